"""What a service listens on, and the switches that are set before Ray Serve is imported."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.serving import ports, switches
from clipgap_ray.serving.ports import Listening

SETTINGS = ServeSettings(index=("pool=x",))


@pytest.mark.parametrize(
    ("family", "address", "is_loopback"),
    [
        (socket.AF_INET, "127.0.0.1", True),
        (socket.AF_INET, "0.0.0.0", False),
        (socket.AF_INET6, "::1", True),
        (socket.AF_INET6, "::", False),
    ],
)
def test_a_listening_socket_of_this_process_is_found(family: int, address: str, is_loopback: bool) -> None:
    with socket.socket(family) as server:
        try:
            server.bind((address, 0))
        except OSError:
            pytest.skip(f"no {address} here")
        port = server.getsockname()[1]
        assert port not in [one.port for one in ports.listening([os.getpid()])]  # bound is not listening
        server.listen()
        (found,) = [one for one in ports.listening([os.getpid()]) if one.port == port]
    assert (found.address, found.is_loopback) == (address, is_loopback)
    assert port not in [one.port for one in ports.listening([os.getpid()])]


def test_ports_of_processes_below_are_found_with_their_names() -> None:
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        assert child.pid in ports.descendants(os.getpid())
        (found,) = [one for one in ports.listening(ports.descendants(os.getpid())) if one.port == port]
        assert found == Listening(port, "127.0.0.1", Path(sys.executable).name)
    finally:
        child.communicate("\n", timeout=30)
    assert child.pid not in ports.descendants(os.getpid())


def test_an_ipv4_address_in_ipv6_is_judged_as_one() -> None:
    assert Listening(1, "::ffff:127.0.0.1", "x").is_loopback
    assert not Listening(1, "::ffff:10.0.0.1", "x").is_loopback


FOUND = [
    Listening(8000, "127.0.0.1", "haproxy"),
    Listening(8404, "0.0.0.0", "haproxy"),
    Listening(9101, "0.0.0.0", "haproxy"),
    Listening(30000, "127.0.0.1", "ray::ServeReplica:clipgap:Gateway"),
    Listening(40001, "0.0.0.0", "ray::DashboardAgent"),
    Listening(40002, "::", "ray::ServeReplica:clipgap:Gateway"),
    Listening(40003, "::", "raylet"),
]


def test_what_is_open_is_said_by_kind_and_what_to_close() -> None:
    head, haproxy, metrics, inside = ports.explain(FOUND, [8000], [8404, 9101], [40001], has_token=True)
    assert "close these ports" in head
    assert haproxy.startswith("  8404, 9101: HAProxy")
    assert "--no-haproxy" in haproxy
    assert metrics == "  40001: Ray: metrics of this node, no token"
    assert inside.startswith("  40002, 40003: Ray")
    assert "only with Ray's token" in inside


def test_without_rays_token_the_danger_is_said() -> None:
    assert "whoever reaches them runs code here" in ports.explain(FOUND, [], [], [], has_token=False)[-1]


def test_a_public_gateway_s_replicas_are_behind_the_service_s_token() -> None:
    found = [Listening(30000, "0.0.0.0", "ray::ServeReplica:clipgap:Gateway")]
    (line,) = ports.explain(found, [8000], [], [], has_token=True)[1:]
    assert line.startswith("  30000: gateway replicas")
    assert "the service's own token" in line


def test_a_node_of_a_running_cluster_is_named_and_its_own_switches_are() -> None:
    head, haproxy, *_ = ports.explain(FOUND, [8000], [8404, 9101], [40001], has_token=True, node="10.0.0.7")
    assert head.startswith("node 10.0.0.7 is listening")
    assert haproxy.endswith("without RAY_SERVE_ENABLE_HA_PROXY=1 a node opens neither")


def test_the_services_own_port_and_loopback_need_no_word() -> None:
    public = Listening(8000, "0.0.0.0", "haproxy")
    assert ports.explain([public, *FOUND[:1], FOUND[3]], [8000], [], [], has_token=True) == []


def test_the_switches_are_set_and_a_port_that_somebody_uses_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        monkeypatch.setitem(switches.PORTS, "RAY_SERVE_HAPROXY_STATS_PORT", taken)
        switches.switch(SETTINGS, environment)
    assert (environment[switches.HAPROXY], environment[switches.THROUGHPUT]) == ("1", "1")
    stats, metrics = switches.haproxy_ports(environment)
    assert stats not in (taken, 0, metrics)


def test_what_the_environment_says_already_holds() -> None:
    environment = {switches.HAPROXY: "0"}
    switches.switch(SETTINGS, environment)
    assert environment == {switches.HAPROXY: "0"}
    environment = {"RAY_SERVE_HAPROXY_STATS_PORT": "7000", "RAY_SERVE_HAPROXY_METRICS_PORT": "7001"}
    switches.switch(SETTINGS, environment)
    assert switches.haproxy_ports(environment) == [7000, 7001]


def test_no_haproxy_is_no_haproxy() -> None:
    environment = {switches.HAPROXY: "1"}
    switches.switch(SETTINGS.model_copy(update={"haproxy": False}), environment)
    assert environment == {switches.HAPROXY: "0"}
    assert switches.haproxy_ports(environment) == []


def test_on_a_cluster_the_nodes_environment_decides_and_is_printed(caplog: pytest.LogCaptureFixture) -> None:
    environment = {"RAY_ADDRESS": "10.0.0.1:6379"}
    with caplog.at_level("INFO", "clipgap"):
        switches.switch(SETTINGS, environment)
    assert environment == {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert "RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1" in caplog.text


def test_the_names_and_usual_values_are_those_of_the_installed_ray() -> None:
    from ray.serve._private import constants, haproxy

    for name, usual in {**switches.PORTS, **switches.REPLICA_PORTS}.items():
        assert getattr(constants, name) == int(os.environ.get(name, usual))
    for name in (switches.HAPROXY, switches.THROUGHPUT, *switches.DRAINING):
        assert hasattr(constants, name), name
    assert haproxy.get_haproxy_binary()


def test_the_switches_are_set_before_ray_serve_is_imported() -> None:
    code = "import sys; import clipgap_ray.serving.start; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
