"""A node of a cluster is asked what it listens on; what does not answer is named."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
import ray

from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.serving import node_ports
from clipgap_ray.serving.run import open_ports
from tests.waiting import free_port

pytestmark = pytest.mark.ray


class Listener:
    """A process of the cluster that listens."""

    def __init__(self, address: str) -> None:
        self.server = socket.create_server((address, 0))

    def port(self) -> int:
        return int(self.server.getsockname()[1])


@pytest.fixture
def listening(ray_session: None) -> Iterator[tuple[int, int]]:
    """A port on all interfaces and one on loopback, held by workers of the node."""
    actors = [ray.remote(num_cpus=0)(Listener).remote(address) for address in ("0.0.0.0", "127.0.0.1")]
    yield tuple(ray.get([actor.port.remote() for actor in actors]))
    for actor in actors:
        ray.kill(actor)


def test_a_service_on_a_running_cluster_says_what_its_nodes_open(
    listening: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "of the cluster")
    public, loopback = listening
    head, *lines, rest = open_ports(ServeSettings(index=("pool=x",), port=free_port()))
    (node,) = ray.nodes()
    assert head.startswith(f"node {node['NodeManagerAddress']} is listening")
    said = {int(port) for line in lines for port in line.partition(":")[0].split(",")}
    assert {public, node["MetricsExportPort"]} <= said
    assert loopback not in said
    assert rest == node_ports.REST
    own = " ".join(node_ports.explain(own=public))
    assert f" {public}," not in own
    assert f" {public}:" not in own


def test_a_node_that_does_not_answer_is_named(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (node,) = ray.nodes()

    def fails() -> None:
        raise ImportError("no clipgap_ray here")

    def hangs() -> None:
        time.sleep(600)  # until it is cancelled, after LOOK_S

    monkeypatch.setattr(node_ports, "LOOK_S", 5.0)
    for look in (fails, hangs):
        monkeypatch.setattr(node_ports, "look", look)
        assert node_ports.explain(8000) == [f"not looked at: {node['NodeManagerAddress']} (1 nodes)", node_ports.REST]
