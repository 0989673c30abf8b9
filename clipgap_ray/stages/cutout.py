"""Cut a grouped test set apart by masks, so that animals and backgrounds can be scored by themselves.

Reads: a test set (a tree of folders) and a folder of masks. Writes: OUT/foreground/NAME (the animal on grey) and
OUT/background/NAME (the animal replaced by what is around it), trees like the source's with the same file names, so
that every cut photo has the uid of its photo; OUT/skipped.csv and OUT/summary.json. Photos without a usable mask are
in neither and counted. Unit of restart: one folder of the tree; a folder that is done is not cut again, so masks that
come later need another --out. Needs no Ray.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from clipgap_ray import pixels, rundir, store, testsets
from clipgap_ray.config.cutout import CutoutSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import cutout
from clipgap_ray.reporting.page import csv_bytes
from clipgap_ray.shards import Sample
from clipgap_ray.sources import Shard, suffix_of
from clipgap_ray.stages.progress import Progress

PARTS = {"foreground": cutout.foreground, "background": cutout.background}
FORMATS = {"png": "PNG", "webp": "WEBP"}  # everything else is written as JPEG; readers look at the content
NAMES = "imagenet_names.txt"


class NoMaskError(Exception):
    """A photo that cannot be cut; the message is the reason that is counted."""


def run(settings: CutoutSettings) -> rundir.Summary:
    """Write both halves of a test set.

    Raises:
        ConfigError: If the test set is no tree of folders, or lies where the output would.
        DataError: If no photo has a mask.
    """
    source = settings.source.rstrip("/")
    test_set = testsets.open_test_set(source)
    if test_set.layout not in ("counteranimal", "folder"):
        raise ConfigError(
            f"{source} is read as {test_set.layout}: its uids would change with its files",
            hint="cutout takes CounterAnimal's tree, or a folder per class",
        )
    trees = {part: store.join(settings.out, part, source.rsplit("/", 1)[-1]) for part in PARTS}
    if source in trees.values():
        raise ConfigError(f"--out {settings.out} would overwrite the test set itself", hint="choose another --out")
    guarded = {name: value for name, value in settings.fingerprint().items() if name != "out"}
    with rundir.RunDirectory(settings.out, "cutout", guarded) as directory:
        numbers = rundir.assign_parts(directory.uri, [shard.name for shard in test_set.shards])
        todo = [shard for shard in test_set.shards if numbers[shard.name] not in directory.log.records]
        progress = Progress("cutout", len(test_set.shards), "folders", len(test_set.shards) - len(todo))
        for shard in todo:
            directory.log.append([{"part": numbers[shard.name], **_cut(settings, trees, test_set, shard)}])
            progress.advance()
        progress.close()
        records = directory.log.records.values()
        skipped = [line for record in records for line in record["skipped"]]
        if not any(record["kept"] for record in records):
            raise DataError(
                f"no photo of {source} could be cut: {_counts(skipped) or 'it has no photos'}",
                hint=f"masks lie at {settings.masks}/<folder>/<file>.png; choose another --out for other masks",
            )
        if test_set.layout == "counteranimal":
            for tree in trees.values():
                store.write_bytes(store.join(tree, NAMES), store.read_bytes(store.join(source, NAMES)))
        if skipped:
            store.write_bytes(directory.path("skipped.csv"), csv_bytes(skipped))
        return directory.finish({"source": source, "trees": trees}, trees=trees)


def _cut(settings: CutoutSettings, trees: dict[str, str], test_set: testsets.TestSet, shard: Shard) -> dict[str, Any]:
    """Cut the photos of one folder; returns its commit record."""
    skipped, kept = [], 0
    for item in test_set.read(shard):
        if isinstance(item, Sample):
            try:
                _write(settings, trees, item)
                kept += 1
            except NoMaskError as error:
                skipped.append({"key": item.key, "reason": str(error)})
        elif item.is_sample:
            skipped.append({"key": item.key, "reason": item.reason})
    return {"read": kept + len(skipped), "kept": kept, "dropped": _counts(skipped), "skipped": skipped}


def _counts(skipped: list[dict[str, str]]) -> dict[str, int]:
    reasons = [record["reason"] for record in skipped]
    return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}


def _write(settings: CutoutSettings, trees: dict[str, str], photo: Sample) -> None:
    try:
        picture = pixels.open_picture(photo.image).convert("RGB")
    except pixels.ImageError as error:
        raise NoMaskError(error.reason) from None
    values = np.asarray(picture)
    mask = _mask(settings.masks, photo.key, picture.size)
    for part, cut in PARTS.items():
        buffer = io.BytesIO()
        form = FORMATS.get(suffix_of(photo.key), "JPEG")
        Image.fromarray(cut(values, mask)).save(buffer, form, quality=settings.quality)
        store.write_bytes(store.join(trees[part], photo.key), buffer.getvalue())


def _mask(masks: str, key: str, size: tuple[int, int]) -> np.ndarray:
    """(h, w) bool mask of a photo of (w, h) pixels."""
    stem = key.rsplit(".", 1)[0]
    # The full name first: stems may collide (x.jpg beside x.jpeg, counteranimal.md 9, item 3).
    path = next((p for p in (f"{key}.png", f"{stem}.png") if store.exists(store.join(masks, p))), None)
    if path is None:
        raise NoMaskError("no_mask")
    try:
        picture = pixels.open_picture(store.read_bytes(store.join(masks, path)))
    except pixels.ImageError:
        raise NoMaskError("broken_mask") from None
    if picture.size != size:
        raise NoMaskError("mask_of_another_size")
    # A palette's numbers are the labels; its colours are for the eye.
    mask = np.asarray(picture if picture.mode in ("P", "1", "L", "I", "I;16") else picture.convert("L")) > 0
    if not mask.any() or mask.all():
        raise NoMaskError("empty_mask" if not mask.any() else "mask_of_everything")
    return np.asarray(mask, bool)
