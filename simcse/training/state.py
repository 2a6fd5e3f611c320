"""Save and restore the state of a run, so that --resume continues it."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from simcse.console import InputError
from simcse.encoder.weights import read_weights, write_weights
from simcse.files import read_json, write_json
from simcse.training.best import BestEvaluation
from simcse.training.checkpoints import STATE_FILE, STATE_RECORD
from simcse.training.optimization import Optimization, restore_scaler, scaler_record

import paddle
from paddle import nn

# Flags that were removed since, with the value at which they had no effect; a run with another one cannot be resumed.
# mlm_probability was once a flag of train.py; now it is one of pretrain.py alone.
REMOVED_FLAGS = {"objective": "contrastive", "mlm_probability": None, "dup_rate": 0.0, "matryoshka_dims": None,
                 "distill_from": None, "distill_weight": None, "gradient_accumulation_steps": 1,
                 "gradient_cache": False, "use_recompute": False}
PROCESSES = "number of processes"  # a setting that is no flag
TRAINING_FILE = "train_set_file"  # a setting whose value is the digest of the file


@dataclass(frozen=True)
class RunSettings:
    """What a resumed run has to share with the run that left its checkpoint.

    Attributes:
        values: by the names of the flags, and PROCESSES.
        defaults: what they were in runs that are too old to have recorded them.
    """

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
        step: steps that are done.
        best: its best evaluation so far.
    """

    step: int
    best: BestEvaluation


def write_state(folder: str, model: nn.Layer, optimization: Optimization, *, progress: Progress,
                settings: RunSettings) -> None:
    """Write the state of a run: the optimizer's moments, by the names of the model's parameters, and a record of its
    progress, schedule, loss scaler and settings."""
    state = optimization.optimizer.state_dict()
    moments = {}
    for name, parameter in model.named_parameters():
        prefix = parameter.name + "_"  # paddle's own name, which is another in every process
        for key, tensor in state.items():
            if key.startswith(prefix):
                moments[f"{name}|{key.removeprefix(prefix)}"] = tensor
    write_weights(os.path.join(folder, STATE_FILE), moments)
    write_json(os.path.join(folder, STATE_RECORD), {
        "step": progress.step, "best": asdict(progress.best), "run": dict(settings.values),
        "scaler": scaler_record(optimization.scaler), "schedule": state["LR_Scheduler"]})


def restore_state(folder: str, model: nn.Layer, optimization: Optimization, settings: RunSettings) -> Progress:
    """Restore the state that `write_state` wrote: of optimizer, schedule and loss scaler.

    Args:
        folder: a checkpoint's.
        model: the network, which has that checkpoint's weights.
        optimization: is changed.
        settings: of this run.

    Returns:
        How far the run had come when the checkpoint was saved.

    Raises:
        InputError: the state is of a run with other settings.
    """
    record = read_json(os.path.join(folder, STATE_RECORD))
    check_settings(folder, settings, record["run"])
    names = {name: parameter.name for name, parameter in model.named_parameters()}
    state = {"LR_Scheduler": record["schedule"]}
    for key, array in read_weights(os.path.join(folder, STATE_FILE), "--resume").items():
        name, moment = key.rsplit("|", 1)
        state[f"{names[name]}_{moment}"] = paddle.to_tensor(array)
    optimization.optimizer.set_state_dict(state)
    if record["scaler"]:
        restore_scaler(optimization.scaler, record["scaler"])
    best = BestEvaluation(**record.get("best", {}))  # a state older than --save_best has none
    return Progress(record["step"], best)


def check_settings(folder: str, settings: RunSettings, recorded: Mapping[str, Any]) -> None:
    """Raise InputError where the run that left a checkpoint had other settings, so that it cannot be resumed.

    Args:
        folder: the checkpoint's, for the message.
        settings: of this run.
        recorded: settings of the run that left the checkpoint, by name.
    """
    differences = []
    for name, value in settings.values.items():
        before = recorded.get(name, settings.defaults.get(name))
        if value != before:
            differences.append(_describe_difference(name, value, before, settings.defaults))
    for name, before in recorded.items():
        is_known = name in settings.values
        changed_nothing = name in REMOVED_FLAGS and before == REMOVED_FLAGS[name]
        if not is_known and not changed_nothing:
            differences.append(f"the checkpoint has --{name} {before}, which this version does not have")
    if differences:
        raise InputError(f"--resume {folder}: different settings: {'; '.join(differences)}. Give the same flags, or "
                         "start a new run from its weights with --init_from_ckpt")


def _describe_difference(name: str, value: Any, before: Any, defaults: Mapping[str, Any]) -> str:
    """Return how a setting differs; a default is marked, since the flag that sets it may just have been left out."""
    if name == TRAINING_FILE:  # digests tell a user nothing
        return f"--{name} is another file than the checkpoint's"
    setting = f"the {name}" if name == PROCESSES else f"--{name}"
    marks = ["", ""]
    if name in defaults:
        marks = [" (default)" if each == defaults[name] else "" for each in (value, before)]
    return f"{setting} is {value}{marks[0]}, the checkpoint has {before}{marks[1]}"
