"""Settings of `export`."""

from __future__ import annotations

from typing import Annotated

import pydantic
import tyro

from clipgap_ray.config.base import Operational, Settings
from clipgap_ray.config.limits import Limits, LimitsSettings


class ExportSettings(Settings):
    """Copy the samples of a split into new shards that DataComp's tools and open_clip read, every byte as it was."""

    split: tyro.conf.Positional[str]
    """Subset NAME.npy (uids, dtype u8,u8): a split of ours or DataComp's own file."""
    source: str
    """Tars, parquet or folders of images: a directory, glob, `{000..099}.tar`, `@list.txt`, joined by `::`."""
    out: str
    """Directory: 00000000.tar and so on, each with _stats.json; sizes.json, sample_ids.npy, meta.json."""
    shard_size: pydantic.PositiveInt = 10_000
    """Samples per output tar; the last one may hold fewer."""
    write_uid: bool = False
    """Put the uid into the json of samples that have none there (all of LAION), and add a json where there is none:
    DataComp's tools look for it. The only flag under which bytes of a member change."""
    blocklist: str = ""
    """File of uids, sha256 of images or urls, one per line (or .npy of u8,u8): these samples are left out."""
    workers: Annotated[pydantic.NonNegativeInt, Operational()] = 0
    """Shards read or written at a time; 0 = one per core."""
    max_missing_fraction: Annotated[float, Operational()] = 0.01
    """Exit with code 3 when a larger share of the split's uids is not in the source."""
    limits: Limits = LimitsSettings()
    """When to stop."""
