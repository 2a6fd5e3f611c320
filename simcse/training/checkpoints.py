"""The folder of a run's checkpoints, model_<step>: which it has, which can be resumed, and which of them stay.

With --save_best the folder also has model_best, which is not one of them: no run is resumed from it, and it is not
removed with old checkpoints.

This file imports no paddle, so that flags can be parsed without loading paddle.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

from simcse.console import InputError

# What a run is resumed from, in its newest checkpoint; `state` writes and reads it.
STATE_FILE = "training_state.safetensors"
STATE_RECORD = "training_state.json"


def checkpoint_path(save_dir: str, step: int) -> str:
    """Return the path of the checkpoint of a step."""
    return os.path.join(save_dir, f"model_{step}")


def best_path(save_dir: str) -> str:
    """Return the path of the checkpoint of the best evaluation."""
    return os.path.join(save_dir, "model_best")


def saved_steps(save_dir: str) -> list[int]:
    """Return the steps of the checkpoints model_<step> in a folder, rising."""
    if not os.path.isdir(save_dir):
        return []
    matches = [re.fullmatch(r"model_(\d+)", name) for name in os.listdir(save_dir)]
    return sorted(int(match[1]) for match in matches if match)


def newest_resumable(save_dir: str) -> str | None:
    """Return the newest checkpoint in a folder that training can be resumed from; None if there is none."""
    for step in reversed(saved_steps(save_dir)):
        folder = checkpoint_path(save_dir, step)
        if os.path.isfile(os.path.join(folder, STATE_RECORD)):
            return folder
    return None


def prepare_save_dir(save_dir: str, needed: int) -> None:
    """Make the folder of the checkpoints, and remove what a killed run left half written.

    Args:
        save_dir: the folder.
        needed: bytes of a checkpoint.

    Raises:
        InputError: it is no folder, not writable, or on a disk with less space than that.
    """
    try:
        os.makedirs(save_dir, exist_ok=True)
        for unfinished in Path(save_dir).glob(".model_*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        tempfile.TemporaryFile(dir=save_dir).close()
    except OSError as error:
        raise InputError(f"--save_dir {save_dir}: {(error.strerror or str(error)).lower()}") from None
    free = shutil.disk_usage(save_dir).free
    if free < needed:
        raise InputError(f"--save_dir {save_dir}: {free / 1e9:.1f} GB are free, and a checkpoint takes "
                         f"{needed / 1e9:.1f} GB")


def remove_old(save_dir: str, step: int, keep: int) -> None:
    """Remove old checkpoints, of which the newest `keep` stay, and the training state of all but the newest.

    Checkpoints after `step`, which another run has left, stay as they are.

    Args:
        save_dir: folder of the checkpoints.
        step: of the newest.
        keep: how many stay; 0: all.
    """
    steps = [saved for saved in saved_steps(save_dir) if saved <= step]
    kept = steps[-keep:] if keep else steps
    for old in kept[:-1]:
        for name in (STATE_RECORD, STATE_FILE):
            Path(checkpoint_path(save_dir, old), name).unlink(missing_ok=True)
    for old in steps[: len(steps) - len(kept)]:
        # Renamed first, so that a kill leaves no half of it under its name.
        folder = Path(checkpoint_path(save_dir, old))
        shutil.rmtree(folder.rename(folder.with_name(f".model_{old}.tmp")))
