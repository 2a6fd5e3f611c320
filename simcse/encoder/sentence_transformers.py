"""Read what a folder of sentence-transformers says beside its encoder: pooling, dense layers, length and prompts."""

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

from simcse.console import InputError, as_input_error
from simcse.encoder.hugging_face import read_weight_file
from simcse.files import read_json
from simcse.text.prefixes import Prefixes

import numpy as np

MODULES_FILE = "modules.json"
# The file with max_seq_length has the name of the kind of encoder for which it was first written.
LENGTH_FILES = [f"sentence_{kind}_config.json" for kind in (
    "bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")]
POOLING_OF_MODE = {"cls": "cls", "mean": "mean_all"}  # our names of sentence-transformers' modes
# Names of prompts, the first that there is; sentence-transformers looks for them in this order.
QUERY_PROMPTS = ("query",)
DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class Dense(NamedTuple):
    """The weights of a dense layer.

    Attributes:
        weight: float32 [input size, output size].
        bias: float32 [output size].
    """

    weight: np.ndarray
    bias: np.ndarray


class Recipe(NamedTuple):
    """How a folder of sentence-transformers makes an embedding of its encoder's output.

    Attributes:
        encoder: folder of the encoder.
        pooling: a name in POOLINGS; None: the folder is not one of sentence-transformers.
        max_seq_length: tokens of a text; None: as many as the encoder has positions.
        prefixes: its prompts.
        pooler: folder of a dense layer with tanh that follows [CLS]; None: there is none.
        fc: folder of the last dense layer, which has no activation; None: there is none.
    """

    encoder: str
    pooling: str | None = None
    max_seq_length: int | None = None
    prefixes: Prefixes = Prefixes()
    pooler: str | None = None
    fc: str | None = None


def read_recipe(folder: str) -> Recipe:
    """Return what an encoder's folder says; of a hub name, or a folder without modules.json, nothing but its name.

    Raises:
        InputError: the folder has modules, or settings of them, that this project does not have.
    """
    path = os.path.join(folder, MODULES_FILE)
    if not os.path.isfile(path):
        return Recipe(folder)
    where = f"--model_name_or_path {folder}"
    folders = _read_modules(path, where)
    kinds = [kind for kind, _ in folders]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise InputError(f"{where}: {MODULES_FILE} has the modules {', '.join(kinds)}; Transformer, Pooling, and then "
                         "Dense and Normalize are supported")
    encoder, pooling_folder = (os.path.join(folder, subfolder) for _, subfolder in folders[:2])
    pooling = _read_pooling(pooling_folder, where)
    pooler = None
    fc = None
    for kind, subfolder in folders[2:]:
        if kind == "Normalize":
            continue  # embeddings are L2-normalized here anyway
        dense = os.path.join(folder, subfolder)
        activation = read_json(os.path.join(dense, "config.json")).get("activation_function", "Tanh")
        activation = str(activation).rpartition(".")[2]
        if kind == "Dense" and activation == "Tanh" and pooling == "cls" and not (pooler or fc):
            pooler = dense
        elif kind == "Dense" and activation == "Identity" and not fc:
            fc = dense
        else:
            raise InputError(f"{where}: {MODULES_FILE} has the module {kind} in {subfolder}, which is not supported "
                             "there; one Dense with Tanh after the pooling cls, then one with Identity are")
    return Recipe(encoder, pooling="pooler" if pooler else pooling, max_seq_length=_read_length(encoder),
                  prefixes=_read_prompts(folder), pooler=pooler, fc=fc)


def _read_modules(path: str, where: str) -> list[tuple[str, str]]:
    """Return kind and subfolder of each module, in their order."""
    with as_input_error(f"{where}: {MODULES_FILE}: not valid JSON", ValueError), open(path, encoding="utf-8") as file:
        modules = json.load(file)
    found = []
    for module in modules if isinstance(modules, list) else [None]:
        if not isinstance(module, Mapping) or not all(isinstance(module.get(key), str) for key in ("type", "path")):
            raise InputError(f"{where}: {MODULES_FILE}: expected a list of modules with type and path")
        found.append((module["type"].rpartition(".")[2], module["path"]))
    return found


def _read_pooling(folder: str, where: str) -> str:
    """Return our name of the pooling that a Pooling module has."""
    config = read_json(os.path.join(folder, "config.json"))
    modes = config.get("pooling_mode")
    if modes is None:  # older versions have a field for each mode
        modes = [name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
                 for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    modes = modes if isinstance(modes, list) else [modes]
    modes = modes or ["mean"]
    if len(modes) != 1 or modes[0] not in POOLING_OF_MODE:
        raise InputError(f"{where}: its pooling is {' and '.join(map(str, modes))}; of those of sentence-transformers "
                         f"{' and '.join(POOLING_OF_MODE)} are supported")
    if config.get("include_prompt", True) is not True:
        raise InputError(f"{where}: its pooling leaves out the tokens of prompts (include_prompt false), which is not "
                         "supported")
    return POOLING_OF_MODE[modes[0]]


def read_dense(folder: str, flag: str) -> Dense:
    """Return the weights of a Dense module.

    Args:
        folder: of the module.
        flag: the flag that named its encoder, for messages.

    Raises:
        InputError: its file of weights is missing or damaged.
    """
    where = f"{flag} {folder}"
    names = [name for name in ("model.safetensors", "pytorch_model.bin") if os.path.isfile(os.path.join(folder, name))]
    if not names:
        raise InputError(f"{where}: has neither model.safetensors nor pytorch_model.bin")
    weights = read_weight_file(os.path.join(folder, names[0]), where)
    with as_input_error(f"{where}: {names[0]}", KeyError, ValueError):
        weight = weights["linear.weight"].astype("float32").T
        bias = weights.get("linear.bias", np.zeros(weight.shape[1])).astype("float32")
        return Dense(weight, bias)


def _read_length(encoder: str) -> int | None:
    """Return the tokens of a text at most; None: no file says it."""
    for name in LENGTH_FILES:
        length = read_json(os.path.join(encoder, name)).get("max_seq_length")
        if isinstance(length, int):
            return length
    config = read_json(os.path.join(encoder, "config.json"))
    length = read_json(os.path.join(encoder, "tokenizer_config.json")).get("model_max_length")
    positions = config.get("max_position_embeddings")
    # transformers writes 1e30 where there is no limit.
    return length if isinstance(length, int) and isinstance(positions, int) and length <= positions else None


def _read_prompts(folder: str) -> Prefixes:
    """Return the prompts of queries and of documents."""
    path = os.path.join(folder, "config_sentence_transformers.json")
    config = read_json(path)
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, Mapping) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise InputError(f"{path}: prompts: expected an object of strings")
    default = prompts.get(config.get("default_prompt_name"), "")
    query, document = (next((prompts[name] for name in names if name in prompts), default)
                       for names in (QUERY_PROMPTS, DOCUMENT_PROMPTS))
    return Prefixes(query, document)
