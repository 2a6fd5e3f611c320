"""Whitening of embeddings (Su et al. 2021, arXiv:2103.15316), folded into the fc: later stages see an ordinary one."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from paddle import nn

SAMPLE = 16384  # rows of the training file that mean and covariance are taken of
RUNS, SHORTEST, LENGTHS = 2048, 8, 8  # and of runs of their text, from SHORTEST tokens to --max_seq_length
RIDGE = 0.01


def runs(texts: Sequence[str], tokenizer: Callable[[Sequence[str], int], list], longest: int) -> list[str]:
    """Runs of characters from all over the texts, one after the other, as many as these and RUNS at most, of LENGTHS
    lengths, evenly spaced by their logarithm: SHORTEST tokens to about `longest`, with [CLS] and [SEP], never more.

    The mean of short texts is not that of long ones, which also lie closer together (Zhou et al. 2024,
    arXiv:2410.24200). Where a fit has but one kind, whitening blows up the directions in which that kind hardly varies,
    and the others lie far off in them: fitted on documents alone it puts all queries, which are short, to one side, and
    most of them recall the same documents. With texts of all lengths in the fit these directions have their variance.
    """
    text, heads = " ".join(texts), [text[:longest] for text in texts]  # no more tokens than characters
    characters = sum(map(len, heads)) / max(1, sum(len(ids) - 2 for ids in tokenizer(heads, longest + 2)))
    count = min(RUNS, len(texts))
    lengths = (characters * np.geomspace(min(SHORTEST, longest - 2), longest - 2, LENGTHS)).astype(int)
    starts = np.linspace(0, max(0, len(text) - lengths[-1]), count).astype(int)
    found = [text[start : start + length] for start, length in zip(starts, itertools.cycle(lengths))]
    return [run for run, ids in zip(found, tokenizer(found, longest + 1)) if 2 < len(ids) <= longest]


def whitening(vectors: np.ndarray, dim: int, ridge: float = RIDGE) -> tuple[np.ndarray, np.ndarray]:
    """The affine map of vectors, float [texts, size], to `dim` uncorrelated numbers of equal variance, those of largest
    variance first: x -> x W + b, W float64 [size, dim], b float64 [dim].

    With U S U' the covariance, W = U (S + ridge * mean(S))^-1/2 (there without a ridge), b = -mean W. The ridge keeps
    directions of next to no variance, which are noise, from being blown up.
    """
    vectors = vectors.astype("float64")
    mean = vectors.mean(axis=0)
    centred = vectors - mean
    values, directions = np.linalg.eigh(centred.T @ centred / len(vectors))
    values, directions = np.maximum(values[::-1], 0), directions[:, ::-1]
    weight = (directions / np.sqrt(values + ridge * values.mean() + 1e-12))[:, :dim]
    return weight, -mean @ weight


def whiten(model: nn.Layer, encode: Callable[[], np.ndarray], dim: int, longest: int) -> None:
    """Whiten the network's embeddings, of which `encode` gives some, float32 [texts, embedding_size], of texts of up to
    `longest` tokens; the network gets an fc of `dim`."""
    model.normalizes = False  # the fc comes before the norm
    try:
        weight, bias = whitening(encode(), dim)
    finally:
        model.normalizes = True
    if model.output_emb_size:
        before = model.emb_reduce_linear
        weight, bias = before.weight.numpy() @ weight, before.bias.numpy() @ weight + bias
    model.output_emb_size = model.embedding_size = dim
    model.whitened_at = longest
    model.emb_reduce_linear = nn.Linear(*weight.shape)
    model.emb_reduce_linear.weight.set_value(weight.astype("float32"))
    model.emb_reduce_linear.bias.set_value(bias.astype("float32"))
