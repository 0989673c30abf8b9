"""What `plan` predicts for an embed job, beside what the job leaves; no Ray, nothing written."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from clipgap_ray import cli
from clipgap_ray.config.embed import PlanSettings
from clipgap_ray.config.limits import LimitsSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.stages import plan
from clipgap_ray.testsets import is_test_set
from tests import made


def predict(source: str, **more: object) -> dict[str, object]:
    return plan.run(PlanSettings(source=source, model="projection", device="cpu", **more))  # type: ignore[arg-type]


def test_rows_and_bytes_are_those_of_the_job(
    tiny_world: made.World, tiny_embeddings: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    pool = EmbeddingSet.open(tiny_embeddings["pool"])
    with caplog.at_level(logging.INFO, logger="clipgap"):
        predicted = predict(tiny_world.path("pool"), probe_rows=600)
    assert predicted["rows"] == pytest.approx(pool.num_rows, rel=0.2)  # two of 11 shards are cut or empty
    rows = pool.all_metadata(["image_bytes"]).column("image_bytes").to_numpy()
    assert predicted["input_bytes"] == pytest.approx(rows.sum(), rel=0.2)
    files = [path for kind in ("img_emb", "text_emb", "metadata") for path in Path(pool.uri, kind).iterdir()]
    overhead = 11 * (2 * 128 + 4000)  # headers and footers, which a plan for millions of rows leaves out
    written = sum(path.stat().st_size for path in files)
    assert predicted["output_bytes"] == pytest.approx(written - overhead, rel=0.35)
    assert predicted["shards"] == 11
    for word in ("11 shards", "GB of images", "images/s", " cores ("):
        assert word in caplog.text


def test_time_adds_up_from_the_probe(tiny_world: made.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By clocks that stand still but for what is stated: 10 ms to read a chunk's image, 40 ms to encode a row."""
    clock = {"cpu": 0.0}
    original = plan.read_chunks

    def reading(work: object, how: object) -> object:
        for table in original(work, how):  # type: ignore[arg-type]
            clock["cpu"] += 0.010 * table.column("images")[0].as_py()
            yield table

    monkeypatch.setattr(plan, "read_chunks", reading)
    monkeypatch.setattr(plan.time, "process_time", lambda: clock["cpu"])
    monkeypatch.setattr(plan.budget, "probe", lambda encoder, text: 0.040)
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 5)
    predicted = predict(tiny_world.path("pool"), shards="0:2")
    assert predicted["read_ms_per_image"] == pytest.approx(10)
    assert predicted["images_per_s"] == pytest.approx(5 / 0.050, rel=1e-2)
    rows = predicted["rows"] / (1 - predicted["skipped_share"])  # type: ignore[operator]
    assert predicted["seconds"] == pytest.approx(rows * 0.050 / 5, rel=0.02)
    half = predict(tiny_world.path("pool"), shards="0:2", sample=0.5)
    assert half["seconds"] == pytest.approx(predicted["seconds"] / 2, rel=0.1)  # type: ignore[operator]
    prices = tmp_path / "prices.yaml"
    prices.write_text("per_hour: {CPU: 0.36, node:__internal_head__: 0.3}\ncurrency: EUR\n")
    more = predict(tiny_world.path("pool"), shards="0:2", cores=20, limits={"prices": str(prices)})
    assert more["seconds"] == pytest.approx(predicted["seconds"] / 4, rel=0.01)  # type: ignore[operator]
    assert more["cost"]["per_hour"] == pytest.approx(7.5)  # type: ignore[index]
    assert more["cost"]["amount"] == pytest.approx(more["seconds"] * 7.5 / 3600, abs=1e-4)  # type: ignore[index, operator]
    assert predicted["cost"] is None


@pytest.mark.parametrize(
    ("device", "devices", "expected"), [("cpu", 0, 0.030 / 4), ("cuda", 1, 0.010), ("cuda", 4, 0.020 / 4)]
)
def test_cores_and_gpus_work_at_once(device: str, devices: int, expected: float) -> None:
    assert plan._seconds_per_row(0.020, 0.010, device, devices, 4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("limits", "seconds", "amount", "starts"),
    [
        ({}, 9e9, 9e9, 1),
        ({"max_hours": 2}, 7200, 0.0, 1),
        ({"max_hours": 2}, 7201, 0.0, 2),
        ({"max_hours": 2, "max_cost": 1.0, "prices": "p.yaml"}, 7201, 4.5, 5),
        ({"max_hours": 2}, 0, 0.0, 1),
    ],
)
def test_limits_say_how_often_to_start(limits: dict[str, object], seconds: float, amount: float, starts: int) -> None:
    assert plan._starts(LimitsSettings.model_validate(limits), seconds, {"amount": amount}) == starts


def test_a_plan_over_its_limit_says_so(tiny_world: made.World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="clipgap"):
        predicted = predict(tiny_world.path("pool"), limits={"max_hours": 1e-6})
    assert predicted["starts"] > 1  # type: ignore[operator]
    assert "stop it before its end" in caplog.text


def test_several_encoders_cost_their_sum_on_disk(tiny_world: made.World, tmp_path: Path) -> None:
    source, out = tiny_world.path("tests/val"), str(tmp_path / "out")
    assert is_test_set(source)
    one = predict(source, out=out)
    two = predict(source, out=out, also=(f"{tmp_path}/other=projection",))
    assert two["output_bytes"] == pytest.approx(2 * one["output_bytes"], rel=1e-3)  # type: ignore[operator]
    assert two["rows"] == one["rows"]
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_it_and_exits_with_0(tiny_world: made.World, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_world.path("pool", "00000.tar")
    assert cli.main(["plan", source, "--model", "projection", "--device", "cpu", "--probe-rows", "20"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["shards"] == 1
    assert 20 <= printed["probed_rows"] <= 64


def test_what_embed_would_refuse_is_refused(tiny_world: made.World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown model"):
        plan.run(PlanSettings(source=tiny_world.path("pool"), model="ViT-B-23", pretrained="x"))
    noise = np.random.default_rng(0).bytes(300)
    made.tar_shard(tmp_path / "pool" / "0.tar", [(f"{n}.jpg", noise) for n in range(5)])
    with pytest.raises(DataError, match="none of the first 5 samples"):
        predict(str(tmp_path / "pool"))
