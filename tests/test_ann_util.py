"""Exact and approximate search against numpy's own sorting."""

import functools
import json

import ann_util
from recall import HNSW_EF, HNSW_M, SHARDS
from simcse import machine
from simcse.console import InputError
from simcse.encoder.engine import make_engine
from simcse.files import file_digest
from simcse.index import exact, hnsw
from simcse.index.documents import Entries
from simcse.index.exact import ExactIndex, exact_search, merge
from simcse.index.hnsw import HnswIndex
from simcse.index.shards import Shards, ann_recall
from simcse.text.textfile import Corpus, read_text_pairs
from simcse.text.wordpiece import load_tokenizer

import numpy as np
import pytest
from conftest import ENCODER, FP32, refuse, succeed


@pytest.fixture(scope="module")
def vectors():
    random = np.random.default_rng(0)
    vectors = random.standard_normal((700, 32)).astype("float32")
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 10, 600, 900])
def test_exact_search_is_a_full_sort(vectors, k, monkeypatch):
    monkeypatch.setattr(exact, "QUERY_BLOCK", 33)
    monkeypatch.setattr(exact, "CORPUS_BLOCK", 64)
    queries, corpus = vectors[:100], vectors[100:]
    rows, cosines = exact_search(queries, corpus, k)
    products = queries.astype("float64") @ corpus.T.astype("float64")
    expected = np.argsort(-products, axis=1, kind="stable")
    ordered = np.take_along_axis(products, expected, axis=1)
    assert rows.shape == (100, min(k, 600))
    np.testing.assert_allclose(cosines, ordered[:, :k], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(products, rows, axis=1), ordered[:, :k], atol=1e-6)
    gaps = np.pad(-np.diff(ordered, axis=1), ((0, 0), (1, 1)), constant_values=1)
    clear = ((gaps[:, :-1] > 1e-6) & (gaps[:, 1:] > 1e-6))[:, :k]  # float32 may swap the others
    assert (rows == expected[:, :k])[clear].all() and clear.mean() > 0.9


@pytest.mark.parametrize("block", [2, 4, 6])
def test_equal_cosines_come_in_row_order(block, monkeypatch):
    monkeypatch.setattr(exact, "CORPUS_BLOCK", block)
    corpus = np.ones((6, 1), "float32")
    assert exact_search(corpus[:1], corpus, 6)[0].tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("engine", ["exact", "hnswlib"])
@pytest.mark.parametrize("documents", [1, 3, 700])
def test_shards_find_the_same_on_any_number_of_ranks(vectors, documents, engine, tmp_path, monkeypatch):
    """Rows, cosines and what is on the disk; against one exact index, too, where the shards are."""
    monkeypatch.setattr(ann_util, "WINDOW", 64)
    corpus, queries = vectors[:documents], vectors[-30:]
    fingerprint = {"ann_engine": engine, "index_shards": 4, "hnsw_m": 32, "hnsw_ef": 100,
                   "hnsw_max_elements": documents}
    results = []
    for ranks, threads in ((1, 1), (1, 3), (1, 8), (3, 2)):  # 30 queries are few for 8 threads
        folder = tmp_path / f"{ranks}_{threads}"
        folder.mkdir()
        found = []
        for rank in range(ranks):
            built = Shards(fingerprint, documents, 32, threads, rank=rank, ranks=ranks)
            built.fill(corpus[rows.start : rows.stop] for rows in built.pieces)
            built.save(str(folder))
            digests = {path.name: file_digest(str(path)) for path in folder.iterdir()}
            kept = Shards({**fingerprint, "files": digests}, documents, 32, threads, str(folder), rank, ranks)
            one, again = (index.search(queries, 9) for index in (built, kept))
            assert all((a == b).all() for a, b in zip(one, again))
            found.append((one, built.search(queries, 9, exact=True)))
        k = min(9, documents)
        results.append([merge(part, k) for part in zip(*found)])
        assert sorted(path.name for path in folder.iterdir()) == [f"shard_{n}.bin" for n in range(min(4, documents))]
    for (rows, cosines), (exact_rows, exact_cosines) in results:
        assert (rows == results[0][0][0]).all() and (cosines == results[0][0][1]).all()
        expected = exact_search(queries, corpus, k)
        np.testing.assert_allclose(exact_cosines, expected[1], atol=1e-6)
        assert np.mean(exact_rows == expected[0]) > 0.99 and np.mean(rows == exact_rows) > 0.97
    for path in (tmp_path / "1_1").iterdir():
        assert path.read_bytes() == (tmp_path / "3_2" / path.name).read_bytes()


@pytest.mark.parametrize("make", [ExactIndex, functools.partial(HnswIndex, 32, 700)])
def test_an_index_survives_the_disk(vectors, make, tmp_path):
    index, path = make(), str(tmp_path / "index.bin")
    index.add(vectors[:400])
    index.add(vectors[400:])
    np.testing.assert_allclose(index[:], vectors, atol=1e-6)
    np.testing.assert_allclose(index[300:500], vectors[300:500], atol=1e-6)
    index.save(path)
    again = make(path=path)
    assert len(again) == len(index) == 700
    for one, other in zip(index.search(vectors[:50], 20), again.search(vectors[:50], 20)):
        assert (one == other).all()


def test_an_index_in_another_precision_is_refused_with_advice(tmp_path):
    (tmp_path / "fingerprint.json").write_text(json.dumps({"precision": "int8", "index_format": 2}))
    with pytest.raises(InputError, match="was built with precision int8, not fp16; --precision int8 with --device cpu "
                       "takes it as it is; or name another folder"):
        ann_util.read_fingerprint(str(tmp_path), {"precision": "fp16"})


def test_a_kept_index_of_a_former_version_is_refused(checkpoint, sample, tmp_path):
    """Of a former version, whose rows were lines."""
    flags = ["--device", "cpu", "--params_path", checkpoint, "--query", "语义", "--index_path", "index", *FP32]
    succeed("recall.py", *flags, "--corpus_file", sample / "corpus.csv", "--ann_engine", "exact", cwd=tmp_path)
    path = tmp_path / "index" / "fingerprint.json"
    told = json.loads(path.read_text())
    del told["index_format"]
    path.write_text(json.dumps(told))
    line = refuse("recall.py", *flags, cwd=tmp_path)
    assert ("--index_path index: was built with another index_format; name another folder, or remove this one to build "
            "it again") in line


def test_ann_recall_counts_what_is_missing():
    exact = np.array([[0.9, 0.8, 0.7], [0.5, 0.4, 0.3]])
    assert ann_recall(exact, exact) == 1
    assert ann_recall(np.array([[0.9, 0.7, 0.6], [0.5, 0.2, 0.1]]), exact) == 0.5


def test_hnsw_agrees_with_exact_on_a_small_corpus(vectors):
    index = HnswIndex(32, 600)
    index.add(vectors[100:400])
    index.add(vectors[400:])
    rows, cosines = index.search(vectors[:100], 50)
    exact_rows, exact_cosines = exact_search(vectors[:100], vectors[100:], 50)
    assert np.mean([len(set(a) & set(b)) / 50 for a, b in zip(rows, exact_rows)]) > 0.98
    same = rows == exact_rows
    np.testing.assert_allclose(cosines[same], exact_cosines[same], atol=1e-5)


@pytest.mark.parametrize("k", [400, 600, 5000])
def test_more_neighbours_than_ef_or_elements(vectors, k):
    index = HnswIndex(32, 1000, m=16, ef=10)
    index.add(vectors[100:])
    rows, cosines = index.search(vectors[:5], k)
    assert rows.shape == cosines.shape == (5, min(k, 600))
    assert all(len(set(row)) == len(row) for row in rows.tolist())
    assert (np.diff(cosines, axis=1) <= 1e-6).all()


def test_an_unreachable_graph_is_an_input_error():
    """1000 copies of two texts with two links a node: hnswlib alone raises RuntimeError."""
    corpus = np.repeat(np.eye(2, 8, dtype="float32"), 1000, axis=0)
    index = HnswIndex(8, 2000, m=2, ef=2)
    index.add(corpus)
    try:
        rows, _ = index.search(corpus[:1], 2000)
    except InputError as error:
        assert "--hnsw_m" in str(error)
    else:
        assert sorted(rows[0].tolist()) == list(range(2000))


def test_too_little_memory_says_how_much(monkeypatch):
    monkeypatch.setattr(hnsw, "available_memory", lambda: 10**9)
    with pytest.raises(InputError, match=r"the graph of 10,000,000 documents of 256 needs 13\.4 GB .* 1\.0 are free"):
        HnswIndex(256, 10**7)
    monkeypatch.undo()
    assert 10**8 < machine.available_memory() < 10**13


def test_csl_in_milvus_and_hnswlib_against_exact(real_data, tmp_path, monkeypatch):
    """6,092 abstracts and 250 titles, the beginning of each: all at least 0.99 of the exact 50."""
    pytest.importorskip("pymilvus", reason="requirements-milvus.txt is not installed")
    from model import SimCSE
    from simcse.encoder.encoder import Encoder
    from simcse.encoder.pretrained import load_pretrained
    from simcse.index.milvus import MilvusIndex

    monkeypatch.chdir(tmp_path)
    folder = real_data / "csl" / "recall"
    entries = Entries(Corpus(str(folder / "corpus.csv"), "--flag"))
    corpus = entries[:]
    queries = [query for query, _ in read_text_pairs(str(folder / "dev.csv"), "--flag")[:250]]
    network = SimCSE(load_pretrained(str(ENCODER)))
    encoder = Encoder(make_engine(network), load_tokenizer(str(ENCODER)), 16)
    asked, vectors = (encoder.encode(texts) for texts in (queries, corpus))
    _, exact = exact_search(asked, vectors, 50)
    fingerprint = {"dim": vectors.shape[1], "metric": "COSINE", "hnsw_m": HNSW_M,
               "hnsw_ef": HNSW_EF}
    graph = Shards({"ann_engine": "hnswlib", "index_shards": SHARDS, "hnsw_m": HNSW_M, "hnsw_ef": HNSW_EF,
                    "hnsw_max_elements": len(corpus)}, len(corpus), vectors.shape[1])
    collections = [MilvusIndex("csl.db", kind, {}, entries, {**fingerprint, "index_type": kind})
                   for kind in ("FLAT", "HNSW")]
    for index in (graph, *collections):
        index.fill(vectors[rows.start : rows.stop] for rows in index.pieces)
        assert ann_recall(index.search(asked, 50)[1], exact) >= 0.99
    collections[0].close()
