"""The digits world: the same formats around real scans, dealt into disjoint parts."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from clipgap_ray.errors import ConfigError
from clipgap_ray.world import Unit, class_names, digits, evaluation_sets, preset, render, units

SPEC = replace(preset("tiny", kind="digits", rows=400, seed=5), reference_rows=120, leak_rate=0.03)


def images(tar: bytes) -> list[bytes]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return [archive.extractfile(info).read() for info in archive if info.name.endswith(".jpg")]


@pytest.fixture(scope="module")
def rendered() -> tuple[dict[str, bytes], list[dict]]:
    parts = [render(SPEC, unit) for unit in units(SPEC)]
    files = {path: content for part in parts for path, content in part.files.items()}
    return files, pa.concat_tables([part.truth for part in parts]).to_pylist()


def test_scans_are_dealt_once() -> None:
    parts = digits.scan_parts(SPEC.seed)
    dealt = np.concatenate(list(parts.values()))
    assert sorted(dealt) == list(range(1_797))
    assert not np.array_equal(parts["test"], digits.scan_parts(6)["test"])


def test_no_scan_is_in_two_of_pool_reference_and_tests() -> None:
    small = preset("small", kind="digits", seed=5)
    shown = {
        "pool": {digits.scan_of(small, "pool", row) for row in range(2_000)} - {-1},
        "reference": {digits.scan_of(small, "reference", row) for row in range(small.reference_rows)},
        "test": {digits.scan_of(small, name, row) for name in evaluation_sets(small) for row in range(500)},
    }
    assert {name: len(scans) for name, scans in shown.items() if name != "pool"} == {"reference": 449, "test": 500}
    assert len(shown["pool"]) > 700
    assert not shown["pool"] & shown["reference"]
    assert not shown["pool"] & shown["test"]
    assert not shown["reference"] & shown["test"]


def test_labels_are_those_of_the_scans() -> None:
    from sklearn.datasets import load_digits

    target = load_digits().target
    for name in ("pool", "reference", "val", "rotated"):
        for row in range(60):
            scan, facts, _ = digits._sample(SPEC, name, row)
            assert facts.label == (target[scan] if scan >= 0 else -1)
            assert facts.class_name == (class_names(SPEC)[facts.label] if scan >= 0 else "")


def test_layout_and_truth(rendered: tuple[dict[str, bytes], list[dict]]) -> None:
    files, truth = rendered
    assert {path.split("/")[0] for path in files} == {"pool", "reference", "tests"}
    assert {path.split("/")[1] for path in files if path.startswith("tests/")} == set(evaluation_sets(SPEC))
    assert files["tests/val/classnames.txt"].decode().splitlines()[:3] == ["zero", "one", "two"]
    for name, rows in (("reference", 120), ("val", 300), ("rotated", 300), ("pool", 400)):
        of_set = [row for row in truth if row["set"] == name]
        assert len(of_set) == rows
        assert {row["label"] for row in of_set} - {-1} == set(range(10))
    styles = {
        name: {row["style"] for row in truth if row["set"] == name} for name in ("reference", *evaluation_sets(SPEC))
    }
    assert styles == {
        "reference": {"plain"}, "val": {"plain"}, "inverted": {"inverted"}, "outlined": {"outlined"},
        "rotated": {"rotated"},
    }  # fmt: skip
    pool_styles = {row["style"] for row in truth if row["set"] == "pool"}
    assert pool_styles == {"plain", "inverted", "outlined", "rotated", "abstract"}


def test_leaks_and_duplicates_have_equal_bytes(rendered: tuple[dict[str, bytes], list[dict]]) -> None:
    files, truth = rendered
    loaded = {path: images(tar) for path, tar in files.items() if path.endswith(".tar")}
    at = {(row["set"], row["key"]): loaded[row["shard"]][row["row"]] for row in truth}
    pool = [row for row in truth if row["set"] == "pool"]
    leaks = [row for row in pool if row["leak_kind"]]
    assert len(leaks) == 4 * 9
    for row in leaks:
        equal = at["pool", row["key"]] == at[row["leak_of_set"], row["leak_of_key"]]
        assert equal == (row["leak_kind"] == "exact")
    sources = {row["duplicate_group"]: row["key"] for row in pool if row["duplicate_kind"] == "source"}
    copies = [row for row in pool if row["duplicate_kind"] == "exact"]
    assert len(copies) == 12
    assert all(at["pool", row["key"]] == at["pool", sources[row["duplicate_group"]]] for row in copies)


def test_captions_name_the_digit(rendered: tuple[dict[str, bytes], list[dict]]) -> None:
    kinds = set()
    for row in rendered[1]:
        if row["set"] != "pool":
            continue
        kinds.add(row["caption_kind"])
        named = {name for name in class_names(SPEC) if name in row["caption"].replace(",", "").split()}
        expected = {"names_class": {row["class_name"]}, "no_class": set(), "off_topic": set()}
        if row["caption_kind"] == "wrong":
            assert len(named - {row["class_name"]}) == 1 == len(named)
        else:
            assert named == expected[row["caption_kind"]]
    assert kinds == {"names_class", "no_class", "wrong", "off_topic"}


def test_styles_look_like_their_names() -> None:
    def brightness(name: str) -> float:
        tar = render(SPEC, Unit("test", name, 0)).files[f"tests/{name}/test/0.tar"]
        return float(np.mean([np.asarray(Image.open(io.BytesIO(image)).convert("L")).mean() for image in images(tar)]))

    assert brightness("inverted") < 80
    assert brightness("val") > 140
    assert brightness("outlined") > 140


def test_same_seed_same_bytes(rendered: tuple[dict[str, bytes], list[dict]]) -> None:
    again = render(SPEC, Unit("pool", "pool", 3)).files["pool/00003.tar"]
    assert hashlib.sha256(again).digest() == hashlib.sha256(rendered[0]["pool/00003.tar"]).digest()
    assert render(replace(SPEC, seed=6), Unit("pool", "pool", 3)).files["pool/00003.tar"] != again


def test_faults_are_planted_as_in_the_miniature_world() -> None:
    spec = replace(SPEC, faults=True)
    faults = {
        row["fault"] for unit in units(spec) if unit.kind == "pool" for row in render(spec, unit).truth.to_pylist()
    }
    assert {"broken_image", "missing_caption", "repeated_uid", "truncated_shard", "empty_shard"} <= faults


def test_missing_scikit_learn_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    digits._scans.cache_clear()
    digits.scan_parts.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install clipgap-ray\[digits\]"):
        units(SPEC)


def test_correlation_is_refused_without_backgrounds() -> None:
    with pytest.raises(ConfigError, match=r"correlation is 0\.5, but a digits world has no backgrounds"):
        preset("tiny", kind="digits", correlation=0.5)
