"""`python benchmarks/run.py serving`: the search service under load.

Batching of concurrent requests is compared with one run of the encoder a request, and the fusion with BM25 with
embeddings alone. All sides are the same service, one with --max_batch 1. Clients are connections of another process on
the same machine. Each asks for the 10 best documents of one query, waits for the answer, and asks again.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from bench import ROOT, Bench, Values, median_values
from simcse import console


class Side(NamedTuple):
    """A way of answering.

    Attributes:
        flags: of server.py.
        mode: of the requests.
    """

    flags: tuple[str, ...]
    mode: str


SIDES = {"batched": Side((), "embedding"), "one by one": Side(("--max_batch", "1"), "embedding"),
         "hybrid": Side((), "hybrid")}
CLIENTS = (1, 8, 64)  # at a time
SECONDS = 6  # of a run
REPEATS = 3


async def ask_on(port: int, queries: list[str], mode: str, first: int, end: float) -> list[float]:
    """Ask over one connection until `end`, and return the seconds of each answer.

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


async def load(port: int, queries: list[str], mode: str, clients: int, seconds: float) -> dict[str, float]:
    """Ask with several clients at a time, and return the answers a second, and percentiles of their time in ms."""
    start = time.perf_counter()
    tasks = [ask_on(port, queries, mode, client * 7919, start + seconds) for client in range(clients)]
    times_of_clients = await asyncio.gather(*tasks)
    took = time.perf_counter() - start
    times = sorted(1000 * seconds for times in times_of_clients for seconds in times)
    values = {"answers/s": len(times) / took}
    for percentile in (50, 95, 99):
        place = min(len(times) - 1, len(times) * percentile // 100)
        values[f"p{percentile}"] = times[place]
    return values


@contextlib.contextmanager
def service(model_dir: str, index: str, flags: tuple[str, ...]) -> Iterator[int]:
    """Start the service as its users do, and yield its port."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, f"{ROOT}/deploy/serving/server.py", "--device", "cpu", "--port", "0", "--model_dir",
             model_dir, "--index_path", index, *flags], stderr=log, stdout=subprocess.DEVNULL)
        try:
            address = "http://127.0.0.1:"
            stderr = ""
            while address not in stderr:
                if process.poll() is not None:
                    raise console.InputError(f"server.py ended:\n{stderr}")
                time.sleep(0.2)
                log.seek(0)
                stderr = log.read()
            yield int(stderr.split(address)[1].split(",")[0])
        finally:
            process.terminate()
            process.wait()


def prepare(bench: Bench, encoder: str, checkpoint: str) -> tuple[str, str]:
    """Export the model and build an index of 1,000 documents, and return their folders."""
    folder = f"{bench.scratch}/serving_{encoder}"
    os.makedirs(folder)
    with open(f"{folder}/corpus.csv", "w", encoding="utf-8") as file:
        file.writelines(text + "\n" for text in bench.texts("corpus", 1000))
    bench.run_stage("recall.py", "--params_path", checkpoint, "--corpus_file", f"{folder}/corpus.csv", "--query", "a",
                "--hybrid_bm25", "--index_path", f"{folder}/index")
    subprocess.run([sys.executable, f"{ROOT}/export_model.py", "--quiet", "--params_path", checkpoint,
                    "--output_path", f"{folder}/output"], check=True)
    return f"{folder}/output", f"{folder}/index"


def run_clients(port: int, queries: list[str], mode: str, clients: int, seconds: float) -> Values:
    """Run `load` in a process of its own."""
    arguments = json.dumps([port, queries, mode, clients, seconds])
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, input=arguments)
    if done.returncode:
        raise console.InputError(f"clients failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def measure_sides(ports: dict[tuple[str, ...], int], queries: list[str], clients: int) -> dict[str, Values]:
    """Run all sides in turn, and return their medians.

    Args:
        ports: of the services, by their flags.
        queries: the texts.
        clients: how many at a time.
    """
    passes: dict[str, list[Values]] = {name: [] for name in SIDES}
    for side in SIDES.values():
        run_clients(ports[side.flags], queries, side.mode, clients, seconds=2)  # warms up
    for _ in range(REPEATS):
        for name, side in SIDES.items():
            passes[name].append(run_clients(ports[side.flags], queries, side.mode, clients, SECONDS))
    return {name: median_values(values) for name, values in passes.items()}


def serving(bench: Bench) -> None:
    bench.make_base()
    checkpoints = {"base": bench.checkpoint, "ernie_mini_zh": bench.make_mini(),
                   "first_avg": bench.make_mini("first_avg")}
    for encoder, checkpoint in checkpoints.items():
        model_dir, index = prepare(bench, encoder, checkpoint)
        queries = bench.texts("titles", 1000)
        with contextlib.ExitStack() as running:
            ports = {}
            for side in SIDES.values():
                if side.flags not in ports:
                    ports[side.flags] = running.enter_context(service(model_dir, index, side.flags))
            for clients in CLIENTS:
                medians = measure_sides(ports, queries, clients)
                for name, other in (("batched", "one by one"), ("hybrid", "batched")):
                    for quantity, value in medians[name].items():
                        bench.add("serving", f"{encoder}, {clients} clients, {quantity}, {name} against {other}",
                                  value, medians[other][quantity], "ms" if quantity.startswith("p") else quantity)


if __name__ == "__main__":  # the process of the clients
    print(json.dumps(asyncio.run(load(*json.load(sys.stdin)))))
