"""A gateway and replicas that die, hang, or refuse; without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.errors import ConfigError
from clipgap_ray.serving import remote
from clipgap_ray.serving.messages import ApiError, IndexInfo
from clipgap_ray.serving.remote import RemoteEncoder, RemoteSearcher

INFO = IndexInfo(name="pool", version="v1", rows=2, dim=2, shards=1, key="Flat")
NEAR = np.array([[0.9]], np.float32), np.array([[7]])


class Handle:
    """A deployment whose replicas answer in turn: with a value, or by raising."""

    def __init__(self, *turns: Any) -> None:
        self.turns = list(turns)
        self.asked = 0
        self.search = self.describe = self.encode_texts = self

    async def _next(self) -> Any:
        turn = self.turns[min(self.asked, len(self.turns) - 1)]
        self.asked += 1
        if isinstance(turn, Exception):
            raise turn
        return await turn() if callable(turn) else turn

    def remote(self, *_: Any) -> Any:
        return self._next()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "AGAIN_S", 0.0)


def ask(*handles: Handle, timeout_s: float = 5.0) -> Any:
    searcher = RemoteSearcher(INFO, list(handles), None, timeout_s)  # type: ignore[arg-type]
    return asyncio.run(searcher.answer(np.zeros((1, 2), np.float32), 1))


def rpc_error() -> Exception:
    return grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, grpc.aio.Metadata(), grpc.aio.Metadata())


@pytest.mark.parametrize("died", [ActorDiedError, lambda: ActorUnavailableError("gone", b"0" * 16), rpc_error])
def test_a_question_is_asked_again_when_its_replica_dies(died: Callable[[], Exception]) -> None:
    shard, other = Handle(died(), died(), NEAR), Handle(NEAR)
    answer = ask(shard, other)
    assert (answer.shards_ok, answer.degraded) == (2, False)
    assert (shard.asked, other.asked) == (3, 1)


def test_replicas_that_all_die_leave_the_answer_degraded() -> None:
    shard = Handle(ActorDiedError())
    answer = ask(shard, Handle(NEAR))
    assert (answer.shards_ok, answer.shards, answer.degraded) == (1, 2, True)
    assert answer.row_ids.tolist() == [[7]]
    assert shard.asked == remote.ASKS


def test_what_would_fail_again_is_not_asked_again() -> None:
    for error in (RayTaskError("search", "traceback", ValueError("bad")), BackPressureError(1, 1)):
        shard = Handle(error)
        assert ask(shard).shards_ok == 0
        assert shard.asked == 1


def test_all_questions_together_end_at_the_deadline() -> None:
    async def hang() -> None:
        await asyncio.sleep(60)

    shard = Handle(ActorDiedError(), hang)
    assert ask(shard, timeout_s=0.05).shards_ok == 0
    assert shard.asked == 2


def test_another_version_is_not_counted() -> None:
    searcher = RemoteSearcher(INFO, [Handle({"version": "v1"}), Handle({"version": "v0"})], None, 1.0)  # type: ignore[arg-type,list-item]
    assert asyncio.run(searcher.shards_ok()) == 1


def test_the_encoder_is_asked_again_and_then_given_up() -> None:
    rows = np.ones((1, 2), np.float32)
    encoder = RemoteEncoder(Handle(ActorDiedError(), rows))  # type: ignore[arg-type]
    assert asyncio.run(encoder.encode_texts(["x"])) is rows
    with pytest.raises(ApiError, match="the encoder did not answer") as caught:
        asyncio.run(RemoteEncoder(Handle(ActorDiedError())).encode_texts(["x"]))  # type: ignore[arg-type]
    assert (caught.value.status, caught.value.code) == (503, "encoder_lost")


def test_an_encoder_on_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipgap_ray.serving import run

    settings = ServeSettings(index=("pool=x",), encoder_gpus=0.5)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"--encoder-gpus 0\.5, but this machine has 0 GPUs"):
        run._check_gpus(settings)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    run._check_gpus(settings)
