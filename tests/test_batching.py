"""Dynamic batching, with a thread that answers when the test lets it."""

import asyncio
import threading

from deploy.serving.batching import Batcher, OverloadedError
from deploy.serving.jobs import EmbedJob

import pytest


class Answers:
    """Answers jobs by their texts in capitals, once `go` is set; keeps the batches, and fails at the text "bad"."""

    def __init__(self):
        self.batches, self.go, self.started = [], threading.Event(), threading.Event()

    def __call__(self, jobs):
        self.batches.append([job.texts for job in jobs])
        self.started.set()
        assert self.go.wait(30)
        if any("bad" in job.texts for job in jobs):
            raise ValueError("bad")
        return [[text.upper() for text in job.texts] for job in jobs]


def batching(test, max_batch=4, max_waiting=100, **options):
    """Run the coroutine `test(batcher, answers, ask)`; `ask(*texts)` starts a job. Returns the batches."""
    answers = Answers()

    async def run():
        batcher = Batcher(answers, max_batch, max_waiting, **options)
        running = asyncio.create_task(batcher.run())

        async def ask(*texts):
            asked = asyncio.create_task(batcher.ask(EmbedJob(texts, ["document"] * len(texts))))
            await asyncio.sleep(0)
            return asked

        try:
            await asyncio.wait_for(test(batcher, answers, ask), 30)
        finally:
            answers.go.set()
            running.cancel()

    asyncio.run(run())
    return answers.batches


async def computing(answers):
    """Wait until a batch is being computed."""
    await asyncio.get_running_loop().run_in_executor(None, answers.started.wait, 30)


def test_what_waits_is_the_next_batch_in_its_order():
    told = []

    async def test(batcher, answers, ask):
        first = await ask("a")
        await computing(answers)
        later = [await ask(*texts) for texts in ("bc", "d", "e", "fg", "hijkl", "m")]
        assert batcher.waiting == 12 and not first.done()
        answers.go.set()
        assert await first == ["A"]
        assert await asyncio.gather(*later) == [list(texts) for texts in ("BC", "D", "E", "FG", "HIJKL", "M")]
        assert batcher.waiting == 0

    batches = batching(test, on_batch=lambda jobs, texts: told.append((jobs, texts)))
    # At most 4 texts; the job of 5 is alone.
    assert batches == [[("a",)], [("b", "c"), ("d",), ("e",)], [("f", "g")], [("h", "i", "j", "k", "l")], [("m",)]]
    assert told == [(1, 1), (3, 4), (1, 2), (1, 5), (1, 1)]


def test_a_job_that_comes_alone_waits_for_nothing():
    async def test(batcher, answers, ask):
        answers.go.set()
        for text in "ab":
            assert await (await ask(text)) == [text.upper()]

    assert batching(test) == [[("a",)], [("b",)]]


def test_an_error_is_that_of_its_job_alone():
    """A batch that fails is computed again, job by job."""
    async def test(batcher, answers, ask):
        first = await ask("a")
        await computing(answers)
        others = [await ask(text) for text in ("b", "bad", "c")]
        answers.go.set()
        answered = await asyncio.gather(first, *others, return_exceptions=True)
        assert answered[:2] == [["A"], ["B"]] and answered[3] == ["C"]
        assert isinstance(answered[2], ValueError)

    assert batching(test) == [[("a",)], [("b",), ("bad",), ("c",)], [("b",)], [("bad",)], [("c",)]]


def test_what_nobody_waits_for_is_not_computed():
    async def test(batcher, answers, ask):
        first = await ask("a")
        await computing(answers)
        given_up, wanted = await ask("b", "c", "d"), await ask("e", "f")
        given_up.cancel()
        first.cancel()
        await asyncio.sleep(0)
        answers.go.set()
        assert await wanted == ["E", "F"] and batcher.waiting == 0
        assert given_up.cancelled() and first.cancelled()

    assert batching(test) == [[("a",)], [("e", "f")]]


def test_more_than_may_wait_is_refused():
    async def test(batcher, answers, ask):
        first = await ask("a")
        await computing(answers)
        waiting = [await ask("b", "c"), await ask("d", "e")]
        for texts in ("f", "fghijk"):
            with pytest.raises(OverloadedError):
                await (await ask(*texts))
        assert batcher.waiting == 4
        answers.go.set()
        assert await asyncio.gather(first, *waiting) == [["A"], ["B", "C"], ["D", "E"]]
        assert await (await ask(*"fghijk")) == list("FGHIJK"), "nothing waits, so it may be more than 4"

    assert batching(test, max_waiting=4) == [[("a",)], [("b", "c"), ("d", "e")], [tuple("fghijk")]]
