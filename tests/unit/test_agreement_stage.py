"""Two score runs in buckets against the same tables held whole, in memory: the slow twin of `agreement`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from clipgap_ray import schema, store
from clipgap_ray.config.join import AgreementSettings
from clipgap_ray.config.split import Far, GapMatch, Near
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.kernels import subsets
from clipgap_ray.kernels.vectors import error_bound
from clipgap_ray.stages import agreement, agreement_cuts, score_pairs, split
from tests import made, twins

TESTS = ("cats", "dogs")
SIZES = (0.1, 0.25, 0.5)
DIM = 16


class Run:
    """A pool in parts with its scores, written as `score` does, by brute force.

    Args:
        folder: Where to write.
        rows: (n, DIM) float16.
        uids: n uids, repeats allowed.
        cuts: Where parts begin.
        thresholds: Whether the test sets have tau.
        noise: Of the stored scores, at most the bound: what another device would have stored.
    """

    def __init__(
        self, folder: Path, rows: np.ndarray, uids: list[str], cuts: list[int], *, model: str, thresholds: bool = True,
        noise: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        self.uri = str(folder / "scores")
        rng = np.random.default_rng(seed)
        parts = np.split(np.arange(len(rows)), cuts)
        names = [[uids[i] for i in part] for part in parts]
        pool = made.write_embeddings(str(folder / "pool"), [rows[part] for part in parts], names)
        tests: dict[str, Any] = {}
        for at, test in enumerate(TESTS):
            queries = made.sign_rows(9, DIM, 50 + at) if seed % 2 else made.unit_rows(9, DIM, 50 + at)
            own = made.write_embeddings(str(folder / test), [queries], [[f"{at}{i:031x}" for i in range(9)]])
            tests[test] = {"uri": own.uri, "digest": own.digest}
            tau = np.linspace(0.1, 0.6, 9) if thresholds else np.full(9, np.nan)
            table = twins.similarities(rows, queries)
            for number, part in enumerate(parts):
                moved = [np.max(v[part], axis=1) + noise * rng.uniform(-1, 1, len(part)) for v in (table, table - tau)]
                columns = {"row_id": schema.row_ids(number, len(part)), "uid": pa.array(names[number], pa.string()),
                           "m": moved[0].astype(np.float32), "margin": moved[1].astype(np.float32)}  # fmt: skip
                values = [columns.get(f.name, np.full(len(part), -1, np.int64)) for f in schema.POOL_SCORES]
                path = f"{self.uri}/pool/{test}/part-{number:05d}.parquet"
                store.write_table(path, pa.table(values, schema=schema.POOL_SCORES))
            nearest = table.argmax(axis=0)
            facts = {"row_id": schema.row_ids(0, 9), "uid": [f"{at}{i:031x}" for i in range(9)], "tau": tau,
                     "reference_uid": pa.nulls(9, pa.string()), "similarity": table.max(axis=0),
                     "nearest_uid": [uids[i] for i in nearest], "nearest_row_ids": [[0]] * 9,
                     "nearest_similarities": [[0.0]] * 9}  # fmt: skip
            queries_path = f"{self.uri}/queries/{test}.parquet"
            store.write_table(queries_path, pa.table(facts, schema=schema.QUERY_SCORES))
        about = {"uri": pool.uri, "rows": len(rows), "digest": pool.digest}
        manifest = {"stage": "score", "digest": model, "encoder": {"model": model, "dim": DIM}, "tests": tests,
                    "bound": error_bound(DIM), "pool": about}  # fmt: skip
        store.write_json(f"{self.uri}/manifest.json", manifest)


def whole(settings: AgreementSettings, test: str) -> dict[str, Any]:
    """The slow twin: both tables in memory, masks over all uids, scipy's ranks."""
    first, second = (split.open_table(scores, (test,)) for scores in settings.scores)
    at = subsets.find(second.uids, first.uids)
    pairs = np.nonzero(at >= 0)[0], at[at >= 0]
    result: dict[str, Any] = {"uids": (len(pairs[0]), first.num_uids, second.num_uids), "pruned": []}
    for column in ("m", "margin"):
        with np.errstate(invalid="ignore"):
            x, y = (t.column(test, column)[own] for t, own in zip((first, second), pairs, strict=True))
        known = np.isfinite(x) & np.isfinite(y)
        flat = known.sum() < 3 or np.ptp(x[known]) == 0 or np.ptp(y[known]) == 0
        result[f"rank_correlation_{column}"] = None if flat else stats.spearmanr(x[known], y[known]).statistic
    cuts: list[tuple[str, Any, dict[str, str]]] = [("gap-match", GapMatch, {})]
    if np.isnan(split.read_tau(first.scores, test)).any():
        cuts = []
    for share in settings.sizes:
        cuts += [(f"{name} {share:g}", kind, {"size": f"{1 - share:.9f}"})
                 for name, kind in (("near", Near), ("far", Far))]  # fmt: skip
    for name, kind, more in cuts:
        gone = [
            ~split.select(kind(scores=t.scores, out="x.npy", test=(test,), **more), t)[own]
            for t, own in zip((first, second), pairs, strict=True)
        ]
        either = int((gone[0] | gone[1]).sum())
        both = int((gone[0] & gone[1]).sum())
        result["pruned"].append(
            {"cut": name, "removed_first": int(gone[0].sum()), "removed_second": int(gone[1].sum()),
             "removed_both": both, "jaccard": both / either if either else None}
        )  # fmt: skip
    return result


def two_runs(folder: Path, kind: str, *, thresholds: bool = True) -> tuple[str, str]:
    """The same 700 samples by two encoders: other parts, other gaps, copies that lie in different parts."""
    rng = np.random.default_rng(3)
    rows = {"ties": made.sign_rows, "smooth": made.unit_rows}[kind](700, DIM, 1)
    other = np.where(rng.random((700, 1)) < 0.5, rows, {"ties": made.sign_rows, "smooth": made.unit_rows}[kind](
        700, DIM, 2)).astype(np.float16)  # fmt: skip
    uids = [f"{int(i):032x}" for i in rng.permutation(700)]
    for i in range(0, 60, 2):
        uids[600 + i] = uids[i]  # a copy, two or more parts away
    kept = np.sort(rng.permutation(700)[:640])
    turned = rng.permutation(kept)
    noise, seed = 0.9 * error_bound(DIM), int(kind == "ties")
    first = Run(
        folder / "a", rows, uids, [100, 350, 351, 600], model="a", thresholds=thresholds, noise=noise, seed=seed
    )
    second = Run(folder / "b", other[turned], [uids[i] for i in turned], [10, 400], model="b", thresholds=thresholds,
                 noise=noise, seed=seed + 2)  # fmt: skip
    return first.uri, second.uri


@pytest.fixture(scope="module", params=["ties", "smooth"])
def runs(request, tmp_path_factory) -> tuple[str, str]:
    return two_runs(tmp_path_factory.mktemp("runs"), request.param)


def compare(scores: tuple[str, str], out: Path, **more: Any) -> dict[str, Any]:
    agreement.run(AgreementSettings(scores=scores, out=str(out), sizes=SIZES, **more)).check()
    return json.loads((out / "agreement.json").read_text())


def assert_same(found: dict[str, Any], settings: AgreementSettings, error: bool = False) -> None:
    for record in found["tests"]:
        expected = whole(settings, record["test"])
        assert tuple(found["uids"].values()) == expected["uids"]
        for column in ("m", "margin"):
            value, close = expected[f"rank_correlation_{column}"], 1e-12
            if value is None:
                assert record[f"rank_correlation_{column}"] is None
                continue
            assert (record[f"rank_error_{column}"] > 0) == error
            close = max(close, record[f"rank_error_{column}"])
            assert record[f"rank_correlation_{column}"] == pytest.approx(value, abs=close)
        for own, other in zip(record["pruned"], expected["pruned"], strict=True):
            assert {key: own[key] for key in other} == pytest.approx(other)


def test_one_bucket_is_the_slow_twin(runs, tmp_path) -> None:
    found = compare(runs, tmp_path)
    assert_same(found, AgreementSettings(scores=runs, out="x", sizes=SIZES))
    assert found["uids"]["first"] == 670
    assert not (tmp_path / "partial").exists()


@pytest.mark.parametrize(("group_rows", "bucket_rows"), [(1, 300), (200, 60), (10_000, 300)])
def test_groups_and_buckets_change_nothing(runs, tmp_path, monkeypatch, group_rows, bucket_rows) -> None:
    monkeypatch.setattr(score_pairs, "GROUP_ROWS", group_rows)
    monkeypatch.setattr(score_pairs, "BUCKET_ROWS", bucket_rows)
    monkeypatch.setattr(score_pairs, "CHUNKS", 5)
    monkeypatch.setattr(agreement_cuts, "CHUNKS", 3)
    assert_same(compare(runs, tmp_path), AgreementSettings(scores=runs, out="x", sizes=SIZES))


def test_a_coarse_grid_decides_the_same_and_says_how_far_its_ranks_may_be_off(tmp_path, monkeypatch) -> None:
    runs = two_runs(tmp_path, "smooth")
    monkeypatch.setattr(score_pairs, "SAMPLE", 60)
    monkeypatch.setattr(score_pairs, "BUCKET_ROWS", 100)
    found = compare(runs, tmp_path / "out")
    assert_same(found, AgreementSettings(scores=runs, out="x", sizes=SIZES), error=True)
    assert all(0 < record["rank_error_m"] < 0.2 for record in found["tests"])


def test_without_thresholds_there_is_no_gap_and_no_margin(tmp_path) -> None:
    runs = two_runs(tmp_path, "smooth", thresholds=False)
    found = compare(runs, tmp_path / "out", test=("dogs",))
    assert_same(found, AgreementSettings(scores=runs, out="x", sizes=SIZES))
    assert found["tests"][0]["rank_correlation_margin"] is None
    assert found["tests"][0]["pruned"][0]["cut"] == "near 0.1"


def test_pools_without_a_common_uid_and_empty_scores_are_refused(runs, tmp_path) -> None:
    other = Run(tmp_path, made.unit_rows(30, DIM, 9), [f"f{i:031x}" for i in range(30)], [10], model="c")
    with pytest.raises(DataError, match="score no uid in common"):
        compare((runs[0], other.uri), tmp_path / "out")
    assert not (tmp_path / "out" / "partial").exists()
    for path in (tmp_path / "scores" / "pool" / "cats").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="scores no pool row"):
        compare((runs[0], other.uri), tmp_path / "out")


def test_parts_that_score_other_rows_for_another_test_set_are_refused(tmp_path) -> None:
    runs = two_runs(tmp_path, "smooth")
    path = f"{runs[0]}/pool/dogs/part-00001.parquet"
    store.write_table(path, store.read_table(path).slice(1))
    with pytest.raises(DataError, match="score other rows for dogs than cats"):
        compare(runs, tmp_path / "out")
