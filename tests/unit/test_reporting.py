"""The report of a fake study: its numbers against brute force, its page whole, and what is missing named."""

import base64
import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from clipgap_ray import schema, store
from clipgap_ray.config.report import ReportSettings
from clipgap_ray.errors import BudgetError, ConfigError, DataError
from clipgap_ray.hidden import read_hidden
from clipgap_ray.kernels import robustness
from clipgap_ray.reporting import (
    conclusions,
    density,
    fewshot,
    figures,
    figures_models,
    galleries,
    joined,
    planted,
    robust,
    sections_groups,
    sections_shift,
    similarity,
    tables,
    tables_groups,
    theme,
)
from clipgap_ray.reporting import page as report_page
from clipgap_ray.reporting.study import Study
from clipgap_ray.stages import report
from tests.unit.study_fixture import Built, build_study

EMPTY = {"light.svg": b"", "dark.svg": b"", "light.png": b""}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    return build_study(tmp_path_factory.mktemp("study"), seeds=(0, 1))


@pytest.fixture(scope="module")
def study(built) -> Study:
    return Study.open(str(built.root))


def cut_texts(figure: Figure) -> list[str]:
    """Titles, labels, notes and legends of a drawn figure that reach beyond its edge."""
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes._right_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    shown = [text for text in texts if text.get_visible() and text.get_text()]
    page = figure.bbox.padded(2)  # pixels
    corners = {text: text.get_window_extent().corners() for text in shown}
    return [text.get_text() for text in shown if not all(page.contains(x, y) for x, y in corners[text])]


@pytest.fixture(scope="module")
def page(built) -> str:
    cut, save = [], Figure.savefig
    with pytest.MonkeyPatch.context() as patch:

        def saving(figure, *args, **words):
            save(figure, *args, **words)
            figure.canvas.draw()  # savefig had another resolution
            cut.extend(cut_texts(figure))

        patch.setattr(Figure, "savefig", saving)
        summary = report.run(ReportSettings(study=str(built.root), gallery_rows=2, draws=100))
    assert summary.extra["missing"] == {}
    assert cut == []
    return (built.root / "report" / "index.html").read_text()


def test_a_legend_takes_as_many_columns_as_there_is_room_for() -> None:
    columns = []
    for length in (5, 20, 200):
        with theme.using(theme.LIGHT):
            figure, axes = theme.grid(3)
            for number in range(6):
                axes[0].plot([0, 1], [0, number], label=f"{number}".ljust(length, "m"))
            theme.legend_above(figure, axes[0])
            figure.canvas.draw()
        columns.append(figure.legends[0]._ncols)
        assert columns[-1] == 1 or cut_texts(figure) == []
    assert columns[0] == 6 > columns[1] > columns[2] == 1


# --- numbers ---------------------------------------------------------------------------------------------


def test_closeness_and_histograms_count_every_test_image(built, study) -> None:
    for record in similarity.closeness(study):
        test = record["test"]
        closer = (built.similarity[test].max(axis=1) > built.tau[test]).sum()
        assert record["num_closer_to_pool"] == closer
        bins = [b for b in similarity.histograms(study) if b["test"] == test]
        assert sum(b["pool"] for b in bins) == sum(b["reference"] for b in bins) == record["num_images"]


def test_accuracy_table_matches_the_predictions(study) -> None:
    records = tables.accuracy(study)
    gap = tables.lookup(records, split="gap-sketch", test="sketch")
    right = [study.predictions(f"gap-sketch-s{s}", "sketch").correct for s in (0, 1)]
    full = [study.predictions(f"full-s{s}", "sketch").correct for s in (0, 1)]
    assert gap["accuracy"] == pytest.approx(np.mean(right))
    assert gap["sd_seeds"] == pytest.approx(np.std(np.mean(right, axis=1), ddof=1))
    assert gap["drop_pp"] == pytest.approx(100 * (np.mean(full) - np.mean(right)))
    assert gap["drop_relative"] == pytest.approx(1 - np.mean(right) / np.mean(full))
    assert gap["targeted"]
    assert not tables.lookup(records, split="gap-sketch", test="val")["targeted"]
    assert tables.lookup(records, split="full", test="val", objective="clip")["drop_pp"] is None
    assert sum(r["objective"] == "supervised" for r in records) == 3 * 3


def test_predictions_in_another_order_are_joined_by_uid(built, tmp_path) -> None:
    shutil.copytree(built.root, tmp_path / "s")
    path = tmp_path / "s" / "eval" / "gap-sketch-s1" / "sketch.parquet"
    before = tables.lookup(tables.accuracy(Study.open(str(tmp_path / "s"))), split="gap-sketch", test="sketch")
    store.write_table(str(path), pq.read_table(path).take(list(range(79, -1, -1))))
    after = tables.lookup(tables.accuracy(Study.open(str(tmp_path / "s"))), split="gap-sketch", test="sketch")
    assert after["drop_se_images_pp"] == pytest.approx(before["drop_se_images_pp"])


def test_seeds_with_different_photos_are_compared_on_those_that_all_have(built, study, tmp_path) -> None:
    shutil.copytree(built.root, tmp_path / "s")
    path = tmp_path / "s" / "eval" / "gap-sketch-s1" / "counteranimal.parquet"
    kept = np.arange(79, 4, -1)
    store.write_table(str(path), pq.read_table(path).take(kept.tolist()))
    right = [study.predictions(f"gap-sketch-s{s}", "counteranimal").correct[5:] for s in (0, 1)]
    other = Study.open(str(tmp_path / "s"))
    record = tables.lookup(tables.accuracy(other), split="gap-sketch", test="counteranimal")
    assert record["num_images"] == 75
    assert record["accuracy"] == pytest.approx(np.mean(right))
    group = next(r for r in tables_groups.group_shift(other, 20, 0) if r["arm"] == "gap-sketch")
    assert sum(group["num_images"].values()) == 75
    groups = np.array(built.tests["counteranimal"].groups)[5:]
    expected = np.mean(right, axis=0)[groups == "common"].mean()
    assert group["unbalanced"]["common"] == pytest.approx(expected)
    table = pq.read_table(path)
    uids = pa.array([f"x{i}" for i in range(table.num_rows)])
    store.write_table(str(path), table.set_column(table.column_names.index("uid"), "uid", uids))
    with pytest.raises(DataError, match="seeds of gap-sketch on counteranimal share no photo"):
        tables.accuracy(Study.open(str(tmp_path / "s")))


def test_bins_hold_every_image_once_and_their_mean_is_the_accuracy(study) -> None:
    bins = similarity.accuracy_by_similarity(study, 0.05)
    records = tables.accuracy(study)
    for test in study.tests:
        rows = [b for b in bins if b["test"] == test and b["model"] == "full"]
        count = sum(b["num_images"] for b in rows)
        mean = sum(b["accuracy"] * b["num_images"] for b in rows) / count
        assert count == 80
        assert mean == pytest.approx(tables.lookup(records, split="full", test=test, objective="clip")["accuracy"])
        assert all(b["low"] <= b["accuracy"] <= b["high"] for b in rows)
    # An exact copy has similarity 1 (or a rounding above): it must not open a bin beyond 1.
    assert max(b["high_similarity"] for b in bins) <= 1.0 + 1e-9


def test_gap_check_passes_and_sees_a_broken_cut(built, study, tmp_path) -> None:
    checks = similarity.gap_check(study)
    assert {(c["split"], c["test"]) for c in checks} == {("gap-sketch", "sketch"), ("gap-val", "val")}
    assert all(c["num_equal"] == c["num_points"] == 80 and c["max_deviation"] == 0 for c in checks)
    assert "holds at every point" in conclusions.on_gap_check(checks)
    shutil.copytree(built.root, tmp_path / "s")
    full, cut = (tmp_path / "s" / "gaps" / name / "sketch.parquet" for name in ("full", "gap-sketch"))
    shutil.copy(full, cut)
    broken = similarity.gap_check(Study.open(str(tmp_path / "s")))
    closer = (built.similarity["sketch"].max(axis=1) > built.tau["sketch"]).sum()
    assert broken[0]["num_violations"] == closer
    assert f"is broken at {closer} points" in conclusions.on_gap_check(broken)


def test_neighbour_curves_stand_beside_the_reference_s(built, study) -> None:
    records = density.neighbour_curves(study)
    keep, similarity_of = built.keeps["gap-sketch"], built.similarity["sketch"]
    kept = np.median(-np.sort(-np.where(keep, similarity_of, -np.inf), axis=1)[:, :3], axis=0)
    curve = [r["median_similarity"] for r in records if r["test"] == "sketch" and r["kind"] == "gap-match"]
    assert curve == pytest.approx(kept.tolist())
    assert {r["split"] for r in records if r["test"] == "sketch"} == {"pool", "gap-sketch", "reference"}
    third = {(r["test"], r["kind"]): r["median_similarity"] for r in records if r["k"] == 3}
    denser = third["sketch", "gap-match"] > third["sketch", "reference"]
    said = density.sentence(records)
    assert ("sketch" in said) == denser
    assert density.sentence([]).startswith("No gap-matched split")
    assert {r["delta"] for r in records} == {0.05}
    assert "Within" not in said  # these gaps did not count the reference


def test_rows_outside_the_hull_are_shown_for_the_deltas_there_are(built, tmp_path) -> None:
    shutil.copytree(built.root, tmp_path / "s", ignore=shutil.ignore_patterns("report", "world", "eval"))
    path = str(tmp_path / "s" / "gaps" / "diagnostics.json")
    counts = {"pool": 9.0, "gap-sketch": 7.5, "gap-val": 1.0, "reference": 2.0}
    records = [{**r, "mean_rows_within": {"0.01": 0.5, "0.03": counts.get(r["split"], 4.0)}}
               for r in store.read_json(path)]  # fmt: skip
    store.write_json(path, records)
    found = density.neighbour_curves(Study.open(str(tmp_path / "s")))
    assert {r["delta"] for r in found} == {0.03}
    assert {(r["test"], r["kind"]): r["mean_rows_within"] for r in found}["sketch", "reference"] == 2.0
    said = density.sentence(found)
    assert said.endswith("Within 0.03 of the hull it holds more images than the reference on sketch (7.5 against 2.0).")
    titles = [axis.get_title() for axis in density.draw(found, theme.LIGHT).axes]
    assert "sketch  (n = 80)" in titles


def test_removed_rows_add_up_to_the_cut(built, study) -> None:
    per_image, per_class = similarity.removed(study)
    for test in ("sketch", "val"):
        gone = int((~built.keeps[f"gap-{test}"]).sum())
        assert sum(r["num_removed"] for r in per_image if r["test"] == test) == gone
        assert sum(r["num_removed"] for r in per_class if r["test"] == test) == gone
        assert sum(r["num_images"] for r in per_class if r["test"] == test) == 80


def test_robustness_needs_two_baselines(study, tmp_path) -> None:
    panels = robust.panels(study, tables.accuracy(study), 200, 0)
    assert [p.test for p in panels] == ["sketch", "counteranimal"]
    assert panels[0].line.num_points == 3
    full = tables.lookup(panels[0].points, arm="full")
    assert full["residual_pp"] == pytest.approx(100 * (full["y"] - full["predicted"]))
    assert full["residual_low_pp"] < full["residual_pp"] < full["residual_high_pp"]
    assert full["residual_se_seeds_pp"] > 0
    assert len(panels[0].without) == len(panels[0].lines) == 3
    by_hand = [
        robustness.residuals_pp(line, np.array([full["x"]]), np.array([full["y"]]))[0] for line in panels[0].lines
    ]
    assert (full["leave_one_out_low_pp"], full["leave_one_out_high_pp"]) == (min(by_hand), max(by_hand))
    assert [line["axes"] for line in panels[0].axes] == list(robustness.AXES)
    outside = [p for p in panels[0].points if p["extrapolates"]]
    assert all((p["beyond_pp"] > 0) == p["extrapolates"] for p in panels[0].points)
    assert any(f"{len(outside)} of {len(panels[0].points)}" in text for text in robust.warnings(panels, "val"))
    build_study(tmp_path, pool_rows=120, test_rows=24, num_supervised=1)
    small = Study.open(str(tmp_path))
    alone = robust.panels(small, tables.accuracy(small), 20, 0)
    assert alone[0].line is None
    assert "1 supervised baseline" in alone[0].why_no_line
    assert "No line" in conclusions.on_robustness(alone, "val")


def test_planted_truth_is_found_and_a_miss_is_seen(built, study, tmp_path) -> None:
    found = {r["what"]: (r["planted"], r["found"]) for r in planted.planted(study)}
    assert found == {"exact duplicates in the pool": (2, 2), "exact leaks of test images": (2, 2)}
    shutil.copytree(built.root, tmp_path / "s")
    path = tmp_path / "s" / "dedup" / "keep" / "part-00000.parquet"
    table = pq.read_table(path)
    kept = table.set_column(2, "keep", [[True] * table.num_rows])
    store.write_table(str(path), kept)
    missed = planted.planted(Study.open(str(tmp_path / "s")))
    assert (missed[0]["planted"], missed[0]["found"]) == (2, 0)


def test_every_grouped_test_set_has_a_section_of_its_own(study) -> None:
    one = tables_groups.group_shift(study, 20, 0)[:2]
    both = [*one, *({**record, "test": "other"} for record in one)]
    numbers = SimpleNamespace(groups=both, group_accuracy=tables_groups.group_accuracy(study), exposure=[], prompts=[])
    first, second = sections_shift.sections(study, numbers)
    assert (first.anchor, second.anchor) == ("groups", "groups-other")
    assert (first.title, second.title) == (
        "Common and counter backgrounds", "Common and counter backgrounds (other)"
    )  # fmt: skip
    assert [row[0] for row in first.tables[0].rows] == [r["arm"] for r in one]
    assert len({plot.name for section in (first, second) for plot in section.plots}) == 4
    drops = joined.joins(study, 5, 0)[:1]
    section = sections_groups.join(SimpleNamespace(joins=[*drops, {**drops[0], "test": "other"}]))
    names = [f"{drops[0]['arm']} · {test}" for test in (drops[0]["test"], "other")]
    assert [row[0].removeprefix("◆ ") for row in section.tables[0].rows] == names
    axes = section.plots[1].draw(theme.LIGHT).axes[0]
    photos = sum(drops[0]["num_images"].values())
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"{name}\nn = {photos}" for name in names]


def test_leaving_one_out_leaves_out_all_its_seeds(built, tmp_path) -> None:
    shutil.copytree(built.root, tmp_path / "s")
    info = json.loads((tmp_path / "s" / "study.json").read_text())
    sister = next(run for run in info["runs"] if run["name"] == "supervised-0")
    info["runs"].append({**sister, "name": "supervised-0-s1", "seed": 1})
    (tmp_path / "s" / "study.json").write_text(json.dumps(info))
    shutil.copytree(tmp_path / "s" / "eval" / "supervised-0", tmp_path / "s" / "eval" / "supervised-0-s1")
    other = Study.open(str(tmp_path / "s"))
    panel = robust.panels(other, tables.accuracy(other), 20, 0)[0]
    assert [line["left_out"] for line in panel.without] == [f"supervised · {n}k" for n in (12, 24, 36)]


def test_removed_rows_per_image_are_drawn_as_a_distribution(built, study) -> None:
    per_image, per_class = similarity.removed(study)
    figure = figures.removed_per_image(per_image, per_class, theme.LIGHT)
    own = sorted((r["num_removed"] for r in per_image if r["test"] == "sketch"), reverse=True)
    axis = next(axis for axis in figure.axes if axis.get_title().startswith("sketch"))
    assert axis.get_title() == "sketch  (n = 80)"
    x, y = axis.lines[0].get_data()
    assert (x.tolist(), y[-1]) == (own, pytest.approx(len(own) / 80))
    assert axis.texts[0].get_text() == f"{len(own) / 80:.0%} cost any\nmost: {own[0]}"


def test_kinds_of_pruning_differ_without_colour(study) -> None:
    curves = tables.pruning_curves(study, tables.accuracy(study))
    axis = figures_models.pruning_curves(curves, theme.LIGHT).axes[0]
    markers = [line.get_marker() for line in axis.lines if line.get_marker() not in ("None", "|", "_")]
    assert {"v", "o", "^", "*"} <= set(markers)


def test_figures_about_models_say_how_many_photos(study) -> None:
    panels = robust.panels(study, tables.accuracy(study), 20, 0)
    axis = figures_models.robustness_scatter(panels, "val", theme.LIGHT).axes[0]
    assert axis.get_xlabel() == "val accuracy (probit scale, n = 80)"
    assert axis.get_title() == "sketch  (n = 80)"
    results = tables_groups.group_shift(study, 20, 0)[:2]
    figure = figures_models.group_bars(results, theme.LIGHT)
    counts = results[0]["num_images"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [f"{group} (n = {counts[group]})" for group in ("common", "counter")]
    title = figures_models.class_drop_bars(results[0], theme.LIGHT).axes[0].get_title()
    assert f"n = {counts['common']} common, n = {counts['counter']} counter photos" in title


def test_group_shift_pools_seeds_without_counting_photos_twice(study) -> None:
    result = tables_groups.group_shift(study, 50, 0)[0]
    assert sum(result["num_images"].values()) == 80
    assert result["num_seeds"] == 2
    exposure = similarity.exposure(study)
    assert [e["test"] for e in exposure] == ["counteranimal"]
    assert 0 < exposure[0]["auc"] < 1


def test_the_join_takes_every_arm_beside_what_it_was_trained_on(built, study) -> None:
    records = {r["arm"]: r for r in joined.joins(study, 20, 0)}
    groups, classes = np.array(built.tests["counteranimal"].groups), built.tests["counteranimal"].labels
    kept = np.where(built.keeps["gap-sketch"], built.similarity["counteranimal"], -1).max(axis=1)
    tau = built.tau["counteranimal"]
    full = np.maximum(built.similarity["counteranimal"].max(axis=1), tau)
    for arm, s in (("full", full), ("gap-sketch", np.maximum(kept, tau)), ("supervised · 12k", tau)):
        means = [[s[(classes == c) & (groups == g)].mean() for g in ("common", "counter")] for c in range(8)]
        assert records[arm]["exposure"]["difference"] == pytest.approx(np.mean(np.diff(means, axis=1)) * -1)
    line = joined.flat(records["full"])
    assert line["drop_pp"] == pytest.approx(tables_groups.group_shift(study, 20, 0)[0]["drop"]["drop_pp"])
    assert records["full"]["arm"] in conclusions.on_join(list(records.values()))


def test_warnings_that_many_models_share_are_said_once() -> None:
    results = [{"arm": "a-b", "warnings": ["they miss the drop by +1.4 points: no", "no share"]},
               {"arm": "c", "warnings": ["they miss the drop by -2.0 points: no"]}]  # fmt: skip
    said = sections_groups._warnings(results)
    assert said == ["a-b, c: they miss the drop by −2.0 to +1.4 points: no.", "a-b: no share."]


# --- galleries -------------------------------------------------------------------------------------------


def test_gallery_shows_the_planted_leak_by_byte_range(built, study) -> None:
    strips = galleries.neighbours(study, galleries.Thumbnails(study.embeddings), "val", 3)
    leaked = strips[0]
    assert [tile.title for tile in leaked.tiles] == [
        "test image",
        "nearest reference",
        "nearest pool image",
        "nearest kept after the cut",
    ]
    assert leaked.tiles[2].image == leaked.tiles[0].image  # the same bytes
    assert base64.b64decode(leaked.tiles[0].image.split(",")[1]) in (built.tests["val"].jpegs[0], built.pool.jpegs[4])
    assert leaked.tiles[3].similarity <= leaked.tiles[1].similarity


def test_ladder_falls(study) -> None:
    rungs = [
        tile.similarity for tile in galleries.ladder(study, galleries.Thumbnails(study.embeddings), "sketch").tiles[1:]
    ]
    assert len(rungs) >= 5
    assert rungs == sorted(rungs, reverse=True)


def test_ladder_starts_at_the_nearest_row_of_the_pool_and_shows_no_dropped_one(built, study, monkeypatch) -> None:
    class Rows(galleries.Thumbnails):
        def by_row_id(self, name: str, row_id: int) -> tuple[str, str, str]:
            return "", str(row_id) if name == "pool" else "", "not read"

    pictures = Rows(study.embeddings)
    monkeypatch.setattr(galleries, "LADDER_ROWS", 1)  # the first of three parts
    for test in study.tests:
        queries = study.queries(test)
        for row in range(20):
            monkeypatch.setattr(galleries, "choose", lambda *_, row=row: np.array([row]))
            rungs = galleries.ladder(study, pictures, test).tiles[1:]
            assert rungs[0].similarity == pytest.approx(built.similarity[test][row].max(), abs=1e-6)
            assert int(rungs[0].caption) in queries.neighbour_ids[row]
            assert len({rung.caption for rung in rungs}) == len(rungs)
    assert study.dropped_rows(0).tolist() == [1, 2]
    monkeypatch.setattr(galleries, "LADDER_RUNGS", 400)
    monkeypatch.setattr(galleries, "choose", lambda *_: np.array([0]))
    shown = {int(rung.caption) for rung in galleries.ladder(study, pictures, "sketch").tiles[1:]}
    assert not {1, 2} & shown - set(study.queries("sketch").neighbour_ids[0])


def test_blocked_images_are_never_shown(built, study, tmp_path) -> None:
    blocked = built.pool.uids[3:5]
    np.save(tmp_path / "b.npy", schema.pack_uids(blocked))
    hidden = read_hidden(str(tmp_path / "b.npy"), ("caption~SKETCH", "image_bytes>100000"))
    pictures = galleries.Thumbnails(study.embeddings, hidden)
    assert pictures.by_row_id("pool", 3) == ("", "", "on the blocklist")
    drawn, photo = built.pool.styles.index("sketch", 5), built.pool.styles.index("photo", 5)
    assert pictures.by_row_id("pool", drawn) == ("", "", "hidden by caption~SKETCH")
    assert pictures.by_row_id("pool", photo)[0].startswith("data:image/jpeg")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("nsfw", "is no rule"),
        ("punsafe>low", "cannot be read"),
        ("caption>3", "caption is string"),
        ("width~3", "width is int32"),
        ("caption~(", "cannot be read"),
        ("clip_score<low", "cannot be read"),
    ],
)
def test_a_rule_that_hides_nothing_is_refused(rule, message) -> None:
    with pytest.raises(ConfigError, match=message):
        ReportSettings.load({"study": "s", "hide": (rule,)}, "report")


def test_rules_may_name_a_column_that_somebody_added_to_the_pool(built, tmp_path) -> None:
    root = tmp_path / "s"
    shutil.copytree(built.root, root, ignore=shutil.ignore_patterns("report", "eval", "runs"))
    with pytest.raises(ConfigError, match=r"no column 'punsafe'[\s\S]*columns: image_path, .*clip_score"):
        report.run(ReportSettings(study=str(root), hide=("punsafe>0.5",)))
    parts = sorted((root / "embed" / "pool" / "metadata").glob("*.parquet"))
    for part in parts:
        table = pq.read_table(part)
        unsafe = pa.array([0.9 if row % 2 else 0.1 for row in range(table.num_rows)])
        store.write_table(str(part), table.append_column("punsafe", unsafe))
    study = Study.open(str(root))
    hidden = read_hidden("", ("punsafe>0.5",), galleries.rule_columns(study.embeddings("pool")))
    pictures = galleries.Thumbnails(study.embeddings, hidden)
    assert pictures.by_row_id("pool", 21) == ("", "", "hidden by punsafe>0.5")
    assert pictures.by_row_id("pool", 20)[0].startswith("data:image/jpeg")
    assert pictures.by_row_id("val", 21)[0].startswith("data:image/jpeg")  # a test set without the column
    store.write_table(str(parts[1]), pq.read_table(parts[1]).drop_columns("punsafe"))
    with pytest.raises(DataError, match=r"punsafe[\s\S]*in all parts"):
        galleries.Thumbnails(Study.open(str(root)).embeddings, hidden).by_row_id("pool", (1 << 32) + 3)


@pytest.mark.parametrize(("span", "widest", "width"), [(0.4, 0.05, 0.05), (0.06, 0.05, 0.01), (0.06, 0.002, 0.002)])
def test_bins_narrow_where_an_encoder_crowds_its_similarities(study, monkeypatch, span, widest, width) -> None:
    queries = study.queries("val")
    crowded = dataclasses.replace(queries, similarity=np.linspace(1 - span, 1, len(queries.similarity)))
    monkeypatch.setattr(study, "queries", lambda test: crowded)
    assert similarity.bin_width(study, widest) == width


def test_numbers_that_round_to_nothing_have_no_sign() -> None:
    assert conclusions.signed(-0.04) == "0.0"
    assert conclusions.signed(0.0) == "0.0"
    assert conclusions.span(-0.04, 3.2, "+.1f") == "[0.0, +3.2]"
    assert conclusions.points(-8.13) == "−8.1\u00a0points"


def test_few_shot_curves_are_means_over_draws_with_their_spread(built, tmp_path) -> None:
    root = tmp_path / "s"
    shutil.copytree(built.root, root, ignore=shutil.ignore_patterns("report", "world", "tests"))
    assert fewshot.curves(Study.open(str(root))) == []
    rows = {"k": [1, 1, 0, 4], "seed": [0, 1, 0, 0], "acc1": [0.2, 0.4, 0.75, 0.5], "num_samples": [80] * 4}
    for run, lift in (("full-s0", 0.0), ("gap-sketch-s0", -0.1)):
        table = pa.table({**rows, "acc1": [a + lift for a in rows["acc1"]]})
        store.write_table(str(root / "probes" / run / "sketch.fewshot.parquet"), table)
    records = fewshot.curves(Study.open(str(root)))
    assert [r["k"] for r in records] == [1, 4, 0, 1, 4, 0]
    first = records[0]
    assert (first["accuracy"], first["num_draws"]) == (pytest.approx(0.3), 2)
    assert first["sd"] == pytest.approx(np.std([0.2, 0.4], ddof=1))
    assert records[1]["sd"] is None
    assert records[1]["low"] < 0.5 < records[1]["high"]
    text = fewshot.sentence(records, "sketch", "full")
    assert "all labelled images on sketch" in text
    assert "75.0 %" in text
    assert "−10.0 points" in text
    fewshot.draw(records, theme.LIGHT)
    store.write_table(str(root / "probes" / "full-s0" / "val.fewshot.parquet"), pa.table({"k": [1], "acc1": [20.0]}))
    with pytest.raises(DataError, match="lacks the columns"):
        fewshot.curves(Study.open(str(root)))
    bad = pa.table({"k": [1], "seed": [0], "acc1": [20.0], "num_samples": [80]})
    store.write_table(str(root / "probes" / "full-s0" / "val.fewshot.parquet"), bad)
    with pytest.raises(DataError, match="no fraction"):
        fewshot.curves(Study.open(str(root)))


# --- page ------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        values = dict(attrs)
        if tag != "a":
            self.loaded += [values[key] for key in ("src", "srcset", "href") if values.get(key)]


def test_page_is_self_contained_and_holds_every_section(page) -> None:
    links = Links()
    links.feed(page)
    assert len(links.loaded) > 20
    assert all(link.startswith("data:image/") for link in links.loaded)
    anchors = re.findall(r'<section id="([a-z-]+)"', page)
    assert anchors == ["answers", "table", "similarity", "accuracy-similarity", "pruning", "robustness", "galleries",
                       "gap-check", "density", "removed", "groups", "drop-similarity", "hypotheses", "duplicates",
                       "training", "provenance"]  # fmt: skip
    assert "prefers-color-scheme: dark" in page
    assert "NaN" not in re.sub(r"data:[^\"]*", "", page)
    assert len(page) < 20 * 2**20


def test_columns_that_only_a_later_record_has_are_kept(tmp_path) -> None:
    records = [{"test": "a", "n": 1}, {"test": "b", "n": 2, "low": 0.5, "nested": {}}]
    hashes = report_page.write_tables(str(tmp_path), {"t": records}, [])
    assert set(hashes) == {"tables/t.csv", "tables/t.parquet"}
    table = pq.read_table(tmp_path / "tables" / "t.parquet")
    assert table.to_pylist() == [{"test": "a", "n": 1, "low": None}, {"test": "b", "n": 2, "low": 0.5}]
    assert (tmp_path / "tables" / "t.csv").read_text().splitlines() == ["test,n,low", "a,1,", "b,2,0.5"]


def test_every_figure_and_table_is_a_file_with_its_digests(built, page) -> None:
    out = built.root / "report"
    manifest = json.loads((out / "manifest.json").read_text())
    for name, digest in manifest["files"].items():
        assert store.sha256((out / name).read_bytes()) == digest
    figures = {p.name for p in (out / "figures").iterdir()}
    for name in ("similarity_histograms", "accuracy_by_similarity", "pruning_curves", "effective_robustness"):
        assert {f"{name}.svg", f"{name}.png"} <= figures
    marks = pq.read_schema(out / "tables" / "accuracy.parquet").metadata
    assert {d["artefact"] for d in json.loads(marks[b"clipgap.digests"])} >= {"embed/pool", "scores", "splits/full"}


def test_the_same_records_give_the_same_figure(built, study, page) -> None:
    bins = similarity.histograms(study)
    files = theme.render(lambda shade: figures.similarity_histograms(bins, similarity.closeness(study), shade))
    assert files["light.svg"] == (built.root / "report" / "figures" / "similarity_histograms.svg").read_bytes()
    assert files["light.svg"] != files["dark.svg"]


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        ("eval", {"table", "accuracy-similarity", "pruning", "robustness", "groups", "drop-similarity"}),
        ("scores", {"similarity", "accuracy-similarity", "galleries", "removed", "drop-similarity"}),
        ("gaps", {"gap-check", "density"}),
        ("runs", {"training"}),
        ("world", set()),
        ("embed", set()),
    ],
)
def test_what_is_missing_is_named_in_the_page(built, tmp_path, gone, missing, monkeypatch) -> None:
    monkeypatch.setattr(report.page, "render", lambda draw: draw(theme.LIGHT) and EMPTY)  # draws, writes no bytes
    shutil.copytree(built.root, tmp_path / "s", ignore=shutil.ignore_patterns("report", gone))
    summary = report.run(ReportSettings(study=str(tmp_path / "s"), gallery_rows=1, draws=5))
    assert set(summary.extra["missing"]) == missing
    html = (tmp_path / "s" / "report" / "index.html").read_text()
    assert html.count("Not shown:") == len(missing)


def test_a_page_over_the_limit_is_refused_and_pictures_can_be_left_out(built, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report.page, "render", lambda draw: EMPTY)
    settings = {"study": str(built.root), "out": str(tmp_path / "r"), "gallery_rows": 1, "draws": 5}
    report.run(ReportSettings(**settings, images=False))
    html = (tmp_path / "r" / "index.html").read_text()
    assert "data:image/jpeg" not in html
    assert "pictures are off" in html
    assert "beforeprint" in html
    (tmp_path / "r" / "index.html").unlink()
    monkeypatch.setattr(report.page, "LARGEST_BYTES", len(html) // 2)
    with pytest.raises(BudgetError, match="MB, more than 20 MB") as error:
        report.run(ReportSettings(**settings))
    assert "--no-images" in error.value.hint
    assert not (tmp_path / "r" / "index.html").exists()


def test_a_directory_that_is_no_study_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"is no study"):
        report.run(ReportSettings(study=str(tmp_path)))
