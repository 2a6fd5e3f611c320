"""Dynamic batching: requests that wait while a batch is computed are the next batch."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


class OverloadedError(Exception):
    """More texts wait already than may."""


@dataclass(frozen=True)
class Job:
    """What a request asks: the texts' embeddings, or, with `top_k`, the documents most similar to each, by embedding or
    by that and by words, `hybrid`; with `counted` the embeddings, and how many tokens each text has."""

    texts: Sequence[str]
    top_k: int = 0
    hybrid: bool = False
    counted: bool = False


class Batcher:
    """Has one thread answer the jobs of many requests, in their order, as many at a time as wait.

    A job that comes alone is computed at once and alone; batches grow with the load by themselves.

    Args:
        answer: gives the answers of a batch of jobs, one each.
        max_batch: texts of a batch; a job of more is a batch of its own.
        max_waiting: texts that may wait; `ask` refuses more.
        batched: is told how many jobs and texts each batch has.
    """

    def __init__(self, answer: Callable[[list[Job]], list[Any]], max_batch: int, max_waiting: int,
                 batched: Callable[[int, int], None] = lambda jobs, texts: None) -> None:
        self.answer, self.max_batch, self.max_waiting, self.batched = answer, max_batch, max_waiting, batched
        self.waiting = 0  # texts
        self._jobs: deque[tuple[Job, asyncio.Future]] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "batcher")

    async def ask(self, job: Job) -> Any:
        """The answer to a job.

        Raises:
            OverloadedError: `max_waiting` texts wait already.
            Exception: whatever `answer` raised.
        """
        if self.waiting and self.waiting + len(job.texts) > self.max_waiting:
            raise OverloadedError
        future = asyncio.get_running_loop().create_future()
        self._jobs.append((job, future))
        self.waiting += len(job.texts)
        self._wake.set()
        return await future

    def _next_batch(self) -> list[tuple[Job, asyncio.Future]]:
        """The jobs that have waited longest, without those that nobody waits for any more."""
        batch, texts = [], 0
        while self._jobs and (not batch or texts + len(self._jobs[0][0].texts) <= self.max_batch):
            job, future = self._jobs.popleft()
            self.waiting -= len(job.texts)
            if not future.done():
                batch.append((job, future))
                texts += len(job.texts)
        return batch

    async def _let_more_come(self) -> None:
        """Wait as long as jobs keep coming, 10 ms at most: who was answered just now asks again."""
        for _ in range(10):
            waiting = len(self._jobs)
            await asyncio.sleep(0.001)
            if len(self._jobs) == waiting or self.waiting >= self.max_batch:
                return

    async def run(self) -> None:
        """Answer jobs until cancelled."""
        loop, batch = asyncio.get_running_loop(), []
        while True:
            await self._wake.wait()
            if len(batch) > 1:
                await self._let_more_come()
            if not (batch := self._next_batch()):
                self._wake.clear()
                continue
            jobs = [job for job, _ in batch]
            self.batched(len(jobs), sum(len(job.texts) for job in jobs))
            try:
                answers = await loop.run_in_executor(self._thread, self.answer, jobs)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers):
                if not future.done():
                    future.set_result(answer)
