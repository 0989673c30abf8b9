"""From sources, a split and a reference to the plan of a run: what is trained on, in which order, for how many steps.

Nothing but ids is read: the sample index names every sample's place, the split keeps some of them as a bitmap per
shard (50 MB for 400 M samples), and images are read by byte range when their turn comes. What makes a run impossible is
an error here, before a worker starts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import ray

from clipgap_ray import idlists, store
from clipgap_ray.config.train import TrainSettings
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels.order import ResampledOrder, SampleOrder
from clipgap_ray.shards import Skip, read_shard
from clipgap_ray.sources import list_shards
from clipgap_ray.stages import samples
from clipgap_ray.stages.progress import logger
from clipgap_ray.stages.session import connect
from clipgap_ray.stages.train_data import Order, Part, Plan
from clipgap_ray.stages.waits import bounded

PARTS_PER_TASK = 64  # a pool of no more is filtered in this process
PAGE_BYTES = 4096  # what a local disk reads at least
EXPORT_ABOVE = 2.0


@dataclass
class Chosen:
    """What a source contributes, in numbers."""

    parts: list[Part]
    available: int = 0  # samples in the source
    in_split: int = 0
    kept: int = 0  # of these, those with a caption where one is needed
    bytes_used: int = 0
    bytes_paged: int = 0  # the same, in whole pages
    bytes_beside: int = 0  # all images in the shards that hold any of them
    shards_used: int = 0

    def add(self, part: Part, counts: dict[str, int]) -> None:
        """Add a part and its counts."""
        self.parts.append(part)
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)


def make_plan(settings: TrainSettings, out: str, image_size: int) -> tuple[Plan, dict[str, int]]:
    """Index the sources, apply the split, and fix the order.

    Args:
        settings: Of the run.
        out: Run directory, for indices that are not shared.
        image_size: Pixels of the model.

    Returns:
        The plan, and counts: `available` samples in the sources, `used` after the split.

    Raises:
        ConfigError: Unlabelled source under `supervised`, or fewer samples than a step.
        DataError: A source without a usable sample, or a split of which no uid is in the source.
    """
    split = idlists.read_subset(settings.split) if settings.split else None
    supervised = settings.objective == "supervised"
    pool, reference = index_sources(settings, out)
    if supervised and not pool.class_names:
        raise ConfigError(
            f"--objective supervised needs labels, but {settings.source} is no labelled set",
            hint="give a test-set folder (wds with classnames.txt, one folder per class, a manifest)",
        )
    chosen = _choose(pool, split, captions=not supervised)
    _check(settings, chosen, split, supervised)
    if split is not None:
        _tell(settings, chosen, len(split))
    sources = _source_of_parts(settings, len(pool.parts))
    if reference is not None:
        mixed = _choose(reference, None, captions=not supervised)
        chosen.parts += mixed.parts
        chosen.available, chosen.kept = chosen.available + mixed.available, chosen.kept + mixed.kept
        sources = np.concatenate([sources, np.full(len(mixed.parts), 1 + sources.max(initial=-1))])
    steps = settings.num_samples // settings.global_batch
    if chosen.kept < settings.global_batch or not steps:
        accumulated = f" x --accum-freq {settings.accum_freq}" if settings.accum_freq > 1 else ""
        raise ConfigError(
            f"{chosen.kept} samples and --num-samples {settings.num_samples} are less than one step of "
            f"--workers {settings.workers} x --batch-size {settings.batch_size}{accumulated}",
            hint="lower --batch-size or --workers, or raise --num-samples",
        )
    order = _order(settings, np.array([part.count for part in chosen.parts]), sources)
    dump = settings.model_dump(mode="json")
    plan = Plan(chosen.parts, order, pool.class_names, dump, steps, image_size, settings.global_batch)
    return plan, {"available": chosen.available, "used": chosen.kept}


def index_sources(settings: TrainSettings, out: str) -> tuple[samples.Source, samples.Source | None]:
    """Return the sample indices of source and reference, made where `settings.samples` (else `out`) has none."""
    pool = samples.index(settings.source, settings.samples or store.join(out, "samples"))
    if not settings.reference:
        return pool, None
    beside = f"{settings.samples}-reference" if settings.samples else store.join(out, "reference")
    return pool, samples.index(settings.reference, beside)


def _order(settings: TrainSettings, counts: np.ndarray, sources: np.ndarray) -> Order:
    if not settings.dataset_resampled:
        return SampleOrder(counts, settings.seed, settings.window)
    factors = settings.factors()
    weights = np.array(factors)[sources] if factors else np.ones(len(counts))
    return ResampledOrder(counts, weights, settings.seed, settings.window)


def _source_of_parts(settings: TrainSettings, num_parts: int) -> np.ndarray:
    """(num_parts,) index of the source, of those joined by `::`, that each part came from."""
    items = settings.source.split("::")
    if len(items) == 1:
        return np.zeros(num_parts, np.int64)
    return np.repeat(np.arange(len(items)), [len(list_shards(item)) for item in items])


def _choose(source: samples.Source, split: np.ndarray | None, *, captions: bool) -> Chosen:
    uris = [source.table_uri(part) for part in source.parts]
    chosen = Chosen([])
    for part, counts in _filtered(uris, split, captions):
        chosen.add(part, counts)
    return chosen


def _filtered(uris: list[str], split: np.ndarray | None, captions: bool) -> Iterator[tuple[Part, dict[str, int]]]:
    """Filter every part, in the order of `uris`; a large pool by Ray tasks."""
    if len(uris) <= PARTS_PER_TASK:
        yield from (_filter(uri, split, captions) for uri in uris)
        return
    connect()
    shared = ray.put(split)
    groups = [uris[start : start + PARTS_PER_TASK] for start in range(0, len(uris), PARTS_PER_TASK)]
    task = ray.remote(num_cpus=1)(_filter_group)
    results = dict(bounded(lambda number: task.remote(number, groups[number], shared, captions), range(len(groups))))
    for number in range(len(groups)):
        yield from results[number]


def _filter_group(
    number: int, uris: list[str], split: np.ndarray | None, captions: bool
) -> tuple[int, list[tuple[Part, dict[str, int]]]]:
    return number, [_filter(uri, split, captions) for uri in uris]


def _filter(uri: str, split: np.ndarray | None, captions: bool) -> tuple[Part, dict[str, int]]:
    table = store.read_table(uri, ["uid", "caption", "num_bytes"])
    inside = samples.in_split(table, split)
    keep = inside & np.asarray(pc.is_valid(table.column("caption")).combine_chunks()) if captions else inside
    sizes = table.column("num_bytes").to_numpy()
    used = sizes[keep]
    count = int(keep.sum())
    part = Part(uri, None if count == len(keep) else np.packbits(keep), count)
    return part, {
        "available": len(keep),
        "in_split": int(inside.sum()),
        "kept": count,
        "bytes_used": int(used.sum()),
        "bytes_paged": int((-(-used // PAGE_BYTES) * PAGE_BYTES).sum()),
        "bytes_beside": int(sizes.sum()) if count else 0,
        "shards_used": int(count > 0),
    }


def _check(settings: TrainSettings, chosen: Chosen, split: np.ndarray | None, supervised: bool) -> None:
    if not chosen.available:
        raise DataError(
            f"{settings.source} has no readable image; suffixes in its first shards: {_suffixes(settings.source)}",
            hint="images are members named .jpg, .jpeg, .png or .webp; `clipgap doctor SOURCE` looks closer",
        )
    if split is not None and not chosen.in_split:
        raise DataError(
            f"split {settings.split}: none of its {len(split)} uids is in {settings.source} (coverage 0 %)",
            hint="train on the pool that the split was cut from",
        )
    if not supervised and not chosen.kept:
        raise DataError(
            f"none of the {chosen.in_split} samples of {settings.source} has a caption; "
            f"suffixes in its first shards: {_suffixes(settings.source)}",
            hint="captions are members named .txt, or `caption` or `text` in .json",
        )


def _suffixes(source: str) -> str:
    """Name what the first shards hold: a mistaken suffix is the usual reason for finding nothing."""
    found: Counter[str] = Counter()
    for shard in list_shards(source)[:2]:
        for item in itertools.islice(read_shard(shard, images=False), 200):
            if isinstance(item, Skip):
                found.update(item.detail.removeprefix("members: ").split(", ") if item.reason == "no_image" else ())
            else:
                found.update(member.suffix.lower() for member in item.members)
    return ", ".join(f"{name} {count}" for name, count in found.most_common()) or "none"


def _tell(settings: TrainSettings, chosen: Chosen, uids: int) -> None:
    """Say what the split covers, and what reading it where it lies costs."""
    cost = amplification(chosen, remote="://" in settings.source)
    logger.info(
        "split keeps %d of %d samples in %d of %d shards; read amplification %.2f by byte range, %.2f by whole shards",
        chosen.kept, chosen.available, chosen.shards_used, len(chosen.parts), cost["ranges"], cost["shards"],
    )  # fmt: skip
    if chosen.in_split < uids:
        logger.warning(
            "split %s: only %d of its %d uids are in %s (coverage %.1f %%)",
            settings.split, chosen.in_split, uids, settings.source, 100 * chosen.in_split / uids,
        )  # fmt: skip
    if cost["export"]:
        logger.warning(
            "read amplification above %.0fx: to train on it more than once, copy it: clipgap export %s --source %s",
            EXPORT_ABOVE, settings.split, settings.source,
        )  # fmt: skip


def amplification(chosen: Chosen, *, remote: bool) -> dict[str, Any]:
    """Return bytes read per byte used.

    Local disks read whole pages around every image (`ranges`). An object store answers one request per image, so there
    the copy is compared with reading whole shards (`shards`): above `EXPORT_ABOVE` it is advised (`export`).
    """
    used = max(chosen.bytes_used, 1)
    ranges, shards = chosen.bytes_paged / used, chosen.bytes_beside / used
    return {"ranges": ranges, "shards": shards, "export": (shards if remote else ranges) > EXPORT_ABOVE}
