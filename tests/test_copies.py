"""Copies in a corpus: each distinct text is one entry of the index, whose lines are given out."""

from simcse.console import InputError
from simcse.index import documents
from simcse.index.ann_recall import ann_recall
from simcse.index.documents import Documents
from simcse.index.exact import exact_search
from simcse.index.hits import Hit, Ranking, hits_of, search
from simcse.index.key_table import KeyTable
from simcse.index.shards import ShardedIndex
from simcse.text.keys import text_keys
from simcse.text.textfile import Corpus

import numpy as np
import pytest
from indexes import documents_of, fill, manifest_of


@pytest.mark.parametrize("kept", [False, True])
def test_a_document_is_a_text_and_has_its_lines(tmp_path, kept):
    """White space around a text is no part of it; blank lines are counted in the number of a line."""
    found = documents_of(tmp_path, "甲", "", "乙", " 甲 ", "丙", "乙", "甲\u3000")
    if kept:
        found.save(str(tmp_path))
        found = Documents(Corpus(str(tmp_path / "corpus.csv"), "--index_path"), str(tmp_path))
    assert (len(found), found.row_count, found.line_count) == (3, 3, 6)
    assert list(found) == found[:] == ["甲", "乙", "丙"]
    assert found[1] == "乙" and found.read([2, 0]) == [
        ("丙", [(5, None)]), ("甲", [(1, None), (4, None), (7, None)])]
    assert found.read([0], 2) == [("甲", [(1, None), (4, None)])]
    assert found._lines.dtype == found._starts.dtype == "int32"
    assert found.row_keys().tolist() == text_keys("甲乙丙").tolist()
    if not kept:
        found.save(str(tmp_path))
    assert Documents.load_row_keys(str(tmp_path), has_passages=False).tolist() == text_keys("甲乙丙").tolist()


def test_different_texts_of_one_key_are_no_copies(tmp_path, monkeypatch):
    """They are an error that names the lines; copies of one text are not."""
    real = documents.text_keys
    monkeypatch.setattr(documents, "text_keys", lambda texts: real(text.replace("丁", "乙") for text in texts))
    assert len(documents_of(tmp_path, "甲", "乙", "乙", "丙")) == 3
    with pytest.raises(InputError, match="corpus.csv:4: has the same 64-bit key as another text, .*corpus.csv:2; "):
        documents_of(tmp_path, "甲", "乙", "甲", "丁")


def test_keys_are_found_among_others():
    existing = np.array([7, 3, 9, 5])
    assert KeyTable(existing).find(np.array([3, 4, 9, 10, 0, 7])).tolist() == [1, -1, 2, -1, -1, 0]
    assert KeyTable(np.empty(0, "int64")).find(existing).tolist() == [-1] * 4


def test_a_file_is_read_by_blocks_as_it_is_row_by_row(tmp_path):
    """1,000 rows in blocks of 256, with blank lines between them and without; the last line has no break."""
    for blank in ("", "\n"):
        (tmp_path / "texts.csv").write_text("\n".join(f"文本 {row}{blank * (row % 3)}" for row in range(1000)), "utf-8")
        assert list(Corpus(str(tmp_path / "texts.csv"), "--flag")) == [f"文本 {row}" for row in range(1000)]


def test_lines_are_given_out_in_order_down_to_the_depth(tmp_path):
    found = documents_of(tmp_path, "甲", "乙", "甲", "甲", "丙")
    numbers = np.array([[1, 0, 2], [0, 2, -1]])
    ranking = Ranking(numbers, np.array([[0.9, 0.8, 0.1], [0.7, 0.6, -np.inf]]), numbers)
    assert hits_of(ranking, found, [3, 9]) == [
        [Hit("乙", 2, None, 0.9), Hit("甲", 1, None, 0.8), Hit("甲", 3, None, 0.8)],
        [Hit("甲", 1, None, 0.7), Hit("甲", 3, None, 0.7), Hit("甲", 4, None, 0.7), Hit("丙", 5, None, 0.6)]]
    assert hits_of(ranking, found, [2, 9], distinct=True) == [
        [Hit("乙", 2, None, 0.9), Hit("甲", 1, None, 0.8)], [Hit("甲", 1, None, 0.7), Hit("丙", 5, None, 0.6)]]
    assert hits_of(ranking, found, [0, 1]) == [[], [Hit("甲", 1, None, 0.7)]]


def test_copies_do_not_break_the_graph(tmp_path):
    """Five texts 2,000 times each among 2,000 others: every text is found first for its own vector, and the result is
    that of exact search over all lines."""
    random = np.random.default_rng(0)
    texts = [f"{number}" for number in range(2000)] + [f"copy {number % 5}" for number in range(10000)]
    lines = [texts[place] for place in random.permutation(len(texts))]
    found = documents_of(tmp_path, *lines)
    vectors = random.standard_normal((len(found), 32)).astype("float32")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = ShardedIndex(manifest_of("hnswlib", len(found), 32, 2, hnsw_m=16, hnsw_ef=50))
    fill(index, vectors)
    number_of = {text: number for number, text in enumerate(found[:])}
    asked = [number_of[text] for text in (*(f"copy {n}" for n in range(5)), *map(str, range(100)))]
    got = hits_of(search(index, found, vectors[asked], 10), found, [10] * len(asked))
    assert [hits[0].document for hits in got] == [found[number] for number in asked]
    exact = exact_search(vectors[asked], vectors[[number_of[line] for line in lines]], 10)
    assert ann_recall(np.array([[hit.score for hit in hits] for hits in got]), exact.scores) > 0.98
    assert all(lines[hit.line - 1] == hit.document for hits in got for hit in hits)
