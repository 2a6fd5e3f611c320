"""recall.py with a real Milvus Lite: agreement with exact search, a broken run, one query, refusals."""

import argparse
import dataclasses
import fcntl
import functools
import json
import re
import shutil
import signal
import subprocess

from simcse.console import InputError
from simcse.index import milvus_types
from simcse.index.ann_recall import ann_recall
from simcse.index.exact import exact_search
from simcse.index.hits import hits_of, search
from simcse.index.manifest import Manifest
from simcse.index.milvus import MilvusIndex
from simcse.index.milvus_collection import COMPLETE, Record
from simcse.index.milvus_rows import join_ids
from simcse.index.milvus_update import compare_with_corpus
from simcse.index.protocols import NOT_FOUND, Document, Line
from simcse.text.keys import text_keys
from simcse.text.passages import Passages

import numpy as np
import pytest
from conftest import FP32, ROOT, command, refuse, succeed
from indexes import documents_of, fill_collection, milvus_manifest

pymilvus = pytest.importorskip("pymilvus", reason="pymilvus is not installed (requirements-milvus.txt)")


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


# ------------------------------------------------------------------------------------------------------- the commands
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
        f"import sys, runpy\nsys.path.insert(0, {str(ROOT)!r})\nfrom simcse.index import milvus_update\n"
        "real = milvus_update.CollectionUpdate._store\n"
        "def slow(self, rows, vectors):\n    if rows[0]:\n        print('SECOND', flush=True)\n"
        "        import time; time.sleep(60)\n    real(self, rows, vectors)\n"
        "milvus_update.CollectionUpdate._store = slow\n"
        f"runpy.run_path({str(ROOT / 'recall.py')!r}, run_name='__main__')",
        encoding="utf-8")
    process = subprocess.Popen(command(script, *wanted), cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"SECOND\n"
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    second = succeed("recall.py", *wanted, cwd=tmp_path)
    assert f"encoding and indexing {4200 - 4096} of 4,200 documents" in second.stderr
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
    hit = json.loads(succeed("recall.py", *ask, "--format", "jsonl", cwd=filled).stdout)["results"][0]
    assert hit["document"] == expected[0][1] and hit["line"] is None  # it stands in the corpus alone
    assert "was built with max_seq_length 32, not 9;" in refuse("recall.py", *ask, "--max_seq_length", 9, cwd=filled)
    (filled / "queries.csv").write_text(query, encoding="utf-8")
    ask[ask.index("--query") : ask.index("--top_k")] = ["--query_file", "queries.csv", "--format", "trec"]
    assert "--format trec: a document has no id in the collection, and its line is not known" in refuse(
        "recall.py", *ask, cwd=filled)


def test_refusals(flags, checkpoint, filled, tmp_path):
    (tmp_path / "other.csv").write_text("另一个\n" * 120, encoding="utf-8")
    assert "simcse: was built with another corpus, of which no text is in" in refuse(
        "recall.py", *flags(corpus=tmp_path / "other.csv"), cwd=filled)
    ask = ["--device", "cpu", "--params_path", checkpoint, "--ann_engine", "milvus", "--query", "问"]
    assert "--milvus_collection none: ./recall.db has no such collection" in refuse(
        "recall.py", *ask, "--milvus_collection", "none", cwd=filled)
    line = refuse("recall.py", *ask, "--milvus_uri", "http://127.0.0.1:1", cwd=filled)
    assert line.startswith("recall.py: error: --milvus_uri http://127.0.0.1:1: ")
    assert "nowhere: no such folder" in refuse("recall.py", *ask, "--milvus_uri", "nowhere/x.db", cwd=filled)


def test_without_pymilvus_a_hint(checkpoint, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['pymilvus'] = None\n")
    line = refuse("recall.py", "--device", "cpu", "--params_path", checkpoint, "--ann_engine", "milvus", "--query", "x",
                  cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert "pymilvus is not installed; pip install -r requirements-milvus.txt" in line


def test_a_file_in_use_is_called_that(filled, checkpoint):
    with open(filled / "recall.db" / "LOCK") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        line = refuse("recall.py", "--device", "cpu", "--params_path", checkpoint, "--ann_engine", "milvus", "--query",
                      "x", cwd=filled)
    assert "--milvus_uri ./recall.db: is in use by another process;" in line


# ---------------------------------------------------------------------------------------------------------- the class
@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(collection="texts"):
    """The collection without its corpus, and its documents."""
    index = MilvusIndex("x.db", collection)
    return index, index.open({})


def test_a_row_is_a_document_with_the_corpus_and_a_key_without_it(in_a_folder):
    """With blank lines and copies in the file; the texts come back whole, and as often as they are there."""
    whole = "长" * 21845
    vectors = np.eye(3, 8, dtype="float32")
    index = fill_collection(documents_of(in_a_folder, "甲", "", whole, "甲", "乙", "甲"), vectors)
    result = index.search(vectors, 3)
    assert result.rows[:, 0].tolist() == [0, 1, 2] and result.scores[0, 0] == pytest.approx(1)
    assert index.vectors(np.array([2, NOT_FOUND])).tolist() == [vectors[2].tolist(), [0] * 8]
    index.close()
    again, stored = opened()
    assert (len(stored), stored.line_count, stored.row_count) == (3, 5, 3)
    keys = text_keys(["甲", whole, "乙"])
    assert again.search(vectors, 3).rows[:, 0].tolist() == keys.tolist()
    assert stored.read(keys[[1, 0]], 9) == [
        Document(whole, [Line(None, None)]), Document("甲", [Line(None, None)] * 3)]
    assert again.vectors(keys).tolist() == vectors.tolist()
    again.close()


def test_of_equal_cosines_the_lower_row_comes_first(in_a_folder):
    texts = [f"文{number}" for number in range(6)]
    vectors = np.repeat(np.eye(1, 8, dtype="float32"), 6, axis=0)
    index = fill_collection(documents_of(in_a_folder, *texts), vectors)
    assert index.search(vectors[:1], 6).rows.tolist() == [[0, 1, 2, 3, 4, 5]]
    index.close()
    again, _ = opened()
    assert again.search(vectors[:1], 6).rows.tolist() == [sorted(text_keys(texts).tolist())]
    again.close()


def test_more_neighbours_than_rows(in_a_folder):
    index = fill_collection(documents_of(in_a_folder, "甲"), np.eye(1, 8, dtype="float32"))
    found = index.search(np.eye(1, 8, dtype="float32"), 3)
    assert found.rows.tolist() == [[0, NOT_FOUND, NOT_FOUND]]
    index.close()


def test_ids_are_stored(in_a_folder):
    """Of the lines of a text as many as a field holds: 65,535 bytes, a tab after each of them."""
    assert join_ids(["长" * 10000, "b" * 35533, "c"]) == "长" * 10000 + "\t" + "b" * 35533
    documents = documents_of(in_a_folder, "a\t丙", "b\t丁", "c\t丙", "d\t丙")
    fill_collection(documents, np.eye(2, 8, dtype="float32")).close()
    index, stored = opened()
    assert stored.read(documents.keys, 2) == [
        Document("丙", [Line(None, "a"), Line(None, "c")]), Document("丁", [Line(None, "b")])]
    index.close()


def test_passages_are_rows_of_their_document(in_a_folder):
    """Found with the corpus and without it; each document once, by its best passage."""
    documents = documents_of(in_a_folder, "", "a\t甲。乙。", "b\t丙。丁。戊。", "c\t甲。乙。")
    documents.passages = Passages(documents, np.array([0, 2, 5]), np.array([0, 2, 0, 2, 4]))
    index = fill_collection(documents, np.eye(5, 8, dtype="float32"))
    queries = np.eye(8, dtype="float32")[[1, 4]] + np.eye(8, dtype="float32")[[2, 0]] / 2
    hits = hits_of(search(index, documents, queries, 2), documents, [3, 3])
    assert [[(hit.line, hit.id, hit.passage) for hit in of_query] for of_query in hits] == [
        [(2, "a", "乙。"), (4, "c", "乙。"), (3, "b", "丙。")], [(3, "b", "戊。"), (2, "a", "甲。"), (4, "c", "甲。")]]
    index.close()
    again, stored = opened()
    assert (len(stored), stored.line_count, stored.row_count, stored.has_passages) == (2, 3, 5, True)
    alone = hits_of(search(again, stored, queries, 2), stored, [3, 3])
    assert alone == [[hit._replace(line=None) for hit in of_query] for of_query in hits]
    assert stored.documents_of(np.array([[NOT_FOUND]])).tolist() == [[NOT_FOUND]]
    for document, key in enumerate(documents.keys):
        assert sorted(stored.rows_of(key)) == sorted(documents.row_keys()[documents.rows_of(document)])
    again.close()


def test_a_text_too_long_for_milvus_is_refused_with_its_line(in_a_folder):
    documents = documents_of(in_a_folder, "短", "", "长" * 21846, "a" * 65535)
    with pytest.raises(InputError, match=r"corpus.csv:3: 1 of 3 texts is longer than Milvus takes, 65,535 bytes"):
        compare_with_corpus(MilvusIndex("x.db", "texts"), documents, milvus_manifest(documents))
    with pytest.raises(InputError, match="no such collection"):
        opened()


def test_asking_makes_no_file(in_a_folder):
    with pytest.raises(InputError, match="--milvus_collection texts: x.db has no such collection; --corpus_file is ne"):
        opened()
    assert not list(in_a_folder.iterdir())


def test_the_settings_of_a_collection_are_kept_and_a_search_may_have_another_ef(in_a_folder, monkeypatch):
    """HNSW, as on a server."""
    documents = documents_of(in_a_folder, "甲", "乙")
    vectors = np.eye(2, 8, dtype="float32")
    of_hnsw = {"milvus_index": "HNSW", "M": 16, "efConstruction": 50}
    fill_collection(documents, vectors, build_settings=of_hnsw, search_settings={"ef": 40}).close()
    index = MilvusIndex("x.db", "texts")
    index.open({"ef": 77})
    assert index.manifest.build_settings == of_hnsw and index.manifest.search_settings == {"ef": 40}
    calls = []
    search = pymilvus.MilvusClient.search

    def recorded(self, *args, **options):
        calls.append(options["search_params"])
        return search(self, *args, **options)

    monkeypatch.setattr(pymilvus.MilvusClient, "search", recorded)
    assert index.search(vectors, 1).rows.ravel().tolist() == documents.keys.tolist()
    assert calls == [{"params": {"ef": 77}}]
    assert index.manifest.differences(Manifest(build_settings={"M": 8})) == ["M 16, not 8"]
    with pytest.raises(InputError, match=r"nprobe \(--milvus_index_params\) is not for HNSW, which has M, efCon"):
        index.check(Manifest(search_settings={"nprobe": 3}))
    index.close()


@pytest.mark.parametrize("is_lite, build, search", [
    (True, {"milvus_index": "FLAT"}, {}),
    (False, {"milvus_index": "HNSW", "M": 16, "efConstruction": 40}, {"ef": 40})])
def test_a_collection_from_before_there_were_index_types(in_a_folder, is_lite, build, search, monkeypatch):
    documents = documents_of(in_a_folder, "甲", "乙")
    index = fill_collection(documents, np.eye(2, 8, dtype="float32"))
    old = dataclasses.replace(index.manifest, build_settings={"hnsw_m": 16}, search_settings={"hnsw_ef": 40})
    index.collection.write_record(Record(old, COMPLETE))
    index.collection.is_lite = is_lite  # a server's record looks the same
    monkeypatch.setattr(index.collection, "_check_index", lambda manifest: None)  # its index is Milvus Lite's
    manifest = index.collection.read_record().manifest
    assert (manifest.build_settings, manifest.search_settings) == (build, search)
    index.close()


def test_the_recall_of_a_changed_collection_is_measured_with_all_of_its_vectors(in_a_folder):
    """Those that were there before, too, and not those that are gone."""
    vectors = np.random.default_rng(0).standard_normal((60, 8)).astype("float32")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    of_hnsw = {"build_settings": {"milvus_index": "HNSW"}, "corpus": "before"}
    fill_collection(documents_of(in_a_folder, *(f"文{n}" for n in range(40))), vectors[:40], **of_hnsw).close()
    documents = documents_of(in_a_folder, *(f"文{n}" for n in range(20, 60)))
    index = MilvusIndex("x.db", "texts")
    manifest = milvus_manifest(documents, corpus="after", build_settings=index.manifest.build_settings,
                               search_settings=index.manifest.search_settings)
    update = compare_with_corpus(index, documents, manifest)
    update.start()
    assert update.has_to_be_measured()
    update.measure_with(vectors[:9])
    nearest = update._nearest
    for rows in update.missing_rows:
        update.add(rows, vectors[20:][rows])
    update.finish()
    np.testing.assert_allclose(nearest.cosines, exact_search(vectors[:9], vectors[20:], 10).scores, atol=1e-6)
    assert index.manifest.ann_recall.recall > 0.9 and index.manifest.ann_recall.settings == {"ef": 100}
    index.close()


# ---------------------------------------------------------------------------------------------------- the index types
def test_parameters_are_read():
    assert milvus_types.parse_parameters("nlist=4096, nprobe=64") == {"nlist": 4096, "nprobe": 64}
    for text, message in (("nlists=1", "no index type has a parameter 'nlists'; HNSW has M, efConstruction, ef; FLAT"),
                          ("ef=1,ef=2", "ef is given twice"), ("ef=", "ef: expected an integer >= 1, got ''"),
                          ("ef=0", "ef: expected an integer >= 1, got '0'"),
                          ("ef=９", "ef: expected an integer >= 1, got '９'"),
                          ("nbits=99", "nbits: expected an integer from 1 to 16, got '99'"),
                          ("ef", "expected NAME=VALUE,..., got 'ef' in 'ef'"),
                          ("ef=1,", "expected NAME=VALUE,..., got '' in 'ef=1,'")):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(message)):
            milvus_types.parse_parameters(text)
    assert not milvus_types.build_settings().keys() & milvus_types.search_settings().keys()
    with pytest.raises(InputError, match=r"M \(--milvus_index_params or --hnsw_m\) is not for FLAT, which has no "):
        milvus_types.check_names("FLAT", ["M"])


@pytest.mark.parametrize("index_type, given, rows, dimension, to_build, to_search, deeper", [
    ("HNSW", {}, 9, 64, {"M": 32, "efConstruction": 100}, {"ef": 100}, {"ef": 400}),
    ("HNSW", {"ef": 7}, 9, 64, {"M": 32, "efConstruction": 7}, {"ef": 7}, {"ef": 80}),
    ("FLAT", {}, 9, 64, {}, {}, {}),
    ("IVF_FLAT", {}, 10, 64, {"nlist": 13}, {"nprobe": 13}, {}),
    ("IVF_FLAT", {}, 10**9, 256, {"nlist": 2896}, {"nprobe": 362}, {"nprobe": 1448}),
    ("IVF_SQ8", {"nlist": 100, "nprobe": 60}, 10**6, 256, {"nlist": 100}, {"nprobe": 60}, {"nprobe": 100}),
    ("IVF_PQ", {}, 10**4, 130, {"nlist": 400, "m": 130, "nbits": 8}, {"nprobe": 50}, {"nprobe": 200}),
    ("SCANN", {}, 10**4, 64, {"nlist": 400}, {"nprobe": 50, "reorder_k": 400}, {"nprobe": 200, "reorder_k": 1600}),
    ("DISKANN", {"search_list": 9}, 10**4, 64, {}, {"search_list": 9}, {"search_list": 80})])
def test_defaults_of_index_types(index_type, given, rows, dimension, to_build, to_search, deeper):
    """Those that depend on the corpus; and what looks deeper in a search for 10."""
    built, searched = milvus_types.split_settings(given)
    built, searched = milvus_types.complete_settings({"milvus_index": index_type, **built}, searched, rows, dimension)
    assert built == {"milvus_index": index_type, **to_build} and searched == to_search
    assert milvus_types.deeper_settings(built, searched, 10) == deeper


@pytest.mark.parametrize("content, message", [
    ({"properties": {"simcse": json.dumps({"index_format": 4, "model": "m"})}}, "another version of recall.py built"),
    ({"description": json.dumps({"index_format": 4})}, "another version of recall.py built it; name another coll"),
    ({"description": "papers"}, "exists, but was not made by recall.py"),
    ({"description": "12"}, "exists, but was not made by recall.py"),
    ({"description": '{"manifest": 5}'}, "exists, but was not made by recall.py"),
    ({}, "exists, but was not made by recall.py")])
def test_collections_of_others_and_of_earlier_versions(in_a_folder, content, message, monkeypatch):
    """A server kept the fingerprint in the description, Milvus Lite in a property."""
    fill_collection(documents_of(in_a_folder, "甲"), np.eye(1, 8, dtype="float32")).close()
    monkeypatch.setattr(pymilvus.MilvusClient, "describe_collection", lambda self, name: content)
    with pytest.raises(InputError, match=f"--milvus_collection texts: {message}"):
        MilvusIndex("x.db", "texts")
