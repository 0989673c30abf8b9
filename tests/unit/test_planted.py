"""Planted backgrounds beside what join and discover name: found, missed, and found though nobody planted them."""

from pathlib import Path

import pyarrow as pa
import pytest

from clipgap_ray import store
from clipgap_ray.reporting import conclusions, planted
from clipgap_ray.reporting.study import Study
from clipgap_ray.world.truth import TRUTH_SCHEMA, truth_row

# Pool rows before (grass, rock); common photos stand on grass. A hen's difference may be chance.
POOL = {"fox": (30, 2), "owl": (20, 0), "crab": (1, 25), "hen": (5, 4)}


def write_truth(root: Path, pool: dict[str, tuple[int, int]]) -> None:
    about = {"style": "photo"}
    rows = [
        truth_row("pool", "0.tar", f"{name}-{ground}-{i}", i, None, class_name=name, background=ground, **about)
        for name, counts in pool.items()
        for ground, count in zip(("grass", "rock"), counts, strict=True)
        for i in range(count)
    ]
    rows += [
        truth_row("animals", "animals", f"{name}/{group}", 0, None, class_name=name, background=ground, group=group)
        for name in pool
        for group, ground in (("common", "grass"), ("counter", "rock"))
    ]
    store.write_table(str(root / "world" / "truth.parquet"), pa.Table.from_pylist(rows, schema=TRUTH_SCHEMA))


def write_results(root: Path, by_labels: dict[str, str], by_accuracy: dict[str, str]) -> None:
    """What `join` and `discover` say of every class: the group whose background is more common; the best background."""
    classes = [{"class_name": name, "common_background": "grass", "counter_background": "rock", "more_common": side}
               for name, side in by_labels.items()]  # fmt: skip
    own = {"neighbours": {"k": 1}, "prevalence": {"classes": classes}}
    store.write_json(str(root / "join" / "join.json"), {"test": "animals", "models": {"a": own}})
    classes = [
        {"class_name": name, "common": best or "grass", "kept": bool(best)} for name, best in by_accuracy.items()
    ]
    store.write_json(str(root / "discover" / "discover.json"), {"by": "a", "classes": classes})


@pytest.mark.parametrize(
    ("pool", "labels", "accuracy", "said"),
    [
        (POOL, {"fox": "common", "owl": "", "crab": "counter", "hen": ""}, {"fox": "grass", "owl": "grass"},
         ("in animals 1 of 2 (and 1 that were not planted)", "of a in animals 2 of 2.")),
        (POOL, {"fox": None, "hen": "common"}, {"fox": "rock", "owl": ""},
         ("in animals 0 of 2 (and 1 that were not planted)", "of a in animals 0 of 2 (and 1 that were not planted).")),
        ({"fox": (5, 5), "owl": (6, 4)}, {"fox": ""}, {"fox": ""},
         ("in animals: none planted, none found", "of a in animals: none planted, none found.")),
        ({"fox": (5, 5), "owl": (6, 4)}, {"fox": "common"}, {"fox": ""},
         ("in animals: none planted, 1 found", "of a in animals: none planted, none found.")),
    ],
)  # fmt: skip
def test_backgrounds_found_missed_and_made_up(tmp_path, pool, labels, accuracy, said) -> None:
    write_truth(tmp_path, pool)
    write_results(tmp_path, labels, accuracy)
    sentence = conclusions.on_planted(planted.planted(Study(str(tmp_path), {})))
    assert sentence == (
        f"Planted and found again: habitual backgrounds by the pool's labels {said[0]}; "
        f"habitual backgrounds by the accuracy {said[1]}"
    )


def test_a_join_of_an_earlier_version_says_nothing_of_backgrounds(tmp_path) -> None:
    write_truth(tmp_path, POOL)
    own = {"neighbours": {"k": 1}, "prevalence": {"classes": [{"class_name": "fox", "common_background": "grass"}]}}
    store.write_json(str(tmp_path / "join" / "join.json"), {"test": "animals", "models": {"a": own}})
    assert planted.planted(Study(str(tmp_path), {})) == []
