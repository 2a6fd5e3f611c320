"""Whether everything of this project works on the GPUs of a machine, and how fast; without a GPU all of it on its CPU.

    python benchmarks/gpu.py                      # under ten minutes; on two cores of a CPU about two
    python benchmarks/gpu.py --only figures ranks # some of its sections

Only what is committed is needed, and no network: texts and weights are generated. It prints a table, and writes the
rows to --json. Exit code 1 says that a figure is not what is expected, or could not be found.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from bench import HERE, ROOT
from simcse import console, files, flags

from gpu_jobs import last_line

FIGURES = os.path.join(HERE, "gpu_figures.json")
MINUTES, SECONDS = {"gpu": 10, "cpu": 30}, {"gpu": 200, "cpu": 600}  # that all of it, and a job of it, may take


class Job(NamedTuple):
    """A function of gpu_checks.py or gpu_speed.py, and its arguments beside the scratch folder and the device."""

    module: str
    function: str
    arguments: dict


def number_formats(add_arguments: Callable[[argparse.ArgumentParser], None]) -> list[str]:
    """What --precision may be of the flags that are added, but for `auto`, and `int8`, which is for CPUs."""
    add_arguments(parser := flags.ArgumentParser(""))
    action = next(action for action in parser._actions if action.dest == "precision")
    return [name for name in action.choices if name not in ("auto", "int8")]


def sections(device: str, cards: int) -> dict[str, list[Job]]:
    """The jobs of each section; what is right or wrong comes first."""
    trained = number_formats(flags.add_optimization_arguments)
    encoded = number_formats(flags.add_encode_arguments)
    formats, exported = list(dict.fromkeys(trained + encoded)), ("fp32", "bf16", "fp16")[: 3 if device == "gpu" else 2]
    sizes = ("mini", "base")[: 2 if device == "gpu" else 1]
    return {
        "machine": [Job("checks", "machine", {})],
        "figures": [Job("checks", "figures", {"precision": each}) for each in formats],
        "export": [Job("checks", "exported", {"size": "mini"}),
                   *(Job("checks", "deployed", {"size": "mini", "precision": each, "tensorrt": False})
                     for each in exported),
                   *(Job("checks", "deployed", {"size": "mini", "precision": each, "tensorrt": True})
                     for each in ("fp32", "fp16") if device == "gpu")],
        "ranks": [Job("checks", "ranks", {"cards": cards}), Job("speed", "scaling", {"cards": cards, "size": "mini"})],
        "breaks": [Job("checks", "nan", {}), *(Job("checks", "resume", {"precision": each}) for each in ("fp32", "fp16")
                                               if each == "fp32" or device == "gpu")],
        "step": [Job("speed", "host", {"size": each}) for each in ("6 layers", "12 layers")],
        "memory": [Job("speed", "memory", {"size": "mini"})],
        "train": [Job("speed", "train_speed", {"size": size, "precision": each}) for each in trained for size in sizes],
        "encode": [Job("speed", "encode_speed", {"size": size, "precision": each}) for each in encoded
                   for size in sizes]}


def run_job(job: Job, scratch: str, device: str, seconds: float) -> Iterator[dict]:
    """Yield the rows that a job prints; where it fails, or takes longer, a last one that says so."""
    what = " ".join([job.function, *map(str, job.arguments.values())])
    failed = {"what": what, "unit": "", "expected": "", "ok": False}
    if seconds <= 0:
        yield {**failed, "figure": f"failed: not run, {MINUTES[device]} minutes are over"}
        return
    words = [f"{HERE}/gpu_{job.module}.py", job.function, json.dumps({"scratch": scratch, "device": device,
                                                                      **job.arguments})]
    with (tempfile.TemporaryFile("w+", errors="replace") as log,
          subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=log, text=True,
                           start_new_session=True) as process):
        timer = threading.Timer(seconds, kill, [process])
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith("ROW "):
                    yield json.loads(line.removeprefix("ROW "))
            code, in_time = process.wait(), timer.is_alive()
        finally:
            timer.cancel()
            kill(process)
        if code:
            log.seek(0)
            said = last_line(log.read()) if in_time else f"it took longer than {seconds:.3g} s"
            yield {**failed, "figure": f"failed: {said}"}


def kill(process: subprocess.Popen) -> None:
    """End a job with all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def write_texts(scratch: str) -> None:
    """Sample data, and of it what the recorded figures are of."""
    folder = f"{scratch}/sample"
    subprocess.run([sys.executable, f"{ROOT}/scripts/make_sample_data.py", folder], check=True,
                   stdout=subprocess.DEVNULL)
    for name, source, start, end in (("train", "train_unsupervised", 0, 800), ("some", "train_unsupervised", 800, 804),
                                     ("pairs", "test", 0, 8)):
        with open(f"{folder}/{source}.csv", encoding="utf-8") as file:
            lines = file.readlines()[start:end]
        with open(f"{folder}/{name}.csv", "w", encoding="utf-8") as file:
            file.writelines(lines)


def shown(section: str, found: dict) -> str:
    """A row of the table."""
    figure, ok = found["figure"], {None: "", True: "yes", False: "NO"}[found["ok"]]
    said = " ".join([f"{figure:g}" if isinstance(figure, float) else str(figure), found["unit"]])
    return f"{section:8} {found['what']:58} {said:22} {found['expected']:20} {ok}".rstrip()


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(sections("cpu", 1))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SECTION",
                        help=f"what to find out, of {', '.join(names)}")
    parser.add_argument("--device", choices=("cpu", "gpu"), default=None, help="None: gpu, if there is one")
    parser.add_argument("--json", default="gpu.json", help="file for the rows, in the current folder")
    parser.add_argument("--figures", default=FIGURES, help="vectors, scores and losses to compare with")
    parser.add_argument("--record", action="store_true", help="instead write --figures, by this CPU in fp32")
    args = parser.parse_args()
    if args.record and args.device == "gpu":
        parser.error("--record is of a CPU")
    if not args.record and not os.path.isfile(args.figures):
        parser.error(f"argument --figures: {args.figures}: no such file")
    return args


def choose_device(asked: str | None) -> tuple[str, int]:
    """The device and how many processes train on it; InputError where the GPU asked for is not there."""
    if asked != "cpu":
        from simcse.device import visible_gpus

        try:
            return "gpu", len(visible_gpus())
        except console.InputError as error:
            if asked:
                raise
            console.log(f"all of it on the CPU: {error}")
    return "cpu", 2


def main() -> None:
    args = parse_args()
    device, cards = choose_device("cpu" if args.record else args.device)
    end, rows = time.monotonic() + 60 * MINUTES[device], []
    wanted = {name: jobs for name, jobs in sections(device, cards).items() if name in args.only}
    if args.record:
        wanted = {"record": [Job("checks", "record", {})]}
    sizes = {"small", *(job.arguments.get("size", "small") for jobs in wanted.values() for job in jobs)}
    prepare = [Job("checks", "prepare", {"sizes": sorted(sizes)})]
    console.result(f"{'section':8} {'what':58} {'figure':22} {'expected':20} ok")
    with tempfile.TemporaryDirectory() as scratch:
        write_texts(scratch)
        if not args.record:
            shutil.copy(args.figures, f"{scratch}/figures.json")
        for section, jobs in {"prepare": prepare, **wanted}.items():
            started = time.monotonic()
            for job in jobs:
                for found in run_job(job, scratch, device, min(SECONDS[device], end - time.monotonic())):
                    rows.append({"section": section, **found})
                    console.result(shown(section, found))
            console.log(f"{section}: {time.monotonic() - started:.0f} s")
        if args.record:
            shutil.copy(f"{scratch}/figures.json", args.figures)
    wrong = sum(found["ok"] is False for found in rows)
    if not args.record:
        with files.new_file(args.json) as file:
            json.dump(rows, file, indent=1, ensure_ascii=False)
        console.log(f"wrote {args.json}; {wrong} of {len(rows)} rows are wrong")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    console.run(main)
