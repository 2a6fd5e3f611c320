"""Exact and approximate search against numpy's own sorting."""

import dataclasses
import json
import math
from types import SimpleNamespace

import ann_util
from simcse import console, huge_pages, machine, memory
from simcse.console import InputError
from simcse.encoder.encoder import Encoder
from simcse.encoder.engine import make_engine
from simcse.encoder.weights import layer_bytes
from simcse.files import file_digest
from simcse.index import exact, shards
from simcse.index.ann_recall import ann_recall, report_ann_recall
from simcse.index.documents import Documents
from simcse.index.engines import LOCAL_ENGINES
from simcse.index.exact import exact_search
from simcse.index.manifest import FORMAT, AnnRecall, Manifest
from simcse.index.previous import PreviousIndex
from simcse.index.protocols import LocalEngine, SearchResult
from simcse.index.shards import ShardedIndex
from simcse.text.textfile import Corpus, read_text_pairs
from simcse.text.tokens import WINDOW
from simcse.text.wordpiece import load_tokenizer

import numpy as np
import pytest
from conftest import ENCODER, FP32, refuse
from indexes import ThreadRanks, documents_of, engine_of, fill, fill_collection, for_engines, manifest_of


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


def reference(queries, corpus, k):
    """The k nearest of each query, of equal cosines the lower row, by a full sort of the same float32 cosines."""
    cosines = queries @ corpus.T
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(cosines, rows, axis=1)


@pytest.mark.parametrize("engine", for_engines())
@pytest.mark.parametrize("seed", range(12))
def test_of_equal_scores_the_lower_row_comes_first(seed, engine, monkeypatch):
    """Small integers, whose cosines are exact: most are equal to others, within a block and across blocks. At the cut,
    too, where the engine is exact.
    """
    random = np.random.default_rng(seed)
    monkeypatch.setattr(exact, "QUERY_BLOCK", 3)
    monkeypatch.setattr(exact, "CORPUS_BLOCK", int(random.integers(1, 40)))
    corpus = random.integers(-1, 2, (60, 3)).astype("float32")
    queries = random.integers(-1, 2, (10, 3)).astype("float32")
    index = engine_of(engine, 3, 60)
    if index.training_size:
        index.train(corpus[: index.training_size])
    index.add(corpus)
    for k in (1, 2, 7, 30, 59, 60, 80):
        result = index.search(queries, k, threads=2)
        order = np.lexsort((result.rows, -result.scores), axis=1)
        assert (order == np.arange(min(k, 60))).all()
        if not index.approximate:
            rows, cosines = reference(queries, corpus, k)
            assert result.rows.tolist() == rows.tolist() and result.scores.tolist() == cosines.tolist()


@pytest.mark.parametrize("vectors, shard_count", [
    (1, 1), (200_000, 1), (200_001, 2), (10**6, 2), (10**6 + 1, 3), (4 * 10**6, 8), (10**9, 8)])
def test_the_number_of_shards_follows_that_of_vectors(vectors, shard_count):
    assert shards.choose_shard_count(vectors) == shard_count


@pytest.mark.parametrize("engine", for_engines())
@pytest.mark.parametrize("documents", [1, 3, 700])
@pytest.mark.parametrize("shard_count", [1, 2, 4])
def test_shards_find_the_same_on_any_number_of_ranks(vectors, documents, shard_count, engine, tmp_path, monkeypatch):
    """Rows, cosines and what is on the disk; against one exact index, too, where the shards are."""
    monkeypatch.setattr(shards, "WINDOW", 64)
    corpus, queries = vectors[:documents], vectors[-30:]
    manifest = manifest_of(engine, documents, 32, shard_count)

    def build_and_search(rank, ranks, threads, folder):
        built = ShardedIndex(manifest, threads, rank=rank, ranks=ranks)
        encoded = [len(rows) for rows in built.missing_rows]
        fill(built, corpus)
        built.save(folder)
        return encoded, built.search(queries, 9), built._search_vectors(queries, 9, exact=True)

    def open_and_search(rank, ranks, threads, folder):
        kept = ShardedIndex(manifest, threads, rank=rank, ranks=ranks)
        kept.load(folder)
        assert not kept.missing_rows
        return kept.search(queries, 9)

    results = []
    for ranks, threads in ((1, 1), (1, 3), (1, 8), (2, 1), (3, 2)):  # 30 queries are few for 8 threads
        folder = tmp_path / f"{ranks}_{threads}"
        folder.mkdir()
        built = ThreadRanks(ranks).run(build_and_search, ranks, threads, str(folder))
        manifest.files = {path.name: file_digest(str(path)) for path in folder.iterdir()}
        opened = ThreadRanks(ranks).run(open_and_search, ranks, threads, str(folder))
        shares, found, exact_found = zip(*built)
        for result in (*found[1:], *opened):
            assert all((one == other).all() for one, other in zip(found[0], result))
        assert sum(map(sum, shares)) == documents
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        results.append([[column[:, :documents] for column in result] for result in (found[0], exact_found[0])])
        kept_shards = range(min(shard_count, documents))
        assert sorted(path.name for path in folder.iterdir()) == [f"shard_{n}.bin" for n in kept_shards]
    for (rows, cosines), (exact_rows, exact_cosines) in results:
        assert (rows == results[0][0][0]).all() and (cosines == results[0][0][1]).all()
        expected = exact_search(queries, corpus, 9)
        np.testing.assert_allclose(exact_cosines, expected[1], atol=1e-6)
        assert np.mean(exact_rows == expected[0]) > 0.99 and np.mean(rows == exact_rows) > 0.97
    for path in (tmp_path / "1_1").iterdir():
        for several in ("2_1", "3_2"):
            assert path.read_bytes() == (tmp_path / several / path.name).read_bytes()


@pytest.mark.parametrize("engine", for_engines())
def test_an_engine_keeps_its_promises(vectors, engine, tmp_path, capfd, caplog):
    """Any engine of the table: vectors come back, a search finds them, on the disk as in memory, and says nothing,
    where a library has set up logging either."""
    caplog.set_level("INFO")
    index = engine_of(engine, 32, 700)
    assert isinstance(index, LocalEngine) and len(index) == 0
    if index.training_size:
        index.train(vectors[: index.training_size])
    index.add(vectors[:400])
    index.add(vectors[400:])
    assert len(index) == 700
    assert len(index.all_vectors()) == 700
    for got, rows in ((index.all_vectors(), np.arange(700)), (index.vectors(np.array([699, 0, 5])), [699, 0, 5])):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, vectors[rows], atol=1e-6)
    for path in ("/dev/full", tmp_path / "none" / "index.bin"):
        with pytest.raises(OSError):
            index.save(str(path))
    index.save(str(tmp_path / "index.bin"))
    again = engine_of(engine, 32, 700)
    again.load(str(tmp_path / "index.bin"))
    assert len(again) == 700
    expected = reference(vectors[:50], vectors, 20)
    for threads in (1, 3):
        for found in (index.search(vectors[:50], 20, threads), again.search(vectors[:50], 20, threads)):
            assert isinstance(found, SearchResult) and found.rows.dtype == np.int64
            assert found.rows.shape == found.scores.shape == (50, 20) and found.rows[:, 0].tolist() == list(range(50))
            assert ann_recall(found.scores, expected[1]) >= (0.98 if index.approximate else 1)
            np.testing.assert_allclose(found.scores, np.take_along_axis(vectors[:50] @ vectors.T, found.rows, 1),
                                       atol=1e-5)
    assert index.search(vectors[:2], 1000, 1).rows.shape == (2, 700)
    deeper = index.deeper_settings(index.settings, 20)
    assert bool(deeper) == index.approximate and set(deeper) <= {setting.name for setting in index.search_settings}
    nothing = index.search(vectors[:0], 20, 1)
    assert nothing.rows.shape == nothing.scores.shape == (0, 20)
    assert capfd.readouterr() == ("", "") and not caplog.messages


class Trained(LOCAL_ENGINES["exact"]):
    """An engine that has to see 100 vectors before the first is added."""

    training_size = 100

    def train(self, vectors):
        assert len(self) == 0
        self.trained_with = vectors

    def add(self, vectors):
        assert len(self.trained_with)
        super().add(vectors)


@pytest.mark.parametrize("documents, trained_with", [(700, [100, 100]), (150, [80, 70])])
def test_an_engine_is_trained_before_vectors_are_added(vectors, documents, trained_with, monkeypatch):
    """With the first vectors of its shard, or with all if there are fewer."""
    monkeypatch.setattr(shards, "WINDOW", 40)
    monkeypatch.setitem(LOCAL_ENGINES, "trained", Trained)
    monkeypatch.setitem(ann_util.ENGINES, "trained", Trained)
    index = ShardedIndex(manifest_of("trained", documents, 32, 2), 2)
    fill(index, vectors[:documents])
    for shard, count in zip(index._shards.values(), trained_with, strict=True):
        assert shard.engine.trained_with.tolist() == shard.engine.all_vectors()[:count].tolist()
    assert index.search(vectors[:documents], 1).rows[:, 0].tolist() == list(range(documents))
    assert index.vectors(np.array([3, -1, 149])).tolist() == [vectors[3].tolist(), [0] * 32, vectors[149].tolist()]


@pytest.mark.parametrize("change", [
    {"index_shards": 3}, {"dimension": 128}, {"rows": 10}, {"rows": None}, {"files": []}, {"foo": 1}, {"ann_recall": 3},
    {"ann_engine": ["exact"]}, {"precision": 5}, {"search_settings": None}])
def test_an_edited_manifest_is_damaged(tmp_path, change):
    """Whatever the edit is: it would give other answers, or end in a traceback."""
    manifest_of("exact", 9, 4, 1).save(str(tmp_path))
    assert ann_util.read_manifest(str(tmp_path), Manifest()).rows == 9
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **change}), encoding="utf-8")
    assert ann_util.peek_manifest(str(tmp_path)) == {}
    with pytest.raises(InputError, match="index_path .*: damaged: manifest.json is not what was written; name another"):
        ann_util.read_manifest(str(tmp_path), Manifest())


def test_an_index_in_another_precision_is_refused_with_advice(tmp_path):
    Manifest(precision="int8", ann_engine="none").save(str(tmp_path))
    with pytest.raises(InputError, match="index_path .*: has ann_engine none, which is not among those of this"):
        ann_util.read_manifest(str(tmp_path), Manifest())
    Manifest(precision="int8", ann_engine="exact").save(str(tmp_path))
    with pytest.raises(InputError, match="was built with precision int8, not fp16; --precision int8 with --device cpu "
                       "takes it as it is; or name another folder"):
        ann_util.read_manifest(str(tmp_path), Manifest(precision="fp16"))


def test_what_is_no_damage_is_not_called_that(tmp_path, monkeypatch):
    """An error of an engine before it reads anything."""
    def refuse_settings(self, *arguments):
        raise RuntimeError("no such GPU")

    documents = documents_of(tmp_path, "甲")
    index = ShardedIndex(manifest_of("exact", 1, 4, 1))
    index.manifest.corpus = file_digest(documents.corpus.path)
    fill(index, np.ones((1, 4), "float32"))
    ann_util.save_index(str(tmp_path / "index"), index, documents)
    manifest = ann_util.read_manifest(str(tmp_path / "index"), Manifest())
    monkeypatch.setattr(LOCAL_ENGINES["exact"], "__init__", refuse_settings)
    with pytest.raises(RuntimeError, match="^no such GPU$"):
        ann_util.load_index(str(tmp_path / "index"), manifest)
    with pytest.raises(RuntimeError, match="^no such GPU$"):
        PreviousIndex.open(str(tmp_path / "index")).read_vectors(index.vector_map, [np.arange(1)])


@pytest.mark.parametrize("name, content", [
    ("fingerprint.json", {"ann_engine": "exact", "index_format": 2, "precision": "fp32"}),
    ("manifest.json", {"ann_engine": "exact", "format": FORMAT - 1}),
    ("manifest.json", {"ann_engine": "exact", "format": FORMAT + 1, "unheard": "of"})])
def test_a_kept_index_of_another_version_is_refused(checkpoint, sample, tmp_path, name, content):
    """In one line, with what to do."""
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / name).write_text(json.dumps(content))
    line = refuse("recall.py", "--device", "cpu", "--params_path", checkpoint, "--query", "语义", "--index_path",
                  "index", *FP32, cwd=tmp_path)
    assert ("--index_path index: another version of recall.py built it; name another folder, or remove this one to "
            "build it again") in line


def test_a_manifest_says_what_differs(tmp_path):
    """What is wanted and not given is not compared, nor are search settings and the state of the corpus."""
    kept = Manifest(model="a" * 64, max_seq_length=32, ann_engine="hnswlib", passages=False, index_shards=8,
                    document_prefix="", build_settings={"hnsw_m": 32}, search_settings={"hnsw_ef": 100}, corpus="c",
                    corpus_columns=1, files={"shard_0.bin": "d"})
    kept.save(str(tmp_path))
    assert Manifest.load(str(tmp_path), "--index_path x", "") == kept
    assert kept.differences(Manifest()) == []
    assert kept.differences(Manifest(search_settings={"hnsw_ef": 7}, corpus="other", passages=None)) == []
    wanted = Manifest(model="b" * 64, max_seq_length=64, passages=True, build_settings={"hnsw_m": 8, "lists": 4})
    assert kept.differences(wanted) == ["another model", "max_seq_length 32, not 64", "passages False, not True",
                                        "hnsw_m 32, not 8", "another lists"]
    assert kept.has_corpus_of(Manifest()) and kept.has_corpus_of(Manifest(corpus="c", corpus_columns=1))
    assert not kept.has_corpus_of(Manifest(corpus="other")) and not kept.has_corpus_of(Manifest(corpus_columns=2))


def test_an_index_of_another_int8_graph_is_warned_of(tmp_path, capsys):
    """As far as both are known: a manifest may lack what its graph was calibrated with."""
    kept = Manifest(precision="int8", calibration="a")
    for wanted in ("a", None):
        kept.warn_other_calibration(Manifest(calibration=wanted), "--index_path x", "remove it")
    Manifest().warn_other_calibration(Manifest(calibration="b"), "--index_path x", "remove it")
    assert not capsys.readouterr().err
    kept.warn_other_calibration(Manifest(calibration="b"), "--index_path x", "remove it")
    assert capsys.readouterr().err == ("--index_path x: was made by an int8 graph with another calibration file, so "
                                       "that cosines are a little off; use that graph, or remove it\n")
    assert ann_util.manifest_to_build(Manifest(calibration="b"), kept).calibration == "a"
    content = dataclasses.asdict(kept)
    del content["calibration"]
    assert Manifest.from_dict(content, "", "").calibration is None
    del content["model"]
    with pytest.raises(InputError, match="its manifest lacks fields"):
        Manifest.from_dict(content, "", "")


def test_what_an_index_is_built_with():
    """What is wanted, else what the previous index has, else the defaults; what depends on the corpus is new."""
    first = ann_util.manifest_to_build(Manifest(max_seq_length=9, build_settings={"hnsw_m": 16}))
    assert (first.ann_engine, first.index_shards, first.passages) == ("hnswlib", None, False)
    assert first.build_settings == {"hnsw_m": 16, "hnsw_max_elements": None}
    assert first.search_settings == {"hnsw_ef": 100}
    previous = Manifest(ann_engine="hnswlib", index_shards=3, passages=True, corpus="before",
                        build_settings={"hnsw_m": 7, "hnsw_max_elements": 50}, search_settings={"hnsw_ef": 40})
    again = ann_util.manifest_to_build(Manifest(corpus="now"), previous)
    assert (again.ann_engine, again.index_shards, again.passages, again.corpus) == ("hnswlib", None, True, "now")
    assert again.build_settings == {"hnsw_m": 7, "hnsw_max_elements": None}
    assert again.search_settings == {"hnsw_ef": 40}
    assert ann_util.manifest_to_build(Manifest(index_shards=5), previous).index_shards == 5
    assert ann_util.manifest_to_build(Manifest(ann_engine="exact")).build_settings == {}


def test_ann_recall_counts_what_is_missing():
    exact = np.array([[0.9, 0.8, 0.7], [0.5, 0.4, 0.3]])
    assert ann_recall(exact, exact) == 1
    assert ann_recall(np.array([[0.9, 0.7, 0.6], [0.5, 0.2, 0.1]]), exact) == 0.5


def test_hnsw_agrees_with_exact_on_a_small_corpus(vectors):
    index = engine_of("hnswlib", 32, 600)
    index.add(vectors[100:400])
    index.add(vectors[400:])
    rows, cosines = index.search(vectors[:100], 50, 2)
    exact_rows, exact_cosines = exact_search(vectors[:100], vectors[100:], 50)
    assert np.mean([len(set(a) & set(b)) / 50 for a, b in zip(rows, exact_rows)]) > 0.98
    same = rows == exact_rows
    np.testing.assert_allclose(cosines[same], exact_cosines[same], atol=1e-5)


def bytes_in_huge_pages():
    """The bytes of this process in pages of 2 MB."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return sum(1024 * int(line.split()[1]) for line in file if line.startswith("AnonHugePages"))


def test_a_large_graph_is_built_in_huge_pages():
    """The vectors, 3 MB, are too few for numpy to ask for such pages."""
    if not huge_pages._gives_huge_pages_on_request():
        pytest.skip(f"{huge_pages.HUGE_PAGE_POLICY} is not madvise")
    vectors = np.random.default_rng(0).standard_normal((3000, 256), "float32")
    small, large = (engine_of("hnswlib", 256, capacity, hnsw_m=8, hnsw_ef=8) for capacity in (500, 80_000))
    before = bytes_in_huge_pages()
    small.add(vectors[:500])
    assert bytes_in_huge_pages() == before
    large.add(vectors)
    assert bytes_in_huge_pages() >= before + 2 * 2**20


@pytest.mark.parametrize("missing", ["HUGE_PAGE_POLICY", "MEMORY_MAP", "madvise", None])
def test_asking_for_huge_pages_never_fails(missing, tmp_path, monkeypatch):
    """Whatever is not there, and where the system refuses."""
    asked = []
    library = SimpleNamespace(madvise=lambda start, size, advice: asked.append(size.value) or -1)
    monkeypatch.setattr(huge_pages.ctypes, "CDLL", lambda name: object() if missing == "madvise" else library)
    (tmp_path / "policy").write_text("always [madvise] never\n")
    before = "50000000-60000000 rw-p 00000000 00:00 0 \n"
    (tmp_path / "maps").write_text(before)
    for name, file in (("HUGE_PAGE_POLICY", "policy"), ("MEMORY_MAP", "maps")):
        monkeypatch.setattr(huge_pages, name, str(tmp_path / ("none" if missing == name else file)))
    with huge_pages.huge_pages():
        (tmp_path / "maps").write_text(before +
                                       "10000000-20000000 rw-p 00000000 00:00 0 \n"
                                       "20000000-30000000 r--p 00000000 00:00 0 \n"
                                       "30000000-40000000 rw-p 00000000 00:00 0          [heap]\n"
                                       "40000000-40300000 rw-p 00000000 00:00 0 \n")
    assert asked == ([] if missing else [0x10000000])


@pytest.mark.parametrize("k", [400, 600, 5000])
def test_more_neighbours_than_ef_or_elements(vectors, k):
    index = engine_of("hnswlib", 32, 1000, hnsw_m=16, hnsw_ef=10)
    index.add(vectors[100:])
    rows, cosines = index.search(vectors[:5], k, 1)
    assert rows.shape == cosines.shape == (5, min(k, 600))
    assert all(len(set(row)) == len(row) for row in rows.tolist())
    assert (np.diff(cosines, axis=1) <= 1e-6).all()


def test_an_unreachable_graph_is_an_input_error():
    """1000 copies of two texts with two links a node: hnswlib alone raises RuntimeError."""
    corpus = np.repeat(np.eye(2, 8, dtype="float32"), 1000, axis=0)
    index = engine_of("hnswlib", 8, 2000, hnsw_m=2, hnsw_ef=2)
    index.add(corpus)
    try:
        rows, _ = index.search(corpus[:1], 2000, 1)
    except InputError as error:
        assert "--hnsw_m" in str(error)
    else:
        assert sorted(rows[0].tolist()) == list(range(2000))


@pytest.mark.parametrize("granted, warned, said", [
    (10.0, False, "this process needs about 0.70 GB of memory; 10.20 GB are available"),
    (0.8, True, "this process needs about 0.70 GB of memory; 1.00 GB are available"),
    (0.3, True, "this process needs about 0.70 GB of memory; 0.50 GB are available: the system may kill it")])
def test_what_it_needs_is_said_before_the_work(monkeypatch, capsys, granted, warned, said):
    """0.2 GB are taken, 0.5 GB come to them; with --quiet there are warnings alone."""
    monkeypatch.setattr(memory, "available_memory", lambda: granted * 1e9)
    monkeypatch.setattr(memory, "resident_memory", lambda: 2 * 10**8)
    memory.announce_memory(5 * 10**8)
    assert said in capsys.readouterr().err
    monkeypatch.setattr(console.settings, "quiet", True)
    memory.announce_memory(5 * 10**8)
    assert bool(capsys.readouterr().err) == warned
    monkeypatch.setattr(memory, "available_memory", lambda: math.inf)
    memory.announce_memory(5 * 10**8)
    assert not capsys.readouterr().err
    assert 10**7 < machine.resident_memory() < 10**11


def test_the_memory_of_encoding_is_estimated(tmp_path):
    """The engine's, and the tokens of two windows at most; a graph's kernels copy the weights without the tokens'."""
    engine = SimpleNamespace(bytes_needed=1000, max_positions=512, batch_tokens=2048)
    encoder = Encoder(engine, None, max_seq_length=64)
    assert encoder.bytes_needed(10) == 1000 + 40 * 10 * 64
    assert encoder.bytes_needed(10**6) == 1000 + 40 * 2 * WINDOW * 64
    (tmp_path / "weights").write_bytes(bytes(5000))
    assert layer_bytes({"vocab_size": 100, "hidden_size": 10}, str(tmp_path / "weights")) == 1000


def test_the_memory_of_an_index_is_counted():
    manifest = manifest_of("exact", 1000, 256, 8)
    assert ShardedIndex(manifest).bytes_needed == 4 * 256 * 1000
    assert ShardedIndex(manifest, rank=1, ranks=2).bytes_needed == 4 * 256 * 500


@pytest.mark.parametrize("rank", [0, 3])
def test_the_memory_of_ranks_on_one_machine_is_that_of_their_shards(rank, monkeypatch):
    """Whichever of them has these: the first of four, or two of the first four and one of the others."""
    monkeypatch.setattr(shards, "LOCAL_RANKS", 4)
    assert ShardedIndex(manifest_of("exact", 1000, 256, 1), rank=rank, ranks=4).bytes_needed == 256 * 1000
    five = manifest_of("exact", 1000, 256, 5)
    assert ShardedIndex(five, rank=rank, ranks=8).bytes_needed == 256 * 800
    assert ShardedIndex(five, rank=rank + 4, ranks=8).bytes_needed == 256 * 200
    monkeypatch.setattr(shards, "available_memory", lambda: 1023)
    with pytest.raises(InputError, match="the index of 1,000 vectors of 256 needs 0.00 GB of memory, and 0.00 are"):
        ShardedIndex(manifest_of("exact", 1000, 256, 1), rank=rank, ranks=4)


def test_too_little_memory_says_how_much(monkeypatch):
    """All shards of the process together, before any is made; of several ranks each has a part of them."""
    monkeypatch.setattr(shards, "available_memory", lambda: 10**9)
    made = []
    monkeypatch.setattr(LOCAL_ENGINES["hnswlib"], "__init__", lambda self, *arguments: made.append(arguments))
    manifest = manifest_of("hnswlib", 10**6, 256, 8)  # 0.17 GB a shard
    with pytest.raises(InputError, match=r"the index of 1,000,000 vectors of 256 needs 1\.\d\d GB .* 1\.00 are free"):
        ShardedIndex(manifest)
    assert not made
    ShardedIndex(manifest, rank=1, ranks=2)
    assert len(made) == 4
    with pytest.raises(InputError, match=r"the index of 10,000,000 vectors of 256 needs 10\.\d\d GB .* 1\.00 are free"):
        ShardedIndex(manifest_of("exact", 10**7, 256, 8))
    monkeypatch.undo()
    assert 10**8 < machine.available_memory() < 10**13


@pytest.fixture(scope="module")
def csl(real_data):
    """6,092 abstracts, their vectors and those of 250 titles, of the beginning of each."""
    from model import SimCSE
    from simcse.encoder.encoder import Encoder
    from simcse.encoder.pretrained import load_pretrained

    folder = real_data / "csl" / "recall"
    documents = Documents(Corpus(str(folder / "corpus.csv"), "--flag"))
    queries = [query for query, _ in read_text_pairs(str(folder / "dev.csv"), "--flag")[:250]]
    network = SimCSE(load_pretrained(str(ENCODER)))
    encoder = Encoder(make_engine(network), load_tokenizer(str(ENCODER)), 16)
    return documents, encoder.encode(documents[:]), encoder.encode(queries)


@pytest.mark.parametrize("engine", for_engines(name for name, kind in LOCAL_ENGINES.items() if kind.approximate))
def test_csl_by_approximate_engines_against_exact(csl, engine):
    """All find at least 0.99 of the exact 50 with their defaults."""
    documents, vectors, queries = csl
    exact = exact_search(queries, vectors, 50)
    index = ShardedIndex(manifest_of(engine, len(documents), vectors.shape[1], 1))
    fill(index, vectors)
    assert ann_recall(index.search(queries, 50).scores, exact.scores) >= 0.99


def test_csl_in_milvus_lite_against_exact(csl, tmp_path, monkeypatch):
    pytest.importorskip("pymilvus", reason="requirements-milvus.txt is not installed")
    monkeypatch.chdir(tmp_path)
    documents, vectors, queries = csl
    exact = exact_search(queries, vectors, 50)
    index = fill_collection(documents, vectors)
    assert ann_recall(index.search(queries, 50).scores, exact.scores) >= 0.99
    index.close()


def test_what_the_approximation_costs_is_measured_and_advice_was_tried(tmp_path, capsys):
    random = np.random.default_rng(1)
    vectors = random.standard_normal((4000, 64)).astype("float32")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = ShardedIndex(manifest_of("hnswlib", 4000, 64, 1, hnsw_m=4, hnsw_ef=2))
    fill(index, vectors)
    measured = index.measure(vectors[:100], 10, "documents")
    exact = index._search_vectors(vectors[:100], 10, exact=True)
    found = index.search(vectors[:100], 10)
    assert measured.recall == round(ann_recall(found.scores, exact.scores), 4) < 0.9
    assert measured.deeper_recall > measured.recall and index.search_settings == {"hnsw_ef": 2}
    assert (measured.settings, measured.deeper_settings) == ({"hnsw_ef": 2}, {"hnsw_ef": 80})
    Manifest(ann_recall=measured).save(str(tmp_path))
    assert Manifest.load(str(tmp_path), "", "").ann_recall == measured
    report_ann_recall(measured)
    line = capsys.readouterr().err
    assert line == (f"ANN recall@10 against exact search, 100 documents: {measured.recall:.4f} with --hnsw_ef 2; "
                    f"--hnsw_ef 80 finds {measured.deeper_recall:.4f}; larger values may find more, "
                    "--ann_engine exact finds all\n")
    report_ann_recall(dataclasses.replace(measured, deeper_recall=0.995))
    assert capsys.readouterr().err.endswith(" with --hnsw_ef 2; --hnsw_ef 80 finds 0.9950\n")
    report_ann_recall(dataclasses.replace(measured, deeper_recall=measured.recall))
    assert "; --ann_engine exact finds all, --hnsw_ef 80 does not help\n" in capsys.readouterr().err
    report_ann_recall(dataclasses.replace(measured, recall=0.999), {"hnsw_ef": 7})
    assert capsys.readouterr().err.endswith(
        ": 0.9990 with --hnsw_ef 2; this search has --hnsw_ef 7, with which it was not measured\n")
    deeper = dataclasses.replace(measured, deeper_recall=0.995)
    report_ann_recall(deeper, {"hnsw_ef": 80}, rows=4001)
    assert capsys.readouterr().err.endswith(", measured when it had 4,000 rows instead of 4,001; this search has "
                                            "--hnsw_ef 80, which finds 0.9950\n")
    report_ann_recall(dataclasses.replace(measured, deeper_recall=0.95), {"hnsw_ef": 80}, rows=4000)
    assert capsys.readouterr().err.endswith(
        "--hnsw_ef 80, which finds 0.9500; larger values may find more, --ann_engine exact finds all\n")
    report_ann_recall(AnnRecall(10, "9 queries", 1.0, {}, 1.0, {}))
    assert capsys.readouterr().err.endswith("9 queries: 1.0000 with its default settings\n")


def test_an_exact_index_has_nothing_to_measure():
    index = ShardedIndex(manifest_of("exact", 9, 4, 1))
    fill(index, np.eye(9, 4, dtype="float32"))
    assert index.measure(np.ones((1, 4), "float32"), 3, "queries") is None
