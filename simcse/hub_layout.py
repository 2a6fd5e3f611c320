"""Tell the layout of an encoder's folder: that of PaddleNLP, or that of Hugging Face's transformers."""

import json
import os
from collections.abc import Iterable

from simcse.files import read_json

# Files of weights of transformers; the first one that a folder has is read. An index names the files among which they
# are shared out.
HUGGING_FACE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                        "pytorch_model.bin.index.json")
PADDLE_LAYERS = ("embeddings.layer_norm.", ".self_attn.")  # in names of weights: PaddleNLP writes safetensors as well


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
