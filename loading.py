"""Encoders and checkpoints: from a folder or a name to a network and its tokenizer, and back."""

# isort: off
import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# `model` first: it prepares the environment in which paddle is imported.
from model import SimCSE

import numpy as np
import paddle
from paddle import nn
# isort: on

from checkpoint import new_folder, read_weights, write_weights
from console import InputError, first_line, warn
from data import DEFAULT_MODEL, distinct
from tokenizing import load_tokenizer

CONFIG_FILE = "simcse_config.json"
PARAMS_FILE = "model_state.pdparams"


class _NewlyInitialized(logging.Handler):
    """Collects the layers that paddlenlp says it left at random: it only logs them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.layers: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        named = re.search(r"newly initialized: \[(.*?)\]", record.getMessage())
        self.layers += re.findall(r"'([^']+)'", named[1]) if named else []


def load_encoder(model_name_or_path: str, dropout: float | None = None, kind: str = "AutoModel",
                 may_start_at_random: str = "pooler") -> nn.Layer:
    """A pretrained encoder by hub name or folder, every layer of it loaded, in float32.

    Args:
        dropout: hidden and attention dropout rate; None: the encoder's own.
        kind: the class of paddlenlp that loads it.
        may_start_at_random: layers that may be missing from its weights, by what is in their names. Encoders pretrained
            without a pooler get a random one, which is said on stderr, to be trained.

    Raises:
        InputError: no such encoder, or other layers are missing from its weights.
    """
    import paddlenlp
    from paddlenlp.utils.log import logger

    logger.set_level("WARNING")
    rates = {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    for name in os.listdir(model_name_or_path) if os.path.isdir(model_name_or_path) else ():
        if name.endswith(".pdparams"):  # paddlenlp would run what is in it
            read_weights(os.path.join(model_name_or_path, name), "--model_name_or_path")
    seen = _NewlyInitialized()
    handlers, logger.logger.handlers = logger.logger.handlers, [seen]  # its several lines become one below
    try:
        encoder = getattr(paddlenlp.transformers, kind).from_pretrained(model_name_or_path, **rates)
    except Exception as error:  # paddlenlp raises OSError, ValueError, KeyError, RuntimeError for the same reasons
        raise InputError(f"--model_name_or_path {model_name_or_path}: neither a folder with an encoder nor one that "
                         f"can be fetched by that name: {first_line(error)}") from None
    finally:
        logger.logger.handlers = handlers
    if missing := [name for name in seen.layers if may_start_at_random not in name and "pooler" not in name]:
        raise InputError(f"--model_name_or_path {model_name_or_path}: its weights lack {_some(missing)}")
    if seen.layers:
        warn(f"{model_name_or_path} has no trained {may_start_at_random}: {_some(seen.layers)} start at random")
    return encoder


@contextlib.contextmanager
def _weights_not_drawn() -> Iterator[None]:
    """Build layers without drawing weights at random: for ERNIE-base that takes longer than all else of its start."""
    from unittest.mock import patch

    zeros = nn.initializer.Constant(0.0)
    # Paddle's layers draw them by the global initializer or, in ERNIE, by TruncatedNormal; paddlenlp then draws again.
    nn.initializer.set_global_initializer(zeros)
    try:
        with (patch.object(nn.initializer.TruncatedNormal, "forward", lambda _, *where: zeros.forward(*where)),
              patch.object(paddle.tensor, "normal", lambda mean, std, shape: paddle.empty(shape))):
            yield
    finally:
        nn.initializer.set_global_initializer(None)


def _encoder_from_record(record: dict, dropout: float | None) -> nn.Layer:
    """The encoder that a checkpoint describes, its weights not set yet: the checkpoint has them all."""
    import paddlenlp

    paddlenlp.utils.log.logger.set_level("WARNING")
    encoder_class = getattr(paddlenlp.transformers, record["encoder_class"])
    config = encoder_class.config_class.from_dict(_portable(record["encoder_config"]))
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    with _weights_not_drawn():
        return encoder_class(config)


def _portable(config: dict) -> dict:
    """An encoder's config without what one paddlenlp writes and another refuses to read."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _some(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def load_state(model: SimCSE, state: dict[str, np.ndarray], source: str) -> None:
    """Load every tensor of `state` into `model`, cast to the model's own dtype.

    Raises:
        InputError: tensors that are missing, unexpected or of another shape, by name.
    """
    own = model.state_dict()
    wrong_shape = [f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
                   for name in own if name in state and list(state[name].shape) != list(own[name].shape)]
    faults = {"missing": [name for name in own if name not in state],
              "unexpected": [name for name in state if name not in own], "wrongly shaped": wrong_shape}
    if any(faults.values()):
        found = "; ".join(f"{kind}: {_some(names)}" for kind, names in faults.items() if names)
        raise InputError(f"{source} does not fit the network; {found}")
    for name, tensor in own.items():
        tensor.set_value(paddle.to_tensor(state[name]).astype(tensor.dtype))


def read_record(folder: str) -> dict:
    """What `simcse_config.json` in a checkpoint or exported folder records; {} where there is none."""
    path = os.path.join(folder, CONFIG_FILE)
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {first_line(error)}") from None


def load_model(params_path: str, model_name_or_path: str | None = None, output_emb_size: int | None = None,
               flag: str = "--params_path", dropout: float | None = None,
               settings: dict | None = None) -> tuple[SimCSE, Any, dict]:
    """Load a checkpoint, strictly.

    Args:
        params_path: the .pdparams file, this project's or the original's (which has no simcse_config.json beside it).
        model_name_or_path: the encoder; None: what the checkpoint records, else DEFAULT_MODEL.
        output_emb_size: None, or what the checkpoint must have (0: no fc), or one of the smaller sizes it was trained
            for, whose first numbers then are the embedding.
        flag: the flag that named the file, for messages.
        dropout: the encoder's dropout rate, for training on.
        settings: further arguments of `SimCSE`; what is not in them is from the checkpoint's record.

    Returns:
        The network in evaluation mode, the tokenizer, and the checkpoint's record.

    Raises:
        InputError: unreadable file; a tensor is missing, unexpected or wrongly shaped; `output_emb_size` contradicts.
    """
    folder = os.path.dirname(params_path) or "."
    state = read_weights(params_path, flag)
    if not any(name.startswith("ptm.") for name in state):
        raise InputError(f"{flag} {params_path}: not a SimCSE checkpoint (no ptm.* tensors); "
                         "an encoder without SimCSE training is given by --model_name_or_path")
    record = read_record(folder)
    size = state["emb_reduce_linear.weight"].shape[-1] if "emb_reduce_linear.weight" in state else 0
    if output_emb_size is not None and output_emb_size != size:
        if output_emb_size not in (smaller := record.get("matryoshka_dims", [])):
            raise InputError(f"--output_emb_size {output_emb_size}: {params_path} has "
                             f"{', '.join(map(str, distinct([size, *smaller]))) if size else 'no fc: 0'}")
        size = output_emb_size
        for name in ("emb_reduce_linear.weight", "emb_reduce_linear.bias"):
            state[name] = state[name][..., :size]
    if model_name_or_path or not record:
        name = model_name_or_path or DEFAULT_MODEL
        encoder = load_encoder(name, dropout)
    else:
        name = record["model_name_or_path"]
        encoder = _encoder_from_record(record, dropout)
    tokenizer = checkpoint_tokenizer(params_path, name)
    recorded = {key: record[key] for key in ("margin", "scale", "pooling") if key in record}
    model = SimCSE(encoder, output_emb_size=size, **{**recorded, **(settings or {})})
    model.infer_with_pooler = record.get("with_pooler", True)
    model.matryoshka_dims = [dim for dim in record.get("matryoshka_dims", [size]) if dim <= size]
    load_state(model, state, f"{flag} {params_path}")
    model.eval()
    return model, tokenizer, make_record(model, name, record.get("max_seq_length"))


def checkpoint_tokenizer(params_path: str, model_name_or_path: str | None = None) -> Any:
    """The tokenizer beside a checkpoint; where there is none, that of its encoder, named or recorded."""
    folder = os.path.dirname(params_path) or "."
    if os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        return load_tokenizer(folder)
    return load_tokenizer(model_name_or_path or read_record(folder).get("model_name_or_path", DEFAULT_MODEL))


def make_record(model: SimCSE, model_name_or_path: str, max_seq_length: int | None) -> dict:
    """What later stages have to know of a checkpoint: the content of simcse_config.json."""
    import paddlenlp

    return {"model_name_or_path": model_name_or_path, "output_emb_size": model.output_emb_size,
            "pooling": model.pooling, "with_pooler": model.infer_with_pooler,
            "matryoshka_dims": model.matryoshka_dims, "scale": model.scale, "margin": model.margin,
            "max_seq_length": max_seq_length, "encoder_class": type(model.ptm).__name__,
            "encoder_config": _portable(model.ptm.config.to_dict()),
            "versions": {"paddlepaddle": paddle.__version__, "paddlenlp": paddlenlp.__version__}}


def write_json(path: str, content: dict) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=2)


def write_record(folder: str, record: dict, tokenizer: Any) -> None:
    """Write simcse_config.json and the tokenizer's files."""
    tokenizer.save_pretrained(folder)
    write_json(os.path.join(folder, CONFIG_FILE), record)


def save_checkpoint(folder: str, model: SimCSE, tokenizer: Any, record: dict, params_file: str = PARAMS_FILE,
                    also: Callable[[str], None] | None = None) -> None:
    """Write weights, tokenizer, simcse_config.json and what `also` adds to `folder`, which appears complete or not at
    all."""
    with new_folder(folder) as temporary:
        write_weights(os.path.join(temporary, params_file), model.state_dict())
        write_record(temporary, record, tokenizer)
        if also:
            also(temporary)


def save_encoder(folder: str, network: nn.Layer, tokenizer: Any, also: Callable[[str], None]) -> None:
    """Write an encoder as --model_name_or_path takes it, and what `also` adds, to `folder`, likewise."""
    with new_folder(folder) as temporary:
        network.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        also(temporary)
