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
MINUTES = {"gpu": 10, "cpu": 30}  # that all of it may take
SECONDS = {"gpu": 200, "cpu": 600}  # that a job of it may take
OK = {None: "", True: "yes", False: "NO"}


class Job(NamedTuple):
    """A function of gpu_checks.py or gpu_speed.py, and its arguments beside the scratch folder and the device."""

    module: str
    function: str
    arguments: dict


def number_formats(add_arguments: Callable[[argparse.ArgumentParser], None]) -> list[str]:
    """Return what --precision takes, of the flags that `add_arguments` adds, without auto and int8, which is for CPUs.
    """
    parser = flags.ArgumentParser("")
    add_arguments(parser)
    choices = parser._option_string_actions["--precision"].choices
    return [name for name in choices if name not in ("auto", "int8")]


def sections(device: str, cards: int) -> dict[str, list[Job]]:
    """Return the jobs of each section; those that are right or wrong come before speeds.

    Args:
        device: "cpu" or "gpu".
        cards: how many processes train.
    """
    trained = number_formats(flags.add_optimization_arguments)
    encoded = number_formats(flags.add_encode_arguments)
    if device == "gpu":
        exported = ("fp32", "bf16", "fp16")
        tensorrt = ("fp32", "fp16")
        resumed = ("fp32", "fp16")
        sizes = ("mini", "base")
    else:
        exported = ("fp32", "bf16")
        tensorrt = ()
        resumed = ("fp32",)
        sizes = ("mini",)

    def deployed(precision: str, tensorrt: bool) -> Job:
        return Job("checks", "deployed", {"size": "mini", "precision": precision, "tensorrt": tensorrt})

    return {
        "machine": [Job("checks", "machine", {})],
        "figures": [Job("checks", "figures", {"precision": name}) for name in dict.fromkeys(trained + encoded)],
        "export": [Job("checks", "exported", {"size": "mini"}), *(deployed(name, False) for name in exported),
                   *(deployed(name, True) for name in tensorrt)],
        "ranks": [Job("checks", "ranks", {"cards": cards}), Job("speed", "scaling", {"cards": cards, "size": "mini"})],
        "breaks": [Job("checks", "nan", {}), *(Job("checks", "resume", {"precision": name}) for name in resumed)],
        "step": [Job("speed", "host", {"size": size}) for size in ("6 layers", "12 layers")],
        "memory": [Job("speed", "memory", {"size": "mini"})],
        "train": [Job("speed", "train_speed", {"size": size, "precision": name}) for name in trained for size in sizes],
        "encode": [Job("speed", "encode_speed", {"size": size, "precision": name})
                   for name in encoded for size in sizes]}


def run_job(job: Job, scratch: str, device: str, seconds: float) -> Iterator[dict]:
    """Run a job, and yield the rows that it prints; if it fails or takes longer, a last row says so."""
    what = " ".join([job.function, *map(str, job.arguments.values())])
    failed = {"what": what, "unit": "", "expected": "", "ok": False}
    if seconds <= 0:
        yield {**failed, "figure": f"failed: not run, {MINUTES[device]} minutes are over"}
        return
    arguments = {"scratch": scratch, "device": device, **job.arguments}
    words = [f"{HERE}/gpu_{job.module}.py", job.function, json.dumps(arguments)]
    with (tempfile.TemporaryFile("w+", errors="replace") as log,
          subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=log, text=True,
                           start_new_session=True) as process):
        timer = threading.Timer(seconds, kill, [process])
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith("ROW "):
                    yield json.loads(line.removeprefix("ROW "))
            code = process.wait()
            in_time = timer.is_alive()
        finally:
            timer.cancel()
            kill(process)
        if code:
            log.seek(0)
            reason = last_line(log.read()) if in_time else f"it took longer than {seconds:.3g} s"
            yield {**failed, "figure": f"failed: {reason}"}


def kill(process: subprocess.Popen) -> None:
    """End a job with all processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def write_texts(scratch: str) -> None:
    """Make sample data, and the parts of it on which the recorded figures were computed."""
    folder = f"{scratch}/sample"
    subprocess.run([sys.executable, f"{ROOT}/scripts/make_sample_data.py", folder], check=True,
                   stdout=subprocess.DEVNULL)
    write_part(f"{folder}/train_unsupervised.csv", f"{folder}/train.csv", 0, 800)
    write_part(f"{folder}/train_unsupervised.csv", f"{folder}/some.csv", 800, 804)
    write_part(f"{folder}/test.csv", f"{folder}/pairs.csv", 0, 8)


def write_part(source: str, target: str, start: int, end: int) -> None:
    """Copy the lines from `start` to `end`, counted from 0, to another file."""
    with open(source, encoding="utf-8") as file:
        lines = file.readlines()[start:end]
    with open(target, "w", encoding="utf-8") as file:
        file.writelines(lines)


def format_row(section: str, row: dict) -> str:
    """Return a row of the table."""
    figure = row["figure"]
    text = f"{figure:g}" if isinstance(figure, float) else str(figure)
    with_unit = f"{text} {row['unit']}"
    return f"{section:8} {row['what']:58} {with_unit:22} {row['expected']:20} {OK[row['ok']]}".rstrip()


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(sections("cpu", 1))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SECTION",
                        help=f"sections to run, of {', '.join(names)}")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="device to run on (default: gpu, if there is one)")
    parser.add_argument("--json", default="gpu.json", help="file for the rows, in the current folder")
    parser.add_argument("--figures", default=FIGURES, help="vectors, scores and losses to compare with")
    parser.add_argument("--record", action="store_true",
                        help="write --figures, computed by this CPU in fp32, instead of comparing with them")
    args = parser.parse_args()
    if args.record and args.device == "gpu":
        parser.error("--record needs --device cpu")
    if not args.record and not os.path.isfile(args.figures):
        parser.error(f"argument --figures: {args.figures}: no such file")
    return args


def choose_device(wanted: str | None) -> tuple[str, int]:
    """Return the device, and how many processes train on it.

    Raises:
        InputError: a GPU is wanted, and there is none.
    """
    if wanted == "cpu":
        return "cpu", 2
    from simcse.device import visible_gpus

    try:
        return "gpu", len(visible_gpus())
    except console.InputError as error:
        if wanted == "gpu":
            raise
        console.log(f"everything runs on the CPU: {error}")
        return "cpu", 2


def prepare_job(jobs: list[Job]) -> Job:
    """Return the job that makes the networks that others need."""
    sizes = {"small", *(job.arguments.get("size", "small") for job in jobs)}
    return Job("checks", "prepare", {"sizes": sorted(sizes)})


def main() -> None:
    args = parse_args()
    device, cards = choose_device("cpu" if args.record else args.device)
    end = time.monotonic() + 60 * MINUTES[device]
    if args.record:
        wanted = {"record": [Job("checks", "record", {})]}
    else:
        wanted = {name: jobs for name, jobs in sections(device, cards).items() if name in args.only}
    wanted = {"prepare": [prepare_job([job for jobs in wanted.values() for job in jobs])], **wanted}
    rows = []
    console.print_result(f"{'section':8} {'what':58} {'figure':22} {'expected':20} ok")
    with tempfile.TemporaryDirectory() as scratch:
        write_texts(scratch)
        if not args.record:
            shutil.copy(args.figures, f"{scratch}/figures.json")
        for section, jobs in wanted.items():
            started = time.monotonic()
            for job in jobs:
                for row in run_job(job, scratch, device, min(SECONDS[device], end - time.monotonic())):
                    rows.append({"section": section, **row})
                    console.print_result(format_row(section, row))
            console.log(f"{section}: {time.monotonic() - started:.0f} s")
        if args.record:
            shutil.copy(f"{scratch}/figures.json", args.figures)
    wrong = sum(row["ok"] is False for row in rows)
    if not args.record:
        with files.new_file(args.json) as file:
            json.dump(rows, file, indent=1, ensure_ascii=False)
        console.log(f"wrote {args.json}; {wrong} of {len(rows)} rows are wrong")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    console.run(main)
