"""Whiten embeddings (Su et al. 2021, arXiv:2103.15316), by an fc that later stages treat as any other."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from paddle import nn

SAMPLE = 16384  # rows of the training file for mean and covariance
MAX_RUNS = 2048  # runs of the sample's text, which are added to the fit
SHORTEST_RUN = 8  # tokens
RUN_LENGTHS = 8  # different lengths of runs
RIDGE = 0.01


def cut_runs(texts: Sequence[str], tokenizer: Callable[[Sequence[str], int], Any], max_seq_length: int) -> list[str]:
    """Return runs of characters cut from all over the texts, of RUN_LENGTHS lengths in turn.

    The lengths are evenly spaced by their logarithm, from SHORTEST_RUN tokens to about `max_seq_length`, with [CLS]
    and [SEP], and never more. There are as many runs as texts, and at most MAX_RUNS.

    The mean of short texts is not that of long ones, which also lie closer together (Zhou et al. 2024,
    arXiv:2410.24200). Where a fit has only one kind, whitening magnifies the directions in which that kind hardly
    varies, and the others lie far off in them. Fitted on documents only, it puts all queries, which are short, to one
    side, and most of them recall the same documents. With texts of all lengths in the fit these directions have their
    variance.
    """
    joined = " ".join(texts)
    heads = [text[:max_seq_length] for text in texts]  # no more tokens than characters
    tokens = sum(len(ids) - 2 for ids in tokenizer(heads, max_seq_length + 2))  # [CLS] and [SEP] left out
    characters_per_token = sum(map(len, heads)) / max(1, tokens)
    most_tokens = max_seq_length - 2
    token_counts = np.geomspace(min(SHORTEST_RUN, most_tokens), most_tokens, RUN_LENGTHS)
    lengths = (characters_per_token * token_counts).astype(int)  # in characters
    starts = np.linspace(0, max(0, len(joined) - lengths[-1]), min(MAX_RUNS, len(texts))).astype(int)
    candidates = [joined[start : start + length] for start, length in zip(starts, itertools.cycle(lengths))]
    all_ids = tokenizer(candidates, max_seq_length + 1)
    return [run for run, ids in zip(candidates, all_ids) if 2 < len(ids) <= max_seq_length]


def fit_whitening(vectors: np.ndarray, dim: int, ridge: float = RIDGE) -> tuple[np.ndarray, np.ndarray]:
    """Return the affine map x -> x W + b of vectors to uncorrelated numbers of equal variance.

    With U S U' the covariance, W = U (S + ridge * mean(S))^-1/2 and b = -mean W. The ridge keeps directions of next to
    no variance, which are noise, from being magnified; without it variances are exactly equal.

    Args:
        vectors: float [texts, size].
        dim: how many numbers, those of largest variance first.

    Returns:
        W, float64 [size, dim], and b, float64 [dim].
    """
    vectors = vectors.astype("float64")
    mean = vectors.mean(axis=0)
    centred = vectors - mean
    rising_values, rising_directions = np.linalg.eigh(centred.T @ centred / len(vectors))
    values = np.maximum(rising_values[::-1], 0)
    directions = rising_directions[:, ::-1]
    weight = (directions / np.sqrt(values + ridge * values.mean() + 1e-12))[:, :dim]
    return weight, -mean @ weight


@contextlib.contextmanager
def unnormalized(model: nn.Layer) -> Iterator[None]:
    """Leave out the L2 norm of embeddings in the network, and in engines that are made of it meanwhile."""
    model.normalizes = False
    try:
        yield
    finally:
        model.normalizes = True


def remove_fc(model: nn.Layer) -> None:
    """Remove the fc of a network, so that its embeddings are the vectors that went into the fc."""
    del model.emb_reduce_linear
    model.output_emb_size = 0
    model.embedding_size = model.ptm.config.hidden_size
    model.fc_is_random = False


def whiten_network(model: nn.Layer, embeddings: np.ndarray, dim: int, max_seq_length: int) -> None:
    """Whiten the network's embeddings: it gets an fc of `dim`, into which the one that it has is multiplied.

    Args:
        embeddings: of the texts to fit, made within `unnormalized(model)`, float32 [texts, embedding_size].
        dim: numbers of a whitened embedding.
        max_seq_length: tokens that were read of these texts at most; the checkpoint records them.
    """
    weight, bias = fit_whitening(embeddings, dim)
    if model.output_emb_size:
        fc = model.emb_reduce_linear
        bias = fc.bias.numpy() @ weight + bias
        weight = fc.weight.numpy() @ weight
    model.output_emb_size = dim
    model.embedding_size = dim
    model.whitened_at = max_seq_length
    model.fc_is_random = False
    model.emb_reduce_linear = nn.Linear(*weight.shape)
    model.emb_reduce_linear.weight.set_value(weight.astype("float32"))
    model.emb_reduce_linear.bias.set_value(bias.astype("float32"))
