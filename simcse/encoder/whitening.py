"""Whiten embeddings (Su et al. 2021, arXiv:2103.15316), by an fc that later stages treat as any other."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from paddle import nn

SAMPLE = 16384  # rows of the training file for mean and covariance
MAX_SPANS = 2048  # spans of the sample's text, which are added to the fit
SHORTEST_SPAN = 8  # tokens
SPAN_LENGTHS = 8  # different lengths of spans
RIDGE = 0.01


def cut_spans(texts: Sequence[str], tokenizer: Callable[[Sequence[str], int], Any], max_seq_length: int) -> list[str]:
    """Return spans of characters cut from all over the texts, of SPAN_LENGTHS lengths in turn.

    The lengths are evenly spaced by their logarithm, from SHORTEST_SPAN tokens to about `max_seq_length`, with [CLS]
    and [SEP], and never more. There are as many spans as texts, and at most MAX_SPANS.

    Short and long texts have different means and spreads (Zhou et al. 2024, arXiv:2410.24200). Fitted on documents
    alone, whitening amplifies directions in which documents hardly vary, and short queries collapse to one side.
    """
    joined = " ".join(texts)
    heads = [text[:max_seq_length] for text in texts]  # no more tokens than characters
    tokens = sum(len(ids) - 2 for ids in tokenizer(heads, max_seq_length + 2))  # [CLS] and [SEP] left out
    characters_per_token = sum(map(len, heads)) / max(1, tokens)
    most_tokens = max_seq_length - 2
    token_counts = np.geomspace(min(SHORTEST_SPAN, most_tokens), most_tokens, SPAN_LENGTHS)
    lengths = (characters_per_token * token_counts).astype(int)  # in characters
    starts = np.linspace(0, max(0, len(joined) - lengths[-1]), min(MAX_SPANS, len(texts))).astype(int)
    candidates = [joined[start : start + length] for start, length in zip(starts, itertools.cycle(lengths))]
    all_ids = tokenizer(candidates, max_seq_length + 1)
    return [span for span, ids in zip(candidates, all_ids) if 2 < len(ids) <= max_seq_length]


def fit_whitening(vectors: np.ndarray, dim: int, ridge: float = RIDGE) -> tuple[np.ndarray, np.ndarray]:
    """Return the affine map x -> x W + b of vectors to uncorrelated dimensions of equal variance.

    With U S U' the covariance, W = U (S + ridge * mean(S))^-1/2 and b = -mean W. The ridge keeps directions of next to
    no variance, which are noise, from being magnified; without it variances are exactly equal.

    Args:
        vectors: float [texts, size].
        dim: how many dimensions, those of largest variance first.

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


def whiten_network(model: nn.Layer, embeddings: np.ndarray, dim: int, max_seq_length: int) -> None:
    """Whiten the network's embeddings: it gets an fc of `dim`, into which the one that it has is multiplied.

    Args:
        embeddings: of the texts to fit, made within `unnormalized(model)`, float32 [texts, embedding_size].
        dim: the size of a whitened embedding.
        max_seq_length: tokens that were read of these texts at most; the checkpoint records them.
    """
    weight, bias = fit_whitening(embeddings, dim)
    if model.output_emb_size:
        fc = model.emb_reduce_linear
        bias = fc.bias.numpy() @ weight + bias
        weight = fc.weight.numpy() @ weight
    model.replace_fc(weight, bias)
    model.whitened_at = max_seq_length
