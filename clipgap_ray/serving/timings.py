"""Where the time of a request goes, under the names of clip-retrieval's back end, so that its dashboards go on working.

The names, and that the unit is seconds, are its; the meaning here stands in `HISTOGRAMS`. Measured where the work is
done, so that all routes count: `/knn-service` and `/v1/...` alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import prometheus_client

HISTOGRAMS = {
    "full_knn_request_time": "Seconds of a search: encode, ask the index, describe; downloads come before it",
    "download_time": "Seconds to download the images that a request gives by address",
    "text_clip_inference_time": "Seconds to encode the texts of a request; tokenisation and the wait for a batch count",
    "image_clip_inference_time": "Seconds to encode the images of a request; the wait for a batch counts",
    "metadata_get_time": "Seconds to look up the metadata of the rows of an answer",
    "knn_index_time": "Seconds for all index shards to answer",
    "dedup_time": "Seconds to leave out near duplicates",
    "safety_time": "Always 0: this service has no safety model; --blocklist and --hide are part of metadata_get_time",
    "image_prepro_time": "Seconds to decode and resize the images of a request",
    "text_prepro_time": "Always 0: tokenisation is part of text_clip_inference_time",
}
# A search in memory takes less than prometheus_client's smallest bucket; its own are all among these.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)


class Timings:
    """The histograms of one process."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._histograms = {
            name: prometheus_client.Histogram(name, text, buckets=BUCKETS, registry=self.registry)
            for name, text in HISTOGRAMS.items()
        }

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Measure a block of code; what raises counts too."""
        with self._histograms[name].time():
            yield

    def text(self) -> bytes:
        """Return the exposition format."""
        return prometheus_client.generate_latest(self.registry)

    def summary(self) -> str:
        """Return a table for people: calls, mean seconds, and the mean as a share of a search's; slowest step first."""
        steps = [(name, *self._calls_and_mean(name)) for name in HISTOGRAMS]
        (whole, searches, mean), *parts = steps
        if not searches:
            return "no search yet\n"
        width = max(len(name) for name in HISTOGRAMS)
        lines = [
            f"{searches} searches, {mean:.4f} s each on average ({whole}); where the time goes, per call:",
            f"{'name':<{width}}  {'calls':>8}  {'average':>9}  {'share':>7}  description",
        ]
        for name, calls, average in sorted(parts, key=lambda part: -part[2]):
            share = f"{100 * average / mean:.1f}%"
            lines.append(f"{name:<{width}}  {calls:>8}  {average:>8.4f}s  {share:>7}  {HISTOGRAMS[name]}")
        return "\n".join(lines) + "\n"

    def _calls_and_mean(self, name: str) -> tuple[int, float]:
        calls = int(self.registry.get_sample_value(f"{name}_count") or 0)
        seconds = self.registry.get_sample_value(f"{name}_sum") or 0.0
        return calls, seconds / calls if calls else 0.0
