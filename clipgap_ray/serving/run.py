"""`clipgap serve`: start Ray Serve, deploy, say how to ask, wait, clean up."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import ray
from ray import serve
from ray.exceptions import RayError

from clipgap_ray.config.serve import TOKEN_VARIABLE, ServeSettings
from clipgap_ray.errors import ClipgapError, ConfigError
from clipgap_ray.serving import node_ports, ports, switches
from clipgap_ray.serving.app import build_app, check_exposure

logger = logging.getLogger("clipgap")

APP = "clipgap"
LOCAL_CPUS = 4  # logical: the deployments ask for fractions, so two cores are enough
REQUEST_TIMEOUT_S = 60.0


def run(settings: ServeSettings) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: On impossible settings, a port in use, a public address without a token, or a cluster where
            Serve runs already: its address would be kept, and stopping ours would stop the others.
        IndexMismatchError: If the encoder did not make every index.
    """
    check_exposure(settings)
    app = build_app(settings)  # every error of settings and files, before anything starts
    _check_port(settings.host, settings.port)
    with _cluster():
        _check_no_other_serve()
        _check_gpus(settings)
        try:
            deploy(app, settings)
            for line in open_ports(settings):
                logger.warning("%s", line)
            sys.stdout.write(f"serving; try:\n{example(settings)}\n")
            sys.stdout.flush()
            _wait_for_signal()
        finally:
            serve.shutdown()


def deploy(app: serve.Application, settings: ServeSettings) -> None:
    """Start Serve's proxy on the settings' address and run the application; returns when it is healthy.

    Raises:
        ClipgapError: If the proxy does not start.
    """
    http = {"host": settings.host, "port": settings.port, "request_timeout_s": REQUEST_TIMEOUT_S}
    try:
        serve.start(http_options=http)
    except RayError as error:
        said = str(error).strip().splitlines()[-1]
        hint = "--no-haproxy answers with Serve's own proxy" if switches.haproxy_ports() else None
        raise ClipgapError(f"the proxy does not listen on {settings.host}:{settings.port}: {said}", hint) from error
    serve.run(app, name=APP, route_prefix="/", logging_config={"log_level": "WARNING", "enable_access_log": False})


def open_ports(settings: ServeSettings) -> list[str]:
    """Return lines on what listens on other interfaces than was asked for; see `ports`, on a cluster `node_ports`."""
    if os.environ.get("RAY_ADDRESS"):
        return node_ports.explain(settings.port)
    found = ports.listening(ports.descendants(os.getpid()))
    metrics = [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]
    has_token = os.environ.get("RAY_AUTH_MODE") == "token"
    return ports.explain(found, [settings.port], switches.haproxy_ports(), metrics, has_token)


def example(settings: ServeSettings) -> str:
    """Return a curl line that works as it stands."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    host = f"[{host}]" if ":" in host else host
    token = ""
    if os.environ.get(f"{TOKEN_VARIABLE}_FILE"):
        token = f' -H "Authorization: Bearer $(cat "${TOKEN_VARIABLE}_FILE")"'
    elif os.environ.get(TOKEN_VARIABLE):
        token = f' -H "Authorization: Bearer ${TOKEN_VARIABLE}"'
    body = '{"text": "a photo of a bird", "k": 3}'
    return f"curl -s http://{host}:{settings.port}/v1/search{token} -H 'Content-Type: application/json' -d '{body}'"


def _check_no_other_serve() -> None:
    if serve.status().proxies:
        raise ConfigError(
            "Ray Serve runs on this cluster already, with its own address and applications",
            hint="add ours to it: serve deploy serve/config.yaml",
        )


def _check_gpus(settings: ServeSettings) -> None:
    """Serve would wait for a GPU for ever; on a cluster an autoscaler may bring one."""
    there = ray.cluster_resources().get("GPU", 0.0)
    if settings.encoder_gpus > there and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"--encoder-gpus {settings.encoder_gpus:g}, but this machine has {there:g} GPUs",
            hint="--encoder-gpus 0 encodes on CPUs",
        )


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}", hint="choose another --port"
            ) from None


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS, or a private one on this machine that ends with this process."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
    else:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home directory
        ray.init(
            address="local",  # else Ray would join a cluster that happens to run on this machine
            num_cpus=max(LOCAL_CPUS, os.cpu_count() or 1),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=os.environ.get("CLIPGAP_WORKER_LOGS") == "1",
            _temp_dir=os.environ.get("CLIPGAP_RAY_TMP"),
        )
    try:
        yield
    finally:
        ray.shutdown()


def _wait_for_signal() -> None:
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
