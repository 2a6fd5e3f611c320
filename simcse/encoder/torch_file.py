"""Read the arrays in a file that torch.save wrote, without torch, and without running what may be in it."""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from simcse.encoder.weights import bfloat16_to_float32

import numpy as np

# The numpy type of a torch storage; numpy has no bfloat16, which is read as bits.
STORAGES = {"FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16",
            "BFloat16Storage": "uint16",
            "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
            "ByteStorage": "uint8", "BoolStorage": "bool"}
BFLOAT16 = "BFloat16Storage"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of torch before 1.6


class Storage(NamedTuple):
    """The numbers that tensors are views of.

    Attributes:
        kind: a name in STORAGES.
        key: its name in the file.
    """

    kind: str
    key: str


class LazyTensor(NamedTuple):
    """A tensor whose storage is read later; offset and strides are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_file(path: str) -> dict[str, np.ndarray]:
    """Return the arrays in a file of torch.save, such as pytorch_model.bin, by name; bfloat16 as float32.

    Raises:
        pickle.UnpicklingError: it refers to more than tensors need; it is refused without running it.
        Exception: the file is damaged.
    """
    if zipfile.is_zipfile(path):
        return _read_zip(path)
    with open(path, "rb") as file:
        return _read_legacy(file)


def _read_zip(path: str) -> dict[str, np.ndarray]:
    """Return the arrays in a file of torch 1.6 or later: a pickle and a file for each storage, not compressed."""
    with zipfile.ZipFile(path) as archive:
        pickle_name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if pickle_name is None:
            raise ValueError("not a file of torch.save: it has no data.pkl")
        folder = pickle_name.rpartition("/")[0]
        tensors = _TensorUnpickler(io.BytesIO(archive.read(pickle_name))).load()
        return _to_arrays(tensors, lambda storage: archive.read(f"{folder}/data/{storage.key}"))


def _read_legacy(file: Any) -> dict[str, np.ndarray]:
    """Return the arrays in a file of torch before 1.6: several pickles, then the storages one after the other."""
    if _TensorUnpickler(file).load() != _LEGACY_MAGIC:
        raise ValueError("not a file of torch.save")
    _TensorUnpickler(file).load()  # the version of the format
    _TensorUnpickler(file).load()  # sizes of integers on the machine that wrote it
    unpickler = _TensorUnpickler(file)
    tensors = unpickler.load()
    keys = _TensorUnpickler(file).load()
    contents = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        contents[key] = file.read(count * np.dtype(STORAGES[unpickler.kinds[key]]).itemsize)
    return _to_arrays(tensors, lambda storage: contents[storage.key])


class _TensorUnpickler(pickle.Unpickler):
    """Build what holds tensors, and of each tensor where it is, and nothing else.

    Attributes:
        kinds: the kind of each storage, by key.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.kinds: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return name
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        raise pickle.UnpicklingError(f"the pickle refers to {module}.{name}, which tensors do not need; refused, not "
                                     "run")

    def persistent_load(self, pid: tuple) -> Storage:
        """Return the storage that an entry of the pickle names: ("storage", kind, key, device, size, ...)."""
        _, kind, key = pid[:3]
        self.kinds[key] = kind
        return Storage(kind, key)


def _rebuild_tensor(storage: Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> LazyTensor:
    return LazyTensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: LazyTensor, *_: Any) -> LazyTensor:
    return tensor


def _to_arrays(tensors: Any, read: Callable[[Storage], bytes]) -> dict[str, np.ndarray]:
    """Return the arrays of tensors by name.

    Args:
        tensors: what the file holds.
        read: returns the bytes of a storage.

    Raises:
        ValueError: it holds no tensors by name, or a tensor reaches beyond its storage.
    """
    if not isinstance(tensors, dict):
        raise ValueError("no tensors by name")
    arrays = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, LazyTensor):
            raise ValueError(f"{name} is no tensor")
        arrays[name] = _to_array(tensor, np.frombuffer(read(tensor.storage), STORAGES[tensor.storage.kind]))
    return arrays


def _to_array(tensor: LazyTensor, numbers: np.ndarray) -> np.ndarray:
    """Return a tensor as an array of its own, from the numbers of its storage."""
    if 0 in tensor.shape:
        numbers = np.zeros(1, numbers.dtype)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
    has_negative = min((*tensor.shape, *tensor.strides, tensor.offset), default=0) < 0
    if has_negative or (0 not in tensor.shape and last >= len(numbers)):
        raise ValueError("a tensor reaches beyond its storage")
    strides = [stride * numbers.itemsize for stride in tensor.strides]
    array = np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)
    if tensor.storage.kind == BFLOAT16:
        return bfloat16_to_float32(array)
    return np.array(array)
