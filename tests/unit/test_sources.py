"""Every way to write a source gives the same shards in a stable order."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipgap_ray import store
from clipgap_ray.errors import ConfigError
from clipgap_ray.sources import Shard, expand_braces, list_shards, suffix_of
from tests import made


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    for name in ("00002.tar", "00000.tar", "00001.TAR", "00000.parquet", "notes.txt"):
        (tmp_path / "pool").mkdir(exist_ok=True)
        (tmp_path / "pool" / name).write_bytes(b"")
    return tmp_path / "pool"


def names(source: str) -> list[str]:
    return [shard.name for shard in list_shards(source)]


def test_a_directory_gives_its_tars_sorted_and_neither_parquet_nor_notes(pool: Path) -> None:
    shards = list_shards(str(pool))
    assert [shard.name for shard in shards] == ["00000.tar", "00001.TAR", "00002.tar"]
    assert shards[0] == Shard(str(pool / "00000.tar"), "00000.tar", "tar", "pool")


def test_trees_are_walked_and_names_are_relative(tmp_path: Path) -> None:
    for name in ("b/1.tar", "a/1.tar", "0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert names(str(tmp_path)) == ["0.tar", "a/1.tar", "b/1.tar"]


@pytest.mark.parametrize("form", ["{root}/*.tar", "{root}/0000{{0,2}}.tar", "{root}/{{00000..00002..2}}.tar"])
def test_globs_and_braces(pool: Path, form: str) -> None:
    source = form.format(root=pool)
    if "..2" in form:
        with pytest.raises(ConfigError, match="is not a range"):
            list_shards(source)
        return
    assert names(source) == ["00000.tar", "00002.tar"]


def test_joined_sources_and_list_files_keep_their_order(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{pool}/00002.tar\n\n{pool}/00000.parquet\n")
    assert names(f"{pool}/00001.TAR::@{tmp_path}/list.txt") == ["00001.TAR", "00002.tar", "00000.parquet"]
    kinds = [shard.kind for shard in list_shards(f"@{tmp_path}/list.txt")]
    assert kinds == ["tar", "parquet"]


def test_one_file(pool: Path) -> None:
    assert list_shards(str(pool / "00001.TAR"))[0].kind == "tar"
    assert list_shards(str(pool / "00000.parquet"))[0].kind == "parquet"
    with pytest.raises(ConfigError, match=r"neither a \.tar nor a \.parquet"):
        list_shards(str(pool / "notes.txt"))


def test_folders_of_images_are_shards_whatever_the_case_of_their_suffix(tmp_path: Path) -> None:
    for name in ("cat/a.JPG", "cat/b.txt", "dog/x/c.WebP", "empty/readme.md", "top.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"x")
    shards = list_shards(str(tmp_path / "set"))
    assert [(shard.name, shard.kind) for shard in shards] == [("set", "folder"), ("cat", "folder"), ("dog/x", "folder")]


def test_remote_stores_list_like_local_ones(tmp_path: Path) -> None:
    for name in ("1.tar", "0.tar"):
        store.write_bytes(f"memory://sources-test/{name}", made.tar([]))
    shards = list_shards("memory://sources-test")
    assert [shard.name for shard in shards] == ["0.tar", "1.tar"]
    assert store.exists(shards[0].uri)
    assert [shard.uri for shard in list_shards("memory://sources-test/*.tar")] == [shard.uri for shard in shards]


@pytest.mark.parametrize("source", ["", "a::", "/nowhere/at/all", "/nowhere/*.tar"])
def test_what_matches_nothing_is_an_error(source: str) -> None:
    with pytest.raises(ConfigError) as error:
        list_shards(source)
    assert "hint: " in str(error.value)


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no shards in"):
        list_shards(str(tmp_path))


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [("a", ["a"]), ("{08..11}", ["08", "09", "10", "11"]), ("{0..2}x", ["0x", "1x", "2x"]), ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),  # noqa: E501
     ("{000..001}/{0,1}", ["000/0", "000/1", "001/0", "001/1"])],
)  # fmt: skip
def test_braces_keep_their_width(pattern: str, expanded: list[str]) -> None:
    assert expand_braces(pattern) == expanded


@pytest.mark.parametrize("pattern", ["{a..b}", "{1..}", "{1..x}"])
def test_braces_that_are_no_range_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="is not a range"):
        expand_braces(pattern)


@pytest.mark.parametrize(("name", "suffix"), [("a.JPG", "jpg"), ("a.b.Png", "png"), ("a", ""), ("a.", "")])
def test_suffixes_are_lower_case(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix


@pytest.mark.parametrize(
    "line", ["https://user:pw-77@host/a.tar", "https://host/a.tar?X-Amz-Signature=pw-77", "s3://key:pw-77@bucket/a.tar"]
)
def test_a_secret_in_a_list_is_refused_and_not_shown(tmp_path: Path, line: str) -> None:
    (tmp_path / "list.txt").write_text(f"\n{line}\n")
    with pytest.raises(ConfigError, match=r"list.txt:2 is .*\*\*\*.*:? a secret in a list") as caught:
        list_shards(f"@{tmp_path}/list.txt")
    assert "pw-77" not in str(caught.value)
    assert "instance profile" in str(caught.value)
