"""Exported shards: every byte as it was, every count in its place, the same files at every run."""

from __future__ import annotations

import datetime
import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image

from clipgap_ray import cli, schema, store
from clipgap_ray.config.export import ExportSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.errors import ConfigError, DataError, StaleOutputError
from clipgap_ray.kernels import subsets
from clipgap_ray.shards import Sample, read_shard
from clipgap_ray.sources import list_shards
from clipgap_ray.stages import export, export_copy, export_index
from tests import made

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

DATACOMP = ("sizes.json", "sample_ids.npy", "meta.json")


def fields(number: int, **more: object) -> bytes:
    return json.dumps({"uid": f"{number:032x}", "url": f"http://x/{number}", **more}).encode()


def sample(stem: str, number: int, suffix: str = "jpg", **more: bytes) -> list[tuple[str, bytes]]:
    members = {suffix: made.jpeg(number), "txt": f"caption {number}".encode(), "json": fields(number), **more}
    return [(f"{stem}.{name}", data) for name, data in members.items()]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three tars with what makes copying hard: stems that repeat in and across tars, odd suffixes and further members,
    members apart from each other, a uid in two tars, samples without json or with a broken one."""
    root = tmp_path_factory.mktemp("export") / "pool"
    made.tar_shard(
        root / "00000.tar",
        [*sample("a", 0), *sample("b", 1, "JPEG", cls=b"3", NPY=b"\x00\x01"), *sample("b", 2), *sample("c", 3)],
    )
    apart = [*sample("a", 4), *sample("b", 5), *sample("d", 6)]
    made.tar_shard(root / "00001.tar", sorted(apart, key=lambda m: m[0].split(".")[1]))
    lonely = [("e.jpg", made.jpeg(7)), ("f.png", made.jpeg(8)), ("f.json", b"{broken"), ("no_image.txt", b"x")]
    made.tar_shard(root / "00002.tar", [*sample("a", 3), *lonely, *sample("g/h", 9, meta=b"1")])
    return str(root)


def samples_of(source: str) -> list[Sample]:
    return [item for shard in list_shards(source) for item in read_shard(shard) if isinstance(item, Sample)]


def subset_file(path: Path, uids: list[str]) -> str:
    store.write_bytes(str(path), store.array_bytes(subsets.sorted_unique(schema.pack_uids(uids))))
    return str(path)


@pytest.fixture(scope="module")
def everything(pool: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return subset_file(tmp_path_factory.mktemp("splits") / "full.npy", [s.uid for s in samples_of(pool)])


def run(split: str, source: str, out: Path, **more: Any) -> dict[str, Any]:
    return export.run(ExportSettings(split=split, source=source, out=str(out), **more)).as_dict()


def exported(out: Path) -> list[tuple[str, dict[str, bytes]]]:
    """(stem, {suffix: bytes}) in order, read by the standard library as webdataset does: neighbours of one stem."""
    found: list[tuple[str, dict[str, bytes]]] = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert len(set(names)) == len(names)
            for member in tar.getmembers():
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            stems = [stem for stem, _ in itertools.groupby(names, key=lambda name: name.partition(".")[0])]
            assert len(set(stems)) == len(stems), "a stem repeats in a tar"
            for stem in stems:
                mine = [name for name in names if name.partition(".")[0] == stem]
                content = {name.partition(".")[2]: tar.extractfile(name).read() for name in mine}  # type: ignore[union-attr]
                found.append((stem, content))
    return found


def datacomp_files(out: Path) -> dict[str, bytes]:
    names = [*DATACOMP, *sorted(p.name for p in out.glob("0*"))]
    return {name: (out / name).read_bytes() for name in names}


def test_members_are_the_same_bytes_under_new_stems(pool: str, everything: str, tmp_path: Path) -> None:
    summary = run(everything, pool, tmp_path / "out", shard_size=4)
    assert [(stem[:32].lstrip("0"), stem[32:], sorted(m)) for stem, m in exported(tmp_path / "out")][:4] == [
        ("", "-0", ["jpg", "json", "txt"]),
        ("1", "-0", ["JPEG", "NPY", "cls", "json", "txt"]),
        ("2", "-0", ["jpg", "json", "txt"]),
        ("3", "-0", ["jpg", "json", "txt"]),
    ]
    source = samples_of(pool)
    raw = {shard.source + shard.name: Path(shard.uri).read_bytes() for shard in list_shards(pool)}
    places = [(shard, s) for shard in list_shards(pool) for s in read_shard(shard) if isinstance(s, Sample)]
    expected = [
        {m.suffix: raw[shard.source + shard.name][m.offset : m.offset + m.size] for m in s.members}
        for shard, s in places
    ]
    found = exported(tmp_path / "out")
    assert [members for _, members in found] == expected
    assert [stem.split("-")[0] for stem, _ in found] == [s.uid for s in source]
    assert len({stem for stem, _ in found}) == len(source) == summary["kept"] == 11
    assert f"{3:032x}-1" in {stem for stem, _ in found}  # the second sample of a uid, in another tar
    assert summary["dropped"] == {"no_image": 1}
    assert summary["read"] == 12
    assert summary["coverage"] == {"uids": 10, "found": 10, "missing": 0, "blocked": 0, "copies": 1}


def test_what_datacomp_and_open_clip_read(pool: str, everything: str, tmp_path: Path) -> None:
    run(everything, pool, tmp_path / "out", shard_size=4)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.tar")) == [f"{n:08d}.tar" for n in range(3)]
    # open_clip: total_size = sum([int(sizes[os.path.basename(shard)]) for shard in shards_list])
    sizes = json.loads((out / "sizes.json").read_text())
    assert sizes == {"00000000.tar": 4, "00000001.tar": 4, "00000002.tar": 3}
    for number, count in enumerate(sizes.values()):  # the resharder: int(stats.get("successes"))
        assert json.loads((out / f"{number:08d}_stats.json").read_text()) == {"successes": count}
    ids = np.load(out / "sample_ids.npy")
    assert ids.dtype == np.dtype("u8,u8")
    assert np.array_equal(ids, np.load(everything))
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["output_shard_count"], meta["output_shard_format"], meta["output_count"]) == (3, "{:08d}.tar", 11)
    assert (meta["shard_size"], meta["subset_file"], meta["input_dir"]) == ("4", everything, pool)
    assert not (out / "missing_ids.npy").exists()


@pytest.mark.parametrize("workers", [1, 3])
def test_two_exports_are_equal_whatever_the_workers(pool: str, everything: str, tmp_path: Path, workers: int) -> None:
    for name, n in (("a", 0), ("b", workers)):
        run(everything, pool, tmp_path / name, shard_size=2, workers=n)
    assert datacomp_files(tmp_path / "a") == datacomp_files(tmp_path / "b")
    stamps = made.stamps_below(str(tmp_path / "a"))
    again = run(everything, pool, tmp_path / "a", shard_size=2)
    assert again["parts_skipped"] == 6
    tars = [name for name in stamps if name.endswith(".tar")]
    assert {name: made.stamps_below(str(tmp_path / "a"))[name] for name in tars} == {n: stamps[n] for n in tars}


@pytest.mark.parametrize("chosen", [[2], [0, 3, 9], [1, 4, 5, 6]])
def test_a_split_is_copied_and_nothing_else(pool: str, tmp_path: Path, chosen: list[int]) -> None:
    split = subset_file(tmp_path / "s.npy", [f"{n:032x}" for n in chosen])
    summary = run(split, pool, tmp_path / "out")
    copies = 1 if 3 in chosen else 0
    assert summary["kept"] == len(chosen) + copies
    assert summary["read"] == 12 == summary["kept"] + sum(summary["dropped"].values())
    assert {s.uid for s in samples_of(str(tmp_path / "out"))} == {f"{n:032x}" for n in chosen}


def test_write_uid_makes_every_uid_readable_and_changes_nothing_else(
    pool: str, everything: str, tmp_path: Path
) -> None:
    run(everything, pool, tmp_path / "plain")
    summary = run(everything, pool, tmp_path / "with", write_uid=True)
    source = samples_of(pool)
    assert [s.uid for s in samples_of(str(tmp_path / "with"))] == [s.uid for s in source]
    # without the flag the uids that are hashed from a sample's place are lost, and a warning said so
    lost = [a.uid != b.uid for a, b in zip(samples_of(str(tmp_path / "plain")), source, strict=True)]
    assert sum(lost) == 2
    assert summary["notes"] == {"uid_added": 1, "bad_json_replaced": 1}
    for (stem, plain), (other, with_uid) in zip(exported(tmp_path / "plain"), exported(tmp_path / "with"), strict=True):
        assert stem == other
        assert json.loads(with_uid.pop("json"))["uid"] == stem.split("-")[0]
        plain.pop("json", None)
        assert plain == with_uid


def test_write_uid_keeps_the_other_fields(tmp_path: Path) -> None:
    laion = {"url": "http://x", "caption": "é", "key": "000000001", "similarity": 0.3333333333333333, "uid": None}
    members = [("000000001.jpg", made.jpeg(1)), ("000000001.json", json.dumps(laion).encode())]
    made.tar_shard(tmp_path / "p" / "0.tar", members)
    (one,) = samples_of(str(tmp_path / "p"))
    run(subset_file(tmp_path / "s.npy", [one.uid]), str(tmp_path / "p"), tmp_path / "out", write_uid=True)
    ((_, found),) = exported(tmp_path / "out")
    assert json.loads(found["json"]) == {**laion, "uid": one.uid}


def test_blocked_samples_stay_behind_and_are_counted(pool: str, everything: str, tmp_path: Path) -> None:
    source = samples_of(pool)
    blocklist = tmp_path / "block.txt"
    blocklist.write_text(f"# takedowns\n{source[0].uid}\n{source[1].sha256}\nhttp://x/5\n{'f' * 32}\n")
    summary = run(everything, pool, tmp_path / "out", blocklist=str(blocklist))
    assert summary["dropped"] == {"no_image": 1, "blocked_uid": 1, "blocked_sha256": 1, "blocked_url": 1}
    assert summary["coverage"] == {"uids": 10, "found": 7, "missing": 0, "blocked": 3, "copies": 1}
    blocked = {source[0].uid, source[1].uid, f"{5:032x}"}
    kept = [s.uid for s in source if s.uid not in blocked]
    assert [stem.split("-")[0] for stem, _ in exported(tmp_path / "out")] == kept
    assert schema.unpack_uids(np.load(tmp_path / "out" / "sample_ids.npy")) == sorted(set(kept))


def test_uids_that_the_source_lacks_are_listed(pool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = [f"{n:032x}" for n in (100, 101)]
    split = subset_file(tmp_path / "s.npy", [f"{1:032x}", *gone])
    words = ["export", split, "--source", pool, "--out", str(tmp_path / "out")]
    assert cli.main(words) == 3
    assert json.loads(capsys.readouterr().out)["coverage"]["missing"] == 2
    assert schema.unpack_uids(np.load(tmp_path / "out" / "missing_ids.npy")) == gone
    assert schema.unpack_uids(np.load(tmp_path / "out" / "sample_ids.npy")) == [f"{1:032x}"]
    assert cli.main([*words, "--max-missing-fraction", "0.7"]) == 0


def test_impossible_exports_are_named(pool: str, everything: str, tmp_path: Path) -> None:
    foreign = subset_file(tmp_path / "s.npy", ["e" * 32])
    with pytest.raises(DataError, match=r"0 of its 1 uids can be exported .* \(coverage 0 %, 0 blocked\)"):
        run(foreign, pool, tmp_path / "a")
    assert not list((tmp_path / "a").glob("*.tar"))
    with pytest.raises(ConfigError, match="is part of the source and lies in --out"):
        run(everything, pool, Path(pool).parent)
    run(everything, pool, tmp_path / "c", shard_size=4)
    with pytest.raises(StaleOutputError, match="shard_size was 4, now 5"):
        run(everything, pool, tmp_path / "c", shard_size=5)


def test_rows_of_parquet_become_members(tmp_path: Path) -> None:
    """Images keep their bytes and get a suffix by content; a second file cut by the size of the output."""
    png = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(png, "PNG")
    images = [made.jpeg(0), png.getvalue(), None, b"broken", made.jpeg(3)]
    table = pa.table({
        "image": [image and {"bytes": image, "path": "x"} for image in images],
        "caption": ["é", "two", "none", "bad", None],
        "url": [f"http://x/{n}" for n in range(5)],
        "similarity": [0.25, float("nan"), 0.0, 0.5, None],
        "taken": [datetime.date(2020, 1, n + 1) for n in range(5)],
        "thumbnail": [b"\x00"] * 5,
        "nested": [{"raw": b"\x00", "values": [0.5, float("nan")]}] * 5,
    })  # fmt: skip
    for name in ("0.parquet", "1.parquet"):
        rows = table if name[0] == "0" else table.set_column(2, "url", [[f"http://y/{n}" for n in range(5)]])
        store.write_table(str(tmp_path / "pool" / name), rows)
    source = samples_of(str(tmp_path / "pool"))
    assert len(source) == 8
    chosen = [s for n, s in enumerate(source) if n not in (2, 4)]
    split = subset_file(tmp_path / "s.npy", [s.uid for s in chosen])
    summary = run(split, str(tmp_path / "pool"), tmp_path / "out", shard_size=4, write_uid=True)
    assert summary["coverage"]["found"] == 6
    assert summary["dropped"] == {"no_image": 2, "not_in_split": 2}
    found = exported(tmp_path / "out")
    assert [stem for stem, _ in found] == [f"{s.uid}-0" for s in chosen]
    assert [next(iter(members.items())) for _, members in found] == [
        ("png" if s.image == png.getvalue() else "jpg", s.image) for s in chosen
    ]
    assert found[0][1]["txt"].decode() == "é"
    assert "txt" not in found[2][1]  # no caption
    assert json.loads(found[0][1]["json"]) == {
        "caption": "é", "url": "http://x/0", "similarity": 0.25, "taken": "2020-01-01", "uid": chosen[0].uid,
        "nested": {"raw": None, "values": [0.5, None]},
    }  # fmt: skip
    assert json.loads(found[1][1]["json"])["similarity"] is None
    assert [s.uid for s in samples_of(str(tmp_path / "out"))] == [s.uid for s in chosen]
    before = datacomp_files(tmp_path / "out")
    run(split, str(tmp_path / "pool"), tmp_path / "again", shard_size=4, write_uid=True, workers=1)
    after = datacomp_files(tmp_path / "again")
    assert all(after[name] == data for name, data in before.items() if name != "meta.json")


def test_parquet_that_changed_between_the_passes_is_refused(tmp_path: Path) -> None:
    """Of the same size: the rows say who they are."""
    path = str(tmp_path / "pool" / "0.parquet")
    for order, problem in (([0, 1, 2], None), ([0, 2, 1], "row 1 is no longer")):
        urls = [f"http://x/{n}" for n in order]
        store.write_table(path, pa.table({"image": [made.jpeg(7)] * 3, "caption": ["c"] * 3, "url": urls}))
        size = Path(path).stat().st_size
        if problem is None:
            before = size
            split = subset_file(tmp_path / "s.npy", [s.uid for s in samples_of(str(tmp_path / "pool"))[1:]])
            run(split, str(tmp_path / "pool"), tmp_path / "out")
            for commit in (tmp_path / "out" / "commits").iterdir():
                commit.unlink()  # as if the second pass had not begun
        else:
            assert size == before
            with pytest.raises(DataError, match=problem):
                run(split, str(tmp_path / "pool"), tmp_path / "out")


def test_files_of_folders_become_members(tmp_path: Path) -> None:
    for n in range(4):
        folder = tmp_path / "pool" / "cats"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n}.{'jpg' if n else 'JPG'}").write_bytes(made.jpeg(n))
        if n != 2:
            (folder / f"{n}.txt").write_bytes(b"caption \xff" if n == 1 else b"caption")
    source = samples_of(str(tmp_path / "pool"))
    split = subset_file(tmp_path / "s.npy", [s.uid for s in source[1:]])
    run(split, str(tmp_path / "pool"), tmp_path / "out", write_uid=True)
    found = exported(tmp_path / "out")
    assert [stem for stem, _ in found] == [f"{s.uid}-0" for s in source[1:]]
    assert [sorted(members) for _, members in found] == [
        ["jpg", "json", "txt"],
        ["jpg", "json"],
        ["jpg", "json", "txt"],
    ]
    assert [members["jpg"] for _, members in found] == [s.image for s in source[1:]]
    assert found[0][1]["txt"] == b"caption \xff"
    assert [s.uid for s in samples_of(str(tmp_path / "out"))] == [s.uid for s in source[1:]]


def test_a_tar_that_changed_between_the_passes_is_refused(pool: str, everything: str, tmp_path: Path) -> None:
    root = tmp_path / "pool"
    root.mkdir()
    for path in Path(pool).glob("*.tar"):
        (root / path.name).write_bytes(path.read_bytes())
    run(everything, str(root), tmp_path / "out")
    for path in [*(tmp_path / "out" / "commits").iterdir()]:
        path.unlink()  # as if the second pass had not begun
    (root / "00001.tar").write_bytes(made.tar(sample("a", 4)))
    with pytest.raises(DataError, match=r"00001.tar has \d+ bytes, but had \d+ when it was indexed"):
        run(everything, str(root), tmp_path / "out")


def test_tars_in_object_stores_give_the_same_bytes(pool: str, everything: str, tmp_path: Path) -> None:
    """The tasks themselves, in this process: fsspec's memory store is not seen by Ray's workers."""
    remote = "memory://export-test"
    for path in Path(pool).glob("*.tar"):
        store.write_bytes(f"{remote}/pool/{path.name}", path.read_bytes())
    split = np.load(everything)
    written = []
    for source, out in ((pool, str(tmp_path / "out")), (f"{remote}/pool", f"{remote}/out")):
        shards = list_shards(source)
        index = f"{out}/index"
        records = {n: export_index.index_shard(index, n, shard, (split, None)) for n, shard in enumerate(shards)}
        outputs = export_index.Placement(index, shards, records, split).outputs(4)
        counts = [export_copy.write_shard(out, n, pieces, True) for n, pieces in enumerate(outputs)]
        assert [record["files"]["tar"] for record in counts] == [
            store.sha256(store.read_bytes(f"{out}/{n:08d}.tar")) for n in range(len(outputs))
        ]
        written.append([store.read_bytes(f"{out}/{n:08d}.tar") for n in range(len(outputs))])
    assert len(written[0]) == 3
    assert written[0] == written[1]


def test_the_faulty_world_comes_through(
    tiny_world: made.World, tiny_embeddings: dict[str, str], tmp_path: Path
) -> None:
    """Every row that was embedded is in the split, so every one is exported, planted faults and copies included."""
    uids = EmbeddingSet.open(tiny_embeddings["pool"]).all_metadata(["uid"]).column("uid").to_pylist()
    split = subset_file(tmp_path / "full.npy", uids)
    summary = run(split, tiny_world.path("pool"), tmp_path / "out", shard_size=100, write_uid=True)
    assert summary["coverage"]["found"] == len(set(uids))
    assert summary["coverage"]["missing"] == 0
    readable = [s for s in samples_of(tiny_world.path("pool")) if s.uid in set(uids)]
    found = samples_of(str(tmp_path / "out"))
    assert [(s.uid, s.sha256, s.caption) for s in found] == [(s.uid, s.sha256, s.caption) for s in readable]
    assert Counter(s.uid for s in found) >= Counter(uids)
    assert not [s for s in found if "repeated_key" in s.notes]
    assert sum(json.loads((tmp_path / "out" / "sizes.json").read_text()).values()) == len(found)


def test_webdataset_reads_it(pool: str, everything: str, tmp_path: Path) -> None:
    run(everything, pool, tmp_path / "out")
    read = list(webdataset.WebDataset(str(tmp_path / "out" / "00000000.tar"), shardshuffle=False))
    assert [(r["__key__"], r.get("txt")) for r in read] == [(k, m.get("txt")) for k, m in exported(tmp_path / "out")]
