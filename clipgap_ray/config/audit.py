"""Settings of `audit`."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

import pydantic

from clipgap_ray import schema
from clipgap_ray.config.base import Operational, Settings
from clipgap_ray.config.hide import parse_hide_rule
from clipgap_ray.errors import ConfigError

METRICS = ("dup_rate", "exact_rate", "hash_rate", "caption_rate", "closer_rate")
RULE = re.compile(r"(?P<metric>[a-z_]+)\s*(?P<sign>>=|>)\s*(?P<limit>[0-9.eE+-]+)\Z")


class AuditSettings(Settings):
    """Look for a test set inside a pool: duplicates, similarity gap, accuracy on the clean part. No training."""

    pool: str
    """Folder of embeddings of the pool."""
    out: str
    """Directory for audit.json and index.html."""
    test: tuple[str, ...]
    """Test sets, NAME=EMB, separated by blanks."""
    reference: str = ""
    """Folder of embeddings whose gap is the yardstick."""
    thresholds: tuple[str, ...] = ()
    """Thresholds files instead of a reference: FILE for a single test set, or NAME=FILE."""
    predictions: tuple[str, ...] = ()
    """Per-sample predictions of `clipgap evaluate`: FILE for a single test set, or NAME=FILE."""
    near: tuple[float, ...] = (0.9, 0.95, 0.99)
    """Similarities at which near duplicates are counted. What a value looks like depends on the encoder: see
    the report's similarity ladder."""
    duplicate: float = 0.95
    """A test image with a pool image at least this alike, or with equal bytes, counts as duplicated."""
    hash_bits: Annotated[int, pydantic.Field(ge=-1, le=16)] = 2
    """So does one whose perceptual hash differs from a pool image's, mirrored or not, in at most this many of 64 bits;
    -1 does without hashes."""
    canaries: pydantic.NonNegativeInt = 60
    """Positive control: so many images of every test set are re-encoded, resized, cropped, flipped, made grey,
    captioned and watermarked, and the share of these copies that would be found is measured; 0 leaves it out. Needs
    the images and the encoder."""
    pretrained: str = ""
    """Weights for the control, where the embeddings' tag does not name them: a checkpoint file or run directory."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Operational()] = "auto"
    """Where the control's copies are embedded: auto is a GPU of this machine if there is one."""
    recall: str = ""
    """JSON {"recall": r, "similarity": s} of a control measured elsewhere (altered copies found at s), instead of
    canaries: lets a set without duplicates be called CLEAN AT RECALL r."""
    pairs: pydantic.NonNegativeInt = 20
    """Closest pairs to list per test set."""
    images: bool = True
    """Show pictures of the closest pairs; `--no-images` makes a page that may be shared without the data's licence."""
    blocklist: str = ""
    """Takedown list as `embed` takes it: the page shows no sample whose uid, sha256 or url it names."""
    hide: tuple[str, ...] = ()
    """Further samples that the page does not show, by any column of the pool's metadata: `caption~REGEX`,
    `clip_score<0.1`, `punsafe>0.5` where the pool has such a column."""
    fail_on: tuple[str, ...] = ()
    """Rules such as dup_rate>0.001; exit code 4 when one holds for any test set. Metrics: dup_rate (bytes, similarity
    or hash), exact_rate, hash_rate, caption_rate (normalised caption occurs in the pool), closer_rate (closer to the
    pool than to the reference)."""
    seed: int = 0
    """Seed of the canaries' choice and of the bootstrap."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if not self.test:
            raise ConfigError("--test names no test set", hint="for example --test val=out/embed/val")
        schema.named(self.test, "--test")
        if self.reference and self.thresholds:
            raise ConfigError("give --reference or --thresholds, not both")
        if self.recall and self.canaries:
            raise ConfigError("--recall brings a control from elsewhere, --canaries makes one", hint="--canaries 0")
        for rule in self.fail_on:
            parse_rule(rule)
        for rule in self.hide:
            parse_hide_rule(rule, None)
        return self


def parse_rule(text: str) -> tuple[str, str, float]:
    """Read `dup_rate>0.001` into (metric, sign, limit).

    Raises:
        ConfigError: If it is no rule or the metric is unknown.
    """
    match = RULE.match(text.strip())
    if match is None or match["metric"] not in METRICS:
        raise ConfigError(
            f"--fail-on {text!r} is no rule", hint=f"METRIC>NUMBER with METRIC one of {', '.join(METRICS)}"
        )
    try:
        return match["metric"], match["sign"], float(match["limit"])
    except ValueError:
        raise ConfigError(f"--fail-on {text!r}: {match['limit']!r} is no number") from None
