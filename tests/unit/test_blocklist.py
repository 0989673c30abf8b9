"""Takedown lists: three kinds of names, any order, sorted arrays that answer as a set would."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray import blocklist, schema
from clipgap_ray.errors import ConfigError

UID = st.integers(0, 2**128 - 1).map(lambda n: f"{n:032x}")
ENDS = [f"{n:032x}" for n in (0, 1, 2**64 - 1, 2**64, 2**128 - 2**64, 2**128 - 1)]
DIGEST = st.binary(min_size=32, max_size=32).map(bytes.hex)


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@given(listed=st.lists(UID | st.sampled_from(ENDS)), asked=st.lists(UID | st.sampled_from(ENDS)))
def test_uids_answer_as_a_set_would(tmp_path: Path, listed: list[str], asked: list[str]) -> None:
    blocked = blocklist.read(write(tmp_path / "list.txt", *listed))
    assert len(blocked.uids) == len(set(listed))
    for uid in [*listed, *asked]:
        assert blocked.reason(uid, "0" * 64, None) == ("blocked_uid" if uid in set(listed) else "")


@given(listed=st.lists(DIGEST), asked=st.lists(DIGEST))
def test_digests_answer_as_a_set_would(tmp_path: Path, listed: list[str], asked: list[str]) -> None:
    zeros = ["ab" * 31 + "00", "00" * 32]  # zero bytes at the end count
    blocked = blocklist.read(write(tmp_path / "list.txt", *listed, zeros[0]))
    for digest in [*listed, *asked, *zeros, "ab" * 32]:
        assert bool(blocked.reason("0" * 32, digest, None)) == (digest in {*listed, zeros[0]})


def test_kinds_are_told_apart_and_comments_passed_over(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"image").hexdigest()
    lines = ["# asked for on 2026-01-02", "", f"  {'AB' * 16}  ", digest.upper(), "https://example.org/ä.jpg?x=1#y"]
    blocked = blocklist.read(write(tmp_path / "a.txt", *lines))
    other = "0" * 32
    assert blocked.reason("ab" * 16, "0" * 64, None)
    assert blocked.reason(other, digest, None)
    assert blocked.reason(other, "0" * 64, "https://example.org/ä.jpg?x=1#y")
    assert not blocked.reason(other, "0" * 64, "https://example.org/ä.jpg")
    found = blocked.describe()
    assert (found["uids"], found["sha256"], found["urls"]) == (1, 1, 1)
    again = blocklist.read(write(tmp_path / "b.txt", *reversed(lines), "# another comment", *lines))
    assert again.describe() == found
    assert blocklist.read(write(tmp_path / "c.txt", *lines[:-1])).describe()["digest"] != found["digest"]


def test_a_subset_file_is_a_list_of_uids(tmp_path: Path) -> None:
    uids = [ENDS[5], ENDS[0], ENDS[2], ENDS[0]]
    np.save(tmp_path / "list.npy", schema.pack_uids(uids))
    text = blocklist.read(write(tmp_path / "list.txt", *uids))
    assert blocklist.read(str(tmp_path / "list.npy")).describe() == text.describe()
    np.save(tmp_path / "bad.npy", np.arange(3))
    with pytest.raises(ConfigError, match=r"int64 of shape \(3,\), expected a list of uids"):
        blocklist.read(str(tmp_path / "bad.npy"))


def test_a_line_that_names_nothing_is_refused_with_its_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 3: 'abc' is no uid"):
        blocklist.read(write(tmp_path / "list.txt", "# x", "0" * 32, "abc"))


def test_an_empty_list_blocks_nothing(tmp_path: Path) -> None:
    blocked = blocklist.read(write(tmp_path / "list.txt", "# nothing yet"))
    assert not blocked.reason("0" * 32, "0" * 64, "http://x")


def test_the_first_of_three_names_is_the_reason(tmp_path: Path) -> None:
    listed, other, sha = "7".zfill(32), "3".zfill(32), "AB" * 32
    blocked = blocklist.read(write(tmp_path / "b.txt", "# takedowns", "7".zfill(32), "", sha, "https://x/a.jpg"))
    uids = [listed, other, other, other, listed]
    shas, urls = ["", sha.lower(), "c" * 64, "", sha.lower()], [None, None, "https://x/a.jpg", "https://x/b.jpg", None]
    reasons = [blocked.reason(*names) for names in zip(uids, shas, urls, strict=True)]
    assert reasons == ["blocked_uid", "blocked_sha256", "blocked_url", "", "blocked_uid"]
    np.save(tmp_path / "b.npy", schema.pack_uids([listed, other, "1" * 32, other]))
    by_array = blocklist.read(str(tmp_path / "b.npy"))
    assert [by_array.reason(*names) for names in zip(uids, shas, urls, strict=True)] == ["blocked_uid"] * 5
