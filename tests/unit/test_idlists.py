"""Lists of identities: what their entries are, how they are packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clipgap_ray import idlists, schema, store
from clipgap_ray.errors import DataError

UIDS = [f"{n:032x}" for n in (7, 3, 2**64 + 1, 3)]


def write(path: Path, content: object) -> str:
    if isinstance(content, np.ndarray):
        store.write_bytes(str(path), store.array_bytes(content))
    elif isinstance(content, pa.Table):
        store.write_table(str(path), content)
    else:
        path.write_text(str(content))
    return str(path)


def test_a_foreign_subset_is_sorted_and_its_repeats_dropped(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.npy", schema.pack_uids(UIDS))
    assert schema.unpack_uids(idlists.read_subset(uri)) == sorted(set(UIDS))
    ours = idlists.read_subset(write(tmp_path / "b.npy", schema.pack_uids(sorted(set(UIDS)))))
    assert isinstance(ours, np.memmap)  # not read before it is needed


def test_other_arrays_are_no_subset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dtype is int64, shape \(3,\); expected \(n,\) of u8,u8"):
        idlists.read_subset(write(tmp_path / "a.npy", np.arange(3)))


@pytest.mark.parametrize(
    ("name", "content", "kind", "num"),
    [
        ("a.npy", schema.pack_uids(UIDS), "uid", 3),
        ("a.npy", np.array([5, 5, 9]), "integer", 2),
        ("a.npy", np.array(["000000005", "9"]), "integer", 2),
        ("a.npy", np.array([b"x/a", b"x/b"]), "key", 2),
        ("a.txt", "\n".join(UIDS).upper() + "\n\n", "uid", 3),
        ("a.txt", "000000005\n5\n000000009\n", "integer", 2),
        ("a.txt", "000000005\nabc\n", "key", 2),
        ("a.parquet", pa.table({"url": ["u"], "uid": [UIDS[0]]}), "uid", 1),
        ("a.parquet", pa.table({"key": pa.array([5, None, 9])}), "integer", 2),
    ],
)
def test_what_a_list_holds(tmp_path: Path, name: str, content: object, kind: str, num: int) -> None:
    found = idlists.read_ids(write(tmp_path / name, content))
    assert (found.kind, len(found.ids)) == (kind, num)
    assert found.num_given >= num


def test_lists_that_are_none(tmp_path: Path) -> None:
    for content, words in [
        (np.zeros((2, 2), np.int64), r"int64 of shape \(2, 2\)"),
        (np.array([0.5]), "float64"),
        (np.zeros(0, np.int64), "holds no id"),
    ]:
        with pytest.raises(DataError, match=words):
            idlists.read_ids(write(tmp_path / "a.npy", content))
    np.save(tmp_path / "o.npy", np.array(["x", None], object), allow_pickle=True)
    with pytest.raises(DataError, match="without pickle"):
        idlists.read_ids(str(tmp_path / "o.npy"))
    table = write(tmp_path / "a.parquet", pa.table({"SAMPLE_ID": ["x"]}))
    with pytest.raises(DataError, match=r"no column uid or key .* it has \['SAMPLE_ID'\]"):
        idlists.read_ids(table)
    assert idlists.read_ids(table, "SAMPLE_ID").kind == "key"


def test_integers_and_texts_do_not_meet() -> None:
    assert idlists.pack(["000000005"], "integer") == idlists.pack_integers(np.array([5]))
    unequal = [idlists.pack(["x"], "integer"), idlists.pack_integers(np.array([5])), idlists.pack(["5"], "key")]
    assert len({schema.unpack_uids(ids)[0] for ids in unequal}) == 3
