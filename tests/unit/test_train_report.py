"""Where metrics go: event files that TensorBoard reads; what is not installed is refused by name."""

from __future__ import annotations

import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from clipgap_ray.errors import ConfigError
from clipgap_ray.stages import train_report

ROWS = [
    {"step": 10, "samples": 160, "loss": 2.5, "lr": 0.001, "samples_per_s": 8.0, "data_wait_share": 0.25},
    {"step": 20, "samples": 320, "loss": 2.0, "lr": 0.0005, "samples_per_s": 9.0, "data_wait_share": 0.5},
]


def events(folder: Path) -> list[Event]:
    """Read TFRecords: length, its checksum, data, its checksum."""
    data = next(folder.iterdir()).read_bytes()
    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


@pytest.mark.parametrize("remote", [False, True])
def test_tensorboard_s_files_hold_every_value(tmp_path: Path, remote: bool) -> None:
    out = f"memory://run-{tmp_path.name}" if remote else str(tmp_path)
    with train_report.open_reporters({"report_to": ["tensorboard"]}, out) as reporters:
        for row in ROWS:
            reporters[-1].add([row])
    folder = tmp_path / "tensorboard"
    if remote:
        import fsspec

        fsspec.filesystem("memory").get(f"/run-{tmp_path.name}/tensorboard", str(folder), recursive=True)
    values = {(v.tag, e.step): v.simple_value for e in events(folder) for v in e.summary.value}
    assert values == {
        (f"train/{name}", row["step"]): pytest.approx(value)
        for row in ROWS
        for name, value in row.items()
        if name not in train_report.POSITIONS
    }


def test_prometheus_gets_the_last_row_by_the_run_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, tuple[float, dict[str, str]]] = {}

    class Gauge:
        def __init__(self, name: str, text: str, tag_keys: tuple[str, ...]) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            shown[self.name] = (value, tags)

    monkeypatch.setattr(train_report, "Gauge", Gauge)
    with train_report.open_reporters({"report_to": []}, "study/runs/full-s0/") as (reporter,):
        reporter.add(ROWS)
    run = {"run": "full-s0"}
    assert shown == {name: (float(ROWS[1][of]), run) for name, of in train_report.GAUGES.items()}
    assert {"clipgap_train_loss", "clipgap_train_samples_per_s"} <= set(shown)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_reporter_that_is_not_installed_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(train_report.importlib.util, "find_spec", lambda module: None if module == name else object())
    train_report.check(("tensorboard",))
    with pytest.raises(ConfigError, match=f"--report-to {name}: {name} is not installed"):
        train_report.check(("tensorboard", name))


def test_wandb_and_mlflow_get_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against stand-ins with the calls of their public interfaces; neither is installed here."""
    logged: list[tuple[str, dict[str, Any], int]] = []
    run = types.SimpleNamespace(log=lambda values, step: logged.append(("wandb", values, step)), finish=lambda: None)
    wandb = types.SimpleNamespace(init=lambda **words: run)
    mlflow = types.SimpleNamespace(
        set_experiment=lambda name: None, start_run=lambda run_name: None, log_params=lambda values: None,
        log_metrics=lambda values, step: logged.append(("mlflow", values, step)), end_run=lambda: None,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with train_report.open_reporters({"report_to": ["wandb", "mlflow"], "lr": 1}, "runs/a") as reporters:
        for reporter in reporters:
            reporter.add(ROWS[:1])
    values = {f"train/{name}": value for name, value in ROWS[0].items() if name not in train_report.POSITIONS}
    assert logged == [(name, values, 10) for name in ("wandb", "mlflow")]
