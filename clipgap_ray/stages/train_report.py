"""Where the metrics of a training go besides metrics.jsonl: always to Prometheus, by Ray's exporter; to TensorBoard by
default; to wandb and mlflow if asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ray.util.metrics import Gauge

from clipgap_ray import filesystems, store
from clipgap_ray.errors import ConfigError

#: Gauges by run, and the columns of metrics.jsonl that they show.
GAUGES = {
    "clipgap_train_loss": "loss",
    "clipgap_train_learning_rate": "lr",
    "clipgap_train_samples_per_s": "samples_per_s",
    "clipgap_train_data_wait_share": "data_wait_share",
    "clipgap_train_samples": "samples",
}
POSITIONS = ("step", "samples")  # the axis, not values on it


class Reporter(Protocol):
    """Takes rows of metrics as they come; a resumed run may bring steps again."""

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Take rows of `train_loop`'s metrics."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def check(names: Sequence[str]) -> None:
    """Refuse reporters that are not installed, before anything runs.

    Raises:
        ConfigError: Naming the package.
    """
    modules = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
    for name in names:
        if importlib.util.find_spec(modules[name]) is None:
            raise ConfigError(
                f"--report-to {name}: {modules[name]} is not installed",
                hint=f"pip install {modules[name]}, or leave {name} out",
            )


@contextlib.contextmanager
def open_reporters(settings: dict[str, Any], out: str) -> Iterator[list[Reporter]]:
    """Yield the reporters that a run asks for, and close them.

    Args:
        settings: `TrainSettings` as a dict.
        out: The run directory.
    """
    kinds: dict[str, type[Any]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}
    reporters: list[Reporter] = [Prometheus(out), *(kinds[name](settings, out) for name in settings["report_to"])]
    try:
        yield reporters
    finally:
        for reporter in reporters:
            reporter.close()


def _values(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in POSITIONS}


class Prometheus:
    """The last values of a run as gauges of the driver's node, named like the run directory."""

    def __init__(self, out: str) -> None:
        self._tags = {"run": out.rstrip("/").rsplit("/", 1)[-1]}
        self._gauges = {Gauge(name, f"Training: {of}.", tag_keys=("run",)): of for name, of in GAUGES.items()}

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Show the last row."""
        for gauge, of in self._gauges.items():
            gauge.set(float(rows[-1][of]), self._tags)

    def close(self) -> None:
        """Leave the last values; Ray forgets them with the driver."""


class TensorBoard:
    """Event files in RUN/tensorboard; of a remote run they are uploaded when it ends."""

    def __init__(self, settings: dict[str, Any], out: str) -> None:
        from tensorboardX import SummaryWriter

        self._target = store.join(out, "tensorboard")
        local = filesystems.is_local(out)
        self._folder = None if local else tempfile.TemporaryDirectory(prefix="clipgap-tensorboard-")
        self._place = filesystems.filesystem(self._target)[1] if local else str(self._folder.name)  # type: ignore[union-attr]
        self._writer = SummaryWriter(self._place)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Write one event per value."""
        for row in rows:
            for name, value in _values(row).items():
                self._writer.add_scalar(f"train/{name}", value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file, and upload it."""
        with contextlib.suppress(OSError):  # a full disk: the checkpoint says so, and better
            self._writer.close()
        if self._folder is not None:
            for name in os.listdir(self._place):
                with open(os.path.join(self._place, name), "rb") as file:
                    store.write_bytes(store.join(self._target, name), file.read())
            self._folder.cleanup()


class Wandb:
    """A run of Weights & Biases, named like the run directory and continued by it."""

    def __init__(self, settings: dict[str, Any], out: str) -> None:
        import wandb

        name = out.rstrip("/").rsplit("/", 1)[-1]
        self._run = wandb.init(
            project="clipgap", name=name, id=store.digest(out)[:16], resume="allow", config=dict(settings)
        )

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Log each row at its step."""
        for row in rows:
            self._run.log({f"train/{name}": value for name, value in _values(row).items()}, step=row["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Mlflow:
    """A run of MLflow, named like the run directory, at the tracking address that MLflow's own variables name."""

    def __init__(self, settings: dict[str, Any], out: str) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment("clipgap")
        mlflow.start_run(run_name=out.rstrip("/").rsplit("/", 1)[-1])
        mlflow.log_params({name: str(value) for name, value in settings.items()})

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Log each row at its step."""
        for row in rows:
            self._mlflow.log_metrics({f"train/{name}": float(v) for name, v in _values(row).items()}, step=row["step"])

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()
