"""SIGKILL at the worst moment, run again, compare with a run that nobody disturbed (contract 6).

The driver of embed, score and dedup kills itself between the files of its second part and that part's commit: one
part is committed, one is written and must be written again, the rest is missing. The driver of train is killed from
here once Ray Train has registered a checkpoint.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clipgap_ray import rundir
from clipgap_ray.config.dedup import DedupSettings
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.config.score import ScoreSettings
from clipgap_ray.config.train import TrainSettings
from clipgap_ray.stages import dedup, embed, score, train
from tests import made
from tests.conftest import RESUME_LOSS_TOLERANCE

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
DRIVER_LIMIT_S = 150.0

DRIVER = """
import importlib, json, os, signal, sys
from clipgap_ray import rundir
stage, settings, values, kill = sys.argv[1:]
append, appended = rundir.CommitLog.append, []
def die_before_the_second(log, records):
    if appended and log.uri.startswith(json.loads(values)["out"] + "/commits"):
        os.kill(os.getpid(), signal.SIGKILL)
    append(log, records)
    appended.extend(records)
if kill == "kill":
    rundir.CommitLog.append = die_before_the_second
module, name = settings.split(":")
importlib.import_module(stage).run(getattr(importlib.import_module(module), name)(**json.loads(values)))
"""


def pids_with(word: str) -> list[int]:
    """Processes whose command line names a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if word.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def until(condition: Callable[[], Any], what: str, limit_s: float = DRIVER_LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen within {limit_s} s")
        time.sleep(0.01)  # between two looks, not instead of one


class Driver(subprocess.Popen[bytes]):
    """A driver that writes its errors to a file: Ray's orphans inherit a pipe and would keep its reader waiting."""

    def __init__(self, command: list[str], env: dict[str, str], errors: Path) -> None:
        self.errors = errors
        with open(errors, "wb") as sink:
            super().__init__(command, env=env, stdout=subprocess.DEVNULL, stderr=sink)

    def finish(self) -> int:
        """Wait for the end and return the exit code."""
        return self.wait(timeout=DRIVER_LIMIT_S)

    def said(self) -> str:
        """The end of what it wrote to stderr."""
        return self.errors.read_text(errors="replace")[-2000:]


@pytest.fixture
def drive() -> Iterator[Callable[..., Driver]]:
    """Start a stage's driver in a process and a Ray of its own."""
    started: list[tuple[Driver, str]] = []

    def start(stage: Any, settings: Any, *, kill: bool = False) -> Driver:
        folder = tempfile.mkdtemp(prefix="cg-kill-", dir="/tmp")
        env = {**os.environ, "CLIPGAP_RAY_TMP": folder, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        env.pop("RAY_ADDRESS", None)
        kind = f"{type(settings).__module__}:{type(settings).__name__}"
        command = [
            sys.executable,
            "-c",
            DRIVER,
            stage.__name__,
            kind,
            settings.model_dump_json(),
            "kill" if kill else "",
        ]
        process = Driver(command, env, Path(folder, "driver.err"))
        started.append((process, folder))
        return process

    yield start
    for process, folder in started:
        process.kill()
        process.wait()
        until(lambda folder=folder: not pids_with(folder), "the end of Ray's processes", 30)
        shutil.rmtree(folder, ignore_errors=True)


def kill_then_resume(drive: Callable[..., Driver], stage: Any, settings: Any) -> int:
    """Let the driver die before its second commit, then finish; returns the parts that the resumption found."""
    dead = drive(stage, settings, kill=True)
    assert dead.finish() == -signal.SIGKILL, dead.said()
    assert len(rundir.CommitLog(settings.out).records) == 1
    assert not Path(settings.out, "manifest.json").exists()
    heir = drive(stage, settings)
    assert heir.finish() == 0, heir.said()
    return int(json.loads(Path(settings.out, "summary.json").read_text())["parts_skipped"])


def test_embed(drive: Any, tiny_world: made.World, tiny_embeddings: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "emb")
    settings = EmbedSettings(source=tiny_world.path("pool"), out=out, model="projection", batch_size=made.BATCH_SIZE)
    assert kill_then_resume(drive, embed, settings) == 1
    for kind in ("img_emb", "text_emb", "metadata", "ledger"):
        assert made.files_below(f"{out}/{kind}") == made.files_below(f"{tiny_embeddings['pool']}/{kind}")
    assert json.loads(Path(out, "summary.json").read_text())["parts"] == 11


def test_score(drive: Any, tiny_embeddings: dict[str, str], tiny_scores: str, tmp_path: Path) -> None:
    settings = ScoreSettings(**made.score_words(tiny_embeddings), out=str(tmp_path / "s"), group_bytes=1)
    assert kill_then_resume(drive, score, settings) == 1
    for kind in ("pool", "queries", "thresholds"):
        assert made.files_below(str(tmp_path / "s" / kind)) == made.files_below(f"{tiny_scores}/{kind}")
    manifests = [rundir.read_manifest(uri, "score")["digest"] for uri in (str(tmp_path / "s"), tiny_scores)]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("mode", [{}, {"mode": "partitioned", "partitions": 8, "also": [0.9], "stays": "hard"}])
def test_dedup(drive: Any, tiny_embeddings: dict[str, str], tmp_path: Path, mode: dict[str, Any]) -> None:
    words = {"pool": tiny_embeddings["pool"], "min_similarity": 0.97, **mode}
    dedup.run(DedupSettings(**words, out=str(tmp_path / "whole")))
    assert kill_then_resume(drive, dedup, DedupSettings(**words, out=str(tmp_path / "cut"))) == 1
    cut, whole = made.files_below(str(tmp_path / "cut")), made.files_below(str(tmp_path / "whole"))
    written = {name for name in whole if name.startswith(("keep", "groups", "found.json"))}
    assert len(written) == (2 * 11 + 3 if mode else 11 + 2)
    assert all(cut[name] == whole[name] for name in written)
    manifests = [rundir.read_manifest(str(tmp_path / name), "dedup")["digest"] for name in ("cut", "whole")]
    assert manifests[0] == manifests[1]


def test_train(drive: Any, tiny_world: made.World, tmp_path: Path) -> None:
    words = {
        "source": tiny_world.path("pool"), "model": "conv-64-test", "batch_size": 8, "workers": 2, "warmup": 2,
        "num_samples": 16 * 30, "checkpoint_every": 3, "samples": str(tmp_path / "samples"),
    }  # fmt: skip
    whole, cut = (TrainSettings(**words, out=str(tmp_path / name)) for name in ("whole", "cut"))
    train.run(whole)
    dead = drive(train, cut)
    snapshot = Path(cut.out, "train", "checkpoint_manager_snapshot.json")
    until(
        lambda: dead.poll() is not None or (snapshot.exists() and '"checkpoint_' in snapshot.read_text()),
        "a checkpoint",
    )
    dead.kill()
    assert dead.wait() == -signal.SIGKILL
    assert not Path(cut.out, "manifest.json").exists()
    heir = drive(train, cut)
    assert heir.finish() == 0, heir.said()

    def history(run: TrainSettings) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(run.out, "metrics.jsonl").read_text().splitlines()]

    starts = json.loads(Path(cut.out, "summary.json").read_text())["starts"]
    assert starts[0] == 0
    assert len(starts) == 2
    assert starts[1] >= 3, "the second driver began from the start"
    expected, found = history(whole), history(cut)
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [10, 20, 30]
    for one, other in zip(expected, found, strict=True):
        assert one["lr"] == other["lr"]
        assert abs(one["loss"] - other["loss"]) <= RESUME_LOSS_TOLERANCE
    assert len({row["loss"] for row in expected}) == 3
