"""What a run leaves in its folder of checkpoints besides the network, so that --resume can go on from there."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simcse.console import InputError
from simcse.encoder.weights import STATE_FILE, STATE_RECORD, read_weights, saved_steps, write_weights
from simcse.files import read_json, write_json
from simcse.training.optimization import Optimization, restore_scaler, scaler_record

import paddle
from paddle import nn

# Flags that earlier versions recorded and this one does not have, with the value by which they changed nothing.
REMOVED_FLAGS = {"objective": "contrastive", "mlm_probability": None, "dup_rate": 0.0, "matryoshka_dims": None,
                 "distill_from": None, "distill_weight": None, "gradient_accumulation_steps": 1,
                 "gradient_cache": False, "use_recompute": False}


def write_state(folder: str, model: nn.Layer, optimization: Optimization, *, step: int,
                settings: Mapping[str, Any]) -> None:
    """Write the state of a run: the optimizer's moments, by the names of the model's parameters, and a record of its
    step, schedule, loss scaler and settings."""
    state = optimization.optimizer.state_dict()
    moments = {}
    for name, parameter in model.named_parameters():
        prefix = parameter.name + "_"  # paddle's own name, which is another in every process
        for key, tensor in state.items():
            if key.startswith(prefix):
                moments[f"{name}|{key.removeprefix(prefix)}"] = tensor
    write_weights(os.path.join(folder, STATE_FILE), moments)
    write_json(os.path.join(folder, STATE_RECORD), {
        "step": step, "run": dict(settings), "scaler": scaler_record(optimization.scaler),
        "schedule": state["LR_Scheduler"]})


def read_state(folder: str, model: nn.Layer, optimization: Optimization, *, settings: Mapping[str, Any],
               defaults: Mapping[str, Any]) -> int:
    """Give optimizer, schedule and loss scaler the state that `write_state` wrote, and return its step.

    Args:
        folder: a checkpoint's.
        model: the network, which has that checkpoint's weights.
        optimization: gets the state.
        settings: see `check_settings`.
        defaults: the same.

    Raises:
        InputError: the state is of a run with other settings.
    """
    record = read_json(os.path.join(folder, STATE_RECORD))
    check_settings(folder, settings, record["run"], defaults)
    names = {name: parameter.name for name, parameter in model.named_parameters()}
    state = {"LR_Scheduler": record["schedule"]}
    for key, array in read_weights(os.path.join(folder, STATE_FILE), "--resume").items():
        name, moment = key.rsplit("|", 1)
        state[f"{names[name]}_{moment}"] = paddle.to_tensor(array)
    optimization.optimizer.set_state_dict(state)
    if record["scaler"]:
        restore_scaler(optimization.scaler, record["scaler"])
    return record["step"]


def check_settings(folder: str, settings: Mapping[str, Any], recorded: Mapping[str, Any],
                   defaults: Mapping[str, Any]) -> None:
    """Raise InputError where a run cannot go on from a checkpoint, since its settings are not those of the run that
    left it.

    Args:
        folder: the checkpoint's, for the message.
        settings: those of this run, by name.
        recorded: those of the run that left the checkpoint.
        defaults: what settings were in runs that are too old to have recorded them.
    """
    changes = []
    for name, value in settings.items():
        before = recorded.get(name, defaults.get(name))
        if value == before:
            continue
        is_digest = name == "train_set_file"
        changes.append(name if is_digest else f"{name} {value} instead of {before}")
    for name, before in recorded.items():
        if name not in settings and (name not in REMOVED_FLAGS or before != REMOVED_FLAGS[name]):
            changes.append(f"{name} {before}, which this version does not have")
    if changes:
        raise InputError(f"--resume {folder}: its run had another {', '.join(changes)}; give the same flags, or start "
                         "a new run from its weights with --init_from_ckpt")


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
    """Remove all but the newest checkpoints up to a step, and the state of all but the newest.

    Args:
        save_dir: folder of the checkpoints.
        step: of the newest.
        keep: how many stay; 0: all.
    """
    steps = [saved for saved in saved_steps(save_dir) if saved <= step]
    kept = steps[-keep:]  # all of them where `keep` is 0
    for old in steps[:-1]:
        folder = Path(save_dir, f"model_{old}")
        if old in kept:
            for name in (STATE_RECORD, STATE_FILE):
                (folder / name).unlink(missing_ok=True)
        else:
            # Renamed first, so that a kill leaves no half of it under its name.
            shutil.rmtree(folder.rename(folder.with_name(f".model_{old}.tmp")))
