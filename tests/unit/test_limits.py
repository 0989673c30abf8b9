"""Limits in hours and money: they speak after a commit, name both numbers, and cost follows the nodes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clipgap_ray import cli
from clipgap_ray.config.embed import EmbedSettings
from clipgap_ray.config.index import IndexSettings
from clipgap_ray.config.limits import HEAD, LimitsSettings, PricesFile
from clipgap_ray.errors import ConfigError, StoppedError
from clipgap_ray.kernels.order import SampleOrder
from clipgap_ray.stages import limits, session, train, waits
from clipgap_ray.stages.progress import Progress
from clipgap_ray.stages.train_data import Plan

PRICES = "per_hour: {CPU: 0.5, GPU: 2.0}\ncurrency: EUR\n"


@pytest.fixture(autouse=True)
def no_limit() -> Any:
    yield
    limits.start(LimitsSettings())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(hours=0.0)
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: now.hours * 3600))
    return now


def test_hours_are_looked_at_with_every_step_of_progress(clock: SimpleNamespace) -> None:
    limits.start(LimitsSettings(max_hours=2))
    progress = Progress("embed", 10, "shards")
    progress.advance()
    clock.hours = 1.99
    progress.advance()
    clock.hours = 2.5
    with pytest.raises(StoppedError, match=r"stopped after 2.50 hours, --max-hours is 2\n.*same command continues"):
        progress.advance()
    assert progress.done == 3, "the commit that passed the limit counts"


def test_costs_follow_the_nodes(clock: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prices.yaml").write_text(PRICES)
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"GPU": 8.0}}]
    monkeypatch.setattr(limits.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(limits.ray, "nodes", lambda: nodes)
    limits.start(LimitsSettings(max_cost=10.0, prices=str(tmp_path / "prices.yaml")))
    clock.hours = 2.0
    limits.check()  # 2 h x 4 CPUs x 0.5 = 4
    nodes.append({"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0, "memory": 1e9}})
    clock.hours = 3.0
    limits.check()  # 1 h x (2 + 1 + 2) = 5
    clock.hours = 3.5
    with pytest.raises(StoppedError, match=r"stopped after 11.50 EUR in 3.50 hours, --max-cost is 10"):
        limits.check()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A pretended cluster's nodes, none at first, and a wait that speaks at once."""
    there: list[dict[str, Any]] = []
    monkeypatch.setattr(session.ray, "nodes", lambda: there)
    monkeypatch.setattr(session.ray, "available_resources", dict)
    monkeypatch.setattr(waits, "launchable", lambda resource: 8)
    monkeypatch.setattr(waits, "SAY_SHORTAGE_S", 0.01)
    return there


def test_the_head_costs_what_its_own_resource_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME

    assert HEAD == HEAD_NODE_RESOURCE_NAME
    resources = [{"node:__internal_head__": 1.0, "node:10.0.0.1": 1.0}, {"CPU": 2.0, "node:10.0.0.2": 1.0}]
    monkeypatch.setattr(limits.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(limits.ray, "nodes", lambda: [{"Alive": True, "Resources": one} for one in resources])
    assert limits.hourly_cost(PricesFile(per_hour={"CPU": 0.5, HEAD: 0.25})) == 1.25
    assert limits.hourly_cost(PricesFile(per_hour={"CPU": 0.5})) == 1.0


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])  # in a script: `command &`
def test_a_wait_for_nodes_that_do_not_come_ends_at_the_limit(nodes: list[dict[str, Any]], handler: Any) -> None:
    limits.start(LimitsSettings(max_hours=1e-9))
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(StoppedError, match="--max-hours is 1e-09"), waits.waiting({"CPU": 1.0}):
            time.sleep(60)
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_wait_for_others_work_or_for_a_result_goes_on(nodes: list[dict[str, Any]]) -> None:
    nodes.append({"Alive": True, "Resources": {"CPU": 1.0}})
    limits.start(LimitsSettings(max_hours=1e-9))
    with waits.waiting({"CPU": 1.0}):
        time.sleep(0.2)


def test_ctrl_c_in_a_wait_stays_what_it_is(nodes: list[dict[str, Any]]) -> None:
    with pytest.raises(KeyboardInterrupt), waits.waiting({"CPU": 1.0}):
        raise KeyboardInterrupt


def test_training_looks_before_its_first_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    done, stopped, signals = threading.Event(), [], []
    monkeypatch.setattr(train.ray, "get", lambda rows: rows)
    monkeypatch.setattr(train.train_report, "open_reporters", lambda *_: contextlib.nullcontext([]))

    def end(*words: int) -> None:
        signals.append(words)
        done.set()

    monkeypatch.setattr(train.os, "kill", end)
    monitor = SimpleNamespace(since=SimpleNamespace(remote=lambda count: []))
    plan = Plan([], SampleOrder(np.array([8]), 0, 8), (), {}, 1, 32, 8)
    limits.start(LimitsSettings(max_hours=1e-9))
    follower = threading.Thread(target=train._follow, args=(monitor, plan, "out", done, {"CPU": 0.9}, 2, stopped))
    follower.start()
    follower.join(60)
    assert [str(error).split(",")[0] for error in stopped] == ["stopped after 0.00 hours"]
    assert signals == [(os.getpid(), signal.SIGINT)]


def test_without_a_cluster_this_machine_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(limits.os, "cpu_count", lambda: 2)
    assert limits.hourly_cost(PricesFile(per_hour={"CPU": 0.5})) == 1.0


def test_a_cost_without_prices_and_wrong_prices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--max-cost 3 without --prices"):
        EmbedSettings.load({"source": "a", "out": "b", "model": "projection", "limits": {"max_cost": 3}}, "embed")
    with pytest.raises(ConfigError, match=r"prices.yaml does not exist"):
        limits.start(LimitsSettings(max_cost=3, prices=str(tmp_path / "prices.yaml")))
    (tmp_path / "prices.yaml").write_text("per_hour: {CPU: -1}")
    with pytest.raises(ConfigError, match=r"prices.yaml.*CPU"):
        limits.start(LimitsSettings(max_cost=3, prices=str(tmp_path / "prices.yaml")))


def test_limits_are_flags_and_no_part_of_what_is_written() -> None:
    words = {"source": "a", "out": "b", "model": "projection"}
    assert EmbedSettings(**words, limits={"max_hours": 1}).fingerprint() == EmbedSettings(**words).fingerprint()
    index = {"embeddings": "a", "out": "b"}
    assert IndexSettings(**index, limits={"max_hours": 1}).fingerprint() == IndexSettings(**index).fingerprint()


def test_the_exit_code_of_a_stopped_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: Any) -> None:
        raise StoppedError("stopped after 2.00 hours, --max-hours is 2", hint="the same command continues")

    load = cli._load
    monkeypatch.setattr(cli, "_load", lambda path: stopped if path.endswith("stages.embed:run") else load(path))
    words = ["embed", "a", "--out", str(tmp_path), "--model", "projection", "--max-hours", "2"]
    assert cli.main(words) == cli.EXIT_STOPPED == 5
    assert "StoppedError: stopped after 2.00 hours" in capsys.readouterr().err
