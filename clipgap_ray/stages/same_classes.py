"""`split random --match OTHER --same-classes ...`: a random control with the class counts of another cut.

Reads the captions of the pool part by part; memory is one part's captions and a number per row. Rejected: one regular
expression per class, which reads every caption a thousand times for ImageNet's names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from clipgap_ray import schema, store
from clipgap_ray.config.split import Random
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError
from clipgap_ray.idlists import read_subset
from clipgap_ray.kernels import concepts, subsets

if TYPE_CHECKING:
    from clipgap_ray.stages.split import Table

CLASSES_OF = "test:"


def select(settings: Random, table: Table) -> np.ndarray:
    """Return the (u,) keep mask: of every set of classes that captions name, as many uids as `match` keeps.

    Raises:
        ConfigError: If there are no class names, or no caption of the pool names any.
    """
    try:
        known = concepts.Concepts(_names(settings.same_classes, table))
    except ValueError as error:
        raise ConfigError(f"--same-classes: {error}") from None
    other = subsets.contains(read_subset(settings.match), table.uids)
    numbers, patterns = _patterns(known, table)
    if patterns == [()]:
        raise ConfigError(
            f"no caption of {table.manifest['pool']['uri']} names any of {len(known.names)} classes "
            f"({known.names[0]!r}, ...)",
            hint="give the names as captions write them, synonyms separated by commas",
        )
    keep = concepts.keep_like(numbers, other, np.random.default_rng(settings.seed))
    table.notes["same_classes"] = _counts(known.names, patterns, numbers, keep)
    return keep


def _names(wanted: tuple[str, ...], table: Table) -> list[str]:
    """Read names, `@FILE` (a name per line) and `test:NAME` (the classes of a scored test set); repeats go."""
    names: list[str] = []
    for word in wanted:
        if word.startswith("@"):
            names += [line.strip() for line in store.read_bytes(word[1:]).decode().splitlines() if line.strip()]
        elif word.startswith(CLASSES_OF):
            names += _classes_of(word.removeprefix(CLASSES_OF), table)
        else:
            names.append(word)
    return list(dict.fromkeys(names))


def _classes_of(test: str, table: Table) -> list[str]:
    tests = table.manifest["tests"]
    if test not in tests:
        raise ConfigError(f"{table.scores} has no test set {test!r}; it has {sorted(tests)}")
    found = EmbeddingSet.open(tests[test]["uri"]).all_metadata(["class_name"]).column("class_name").to_pylist()
    return sorted({name for name in found if name})


def _patterns(known: concepts.Concepts, table: Table) -> tuple[np.ndarray, list[concepts.Pattern]]:
    """(u,) int64 pattern of every uid, by the caption of its first row, and the patterns by number."""
    pool = EmbeddingSet.open(table.manifest["pool"]["uri"])
    numbers: dict[concepts.Pattern, int] = {}
    per_row = np.empty(len(table.row_ids), np.int64)
    parts, inside = schema.split_row_ids(table.row_ids)
    for part in np.unique(parts).tolist():
        here = np.nonzero(parts == part)[0]
        captions = pool.metadata(part, ["caption"]).column("caption").to_pylist()
        per_row[here] = [numbers.setdefault(known.named(captions[i]), len(numbers)) for i in inside[here].tolist()]
    per_uid = np.empty(table.num_uids, np.int64)
    per_uid[table.position[::-1]] = per_row[::-1]  # the first row is written last
    return per_uid, list(numbers)


def _counts(
    names: tuple[str, ...], patterns: list[concepts.Pattern], numbers: np.ndarray, keep: np.ndarray
) -> dict[str, Any]:
    """What the recipe says: per class the uids of the pool that name it, and those kept."""
    pool = np.bincount(numbers, minlength=len(patterns))
    kept = np.bincount(numbers[keep], minlength=len(patterns))
    counts: dict[str, dict[str, int]] = {name: {"pool": 0, "kept": 0} for name in names}
    for number, pattern in enumerate(patterns):
        for concept in pattern:
            counts[names[concept]]["pool"] += int(pool[number])
            counts[names[concept]]["kept"] += int(kept[number])
    unnamed = sum(int(pool[number]) for number, pattern in enumerate(patterns) if not pattern)
    return {"num_patterns": len(patterns), "without_any": unnamed, "counts": counts}
