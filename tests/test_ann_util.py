"""Exact and approximate search against numpy's own sorting."""

import json

import numpy as np
import pytest
from conftest import ENCODER, refuse, succeed

import ann_util
from ann_util import ExactIndex, HnswIndex, Shards, ann_recall, exact_search, fill_up, from_int8, merge, to_int8
from console import InputError
from data import file_digest, read_text_pairs, read_texts
from deploy.python.predictor import make_engine
from index_store import new_index
from recall import HNSW_EF, HNSW_M, SHARDS
from tokenizing import load_tokenizer


@pytest.fixture(scope="module")
def vectors():
    random = np.random.default_rng(0)
    vectors = random.standard_normal((700, 32)).astype("float32")
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 10, 600, 900])
def test_exact_search_is_a_full_sort(vectors, k, monkeypatch):
    monkeypatch.setattr(ann_util, "QUERY_BLOCK", 33)
    monkeypatch.setattr(ann_util, "CORPUS_BLOCK", 64)
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


def test_equal_cosines_come_in_row_order():
    corpus = np.ones((6, 1), "float32")
    for blocks in (corpus, [corpus[:2], corpus[2:]]):
        assert exact_search(corpus[:1], blocks, 6)[0].tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("make, kept", [
    (lambda size: ExactIndex(), lambda corpus: corpus), (lambda size: HnswIndex(32, size), lambda corpus: corpus),
    (lambda size: ExactIndex("int8"), lambda corpus: from_int8(to_int8(corpus)))])
@pytest.mark.parametrize("documents", [1, 3, 700])
def test_shards_find_the_same_on_any_number_of_ranks(vectors, documents, make, kept, tmp_path, monkeypatch):
    """Rows, cosines and what is on the disk; against one exact index, too, where the shards are."""
    monkeypatch.setattr(ann_util, "WINDOW", 64)
    corpus, queries = vectors[:documents], vectors[-30:]
    results = []
    for ranks, threads in ((1, 1), (1, 3), (3, 2)):
        folder = tmp_path / f"{ranks}_{threads}"
        folder.mkdir()
        found = []
        for rank in range(ranks):
            parts = [Shards(make, documents, rank, ranks, threads, shards=4) for _ in range(2)]
            for rows in parts[0].pieces:
                parts[0].add(rows, corpus[rows.start : rows.stop])
            parts[0].finish()
            parts[0].save(str(folder))
            parts[1].load(str(folder), {path.name: file_digest(str(path)) for path in folder.iterdir()})
            one, again = (part.search(queries, 9) for part in parts)
            exact = parts[0].search(queries, 9, exact=True)
            assert all((a == b).all() for a, b in zip(one, again))
            found.append((fill_up(one, 9), fill_up(exact, 9)))
        k = min(9, documents)
        results.append([merge(part, k) for part in zip(*found)])
        assert sorted(path.name for path in folder.iterdir()) == [f"shard_{n}.bin" for n in range(min(4, documents))]
    for (rows, cosines), (exact_rows, exact_cosines) in results:
        assert (rows == results[0][0][0]).all() and (cosines == results[0][0][1]).all()
        expected = exact_search(queries, kept(corpus), k)
        np.testing.assert_allclose(exact_cosines, expected[1], atol=1e-6)
        assert np.mean(exact_rows == expected[0]) > 0.99 and np.mean(rows == exact_rows) > 0.97
    for path in (tmp_path / "1_1").iterdir():
        assert path.read_bytes() == (tmp_path / "3_2" / path.name).read_bytes()


@pytest.mark.parametrize("make", [ExactIndex, lambda: HnswIndex(32, 700)])
def test_an_index_survives_the_disk(vectors, make, tmp_path):
    index, again = make(), make()
    index.add(vectors[:400])
    index.add(vectors[400:])
    np.testing.assert_allclose(np.concatenate(list(index.blocks())), vectors, atol=1e-6)
    index.save(str(tmp_path / "index.bin"))
    again.load(str(tmp_path / "index.bin"))
    assert len(again) == len(index) == 700
    for one, other in zip(index.search(vectors[:50], 20), again.search(vectors[:50], 20)):
        assert (one == other).all()


def test_int8_is_a_quarter_and_close(vectors, tmp_path):
    """Cosines against float32, through the disk too; norms are those of what was packed."""
    plain, small, again = ExactIndex(), ExactIndex("int8"), ExactIndex("int8")
    for rows in (slice(0, 300), slice(300, 700)):
        plain.add(vectors[rows])
        small.add(vectors[rows])
    (restored,) = small.blocks()
    assert restored.dtype == np.float32 and 0 < np.abs(vectors[:50] @ (restored - vectors).T).max() < 0.01
    np.testing.assert_allclose(np.linalg.norm(restored, axis=1), 1, atol=1e-6)
    (rows, cosines), (exact_rows, exact_cosines) = (index.search(vectors[:50], 20) for index in (small, plain))
    np.testing.assert_allclose(cosines, exact_cosines, atol=0.01)
    assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(rows.tolist(), exact_rows.tolist())]) > 0.95
    small.save(str(tmp_path / "small"))
    plain.save(str(tmp_path / "plain"))
    again.load(str(tmp_path / "small"))
    assert (again.search(vectors[:50], 20)[1] == cosines).all() and len(again) == 700
    header = 256
    assert (tmp_path / "small").stat().st_size <= 700 * (32 + 4) + header
    assert (tmp_path / "plain").stat().st_size >= 700 * 4 * 32


def test_int8_of_zeros_and_of_other_norms():
    vectors = np.array([[0, 0], [3, -4], [1e-20, 0]], "float32")
    np.testing.assert_allclose(from_int8(to_int8(vectors)), vectors, atol=0.02)
    assert to_int8(vectors)["values"].tolist() == [[0, 0], [95, -127], [127, 0]]


def test_a_kept_index_of_another_vector_type_is_refused(checkpoint, sample, tmp_path):
    """In both directions, without the corpus too; one that does not say is of float32."""
    flags = ["--device", "cpu", "--params_path", checkpoint, "--query", "语义", "--top_k", 120, "--precision", "fp32"]
    found = {}
    for kind in ("float32", "int8"):
        build = [*flags, "--corpus_file", sample / "corpus.csv", "--ann_engine", "exact", "--index_path", kind]
        answer = succeed("recall.py", *build, "--vector_type", kind, cwd=tmp_path).stdout
        assert json.loads((tmp_path / kind / "fingerprint.json").read_text())["vector_type"] == kind
        assert succeed("recall.py", *flags, "--index_path", kind, cwd=tmp_path).stdout == answer
        other = {"float32": "int8", "int8": "float32"}[kind]
        line = refuse("recall.py", *build, "--vector_type", other, cwd=tmp_path)
        assert f"--index_path {kind}: was built with another vector_type;" in line
        found[kind] = {line.split("\t")[1]: float(line.split("\t")[2]) for line in answer.splitlines()}
    line = refuse("recall.py", *flags, "--index_path", "float32", "--ann_engine", "exact", "--vector_type", "int8",
                  cwd=tmp_path)
    assert "was built with another vector_type;" in line
    exact = list(found["float32"])
    np.testing.assert_allclose(*([each[text] for text in exact] for each in found.values()), atol=0.01)
    assert found["float32"] != found["int8"]
    path = tmp_path / "float32" / "fingerprint.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items()
                                if name != "vector_type"}))
    succeed("recall.py", *flags, "--index_path", "float32", "--corpus_file", sample / "corpus.csv", "--ann_engine",
            "exact", cwd=tmp_path)


@pytest.mark.parametrize("engine", ["hnswlib", "milvus"])
def test_int8_is_for_exact_search(tmp_path, engine):
    (tmp_path / "file").write_text("a\tb\n")
    line = refuse("recall.py", "--params_path", "file", "--corpus_file", "file", "--similar_text_pair", "file",
                  "--ann_engine", engine, "--vector_type", "int8", cwd=tmp_path)
    assert "--vector_type int8 needs --ann_engine exact" in line


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
    monkeypatch.setattr(ann_util, "available_memory", lambda: 10**9)
    with pytest.raises(InputError, match=r"the graph of 10,000,000 documents of 256 needs 13\.4 GB .* 1\.0 are free"):
        HnswIndex(256, 10**7)
    monkeypatch.undo()
    assert 10**8 < ann_util.available_memory() < 10**13


def test_csl_in_milvus_and_hnswlib_against_exact(real_data, tmp_path, monkeypatch):
    """6,092 abstracts and 250 titles, the beginning of each: both at least 0.99 of the exact 50."""
    pytest.importorskip("pymilvus", reason="requirements-milvus.txt is not installed")
    from loading import load_encoder
    from milvus_index import MilvusIndex
    from model import SimCSE, encode

    monkeypatch.chdir(tmp_path)
    folder = real_data / "csl" / "recall"
    corpus = read_texts(str(folder / "corpus.csv"), "--flag")
    queries = [query for query, _ in read_text_pairs(str(folder / "dev.csv"), "--flag")[:250]]
    network = SimCSE(load_encoder(str(ENCODER)))
    engine, tokenizer = make_engine(network), load_tokenizer(str(ENCODER))
    asked, vectors = (encode(engine, tokenizer, texts, 16) for texts in (queries, corpus))
    _, exact = exact_search(asked, vectors, 50)
    made_of = {"documents": len(corpus), "dim": vectors.shape[1], "index_type": "FLAT", "metric": "COSINE"}
    graph = new_index({"ann_engine": "hnswlib", "index_shards": SHARDS, "hnsw_m": HNSW_M, "hnsw_ef": HNSW_EF,
                       "hnsw_max_elements": len(corpus)}, len(corpus), vectors.shape[1])
    collection = MilvusIndex("csl.db", "csl", made_of)
    for index in (graph, collection):
        for rows in index.pieces:
            part = slice(rows.start, rows.stop)
            index.add(rows, vectors[part], *([corpus[part]] if index is collection else []))
        index.finish()
        assert ann_recall(index.search(asked, 50)[1], exact) >= 0.99
        index.close()
