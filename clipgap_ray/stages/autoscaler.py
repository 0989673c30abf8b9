"""What the cluster's autoscaler may still bring up.

Work has to be sized by this: a cluster that starts at zero adds nodes only for what waits. Ray has an entry for it that
only hosted clusters fill in (Ray 2.60), so it is read where a cluster's operator wrote it: in a variable, or in
the configuration that `ray up` leaves on the head.
"""

from __future__ import annotations

import os
from pathlib import Path

import ray
import yaml

from clipgap_ray.errors import ConfigError

#: "CPU=80,GPU=2": what all nodes together may have. Set by deploy/kuberay, whose limits Ray does not tell.
VARIABLE = "CLIPGAP_LAUNCHABLE"
#: Where `ray up` leaves the cluster's configuration, on the head and nowhere else.
BOOTSTRAP = "~/ray_bootstrap_config.yaml"
MOST_TASKS = 4096  # in flight, where the autoscaler knows no limit


def launchable(resource: str) -> int:
    """Return how much of a resource ("CPU", "GPU") the autoscaler may bring up in all; 0 where there is none.

    Raises:
        ConfigError: If CLIPGAP_LAUNCHABLE is not "NAME=NUMBER,...".
    """
    return int(min(MOST_TASKS, _limits().get(resource, 0)))


def said_here() -> str:
    """Return what this machine knows of the limits in the words of CLIPGAP_LAUNCHABLE; "" if nothing.

    For tasks that plan work themselves: on their nodes nobody wrote the limits down.

    Raises:
        ConfigError: As of `launchable`.
    """
    return ",".join(f"{name}={amount:g}" for name, amount in _limits().items())


def _limits() -> dict[str, float]:
    if said := os.environ.get(VARIABLE, ""):
        return _parsed(said)
    if known := ray._private.state.state.get_max_resources_from_cluster_config():
        return dict(known)
    path = Path(BOOTSTRAP).expanduser()
    if not os.environ.get("RAY_ADDRESS") or not path.is_file():  # a private Ray on a head is not the head's cluster
        return {}
    return most_resources(yaml.safe_load(path.read_text()))


def _parsed(said: str) -> dict[str, float]:
    try:
        return {name.strip(): float(amount) for name, amount in (item.split("=") for item in said.split(","))}
    except ValueError:
        raise ConfigError(
            f"{VARIABLE} is {said!r}; expected NAME=NUMBER,...", hint="for example CPU=80,GPU=2"
        ) from None


def most_resources(config: dict[str, object]) -> dict[str, float]:
    """The most of each resource that a cluster configuration of `ray up` can come to.

    Args:
        config: With `available_node_types` and, to cap all types together, `max_workers`.

    Returns:
        Amount by resource. Each resource is counted as if the node types that have it came first, so two amounts
        need not be there at the same time.
    """
    types: dict[str, dict[str, object]] = config.get("available_node_types") or {}  # type: ignore[assignment]
    head, room = config.get("head_node_type"), config.get("max_workers")
    workers = [node for name, node in types.items() if name != head]
    names = {name for node in types.values() for name in _resources(node)}
    most = {}
    for name in names:
        left = float("inf") if room is None else float(room)  # type: ignore[arg-type]
        total = _resources(types[head]).get(name, 0.0) if head in types else 0.0  # type: ignore[index]
        for node in sorted(workers, key=lambda node: -_resources(node).get(name, 0.0)):
            count = min(left, float(node.get("max_workers", left)))  # type: ignore[arg-type]
            total += count * _resources(node).get(name, 0.0) if count else 0.0
            left -= count
        most[name] = total
    return most


def _resources(node: dict[str, object]) -> dict[str, float]:
    return dict(node.get("resources") or {})  # type: ignore[call-overload, no-any-return]
