"""Copies in a corpus: each distinct text is one entry of the index, whose lines are given out; what the index costs."""

import json
import multiprocessing
import os

from simcse import files
from simcse.console import InputError
from simcse.files import building
from simcse.index import shards
from simcse.index.documents import Entries
from simcse.index.exact import exact_search
from simcse.index.hits import Hit, expand
from simcse.index.shards import Shards
from simcse.text.textfile import Corpus

import numpy as np
import pytest

FINGERPRINT = {"ann_engine": "hnswlib", "index_shards": 2, "hnsw_m": 16, "hnsw_ef": 50, "hnsw_max_elements": 0}


def entries_of(folder, *lines):
    (folder / "corpus.csv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return Entries(Corpus(str(folder / "corpus.csv"), "--corpus_file"))


@pytest.mark.parametrize("kept", [False, True])
def test_an_entry_is_a_text_and_has_its_lines(tmp_path, kept):
    """White space around a text is no part of it; blank lines are counted in the number of a line."""
    entries = entries_of(tmp_path, "甲", "", "乙", " 甲 ", "丙", "乙", "甲\u3000")
    if kept:
        entries.save(str(tmp_path))
        entries = Entries(Corpus(str(tmp_path / "corpus.csv"), "--index_path"), str(tmp_path))
    assert (len(entries), entries.documents) == (3, 6) and list(entries) == entries[:] == ["甲", "乙", "丙"]
    assert entries[1] == "乙" and entries.take([2, 0]) == [
        ("丙", [(5, None)]), ("甲", [(1, None), (4, None), (7, None)])]
    assert entries.take([0], 2) == [("甲", [(1, None), (4, None)])]
    assert entries.rows.dtype == entries.starts.dtype == "int32"


def test_a_file_is_read_by_blocks_as_it_is_row_by_row(tmp_path):
    """1,000 rows in blocks of 256, with blank lines between them and without; the last line has no break."""
    for blank in ("", "\n"):
        (tmp_path / "texts.csv").write_text("\n".join(f"文本 {row}{blank * (row % 3)}" for row in range(1000)), "utf-8")
        assert list(Corpus(str(tmp_path / "texts.csv"), "--flag")) == [f"文本 {row}" for row in range(1000)]


def test_lines_are_given_out_in_order_down_to_the_depth(tmp_path):
    entries = entries_of(tmp_path, "甲", "乙", "甲", "甲", "丙")
    found = np.array([[1, 0, 2], [0, 2, -1]]), np.array([[0.9, 0.8, 0.1], [0.7, 0.6, -np.inf]])
    assert expand(found, entries, [3, 9]) == [
        [Hit("乙", 2, None, 0.9), Hit("甲", 1, None, 0.8), Hit("甲", 3, None, 0.8)],
        [Hit("甲", 1, None, 0.7), Hit("甲", 3, None, 0.7), Hit("甲", 4, None, 0.7), Hit("丙", 5, None, 0.6)]]
    assert expand(found, entries, [2, 9], distinct=True) == [
        [Hit("乙", 2, None, 0.9), Hit("甲", 1, None, 0.8)], [Hit("甲", 1, None, 0.7), Hit("丙", 5, None, 0.6)]]


def test_copies_do_not_break_the_graph(tmp_path):
    """Five texts 2,000 times each among 2,000 others: every text is found first for its own vector, and the result is
    that of exact search over all lines."""
    random = np.random.default_rng(0)
    texts = [f"{number}" for number in range(2000)] + [f"copy {number % 5}" for number in range(10000)]
    lines = [texts[place] for place in random.permutation(len(texts))]
    entries = entries_of(tmp_path, *lines)
    vectors = random.standard_normal((len(entries), 32)).astype("float32")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = Shards({**FINGERPRINT, "hnsw_max_elements": len(entries)}, len(entries), 32)
    index.fill(vectors[rows.start : rows.stop] for rows in index.pieces)
    entry_of = {text: entry for entry, text in enumerate(entries[:])}
    asked = [entry_of[text] for text in (*(f"copy {n}" for n in range(5)), *map(str, range(100)))]
    got = expand(index.search(vectors[asked], 10), entries, [10] * len(asked))
    assert [hits[0][0] for hits in got] == [entries[entry] for entry in asked]
    _, exact = exact_search(vectors[asked], vectors[[entry_of[line] for line in lines]], 10)
    assert shards.ann_recall(np.array([[hit.score for hit in hits] for hits in got]), exact) > 0.98
    assert all(lines[line - 1] == text for hits in got for text, line, *_ in hits)


def test_what_the_approximation_costs_is_measured_and_advice_was_tried(tmp_path, capsys):
    random = np.random.default_rng(1)
    vectors = random.standard_normal((4000, 64)).astype("float32")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = Shards({**FINGERPRINT, "hnsw_m": 4, "hnsw_ef": 2, "index_shards": 1, "hnsw_max_elements": 4000}, 4000, 64)
    index.fill(vectors[rows.start : rows.stop] for rows in index.pieces)
    measured = index.measure(vectors[:100], 10, "documents")
    _, exact = index.search(vectors[:100], 10, exact=True)
    assert measured["recall"] == round(shards.ann_recall(index.search(vectors[:100], 10)[1], exact), 4) < 0.9
    assert measured["deeper_recall"] > measured["recall"] and json.loads(json.dumps(measured)) == measured
    shards.report(measured)
    line = capsys.readouterr().err
    assert line.startswith(f"ANN recall@10 against exact search, 100 documents: {measured['recall']:.4f} with --hnsw_ef"
                           f" 2; --hnsw_ef 80 finds {measured['deeper_recall']:.4f}\n") and line.count("\n") == 1
    shards.report({**measured, "deeper_recall": measured["recall"]})
    assert "--ann_engine exact finds all, a larger --hnsw_ef does not help" in capsys.readouterr().err
    shards.report({**measured, "recall": 0.999})
    assert capsys.readouterr().err.endswith(": 0.9990 with --hnsw_ef 2\n")


def _build(path, fingerprint, started, end):
    with building(path, {}, fingerprint):
        started.set()
        end.wait(20)
        os.mkdir(path)


def test_two_builds_of_one_index(tmp_path, monkeypatch):
    """The later waits for the same index, and is refused for another before it has done anything."""
    path, context = str(tmp_path / "new" / "index"), multiprocessing.get_context("spawn")
    started, end = context.Event(), context.Event()
    other = context.Process(target=_build, args=(path, FINGERPRINT, started, end))
    other.start()
    assert started.wait(30)
    with (pytest.raises(InputError, match="another process is building: was built with hnsw_m 16, not 32; name"),
          building(path, {"hnsw_m": 32}, {**FINGERPRINT, "hnsw_m": 32})):
        raise AssertionError("two at a time")
    assert not os.path.exists(path)
    said = []
    monkeypatch.setattr(files, "log", lambda line: (said.append(line), end.set()))  # which lets the first go on
    with building(path, {"hnsw_m": 16}, FINGERPRINT):
        assert os.path.isdir(path), "the first has built it"
    other.join(20)
    assert said == [f"waiting for the process that is building the index in {path}"]
    assert os.listdir(tmp_path / "new") == ["index"]
