"""Whiten embeddings (Su et al. 2021, arXiv:2103.15316), by an fc: for later stages it is an ordinary one."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from paddle import nn

SAMPLE = 16384  # rows of the training file for mean and covariance
RUNS = 2048  # and as many runs of their text
SHORTEST = 8  # tokens of the shortest runs
LENGTHS = 8  # different lengths of runs
RIDGE = 0.01


def runs(texts: Sequence[str], tokenizer: Callable[[Sequence[str], int], Any], longest: int) -> list[str]:
    """Return runs of characters from all over the texts, of LENGTHS lengths in turn.

    The lengths are evenly spaced by their logarithm, from SHORTEST tokens to about `longest`, with [CLS] and [SEP],
    and never more. There are as many runs as texts, and at most RUNS.

    The mean of short texts is not that of long ones, which also lie closer together (Zhou et al. 2024,
    arXiv:2410.24200). Where a fit has only one kind, whitening magnifies the directions in which that kind hardly
    varies, and the others lie far off in them. Fitted on documents only, it puts all queries, which are short, to one
    side, and most of them recall the same documents. With texts of all lengths in the fit these directions have their
    variance.
    """
    joined = " ".join(texts)
    heads = [text[:longest] for text in texts]  # no more tokens than characters
    tokens = sum(len(ids) - 2 for ids in tokenizer(heads, longest + 2))  # [CLS] and [SEP] left out
    characters_per_token = sum(map(len, heads)) / max(1, tokens)
    token_counts = np.geomspace(min(SHORTEST, longest - 2), longest - 2, LENGTHS)
    lengths = (characters_per_token * token_counts).astype(int)  # in characters
    starts = np.linspace(0, max(0, len(joined) - lengths[-1]), min(RUNS, len(texts))).astype(int)
    candidates = [joined[start : start + length] for start, length in zip(starts, itertools.cycle(lengths))]
    all_ids = tokenizer(candidates, longest + 1)
    return [run for run, ids in zip(candidates, all_ids) if 2 < len(ids) <= longest]


def whitening(vectors: np.ndarray, dim: int, ridge: float = RIDGE) -> tuple[np.ndarray, np.ndarray]:
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
    """Have the network, and engines that are made of it meanwhile, give embeddings without L2 norm."""
    model.normalizes = False
    try:
        yield
    finally:
        model.normalizes = True


def whiten(model: nn.Layer, embeddings: np.ndarray, dim: int, longest: int) -> None:
    """Whiten the network's embeddings: it gets an fc of `dim`, into which the one that it has is multiplied.

    Args:
        embeddings: of the texts to fit, made within `unnormalized(model)`, float32 [texts, embedding_size].
        dim: numbers of a whitened embedding.
        longest: tokens of the longest of these texts.
    """
    weight, bias = whitening(embeddings, dim)
    if model.output_emb_size:
        fc = model.emb_reduce_linear
        bias = fc.bias.numpy() @ weight + bias
        weight = fc.weight.numpy() @ weight
    model.output_emb_size = dim
    model.embedding_size = dim
    model.whitened_at = longest
    model.emb_reduce_linear = nn.Linear(*weight.shape)
    model.emb_reduce_linear.weight.set_value(weight.astype("float32"))
    model.emb_reduce_linear.bias.set_value(bias.astype("float32"))
