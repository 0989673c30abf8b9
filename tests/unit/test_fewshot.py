"""Few-shot tables: every model is compared with the full pool's that was trained as it was."""

from __future__ import annotations

from clipgap_ray.reporting import fewshot
from clipgap_ray.reporting.tables import Record


def _record(arm: str, split: str, train_on: str, accuracy: float) -> Record:
    return {"test": "val", "arm": arm, "split": split, "train_on": train_on, "supervised": False, "k": 1,
            "accuracy": accuracy, "sd": None, "num_images": 100, "num_draws": 1}  # fmt: skip


RECORDS = [
    _record("full", "full", "pool+reference", 0.8),
    _record("full · without reference", "full", "pool", 0.6),
    _record("gap-val", "gap-val", "pool+reference", 0.7),
    _record("near-val · without reference", "near-val", "pool", 0.5),
    _record("CLIP · reference only", "full", "reference", 0.9),  # its split is whatever the study says
]


def test_changes_are_against_the_full_pool_trained_alike() -> None:
    _, rows = fewshot.table(RECORDS, [], "full")
    assert {row[1]: row[4][1] for row in rows} == {
        "full": "", "full · without reference": "", "gap-val": "Δ −10.0", "near-val · without reference": "Δ −10.0",
        "CLIP · reference only": "Δ +10.0",
    }  # fmt: skip


def test_the_sentence_compares_alike_with_alike() -> None:
    said = fewshot.sentence(RECORDS, "val", "full")
    assert "80.0 %, those of gap-val 70.0 % (−10.0 points" in said
    assert "80.0 %" in fewshot.sentence(RECORDS[:1] + RECORDS[2:3], "val", "full")
    assert fewshot.sentence(RECORDS[-1:], "val", "full").endswith("CLIP · reference only 90.0 %.")
