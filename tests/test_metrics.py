"""Measures against scikit-learn, ir-measures and loops written out; the bootstrap against one that draws query by
query."""

import math

from simcse.measures import (
    JUDGED_METRICS,
    mean_percent,
    measure_queries,
    ndcg,
    paired_bootstrap,
    rank_documents,
    rank_first_targets,
    read_judgements,
    read_run,
)

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
        assert ndcg([(rank, 1) for rank in ranks], k) == pytest.approx(ndcg_score([gains], [scores], k=k), abs=1e-12)


@given(RANKS)
def test_reciprocal_rank_by_walking_down_the_result(ranks):
    first = next((1 / looked_at for looked_at in range(1, DEPTH + 1) if looked_at - 1 in ranks), 0)
    assert measure_queries([ranks], ["mrr"])["mrr"] == [first]


def test_measures_worked_out_by_hand():
    """Järvelin and Kekäläinen's gains 1 at ranks 1 and 3 of three targets: (1 + 1/2) / (1 + 1/log2(3) + 1/2)."""
    found = measure_queries([[2, math.inf, 0], [4, 1], [math.inf]], ["recall", "mrr", "ndcg"])
    assert found["ndcg@10"][0] == pytest.approx(1.5 / (1.5 + 1 / math.log2(3)))
    assert found["mrr"].tolist() == [1, 0.5, 0]
    assert found["recall@1"].tolist() == [1, 0, 0] and found["recall@5"].tolist() == [1, 1, 0]


@pytest.mark.parametrize("seed", range(3))
def test_judged_measures_are_those_of_ir_measures(tmp_path, seed):
    """Random runs of 60 documents with ties, judgements with grades from -1 to 3, queries that nobody answered, or
    judged, or found nothing relevant for; ids whose order is another as text and as numbers."""
    from ir_measures import RR, R, Success, calc_aggregate, iter_calc, nDCG, read_trec_qrels, read_trec_run

    random = np.random.default_rng(seed)
    judgements = [f"q{query} 0 d{document} {random.integers(-1, 4) if query else 0}\n" for query in range(30)
                  for document in random.choice(80, random.integers(1, 25), replace=False)]
    run = [f"q{query} Q0 d{document} {rank} {random.integers(20) / 19 + 0.25} simcse\n" for query in range(2, 34)
           for rank, document in enumerate(random.choice(80, 60, replace=False), 1) if query % 7]
    (tmp_path / "qrels").write_text("".join(judgements))
    (tmp_path / "run").write_text("".join(run))
    grades = {query: {document: grade for document, grade in each.items() if grade > 0}
              for query, each in read_judgements(str(tmp_path / "qrels"), "--qrels").items()}
    run = read_run(str(tmp_path / "run"), "--recall_result_file")
    found = {}
    for metric in JUDGED_METRICS:
        ranked = {query: rank_documents(run.get(query, {}), metric) for query in grades}
        ranks = [[ranked[query].index(document) if document in ranked[query] else math.inf for document in each]
                 for query, each in grades.items()]
        found.update(measure_queries(ranks, [metric], grades=[[*each.values()] for each in grades.values()],
                               table=JUDGED_METRICS))
    theirs = {"mrr@10": RR @ 10, "ndcg@10": nDCG @ 10, **{
        f"{name}@{k}": measure @ k for name, measure in (("recall", R), ("success", Success))
        for k in (1, 5, 10, 20, 50)}}
    assert found.keys() == theirs.keys()
    both = [list(read(str(tmp_path / name))) for read, name in ((read_trec_qrels, "qrels"), (read_trec_run, "run"))]
    means = calc_aggregate(theirs.values(), *both)
    by_query = {(each.measure, each.query_id): each.value for each in iter_calc(theirs.values(), *both)}
    for name, values in found.items():
        assert values.mean() == pytest.approx(means[theirs[name]], abs=1e-9), name
        for query, value in zip(grades, values):
            assert value == pytest.approx(by_query[theirs[name], query], abs=1e-9), (name, query)


def test_recall_of_first_hits():
    ranks = rank_first_targets(np.array([[3, 1, 2], [0, 1, 2], [2, 1, 0]]), [{1, 2}, {9}, {2}])
    assert ranks.tolist() == [1, np.inf, 0]
    values = measure_queries([[rank] for rank in ranks], ["recall"])
    recall = {name: mean_percent(hits) for name, hits in values.items()}
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
