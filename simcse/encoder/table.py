"""A network without layers as tables of tokens and positions."""

import os
from unittest.mock import patch

from simcse.console import InputError
from simcse.encoder.pooling import find_pooling
from simcse.encoder.weights import CONFIG_FILE, read_record
from simcse.files import write_json

import numpy as np
import paddle
from paddle import nn


class TableEngine:
    """A network of pooling "first_avg" as a table of tokens and one of positions, without paddle, in float32.

    What goes into the first layer is the layer norm of a token's and a position's embedding. With both centred, t and
    p, its variance is (|t|^2 + |p|^2 + 2 t p) / hidden size, and the mean over a text's n tokens a weighted sum of rows
    of the tables, sum(w t) + sum(w p) with w = 1 / (n standard deviation), times the norm's scale and plus its bias:
    two sparse products, where the graph fills an array of tokens x hidden size several times.
    """

    batch_tokens, precision = 16384, "fp32"
    FILE = "table.npz"
    _STEP = 64  # positions that the products of tokens and positions, t p, are made for at a time

    def __init__(self, folder: str, precision: str = "fp32") -> None:
        record = read_record(folder)
        if precision not in ("auto", "fp32"):
            raise InputError(f"--precision {precision}: pooling {record['pooling']} is computed in fp32")
        self.embedding_size, self.max_positions = record["embedding_size"], record["max_positions"]
        with np.load(os.path.join(folder, self.FILE)) as tables:
            self._centred = tables["tokens"], tables["positions"]
            self._pad, self._epsilon, self._normalizes = (
                tables[name].item() for name in ("pad", "epsilon", "normalizes"))
            self._tokens, self._positions = (
                (table * tables["scale"]) @ tables["weight"] for table in self._centred)
            self._bias, self._shift = tables["bias"] @ tables["weight"], tables["shift"]
        self._weights = np.empty((0, 0), "float32")

    @classmethod
    def write(cls, model: nn.Layer, folder: str) -> bool:
        """Write the tables of a network; returns whether its embeddings are such sums, by an example. False: they have
        to be a graph."""
        embeddings = model.ptm.embeddings
        names = ("word_embeddings", "position_embeddings", "layer_norm")
        if not find_pooling(model.pooling).removes_layers or not all(hasattr(embeddings, name) for name in names):
            return False
        model.eval()
        with paddle.no_grad(), patch.object(embeddings.layer_norm, "forward", lambda x: x):
            ids = paddle.ones([1, len(embeddings.position_embeddings.weight)], "int64")
            words = embeddings.word_embeddings.weight.numpy()
            positions = embeddings(ids, token_type_ids=paddle.zeros_like(ids)).numpy()[0] - words[1]
        fc = model.emb_reduce_linear if model.output_emb_size else None
        np.savez(os.path.join(folder, cls.FILE), scale=embeddings.layer_norm.weight.numpy(),
                 tokens=words - words.mean(axis=1, keepdims=True), bias=embeddings.layer_norm.bias.numpy(),
                 positions=positions - positions.mean(axis=1, keepdims=True),
                 weight=fc.weight.numpy() if fc else np.eye(words.shape[1], dtype="float32"),
                 shift=fc.bias.numpy() if fc else np.zeros(words.shape[1], "float32"),
                 pad=model.ptm.config.pad_token_id, epsilon=embeddings.layer_norm._epsilon,
                 normalizes=model.normalizes)
        write_json(os.path.join(folder, CONFIG_FILE),
                   {"embedding_size": model.embedding_size, "max_positions": model.max_positions,
                    "pooling": model.pooling})
        ids = np.random.default_rng(0).integers(0, len(words), (8, min(32, len(positions))))
        ids[:, -8:][::2] = model.ptm.config.pad_token_id
        same = np.allclose(cls(folder).embed(ids, ids * 0), model.embed(ids, ids * 0), atol=1e-5)
        if not same:
            os.remove(os.path.join(folder, cls.FILE))
        return same

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """int64 [batch, length] twice, types being 0, to float32 [batch, embedding_size], L2-normalized."""
        from scipy.sparse import csr_matrix

        length = input_ids.shape[1]
        if length > self._weights.shape[1]:
            self._weights = self._inverse_deviations(-(-length // self._STEP) * self._STEP)
        inner = input_ids != self._pad
        inner[np.arange(len(inner)), inner.sum(axis=1) - 1] = inner[:, 0] = False  # [SEP] and [CLS]
        weights = self._weights.take(input_ids * self._weights.shape[1] + np.arange(length)) * inner
        counts = inner.sum(axis=1)
        of_tokens = csr_matrix((weights[inner], input_ids[inner].astype("int32"), np.append(0, np.cumsum(counts))),
                               (len(inner), len(self._tokens)))
        summed = of_tokens @ self._tokens + weights @ self._positions[:length]
        vectors = summed / np.maximum(counts, 1)[:, None].astype("float32")
        vectors += self._bias * (counts > 0)[:, None] + self._shift
        if self._normalizes:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _inverse_deviations(self, length: int) -> np.ndarray:
        """What a token's and a position's embedding is divided by, inverted, float32 [tokens, first positions]."""
        tokens, positions = self._centred[0], self._centred[1][:length]
        squares = 2 * (tokens @ positions.T) + (tokens**2).sum(axis=1)[:, None] + (positions**2).sum(axis=1)
        return 1 / np.sqrt(squares / tokens.shape[1] + self._epsilon)
