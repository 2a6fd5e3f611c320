"""Whitening of embeddings (Su et al. 2021, arXiv:2103.15316), folded into the fc: later stages see an ordinary one."""

from collections.abc import Callable

import numpy as np
from paddle import nn

SAMPLE = 16384  # rows of the training file that mean and covariance are taken of
RIDGE = 0.01


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


def whiten(model: nn.Layer, encode: Callable[[], np.ndarray], dim: int) -> None:
    """Whiten the network's embeddings, of which `encode` gives some, float32 [texts, embedding_size]; the network gets
    an fc of `dim`."""
    model.normalizes = False  # the fc comes before the norm
    try:
        weight, bias = whitening(encode(), dim)
    finally:
        model.normalizes = True
    if model.output_emb_size:
        before = model.emb_reduce_linear
        weight, bias = before.weight.numpy() @ weight, before.bias.numpy() @ weight + bias
    model.output_emb_size = model.embedding_size = dim
    model.emb_reduce_linear = nn.Linear(*weight.shape)
    model.emb_reduce_linear.weight.set_value(weight.astype("float32"))
    model.emb_reduce_linear.bias.set_value(bias.astype("float32"))
