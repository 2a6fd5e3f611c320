"""A service whose index is replaced: no request is lost, and no answer is of two indexes."""

import argparse
import asyncio
import contextlib
import functools
import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time

from simcse.console import InputError

import httpx
import numpy as np
import pytest
from conftest import FP32, read_texts, run_script

pytest.importorskip("fastapi_offline", reason="requirements-serving.txt is not installed")
from deploy.serving import remote
from deploy.serving.reloading import ReloadingApp, Served


@pytest.fixture(scope="module")
def indexes(checkpoint, sample, tmp_path_factory):
    """Of two corpora that share no document, the second with BM25."""
    folder = tmp_path_factory.mktemp("following")
    texts = read_texts(sample / "corpus.csv")
    for name, own in (("first", texts[:40]), ("second", texts[40:100])):
        (folder / f"{name}.csv").write_text("".join(f"{text}\n" for text in own), encoding="utf-8")
        result = run_script("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file",
                            folder / f"{name}.csv", "--query", "语义", "--max_seq_length", 32, "--index_path",
                            folder / name, *(["--hybrid_bm25"] if name == "second" else []), *FP32)
        assert not result.returncode, result.stderr
    return folder


def replace(source, index):
    """As recall.py does it: the new folder takes the old one's place in one step."""
    from simcse.files import new_cache_folder

    with new_cache_folder(str(index)) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)


def test_an_index_that_is_replaced_under_load(serve, indexes, tmp_path):
    """Three times, the second time damaged; every answer is 200, and of one index alone."""
    index = tmp_path / "index"
    shutil.copytree(indexes / "first", index)
    service = serve("--index_path", index)
    texts = [read_texts(indexes / f"{name}.csv") for name in ("first", "second")]
    corpora = {len(each): set(each) for each in texts}
    answers, ended = [], threading.Event()

    def ask(number):
        while not ended.is_set():
            status, _, content = service.ask("/search", {"queries": [f"语义 {number}", "检索"], "top_k": 5})
            answers.append((status, content))

    def wait_for(documents):
        until = time.time() + 60
        while service.ask("/healthz")[2]["documents"] != documents:
            assert time.time() < until, service.log.read_text("utf-8")
            time.sleep(0.05)

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for client in clients:
        client.start()
    replace(indexes / "second", index)
    wait_for(60)
    assert service.ask("/healthz")[2]["modes"] == ["embedding", "hybrid"]
    (index / "shard_0.bin").write_bytes(b"damaged")
    service.process.send_signal(signal.SIGHUP)
    while "what was served before goes on" not in service.log.read_text("utf-8"):
        time.sleep(0.05)
    replace(indexes / "first", index)
    wait_for(40)
    ended.set()
    for client in clients:
        client.join()
    assert service.ask("/search", {"queries": ["语义"]})[2]["documents"] == 40
    seen = [content["documents"] for status, content in answers if status == 200]
    assert len(seen) == len(answers) and set(seen) == {40, 60}
    for _, content in answers:
        hits = [hit for each in content["results"] for hit in each]
        assert len(hits) == 10 and {hit["document"] for hit in hits} <= corpora[content["documents"]]
        assert all((hit["score"] is not None) == (content["documents"] == 60) for hit in hits)
    assert service.figures()["simcse_documents"] == 40
    assert service.figures()['simcse_requests_total{path="/search",status="200"}'] >= len(answers)
    said = [line for line in service.log.read_text("utf-8").splitlines() if "from now on" in line or "goes on" in line]
    assert [line.split()[0] for line in said] == ["60", "--index_path", "40"] and "damaged" in said[1], said


class Searcher:
    """One that is open at once, unless it `waits`, and its app, whose answers wait for its gate."""

    def __init__(self, name, waits=False):
        self.name, self.closed, self.killed, self.gate = name, False, threading.Event(), asyncio.Event()
        self.waits, self.opening = waits, threading.Event()
        self.facts = type("Facts", (), {"documents": 1, "precision": "fp32"})

    def open(self):
        self.opening.set()
        if self.waits:
            self.killed.wait()
            raise OSError("it was ended")

    def kill(self):
        self.killed.set()

    def close(self):
        self.closed = True

    def app(self):
        from fastapi import FastAPI

        class App(FastAPI):
            def lifespan(self):
                return self.router.lifespan_context(self)

        app = App()

        @app.get("/")
        async def name():
            await self.gate.wait()
            return self.name

        return app


async def get(app):
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b"", "http_version": "1.1"}
    await app(scope, receive, send)
    return sent[-1]["body"]


async def until(condition, seconds=0.01):
    while not condition():
        await asyncio.sleep(seconds)


@contextlib.asynccontextmanager
async def living(following):
    """From its start as an application to its end."""
    events, said = asyncio.Queue(), []

    async def send(message):
        said.append(message["type"])

    await events.put({"type": "lifespan.startup"})
    task = asyncio.create_task(following({"type": "lifespan"}, events.get, send))
    await until(lambda: said)
    yield
    await events.put({"type": "lifespan.shutdown"})
    await task


def run(main, seconds=20):
    asyncio.run(asyncio.wait_for(main(), seconds))


def test_requests_under_way_are_answered_by_what_they_began_with():
    """The old searcher is closed when they are; one that cannot be opened changes nothing."""
    opened, stamps = [], ["a"]

    def new_searcher():
        if stamps[0] == "broken":
            stamps.append("seen")
            raise OSError("no such index")
        opened.append(Searcher(stamps[0]))
        return opened[-1]

    async def main():
        following = ReloadingApp(new_searcher, Searcher.app, lambda: stamps[0], seconds=0.01)
        async with living(following):
            waiting = asyncio.create_task(get(following))
            await asyncio.sleep(0.02)
            stamps[0] = "broken"
            await until(lambda: "seen" in stamps)
            assert following.searcher is opened[0]
            stamps[0] = "b"
            await until(lambda: following.searcher.name == "b")
            opened[1].gate.set()
            assert await get(following) == b'"b"' and not opened[0].closed
            opened[0].gate.set()
            assert await waiting == b'"a"'
            await until(lambda: opened[0].closed)
            stamps[0] = None  # the folder is away for a moment
            await asyncio.sleep(0.05)
        assert [searcher.name for searcher in opened] == ["a", "b"] and not opened[1].closed

    run(main)


def test_its_end_waits_for_nothing_that_is_being_opened():
    stamps, opened = ["a"], []

    def new_searcher():
        opened.append(Searcher(stamps[0], waits=bool(opened)))
        return opened[-1]

    async def main():
        async with living(ReloadingApp(new_searcher, Searcher.app, lambda: stamps[0], seconds=0.01)):
            stamps[0] = "b"
            await until(lambda: len(opened) == 2 and opened[1].opening.is_set())
        assert opened[1].killed.is_set() and not opened[0].killed.is_set()

    run(main)


def test_what_changed_while_it_was_opened_is_opened_again(capsys):
    """At the start and later: its files may be of two indexes."""
    stamps, opened = ["a"], []

    class Slow(Searcher):
        def open(self):
            stamps[0] = {"a": "b", "c": "d"}.get(self.name, self.name)

    def new_searcher():
        opened.append(Slow(stamps[0]))
        return opened[-1]

    async def main():
        following = ReloadingApp(new_searcher, Searcher.app, lambda: stamps[0], seconds=0.01)
        assert following.searcher is opened[1] and opened[0].closed
        async with living(following):
            stamps[0] = "c"
            await until(lambda: following.searcher.name == "d")
        assert [searcher.name for searcher in opened] == ["a", "b", "c", "d"] and opened[2].killed.is_set()

    run(main)
    again = "the index changed while it was being opened, and is opened again"
    assert capsys.readouterr().err.splitlines()[:2] == [again, f"{again}; what was served before goes on"]


def test_one_whose_app_cannot_be_made_changes_nothing(capsys):
    """And the one after it takes over."""
    stamps, opened = ["a"], []

    def new_searcher():
        opened.append(Searcher(stamps[0]))
        return opened[-1]

    def make_app(searcher):
        if searcher.name == "broken":
            raise KeyError("mode")
        return searcher.app()

    async def main():
        following = ReloadingApp(new_searcher, make_app, lambda: stamps[0], seconds=0.01)
        async with living(following):
            stamps[0] = "broken"
            await until(lambda: len(opened) == 2 and opened[1].killed.is_set())
            assert following.searcher is opened[0]
            stamps[0] = "b"
            await until(lambda: following.searcher.name == "b")

    run(main)
    assert capsys.readouterr().err.splitlines()[0] == "KeyError: 'mode'; what was served before goes on"


@pytest.mark.parametrize("steps", range(6))
def test_a_cancellation_as_the_last_request_ends_is_not_lost(steps):
    """The service would not end otherwise."""

    async def main():
        searcher = Searcher("a")
        served = Served(searcher, searcher.app())
        await served.begin()

        async def reload():
            await served.end(60)
            await asyncio.sleep(60)

        reloading = asyncio.create_task(reload())
        for _ in range(steps):
            await asyncio.sleep(0)
        reloading.cancel()
        await asyncio.wait([reloading], timeout=1)
        assert reloading.cancelled()

    run(main)


def test_figures_are_of_what_has_begun():
    """An app that was made, and does not take over, changes none."""
    from deploy.serving.app import make_app
    from deploy.serving.jobs import EMBEDDING, Facts
    from deploy.serving.metrics import Metrics
    from deploy.serving.schemas import Limits

    metrics, searcher = Metrics(), Searcher("a")
    searcher.facts, searcher.answer = Facts(7, 2, "fp32", (EMBEDDING,), 8, False), None
    app = make_app(searcher, Limits(), metrics=metrics)
    assert metrics.registry.get_sample_value("simcse_documents") == 0

    async def main():
        async with app.lifespan():
            assert metrics.registry.get_sample_value("simcse_documents") == 7

    run(main)


def test_a_thousand_take_overs_leave_nothing_behind():
    """Neither threads, nor descriptors, nor what FastAPI knows of endpoints; with BM25 and without in turn."""
    from deploy.serving.app import make_app
    from deploy.serving.jobs import EMBEDDING, HYBRID, Embedded, Facts
    from deploy.serving.metrics import Metrics
    from deploy.serving.schemas import Limits

    metrics = Metrics()
    opened, figures = [0], []

    def new_searcher():
        opened[0] += 1
        searcher = Searcher(opened[0])
        modes = (EMBEDDING, HYBRID)[: 1 + opened[0] % 2]
        searcher.facts = Facts(opened[0], 2, "fp32", modes, 8, False)
        searcher.answer = lambda jobs: [Embedded(np.zeros((1, 2), "float32"), np.array([3])) for _ in jobs]
        return searcher

    async def main():
        following = ReloadingApp(new_searcher, functools.partial(make_app, limits=Limits(), metrics=metrics), seconds=0)
        transport = httpx.ASGITransport(following)
        async with living(following), httpx.AsyncClient(transport=transport, base_url="http://a") as web:
            for number in range(2, 1001):
                following._reopen = True
                await until(lambda number=number: following.searcher.name >= number, 0)
                if number % 100 == 0:
                    assert (await web.post("/embed", json={"texts": ["a"]})).status_code == 200
                    assert (await web.get("/healthz")).json()["documents"] == following.searcher.name
                    gc.collect()
                    figures.append((threading.active_count(), len(os.listdir("/proc/self/fd")), len(gc.get_objects())))

    run(main, 300)
    threads, descriptors, objects = zip(*figures)
    assert threads[-1] <= threads[0] + 1 and descriptors[-1] <= descriptors[0]
    assert objects[-1] < objects[0] * 1.01


def test_an_index_that_cannot_be_opened_is_told_until_another_takes_over():
    opened, stamps, told = [], ["a"], []

    def new_searcher():
        if stamps[0] == "broken":
            raise OSError("no such index")
        opened.append(Searcher(stamps[0]))
        return opened[-1]

    async def main():
        following = ReloadingApp(new_searcher, Searcher.app, lambda: stamps[0], seconds=0.01, on_outdated=told.append)
        async with living(following):
            await asyncio.sleep(0.05)
            assert told == []
            stamps[0] = "broken"
            await until(lambda: told)
            await asyncio.sleep(0.05)
            assert told == [True]
            stamps[0] = "b"
            await until(lambda: following.searcher.name == "b")
            assert told == [True, True, False]

    run(main)


def test_what_could_not_be_opened_is_tried_again(monkeypatch):
    monkeypatch.setattr("deploy.serving.reloading.RETRY_SECONDS", 0.05)
    opened, stamps, failures = [], ["a"], [OSError("too many open files")]

    def new_searcher():
        if stamps[0] == "b" and failures:
            raise failures.pop()
        opened.append(Searcher(stamps[0]))
        return opened[-1]

    async def main():
        following = ReloadingApp(new_searcher, Searcher.app, lambda: stamps[0], seconds=0.01)
        async with living(following):
            stamps[0] = "b"
            await until(lambda: following.searcher.name == "b")

    run(main)
    assert not failures


def test_who_waits_for_what_is_killed_while_it_opens_is_told():
    searcher, errors = remote.RemoteSearcher(argparse.Namespace(quiet=True)), []

    def wait():
        try:
            searcher.open()
        except InputError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    searcher.kill()
    waiting.join(10)
    assert errors and not searcher.ended


def test_what_nobody_waits_for_may_be_computed_when_it_is_closed(monkeypatch):
    """The server goes on: only a model that ends by itself ends it."""
    searcher, (ours, theirs) = object.__new__(remote.RemoteSearcher), multiprocessing.Pipe()
    searcher._connection, searcher._answering = ours, threading.Lock()
    searcher._is_open, searcher._closing, searcher.ended = True, False, False
    searcher._process = type("Process", (), {"kill": staticmethod(theirs.close), "join": staticmethod(lambda: None),
                                             "close": staticmethod(lambda: None)})
    killed, errors = [], []
    monkeypatch.setattr(remote.os, "kill", lambda *_: killed.append(1))

    def ask():
        try:
            searcher.answer([])
        except RuntimeError as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert theirs.recv() == []
    searcher.close()
    asking.join(10)
    assert errors and not killed and not searcher.ended
