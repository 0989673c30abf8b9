"""A command that a study runs, and how it knows that it need not run again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clipgap_ray import __version__, store
from clipgap_ray.config.base import Settings
from clipgap_ray.stages.progress import logger

MADE_FROM = "made_from.json"


@dataclass(frozen=True)
class Step:
    """A command of the study.

    Attributes:
        title: What the log says.
        run: The stage's `run`.
        settings: Its settings.
        inputs: For stages without a commit log: files whose content decides what comes out.
    """

    title: str
    run: Callable[[Any], object]
    settings: Settings
    inputs: tuple[str, ...] = ()

    def __call__(self) -> None:
        """Run it, unless it has been run with these settings on these inputs."""
        logger.info("-- %s", self.title)
        if not self.inputs:
            self.run(self.settings)
            return
        out = str(self.settings.out)  # type: ignore[attr-defined]  # every stage's settings have it
        path = store.join(out, MADE_FROM)
        made_from = {
            "version": __version__,
            "settings": self.settings.fingerprint(),
            "inputs": {uri: store.sha256(store.read_bytes(uri)) for uri in self.inputs},
        }
        if store.exists(path):
            if store.read_json(path) == made_from:
                logger.info("%s is there already", out)
                return
            store.remove(path)  # what a run that does not finish leaves is of neither settings
        self.run(self.settings)
        store.write_json(path, made_from)
