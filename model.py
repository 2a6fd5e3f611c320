"""The network and its loss: the one way from token ids to embeddings.

`SimCSE` is the network in dynamic graph; the Predictor of deploy/python/predictor.py is the same network as a static
graph in Paddle Inference. Both have `embed(input_ids, token_type_ids)`, and `encode` turns texts into embeddings with
either.
"""

import contextlib
import ctypes
import os
import signal
import warnings
import zlib  # noqa: F401  paddlepaddle 2.6 dies in inflateReset2 if its own zlib is loaded before Python's
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from machine import PROCESSOR, default_threads

if "AuthenticAMD" in PROCESSOR and " avx2" in PROCESSOR:
    # paddle's MKL, of 2019, runs processors that are not Intel's on SSE unless this names a kind before it is loaded:
    # 5 for AVX2, 7 for AVX-512. Matrix products are up to five times faster for it.
    wide = all(f" {part}" in PROCESSOR for part in ("avx512f", "avx512bw", "avx512dq", "avx512vl"))
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "7" if wide else "5")
os.environ.setdefault("GLOG_minloglevel", "2")  # paddle's C++ notes and warnings say nothing that a user can act on
warnings.filterwarnings("ignore", message="No ccache found|Setuptools is replacing distutils")

import numpy as np  # noqa: E402
import paddle  # noqa: E402
import paddle.nn.functional as F  # noqa: E402
from paddle import nn  # noqa: E402

from console import InputError, progress  # noqa: E402
from losses import contrastive_loss, distillation_loss, gather_rows  # noqa: E402
from tokenizing import make_batches, tokenize_windows  # noqa: E402

LAUNCHER_GONE = signal.SIGUSR1  # not SIGTERM: it comes once for each thread of the launcher
# Tokens of a batch, padding included, that keep a processor busy, by whether it is a CPU.
BATCH_TOKENS = {True: 2048, False: 65536}


def set_device(device: str, cpu_threads: int = 0) -> None:
    """Make `device` ("cpu", "gpu") the current one, with `cpu_threads` math threads (0: all cores) on a CPU.

    Raises:
        InputError: this paddle, or this machine, has no such device.
    """
    if device == "gpu" and not (paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count()):
        raise InputError("--device gpu: no GPU that this paddlepaddle can use; run with --device cpu, "
                         "or install paddlepaddle-gpu (requirements-gpu.txt)")
    paddle.set_device(device)
    # paddle starts with one math thread.
    paddle.base.core.set_num_threads(cpu_threads or default_threads())


# ------------------------------------------------------------------------------------------------- the network
def first_token_only(encoder: nn.Layer) -> None:
    """Let the last layer of an encoder compute its first token only, the one that becomes the embedding.

    Keys and values come from all tokens, as before, so the first token is the same; its queries, and all that follows
    them, are one row a text. Where the encoder is no stack of post-norm `nn.TransformerEncoderLayer`, nothing changes.
    """
    layers = getattr(getattr(encoder, "encoder", None), "layers", None)
    layer = layers[-1] if layers else None
    if type(layer) is not nn.TransformerEncoderLayer or layer.normalize_before:
        return

    def forward(src, src_mask=None, cache=None, output_attentions=False):
        first = src[:, :1]
        first = layer.norm1(first + layer.dropout1(layer.self_attn(first, src, src, src_mask)))
        hidden = layer.dropout(layer.activation(layer.linear1(first)))
        return layer.norm2(first + layer.dropout2(layer.linear2(hidden)))

    layer.forward = forward


def freeze_pooler(encoder: nn.Layer) -> None:
    """Take an encoder's pooler, where it has one and nothing asks it, out of training."""
    for parameter in encoder.pooler.parameters() if getattr(encoder, "pooler", None) else ():
        parameter.stop_gradient = True


class SimCSE(nn.Layer):
    """A dual tower with shared weights: encoder -> pooling [-> fc] -> dropout -> L2 norm.

    Args:
        pretrained_model: an encoder as AutoModel loads it; (input_ids, token_type_ids, position_ids, attention_mask)
            to (sequence_output [batch, length, hidden], pooled_output [batch, hidden]).
        dropout: rate on the output vector; None: 0.1.
        margin, scale: see `contrastive_loss`.
        output_emb_size: size of the embedding; None or 0: the encoder's hidden size, without fc.
        pooling: one of data.POOLINGS; see `pool`.
    """

    def __init__(self, pretrained_model: nn.Layer, dropout: float | None = None, margin: float = 0.0,
                 scale: float = 20, output_emb_size: int | None = None, pooling: str = "pooler") -> None:
        super().__init__()
        if pooling in ("pooler", "cls"):
            first_token_only(pretrained_model)
        if pooling != "pooler":
            freeze_pooler(pretrained_model)
        self.ptm = pretrained_model
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.margin = margin
        self.scale = scale
        self.pooling = pooling
        self.normalizes = True  # whether embeddings are L2-normalized, as they are but for whitening
        self.infer_with_pooler = True  # what `embed` and the exported graph do; training always uses the pooler
        self.precision = "fp32"  # what `forward` and `embed` compute in; bf16 and fp16 need a GPU
        self.recomputes = False  # whether the encoder's layers are computed again for their gradients
        self.cross_device_negatives = False  # whether `loss` is that of the rows of all ranks
        self.distill_weight = 1.0  # of `distillation_loss`, where there is a teacher
        self.compared = None  # what the last `loss` was of: query, title, keys
        self.output_emb_size = output_emb_size or 0
        hidden_size = pretrained_model.config.hidden_size
        self.embedding_size = self.output_emb_size or hidden_size
        self.matryoshka_dims = [self.embedding_size]  # the first so many numbers of an embedding have the loss, each
        self.max_positions = getattr(pretrained_model.config, "max_position_embeddings", 512)
        if self.output_emb_size:
            weight_attr = paddle.ParamAttr(initializer=nn.initializer.TruncatedNormal(std=0.02))
            self.emb_reduce_linear = nn.Linear(hidden_size, self.output_emb_size, weight_attr=weight_attr)

    def pool(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor | None = None,
             position_ids: paddle.Tensor | None = None, attention_mask: paddle.Tensor | None = None,
             with_pooler: bool = True) -> paddle.Tensor:
        """A vector a text, float [batch, hidden]; arguments as in `get_pooled_embedding`.

        pooler: tanh of a layer on the first token, or the first token where not `with_pooler`; cls: the first token;
        mean: the mean over the text's tokens, [CLS] and [SEP] left out; first_last_avg: likewise, of the mean of what
        goes into the first layer and what comes out of the last (the first-last average of Gao et al. 2021).
        """
        hidden_states = {"output_hidden_states": True} if self.pooling == "first_last_avg" else {}
        outputs = self.ptm(input_ids, token_type_ids=token_type_ids, position_ids=position_ids,
                           attention_mask=attention_mask, **hidden_states)
        if self.pooling in ("pooler", "cls"):
            return outputs[1] if with_pooler and self.pooling == "pooler" else outputs[0][:, 0]
        tokens = (outputs[2][0] + outputs[2][-1]) / 2 if hidden_states else outputs[0]
        if attention_mask is None:
            attention_mask = input_ids != self.ptm.config.pad_token_id
        order = attention_mask.astype("int32").cumsum(axis=1)  # from 1 to the last token's, which padding has as well
        inner = ((order > 1) & (order < order[:, -1:])).astype(tokens.dtype).unsqueeze(-1)
        return (tokens * inner).sum(axis=1) / inner.sum(axis=1).clip(min=1)

    def get_pooled_embedding(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor | None = None,
                             position_ids: paddle.Tensor | None = None, attention_mask: paddle.Tensor | None = None,
                             with_pooler: bool = True) -> paddle.Tensor:
        """L2-normalized embeddings, float [batch, embedding_size].

        Args:
            input_ids, token_type_ids, position_ids: int64 [batch, length]; padding has the encoder's pad id.
            attention_mask: [batch, length], 1 for a token and 0 for padding; None: from the pad id.
            with_pooler: with pooling "pooler" take the encoder's pooled (tanh) output; otherwise the raw first token.
        """
        with self.autocast():
            embedding = self.pool(input_ids, token_type_ids, position_ids, attention_mask, with_pooler)
            if self.output_emb_size:
                embedding = self.emb_reduce_linear(embedding)
        if self.precision != "fp32":
            embedding = embedding.astype("float32")  # norm, cosines and loss are of full precision
        embedding = self.dropout(embedding)
        return F.normalize(embedding, p=2, axis=-1) if self.normalizes else embedding

    def use_recompute(self) -> None:
        """Keep the encoder layers' inputs only, and compute each layer again for its gradients."""
        self.ptm.recompute_enable()
        self.recomputes = True

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which matrix products are computed in `precision`."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return paddle.amp.auto_cast(level="O1", dtype={"bf16": "bfloat16", "fp16": "float16"}[self.precision])

    @paddle.no_grad()
    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> paddle.Tensor:
        """Embeddings without dropout or gradient: int64 [batch, length] twice to float32 [batch, embedding_size].

        On a GPU the work is only launched; whoever reads the result waits for it.
        """
        self.eval()
        return self.get_pooled_embedding(paddle.to_tensor(input_ids), paddle.to_tensor(token_type_ids),
                                         with_pooler=self.infer_with_pooler)

    def get_semantic_embedding(self, data_loader: Iterable[tuple[Any, Any]]) -> Iterator[paddle.Tensor]:
        """Yield the embeddings, float [batch, embedding_size], of every (input_ids, token_type_ids) batch."""
        for input_ids, token_type_ids in data_loader:
            yield self.embed(input_ids, token_type_ids)

    @staticmethod
    def inputs(chunk: tuple) -> tuple:
        """`forward`'s arguments of a chunk of `batches.Batches`."""
        query, query_types, title, title_types = chunk
        return query, title, query_types, None, None, title_types

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch, padding included, where no batch size is asked for."""
        return BATCH_TOKENS[paddle.device.get_device() == "cpu"]

    def _pair(self, query: list, title: list, with_pooler: bool = True) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Embeddings of both sides; in one pass of twice the rows where the inputs have one shape."""
        if query[0].shape != title[0].shape or any((q is None) != (t is None) for q, t in zip(query, title)):
            return (self.get_pooled_embedding(*query, with_pooler=with_pooler),
                    self.get_pooled_embedding(*title, with_pooler=with_pooler))
        both = [None if q is None else paddle.concat([q, t]) for q, t in zip(query, title)]
        return tuple(paddle.split(self.get_pooled_embedding(*both, with_pooler=with_pooler), 2))

    def cosine_sim(self, query_input_ids: paddle.Tensor, title_input_ids: paddle.Tensor, query_token_type_ids=None,
                   query_position_ids=None, query_attention_mask=None, title_token_type_ids=None,
                   title_position_ids=None, title_attention_mask=None, with_pooler: bool = True) -> paddle.Tensor:
        """Cosine of each query with its title, float [batch]; arguments as in `get_pooled_embedding`."""
        query, title = self._pair(
            [query_input_ids, query_token_type_ids, query_position_ids, query_attention_mask],
            [title_input_ids, title_token_type_ids, title_position_ids, title_attention_mask], with_pooler)
        return (query * title).sum(axis=-1)

    def loss(self, query: paddle.Tensor, title: paddle.Tensor, keys: paddle.Tensor | None = None,
             negative: paddle.Tensor | None = None, teacher: paddle.Tensor | None = None) -> paddle.Tensor:
        """The training loss of embeddings, with `cross_device_negatives` of those of all ranks: the same on each.

        `contrastive_loss`, of `matryoshka_dims` the mean (Kusupati et al. 2022, arXiv:2205.13147, eq. 1, all weights
        equal); with a teacher and the `distillation_loss`.

        Args:
            query, title, negative: float [batch, embedding_size]; `negative` has more negatives for all queries.
            keys: int64 [batch] or [batch, 2 or 3], see `same_texts`.
            teacher: another encoder's embeddings of the queries, see `distillation_loss`.
        """
        if self.cross_device_negatives:
            query, title, keys, negative, teacher = (
                None if rows is None else gather_rows(rows) for rows in (query, title, keys, negative, teacher))
        self.compared = query.detach(), title.detach(), keys
        candidates = title if negative is None else paddle.concat([title, negative])

        def of_first(dim: int) -> paddle.Tensor:
            sides = (query, candidates)
            if dim < self.embedding_size:
                sides = (F.normalize(side[:, :dim], p=2, axis=-1) for side in sides)
            return contrastive_loss(*sides, self.margin, self.scale, keys)

        loss = sum(map(of_first, self.matryoshka_dims)) / len(self.matryoshka_dims)
        if teacher is not None:
            loss = loss + self.distill_weight * distillation_loss(query, title, teacher, self.scale)
        return loss

    def forward(self, query_input_ids: paddle.Tensor, title_input_ids: paddle.Tensor, query_token_type_ids=None,
                query_position_ids=None, query_attention_mask=None, title_token_type_ids=None,
                title_position_ids=None, title_attention_mask=None, keys: paddle.Tensor | None = None,
                teacher: paddle.Tensor | None = None,
                embeddings_only: bool = False) -> paddle.Tensor | tuple[paddle.Tensor, ...]:
        """The training loss, a scalar. In SimCSE both sides are the same texts under different dropout.

        Args:
            title_*: of the queries' titles; twice as many rows are titles, then hard negatives.
            keys, teacher: see `loss`.
            embeddings_only: return the embeddings of queries, titles and hard negatives, where there are any, each
                float [batch, embedding_size], instead of the loss.
        """
        query, title = self._pair(
            [query_input_ids, query_token_type_ids, query_position_ids, query_attention_mask],
            [title_input_ids, title_token_type_ids, title_position_ids, title_attention_mask])
        sides = (query, *paddle.split(title, len(title) // len(query)))
        return sides if embeddings_only else self.loss(*sides[:2], keys, *sides[2:], teacher=teacher)


class Engine(Protocol):
    """What `encode` needs: `SimCSE`, or the Predictor of deploy/python/predictor.py."""

    embedding_size: int
    max_positions: int
    batch_tokens: int  # tokens of a batch, padding included, where no batch size is asked for

    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> Any: ...


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return paddle.distributed.get_rank() == 0


def join_ranks() -> tuple[int, int]:
    """Make this process one of those that the launcher started, if it did; its rank, and how many there are."""
    if (ranks := paddle.distributed.get_world_size()) > 1:
        if hasattr(libc := ctypes.CDLL(None), "prctl"):  # Linux: a launcher that is killed does not end its processes
            pr_set_pdeathsig = 1
            libc.prctl(pr_set_pdeathsig, LAUNCHER_GONE)
        paddle.distributed.init_parallel_env()
    return paddle.distributed.get_rank(), ranks


def wait_for_ranks() -> None:
    """Wait until all ranks are here."""
    if paddle.distributed.get_world_size() > 1:
        paddle.distributed.barrier()


def gather_arrays(array: np.ndarray) -> list[np.ndarray]:
    """The arrays of all ranks, which have one shape and dtype."""
    if paddle.distributed.get_world_size() == 1:
        return [array]
    parts: list[paddle.Tensor] = []
    paddle.distributed.all_gather(parts, paddle.to_tensor(array))
    return [part.numpy() for part in parts]


def check_length(model: Engine, max_seq_length: int) -> None:
    """Raise InputError where texts of `max_seq_length` tokens have more positions than the encoder."""
    if max_seq_length > model.max_positions:
        raise InputError(f"--max_seq_length {max_seq_length}: the encoder has {model.max_positions} positions")


def encode_stream(model: Engine, tokenizer: Any, texts: Sequence[str], max_seq_length: int,
                  batch_size: int | None = None, windows: Sequence[range] | None = None) -> Iterator[np.ndarray]:
    """Yield the embeddings of `texts` in their order, float32 [texts of the window, embedding_size] at a time.

    A batch is read back when the next one is under way, so that host and GPU work side by side.

    Args:
        windows: the rows that are wanted, by which texts are batched together; None: all, data.WINDOW at a time.
    """
    check_length(model, max_seq_length)
    count = len(texts) if windows is None else sum(map(len, windows))
    with progress("encoding", count, "texts") as advance:
        for ids in tokenize_windows(texts, tokenizer, max_seq_length, windows):
            embeddings = np.empty((len(ids), model.embedding_size), "float32")
            rows, under_way = [], embeddings[:0]
            for next_rows, *batch in make_batches(ids, tokenizer.pad_token_id, batch_size, model.batch_tokens):
                launched = model.embed(*batch)
                embeddings[rows] = np.asarray(under_way)
                rows, under_way = next_rows, launched
                advance(len(rows))
            embeddings[rows] = np.asarray(under_way)
            yield embeddings


def encode(model: Engine, tokenizer: Any, texts: Sequence[str], max_seq_length: int,
           batch_size: int | None = None) -> np.ndarray:
    """The one way from texts to embeddings: float32 [len(texts), embedding_size], in the order of `texts`."""
    embeddings, row = np.empty((len(texts), model.embedding_size), "float32"), 0
    for block in encode_stream(model, tokenizer, texts, max_seq_length, batch_size):
        embeddings[row : (row := row + len(block))] = block
    return embeddings


def encode_pairs(model: Engine, tokenizer: Any, pairs: Sequence[tuple[str, str]],
                 max_seq_length: int, batch_size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the first and of the second texts, each float32 [len(pairs), embedding_size]."""
    texts = [text for side in zip(*pairs) for text in side]
    return tuple(np.split(encode(model, tokenizer, texts, max_seq_length, batch_size), 2))


def mean_loss(query: np.ndarray, title: np.ndarray, batch_size: int, margin: float, scale: float) -> float:
    """`contrastive_loss` of embeddings taken in batches, the mean over all rows."""
    total = 0.0
    for start in range(0, len(query), batch_size):
        q, t = (paddle.to_tensor(side[start : start + batch_size]) for side in (query, title))
        total += float(contrastive_loss(q, t, margin, scale)) * len(q)
    return total / len(query)
