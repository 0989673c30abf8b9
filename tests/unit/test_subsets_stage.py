"""Algebra, joins, id files and `split show` on the tiny pool: uids, bitmap and recipe agree with Python's sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clipgap_ray import cli, embeddings, schema, store
from clipgap_ray.config.subsets import And, IdsSettings, JoinSettings, Minus, Or, ShowSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError, DataError
from clipgap_ray.stages import subsets
from clipgap_ray.stages.keep import bitmap_bytes, bitmap_path, read_split
from tests import index_fixture, made

UIDS = [index_fixture.uid(part, row) for part, rows in ((0, 20), (1, 7)) for row in range(rows)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two parts of 20 and 7 rows with keys such as 000000003."""
    rows = [index_fixture.unit_rows(20, 0), index_fixture.unit_rows(7, 1)]
    return index_fixture.write_embeddings(tmp_path_factory.mktemp("subsets") / "pool", rows)


def rows_of(split: str, pool: str) -> list[str]:
    """Uids of the rows that the bitmap keeps, in pool order."""
    opened = EmbeddingSet.open(pool)
    masks = read_split(split, opened)
    kept = [opened.metadata(p.number, ["uid"]).filter(pa.array(masks[p.number])) for p in opened.parts]
    return pa.concat_tables(kept).column("uid").to_pylist()


def make(pool: str, out: Path, uids: list[str]) -> str:
    """A split with exactly these uids."""
    listed = out.with_suffix(".txt")
    listed.write_text("\n".join(uids))
    check(subsets.join(JoinSettings(ids=str(listed), pool=pool, out=str(out))), str(out), pool)
    return str(out)


def check(recipe: dict[str, Any], split: str, pool: str) -> set[str]:
    """The split's uids, after a look at all three files."""
    kept = schema.unpack_uids(store.read_array(split))
    assert kept == sorted(set(kept))
    assert recipe == store.read_json(split.removesuffix(".npy") + ".recipe.json")
    assert recipe["counts"]["kept"] == len(kept) == recipe["counts"]["pool"] - recipe["counts"]["removed"]
    rows = rows_of(split, pool)
    assert set(rows) == set(kept)
    assert recipe["rows"] == {"pool": len(UIDS), "kept": len(rows)}
    return set(kept)


def test_algebra(pool: str, tmp_path: Path) -> None:
    a, b, c = set(UIDS[:15]), set(UIDS[10:]), set(UIDS[12:14])
    files = tuple(make(pool, tmp_path / f"{n}.npy", sorted(s)) for n, s in (("a", a), ("b", b), ("c", c)))
    for kind, expected in ((And, a & b & c), (Or, a | b | c), (Minus, a - b - c)):
        settings = kind(splits=files, out=str(tmp_path / "out.npy"))
        recipe = subsets.combine(settings)
        assert check(recipe, settings.out, pool) == expected
        assert [s["name"] for s in recipe["inputs"]["splits"]] == ["a", "b", "c"]
        assert recipe["inputs"]["pool"]["digest"] == EmbeddingSet.open(pool).digest


def test_algebra_of_splits_that_know_different_rows_of_a_uid(pool: str, tmp_path: Path) -> None:
    """A deduplication kept one of two rows of a uid: what is taken away by uid is away in the bitmap too."""
    opened = EmbeddingSet.open(pool)
    a, b = make(pool, tmp_path / "a.npy", UIDS[:5]), make(pool, tmp_path / "b.npy", UIDS[3:8])
    masks = read_split(b, opened)
    masks[0][4] = False  # b lost its row of uid 4, not the uid
    store.write_bytes(bitmap_path(b), bitmap_bytes(masks))
    for first, second in ((a, b), (b, a)):
        subsets.combine(And(splits=(first, second), out=str(tmp_path / "and.npy")))
        assert rows_of(str(tmp_path / "and.npy"), pool) == UIDS[3:5]
    subsets.combine(Minus(splits=(a, b), out=str(tmp_path / "minus.npy")))
    assert rows_of(str(tmp_path / "minus.npy"), pool) == UIDS[:3]


def test_algebra_refuses_what_it_cannot_combine(pool: str, tmp_path: Path) -> None:
    a = make(pool, tmp_path / "a.npy", UIDS[:5])
    other_pool = index_fixture.write_embeddings(tmp_path / "other", [index_fixture.unit_rows(20, 5)])
    listed = tmp_path / "b.txt"
    listed.write_text("\n".join(UIDS[:3]))
    b = str(tmp_path / "b.npy")
    subsets.join(JoinSettings(ids=str(listed), pool=other_pool, out=b))
    out = str(tmp_path / "out.npy")
    with pytest.raises(DataError, match="was cut from another pool"):
        subsets.combine(And(splits=(a, b), out=out))
    store.write_bytes(str(tmp_path / "foreign.npy"), store.array_bytes(schema.pack_uids(UIDS[:3])))
    with pytest.raises(DataError, match=r"no recipe beside it[^$]*hint: bring it in first: clipgap split join"):
        subsets.combine(And(splits=(a, str(tmp_path / "foreign.npy")), out=out))
    with pytest.raises(ConfigError, match="expected two or more"):
        And.load({"splits": [a], "out": out}, "here")
    assert not Path(out).exists()


def test_the_command_line_of_set_algebra(pool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make(pool, tmp_path / "a.npy", UIDS[:5]), make(pool, tmp_path / "b.npy", UIDS[3:8])
    for word, expected in (("and", UIDS[3:5]), ("or", UIDS[:8]), ("minus", UIDS[:3])):
        assert cli.main(["split", word, a, b, "--out", str(tmp_path / "c.npy")]) == 0
        assert json.loads(capsys.readouterr().out)["counts"]["kept"] == len(expected)
        assert schema.unpack_uids(store.read_array(str(tmp_path / "c.npy"))) == expected


@pytest.mark.parametrize("form", ["integers.npy", "texts.txt", "padded.txt", "uids.npy", "table.parquet"])
def test_a_foreign_list_becomes_a_split(pool: str, tmp_path: Path, form: str) -> None:
    numbers = [3, 10_005, 19, 3, 777]  # 777 is in no shard; 10005 = part 1 row 5
    keys = [f"{n:09d}" for n in numbers]
    uids = [index_fixture.uid(n // 10_000, n % 10_000) for n in numbers]
    uri = str(tmp_path / form)
    match form:
        case "integers.npy":
            store.write_bytes(uri, store.array_bytes(np.array(numbers)))
        case "uids.npy":
            store.write_bytes(uri, store.array_bytes(schema.pack_uids(uids)))
        case "table.parquet":
            store.write_table(uri, pa.table({"url": ["u"] * 5, "key": keys}))
        case _:
            Path(uri).write_text("\n".join(keys if form == "padded.txt" else [str(n) for n in numbers]))
    recipe = subsets.join(JoinSettings(ids=uri, pool=pool, out=str(tmp_path / "out.npy")))
    assert check(recipe, str(tmp_path / "out.npy"), pool) == set(uids) - {index_fixture.uid(0, 777)}
    missing = [index_fixture.uid(0, 777)] if form == "uids.npy" else ["777"]
    assert recipe["coverage"] == {
        "given": 5, "unique": 4, "found": 3, "missing": 1, "ambiguous": 0, "missing_examples": missing,
    }  # fmt: skip


def test_keys_that_several_samples_share_are_counted(tmp_path: Path) -> None:
    pool = str(tmp_path / "pool")
    index_fixture.write_embeddings(tmp_path / "pool", [index_fixture.unit_rows(4, 0), index_fixture.unit_rows(4, 1)])
    path = store.join(pool, embeddings.part_file("metadata", 1))
    table = store.read_table(path)
    keys = ["000000001", "x/000000001", "y/000000002", "z"]
    store.write_table(path, table.set_column(0, "image_path", pa.array(keys)))
    listed = tmp_path / "l.txt"
    listed.write_text("1\n2\n3\n")
    recipe = subsets.join(JoinSettings(ids=str(listed), pool=pool, out=str(tmp_path / "o.npy")))
    assert {k: recipe["coverage"][k] for k in ("found", "missing", "ambiguous")} == {
        "found": 3, "missing": 0, "ambiguous": 2,
    }  # fmt: skip
    assert recipe["counts"]["kept"] == 6
    listed.write_text("x/000000001\nz\nnothing\n")  # whole keys are compared as they are
    recipe = subsets.join(JoinSettings(ids=str(listed), pool=pool, out=str(tmp_path / "o.npy")))
    assert (recipe["coverage"]["found"], recipe["coverage"]["ambiguous"], recipe["counts"]["kept"]) == (2, 0, 2)
    with pytest.raises(ConfigError, match=r"key 'z' of .* is no integer"):
        subsets.ids(IdsSettings(split=str(tmp_path / "o.npy"), pool=pool, out=str(tmp_path / "k.npy")))


def test_a_list_of_another_pool_is_refused(pool: str, tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("999999\n")
    with pytest.raises(DataError, match=r"none of the 1 ids \(integer\) .* \(coverage 0 %\)"):
        subsets.join(JoinSettings(ids=str(tmp_path / "l.txt"), pool=pool, out=str(tmp_path / "o.npy")))
    assert not (tmp_path / "o.npy").exists()


@pytest.mark.parametrize("suffix", ["npy", "txt", "parquet"])
def test_ids_and_join_are_inverse(pool: str, tmp_path: Path, suffix: str) -> None:
    split = make(pool, tmp_path / "a.npy", UIDS[4:23])
    out = str(tmp_path / f"ids.{suffix}")
    answer = subsets.ids(IdsSettings(split=split, pool=pool, out=out))
    assert (answer["rows"], answer["repeated_keys"], answer["coverage"]["missing"]) == (19, 0, 0)
    if suffix == "npy":
        assert np.load(out).dtype == np.int64
        assert np.load(out).tolist() == [*range(4, 20), *range(10_000, 10_003)]
    if suffix == "txt":
        assert Path(out).read_text().splitlines()[:2] == ["000000004", "000000005"]
    recipe = subsets.join(JoinSettings(ids=out, pool=pool, out=str(tmp_path / "back.npy")))
    assert recipe["coverage"]["missing"] == 0
    assert (tmp_path / "back.npy").read_bytes() == Path(split).read_bytes()


def test_show(pool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = make(pool, tmp_path / "a.npy", UIDS[:5])
    before = made.files_below(str(tmp_path))
    assert cli.main(["split", "show", split, "--pool", pool]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["uids"], shown["kind"], shown["bitmap"], shown["agrees_with_recipe"]) == (5, "join", True, True)
    assert shown["inputs"]["ids"]["kind"] == "uid"
    assert shown["pool"] == {
        "uri": pool, "cut_from_it": True, "uids_found": 5, "uids_missing": 0, "coverage": 1.0, "rows_found": 5,
        "rows": 27,
    }  # fmt: skip
    assert made.files_below(str(tmp_path)) == before


def test_show_a_file_of_another_tool(pool: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "datacomp.npy")
    store.write_bytes(uri, store.array_bytes(schema.pack_uids([UIDS[3], UIDS[1], UIDS[3], "e" * 32])))
    shown = subsets.show(ShowSettings(split=uri, pool=pool))
    assert (shown["uids"], shown["sorted_and_unique"], shown["bitmap"]) == (3, False, False)
    assert shown["pool"]["cut_from_it"] is False
    assert (shown["pool"]["uids_found"], shown["pool"]["coverage"]) == (2, 2 / 3)
    assert "kind" not in shown
