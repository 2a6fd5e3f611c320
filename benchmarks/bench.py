"""What the measurements share: both sides in processes of their own, scratch files, rows."""

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from simcse import console  # noqa: E402
from simcse.text import textfile  # noqa: E402

MINI = os.path.join(ROOT, "pretrained", "ernie_mini_zh")
BASE = {"vocab_size": 17964, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "hidden_act": "relu", "max_position_embeddings": 513}
FILES = {"titles": "dev.csv", "corpus": "corpus.csv", "training": "train_unsupervised.csv"}
LESS_IS_BETTER = ("s", "ms", "MB")

Values = dict[str, float]  # of one pass, by case


class Stage(NamedTuple):
    """What a stage took."""

    seconds: float
    peak_mb: float
    stderr: str


class Bench:
    """The arguments, a scratch folder with encoder and checkpoint, the texts, and the rows measured so far."""

    def __init__(self, args: argparse.Namespace, scratch: str) -> None:
        self.args = args
        self.scratch = scratch
        self.machine = describe_machine()
        self.rows: list[dict] = []
        self.encoder = f"{scratch}/encoder"
        self.checkpoint = f"{scratch}/checkpoint"
        self.processes = contextlib.ExitStack()  # of `passes`; closed after each measurement

    def texts(self, kind: str, most: int) -> list[str]:
        """Return up to `most` texts, evenly spaced over the file; of pairs the first text."""
        with open(os.path.join(self.args.data_dir, FILES[kind]), encoding="utf-8") as file:
            texts = textfile.distinct(line.split("\t")[0].strip() for line in file if line.strip())
        step = max(1, len(texts) // most)
        return texts[::step][:most]

    def write(self, name: str, texts: Iterable[str]) -> str:
        """Write texts to a scratch file, one a line, and return its path."""
        path = f"{self.scratch}/{name}"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(text + "\n" for text in texts)
        return path

    def make_base(self) -> None:
        """Make the encoder and the checkpoint of ERNIE-base's dimensions, if they do not exist."""
        if not os.path.isdir(self.checkpoint):
            self.run_side("ours", "prepare", folder=self.scratch, sizes=BASE, vocab_folder=MINI)

    def make_mini(self, pooling: str | None = None) -> str:
        """Return a checkpoint of ernie_mini_zh, which train.py makes the first time.

        Args:
            pooling: whitened embeddings of this pooling; None: the pooler with fc.
        """
        folder = f"{self.scratch}/mini_{pooling}"
        if pooling:
            name = "model_0_whitened"
            flags = ["--pooling", pooling, "--whiten", "--max_seq_length", 512]
        else:
            name = "model_0"
            flags = ["--output_emb_size", 256, "--infer_with_fc_pooler"]
        if not os.path.isdir(folder):
            self.run_stage("train.py", "--epochs", 0, "--model_name_or_path", MINI, *flags, "--save_dir", folder,
                           "--visualdl_dir", f"{self.scratch}/log", "--train_set_file",
                           os.path.join(self.args.data_dir, FILES["training"]))
        return f"{folder}/{name}"

    def run_side(self, module: str, function: str, env: dict | None = None, python: str = sys.executable,
                 **arguments) -> Values:
        """Run a function of ours.py, original.py or peer.py in a process of its own, and return its values."""
        with self._start_side(module, function, env, python) as ask:
            return ask(json.dumps(arguments))

    def passes(self, module: str, function: str, env: dict | None = None, python: str = sys.executable,
               **arguments) -> Callable[[], Values]:
        """Start a function that measures pass by pass, and return what runs its next pass and returns its values.

        The first pass is not counted. The process stays until the measurement ends, so that sides take turns at short
        intervals.
        """
        ask = self.processes.enter_context(self._start_side(module, function, env, python))
        ask(json.dumps(arguments))
        return lambda: ask("")

    @contextlib.contextmanager
    def _start_side(self, module: str, function: str, env: dict | None,
                    python: str) -> Iterator[Callable[[str], Values]]:
        """Start a process for a function, and yield what sends it a line and returns the values that it answers.

        `side.serve` reads the lines: first the arguments, then a line for each further pass.
        """
        with tempfile.TemporaryFile("w+") as log, subprocess.Popen(
                [python, f"{HERE}/{module}.py", function], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, env={**os.environ, **(env or {})}) as process:
            def ask(line: str) -> Values:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(line + "\n")
                    process.stdin.flush()
                for answer in process.stdout:
                    if answer.startswith("RESULT "):
                        return json.loads(answer.removeprefix("RESULT "))
                log.seek(0)
                raise console.InputError(f"{module}.py {function} failed:\n{log.read()[-2000:]}")

            yield ask

    def run_stage(self, script: str, *flags) -> Stage:
        """Run a script of the project on the CPU."""
        with tempfile.TemporaryFile("w+") as log:
            start = time.perf_counter()
            process = subprocess.Popen([sys.executable, f"{ROOT}/{script}", "--device", "cpu", *map(str, flags)],
                                       stdout=subprocess.DEVNULL, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            log.seek(0)
            stderr = log.read()
        if status:
            raise console.InputError(f"{script} failed:\n{stderr[-2000:]}")
        return Stage(seconds, usage.ru_maxrss / 1024, stderr)

    def add(self, name: str, case: str, ours: float, reference: float, unit: str) -> None:
        """Add and print a row; its ratio is above 1 where this project is better."""
        ratio = reference / ours if unit in LESS_IS_BETTER else ours / reference
        self.rows.append({"name": name, "case": case, "ours": round(ours, 4), "reference": round(reference, 4),
                          "ratio": round(ratio, 3), "unit": unit, "machine": self.machine})
        print(f"{name:9} {case:66} {ours:10.4g} {reference:10.4g} {unit:10} {ratio:7.2f}", flush=True)

    def measure_in_turn(self, name: str, unit: str | dict[str, str], repeats: int, ours: Callable[[], Values],
                        references: dict[str, Callable[[], Values]]) -> None:
        """Run all sides in turn, and add a row of medians for each case and reference.

        Args:
            name: of the measurement.
            unit: of all cases, or by case.
            repeats: passes of each side.
            ours: runs a pass of this project.
            references: by name, run a pass of what it is compared with.
        """
        our_passes = []
        reference_passes: dict[str, list[Values]] = {reference: [] for reference in references}
        for _ in range(repeats):
            our_passes.append(ours())
            for reference, run in references.items():
                reference_passes[reference].append(run())
        our_medians = median_values(our_passes)
        for reference, passes in reference_passes.items():
            for case, value in median_values(passes).items():
                self.add(name, f"{case}, against {reference}", our_medians[case], value,
                         unit if isinstance(unit, str) else unit[case])


@contextlib.contextmanager
def start_milvus(scratch: str) -> Iterator[Any]:
    """Start a Milvus server with an empty folder, which is in `scratch`, and end it."""
    sys.path.append(f"{ROOT}/tests")
    from milvus_server import MilvusServer

    server = MilvusServer(tempfile.mkdtemp(dir=scratch), environment={})
    try:
        yield server.start()
    finally:
        server.stop()
        shutil.rmtree(server.folder)


def median_values(passes: list[Values]) -> Values:
    """Return the median of every case; of an even number of passes the lower one in the middle; NaN if one is NaN."""
    medians = {}
    for case in passes[0]:
        values = sorted(values[case] for values in passes)
        medians[case] = math.nan if any(map(math.isnan, values)) else values[(len(values) - 1) // 2]
    return medians


def describe_machine() -> str:
    """Return the number and the model of the processors, the system and the version of Python."""
    model = platform.processor()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":")[1].strip()
                break
    return f"{os.cpu_count()} x {model}, {platform.system()}, Python {platform.python_version()}"
