"""Labelled sets in four layouts: classes, labels, groups, and what is wrong with broken ones."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from clipgap_ray import store
from clipgap_ray.errors import ConfigError
from clipgap_ray.shards import Sample, Skip
from clipgap_ray.testsets import TestSet, is_test_set, open_test_set, with_class_names
from tests import made


def read(test_set: TestSet) -> tuple[list[Sample], list[Skip]]:
    items = [item for shard in test_set.shards for item in test_set.read(shard)]
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Skip)]


def write(root: Path, files: dict[str, bytes | str]) -> str:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return str(root)


def wds_tar(*labels: str, start: int = 0) -> bytes:
    return made.tar(
        [
            m
            for n, label in enumerate(labels, start)
            for m in ((f"s{n}.cls", label.encode()), (f"s{n}.jpg", made.jpeg(n)))
        ]
    )


def test_wds_with_labels_templates_and_shards_in_natural_order(tmp_path: Path) -> None:
    uri = write(tmp_path / "val", {
        "classnames.txt": "cat\ndog\n", "zeroshot_classification_templates.txt": "a {c}.\nthe {c}\n",
        "test/nshards.txt": "3", "test/10.tar": wds_tar("1", start=3), "test/2.tar": wds_tar("0", start=2),
        "test/0.tar": wds_tar("0", "1"),
    })  # fmt: skip
    assert is_test_set(uri)
    test_set = open_test_set(uri)
    assert (test_set.layout, test_set.class_names, test_set.templates) == ("wds", ("cat", "dog"), ("a {c}.", "the {c}"))
    assert [shard.name for shard in test_set.shards] == ["test/0.tar", "test/2.tar", "test/10.tar"]
    samples, skips = read(test_set)
    assert [(s.key, s.label, s.class_name, s.caption) for s in samples] == [
        ("s0", 0, "cat", "a cat."), ("s1", 1, "dog", "a dog."), ("s2", 0, "cat", "a cat."), ("s3", 1, "dog", "a dog."),
    ]  # fmt: skip
    assert all(s.notes == () for s in samples)  # a caption from the template is not a missing one
    assert skips == []
    assert len({s.uid for s in samples}) == 4


def test_labels_out_of_range_are_skipped_with_a_reason(tmp_path: Path) -> None:
    uri = write(tmp_path, {"classnames.txt": "cat\ndog\n", "test/0.tar": wds_tar("0", "2", "-1", "1")})
    samples, skips = read(open_test_set(uri))
    assert [s.label for s in samples] == [0, 1]
    assert [(s.key, s.reason, s.is_sample) for s in skips] == [("s1", "bad_label", True), ("s2", "bad_label", True)]
    assert skips[0].detail == "label 2 is outside the 2 class names"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"test/0.tar": wds_tar("0")}, "classnames.txt"),
        ({"0 cat/common-snow/a.jpg": made.jpeg(0)}, "imagenet_names.txt"),
        ({"0 cat/a.jpg": made.jpeg(0), "imagenet_names.txt": "0\tcat"}, "none of common-<background>"),
        ({"readme.md": "x"}, "is no test set"),
        ({"classnames.txt": "a\n", "test/0.tar": wds_tar("0"), "zeroshot_classification_templates.txt": "a photo"}, "has no {c}"),  # noqa: E501
    ],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path: Path, files: dict[str, bytes | str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        open_test_set(write(tmp_path / "set", files))
    assert message in str(error.value)
    with pytest.raises(ConfigError, match="does not exist"):
        open_test_set(str(tmp_path / "nothing"))


def test_counteranimal_s_tree_with_stray_files(tmp_path: Path) -> None:
    uri = write(tmp_path / "counter", {
        "imagenet_names.txt": "0\tcat\n1\tice bear\n2\tunused\n",
        "1 ice bear/common-snow/b.jpg": made.jpeg(0), "1 ice bear/common-snow/a.JPEG": made.jpeg(1),
        "1 ice bear/counter-grass/c.jpg": made.jpeg(2), "0 cat/counter-snow/c.jpg": made.jpeg(3),
        "1 ice bear/.DS_Store": "x", "1 ice bear/notes/x.jpg": made.jpeg(4), ".DS_Store": "x", "__MACOSX/x.jpg": "x",
        "1 ice bear/common-snow/list.txt.bak": "x", "0 cat/counter-snow/photo.jfif": made.jpeg(5),
    })  # fmt: skip
    assert is_test_set(uri)
    test_set = open_test_set(uri)
    assert (test_set.layout, test_set.class_names) == ("counteranimal", ("cat", "ice bear", "unused"))
    samples, skips = read(test_set)
    assert [(s.key, s.label, s.class_name, s.group, s.caption) for s in samples] == [
        ("0 cat/counter-snow/c.jpg", 0, "cat", "counter", "A photo of cat."),
        ("0 cat/counter-snow/photo.jfif", 0, "cat", "counter", "A photo of cat."),  # by its content
        ("1 ice bear/common-snow/a.JPEG", 1, "ice bear", "common", "A photo of ice bear."),
        ("1 ice bear/common-snow/b.jpg", 1, "ice bear", "common", "A photo of ice bear."),
        ("1 ice bear/counter-grass/c.jpg", 1, "ice bear", "counter", "A photo of ice bear."),
    ]
    assert [(s.key, s.reason, s.is_sample) for s in skips] == [
        ("1 ice bear/common-snow/list.txt.bak", "not_an_image", False)
    ]
    assert len({s.uid for s in samples}) == 5


def test_one_folder_per_class(tmp_path: Path) -> None:
    uri = write(tmp_path / "set", {
        "zebra/1.jpg": made.jpeg(0), "ant/2.png": made.jpeg(1), "ant/1.jpg": made.jpeg(2), "docs/readme.md": "x",
    })  # fmt: skip
    test_set = open_test_set(uri)
    assert (test_set.layout, test_set.class_names) == ("folder", ("ant", "zebra"))
    samples, _ = read(test_set)
    assert [(s.key, s.label, s.caption) for s in samples] == [
        ("ant/1.jpg", 0, "a photo of a ant."), ("ant/2.png", 0, "a photo of a ant."),
        ("zebra/1.jpg", 1, "a photo of a zebra."),
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_manifests_with_relative_and_absolute_paths(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, {"images/a.jpg": made.jpeg(0), "b.jpg": made.jpeg(1)})
    rows = {
        "path": ["images/a.jpg", str(tmp_path / "b.jpg"), "gone.jpg"],
        "class_name": ["dog", "cat", "cat"],
        "group": ["common", "counter", "common"],
    }
    uri = str(tmp_path / f"manifest.{suffix}")
    if suffix == "csv":
        lines = [",".join(rows), *(",".join(row) for row in zip(*rows.values(), strict=True))]
        store.write_bytes(uri, "\n".join(lines).encode())
    else:
        store.write_table(uri, pa.table(rows))
    test_set = open_test_set(uri)
    assert test_set.class_names == ("cat", "dog")
    samples, skips = read(test_set)
    assert [(s.image, s.label, s.class_name, s.group) for s in samples] == [
        (made.jpeg(0), 1, "dog", "common"), (made.jpeg(1), 0, "cat", "counter"),
    ]  # fmt: skip
    assert [(s.key, s.reason) for s in skips] == [("gone.jpg", "no_image")]


def test_a_manifest_without_its_columns_names_them(tmp_path: Path) -> None:
    uri = write(tmp_path, {"m.csv": "file,class\nx,y\n"}) + "/m.csv"
    with pytest.raises(ConfigError, match=r"lacks the columns \['class_name', 'path'\]"):
        open_test_set(uri)


def test_a_plain_pool_is_no_test_set(tmp_path: Path) -> None:
    uri = write(tmp_path / "pool", {"00000.tar": made.tar([]), "00001.tar": made.tar([])})
    assert not is_test_set(uri)
    for form in (f"{uri}/*.tar", f"{uri}/{{00000..00001}}.tar", f"{uri}::{uri}", f"@{uri}/x.txt", f"{uri}/00000.tar"):
        assert not is_test_set(form)


def test_the_world_s_sets_say_what_the_truth_says(tiny_world: made.World) -> None:
    for name, place in (("val", "tests/val"), ("reference", "reference"), ("counteranimal", "counteranimal")):
        samples, skips = read(open_test_set(tiny_world.path(place)))
        truth = {row["key"]: row for row in tiny_world.of(name)}
        assert skips == []
        assert {s.key for s in samples} == set(truth)
        for sample in samples:
            row = truth[sample.key]
            assert (sample.label, sample.class_name, sample.group) == (row["label"], row["class_name"], row["group"])


# --- label spaces ----------------------------------------------------------------------------------------


def test_an_own_list_of_names_renames_or_relabels(tmp_path: Path) -> None:
    folder = open_test_set(write(tmp_path / "f", {"n01/1.jpg": made.jpeg(0), "n02/1.jpg": made.jpeg(1)}))
    assert with_class_names(folder, ("cat", "dog"), "x").class_names == ("cat", "dog")  # by position: synset folders
    wide = with_class_names(folder, ("bird", "n02", "n01"), "x")
    assert wide.labels == {"n01": 2, "n02": 1}
    assert [s.class_name for s in read(wide)[0]] == ["n01", "n02"]
    with pytest.raises(ConfigError, match=r"x has 3 class names, .* has 2 classes, of which the list lacks 'n01'"):
        with_class_names(folder, ("a", "b", "n02"), "x")
    wds = open_test_set(write(tmp_path / "w", {"classnames.txt": "a\nb\n", "test/0.tar": wds_tar("0")}))
    assert with_class_names(wds, ("b", "a"), "x").class_names == ("b", "a")  # labels are numbers: names in their order
    manifest = write(tmp_path / "m", {"m.csv": "path,class_name\na.jpg,cat\n"}) + "/m.csv"
    assert with_class_names(open_test_set(manifest), ("dog", "cat"), "x").class_names == ("dog", "cat")
    with pytest.raises(ConfigError, match="lacks 'cat'"):  # names decide there, so none may be missing
        with_class_names(open_test_set(manifest), ("dog",), "x")
    with pytest.raises(ConfigError, match=r"x has 3 class names, .* has 2 classes"):
        with_class_names(wds, ("a", "b", "c"), "x")


def test_splits_of_a_wds_folder(tmp_path: Path) -> None:
    uri = write(tmp_path, {"classnames.txt": "a\n", "test/0.tar": wds_tar("0"), "train/0.tar": wds_tar("0", "0")})
    counts = {split: len(read(open_test_set(uri, split))[0]) for split in ("", "test", "train")}
    assert counts == {"": 1, "test": 1, "train": 2}
    (tmp_path / "train" / "0.tar").unlink()
    (tmp_path / "train").rmdir()
    with pytest.raises(ConfigError, match="has no train split"):
        open_test_set(uri, "train")
    (tmp_path / "dataset_type.txt").write_text("multilabel\n")
    with pytest.raises(ConfigError, match="is multilabel"):
        open_test_set(uri)
