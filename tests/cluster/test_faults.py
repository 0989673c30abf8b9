"""Every stage, every fault: the outcome is the same bytes, at once or after the same command is given again.

A fault happens at a moment drawn from a seed within the time that the stage takes undisturbed; CLIPGAP_FAULT_SEED moves
them all. The table of outcomes is printed at the end, and CLIPGAP_FAULT_TABLE=docs/faults.md puts it there: the mark
`fault` begins a test's cell with FAILED, and `outcome` ends it.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from clipgap_ray import schema, store
from clipgap_ray.config.dedup import DedupSettings
from clipgap_ray.config.embed import EmbedSettings, ImportSettings
from clipgap_ray.config.evaluate import EvaluateSettings
from clipgap_ray.config.export import ExportSettings
from clipgap_ray.config.index import IndexSettings
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.config.split import GapMatch, GapsSettings
from clipgap_ray.config.train import TrainSettings
from clipgap_ray.config.world import WorldSettings
from clipgap_ray.embeddings import EmbeddingSet
from clipgap_ray.kernels import subsets
from clipgap_ray.stages import dedup, embed, evaluate, export, gaps, imports, index, score, split, train, world
from tests import made, s3_server
from tests.driver import Driver, ray_folder, until
from tests.two_nodes import TwoNodes

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

SEED = int(os.environ.get("CLIPGAP_FAULT_SEED", "0"))
LIMIT_S = 240.0
ROOMY = 1 << 30  # bytes that a tmpfs may take; it takes what is written
ON_NODES = {"world": world, "embed": embed, "score": score, "dedup": dedup, "gaps": gaps, "export": export,
            "index": index, "train": train, "evaluate": evaluate}  # fmt: skip
IN_THE_DRIVER = {"import": imports, "split": split}  # no worker, node or object store has a part in them
STAGES = ON_NODES | IN_THE_DRIVER
#: What a stage's result is, below its folder; the rest is bookkeeping with times in it.
RESULTS = {
    "world": ("pool/", "reference/", "tests/", "counteranimal/", "truth.parquet"),
    "embed": ("img_emb/", "text_emb/", "metadata/", "ledger/"),
    "import": ("img_emb/", "text_emb/", "metadata/", "ledger/"),
    "score": ("pool/", "queries/", "thresholds/"),
    "dedup": ("keep/", "groups", "found.json"),
    "split": ("cut.",),
    "gaps": ("cut/", "diagnostics.json"),
    "export": ("0", "sizes.json", "sample_ids.npy", "meta.json"),
    "index": ("shard_00000/index.faiss", "shard_00001/index.faiss", "uidmap"),
    "train": ("metrics.jsonl", "checkpoint.pt"),
    "evaluate": ("val.parquet", "sketch.parquet", "r.parquet"),
}
#: Columns of training's log that say how fast it was, not what came out.
OF_THE_CLOCK = ("data_wait_share", "samples_per_s", "seconds")
S3_FAILURES = {"error": 9, "cut": 6, "hang up": 31, "throttle": 13}


@dataclass
class Lab:
    """Two nodes, inputs, an S3 server, and each stage's undisturbed result."""

    cluster: TwoNodes
    s3: s3_server.S3Server
    inputs: dict[str, Any]
    whole: dict[str, tuple[dict[str, bytes], float]]

    def settings(self, stage: str, out: str) -> Any:
        given = self.inputs
        if stage == "world":
            return WorldSettings(rows=300, out=out)
        if stage == "import":
            return ImportSettings(folder=given["embeddings"]["pool"], model="projection", pretrained="made", out=out)
        if stage == "split":
            return GapMatch(scores=given["scores"], test=made.TESTS, out=f"{out}/cut.npy")
        if stage == "gaps":
            pool = given["embeddings"]["pool"]
            return GapsSettings(pool=pool, scores=given["scores"], split=(given["cut"],), out=out)
        if stage == "embed":
            return EmbedSettings(source=given["pool"], out=out, model="projection", batch_size=made.BATCH_SIZE)
        if stage == "score":
            return ScoreSettings(**made.score_words(given["embeddings"]), out=out, group_bytes=1, query_share=1e9)
        if stage == "dedup":
            return DedupSettings(
                pool=given["embeddings"]["pool"], min_similarity=0.97, mode="partitioned", partitions=8, out=out
            )
        if stage == "export":
            return ExportSettings(split=given["half"], source=given["pool"], shard_size=40, write_uid=True, out=out)
        if stage == "index":
            return IndexSettings(embeddings=given["embeddings"]["pool"], key="Flat", recall_queries=10, out=out)
        if stage == "train":
            return TrainSettings(
                source=given["pool"], model="conv-64-test", batch_size=16, workers=1, warmup=2, num_samples=16 * 30,
                checkpoint_every=5, samples=given["samples"], out=out,
            )  # fmt: skip
        tests = tuple(f"{name}={given['tests']}/{name}" for name in made.TESTS)
        return EvaluateSettings(model="conv-64-test", pretrained="random", test=tests, batch_size=16, out=out)

    def start(self, stage: str, out: Path) -> Driver:
        """Start a stage that writes below a folder; a short one finds it there, so its time includes its imports."""
        if stage in IN_THE_DRIVER:
            out.mkdir(parents=True)
        return self.cluster.driver(STAGES[stage], self.settings(stage, str(out)))

    def undisturbed(self, stage: str, folder: Path) -> tuple[dict[str, bytes], float]:
        """The stage's result on this cluster, and the seconds from its first file to its end."""
        if stage not in self.whole:
            out = folder / "whole"
            driver = self.start(stage, out)
            began = moment_of_birth(out, driver)
            assert driver.wait(timeout=LIMIT_S) == 0, driver.said()
            self.whole[stage] = (results(stage, made.files_below(str(out))), time.monotonic() - began)
        return self.whole[stage]


def moment_of_birth(out: Path, driver: Driver) -> float:
    until(lambda: out.exists() or driver.poll() is not None, f"{out}", LIMIT_S)
    return time.monotonic()


def results(stage: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files that make up the result, less what tells the time, and less what a killed writer left unfinished."""
    chosen = {
        name: data for name, data in files.items() if name.startswith(RESULTS[stage]) and not name.endswith(".tmp")
    }
    if stage == "train":
        rows = [json.loads(line) for line in chosen["metrics.jsonl"].splitlines()]
        kept = [{key: value for key, value in row.items() if key not in OF_THE_CLOCK} for row in rows]
        chosen["metrics.jsonl"] = json.dumps(kept).encode()
        chosen["checkpoint.pt"] = weights(chosen["checkpoint.pt"])
    return chosen


def weights(checkpoint: bytes) -> bytes:
    """The sha256 of every tensor, with name, type and shape: how torch packs them into a file is not the result."""
    state = torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True)["state_dict"]
    lines = {name: [str(t.dtype), list(t.shape), store.sha256(t.numpy().tobytes())] for name, t in state.items()}
    assert lines
    return json.dumps(lines, sort_keys=True).encode()


def too_small(stage: str, expected: dict[str, bytes]) -> int:
    """Bytes of a disk on which the stage starts and cannot finish."""
    checkpoint = 20_000_000  # less than one of conv-64-test with its optimizer
    return checkpoint if stage == "train" else max(max(map(len, expected.values())) // 2, 4096)


@pytest.fixture(scope="module")
def lab(
    tiny_world: made.World, tiny_embeddings: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    inputs = tmp_path_factory.mktemp("lab")
    uids = EmbeddingSet.open(tiny_embeddings["pool"]).all_metadata(["uid"]).column("uid")
    half = str(inputs / "half.npy")
    store.write_bytes(half, store.array_bytes(subsets.sorted_unique(schema.pack_uids(uids))[::2]))
    given = {"pool": tiny_world.path("pool"), "tests": tiny_world.path("tests"), "embeddings": tiny_embeddings,
             "half": half, "samples": str(inputs / "samples")}  # fmt: skip
    with ray_folder() as folder, s3_server.running() as s3:
        s3.put("bucket", "ready", b"")
        cluster = TwoNodes(folder, **s3_server.CREDENTIALS, AWS_ENDPOINT_URL=s3.url)
        lab = Lab(cluster, s3, {**given, "scores": str(inputs / "scores"), "cut": str(inputs / "cut.npy")}, {})
        scoring = lab.start("score", inputs / "scores")
        assert scoring.wait(timeout=LIMIT_S) == 0, scoring.said()
        split.run(GapMatch(scores=lab.inputs["scores"], test=("sketch",), out=lab.inputs["cut"]))
        yield lab
        cluster.close()


@pytest.fixture
def outcome(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Write a cell of the table of faults."""
    return lambda stage, fault, result: record_property("fault", (stage, fault, result))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("stage", "victim"),
    [(stage, victim) for stage in ON_NODES for victim in ("driver", "worker", "node")]
    + [(stage, "driver") for stage in IN_THE_DRIVER],
)
def test_a_death_at_any_moment_changes_no_byte(
    lab: Lab, stage: str, victim: str, tmp_path: Path, outcome: Callable[..., None]
) -> None:
    expected, seconds = lab.undisturbed(stage, tmp_path)
    seed = SEED + zlib.crc32(f"{stage} {victim}".encode())
    rng = random.Random(seed)
    for attempt in range(4):  # a stage may be over before the moment: then an earlier one
        out = tmp_path / f"out-{attempt}"
        settings = lab.settings(stage, str(out))
        driver = lab.start(stage, out)
        moment = moment_of_birth(out, driver) + rng.uniform(0.0, 0.8) * seconds / 2**attempt
        until(lambda moment=moment: time.monotonic() >= moment, "the moment", LIMIT_S)
        if victim == "worker":
            until(lambda driver=driver: lab.cluster.workers() or driver.poll() is not None, "a worker", LIMIT_S)
        if lab.cluster.strike(victim, driver, rng):
            break
        assert driver.returncode == 0, driver.said()
    else:
        pytest.fail(f"{stage} ended before {victim} could be killed, four times")
    code = driver.wait(timeout=LIMIT_S)
    how = "healed" if code == 0 else "rerun"
    if code != 0:
        assert code == (-signal.SIGKILL if victim == "driver" else 1), driver.said()
        assert not (out / "manifest.json").exists(), "an unfinished run says that it is finished"
        driver = lab.cluster.driver(STAGES[stage], settings)
        assert driver.wait(timeout=LIMIT_S) == 0, driver.said()
    assert results(stage, made.files_below(str(out))) == expected
    outcome(stage, victim, f"{how} (seed {seed})")


@pytest.mark.fault("full object store")
@pytest.mark.parametrize("stage", ON_NODES)
def test_full_object_stores_change_no_byte(lab: Lab, stage: str, tmp_path: Path, outcome: Callable[..., None]) -> None:
    expected, _ = lab.undisturbed(stage, tmp_path)
    out = tmp_path / "out"
    driver = lab.cluster.driver(STAGES[stage], lab.settings(stage, str(out)), ballast=True)
    assert driver.wait(timeout=LIMIT_S) == 0, driver.said()
    assert results(stage, made.files_below(str(out))) == expected
    outcome(stage, "full object store", "healed")


@pytest.mark.fault("full disk")
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_a_clear_error_and_loses_nothing(
    lab: Lab, stage: str, tmp_path: Path, outcome: Callable[..., None]
) -> None:
    if not lab.cluster.disk:
        pytest.skip("this kernel gives us no mount namespace to make a small disk in")
    expected, _ = lab.undisturbed(stage, tmp_path)
    settings = lab.settings(stage, f"{lab.cluster.disk}/{stage}")
    out = lab.cluster.on_disk(stage)
    lab.cluster.resize_disk(too_small(stage, expected))
    try:
        once = settings.model_copy(update={"max_failures": 0}) if stage == "train" else settings  # it stays full
        driver = lab.cluster.driver(STAGES[stage], once)
        assert driver.wait(timeout=LIMIT_S) == 1, driver.said()
        # the whole log: Ray may forward what its workers wrote after the command has ended
        assert "no space left on device" in driver.log.read_text(errors="replace"), driver.said()
        assert not (out / "manifest.json").exists()
        lab.cluster.resize_disk(ROOMY)
        driver = lab.cluster.driver(STAGES[stage], settings)
        assert driver.wait(timeout=LIMIT_S) == 0, driver.said()
        assert results(stage, made.files_below(str(out))) == expected
    finally:
        lab.cluster.resize_disk(ROOMY)
        shutil.rmtree(out, ignore_errors=True)
    outcome(stage, "full disk", "clear error, then rerun")


@pytest.mark.fault("slow, failing S3")
@pytest.mark.parametrize("stage", STAGES)
def test_a_slow_and_failing_s3_changes_no_byte(
    lab: Lab, stage: str, tmp_path: Path, outcome: Callable[..., None]
) -> None:
    expected, _ = lab.undisturbed(stage, tmp_path)
    lab.s3.fail_every, lab.s3.delay_s = S3_FAILURES, 0.01
    lab.s3.failed.clear()
    try:
        driver = lab.cluster.driver(STAGES[stage], lab.settings(stage, f"s3://bucket/{stage}"))
        assert driver.wait(timeout=LIMIT_S) == 0, driver.said()
    finally:
        lab.s3.fail_every, lab.s3.delay_s = {}, 0.0
    assert sum(lab.s3.failed.values()) > 0
    assert results(stage, lab.s3.objects("bucket", f"{stage}/")) == expected
    outcome(stage, "slow, failing S3", f"healed ({sum(lab.s3.failed.values())} failures)")
