"""Files of weights, read without running what may be in them, and the record of a checkpoint beside them."""

import functools
import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

from simcse.console import InputError, reported, some
from simcse.files import file_digest, read_json, write_json

import numpy as np

DEFAULT_MODEL = "rocketqa-zh-base-query-encoder"
CONFIG_FILE, TOKENIZER_FILE = "simcse_config.json", "tokenizer_config.json"
WEIGHTS = (".pdparams", ".safetensors")
PARAMS_FILE = "model_state.pdparams"
OPENVINO_FILE = "inference.xml"  # and its weights, inference.bin
TABLE_FILE = "table.npz"
ONNX_FILE, OPSET = "inference.onnx", 17  # 17: the first with LayerNormalization as one operator
STATE_FILE, STATE_RECORD = "training_state.safetensors", "training_state.json"
# What paddle.save's pickles name: numpy arrays, in dicts and tuples. Anything else could run code while it is read.
_ALLOWED = {("collections", "OrderedDict"), ("builtins", "tuple"), ("_codecs", "encode"), ("numpy", "ndarray"),
            ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}


class _TensorUnpickler(pickle.Unpickler):
    """Builds arrays and what holds them, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no tensor needs; it could run code and was not "
                                     "loaded")


def read_weights(path: str, flag: str) -> dict[str, np.ndarray]:
    """The arrays in a .pdparams file, as paddle.save writes it, or in a .safetensors file, by name; InputError where it
    is damaged, of another kind, or a pickle of more than tensors, of which nothing is run."""
    with reported(f"{flag} {path}: not a paddle checkpoint", Exception):  # damaged files raise anything
        if path.endswith(".safetensors"):
            from safetensors.numpy import load_file

            return load_file(path)
        with open(path, "rb") as file:
            state = _TensorUnpickler(file).load()
        for name, parts in state.pop("UnpackBigParamInfor@@", {}).items():  # paddle cuts large arrays into pieces
            state[name] = np.concatenate([state.pop(part) for part in parts["slices"]]).reshape(parts["OriginShape"])
        state.pop("StructuredToParameterName@@", None)
        # A tensor is an array, or a pair of its name and its array; of bfloat16 the bits as uint16.
        arrays = {name: np.asarray(value[1] if isinstance(value, tuple) else value) for name, value in state.items()}
        return {name: (array.astype("uint32") << 16).view("float32") if array.dtype == np.uint16 else array
                for name, array in arrays.items()}


def write_weights(path: str, state: Mapping[str, Any]) -> None:
    """Write tensors to a .safetensors file or, as paddle.save does, to a .pdparams file."""
    if path.endswith(".safetensors"):
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(tensor) for name, tensor in state.items()}, path)
    else:
        import paddle

        paddle.save(dict(state), path)


def load_state(model: Any, state: dict[str, np.ndarray], source: str) -> None:
    """Load every tensor of `state` into `model`, cast to the model's own dtype; InputError names those that are
    missing, unexpected or of another shape."""
    import paddle

    own = model.state_dict()
    faults = {"missing": [name for name in own if name not in state],
              "unexpected": [name for name in state if name not in own],
              "wrongly shaped": [f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
                                 for name, tensor in own.items()
                                 if name in state and list(state[name].shape) != list(tensor.shape)]}
    if any(faults.values()):
        found = "; ".join(f"{kind}: {some(names)}" for kind, names in faults.items() if names)
        raise InputError(f"{source} does not fit the network; {found}")
    for name, tensor in own.items():
        tensor.set_value(paddle.to_tensor(state[name]).astype(tensor.dtype))


def read_record(folder: str) -> dict:
    """What `simcse_config.json` in a checkpoint or exported folder records; {} where there is none."""
    return read_json(os.path.join(folder, CONFIG_FILE))


def write_record(folder: str, record: dict, tokenizer: Any) -> None:
    """Write simcse_config.json and the tokenizer's files."""
    tokenizer.save_pretrained(folder)
    write_json(os.path.join(folder, CONFIG_FILE), record)


@functools.cache  # weights are large, and a process reads them once
def model_digest(params_path: str, model_name_or_path: str | None) -> str:
    """SHA-256 of what makes the embeddings, by content: the weights, and beside them the record and the tokenizer; what
    describes the encoder in a folder, or its hub name, where one is given, or the checkpoint lacks record or tokenizer.
    How a record names the encoder that it describes, and the versions that wrote it, are no content."""
    folder = os.path.dirname(params_path)
    record, tokenizer = read_record(folder), [os.path.join(folder, name) for name in ("vocab.txt", TOKENIZER_FILE)]
    named = model_name_or_path or ""
    if not (record and os.path.isfile(tokenizer[1])):
        named = named or record.get("model_name_or_path", DEFAULT_MODEL)
    described = sorted(os.listdir(named)) if os.path.isdir(named) else []
    content = {name: value for name, value in record.items() if name not in ("model_name_or_path", "versions")}
    digest = hashlib.sha256(json.dumps([content, "" if described else named], sort_keys=True).encode())
    for path in filter(os.path.isfile, [
            params_path, *tokenizer, *(os.path.join(named, name) for name in described if not name.endswith(WEIGHTS))]):
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
