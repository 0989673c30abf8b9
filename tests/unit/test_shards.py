"""Nothing in a shard vanishes: every sample comes out, or a reason why it cannot."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgap_ray import filesystems, store
from clipgap_ray.errors import DataError
from clipgap_ray.shards import Sample, Skip, read_shard, sample_uid, write_tar
from clipgap_ray.sources import Shard, list_shards
from tests import made


def read(shard: Shard) -> tuple[list[Sample], list[Skip]]:
    items = list(read_shard(shard))
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Skip)]


def fields(number: int, **more: object) -> bytes:
    return json.dumps({"uid": f"{number:032x}", "url": f"http://x/{number}", **more}).encode()


def triple(number: int) -> list[tuple[str, bytes]]:
    key = f"{number:05d}"
    return [
        (f"{key}.jpg", made.jpeg(number)),
        (f"{key}.txt", f"caption {number}".encode()),
        (f"{key}.json", fields(number)),
    ]


# --- tars ------------------------------------------------------------------------------------------------


def test_a_sound_tar_gives_every_sample_with_its_place(tmp_path: Path) -> None:
    shard = made.tar_shard(tmp_path / "0.tar", [member for n in range(3) for member in triple(n)])
    samples, skips = read(shard)
    assert skips == []
    assert [s.key for s in samples] == ["00000", "00001", "00002"]
    assert [s.uid for s in samples] == [f"{n:032x}" for n in range(3)]
    assert [s.caption for s in samples] == ["caption 0", "caption 1", "caption 2"]
    assert [s.url for s in samples] == ["http://x/0", "http://x/1", "http://x/2"]
    data = Path(shard.uri).read_bytes()
    for number, sample in enumerate(samples):
        assert sample.image == made.jpeg(number)
        assert data[sample.offset : sample.offset + len(sample.image)] == sample.image
        assert sample.sha256 == hashlib.sha256(sample.image).hexdigest()
        assert sample.notes == ()


def test_members_say_where_every_file_of_a_sample_lies(tmp_path: Path) -> None:
    files = [("a.TXT", b"t"), ("b.jpg", made.jpeg(1)), ("a.JPEG", made.jpeg(0)), ("a.seg.npy", b"\x00"), ("a", b"bare")]
    shard = made.tar_shard(tmp_path / "0.tar", files)
    data = Path(shard.uri).read_bytes()
    a, b = (s for s in read_shard(shard) if isinstance(s, Sample))
    assert [(m.suffix, data[m.offset : m.offset + m.size]) for m in a.members] == [
        ("TXT", b"t"), ("JPEG", made.jpeg(0)), ("seg.npy", b"\x00"), ("", b"bare"),
    ]  # fmt: skip
    assert [m.suffix for m in b.members] == ["jpg"]
    quick = [s for s in read_shard(shard, images=False) if isinstance(s, Sample)]
    assert [replace(s, image=b"") for s in (a, b)] == quick
    assert [s.members for s in quick] == [a.members, b.members]


def test_a_remote_tar_reads_like_a_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = made.tar_shard(tmp_path / "0.tar", [member for n in range(5) for member in triple(n)])
    remote = "memory://shards-test/0.tar"
    store.write_bytes(remote, Path(local.uri).read_bytes())
    monkeypatch.setattr("clipgap_ray.shards._COPY_BLOCK_BYTES", 1_000)
    fs, _ = filesystems.filesystem(remote)
    cat, failures = fs.cat_file, [2]

    def flaky(path: str, **words: int) -> bytes:
        if failures[0] and words["start"] > 1_500:
            failures[0] -= 1
            raise OSError("connection reset")
        return cat(path, **words)

    monkeypatch.setattr(type(fs), "cat_file", staticmethod(flaky))
    assert read(Shard(remote, "0.tar", "tar", local.source)) == read(local)
    assert failures == [0]


@functools.cache
def six_samples() -> tuple[bytes, list[int]]:
    """A tar of six samples, and where each sample's last member ends."""
    data = made.tar([member for n in range(6) for member in triple(n)])
    ends = [len(made.tar([m for n in range(k + 1) for m in triple(n)]).rstrip(b"\0")) for k in range(6)]
    return data, ends


def check_cut(tmp_path: Path, cut: int) -> None:
    data, ends = six_samples()
    path = tmp_path / "cut.tar"
    path.write_bytes(data[:cut])
    shard = Shard(str(path), "cut.tar", "tar", "pool")
    samples, skips = read(shard)
    whole = sum(end <= cut for end in ends)
    # samples that end before the cut are untouched; at most the one that the cut goes through may come in part
    assert [s.uid for s in samples[:whole]] == [f"{n:032x}" for n in range(whole)]
    assert [s.image for s in samples] == [made.jpeg(n) for n in range(len(samples))]
    assert len(samples) + sum(s.is_sample for s in skips) in (whole, whole + 1)
    assert [s.reason for s in skips] == (
        [] if cut >= len(data.rstrip(b"\0")) + 1024 else ["truncated_shard"] * len(skips)
    )


@given(cut=st.integers(0, len(six_samples()[0])))
def test_a_tar_cut_anywhere_gives_what_lies_before_the_cut(tmp_path: Path, cut: int) -> None:
    check_cut(tmp_path, cut)


@pytest.mark.parametrize("around", range(6))
def test_a_tar_cut_around_every_boundary_of_a_sample(tmp_path: Path, around: int) -> None:
    data, ends = six_samples()
    for cut in (-513, -512, -511, -2, -1, 0, 1, 2, 511, 512, 513, 1023, 1024, 1025):
        if 0 <= ends[around] + cut <= len(data):
            check_cut(tmp_path, ends[around] + cut)


def test_every_real_cut_is_reported(tmp_path: Path) -> None:
    data, ends = six_samples()
    for cut in [0, 100, 512, 700, ends[2] - 3, ends[2] + 600, ends[5] - 1]:
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:cut])
        _, skips = read(Shard(str(path), "cut.tar", "tar"))
        assert [s.reason for s in skips] == ["truncated_shard"], cut


def test_a_damaged_header_in_the_middle_is_reported_not_swallowed(tmp_path: Path) -> None:
    data = bytearray(six_samples()[0])
    at = len(made.tar(triple(0)).rstrip(b"\0"))
    at = -(-at // 512) * 512
    data[at : at + 512] = b"\xff" * 512
    path = tmp_path / "bad.tar"
    path.write_bytes(bytes(data))
    samples, skips = read(Shard(str(path), "bad.tar", "tar"))
    assert [s.uid for s in samples] == [f"{0:032x}"]
    assert [(s.reason, s.detail) for s in skips] == [("truncated_shard", f"damaged header at byte {at}")]


def test_a_cut_inside_the_caption_keeps_the_image(tmp_path: Path) -> None:
    members = [("a.jpg", made.jpeg(1)), ("a.txt", b"x" * 100)]
    data = made.tar(members)
    path = tmp_path / "cut.tar"
    path.write_bytes(data[: data.index(b"x" * 100) + 50])
    samples, skips = read(Shard(str(path), "cut.tar", "tar"))
    assert [(s.key, s.caption) for s in samples] == [("a", None)]
    assert [(s.key, s.is_sample) for s in skips] == [("a", False)]


def test_members_need_not_be_neighbours(tmp_path: Path) -> None:
    members = [member for n in range(4) for member in triple(n)]
    grouped = [m for suffix in ("jpg", "txt", "json") for m in members if m[0].endswith(suffix)]
    one, other = read(made.tar_shard(tmp_path / "a" / "0.tar", members)), read(
        made.tar_shard(tmp_path / "b" / "0.tar", grouped)
    )  # fmt: skip
    assert [replace(s, offset=0) for s in one[0]] == [replace(s, offset=0) for s in other[0]]
    assert one[1] == other[1] == []


@pytest.mark.parametrize("apart", [False, True])
def test_a_repeated_key_opens_another_sample(tmp_path: Path, apart: bool) -> None:
    again = [(name.replace("00009", "00000"), data) for name, data in triple(9)]
    members = [*triple(0), *triple(1), *again] if apart else [*triple(0), *again, *triple(1)]
    samples, skips = read(made.tar_shard(tmp_path / "0.tar", members))
    assert skips == []
    assert {s.key: s.uid for s in samples} == {
        "00000": f"{0:032x}", "00000#2": f"{9:032x}", "00001": f"{1:032x}",
    }  # fmt: skip
    assert {s.key: s.image for s in samples}["00000#2"] == made.jpeg(9)
    assert {s.key: s.notes for s in samples} == {"00000": (), "00000#2": ("repeated_key",), "00001": ()}


def test_two_images_under_one_key_are_two_samples(tmp_path: Path) -> None:
    shard = made.tar_shard(tmp_path / "0.tar", [("a.jpg", made.jpeg(0)), ("a.png", made.jpeg(1)), ("a.txt", b"t")])
    samples, skips = read(shard)
    assert [(s.key, s.image) for s in samples] == [("a", made.jpeg(0)), ("a#2", made.jpeg(1))]
    assert samples[0].uid != samples[1].uid
    assert skips == []


@pytest.mark.parametrize(
    ("suffix", "notes"), [("jpg", ()), ("webp", ()), ("JPEG", ("odd_suffix",)), ("Png", ("odd_suffix",))]
)
def test_image_suffixes_in_any_case(tmp_path: Path, suffix: str, notes: tuple[str, ...]) -> None:
    samples, _ = read(made.tar_shard(tmp_path / "0.tar", [(f"a.{suffix}", made.jpeg(0)), ("a.txt", b"t")]))
    assert [(s.key, s.image, s.notes) for s in samples] == [("a", made.jpeg(0), notes)]


def test_captions_come_from_txt_else_json_and_may_be_missing(tmp_path: Path) -> None:
    members = [
        ("a.jpg", made.jpeg(0)), ("a.txt", b"from txt"), ("a.json", fields(0, caption="from json")),
        ("b.jpg", made.jpeg(1)), ("b.json", fields(1, caption="from json")),
        ("c.jpg", made.jpeg(2)), ("c.json", fields(2, caption=None)),
        ("d.jpg", made.jpeg(3)), ("d.txt", b""),
        ("e.jpg", made.jpeg(4)), ("e.txt", b"ok"), ("e.json", b"{broken"),
        ("f.jpg", made.jpeg(5)), ("f.txt", b"caf\xe9"),
    ]  # fmt: skip
    samples, skips = read(made.tar_shard(tmp_path / "0.tar", members))
    assert skips == []
    assert [s.caption for s in samples] == ["from txt", "from json", None, None, "ok", "caf�"]
    assert [s.notes for s in samples] == [(), (), ("missing_caption",), ("missing_caption",), ("bad_json",), ()]


def test_labels_are_integers_or_a_reason(tmp_path: Path) -> None:
    members = [("a.cls", b"3"), ("a.jpg", made.jpeg(0)), ("b.cls", b"cat"), ("b.jpg", made.jpeg(1)), ("c.txt", b"x")]
    samples, skips = read(made.tar_shard(tmp_path / "0.tar", members))
    assert [(s.key, s.label) for s in samples] == [("a", 3)]
    assert [(s.key, s.reason, s.is_sample) for s in skips] == [("b", "bad_label", True), ("c", "no_image", True)]
    assert "'cat'" in skips[0].detail
    assert "txt" in skips[1].detail


@pytest.mark.parametrize(
    ("content", "reason"), [(made.tar([]), "empty_shard"), (b"", "truncated_shard"), (b"x" * 700, "truncated_shard")]
)
def test_shards_without_samples_say_so(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    samples, skips = read(Shard(str(tmp_path / "0.tar"), "0.tar", "tar"))
    assert samples == []
    assert [(s.key, s.reason, s.is_sample) for s in skips] == [("", reason, False)]


def test_a_missing_tar_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(Shard(str(tmp_path / "0.tar"), "0.tar", "tar"))


# --- parquet and folders ---------------------------------------------------------------------------------


def test_parquet_with_image_bytes(tmp_path: Path) -> None:
    table = {
        "image": [{"bytes": made.jpeg(0), "path": "x"}, {"bytes": None, "path": "y"}, {"bytes": made.jpeg(2), "path": ""}],  # noqa: E501
        "caption": ["one", "two", None],
        "uid": ["A" * 32, None, "not a uid"],
        "label": [4, 5, None],
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "0.parquet")
    samples, skips = read(Shard(str(tmp_path / "0.parquet"), "0.parquet", "parquet", "pool"))
    assert [(s.key, s.image, s.caption, s.label, s.notes) for s in samples] == [
        ("000000000", made.jpeg(0), "one", 4, ()), ("000000002", made.jpeg(2), None, -1, ("missing_caption",)),
    ]  # fmt: skip
    assert samples[0].uid == "a" * 32
    assert [(s.key, s.reason) for s in skips] == [("000000001", "no_image")]


def test_parquet_without_images_names_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["x"], "image": ["a string"]}), tmp_path / "0.parquet")
    with pytest.raises(DataError, match=r"no column of images: columns are \['url', 'image'\]"):
        read(Shard(str(tmp_path / "0.parquet"), "0.parquet", "parquet"))
    (tmp_path / "1.parquet").write_bytes(b"PAR1 cut")
    assert [s.reason for s in read(Shard(str(tmp_path / "1.parquet"), "1.parquet", "parquet"))[1]] == [
        "truncated_shard"
    ]


def test_folders_of_images_with_captions_beside(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "cat"
    folder.mkdir(parents=True)
    for name, data in {
        "a.jpg": made.jpeg(0),
        "a.png": made.jpeg(1),
        "b.JPEG": made.jpeg(2),
        "a.txt": b"two share it",
        "c.png": b"",
        "x.md": b"",
    }.items():
        (folder / name).write_bytes(data)
    (shard,) = list_shards(str(tmp_path / "set"))
    samples, skips = read(shard)
    assert [(s.key, s.caption) for s in samples] == [
        ("cat/a.jpg", "two share it"), ("cat/a.png", "two share it"), ("cat/b.JPEG", None),
    ]  # fmt: skip
    assert len({s.uid for s in samples}) == 3
    assert [(s.key, s.reason) for s in skips] == [("cat/c.png", "no_image")]


# --- uids ------------------------------------------------------------------------------------------------


def test_uid_rules_in_order() -> None:
    shard = Shard("/x/pool/0.tar", "0.tar", "tar", "pool")
    given_uid = sample_uid({"uid": "AB" * 16}, "http://x", "cap", shard, "k")
    assert given_uid == "ab" * 16
    by_url = sample_uid({"uid": "too short"}, "http://x", "cap", shard, "k")
    other = Shard("/elsewhere/1.tar", "1.tar", "tar", "elsewhere")
    assert by_url == sample_uid({}, "http://x", "cap", other, "other")  # place does not matter when url and caption do
    assert by_url != sample_uid({}, "http://x", "cap2", shard, "k")
    assert by_url != sample_uid({}, "http://y", "cap", shard, "k")
    by_key = sample_uid({}, "http://x", None, shard, "k")
    assert by_key == sample_uid({"uid": 7}, None, "cap", shard, "k")
    assert by_key != sample_uid({}, None, None, shard, "k2")
    assert by_key != sample_uid({}, None, None, replace(shard, name="1.tar"), "k")
    assert by_key != sample_uid({}, None, None, replace(shard, source="pool2"), "k")
    assert len({given_uid, by_url, by_key}) == 3


def test_words_of_a_uid_do_not_run_together() -> None:
    shard = Shard("", "0.tar", "tar", "p")
    assert sample_uid({}, "ab", "c", shard, "k") != sample_uid({}, "a", "bc", shard, "k")


@pytest.mark.parametrize("form", ["{root}", "{root}/*.tar", "{root}/{{0..1}}.tar", "{root}/0.tar::{root}/1.tar"])
def test_uids_do_not_depend_on_where_the_pool_lies_or_how_it_is_written(tmp_path: Path, form: str) -> None:
    for number in (0, 1):
        made.tar_shard(tmp_path / "here" / "pool" / f"{number}.tar", [(f"a{number}.jpg", made.jpeg(number))])
    shutil.copytree(tmp_path / "here", tmp_path / "else" / "where")

    def uids(root: Path) -> list[str]:
        return [s.uid for shard in list_shards(form.format(root=root)) for s in read(shard)[0]]

    here = uids(tmp_path / "here" / "pool")
    assert here == uids(tmp_path / "else" / "where" / "pool")
    assert here == [s.uid for shard in list_shards(str(tmp_path / "here" / "pool")) for s in read(shard)[0]]
    assert len(set(here)) == 2


def test_uids_of_a_flat_folder_of_images_do_not_depend_on_where_it_lies(tmp_path: Path) -> None:
    for place in ("here/set", "else/where/set"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.jpg").write_bytes(made.jpeg(0))
    here, there = (read(list_shards(str(tmp_path / place))[0])[0][0] for place in ("here/set", "else/where/set"))
    assert (here.key, here.uid) == (there.key, there.uid) == ("set/a.jpg", here.uid)


# --- writing ---------------------------------------------------------------------------------------------


def test_written_tars_are_deterministic_and_read_back(tmp_path: Path) -> None:
    samples = [(f"k{n}", {"jpg": made.jpeg(n), "txt": b"t"}) for n in range(3)]
    data = write_tar(samples)
    assert data == write_tar(samples)
    (tmp_path / "0.tar").write_bytes(data)
    found, skips = read(Shard(str(tmp_path / "0.tar"), "0.tar", "tar"))
    assert [(s.key, s.image, s.caption) for s in found] == [(f"k{n}", made.jpeg(n), "t") for n in range(3)]
    assert skips == []


# --- the faulty world ------------------------------------------------------------------------------------


def test_every_planted_fault_comes_out_as_what_it_is(tiny_world: made.World) -> None:
    """Reader level: see tests/ray/test_embed_stage.py for the ledger."""
    found = {shard.name: read(shard) for shard in list_shards(tiny_world.path("pool"))}
    planted = [row for row in tiny_world.of("pool") if row["fault"]]
    assert {row["fault"] for row in planted} == {
        "broken_image", "truncated_image", "odd_suffix", "missing_caption", "repeated_key", "doubled_key",
        "repeated_uid", "truncated_shard", "empty_shard",
    }  # fmt: skip
    for row in planted:
        samples, skips = found[row["shard"].removeprefix("pool/")]
        keys = {s.key: s for s in samples}
        match row["fault"]:
            case "odd_suffix" | "missing_caption":
                assert row["fault"] in keys[row["key"]].notes
            case "repeated_key" | "doubled_key":
                assert keys[f"{row['key']}#2"].uid == row["uid"]
                assert keys[f"{row['key']}#2"].notes == ("repeated_key",)
            case "broken_image" | "truncated_image":
                assert row["key"] in keys  # the bytes are there; decoding fails
            case "repeated_uid":
                assert keys[row["key"]].uid == row["uid"]
            case "truncated_shard":
                assert row["key"] not in keys
                assert [s.reason for s in skips] == ["truncated_shard"]
            case "empty_shard":
                assert [s.reason for s in skips] == ["empty_shard"]
