"""Identities: row ids pack and unpack, uids sort as DataComp's subset files do, names are checked."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray import schema
from clipgap_ray.errors import ConfigError, DataError


def test_row_ids_put_the_part_in_the_high_word() -> None:
    assert schema.row_ids(3, 2).tolist() == [3 * 2**32, 3 * 2**32 + 1]
    assert schema.row_ids(0, 0).dtype == np.int64


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**32 - 1)), min_size=1))
def test_row_ids_round_trip_and_sort_by_part_then_row(pairs: list[tuple[int, int]]) -> None:
    ids = np.array([(part << 32) | row for part, row in pairs], np.int64)
    parts, rows = schema.split_row_ids(ids)
    assert list(zip(parts.tolist(), rows.tolist(), strict=True)) == pairs
    assert [pairs[i] for i in np.argsort(ids, kind="stable")] == sorted(pairs)


@pytest.mark.parametrize(("part", "rows"), [(-1, 1), (1 << 31, 1), (0, (1 << 32) + 1)])
def test_row_ids_that_do_not_fit_are_refused(part: int, rows: int) -> None:
    with pytest.raises(DataError, match="does not fit"):
        schema.row_ids(part, rows)


UIDS = st.lists(st.integers(0, 2**128 - 1).map(lambda number: f"{number:032x}"), max_size=20)


@given(UIDS)
def test_uids_round_trip_and_sort_like_their_text(uids: list[str]) -> None:
    packed = schema.pack_uids(uids)
    assert packed.dtype == np.dtype("u8,u8")
    assert schema.unpack_uids(packed) == uids
    assert [uids[i] for i in schema.sort_uids(packed)] == sorted(uids)
    assert np.array_equal(packed, schema.pack_uids(pa.chunked_array([uids], pa.string())))


@given(st.lists(st.text("0123456789abcdef", min_size=32, max_size=32)), st.integers(1, 5))
def test_uid_columns_are_the_same_text_in_chunks(uids: list[str], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "HEX_CHUNK_ROWS", chunk)
        column = schema.hex_uids(schema.pack_uids(uids))
    assert column.type == pa.string()
    assert column.to_pylist() == uids


def test_uid_hashes_differ_by_uid_and_seed_and_spread_evenly() -> None:
    uids = schema.pack_uids([f"{i:032x}" for i in range(4096)] + [f"{i + 1:016x}{0:016x}" for i in range(4096)])
    hashes = {seed: schema.hash_uids(uids, seed) for seed in (0, 1, 1 << 40)}
    assert len(set(np.concatenate(list(hashes.values())).tolist())) == 3 * 8192
    order = np.random.default_rng(0).permutation(8192)
    assert np.array_equal(schema.hash_uids(uids[order], 1), hashes[1][order])
    for values in hashes.values():  # 16 bins of 512: five standard deviations are 110
        counts = np.bincount((values >> np.uint64(60)).astype(int), minlength=16)
        assert np.abs(counts - 512).max() < 110


def test_uid_words_are_big_endian() -> None:
    packed = schema.pack_uids(["000000000000000100000000000000ff"])
    assert (int(packed["f0"][0]), int(packed["f1"][0])) == (1, 255)


@pytest.mark.parametrize("uid", ["", "ab", "g" * 32, "0" * 33, "0" * 16 + " " * 16])
def test_what_is_no_uid_is_refused(uid: str) -> None:
    with pytest.raises(DataError, match="uid"):
        schema.pack_uids([uid])


def test_lengths_that_cancel_out_are_still_refused() -> None:
    with pytest.raises(DataError, match="is not 32 hex characters"):
        schema.pack_uids(["0" * 31, "0" * 33])


def test_named_words_keep_their_order() -> None:
    assert schema.named(["b=x", "a-1=s3://y=z"], "--test") == {"b": "x", "a-1": "s3://y=z"}
    assert list(schema.named(["b=x", "a=y"], "--test")) == ["b", "a"]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["val"], "'val' is not NAME=PATH"), (["val="], "is not NAME=PATH"), (["a=x", "a=y"], "names 'a' twice"),
     (["Val=x"], "'Val' does not match"), (["=x"], "'' does not match")],
)  # fmt: skip
def test_malformed_words_are_refused_by_flag(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        schema.named(words, "--test")
    assert "--test" in str(error.value)


@pytest.mark.parametrize("name", ["val", "imagenet-v2", "a_b", "0"])
def test_good_names_come_back(name: str) -> None:
    assert schema.check_name(name, "test set") == name


@pytest.mark.parametrize("name", ["", "-a", "A", "a b", "a/b", "a\n", "ä"])
def test_bad_names_are_refused_with_a_hint(name: str) -> None:
    with pytest.raises(ConfigError, match="test set") as error:
        schema.check_name(name, "test set")
    assert "imagenet-v2" in str(error.value)


@given(words=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=30))
def test_uids_sort_by_both_words_and_equals_keep_their_order(words: list[tuple[int, int]]) -> None:
    packed = np.array(words, dtype=schema.UID)
    assert schema.sort_uids(packed).tolist() == sorted(range(len(words)), key=lambda i: words[i])


def test_uids_pack_alike_from_every_kind_of_column() -> None:
    texts = [f"{i * 7919:032x}" for i in range(50)]
    expected = schema.pack_uids(texts)
    column = pa.chunked_array([pa.array(texts[:20]), pa.array([], pa.string()), pa.array(texts[20:])])
    assert np.array_equal(schema.pack_uids(column), expected)
    assert np.array_equal(schema.pack_uids(column.cast(pa.large_string())), expected)
    assert np.array_equal(schema.pack_uids(column.slice(7, 30)), expected[7:37])
    assert np.array_equal(schema.pack_uids([text.upper() for text in texts]), expected)
    for bad in (["0" * 31], ["g" * 32], [None]):
        with pytest.raises(DataError, match="is not"):
            schema.pack_uids(pa.array(bad, pa.string()))
