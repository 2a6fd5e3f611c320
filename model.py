"""The network, its loss, its checkpoints: the one way from token ids to embeddings.

`SimCSE` is the network in dynamic graph; the Predictor of deploy/python/predictor.py is the same network as a static
graph in Paddle Inference. Both have `embed(input_ids, token_type_ids)`, and `encode` turns texts into embeddings with
either.
"""

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import warnings
import zlib  # noqa: F401  paddlepaddle 2.6 dies in inflateReset2 if its own zlib is loaded before Python's
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from checkpoint import new_folder, read_weights, write_weights  # noqa: E402
from console import InputError, first_line, progress, warn  # noqa: E402
from data import DEFAULT_MODEL  # noqa: E402
from tokenizing import load_tokenizer, make_batches, tokenize_windows  # noqa: E402

CONFIG_FILE = "simcse_config.json"
LAUNCHER_GONE = signal.SIGUSR1  # not SIGTERM: it comes once for each thread of the launcher
PARAMS_FILE = "model_state.pdparams"
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
def contrastive_loss(query: paddle.Tensor, title: paddle.Tensor, margin: float, scale: float,
                     keys: paddle.Tensor | None = None) -> paddle.Tensor:
    """In-batch contrastive loss of SimCSE (Gao et al. 2021, eq. 1), a margin taken off the positives' cosine.

    mean_i -log softmax_j(scale * (cos(q_i, t_j) - margin * [i = j]))[i]

    Args:
        query, title: L2-normalized embeddings, float [batch, dim]; row i of one is the positive of row i of the other,
            all other rows are its negatives.
        margin: how much more similar than a negative a positive has to be, in cosine.
        scale: the inverse of the temperature.
        keys: int64 [batch], equal for equal texts, which then are not each other's negatives; None: they are.

    Returns:
        A scalar tensor.
    """
    cosine = paddle.matmul(query, title, transpose_y=True)
    positive = paddle.eye(cosine.shape[0], dtype=cosine.dtype)
    logits = scale * (cosine - margin * positive)
    if keys is not None:
        same = (keys.unsqueeze(0) == keys.unsqueeze(1)).astype(cosine.dtype)
        logits = logits - 1e9 * (same - positive)
    loss = F.cross_entropy(logits, paddle.arange(cosine.shape[0], dtype="int64"))
    # On a CPU paddle's softmax makes ln(batch) of NaN; a run that has diverged would look like one that learns nothing.
    return loss + 0 * cosine.detach().sum()


def gather_rows(tensor: paddle.Tensor) -> paddle.Tensor:
    """The rows of all ranks, rank 0's first; gradients flow to those of this rank."""
    parts: list[paddle.Tensor] = []
    paddle.distributed.all_gather(parts, tensor.detach())
    parts[paddle.distributed.get_rank()] = tensor
    return paddle.concat(parts)


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


class SimCSE(nn.Layer):
    """A dual tower with shared weights: encoder -> first token [-> pooler] [-> fc] -> dropout -> L2 norm.

    Args:
        pretrained_model: an encoder as AutoModel loads it; (input_ids, token_type_ids, position_ids, attention_mask)
            to (sequence_output [batch, length, hidden], pooled_output [batch, hidden]).
        dropout: rate on the output vector; None: 0.1.
        margin, scale: see `contrastive_loss`.
        output_emb_size: size of the embedding; None or 0: the encoder's hidden size, without fc.
    """

    def __init__(self, pretrained_model: nn.Layer, dropout: float | None = None, margin: float = 0.0,
                 scale: float = 20, output_emb_size: int | None = None) -> None:
        super().__init__()
        first_token_only(pretrained_model)
        self.ptm = pretrained_model
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.margin = margin
        self.scale = scale
        self.infer_with_pooler = True  # what `embed` and the exported graph do; training always uses the pooler
        self.precision = "fp32"  # what `forward` and `embed` compute in; bf16 and fp16 need a GPU
        self.recomputes = False  # whether the encoder's layers are computed again for their gradients
        self.cross_device_negatives = False  # whether `loss` is that of the rows of all ranks
        self.compared = None  # what the last `loss` was of: query, title, keys
        self.output_emb_size = output_emb_size or 0
        hidden_size = pretrained_model.config.hidden_size
        self.embedding_size = self.output_emb_size or hidden_size
        self.max_positions = getattr(pretrained_model.config, "max_position_embeddings", 512)
        if self.output_emb_size:
            weight_attr = paddle.ParamAttr(initializer=nn.initializer.TruncatedNormal(std=0.02))
            self.emb_reduce_linear = nn.Linear(hidden_size, self.output_emb_size, weight_attr=weight_attr)

    def get_pooled_embedding(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor | None = None,
                             position_ids: paddle.Tensor | None = None, attention_mask: paddle.Tensor | None = None,
                             with_pooler: bool = True) -> paddle.Tensor:
        """L2-normalized embeddings, float [batch, embedding_size].

        Args:
            input_ids, token_type_ids, position_ids: int64 [batch, length]; padding has the encoder's pad id.
            attention_mask: [batch, length], 1 for a token and 0 for padding; None: from the pad id.
            with_pooler: take the encoder's pooled (tanh) output; otherwise the raw first token.
        """
        with self.autocast():
            outputs = self.ptm(input_ids, token_type_ids=token_type_ids, position_ids=position_ids,
                               attention_mask=attention_mask)
            embedding = outputs[1] if with_pooler else outputs[0][:, 0]
            if self.output_emb_size:
                embedding = self.emb_reduce_linear(embedding)
        if self.precision != "fp32":
            embedding = embedding.astype("float32")  # norm, cosines and loss are of full precision
        return F.normalize(self.dropout(embedding), p=2, axis=-1)

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

    def loss(self, query: paddle.Tensor, title: paddle.Tensor, keys: paddle.Tensor | None = None) -> paddle.Tensor:
        """`contrastive_loss` of embeddings, with `cross_device_negatives` of those of all ranks: the same on each."""
        if self.cross_device_negatives:
            query, title, keys = (None if rows is None else gather_rows(rows) for rows in (query, title, keys))
        self.compared = query.detach(), title.detach(), keys
        return contrastive_loss(query, title, self.margin, self.scale, keys)

    def forward(self, query_input_ids: paddle.Tensor, title_input_ids: paddle.Tensor, query_token_type_ids=None,
                query_position_ids=None, query_attention_mask=None, title_token_type_ids=None,
                title_position_ids=None, title_attention_mask=None, keys: paddle.Tensor | None = None,
                embeddings_only: bool = False) -> paddle.Tensor | tuple[paddle.Tensor, paddle.Tensor]:
        """The contrastive loss, a scalar. In SimCSE both sides are the same texts under different dropout.

        Args:
            keys: see `contrastive_loss`.
            embeddings_only: return the embeddings of both sides, float [batch, embedding_size], instead of the loss.
        """
        query, title = self._pair(
            [query_input_ids, query_token_type_ids, query_position_ids, query_attention_mask],
            [title_input_ids, title_token_type_ids, title_position_ids, title_attention_mask])
        return (query, title) if embeddings_only else self.loss(query, title, keys)


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


# ------------------------------------------------------------------------------------------------- checkpoints
class _NewlyInitialized(logging.Handler):
    """Collects the layers that paddlenlp says it left at random: it only logs them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.layers: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        named = re.search(r"newly initialized: \[(.*?)\]", record.getMessage())
        self.layers += re.findall(r"'([^']+)'", named[1]) if named else []


def load_encoder(model_name_or_path: str, dropout: float | None = None) -> nn.Layer:
    """A pretrained encoder by hub name or folder, every layer of it loaded, in float32.

    Args:
        dropout: hidden and attention dropout rate; None: the encoder's own.

    Raises:
        InputError: no such encoder, or layers are missing from its weights. Only the pooler may be: encoders
            pretrained without one get a random one, which is said on stderr, to be trained.
    """
    import paddlenlp
    from paddlenlp.utils.log import logger

    logger.set_level("WARNING")
    rates = {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    for name in os.listdir(model_name_or_path) if os.path.isdir(model_name_or_path) else ():
        if name.endswith(".pdparams"):  # paddlenlp would run what is in it
            read_weights(os.path.join(model_name_or_path, name), "--model_name_or_path")
    seen = _NewlyInitialized()
    logger.logger.addHandler(seen)
    try:
        encoder = paddlenlp.transformers.AutoModel.from_pretrained(model_name_or_path, **rates)
    except Exception as error:  # paddlenlp raises OSError, ValueError, KeyError, RuntimeError for the same reasons
        raise InputError(f"--model_name_or_path {model_name_or_path}: neither a folder with an encoder nor one that "
                         f"can be fetched by that name: {first_line(error)}") from None
    finally:
        logger.logger.removeHandler(seen)
    if missing := [name for name in seen.layers if "pooler" not in name]:
        raise InputError(f"--model_name_or_path {model_name_or_path}: its weights lack {_some(missing)}")
    if seen.layers:
        warn(f"{model_name_or_path} has no trained pooler: {_some(seen.layers)} start at random")
    return encoder


def _encoder_from_record(record: dict, dropout: float | None) -> nn.Layer:
    """The encoder that a checkpoint describes, with random weights: the checkpoint has them all."""
    import paddlenlp

    paddlenlp.utils.log.logger.set_level("WARNING")
    encoder_class = getattr(paddlenlp.transformers, record["encoder_class"])
    config = encoder_class.config_class.from_dict(_portable(record["encoder_config"]))
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
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
        output_emb_size: None, or what the checkpoint must have (0: no fc).
        flag: the flag that named the file, for messages.
        dropout: the encoder's dropout rate, for training on.
        settings: dropout, margin and scale of `SimCSE`; None: margin and scale from the checkpoint's record.

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
    size = state["emb_reduce_linear.weight"].shape[-1] if "emb_reduce_linear.weight" in state else 0
    if output_emb_size is not None and output_emb_size != size:
        raise InputError(f"--output_emb_size {output_emb_size}: {params_path} has {size or 'no fc: 0'}")

    record = read_record(folder)
    if model_name_or_path or not record:
        name = model_name_or_path or DEFAULT_MODEL
        encoder = load_encoder(name, dropout)
    else:
        name = record["model_name_or_path"]
        encoder = _encoder_from_record(record, dropout)
    has_tokenizer = os.path.isfile(os.path.join(folder, "tokenizer_config.json"))
    tokenizer = load_tokenizer(folder if has_tokenizer else name)
    settings = settings or {key: record[key] for key in ("margin", "scale") if key in record}
    model = SimCSE(encoder, output_emb_size=size, **settings)
    model.infer_with_pooler = record.get("with_pooler", True)
    load_state(model, state, f"{flag} {params_path}")
    model.eval()
    return model, tokenizer, make_record(model, name, record.get("max_seq_length"))


def make_record(model: SimCSE, model_name_or_path: str, max_seq_length: int | None) -> dict:
    """What later stages have to know of a checkpoint: the content of simcse_config.json."""
    import paddlenlp

    return {"model_name_or_path": model_name_or_path, "output_emb_size": model.output_emb_size,
            "with_pooler": model.infer_with_pooler, "scale": model.scale, "margin": model.margin,
            "max_seq_length": max_seq_length, "encoder_class": type(model.ptm).__name__,
            "encoder_config": _portable(model.ptm.config.to_dict()),
            "versions": {"paddlepaddle": paddle.__version__, "paddlenlp": paddlenlp.__version__}}


def write_record(folder: str, record: dict, tokenizer: Any) -> None:
    """Write simcse_config.json and the tokenizer's files."""
    tokenizer.save_pretrained(folder)
    with open(os.path.join(folder, CONFIG_FILE), "w", encoding="utf-8") as file:
        json.dump(record, file, ensure_ascii=False, indent=2)


def save_checkpoint(folder: str, model: SimCSE, tokenizer: Any, record: dict, params_file: str = PARAMS_FILE,
                    also: Callable[[str], None] | None = None) -> None:
    """Write weights, tokenizer, simcse_config.json and what `also` adds to `folder`, which appears complete or not at
    all."""
    with new_folder(folder) as temporary:
        write_weights(os.path.join(temporary, params_file), model.state_dict())
        write_record(temporary, record, tokenizer)
        if also:
            also(temporary)
