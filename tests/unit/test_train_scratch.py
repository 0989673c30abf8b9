"""Checkpoints on their way to storage: what a killed worker left goes, what another run has stays."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from clipgap_ray.stages.train_loop import discard_scratch, scratch_prefix


def test_only_the_own_runs_leftovers_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = [Path(tempfile.mkdtemp(prefix=scratch_prefix("/runs/a"))) for _ in range(2)]
    (left[0] / "state.pt").write_bytes(b"half")
    other = Path(tempfile.mkdtemp(prefix=scratch_prefix("/runs/b")))
    discard_scratch("/runs/a")
    assert list(tmp_path.iterdir()) == [other]


def test_nothing_left_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "[none]"))
    discard_scratch("s3://bucket/run")
