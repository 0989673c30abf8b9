"""`clipgap serve`: set Ray Serve's switches, then import it."""

from __future__ import annotations

from clipgap_ray.config.serve import ServeSettings
from clipgap_ray.serving.switches import switch


def run(settings: ServeSettings) -> None:
    """Serve until Ctrl-C or SIGTERM; errors as of `run.run`."""
    switch(settings)
    from clipgap_ray.serving import run as service

    service.run(settings)
