"""The invariants of gap matching and pruning (train_test_similarity.md 12.4), on small random worlds full of ties.

Every property runs on two backends, which must agree: tasks called in this process, and real Ray tasks. Kill and
resume (invariant 8) is in test_kill_resume, dedup (9) in test_dedup_stage, tars (10) in test_export_stage.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray import schema, store
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.config.split import Far, GapMatch, GapsSettings, Near
from clipgap_ray.kernels import nearest
from clipgap_ray.stages import gaps, score, split, thresholds
from tests import made, twins
from tests.index_fixture import DIM, uid, write_embeddings

pytestmark = [pytest.mark.ray]
SETTINGS = hypothesis.settings(max_examples=8)
MODULES = (score, thresholds, gaps)


@pytest.fixture(scope="module", params=["in-process", pytest.param("ray", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tasks run. In-process: the same stage code, `bounded` is `map`."""
    if request.param == "ray":
        request.getfixturevalue("ray_session")
        yield "ray"
        return
    local = SimpleNamespace(put=lambda value: value, remote=lambda **_: lambda task: SimpleNamespace(remote=task))
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "connect", lambda: None)
            patch.setattr(module, "ray", local)
            patch.setattr(module, "bounded", lambda submit, items, **_: map(submit, items))
        patch.setattr(score, "physical_cpus", lambda: 2)
        patch.setattr(score, "resolve_device", lambda device: "cpu")
        yield "in-process"


@dataclass
class Study:
    """A random pool in parts, two test sets, a reference; and its exact similarities."""

    seed: int
    parts: tuple[int, ...]
    ties: bool
    copies: bool = True
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="cg-inv-")))

    def __post_init__(self) -> None:
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        make = made.sign_rows if self.ties else made.unit_rows
        self.pool = [make(size, DIM, self.seed + i) for i, size in enumerate(self.parts)]
        self.tests = {name: make(7, DIM, self.seed + 100 + i) for i, name in enumerate("ab")}
        self.reference = make(12, DIM, self.seed + 200)
        if self.copies and len(self.pool[0]) > 3:  # a leak, a leak that the reference has too, and a reference row
            self.pool[0][0] = self.tests["a"][0]
            self.pool[0][1] = self.reference[0] = self.tests["a"][1]
            self.pool[0][2] = self.reference[5]

    @property
    def rows(self) -> np.ndarray:
        return np.concatenate(self.pool)

    @property
    def uids(self) -> list[str]:
        return [uid(part, row) for part, rows in enumerate(self.pool) for row in range(len(rows))]

    def tau(self, name: str) -> np.ndarray:
        return twins.similarities(self.tests[name], self.reference).max(axis=1)

    def margin(self, names: tuple[str, ...]) -> np.ndarray:
        """(n,) exact margins over these test sets."""
        return np.max([twins.pool_scores(self.rows, self.tests[n], self.tau(n))[1] for n in names], axis=0)

    def written(self, **changed: list[np.ndarray]) -> dict[str, str]:
        sets = {"pool": self.pool, "reference": [self.reference], **{n: [rows] for n, rows in self.tests.items()}}
        return {name: write_embeddings(self.folder / name, rows) for name, rows in {**sets, **changed}.items()}

    def scored(self, places: dict[str, str], out: str, **more: Any) -> str:
        words = {
            "pool": places["pool"],
            "test": ("a=" + places["a"], "b=" + places["b"]),
            "reference": (places["reference"],),
            "k": 3,
            "out": str(self.folder / out),
        }
        score.run(ScoreSettings(**{**words, **more}))
        return words["out"]

    def cut(self, kind: type, scores: str, **words: Any) -> set[str]:
        out = str(self.folder / "split.npy")
        split.run(kind(scores=scores, out=out, **words))
        return set(schema.unpack_uids(store.read_array(out)))


STUDIES = st.builds(
    Study,
    seed=st.integers(0, 10_000),
    parts=st.lists(st.integers(0, 25), min_size=1, max_size=3).map(lambda sizes: (5, *sizes)),
    ties=st.booleans(),
)


@pytest.mark.usefixtures("backend")
@SETTINGS
@given(study=STUDIES, block=st.sampled_from([1, 7, 512]), slack=st.sampled_from([-0.1, 0.0, 0.05]))
def test_gap_matching_equals_brute_force_and_every_removed_row_has_a_violated_test_image(
    study: Study, block: int, slack: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "BLOCK_ROWS", block)  # the in-process backend feels it; Ray's workers keep theirs
        scores = study.scored(study.written(), "s", group_bytes=1)
    for names in (("a",), ("b",), ("a", "b")):
        margin = study.margin(names)
        expected = {u for u, value in zip(study.uids, margin, strict=True) if not value > slack}
        assert study.cut(GapMatch, scores, test=names, slack=slack) == expected


@pytest.mark.usefixtures("backend")
@SETTINGS
@given(study=STUDIES)
def test_a_reference_inside_the_pool_stays_and_the_gap_of_what_is_kept_is_tau(study: Study) -> None:
    study.pool[0] = np.concatenate([study.pool[0], study.reference])  # bit-equal rows: strictly greater spares them
    places = study.written()
    scores = study.scored(places, "s")
    kept = study.cut(GapMatch, scores, test=("a", "b"))
    inside = set(study.uids[len(study.pool[0]) - len(study.reference) : len(study.pool[0])])
    assert inside <= kept
    gaps.run(
        GapsSettings(pool=places["pool"], scores=scores, split=(str(study.folder / "split.npy"),),
                     out=str(study.folder / "gaps"))
    )  # fmt: skip
    for name in "ab":
        table = store.read_table(str(study.folder / "gaps" / "split" / f"{name}.parquet"))
        assert np.array_equal(table.column("gap").to_numpy(), study.tau(name))
        assert np.array_equal(table.column("similarity").to_numpy(), study.tau(name))  # the reference is in the pool


@pytest.mark.usefixtures("backend")
@SETTINGS
@given(study=STUDIES)
def test_combined_removals_are_the_union_and_slack_is_monotone(study: Study) -> None:
    scores = study.scored(study.written(), "s")
    single = [study.cut(GapMatch, scores, test=(name,)) for name in "ab"]
    assert study.cut(GapMatch, scores, test=("a", "b")) == single[0] & single[1]
    kept = [study.cut(GapMatch, scores, test=("a", "b"), slack=slack) for slack in (-0.2, -0.01, 0.0, 0.1, 2.0)]
    for less, more in itertools.pairwise(kept):
        assert less <= more
    assert kept[-1] == set(study.uids)


@pytest.mark.usefixtures("backend")
@SETTINGS
@given(study=STUDIES, extra=st.integers(1, 5))
def test_more_test_images_remove_more_and_a_larger_reference_removes_fewer(study: Study, extra: int) -> None:
    plain = study.cut(GapMatch, study.scored(study.written(), "s"), test=("a",))
    more = study.written(a=[np.concatenate([study.tests["a"], made.unit_rows(extra, DIM, study.seed + 7)])])
    assert study.cut(GapMatch, study.scored(more, "more"), test=("a",)) <= plain
    wider = study.written(reference=[np.concatenate([study.reference, made.unit_rows(extra, DIM, study.seed + 8)])])
    assert study.cut(GapMatch, study.scored(wider, "wider"), test=("a",)) >= plain


@pytest.mark.usefixtures("backend")
@SETTINGS
@given(study=STUDIES, share=st.floats(0, 1))
def test_near_and_far_are_complements_and_disjoint_halves(study: Study, share: float) -> None:
    scores = study.scored(study.written(), "s")
    total, keep = len(study.uids), round(share * len(study.uids))
    near = study.cut(Near, scores, test=("a", "b"), size=str(keep))
    far = study.cut(Far, scores, test=("a", "b"), size=str(total - keep))
    assert len(near) == keep
    assert near | far == set(study.uids)
    assert not near & far
    if 2 * keep <= total:
        assert not near & study.cut(Far, scores, test=("a", "b"), size=str(keep))


@pytest.mark.usefixtures("backend")
@SETTINGS
@given(study=STUDIES)
def test_leaks_go_unless_the_reference_has_them_too(study: Study) -> None:
    kept = study.cut(GapMatch, study.scored(study.written(), "s"), test=("a", "b"))
    margin = dict(zip(study.uids, study.margin(("a", "b")), strict=True))
    assert uid(0, 0) not in kept or margin[uid(0, 0)] <= 0  # sign rows may lie in the reference by chance
    if not study.ties:
        assert uid(0, 0) not in kept
    # the second leak is in the reference, too: it may stay, and does unless it violates another test image
    assert (uid(0, 1) in kept) == (margin[uid(0, 1)] <= 0)
    assert (set(study.uids) == kept) == bool((study.margin(("a", "b")) <= 0).all())  # no closer than the reference


@pytest.mark.usefixtures("backend")
@SETTINGS
@given(study=STUDIES, order=st.randoms(use_true_random=False))
def test_rotation_and_the_order_of_rows_parts_and_groups_change_nothing(study: Study, order: Any) -> None:
    plain = study.scored(study.written(), "s", group_bytes=1)
    rng = np.random.default_rng(order.randrange(1 << 30))
    turn, sign = rng.permutation(DIM), rng.choice([-1, 1], DIM).astype(np.float16)  # orthogonal, exact in float16

    def rotated(rows: np.ndarray) -> np.ndarray:
        return rows[:, turn] * sign

    turned = study.scored(
        study.written(
            pool=[rotated(rows) for rows in study.pool],
            reference=[rotated(study.reference)[::-1].copy()],
            **{name: [rotated(rows)[rng.permutation(7)]] for name, rows in study.tests.items()},
        ),
        "turned",
    )
    half = len(study.uids) // 2
    for kind, words in ((GapMatch, {"test": ("a", "b")}), (Near, {"test": ("a",), "size": str(half)}),
                        (Far, {"test": ("b",), "size": str(half)})):  # fmt: skip
        # one after the other: the manifests name the embeddings that exact rows are read from
        assert study.cut(kind, turned, **words) == expected_cut(study, kind, words)
    study.written()
    for kind, words in ((GapMatch, {"test": ("a", "b")}), (Near, {"test": ("a",), "size": str(half)})):
        assert study.cut(kind, plain, **words) == expected_cut(study, kind, words)


def expected_cut(study: Study, kind: type, words: dict[str, Any]) -> set[str]:
    """The cut by brute force, ties by uid."""
    names = words["test"]
    if kind is GapMatch:
        return {u for u, value in zip(study.uids, study.margin(names), strict=True) if not value > 0}
    m = np.max([twins.similarities(study.rows, study.tests[n]).max(axis=1) for n in names], axis=0)
    order = sorted(range(len(m)), key=lambda i: (m[i], study.uids[i]))
    size = int(words["size"])
    chosen = order[:size] if kind is Near else order[len(order) - size :]
    return {study.uids[i] for i in chosen}
