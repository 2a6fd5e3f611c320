"""Run a script of the project on GPUs: on one GPU by itself, on several by paddle.distributed.launch.

    python scripts/launch.py --gpus 0,1,2,3 --log_dir train_log train.py --train_set_file ...

A GPU that is not there is an error of one line before anything starts. The shell scripts use this; a person may call
paddle.distributed.launch as well.
"""

import argparse
import os
import sys
from collections.abc import Sequence

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from simcse import console, flags


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", default="all",
                        help="all, first, or numbers with commas between them, of those in CUDA_VISIBLE_DEVICES where "
                             "it is set")
    parser.add_argument("--log_dir", default="log", help="folder of the processes' logs, where there are several")
    script = next((place for place, word in enumerate(sys.argv) if place and word.endswith(".py")), len(sys.argv))
    args = parser.parse_args(sys.argv[1:script])
    args.command = sys.argv[script:]
    if not args.command:
        parser.error("a script to run is required")
    return args


def choose_gpus(asked: str, visible: Sequence[str]) -> list[str]:
    """The GPUs that `asked` means, "all", "first" or numbers, of the `visible` ones; InputError where it names one that
    is not there, or one twice."""
    if asked == "all":
        return list(visible)
    if asked == "first":
        return list(visible[:1])
    chosen = [number.strip() for number in asked.split(",")]
    for number in chosen:
        if number not in visible:
            where = " by CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
            raise console.InputError(f"GPUS={asked}: no GPU {number or 'without a number'}; there "
                                     f"{'is' if len(visible) == 1 else 'are'} {','.join(visible)}{where}")
        if chosen.count(number) > 1:
            raise console.InputError(f"GPUS={asked}: GPU {number} is named twice")
    return chosen


def main() -> None:
    """Replace this process by the script, or by the launcher."""
    args = parse_args()
    from simcse.device import visible_gpus

    chosen = choose_gpus(args.gpus, visible_gpus())
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    words = [sys.executable, "-u"]
    if len(chosen) > 1:
        # The launcher writes the environment into files of that folder, and prints it, at ERROR, where a process fails;
        # tokens may be in it. What the processes themselves print is shown at any level.
        os.makedirs(args.log_dir, mode=0o700, exist_ok=True)
        words += ["-m", "paddle.distributed.launch", "--gpus", ",".join(chosen), "--log_level", "CRITICAL",
                  "--log_dir", args.log_dir]
    os.execv(sys.executable, [*words, *args.command])


if __name__ == "__main__":
    console.run(main)
