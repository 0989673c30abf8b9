"""Every verdict about a drop, from made-up results; nothing is read from disk."""

from __future__ import annotations

from typing import Any

import pytest

from clipgap_ray.kernels import intervals
from clipgap_ray.reporting import hypotheses
from clipgap_ray.reporting.hypotheses import about_zero, above, at_most, differs, verdict

DROP = 20.0
REGIMES = ("never seen", "wrong caption", "other background", "well covered")


def base(
    difference: tuple[float, float, float] = (0.05, 0.03, 0.07),
    explained: tuple[float, float, float] | None = (19.0, 15.0, 23.0),
    residual: tuple[float, float, float] = (1.0, -3.0, 5.0),
    drop: tuple[float, float] = (16.0, 24.0),
) -> dict[str, Any]:
    """The report's join of one model; by default a drop of 20 points that distance explains."""
    parts = explained and {
        "explained_pp": explained[0], "explained_interval_pp": list(explained[1:]),
        "residual_pp": residual[0], "residual_interval_pp": list(residual[1:]),
    }  # fmt: skip
    return {
        "test": "animals", "arm": "full", "supervised": False, "groups": ["common", "counter"],
        "drop": {"drop_pp": DROP, "interval_pp": list(drop)},
        "exposure": {"difference": difference[0], "interval": list(difference[1:])},
        "decomposition": parts, "why_not": "" if parts else "only 20% of the counter photos lie in the common support",
    }  # fmt: skip


def joined(common: list[int], counter: list[int], backgrounds: float | None = 0.2, **more: Any) -> dict[str, Any]:
    """A `join.json` with photos by regime."""
    groups = [
        {"group": group, "num_images": sum(counts), "same_background": backgrounds,
         "regimes": [{"regime": name, "num_images": n} for name, n in zip(REGIMES, counts, strict=True)]}
        for group, counts in (("common", common), ("counter", counter))
    ]  # fmt: skip
    return {"": {"test": "animals", "models": {"full-s0": {"neighbours": {"groups": groups}, **more}}}}


def parts(foreground: tuple[float, float, float], whole: float = 0.05) -> dict[str, Any]:
    sides = {"whole": (whole, 0.03, 0.07), "foreground": foreground}
    return {"similarity_parts": {"parts": [
        {"part": name, "exposure": {"difference": v[0], "interval": list(v[1:])}} for name, v in sides.items()
    ]}}  # fmt: skip


def chosen(
    same: float, held: tuple[float, float, float] | None, other: tuple[float, float, float] | None = None
) -> Any:
    own = {"same_photos_drop_pp": same, "held_out_drop_pp": held and held[0],
           "held_out_interval_pp": list(held[1:]) if held else None}  # fmt: skip
    matrix = [
        {"discovered_by": by, "evaluated": "full", "held_out_drop_pp": v[0], "held_out_low_pp": v[1],
         "held_out_high_pp": v[2]} for by, v in (("full", held), ("far", other)) if v
    ]  # fmt: skip
    return {"": {"by": "full", "models": {"full": own}, "matrix": matrix}}


def judged(
    hypothesis: str, joins: Any = None, commands: Any = None, selections: Any = None, trials: Any = None
) -> tuple[str, list[str]]:
    """The verdict of a hypothesis and the outcomes of its predictions."""
    records = hypotheses.table(joins or [base()], trials or [], commands or {}, selections or {})
    own = [r for r in records if r["hypothesis"] == hypothesis]
    assert len({r["verdict"] for r in own}) == 1
    return own[0]["verdict"], [r["outcome"] for r in own]


# --- intervals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "is_above", "is_zero"),
    [
        (15, 23, "holds", "fails"),
        (1, 5, "holds", "fails"),
        (-3, 5, "fails", "holds"),  # holds 0 and not the whole: no effect worth the name
        (-3, 25, "open", "open"),  # holds 0 and the whole: nothing is known
        (-9, -2, "fails", "fails"),
        (0, 5, "fails", "holds"),
        (20, 21, "holds", "fails"),
    ],
)
def test_an_interval_is_read_against_nothing_and_the_whole(
    low: float, high: float, is_above: str, is_zero: str
) -> None:
    assert above(low, high, DROP) == is_above
    assert about_zero(low, high, DROP) == is_zero
    assert differs(low, high, DROP) == {"holds": "fails", "fails": "holds", "open": "open"}[is_zero]


def test_without_a_whole_an_interval_around_0_stays_open() -> None:
    assert (above(-1, 1), above(-1, 0), about_zero(-1, 1, None)) == ("open", "fails", "open")
    assert above(-1, 1, -20) == "open", "a negative whole is no yardstick for more than 0"
    assert [at_most(*ends, 15) for ends in ((5, 15), (14, 16), (15.1, 20))] == ["holds", "open", "fails"]


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["holds", "holds"], "supported"),
        (["fails", "open"], "contradicted"),
        (["holds", "fails", "not measured"], "in part"),
        (["holds", "not measured"], "not measured: run it"),
        (["open", "holds"], "undecided"),
        (["fails", "not measured"], "contradicted"),
    ],
)
def test_outcomes_make_a_verdict(outcomes: list[str], expected: str) -> None:
    assert verdict((outcome, "run it" if outcome == "not measured" else "") for outcome in outcomes) == expected


def test_a_difference_of_proportions_is_newcombe_s() -> None:
    """Newcombe (1998), table II, (a): 56/70 - 48/80 = 0.2, method 10: 0.0524 to 0.3339."""
    assert intervals.proportion_difference((56, 70), (48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert intervals.proportion_difference((0, 10), (0, 20)) == pytest.approx((-0.1611, 0.2775), abs=5e-5)
    for wrong in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="expected 0 <= hits"):
            intervals.proportion_difference(wrong, (1, 2))


# --- the five --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "expected", "outcomes"),
    [
        (base(), "supported", ["holds", "holds"]),
        (base(difference=(0, -0.01, 0.01), residual=(19, 15, 23)), "contradicted", ["open", "fails"]),
        (base(residual=(9, 5, 13)), "in part", ["holds", "fails"]),
        (base(residual=(5, -10, 21)), "undecided", ["holds", "open"]),
        (base(explained=None), "not measured: only 20% of the counter photos lie in the common support",
         ["holds", "not measured"]),
        (base(drop=(-2, 9)), "no drop to explain", ["holds", "holds"]),
        (base(residual=(float("nan"),) * 3), "undecided", ["holds", "open"]),
    ],
)  # fmt: skip
def test_exposure(world: dict[str, Any], expected: str, outcomes: list[str]) -> None:
    assert judged("exposure", [world]) == (expected, outcomes)


SHORTCUT = base(difference=(0, -0.01, 0.01), explained=(0, -3, 3), residual=(20, 16, 24))
ELSEWHERE, ALIKE = joined([10, 10, 10, 70], [5, 5, 60, 30]), joined([10, 10, 30, 50], [10, 10, 30, 50])


@pytest.mark.parametrize(
    ("world", "commands", "expected", "outcomes"),
    [
        (SHORTCUT, ELSEWHERE, "supported", ["holds", "holds", "holds"]),
        (SHORTCUT, ALIKE, "undecided", ["holds", "holds", "open"]),
        (SHORTCUT, joined([0, 0, 60, 40], [0, 0, 10, 90]), "in part", ["holds", "holds", "fails"]),
        (SHORTCUT, {}, f"not measured: {hypotheses.RUN_BACKGROUNDS}", ["holds", "holds", "not measured"]),
        (SHORTCUT, joined([1, 1, 1, 1], [1, 1, 1, 1], None), f"not measured: {hypotheses.RUN_BACKGROUNDS}",
         ["holds", "holds", "not measured"]),
        (base(), {}, "contradicted", ["fails", "fails", "not measured"]),
        (base(explained=(10, 6, 14), residual=(10, 6, 14)), ELSEWHERE, "in part", ["fails", "holds", "holds"]),
        ({**SHORTCUT, "drop": {"drop_pp": 1, "interval_pp": [-1, 3]}}, ELSEWHERE, "no drop to explain", None),
    ],
)  # fmt: skip
def test_shortcut(world: Any, commands: Any, expected: str, outcomes: list[str] | None) -> None:
    found = judged("shortcut", [world], commands)
    assert found[0] == expected
    assert outcomes is None or found[1] == outcomes


@pytest.mark.parametrize(
    ("commands", "expected"),
    [
        (joined([10, 5, 15, 70], [10, 60, 10, 20]), "supported"),
        (joined([10, 60, 10, 20], [10, 5, 15, 70]), "contradicted"),
        (joined([10, 20, 10, 60], [10, 22, 10, 58]), "undecided"),
        (joined([10, 5, 0, 85], [10, 60, 0, 30], None), "supported"),  # captions need no labels of backgrounds
        ({}, f"not measured: {hypotheses.RUN_NEIGHBOURS}"),
        ({"": {**ELSEWHERE[""], "test": "others"}}, f"not measured: {hypotheses.RUN_NEIGHBOURS}"),
    ],
)
def test_caption(commands: Any, expected: str) -> None:
    assert judged("caption", commands=commands)[0] == expected


@pytest.mark.parametrize(
    ("foreground", "expected"),
    [
        ((0.04, 0.02, 0.06), "supported"),
        ((-0.04, -0.06, -0.02), "supported"),
        ((0.0, -0.01, 0.01), "contradicted"),
        ((0.02, -0.02, 0.06), "undecided"),
        (None, f"not measured: {hypotheses.RUN_PARTS}"),
    ],
)
def test_foreground(foreground: Any, expected: str) -> None:
    more = parts(foreground) if foreground else {}
    assert judged("foreground", commands=joined([1, 1, 1, 1], [1, 1, 1, 1], **more))[0] == expected


@pytest.mark.parametrize(
    ("selections", "expected"),
    [
        (chosen(30, (4, -2, 10)), "supported"),
        (chosen(30, (4, -2, 10), (3, -3, 9)), "supported"),
        (chosen(30, (26, 20, 30)), "contradicted"),
        (chosen(30, (4, -2, 10), (26, 20, 30)), "in part"),
        (chosen(30, (15, 10, 20)), "undecided"),
        (chosen(30, None), "not measured: too few photos of a class and background for two halves"),
        ({}, f"not measured: {hypotheses.RUN_DISCOVER}"),
    ],
)
def test_selection(selections: Any, expected: str) -> None:
    assert judged("selection", selections=selections)[0] == expected


def test_the_table_names_numbers_and_the_first_clip_of_every_test_set() -> None:
    supervised = {**base(), "arm": "supervised", "supervised": True}
    second = {**SHORTCUT, "test": "birds", "arm": "full"}
    records = hypotheses.table([supervised, base(), second], [], ELSEWHERE, chosen(30, (4, -2, 10)))
    assert [r["arm"] for r in records] == ["full"] * len(records)
    assert list(dict.fromkeys(r["test"] for r in records)) == ["animals", "birds"]
    share = next(r for r in records if r["hypothesis"] == "shortcut" and "other background" in r["quantity"])
    assert share["value"] == pytest.approx(60 - 10)
    assert share["low"] < 50 < share["high"]
    assert share["quantity"].endswith("(full-s0)")
    on_birds = [r["verdict"] for r in records if r["test"] == "birds" and r["hypothesis"] == "selection"]
    assert on_birds == [f"not measured: {hypotheses.RUN_DISCOVER}"], "a selection stands beside one test set only"
    assert hypotheses.table([], [], ELSEWHERE, {}) == []
