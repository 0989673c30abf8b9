"""Drivers of stages in processes of their own, to be killed: the harness of the kill-and-resume tests."""

from __future__ import annotations

import contextlib
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

DRIVER_LIMIT_S = 150.0

DRIVER = """
import importlib, json, os, signal, sys
from clipgap_ray import rundir
stage, settings, values, kill = sys.argv[1:]
append, appended = rundir.CommitLog.append, []
def die_before_the_second(log, records):
    its_own = log.uri == json.loads(values)["out"] + "/" + kill
    if appended and its_own:
        os.kill(os.getpid(), signal.SIGKILL)
    append(log, records)
    appended.extend(records if its_own else [])
if kill:
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


@contextlib.contextmanager
def ray_folder() -> Iterator[str]:
    """A directory short enough for Ray's sockets, removed once no process names it any more."""
    folder = tempfile.mkdtemp(prefix="cg-", dir="/tmp")
    yield folder
    until(lambda: not pids_with(folder), "the end of Ray's processes", 60)
    shutil.rmtree(folder, ignore_errors=True)


class Driver(subprocess.Popen[bytes]):
    """A driver that writes its errors to a file: Ray's orphans inherit a pipe and would keep its reader waiting."""

    def __init__(self, command: list[str], env: dict[str, str], errors: Path) -> None:
        self.log = errors  # Popen has an attribute `errors` of its own
        with open(errors, "wb") as sink:
            super().__init__(command, env=env, stdout=subprocess.DEVNULL, stderr=sink)

    def finish(self) -> int:
        """Wait for the end and return the exit code."""
        return self.wait(timeout=DRIVER_LIMIT_S)

    def said(self) -> str:
        """The end of what it wrote to stderr."""
        return self.log.read_text(errors="replace")[-2000:]


@pytest.fixture
def drive() -> Iterator[Callable[..., Driver]]:
    """Start a stage's driver in a process and a Ray of its own; `kill` names the commit log at which it dies."""
    started: list[tuple[Driver, str]] = []

    def start(stage: Any, settings: Any, *, kill: str = "") -> Driver:
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
            kill,
        ]
        process = Driver(command, env, Path(folder, "driver.err"))
        started.append((process, folder))
        return process

    yield start
    for process, folder in started:
        process.kill()
        process.wait()
        for pid in pids_with(folder):  # Ray's own end by themselves when they miss the driver, after ten seconds
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda folder=folder: not pids_with(folder), "the end of Ray's processes", 30)
        shutil.rmtree(folder, ignore_errors=True)


def kill_then_resume(drive: Callable[..., Driver], stage: Any, settings: Any) -> int:
    """Let a driver die before its second commit, then finish here; returns the parts that the heir found."""
    dead = drive(stage, settings, kill="commits")
    assert dead.finish() == -signal.SIGKILL, dead.said()
    assert len(rundir.CommitLog(settings.out).records) == 1
    assert not Path(settings.out, "manifest.json").exists()
    return int(stage.run(settings).parts_skipped)
