"""`python benchmarks/run.py serving`: the search service under load.

Batching of concurrent requests is compared with one run of the encoder a request, and the fusion with BM25 with
embeddings alone. All sides are the same service, one with --max_batch 1. `run.py serving_milvus` compares the service
with a Milvus server to the one with the index of a folder. Clients are connections of another process on the same
machine. Each asks for the 10 best documents of one query, waits for the answer, and asks again.
"""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from bench import ROOT, Bench, Values, median_values, start_milvus
from simcse import console


class Side(NamedTuple):
    """A way of answering.

    Attributes:
        flags: of server.py, without the model.
        mode: of the requests.
    """

    flags: tuple[str, ...]
    mode: str


DOCUMENTS = 1000
MILVUS_DOCUMENTS = 6000  # so that a graph is searched: Milvus has none where there are fewer than 1,024
CLIENTS = (1, 8, 64)  # at a time
SECONDS = 6  # of a run
REPEATS = 3
LISTENING = re.compile(r" at http://127\.0\.0\.1:(\d+), API at ")  # what server.py logs when it serves


async def ask_until(port: int, queries: list[str], mode: str, first: int, end: float) -> list[float]:
    """Ask over one connection, and return the seconds of each answer.

    Args:
        first: the number of the query to begin with.
        end: in the seconds of time.perf_counter.

    Raises:
        InputError: the service answers anything but 200.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seconds = []
    for number in range(first, sys.maxsize):
        body = json.dumps({"queries": [queries[number % len(queries)]], "mode": mode}).encode()
        start = time.perf_counter()
        if start > end:
            writer.close()
            return seconds
        writer.write(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise console.InputError(f"the service answered {head.splitlines()[0].decode()}")
        length = next(line for line in head.lower().splitlines() if line.startswith(b"content-length"))
        await reader.readexactly(int(length.split(b":")[1]))
        seconds.append(time.perf_counter() - start)


async def measure_load(port: int, queries: list[str], mode: str, clients: int, seconds: float) -> dict[str, float]:
    """Ask with several clients at a time, and return the answers a second, and percentiles of their time in ms."""
    start = time.perf_counter()
    tasks = [ask_until(port, queries, mode, client * 7919, start + seconds) for client in range(clients)]
    times_of_clients = await asyncio.gather(*tasks)
    took = time.perf_counter() - start
    latencies_ms = sorted(1000 * latency for latencies in times_of_clients for latency in latencies)
    values = {"answers/s": len(latencies_ms) / took}
    for percentile in (50, 95, 99):
        place = min(len(latencies_ms) - 1, len(latencies_ms) * percentile // 100)
        values[f"p{percentile}"] = latencies_ms[place]
    return values


@contextlib.contextmanager
def start_service(model_dir: str, flags: tuple[str, ...]) -> Iterator[int]:
    """Start the service as its users do, and yield its port."""
    with tempfile.TemporaryFile("a+") as log:  # "a": the service writes to its end, wherever it was read
        process = subprocess.Popen(
            [sys.executable, f"{ROOT}/deploy/serving/server.py", "--device", "cpu", "--port", "0", "--model_dir",
             model_dir, *flags], stderr=log, stdout=subprocess.DEVNULL)
        try:
            stderr = ""
            listening = None
            while listening is None:
                if process.poll() is not None:
                    raise console.InputError(f"server.py ended:\n{stderr}")
                time.sleep(0.2)
                log.seek(0)
                stderr = log.read()
                listening = LISTENING.search(stderr)
            yield int(listening[1])
        finally:
            process.terminate()
            process.wait()


def export(bench: Bench, encoder: str, checkpoint: str) -> str:
    """Export the model, and return its folder."""
    folder = f"{bench.scratch}/serving_{encoder}"
    subprocess.run([sys.executable, f"{ROOT}/export_model.py", "--quiet", "--params_path", checkpoint,
                    "--output_path", folder], check=True)
    return folder


def build_index(bench: Bench, checkpoint: str, documents: int, *flags: str) -> None:
    """Build an index of so many documents; `flags` say which and where."""
    corpus = bench.write("serving_corpus", bench.texts("corpus", documents))
    bench.run_stage("recall.py", "--params_path", checkpoint, "--corpus_file", corpus, "--query", "a", *flags)


def run_clients(port: int, queries: list[str], mode: str, clients: int, seconds: float) -> Values:
    """Run `measure_load` in a process of its own."""
    arguments = json.dumps([port, queries, mode, clients, seconds])
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, input=arguments)
    if done.returncode:
        raise console.InputError(f"clients failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def compare(bench: Bench, name: str, case: str, model_dir: str, sides: dict[str, Side],
            pairs: list[tuple[str, str]]) -> None:
    """Measure several services, and add rows.

    Args:
        name, case: of the rows.
        model_dir: the exported model.
        sides: by name; those with the same flags share a service.
        pairs: which side is compared with which other.
    """
    queries = bench.texts("titles", 1000)
    with contextlib.ExitStack() as running:
        ports = {}
        for side in sides.values():
            if side.flags not in ports:
                ports[side.flags] = running.enter_context(start_service(model_dir, side.flags))
        for clients in CLIENTS:
            medians = measure_sides(sides, ports, queries, clients)
            for one, other in pairs:
                for quantity, value in medians[one].items():
                    bench.add(name, f"{case}, {clients} clients, {quantity}, {one} against {other}", value,
                              medians[other][quantity], "ms" if quantity.startswith("p") else quantity)


def measure_sides(sides: dict[str, Side], ports: dict[tuple[str, ...], int], queries: list[str],
                  clients: int) -> dict[str, Values]:
    """Run all sides in turn, and return their medians.

    Args:
        sides: by name.
        ports: of the services, by their flags.
        queries: the texts.
        clients: how many at a time.
    """
    passes: dict[str, list[Values]] = {name: [] for name in sides}
    for side in sides.values():
        run_clients(ports[side.flags], queries, side.mode, clients, seconds=2)  # warms up
    for _ in range(REPEATS):
        for name, side in sides.items():
            passes[name].append(run_clients(ports[side.flags], queries, side.mode, clients, SECONDS))
    return {name: median_values(values) for name, values in passes.items()}


def serving(bench: Bench) -> None:
    """The search service under load: batching, and the fusion with BM25."""
    bench.make_base()
    checkpoints = {"base": bench.checkpoint, "ernie_mini_zh": bench.make_mini(),
                   "first_avg": bench.make_mini("first_avg")}
    for encoder, checkpoint in checkpoints.items():
        model_dir = export(bench, encoder, checkpoint)
        index = ("--index_path", f"{bench.scratch}/index_{encoder}")
        build_index(bench, checkpoint, DOCUMENTS, "--hybrid_bm25", *index)
        sides = {"batched": Side(index, "embedding"), "one by one": Side((*index, "--max_batch", "1"), "embedding"),
                 "hybrid": Side(index, "hybrid")}
        compare(bench, "serving", encoder, model_dir, sides, [("batched", "one by one"), ("hybrid", "batched")])


def serving_milvus(bench: Bench) -> None:
    """The search service on a Milvus server, against the index of a folder."""
    checkpoint = bench.make_mini()
    model_dir = export(bench, "milvus", checkpoint)
    with start_milvus(bench.scratch) as server:
        sides = {"Milvus": Side(("--milvus_uri", server.uri, "--milvus_collection", "serving"), "embedding"),
                 "folder": Side(("--index_path", f"{bench.scratch}/index_beside_milvus"), "embedding")}
        build_index(bench, checkpoint, MILVUS_DOCUMENTS, "--ann_engine", "milvus", *sides["Milvus"].flags)
        build_index(bench, checkpoint, MILVUS_DOCUMENTS, *sides["folder"].flags)
        compare(bench, "serving_milvus", "ernie_mini_zh", model_dir, sides, [("Milvus", "folder")])


if __name__ == "__main__":  # the process of the clients
    print(json.dumps(asyncio.run(measure_load(*json.load(sys.stdin)))))
