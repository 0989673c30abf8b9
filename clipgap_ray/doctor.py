"""`clipgap doctor [SRC]`: what is installed here; or what a source holds, before hours are spent on it.

Most of what goes wrong in ingest shows in the first shards: a suffix that nobody reads, captions under another name,
uids that depend on file names. This reads a stated number of samples with the readers that `embed` uses, opens their
images, and says what it found. Reads only.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from clipgap_ray import environment, filesystems, regions, testsets
from clipgap_ray.config.study import DoctorSettings
from clipgap_ray.pixels import ImageError, open_picture
from clipgap_ray.shards import Sample, Skip, estimate_rows, list_shards, read_shard, uid_rule

FEW_CAPTIONS, MANY_BROKEN = 0.95, 0.01
SHOWN_FIELDS = 12


@dataclass
class Findings:
    """Counts over the samples looked at."""

    samples: int = 0  # readable or not
    captions: int = 0
    suffixes: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)
    uid_rules: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)  # samples that embed would drop, by reason
    notes: Counter[str] = field(default_factory=Counter)  # and those it would keep and note; shards that break off

    def add(self, item: Sample | Skip) -> None:
        """Count one item of a reader; its image is opened."""
        if isinstance(item, Skip):
            (self.broken if item.is_sample else self.notes)[item.reason] += 1
            self.samples += item.is_sample
            return
        self.samples += 1
        self.suffixes.update(member.suffix.lower() for member in item.members)
        self.fields.update(name for name, value in item.fields.items() if value is not None)
        self.uid_rules[uid_rule(item.fields, item.url, item.caption)] += 1
        self.captions += bool(item.caption)
        self.notes.update(item.notes)
        try:
            open_picture(item.image)
        except ImageError as error:
            self.broken[error.reason] += 1

    @property
    def broken_share(self) -> float:
        """Share of the samples that embed would drop."""
        return self.broken.total() / self.samples if self.samples else 0.0

    def problems(self) -> list[str]:
        """Return what a user should know before starting, each with the next step."""
        found = []
        if self.broken.total() == self.samples:
            return [f"none of {self.samples} samples is readable: {dict(self.broken)}; are these image shards?"]
        if self.captions < FEW_CAPTIONS * self.samples:
            found.append(
                f"{1 - self.captions / self.samples:.0%} of the samples have no caption: captions are read from .txt "
                "or the fields caption, text, TEXT; without them the text row is zero (--no-text leaves texts out)"
            )
        if self.broken_share > MANY_BROKEN:
            found.append(f"{self.broken_share:.1%} of the samples are unreadable: embed will exit with code 3 "
                         "unless --max-skip-fraction allows it")  # fmt: skip
        if self.uid_rules["key"]:
            found.append(f"{self.uid_rules['key']} of {self.samples} samples have neither a uid nor url and caption: "
                         "their uids are made of shard name and key, so shards must not be renamed")  # fmt: skip
        return found


def run(settings: DoctorSettings) -> dict[str, Any]:
    """Return a description of the environment, of a source or of every node; exit code 1 when something is wrong.

    Raises:
        ConfigError: If the source matches nothing.
        StorageError: If its store cannot be reached.
    """
    filesystems.configure(settings.storage.options())
    if settings.cluster:
        from clipgap_ray.stages import nodes  # Ray only where it is asked for

        return nodes.run(settings.source)
    if not settings.source:
        report = environment.describe()
        return {**report, "exit_code": 1 if report["problems"] else 0}
    report = look_into(settings.source, settings.first, settings.samples)
    sys.stderr.write(table(report) + "\n")
    return report


def look_into(source: str, first: int, samples: int) -> dict[str, Any]:
    """Look at the first shards of a source.

    Args:
        source: As `clipgap embed` takes it.
        first: Shards to read.
        samples: Samples of each at most.

    Returns:
        JSON values: counts, shares in 0..1, `rows_estimated` (rows of the first shards scaled to all), `problems`.
    """
    test_set = testsets.open_test_set(source) if testsets.is_test_set(source) else None
    shards = list(test_set.shards) if test_set else list_shards(source)
    found = Findings()
    for shard in shards[:first]:
        items = test_set.read(shard) if test_set else read_shard(shard)
        for item in itertools.islice(items, samples):
            found.add(item)
    rows = sum(estimate_rows(shard) for shard in shards[:first])
    readable = sum(found.uid_rules.values())
    bucket = regions.of_bucket(source)
    far = regions.problem(source, bucket, regions.of_machine() if bucket else "", "this machine")
    return {
        "source": source,
        "kind": f"test set ({test_set.layout})" if test_set else "pool",
        "shards": dict(Counter(shard.kind for shard in shards)),
        "shards_read": len(shards[:first]),
        "samples_read": found.samples,
        "rows_estimated": round(rows * len(shards) / len(shards[:first])),
        "suffixes": dict(found.suffixes.most_common()),
        "caption_share": found.captions / readable if readable else 0.0,
        "fields": {name: count / readable for name, count in found.fields.most_common()},
        "uid_rules": dict(found.uid_rules.most_common()),
        "broken_share": found.broken_share,
        "broken": dict(found.broken),
        "notes": dict(found.notes),
        "region": bucket,
        "problems": [*found.problems(), *([far] if far else [])],
        "exit_code": 1 if not readable or found.broken.total() == found.samples else 0,
    }


def table(report: dict[str, Any]) -> str:
    """Return a source's report as lines for a terminal."""

    def counts(values: dict[str, int]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in values.items()) or "none"

    fields = [f"{name} {share:.0%}" for name, share in report["fields"].items()]
    more = f", and {len(fields) - SHOWN_FIELDS} more" if len(fields) > SHOWN_FIELDS else ""
    lines = [
        ("source", f"{report['source']}  ({report['kind']})"),
        ("shards", f"{counts(report['shards'])}; read: the first {report['shards_read']}"),
        ("samples read", f"{report['samples_read']:,}"),
        ("rows", f"about {report['rows_estimated']:,}"),
        ("suffixes", counts(report["suffixes"])),
        ("captions", f"{report['caption_share']:.1%}"),
        ("fields", (", ".join(fields[:SHOWN_FIELDS]) or "none") + more),
        ("uid by", counts(report["uid_rules"])),
        ("broken", f"{report['broken_share']:.2%}  ({counts(report['broken'])})"),
        ("notes", counts(report["notes"])),
        *(("problem", text) for text in report["problems"]),
    ]
    return "\n".join(f"{name:<13} {text}" for name, text in lines)
