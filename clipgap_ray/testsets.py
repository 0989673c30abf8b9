"""Test sets and references: labelled images with class names, prompts and groups, from four layouts.

* CLIP_benchmark's `wds`: `classnames.txt`, templates, `{test,train}/*.tar` with image + `cls`.
* CounterAnimal's tree: `imagenet_names.txt`, `<idx> <name>/(common|counter)-<background>/*`.
* A tree of images: `<class name>/*`.
* A manifest: csv or parquet with `path, class_name` and optionally `group`.

Embedding and evaluation both read through here, so that uids and row order agree (design 5.3).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from clipgap_ray import store
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.shards import Sample, Skip, read_shard, sample_uid
from clipgap_ray.sources import IMAGE_SUFFIXES, Shard, list_shards, suffix_of

DEFAULT_TEMPLATE = "a photo of a {c}."
GROUP_FOLDER = re.compile(r"(common|counter)-(.+)\Z")
CLASS_FOLDER = re.compile(r"(\d+) (.+)\Z")


@dataclass(frozen=True)
class TestSet:
    """A labelled set of images.

    Attributes:
        uri: Where it is.
        layout: "wds", "counteranimal", "folder", "manifest", or "captions" (pairs without labels, for retrieval).
        class_names: Names by label.
        templates: Prompts with `{c}` for the class name.
        shards: Units of reading, in order.
        labels: Label by shard name, where the folder decides it.
        groups: Group by shard name, likewise.
    """

    __test__ = False  # not a pytest class

    uri: str
    layout: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    shards: tuple[Shard, ...]
    labels: dict[str, int] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)

    def read(self, shard: Shard) -> Iterator[Sample | Skip]:
        """Yield the labelled samples of a shard; the caption is the first template with the class name."""
        if self.layout == "manifest":
            yield from _read_manifest(self)
            return
        if self.layout == "captions":
            yield from read_shard(shard)
            return
        label_of_folder = self.labels.get(shard.name)
        for item in read_shard(shard):
            if isinstance(item, Skip):
                yield item
                continue
            label = item.label if label_of_folder is None else label_of_folder
            if not 0 <= label < len(self.class_names):
                detail = f"label {label} is outside the {len(self.class_names)} class names"
                yield Skip(item.key, "bad_label", detail)
                continue
            yield self._labelled(item, label, self.groups.get(shard.name, ""))
        if shard.kind == "folder" and label_of_folder is not None:
            for item in _odd_files(shard):
                if isinstance(item, Sample):
                    yield self._labelled(item, label_of_folder, self.groups.get(shard.name, ""))
                else:
                    yield item

    def _labelled(self, sample: Sample, label: int, group: str) -> Sample:
        name = self.class_names[label]
        caption = sample.caption or self.templates[0].format(c=name)
        notes = tuple(note for note in sample.notes if note != "missing_caption")
        return replace(sample, label=label, class_name=name, group=group, caption=caption, notes=notes)


# What begins like one of these is an image, whatever its name says.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")


def _odd_files(shard: Shard) -> Iterator[Sample | Skip]:
    """Files of a folder that are not named like images: read where the content is one, else reported.

    A .txt beside an image is its caption; hidden files are a file manager's.
    """
    names = store.list_names(shard.uri)
    stems = {name.rsplit(".", 1)[0] for name in names if suffix_of(name) in IMAGE_SUFFIXES}
    for name in names:
        caption = suffix_of(name) == "txt" and name.rsplit(".", 1)[0] in stems
        if suffix_of(name) in IMAGE_SUFFIXES or caption or name.startswith("."):
            continue
        key = f"{shard.name}/{name}"
        try:
            data = store.read_bytes(store.join(shard.uri, name))
        except (OSError, DataError):  # a folder
            yield Skip(key, "not_an_image", "no file", is_sample=False)
            continue
        if data.startswith(_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
            yield Sample(key, sample_uid({}, None, None, shard, key), data, notes=("odd_suffix",))
        else:
            yield Skip(key, "not_an_image", f"{len(data)} bytes that begin with {data[:8]!r}", is_sample=False)


def is_test_set(uri: str) -> bool:
    """Tell whether a path looks like a labelled set in one of the layouts (a plain pool does not)."""
    if uri.endswith(".csv"):
        return True
    if any(mark in uri for mark in "{*?@") or "::" in uri or suffix_of(uri) in ("tar", "parquet"):
        return False
    names = store.list_names(uri)
    wds = any(split in names and "nshards.txt" in store.list_names(store.join(uri, split)) for split in SPLITS)
    return wds or "classnames.txt" in names or any(CLASS_FOLDER.match(name) for name in names)


SPLITS = ("test", "train")


def open_test_set(uri: str, split: str = "") -> TestSet:
    """Open a labelled set, whatever its layout.

    Args:
        uri: The folder or manifest file.
        split: Of the `wds` layout: "test" or "train"; empty takes the first that is there.

    Raises:
        ConfigError: If it is missing, has no class names, or is of no known layout.
    """
    if not store.exists(uri):
        raise ConfigError(f"test set {uri} does not exist", hint="check the path after NAME=")
    if suffix_of(uri) in ("csv", "parquet"):
        return _open_manifest(uri)
    names = store.list_names(uri)
    if any(one in names for one in SPLITS):
        return _open_wds(uri, names, split)
    if split:
        raise ConfigError(f"{uri} has no splits: expected the folders {' or '.join(SPLITS)}")
    if any(CLASS_FOLDER.match(name) for name in names):
        return _open_counteranimal(uri, names)
    return _open_folder(uri)


def _base_name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


def _lines(uri: str) -> list[str]:
    return [line for line in store.read_bytes(uri).decode().splitlines() if line.strip()]


def _templates(uri: str, names: list[str]) -> tuple[str, ...]:
    if "zeroshot_classification_templates.txt" not in names:
        return (DEFAULT_TEMPLATE,)
    templates = _lines(store.join(uri, "zeroshot_classification_templates.txt"))
    bad = next((t for t in templates if "{c}" not in t), None)
    if bad is not None:
        raise ConfigError(f"{uri}: template {bad!r} has no {{c}} for the class name")
    return tuple(templates)


def _open_wds(uri: str, names: list[str], wanted: str) -> TestSet:
    if "classnames.txt" not in names:
        raise ConfigError(
            f"test set {uri} has no class names: expected {store.join(uri, 'classnames.txt')}",
            hint="write one class name per line, in the order of the labels in the .cls members",
        )
    if wanted and wanted not in names:
        raise ConfigError(f"{uri} has no {wanted} split: expected {store.join(uri, wanted)}")
    split = wanted or next(split for split in SPLITS if split in names)
    kind = _lines(store.join(uri, "dataset_type.txt")) if "dataset_type.txt" in names else []
    if kind and kind[0].strip() == "multilabel":
        raise ConfigError(f"{uri} is multilabel (dataset_type.txt): images with several classes are not evaluated")
    shards = tuple(
        replace(shard, name=f"{split}/{shard.name}", source=_base_name(uri))
        for shard in sorted(list_shards(store.join(uri, split)), key=_natural)
    )
    return TestSet(uri, "wds", tuple(_lines(store.join(uri, "classnames.txt"))), _templates(uri, names), shards)


def with_class_names(test_set: TestSet, names: tuple[str, ...], where: str) -> TestSet:
    """Return a test set in another label space, as an own list of class names asks for.

    A list that holds every name of the set puts each label where its name stands: a manifest or folder of 45 classes
    becomes a question among 1000. A list of the same length renames the classes in the order of their labels (folders
    named by synset, for instance).

    Args:
        test_set: As opened.
        names: The class names, distinct or not.
        where: What to name in the error.

    Raises:
        ConfigError: If the list is of another length and lacks names of the set.
    """
    place = {name: label for label, name in reversed(list(enumerate(names)))}
    lacking = [name for name in test_set.class_names if name not in place]
    numbered = test_set.layout in ("wds", "counteranimal")  # labels are numbers: only their order counts
    renames = numbered or (lacking and test_set.layout == "folder")
    if len(names) == len(test_set.class_names) and renames:
        return replace(test_set, class_names=names)
    if lacking or numbered:
        raise ConfigError(
            f"{where} has {len(names)} class names, {test_set.uri} has {len(test_set.class_names)} classes"
            + (f", of which the list lacks {lacking[0]!r}" if lacking else ""),
            hint="one name per line, in the order of the labels",
        )
    labels = {shard: place[test_set.class_names[label]] for shard, label in test_set.labels.items()}
    return replace(test_set, class_names=names, labels=labels)


def _natural(shard: Shard) -> list[int | str]:
    """Sort key under which 2.tar comes before 10.tar."""
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", shard.name)]


def _open_counteranimal(uri: str, names: list[str]) -> TestSet:
    if "imagenet_names.txt" not in names:
        raise ConfigError(
            f"test set {uri} has no class names: expected {store.join(uri, 'imagenet_names.txt')}",
            hint="write lines of `<index><tab><name>`, as the released archive has them",
        )
    pairs = [line.split("\t", 1) for line in _lines(store.join(uri, "imagenet_names.txt"))]
    class_names = tuple(name.strip() for _, name in pairs)
    shards, labels, groups = [], {}, {}
    for folder in sorted(names):
        match = CLASS_FOLDER.match(folder)
        if match is None:
            continue  # stray files lie beside the class folders (counteranimal.md 2.1)
        for sub in store.list_names(store.join(uri, folder)):
            group = GROUP_FOLDER.match(sub)
            if group is None:
                continue
            name = f"{folder}/{sub}"
            shards.append(Shard(store.join(uri, folder, sub), name, "folder", _base_name(uri)))
            labels[name], groups[name] = int(match.group(1)), group.group(1)
    if not shards:
        raise ConfigError(f"{uri} has class folders but none of common-<background> or counter-<background>")
    return TestSet(uri, "counteranimal", class_names, ("A photo of {c}.",), tuple(shards), labels, groups)


def _open_folder(uri: str) -> TestSet:
    class_names = [
        name
        for name in store.list_names(uri)
        if any(suffix_of(file) in IMAGE_SUFFIXES for file in store.list_names(store.join(uri, name)))
    ]
    if not class_names:
        raise ConfigError(
            f"{uri} is no test set: expected wds (classnames.txt, test/*.tar), CounterAnimal's tree, "
            "one folder per class, or a manifest.csv",
        )
    shards = tuple(Shard(store.join(uri, name), name, "folder", _base_name(uri)) for name in class_names)
    labels = {name: label for label, name in enumerate(class_names)}
    return TestSet(uri, "folder", tuple(class_names), (DEFAULT_TEMPLATE,), shards, labels)


def _manifest_rows(uri: str) -> list[dict[str, str]]:
    if suffix_of(uri) == "parquet":
        return store.read_table(uri).to_pylist()
    return list(csv.DictReader(io.StringIO(store.read_bytes(uri).decode())))


def _open_manifest(uri: str) -> TestSet:
    rows = _manifest_rows(uri)
    missing = {"path", "class_name"} - set(rows[0] if rows else {})
    if missing:
        raise ConfigError(
            f"manifest {uri} lacks the columns {sorted(missing)}", hint="expected path, class_name[, group]"
        )
    class_names = tuple(sorted({row["class_name"] for row in rows}))
    name = _base_name(uri)
    return TestSet(uri, "manifest", class_names, (DEFAULT_TEMPLATE,), (Shard(uri, name, "manifest", name),))


def _read_manifest(test_set: TestSet) -> Iterator[Sample | Skip]:
    base = test_set.uri.rsplit("/", 1)[0]
    for row in _manifest_rows(test_set.uri):
        path = row["path"]
        uri = path if path.startswith("/") or "://" in path else store.join(base, path)
        uid = sample_uid({}, None, None, test_set.shards[0], path)
        try:
            image = store.read_bytes(uri)
        except DataError:
            yield Skip(path, "no_image", f"{uri} does not exist")
            continue
        label = test_set.class_names.index(row["class_name"])
        yield test_set._labelled(Sample(path, uid, image), label, row.get("group") or "")
