"""Read an encoder from a folder in the layout of Hugging Face's transformers, without torch.

Each supported kind is BERT up to one difference, which is folded into the weights here, so that PaddleNLP's BertModel
computes it: DistilBERT has no token types, XLM-RoBERTa counts positions from another number, ERNIE adds the embedding
of a task to every token.
"""

import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from simcse.console import InputError, as_input_error, some
from simcse.encoder.torch_file import read_torch_file
from simcse.encoder.weights import read_safetensors
from simcse.files import read_json
from simcse.hub_layout import HUGGING_FACE_WEIGHTS

import numpy as np

Weights = dict[str, np.ndarray]

# Activations that both libraries have, by transformers' names, and PaddleNLP's names.
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "tanh": "tanh"}
# What transformers takes where config.json lacks a field; PaddleNLP takes other values.
DEFAULTS = {"hidden_act": "gelu", "type_vocab_size": 2, "pad_token_id": 0, "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512}
# Names of layers of BERT, and what PaddleNLP calls them. The matrices of LINEAR are transposed.
EMBEDDINGS = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "embeddings.LayerNorm": "embeddings.layer_norm",
}
LINEAR = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
}
NORMS = {"attention.output.LayerNorm": "norm1", "output.LayerNorm": "norm2"}
DISTILBERT_LAYER = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
DISTILBERT_CONFIG = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size", "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob", "activation": "hidden_act"}
# What PaddleNLP's BertConfig takes of a config.json.
CONFIG_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
    "initializer_range", "pad_token_id", "layer_norm_eps")
INTEGERS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings", "type_vocab_size")
# Layers of the head that predicts tokens, and what PaddleNLP calls them. The matrix of its last layer, the decoder, is
# that of the word embeddings.
BERT_HEAD = {"cls.predictions.transform.dense": "transform", "cls.predictions.transform.LayerNorm": "layer_norm",
             "cls.predictions": "decoder"}
DISTILBERT_HEAD = {"vocab_transform": "transform", "vocab_layer_norm": "layer_norm", "vocab_projector": "decoder"}
XLM_ROBERTA_HEAD = {"lm_head.dense": "transform", "lm_head.layer_norm": "layer_norm", "lm_head": "decoder"}
HEAD_WEIGHTS = {"transform.weight", "transform.bias", "layer_norm.weight", "layer_norm.bias", "decoder.bias"}
# Weights that are no part of an encoder: heads, and the position_ids buffer, which BertModel makes itself.
_OTHER_PARTS = re.compile(r"(cls|lm_head|(pre_)?classifier|vocab_\w+|qa_outputs)\.|.*\bposition_ids$")


class HuggingFaceEncoder(NamedTuple):
    """An encoder as PaddleNLP's BertModel.

    Attributes:
        kind: model_type of its config.json.
        file: the file of its weights.
        config: of BertModel.
        weights: of BertModel, by its names; some kinds, and some files, have no pooler.
        head: of BertForMaskedLM's head that predicts tokens: HEAD_WEIGHTS, or none where the file has no such head.
    """

    kind: str
    file: str
    config: dict[str, Any]
    weights: Weights
    head: Weights


def read_hugging_face(folder: str, flag: str) -> HuggingFaceEncoder:
    """Return the encoder in a folder.

    Args:
        flag: the flag that named the folder, for messages.

    Raises:
        InputError: the folder is damaged, or its model_type is not supported.
    """
    where = f"{flag} {folder}"
    config = read_json(os.path.join(folder, "config.json"))
    if not config:
        raise InputError(f"{where}: has no config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{where}: config.json has model_type {kind!r}; {', '.join(KINDS)} are supported")
    file = next(name for name in HUGGING_FACE_WEIGHTS if os.path.isfile(os.path.join(folder, name)))
    weights = {}
    other_parts = {}
    for name, array in _read_files(folder, file, where).items():
        name = name.removeprefix("module.").removeprefix(f"{KINDS[kind].prefix}.")
        if _OTHER_PARTS.match(name):
            other_parts[name] = array
        else:
            weights[name] = array.astype("float32")
    head = {}
    if config.get("tie_word_embeddings", True):  # PaddleNLP's head has no matrix of its own
        head = _rename_head(other_parts, KINDS[kind].head)
    with as_input_error(where, KeyError, TypeError, ValueError):
        config, weights = KINDS[kind].to_bert({**DEFAULTS, **KINDS[kind].defaults, **config}, weights)
        _check_config(config)
        config["hidden_act"] = ACTIVATIONS[config["hidden_act"]]
        return HuggingFaceEncoder(kind, file, {name: config[name] for name in CONFIG_FIELDS if name in config},
                                  _rename(weights), head)


def _read_files(folder: str, file: str, where: str) -> Weights:
    """Return the arrays of a file of weights, or of those that an index names."""
    if not file.endswith(".index.json"):
        return read_weight_file(os.path.join(folder, file), where)
    file_of_weight = read_json(os.path.join(folder, file)).get("weight_map")
    if not isinstance(file_of_weight, dict) or not all(isinstance(name, str) for name in file_of_weight.values()):
        raise InputError(f"{where}: {file} has no weight_map")
    weights: Weights = {}
    for shard in sorted(set(file_of_weight.values())):
        path = os.path.join(folder, os.path.basename(shard))  # it names no file of another folder
        if not os.path.isfile(path):
            raise InputError(f"{where}: {file} names {shard}, which is missing")
        weights |= read_weight_file(path, where)
    return weights


def read_weight_file(path: str, where: str) -> Weights:
    """Return the arrays of a .safetensors or .bin file by name, bfloat16 as float32.

    Args:
        where: names its folder in messages.

    Raises:
        InputError: the file is damaged.
    """
    unreadable = f"{where}: {os.path.basename(path)} cannot be read"
    with as_input_error(unreadable, Exception):  # a damaged file raises anything
        if path.endswith(".bin"):
            return read_torch_file(path)
        return read_safetensors(path)


def _check_config(config: dict[str, Any]) -> None:
    """Raise ValueError if BertModel cannot be as a config.json says."""
    for name in INTEGERS:
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {config[name]!r}")
    if not isinstance(config["layer_norm_eps"], float) or not 0 < config["layer_norm_eps"] < 1:
        raise ValueError(f"layer_norm_eps: expected a number in (0, 1), got {config['layer_norm_eps']!r}")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"position_embedding_type {config['position_embedding_type']} is not supported")
    if config.get("is_decoder"):
        raise ValueError("is_decoder true is not supported")
    if config["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"hidden_act {config['hidden_act']} is not supported; {', '.join(ACTIVATIONS)} are")


def _rename(weights: Weights) -> Weights:
    """Return weights of transformers' BERT under the names that PaddleNLP has for them, matrices transposed.

    Raises:
        ValueError: a weight is none of BERT's.
    """
    renamed = {}
    unknown = []
    for name, array in weights.items():
        module, parameter = _split_name(name)
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", module)
        if layer and layer[2] in LINEAR | NORMS:
            renamed[f"encoder.layers.{layer[1]}.{(LINEAR | NORMS)[layer[2]]}.{parameter}"] = (
                array.T if layer[2] in LINEAR and parameter == "weight" else array)
        elif module in EMBEDDINGS:
            renamed[f"{EMBEDDINGS[module]}.{parameter}"] = array
        elif module == "pooler.dense":
            renamed[f"pooler.dense.{parameter}"] = array.T if parameter == "weight" else array
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"no weights of BERT: {some(unknown)}")
    return renamed


def _rename_head(weights: Weights, layers: dict[str, str]) -> Weights:
    """Return the HEAD_WEIGHTS among the weights of a file, matrices transposed; none where one of them is missing.

    Args:
        layers: the kind's names of the layers, and what PaddleNLP calls them.
    """
    head = {}
    for name, array in weights.items():
        module, parameter = _split_name(name)
        renamed = f"{layers.get(module)}.{parameter}"
        if renamed in HEAD_WEIGHTS:
            head[renamed] = (array.T if renamed == "transform.weight" else array).astype("float32")
    return head if head.keys() == HEAD_WEIGHTS else {}


def _split_name(name: str) -> tuple[str, str]:
    """Return the layer and the parameter that a weight's name consists of.

    The oldest files call weight and bias of a layer normalization gamma and beta.
    """
    module, _, parameter = name.rpartition(".")
    return module, {"gamma": "weight", "beta": "bias"}.get(parameter, parameter)


# ------------------------------------------------------------------------------------------------------------ the kinds
def _keep_bert(config: dict[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
    return config, weights


def _add_task(config: dict[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
    """ERNIE: add the embedding of task 0, which transformers takes, to that of every token type."""
    tasks = weights.pop("embeddings.task_type_embeddings.weight", None)
    if config.get("use_task_id") and tasks is not None:
        types = "embeddings.token_type_embeddings.weight"
        weights[types] = weights[types] + tasks[0]
    return config, weights


def _drop_first_positions(config: dict[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
    """XLM-RoBERTa: drop the first pad_token_id + 1 position embeddings, from which it counts positions."""
    positions = "embeddings.position_embeddings.weight"
    weights[positions] = weights[positions][config["pad_token_id"] + 1 :]
    return {**config, "max_position_embeddings": len(weights[positions])}, weights


def _rename_distilbert(config: dict[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
    """DistilBERT: rename config and weights as BERT's, and add token type embeddings of 0."""
    renamed = {}
    for name, array in weights.items():
        layer = re.fullmatch(r"transformer\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer:
            name = f"encoder.layer.{layer[1]}.{DISTILBERT_LAYER.get(layer[2], layer[2])}.{layer[3]}"
        renamed[name] = array
    config = {DISTILBERT_CONFIG.get(name, name): value for name, value in config.items()}
    renamed["embeddings.token_type_embeddings.weight"] = np.zeros((2, config["hidden_size"]), "float32")
    return {**config, "type_vocab_size": 2, "layer_norm_eps": 1e-12}, renamed


class Kind(NamedTuple):
    """A kind of encoder.

    Attributes:
        prefix: of the encoder's weights in a file that also has a head.
        to_bert: makes of its config and its weights those of BERT, by transformers' names.
        head: its names of the layers of the head that predicts tokens, and what PaddleNLP calls them.
        defaults: fields of config.json of which it has other defaults than BERT.
    """

    prefix: str
    to_bert: Callable[[dict[str, Any], Weights], tuple[dict[str, Any], Weights]]
    head: dict[str, str]
    defaults: dict[str, Any]


KINDS = {  # by model_type
    "bert": Kind("bert", _keep_bert, BERT_HEAD, {}),
    "ernie": Kind("ernie", _add_task, BERT_HEAD, {}),
    "distilbert": Kind("distilbert", _rename_distilbert, DISTILBERT_HEAD, {}),
    "xlm-roberta": Kind("roberta", _drop_first_positions, XLM_ROBERTA_HEAD, {"pad_token_id": 1}),
}
