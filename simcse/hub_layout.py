"""Tell the layout of an encoder's folder: that of PaddleNLP, or that of Hugging Face's transformers, which folders of
sentence-transformers have, too."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from simcse.console import InputError, as_input_error
from simcse.files import is_there, read_json

# Files of weights of transformers; the first one that a folder has is read. An index names the files among which they
# are shared out.
HUGGING_FACE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                        "pytorch_model.bin.index.json")
MODULES_FILE = "modules.json"  # of sentence-transformers
PADDLE_LAYERS = ("embeddings.layer_norm.", ".self_attn.")  # in names of weights: PaddleNLP writes safetensors as well


class Module(NamedTuple):
    """A module of a folder of sentence-transformers.

    Attributes:
        kind: Transformer, Pooling, Dense, Normalize or another.
        path: its folder within that folder; "": the folder itself.
    """

    kind: str
    path: str


def read_modules(folder: str) -> list[Module]:
    """Return the modules of a folder of sentence-transformers, in their order; []: it is no such folder.

    Raises:
        InputError: modules.json is damaged.
    """
    path = os.path.join(folder, MODULES_FILE)
    if not is_there(path):
        return []
    with as_input_error(f"{path}: not valid JSON", ValueError, RecursionError), open(path, encoding="utf-8") as file:
        content = json.load(file)
    modules = []
    for entry in content if isinstance(content, list) else [None]:
        if not isinstance(entry, Mapping) or not all(isinstance(entry.get(key), str) for key in ("type", "path")):
            raise InputError(f"{path}: expected a list of modules with type and path")
        modules.append(Module(entry["type"].rpartition(".")[2], entry["path"]))
    return modules


def find_encoder(name_or_path: str) -> str:
    """Return the folder of the encoder in a folder of sentence-transformers; another folder, or a name, as it is."""
    modules = read_modules(name_or_path)
    if not modules or modules[0].kind != "Transformer" or not modules[0].path:
        return name_or_path
    folder = os.path.join(name_or_path, modules[0].path)
    if not os.path.isdir(folder):
        raise InputError(f"{os.path.join(name_or_path, MODULES_FILE)}: no folder {modules[0].path!r}")
    return folder


def is_hugging_face(folder: str) -> bool:
    """Return whether a folder has weights as transformers writes them, and none of PaddleNLP's."""
    if not os.path.isdir(folder):
        return False
    names = os.listdir(folder)
    files = [name for name in HUGGING_FACE_WEIGHTS if name in names]
    if not files or any(name.endswith(".pdparams") for name in names):
        return False
    layers = _names_of_weights(os.path.join(folder, files[0]))
    return not any(part in name for name in layers for part in PADDLE_LAYERS)


def _names_of_weights(path: str) -> Iterable[str]:
    """Return the names of the weights in a file, as far as it is no pickle and not damaged."""
    if path.endswith(".index.json"):
        names = read_json(path).get("weight_map")
        return names if isinstance(names, dict) else ()
    if path.endswith(".bin"):
        return ()
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(size, os.path.getsize(path))))
        except ValueError:  # damaged, which is said when it is read
            return ()
    return header if isinstance(header, dict) else ()
