"""Questions that come while one is answered are answered together by the next computation.

Ray Serve's `serve.batch` closes a batch a fixed time after its first question, also while the batch before is still
computed: with no wait a busy replica gets batches of one (seen with Ray 2.60), with a wait an idle one answers late.
Here a batch is closed when the computation can begin, so an idle replica begins at once and a busy one fills up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Together(Generic[Q, A]):
    """One computation at a time, in a thread, for all who wait; belongs to one event loop.

    Args:
        compute: Maps questions to as many answers, in order.
        most: Questions per computation.
    """

    def __init__(self, compute: Callable[[list[Q]], list[A]], most: int) -> None:
        self._compute, self._most = compute, most
        self._waiting: deque[tuple[Q, asyncio.Future[A]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def ask(self, question: Q) -> A:
        """Return the answer to one question. What the computation raises, everybody in it gets.

        A caller who is cancelled leaves the queue: nothing is computed for those who have gone.
        """
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            batch: list[tuple[Q, asyncio.Future[A]]] = []
            while self._waiting and len(batch) < self._most:
                question, future = self._waiting.popleft()
                if not future.cancelled():
                    batch.append((question, future))
            if not batch:
                return
            try:
                answers = await asyncio.to_thread(self._compute, [question for question, _ in batch])
                answered = list(zip(batch, answers, strict=True))
            except Exception as error:  # noqa: BLE001  whatever it is: the callers' business, not this loop's
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in answered:
                if not future.done():
                    future.set_result(answer)
