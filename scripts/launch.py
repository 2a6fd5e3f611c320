"""Run a script of the project on GPUs: on one GPU by itself, on several by paddle.distributed.launch.

    python scripts/launch.py --gpus 0,1,2,3 --log_dir train_log train.py --train_set_file ...

A GPU that does not exist is an error of one line before anything starts. The shell scripts use this; you may call
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
                        help="all, first, or numbers with commas between them; if CUDA_VISIBLE_DEVICES is set, of the "
                             "GPUs that it has")
    parser.add_argument("--log_dir", default="log", help="folder of the processes' logs, if there are several")
    own, command = split_words(sys.argv[1:])
    args = parser.parse_args(own)
    args.command = command
    if not command:
        parser.error("a script to run is required")
    return args


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the flags of this script, and the script to run with its flags."""
    for place, word in enumerate(words):
        if word.endswith(".py"):
            return words[:place], words[place:]
    return words, []


def choose_gpus(wanted: str, visible: Sequence[str]) -> list[str]:
    """Return the numbers of the GPUs to use.

    Args:
        wanted: "all", "first", or numbers with commas between them.
        visible: the numbers of the GPUs that this process may use.

    Raises:
        InputError: a GPU does not exist, or is named twice.
    """
    if wanted == "all":
        return list(visible)
    if wanted == "first":
        return list(visible[:1])
    chosen = [number.strip() for number in wanted.split(",")]
    for number in chosen:
        if number not in visible:
            verb = "is" if len(visible) == 1 else "are"
            where = " by CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
            raise console.InputError(f"GPUS={wanted}: no GPU {number or 'without a number'}; there {verb} "
                                     f"{','.join(visible)}{where}")
        if chosen.count(number) > 1:
            raise console.InputError(f"GPUS={wanted}: GPU {number} is named twice")
    return chosen


def main() -> None:
    """Replace this process with the script, or with the launcher."""
    args = parse_args()
    from simcse.device import visible_gpus

    chosen = choose_gpus(args.gpus, visible_gpus())
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    words = [sys.executable, "-u"]
    if len(chosen) > 1:
        # The environment may have tokens in it. The launcher writes it to files of this folder, and prints it at level
        # ERROR if a process fails. What the processes themselves print is shown at any level.
        os.makedirs(args.log_dir, mode=0o700, exist_ok=True)
        words += ["-m", "paddle.distributed.launch", "--gpus", ",".join(chosen), "--log_level", "CRITICAL",
                  "--log_dir", args.log_dir]
    os.execv(sys.executable, [*words, *args.command])


if __name__ == "__main__":
    console.run(main)
