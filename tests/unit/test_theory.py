"""The linear theory: the closed form against the printed values and a simulation (counteranimal.md 10.1, item 4)."""

import numpy as np
import pytest

from clipgap_ray.kernels import theory
from clipgap_ray.kernels.theory import Shortcut

SETTINGS = [(1.5, 0.99), (2.0, 0.95), (1.0, 0.95)]


@pytest.mark.parametrize(
    ("world", "printed", "full"),
    [(SETTINGS[0], 0.538, 0.77), (SETTINGS[1], 0.767, 0.97), (SETTINGS[2], 0.296, 0.40)],
)
def test_golden_errors(world: tuple[float, float], printed: float, full: float) -> None:
    assert theory.counter_error(Shortcut(*world)) == pytest.approx(printed, abs=5e-4)
    assert theory.counter_error(Shortcut(*world), "full") == pytest.approx(full, abs=5e-3)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("prompt", ["object", "full"])
def test_the_simulation_agrees_with_the_closed_form(setting: tuple[float, float], prompt: theory.Prompt) -> None:
    world = Shortcut(*setting)
    found = theory.simulate_counter_error(world, np.random.default_rng(0), prompt)
    assert found == pytest.approx(theory.counter_error(world, prompt), abs=0.02)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_half_of_the_counter_samples_are_wrong_where_the_signs_change(sigma: float) -> None:
    p = 0.97
    mu = np.sqrt((1 + sigma**2) / (2 * p - 1))
    assert theory.counter_error(Shortcut(mu, p, sigma)) == pytest.approx(0.5)
    assert (
        theory.counter_error(Shortcut(1.05 * mu, p, sigma)) > 0.5 > theory.counter_error(Shortcut(mu / 1.05, p, sigma))
    )


def test_an_uncorrelated_background_costs_only_the_object_s_noise() -> None:
    assert theory.counter_error(Shortcut(3.0, 0.5)) == pytest.approx(0.1587, abs=1e-4)  # Phi(-1)
