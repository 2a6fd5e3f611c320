"""Write a network as a folder that sentence-transformers loads, without torch.

ERNIE and BERT are one network, up to the embedding of a task that ERNIE adds to every token. It is folded into the
embeddings of token types, so that transformers' BertModel computes either. What comes after the encoder is a list of
modules: pooling, a dense layer for the encoder's pooler, another for the fc, and the L2 norm.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from simcse.console import InputError, as_input_error, some
from simcse.encoder.hugging_face import (
    ACTIVATIONS,
    CONFIG_FIELDS,
    EMBEDDINGS,
    LINEAR,
    NORMS,
    Weights,
    read_hugging_face,
)
from simcse.encoder.pooling import find_pooling
from simcse.encoder.sentence_transformers import Dense, read_dense, read_recipe
from simcse.encoder.weights import TOKENIZER_FILE, load_state
from simcse.files import read_json, sync, write_json
from simcse.hub_layout import MODULES_FILE
from simcse.text.prefixes import Prefixes
from simcse.text.wordpiece import RUST, SPECIAL_TOKENS, RustTokenizer, WordPiece

import numpy as np

FORMAT = "--format sentence_transformers"  # for messages
ENCODER_CLASSES = ("BertModel", "ErnieModel")  # of PaddleNLP, that are transformers' BertModel
WEIGHTS_FILE = "model.safetensors"
SETTINGS_FILE = "config_sentence_transformers.json"
LENGTH_FILE = "sentence_bert_config.json"
POOLING_FOLDER = "1_Pooling"
EXPORTED = {"exported_by": "simcse-semantic-index"}  # in SETTINGS_FILE, tells an export from other folders
# By these names a folder of this format is known.
FILES = (MODULES_FILE, SETTINGS_FILE, LENGTH_FILE, POOLING_FOLDER, "2_Dense", "3_Dense", WEIGHTS_FILE)
TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"  # activations
# The poolings of sentence-transformers that `Pooling.sentence_transformers` names, and the field of 1_Pooling's
# config.json that switches each on. Other readers of that file need all fields.
POOLING_FIELDS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
OTHER_POOLING_FIELDS = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens",
                        "pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken")
# Names of layers in PaddleNLP, and what transformers calls them.
OUTER_LAYERS = {**{ours: theirs for theirs, ours in EMBEDDINGS.items()}, "pooler.dense": "pooler.dense"}
INNER_LAYERS = {ours: theirs for theirs, ours in (LINEAR | NORMS).items()}
MATRICES = {"pooler.dense.weight", *(f"{name}.weight" for name in LINEAR.values())}  # that are transposed
TASKS, TYPES = "embeddings.task_type_embeddings.weight", "embeddings.token_type_embeddings.weight"
MODEL_CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
---

Text embeddings of {size} dimensions, L2-normalized, by an encoder that SimCSE semantic index has exported. Texts of
more than {max_seq_length} tokens are cut.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode_query(["..."])
documents = model.encode_document(["..."])
print(model.similarity(queries, documents))
```
"""


class DenseModule(NamedTuple):
    """A linear layer after the pooling, and its activation: TANH or IDENTITY."""

    dense: Dense
    activation: str


class ExportSettings(NamedTuple):
    """What a folder records beside the network.

    Attributes:
        max_seq_length: tokens that are read of a text, with [CLS] and [SEP].
        prefixes: put before queries and documents.
    """

    max_seq_length: int
    prefixes: Prefixes


def is_export(folder: str) -> bool:
    """Return whether `export_sentence_transformers` has written a folder."""
    return EXPORTED.items() <= read_json(os.path.join(folder, SETTINGS_FILE)).items()


def check_supported(record: Mapping[str, Any], source: str) -> None:
    """Refuse a checkpoint that sentence-transformers cannot compute.

    Args:
        record: the checkpoint's, as far as there is one.
        source: names the checkpoint in messages.

    Raises:
        InputError: its pooling or its encoder is not supported.
    """
    pooling = record.get("pooling", "pooler")
    with as_input_error(source, ValueError):
        mode = find_pooling(pooling).sentence_transformers
    if mode is None:
        raise InputError(f"{FORMAT}: {source} has --pooling {pooling}, which sentence-transformers does not have (its "
                         "mean counts [CLS] and [SEP]); use --format onnx")
    encoder_class = record.get("encoder_class", ENCODER_CLASSES[0])
    if encoder_class not in ENCODER_CLASSES:
        raise InputError(f"{FORMAT}: {source} has the encoder {encoder_class}; only {' and '.join(ENCODER_CLASSES)} "
                         "are supported; use --format onnx")


# -------------------------------------------------------------------------------------------------------------- writing
def export_sentence_transformers(model: Any, tokenizer: Any, folder: str, settings: ExportSettings) -> None:
    """Write a network and its tokenizer to a folder that sentence-transformers loads.

    Args:
        model: a `SimCSE` that `check_supported` has accepted.
        tokenizer: of `wordpiece.load_tokenizer`.

    Raises:
        InputError: the encoder or the tokenizer is not supported.
    """
    _write_encoder(model.ptm, folder)
    _write_tokenizer(tokenizer, folder, settings.max_seq_length)
    modules = ["Transformer", "Pooling"]
    _write_pooling(model, os.path.join(folder, POOLING_FOLDER))
    for module in _dense_modules(model):
        _write_dense(module, os.path.join(folder, f"{len(modules)}_Dense"))
        modules.append("Dense")
    modules.append("Normalize")
    _write_modules(modules, folder)
    _write_settings(settings, folder)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(MODEL_CARD.format(size=model.embedding_size, max_seq_length=settings.max_seq_length))


def _write_encoder(encoder: Any, folder: str) -> None:
    """Write config.json and model.safetensors of transformers' BertModel."""
    weights = bert_weights(encoder)
    config = {name: getattr(encoder.config, name) for name in CONFIG_FIELDS}
    if config["hidden_act"] not in ACTIVATIONS:
        raise InputError(f"{FORMAT}: the encoder's hidden_act {config['hidden_act']} is not supported; "
                         f"{', '.join(ACTIVATIONS)} are")
    # PaddleNLP's ERNIE does not compute with the value in its config.
    epsilons = {layer._epsilon for layer in encoder.sublayers() if hasattr(layer, "_epsilon")}
    if len(epsilons) != 1:
        raise InputError(f"{FORMAT}: the encoder's layer norms differ in epsilon: {sorted(epsilons)}")
    config["layer_norm_eps"] = epsilons.pop()
    config["type_vocab_size"] = len(weights[TYPES])
    write_json(os.path.join(folder, "config.json"),
               {"architectures": ["BertModel"], "model_type": "bert", **config})
    _write_weights(weights, os.path.join(folder, WEIGHTS_FILE))


def bert_weights(encoder: Any) -> Weights:
    """Return the weights of PaddleNLP's BertModel or ErnieModel as those of transformers' BertModel.

    Raises:
        InputError: the encoder has other layers.
    """
    state = {name: tensor.numpy().astype("float32") for name, tensor in encoder.state_dict().items()}
    tasks = state.pop(TASKS, None)
    if TYPES not in state:  # ERNIE without token types
        state[TYPES] = np.zeros((2, encoder.config.hidden_size), "float32")
    if tasks is not None:
        state[TYPES] = state[TYPES] + tasks[encoder.config.task_id]
    weights = {}
    unknown = []
    for name, array in state.items():
        module, _, parameter = name.rpartition(".")
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", module)
        if layer and layer[2] in INNER_LAYERS:
            module = layer[2]
            new_name = f"encoder.layer.{layer[1]}.{INNER_LAYERS[module]}.{parameter}"
        elif module in OUTER_LAYERS:
            new_name = f"{OUTER_LAYERS[module]}.{parameter}"
        else:
            unknown.append(name)
            continue
        weights[new_name] = array.T if f"{module}.{parameter}" in MATRICES else array
    if unknown:
        raise InputError(f"{FORMAT}: BERT has no {some(unknown)}, which the encoder has; use --format onnx")
    return weights


def _write_weights(weights: Weights, path: str) -> None:
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(array, "float32") for name, array in weights.items()}
    save_file(arrays, path, metadata={"format": "pt"})  # transformers reads no file without it


def _write_tokenizer(tokenizer: Any, folder: str, max_seq_length: int) -> None:
    """Write tokenizer.json, and the files beside it that make transformers take it as it is.

    BertTokenizerFast would not: it makes a normalizer of its own, and it does not split at symbols.
    """
    if isinstance(tokenizer, WordPiece):
        tokenizer.save_pretrained(folder)  # vocab.txt
        tokenizer.save_rust(folder)
        named = [token for token in SPECIAL_TOKENS if token in tokenizer.vocab]
        special_tokens = {f"{token[1:-1].lower()}_token": token for token in named}
    elif isinstance(tokenizer, RustTokenizer):
        tokenizer.save_pretrained(folder)
        config = read_json(os.path.join(folder, TOKENIZER_FILE))
        special_tokens = {name: config[name] for name in ("pad_token", "unk_token")}
    else:
        raise InputError(f"{FORMAT}: the encoder's tokenizer is not ERNIE's or BERT's, and has no tokenizer.json; use "
                         "--format onnx")
    # "[SEP]" in a text is text, unless tokenizer.json says otherwise.
    has_added_tokens = bool(read_json(os.path.join(folder, "tokenizer.json")).get("added_tokens"))
    write_json(os.path.join(folder, "special_tokens_map.json"), special_tokens)
    write_json(os.path.join(folder, TOKENIZER_FILE), {
        "tokenizer_class": RUST, **special_tokens, "model_max_length": max_seq_length,
        "split_special_tokens": not has_added_tokens, "clean_up_tokenization_spaces": False})


def _dense_modules(model: Any) -> list[DenseModule]:
    """Return the layers between pooling and L2 norm.

    Raises:
        InputError: the encoder's pooler has another activation than tanh.
    """
    modules = []
    if find_pooling(model.pooling).uses_pooler and model.with_pooler:
        activation = getattr(model.ptm.pooler, "pool_act", "tanh")  # ERNIE's has no choice
        if activation != "tanh":
            raise InputError(f"{FORMAT}: the encoder's pool_act {activation} is not supported; use --format onnx")
        modules.append(_dense_module(model.ptm.pooler.dense, TANH))
    if model.output_emb_size:
        modules.append(_dense_module(model.emb_reduce_linear, IDENTITY))
    return modules


def _dense_module(linear: Any, activation: str) -> DenseModule:
    return DenseModule(Dense(linear.weight.numpy(), linear.bias.numpy()), activation)


def _write_pooling(model: Any, folder: str) -> None:
    """Write the folder of the module Pooling."""
    mode = find_pooling(model.pooling).sentence_transformers
    os.mkdir(folder)
    config = {"word_embedding_dimension": model.ptm.config.hidden_size}
    for name, field in POOLING_FIELDS.items():
        config[field] = name == mode
    for field in OTHER_POOLING_FIELDS:
        config[field] = False
    write_json(os.path.join(folder, "config.json"), {**config, "include_prompt": True})
    sync(folder)


def _write_dense(module: DenseModule, folder: str) -> None:
    """Write the folder of a module Dense."""
    os.mkdir(folder)
    weight, bias = module.dense
    in_features, out_features = weight.shape
    write_json(os.path.join(folder, "config.json"), {
        "in_features": in_features, "out_features": out_features, "bias": True,
        "activation_function": module.activation})
    _write_weights({"linear.weight": weight.T, "linear.bias": bias}, os.path.join(folder, WEIGHTS_FILE))
    sync(folder)


def _write_modules(modules: list[str], folder: str) -> None:
    """Write modules.json; the first module is in the folder itself, and the others in folders of their own."""
    entries = []
    for number, module in enumerate(modules):
        path = f"{number}_{module}" if number else ""
        entries.append({"idx": number, "name": str(number), "path": path,
                        "type": f"sentence_transformers.models.{module}"})
    with open(os.path.join(folder, MODULES_FILE), "w", encoding="utf-8") as file:
        json.dump(entries, file, indent=2)


def _write_settings(settings: ExportSettings, folder: str) -> None:
    """Write the length to which texts are cut, the prompts and the similarity."""
    write_json(os.path.join(folder, LENGTH_FILE),
               {"max_seq_length": settings.max_seq_length, "do_lower_case": False})
    config: dict[str, Any] = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", **EXPORTED}
    if any(settings.prefixes):
        config["prompts"] = settings.prefixes._asdict()
        config["default_prompt_name"] = None
    write_json(os.path.join(folder, SETTINGS_FILE), config)


# -------------------------------------------------------------------------------------------------------------- reading
def open_sentence_transformers(folder: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Open what `export_sentence_transformers` wrote, as a function of input_ids and token_type_ids.

    It reads the files alone, as a new training run does; the modules after the encoder are computed by numpy.
    """
    from simcse.encoder.pretrained import encoder_from_record

    import paddle

    found = read_hugging_face(folder, "--output_path")
    encoder = encoder_from_record({"encoder_class": "BertModel", "encoder_config": found.config}, None)
    load_state(encoder, found.weights, folder)
    encoder.eval()
    recipe = read_recipe(folder)
    takes_first = find_pooling(recipe.pooling).sentence_transformers == "cls"
    hidden_size = found.config["hidden_size"]
    pooler = read_dense(recipe.pooler, "--output_path", hidden_size) if recipe.pooler else None
    fc = read_dense(recipe.fc, "--output_path", hidden_size) if recipe.fc else None

    def embed(input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        with paddle.no_grad():
            states = encoder(paddle.to_tensor(input_ids), token_type_ids=paddle.to_tensor(token_type_ids))[0].numpy()
        is_token = (input_ids != found.config["pad_token_id"])[:, :, None]
        vectors = states[:, 0] if takes_first else (states * is_token).sum(axis=1) / is_token.sum(axis=1)
        if pooler:
            vectors = np.tanh(vectors @ pooler.weight + pooler.bias)
        if fc:
            vectors = vectors @ fc.weight + fc.bias
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    return embed
