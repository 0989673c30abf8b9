"""Settings of `plan-study`."""

from __future__ import annotations

import pydantic
import tyro

from clipgap_ray.config.base import Settings, Storage, StorageSettings
from clipgap_ray.errors import ConfigError

UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}


class StudyPlanSettings(Settings):
    """What a whole study would take, step by step: time, cost, disk, memory. Runs nothing of it."""

    study: tyro.conf.Positional[str]
    """YAML file of the study."""
    out: str = ""
    """Directory of the study: the plan is written to OUT/plan.json, and `clipgap status OUT` shows it beside what the
    steps took."""
    rows: tuple[str, ...] = ()
    """Rows by name, where the data cannot be looked at: `pool=413M reference=1.28M val=50k`. Others are estimated from
    a few shards."""
    nodes: str = ""
    """A cluster's YAML (cluster.yaml): all nodes that it may have. Empty: this machine."""
    gpu_tflops: pydantic.NonNegativeFloat = 0.0
    """Peak of one of its GPUs for float16 without sparsity: L4 121, A10G 70, A100 312, H100 989."""
    gpu_use: pydantic.PositiveFloat = 0.4
    """Share of that peak that networks and products reach; an assumption."""
    gigabytes_per_s: pydantic.PositiveFloat = 1.0
    """What storage gives to all nodes together; an assumption."""
    image_kb: pydantic.PositiveFloat = 24.0
    """Size of an image where the pool cannot be looked at (LAION at 256 px: 24)."""
    image_ms: pydantic.PositiveFloat = 4.0
    """Time of a core to read and decode an image where the pool cannot be looked at."""
    prices: str = ""
    """YAML file: `per_hour: {CPU: 0.04, GPU: 1.1}`, and `currency` if it is not USD."""
    storage: Storage = StorageSettings()
    """How S3 stores are reached."""

    @property
    def known_rows(self) -> dict[str, float]:
        """Rows by name, as given."""
        return dict(_count(word) for word in self.rows)


def _count(word: str) -> tuple[str, float]:
    name, _, value = word.partition("=")
    number, unit = (value[:-1], UNITS[value[-1]]) if value[-1:] in UNITS else (value, 1.0)
    try:
        rows = float(number.replace("_", "").replace(",", "")) * unit
    except ValueError:
        rows = 0.0
    if not name or rows < 1:
        raise ConfigError(f"--rows {word!r} is not NAME=COUNT", hint="for example pool=413M val=50000")
    return name, rows
