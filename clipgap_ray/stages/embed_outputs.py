"""The outputs of one `embed` run: an encoder and a folder each, filled from one read of the data.

A folder is what `embed` writes for its encoder alone: same files, same settings guard, same lease. So a run of several
may be continued one by one, or one by one begun and continued together. Part numbers are common: row i of part p is the
same image in every folder of a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from clipgap_ray import embeddings, rundir, store
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.encoder import Encoder, EncoderSettings, Preprocess, check
from clipgap_ray.errors import ConfigError
from clipgap_ray.stages.progress import logger
from clipgap_ray.stages.session import resolve_device

# Appending shards is not a change of settings, moving weights to another path neither; what the other folders of a run
# hold is no matter of this one.
_FREE = ("out", "shards", "pretrained", "blocklist", "also", "decode")


@dataclasses.dataclass(frozen=True)
class Output:
    """A folder, and what makes its rows."""

    uri: str
    encoder: EncoderSettings
    text: bool
    preprocess: Preprocess
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def dim(self) -> int:
        """Dimension of its rows; known once the encoder was built."""
        return int(self.fingerprint["dim"])


def named(settings: EmbedSettings) -> list[Output]:
    """Return the outputs that settings name, `--out` first; models and weights are checked, not loaded.

    Raises:
        ConfigError: On an unknown model or weights.
    """
    pairs = [(settings.out, settings.model, settings.pretrained)]
    pairs += [(folder, model, "") for folder, model in settings.also_pairs()]
    outputs = []
    for uri, model, pretrained in pairs:
        encoder = EncoderSettings(model, pretrained, crop_border=settings.crop_border)
        if settings.text and not encoder.has_text:
            logger.info("embed: %s embeds images only; captions are kept, text rows left out", encoder.model)
        outputs.append(Output(uri.rstrip("/"), encoder, settings.text and encoder.has_text, check(encoder)))
    if settings.decode == "exact":
        return outputs
    # One decoding serves all: no JPEG is shrunk below what the largest of them needs.
    side = max(output.preprocess.resize_to or output.preprocess.size for output in outputs)
    return [
        dataclasses.replace(
            output,
            encoder=dataclasses.replace(output.encoder, shrink_to=side),
            preprocess=dataclasses.replace(output.preprocess, shrink_to=side),
        )
        for output in outputs
    ]


def on_device(output: Output, settings: EmbedSettings) -> Output:
    """Return the output with its encoder's device, precision and batches decided by the cluster and the settings."""
    return on_this_device(output, settings, resolve_device(settings.device))


def on_this_device(output: Output, settings: EmbedSettings, device: str) -> Output:
    """Return the output with its encoder on "cpu" or "cuda"."""
    precision = settings.precision
    if precision == "auto":
        precision = "fp16" if device == "cuda" else "fp32"
    encoder = dataclasses.replace(
        output.encoder, device=device, precision=precision, batch_size=settings.batch_size, threads=settings.threads
    )
    return dataclasses.replace(output, encoder=encoder)


def described(output: Output, encoder: Encoder) -> Output:
    """Return the output with the fingerprint of its built encoder."""
    return dataclasses.replace(output, fingerprint=encoder.fingerprint)


def guarded(output: Output, settings: EmbedSettings, blocklist: dict[str, Any] | None) -> dict[str, Any]:
    """Return the settings that a later run into the same folder must repeat."""
    values = {name: value for name, value in settings.fingerprint().items() if name not in _FREE}
    values |= {"model": output.encoder.model, "text": output.text}
    values["encoder"] = embeddings.identity(output.fingerprint)
    if settings.decode != "exact":
        values["decode"] = f"{settings.decode}, JPEGs not below {output.preprocess.shrink_to} pixels"
    if blocklist is not None:
        values["blocklist"] = blocklist
    return values


def common_parts(uris: Iterable[str], shards: list[str]) -> dict[str, int]:
    """Give every shard one part number in all folders; numbers that a folder has given stay.

    Returns:
        Part numbers of these shards, in the order of `shards`.

    Raises:
        ConfigError: If two folders have numbered a shard differently, naming both.
    """
    uris = list(uris)
    numbers: dict[str, tuple[int, str]] = {}  # shard -> its number, and the folder that says so
    shards_of: dict[int, tuple[str, str]] = {}
    for uri in uris:
        path = store.join(uri, "parts.json")
        for shard, number in (store.read_json(path) if store.exists(path) else {}).items():
            known, other = numbers.setdefault(shard, (number, uri))
            there, _ = shards_of.setdefault(number, (shard, uri))
            if (known, there) != (number, shard):
                raise ConfigError(
                    f"{uri} gives part {number} to shard {shard}, {other} gives it {known}" if known != number
                    else f"{uri} gives part {number} to shard {shard}, {shards_of[number][1]} gives it to {there}",
                    hint="folders that were begun apart cannot share a read: embed into them one by one",
                )  # fmt: skip
    if len(uris) > 1 and numbers:
        merged = {shard: number for shard, (number, _) in sorted(numbers.items(), key=lambda item: item[1][0])}
        for uri in uris:
            store.write_json(store.join(uri, "parts.json"), merged)
    numbered = [rundir.assign_parts(uri, shards) for uri in uris]
    return numbered[0]
