"""SimCSE: the network, its loss, its checkpoints, and the one way from texts to embeddings.

Read it from the top: `SimCSE` (encoder, pooling, fc, dropout), `contrastive_loss`, checkpoints, `encode`.
"""

import argparse
import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from data import load_tokenizer, make_batches, tokenize_windows
from simcse.console import InputError, progress
from simcse.encoders import encoder_from_record, first_token_only, freeze_pooler, load_encoder, portable
from simcse.engine import Engine, graph_fingerprint, keep_graph, make_engine, read_kept_graph
from simcse.files import new_folder
from simcse.flags import DEFAULT_MODEL, POOLINGS
from simcse.machine import BATCH_TOKENS, RANK
from simcse.ranks import gather_rows, set_device
from simcse.weights import CONFIG_FILE, PARAMS_FILE, load_state, read_record, read_weights, write_record, write_weights

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn


# ---------------------------------------------------------------------------------------------------------- the network
class SimCSE(nn.Layer):
    """A dual tower with shared weights: encoder -> pooling [-> fc] -> dropout -> L2 norm.

    Args:
        pretrained_model: an encoder as AutoModel loads it; (input_ids, token_type_ids, position_ids, attention_mask)
            to (sequence_output [batch, length, hidden], pooled_output [batch, hidden]).
        dropout: rate on the output vector; None: 0.1.
        margin, scale: see `contrastive_loss`.
        output_emb_size: size of the embedding; None or 0: the encoder's hidden size, without fc.
        pooling: one of flags.POOLINGS; see `pool`.
        infer_with_pooler: whether `embed` and the exported graph take the pooled output; training always does.
        precision: what matrix products are computed in: fp32, or on a GPU bf16 or fp16.
        cross_device_negatives: whether `loss` is that of the rows of all ranks.
    """

    def __init__(self, pretrained_model: nn.Layer, dropout: float | None = None, margin: float = 0.0,
                 scale: float = 20, output_emb_size: int | None = None, pooling: str = "pooler",
                 infer_with_pooler: bool = True, precision: str = "fp32", cross_device_negatives: bool = False) -> None:
        super().__init__()
        if pooling == "pooler":
            first_token_only(pretrained_model)
        else:
            freeze_pooler(pretrained_model)
        self.ptm = pretrained_model
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.margin = margin
        self.scale = scale
        self.pooling = pooling
        self.infer_with_pooler = infer_with_pooler or pooling != "pooler"
        self.precision = precision
        self.cross_device_negatives = cross_device_negatives
        self.normalizes = True  # whether embeddings are L2-normalized, as they are but for whitening
        self.compared = None  # what the last `loss` was of: query, title, keys
        self.output_emb_size = output_emb_size or 0
        hidden_size = pretrained_model.config.hidden_size
        self.embedding_size = self.output_emb_size or hidden_size
        self.max_positions = getattr(pretrained_model.config, "max_position_embeddings", 512)
        if self.output_emb_size:
            weight_attr = paddle.ParamAttr(initializer=nn.initializer.TruncatedNormal(std=0.02))
            self.emb_reduce_linear = nn.Linear(hidden_size, self.output_emb_size, weight_attr=weight_attr)

    def pool(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor | None = None,
             position_ids: paddle.Tensor | None = None, attention_mask: paddle.Tensor | None = None,
             with_pooler: bool = True) -> paddle.Tensor:
        """A vector a text, float [batch, hidden]; arguments as in `get_pooled_embedding`.

        pooler: tanh of a layer on the first token, or the first token itself where not `with_pooler`. mean: the mean
        over the text's tokens, [CLS] and [SEP] left out. first_last_avg: the same mean, of the average of what goes
        into the first layer and what comes out of the last (Gao et al. 2021).
        """
        hidden_states = {"output_hidden_states": True} if self.pooling == "first_last_avg" else {}
        outputs = self.ptm(input_ids, token_type_ids=token_type_ids, position_ids=position_ids,
                           attention_mask=attention_mask, **hidden_states)
        if self.pooling == "pooler":
            return outputs[1] if with_pooler else outputs[0][:, 0]
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
             negative: paddle.Tensor | None = None) -> paddle.Tensor:
        """`contrastive_loss` of embeddings, a scalar; with `cross_device_negatives` of those of all ranks, on each the
        same.

        Args:
            query, title, negative: float [batch, embedding_size]; `negative` has more negatives for all queries.
            keys: int64 [batch] or [batch, 2 or 3], see `same_texts`.
        """
        if self.cross_device_negatives:
            query, title, keys, negative = (
                None if rows is None else gather_rows(rows) for rows in (query, title, keys, negative))
        self.compared = query.detach(), title.detach(), keys
        candidates = title if negative is None else paddle.concat([title, negative])
        return contrastive_loss(query, candidates, self.margin, self.scale, keys)

    def forward(self, query_input_ids: paddle.Tensor, title_input_ids: paddle.Tensor, query_token_type_ids=None,
                query_position_ids=None, query_attention_mask=None, title_token_type_ids=None,
                title_position_ids=None, title_attention_mask=None, keys: paddle.Tensor | None = None,
                embeddings_only: bool = False) -> paddle.Tensor | tuple[paddle.Tensor, ...]:
        """The training loss, a scalar. In SimCSE both sides are the same texts under different dropout.

        The order of the arguments is the original's, whose callers may pass positions and masks; train.py does not.

        Args:
            title_*: of the queries' titles; twice as many rows are titles, then hard negatives.
            keys: see `loss`.
            embeddings_only: return the embeddings of queries, titles and hard negatives, where there are any, each
                float [batch, embedding_size], instead of the loss.
        """
        query, title = self._pair(
            [query_input_ids, query_token_type_ids, query_position_ids, query_attention_mask],
            [title_input_ids, title_token_type_ids, title_position_ids, title_attention_mask])
        sides = (query, *paddle.split(title, len(title) // len(query)))
        return sides if embeddings_only else self.loss(*sides[:2], keys, *sides[2:])


# ------------------------------------------------------------------------------------------------------------- the loss
def same_texts(keys: paddle.Tensor) -> paddle.Tensor:
    """Which candidates say what a row's own texts say, and are no negatives of it.

    Args:
        keys: int64 [batch], equal for equal texts, where a row is one text; or [batch, 2 or 3], a column each for
            queries, titles and hard negatives.

    Returns:
        bool [batch, candidates], titles first, then hard negatives: the candidate is the row's query or title again, or
        it is the title of the same query.
    """
    keys = keys.reshape([keys.shape[0], -1])
    query, titles = keys[:, :1], keys[:, 1:] if keys.shape[1] > 1 else keys
    candidates = titles.t().reshape([1, -1])
    same_query = query == query.t()
    if more := candidates.shape[1] - len(keys):
        same_query = paddle.concat([same_query, paddle.zeros([len(keys), more], "bool")], axis=1)
    return (candidates == query) | (candidates == titles[:, :1]) | same_query


def contrastive_loss(query: paddle.Tensor, title: paddle.Tensor, margin: float, scale: float,
                     keys: paddle.Tensor | None = None) -> paddle.Tensor:
    """In-batch contrastive loss of SimCSE (Gao et al. 2021, eq. 1), a margin taken off the positives' cosine.

    mean_i -log softmax_j(scale * (cos(q_i, t_j) - margin * [i = j]))[i]

    Args:
        query: L2-normalized embeddings, float [batch, dim].
        title: L2-normalized embeddings, float [batch or more, dim]; row i is the positive of query i, all other rows
            are its negatives.
        margin: how much more similar than a negative a positive has to be, in cosine.
        scale: the inverse of the temperature.
        keys: of `same_texts`, whose texts then are not each other's negatives; None: they are.

    Returns:
        A scalar tensor.
    """
    cosine = paddle.matmul(query, title, transpose_y=True)
    batch, candidates = cosine.shape
    positive = paddle.eye(batch, candidates, dtype=cosine.dtype)
    logits = scale * (cosine - margin * positive)
    if keys is not None:
        logits = logits - 1e9 * (same_texts(keys).astype(cosine.dtype) - positive)
    loss = F.cross_entropy(logits, paddle.arange(batch, dtype="int64"))
    # On a CPU paddle's softmax makes ln(batch) of NaN; a run that has diverged would look like one that learns nothing.
    return loss + 0 * cosine.detach().sum()


# ---------------------------------------------------------------------------------------------------------- checkpoints
def load_model(params_path: str, model_name_or_path: str | None = None, output_emb_size: int | None = None,
               flag: str = "--params_path", dropout: float | None = None,
               settings: dict | None = None) -> tuple[SimCSE, Any, dict]:
    """Load a checkpoint, strictly.

    Args:
        params_path: the .pdparams file, this project's or the original's (which has no simcse_config.json beside it).
        model_name_or_path: the encoder; None: what the checkpoint records, else DEFAULT_MODEL.
        output_emb_size: None, or what the checkpoint must have (0: no fc).
        flag: the flag that named the file, for messages.
        dropout: the encoder's dropout rate, for training on.
        settings: further arguments of `SimCSE`; what they lack is taken from the checkpoint's record.

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
    if output_emb_size not in (None, size):
        raise InputError(f"--output_emb_size {output_emb_size}: {params_path} has {size or 'no fc: 0'}")
    if record.get("pooling", "pooler") not in POOLINGS:
        raise InputError(f"{flag} {params_path}: its {CONFIG_FILE} has pooling {record['pooling']}, which is none of "
                         f"{', '.join(POOLINGS)}")
    if model_name_or_path or not record:
        name = model_name_or_path or DEFAULT_MODEL
        encoder = load_encoder(name, dropout)
    else:
        name = record["model_name_or_path"]
        encoder = encoder_from_record(record, dropout)
    tokenizer = checkpoint_tokenizer(params_path, name)
    recorded = {key: record[key] for key in ("margin", "scale", "pooling") if key in record}
    recorded["infer_with_pooler"] = record.get("with_pooler", True)
    model = SimCSE(encoder, output_emb_size=size, **{**recorded, **(settings or {})})
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
            "pooling": model.pooling, "with_pooler": model.infer_with_pooler, "scale": model.scale,
            "margin": model.margin, "max_seq_length": max_seq_length, "encoder_class": type(model.ptm).__name__,
            "encoder_config": portable(model.ptm.config.to_dict()),
            "versions": {"paddlepaddle": paddle.__version__, "paddlenlp": paddlenlp.__version__}}


def save_checkpoint(folder: str, model: SimCSE, tokenizer: Any, record: dict, params_file: str = PARAMS_FILE,
                    also: Callable[[str], None] | None = None) -> None:
    """Write weights, tokenizer, simcse_config.json and what `also` adds to `folder`, which appears complete or not at
    all."""
    with new_folder(folder) as temporary:
        write_weights(os.path.join(temporary, params_file), model.state_dict())
        write_record(temporary, record, tokenizer)
        if also:
            also(temporary)


def load_engine(args: argparse.Namespace) -> tuple[Engine, Any]:
    """The engine and the tokenizer that a stage's flags ask for (`add_model_arguments`, `add_encode_arguments`).

    On a CPU the graph, once exported, is kept beside the checkpoint; later starts need neither the network nor
    paddlenlp.
    """
    set_device(args.device, args.cpu_threads)
    keep = None
    if args.device == "cpu":
        kept, fingerprint = f"{os.path.splitext(args.params_path)[0]}.graph", graph_fingerprint(args)
        if engine := read_kept_graph(kept, fingerprint, args):
            return engine, checkpoint_tokenizer(args.params_path, args.model_name_or_path)
    model, tokenizer, record = load_model(args.params_path, args.model_name_or_path, args.output_emb_size)
    if args.device == "cpu" and not RANK:
        keep = functools.partial(keep_graph, kept, fingerprint, record)
    return make_engine(model, args.precision, args.cpu_threads, keep), tokenizer


# --------------------------------------------------------------------------------------------- from texts to embeddings
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
        embeddings[row : row + len(block)] = block
        row += len(block)
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
