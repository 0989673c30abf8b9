"""Where `serve deploy serve/config.yaml` finds the application."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def build_app(args: dict[str, Any]) -> Application:
    """Build the application from the `args` of the config file.

    Args:
        args: Settings of `clipgap serve` (`clipgap_ray.config.serve.ServeSettings`).
    """
    from clipgap_ray.serving.app import build_app as build

    return build(args)
