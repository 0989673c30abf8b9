"""Bytes on disk: webdataset tars and the small text files that CLIP_benchmark and CounterAnimal keep beside images."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence

#: Zero-shot templates in CLIP_benchmark's form. They resemble the pool's captions and are not copied from them.
TEMPLATES = (
    "a photo of a {c}.",
    "a picture of a {c}.",
    "a drawing of a {c}.",
    "a sketch of a {c}.",
    "a cartoon {c}.",
    "a painting of a {c}.",
    "the silhouette of a {c}.",
    "a {c}.",
)
DIGIT_TEMPLATES = ("a scan of the digit {c}.", "the digit {c}.", "a handwritten {c}.", "the number {c}.")

Member = tuple[str, bytes]


def tar_bytes(members: Iterable[Member]) -> bytes:
    """A tar of (name, content) members in the order given; no times, no owners, so equal input is equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(content), 0, 0o644
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cut_inside(tar: bytes, name: str) -> bytes:
    """The tar up to the middle of member `name`'s content, as a broken download leaves it."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        info = archive.getmember(name)
    return tar[: info.offset_data + info.size // 2]


def num_shards(rows: int, samples_per_shard: int) -> int:
    """Tars needed for `rows` samples."""
    return -(-rows // samples_per_shard)


def wds_labels(
    folder: str,
    split: str,
    shards: int,
    names: Sequence[str],
    templates: Sequence[str],
) -> dict[str, bytes]:
    """The text files of a CLIP_benchmark folder.

    Args:
        folder: The data set's folder, relative to the world's root.
        split: "train" or "test".
        shards: Number of tars.
        names: Class names in label order.
        templates: Zero-shot templates with `{c}` for the class name.

    Returns:
        Relative path -> content.
    """
    return {
        f"{folder}/{split}/nshards.txt": str(shards).encode(),
        f"{folder}/classnames.txt": _lines(names),
        f"{folder}/zeroshot_classification_templates.txt": _lines(templates),
        f"{folder}/dataset_type.txt": b"classification",
    }


def counteranimal_labels(names: Sequence[str]) -> dict[str, bytes]:
    """CounterAnimal's list of all class names, `<idx>\\t<name>` per line; the label space exceeds its classes."""
    lines = [f"{label}\t{name}" for label, name in enumerate(names)]
    return {"counteranimal/imagenet_names.txt": _lines(lines)}


def _lines(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
