"""Takedown lists: samples that may not be used, by uid, sha256 of the image, or address; for embed and export.

Three sorted arrays of 128 bits, not Python sets: ten million uids are 160 MB here and about 1 GB as a set of strings,
and Ray's object store hands an array to every worker of a node without a copy. Digests and addresses are hashed
(blake2b), as in `idlists`. The list itself is nobody's business downstream: outputs name its digest and counts only.
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipgap_ray import schema, store
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels import subsets

_SHA256 = re.compile(rb"[0-9a-fA-F]{64}\Z")
_UID = re.compile(rb"[0-9a-fA-F]{32}\Z")


@dataclass(frozen=True)
class Blocklist:
    """What is blocked; each array is `schema.UID`, sorted, distinct.

    Attributes:
        uids: (n,) the uids themselves.
        sha256: (m,) hashes of the digests of encoded images.
        urls: (k,) hashes of addresses in UTF-8.
    """

    uids: np.ndarray
    sha256: np.ndarray
    urls: np.ndarray

    def reason(self, uid: str, sha256: str, url: str | None) -> str:
        """Say why a sample is blocked.

        Args:
            uid: 32 hex characters.
            sha256: 64 hex characters, of the encoded image; may be "" when the list holds none.
            url: Address, if known.

        Returns:
            "blocked_uid", "blocked_sha256" or "blocked_url", the first that applies; "" when it is not blocked.
        """
        if len(self.uids) and _has(self.uids, bytes.fromhex(uid)):
            return "blocked_uid"
        if sha256 and len(self.sha256) and _has(self.sha256, _hashed(bytes.fromhex(sha256))):
            return "blocked_sha256"
        if url and len(self.urls) and _has(self.urls, _hashed(url.encode())):
            return "blocked_url"
        return ""

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of the list: its digest (whatever the order of its lines) and counts."""
        arrays = (self.uids, self.sha256, self.urls)
        content = hashlib.sha256()
        for array in arrays:
            content.update(len(array).to_bytes(8, "big") + np.ascontiguousarray(array).tobytes())
        counts = dict(zip(("uids", "sha256", "urls"), map(len, arrays), strict=True))
        return {"digest": content.hexdigest(), **counts}


def _has(array: np.ndarray, name: bytes) -> bool:
    return subsets.contains_one(array, int.from_bytes(name[:8], "big"), int.from_bytes(name[8:], "big"))


def _hashed(name: bytes) -> bytes:
    return hashlib.blake2b(name, digest_size=16).digest()


def read(uri: str) -> Blocklist:
    """Read a list.

    Args:
        uri: Text with one entry per line: a uid (32 hex characters), the sha256 of an image file (64), or an address
            with "://"; blank lines and lines that begin with # are passed over. Or `.npy` of dtype u8,u8: uids, as in
            DataComp's subset files.

    Raises:
        ConfigError: If a line is none of these, with its number, or the array is of another type: a takedown that
            silently does nothing is worse than an error.
        DataError: If the file does not exist.
    """
    data = store.read_bytes(uri)
    if uri.endswith(".npy"):
        uids = np.load(io.BytesIO(data), allow_pickle=False)
        if uids.dtype != schema.UID or uids.ndim != 1:
            raise ConfigError(f"{uri} is {uids.dtype} of shape {uids.shape}, expected a list of uids, dtype u8,u8")
        return Blocklist(subsets.sorted_unique(uids), np.empty(0, schema.UID), np.empty(0, schema.UID))
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
            found["sha256"] += _hashed(bytes.fromhex(line.decode()))
        elif b"://" in line:
            found["urls"] += _hashed(line)
        else:
            raise ConfigError(
                f"{uri} line {number}: {line[:80].decode(errors='replace')!r} is no uid (32 hex characters), sha256 "
                "(64) or url (with ://)",
                hint="one entry per line; comments begin with #",
            )
    packed = (schema.pack_words(np.frombuffer(bytes(names), ">u8")) for names in found.values())
    return Blocklist(*(subsets.sorted_unique(names) for names in packed))
