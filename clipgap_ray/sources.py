"""From what a user writes (`pool/{00000..00099}.tar::s3://bucket/more @list.txt`) to a stable list of shards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from clipgap_ray import filesystems, store
from clipgap_ray.errors import ConfigError
from clipgap_ray.redaction import ADVICE, addresses_with_secrets

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Shard:
    """One input shard: where it is, what it is, and the name by which its part number is remembered.

    `name` is the path below the source, so that the same data moved elsewhere keeps its identity.
    """

    uri: str
    name: str
    kind: str  # "tar", "parquet" or "folder"
    source: str = ""  # base name of the folder it came from: part of the uid where nothing better is given


def list_shards(source: str) -> list[Shard]:
    """List the shards of a source in a stable order.

    Args:
        source: A directory, a file, a glob, a brace pattern (`{00000..00099}.tar`), a list file (`@shards.txt`),
            or several of these joined by `::`. Any fsspec URI.

    Returns:
        Shards in source order; within a directory, sorted by name.

    Raises:
        ConfigError: If a part of the source matches nothing or is of no known kind, or a line of a list file carries
            a password, a signature or a token.
    """
    shards: list[Shard] = []
    for item in source.split("::"):
        found = list(_list_one(item.strip()))
        if not found:
            raise ConfigError(
                f"no shards in {item!r}: expected *.tar, *.parquet or folders of images",
                hint="check the path; patterns look like 'pool/{00000..00099}.tar'",
            )
        shards.extend(found)
    return _distinct(shards)


def _distinct(shards: list[Shard]) -> list[Shard]:
    """Give shards of several sources distinct names; the first keeps its own, so that appending renames nothing."""
    taken: set[str] = set()
    result = []
    for shard in shards:
        name, count = shard.name, 1
        while name in taken:
            name = f"{shard.source}{f'#{count}' if count > 1 else ''}/{shard.name}"
            count += 1
        taken.add(name)
        result.append(replace(shard, name=name))
    return result


def _list_one(item: str) -> Iterator[Shard]:
    if not item:
        raise ConfigError("the source is empty", hint="give a directory, a glob or a brace pattern")
    if item.startswith("@"):
        for number, line in enumerate(store.read_bytes(item[1:]).decode().splitlines(), 1):
            if line.strip():
                for shown in addresses_with_secrets(line.strip()):  # settings see no more than the list's name
                    raise ConfigError(
                        f"{item[1:]}:{number} is {shown}: a secret in a list would be shown by Ray and kept in tables",
                        hint=ADVICE,
                    )
                yield from _list_one(line.strip())
        return
    if "{" in item:
        for uri in expand_braces(item):
            yield _file_shard(uri)
        return
    fs, path = filesystems.filesystem(item)
    prefix = item.split("://")[0] + "://" if "://" in item else ""
    if any(mark in path for mark in "*?["):
        found = sorted(str(p) for p in filesystems.patiently(item, lambda: fs.glob(path)))
        for name in found:
            yield _file_shard(prefix + name)
        return
    try:
        kind = filesystems.patiently(item, lambda: fs.info(path))["type"]
    except FileNotFoundError:
        hint = "check the path; remote paths look like s3://bucket/prefix"
        raise ConfigError(f"{item} does not exist", hint=hint) from None
    if kind == "file":
        yield _file_shard(item)
        return
    yield from _list_directory(item)


def _list_directory(uri: str) -> Iterator[Shard]:
    """Tars first, else parquet, else every folder with images: a directory holds one kind."""
    fs, path = filesystems.filesystem(uri)
    prefix = uri.split("://")[0] + "://" if "://" in uri else ""
    files = sorted(str(name) for name in filesystems.patiently(uri, lambda: fs.find(path)))
    base = str(path).rstrip("/")
    source = base.rsplit("/", 1)[-1]

    def name_of(file: str) -> str:
        return file[len(base) + 1 :] if file == base or file.startswith(base + "/") else file

    for suffix, kind in ((".tar", "tar"), (".parquet", "parquet")):
        chosen = [file for file in files if file.lower().endswith(suffix)]
        # img2dataset writes 00000.parquet beside 00000.tar, hence tars win.
        if chosen:
            for file in chosen:
                yield Shard(prefix + file, name_of(file), kind, source)
            return
    folders = sorted({file.rsplit("/", 1)[0] for file in files if suffix_of(file) in IMAGE_SUFFIXES})
    for folder in folders:
        yield Shard(prefix + folder, name_of(folder) or PurePosixPath(folder).name, "folder", source)


def _file_shard(uri: str) -> Shard:
    parent, _, name = uri.rstrip("/").rpartition("/")
    suffix = suffix_of(name)
    if suffix not in ("tar", "parquet"):
        raise ConfigError(f"{uri} is neither a .tar nor a .parquet shard", hint="give its folder for single images")
    return Shard(uri, name, suffix, parent.rsplit("/", 1)[-1])


def expand_braces(pattern: str) -> list[str]:
    """Expand `{000..012}` and `{a,b}` in a pattern; widths of zero-padded ranges are kept."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, body, tail = pattern[: match.start()], match.group(1), pattern[match.end() :]
    if ".." in body:
        try:
            low, high = body.split("..")
            options = [f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)]
        except ValueError:
            raise ConfigError(f"{{{body}}} in {pattern!r} is not a range of numbers like {{00000..00099}}") from None
    else:
        options = body.split(",")
    return [rest for option in options for rest in expand_braces(head + option + tail)]


def suffix_of(name: str) -> str:
    """Return the lower-case suffix of a file name, without the dot; empty when there is none."""
    return name.rsplit(".", 1)[-1].lower() if "." in name else ""
