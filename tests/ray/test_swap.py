"""Hot swap and redeployment of the real service under constant load: no request fails, no answer mixes versions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from clipgap_ray.config.index import IndexSettings
from clipgap_ray.config.serve import ADMIN_VARIABLE, ServeSettings
from clipgap_ray.kernels.topk import exact_topk
from tests.index_fixture import all_rows, uid, unit_rows, write_embeddings
from tests.waiting import free_port, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CALLERS = 4
QUERY = unit_rows(1, 123)
# The versions differ in their rows, in the number of their shards, and so in every answer.
VERSIONS = {
    "one": ([unit_rows(60, seed) for seed in range(4)], 2),
    "two": ([unit_rows(50, seed) for seed in range(10, 16)], 3),
    "three": ([unit_rows(70, 20)], 1),
}


@pytest.fixture(scope="module")
def indexes(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from clipgap_ray.stages import index as stage

    folder = tmp_path_factory.mktemp("swap")
    for name, (parts, shards) in VERSIONS.items():
        source = write_embeddings(folder / f"emb-{name}", parts)
        stage.run(IndexSettings(embeddings=source, out=str(folder / name), shards=shards, recall_queries=2))
    return {name: str(folder / name) for name in VERSIONS}


@pytest.fixture(scope="module")
def settings(indexes: dict[str, str]) -> Iterator[ServeSettings]:
    """The service with version one and an admin's key."""
    from ray import serve

    from clipgap_ray.serving.app import build_app
    from clipgap_ray.serving.run import deploy

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(ADMIN_VARIABLE, "boss")
        settings = ServeSettings(index=(f"pool={indexes['one']}",), port=free_port(), shard_timeout_s=20.0)
        deploy(build_app(settings), settings)
        yield settings
        serve.shutdown()


class Load:
    """Callers that ask without pause; every answer is checked against the exact one of the version that it names."""

    def __init__(self, address: str, exact: dict[str, list[int]]) -> None:
        self.address, self.exact = address, exact
        self.versions: list[str] = []
        self.wrong: list[Any] = []
        self._stop = threading.Event()

    def __enter__(self) -> Load:
        self._threads = ThreadPoolExecutor(CALLERS)
        self._callers = [self._threads.submit(self._ask) for _ in range(CALLERS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for caller in self._callers:
            caller.result(120)
        self._threads.shutdown()

    def _ask(self) -> None:
        body = {"vector": QUERY[0].astype(float).tolist(), "k": 6}
        with httpx.Client(base_url=self.address, timeout=60) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post("/v1/search", json=body)
                except httpx.HTTPError as error:
                    self.wrong.append(error)
                    continue
                found = answer.json() if answer.status_code == 200 else {}
                rows = [row["row_id"] for row in found["results"][0]] if found else []
                if not found or found["degraded"] or rows != self.exact[found["version"]]:
                    self.wrong.append((answer.status_code, answer.text[:300]))
                self.versions.append(found.get("version", ""))

    def more(self, version: str | None = None, count: int = 20) -> Callable[[], bool]:
        """A condition: so many more answers, of this version if one is named."""
        start = len(self.versions)
        return lambda: sum(version in (None, seen) for seen in self.versions[start:]) >= count


def _exact(indexes: dict[str, str]) -> dict[str, list[int]]:
    from clipgap_ray import rundir

    return {
        rundir.read_manifest(uri, "index")["index_version"]: exact_topk(QUERY, *all_rows(VERSIONS[name][0]), 6)[1][
            0
        ].tolist()
        for name, uri in indexes.items()
    }


def _swap(address: str, **body: Any) -> dict[str, Any]:
    """Ask for a swap and wait until it is over."""
    boss = {"authorization": "Bearer boss"}
    begun = httpx.post(f"{address}/v1/admin/swap", json={"index": "pool", **body}, headers=boss, timeout=60)
    assert begun.status_code == 202, begun.text

    def over() -> Any:
        state = httpx.get(f"{address}/v1/admin/swap", headers=boss, timeout=60).json()
        return state if state["state"] in ("done", "failed") else None

    state: dict[str, Any] = until(over, "the swap is over", seconds=240)
    assert state["state"] == "done", state
    return state


@pytest.mark.timeout(900)
def test_versions_are_swapped_twice_under_load_without_a_failed_request(
    settings: ServeSettings, indexes: dict[str, str]
) -> None:
    from ray import serve

    address = f"http://127.0.0.1:{settings.port}"
    exact = _exact(indexes)
    with Load(address, exact) as load:
        until(load.more(), "answers before")
        for name in ("two", "three"):
            state = _swap(address, uri=indexes[name])
            until(load.more(state["version_after"]), "answers of the new version", seconds=120)
    assert load.wrong == []
    assert set(load.versions) == set(exact)
    # Nothing of version two is left; the answers, the metadata and the filters are those of version three.
    assert [name for name in serve.status().applications if "." in name] == [f"clipgap.pool.{state['version_after']}"]
    info = httpx.get(f"{address}/v1/indices").json()["indices"][0]
    assert (info["version"], info["rows"], info["shards"]) == (state["version_after"], 70, 1)
    near = httpx.post(f"{address}/v1/search", json={"uid": uid(0, 66), "k": 1}).json()["results"][0][0]
    assert (near["uid"], near["caption"]) == (uid(0, 66), "caption 0 66")
    assert httpx.get(f"{address}/readyz").json() == {"ready": True, "shards": 1, "shards_ok": 1, "encoder_ok": True}


@pytest.mark.timeout(600)
def test_a_gateway_that_starts_again_finds_the_version_that_counts(
    settings: ServeSettings, indexes: dict[str, str]
) -> None:
    """Runs after the swaps: the deployment itself knows version one only."""
    import ray

    address = f"http://127.0.0.1:{settings.port}"
    version = httpx.get(f"{address}/v1/indices").json()["indices"][0]["version"]
    deployed = next(iter(_exact(indexes)))
    assert version != deployed
    (name,) = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if "clipgap#Gateway#" in (actor["name"] or "")
    ]
    ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)

    def answers() -> Any:
        try:
            body = {"vector": QUERY[0].astype(float).tolist(), "k": 6}
            answer = httpx.post(f"{address}/v1/search", json=body, timeout=10)
        except httpx.HTTPError:
            return None
        return answer.json() if answer.status_code == 200 else None

    found = until(answers, "an answer of the new gateway", seconds=120)
    assert found["version"] == version


@pytest.mark.timeout(600)
def test_the_service_is_deployed_again_under_load_without_a_failed_request(
    settings: ServeSettings, indexes: dict[str, str]
) -> None:
    from clipgap_ray.serving.app import build_app
    from clipgap_ray.serving.run import deploy

    address = f"http://127.0.0.1:{settings.port}"
    with Load(address, _exact(indexes)) as load:
        until(load.more(), "answers before")
        changed = settings.model_copy(update={"max_k": 77})
        deploy(build_app(changed), changed)

        def refuses() -> bool:
            body = {"vector": np.ones(QUERY.shape[1]).tolist(), "k": 78}
            return httpx.post(f"{address}/v1/search", json=body, timeout=60).status_code == 400

        until(refuses, "the new limit", seconds=120)
        time_over = time.monotonic() + 5
        until(lambda: time.monotonic() > time_over, "old replicas are gone")
        until(load.more(), "answers after")
    assert load.wrong == []
