"""`clipgap doctor --cluster [SRC]`: does every node run what the driver runs, and is the bucket of SRC near them?

A task per node, pinned to it, reports the versions there; they are compared with the driver's. Code and pickles travel
from the driver to the nodes, so another Python or Ray fails late and strangely, another torch changes the embeddings'
bits, another FAISS may refuse an index file. Reads nothing else and writes nothing.

Compared: Python, Ray and torch to the letter, the CUDA that torch was built for, FAISS by major.minor (its CPU and GPU
wheels are numbered apart, and CPU and GPU nodes differ on purpose). Not compared: the number of GPUs; but a node that
offers a GPU to Ray and whose torch sees none is a problem.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clipgap_ray import regions
from clipgap_ray.environment import FAISS_WHEELS
from clipgap_ray.errors import ConfigError
from clipgap_ray.stages.progress import logger
from clipgap_ray.stages.session import connect

ANSWER_S = 120.0  # torch's first import on a cold disk takes most of a minute
COMPARED = ("python", "ray", "torch", "faiss", "cuda")
MISSING = "-"


def run(source: str = "") -> dict[str, Any]:
    """Compare every node of the cluster with the driver, and the region of each with a bucket's.

    Args:
        source: Something in the bucket, or "".

    Returns:
        `driver` (its versions), `nodes` (one record each), `problems`, and `exit_code` 1 if there is any.

    Raises:
        ConfigError: If there is no cluster to look at, or it refuses this driver.
    """
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            "doctor --cluster: no cluster, RAY_ADDRESS is not set",
            hint="export RAY_ADDRESS=HOST:6379, or submit it: ray job submit -- clipgap doctor --cluster",
        )
    try:
        connect()
    except (ConnectionError, RuntimeError) as error:  # Ray itself refuses another Ray, another Python, a wrong token
        raise ConfigError(f"the cluster refuses this driver: {error}") from None
    driver = {"node": "driver", "gpus": 0, **_prober()(FAISS_WHEELS)}
    nodes = ask_nodes(ANSWER_S)
    problems = [problem for node in nodes for problem in compare(driver, node)]
    bucket = regions.of_bucket(source)
    far = (regions.problem(source, bucket, node.get("region", ""), node["node"]) for node in nodes)
    problems += [problem for problem in far if problem]
    logger.info("%s", table([driver, *nodes]))
    for problem in problems:
        logger.warning("%s", problem)
    return {"driver": driver, "nodes": nodes, "problems": problems, "exit_code": 1 if problems else 0}


def ask_nodes(timeout_s: float) -> list[dict[str, Any]]:
    """Run the probe on every living node, the head first, then by address.

    Args:
        timeout_s: How long to wait for all of them together.

    Returns:
        One record per node: `node`, `gpus`, the versions, or `error` where the probe failed.
    """
    alive = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: (not _is_head(n), n["NodeManagerAddress"]))
    probe = ray.remote(num_cpus=0, max_retries=0)(_prober())
    calls = [
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            FAISS_WHEELS
        )
        for node in alive
    ]
    ready, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
    done = set(ready)
    return [_record(node, call if call in done else None, timeout_s) for node, call in zip(alive, calls, strict=True)]


def _is_head(node: dict[str, Any]) -> bool:
    return "node:__internal_head__" in node["Resources"]


def _record(node: dict[str, Any], call: Any, timeout_s: float) -> dict[str, Any]:
    name = f"{node['NodeManagerAddress']} {node['NodeID'][:8]}{' (head)' if _is_head(node) else ''}"
    record = {"node": name, "gpus": int(node["Resources"].get("GPU", 0))}
    if call is None:
        return {**record, "error": f"no answer within {timeout_s:.0f} s"}
    try:
        return {**record, **ray.get(call)}
    except ray.exceptions.RayError as error:
        return {**record, "error": str(error).strip().splitlines()[-1]}


def _prober() -> Callable[[tuple[str, ...]], dict[str, str]]:
    """Return the probe. Nested, so that it travels by value: a node may lack this package."""

    def probe(wheels: tuple[str, ...]) -> dict[str, str]:
        import importlib.metadata as metadata
        import platform

        def version(name: str) -> str:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                return ""

        found = {wheel: version(wheel) for wheel in wheels if version(wheel)}
        try:
            import torch

            cuda, usable = torch.version.cuda or "", str(torch.cuda.device_count())
        except (ImportError, OSError, RuntimeError) as error:  # missing, or a library of it is
            cuda, usable = f"torch fails: {error}", "0"
        try:
            from clipgap_ray import regions

            region = regions.of_machine()
        except ImportError:
            region = ""
        return {
            "region": region,
            "python": platform.python_version(),
            "ray": version("ray"),
            "torch": version("torch"),
            "faiss": ", ".join(f"{number} ({wheel})" for wheel, number in found.items()),
            "cuda": cuda,
            "usable_gpus": usable,
        }

    return probe


def compare(driver: dict[str, Any], node: dict[str, Any]) -> list[str]:
    """Return what is wrong with a node, each with both values.

    Args:
        driver: Versions of the driver.
        node: A record of `ask_nodes`.
    """
    if "error" in node:
        return [f"{node['node']}: {node['error']}"]
    problems = [
        f"{node['node']}: {name} is {node[name] or MISSING}, the driver's is {driver[name] or MISSING}"
        for name in COMPARED
        if _essence(name, node[name]) != _essence(name, driver[name])
    ]
    if "), " in node["faiss"]:
        problems.append(f"{node['node']}: several FAISS wheels over each other: {node['faiss']}")
    if node["gpus"] and node["usable_gpus"] == "0":
        problems.append(f"{node['node']}: offers {node['gpus']} GPUs to Ray, but torch there can use none")
    return problems


def _essence(name: str, value: str) -> str:
    """The part of a version that must agree."""
    return ".".join(value.split(" ")[0].split(".")[:2]) if name == "faiss" else value


def table(records: list[dict[str, Any]]) -> str:
    """Return records as aligned columns, the first one being what the others are compared with."""
    columns = ("node", *COMPARED, "gpus", "region")
    rows = [columns] + [
        (record["node"], record["error"]) if "error" in record
        else tuple(str(record[name]) or MISSING for name in columns)
        for record in records
    ]  # fmt: skip
    full = [row for row in rows if len(row) == len(columns)]
    widths = [max(len(row[i]) for row in full) for i in range(len(columns))]
    widths[0] = max(len(row[0]) for row in rows)
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in rows)
