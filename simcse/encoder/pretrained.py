"""PaddleNLP's encoders, loaded strictly."""

import logging
import os
import re
from unittest.mock import patch

from simcse.console import InputError, reported, some, warn
from simcse.encoder.weights import read_weights

import paddle
from paddle import nn


def load_pretrained(model_name_or_path: str, dropout: float | None = None, kind: str = "AutoModel",
                 may_start_at_random: str = "pooler") -> nn.Layer:
    """A pretrained encoder by hub name or folder, every layer of it loaded by paddlenlp's class `kind`, in float32,
    with a rate of hidden and attention dropout or, None, its own. InputError: no such encoder, or its weights lack
    layers other than those with `may_start_at_random` in their names: some encoders were pretrained without a pooler,
    and get a random one to be trained, which is said on stderr."""
    import paddlenlp
    from paddlenlp.utils.log import logger

    logger.set_level("WARNING")
    rates = {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    for name in os.listdir(model_name_or_path) if os.path.isdir(model_name_or_path) else ():
        if name.endswith(".pdparams"):  # paddlenlp would run what is in it
            read_weights(os.path.join(model_name_or_path, name), "--model_name_or_path")
    records: list[logging.LogRecord] = []  # paddlenlp only logs which layers it left at random; one line says so below
    with (reported(f"--model_name_or_path {model_name_or_path}: neither a folder with an encoder nor one that can be "
                   "fetched by that name", Exception),  # OSError, ValueError, KeyError, RuntimeError of paddlenlp
          patch.object(logger.logger, "handle", records.append)):
        encoder = getattr(paddlenlp.transformers, kind).from_pretrained(model_name_or_path, **rates)
    said = re.findall(r"newly initialized: \[(.*?)\]", "\n".join(record.getMessage() for record in records))
    layers = re.findall(r"'([^']+)'", ",".join(said))
    if missing := [name for name in layers if may_start_at_random not in name and "pooler" not in name]:
        raise InputError(f"--model_name_or_path {model_name_or_path}: its weights lack {some(missing)}")
    if layers:
        warn(f"{model_name_or_path} has no trained {may_start_at_random}: {some(layers)} start at random")
    return encoder


def encoder_from_record(record: dict, dropout: float | None) -> nn.Layer:
    """The encoder that a checkpoint describes, its weights not set yet: the checkpoint has them all."""
    import paddlenlp

    paddlenlp.utils.log.logger.set_level("WARNING")
    encoder_class = getattr(paddlenlp.transformers, record["encoder_class"])
    config = encoder_class.config_class.from_dict(portable(record["encoder_config"]))
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    # For ERNIE-base drawing weights at random takes longer than all else of its start. Paddle's layers draw them by the
    # global initializer or, in ERNIE, by TruncatedNormal; paddlenlp then draws again.
    zeros = nn.initializer.Constant(0.0)
    nn.initializer.set_global_initializer(zeros)
    try:
        with (patch.object(nn.initializer.TruncatedNormal, "forward", lambda _, *where: zeros.forward(*where)),
              patch.object(paddle.tensor, "normal", lambda mean, std, shape: paddle.empty(shape))):
            return encoder_class(config)
    finally:
        nn.initializer.set_global_initializer(None)


def portable(config: dict) -> dict:
    """An encoder's config without what one paddlenlp writes and another refuses to read."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def remove_layers(encoder: nn.Layer) -> None:
    """Take the layers out of an encoder, whose output then is what would go into the first; InputError where it is no
    stack of layers after embeddings."""
    layers = getattr(getattr(encoder, "encoder", None), "layers", None)
    if layers is None or not hasattr(encoder, "embeddings"):
        raise InputError(f"--pooling: {type(encoder).__name__} has no layers that can be removed")
    encoder.encoder.layers, encoder.encoder.num_layers = nn.LayerList(), 0
    encoder.config.num_hidden_layers = 0


def freeze_pooler(encoder: nn.Layer) -> None:
    """Take an encoder's pooler, where it has one and nothing asks it, out of training."""
    for parameter in encoder.pooler.parameters() if getattr(encoder, "pooler", None) else ():
        parameter.stop_gradient = True
