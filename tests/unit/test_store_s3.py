"""Run directories and shards on an S3 server that fails: retried, resumed by range, listed by the page, leased."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from clipgap_ray import filesystems, lease, rundir, store
from clipgap_ray.errors import DataError, LeaseError, StorageError
from clipgap_ray.shards import read_shard
from clipgap_ray.sources import list_shards
from tests import made, s3_server

FAILURES = {"error": 5, "cut": 4, "hang up": 7}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_server.S3Server]:
    for name, value in s3_server.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(filesystems, "FIRST_PAUSE_S", 0.01)
    before = filesystems.options()
    with s3_server.running() as server:
        filesystems.configure(filesystems.StorageOptions(server.url))
        server.put("pool", "empty", b"")
        yield server
    filesystems.configure(before)


def test_files_survive_errors_cuts_and_hang_ups(s3: s3_server.S3Server) -> None:
    s3.fail_every = FAILURES
    array, table = np.arange(300.0).reshape(30, 10), pa.table({"a": list(range(50))})
    for i in range(6):
        folder = f"s3://pool/emb/{i}"
        store.write_bytes(f"{folder}/a.npy", store.array_bytes(array + i))
        with store.atomic_file(f"{folder}/t.parquet") as file:
            file.write(store.table_bytes(table))
        assert np.array_equal(store.read_array(f"{folder}/a.npy"), array + i)
        assert store.read_table(f"{folder}/t.parquet", ["a"]) == table
        assert store.read_bytes(f"{folder}/a.npy", 128, 80) == (array + i).tobytes()[:80]
        assert store.list_names(folder) == ["a.npy", "t.parquet"]
        assert store.exists(f"{folder}/a.npy")
        assert not store.exists(f"{folder}/b.npy")
    assert all(s3.failed[kind] >= 3 for kind in FAILURES)
    with pytest.raises(DataError, match="nothing does not exist"):
        store.read_bytes("s3://pool/nothing")


def test_a_server_that_always_fails_is_named(s3: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "ATTEMPTS", 2)
    s3.fail_every = {"hang up": 1}
    with pytest.raises(StorageError, match=r"s3://pool/empty: .* after 2 attempts") as error:
        store.read_bytes("s3://pool/empty")
    assert "--endpoint-url" in str(error.value)


def test_a_connection_cut_in_a_shard_costs_its_block(
    s3: s3_server.S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = made.tar_shard(tmp_path / "pool" / "0.tar", [(f"{n}.jpg", made.jpeg(n)) for n in range(20)])
    data = Path(local.uri).read_bytes()
    s3.put("pool", "0.tar", data)
    monkeypatch.setattr("clipgap_ray.shards._COPY_BLOCK_BYTES", 4096)
    (shard,) = list_shards("s3://pool/0.tar")
    s3.fail_every = {"cut": 3}
    with s3.counting() as requests:
        assert list(read_shard(shard)) == list(read_shard(local))
    gets = [path for method, path in requests if method == "GET"]
    blocks = -(-len(data) // 4096)
    assert s3.failed["cut"] >= blocks // 3
    assert len(gets) == blocks + s3.failed["cut"]  # one more request per cut, not the file from its start


def test_a_listing_asks_by_the_page_not_by_the_shard(s3: s3_server.S3Server) -> None:
    for i in range(1200):
        s3.put("pool", f"laion/{i:05d}.tar", b"")
    for source, limit in (
        ("s3://pool/laion", 8),
        ("s3://pool/laion/*.tar", 8),
        ("s3://pool/laion/{00000..01199}.tar", 0),
    ):
        with s3.counting() as requests:
            shards = list_shards(source)
        assert [shard.name for shard in shards[:2]] == ["00000.tar", "00001.tar"]
        assert len(shards) == 1200
        assert len(requests) <= limit, requests


def test_opening_a_log_asks_by_the_segment_not_by_the_part(s3: s3_server.S3Server) -> None:
    with rundir.RunDirectory("s3://pool/out", "embed", {"x": 1}) as directory:
        rundir.assign_parts(directory.uri, [f"{i}.tar" for i in range(1000)])
        directory.log.append([{"part": i, "read": 1, "kept": 1} for i in range(1000)])
    with s3.counting() as requests:
        with rundir.RunDirectory("s3://pool/out", "embed", {"x": 1}) as directory:
            rundir.assign_parts(directory.uri, [f"{i}.tar" for i in range(1000)])
            assert len(directory.log.records) == 1000
    assert len(requests) < 25, requests


def test_profile_and_anonymity_reach_the_server(
    s3: s3_server.S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.exists("s3://pool/empty")
    assert "Credential=testing/" in s3.authorizations[-1]
    filesystems.configure(filesystems.StorageOptions(s3.url, anonymous=True))
    store.exists("s3://pool/empty")
    assert s3.authorizations[-1] == ""
    for name in s3_server.CREDENTIALS:
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = OFWORK\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    filesystems.configure(filesystems.StorageOptions(s3.url, profile="work"))
    store.exists("s3://pool/empty")
    assert "Credential=OFWORK/" in s3.authorizations[-1]
    filesystems.configure(filesystems.StorageOptions(s3.url, profile="absent"))
    with pytest.raises(StorageError, match=r"absent") as error:
        store.exists("s3://pool/empty")
    assert "--profile" in str(error.value)


def log_in(folder: Path, key: str) -> None:
    """Write the credentials of the profile `work`, as a login does."""
    text = f"[work]\naws_access_key_id = {key}\naws_secret_access_key = x\naws_session_token = {key}\n"
    (folder / "credentials").write_text(text)


@pytest.fixture
def login(s3: s3_server.S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the only credentials that this process has, those of OLD."""
    for name in s3_server.CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    log_in(tmp_path, "OLD")
    filesystems.configure(filesystems.StorageOptions(s3.url, profile="work"))
    return tmp_path


@pytest.mark.parametrize("call", [store.exists, store.size, store.read_bytes, store.list_names])
def test_credentials_that_expire_are_read_again(
    s3: s3_server.S3Server, login: Path, call: Callable[[str], object]
) -> None:
    before = call("s3://pool/empty")
    s3.expired.add("OLD")
    log_in(login, "NEW")
    assert call("s3://pool/empty") == before
    assert "Credential=NEW/" in s3.authorizations[-1]


def test_credentials_that_stay_expired_are_an_error_with_the_next_step(s3: s3_server.S3Server, login: Path) -> None:
    store.exists("s3://pool/empty")
    s3.expired.add("OLD")
    with pytest.raises(StorageError, match=r"check whether the credentials have expired; .* again continues"):
        store.read_bytes("s3://pool/empty")
    with s3.counting() as requests, pytest.raises(StorageError, match=r"token has expired\.\nhint: check \(or renew\)"):
        store.list_names("s3://pool")
    assert len(requests) == 2


def test_a_process_that_hands_out_credentials_is_asked_ahead_of_their_end(s3: s3_server.S3Server, login: Path) -> None:
    """As instance profiles and service accounts: botocore renews what ends within ten minutes by itself."""
    program = f"""
import datetime, json, pathlib
count = pathlib.Path({str(login)!r}) / "count"
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=5)
key = f"KEY{{number}}"
print(json.dumps(dict(Version=1, AccessKeyId=key, SecretAccessKey="x", SessionToken=key, Expiration=end.isoformat())))
"""
    (login / "hand_out.py").write_text(program)
    (login / "config").write_text(f"[profile issued]\ncredential_process = {sys.executable} {login}/hand_out.py\n")
    filesystems.configure(filesystems.StorageOptions(s3.url, profile="issued"))

    def the_last_key_is_over(_: int) -> None:
        used = [header.split("Credential=")[1].split("/")[0] for header in s3.authorizations]
        s3.expired.update(set(used) - {used[-1]})

    s3.watcher = the_last_key_is_over
    for _ in range(4):
        assert store.read_bytes("s3://pool/empty") == b""
    assert len({header.split("Credential=")[1].split("/")[0] for header in s3.authorizations}) >= 4


def test_botocore_s_own_variables_are_honoured(s3: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    filesystems.configure(filesystems.StorageOptions())
    assert store.list_names("s3://pool") == ["empty"]
    fsspec.get_filesystem_class("s3").clear_instance_cache()


VICTIM = """
import os, signal, sys
from clipgap_ray import filesystems, rundir, store
filesystems.configure(filesystems.StorageOptions(sys.argv[1]))
with rundir.RunDirectory("s3://pool/out", "embed", {"x": 1}) as directory:
    parts = rundir.assign_parts(directory.uri, ["a.tar", "b.tar"])
    directory.log.append([{"part": 0, "read": 2, "kept": 2}])
    store.write_bytes(directory.path("img_emb_00001.npy"), b"half of the second part")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_continued_and_a_living_one_refuses(
    s3: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.fail_every = FAILURES
    monkeypatch.setattr(lease, "BEAT_S", 0.3)
    victim = subprocess.run([sys.executable, "-c", VICTIM, s3.url], env=dict(os.environ), timeout=120, check=False)
    assert victim.returncode == -signal.SIGKILL
    left = json.loads(store.read_bytes("s3://pool/out/lease"))
    started = time.monotonic()
    with rundir.RunDirectory("s3://pool/out", "embed", {"x": 1}) as heir:
        assert time.monotonic() - started >= 3 * lease.BEAT_S  # it watched the dead driver's lease stand still
        assert json.loads(store.read_bytes("s3://pool/out/lease"))["token"] != left["token"]
        assert set(heir.log.records) == {0}
        assert rundir.assign_parts(heir.uri, ["a.tar", "b.tar"]) == {"a.tar": 0, "b.tar": 1}
        with pytest.raises(LeaseError, match="another driver") as refused:
            with rundir.RunDirectory("s3://pool/out", "embed", {"x": 1}):
                pass
        assert str(os.getpid()) in str(refused.value)
        heir.log.append([{"part": 1, "read": 1, "kept": 1}])
        assert heir.finish({}).kept == 3
    assert "lease" not in s3.objects("pool", "out/")
    assert rundir.read_manifest("s3://pool/out", "embed")["stage"] == "embed"
