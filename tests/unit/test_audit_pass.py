"""An audit's pass over a pool: against brute force, and the same however the pool is grouped and merged."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.kernels import phash
from clipgap_ray.stages import audit_pass
from clipgap_ray.stages.audit_pass import Found, Sought
from tests import made, twins

DIM, SIZES = 16, (5, 0, 40, 1, 33)
TELLING = 0x5555555555555555


def hashes(count: int, seed: int) -> np.ndarray:
    """(count,) int64 that differ from `TELLING` in a few bits, so that many are equally near; every seventh is flat."""
    rng = np.random.default_rng(seed)
    found = np.full(count, TELLING, np.int64)
    for bit in rng.integers(0, 8, (3, count)):
        found ^= np.int64(1) << bit
    found[::7] = 0
    return found


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> EmbeddingSet:
    """Five parts, one of them empty; rows tie, some have no sha256, hash or caption."""
    rows, ends = made.sign_rows(sum(SIZES), DIM, 1), np.cumsum(SIZES)[:-1]
    numbers = [list(part) for part in np.split(np.arange(sum(SIZES)), ends)]
    own = hashes(sum(SIZES), 2)
    return made.write_embeddings(
        str(tmp_path_factory.mktemp("pool") / "pool"), np.split(rows, ends),
        [[f"{i:032x}" for i in part] for part in numbers],
        sha256=[["" if i % 9 == 0 else f"sha{i % 50}" for i in part] for part in numbers],
        phash=[[None if i % 11 == 0 else int(own[i]) for i in part] for part in numbers],
        caption=[[None if i % 5 == 0 else f"A Photo, no. {i % 13}" for i in part] for part in numbers],
    )  # fmt: skip


@pytest.fixture(scope="module")
def sought() -> Sought:
    return Sought(
        made.sign_rows(20, DIM, 7), frozenset({"sha3", "sha49", "nowhere"}), (hashes(20, 8), hashes(20, 9)),
        frozenset({"A Photo, no. 4", "a photo no 6", "another"}),
    )  # fmt: skip


def brute_force(pool: EmbeddingSet, sought: Sought) -> Found:
    """The slow twin: everything at once, row by row where ties go to the lower row."""
    table = pool.all_metadata(["row_id", "sha256", "phash", "caption"])
    row_ids = table["row_id"].to_numpy()
    similarity, nearest = twins.nearest(sought.rows, pool.all_images(), row_ids, 1)
    assert sought.hashes is not None
    own = np.array([value or 0 for value in table["phash"].to_pylist()], np.int64)
    bits, rows = [], []
    for pair in zip(*sought.hashes, strict=True):
        best = (64, -1)
        for value, row in zip(own, row_ids.tolist(), strict=True):
            if phash.telling(np.array([value, pair[0]]))[0] and phash.telling(np.array([pair[0]]))[0]:
                apart = min(int(np.uint64(value ^ side).bit_count()) for side in pair)
                best = min(best, (apart, row)) if apart < 64 else best
        bits.append(best[0])
        rows.append(best[1])
    captions = {line for line in table["caption"].to_pylist() if line}
    plain = {audit_pass.normalised(line) for line in sought.captions}
    digests = table["sha256"].to_pylist()
    return Found(
        similarity[:, 0], nearest[:, 0], frozenset(digests) & (sought.digests or frozenset()), np.array(bits),
        np.array(rows), frozenset(line for line in captions if audit_pass.normalised(line) in plain),
        digests.count(""), table["phash"].null_count,
    )  # fmt: skip


def assert_same(found: Found, expected: Found) -> None:
    for name in ("similarity", "nearest", "bits"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    for name in ("digests", "captions", "unknown_bytes", "unknown_hashes"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize("group_bytes", [1, 2 * DIM * 41, 1 << 30])
def test_a_pass_is_brute_force_however_the_pool_is_grouped(pool, sought, monkeypatch, group_bytes) -> None:
    monkeypatch.setattr(audit_pass, "GROUP_BYTES", group_bytes)
    assert_same(audit_pass.look(pool, sought, "audit"), brute_force(pool, sought))


def test_merging_in_any_order_gives_the_same(pool, sought) -> None:
    one_by_one = [audit_pass._group(pool, sought, [part])[0] for part in pool.parts]
    whole = audit_pass._group(pool, sought, pool.parts)[0]
    for order in list(itertools.permutations(range(5)))[::7]:
        total = one_by_one[order[0]]
        for at in order[1:]:
            total = audit_pass.merge(total, one_by_one[at])
        assert_same(total, whole)
        assert total.hash_nearest.tolist() == whole.hash_nearest.tolist()


def test_what_nobody_asks_for_is_not_read(pool, sought, monkeypatch) -> None:
    monkeypatch.setattr(EmbeddingSet, "metadata", None)
    found = audit_pass.look(pool, Sought(sought.rows), "reference")
    assert found.similarity.tolist() == brute_similarity(pool, sought)
    assert (found.bits == 64).all()
    assert (found.unknown_bytes, found.unknown_hashes, found.digests) == (0, 0, frozenset())


def brute_similarity(pool: EmbeddingSet, sought: Sought) -> list[float]:
    return twins.similarities(sought.rows, pool.all_images()).max(axis=1).tolist()


def test_the_nearer_hash_wins_and_the_lower_row_of_equals() -> None:
    first = (np.array([3, 64, 5, 2]), np.array([10, -1, 7, 4]))
    second = (np.array([2, 4, 5, 64]), np.array([99, 8, 3, -1]))
    for pair in ((first, second), (second, first)):
        bits, rows = phash.nearer(*pair)
        assert (bits.tolist(), rows.tolist()) == ([2, 4, 5, 2], [99, 8, 3, 4])


def test_a_folder_of_one_part_starts_no_ray(pool, sought) -> None:
    import ray

    before = ray.is_initialized()
    audit_pass.look(pool, sought, "audit")
    assert ray.is_initialized() == before
