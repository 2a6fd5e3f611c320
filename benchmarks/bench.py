"""What the measurements share: both sides in processes of their own, scratch files, rows."""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

from simcse import console  # noqa: E402
from simcse.text import textfile  # noqa: E402

MINI = os.path.join(ROOT, "pretrained", "ernie_mini_zh")
BASE = {"vocab_size": 17964, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "hidden_act": "relu", "max_position_embeddings": 513}
FILES = {"titles": "dev.csv", "corpus": "corpus.csv", "training": "train_unsupervised.csv"}


class Bench:
    """What the measurements share: arguments, a scratch folder with encoder and checkpoint, texts, rows."""

    def __init__(self, args: argparse.Namespace, scratch: str) -> None:
        self.args, self.scratch, self.rows, self.machine = args, scratch, [], describe_machine()
        self.encoder, self.checkpoint = f"{scratch}/encoder", f"{scratch}/checkpoint"
        self.processes = contextlib.ExitStack()

    def texts(self, kind: str, most: int) -> list[str]:
        """Up to `most` texts, taken evenly over the file; of pairs the first."""
        with open(os.path.join(self.args.data_dir, FILES[kind]), encoding="utf-8") as file:
            texts = textfile.distinct(line.split("\t")[0].strip() for line in file if line.strip())
        return texts[:: max(1, len(texts) // most)][:most]

    def write(self, name: str, texts: Iterable[str]) -> str:
        """The path of a scratch file of texts, one a line."""
        path = f"{self.scratch}/{name}"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(text + "\n" for text in texts)
        return path

    def base(self) -> None:
        """Make the encoder and the checkpoint of ERNIE-base's dimensions, once."""
        if not os.path.isdir(self.checkpoint):
            self.side("ours", "prepare", folder=self.scratch, sizes=BASE, vocab_folder=MINI)

    def mini(self, pooling: str | None = None) -> str:
        """A checkpoint of ernie_mini_zh, made once by train.py: its pooler with fc, or another pooling, whitened."""
        folder = f"{self.scratch}/mini_{pooling}"
        vectors = (("--pooling", pooling, "--whiten", "--max_seq_length", 512) if pooling else
                   ("--output_emb_size", 256, "--infer_with_fc_pooler"))
        if not os.path.isdir(folder):
            self.stage("train.py", "--epochs", 0, "--model_name_or_path", MINI, *vectors, "--save_dir", folder,
                       "--visualdl_dir", f"{self.scratch}/log", "--train_set_file",
                       os.path.join(self.args.data_dir, FILES["training"]))
        return f"{folder}/model_0" + "_whitened" * bool(pooling)

    def side(self, module: str, function: str, env: dict | None = None, python: str = sys.executable,
             **arguments) -> dict[str, float]:
        """Run a function of ours.py, original.py or peer.py in a process of its own."""
        with self._process(module, function, env, python, arguments) as (_, figures):
            return figures

    def passes(self, module: str, function: str, env: dict | None = None, python: str = sys.executable,
               **arguments) -> Callable[[], dict[str, float]]:
        """A function of theirs that measures pass by pass, as one that gives the figures of the next pass, a first one
        not counted. Its process stays until the measurement ends, so that sides take turns at short intervals."""
        next_pass, _ = self.processes.enter_context(self._process(module, function, env, python, arguments))
        return next_pass

    @contextlib.contextmanager
    def _process(self, module: str, function: str, env: dict | None, python: str,
                 arguments: dict) -> Iterator[tuple[Callable[[], dict[str, float]], dict[str, float]]]:
        def ask(line: str) -> dict[str, float]:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line + "\n")
                process.stdin.flush()
            for answer in process.stdout:
                if answer.startswith("RESULT "):
                    return json.loads(answer.removeprefix("RESULT "))
            log.seek(0)
            raise console.InputError(f"{module}.py {function} failed:\n{log.read()[-2000:]}")

        with tempfile.TemporaryFile("w+") as log, subprocess.Popen(
                [python, f"{HERE}/{module}.py", function], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, env={**os.environ, **(env or {})}) as process:
            figures = ask(json.dumps(arguments))
            yield lambda: ask(""), figures

    def stage(self, script: str, *flags) -> tuple[float, float, str]:
        """Run a stage on the CPU: seconds, peak memory in MB, stderr."""
        with tempfile.TemporaryFile("w+") as log:
            start = time.perf_counter()
            process = subprocess.Popen([sys.executable, f"{ROOT}/{script}", "--device", "cpu", *map(str, flags)],
                                       stdout=subprocess.DEVNULL, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            log.seek(0)
            text = log.read()
        if status:
            raise console.InputError(f"{script} failed:\n{text[-2000:]}")
        return seconds, usage.ru_maxrss / 1024, text

    def add(self, name: str, case: str, ours: float, reference: float, unit: str) -> None:
        """A row; less is better for times and memory, more for everything else."""
        ratio = reference / ours if unit in ("s", "ms", "MB") else ours / reference
        self.rows.append({"name": name, "case": case, "ours": round(ours, 4), "reference": round(reference, 4),
                          "ratio": round(ratio, 3), "unit": unit, "machine": self.machine})
        print(f"{name:9} {case:66} {ours:10.4g} {reference:10.4g} {unit:10} {ratio:7.2f}", flush=True)

    def in_turn(self, name: str, unit: str | dict[str, str], repeats: int, ours: Callable,
                references: dict[str, Callable]) -> None:
        """Both sides in turn, `repeats` times; a row for each case and reference, of medians. `unit` may be one for
        each case."""
        sides = {"": ours, **references}
        runs = {side: [] for side in sides}
        for _ in range(repeats):
            for side, run in sides.items():
                runs[side].append(run())
        middle = {side: {case: sorted(run[case] for run in done)[(len(done) - 1) // 2] for case in done[0]}
                  for side, done in runs.items()}
        for reference in references:
            for case, value in middle[reference].items():
                self.add(name, f"{case}, against {reference}", middle[""][case], value,
                         unit if isinstance(unit, str) else unit[case])


def describe_machine() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "")
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} x {model or platform.processor()}, {system}"
