"""What lies where in a webdataset tar: byte ranges by sample, from the headers alone.

Members of a sample need not be neighbours, keys may repeat, and a tar may break off anywhere.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from typing import IO

from clipgap_ray.sources import IMAGE_SUFFIXES


@dataclass(frozen=True)
class Skip:
    """A sample (or, with an empty key, a shard) that could not be read. `is_sample`: it counts as one read row."""

    key: str
    reason: str
    detail: str = ""
    is_sample: bool = True


@dataclass(frozen=True)
class Member:
    """One file of a sample: its suffix as it is spelled there, and where its bytes lie in the tar (-1: in no tar)."""

    suffix: str
    offset: int = -1
    size: int = -1


@dataclass
class Members:
    """One sample's members by lower-case suffix, in the order of the tar."""

    key: str
    ranges: dict[str, Member]

    def image(self) -> Member | None:
        """Return the image, None when there is none."""
        return next((self.ranges[s] for s in IMAGE_SUFFIXES if s in self.ranges), None)


def index_tar(file: IO[bytes]) -> tuple[list[Members], Skip | None]:
    """Group the members of a tar by key, in order of first appearance; report where it breaks off.

    Args:
        file: A seekable tar; only its headers are read.

    Returns:
        The samples, and a Skip when the tar is cut or damaged.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    groups: dict[str, list[Members]] = {}
    order: list[Members] = []
    if size == 0:
        return order, Skip("", "truncated_shard", "zero bytes", is_sample=False)
    problem: Skip | None = None
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  the file is the caller's
        while True:
            end = tar.offset
            info = tar.next()
            if info is None:
                problem = _check_end(file, end, size)
                break
            if not info.isreg():
                continue
            if info.offset_data + info.size > size:
                problem = Skip(_key_and_suffix(info.name)[0], "truncated_shard", f"{info.name} is cut off")
                break
            _file_member(info, groups, order)
    except tarfile.TarError as error:
        problem = Skip("", "truncated_shard", str(error), is_sample=False)
    if problem is not None and problem.is_sample and problem.key in groups:
        # The cut fell inside a later member of a sample whose image was read: the sample stays, with a note.
        kept = groups[problem.key][-1].image() is not None
        problem = Skip(problem.key, problem.reason, problem.detail, is_sample=False) if kept else problem
        if not kept:
            order.remove(groups[problem.key][-1])
    return order, problem


def _check_end(file: IO[bytes], end: int, size: int) -> Skip | None:
    """A sound tar ends in zero blocks; anything else is a cut at a boundary or a damaged header."""
    file.seek(end)
    tail = file.read(512)
    if tail.count(0) == len(tail) == 512:
        return None
    detail = "no end-of-archive blocks" if end >= size else f"damaged header at byte {end}"
    return Skip("", "truncated_shard", detail, is_sample=False)


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Split a member name at the first dot of its base name, as webdataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def _file_member(info: tarfile.TarInfo, groups: dict[str, list[Members]], order: list[Members]) -> None:
    """Add a member to the latest sample of its key that lacks its suffix; a second one opens a new sample."""
    key, raw_suffix = _key_and_suffix(info.name)
    suffix = raw_suffix.lower()
    same_key = groups.setdefault(key, [])
    image = suffix in IMAGE_SUFFIXES
    latest = same_key[-1] if same_key else None
    if latest is None or suffix in latest.ranges or (image and latest.image() is not None):
        name = key if latest is None else f"{key}#{len(same_key) + 1}"
        latest = Members(name, {})
        same_key.append(latest)
        order.append(latest)
    latest.ranges[suffix] = Member(raw_suffix, info.offset_data, info.size)
