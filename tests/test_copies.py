"""Copies in a corpus: each distinct text is one entry of the index, whose lines are given out; what the index costs."""

import dataclasses
import multiprocessing
import os
import threading
import time

import recall
from simcse.console import InputError
from simcse.index import documents, lock, shards
from simcse.index.documents import Documents, find_keys
from simcse.index.exact import exact_search
from simcse.index.hits import Hit, Ranking, hits_of, search
from simcse.index.lock import lock_folder
from simcse.index.manifest import AnnRecall, Manifest
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
    assert find_keys(np.array([3, 4, 9, 10, 0, 7]), existing).tolist() == [1, -1, 2, -1, -1, 0]
    assert find_keys(existing, np.empty(0, "int64")).tolist() == [-1] * 4


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
    assert shards.ann_recall(np.array([[hit.score for hit in hits] for hits in got]), exact.scores) > 0.98
    assert all(lines[hit.line - 1] == hit.document for hits in got for hit in hits)


def test_what_the_approximation_costs_is_measured_and_advice_was_tried(tmp_path, capsys):
    random = np.random.default_rng(1)
    vectors = random.standard_normal((4000, 64)).astype("float32")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = ShardedIndex(manifest_of("hnswlib", 4000, 64, 1, hnsw_m=4, hnsw_ef=2))
    fill(index, vectors)
    measured = index.measure(vectors[:100], 10, "documents")
    exact = index._search_vectors(vectors[:100], 10, exact=True)
    found = index.search(vectors[:100], 10)
    assert measured.recall == round(shards.ann_recall(found.scores, exact.scores), 4) < 0.9
    assert measured.deeper_recall > measured.recall and index.search_settings == {"hnsw_ef": 2}
    assert (measured.settings, measured.deeper_settings) == ({"hnsw_ef": 2}, {"hnsw_ef": 80})
    Manifest(ann_recall=measured).save(str(tmp_path))
    assert Manifest.load(str(tmp_path), "", "").ann_recall == measured
    shards.report_ann_recall(measured)
    line = capsys.readouterr().err
    assert line == (f"ANN recall@10 against exact search, 100 documents: {measured.recall:.4f} with --hnsw_ef 2; "
                    f"--hnsw_ef 80 finds {measured.deeper_recall:.4f}\n")
    shards.report_ann_recall(dataclasses.replace(measured, deeper_recall=measured.recall))
    assert "; --ann_engine exact finds all, --hnsw_ef 80 does not help\n" in capsys.readouterr().err
    shards.report_ann_recall(dataclasses.replace(measured, recall=0.999), {"hnsw_ef": 7})
    assert capsys.readouterr().err.endswith(": 0.9990 with --hnsw_ef 2; this search has --hnsw_ef 7\n")
    shards.report_ann_recall(AnnRecall(10, "9 queries", 1.0, {}, 1.0, {}))
    assert capsys.readouterr().err.endswith("9 queries: 1.0000 with its default settings\n")


def test_an_exact_index_has_nothing_to_measure():
    index = ShardedIndex(manifest_of("exact", 9, 4, 1))
    fill(index, np.eye(9, 4, dtype="float32"))
    assert index.measure(np.ones((1, 4), "float32"), 3, "queries") is None


def _build(path, manifest, started, end):
    with lock_folder(path, Manifest(), manifest):
        started.set()
        end.wait(20)
        os.mkdir(path)


def test_two_builds_of_one_index(tmp_path, monkeypatch):
    """The later waits for the same index, and is refused for another before it has done anything."""
    path, context = str(tmp_path / "new" / "index"), multiprocessing.get_context("spawn")
    started, end = context.Event(), context.Event()
    manifest = manifest_of("hnswlib", 9, 32, 2, hnsw_m=16)
    other = context.Process(target=_build, args=(path, manifest, started, end))
    other.start()
    assert started.wait(30)
    with (pytest.raises(InputError, match="another process is building: was built with hnsw_m 16, not 32; name"),
          lock_folder(path, Manifest(build_settings={"hnsw_m": 32}), manifest)):
        raise AssertionError("two at a time")
    assert not os.path.exists(path)
    said = []
    monkeypatch.setattr(lock, "log", lambda line: (said.append(line), end.set()))  # which lets the first go on
    with lock_folder(path, Manifest(build_settings={"hnsw_m": 16}), manifest):
        assert os.path.isdir(path), "the first has built it"
    other.join(20)
    assert said == [f"waiting for the process that is building the index in {path}"]
    assert os.listdir(tmp_path / "new") == ["index"]


def test_others_wait_for_what_is_built_of_a_changed_corpus(tmp_path, monkeypatch):
    """It has the settings of the index before, whose shards are not the default."""
    previous = manifest_of("hnswlib", 9, 32, 2, hnsw_m=16)
    previous.corpus = "before"
    built = []
    monkeypatch.setattr("ann_util.read_manifest", lambda path, wanted: previous)
    monkeypatch.setattr("recall.lock_folder", lambda path, wanted, manifest: built.append(manifest))
    recall.lock_unless_current(str(tmp_path), Manifest(corpus="now"))
    assert built[0].index_shards == 2 and built[0].build_settings["hnsw_m"] == 16


def test_two_who_waited_for_a_third_do_not_build_at_once(tmp_path, monkeypatch):
    """The lock that one of them gets is of a file that is removed, unless it looks again."""
    path, inside, most = str(tmp_path / "index"), [], []
    monkeypatch.setattr(lock, "log", lambda line: None)

    def build(number):
        for _ in range(20):
            with lock_folder(path, Manifest(), Manifest()):
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.001)
                inside.remove(number)

    builders = [threading.Thread(target=build, args=(number,)) for number in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert len(most) == 80 and max(most) == 1 and os.listdir(tmp_path) == []
