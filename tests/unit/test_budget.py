"""What a run on CPUs is predicted to take: by a clock that the encoder itself moves on."""

from __future__ import annotations

import numpy as np
import pytest

from clipgap_ray.encoder import EncoderSettings, ProjectionEncoder
from clipgap_ray.errors import BudgetError
from clipgap_ray.stages import budget


class Slow(ProjectionEncoder):
    """Takes 0.25 s per image and 0.05 s per caption of a clock; the first batch three times as long."""

    clock = 0.0
    batches = 0

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        Slow.batches += 1
        Slow.clock += 0.25 * len(pixels) * (3 if Slow.batches == 1 else 1)
        return np.zeros((len(pixels), self.dim), np.float32)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        Slow.clock += 0.05 * len(texts)
        return np.zeros((len(texts), self.dim), np.float32)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    monkeypatch.setattr(Slow, "clock", 0.0)
    monkeypatch.setattr(Slow, "batches", 0)
    monkeypatch.setattr(budget.time, "perf_counter", lambda: Slow.clock)
    return Slow(EncoderSettings("projection", batch_size=128))


@pytest.mark.parametrize(("text", "seconds"), [(False, 0.25), (True, 0.3)])
def test_the_second_small_batch_is_timed(slow: Slow, text: bool, seconds: float) -> None:
    assert budget.probe(slow, text) == pytest.approx(seconds)
    assert slow.settings.batch_size == 128  # the probe works on a copy


def test_more_than_two_hours_needs_a_yes() -> None:
    short, long = budget.Forecast(7200, 7200.0), budget.Forecast(10_000_000, 200_000.0)
    budget.check(short, agreed=False)
    budget.check(long, agreed=True)
    with pytest.raises(BudgetError) as error:
        budget.check(long, agreed=False)
    for words in ("10,000,000 rows at 50 images/s: ETA 2.3 days", "2.0 h needs --yes", "--sample 0.01"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (90, "90 s"), (600, "10 min"), (9000, "2.5 h"), (259_200, "3.0 days")]
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert budget.duration(seconds) == words


def test_what_an_encoder_actor_is_not_worth_starting_for() -> None:
    small, long, many = budget.Forecast(1200, 3.0), budget.Forecast(1200, 20.0), budget.Forecast(32_768, 1.0)
    assert [budget.is_small(job, 1) for job in (small, long, many)] == [True, False, False]
    assert not budget.is_small(small, 16)  # 48 seconds of one core
