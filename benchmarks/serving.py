"""`python benchmarks/run.py serving`: the search service under load, batching of concurrent requests against one run a
request, and the fusion with BM25 against embeddings alone.

All sides are the same service, one with --max_batch 1. Clients are connections of another process on the same machine,
each of which asks for the 10 best documents of one query and, answered, asks again.
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

from bench import ROOT, Bench
from simcse import console

SIDES = {"batched": ((), "embedding"), "one by one": (("--max_batch", "1"), "embedding"), "hybrid": ((), "hybrid")}
CLIENTS, SECONDS, REPEATS = (1, 8, 64), 6, 3


async def ask_on(port: int, queries: list[str], mode: str, first: int, end: float) -> list[float]:
    """Ask over one connection until `end`: the seconds of each answer. Anything but 200 is an error."""
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
    """So many clients at once: answers a second, and quantiles of the time of an answer in ms."""
    start = time.perf_counter()
    each = await asyncio.gather(*(ask_on(port, queries, mode, client * 7919, start + seconds)
                                  for client in range(clients)))
    took, times = time.perf_counter() - start, sorted(1000 * second for some in each for second in some)
    return {"answers/s": len(times) / took,
            **{f"p{part}": times[min(len(times) - 1, len(times) * part // 100)] for part in (50, 95, 99)}}


@contextlib.contextmanager
def service(model_dir: str, index: str, flags: tuple[str, ...]) -> Iterator[int]:
    """The service as its users start it; its port."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, f"{ROOT}/deploy/serving/server.py", "--device", "cpu", "--port", "0", "--model_dir",
             model_dir, "--index_path", index, *flags], stderr=log, stdout=subprocess.DEVNULL)
        try:
            while "http://127.0.0.1:" not in (said := log.seek(0) or log.read()):
                if process.poll() is not None:
                    raise console.InputError(f"server.py ended:\n{said}")
                time.sleep(0.2)
            yield int(said.split("http://127.0.0.1:")[1].split(",")[0])
        finally:
            process.terminate()
            process.wait()


def prepare(bench: Bench, encoder: str, checkpoint: str) -> tuple[str, str]:
    """An exported model, and the index of 1,000 documents."""
    folder = f"{bench.scratch}/serving_{encoder}"
    os.makedirs(folder)
    with open(f"{folder}/corpus.csv", "w", encoding="utf-8") as file:
        file.writelines(text + "\n" for text in bench.texts("corpus", 1000))
    bench.stage("recall.py", "--params_path", checkpoint, "--corpus_file", f"{folder}/corpus.csv", "--query", "a",
                "--hybrid_bm25", "--index_path", f"{folder}/index")
    subprocess.run([sys.executable, f"{ROOT}/export_model.py", "--quiet", "--params_path", checkpoint,
                    "--output_path", f"{folder}/output"], check=True)
    return f"{folder}/output", f"{folder}/index"


def serving(bench: Bench) -> None:
    bench.base()
    for encoder, checkpoint in (("base", bench.checkpoint), ("ernie_mini_zh", bench.mini()),
                                ("first_avg", bench.mini("first_avg"))):
        model_dir, index = prepare(bench, encoder, checkpoint)
        queries = bench.texts("titles", 1000)
        with contextlib.ExitStack() as running:
            ports = {flags: running.enter_context(service(model_dir, index, flags)) for flags, _ in SIDES.values()}

            def run(side: str, clients: int, seconds: float) -> dict[str, float]:
                flags, mode = SIDES[side]
                asked = json.dumps([ports[flags], queries, mode, clients, seconds])  # noqa: B023
                done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, input=asked)
                if done.returncode:
                    raise console.InputError(f"clients failed:\n{done.stderr[-2000:]}")
                return json.loads(done.stdout)

            for clients in CLIENTS:
                for side in SIDES:
                    run(side, clients, 2)  # warms up
                runs = {side: [] for side in SIDES}
                for _ in range(REPEATS):
                    for side, done in runs.items():
                        done.append(run(side, clients, SECONDS))
                middle = {side: {name: sorted(run[name] for run in done)[REPEATS // 2] for name in done[0]}
                          for side, done in runs.items()}
                for side, other in (("batched", "one by one"), ("hybrid", "batched")):
                    for name, value in middle[side].items():
                        bench.add("serving", f"{encoder}, {clients} clients, {name}, {side} against {other}", value,
                                  middle[other][name], "ms" if name.startswith("p") else name)


if __name__ == "__main__":  # the process of the clients
    print(json.dumps(asyncio.run(load(*json.load(sys.stdin)))))
