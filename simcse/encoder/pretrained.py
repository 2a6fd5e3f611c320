"""Load PaddleNLP's encoders strictly, and change what of them is computed or trained."""

import errno
import os
import re
from typing import Any

from simcse.console import InputError, as_input_error, describe_machine_error, log, some, summarize_error, warn
from simcse.encoder.hugging_face import Weights, read_hugging_face
from simcse.encoder.paddle_patches import captured_paddlenlp_log, quiet_paddlenlp, zero_initial_weights
from simcse.encoder.weights import load_state, read_weights
from simcse.hub_layout import HUGGING_FACE_WEIGHTS, find_encoder, is_hugging_face
from simcse.machine import RANK
from simcse.text.wordpiece import load_tokenizer

import numpy as np
import paddle
from paddle import nn

DISK_ERRORS = (errno.EACCES, errno.EDQUOT, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS)
# What paddle and paddlenlp raise of a configuration with odd values. RuntimeError and MemoryError tell of the machine.
CONFIG_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
MASKED_LM = "AutoModelForMaskedLM"
# PaddleNLP's classes of an encoder in the layout of Hugging Face, by the class that loads one in PaddleNLP's layout.
HUGGING_FACE_CLASSES = {"AutoModel": "BertModel", MASKED_LM: "BertForMaskedLM"}


def load_pretrained(model_name_or_path: str, dropout: float | None = None, kind: str = "AutoModel",
                    optional_part: str = "pooler", uses_pooler: bool = True) -> nn.Layer:
    """Load a pretrained encoder by hub name or folder, all its layers, in float32.

    Args:
        dropout: rate of hidden and attention dropout; None: the encoder's own.
        kind: paddlenlp's class that loads it.
        optional_part: weights whose names contain it may be missing, since some encoders were pretrained without them.
            They start at random, with a warning.
        uses_pooler: False: the weights may lack the pooler, too, and there is no warning, since nobody reads its
            output, or its weights are loaded afterwards.

    Raises:
        InputError: there is no such encoder, it cannot be loaded, or its weights lack other layers.
    """
    import paddlenlp

    quiet_paddlenlp()
    model_name_or_path = find_encoder(model_name_or_path)
    if is_hugging_face(model_name_or_path):
        return _load_hugging_face(model_name_or_path, dropout, kind, uses_pooler)
    advice = _advise_on_layout(model_name_or_path)
    _check_pickles(model_name_or_path)
    rates = {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    try:
        with captured_paddlenlp_log() as messages:  # it only logs which layers it left at random
            encoder = getattr(paddlenlp.transformers, kind).from_pretrained(model_name_or_path, **rates)
    except Exception as error:  # of a damaged folder paddlenlp raises anything
        reason = describe_load_error(error)
        if advice:
            reason = f"cannot be loaded; {advice} (PaddleNLP says: {summarize_error(error)})"
        raise InputError(f"--model_name_or_path {model_name_or_path}: {reason}") from None
    random_layers = _random_layers(messages)
    if not uses_pooler:
        random_layers = [name for name in random_layers if "pooler" not in name]
    missing = [name for name in random_layers if optional_part not in name]
    if missing:
        reason = f"its weights lack {some(missing)}"
        if advice:
            reason = f"{reason}; {advice}"
        raise InputError(f"--model_name_or_path {model_name_or_path}: {reason}")
    if random_layers:
        warn(f"{model_name_or_path} has no trained {optional_part}: {some(random_layers)} start at random")
    return encoder


def _load_hugging_face(folder: str, dropout: float | None, kind: str, uses_pooler: bool) -> nn.Layer:
    """Load an encoder from a folder in the layout of Hugging Face's transformers; see `load_pretrained`."""
    source = f"--model_name_or_path {folder}"
    found = read_hugging_face(folder, "--model_name_or_path")
    # BertModel leaves out padding by its id, which config.json may not have right: transformers does not use that.
    config = {**found.config, "pad_token_id": load_tokenizer(folder).pad_token_id}
    record = {"encoder_class": HUGGING_FACE_CLASSES[kind], "encoder_config": config}
    encoder = encoder_from_record(record, dropout, source)
    hidden_size = encoder.config.hidden_size
    weights = dict(found.weights)
    if not any(name.startswith("pooler.") for name in weights):
        if uses_pooler:
            warn(f"{folder} has no trained pooler: its pooler starts at random")
        weights["pooler.dense.weight"] = _draw_matrix(hidden_size)
        weights["pooler.dense.bias"] = np.zeros(hidden_size, "float32")
    if kind == MASKED_LM:
        head = found.head
        if not head:
            warn(f"{folder} has no trained head that predicts tokens: the head starts at random")
            head = _draw_head(encoder.config)
        weights = _join_head(weights, head)
    load_state(encoder, weights, source)
    if not RANK:
        log(f"{folder}: {found.kind} in the layout of Hugging Face, {found.file}: "
            f"{encoder.config.num_hidden_layers} layers of {hidden_size}")
    return encoder


def _draw_matrix(size: int) -> np.ndarray:
    """Return random weights to start from, float32 [size, size]; they depend on paddle's seed."""
    generator = np.random.default_rng(int(paddle.randint(0, 2**31 - 1).item()))
    return generator.normal(0, 0.02, (size, size)).astype("float32")


def _draw_head(config: Any) -> Weights:
    """Return weights of the head that predicts tokens to start from, by the names of `hugging_face.HEAD_WEIGHTS`.

    Args:
        config: PaddleNLP's, of the encoder.
    """
    hidden_size = config.hidden_size
    return {"transform.weight": _draw_matrix(hidden_size), "transform.bias": np.zeros(hidden_size, "float32"),
            "layer_norm.weight": np.ones(hidden_size, "float32"), "layer_norm.bias": np.zeros(hidden_size, "float32"),
            "decoder.bias": np.zeros(config.vocab_size, "float32")}


def _join_head(weights: Weights, head: Weights) -> Weights:
    """Return the weights of a BertForMaskedLM, those of its BertModel and of its head.

    PaddleNLP has the decoder's bias under two names, and the word embeddings are the decoder's matrix.
    """
    joined = {f"bert.{name}": array for name, array in weights.items()}
    joined |= {f"cls.predictions.{name}": array for name, array in head.items()}
    joined["cls.predictions.decoder_bias"] = head["decoder.bias"]
    if "embeddings.word_embeddings.weight" in weights:
        joined["cls.predictions.decoder.weight"] = weights["embeddings.word_embeddings.weight"]
    return joined


def describe_load_error(error: Exception) -> str:
    """Return one line about an error that paddlenlp has raised while it loaded an encoder.

    It raises OSError where it finds no encoder. It also does so in place of an error of the disk, which is then the
    context of the one that it raises.
    """
    machine_error = describe_machine_error(error)
    if machine_error is not None:
        return f"cannot be loaded: {machine_error}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            return f"cannot be loaded: {cause}"
        cause = cause.__context__
    if isinstance(error, OSError):
        return ("neither a folder with an encoder nor one that can be fetched by that name: "
                f"{summarize_error(error)}")
    return f"cannot be loaded: {summarize_error(error)}"


def _advise_on_layout(folder: str) -> str:
    """Return what to do about a folder whose weights may be those of transformers under another name; "": nothing."""
    if not os.path.isdir(folder):
        return ""
    names = os.listdir(folder)
    foreign = [name for name in names if name.endswith((".safetensors", ".bin"))]
    if not foreign or any(name.endswith(".pdparams") or name in HUGGING_FACE_WEIGHTS for name in names):
        return ""
    return (f"{foreign[0]} may have weights of Hugging Face transformers: name a single file model.safetensors or "
            "pytorch_model.bin, or add the index of several files")


def _check_pickles(folder: str) -> None:
    """Raise InputError if a file of weights has more than tensors, since paddlenlp would run what is in it."""
    if not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if name.endswith(".pdparams"):
            read_weights(os.path.join(folder, name), "--model_name_or_path")


def _random_layers(messages: list[str]) -> list[str]:
    """Return the names of the layers that, by paddlenlp's log, are initialized at random."""
    names = []
    for listed in re.findall(r"newly initialized: \[(.*?)\]", "\n".join(messages)):
        names += re.findall(r"'([^']+)'", listed)
    return names


def encoder_from_record(record: dict, dropout: float | None, source: str = "the record") -> nn.Layer:
    """Make the encoder that a checkpoint's record describes; its weights are 0, since the checkpoint has them all.

    Args:
        record: has `weights.ENCODER_FIELDS`.
        dropout: rate of hidden and attention dropout; None: the recorded one.
        source: names the record in messages.

    Raises:
        InputError: paddlenlp has no such encoder, or cannot make one of this configuration.
    """
    import paddlenlp

    quiet_paddlenlp()
    name = record["encoder_class"]
    config_class = getattr(getattr(paddlenlp.transformers, name, None), "config_class", None)
    if config_class is None:
        raise InputError(f"{source}: encoder_class: paddlenlp has no encoder {name}")
    with as_input_error(f"{source}: encoder_config: no {name} can be made of it", *CONFIG_ERRORS):
        config = config_class.from_dict(drop_incompatible_keys(record["encoder_config"]))
        if dropout is not None:
            config.hidden_dropout_prob = dropout
            config.attention_probs_dropout_prob = dropout
        with zero_initial_weights():
            return getattr(paddlenlp.transformers, name)(config)


def drop_incompatible_keys(config: dict) -> dict:
    """Return an encoder's config without `quantization_config`, which paddlenlp 3.0 writes and 2.8 cannot read."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def freeze_pooler(encoder: nn.Layer) -> None:
    """Take the pooler of an encoder, if it has one, out of training."""
    pooler = getattr(encoder, "pooler", None)
    if pooler is None:
        return
    for parameter in pooler.parameters():
        parameter.stop_gradient = True
