"""Pool the states of a text's tokens into one vector.

To add a pooling write a function and an entry of POOLINGS. Training, checkpoints, all later stages, the exported
graphs, and the choices and help of --pooling read it off the entry. Then write its definition once more, by numpy, in
DEFINITIONS of tests/test_pooling.py, and name it in docs/zh and docs/en: better-recall.md and training.md, --pooling.

After changing a function, build kept indexes and exported folders again: they are matched to the checkpoint, not to
this code. The graphs that are kept beside checkpoints notice it by themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Tensor = Any  # paddle.Tensor; this file imports no paddle, since command lines read POOLINGS before it is loaded


@dataclass(frozen=True)
class EncoderOutputs:
    """The encoder's outputs for a batch of texts.

    Attributes:
        outputs: (last hidden state, pooler output[, hidden states]), as PaddleNLP orders them.
        input_ids: int64 [batch, length].
        pad_token_id: the id that shorter texts are filled up with.
    """

    outputs: tuple
    input_ids: Tensor
    pad_token_id: int

    @property
    def last_hidden_state(self) -> Tensor:
        """Return the last layer's output, float [batch, length, hidden]; with `first_token_only` [batch, 1, hidden]."""
        return self.outputs[0]

    @property
    def pooler_output(self) -> Tensor:
        """Return the encoder's pooler's output, float [batch, hidden]: a linear layer and tanh of the first token."""
        return self.outputs[1]

    @property
    def hidden_states(self) -> tuple:
        """Return the input of the first layer, then the output of each layer, float [batch, length, hidden] each.

        The last one is `last_hidden_state`, with `first_token_only` [batch, 1, hidden].

        Raises:
            ValueError: the entry of the pooling does not say `all_layers`.
        """
        if len(self.outputs) < 3:
            raise ValueError("a pooling that reads hidden_states needs all_layers=True in its entry of POOLINGS")
        return self.outputs[2]


@dataclass(frozen=True)
class Pooling:
    """A way to pool, and what it needs of the encoder.

    Attributes:
        pool: maps `EncoderOutputs` to one vector per text, float [batch, hidden].
        help: what it does, for the help of --pooling.
        all_layers: it reads `EncoderOutputs.hidden_states`, which are not kept otherwise.
        first_token_only: it reads no other token of the last layer, so that layer computes no other.
        uses_pooler: it reads `EncoderOutputs.pooler_output`; otherwise the encoder's pooler is frozen in training.
        pool_without_pooler: takes the place of `pool` everywhere but in the training loss, if the network was trained
            without --infer_with_fc_pooler; None: `pool` is used everywhere.
        removes_layers: the encoder is replaced by its token embeddings, a `table.TokenTable`; `last_hidden_state` is
            what they are, and there are no other outputs. `pool` must be their mean, which `TokenTable.average` and
            `TableEngine` compute in its place.
        sentence_transformers: the pooling_mode of sentence-transformers that pools the same states; a pooling that
            `uses_pooler` has the pooler's layer after it. None: sentence-transformers has no such pooling.
    """

    pool: Callable[[EncoderOutputs], Tensor]
    help: str
    all_layers: bool = False
    first_token_only: bool = False
    uses_pooler: bool = False
    pool_without_pooler: Callable[[EncoderOutputs], Tensor] | None = None
    removes_layers: bool = False
    sentence_transformers: str | None = None


def take_pooler(encoded: EncoderOutputs) -> Tensor:
    """Return the output of the encoder's own pooler."""
    return encoded.pooler_output


def take_first_token(encoded: EncoderOutputs) -> Tensor:
    """Return the state of [CLS]."""
    return encoded.last_hidden_state[:, 0]


def average_last(encoded: EncoderOutputs) -> Tensor:
    """Return the mean of the last layer's output."""
    return average_tokens(encoded, encoded.last_hidden_state)


def average_first_and_last(encoded: EncoderOutputs) -> Tensor:
    """Return the mean of the first layer's input and the last layer's output.

    Gao et al. (2021) call it avg_first_last, and average over [CLS] and [SEP], too.
    """
    return average_tokens(encoded, (encoded.hidden_states[0] + encoded.hidden_states[-1]) / 2)


def average_tokens(encoded: EncoderOutputs, states: Tensor) -> Tensor:
    """Return the mean over each text's tokens, float [batch, hidden], without [CLS], [SEP] and padding.

    Args:
        encoded: its input_ids tell tokens from padding.
        states: float [batch, length, hidden].
    """
    # The count of tokens stops at [SEP]: the padding after it has the position of [SEP], and is left out with it.
    is_token = encoded.input_ids != encoded.pad_token_id
    position = is_token.astype("int32").cumsum(axis=1)
    is_inner = is_token & (position > 1) & (position < position[:, -1:])
    mask = is_inner.astype(states.dtype).unsqueeze(-1)
    return (states * mask).sum(axis=1) / mask.sum(axis=1).clip(min=1)


def average_all(encoded: EncoderOutputs) -> Tensor:
    """Return the mean of the last layer's output over all tokens but padding, [CLS] and [SEP] included."""
    states = encoded.last_hidden_state
    mask = (encoded.input_ids != encoded.pad_token_id).astype(states.dtype).unsqueeze(-1)
    return (states * mask).sum(axis=1) / mask.sum(axis=1).clip(min=1)


POOLINGS: dict[str, Pooling] = {
    "pooler": Pooling(take_pooler, "the first token through a linear layer and tanh", first_token_only=True,
                      uses_pooler=True, pool_without_pooler=take_first_token, sentence_transformers="cls"),
    "cls": Pooling(take_first_token, "the first token as it is, as bge and gte were trained", first_token_only=True,
                   sentence_transformers="cls"),
    "mean": Pooling(average_last, "the mean over the text's tokens, without [CLS] and [SEP]"),
    "mean_all": Pooling(average_all, "the mean over all tokens, [CLS] and [SEP] included, as sentence-transformers "
                        "computes it; m3e and text2vec were trained so", sentence_transformers="mean"),
    "first_last_avg": Pooling(average_first_and_last, "the same mean, of the average of the first "
                              "layer's input and the last layer's output", all_layers=True),
    "first_avg": Pooling(average_last, "the same mean, of the token embeddings, without positions and layers",
                         removes_layers=True),
}


def find_pooling(name: str) -> Pooling:
    """Return the entry of POOLINGS; raise ValueError if there is none."""
    if name not in POOLINGS:
        raise ValueError(f"pooling {name!r} is none of {', '.join(POOLINGS)}")
    return POOLINGS[name]


def describe_poolings() -> str:
    """Return what each pooling does, for the help of --pooling."""
    return "; ".join(f"{name}: {pooling.help}" for name, pooling in POOLINGS.items())
