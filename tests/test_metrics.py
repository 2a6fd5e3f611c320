"""Measures against scikit-learn and against loops written out; the bootstrap against one that draws query by query."""

import math

from simcse.measures import first_hits, hit, ndcg, paired_bootstrap, per_query, percent, reciprocal_rank

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

DEPTH = 30
# Of up to 12 targets, some recalled at different ranks and the others not at all.
RANKS = st.tuples(st.sets(st.integers(0, DEPTH - 1), max_size=9), st.integers(0, 3)).map(
    lambda parts: [*parts[0], *[math.inf] * parts[1]]).filter(len)


@settings(deadline=None)
@given(RANKS)
def test_ndcg_is_scikit_learns(ranks):
    """Targets that were not recalled stand last, past any k that is looked at."""
    gains = np.zeros(DEPTH + 10 + len(ranks))
    gains[[int(rank) if rank < DEPTH else DEPTH + 10 + place for place, rank in enumerate(ranks)]] = 1
    scores = -np.arange(len(gains))
    for k in (1, 3, 10):
        assert ndcg(ranks, k) == pytest.approx(ndcg_score([gains], [scores], k=k), abs=1e-12)


@given(RANKS)
def test_reciprocal_rank_by_walking_down_the_result(ranks):
    first = next((1 / looked_at for looked_at in range(1, DEPTH + 1) if looked_at - 1 in ranks), 0)
    assert reciprocal_rank(ranks) == first


def test_measures_worked_out_by_hand():
    """Järvelin and Kekäläinen's gains 1 at ranks 1 and 3 of three targets: (1 + 1/2) / (1 + 1/log2(3) + 1/2)."""
    ranks = [2, math.inf, 0]
    assert ndcg(ranks) == pytest.approx(1.5 / (1.5 + 1 / math.log2(3)))
    assert reciprocal_rank([4, 1]) == 0.5 and reciprocal_rank([math.inf]) == 0
    assert [hit(ranks, 1), hit([1], 1), hit([1], 2)] == [1, 0, 1]


def test_recall_of_first_hits():
    ranks = first_hits(np.array([[3, 1, 2], [0, 1, 2], [2, 1, 0]]), [{1, 2}, {9}, {2}])
    assert ranks.tolist() == [1, np.inf, 0]
    recall = {name: percent(hits) for name, hits in per_query([[rank] for rank in ranks], ["recall"]).items()}
    assert recall["recall@1"] == 33.333 and recall["recall@5"] == 66.667


@pytest.mark.parametrize("queries", [40, 700])
def test_interval_is_that_of_drawing_query_by_query(queries):
    """Hits, of which many are alike, and a measure of which none are; within what 10,000 resamples leave to chance."""
    random = np.random.default_rng(1)
    differences = np.stack([random.choice([-1.0, 0, 0, 1, 1], queries), random.normal(0.1, 1, queries)], axis=1)
    means = np.array([differences[random.integers(queries, size=queries)].mean(axis=0) for _ in range(10_000)])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    # Of a quantile, with the normal density there; means of hits are whole numbers over the queries.
    noise = 5 * means.std(axis=0) * math.sqrt(0.025 * 0.975 / 10_000) / 0.0584 + [1 / queries, 0]
    got = paired_bootstrap(differences)
    assert got.shape == (2, 2) and (np.abs(got - [low, high]) < noise).all()
    assert (high - low > 8 * noise).all(), "a noise as wide as the interval would let anything pass"
    np.testing.assert_array_equal(got, paired_bootstrap(differences))


def test_interval_of_a_constant_difference_is_that_difference():
    assert paired_bootstrap(np.tile([0.0, 0.25], (9, 1))).tolist() == [[0, 0.25], [0, 0.25]]


def test_interval_in_blocks():
    """So many kinds of queries that the resamples are drawn in several blocks, one of them short."""
    differences = np.random.default_rng(2).normal(0, 1, (3000, 1))
    (low,), (high,) = paired_bootstrap(differences, resamples=1000)
    expected = 1.96 * differences.std() / math.sqrt(3000)
    assert low == pytest.approx(differences.mean() - expected, abs=0.2 * expected)
    assert high == pytest.approx(differences.mean() + expected, abs=0.2 * expected)
