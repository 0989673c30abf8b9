"""Batches that fill up while a computation runs."""

from __future__ import annotations

import asyncio
import threading

import pytest

from clipgap_ray.serving.together import Together


class Slow:
    """Doubles numbers; holds every computation until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Semaphore(0)

    def __call__(self, numbers: list[int]) -> list[int]:
        self.batches.append(numbers)
        assert self.go.acquire(timeout=10)
        if 13 in numbers:
            raise ValueError("13")
        return [2 * number for number in numbers]


async def started(slow: Slow, batches: int) -> None:
    while len(slow.batches) < batches:
        await asyncio.sleep(0.001)


def test_who_comes_meanwhile_is_answered_together() -> None:
    async def run() -> None:
        slow = Slow()
        together = Together(slow, most=4)
        first = asyncio.create_task(together.ask(0))
        await started(slow, 1)  # at once: nobody waits for company
        others = [asyncio.create_task(together.ask(number)) for number in range(1, 7)]
        await asyncio.sleep(0)
        slow.go.release(3)
        assert [await first, *await asyncio.gather(*others)] == [0, 2, 4, 6, 8, 10, 12]
        assert slow.batches == [[0], [1, 2, 3, 4], [5, 6]]
        slow.go.release()
        assert await together.ask(7) == 14  # idle again, and awake

    asyncio.run(run())


def test_nothing_is_computed_for_those_who_have_gone() -> None:
    async def run() -> None:
        slow = Slow()
        together = Together(slow, most=4)
        first = asyncio.create_task(together.ask(0))
        await started(slow, 1)
        gone, stays = asyncio.create_task(together.ask(1)), asyncio.create_task(together.ask(2))
        await asyncio.sleep(0)
        gone.cancel()
        first.cancel()  # its computation runs already: the answer is dropped
        await asyncio.sleep(0)
        slow.go.release(2)
        assert await stays == 4
        assert slow.batches == [[0], [2]]

    asyncio.run(run())


def test_an_error_is_everybodys_in_the_batch_and_nobody_elses() -> None:
    async def run() -> None:
        slow = Slow()
        together = Together(slow, most=2)
        asked = [asyncio.create_task(together.ask(number)) for number in (1, 13, 3)]
        await asyncio.sleep(0)
        slow.go.release(3)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(answers[0], ValueError)
        assert isinstance(answers[1], ValueError)
        assert answers[2] == 6

    asyncio.run(run())


def test_a_computation_that_loses_an_answer_leaves_nobody_waiting() -> None:
    async def run() -> None:
        together: Together[int, int] = Together(lambda numbers: numbers[:-1], most=4)
        answers = await asyncio.wait_for(asyncio.gather(*map(together.ask, range(3)), return_exceptions=True), 10)
        assert [type(answer) for answer in answers] == [ValueError] * 3

    asyncio.run(run())


@pytest.mark.parametrize("most", [1, 64])
def test_every_caller_gets_its_own_answer(most: int) -> None:
    async def run() -> None:
        together = Together(lambda numbers: [number * number for number in numbers], most)
        assert await asyncio.gather(*map(together.ask, range(200))) == [number * number for number in range(200)]

    asyncio.run(run())
