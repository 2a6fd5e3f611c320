"""Run a network without layers as a table of tokens and one of positions, without paddle."""

import os

from simcse.console import InputError
from simcse.encoder.paddle_patches import without_norm
from simcse.encoder.pooling import find_pooling
from simcse.encoder.weights import CONFIG_FILE, GRAPH_FIELDS, TABLE_FILE, read_record
from simcse.files import write_json

import numpy as np
import paddle
from paddle import nn

TOLERANCE = 1e-5  # of the table's embeddings, to the network's


def write_table(model: nn.Layer, folder: str) -> bool:
    """Write the tables of a network for a `TableEngine`, if its embeddings are what that computes.

    Returns:
        False if they are not: the network has layers, or embeddings or a pooling of another kind.
    """
    tables = _make_tables(model)
    if tables is None:
        return False
    path = os.path.join(folder, TABLE_FILE)
    np.savez(path, **tables)
    write_json(os.path.join(folder, CONFIG_FILE), {
        "embedding_size": model.embedding_size, "max_positions": model.max_positions, "pooling": model.pooling})
    if _is_same(TableEngine(folder), model, len(tables["tokens"]), len(tables["positions"])):
        return True
    os.remove(path)
    return False


def _make_tables(model: nn.Layer) -> dict[str, np.ndarray] | None:
    """Return what a `TableEngine` reads of the network; None if it has layers or embeddings of another kind."""
    if not find_pooling(model.pooling).removes_layers:
        return None
    embeddings = model.ptm.embeddings
    if not all(hasattr(embeddings, part) for part in ("word_embeddings", "position_embeddings", "layer_norm")):
        return None
    model.eval()
    words = embeddings.word_embeddings.weight.numpy()
    # A text that repeats one token shows the positions: without the token's own embedding, its inputs to the layer norm
    # are the embeddings of the positions, with that of token type 0. (The padding token's own embedding is not used.)
    token = 1 if model.ptm.config.pad_token_id != 1 else 0
    with paddle.no_grad(), without_norm(embeddings):
        ids = paddle.full([1, len(embeddings.position_embeddings.weight)], token, "int64")
        positions = embeddings(ids, token_type_ids=paddle.zeros_like(ids)).numpy()[0] - words[token]
    hidden_size = words.shape[1]
    if model.output_emb_size:
        weight = model.emb_reduce_linear.weight.numpy()
        shift = model.emb_reduce_linear.bias.numpy()
    else:
        weight = np.eye(hidden_size, dtype="float32")
        shift = np.zeros(hidden_size, "float32")
    return {"tokens": words - words.mean(axis=1, keepdims=True),
            "positions": positions - positions.mean(axis=1, keepdims=True),
            "scale": embeddings.layer_norm.weight.numpy(), "bias": embeddings.layer_norm.bias.numpy(),
            "epsilon": np.array(embeddings.layer_norm._epsilon), "weight": weight, "shift": shift,
            "pad": np.array(model.ptm.config.pad_token_id), "normalizes": np.array(model.normalizes)}


def _is_same(engine: "TableEngine", model: nn.Layer, tokens: int, positions: int) -> bool:
    """Tell whether the embeddings of random ids, some of them padded, are the network's."""
    ids = np.random.default_rng(0).integers(0, tokens, (8, min(32, positions)))
    ids[::2, -8:] = model.ptm.config.pad_token_id
    types = np.zeros_like(ids)
    return np.allclose(engine.embed(ids, types), model.embed(ids, types), atol=TOLERANCE)


class TableEngine:
    """The mean of what goes into the first layer, from a table of tokens and one of positions, in float32.

    What goes into the first layer is the layer norm of the sum of a token's and a position's embedding. With both
    centred, t and p, its variance is (|t|^2 + |p|^2 + 2 t p) / hidden size. The mean over a text's n tokens is then a
    weighted sum of rows of the tables, sum(w t) + sum(w p) with w = 1 / (n standard deviation), times the norm's scale
    and plus its bias. These are two sparse products; the graph would fill an array of tokens x hidden size several
    times.

    Args:
        folder: filled by `write_table`.
        precision: "fp32" or "auto".
        cpu_threads: not used: scipy has one thread.

    Raises:
        InputError: another precision.
    """

    batch_tokens = 16384
    precision = "fp32"
    STEP = 64  # positions that the products of tokens and positions, t p, are made for at a time

    def __init__(self, folder: str, precision: str = "auto", cpu_threads: int = 0) -> None:
        record = read_record(folder, (*GRAPH_FIELDS, "pooling"))
        if precision not in ("auto", "fp32"):
            raise InputError(f"--precision {precision}: pooling {record['pooling']} is computed in fp32")
        self.embedding_size = record["embedding_size"]
        self.max_positions = record["max_positions"]
        with np.load(os.path.join(folder, TABLE_FILE)) as tables:
            weight = tables["weight"]
            self._centred_tokens = tables["tokens"]
            self._centred_positions = tables["positions"]
            self._tokens = (self._centred_tokens * tables["scale"]) @ weight
            self._positions = (self._centred_positions * tables["scale"]) @ weight
            self._bias = tables["bias"] @ weight
            self._shift = tables["shift"]
            self._epsilon = tables["epsilon"].item()
            self._pad = tables["pad"].item()
            self._normalizes = tables["normalizes"].item()
        self._weights = np.empty((0, 0), "float32")
        self.bytes_needed = 4 * len(self._tokens) * self.max_positions  # of `_weights`, which grows with the texts

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """Return L2-normalized embeddings, float32 [batch, embedding_size].

        Args:
            input_ids: int64 [batch, length].
            token_type_ids: are taken for 0.
        """
        from scipy.sparse import csr_matrix

        texts, length = input_ids.shape
        if length > self._weights.shape[1]:
            steps = -(-length // self.STEP)
            self._weights = self._inverse_deviations(steps * self.STEP)
        inner = input_ids != self._pad
        inner[np.arange(texts), inner.sum(axis=1) - 1] = False  # [SEP]
        inner[:, 0] = False  # [CLS]
        counts = inner.sum(axis=1)
        weights = self._weights.take(input_ids * self._weights.shape[1] + np.arange(length)) * inner
        row_ends = np.append(0, np.cumsum(counts))
        weights_of_tokens = csr_matrix((weights[inner], input_ids[inner].astype("int32"), row_ends),
                                       (texts, len(self._tokens)))
        summed = weights_of_tokens @ self._tokens + weights @ self._positions[:length]
        vectors = summed / np.maximum(counts, 1)[:, None].astype("float32")
        vectors += self._bias * (counts > 0)[:, None] + self._shift
        if self._normalizes:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _inverse_deviations(self, length: int) -> np.ndarray:
        """Return 1 / standard deviation of the embedding of each token at each position, float32 [tokens, length]."""
        tokens = self._centred_tokens
        positions = self._centred_positions[:length]
        squares = 2 * (tokens @ positions.T) + (tokens**2).sum(axis=1)[:, None] + (positions**2).sum(axis=1)
        return 1 / np.sqrt(squares / tokens.shape[1] + self._epsilon)
