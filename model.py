"""SimCSE: the network (encoder, pooling, fc, dropout), its loss, its checkpoints, and the encoder of a checkpoint."""

import argparse
import numbers
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from data import Batch, DuplicateKeys, Inputs
from simcse import console
from simcse.console import InputError, as_input_error
from simcse.device import cast_products, set_device, set_gpu_precision
from simcse.encoder.encoder import Encoder as TextEncoder
from simcse.encoder.encoder import tokenize
from simcse.encoder.engine import Engine, export_fastest, open_engine
from simcse.encoder.int8_check import (
    TextSource,
    check_int8,
    choose_calibration,
    read_comparisons,
    remember_comparisons,
)
from simcse.encoder.kept_graph import KeptGraph
from simcse.encoder.paddle_patches import compute_first_token_only, cross_entropy
from simcse.encoder.pooling import EncoderOutputs, find_pooling
from simcse.encoder.pretrained import (
    drop_incompatible_keys,
    encoder_from_record,
    freeze_pooler,
    load_pretrained,
)
from simcse.encoder.table import TokenTable, remove_layers
from simcse.encoder.weights import (
    CONFIG_FILE,
    ENCODER_FIELDS,
    PARAMS_FILE,
    TOKENIZER_FILE,
    CheckpointFiles,
    load_state,
    new_checkpoint_folder,
    read_record,
    read_weights,
    write_record,
    write_weights,
)
from simcse.flags import DEFAULT_MODEL, ENCODE_LENGTH, checkpoint_file
from simcse.machine import BATCH_TOKENS, ENCODE_PRECISIONS, RANK, RANKS
from simcse.ranks import gather_rows
from simcse.text.prefixes import INPUT_TYPES, NO_PREFIXES, Prefixes
from simcse.text.textfile import Corpus
from simcse.text.tokens import make_batches
from simcse.text.wordpiece import load_tokenizer
from simcse.training.gradients import BatchLoss, Embeddings

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

INT8_REQUIREMENTS = "requirements-openvino.txt"
# The fixed cost of a forward and backward pass, as a number of tokens of ERNIE-base that take as long: measured on a
# CPU; on GPUs, by precision, the least time of its kernels (docs/en/sizing.md, "Padding").
PASS_TOKENS = {"cpu": 256, "fp32": 256, "tf32": 512, "fp16": 256, "bf16": 1000}


# ---------------------------------------------------------------------------------------------------------- the network
@dataclass(frozen=True)
class LossSettings:
    """Settings of the training loss; train.py fills each from the flag of the same name,
    which flags.SHARED_FLAGS names, too.

    A checkpoint records all of them; weights.RECORD_FIELDS says which values each may have. A checkpoint that predates
    a field counts as trained with its default.

    Attributes:
        margin: subtracted from the cosine of a positive.
        scale: factor on the cosines, the inverse of the temperature.
        cross_device_negatives: take the loss over the batches of all ranks together.
    """

    margin: float = 0.0
    scale: float = 20
    cross_device_negatives: bool = False


class SimCSE(nn.Layer):
    """A dual tower with shared weights: encoder -> pooling [-> fc] -> dropout -> L2 norm.

    Args:
        pretrained_model: an encoder as AutoModel loads it; of input_ids and token_type_ids it gives sequence_output
            [batch, length, hidden] and pooled_output [batch, hidden].
        dropout: rate on the output vector; None: 0.1.
        output_emb_size: size of the embedding; None or 0: the encoder's hidden size, without fc.
        pooling: a name in pooling.POOLINGS.
        with_pooler: embed and export by the pooling as it is trained; False: by its `pool_without_pooler`, if it has
            one.
        precision: of matrix products: fp32, or on a GPU tf32, bf16 or fp16; see `device.set_gpu_precision`.
        loss_settings: None: those of `LossSettings()`.

    Attributes:
        whitened_at: the --max_seq_length at which `whitening.whiten_network` was fitted; None: the network is not
            whitened.
        fc_is_random: whether there is an fc with its initial, random weights: neither trained nor whitened.
    """

    def __init__(self, pretrained_model: nn.Layer, dropout: float | None = None,
                 output_emb_size: int | None = None, pooling: str = "pooler", with_pooler: bool = True,
                 precision: str = "fp32", loss_settings: LossSettings | None = None) -> None:
        super().__init__()
        needs = find_pooling(pooling)
        if needs.removes_layers:
            pretrained_model = TokenTable(pretrained_model)
        if needs.first_token_only:
            compute_first_token_only(pretrained_model)
        if not needs.uses_pooler:
            freeze_pooler(pretrained_model)
        self.ptm = pretrained_model
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.loss_settings = loss_settings or LossSettings()
        self.pooling = pooling
        self.precision = precision
        self.with_pooler = with_pooler
        self.whitened_at: int | None = None
        self.normalizes = True  # L2-normalize embeddings; `whitening.unnormalized` switches it off
        hidden_size = pretrained_model.config.hidden_size
        self.output_emb_size = output_emb_size or 0
        self.embedding_size = output_emb_size or hidden_size
        self.fc_is_random = self.output_emb_size > 0
        self.max_positions = getattr(pretrained_model.config, "max_position_embeddings", 512)
        self.batch_tokens = BATCH_TOKENS[paddle.device.get_device().split(":")[0]]
        if self.output_emb_size:
            weight_attr = paddle.ParamAttr(initializer=nn.initializer.TruncatedNormal(std=0.02))
            self.emb_reduce_linear = nn.Linear(hidden_size, self.output_emb_size, weight_attr=weight_attr)

    bytes_needed = 0  # of the host's memory, as an engine on a GPU; see `engine.Engine`

    def remove_fc(self) -> None:
        """Remove the fc, so that embeddings are the vectors that went into it."""
        del self.emb_reduce_linear
        self.output_emb_size = 0
        self.embedding_size = self.ptm.config.hidden_size
        self.fc_is_random = False

    def replace_pooler(self, weight: np.ndarray, bias: np.ndarray) -> None:
        """Replace the weights of the encoder's pooler by others, [hidden, hidden] and [hidden]."""
        load_state(self.ptm.pooler.dense, {"weight": weight, "bias": bias}, "the pooler")

    def replace_fc(self, weight: np.ndarray, bias: np.ndarray) -> None:
        """Replace the fc, or add one where there is none.

        Args:
            weight: [hidden, size], where `size` is that of the embeddings from now on.
            bias: [size].
        """
        self.emb_reduce_linear = nn.Linear(*weight.shape)
        self.emb_reduce_linear.weight.set_value(weight.astype("float32"))
        self.emb_reduce_linear.bias.set_value(bias.astype("float32"))
        self.output_emb_size = len(bias)
        self.embedding_size = len(bias)
        self.fc_is_random = False

    def pool(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor | None = None,
             with_pooler: bool = True) -> paddle.Tensor:
        """Return a vector a text, float [batch, hidden]; arguments as in `get_pooled_embedding`."""
        pooling = find_pooling(self.pooling)
        if self._pools_by_table():
            return self.ptm.average(input_ids)
        if pooling.all_layers:
            outputs = self.ptm(input_ids, token_type_ids=token_type_ids, output_hidden_states=True)
        else:
            outputs = self.ptm(input_ids, token_type_ids=token_type_ids)
        encoded = EncoderOutputs(outputs, input_ids, self.ptm.config.pad_token_id)
        if pooling.pool_without_pooler and not with_pooler:
            return pooling.pool_without_pooler(encoded)
        return pooling.pool(encoded)

    def _pools_by_table(self) -> bool:
        """Return whether a `TokenTable` pools by a sparse product, in which padding costs nothing."""
        return find_pooling(self.pooling).removes_layers and self.ptm.can_average()

    def get_pooled_embedding(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor | None = None,
                             with_pooler: bool = True) -> paddle.Tensor:
        """Return L2-normalized embeddings, float32 [batch, embedding_size].

        The original implementation takes positions and masks as well; here the encoder makes them of the ids.

        Args:
            input_ids: int64 [batch, length], padded with the encoder's pad id.
            token_type_ids: the same shape; None: all zero.
            with_pooler: False: by the pooling's `pool_without_pooler`, if it has one; "pooler" then takes the raw first
                token.
        """
        with cast_products(self.precision):
            embedding = self.pool(input_ids, token_type_ids, with_pooler)
            if self.output_emb_size:
                embedding = self.emb_reduce_linear(embedding)
        if self.precision in ("bf16", "fp16"):
            embedding = embedding.astype("float32")  # norm, cosines and loss stay in float32
        embedding = self.dropout(embedding)
        return F.normalize(embedding, p=2, axis=-1) if self.normalizes else embedding

    @paddle.no_grad()
    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> paddle.Tensor:
        """Return embeddings without dropout or gradient, float32 [batch, embedding_size], of two int64 [batch, length].

        On a GPU the work is only launched; whoever reads the result waits for it.
        """
        self.eval()
        return self.get_pooled_embedding(paddle.to_tensor(input_ids), paddle.to_tensor(token_type_ids),
                                         with_pooler=self.with_pooler)

    def get_semantic_embedding(self, data_loader: Iterable[tuple[Any, Any]]) -> Iterator[paddle.Tensor]:
        """Yield the embeddings, float [batch, embedding_size], of every (input_ids, token_type_ids) batch."""
        for input_ids, token_type_ids in data_loader:
            yield self.embed(input_ids, token_type_ids)

    def _encode(self, sides: Sequence[Inputs], with_pooler: bool = True) -> list[paddle.Tensor]:
        """Return the embeddings of each side, float32 [texts, embedding_size].

        All sides are encoded together in groups of like length, which takes less padding, and then put back in order.
        Lengths are counted on the host, so inputs on a GPU are copied back.
        """
        pad_id = self.ptm.config.pad_token_id
        texts = join_sides(sides, pad_id)
        lengths = count_tokens(texts.input_ids, pad_id)
        if self._pools_by_table():
            groups = [np.argsort(lengths)]  # one group; as everywhere, the longest text is the last
        else:
            cost_key = "cpu" if paddle.device.get_device() == "cpu" else self.precision
            groups = group_by_length(lengths, PASS_TOKENS[cost_key])

        embeddings = []
        for rows in groups:
            longest = lengths[rows[-1]]
            input_ids = paddle.to_tensor(texts.input_ids[rows, :longest])
            token_type_ids = paddle.to_tensor(texts.token_type_ids[rows, :longest])
            embeddings.append(self.get_pooled_embedding(input_ids, token_type_ids, with_pooler=with_pooler))

        inverse_order = paddle.to_tensor(np.argsort(np.concatenate(groups)))
        in_order = paddle.concat(embeddings).index_select(inverse_order)
        return paddle.split(in_order, [len(side.input_ids) for side in sides])

    def cosine_sim(self, query_input_ids: paddle.Tensor, title_input_ids: paddle.Tensor, query_token_type_ids=None,
                   title_token_type_ids=None, with_pooler: bool = True) -> paddle.Tensor:
        """Return the cosine of each query with its title, float32 [batch]; arguments as in `get_pooled_embedding`."""
        sides = [Inputs(query_input_ids, query_token_type_ids), Inputs(title_input_ids, title_token_type_ids)]
        query, title = self._encode(sides, with_pooler=with_pooler)
        return (query * title).sum(axis=-1)

    def forward(self, batch: Batch) -> Embeddings:
        """Return the embeddings of a batch, which `loss` computes the training loss from."""
        sides = [batch.query, batch.title]
        if batch.hard_negative is not None:
            sides.append(batch.hard_negative)
        return Embeddings.of_sides(self._encode(sides))

    def loss(self, embeddings: Embeddings, duplicate_keys: DuplicateKeys | None = None) -> BatchLoss:
        """Return the `contrastive_loss` of a batch, and what it compares. Gradients pass through all of `embeddings`.

        With `cross_device_negatives` it is the loss of all ranks' batches together, on each rank the same; all ranks
        call it together.
        """
        if duplicate_keys is not None:
            duplicate_keys = duplicate_keys.map(paddle.to_tensor)
        if self.loss_settings.cross_device_negatives and RANKS > 1:
            embeddings = embeddings.map(gather_rows)
            if duplicate_keys is not None:
                duplicate_keys = duplicate_keys.map(gather_rows)
        value = contrastive_loss(embeddings.query, embeddings.title, self.loss_settings,
                                 hard_negative=embeddings.hard_negative, duplicate_keys=duplicate_keys)
        return BatchLoss(value, embeddings.map(paddle.Tensor.detach), duplicate_keys)


def join_sides(sides: Sequence[Inputs], pad_id: int) -> Inputs:
    """Return the texts of all sides, one side after the other, padded to the longest: arrays int64 [texts, length]."""
    width = max(side.input_ids.shape[1] for side in sides)
    all_ids = []
    all_types = []
    for side in sides:
        ids = np.asarray(side.input_ids)
        types = np.zeros_like(ids) if side.token_type_ids is None else np.asarray(side.token_type_ids)
        missing = ((0, 0), (0, width - ids.shape[1]))
        all_ids.append(np.pad(ids, missing, constant_values=pad_id))
        all_types.append(np.pad(types, missing))
    return Inputs(np.concatenate(all_ids), np.concatenate(all_types))


def count_tokens(input_ids: np.ndarray, pad_id: int) -> np.ndarray:
    """Return how many tokens each text has up to its padding, at least 1, int64 [texts]."""
    numbers = np.arange(1, input_ids.shape[1] + 1)
    return ((input_ids != pad_id) * numbers).max(axis=1, initial=1)


def group_by_length(lengths: np.ndarray, cost: float) -> list[np.ndarray]:
    """Return the rows of texts in groups of like length, shortest first, such that padding and passes cost least.

    Args:
        lengths: tokens of each text, int64 [texts].
        cost: the fixed cost of a group, in tokens; to it come its tokens, padding included.

    Returns:
        The rows of each group, int64 [texts of the group], by rising length.
    """
    values, counts = np.unique(lengths, return_counts=True)
    different_lengths = values.tolist()
    texts_before = [0, *counts.cumsum().tolist()]  # texts shorter than each length; at the end, all texts
    # For the texts of the first n lengths, least_cost[n] is what their best groups cost, and group_start[n] the length
    # at which the last of these groups starts. That group is padded to the n-th length, so that
    #   least_cost[n] = min over first < n of least_cost[first] + texts of the group * n-th length + cost.
    least_cost = [0.0]
    group_start = [0]
    for n, longest in enumerate(different_lengths, start=1):
        totals = []
        for first in range(n):
            texts_of_group = texts_before[n] - texts_before[first]
            totals.append(least_cost[first] + texts_of_group * longest + cost)
        least_cost.append(min(totals))
        group_start.append(totals.index(min(totals)))

    rows_by_length = np.argsort(lengths, kind="stable")
    groups = []
    end = len(different_lengths)
    while end:
        first = group_start[end]
        groups.append(rows_by_length[texts_before[first] : texts_before[end]])
        end = first
    groups.reverse()
    return groups


# ------------------------------------------------------------------------------------------------------------- the loss
def duplicate_mask(keys: DuplicateKeys) -> paddle.Tensor:
    """Return which candidates must not count as negatives: copies of the query or its title, titles of equal queries.

    Args:
        keys: int64 tensors [queries].

    Returns:
        bool [queries, candidates]; candidates are the titles, then the hard negatives. It is True for the query's own
        title as well, which is its positive.
    """
    query = keys.query.unsqueeze(1)
    title = keys.title.unsqueeze(1)
    same_titles = (keys.title == query) | (keys.title == title) | (keys.query == query)
    if keys.hard_negative is None:
        return same_titles
    same_negatives = (keys.hard_negative == query) | (keys.hard_negative == title)
    return paddle.concat([same_titles, same_negatives], axis=1)


def contrastive_loss(query: paddle.Tensor, title: paddle.Tensor, settings: LossSettings, *,
                     hard_negative: paddle.Tensor | None = None,
                     duplicate_keys: DuplicateKeys | None = None) -> paddle.Tensor:
    """Return the in-batch contrastive loss of SimCSE (Gao et al. 2021, eq. 1), a scalar, with a margin that is taken
    off the positives' cosine:

        mean_i -log softmax_j(scale * (cos(query_i, candidate_j) - margin * [i = j]))[i]

    The candidates of every query are all titles, then all hard negatives.

    Args:
        query: L2-normalized embeddings, float32 [batch, dim].
        title: the same; row i is the positive of query i, the other rows are its negatives.
        settings: margin and scale.
        hard_negative: hard negatives, which are negatives of all queries, float32 [rows, dim].
        duplicate_keys: int64 tensors, by which duplicates are masked out; None: they are kept as negatives.
    """
    batch = query.shape[0]
    cosines = paddle.matmul(query, title, transpose_y=True)
    logits = settings.scale * (cosines - settings.margin * paddle.eye(batch, dtype=cosines.dtype))
    if hard_negative is not None:
        negative_logits = settings.scale * paddle.matmul(query, hard_negative, transpose_y=True)
        logits = paddle.concat([logits, negative_logits], axis=1)
    if duplicate_keys is not None:
        positive = paddle.eye(batch, logits.shape[1], dtype=logits.dtype)
        duplicates = duplicate_mask(duplicate_keys).astype(logits.dtype) - positive
        logits = logits - 1e9 * duplicates
    loss = cross_entropy(logits, paddle.arange(batch, dtype="int64")).mean()
    # On a CPU paddle's softmax makes ln(batch) of NaN: a diverged run would look like one that learns nothing.
    return loss + 0 * logits.detach().sum()


# ---------------------------------------------------------------------------------------------------------- checkpoints
class LoadedModel(NamedTuple):
    """A network, its tokenizer and its record.

    Attributes:
        model: the network.
        tokenizer: see `wordpiece.load_tokenizer`.
        record: see `make_record`.
    """

    model: SimCSE
    tokenizer: Any
    record: dict


def load_model(params_path: str, model_name_or_path: str | None = None, output_emb_size: int | None = None, *,
               flag: str = "--params_path", encoder_dropout: float | None = None, output_dropout: float | None = None,
               pooling: str | None = None, with_pooler: bool | None = None, precision: str = "fp32",
               loss_settings: LossSettings | None = None) -> LoadedModel:
    """Load a checkpoint, strictly.

    Args:
        params_path: the file of weights, this project's or the original implementation's (without simcse_config.json
            beside it).
        model_name_or_path: the encoder; None: what the checkpoint records, else DEFAULT_MODEL.
        output_emb_size: None, or what the checkpoint must have (0: no fc).
        flag: the flag that named the file, for messages.
        encoder_dropout: rate of the encoder's hidden and attention dropout; None: the encoder's own.
        output_dropout: rate on the output vector; None: that of `SimCSE`.
        pooling, with_pooler, loss_settings: see `SimCSE`; None: what the checkpoint records, else that of `SimCSE`.
        precision: see `SimCSE`.

    Returns:
        The network, in evaluation mode, the tokenizer, and a record of the network as it is now. Its max_seq_length
        is the checkpoint's.

    Raises:
        InputError: the file cannot be read; a tensor is missing, unexpected or wrongly shaped; `output_emb_size`
            contradicts the checkpoint; it records an unknown pooling, or has no layers, and `pooling` needs them.
    """
    source = f"{flag} {params_path}"
    state = read_weights(params_path, flag)
    check_simcse(state, source)
    size = read_output_size(state, params_path, output_emb_size)
    folder = os.path.dirname(params_path)
    # {}: the original implementation writes none
    record = read_record(folder, () if model_name_or_path else ENCODER_FIELDS)
    pooling = choose_pooling(record, pooling, source)
    if with_pooler is None:
        with_pooler = record.get("with_pooler", True)

    name = model_name_or_path or record.get("model_name_or_path", DEFAULT_MODEL)
    if record and not model_name_or_path:
        encoder = encoder_from_record(record, encoder_dropout, os.path.join(folder, CONFIG_FILE))
    else:
        encoder = load_pretrained(name, encoder_dropout, uses_pooler=False)  # the checkpoint has the pooler's weights
    model = SimCSE(encoder, dropout=output_dropout, output_emb_size=size, pooling=pooling, with_pooler=with_pooler,
                   precision=precision, loss_settings=loss_settings or recorded_loss_settings(record))
    model.whitened_at = record.get("whitened_at")
    model.fc_is_random = record.get("fc_is_random", False)

    if find_pooling(pooling).removes_layers:
        state = convert_to_table(state, record, source)
    load_state(model, state, source)
    model.eval()
    tokenizer = checkpoint_tokenizer(params_path, name)
    return LoadedModel(model, tokenizer, make_record(model, name, record.get("max_seq_length"),
                                                     Prefixes.from_record(record)))


def check_simcse(state: Mapping[str, np.ndarray], source: str) -> None:
    """Raise InputError if weights are not those of a `SimCSE`; `source` names their file."""
    if not any(name.startswith("ptm.") for name in state):
        raise InputError(f"{source}: not a SimCSE checkpoint (no ptm.* tensors); an encoder without SimCSE training is "
                         "given by --model_name_or_path")


def read_output_size(state: Mapping[str, np.ndarray], params_path: str, wanted: int | None) -> int:
    """Return the size of a checkpoint's fc, 0 where it has none.

    Args:
        state: the checkpoint's weights.
        params_path: their file, for the message.
        wanted: the size that it must have; None: any.

    Raises:
        InputError: it has another.
    """
    size = state["emb_reduce_linear.weight"].shape[-1] if "emb_reduce_linear.weight" in state else 0
    if wanted not in (None, size):
        has = str(size) if size else "no fc; give 0, or leave the flag out"
        raise InputError(f"--output_emb_size {wanted}: {params_path} has {has}")
    return size


def choose_pooling(record: Mapping[str, Any], wanted: str | None, source: str) -> str:
    """Return the pooling of a loaded checkpoint: `wanted`, else what its record says, else "pooler".

    Args:
        record: the checkpoint's.
        wanted: the pooling that is asked for; None: none is.
        source: names the checkpoint in messages.

    Raises:
        InputError: the record has an unknown pooling, or one without layers, and `wanted` needs them.
    """
    recorded = record.get("pooling", "pooler")
    with as_input_error(f"{source}: {CONFIG_FILE}", ValueError):
        has_layers = not find_pooling(recorded).removes_layers
    pooling = wanted or recorded
    if not has_layers and not find_pooling(pooling).removes_layers:
        raise InputError(f"{source}: was trained with --pooling {recorded} and has no layers, which --pooling "
                         f"{pooling} needs; start from another checkpoint")
    return pooling


def convert_to_table(state: Mapping[str, np.ndarray], record: Mapping[str, Any],
                     source: str) -> Mapping[str, np.ndarray]:
    """Return the weights of a checkpoint, with layers or without, as those of a network with a `TokenTable`.

    Args:
        state: the checkpoint's weights.
        record: the checkpoint's.
        source: names the checkpoint in messages.

    Raises:
        InputError: it is of an earlier version, whose table had positions.
    """
    is_table = not any(name.startswith("ptm.embeddings.") for name in state)
    if is_table:
        return state
    if find_pooling(record.get("pooling", "pooler")).removes_layers:
        raise InputError(f"{source}: was made by an earlier version, in which --pooling {record['pooling']} had "
                         "positions; make it again with train.py")
    with as_input_error(source, ValueError):
        return remove_layers(state)


def recorded_loss_settings(record: Mapping[str, Any]) -> LossSettings:
    """Return the settings of the loss in a checkpoint's record; those that it lacks have their defaults."""
    return LossSettings(**{field.name: record[field.name] for field in fields(LossSettings) if field.name in record})


def checkpoint_tokenizer(params_path: str, model_name_or_path: str | None = None) -> Any:
    """Load the tokenizer beside a checkpoint; where there is none, that of its encoder, named or recorded."""
    folder = os.path.dirname(params_path)
    if os.path.isfile(os.path.join(folder, TOKENIZER_FILE)):
        return load_tokenizer(folder or ".")
    return load_tokenizer(model_name_or_path or read_record(folder).get("model_name_or_path", DEFAULT_MODEL))


def make_record(model: SimCSE, model_name_or_path: str, max_seq_length: int | None,
                prefixes: Prefixes = NO_PREFIXES) -> dict:
    """Return what later stages have to know of a checkpoint: the content of simcse_config.json.

    Args:
        prefixes: those that its texts have had.
    """
    import paddlenlp

    record = {"model_name_or_path": model_name_or_path, "output_emb_size": model.output_emb_size,
              "embedding_size": model.embedding_size, "max_positions": model.max_positions, "pooling": model.pooling,
              **asdict(model.loss_settings), "max_seq_length": max_seq_length, "whitened_at": model.whitened_at,
              "encoder_class": encoder_class_name(model.ptm),
              "encoder_config": drop_incompatible_keys(model.ptm.config.to_dict()),
              "versions": {"paddlepaddle": paddle.__version__, "paddlenlp": paddlenlp.__version__}}
    if find_pooling(model.pooling).pool_without_pooler:
        record["with_pooler"] = model.with_pooler
    if model.fc_is_random:
        record["fc_is_random"] = True
    return record | prefixes.as_record()


def encoder_class_name(encoder: nn.Layer) -> str:
    """Return the name of an encoder's class in PaddleNLP; of a `TokenTable`, that of the encoder it was made of."""
    return encoder.encoder_class_name if isinstance(encoder, TokenTable) else type(encoder).__name__


def save_checkpoint(folder: str, model: SimCSE, tokenizer: Any, record: dict) -> None:
    """Write weights, tokenizer and simcse_config.json to `folder`, which appears complete or not at all."""
    with new_checkpoint_folder(folder) as temporary:
        write_checkpoint(temporary, model, tokenizer, record)


def write_checkpoint(folder: str, model: SimCSE, tokenizer: Any, record: dict) -> None:
    """Write weights, tokenizer and simcse_config.json into an existing folder."""
    write_weights(os.path.join(folder, PARAMS_FILE), model.state_dict())
    write_record(folder, record, tokenizer)


# -------------------------------------------------------------------------------------------------------------- encoder
def _is_integer_from(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and console.is_unicode(value)


# The values of options, in words, and what tells whether a value is one of them. None is one where it is the default.
OPTION_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "device": ('"cpu" or "gpu"', lambda value: value in ("cpu", "gpu")),
    "precision": (", ".join(ENCODE_PRECISIONS), lambda value: value in ENCODE_PRECISIONS),
    "max_seq_length": ("an integer >= 3", _is_integer_from(3)),
    "batch_size": ("an integer >= 1", _is_integer_from(1)),
    "cpu_threads": ("an integer >= 0", _is_integer_from(0)),
    "output_emb_size": ("an integer >= 0", _is_integer_from(0)),
    "model_name_or_path": ("a name or a folder", _is_text),
    "calibration_file": ("a file", _is_text),
    "query_prefix": ("a text", _is_text),
    "document_prefix": ("a text", _is_text),
}


@dataclass(frozen=True)
class EncoderOptions:
    """How a checkpoint is loaded for encoding: options of `Encoder.load`, and flags of every stage that encodes.

    Attributes:
        device: "cpu" or "gpu".
        precision: "auto", "fp32" or "bf16"; on a GPU also "tf32" or "fp16", on a CPU also "int8".
        max_seq_length: tokens that are read of a text; None: as many as the checkpoint was trained with, else
            ENCODE_LENGTH.
        batch_size: texts of a batch; None: as many as fill the engine's `batch_tokens`.
        cpu_threads: math threads on a CPU; 0: all cores.
        model_name_or_path: the encoder of a checkpoint without a simcse_config.json.
        output_emb_size: size that the embedding must have; None: any.
        calibration_file: texts, one a line, for the first time that a checkpoint is used in int8.
        query_prefix, document_prefix: put before texts that are encoded; None: as the checkpoint records.
    """

    device: str = "cpu"
    precision: str = "auto"
    max_seq_length: int | None = None
    batch_size: int | None = None
    cpu_threads: int = 0
    model_name_or_path: str | None = None
    output_emb_size: int | None = None
    calibration_file: str | None = None
    query_prefix: str | None = None
    document_prefix: str | None = None

    def __post_init__(self) -> None:
        """Raise InputError if an option has a value that it cannot have."""
        for field in fields(self):
            value = getattr(self, field.name)
            description, is_valid = OPTION_VALUES[field.name]
            if not (is_valid(value) or (value is None and field.default is None)):
                raise InputError(f"{field.name}: expected {description}, got {value!r}")


class Encoder(TextEncoder):
    """The encoder of a checkpoint.

        encoder = Encoder.load("checkpoints/model_900")
        embeddings = encoder.encode(["语义检索", "信息抽取"])  # float32 [2, embedding_size], L2-normalized
    """

    @staticmethod
    def load(checkpoint: str | os.PathLike, *, calibration_texts: Sequence[Any] = (), **options: Any) -> "Encoder":
        """Load a trained checkpoint for encoding.

        On a CPU the exported graph is kept beside the checkpoint; later starts load neither the network nor paddlenlp.

        Args:
            checkpoint: model_state.pdparams, model_state.safetensors or the folder that holds it.
            calibration_texts: texts, or rows of them, like those that are going to be encoded. int8 is calibrated with
                them where no file is given for it, and compared with fp32 on some of them.
            options: those of `EncoderOptions`, by name: device="gpu", precision="fp16", max_seq_length=128.

        Raises:
            InputError: the checkpoint cannot be loaded, the device does not have this precision, or int8 is too far
                from fp32.
        """
        with as_input_error("checkpoint", argparse.ArgumentTypeError):
            params_path = checkpoint_file(os.fspath(checkpoint))
        sources = [TextSource("calibration_texts", calibration_texts)]
        return _open_encoder(params_path, EncoderOptions(**options), sources)


def load_encoder_for(args: argparse.Namespace, sources: Sequence[TextSource] = ()) -> Encoder:
    """Load the encoder that a script's flags ask for.

    Args:
        args: of a script with `flags.add_model_arguments` and `flags.add_encode_arguments`.
        sources: what is going to be encoded, as far as it is known. int8 is compared with fp32 on each of them, and
            calibrated with the first where no file is given for it.
    """
    options = EncoderOptions(**{field.name: getattr(args, field.name) for field in fields(EncoderOptions)})
    return _open_encoder(args.params_path, options, sources)


def _open_encoder(params_path: str, options: EncoderOptions, sources: Sequence[TextSource]) -> Encoder:
    """Load a file of weights on the device that is asked for, as an `Encoder`."""
    record = read_record(os.path.dirname(params_path))
    if options.max_seq_length is None:
        options = replace(options, max_seq_length=record.get("max_seq_length") or ENCODE_LENGTH)
    prefixes = Prefixes.from_record(record).replaced_by(options.query_prefix, options.document_prefix)
    checkpoint = CheckpointFiles(params_path, options.model_name_or_path)
    set_device(options.device, options.cpu_threads)
    if options.precision == "int8":
        return _open_int8(checkpoint, options, sources, prefixes)
    if options.device == "cpu":
        engine, tokenizer = _load_on_cpu(params_path, options)
    else:
        engine, tokenizer, _ = load_model(params_path, options.model_name_or_path, options.output_emb_size,
                                          precision=set_gpu_precision(options.precision))
    return Encoder(engine, tokenizer, options.max_seq_length, options.batch_size, checkpoint=checkpoint,
                   prefixes=prefixes)


def _load_on_cpu(params_path: str, options: EncoderOptions) -> tuple[Engine, Any]:
    """Return the engine of a checkpoint's graph, which is exported if there is none to use, and the tokenizer."""
    kept = KeptGraph(params_path, options.precision, options.model_name_or_path)
    if kept.is_current(options.output_emb_size):
        tokenizer = checkpoint_tokenizer(params_path, options.model_name_or_path)
        return open_engine(kept.folder, options.precision, options.cpu_threads), tokenizer

    model, tokenizer, record = load_model(params_path, options.model_name_or_path, options.output_emb_size)
    with tempfile.TemporaryDirectory() as folder:
        export_fastest(model, folder)
        engine = open_engine(folder, options.precision, options.cpu_threads)
        if not RANK:
            kept.keep(folder, record)
    return engine, tokenizer


# ----------------------------------------------------------------------------------------------------------------- int8
def _open_int8(checkpoint: CheckpointFiles, options: EncoderOptions, sources: Sequence[TextSource],
               prefixes: Prefixes) -> Encoder:
    """Return the encoder with a checkpoint's int8 graph, which is made if there is none to use.

    It is compared with the network on each source with which this graph has not been compared yet.
    """
    console.check_installed("--precision int8", INT8_REQUIREMENTS, "openvino")
    params_path = checkpoint.params_path
    kept = KeptGraph(params_path, "int8", options.model_name_or_path, options.calibration_file)
    if not kept.is_current(options.output_emb_size):
        return _make_int8(checkpoint, options, sources, kept, prefixes)

    def load_network() -> Encoder:
        console.log("comparing int8 with fp32, once for each file, for which the network is loaded")
        model, tokenizer, _ = load_model(params_path, options.model_name_or_path, options.output_emb_size)
        return Encoder(model, tokenizer, options.max_seq_length, checkpoint=checkpoint, prefixes=prefixes)

    tokenizer = checkpoint_tokenizer(params_path, options.model_name_or_path)
    engine = open_engine(kept.folder, "int8", options.cpu_threads)
    calibration = read_record(kept.folder)["calibration"]
    encoder = Encoder(engine, tokenizer, options.max_seq_length, options.batch_size, checkpoint=checkpoint,
                      calibration=calibration["sha256"], prefixes=prefixes)
    comparisons = check_int8(encoder, load_network, sources, calibration=calibration,
                             known=read_comparisons(kept.folder))
    remember_comparisons(kept.folder, comparisons)
    return encoder


def _make_int8(checkpoint: CheckpointFiles, options: EncoderOptions, sources: Sequence[TextSource], kept: KeptGraph,
               prefixes: Prefixes) -> Encoder:
    """Quantize a checkpoint, compare the int8 graph with the network, and keep it."""
    console.check_installed("--precision int8", INT8_REQUIREMENTS, "nncf", "paddle2onnx")
    params_path = checkpoint.params_path
    model, tokenizer, record = load_model(params_path, options.model_name_or_path, options.output_emb_size)
    if options.calibration_file:
        texts = Corpus(options.calibration_file, "--calibration_file")
        sources = [TextSource(options.calibration_file, texts), *sources]
    calibration = choose_calibration(sources[0] if sources else TextSource("", ()), params_path)
    record["calibration"] = calibration.as_record()
    with tempfile.TemporaryDirectory() as folder:
        batches = make_calibration(calibration.texts, tokenizer, options.max_seq_length, prefixes)
        export_fastest(model, folder, batches)
        engine = open_engine(folder, "int8", options.cpu_threads)
        encoder = Encoder(engine, tokenizer, options.max_seq_length, options.batch_size, checkpoint=checkpoint,
                          calibration=record["calibration"]["sha256"], prefixes=prefixes)
        network = Encoder(model, tokenizer, options.max_seq_length, checkpoint=checkpoint, prefixes=prefixes)
        comparisons = check_int8(encoder, lambda: network, sources, calibration=record["calibration"], known={})
        record["int8_cosines"] = next(iter(comparisons.values()))._asdict()
        if not RANK and kept.keep(folder, record):
            remember_comparisons(kept.folder, comparisons)
    return encoder


def make_calibration(texts: Sequence[str], tokenizer: Any, max_seq_length: int,
                     prefixes: Prefixes = NO_PREFIXES) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the batches that int8 is calibrated with: input_ids and token_type_ids, int64 [1, length], of one text.

    Queries and documents take turns, so that the graph has seen both prefixes.
    """
    input_types = [INPUT_TYPES[row % len(INPUT_TYPES)] for row in range(len(texts))]
    ids = tokenize(tokenizer, texts, max_seq_length, prefixes, input_types).ids
    batches = make_batches(ids, tokenizer.pad_token_id, batch_size=1)
    return [(input_ids, token_type_ids) for _, input_ids, token_type_ids in batches]


def mean_loss(query: np.ndarray, title: np.ndarray, batch_size: int, margin: float, scale: float) -> float:
    """Return the `contrastive_loss` of embeddings taken in batches, the mean over all rows.

    Args:
        query, title: float32 [pairs, embedding_size].
    """
    settings = LossSettings(margin=margin, scale=scale)
    total = 0.0
    for start in range(0, len(query), batch_size):
        queries = paddle.to_tensor(query[start : start + batch_size])
        titles = paddle.to_tensor(title[start : start + batch_size])
        total += float(contrastive_loss(queries, titles, settings)) * len(queries)
    return total / len(query)
