"""A cluster that loses its head is gone, the work is not; commands at once on one cluster do not meet."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipgap_ray import rundir
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.stages import embed, score
from tests import made
from tests.driver import pids_with, ray_folder, until
from tests.two_nodes import TwoNodes

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]
LIMIT_S = 240.0
NAMES = ("one", "two", "three", "four")  # as many as one-core nodes take encoders of beside a read
KINDS = ("img_emb", "text_emb", "metadata", "ledger")


@pytest.fixture
def folder() -> Iterator[str]:
    with ray_folder() as short:
        yield short


def settings(world: made.World, out: Path) -> EmbedSettings:
    return EmbedSettings(source=world.path("pool"), out=str(out), model="projection", batch_size=made.BATCH_SIZE)


def test_after_the_head_is_lost_a_new_cluster_finishes_the_work(
    tiny_world: made.World, tiny_embeddings: dict[str, str], tmp_path: Path, folder: str
) -> None:
    # How long nodes and drivers wait for a head that does not answer; Ray's own default is a minute.
    first = TwoNodes(folder, RAY_gcs_rpc_server_reconnect_timeout_s="5")
    out = tmp_path / "emb"
    driver = first.driver(embed, settings(tiny_world, out))
    until(lambda: rundir.CommitLog(str(out)).records or driver.poll() is not None, "a commit", LIMIT_S)
    (head,) = [pid for pid in pids_with(folder) if b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(head, signal.SIGKILL)
    assert driver.wait(timeout=LIMIT_S) != 0, "it said that it had finished"
    done = len(rundir.CommitLog(str(out)).records)
    assert not (out / "manifest.json").exists()
    first.holder.kill()
    first.holder.wait()
    for pid in pids_with(folder):  # what a lost machine would have taken with it
        os.kill(pid, signal.SIGKILL)
    until(lambda: not pids_with(folder), "the end of the first cluster", 60)

    second = TwoNodes(str(Path(folder, "b")))
    heir = second.driver(embed, settings(tiny_world, out))
    assert heir.wait(timeout=LIMIT_S) == 0, heir.said()
    second.close()
    assert 1 <= done < 11
    for kind in KINDS:
        assert made.files_below(f"{out}/{kind}") == made.files_below(f"{tiny_embeddings['pool']}/{kind}")


def test_commands_at_once_on_one_cluster_do_not_meet(
    tiny_world: made.World, tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path, folder: str
) -> None:
    cluster = TwoNodes(folder)
    words = {**made.score_words(tiny_embeddings), "group_bytes": 1, "query_share": 1e9}
    drivers = [
        *(cluster.driver(embed, settings(tiny_world, tmp_path / name)) for name in NAMES),
        cluster.driver(score, ScoreSettings(**words, out=str(tmp_path / "scores"))),
        cluster.driver(embed, settings(tiny_world, tmp_path / "one")),  # the lease refuses it, or it finds all done
    ]
    codes = [driver.wait(timeout=LIMIT_S) for driver in drivers]
    assert codes[1:5] == [0] * 4, [driver.said() for driver in drivers[1:5]]
    refused = [driver for driver, code in zip(drivers, codes, strict=True) if code]
    assert len(refused) <= 1
    assert all("lease" in driver.said() for driver in refused), refused[0].said()
    cluster.close()
    for name in NAMES:
        for kind in KINDS:
            assert made.files_below(f"{tmp_path}/{name}/{kind}") == made.files_below(
                f"{tiny_embeddings['pool']}/{kind}"
            )
    for kind in ("pool", "queries", "thresholds"):
        assert made.files_below(f"{tmp_path}/scores/{kind}") == made.files_below(f"{tiny_scores}/{kind}")
