"""Read what a folder of sentence-transformers says beside its encoder: pooling, dense layers, length and prompts."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from simcse.console import InputError, as_input_error, is_unicode
from simcse.encoder.hugging_face import read_weight_file
from simcse.files import read_json
from simcse.hub_layout import MODULES_FILE, find_encoder, read_modules
from simcse.text.prefixes import Prefixes

import numpy as np

# The file with max_seq_length has the name of the kind of encoder for which it was first written.
LENGTH_FILES = [f"sentence_{kind}_config.json" for kind in (
    "bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")]
POOLING_OF_MODE = {"cls": "cls", "mean": "mean_all"}  # our names of sentence-transformers' modes
SHORTEST = 3  # tokens of a text: [CLS], a token, [SEP]
# Names of prompts, the first that there is, as the documentation of encode_query and encode_document has them. Version
# 6.2 itself finds "query" and "document" alone, which it adds as empty ones where they are missing.
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
        prefixes: its prompts.
        pooler: folder of a dense layer with tanh that follows [CLS]; None: there is none.
        fc: folder of the last dense layer, which has no activation; None: there is none.
    """

    encoder: str
    pooling: str | None = None
    prefixes: Prefixes = Prefixes()
    pooler: str | None = None
    fc: str | None = None


def read_recipe(folder: str) -> Recipe:
    """Return what a folder of sentence-transformers says; of a hub name, or a folder without modules.json, a `Recipe`
    that has its name alone.

    Raises:
        InputError: the folder has modules, or settings of them, that this project does not have.
    """
    modules = read_modules(folder)
    if not modules:
        return Recipe(folder)
    where = f"--model_name_or_path {folder}"
    kinds = [module.kind for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise InputError(f"{where}: {MODULES_FILE} has the modules {', '.join(kinds)}; Transformer, Pooling, and then "
                         "Dense and Normalize are supported")
    encoder = find_encoder(folder)
    pooling = _read_pooling(os.path.join(folder, modules[1].path), where)
    pooler = None
    fc = None
    if kinds[-1] == "Normalize":  # embeddings are L2-normalized here with it or without it
        modules.pop()
    for kind, subfolder in modules[2:]:
        dense = os.path.join(folder, subfolder)
        activation = _read_activation(dense, where) if kind == "Dense" else None
        if kind == "Dense" and activation == "Tanh" and pooling == "cls" and not (pooler or fc):
            _check_square(dense, where)
            pooler = dense
        elif kind == "Dense" and activation == "Identity" and not fc:
            fc = dense
        else:
            raise InputError(f"{where}: {MODULES_FILE} has the module {kind} in {subfolder}, which is not supported "
                             "there; one Dense with Tanh after the pooling cls, then one with Identity, then Normalize "
                             "are")
    _check_lowercase(encoder, where)
    return Recipe(encoder, pooling="pooler" if pooler else pooling, prefixes=_read_prompts(folder), pooler=pooler,
                  fc=fc)


def _read_config(folder: str) -> dict[str, Any]:
    """Return the config.json of a module; raise InputError if there is none."""
    path = os.path.join(folder, "config.json")
    config = read_json(path)
    if not config:
        raise InputError(f"{path}: no such file; was the folder copied completely?")
    return config


def _read_activation(folder: str, where: str) -> str:
    """Return the activation of a Dense module: Tanh, Identity or another of torch.

    Raises:
        InputError: the module computes more than weight, bias and activation.
    """
    config = _read_config(folder)
    others = {"use_residual": False, "module_input_name": "sentence_embedding",
              "module_output_name": "sentence_embedding"}
    for name, value in others.items():
        if config.get(name, value) != value:
            raise InputError(f"{where}: {folder}: config.json has {name} {config[name]!r}, which is not supported")
    return str(config.get("activation_function", "Tanh")).rpartition(".")[2]


def _check_square(folder: str, where: str) -> None:
    """Raise InputError if a Dense with Tanh changes the size of vectors, which a pooler does not."""
    config = _read_config(folder)
    sizes = config.get("in_features"), config.get("out_features")
    if sizes[0] != sizes[1]:
        raise InputError(f"{where}: {folder}: a Dense with Tanh has to keep the size of vectors; it makes {sizes[1]} "
                         f"of {sizes[0]}")


def _read_pooling(folder: str, where: str) -> str:
    """Return our name of the pooling that a Pooling module has."""
    config = _read_config(folder)
    modes = config.get("pooling_mode")
    if modes is None:  # older versions have a field for each mode
        modes = [name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
                 for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    modes = modes if isinstance(modes, list) else [modes]
    if len(modes) != 1 or modes[0] not in list(POOLING_OF_MODE):  # a list, since a mode may be unhashable
        named = " and ".join(map(str, modes)) or "not named"
        raise InputError(f"{where}: its pooling is {named}; of those of sentence-transformers "
                         f"{' and '.join(POOLING_OF_MODE)} are supported")
    if config.get("include_prompt", True) is not True:
        raise InputError(f"{where}: its pooling leaves out the tokens of prompts (include_prompt false), which is not "
                         "supported")
    return POOLING_OF_MODE[modes[0]]


def read_dense(folder: str, flag: str, inputs: int) -> Dense:
    """Return the weights of a Dense module.

    Args:
        folder: of the module.
        flag: the flag that named its encoder, for messages.
        inputs: size of the vectors that it takes.

    Raises:
        InputError: its file of weights is missing or damaged, or is for vectors of another size.
    """
    where = f"{flag} {folder}"
    names = [name for name in ("model.safetensors", "pytorch_model.bin") if os.path.isfile(os.path.join(folder, name))]
    if not names:
        raise InputError(f"{where}: has neither model.safetensors nor pytorch_model.bin")
    weights = read_weight_file(os.path.join(folder, names[0]), where)
    with as_input_error(f"{where}: {names[0]}: it lacks", KeyError):
        weight = weights["linear.weight"].astype("float32")
    bias = weights.get("linear.bias", np.zeros(len(weight), "float32")).astype("float32")
    if weight.ndim != 2 or not len(weight) or weight.shape[1] != inputs or bias.shape != weight.shape[:1]:
        raise InputError(f"{where}: {names[0]}: expected linear.weight [size, {inputs}] and linear.bias [size], got "
                         f"{list(weight.shape)} and {list(bias.shape)}")
    return Dense(weight.T, bias)


def _check_lowercase(encoder: str, where: str) -> None:
    """Raise InputError if sentence-transformers makes texts lower case before a tokenizer that does not."""
    config = read_json(os.path.join(encoder, "tokenizer_config.json"))
    is_bert = str(config.get("tokenizer_class", "BertTokenizer")).startswith("Bert")
    lowercase = config.get("do_lower_case", is_bert)
    for name in LENGTH_FILES:
        if read_json(os.path.join(encoder, name)).get("do_lower_case") and not lowercase:
            raise InputError(f"{where}: {name} has do_lower_case true, and tokenizer_config.json false; write the same "
                             "into both")


def read_length(encoder: str) -> int | None:
    """Return the tokens of a text at most that an encoder's folder names; None: no file says it.

    Raises:
        InputError: it is not an integer >= 3.
    """
    for name in LENGTH_FILES:
        path = os.path.join(encoder, name)
        length = read_json(path).get("max_seq_length")
        if length is not None:
            if type(length) is not int or length < SHORTEST:
                raise InputError(f"{path}: max_seq_length: expected an integer >= {SHORTEST}, got {length!r}")
            return length
    config = read_json(os.path.join(encoder, "config.json"))
    length = read_json(os.path.join(encoder, "tokenizer_config.json")).get("model_max_length")
    positions = config.get("max_position_embeddings")
    # transformers writes 1e30 where there is no limit.
    is_known = type(length) is int and type(positions) is int and SHORTEST <= length <= positions
    return length if is_known else None


def _read_prompts(folder: str) -> Prefixes:
    """Return the prompts of queries and of documents."""
    path = os.path.join(folder, "config_sentence_transformers.json")
    config = read_json(path)
    prompts = config.get("prompts") or {}
    if isinstance(prompts, Mapping):
        prompts = {name: prompt for name, prompt in prompts.items() if prompt is not None}
    if not isinstance(prompts, Mapping) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise InputError(f"{path}: prompts: expected an object of strings")
    for name, prompt in prompts.items():
        if not is_unicode(prompt):
            raise InputError(f"{path}: the prompt {name} is not valid Unicode")
    default_name = config.get("default_prompt_name")
    if default_name is not None and default_name not in list(prompts):
        raise InputError(f"{path}: default_prompt_name {default_name!r} is none of its prompts")
    default = prompts.get(default_name, "")
    query, document = (next((prompts[name] for name in names if name in prompts), default)
                       for names in (QUERY_PROMPTS, DOCUMENT_PROMPTS))
    return Prefixes(query, document)
