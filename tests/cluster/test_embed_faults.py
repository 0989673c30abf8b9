"""Embed on two simulated nodes while its driver, an encoder and a node are killed at random moments.

A killed driver is started again with the same command; a killed actor and a killed node are Ray's to replace. In the
end the folder is, to the last bit, that of a run without Ray that nobody disturbed. Other stages: test_faults.py.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipgap_ray import rundir, store
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.stages import embed
from tests import made
from tests.driver import Driver, ray_folder, until
from tests.two_nodes import TwoNodes

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROUNDS = 2
MODEL = "timm:vit_tiny_patch16_224.augreg_in21k"  # random weights: some seconds for 600 rows
LIMIT_S = 400.0


@pytest.fixture
def two_nodes() -> Iterator[TwoNodes]:
    with ray_folder() as folder:
        cluster = TwoNodes(folder)
        yield cluster
        cluster.close()


def wait_for(out: str, commits: int, driver: Driver, seconds: float) -> None:
    """Wait until so many parts are committed, or the driver has ended, and some seconds more."""
    until(
        lambda: len(rundir.CommitLog(out).records) >= commits or driver.poll() is not None,
        f"{commits} commits", LIMIT_S,
    )  # fmt: skip
    moment = time.monotonic() + seconds
    until(lambda: time.monotonic() >= moment, "the moment", seconds + 10)


@pytest.mark.timeout(1500)
def test_deaths_at_random_moments_change_no_bit(two_nodes: TwoNodes, tiny_world: made.World, tmp_path: Path) -> None:
    source = tiny_world.path("pool")
    whole = made.embed_without_ray(source, str(tmp_path / "whole"), MODEL, "random", text=False)
    rng = random.Random(310_09562)
    struck: dict[str, int] = {"driver": 0, "encoder": 0, "node": 0}
    for number in range(ROUNDS):
        out = str(tmp_path / f"round-{number}")
        settings = EmbedSettings(
            source=source, out=out, model=MODEL, pretrained="random", batch_size=made.BATCH_SIZE, text=False, yes=True
        )
        driver = two_nodes.driver(embed, settings)
        for victim in rng.sample(sorted(struck), len(struck)):
            commits = len(rundir.CommitLog(out).records) + rng.randint(0, 2)
            wait_for(out, commits, driver, rng.uniform(0, 1.5))
            struck[victim] += two_nodes.strike(victim, driver, rng, b"MapWorker(MapBatches(Encode))")
            if driver.poll() is not None:
                assert driver.returncode in (0, -signal.SIGKILL), driver.said()
                driver = two_nodes.driver(embed, settings)
        assert driver.wait(timeout=LIMIT_S) == 0, driver.said()
        for kind in ("img_emb", "metadata", "ledger"):
            assert made.files_below(f"{out}/{kind}") == made.files_below(f"{whole}/{kind}"), (number, kind)
        summary = store.read_json(f"{out}/summary.json")
        assert summary["read"] == summary["kept"] + sum(summary["dropped"].values())
        assert not Path(out, "text_emb").exists()
    assert min(struck.values()) >= 1, struck
