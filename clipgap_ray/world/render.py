"""Units of work and their bytes.

A unit is what one task writes: a tar, a CounterAnimal class folder, or the few text files of a set. Rendering a unit
reads nothing but the spec, so units can be rendered in any order, in any process, and again after a crash.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from clipgap_ray.errors import ConfigError
from clipgap_ray.world import captions, classes, digits, formats, miniature, plan, scenes
from clipgap_ray.world.formats import Member
from clipgap_ray.world.pictures import NEAR_KINDS, Facts, Picture, encode, near_copy
from clipgap_ray.world.spec import DIGITS, WorldSpec, evaluation_sets
from clipgap_ray.world.streams import RECORD, stream
from clipgap_ray.world.truth import truth_row, truth_table

POOL, REFERENCE, TEST, COUNTERANIMAL, LABELS = "pool", "reference", "test", "counteranimal", "labels"


class Unit(NamedTuple):
    """One unit of work.

    Attributes:
        kind: "pool", "reference", "test" (one tar), "counteranimal" (one class folder), or "labels" (the text files
            of a set).
        name: Set that the unit belongs to: "pool", "reference", "counteranimal" or a test set.
        index: Number of the tar, label of the class, or 0.
    """

    kind: str
    name: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a unit


@dataclass(frozen=True)
class Rendered:
    """What a unit is made of.

    Attributes:
        files: Path relative to the world's root -> content.
        truth: One row per sample written or lost, of TRUTH_SCHEMA.
    """

    files: dict[str, bytes]
    truth: pa.Table


class Artist(Protocol):
    """What a kind of world brings: class names, templates, pictures and captions. Modules fulfil it."""

    NAMES: tuple[str, ...]
    TEMPLATES: tuple[str, ...]

    def draw(self, spec: WorldSpec, set_name: str, row: int) -> Picture:
        """Draw a row of a set."""
        ...

    def caption(self, facts: Facts, kind: str, rng: np.random.Generator) -> str:
        """Write a caption of a kind for a picture."""
        ...


def _artist(spec: WorldSpec) -> Artist:
    return digits if spec.kind == DIGITS else miniature


def class_names(spec: WorldSpec) -> tuple[str, ...]:
    """Class names of the world in label order."""
    return _artist(spec).NAMES


def units(spec: WorldSpec) -> list[Unit]:
    """Every unit of a world: pool, reference, test sets, CounterAnimal.

    Raises:
        ConfigError: If the planted rows or faults do not fit, or a digits world lacks scikit-learn; better here than
            in the middle of a run.
    """
    plan.role_of(spec, 0)
    plan.sample_faults(spec)
    if spec.kind == DIGITS:
        digits.scan_parts(spec.seed)
    pool_shards = formats.num_shards(spec.rows, spec.samples_per_shard) + spec.faults
    found = [Unit(POOL, POOL, index) for index in range(pool_shards)]
    found += _wds_units(REFERENCE, REFERENCE, spec.reference_rows, spec)
    for name in evaluation_sets(spec):
        found += _wds_units(TEST, name, spec.test_rows, spec)
    if spec.counter_rows and spec.kind != DIGITS:
        found += [Unit(COUNTERANIMAL, COUNTERANIMAL, label) for label in classes.ANIMALS]
        found.append(Unit(LABELS, COUNTERANIMAL, 0))
    return found


@lru_cache(maxsize=4)
def _known_units(spec: WorldSpec) -> frozenset[Unit]:
    return frozenset(units(spec))


def _wds_units(kind: str, name: str, rows: int, spec: WorldSpec) -> list[Unit]:
    tars = [Unit(kind, name, index) for index in range(formats.num_shards(rows, spec.samples_per_shard))]
    return [*tars, Unit(LABELS, name, 0)]


def render(spec: WorldSpec, unit: Unit) -> Rendered:
    """Render one unit: a pure function, the same bytes for the same arguments.

    Args:
        spec: The world.
        unit: One of `units(spec)`.

    Raises:
        ConfigError: If the world has no such unit.
    """
    if unit not in _known_units(spec):
        raise ConfigError(f"this world has no unit {tuple(unit)!r}; take it from units(spec)")
    if unit.kind == POOL:
        return _pool_tar(spec, unit.index)
    if unit.kind == COUNTERANIMAL:
        return _counteranimal_class(spec, unit.index)
    if unit.kind == LABELS:
        return Rendered(_label_files(spec, unit.name), truth_table([]))
    return _wds_tar(spec, unit)


def _label_files(spec: WorldSpec, name: str) -> dict[str, bytes]:
    artist = _artist(spec)
    if name == COUNTERANIMAL:
        return formats.counteranimal_labels(artist.NAMES)
    rows = spec.reference_rows if name == REFERENCE else spec.test_rows
    shards = formats.num_shards(rows, spec.samples_per_shard)
    return formats.wds_labels(*_wds_place(name), shards, artist.NAMES, artist.TEMPLATES)


def _wds_place(name: str) -> tuple[str, str]:
    """Folder and split of a set in CLIP_benchmark's layout."""
    return (REFERENCE, "train") if name == REFERENCE else (f"tests/{name}", "test")


def _wds_key(row: int) -> str:
    return f"s{row:07d}"


def _wds_tar(spec: WorldSpec, unit: Unit) -> Rendered:
    folder, split = _wds_place(unit.name)
    shard = f"{folder}/{split}/{unit.index}.tar"
    start = unit.index * spec.samples_per_shard
    stop = min(start + spec.samples_per_shard, spec.reference_rows if unit.name == REFERENCE else spec.test_rows)
    members: list[Member] = []
    truth = []
    for row in range(start, stop):
        facts, image, quality = _artist(spec).draw(spec, unit.name, row)
        key = _wds_key(row)
        members += [(f"{key}.cls", str(facts.label).encode()), (f"{key}.jpg", encode(image, quality))]
        truth.append(truth_row(unit.name, shard, key, row - start, facts))
    return Rendered({shard: formats.tar_bytes(members)}, truth_table(truth))


def _counteranimal_class(spec: WorldSpec, label: int) -> Rendered:
    """One class folder of the release: `<label> <name>/<group>-<background>/<row>.jpg`; and masks beside the tree."""
    files, truth = {}, []
    first = classes.ANIMALS.index(label) * 2 * spec.counter_rows
    for row in range(first, first + 2 * spec.counter_rows):
        facts, image, quality = _artist(spec).draw(spec, COUNTERANIMAL, row)
        group = scenes.group_of(spec, row)[1]
        key = f"{label} {facts.class_name}/{group}-{facts.background}/{row:06d}.jpg"
        files[f"{COUNTERANIMAL}/{key}"] = encode(image, quality)
        files[f"masks/{COUNTERANIMAL}/{key}.png"] = encode(miniature.mask(spec, COUNTERANIMAL, row), quality, "png")
        truth.append(truth_row(COUNTERANIMAL, COUNTERANIMAL, key, row, facts, group=group))
    return Rendered(files, truth_table(truth))


# --- the pool ----------------------------------------------------------------------------------------------


def _pool_tar(spec: WorldSpec, index: int) -> Rendered:
    shard = f"pool/{index:05d}.tar"
    start = index * spec.samples_per_shard
    if start >= spec.rows:  # planted: one shard more than the rows need
        lost = truth_row(POOL, shard, "", -1, None, fault=plan.EMPTY_SHARD)
        return Rendered({shard: formats.tar_bytes([])}, truth_table([lost]))
    stop = min(start + spec.samples_per_shard, spec.rows)
    samples = [_pool_sample(spec, row, shard, row - start) for row in range(start, stop)]
    tar = formats.tar_bytes([member for members, _ in samples for member in members])
    cut = plan.first_lost(spec)
    if cut < stop:
        tar = formats.cut_inside(tar, f"{_pool_key(spec, cut)}.jpg")
    return Rendered({shard: tar}, truth_table([truth for _, truth in samples]))


def _pool_sample(spec: WorldSpec, row: int, shard: str, place: int) -> tuple[list[Member], dict[str, Any]]:
    """Members and truth of one pool row, faults included."""
    role, fault = plan.role_of(spec, row), plan.sample_faults(spec).get(row, "")
    rng = stream(spec.seed, POOL, row, RECORD)
    picture = _artist(spec).draw(spec, role.set_name, role.row)
    if role.variant in NEAR_KINDS:
        picture = near_copy(picture, role.variant, rng)
    kind, caption = _caption(spec, picture.facts, fault, rng)
    suffix = fault if fault in plan.GOOD_SUFFIXES else "jpg"
    image = _spoil(encode(picture.image, picture.quality, suffix), fault)
    key, uid = _identity(spec, row, fault)
    fields = _json_fields(uid, key, row, caption, picture, image)
    members = [(f"{key}.{'JPEG' if fault == 'odd_suffix' else suffix}", image)]
    if caption:
        members.append((f"{key}.txt", caption.encode()))
    members.append((f"{key}.json", json.dumps(fields).encode()))
    if row >= plan.first_lost(spec):
        fault = plan.TRUNCATED_SHARD
    lost = fault in plan.UNREADABLE
    truth = truth_row(
        POOL, shard, key, -1 if lost else place, picture.facts, uid=uid, caption=caption, caption_kind=kind,
        fault="" if fault in plan.GOOD_SUFFIXES else fault, **_copied(role),
    )  # fmt: skip
    return members, truth


def _caption(spec: WorldSpec, facts: Facts, fault: str, rng: np.random.Generator) -> tuple[str, str]:
    """Kind and text of a row's caption."""
    if fault == "missing_caption":
        return captions.NO_CLASS, ""
    kind = captions.OFF_TOPIC
    if facts.label >= 0:
        kind = captions.choose_kind(rng, spec.no_class_rate, spec.wrong_rate)
    return kind, _artist(spec).caption(facts, kind, rng)


def _spoil(image: bytes, fault: str) -> bytes:
    if fault == "broken_image":
        return image[:2] + bytes(len(image) - 2)
    return image[: len(image) // 2] if fault == "truncated_image" else image


def _pool_key(spec: WorldSpec, row: int) -> str:
    shard, place = divmod(row, spec.samples_per_shard)
    return f"{shard:05d}{place:04d}"


def _identity(spec: WorldSpec, row: int, fault: str) -> tuple[str, str]:
    """Key and uid of a pool row; faults make it borrow another row's."""
    key_row = row - {"repeated_key": 2, "doubled_key": 1}.get(fault, 0)
    uid_row = row
    if fault == "repeated_uid":  # of the first row one shard earlier, which no fault touches
        uid_row = max(row // spec.samples_per_shard - 1, 0) * spec.samples_per_shard
    name = f"{spec.kind}/{spec.seed}/{uid_row}".encode()
    return _pool_key(spec, key_row), hashlib.blake2b(name, digest_size=16).hexdigest()


def _json_fields(uid: str, key: str, row: int, caption: str, picture: Picture, image: bytes) -> dict[str, Any]:
    """What img2dataset writes beside an image; the original is as large as what was kept."""
    width, height = picture.image.size
    return {
        "uid": uid,
        "url": f"https://images.example.org/{row // 1000}/{row}.jpg",
        "caption": caption or None,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "sha256": hashlib.sha256(image).hexdigest(),
    }


def _copied(role: plan.Role) -> dict[str, Any]:
    """The truth columns about duplicates and leaks."""
    if role.set_name != POOL:
        kind = plan.EXACT if role.variant == plan.EXACT else "near"
        return {"leak_of_set": role.set_name, "leak_of_key": _wds_key(role.row), "leak_kind": kind}
    kind = plan.SOURCE if role.is_source else role.variant
    return {"duplicate_group": role.group, "duplicate_kind": kind}
