"""Zero-shot labels of backgrounds: right where the encoder is sure, abstaining where it is not, corrected by people."""

import csv

import numpy as np
import pytest
import yaml

from clipgap_ray import schema, store
from clipgap_ray.config.groups import AttributesSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.errors import ConfigError, DataError, IndexMismatchError
from clipgap_ray.kernels import attributes as kernel
from clipgap_ray.stages import attributes
from tests import made

NAMES = ("grass", "snow", "water")
DIM, ROWS = 32, 60


class Knows:
    """An encoder whose prompts lie where the backgrounds of the images lie, each prompt with its own noise."""

    dim = DIM

    def __init__(self, settings) -> None:
        self.fingerprint = {"dim": DIM, "model": "by hand"}

    def encode_texts(self, texts):
        rng = np.random.default_rng(1)
        at = [next(i for i, name in enumerate(NAMES) if name in text) for text in texts]
        rows = np.eye(DIM)[at] + 0.1 * rng.normal(size=(len(at), DIM))
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


@pytest.fixture
def world(tmp_path, monkeypatch) -> tuple[EmbeddingSet, list[str]]:
    """Two parts of images; the last ten lie between two backgrounds. Folders name the truth."""
    monkeypatch.setattr(EncoderSettings, "build", lambda settings: Knows(settings))
    rng = np.random.default_rng(0)
    truth = [NAMES[i % 3] for i in range(ROWS)]
    rows = np.stack([np.eye(DIM)[NAMES.index(name)] for name in truth]) + 0.05 * rng.normal(size=(ROWS, DIM))
    rows[-10:] += np.stack([np.eye(DIM)[(NAMES.index(name) + 1) % 3] for name in truth[-10:]])
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    uids = [f"{i:032x}" for i in range(ROWS)]
    halves = (slice(0, 40), slice(40, ROWS))
    embeddings = made.write_embeddings(
        str(tmp_path / "emb"), [rows[h] for h in halves], [uids[h] for h in halves],
        shard=[[f"1 fox/common-{name}" for name in truth[h]] for h in halves],
        image_path=[[f"{uid}.jpg" for uid in uids[h]] for h in halves],
    )  # fmt: skip
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump({name: [f"on {name}", f"in the {name}"] for name in NAMES}))
    return embeddings, truth


def run(tmp_path, **more) -> dict:
    words = {"embeddings": str(tmp_path / "emb"), "out": str(tmp_path / "out"), "margin": 0.15,
             "prompts": str(tmp_path / "prompts.yaml"), "given": "folder"}  # fmt: skip
    settings = AttributesSettings(**{**words, **more})
    attributes.run(settings).check()
    return store.read_json(f"{settings.out}/attributes.json")


def test_sure_images_are_labelled_and_the_others_abstain(world, tmp_path) -> None:
    _, truth = world
    result = run(tmp_path)
    table = [store.read_table(str(tmp_path / "out" / "labels" / f"part-0000{i}.parquet")) for i in (0, 1)]
    assert all(part.schema.equals(schema.ATTRIBUTES) for part in table)
    labels = [label for part in table for label in part.column("attribute").to_pylist()]
    assert labels[:-10] == truth[:-10]
    assert labels[-10:].count(None) >= 8
    assert sum(result["counts"].values()) + result["num_abstained"] == ROWS
    agree = result["agreement"]
    assert agree["agree"]["count"] >= agree["agree"]["of"] - 2
    assert agree["kappa"] > 0.9
    read = attributes.read_labels(str(tmp_path / "out"))
    assert len(read) == ROWS - result["num_abstained"]


def test_corrections_win_and_the_form_lists_the_least_certain(world, tmp_path) -> None:
    run(tmp_path, check=10)
    with open(tmp_path / "out" / "to_check.csv") as file:
        form = list(csv.DictReader(file))
    assert {int(row["uid"], 16) for row in form} == set(range(ROWS - 10, ROWS))
    (tmp_path / "fixed.csv").write_text("uid,attribute\n" + "".join(f"{row['uid']},snow\n" for row in form[:4]))
    run(tmp_path, out=str(tmp_path / "out2"), corrections=str(tmp_path / "fixed.csv"))
    labels = attributes.read_labels(str(tmp_path / "out2"))
    assert all(labels[row["uid"]] == "snow" for row in form[:4])
    (tmp_path / "fixed.csv").write_text("uid,attribute\n0,lava\n")
    with pytest.raises(ConfigError, match="corrects to"):
        run(tmp_path, corrections=str(tmp_path / "fixed.csv"))


def test_a_second_run_labels_nothing_again_and_other_settings_are_refused(world, tmp_path, monkeypatch) -> None:
    run(tmp_path)
    before = made.stamps_below(str(tmp_path / "out" / "labels"))
    monkeypatch.setattr(attributes, "_encoder", lambda *_: pytest.fail("nothing is left to label"))
    run(tmp_path)
    assert made.stamps_below(str(tmp_path / "out" / "labels")) == before


def test_bad_input_is_named(world, tmp_path, monkeypatch) -> None:
    (tmp_path / "one.yaml").write_text("grass: on grass\n")
    with pytest.raises(ConfigError, match="names 1 attributes"):
        run(tmp_path, prompts=str(tmp_path / "one.yaml"))
    (tmp_path / "one.yaml").write_text("grass: 3\nsnow: x\n")
    with pytest.raises(ConfigError, match="grass is 3"):
        run(tmp_path, prompts=str(tmp_path / "one.yaml"))
    with pytest.raises(DataError, match=r"no image of .* has a known label"):
        run(tmp_path, given="group", out=str(tmp_path / "o1"))
    monkeypatch.setattr(Knows, "__init__", lambda self, settings: setattr(self, "fingerprint", {"model": "other"}))
    with pytest.raises(IndexMismatchError, match="other"):
        run(tmp_path, out=str(tmp_path / "o2"))


def test_the_built_in_backgrounds_are_the_paper_s() -> None:
    prompts = attributes.read_prompts("backgrounds")
    words = "ground water earth sand snow grass human sky road rock shrub indoor tree outdoor"  # counteranimal.md 2
    assert set(prompts) == set(words.split())


def test_label_by_hand() -> None:
    weights = kernel.prompt_weights(np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 0, 1]], np.float32), [2, 1])
    assert weights[0] == pytest.approx(np.array([1.6, 0.8, 0]) / np.hypot(1.6, 0.8))
    found = kernel.label(np.array([[0, 0, 1], [1, 0, 0.9]], np.float16), weights, 0.2)
    assert found.label.tolist() == [1, kernel.ABSTAINED]
    assert found.best.tolist() == [1, 1]
    assert found.margin == pytest.approx([1.0, 0.9 - 1.6 / np.hypot(1.6, 0.8)], abs=1e-3)
    assert len(kernel.label(np.zeros((0, 3), np.float16), weights, 0.2).label) == 0


def test_agreement_by_hand() -> None:
    found = kernel.agreement(["a", "a", "b", "b", "c", "a"], ["a", "b", "b", None, "a", "a"], ["a", "b"])
    assert (found["num_unknown"], found["unknown"], found["num_abstained"]) == (1, ["c"], 1)
    assert (found["agree"]["count"], found["agree"]["of"]) == (3, 4)
    # Observed 3/4; by chance 3/4 * 1/2 + 1/4 * 1/2 = 1/2.
    assert found["kappa"] == pytest.approx(0.5)
    assert {"given": "b", "found": "", "count": 1} in found["confusion"]
