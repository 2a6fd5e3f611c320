"""The losses of training against formulas written out in numpy."""

import model as m
from data import DuplicateKeys

import numpy as np
import paddle
import pytest
from test_model import tensors


def vectors(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype("float32")
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def cross_entropy(logits):
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits))


# ---------------------------------------------------------------------------------------------------------- losses
def test_hard_negatives_are_more_candidates():
    query, title, negative = vectors(3, 5, 8)
    logits = 20 * (query @ np.concatenate([title, negative]).T - 0.1 * np.eye(5, 10))
    query, title, negative = tensors(query, title, negative)
    got = m.contrastive_loss(query, title, m.LossSettings(margin=0.1), hard_negative=negative)
    assert float(got) == pytest.approx(cross_entropy(logits), rel=1e-5)


def test_what_says_the_same_is_no_negative():
    """Queries 0 and 3 are one; title 2 is query 1's text; hard negative 0 is title 1; title 4 is title 0."""
    keys = np.array([[1, 11, 12], [2, 12, 90], [3, 2, 91], [1, 13, 92], [5, 11, 93]])
    keys = DuplicateKeys(*tensors(*keys.T))
    hidden = m.duplicate_mask(keys).numpy()
    expected = np.zeros((5, 10), bool)
    expected[range(5), range(5)] = True
    for row, column in ((0, 3), (3, 0), (1, 2), (0, 4), (4, 0), (1, 5)):
        expected[row, column] = True
    np.testing.assert_array_equal(hidden, expected)
    query, title, negative = vectors(3, 5, 8)
    candidates = np.concatenate([title, negative])
    logits = np.where(expected & ~np.eye(5, 10, dtype=bool), -np.inf, 20 * query @ candidates.T)
    query, title, negative = tensors(query, title, negative)
    got = m.contrastive_loss(query, title, m.LossSettings(), hard_negative=negative, duplicate_keys=keys)
    assert float(got) == pytest.approx(cross_entropy(logits), rel=1e-5)


def test_keys_of_texts_against_themselves():
    keys = paddle.to_tensor([4, 5, 4])
    expected = [[True, False, True], [False, True, False], [True, False, True]]
    np.testing.assert_array_equal(m.duplicate_mask(DuplicateKeys(keys, keys)).numpy(), expected)
