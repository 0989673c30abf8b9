"""Which ports the nodes of a running cluster listen on, beyond the address that was asked for.

Looked at by a task on every node, because only the node knows: Ray Serve's switches are those of its environment before
`ray start`, not of this process. A task sees the processes below its node's raylet: workers, replicas, HAProxy. What
`ray start` itself opens on the head (GCS, client server, dashboard) is not among them: docs/cluster.md, What is open.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clipgap_ray.serving import ports, switches

LOOK_S = 30.0  # for a worker to start on every node
MOST_NODES = 8  # told one by one
REST = "what `ray start` opens on the head besides, and what to close: docs/cluster.md, What is open"


@dataclass(frozen=True)
class Seen:
    """What one node said: its open ports, which of them are HAProxy's, whether its Ray wants Ray's token."""

    found: list[ports.Listening]
    haproxy: list[int]
    has_token: bool


def look() -> Seen:
    """Look at the node where this runs, in a Ray worker."""
    found = ports.listening(ports.descendants(os.getppid()))
    return Seen(found, switches.haproxy_ports(), os.environ.get("RAY_AUTH_MODE") == "token")


def explain(own: int) -> list[str]:
    """Return lines on what the nodes of the connected cluster listen on, and what to close.

    Args:
        own: The service's port, which was asked for.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    looks = {task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)).remote(): name
             for name in nodes}  # fmt: skip
    done, late = ray.wait(list(looks), num_returns=len(looks), timeout=LOOK_S)
    for one in late:
        ray.cancel(one, force=True)
    told: list[list[str]] = []
    silent = [nodes[looks[one]]["NodeManagerAddress"] for one in late]
    for one in done:
        node = nodes[looks[one]]
        address = node["NodeManagerAddress"]
        try:
            seen: Seen = ray.get(one)
        except RayError:
            silent.append(address)
            continue
        metrics = [node["MetricsExportPort"]]
        told.append(ports.explain(seen.found, [own], seen.haproxy, metrics, seen.has_token, address))
    lines = [line for lines in told[:MOST_NODES] for line in lines]
    if len(told) > MOST_NODES:
        lines.append(f"and {len(told) - MOST_NODES} other nodes alike")
    if silent:
        lines.append(f"not looked at: {', '.join(sorted(silent)[:MOST_NODES])} ({len(silent)} nodes)")
    return [*lines, REST]
