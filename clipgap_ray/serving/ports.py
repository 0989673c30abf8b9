"""Which ports a service listens on, beyond the address that was asked for.

Found by looking (Linux's /proc), not by reading documentation: Ray Serve opens more than it is told. What it opens, as
of Ray 2.60 (names are those of its constants):

* Every replica has a gRPC port for calls between replicas, chosen by the kernel, on all interfaces (`[::]:0`), whatever
  host was asked for. It takes pickles; with Ray's token authentication on it answers only callers with Ray's token.
* HAProxy's statistics page (RAY_SERVE_HAPROXY_STATS_PORT, 8404) and its Prometheus metrics
  (RAY_SERVE_HAPROXY_METRICS_PORT, 9101), on all interfaces, without any token.
* With HAProxy, the gateway's replicas have an HTTP port each (RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT, 30000 to 31000),
  on the host that was asked for: our own token guards it as it guards the service's port.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clipgap_ray.serving import switches

LISTEN = "0A"  # in /proc/net/tcp


@dataclass(frozen=True, order=True)
class Listening:
    """A port that a process listens on; `address` is numeric, 0.0.0.0 and :: are all interfaces."""

    port: int
    address: str
    process: str

    @property
    def is_loopback(self) -> bool:
        """True when only this machine can reach it."""
        address = ipaddress.ip_address(self.address)
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback


def descendants(pid: int) -> set[int]:
    """Return a process and all processes below it."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it has just ended
                continue
            children[int(stat.rpartition(")")[2].split()[1])].append(int(entry.name))
    found, waiting = set(), [pid]
    while waiting:
        found.add(one := waiting.pop())
        waiting += children[one]
    return found


def listening(pids: Iterable[int]) -> list[Listening]:
    """Return the TCP ports that processes listen on, once each."""
    sockets = _sockets()
    found = set()
    for pid in pids:
        for inode in _inodes(pid) & sockets.keys():
            found.add(Listening(*sockets[inode], _name(pid)))
    return sorted(found)


def _sockets() -> dict[str, tuple[int, str]]:
    """Port and address of every listening socket of this machine, by inode."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *_, = fields = line.split()  # fmt: skip
            if state == LISTEN:
                address, _, port = local.partition(":")
                found[fields[9]] = int(port, 16), _address(address)
    return found


def _address(text: str) -> str:
    """The kernel writes addresses as 32-bit words in the machine's byte order."""
    raw = b"".join(bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8))
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def _inodes(pid: int) -> set[str]:
    try:
        links = [os.readlink(entry) for entry in os.scandir(f"/proc/{pid}/fd")]
    except OSError:
        return set()
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def _name(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "?"
    return words[0].decode(errors="replace").rpartition("/")[2] or "?"


def explain(
    found: Iterable[Listening],
    own: Iterable[int],
    haproxy: Iterable[int],
    metrics: Iterable[int],
    has_token: bool,
    node: str = "",
) -> list[str]:
    """Return lines that say what else can be reached from other machines, and what to do about it; none if nothing.

    Args:
        found: Ports of all processes of a service.
        own: The service's own port, which was asked for.
        haproxy: HAProxy's statistics and metrics.
        metrics: Ray's metrics of the node.
        has_token: Whether Ray's processes want Ray's token from each other.
        node: Address of a node of a running cluster; empty: this machine, with a Ray of the service's own.
    """
    instead = f"without {switches.HAPROXY}=1 a node opens neither" if node else "--no-haproxy opens neither"
    kinds = {
        f"HAProxy: statistics page and metrics, no token; {instead}": set(haproxy),
        "Ray: metrics of this node, no token": set(metrics),
        "gateway replicas on --host: the service's routes behind the service's own token": set(
            switches.replica_ports()
        ),
    }
    inside = (
        "Ray and its workers, the replicas among them: calls to each other, only with Ray's token"
        if has_token
        else "Ray and its workers, the replicas among them: calls to each other, WITHOUT a token: whoever reaches "
        "them runs code here; set RAY_AUTH_MODE=token before Ray starts"
    )
    lines: dict[str, list[int]] = {**{kind: [] for kind in kinds}, inside: []}
    for port in sorted({one.port for one in found if not one.is_loopback} - set(own)):
        lines[next((kind for kind, ports in kinds.items() if port in ports), inside)].append(port)
    told = [f"  {', '.join(map(str, ports))}: {kind}" for kind, ports in lines.items() if ports]
    where = f"node {node} is " if node else ""
    head = f"{where}listening on other interfaces than was asked for; close these ports to other machines (firewall):"
    return [head, *told] if told else []
