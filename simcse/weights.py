"""Files of weights, read without running what may be in them, and the record of a checkpoint beside them."""

import functools
import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

from simcse.console import InputError, first_line, some
from simcse.files import file_digest, write_json

import numpy as np

CONFIG_FILE = "simcse_config.json"
PARAMS_FILE = "model_state.pdparams"
ONNX_FILE, OPSET = "inference.onnx", 17  # 17: the first with LayerNormalization as one operator
STATE_FILE, STATE_RECORD = "training_state.safetensors", "training_state.json"
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


def load_state(model: Any, state: dict[str, np.ndarray], source: str) -> None:
    """Load every tensor of `state` into `model`, cast to the model's own dtype.

    Raises:
        InputError: tensors that are missing, unexpected or of another shape, by name.
    """
    import paddle

    own = model.state_dict()
    wrong_shape = [f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
                   for name in own if name in state and list(state[name].shape) != list(own[name].shape)]
    faults = {"missing": [name for name in own if name not in state],
              "unexpected": [name for name in state if name not in own], "wrongly shaped": wrong_shape}
    if any(faults.values()):
        found = "; ".join(f"{kind}: {some(names)}" for kind, names in faults.items() if names)
        raise InputError(f"{source} does not fit the network; {found}")
    for name, tensor in own.items():
        tensor.set_value(paddle.to_tensor(state[name]).astype(tensor.dtype))


def read_record(folder: str) -> dict:
    """What `simcse_config.json` in a checkpoint or exported folder records; {} where there is none."""
    path = os.path.join(folder, CONFIG_FILE)
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {first_line(error)}") from None


def write_record(folder: str, record: dict, tokenizer: Any) -> None:
    """Write simcse_config.json and the tokenizer's files."""
    tokenizer.save_pretrained(folder)
    write_json(os.path.join(folder, CONFIG_FILE), record)


@functools.cache  # weights are large, and a process reads them once
def model_digest(params_path: str, model_name_or_path: str | None) -> str:
    """SHA-256 of what makes the embeddings: the checkpoint and what is beside it, or the encoder named instead."""
    digest = hashlib.sha256((model_name_or_path or "").encode())
    beside = (os.path.join(os.path.dirname(params_path), name) for name in (CONFIG_FILE, "vocab.txt"))
    for path in [params_path, *filter(os.path.isfile, beside)]:
        digest.update(file_digest(path).encode())
    return digest.hexdigest()


def saved_steps(save_dir: str) -> list[int]:
    """The steps of the checkpoints model_<step> in a folder, in rising order."""
    names = os.listdir(save_dir) if os.path.isdir(save_dir) else ()
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"model_(\d+)", name)))


def newest_resumable(save_dir: str) -> str | None:
    """The newest checkpoint in a folder that training can go on from; None where there is none."""
    folders = (os.path.join(save_dir, f"model_{step}") for step in reversed(saved_steps(save_dir)))
    return next((folder for folder in folders if os.path.isfile(os.path.join(folder, STATE_RECORD))), None)
