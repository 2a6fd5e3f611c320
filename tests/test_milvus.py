"""recall.py with a real Milvus Lite: agreement with exact search, a broken run, one query, refusals."""

import fcntl
import functools
import shutil
import signal
import subprocess

from ann_util import Kept
from simcse.console import InputError
from simcse.index.documents import Entries
from simcse.index.hits import expand, search
from simcse.index.milvus import MilvusIndex
from simcse.index.shards import ann_recall
from simcse.text.passages import Passages
from simcse.text.textfile import Corpus

import numpy as np
import pytest
from conftest import FP32, ROOT, command, refuse, succeed

pytest.importorskip("pymilvus", reason="pymilvus is not installed (requirements-milvus.txt)")


def flags_of(checkpoint, sample, *more, corpus=None):
    return ["--device", "cpu", "--params_path", checkpoint, "--corpus_file", corpus or sample / "corpus.csv",
            "--similar_text_pair", sample / "dev.csv", "--recall_num", 20, "--ann_engine", "milvus", *FP32, *more]


@pytest.fixture
def flags(checkpoint, sample):
    return functools.partial(flags_of, checkpoint, sample)


def result_of(folder):
    lines = (folder / "recall_result_dir" / "recall_result.txt").read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines]


@pytest.fixture
def filled(filled_once, tmp_path):
    """A folder with the sample's corpus in ./recall.db and the result of recalling dev.csv; each test has its own."""
    return shutil.copytree(filled_once, tmp_path / "filled")


@pytest.fixture(scope="module")
def filled_once(checkpoint, sample, tmp_path_factory):
    folder = tmp_path_factory.mktemp("milvus")
    result = succeed("recall.py", *flags_of(checkpoint, sample), cwd=folder)
    assert "Traceback" not in result.stderr and "faiss" not in result.stderr
    return folder


@pytest.fixture(scope="module")
def exact(checkpoint, sample, tmp_path_factory):
    """Like `filled`, by exact search."""
    folder = tmp_path_factory.mktemp("exact")
    succeed("recall.py", *flags_of(checkpoint, sample, "--ann_engine", "exact"), cwd=folder)
    return folder


def test_agrees_with_exact_search(filled, exact):
    found, expected = result_of(filled), result_of(exact)
    assert [line[0] for line in found] == [line[0] for line in expected] and len(found) == 60 * 20
    cosines, exact_cosines = (np.array([float(line[2]) for line in lines]).reshape(60, 20)
                              for lines in (found, expected))
    assert ann_recall(cosines, exact_cosines) > 0.99
    np.testing.assert_allclose(cosines, exact_cosines, atol=1e-5)


def test_a_broken_run_goes_on_where_it_ended(flags, sample, tmp_path):
    """Killed after the first piece: the second run encodes the rest alone, a third nothing, and the result is that of
    a run in one go."""
    documents = [f"{line}{n}" for n in range(35) for line in (sample / "corpus.csv").read_text("utf-8").splitlines()]
    (tmp_path / "corpus.csv").write_text("\n".join(documents) + "\n", encoding="utf-8")
    wanted = [str(word) for word in flags("--max_seq_length", 16, corpus="corpus.csv")]
    script = tmp_path / "slow.py"
    script.write_text(
        f"import sys, runpy\nsys.path.insert(0, {str(ROOT)!r})\nfrom simcse import milvus\n"
        "real = milvus.MilvusIndex._upsert\n"
        "def slow(self, rows, *more):\n    if rows.start:\n        print('SECOND', flush=True)\n"
        "        import time; time.sleep(60)\n    real(self, rows, *more)\n"
        f"milvus.MilvusIndex._upsert = slow\nrunpy.run_path({str(ROOT / 'recall.py')!r}, run_name='__main__')",
        encoding="utf-8")
    process = subprocess.Popen(command(script, *wanted), cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"SECOND\n"
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    second = succeed("recall.py", *wanted, cwd=tmp_path)
    assert f"encoding and indexing {4200 - 4096} of 4200 documents" in second.stderr
    resumed = result_of(tmp_path)
    third = succeed("recall.py", *wanted, cwd=tmp_path)
    assert "using the collection simcse" in third.stderr and "encoding" not in third.stderr
    assert result_of(tmp_path) == resumed
    succeed("recall.py", *wanted, "--milvus_collection", "in_one_go", cwd=tmp_path)
    assert result_of(tmp_path) == resumed


def test_one_query_without_the_corpus(checkpoint, sample, filled):
    query, *_ = (sample / "dev.csv").read_text(encoding="utf-8").split("\t")
    expected = result_of(filled)[:5]
    ask = ["--device", "cpu", "--params_path", checkpoint, "--ann_engine", "milvus", *FP32, "--query", query, "--top_k",
           5]
    answer = [line.split("\t") for line in succeed("recall.py", *ask, cwd=filled).stdout.splitlines()]
    assert [line[:2] for line in answer] == [line[:2] for line in expected]
    assert "was built with max_seq_length 32, not 9;" in refuse("recall.py", *ask, "--max_seq_length", 9, cwd=filled)


def test_refusals(flags, checkpoint, filled, tmp_path):
    (tmp_path / "other.csv").write_text("另一个\n" * 120, encoding="utf-8")
    assert "simcse: was built with another corpus, of which no text is in" in refuse(
        "recall.py", *flags(corpus=tmp_path / "other.csv"), cwd=filled)
    ask = ["--device", "cpu", "--params_path", checkpoint, "--ann_engine", "milvus", "--query", "问"]
    assert "--milvus_collection none: ./recall.db has no such collection" in refuse(
        "recall.py", *ask, "--milvus_collection", "none", cwd=filled)
    line = refuse("recall.py", *ask, "--milvus_uri", "http://127.0.0.1:1", cwd=filled)
    assert line.startswith("recall.py: error: --milvus_uri http://127.0.0.1:1: ")
    assert "is neither http://host:port nor" in refuse("recall.py", *ask, "--milvus_uri", "recall", cwd=filled)
    assert "nowhere: no such folder" in refuse("recall.py", *ask, "--milvus_uri", "nowhere/x.db", cwd=filled)


def test_without_pymilvus_a_hint(checkpoint, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['pymilvus'] = None\n")
    line = refuse("recall.py", "--device", "cpu", "--params_path", checkpoint, "--ann_engine", "milvus", "--query", "x",
                  cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert "pymilvus is not installed; pip install -r requirements-milvus.txt" in line


def entries_of(folder, *lines):
    (folder / "corpus.csv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return Entries(Corpus(str(folder / "corpus.csv"), "--corpus_file"))


NEW = {"dim": 8, "index_type": "FLAT", "metric": "COSINE"}


def test_a_key_is_the_number_of_a_line(tmp_path, monkeypatch):
    """With blank lines and copies in the file; the texts come back whole, and as often as they are there."""
    monkeypatch.chdir(tmp_path)
    vectors, whole = np.eye(3, 8, dtype="float32"), "长" * 21845
    index = MilvusIndex("x.db", "texts", {}, entries_of(tmp_path, "甲", "", whole, "甲", "乙", "甲"), NEW)
    index.fill([vectors])
    assert (len(index), index.documents) == (3, 5)
    entries, cosines = index.search(vectors, 3)
    assert entries[:, 0].tolist() == [0, 1, 2] and cosines[0, 0] == pytest.approx(1)
    index.close()
    again = MilvusIndex("x.db", "texts", {})
    assert not again.pieces and again.search(vectors, 3)[0][:, 0].tolist() == [1, 3, 5]
    assert again.take([3, 1], 9) == [
        (whole, [(3, None)]), ("甲", [(1, None), (None, None), (None, None)])]
    again.close()


def test_ids_are_stored(tmp_path, monkeypatch):
    """Of the lines of a text as many as a field holds: 65,535 bytes, a tab after each of them."""
    monkeypatch.chdir(tmp_path)
    index = MilvusIndex("x.db", "texts", {}, entries_of(tmp_path, "甲", "乙", "a\t丙", "b\t丁", "c\t丙", "d\t丙"), NEW)
    index.fill([np.eye(2, 8, dtype="float32")])
    assert index._joined(["长" * 10000, "b" * 35533, "c"]) == "长" * 10000 + "\t" + "b" * 35533
    index.close()
    again = MilvusIndex("x.db", "texts", {})
    assert again.take([3, 4], 2) == [("丙", [(3, "a"), (None, "c")]), ("丁", [(4, "b")])]
    again.close()


def vectors_of(index, *numbers):
    """A unit vector for each row of the index' pieces."""
    return [np.eye(8, dtype="float32")[list(numbers)][rows.start : rows.stop] for rows in index.pieces]


def follow(folder, *lines):
    """A collection of another state of the corpus; what is new of it has the last vectors."""
    entries = entries_of(folder, *lines)
    index = MilvusIndex("x.db", "texts", {"corpus": str(lines), "model": "m"}, entries, NEW)
    kept = Kept("--milvus_collection texts", entries, index.known, index.before, index.pieces, index.stored)
    return index, kept


def test_a_collection_follows_its_corpus(tmp_path, monkeypatch, capsys):
    """Embeddings go with their texts, which have other lines and ids now; broken off anywhere the old one stays, and
    the same command goes on."""
    monkeypatch.chdir(tmp_path)
    index = MilvusIndex("x.db", "texts", {"corpus": "before", "model": "m"}, entries_of(
        tmp_path, "a\t甲", "b\t乙", "c\t丙"), NEW)
    index.fill(vectors_of(index, 0, 1, 2))
    index.close()
    lines = ["n\t新", "c\t丙", "a2\t甲", "a3\t甲"]
    with pytest.raises(InputError, match="texts: was built with model m, not other; name another collection"):
        MilvusIndex("x.db", "texts", {"corpus": "x", "model": "other"}, entries_of(tmp_path, *lines), NEW)
    with pytest.raises(InputError, match="texts: was built with another corpus, of which no text is in"):
        follow(tmp_path, "z\t别的")
    index, kept = follow(tmp_path, *lines)
    assert "4 documents: 1 new, 1 gone, encoded 1" in capsys.readouterr().err
    assert [rows.tolist() for rows in kept.lacking] == [[0]] and index.follows
    index.close()  # before anything is filled
    again = MilvusIndex("x.db", "texts", {})
    assert again.take([1, 3], 9) == [("甲", [(1, "a")]), ("丙", [(3, "c")])]
    again.close()
    index, kept = follow(tmp_path, *lines)
    index.fill(kept.blocks(iter([np.eye(8, dtype="float32")[[7]]])))
    rename = index._client.rename_collection
    monkeypatch.setattr(index._client, "rename_collection", lambda *names: rename(*names) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # when the old one has gone, and the new one has no name yet
        index.finish()
    index.close()
    again = MilvusIndex("x.db", "texts", {})
    assert again.take([1, 3], 9) == [("甲", [(1, "a")]), ("丙", [(3, "c")])]
    again.close()
    index, kept = follow(tmp_path, *lines)
    assert not index.pieces and not kept.lacking
    index.finish()
    index.close()
    again = MilvusIndex("x.db", "texts", {"corpus": str(tuple(lines))})
    assert not again.pieces and again._client.list_collections() == ["texts"]
    keys, cosines = again.search(np.eye(8, dtype="float32")[[7, 2, 0]], 1)
    assert keys.tolist() == [[1], [2], [3]] and cosines.min() == pytest.approx(1)
    assert again.take([1, 2, 3], 9) == [("新", [(1, "n")]), ("丙", [(2, "c")]), ("甲", [(3, "a2"), (None, "a3")])]
    again.close()


def test_passages_are_rows_of_their_document(tmp_path, monkeypatch):
    """Found with the corpus and without it; each document once, by its best passage."""
    monkeypatch.chdir(tmp_path)

    def opened(entries=None):
        def split():
            entries.passages = Passages(entries, np.array([0, 2, 5]), np.array([0, 2, 0, 2, 4]))

        return MilvusIndex("x.db", "texts", {}, entries, {**NEW, "passages": True}, split)

    entries = entries_of(tmp_path, "", "a\t甲。乙。", "b\t丙。丁。戊。", "c\t甲。乙。")
    index = opened(entries)
    index.fill(vectors_of(index, 0, 1, 2, 3, 4))
    queries = np.eye(8, dtype="float32")[[1, 4]] + np.eye(8, dtype="float32")[[2, 0]] / 2
    found, rows = search(index, entries, queries, 2)
    hits = expand(found, entries, [3, 3], rows=rows)
    assert [[(hit.line, hit.id, hit.passage) for hit in each] for each in hits] == [
        [(2, "a", "乙。"), (4, "c", "乙。"), (3, "b", "丙。")], [(3, "b", "戊。"), (2, "a", "甲。"), (4, "c", "甲。")]]
    index.close()
    again = opened()
    assert (len(again), again.documents, len(again.passages)) == (2, 3, 5)
    found, rows = search(again, again, queries, 2)
    alone = expand(found, again, [3, 3], rows=rows)
    assert [[hit.passage for hit in each] for each in alone] == [[hit.passage for hit in each] for each in hits]
    assert [(hit.line, hit.id) for hit in alone[0]] == [(2, "a"), (None, "c"), (3, "b")]
    again.close()


def test_a_text_too_long_for_milvus_is_refused_with_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entries = entries_of(tmp_path, "短", "", "长" * 21846, "a" * 65535)
    with pytest.raises(InputError, match=r"corpus.csv:3: 1 of 3 texts are longer than Milvus takes, 65,535 bytes"):
        MilvusIndex("x.db", "texts", {}, entries, NEW)
    with pytest.raises(InputError, match="no such collection"):
        MilvusIndex("x.db", "texts", {})


def test_asking_makes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--milvus_collection texts: x.db has no such collection; --corpus_file is ne"):
        MilvusIndex("x.db", "texts", {})
    assert not list(tmp_path.iterdir())


def test_a_file_in_use_is_called_that(filled, checkpoint):
    with open(filled / "recall.db" / "LOCK") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        line = refuse("recall.py", "--device", "cpu", "--params_path", checkpoint, "--ann_engine", "milvus", "--query",
                      "x", cwd=filled)
    assert "--milvus_uri ./recall.db: is in use by another process;" in line


def test_the_settings_of_a_collection_are_refused_and_ef_is_the_searchs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = {**NEW, "index_type": "HNSW", "hnsw_m": 16, "hnsw_ef": 40}
    index = MilvusIndex("x.db", "texts", {}, entries_of(tmp_path, "甲", "乙"), new)
    index.fill([np.eye(2, 8, dtype="float32")])
    assert MilvusIndex("x.db", "texts", {"hnsw_ef": 77}).fingerprint["hnsw_ef"] == 77
    with pytest.raises(InputError, match="texts: was built with hnsw_m 16, not 8; name another collection"):
        MilvusIndex("x.db", "texts", {"hnsw_m": 8})
    index.close()
