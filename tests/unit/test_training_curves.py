"""The figure of training losses: a line per run, and where there are many, per model."""

from __future__ import annotations

import pytest
from matplotlib import pyplot

from clipgap_ray.reporting import figures, theme
from clipgap_ray.reporting.tables import Record


def _curves(models: int, seeds: int) -> list[Record]:
    return [
        {"run": f"m{model}-s{seed}", "supervised": False, "seed": seed, "samples": samples, "loss": float(seed + model)}
        for model in range(models)
        for seed in range(seeds)
        for samples in (64, 128)
    ]


@pytest.mark.parametrize(("models", "names"), [(2, ["m0-s0", "m0-s1", "m0-s2", "m1-s0", "m1-s1", "m1-s2"]),
                                               (5, ["m0", "m1", "m2", "m3", "m4"])])  # fmt: skip
def test_many_runs_are_drawn_by_model(models: int, names: list[str]) -> None:
    figure = figures.training_curves(_curves(models, seeds=3), theme.LIGHT)
    (axis,) = [axis for axis in figure.axes if axis.lines]
    assert [line.get_label() for line in axis.lines] == names
    legend = axis.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == names
    means = [line.get_ydata()[0] for line in axis.lines]  # type: ignore[index]
    assert means == ([0, 1, 2, 1, 2, 3] if models == 2 else [1, 2, 3, 4, 5])
    assert ("mean over seeds" in axis.get_title()) == (models == 5)
    pyplot.close(figure)
