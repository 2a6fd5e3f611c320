"""Tell the layout of an encoder's folder: that of PaddleNLP, or that of Hugging Face's transformers."""

import os

# Files of weights of transformers; the first one that a folder has is read. An index names the files among which they
# are shared out.
HUGGING_FACE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                        "pytorch_model.bin.index.json")


def is_hugging_face(folder: str) -> bool:
    """Return whether a folder has weights as transformers writes them, and none of PaddleNLP's."""
    if not os.path.isdir(folder):
        return False
    names = os.listdir(folder)
    is_paddle = any(name.endswith(".pdparams") for name in names)
    return not is_paddle and any(name in names for name in HUGGING_FACE_WEIGHTS)
