"""Takedown lists: samples that may not be used, by uid, sha256 of the image, or address.

Three sorted arrays, not Python sets: ten million uids are 160 MB here and about 1 GB as a set of strings, and Ray's
object store hands an array to every worker of a node without a copy. The list itself is nobody's business downstream:
outputs name its digest and counts only.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipgap_ray import schema, store
from clipgap_ray.errors import ConfigError

_SHA256 = re.compile(rb"[0-9a-fA-F]{64}\Z")
_UID = re.compile(rb"[0-9a-fA-F]{32}\Z")
_SHA256_TYPE = np.dtype(
    "S32"
)  # sorts like the bytes; the zero bytes at an end that numpy drops, it drops on both sides


@dataclass(frozen=True)
class Blocklist:
    """What is blocked.

    Attributes:
        uids: (n,) `schema.UID`, sorted, distinct.
        sha256: (m,) S32, sorted, distinct: digests of encoded images.
        urls: (k,) S32, sorted, distinct: sha256 of addresses in UTF-8.
    """

    uids: np.ndarray
    sha256: np.ndarray
    urls: np.ndarray

    def blocks(self, uid: str, sha256: str, url: str | None) -> bool:
        """Tell whether a sample is blocked by any of its three names.

        Args:
            uid: 32 hex characters.
            sha256: 64 hex characters, of the encoded image.
            url: Address, if known.
        """
        if len(self.uids) and self._has_uid(uid):
            return True
        if len(self.sha256) and _has(self.sha256, bytes.fromhex(sha256)):
            return True
        return bool(url) and len(self.urls) > 0 and _has(self.urls, hashlib.sha256(str(url).encode()).digest())

    def _has_uid(self, uid: str) -> bool:
        high, low = int(uid[:16], 16), int(uid[16:], 16)
        # By bisection, not np.searchsorted: that would copy the column of first words, a strided view, at every call.
        words = self.uids["f0"]
        first = bisect.bisect_left(words, high)
        end = bisect.bisect_right(words, high, lo=first)
        return bool((self.uids["f1"][first:end] == low).any())

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of the list: its digest (whatever the order of its lines) and counts."""
        arrays = (self.uids, self.sha256, self.urls)
        content = hashlib.sha256()
        for array in arrays:
            content.update(len(array).to_bytes(8, "big") + np.ascontiguousarray(array).tobytes())
        counts = dict(zip(("uids", "sha256", "urls"), map(len, arrays), strict=True))
        return {"digest": content.hexdigest(), **counts}


def _has(array: np.ndarray, value: bytes) -> bool:
    value = value.rstrip(b"\0")  # as numpy gives the elements of an S32 array
    place = bisect.bisect_left(array, value)
    return place < len(array) and bool(array[place] == value)


def read(uri: str) -> Blocklist:
    """Read a list.

    Args:
        uri: Text with one entry per line: a uid (32 hex characters), the sha256 of an image file (64), or an address
            with "://"; blank lines and lines that begin with # are passed over. Or `.npy` of dtype u8,u8: uids, as in
            DataComp's subset files.

    Raises:
        ConfigError: If a line is none of these, with its number, or the array is of another type.
        DataError: If the file does not exist.
    """
    data = store.read_bytes(uri)
    if uri.endswith(".npy"):
        uids = np.load(io.BytesIO(data), allow_pickle=False)
        if uids.dtype != schema.UID or uids.ndim != 1:
            raise ConfigError(f"{uri} is {uids.dtype} of shape {uids.shape}, expected a list of uids, dtype u8,u8")
        return Blocklist(_sorted_uids(uids), np.empty(0, _SHA256_TYPE), np.empty(0, _SHA256_TYPE))
    return _parse(uri, data)


def _parse(uri: str, data: bytes) -> Blocklist:
    found = {"uids": bytearray(), "sha256": bytearray(), "urls": bytearray()}
    for number, raw in enumerate(io.BytesIO(data), 1):
        line = raw.strip()
        if not line or line.startswith(b"#"):
            continue
        if _UID.match(line):
            found["uids"] += bytes.fromhex(line.decode())
        elif _SHA256.match(line):
            found["sha256"] += bytes.fromhex(line.decode())
        elif b"://" in line:
            found["urls"] += hashlib.sha256(line).digest()
        else:
            raise ConfigError(
                f"{uri}, line {number}: {line[:80].decode(errors='replace')!r} is no uid (32 hex characters), sha256 "
                "(64) or address (with ://)",
                hint="one entry per line; comments begin with #",
            )
    words = np.frombuffer(bytes(found["uids"]), dtype=">u8").reshape(-1, 2)
    uids = np.empty(len(words), schema.UID)
    uids["f0"], uids["f1"] = words[:, 0], words[:, 1]
    digests = (np.unique(np.frombuffer(bytes(found[kind]), _SHA256_TYPE)) for kind in ("sha256", "urls"))
    return Blocklist(_sorted_uids(uids), *digests)


def _sorted_uids(uids: np.ndarray) -> np.ndarray:
    ordered = uids[schema.sort_uids(uids)]
    new = np.ones(len(ordered), dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new]
