"""Files of weights: read without running what may be in them, written whole or not at all."""

import argparse
import contextlib
import ctypes
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from console import InputError, first_line, log
from data import TextFile, file_digest

# What paddle.save's pickles name: numpy arrays, in dicts and tuples. Anything else could run code while it is read.
_ALLOWED = {("collections", "OrderedDict"), ("builtins", "tuple"), ("_codecs", "encode"), ("numpy", "ndarray"),
            ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
_NAME_TABLE, _PARTS = "StructuredToParameterName@@", "UnpackBigParamInfor@@"


class _TensorUnpickler(pickle.Unpickler):
    """Builds arrays and what holds them, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no tensor needs; it could run code and was "
                                         "not loaded")
        return super().find_class(module, name)


def _array(value: Any) -> np.ndarray:
    """A pickled tensor: an array, or a pair of the tensor's name and its array; of bfloat16 the bits as uint16."""
    array = np.asarray(value[1] if isinstance(value, tuple) else value)
    return (array.astype("uint32") << 16).view("float32") if array.dtype == np.uint16 else array


def read_weights(path: str, flag: str) -> dict[str, np.ndarray]:
    """The arrays in a .pdparams file, as paddle.save writes it, or in a .safetensors file, by name.

    Raises:
        InputError: damaged, of another kind, or a pickle of more than tensors, of which nothing is run.
    """
    try:
        if path.endswith(".safetensors"):
            from safetensors.numpy import load_file

            return load_file(path)
        with open(path, "rb") as file:
            state = _TensorUnpickler(file).load()
        for name, parts in state.pop(_PARTS, {}).items():  # paddle cuts large arrays into pieces
            state[name] = np.concatenate([state.pop(part) for part in parts["slices"]]).reshape(parts["OriginShape"])
        state.pop(_NAME_TABLE, None)
        return {name: _array(value) for name, value in state.items()}
    except Exception as error:  # damaged files raise anything, from EOFError to AttributeError
        raise InputError(f"{flag} {path}: not a paddle checkpoint: {first_line(error)}") from None


def write_weights(path: str, state: Mapping[str, Any]) -> None:
    """Write tensors, or arrays, to a .safetensors file or, as paddle.save does, to a .pdparams file."""
    if path.endswith(".safetensors"):
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(tensor) for name, tensor in state.items()}, path)
        return
    import paddle

    paddle.save(dict(state), path)


class new_folder:
    """`with new_folder(path) as temporary:` fill it, and it becomes `path` when all is written and on the disk.

    Where `path` exists, it is exchanged for the new folder in one step. On an error the temporary folder is removed,
    and `path` stays as it was.

    Args:
        cache: whether the content can be made again, and is checked before it is used. Then nothing waits for the
            disk, and all that the folder held goes; else files of other names are kept.
    """

    def __init__(self, path: str, cache: bool = False) -> None:
        self.path, self.cache = os.path.abspath(path), cache

    def __enter__(self) -> str:
        parent, name = os.path.split(self.path)
        os.makedirs(parent, exist_ok=True)
        self.temporary = tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=parent)
        os.chmod(self.temporary, 0o755)  # nosec B103  as any folder that a user makes; mkdtemp's is closed to others
        return self.temporary

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            if kind is None and self.cache:
                self._take_the_place()
            elif kind is None:
                sync(self.temporary)
                self._take_the_place()
                sync(os.path.dirname(self.path), files=False)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _take_the_place(self) -> None:
        if not os.path.isdir(self.path):
            os.rename(self.temporary, self.path)
            return
        for name in () if self.cache else set(os.listdir(self.path)) - set(os.listdir(self.temporary)):
            copy = shutil.copytree if os.path.isdir(os.path.join(self.path, name)) else shutil.copy2
            copy(os.path.join(self.path, name), os.path.join(self.temporary, name))
        exchange(self.temporary, self.path)


def exchange(one: str, other: str) -> None:
    """Swap two folders of one file system: on Linux in one step, elsewhere in three."""
    rename_exchange, at_cwd = 2, -100
    if hasattr(libc := ctypes.CDLL(None), "renameat2") and not libc.renameat2(
            at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange):
        return
    aside = f"{one}.aside"
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


def sync(folder: str, files: bool = True) -> None:
    """Have the folder's entries, and its files, on the disk before anything is renamed."""
    paths = [os.path.join(folder, name) for name in os.listdir(folder)] if files else []
    for path in [*filter(os.path.isfile, paths), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems sync no folders
            os.fsync(descriptor)
        os.close(descriptor)


# ------------------------------------------------------------------------------------------- what training goes on from
STATE_FILE, STATE_RECORD = "training_state.safetensors", "training_state.json"


def write_training_state(folder: str, model: Any, optimizer: Any, record: dict) -> None:
    """Write the optimizer's moments, by the names of the model's parameters, and `record` with the schedule's state."""
    state, moments = optimizer.state_dict(), {}
    for name, parameter in model.named_parameters():
        start = f"{parameter.name}_"
        moments.update({f"{name}|{key[len(start):]}": tensor for key, tensor in state.items() if key.startswith(start)})
    write_weights(os.path.join(folder, STATE_FILE), moments)
    with open(os.path.join(folder, STATE_RECORD), "w", encoding="utf-8") as file:
        json.dump({**record, "schedule": state["LR_Scheduler"]}, file, indent=2)


def read_training_record(folder: str) -> dict:
    """What `write_training_state` was given as `record`, and the schedule's state.

    Raises:
        InputError: the folder is no checkpoint that training can go on from.
    """
    try:
        with open(os.path.join(folder, STATE_RECORD), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        raise InputError(f"--resume {folder}: not a checkpoint that training can go on from (no {STATE_RECORD}); "
                         "--init_from_ckpt starts anew from its weights") from None


def restore_optimizer(folder: str, model: Any, optimizer: Any, record: dict) -> None:
    """Give the optimizer, and its schedule, the state of `write_training_state`."""
    import paddle

    name_of = {name: parameter.name for name, parameter in model.named_parameters()}
    state = {}
    for key, array in read_weights(os.path.join(folder, STATE_FILE), "--resume").items():
        name, kind = key.rsplit("|", 1)
        state[f"{name_of[name]}_{kind}"] = paddle.to_tensor(array)
    optimizer.set_state_dict({**state, "LR_Scheduler": record["schedule"]})


# What a run depends on: going on from its checkpoint with another would be neither that run nor a new one.
RUN = ("batch_size", "gradient_accumulation_steps", "epochs", "seed", "max_seq_length", "learning_rate",
       "warmup_proportion", "weight_decay", "max_grad_norm", "dropout", "output_dropout", "margin", "scale",
       "precision", "cross_device_negatives", "keep_duplicate_negatives", "gradient_cache", "chunk_size", "objective",
       "pooling", "crop_rate", "dup_rate", "matryoshka_dims", "distill_from", "distill_weight", "mlm_probability")


def run_of(args: argparse.Namespace, texts: TextFile, ranks: int) -> dict:
    """What the run depends on, by flag; the training file by its content."""
    return {"train_set_file": file_digest(texts.path), "number of processes": ranks,
            **{name: getattr(args, name) for name in RUN}}


def resumed_step(args: argparse.Namespace, run: dict, model: Any, optimizer: Any, scaler: Any) -> int:
    """The step of the checkpoint in --resume, whose state optimizer, schedule and scaler get; 0 without one.

    Raises:
        InputError: it is of a run with another training file, batch size or other setting.
    """
    if not args.resume:
        return 0
    record = read_training_record(args.resume)
    if other := [name for name in run if record["run"].get(name, run[name]) != run[name]]:  # older records have fewer
        changes = ", ".join(name if name == "train_set_file" else f"{name} {run[name]} instead of {record['run'][name]}"
                            for name in other)
        raise InputError(f"--resume {args.resume}: is of a run with another {changes}; --init_from_ckpt starts a new "
                         "run from its weights")
    restore_optimizer(args.resume, model, optimizer, record)
    if record["scaler"]:
        scaler.load_state_dict(record["scaler"])
    log(f"going on from {args.resume}")
    return record["step"]


def saved_steps(save_dir: str) -> list[int]:
    """The steps of the checkpoints model_<step> in a folder, in rising order."""
    names = os.listdir(save_dir) if os.path.isdir(save_dir) else ()
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"model_(\d+)", name)))


def newest_resumable(save_dir: str) -> str | None:
    """The newest checkpoint in a folder that training can go on from; None where there is none."""
    folders = (os.path.join(save_dir, f"model_{step}") for step in reversed(saved_steps(save_dir)))
    return next((folder for folder in folders if os.path.isfile(os.path.join(folder, STATE_RECORD))), None)


def remove_old(save_dir: str, step: int, keep: int) -> None:
    """Of the checkpoints up to `step` keep the newest `keep` (0: all), and training state in the newest alone."""
    older = [each for each in saved_steps(save_dir) if each < step]
    kept = older[max(0, len(older) - keep + 1) :] if keep else older
    for each in older:
        folder = os.path.join(save_dir, f"model_{each}")
        if each in kept:
            for name in (STATE_RECORD, STATE_FILE):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, name))
        else:
            aside = os.path.join(save_dir, f".model_{each}.tmp")  # never half of it under its name
            os.rename(folder, aside)
            shutil.rmtree(aside)


def prepare_save_dir(save_dir: str, needed: int) -> None:
    """Make the folder, remove what a killed run left half written, and refuse one that cannot hold `needed` bytes.

    Raises:
        InputError: not a folder, not writable, or too little space.
    """
    try:
        os.makedirs(save_dir, exist_ok=True)
        for name in os.listdir(save_dir):
            if re.fullmatch(r"\.model_\d+\.(.*\.)?tmp", name):
                shutil.rmtree(os.path.join(save_dir, name), ignore_errors=True)
        with tempfile.TemporaryFile(dir=save_dir):
            pass
    except OSError as error:
        raise InputError(f"--save_dir {save_dir}: {(error.strerror or str(error)).lower()}") from None
    if (free := shutil.disk_usage(save_dir).free) < needed:
        raise InputError(f"--save_dir {save_dir}: {free / 1e9:.1f} GB are free, and a checkpoint takes "
                         f"{needed / 1e9:.1f} GB")
