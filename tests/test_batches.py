"""Views of texts, pairs, masked words: what a training step is made of."""

import argparse
import itertools
from dataclasses import fields
from functools import partial

import data
import model as m
from data import Batch, ShuffledBatches, hash_token_ids
from scripts import pretrain
from simcse.text.wordpiece import load_tokenizer

import numpy as np
import pytest
from conftest import ENCODER
from hypothesis import given, settings
from hypothesis import strategies as st

TEXTS = ["语义索引召回一批语义相关的文本", "SimCSE unsupervised training 2021", "短", "城市道路交通流中观仿真研究",
         "语义索引召回一批语义相关的文本"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ENCODER))


def arguments(**changed):
    return argparse.Namespace(**{
        "max_seq_length": 32, "seed": 7, "crop_rate": 0.0, "keep_duplicate_negatives": False, "epochs": 2,
        "mlm_probability": 0.15, **changed})


def token_ids(inputs):
    """The token ids of texts without their padding."""
    return [row[row != 0].tolist() for row in inputs.input_ids]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 2**32 - 1))
def test_crop_is_a_run_of_tokens(inner, rate, seed):
    ids = [101, *range(1000, 1000 + inner), 102]
    cropped = data.crop(ids, rate, np.random.default_rng(seed))
    assert cropped[0] == 101 and cropped[-1] == 102 and len(cropped) - 2 >= inner - int(rate * inner)
    run = cropped[1:-1]
    assert run and run == list(range(run[0], run[0] + len(run))) and run[0] >= 1000 and run[-1] < 1000 + inner


def test_views_draw_all_lengths():
    ids = [101, *range(1000, 1010), 102]
    random = np.random.default_rng(0)
    assert {len(data.crop(ids, 0.5, random)) for _ in range(300)} == set(range(7, 13))


def test_a_batch_is_the_texts_twice_or_two_views_of_each(tokenizer):
    ids = tokenizer(TEXTS, 32)
    plain = data.make_batch(TEXTS, tokenizer, arguments(), range(5), 0)
    np.testing.assert_array_equal(plain.query.input_ids, plain.title.input_ids)
    assert token_ids(plain.query) == ids and plain.hard_negative is None and plain.size == 5
    keys = plain.duplicate_keys
    np.testing.assert_array_equal(keys.query, hash_token_ids([text_ids[1:-1] for text_ids in ids]))
    np.testing.assert_array_equal(keys.title, keys.query)
    assert keys.query.shape == (5,) and keys.query[0] == keys.query[4] and keys.hard_negative is None
    views = data.make_batch(TEXTS, tokenizer, arguments(crop_rate=0.5), range(5), 0)
    for side in ("query", "title"):
        np.testing.assert_array_equal(getattr(views.duplicate_keys, side), getattr(keys, side))
    sides = [token_ids(views.query), token_ids(views.title)]
    assert sides[0] != sides[1] and sides[0] != ids
    assert all(set(view) <= set(whole) for side in sides for view, whole in zip(side, ids))


def test_views_depend_on_seed_epoch_and_row_alone(tokenizer):
    make = partial(data.make_batch, TEXTS, tokenizer, arguments(crop_rate=0.5))
    whole, part = (token_ids(make(rows, 1).query) for rows in ([0, 1, 2, 3], [3, 1]))
    assert part == [whole[3], whole[1]]
    reseeded = partial(data.make_batch, TEXTS, tokenizer, arguments(crop_rate=0.5, seed=8))
    for other in (make([0, 1, 2, 3], 2), reseeded([0, 1, 2, 3], 1)):
        assert token_ids(other.query) != whole


def test_a_view_is_cut_to_the_length(tokenizer):
    long = ["城市道路交通流中观仿真研究" * 5]
    batch = data.make_batch(long, tokenizer, arguments(crop_rate=0.01, max_seq_length=16), [0], 0)
    query = batch.query.input_ids
    assert query.shape == (1, 16) and query[0, -1] == tokenizer.sep


def test_pairs_and_triples_are_sides(tokenizer):
    triples = [["甲乙", "甲乙丙", "丁"], ["甲乙", "戊己", "庚"], ["辛", "壬癸", "甲乙丙"]]
    batch = data.make_batch(triples, tokenizer, arguments(), [0, 1, 2], 0)
    expected = [list(tokenizer(side, 32)) for side in zip(*triples)]
    assert [token_ids(side) for side in (batch.query, batch.title, batch.hard_negative)] == expected
    keys = batch.duplicate_keys
    assert [len(side) for side in keys] == [3, 3, 3]
    assert keys.query[0] == keys.query[1] and keys.title[0] == keys.hard_negative[2]
    keeping = arguments(keep_duplicate_negatives=True)
    assert data.make_batch(triples, tokenizer, keeping, [0], 0).duplicate_keys is None
    chunks = batch.chunks(2)
    assert [chunk.size for chunk in chunks] == [2, 1] and [list(chunk.rows) for chunk in chunks] == [[0, 1], [2]]
    for number, name in enumerate(("query", "title", "hard_negative")):
        rows = [token_ids(getattr(chunk, name)) for chunk in chunks]
        assert rows == [expected[number][:2], expected[number][2:]]
        whole = getattr(batch, name)
        for field in ("input_ids", "token_type_ids"):
            parts = [getattr(getattr(chunk, name), field) for chunk in chunks]
            np.testing.assert_array_equal(np.concatenate(parts), getattr(whole, field))
    assert all(chunk.duplicate_keys is None for chunk in chunks)


def test_chunks_of_a_batch_have_all_its_fields(tokenizer):
    """A field that is added to Batch is to be thought of in Batch.chunks."""
    assert [field.name for field in fields(Batch)] == ["query", "title", "hard_negative", "duplicate_keys", "rows"]


def test_steps_after_a_step_are_those_of_the_whole_run(tokenizer):
    make = partial(data.make_batch, TEXTS * 3, tokenizer, arguments())

    def steps(first):
        batches = data.batches_after(first, 2, ShuffledBatches(15, 2), make)
        return [batch.rows.tolist() for batch in batches]

    expected = [rows.tolist() for epoch in (0, 1) for rows in ShuffledBatches(15, 2).epoch(epoch)]
    assert steps(0) == expected and len(expected) == 14 and all(steps(first) == steps(0)[first:] for first in range(15))


@pytest.mark.parametrize("count, batch_size, ranks, sizes", [
    (9, 4, 1, [4, 5]), (33, 32, 1, [33]), (10, 4, 1, [4, 4, 2]), (18, 4, 2, [4, 5]), (17, 4, 2, [4, 5]),
    (3, 1, 1, [1, 1, 1]), (1, 4, 1, [1]), (2, 4, 2, [1])])
def test_a_last_batch_of_one_is_joined_to_the_one_before(count, batch_size, ranks, sizes):
    for rank in range(ranks):
        batches = ShuffledBatches(count, batch_size, rank, ranks)
        assert [len(rows) for rows in batches.epoch(0)] == sizes and len(batches) == len(sizes)


# ------------------------------------------------------------------------------------------------------ masked words
def test_whole_words_are_masked(tokenizer):
    text = "城市道路交通流中观仿真研究,SimCSE is unsupervised"
    masked = pretrain.MaskedBatches([text], tokenizer, arguments(max_seq_length=64))
    (encoding,) = tokenizer.encode([text], 64)
    ids, starts = encoding.ids, pretrain.token_starts(encoding)
    assert ids == tokenizer([text], 64)[0] and len(starts) == len(ids) - 2
    words = masked.words(text, starts)
    spelled = ["".join(text[start] for start, word in zip(starts, words) if word == each) for each in range(3)]
    import jieba

    assert spelled == jieba.lcut(text)[:3] and "城市道路" in "".join(spelled)
    tokens = {number: token for token, number in tokenizer.vocab.items()}
    last = [tokens[ids[1 + place]] for place in np.flatnonzero(words == words[-1])]
    assert len(last) > 1 and "".join(token.removeprefix("##") for token in last) == "unsupervised"
    for seed in range(50):
        chosen = masked.choose(words, np.random.default_rng(seed))
        for word in set(words):
            assert chosen[words == word].all() or not chosen[words == word].any()
        assert 1 <= chosen.sum() <= max(0.15 * len(words), np.bincount(words).max())


def test_masks_are_eighty_ten_ten(tokenizer):
    texts = ["城市道路交通流中观仿真研究与应用" * 3] * 500
    args = arguments(max_seq_length=64, mlm_probability=0.3)
    ids, types, places, labels, _ = pretrain.MaskedBatches(texts, tokenizer, args).make(range(500), 0)
    whole = np.array(tokenizer(texts[:1], 64)[0])
    np.testing.assert_array_equal(labels, np.tile(whole, 500)[places])
    seen = ids.reshape(-1)[places]
    assert abs((seen == tokenizer.vocab["[MASK]"]).mean() - 0.8) < 0.02
    assert abs((seen == labels).mean() - 0.1) < 0.02
    untouched = np.ones(ids.size, bool)
    untouched[places] = False
    np.testing.assert_array_equal(ids.reshape(-1)[untouched], np.tile(whole, 500)[untouched])
    assert 0.2 < len(places) / (500 * (len(whole) - 2)) <= 0.3 and not types.any()
    assert not set(seen.tolist()) & {tokenizer.cls, tokenizer.sep, tokenizer.pad_token_id}
    again = pretrain.MaskedBatches(texts, tokenizer, args).make(range(500), 0)
    np.testing.assert_array_equal(again[0], ids)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 20))
def test_groups_of_like_length_take_the_fewest_tokens(lengths, cost):
    """Against all ways to cut the sorted lengths."""
    lengths = np.array(lengths)
    groups = m.group_by_length(lengths, cost)
    assert sorted(np.concatenate(groups)) == list(range(len(lengths)))
    ascending, cuts = np.sort(lengths), range(1, len(lengths))

    def tokens(parts):
        return sum(len(part) * max(part) + cost for part in parts)

    fewest = min(tokens(np.split(ascending, chosen)) for count in range(len(lengths))
                 for chosen in itertools.combinations(cuts, count))
    assert tokens([lengths[rows] for rows in groups]) == fewest
    assert all(lengths[one].max() < lengths[other].min() for one, other in itertools.pairwise(groups))
