"""An encoder without layers: a table of token embeddings, to be trained with paddle and to encode with numpy."""

import copy
import os
import zipfile
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from simcse.console import InputError, as_input_error
from simcse.encoder.pooling import find_pooling
from simcse.encoder.weights import CONFIG_FILE, GRAPH_FIELDS, TABLE_FILE, read_record
from simcse.files import write_json

import numpy as np
import paddle
from paddle import nn

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix  # imported where it is used: networks with layers start without it

WORDS, NORM = "word_embeddings", "layer_norm"  # as PaddleNLP names them in an encoder's `embeddings`
# Other tables that an encoder adds to the embedding of a token, each with the function that reduces it to the one row
# that is added to every token here.
ADDED_ROWS = {"position_embeddings.weight": lambda rows: rows.mean(axis=0),
              "token_type_embeddings.weight": lambda rows: rows[0],
              "task_type_embeddings.weight": lambda rows: rows[0]}


class TokenTable(nn.Layer):
    """What goes into the first layer of an encoder for each token, whatever its position: a row of a table, normed.

    Takes the encoder's place as `SimCSE.ptm`. In place of a token's position there is the mean of all positions: only
    layers can make use of the order of tokens, so that positions would be noise.

    Args:
        encoder: as PaddleNLP makes it. Its table of tokens is changed in place, so that it cannot be used afterwards.

    Attributes:
        config: the encoder's, without layers.
        encoder_class_name: that of the encoder, in PaddleNLP.

    Raises:
        InputError: it has no table of tokens with a layer norm after it, or adds to the tokens what `ADDED_ROWS` does
            not name.
    """

    def __init__(self, encoder: nn.Layer) -> None:
        super().__init__()
        embeddings = getattr(encoder, "embeddings", None)
        if not all(hasattr(embeddings, part) for part in (WORDS, NORM, "dropout")) or (
                embeddings.word_embeddings.weight.shape[1] != encoder.config.hidden_size):
            raise InputError(f"--pooling: {type(encoder).__name__} has no token embeddings that can be used without "
                             "layers")
        _check_added(encoder, embeddings.state_dict())
        self.config = copy.deepcopy(encoder.config)
        self.config.num_hidden_layers = 0
        self.encoder_class_name = type(encoder).__name__
        self.word_embeddings = embeddings.word_embeddings
        self.layer_norm = embeddings.layer_norm
        self.dropout = embeddings.dropout
        arrays = {name: tensor.numpy() for name, tensor in embeddings.state_dict().items()}
        with np.errstate(all="ignore"):  # they are uninitialized memory where a checkpoint is loaded afterwards
            rows = _rows_of_tokens(arrays)
        self.word_embeddings.weight.set_value(rows)

    def forward(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor | None = None) -> tuple:
        """Return the embeddings of all tokens, float [batch, length, hidden], and None for the output of a pooler.

        Args:
            input_ids: int64 [batch, length].
            token_type_ids: ignored; every token has type 0.
        """
        if token_type_ids is not None:
            input_ids = input_ids + 0 * token_type_ids  # paddle exports no graph that leaves out one of its inputs
        return self.dropout(self.layer_norm(self.word_embeddings(input_ids))), None

    def can_average(self) -> bool:
        """Return whether `average` can take the place of `pooling.average_tokens` now.

        It computes by scipy, which is on a CPU and in no static graph, and it has no dropout, which is drawn for each
        occurrence of a token.
        """
        drops = self.training and self.dropout.p > 0
        return paddle.in_dynamic_mode() and paddle.device.get_device() == "cpu" and not drops

    def average(self, input_ids: paddle.Tensor) -> paddle.Tensor:
        """Return the mean embedding of each text's tokens, float [batch, hidden], without [CLS], [SEP] and padding.

        It is the product of `token_fractions` and the embeddings of the tokens that occur, each normed once.
        """
        from scipy.sparse import csr_matrix

        fractions = token_fractions(input_ids.numpy(), self.config.pad_token_id, len(self.word_embeddings.weight))
        tokens, columns = np.unique(fractions.indices, return_inverse=True)
        fractions = csr_matrix((fractions.data, columns, fractions.indptr), (len(input_ids), len(tokens)))
        rows = self.word_embeddings(paddle.to_tensor(tokens.astype("int64")))
        return SparseProduct.apply(self.layer_norm(rows), fractions)


class SparseProduct(paddle.autograd.PyLayer):
    """The product of a sparse matrix, which has no gradient, and a dense one."""

    @staticmethod
    def forward(ctx, dense: paddle.Tensor, sparse: "csr_matrix") -> paddle.Tensor:
        ctx.sparse = sparse
        return paddle.to_tensor(sparse @ dense.numpy())

    @staticmethod
    def backward(ctx, gradient: paddle.Tensor) -> paddle.Tensor:
        return paddle.to_tensor(ctx.sparse.T @ gradient.numpy())


def _check_added(encoder: nn.Layer, names: Collection[str]) -> None:
    """Refuse an encoder that adds to its token embeddings what `_rows_of_tokens` would leave out.

    Args:
        encoder: as PaddleNLP makes it.
        names: of the weights of its embeddings.

    Raises:
        InputError: there is a table that is not in `ADDED_ROWS`, or a task other than 0.
    """
    known = {f"{WORDS}.weight", f"{NORM}.weight", f"{NORM}.bias", *ADDED_ROWS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"--pooling: {type(encoder).__name__} also adds {unknown[0]} to its token embeddings, which "
                         "is not supported without layers; use another encoder or pooling")
    task_id = getattr(encoder.config, "task_id", 0)
    if task_id and "task_type_embeddings.weight" in names:
        raise InputError(f"--pooling: {type(encoder).__name__} has task_id {task_id}; only task 0 is supported without "
                         "layers; use another encoder or pooling")


def _rows_of_tokens(embeddings: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the rows of a `TokenTable`, float32 [tokens, hidden], of the weights of an encoder's embeddings."""
    rows = embeddings[f"{WORDS}.weight"]
    for name, choose_row in ADDED_ROWS.items():
        if name in embeddings:
            rows = rows + choose_row(embeddings[name])
    return rows


def remove_layers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights of a SimCSE network with layers as those of a network with a `TokenTable`.

    A weight that is missing there is missing here, too.

    Raises:
        ValueError: the shapes of its embeddings do not match.
    """
    prefix = "ptm.embeddings."
    embeddings = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("ptm.")}
    for name in (f"{NORM}.weight", f"{NORM}.bias"):
        if name in embeddings:
            kept[f"ptm.{name}"] = embeddings[name]
    if f"{WORDS}.weight" in embeddings:
        kept[f"ptm.{WORDS}.weight"] = _rows_of_tokens(embeddings)
    return kept


def token_fractions(input_ids: np.ndarray, pad_token_id: int, vocab_size: int) -> "csr_matrix":
    """Return which fraction of each text each token is, float32 [batch, vocab_size].

    [CLS], [SEP] and padding count for nothing; the row of a text that has nothing else is 0. A token that occurs
    several times has several entries, which add up in products.

    Args:
        input_ids: int64 [batch, length].
        pad_token_id: what shorter texts are filled up with.
        vocab_size: number of tokens.

    Raises:
        InputError: a token is not in the vocabulary.
    """
    from scipy.sparse import csr_matrix

    texts, length = input_ids.shape
    inner = input_ids != pad_token_id
    last = length - 1 - inner[:, ::-1].argmax(axis=1)
    inner[np.arange(texts), last] = False  # [SEP]
    inner[:, 0] = False  # [CLS]
    tokens = input_ids[inner]
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        # scipy would read what lies beyond the table.
        raise InputError(f"token ids go from {tokens.min()} to {tokens.max()}; the encoder has {vocab_size} tokens, "
                         "and the tokenizer is of another one")
    counts = inner.sum(axis=1)
    fractions = np.repeat(1 / np.maximum(counts, 1), counts).astype("float32")
    return csr_matrix((fractions, tokens.astype("int32"), np.append(0, np.cumsum(counts))), (texts, vocab_size))


def write_table(model: nn.Layer, folder: str) -> bool:
    """Write the table of a network for a `TableEngine`; return False if the network has layers."""
    if not find_pooling(model.pooling).removes_layers:
        return False
    table = model.ptm
    with paddle.no_grad():
        embeddings = table.layer_norm(table.word_embeddings.weight).numpy()
    shift = np.zeros(embeddings.shape[1], "float32")
    if model.output_emb_size:
        embeddings = embeddings @ model.emb_reduce_linear.weight.numpy()
        shift = model.emb_reduce_linear.bias.numpy()
    np.savez(os.path.join(folder, TABLE_FILE), embeddings=embeddings, shift=shift, pad=table.config.pad_token_id,
             normalizes=model.normalizes)
    write_json(os.path.join(folder, CONFIG_FILE), {
        "embedding_size": model.embedding_size, "max_positions": model.max_positions, "pooling": model.pooling})
    return True


class TableEngine:
    """The mean of token embeddings, by a table of them that has been through the fc: one sparse product, in float32.

    Args:
        folder: filled by `write_table`.
        precision: "fp32" or "auto".
        cpu_threads: not used: scipy has one thread.

    Raises:
        InputError: another precision, or a table that is damaged or of an earlier version.
    """

    batch_tokens = 16384
    bytes_needed = 0
    precision = "fp32"

    def __init__(self, folder: str, precision: str = "auto", cpu_threads: int = 0) -> None:
        record = read_record(folder, (*GRAPH_FIELDS, "pooling"))
        if precision not in ("auto", "fp32"):
            raise InputError(f"--precision {precision}: pooling {record['pooling']} is computed in fp32")
        self.embedding_size = record["embedding_size"]
        self.max_positions = record["max_positions"]
        path = os.path.join(folder, TABLE_FILE)
        with as_input_error(f"{path}: damaged", EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile,
                            remedy="; export it again"), np.load(path) as tables:
            if "embeddings" not in tables:
                raise InputError(f"{path}: a table of an earlier version; train and export it again")
            self._embeddings = tables["embeddings"]
            self._shift = tables["shift"]
            self._pad = tables["pad"].item()
            self._normalizes = tables["normalizes"].item()
            if self._embeddings.ndim != 2 or not (
                    self._embeddings.shape[1] == len(self._shift) == self.embedding_size):
                raise ValueError(f"its shapes do not match embedding_size {self.embedding_size}")

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """Return L2-normalized embeddings, float32 [batch, embedding_size].

        Args:
            input_ids: int64 [batch, length].
            token_type_ids: ignored; every token has type 0.
        """
        fractions = token_fractions(input_ids, self._pad, len(self._embeddings))
        vectors = fractions @ self._embeddings + self._shift
        if self._normalizes:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors
