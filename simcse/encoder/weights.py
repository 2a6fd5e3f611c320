"""Read and write files of weights, without running what may be in them, and the record of a checkpoint beside them."""

import contextlib
import functools
import hashlib
import json
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from simcse.console import InputError, as_input_error, some, some_characters
from simcse.files import file_digest, new_folder, read_json, write_json
from simcse.machine import BATCH_TOKENS

import numpy as np

DEFAULT_MODEL = "rocketqa-zh-base-query-encoder"
# A checkpoint or an exported folder
CONFIG_FILE = "simcse_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
VOCABULARY_FILE = "vocab.txt"
PARAMS_FILE = "model_state.pdparams"
WEIGHT_FILES = ("model_state.safetensors", PARAMS_FILE)  # of a checkpoint folder; the first one is loaded
WEIGHTS = (".pdparams", ".safetensors")
OPENVINO_FILE = "inference.xml"  # and its weights, inference.bin
ONNX_FILE = "inference.onnx"
OPSET = 17  # of ONNX, the first with LayerNormalization as one operator
TABLE_FILE = "table.npz"
# The numpy types of a .safetensors file, on every machine little-endian; bfloat16 is read as bits.
NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
               "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}
# What paddle.save's pickles name: numpy arrays, in dicts and tuples. Anything else could run code while it is read.
ALLOWED_IN_PICKLES = {
    ("collections", "OrderedDict"), ("builtins", "tuple"), ("_codecs", "encode"), ("numpy", "ndarray"),
    ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}


# -------------------------------------------------------------------------------------------------------------- weights
class _TensorUnpickler(pickle.Unpickler):
    """Build arrays and what holds them, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED_IN_PICKLES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no tensor needs; it could run code and was not "
                                     "loaded")


def read_weights(path: str, flag: str) -> dict[str, np.ndarray]:
    """Return the arrays in a .pdparams or .safetensors file by name, bfloat16 as float32.

    Args:
        flag: the flag that named the file, for messages.

    Raises:
        InputError: the file is damaged, of another kind, or a pickle of more than tensors, of which nothing is run.
    """
    with as_input_error(f"{flag} {path}: not a paddle checkpoint", Exception):  # damaged files raise anything
        if path.endswith(".safetensors"):
            return read_safetensors(path)
        return _read_pickle(path)


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """Return the arrays in a .safetensors file by name, bfloat16, which numpy lacks, as float32."""
    from safetensors import deserialize

    with open(path, "rb") as file:
        tensors = deserialize(file.read())
    arrays = {}
    for name, tensor in tensors:
        array = np.frombuffer(tensor["data"], NUMPY_TYPES[tensor["dtype"]])
        if tensor["dtype"] == "BF16":
            array = bfloat16_to_float32(array)
        arrays[name] = array.reshape(tensor["shape"])
    return arrays


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Return the numbers whose bits as bfloat16 are given as uint16; they are the upper half of a float32's."""
    return (bits.astype("uint32") << 16).view("float32")


def _read_pickle(path: str) -> dict[str, np.ndarray]:
    """Return the arrays in a file that paddle.save wrote."""
    with open(path, "rb") as file:
        state = _TensorUnpickler(file).load()
    state.pop("StructuredToParameterName@@", None)
    for name, info in state.pop("UnpackBigParamInfor@@", {}).items():  # paddle cuts large arrays into pieces
        pieces = [state.pop(piece) for piece in info["slices"]]
        state[name] = np.concatenate(pieces).reshape(info["OriginShape"])
    arrays = {}
    for name, value in state.items():
        array = np.asarray(value[1] if isinstance(value, tuple) else value)  # or a pair of its name and its array
        if array.dtype == np.uint16:  # the bits of bfloat16
            array = bfloat16_to_float32(array)
        arrays[name] = array
    return arrays


def write_weights(path: str, state: Mapping[str, Any]) -> None:
    """Write tensors to a .safetensors file or, as paddle.save does, to a .pdparams file."""
    if path.endswith(".safetensors"):
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(tensor) for name, tensor in state.items()}, path)
    else:
        import paddle

        paddle.save(dict(state), path)


def new_checkpoint_folder(path: str) -> contextlib.AbstractContextManager[str]:
    """Make a folder for a checkpoint like `new_folder`; no weights of an older folder stay, since they may be loaded.
    """
    return new_folder(path, obsolete=WEIGHT_FILES)


def load_state(model: Any, state: dict[str, np.ndarray], source: str) -> None:
    """Load every tensor of `state` into `model`, cast to the model's dtype.

    Args:
        source: names the checkpoint in messages.

    Raises:
        InputError: tensors are missing, unexpected or of another shape.
    """
    import paddle

    parameters = model.state_dict()
    missing = [name for name in parameters if name not in state]
    unexpected = [name for name in state if name not in parameters]
    misshapen = []
    for name, tensor in parameters.items():
        if name in state and list(state[name].shape) != list(tensor.shape):
            misshapen.append(f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}")
    faults = []
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", misshapen)):
        if names:
            faults.append(f"{kind}: {some(names)}")
    if faults:
        raise InputError(f"{source} does not fit the network; {'; '.join(faults)}")
    for name, tensor in parameters.items():
        tensor.set_value(paddle.to_tensor(state[name]).astype(tensor.dtype))


# --------------------------------------------------------------------------------------------------------------- record
class Values(NamedTuple):
    """The values that a field of a record may have.

    Attributes:
        description: for messages.
        contain: tells whether a value is one of them.
    """

    description: str
    contain: Callable[[Any], bool]


def _is_integer(value: Any, least: int) -> bool:
    return type(value) is int and value >= least  # not isinstance: a bool is an int, too


def _is_number(value: Any, least: float) -> bool:
    return type(value) in (int, float) and least <= value < math.inf


STRING = Values("a string", lambda value: isinstance(value, str))
TRUE_OR_FALSE = Values("true or false", lambda value: isinstance(value, bool))
OBJECT = Values("an object", lambda value: isinstance(value, dict))
SIZE = Values("an integer >= 1", lambda value: _is_integer(value, 1))
SIZE_OR_ZERO = Values("an integer >= 0", lambda value: _is_integer(value, 0))
LENGTH = Values("an integer >= 3", lambda value: _is_integer(value, 3))
LENGTH_OR_NULL = Values("an integer >= 3 or null", lambda value: value is None or _is_integer(value, 3))
NUMBER = Values("a number >= 0", lambda value: _is_number(value, 0))
# The fields of simcse_config.json. A checkpoint, an exported folder and a kept graph each have some of them.
RECORD_FIELDS = {
    "model_name_or_path": STRING, "output_emb_size": SIZE_OR_ZERO, "embedding_size": SIZE, "max_positions": LENGTH,
    "pooling": STRING, "with_pooler": TRUE_OR_FALSE, "margin": NUMBER, "scale": NUMBER,
    "cross_device_negatives": TRUE_OR_FALSE, "max_seq_length": LENGTH_OR_NULL, "whitened_at": LENGTH_OR_NULL,
    "encoder_class": STRING, "encoder_config": OBJECT, "versions": OBJECT, "model": STRING, "precision": STRING,
    "table": TRUE_OR_FALSE, "int8_cosines": OBJECT, "calibration": OBJECT, "hidden_size": SIZE, "vocab_size": SIZE,
    "fc_is_random": TRUE_OR_FALSE, "query_prefix": STRING, "document_prefix": STRING, "step": SIZE_OR_ZERO,
    "measures": OBJECT, "run_digest": STRING}
# Fields that do not change the embeddings: the name of the encoder, the libraries, and what --save_best records. The
# prefixes change the texts; an index records that of its documents itself.
FIELDS_WITHOUT_EFFECT = ("model_name_or_path", "versions", "step", "measures", "run_digest", "query_prefix",
                         "document_prefix")
ENCODER_FIELDS = ("encoder_class", "encoder_config")  # what an encoder is made of
GRAPH_FIELDS = ("embedding_size", "max_positions")  # what running a graph needs


def read_record(folder: str, required: Sequence[str] = ()) -> dict:
    """Return the content of simcse_config.json in a checkpoint or exported folder; {} if there is none.

    Args:
        required: fields that the file has to have.

    Raises:
        InputError: a field is missing, or has a value that it cannot have.
    """
    path = os.path.join(folder, CONFIG_FILE)
    record = read_json(path)
    for name, value in record.items():
        values = RECORD_FIELDS.get(name)
        if values is not None and not values.contain(value):
            raise InputError(f"{path}: {name}: expected {values.description}, got {some_characters(json.dumps(value))}")
    if record:
        for name in required:
            if name not in record:
                raise InputError(f"{path}: {name} is missing; the file is damaged, or another program's")
    return record


def graph_record(model: Any) -> dict[str, int]:
    """Return what an exported folder has to record of its graph."""
    config = model.ptm.config
    return {"embedding_size": model.embedding_size, "max_positions": model.max_positions,
            "hidden_size": config.hidden_size, "vocab_size": config.vocab_size}


def layer_bytes(record: dict, weights_path: str) -> int:
    """Return the bytes of a graph's weights without its token embeddings, which no kernel copies."""
    table = 4 * record.get("vocab_size", 0) * record.get("hidden_size", 0)
    return max(0, os.path.getsize(weights_path) - table)


def activation_bytes(record: dict) -> int:
    """Estimate the bytes of a batch's activations on a CPU, those of a layer."""
    vectors_of_token = 20  # queries, keys and values, two of the feed-forward layer's size, sums
    return 4 * vectors_of_token * record.get("hidden_size", 0) * BATCH_TOKENS["cpu"]


def write_record(folder: str, record: dict, tokenizer: Any) -> None:
    """Write simcse_config.json and the tokenizer's files."""
    tokenizer.save_pretrained(folder)
    write_json(os.path.join(folder, CONFIG_FILE), record)


def add_to_record(folder: str, more: Mapping[str, Any]) -> None:
    """Add fields to the simcse_config.json of a folder."""
    path = os.path.join(folder, CONFIG_FILE)
    record = read_json(path)
    record.update(more)
    write_json(path, record)


class FileState(NamedTuple):
    """What changes with the content of a file, as far as that is known without reading it."""

    inode: int
    size: int
    modified: int  # nanoseconds

    @classmethod
    def of(cls, path: str) -> "FileState":
        """Return the state of a file now."""
        status = os.stat(path)
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


class CheckpointFiles:
    """The files that an encoder is loaded from.

    Args:
        params_path: the file of weights.
        model_name_or_path: the encoder that --model_name_or_path names; None: the recorded one.

    Attributes:
        name: the flag that names the checkpoint, and its value, for messages.
    """

    def __init__(self, params_path: str, model_name_or_path: str | None = None) -> None:
        self.params_path = params_path
        self.model_name_or_path = model_name_or_path
        self.name = f"--params_path {params_path}"
        self._loaded_states = self._read_states()

    def _read_states(self) -> dict[str, FileState]:
        """Return the states of the weights, and of the record and the tokenizer beside them, by path."""
        folder = os.path.dirname(self.params_path)
        beside = (CONFIG_FILE, TOKENIZER_FILE, VOCABULARY_FILE, "tokenizer.json")
        paths = [self.params_path, *(os.path.join(folder, name) for name in beside)]
        return {path: FileState.of(path) for path in paths if os.path.isfile(path)}

    def digest(self) -> str:
        """Return the `model_digest` of the files.

        Raises:
            InputError: a file is not the one that was loaded, but was written later.
        """
        if self._read_states() != self._loaded_states:
            raise InputError(f"{self.name}: has changed since it was loaded; load it again")
        return model_digest(self.params_path, self.model_name_or_path)


@functools.cache  # weights are large, and a process reads them once in each state
def _weights_digest(path: str, state: FileState) -> str:
    """Return SHA-256 of a file of weights that is in this state, in hexadecimal."""
    return file_digest(path)


def model_digest(params_path: str, model_name_or_path: str | None) -> str:
    """Return SHA-256 of what makes the embeddings, by content, in hexadecimal.

    It covers the weights, and the record and the tokenizer beside them. Where an encoder is named, or the checkpoint
    lacks record or tokenizer, it covers the encoder as well: the files that describe it in its folder, or its hub name.
    Of the record it leaves out FIELDS_WITHOUT_EFFECT.

    Args:
        model_name_or_path: the encoder that --model_name_or_path names.
    """
    folder = os.path.dirname(params_path)
    record = read_record(folder)
    tokenizer_file = os.path.join(folder, TOKENIZER_FILE)
    encoder = model_name_or_path or ""
    if not encoder and not (record and os.path.isfile(tokenizer_file)):
        encoder = record.get("model_name_or_path", DEFAULT_MODEL)
    vocabulary = os.path.join(folder, VOCABULARY_FILE)
    small_files = [vocabulary, tokenizer_file]
    if not os.path.isfile(vocabulary):  # a tokenizer without vocab.txt is all in tokenizer.json
        small_files.append(os.path.join(folder, "tokenizer.json"))
    if os.path.isdir(encoder):
        names = [name for name in sorted(os.listdir(encoder)) if not name.endswith(WEIGHTS)]
        small_files += [os.path.join(encoder, name) for name in names]
        encoder = ""  # known by its files
    content = {name: value for name, value in record.items() if name not in FIELDS_WITHOUT_EFFECT}
    digest = hashlib.sha256(json.dumps([content, encoder], sort_keys=True).encode())
    digest.update(_weights_digest(params_path, FileState.of(params_path)).encode())
    for path in small_files:
        if os.path.isfile(path):
            digest.update(file_digest(path).encode())
    return digest.hexdigest()
