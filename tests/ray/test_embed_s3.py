"""Embed from an S3 server that fails to one: the bytes of a local run; settings reach the workers; resume."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clipgap_ray import filesystems, lease, rundir
from clipgap_ray.config.base import StorageSettings
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.stages import embed
from tests import made, s3_server

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
KINDS = ("img_emb", "text_emb", "metadata", "ledger")


@pytest.fixture
def s3(tiny_world: made.World) -> Iterator[s3_server.S3Server]:
    """The world's pool on a server. Neither driver nor workers have credentials: only --anonymous gets through."""
    before = filesystems.options()
    with s3_server.running() as server:
        for path in sorted(Path(tiny_world.path("pool")).glob("*.tar")):
            server.put("bucket", f"pool/{path.name}", path.read_bytes())
        yield server
    filesystems.configure(before)


def settings(s3: s3_server.S3Server, **more: Any) -> EmbedSettings:
    words = {"source": "s3://bucket/pool", "out": "s3://bucket/emb", "model": "projection", "workers": 2}
    storage = StorageSettings(endpoint_url=s3.url, anonymous=True)
    return EmbedSettings(**{**words, "batch_size": made.BATCH_SIZE, "storage": storage, **more})


def check_equal(s3: s3_server.S3Server, local: str) -> None:
    for kind in KINDS:
        assert s3.objects("bucket", f"emb/{kind}/") == made.files_below(f"{local}/{kind}")


@pytest.mark.slow
def test_bytes_equal_a_local_run_through_errors_and_cuts(
    s3: s3_server.S3Server, tiny_embeddings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.fail_every = {"error": 9, "cut": 6, "hang up": 31}
    summary = embed.run(settings(s3))
    assert set(s3.failed) == {"error", "cut", "hang up"}
    assert not any(s3.authorizations)
    assert summary.parts == 11
    check_equal(s3, tiny_embeddings["pool"])
    s3.fail_every = {}
    found = EmbeddingSet.open("s3://bucket/emb")
    assert found.digest == EmbeddingSet.open(tiny_embeddings["pool"]).digest
    assert found.all_images().shape == (found.num_rows, found.dim)
    with s3.counting() as requests:
        assert embed.run(settings(s3)).parts_skipped == 11
    assert not [path for _, path in requests if path.endswith(".tar")]  # a finished shard is not even looked at


@pytest.mark.slow
def test_an_interrupted_run_is_continued(
    s3: s3_server.S3Server, tiny_embeddings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.3)
    append = rundir.CommitLog.append

    def die_after_four(log: rundir.CommitLog, records: list[dict[str, Any]]) -> None:
        if len(log.records) == 4:
            raise KeyboardInterrupt
        append(log, records)

    with monkeypatch.context() as dying:
        dying.setattr(rundir.CommitLog, "append", die_after_four)
        dying.setattr(rundir.store, "remove", lambda uri: None)  # like SIGKILL: the lease stays
        with pytest.raises(KeyboardInterrupt):
            embed.run(settings(s3))
    assert "lease" in s3.objects("bucket", "emb/")
    with s3.counting() as requests:
        assert embed.run(settings(s3)).parts_skipped == 4
    assert len({path for method, path in requests if method == "GET" and path.endswith(".tar")}) == 11 - 4
    check_equal(s3, tiny_embeddings["pool"])


@pytest.mark.slow  # the heir watches the dead driver's lease for 15 s
def test_a_killed_run_is_continued(
    s3: s3_server.S3Server,
    tiny_embeddings: dict[str, str],
    drive: Any,
) -> None:
    s3.fail_every = {"error": 23, "cut": 11}
    dead = drive(embed, settings(s3), kill="commits")
    assert dead.finish() == -signal.SIGKILL, dead.said()
    assert "lease" in s3.objects("bucket", "emb/")
    heir = drive(embed, settings(s3))
    assert heir.finish() == 0, heir.said()
    assert json.loads(s3.objects("bucket", "emb/")["summary.json"])["parts_skipped"] == 1
    check_equal(s3, tiny_embeddings["pool"])


@pytest.mark.slow
def test_credentials_that_expire_in_mid_run_are_read_again(
    s3: s3_server.S3Server,
    tiny_embeddings: dict[str, str],
    drive: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Driver and readers hold the credentials of a login whose time ends after every thirtieth request of theirs."""
    logins = [f"LOGIN{number}" for number in range(100)]

    def log_in(key: str) -> None:
        text = f"[work]\naws_access_key_id = {key}\naws_secret_access_key = x\naws_session_token = {key}\n"
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").rename(tmp_path / "credentials")

    def time_passes(requests: int) -> None:
        if requests % 30 == 0:
            log_in(logins[requests // 30])
            s3.expired.update(logins[: requests // 30])

    for name in s3_server.CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    log_in(logins[0])
    s3.watcher = time_passes
    storage = StorageSettings(endpoint_url=s3.url, profile="work")
    run = drive(embed, settings(s3, storage=storage))
    assert run.finish() == 0, run.said()
    assert len(s3.expired) >= 3
    check_equal(s3, tiny_embeddings["pool"])
