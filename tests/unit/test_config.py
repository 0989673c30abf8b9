"""Settings refuse what they do not know, name the nearest key, and tell what changes the output."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import pytest

from clipgap_ray import config
from clipgap_ray.config.base import Operational, Settings, read_yaml
from clipgap_ray.config.dedup import DedupSettings
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.config.split import GapMatch, Near, Random
from clipgap_ray.config.train import EvaluateSettings, TrainSettings
from clipgap_ray.config.world import WorldSettings
from clipgap_ray.errors import ConfigError

TRAIN = {"source": "s", "out": "o", "model": "m"}
EMBED = {"source": "pool", "out": "emb", "model": "projection"}


def all_settings() -> list[type[Settings]]:
    modules = [importlib.import_module(f"clipgap_ray.config.{m.name}") for m in pkgutil.iter_modules(config.__path__)]
    found = {c for m in modules for _, c in inspect.getmembers(m, inspect.isclass) if issubclass(c, Settings)}
    return sorted(found - {Settings}, key=lambda c: c.__name__)


@pytest.mark.parametrize("settings", all_settings(), ids=lambda c: c.__name__)
def test_every_field_has_its_help_text(settings: type[Settings]) -> None:
    assert [name for name, field in settings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({**EMBED, "modle": "x"}, ["study.yaml: embed: unknown setting 'modle'", "did you mean 'model'?"]),
        ({**EMBED, "zzz": "x"}, ["unknown setting 'zzz'", "known keys: also, batch_size, blocklist, crop_border"]),
        ({"source": "pool", "out": "emb"}, ["setting 'model' is required"]),
        ({**EMBED, "batch_size": 0}, ["batch_size is 0", "greater than 0"]),
        ({**EMBED, "device": "tpu"}, ["device is 'tpu'", "'cuda'"]),
        ({**EMBED, "shards": "3"}, ["--shards '3' is not FIRST:END"]),
    ],
)
def test_wrong_values_are_explained_in_one_line(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        EmbedSettings.load(values, "study.yaml: embed")
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_defaults_hold_what_the_documents_promise() -> None:
    assert DedupSettings.load({"pool": "p", "out": "o"}, "").min_similarity == 0.876
    assert GapMatch.load({"scores": "s", "out": "a.npy", "test": ["t"]}, "").slack == 0.0
    assert WorldSettings.load({"out": "w"}, "").preset == "tiny"


def test_only_fields_that_change_the_output_are_in_the_fingerprint() -> None:
    one = EmbedSettings(**EMBED, workers=1, device="cpu", max_skip_fraction=0.5)  # type: ignore[arg-type]
    other = EmbedSettings(**EMBED, workers=7, device="auto")  # type: ignore[arg-type]
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() != EmbedSettings(**EMBED, batch_size=64).fingerprint()  # type: ignore[arg-type]
    assert "batch_size" in one.fingerprint()
    assert "workers" not in one.fingerprint()


def test_the_training_run_remembers_its_workers_but_not_its_device() -> None:
    names = {n for n, f in TrainSettings.model_fields.items() if any(isinstance(m, Operational) for m in f.metadata)}
    assert {"device", "samples", "checkpoint_every", "decoders", "min_workers"} <= names
    assert not names & {"workers", "batch_size", "accum_freq", "lr", "seed", "window", "precision", "siglip"}


def test_a_setting_younger_than_a_directory_is_remembered_only_when_it_is_used() -> None:
    old = TrainSettings(source="s", out="o", model="m")
    assert "accum_freq" not in old.fingerprint()
    assert old.model_copy(update={"accum_freq": 4}).fingerprint() == {**old.fingerprint(), "accum_freq": 4}


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        EmbedSettings(**EMBED).model = "other"  # type: ignore[arg-type,misc]


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (EmbedSettings, {**EMBED, "also": ["x"]}, r"--also 'x' is not FOLDER=MODEL,WEIGHTS"),
        (EmbedSettings, {**EMBED, "also": [EMBED["out"] + "/=projection"]}, "name the folder .* twice"),
        (EmbedSettings, {**EMBED, "decode": "fast", "crop_border": 2}, "--decode fast with --crop-border 2"),
        (ScoreSettings, {"pool": "p", "out": "o", "test": []}, "names no test set"),
        (ScoreSettings, {"pool": "p", "out": "o", "test": ["val"]}, "is not NAME=PATH"),
        (ScoreSettings, {"pool": "p", "out": "o", "test": ["a=x", "a=y"]}, "names 'a' twice"),
        (EvaluateSettings, {"model": "m", "pretrained": "p", "out": "o", "test": ["Val=x"]}, "does not match"),
        (Near, {"scores": "s", "out": "near.txt", "test": ["t"], "size": "1"}, "does not end in .npy"),
        (Random, {"scores": "s", "out": "r.npy"}, "one of --size"),
        (Random, {"scores": "s", "out": "r.npy", "size": "1", "match": "m.npy"}, "one of --size"),
        (TrainSettings, {"source": "s", "out": "o", "model": "m", "objective": "mae"}, "objective is 'mae'"),
        (TrainSettings, {**TRAIN, "workers": 4, "min_workers": 3}, "4 forward passes per step do not divide among 3"),
        (TrainSettings, {**TRAIN, "workers": 2, "min_workers": 3}, "is more than --workers 2"),
        (TrainSettings, {**TRAIN, "objective": "supervised", "siglip": True}, "--siglip is a loss on pairs"),
        (TrainSettings, {**TRAIN, "train_data_upsampling_factors": "1"}, "is for --dataset-resampled"),
        (TrainSettings, {**TRAIN, "train_data_upsampling_factors": "1::2", "dataset_resampled": True},
         "expected 1 positive numbers joined by '::', one for each of s"),
        (TrainSettings, {**TRAIN, "force_patch_dropout": 1.0}, "less than 1"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_before_any_work(
    settings: type[Settings], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load(values, "here")


def test_yaml_mappings(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("embed: {model: projection}\n")
    assert read_yaml(str(tmp_path / "a.yaml")) == {"embed": {"model": "projection"}}
    (tmp_path / "b.yaml").write_text("- a\n")
    (tmp_path / "c.yaml").write_text("a: [\n")
    for name, message in (("b", "holds list, expected a mapping"), ("c", "is not YAML"), ("d", "does not exist")):
        with pytest.raises(ConfigError, match=message):
            read_yaml(str(tmp_path / f"{name}.yaml"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"gpus_per_worker": 1.5}, "gpus_per_worker is 1.5; Ray shares one GPU or gives whole ones"),
        ({"workers": 2, "min_workers": 3}, "min_workers is 3, more than workers, 2"),
    ],
)
def test_impossible_encoder_pools_are_refused(words: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EmbedSettings.load({"source": "a", "out": "b", "model": "projection", **words}, "embed")


def test_encoders_may_share_a_gpu() -> None:
    assert EmbedSettings(source="a", out="b", model="projection", gpus_per_worker=0.5).gpus_per_worker == 0.5
