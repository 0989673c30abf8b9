"""Every prediction is kept, numbers follow from them, finished sets are not evaluated again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clipgap_ray import rundir, schema, store
from clipgap_ray.config.train import EvaluateSettings
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.errors import ConfigError, DataError, StaleOutputError
from clipgap_ray.stages import evaluate
from clipgap_ray.testsets import open_test_set
from tests import made

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def settings(world: made.World, out: Path, *tests: str, **more: object) -> EvaluateSettings:
    words = tuple(
        f"{name}={world.path('tests', name) if name != 'counter' else world.path('counteranimal')}" for name in tests
    )
    base = {"model": "conv-64-test", "pretrained": "random", "test": words, "out": str(out), "batch_size": 16}
    return EvaluateSettings(**{**base, **more})  # type: ignore[arg-type]


def test_predictions_metrics_and_lines(tiny_world: made.World, tmp_path: Path) -> None:
    summary = evaluate.run(settings(tiny_world, tmp_path / "e", "val", "counter"))
    assert (summary.read, summary.kept, summary.dropped) == (48 + len(tiny_world.of("counteranimal")),) * 2 + ({},)
    encoder = EncoderSettings("conv-64-test", "random", batch_size=16).build()
    for name, place in (("val", "tests/val"), ("counter", "counteranimal")):
        table = store.read_table(str(tmp_path / "e" / f"{name}.parquet"))
        assert table.schema == schema.PREDICTIONS
        rows = table.to_pylist()
        test_set = open_test_set(tiny_world.path(place))
        truth = [item for shard in test_set.shards for item in test_set.read(shard)]
        assert [(r["uid"], r["label"], r["group"], r["class_name"]) for r in rows] == [
            (s.uid, s.label, s.group, s.class_name) for s in truth]  # fmt: skip
        assert [r["row"] for r in rows] == list(range(len(truth)))
        # slow twin: one prompt ensemble, one image after the other
        weights = []
        for class_name in test_set.class_names:
            mean = encoder.encode_texts([t.format(c=class_name) for t in test_set.templates]).mean(axis=0)
            weights.append(mean / np.linalg.norm(mean))
        for row, sample in list(zip(rows, truth, strict=True))[:12]:
            logits = np.stack(weights) @ encoder.encode_images(encoder.preprocess.decode(sample.image)[None])[0]
            assert abs(row["logit"] - logits.max()) < 1e-5
            assert logits[row["prediction"]] > logits.max() - 1e-5
            assert row["top5"][0] == row["prediction"]
            assert len(set(row["top5"])) == 5
        result = store.read_json(str(tmp_path / "e" / f"{name}.json"))
        assert all(r["correct"] == (r["prediction"] == r["label"]) for r in rows)
        assert result["metrics"]["acc1"] == sum(r["correct"] for r in rows) / len(rows)
        assert result["metrics"]["acc5"] == sum(r["label"] in r["top5"] for r in rows) / len(rows)
        assert result["num_samples"] == len(rows)
    lines = [json.loads(line) for line in (tmp_path / "e" / "eval_results.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["counter", "val"]


def test_finished_sets_stay_and_others_join(
    tiny_world: made.World, tmp_path: Path
) -> None:  # fmt: skip
    evaluate.run(settings(tiny_world, tmp_path, "val"))
    before = (tmp_path / "val.parquet").stat().st_mtime_ns
    assert evaluate.run(settings(tiny_world, tmp_path, "val", "r")).kept == 96
    assert (tmp_path / "val.parquet").stat().st_mtime_ns == before
    with pytest.raises(StaleOutputError, match="crop_border was 0, now 2"):
        evaluate.run(settings(tiny_world, tmp_path, "val", crop_border=2))


def test_a_set_whose_commit_is_missing_is_evaluated_again(tiny_world: made.World, tmp_path: Path) -> None:
    """Killed after the files of a set were written and before its record was: the summary must not lose it."""
    evaluate.run(settings(tiny_world, tmp_path, "val"))
    for name in ("manifest.json", "summary.json"):
        (tmp_path / name).unlink()
    for path in (tmp_path / "commits").iterdir():
        path.unlink()
    predictions = (tmp_path / "val.parquet").read_bytes()
    assert evaluate.run(settings(tiny_world, tmp_path, "val")).kept == 48
    assert (tmp_path / "val.parquet").read_bytes() == predictions


def test_broken_images_are_counted_and_an_unreadable_set_is_an_error(tiny_world: made.World, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "test"
    folder.mkdir(parents=True)
    (tmp_path / "set" / "classnames.txt").write_text("a\nb\n")
    good = [("a.cls", b"0"), ("a.jpg", made.jpeg(0))]
    bad = [("b.cls", b"1"), ("b.jpg", b"broken"), ("c.cls", b"7"), ("c.jpg", made.jpeg(1))]
    (folder / "0.tar").write_bytes(made.tar(good + bad))
    words = {"test": (f"x={tmp_path}/set",)}
    summary = evaluate.run(settings(tiny_world, tmp_path / "e", **words))
    assert (summary.read, summary.kept, summary.dropped) == (3, 1, {"broken_image": 1, "bad_label": 1})
    (folder / "0.tar").write_bytes(made.tar(bad))
    with pytest.raises(DataError, match=r"no readable image: skipped \{'broken_image': 1, 'bad_label': 1\}"):
        evaluate.run(settings(tiny_world, tmp_path / "f", **words))
    (tmp_path / "set" / "classnames.txt").unlink()
    with pytest.raises(ConfigError, match="has no class names"):
        evaluate.run(settings(tiny_world, tmp_path / "g", **words))
    with pytest.raises(DataError):
        rundir.read_manifest(str(tmp_path / "f"), "evaluate")
