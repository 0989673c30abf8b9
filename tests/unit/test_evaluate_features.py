"""Probes and retrieval from files to results, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipgap_ray import store
from clipgap_ray.config.evaluate import EvaluateSettings
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import probe
from clipgap_ray.stages import evaluate_features
from tests import made


def write_set(root: Path, train: int, test: int) -> str:
    """A wds folder of two classes, `train` and `test` images of each."""
    root.mkdir(parents=True)
    (root / "classnames.txt").write_text("cat\ndog\n")
    for split, count, first in (("train", train, 0), ("test", test, 100)):
        members = [
            member
            for i in range(2 * count)
            for member in ((f"{i}.cls", str(i % 2).encode()), (f"{i}.jpg", made.jpeg(first + i)))
        ]
        made.tar_shard(root / split / "0.tar", members)
    return str(root)


def run(tmp_path: Path, uri: str, **more: Any) -> dict[str, Any]:
    values = {"model": "conv-64-test", "pretrained": "random", "test": (f"a={uri}",), "out": str(tmp_path)}
    settings = EvaluateSettings.load({**values, "batch_size": 4, **more}, "test")
    question, train = evaluate_features._open(settings, "a", uri)
    return evaluate_features._evaluate(str(tmp_path), question, train, settings, "cpu")


def test_probes_on_all_images_and_on_few(tmp_path: Path) -> None:
    uri = write_set(tmp_path / "set", 6, 4)
    assert run(tmp_path / "all", uri, task="linear-probe")["kept"] == 8
    result = store.read_json(str(tmp_path / "all" / "a.json"))
    assert (result["task"], result["train_samples"], result["shots"]) == ("linear_probe", 12, None)
    assert result["strength"] in probe.STRENGTHS
    record = run(tmp_path / "few", uri, task="linear-probe", shots=(1, 2))
    assert record["options"] == {"shots": [1, 2], "train": ""}
    curve = store.read_table(str(tmp_path / "few" / "a.fewshot.parquet")).to_pylist()
    assert [(row["k"], row["num_samples"]) for row in curve] == [(1, record["kept"]), (2, record["kept"])]
    assert {f"a-{row['k']}shot": row["acc1"] for row in curve} == record["metrics"]
    for k in (1, 2):
        found = store.read_json(str(tmp_path / "few" / f"a-{k}shot.json"))
        assert (found["train_samples"], found["shots"]) == (2 * k, k)
        rows = store.read_table(str(tmp_path / "few" / f"a-{k}shot.parquet")).to_pylist()
        assert len(rows) == 8
        assert found["metrics"]["acc1"] == np.mean([row["correct"] for row in rows])


def test_the_probe_s_classes_must_be_the_test_set_s(tmp_path: Path) -> None:
    uri = write_set(tmp_path / "set", 2, 2)
    other = write_set(tmp_path / "other", 2, 2)
    (tmp_path / "other" / "classnames.txt").write_text("dog\ncat\n")
    with pytest.raises(ConfigError, match="expected the same names in the same order"):
        run(tmp_path, uri, task="linear-probe", train=(f"a={other}",))
    (tmp_path / "set" / "train" / "0.tar").unlink()
    (tmp_path / "set" / "train").rmdir()
    with pytest.raises(ConfigError, match="has no train split"):
        run(tmp_path, uri, task="linear-probe")


def test_retrieval_takes_every_line_as_a_caption(tmp_path: Path) -> None:
    texts = ["a red thing\na thing that is red", "a blue thing", "", "green"]
    members = [m for i, t in enumerate(texts) for m in ((f"{i}.jpg", made.jpeg(i)), (f"{i}.txt", t.encode()))]
    made.tar_shard(tmp_path / "set" / "0.tar", members)
    record = run(tmp_path / "r", f"{tmp_path}/set", task="retrieval")
    assert (record["read"], record["kept"], record["dropped"]) == (4, 3, {"missing_caption": 1})
    result = store.read_json(str(tmp_path / "r" / "a.json"))
    assert (result["task"], result["num_samples"], result["num_texts"]) == ("zeroshot_retrieval", 3, 4)
    # slow twin
    encoder = EncoderSettings("conv-64-test", "random", batch_size=4).build()
    images = np.stack([encoder.encode_images(encoder.preprocess.decode(made.jpeg(i))[None])[0] for i in (0, 1, 3)])
    lines, owner = ["a red thing", "a thing that is red", "a blue thing", "green"], [0, 0, 1, 2]
    scores = np.stack([encoder.encode_texts([line])[0] for line in lines]) @ images.T
    assert result["metrics"]["image_retrieval_recall@1"] == np.mean(scores.argmax(axis=1) == owner)
    best = np.array(owner)[scores.argmax(axis=0)]
    assert result["metrics"]["text_retrieval_recall@1"] == pytest.approx(np.mean(best == np.arange(3)))
    assert result["metrics"]["text_retrieval_recall@5"] == 1.0
    made.tar_shard(tmp_path / "dumb" / "0.tar", [("0.jpg", made.jpeg(0))])
    with pytest.raises(DataError, match="has no captions"):
        run(tmp_path / "d", f"{tmp_path}/dumb", task="retrieval")
