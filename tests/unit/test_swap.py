"""Another version of an index in place of the one that answers: keys, routes, the change-over, the operator."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from clipgap_ray.config.serve import ADMIN_VARIABLE, TOKEN_VARIABLE, ServeSettings, read_token
from clipgap_ray.errors import ConfigError
from clipgap_ray.kernels.topk import exact_topk
from clipgap_ray.serving.admin import Admin, SwapState
from clipgap_ray.serving.api import make_api
from clipgap_ray.serving.guard import Keys, token_sha256
from clipgap_ray.serving.inputs import Query
from clipgap_ray.serving.local import LocalBackend
from clipgap_ray.serving.messages import ApiError
from tests.index_fixture import all_rows, unit_rows, write_embeddings
from tests.service_fixture import serve_locally

OLD, NEW = [unit_rows(40, 1)], [unit_rows(30, 2), unit_rows(25, 3)]


def _version(folder: Path, parts: list[np.ndarray], version: str) -> LocalBackend:
    return serve_locally(write_embeddings(folder / f"emb-{version}", parts), folder / version, version=version)


# --- the change-over ---------------------------------------------------------------------------------------


def test_a_replaced_version_ends_its_requests_and_no_answer_is_mixed(tmp_path: Path) -> None:
    """Requests without pause from several callers, while the version changes: none fails, each is of one version."""
    backend, newer = _version(tmp_path, OLD, "old"), _version(tmp_path, NEW, "new")
    query = unit_rows(1, 9)
    exact = {
        name: exact_topk(query, *all_rows(parts), 5)[1][0].tolist() for name, parts in (("old", OLD), ("new", NEW))
    }
    seen: list[str] = []

    async def load(stop: asyncio.Event) -> None:
        while not stop.is_set():
            found = await backend.search("pool", [Query(vector=query[0].astype(np.float32))], 5)
            assert [near.row_id for near in found.neighbours[0]] == exact[found.info.version]
            seen.append(found.info.version)

    async def change() -> None:
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(6):
                group.create_task(load(stop))
            while len(seen) < 30:
                await asyncio.sleep(0)
            backend.replace("pool", newer.searchers["pool"])
            assert await backend.drained("pool", 30.0)
            after = len(seen)
            while len(seen) < after + 30:
                await asyncio.sleep(0)
            assert set(seen[after:]) == {"new"}
            stop.set()

    asyncio.run(change())
    assert set(seen) == {"old", "new"}
    assert not backend._users


def test_draining_waits_for_a_slow_request_and_says_when_it_gave_up(tmp_path: Path) -> None:
    backend, newer = _version(tmp_path, OLD, "old"), _version(tmp_path, NEW, "new")
    searcher = backend.searchers["pool"]
    answer, held = searcher.answer, asyncio.Event()

    async def slow(*args: Any) -> Any:
        await held.wait()
        return await answer(*args)

    searcher.answer = slow  # type: ignore[method-assign]

    async def change() -> None:
        request = asyncio.create_task(backend.search(None, [Query(vector=np.ones(searcher.info.dim, np.float32))], 1))
        await asyncio.sleep(0)
        backend.replace("pool", newer.searchers["pool"])
        assert not await backend.drained("pool", 0.0)
        assert not await backend.drained("pool", 0.05)
        waiting = asyncio.create_task(backend.drained("pool", 30.0))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        held.set()
        assert await waiting
        assert (await request).info.version == "old"
        assert await backend.drained("pool", 0.0)  # nothing left to wait for

    asyncio.run(change())


def test_a_picture_of_another_version_is_not_shown_for_a_row(tmp_path: Path) -> None:
    backend = _version(tmp_path, OLD, "old")
    with pytest.raises(ApiError, match="another version"):
        asyncio.run(backend.thumbnail("pool", 0, "older"))


# --- keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "admin", "path", "token", "admitted"),
    [
        (None, None, "/v1/search", "", True),
        (None, None, "/v1/admin/swap", "", True),  # there is no such route then
        ("r", None, "/v1/search", "", False),
        ("r", None, "/v1/search", "r", True),
        ("r", None, "/v1/search", "a", False),
        (None, "a", "/v1/search", "", True),
        (None, "a", "/v1/admin/swap", "", False),
        (None, "a", "/v1/admin/swap", "a", True),
        ("r", "a", "/v1/admin/swap", "r", False),
        ("r", "a", "/v1/admin/swap", "a", True),
        ("r", "a", "/v1/admin", "r", False),
        ("r", "a", "/v1/search", "a", True),
        ("r", "a", "/v1/search", "x", False),
        ("r", "a", "/healthz", "", True),
        ("r", "a", "/page/../v1/admin/swap", "r", True),  # a static file's name: no such file
    ],
)
def test_which_key_opens_what(read: str | None, admin: str | None, path: str, token: str, admitted: bool) -> None:
    keys = Keys(*(token_sha256(key) if key else None for key in (read, admin)))
    assert keys.admit(path, f"Bearer {token}".encode() if token else b"") is admitted
    assert not keys.admit(path, f"Basic {token}".encode()) or keys.admit(path, b"")


def test_tokens_come_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipgap_ray.serving.app import check_exposure

    for variable in (TOKEN_VARIABLE, ADMIN_VARIABLE):
        for name in (variable, f"{variable}_FILE"):
            monkeypatch.delenv(name, raising=False)
        assert read_token(variable) == ""
        monkeypatch.setenv(variable, " secret ")
        assert read_token(variable) == "secret"
        (tmp_path / "token").write_text("from the file\n")
        monkeypatch.setenv(f"{variable}_FILE", str(tmp_path / "token"))
        assert read_token(variable) == "from the file"
    with pytest.raises(ConfigError, match="are the same"):
        check_exposure(ServeSettings(index=("pool=x",)))
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_token(TOKEN_VARIABLE)
    (tmp_path / "token").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(TOKEN_VARIABLE)


# --- the routes --------------------------------------------------------------------------------------------


class _Operator:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []

    async def swap(self, index: str, uri: str | None) -> SwapState:
        self.asked.append((index, uri))
        if index != "pool":
            raise ApiError(404, "unknown_index", "no such index")
        return SwapState(state="loading", index=index, version_before="a", version_after="b")

    async def swap_state(self) -> SwapState:
        return SwapState(state="done")


def test_the_routes_pass_on_what_the_admin_asks_for_and_nobody_else(tmp_path: Path) -> None:
    backend, operator = _version(tmp_path, OLD, "old"), _Operator()
    admin = Admin(token_sha256("boss"), operator)
    boss = {"authorization": "Bearer boss"}
    with TestClient(make_api(backend, admin=admin, token_hash=token_sha256("reader"))) as client:
        for headers in ({}, {"authorization": "Bearer reader"}, {"authorization": "Bearer "}):
            for method in ("GET", "POST", "DELETE"):
                answer = client.request(method, "/v1/admin/swap", headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorised")
        assert operator.asked == []
        begun = client.post("/v1/admin/swap", json={"index": "pool", "uri": "out/v2"}, headers=boss)
        assert (begun.status_code, begun.json()["state"]) == (202, "loading")
        assert client.post("/v1/admin/swap", json={"index": "other"}, headers=boss).status_code == 404
        assert operator.asked == [("pool", "out/v2"), ("other", None)]
        assert client.get("/v1/admin/swap", headers=boss).json()["state"] == "done"
        for body in (b"", b"{}", b'{"index": 1}', b'{"index": "pool", "url": "x"}'):
            assert client.post("/v1/admin/swap", content=body, headers=boss).status_code == 400
        assert client.get("/v1/indices", headers=boss).status_code == 200
    with TestClient(make_api(backend)) as client:
        assert client.post("/v1/admin/swap", json={"index": "pool"}, headers=boss).status_code == 404


# --- the operator, without Serve ---------------------------------------------------------------------------


class _Handle:
    """A handle of Serve: `describe` of a shard, or `adopt` of all gateways."""

    def __init__(self, world: _Serve, application: str) -> None:
        self.world, self.application = world, application
        self.describe = SimpleNamespace(remote=self._describe)

    async def _describe(self) -> dict[str, Any]:
        version = self.application.rpartition(".")[2] if "." in self.application else "old"
        return {"uri": str(Path(self.world.uri).with_name(version)), "version": version}

    def broadcast(self, method: str, index: str, application: str) -> Any:
        async def results(timeout_s: float) -> list[bool]:
            self.world.log.append((method, application))
            return self.world.adopted

        return SimpleNamespace(results_async=results)


class _Serve:
    """What the operator asks of Serve, remembered."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.log: list[tuple[str, str]] = []
        self.adopted = [True, True]
        self.failing = False
        started = SimpleNamespace(status="RUNNING", last_deployed_time_s=1.0)
        self.applications = {"clipgap": started}

    def status(self) -> Any:
        return SimpleNamespace(applications=dict(self.applications))

    def get_replica_context(self) -> Any:
        return SimpleNamespace(app_name="clipgap")

    def get_deployment_handle(self, name: str, application: str) -> _Handle:
        return _Handle(self, application)

    def run(self, target: Any, name: str, route_prefix: str | None, logging_config: Any) -> None:
        assert route_prefix is None
        self.log.append(("run", name))
        time_s = 1.0 + len(self.applications)
        self.applications[name] = SimpleNamespace(status="RUNNING", last_deployed_time_s=time_s)
        if self.failing:
            raise RuntimeError("Deploying application failed: a replica could not start")

    def delete(self, name: str, _blocking: bool = True) -> None:
        self.log.append(("delete", name))
        del self.applications[name]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Serve:
    from clipgap_ray.serving import swap

    _version(tmp_path, OLD, "old")
    _version(tmp_path, NEW, "new")
    _version(tmp_path, [unit_rows(7, 5)], "newer")
    world = _Serve(str(tmp_path / "old"))
    for name in ("status", "get_replica_context", "get_deployment_handle", "run", "delete"):
        monkeypatch.setattr(swap.serve, name, getattr(world, name))
    monkeypatch.setattr(swap, "SETTLE_S", 0.0)
    return world


def _operator(world: _Serve) -> Any:
    from clipgap_ray.serving.swap import OperatorDeployment

    return OperatorDeployment.func_or_class({"pool": world.uri}, {}, 1)


async def _swapped(operator: Any, uri: str) -> SwapState:
    begun = await operator.begin("pool", uri)
    assert begun.state == "loading"
    await operator._task
    state: SwapState = await operator.state()
    return state


def test_a_swap_loads_flips_drains_and_removes_what_came_before(serve: _Serve, tmp_path: Path) -> None:
    async def twice() -> None:
        operator = _operator(serve)
        done = await _swapped(operator, str(tmp_path / "new"))
        assert (done.state, done.version_before, done.version_after) == ("done", "old", "new")
        assert serve.log == [("run", "clipgap.pool.new"), *[("adopt", "clipgap.pool.new")] * 2]
        serve.log.clear()
        assert (await _swapped(operator, str(tmp_path / "newer"))).state == "done"
        assert serve.log[-1] == ("delete", "clipgap.pool.new")
        assert list(serve.applications) == ["clipgap", "clipgap.pool.newer"]

    asyncio.run(twice())


def test_a_version_that_does_not_start_leaves_the_old_one_alone(serve: _Serve, tmp_path: Path) -> None:
    async def failing() -> None:
        operator = _operator(serve)
        serve.failing = True
        failed = await _swapped(operator, str(tmp_path / "new"))
        assert (failed.state, serve.log) == ("failed", [("run", "clipgap.pool.new"), ("delete", "clipgap.pool.new")])
        assert str(tmp_path) not in str(failed.message)
        serve.failing = False
        assert (await _swapped(operator, str(tmp_path / "new"))).state == "done"

    asyncio.run(failing())


def test_gateways_that_still_use_the_old_version_keep_it(serve: _Serve, tmp_path: Path) -> None:
    async def stuck() -> None:
        operator = _operator(serve)
        assert (await _swapped(operator, str(tmp_path / "new"))).state == "done"
        serve.adopted = [True, False]
        serve.log.clear()
        assert (await _swapped(operator, str(tmp_path / "newer"))).state == "failed"
        assert serve.log == [("run", "clipgap.pool.newer"), ("adopt", "clipgap.pool.newer")]
        serve.adopted = [True, True]
        serve.log.clear()
        assert (await _swapped(operator, str(tmp_path / "newer"))).state == "done"  # goes on where it stopped
        assert serve.log == [*[("adopt", "clipgap.pool.newer")] * 2, ("delete", "clipgap.pool.new")]
        assert (await operator.begin("pool", str(tmp_path / "newer")))[:2] == (409, "same_version")

    asyncio.run(stuck())


def test_what_cannot_be_swapped_is_refused_before_anything_is_loaded(serve: _Serve, tmp_path: Path) -> None:
    async def refused() -> None:
        operator = _operator(serve)
        assert (await operator.begin("other", None))[:2] == (404, "unknown_index")
        for uri in (str(tmp_path), str(tmp_path / "nowhere"), "", "\0", str(tmp_path / "emb-old")):
            status, code, message, hint = await operator.begin("pool", uri or str(tmp_path / "x"))
            assert (status, code) == (400, "unusable_index")
            assert str(tmp_path) not in message + str(hint)
        assert (await operator.begin("pool", None))[:2] == (409, "same_version")
        begun = await operator.begin("pool", str(tmp_path / "new"))
        assert begun.state == "loading"
        assert (await operator.begin("pool", str(tmp_path / "new")))[:2] == (409, "swap_running")
        await operator._task

    asyncio.run(refused())
    assert [what for what, _ in serve.log] == ["run", "adopt", "adopt"]


def test_the_newest_version_that_runs_counts(serve: _Serve) -> None:
    from clipgap_ray.serving import swap

    def deployed(status: str, time_s: float) -> Any:
        return SimpleNamespace(status=status, last_deployed_time_s=time_s)

    serve.applications |= {
        "clipgap": deployed("UPDATING", 100.0),
        "clipgap.pool.a": deployed("RUNNING", 102.0),
        "clipgap.pool.b": deployed("RUNNING", 103.0),
        "clipgap.pool.c": deployed("DEPLOYING", 104.0),
        "clipgap.texts.a": deployed("RUNNING", 99.9),  # the controller came back and found both
        "clipgap.more-rows.a": deployed("RUNNING", 50.0),  # older than the service: its own version counts
        "clipgap.x": deployed("RUNNING", 9.0),
        "elsewhere.pool.z": deployed("RUNNING", 9.0),
    }
    assert swap.newest_versions() == {"pool": "clipgap.pool.b", "texts": "clipgap.texts.a"}
    del serve.applications["clipgap"]  # the service is being deleted
    assert swap.newest_versions() == {}
