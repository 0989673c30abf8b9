"""`clipgap doctor SRC`: the counts are those of the samples that were made; JSON on stdout, a table on stderr."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipgap_ray import cli, store
from clipgap_ray.config.study import DoctorSettings
from clipgap_ray.doctor import run
from clipgap_ray.errors import ConfigError
from clipgap_ray.shards import estimate_rows
from clipgap_ray.sources import Shard, list_shards
from tests import made


def shard(path: Path, rows: int) -> Shard:
    """Every row has a JPEG and json; of ten rows one lacks its caption, one its url, one is broken, one has a uid."""
    members = []
    for i in range(rows):
        fields = {} if i % 10 == 1 else {"url": f"http://x/{i}"}
        fields |= {"uid": f"{i:032x}"} if i % 10 == 2 else {}
        image = b"not an image" if i % 10 == 3 else made.jpeg(i)
        members += [(f"{i:05d}.jpg", image), (f"{i:05d}.json", json.dumps(fields).encode())]
        members += [] if i % 10 == 0 else [(f"{i:05d}.txt", b"a thing")]
    return made.tar_shard(path, members)


def test_counts_of_a_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(5):
        shard(tmp_path / "pool" / f"{i:05d}.tar", 40)
    code = cli.main(["doctor", str(tmp_path / "pool"), "--first", "2", "--samples", "30"])
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert code == 0
    assert report["shards"] == {"tar": 5}
    assert (report["shards_read"], report["samples_read"], report["rows_estimated"]) == (2, 60, 200)
    assert report["suffixes"] == {"jpg": 60, "json": 60, "txt": 54}
    assert report["caption_share"] == 0.9
    assert report["fields"] == {"url": 0.9, "uid": 0.1}
    assert report["uid_rules"] == {"url+caption": 42, "key": 12, "uid": 6}
    assert (report["broken"], report["broken_share"]) == ({"broken_image": 6}, 0.1)
    assert report["notes"] == {"missing_caption": 6}
    assert len(report["problems"]) == 3
    for words in ("jpg 60, json 60, txt 54", "about 200", "90.0%", "--max-skip-fraction", "must not be renamed"):
        assert words in said.err


def test_the_faults_of_the_world_are_found(tiny_world: made.World) -> None:
    report = run(DoctorSettings(source=tiny_world.path("pool"), first=100))
    faults = [row["fault"] for row in tiny_world.of("pool")]
    assert report["broken"]["broken_image"] == faults.count("broken_image") + faults.count("truncated_image")
    assert report["notes"]["missing_caption"] == faults.count("missing_caption")
    assert report["notes"]["empty_shard"] == 1
    labelled = run(DoctorSettings(source=tiny_world.path("tests/val")))
    assert labelled["kind"] == "test set (wds)"
    assert labelled["problems"] == [p for p in labelled["problems"] if "must not be renamed" in p]


def test_suffixes_are_counted_in_tars_folders_and_parquet(tmp_path: Path) -> None:
    made.tar_shard(tmp_path / "tar" / "0.tar", [("a.JPEG", made.jpeg(0)), ("a.Json", b"{}"), ("b.jpeg", made.jpeg(1))])
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"image": [made.jpeg(0)]}), tmp_path / "parquet" / "0.parquet")
    (tmp_path / "folder").mkdir()
    for name, data in (("a.jpg", made.jpeg(0)), ("a.txt", b"x"), ("b.JPG", made.jpeg(1))):
        (tmp_path / "folder" / name).write_bytes(data)
    suffixes = {name: run(DoctorSettings(source=str(tmp_path / name)))["suffixes"] for name in ("tar", "folder")}
    assert suffixes == {"tar": {"jpeg": 2, "json": 1}, "folder": {"jpg": 2, "txt": 1}}
    assert run(DoctorSettings(source=str(tmp_path / "parquet")))["suffixes"] == {"image": 1}


def test_what_holds_no_images_is_said(tmp_path: Path) -> None:
    made.tar_shard(tmp_path / "pool" / "0.tar", [("a.mp3", b"x"), ("b.mp3", b"x")])
    report = run(DoctorSettings(source=str(tmp_path / "pool")))
    assert report["exit_code"] == 1
    assert "none of 2 samples is readable" in report["problems"][0]
    with pytest.raises(ConfigError, match="does not exist"):
        run(DoctorSettings(source=str(tmp_path / "nowhere")))


def test_rows_are_estimated_from_headers_footers_and_listings(tmp_path: Path) -> None:
    tar = shard(tmp_path / "tar" / "0.tar", 40)
    assert estimate_rows(tar) == 40
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"image": [made.jpeg(i) for i in range(7)]}), tmp_path / "parquet" / "0.parquet")
    assert estimate_rows(list_shards(str(tmp_path / "parquet"))[0]) == 7
    (tmp_path / "folder").mkdir()
    for i in range(3):
        (tmp_path / "folder" / f"{i}.png").write_bytes(b"x")
    assert estimate_rows(list_shards(str(tmp_path / "folder"))[0]) == 3

    (tmp_path / "set.csv").write_text("path,class_name\na.jpg,cat\nb.jpg,dog\n")
    assert estimate_rows(Shard(str(tmp_path / "set.csv"), "set.csv", "manifest")) == 2


def test_rows_of_a_remote_tar_are_estimated_from_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = shard(tmp_path / "tar" / "0.tar", 200)
    data = Path(tar.uri).read_bytes()
    remote = Shard("memory://doctor-test/0.tar", "0.tar", "tar")
    store.write_bytes(remote.uri, data)
    assert estimate_rows(remote) == 200
    monkeypatch.setattr("clipgap_ray.shards._COPY_BLOCK_BYTES", len(data) // 5)
    assert estimate_rows(remote) == pytest.approx(200, rel=0.05)
    store.write_bytes(remote.uri, b"")
    assert estimate_rows(remote) == 0
