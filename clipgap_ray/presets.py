"""What is known of public test sets: how many classes and images they have, and by which metric they are compared.

Counts are those of the sets' own papers and of CLIP_benchmark's folders; CounterAnimal's are of the released archive
(train_test_similarity.md 3, counteranimal.md 2). The metric is the mean over classes where the sets' own papers and
DataComp's list of tasks use it, else top-1.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.shards import estimate_rows
from clipgap_ray.testsets import TestSet


@dataclass(frozen=True)
class Benchmark:
    """What a folder of a named benchmark holds."""

    num_classes: int
    num_images: int
    groups: tuple[tuple[str, int], ...] = ()


BENCHMARKS = {
    "imagenet1k": Benchmark(1000, 50_000),
    "imagenetv2": Benchmark(1000, 10_000),
    "imagenet_sketch": Benchmark(1000, 50_889),
    "imagenet-r": Benchmark(200, 30_000),
    "imagenet-a": Benchmark(200, 7_500),
    "imagenet-o": Benchmark(200, 2_000),
    "objectnet": Benchmark(113, 18_574),
    "counteranimal": Benchmark(1000, 13_334, (("common", 7_408), ("counter", 5_926))),
    "cifar10": Benchmark(10, 10_000),
    "cifar100": Benchmark(100, 10_000),
}

# By the end of a folder's name, `wds_` and `vtab-` aside; everything else is compared by top-1.
MEAN_PER_CLASS = ("caltech101", "fgvc_aircraft", "flowers", "pets")


def main_metric(uri: str) -> str:
    """Return the metric by which a test set is customarily compared, from the name of its folder."""
    name = uri.rstrip("/").rsplit("/", 1)[-1].lower()
    return "mean_per_class_recall" if name.endswith(MEAN_PER_CLASS) else "acc1"


def expect(test_set: TestSet, benchmark: str) -> None:
    """Check a test set against what is known of a benchmark, by counting without decoding.

    Args:
        test_set: As opened.
        benchmark: A key of `BENCHMARKS`.

    Raises:
        ConfigError: If the benchmark is not known.
        DataError: If the set has other numbers of classes, images, or images per group; all of them are named.
    """
    if benchmark not in BENCHMARKS:
        raise ConfigError(f"unknown benchmark {benchmark!r}", hint=f"known: {', '.join(BENCHMARKS)}")
    known = BENCHMARKS[benchmark]
    rows = [(shard, estimate_rows(shard)) for shard in test_set.shards]
    found = [("classes", len(test_set.class_names), known.num_classes)]
    found.append(("images", sum(count for _, count in rows), known.num_images))
    groups: Counter[str] = Counter()
    for shard, count in rows:
        groups[test_set.groups.get(shard.name, "")] += count
    found += [(f"images of group {name}", groups[name], count) for name, count in known.groups]
    wrong = [f"{what}: {have:,} instead of {wanted:,}" for what, have, wanted in found if have != wanted]
    if wrong:
        raise DataError(
            f"{test_set.uri} is not all of {benchmark}: {'; '.join(wrong)}",
            hint="an interrupted download, or another version; leave --expect out to evaluate it as it is",
        )


@functools.cache
def imagenet_class_names() -> tuple[str, ...]:
    """Return open_clip's curated names of the 1000 classes, in the order of ImageNet's sorted synsets."""
    from open_clip import zero_shot_metadata

    return tuple(zero_shot_metadata.IMAGENET_CLASSNAMES)


def templates(name: str) -> tuple[str, ...]:
    """Return open_clip's prompts with `{c}` for the class: "openai" (80) or "simple" (7)."""
    from open_clip import zero_shot_metadata as metadata

    known = {"openai": metadata.OPENAI_IMAGENET_TEMPLATES, "simple": metadata.SIMPLE_IMAGENET_TEMPLATES}
    return tuple(template("{c}") for template in known[name])
