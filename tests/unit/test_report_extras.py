"""Sections that the report shows when other commands left their results in the study's folder."""

import html
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from matplotlib import pyplot

from clipgap_ray import store
from clipgap_ray.config.report import ReportSettings
from clipgap_ray.reporting import found, sections_chosen, sections_found, theme
from clipgap_ray.reporting.study import Study
from clipgap_ray.stages import discover, join, report
from tests.unit.study_extras import add_extras
from tests.unit.study_fixture import build_study

EXTRAS = {"few-shot", "duplicates", "asked", "neighbours", "selection", "encoders"}
EMPTY = {"light.svg": b"", "dark.svg": b"", "light.png": b""}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A study with everything; its figures are drawn once and not written: that takes longer than all the rest."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        for module in (join, discover):
            patch.setattr(module, "render", lambda draw: EMPTY)
        patch.setattr(report.page, "render", lambda draw: pyplot.close(draw(theme.LIGHT)) or EMPTY)
        add_extras(build_study(folder, pool_rows=160, test_rows=80), draws=5)
        summary = report.run(ReportSettings(study=str(folder), gallery_rows=1, draws=20))
    assert summary.extra["missing"] == {}
    return folder


@pytest.fixture(scope="module")
def page(root) -> str:
    return (root / "report" / "index.html").read_text()


def section(page: str, anchor: str) -> str:
    return re.sub(r"<[^>]+>", " ", page.split(f'<section id="{anchor}"')[1].split("</section>")[0])


def test_every_extra_has_a_section_in_its_place(page) -> None:
    anchors = re.findall(r'<section id="([a-z-]+)"', page)
    assert set(anchors) >= EXTRAS
    assert anchors.index("groups") < anchors.index("asked") < anchors.index("drop-similarity")
    assert anchors[-2:] == ["training", "provenance"]


def test_numbers_of_the_sections_are_those_of_the_commands(root, page) -> None:
    joined = json.loads((root / "join" / "join.json").read_text())
    groups = joined["models"]["full"]["neighbours"]["groups"]
    assert f"{100 * groups[0]['names_class']:.0f}\u00a0% for common" in section(page, "neighbours")
    matched = next(m for m in joined["adjusted_robustness"]["models"] if m["model"] == "gap-val")
    assert f"{abs(matched['matched_residual_pp']):.1f}" in section(page, "neighbours")
    count = joined["models"]["full"]["similarity_parts"]["num_images"]
    said = f"full: the groups differ in background (95 % interval), on {count} photos"
    assert said in section(page, "neighbours")
    chosen = json.loads((root / "discover" / "discover.json").read_text())["models"]["full"]
    assert f"{abs(chosen['inflation_pp']):.1f}" in section(page, "selection")
    agreed = pq.read_table(root / "report" / "tables" / "encoder_agreement.parquet").to_pylist()
    assert {(r["first"], r["second"]) for r in agreed} == {("projection", "other")}
    assert {r["cut"] for r in agreed} == {"gap-match", "near 0.5", "far 0.5"}
    assert all(f"{r['jaccard']:.2f}" in section(page, "encoders") for r in agreed)
    for word in ("linear probe (all)", "1 per class", "74.0", "Δ −8.0"):
        assert word in section(page, "few-shot")


def test_numbers_of_joins_and_chosen_groups_are_tables(root) -> None:
    def table(name: str) -> list[dict]:
        assert (root / "report" / "tables" / f"{name}.csv").exists()
        return pq.read_table(root / "report" / "tables" / f"{name}.parquet").to_pylist()

    joined = json.loads((root / "join" / "join.json").read_text())
    own = joined["models"]["full"]
    regimes = [r for r in table("pool_neighbours") if r["model"] == "full"]
    assert [r["num_images"] for r in regimes] == [
        r["num_images"] for g in own["neighbours"]["groups"] for r in g["regimes"]
    ]
    common = next(r for r in table("background_prevalence") if r["model"] == "full")
    assert common["num_classes"] == own["prevalence"]["num_classes"]
    assert len(table("background_prevalence_per_class")) == len(joined["models"]) * len(own["prevalence"]["classes"])
    part = next(r for r in table("similarity_parts") if (r["model"], r["part"]) == ("full", "background"))
    assert part["difference"] == own["similarity_parts"]["parts"][2]["exposure"]["difference"]
    assert [r["matched_residual_pp"] for r in table("adjusted_robustness")] == [
        m["matched_residual_pp"] for m in joined["adjusted_robustness"]["models"]
    ]
    chosen = json.loads((root / "discover" / "discover.json").read_text())
    assert table("group_selection")[0]["inflation_pp"] == chosen["models"]["full"]["inflation_pp"]
    assert [r["held_out_drop_pp"] for r in table("group_selection_matrix")] == [
        r["held_out_drop_pp"] for r in chosen["matrix"]
    ]
    assert [r["class_name"] for r in table("group_selection_per_class")] == [r["class_name"] for r in chosen["classes"]]
    beside = joined["further_inputs"]
    assert beside[str(root / "embed" / "pool")] == Study.open(str(root)).embeddings("pool").digest
    assert {path.rsplit("/", 1)[-1] for path in beside} == {
        "pool", "labels-photos.parquet", "labels-pool", "scores-foreground.parquet", "scores-background.parquet"
    }  # fmt: skip


def test_hypotheses_stand_beside_what_the_commands_measured(root, page) -> None:
    records = pq.read_table(root / "report" / "tables" / "hypotheses.parquet").to_pylist()
    assert (root / "report" / "tables" / "hypotheses.csv").exists()
    verdicts = {r["hypothesis"]: r["verdict"] for r in records}
    assert list(verdicts) == ["exposure", "shortcut", "caption", "foreground", "selection"]
    assert not any("run `" in verdict for verdict in verdicts.values()), "everything was run"
    part = pq.read_table(root / "report" / "tables" / "group_drop_and_similarity.parquet").to_pylist()[0]
    residual = next(r for r in records if r["hypothesis"] == "exposure" and r["unit"] == "points")
    assert (residual["value"], residual["low"]) == (part["residual_pp"], part["residual_low_pp"])
    chosen = json.loads((root / "discover" / "discover.json").read_text())["models"]["full"]
    assert next(r for r in records if r["hypothesis"] == "selection")["value"] == chosen["held_out_drop_pp"]
    shown = html.unescape(section(page, "hypotheses"))
    assert all(verdict in shown for verdict in verdicts.values())
    assert all(r["prediction"] in shown for r in records)


def test_duplicates_stand_at_every_threshold_before_and_after(root, page) -> None:
    study = Study.open(str(root))
    records = {(r["test"], r["where"], r["similarity"]): r for r in found.duplicates(study)}
    nearest = study.queries("val").similarity
    assert records["val", "pool", 0.99]["rate"] == pytest.approx((nearest >= 0.99).mean())
    # Two test images lie in the pool; the cut to the reference's gap takes them out.
    assert records["val", "pool", 0.99]["rate"] >= 2 / 80 > records["val", found.CUT, 0.99]["rate"]
    assert all(r["low"] <= r["rate"] <= r["high"] for r in records.values())
    rates = [records["val", where, None]["rate"] for where in ("pool", found.CUT)]
    assert rates == [2 / 80, 0], "the two are in the pool byte for byte"
    assert {r["by"] for r in records.values()} == {"similarity", "sha256"}
    shown = section(page, "duplicates")
    assert "equal bytes: pool" in shown
    assert "Byte for byte 2 of all 240 test images lie in the pool." in shown
    assert [r["sha256"] + r["near"] for r in found.removed_duplicates(study)] == [2, 5]
    assert "≥ 0.99: after the cut" in section(page, "duplicates")


def test_results_of_other_predictions_and_scores_are_marked(root, page, tmp_path) -> None:
    for word in ("predictions that are not", "neither side is"):
        assert word not in page
    shutil.copytree(root, tmp_path / "s", ignore=shutil.ignore_patterns("report", "world", "gaps", "runs"))
    folder = tmp_path / "s"
    for name in ("discover", "join"):  # one folder deeper, as several of them lie
        shutil.move(folder / name, folder / "moved")
        shutil.move(folder / "moved", folder / name / "second")
    for path in (folder / "eval").rglob("*.parquet"):
        store.write_table(str(path), pq.read_table(path).slice(1))
    store.write_json(str(folder / "scores" / "manifest.json"), {"stage": "score", "digest": "9" * 64})
    study = Study.open(str(folder))
    ((name, joined),) = found.joins(study).items()
    assert name == "second"
    notes = " ".join(sections_chosen.neighbours(study, name, joined).notes)
    assert notes.count("not those of this study") == len(joined["models"])
    selection = sections_chosen.selection(study, name, found.selections(study)[name])
    assert "not those of this study" in " ".join(selection.notes)
    assert selection.anchor == "selection-second"
    assert "neither side" in " ".join(sections_found.agreement(study, found.agreements(study)).notes)
