"""Another version of an index in place of the one that answers, without a failed request and without a mixed answer.

A version is an application of Serve of its own, `<service>.<index>.<version>`, with one deployment per shard. A swap
loads it beside the version that answers, asks every gateway to change over (each does, for itself, between two
requests, once it reaches all new shards), waits until nobody uses the old version, and deletes its application. Which
version counts is nowhere written twice: it is the newest application that runs. A gateway that starts later, or died
in between, finds it there (`deployments.Gateway.check_health`).

The version that the service was deployed with is part of the service's own application: it stays loaded, idle and
mapped, until the next deployment. Rejected: two versions in each shard's process (the new one may have more shards),
and deploying the gateway anew (Serve restarts the encoder with it).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from clipgap_ray import store
from clipgap_ray.embeddings import check_same_encoder
from clipgap_ray.errors import ClipgapError
from clipgap_ray.index_manifest import read_index, rows_of
from clipgap_ray.serving.admin import SwapState
from clipgap_ray.serving.messages import ApiError

logger = logging.getLogger("clipgap")

ADOPT_S = 120.0  # for all gateways to change over and to end what is under way
SETTLE_S = 12.0  # longer than the period of health checks: a gateway that started meanwhile has caught up
RECOVERY_S = 10.0  # a controller that died and came back takes all applications for deployed at that moment
QUIET = {"log_level": "WARNING", "enable_access_log": False}

Refusal = tuple[int, str, str, str | None]


async def shards_of(application: str) -> tuple[str, str, list[DeploymentHandle]]:
    """Return the folder and the version that an application holds, and a handle per shard."""
    first = await asyncio.to_thread(serve.get_deployment_handle, "shard-0", application)
    held = await first.describe.remote()
    uri = held["uri"]
    manifest = await asyncio.to_thread(read_index, uri)
    names = [f"shard-{number}" for number in range(1, manifest["num_shards"])]
    others = [await asyncio.to_thread(serve.get_deployment_handle, name, application) for name in names]
    return uri, held["version"], [first, *others]


def newest_versions() -> dict[str, str]:
    """Return, by index, the newest application with a version that runs, if it is newer than the service itself.

    A service deployed again from a file (`serve deploy`) begins with the versions that the file names.
    """
    own = serve.get_replica_context().app_name
    applications = serve.status().applications
    deployed_s = applications[own].last_deployed_time_s if own in applications else float("inf")  # it is being deleted
    newest: dict[str, tuple[float, str]] = {}
    for application, name in versions(own, applications).items():
        state = applications[application]
        if state.status == "RUNNING" and state.last_deployed_time_s > deployed_s - RECOVERY_S:
            newest[name] = max(newest.get(name, (0.0, "")), (state.last_deployed_time_s, application))
    return {name: application for name, (_, application) in newest.items()}


def versions(own: str, applications: Mapping[str, Any]) -> dict[str, str]:
    """Return the applications that hold versions of a service's indexes, with the index of each."""
    found = {}
    for application in applications:
        name, _, version = application.removeprefix(f"{own}.").rpartition(".")
        if application.startswith(f"{own}.") and name and version:
            found[application] = name
    return found


class RemoteOperator:
    """`admin.Operator` over a handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    async def swap(self, index: str, uri: str | None) -> SwapState:
        """Begin a swap."""
        return await self._ask(self.handle.begin.remote(index, uri))

    async def swap_state(self) -> SwapState:
        """Return where the last swap stands."""
        return await self._ask(self.handle.state.remote())

    async def _ask(self, response: Any) -> SwapState:
        try:
            answer: SwapState | Refusal = await response
        except (RayError, RayServeException):
            raise ApiError(503, "operator_lost", "the operator did not answer", "try again in seconds") from None
        if isinstance(answer, SwapState):
            return answer
        raise ApiError(*answer)


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=8, graceful_shutdown_timeout_s=5)
class OperatorDeployment:
    """Carries swaps out, one at a time.

    Args:
        indexes: Name -> folder, as deployed.
        splits: Name -> file of the splits that filters know.
        replicas: Of every shard.
    """

    def __init__(self, indexes: Mapping[str, str], splits: Mapping[str, str], replicas: int) -> None:
        self.indexes, self.splits, self.replicas = dict(indexes), dict(splits), replicas
        self._state = SwapState()
        self._task: asyncio.Task[None] | None = None

    async def state(self) -> SwapState:
        """Return where the last swap stands."""
        return self._state

    async def begin(self, index: str, uri: str | None) -> SwapState | Refusal:
        """Check what was asked for and begin; a refusal is (status, code, message, hint)."""
        if index not in self.indexes:
            return 404, "unknown_index", "no such index", f"known indexes: {', '.join(self.indexes)}"
        if not self._state.is_over:
            return 409, "swap_running", f"a swap of {self._state.index} is {self._state.state}", "wait until it is done"
        self._state = SwapState(state="loading", index=index)
        try:
            before, uri = await self._current(index, uri)
            manifest = await asyncio.to_thread(check_version, uri, before["uri"])
        except (ClipgapError, OSError) as error:
            logger.warning("swap of %s refused: %s", index, error)
            message = "the folder holds no complete index of the service's encoder"
            self._state = SwapState(state="failed", index=index, message=message)
            return 400, "unusable_index", message, "the service's log says more; `clipgap index` builds one"
        except (RayError, RayServeException) as error:
            logger.warning("swap of %s: %s", index, error)
            self._state = SwapState(state="failed", index=index, message="the version before does not answer")
            return 503, "no_shard", "the version that is served now does not answer", "try again in seconds"
        unfinished = await asyncio.to_thread(self._others, index, self._application(index, manifest))
        if manifest["index_version"] == before["version"] and not unfinished:
            self._state = SwapState()
            return 409, "same_version", f"version {before['version']} is being served", "build the index first"
        self._state = SwapState(
            state="loading", index=index, version_before=before["version"], version_after=manifest["index_version"]
        )
        self._task = asyncio.create_task(self._carry_out(index, uri, manifest))
        return self._state

    async def _current(self, index: str, uri: str | None) -> tuple[dict[str, Any], str]:
        """What the version that counts says of itself, and the folder of the next one."""
        application = (await asyncio.to_thread(newest_versions)).get(index)
        own = serve.get_replica_context().app_name
        words = ("shard-0", application) if application else (f"{index}-shard-0", own)
        handle = await asyncio.to_thread(serve.get_deployment_handle, *words)
        before = await handle.describe.remote()
        return before, uri or before["uri"]

    async def _carry_out(self, index: str, uri: str, manifest: Mapping[str, Any]) -> None:
        application = self._application(index, manifest)
        try:
            await asyncio.to_thread(self._load, application, uri, manifest)
            self._set("flipping")
            await self._adopt(index, application)
            self._set("draining")
            await asyncio.sleep(SETTLE_S)
            await self._adopt(index, application)
            for old in await asyncio.to_thread(self._others, index, application):
                await asyncio.to_thread(serve.delete, old)
            self._set("done")
        except (RayError, RayServeException, ClipgapError, RuntimeError, TimeoutError) as error:
            logger.exception("swap of %s failed while %s", index, self._state.state)
            if self._state.state == "loading":  # nobody uses it yet
                await asyncio.to_thread(serve.delete, application, False)
            self._set("failed", f"while {self._state.state}: {type(error).__name__}; the service's log says more")

    def _application(self, index: str, manifest: Mapping[str, Any]) -> str:
        return f"{serve.get_replica_context().app_name}.{index}.{manifest['index_version']}"

    def _load(self, application: str, uri: str, manifest: Mapping[str, Any]) -> None:
        from clipgap_ray.serving.deployments import bind_shards  # which binds this class

        there = serve.status().applications.get(application)
        if there is not None and there.status == "RUNNING":  # of a swap that did not end
            return
        first, *_ = bind_shards(uri, manifest, self.splits, self.replicas, "shard-")
        serve.run(first, name=application, route_prefix=None, logging_config=QUIET)

    async def _adopt(self, index: str, application: str) -> None:
        own = serve.get_replica_context().app_name
        gateways = await asyncio.to_thread(serve.get_deployment_handle, "Gateway", own)
        answers = await gateways.broadcast("adopt", index, application).results_async(timeout_s=ADOPT_S)
        if not all(answers):
            raise TimeoutError(f"{answers.count(False)} gateways still use the version before")

    def _others(self, index: str, application: str) -> list[str]:
        known = versions(serve.get_replica_context().app_name, serve.status().applications)
        return [other for other, name in known.items() if name == index and other != application]

    def _set(self, state: str, message: str | None = None) -> None:
        self._state = SwapState.model_validate({**self._state.model_dump(), "state": state, "message": message})


def check_version(uri: str, before: str) -> dict[str, Any]:
    """Return the manifest of a folder that may take the place of another one.

    Raises:
        DataError: If it holds no index, or its embeddings are not there.
        IndexMismatchError: If another encoder made it.
    """
    manifest = read_index(uri)
    old = read_index(before) if store.exists(before) else manifest
    check_same_encoder(manifest["encoder"], old["encoder"], ("the new version", "the version before"))
    rows_of(manifest)
    return manifest
