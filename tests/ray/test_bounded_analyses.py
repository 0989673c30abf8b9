"""Analyses whose passes over a pool become Ray tasks where the pool is large: the same numbers as in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipgap_ray.config.audit import AuditSettings
from clipgap_ray.config.join import AgreementSettings
from clipgap_ray.errors import DataError
from clipgap_ray.stages import agreement, audit, audit_pass, score_pairs, waits
from tests.unit.study_fixture import build_study
from tests.unit.test_agreement_stage import two_runs

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def test_agreement_by_ray_tasks_is_that_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = two_runs(tmp_path, "ties")
    monkeypatch.setattr(score_pairs, "GROUP_ROWS", 200)
    monkeypatch.setattr(score_pairs, "BUCKET_ROWS", 150)
    found = []
    for name, small in (("here", 1 << 30), ("tasks", 0)):
        monkeypatch.setattr(waits, "SMALL_ROWS", small)
        agreement.run(AgreementSettings(scores=scores, out=str(tmp_path / name))).check()
        found.append(json.loads((tmp_path / name / "agreement.json").read_text()))
    assert found[0]["tests"] == found[1]["tests"]
    assert found[0]["uids"] == found[1]["uids"]
    assert any(cut["removed_both"] for cut in found[0]["tests"][0]["pruned"])


def test_an_audit_by_ray_tasks_is_that_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = build_study(tmp_path / "s", pool_rows=200, test_rows=40, num_supervised=0, per_part=30).root / "embed"
    tests = tuple(f"{name}={embed / name}" for name in ("val", "sketch"))
    monkeypatch.setattr(audit_pass, "GROUP_BYTES", 1)  # a part per task
    found = []
    for name, small in (("here", 1 << 30), ("tasks", 0)):
        monkeypatch.setattr(waits, "SMALL_ROWS", small)
        settings = AuditSettings(pool=str(embed / "pool"), test=tests, reference=str(embed / "reference"),
                                 out=str(tmp_path / name), duplicate=0.98, canaries=0, images=False)  # fmt: skip
        audit.run(settings).check()
        found.append(json.loads((tmp_path / name / "audit.json").read_text()))
    for result in found:
        result["settings"].pop("out", None)
    assert found[0] == found[1]
    assert found[0]["tests"][0]["verdict"] == "CONTAMINATED"
    assert (tmp_path / "here" / "tests.csv").read_bytes() == (tmp_path / "tasks" / "tests.csv").read_bytes()


def test_an_error_in_a_task_is_ours_and_leaves_no_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = two_runs(tmp_path, "smooth")
    monkeypatch.setattr(waits, "SMALL_ROWS", 0)
    Path(scores[1], "pool", "dogs", "part-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"part-00001\.parquet does not exist"):
        agreement.run(AgreementSettings(scores=scores, out=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "agreement.json").exists()
