"""What an `embed` run measures: Prometheus counters while it runs, a line of the summary at its end.

Readers and encoders write their measurements into the chunks that pass through them anyway, and the driver adds them
up: one process exports, nothing is lost with a worker. Ray prefixes the names with `ray_` and counters with `_total`;
docs/cluster.md lists them, deploy/monitoring charts them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ray.util.metrics import Counter, Gauge

COUNTERS = {
    "clipgap_embed_rows": "Samples committed or skipped; outcome is kept or the ledger's reason.",
    "clipgap_embed_parts": "Parts committed.",
    "clipgap_embed_image_bytes": "Encoded bytes of the images decoded.",
    "clipgap_embed_images": "Images decoded, or found to be broken.",
    "clipgap_embed_decode_ms": "CPU milliseconds of decoding and resizing.",
    "clipgap_embed_encoder_busy_ms": "Milliseconds that encoder actors spent on chunks.",
    "clipgap_embed_encoder_idle_ms": "Milliseconds that encoder actors waited for the next chunk.",
    "clipgap_embed_cross_node_bytes": "Bytes of pixels that were decoded on another node than they were encoded on.",
}
GAUGES = {"clipgap_embed_chunks_held": "Encoded chunks that the driver holds until their part is whole."}


@dataclass
class Measured:
    """Sums over the chunks of this run."""

    images: int = 0
    image_bytes: int = 0
    decode_s: float = 0.0
    busy_s: float = 0.0
    idle_s: float = 0.0
    moved_bytes: int = 0
    _counters: dict[str, Counter] = field(default_factory=dict)
    _gauges: dict[str, Gauge] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, text in COUNTERS.items():
            self._counters[name] = Counter(name, text, tag_keys=("outcome",) if name == "clipgap_embed_rows" else ())
        for name, text in GAUGES.items():
            self._gauges[name] = Gauge(name, text)

    def _count(self, name: str, value: float, **tags: str) -> None:
        if value > 0:  # Ray refuses to add nothing
            self._counters[f"clipgap_embed_{name}"].inc(value, tags=tags)

    def chunk(self, chunk: dict[str, Any], held: int) -> None:
        """Add a chunk that came back from an encoder; `held` chunks wait for the rest of their parts."""
        for name in ("images", "image_bytes", "decode_s", "busy_s", "idle_s", "moved_bytes"):
            setattr(self, name, getattr(self, name) + chunk[name])
        self._count("images", chunk["images"])
        self._count("image_bytes", chunk["image_bytes"])
        self._count("decode_ms", 1e3 * chunk["decode_s"])
        self._count("encoder_busy_ms", 1e3 * chunk["busy_s"])
        self._count("encoder_idle_ms", 1e3 * chunk["idle_s"])
        self._count("cross_node_bytes", chunk["moved_bytes"])
        self._gauges["clipgap_embed_chunks_held"].set(held)

    def part(self, record: dict[str, Any]) -> None:
        """Add a commit record."""
        self._count("parts", 1)
        self._count("rows", record["kept"], outcome="kept")
        for reason, count in record["dropped"].items():
            self._count("rows", count, outcome=reason)

    def as_dict(self) -> dict[str, float]:
        """Return what the summary says; nothing where nothing was decoded."""
        if not self.images:
            return {}
        return {
            "decode_ms_per_image": round(1e3 * self.decode_s / self.images, 3),
            "encoder_busy_share": round(self.busy_s / max(self.busy_s + self.idle_s, 1e-9), 4),
            "image_bytes": self.image_bytes,
            "cross_node_bytes": self.moved_bytes,
        }
