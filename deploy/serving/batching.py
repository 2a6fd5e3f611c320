"""Dynamic batching: requests that wait while a batch is computed are the next batch."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from deploy.serving.jobs import Job


class OverloadedError(Exception):
    """More texts wait already than may."""


class Waiting(NamedTuple):
    """A job, and the future that its answer sets."""

    job: Job
    future: asyncio.Future


class Batcher:
    """Have one thread answer the jobs of many requests, in their order, as many at a time as wait.

    A job that comes alone is computed at once and alone; batches grow with the load.

    Args:
        answer: returns the answers of a batch of jobs, one for each.
        max_batch: most texts of a batch; a job of more is a batch of its own.
        max_waiting: most texts that may wait; `ask` refuses more.
        on_batch: is called with the number of jobs and of texts of each batch.
    """

    def __init__(self, answer: Callable[[list[Job]], list[Any]], max_batch: int, max_waiting: int,
                 on_batch: Callable[[int, int], None] = lambda jobs, texts: None) -> None:
        self.answer = answer
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.on_batch = on_batch
        self.waiting = 0  # texts
        self._queue: deque[Waiting] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "batcher")

    async def ask(self, job: Job) -> Any:
        """Return the answer to a job.

        Raises:
            OverloadedError: `max_waiting` texts wait already.
            Exception: whatever `answer` raised.
        """
        if self.waiting and self.waiting + len(job.texts) > self.max_waiting:
            raise OverloadedError
        future = asyncio.get_running_loop().create_future()
        self._queue.append(Waiting(job, future))
        self.waiting += len(job.texts)
        self._wake.set()
        return await future

    async def run(self) -> None:
        """Answer jobs until cancelled."""
        batch: list[Waiting] = []
        while True:
            await self._wake.wait()
            if len(batch) > 1:
                await self._let_more_come()
            batch = self._next_batch()
            if batch:
                await self._answer(batch)
            else:
                self._wake.clear()

    def close(self) -> None:
        """End the thread, when it has computed what it computes."""
        self._thread.shutdown(wait=False)

    async def _let_more_come(self) -> None:
        """Wait while jobs keep coming, 10 ms at most: clients that were just answered ask again."""
        for _ in range(10):
            jobs = len(self._queue)
            await asyncio.sleep(0.001)
            if len(self._queue) == jobs or self.waiting >= self.max_batch:
                return

    def _next_batch(self) -> list[Waiting]:
        """Return the jobs that have waited longest, without those whose requests have ended."""
        batch = []
        texts = 0
        while self._queue:
            job, future = self._queue[0]
            if batch and texts + len(job.texts) > self.max_batch:
                break
            self._queue.popleft()
            self.waiting -= len(job.texts)
            if not future.done():
                batch.append(Waiting(job, future))
                texts += len(job.texts)
        return batch

    async def _answer(self, batch: list[Waiting]) -> None:
        """Compute a batch in the thread, and pass its answers on.

        Where it fails, each job is computed alone, so that only those that cannot be answered get an error.
        """
        jobs = [waiting.job for waiting in batch]
        self.on_batch(len(jobs), sum(len(job.texts) for job in jobs))
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self.answer, jobs)
        except Exception as error:
            if len(batch) > 1:
                for waiting in batch:
                    await self._answer([waiting])
            elif not batch[0].future.done():
                batch[0].future.set_exception(error)
            return
        for waiting, answer in zip(batch, answers):
            if not waiting.future.done():
                waiting.future.set_result(answer)
