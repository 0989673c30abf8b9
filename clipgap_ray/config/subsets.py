"""Settings of the `split` commands that work on splits and id lists rather than on scores."""

from __future__ import annotations

from typing import Literal

import pydantic
import tyro

from clipgap_ray.config.base import Settings
from clipgap_ray.errors import ConfigError


def _npy(value: str) -> str:
    if not value.endswith(".npy"):
        raise ConfigError(f"--out {value!r} does not end in .npy", hint="for example splits/combined.npy")
    return value


class _SplitOut(Settings):
    out: str
    """Split to write: NAME.npy (uids), beside it NAME.recipe.json and NAME.rows.npz (bitmap over rows)."""

    _check_out = pydantic.field_validator("out")(_npy)


class _Algebra(_SplitOut):
    splits: tyro.conf.Positional[tuple[str, ...]]
    """Two or more splits NAME.npy of one pool."""
    pool: str = ""
    """Folder of embeddings of the pool; default where their recipes say it lies."""

    @pydantic.field_validator("splits")
    @classmethod
    def _two(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) < 2:
            raise ConfigError(f"{len(value)} split given ({value}), expected two or more: A.npy B.npy")
        return value


class And(_Algebra):
    """Keep the uids that every one of the splits keeps: prune by all of them."""

    kind: Literal["and"] = "and"
    """Kind of the split."""


class Or(_Algebra):
    """Keep the uids that at least one of the splits keeps."""

    kind: Literal["or"] = "or"
    """Kind of the split."""


class Minus(_Algebra):
    """Keep the uids that the first split keeps and none of the others does."""

    kind: Literal["minus"] = "minus"
    """Kind of the split."""


AnyAlgebra = And | Or | Minus


class DedupSplit(_SplitOut):
    """Keep the rows that a deduplication keeps."""

    kind: Literal["dedup"] = "dedup"
    """Kind of the split."""
    keep: str
    """Output of `clipgap dedup`."""
    scores: str = ""
    """Output of `clipgap score`: keep only rows that were scored too."""


class JoinSettings(_SplitOut):
    """Find somebody's id list in a pool and make it a split; ids that are missing or ambiguous are counted."""

    kind: Literal["join"] = "join"
    """Kind of the split."""
    ids: tyro.conf.Positional[str]
    """Id list: .npy (u8,u8 uids, integers or texts), .parquet, or text with one id per line. Ids are uids (32 hex),
    integer keys (LAION's, `int(stem)`), or webdataset keys."""
    pool: str
    """Folder of embeddings of the pool."""
    column: str = ""
    """Column of a parquet list; default the first of uid, key, image_path, __key__, id."""


class IdsSettings(Settings):
    """Write a split for tools that know samples by webdataset key: LAION's integers, texts, or a table."""

    split: tyro.conf.Positional[str]
    """Split NAME.npy."""
    pool: str
    """Folder of embeddings of the pool: its metadata say the keys."""
    out: str
    """.npy: sorted int64 (all keys must be digits); .txt: one key per line; .parquet: uid, key, shard, row_id."""

    @pydantic.field_validator("out")
    @classmethod
    def _suffix(cls, value: str) -> str:
        if not value.endswith((".npy", ".txt", ".parquet")):
            raise ConfigError(f"--out {value!r} ends in none of .npy, .txt, .parquet")
        return value


class ShowSettings(Settings):
    """What a split is: counts, the inputs that made it, and how much of a pool it covers. Writes nothing."""

    split: tyro.conf.Positional[str]
    """Split NAME.npy, of ours or a DataComp subset file."""
    pool: str = ""
    """Folder of embeddings: report how many of the split's uids are in it."""
