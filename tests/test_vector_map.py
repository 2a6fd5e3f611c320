"""Rows of which the encoder reads the same share a vector: the map, the index, and what a changed corpus does to it."""

from types import SimpleNamespace

import ann_util
from simcse import console
from simcse.console import InputError
from simcse.encoder.encoder import EncoderInput
from simcse.files import file_digest
from simcse.index.ann_recall import ann_recall
from simcse.index.documents import Documents
from simcse.index.exact import exact_search
from simcse.index.hits import Ranking, hits_of, search
from simcse.index.manifest import Manifest
from simcse.index.protocols import SearchResult
from simcse.index.shards import ShardedIndex
from simcse.index.vector_map import VectorMap
from simcse.text.keys import UNKNOWN_KEY
from simcse.text.passages import Passages
from simcse.text.textfile import Corpus
from simcse.text.tokens import Tokens

import numpy as np
import pytest
from indexes import documents_of, fill, for_engines, manifest_of

LENGTH = 6  # tokens that the encoder of these tests reads
SPECIAL = 2  # of them, [CLS] and [SEP]


class LowercaseEncoder:
    """Reads the first characters of a text, whatever their case, without blanks; "?" is [UNK]."""

    embedding_size = 16
    max_seq_length = LENGTH
    precision = "fp32"

    def __init__(self):
        self.encoded = []

    def bytes_needed(self, texts):
        return 0

    def max_document_length(self):
        return LENGTH

    def tokenizer(self, texts, max_length):
        return [[1, *map(ord, text.lower().replace(" ", ""))][: max_length - 1] + [2] for text in texts]

    def tokenize(self, texts):
        whole = Tokens.of(self.tokenizer(texts, LENGTH + 1))
        unknown = [row for row, ids in enumerate(whole) if set(ids[1:-1]) == {ord("?")}]
        return EncoderInput(whole.truncate(LENGTH), whole.lengths, unknown)

    def encode(self, texts, warn=True):
        inputs = self.tokenize(texts)
        vectors = np.array([np.random.default_rng(ids).standard_normal(16) for ids in inputs.ids])
        vectors[inputs.unknown] = 0
        return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)).astype("float32")

    def stream(self, texts, windows, warn=True):
        for rows in windows:
            block = texts[np.asarray(rows)]
            self.encoded += block
            yield self.encode(block) if block else np.empty((0, 16), "float32")


def build(folder, lines, engine="exact", passages=False, follows=False):
    """Build the index of some lines in a folder, or have it follow them; return it, and the texts that were encoded."""
    (folder / "corpus.csv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    corpus = Corpus(str(folder / "corpus.csv"), "--corpus_file")
    path = str(folder / "index")
    encoder = LowercaseEncoder()
    manifest = ann_util.manifest_to_build(Manifest(ann_engine=engine, index_shards=2, passages=passages))
    manifest.corpus = file_digest(corpus.path)
    manifest.corpus_columns = corpus.columns
    previous_path = path if follows else None
    index, documents = ann_util.build_index(corpus, encoder, manifest, threads=1, previous_path=previous_path)
    ann_util.save_index(path, index, documents)
    index.close()
    index, documents = ann_util.load_index(path, ann_util.read_manifest(path, Manifest()), threads=1)
    return index, documents, encoder.encoded


def lines_found(index, documents, text, k):
    """The numbers of the lines that a text finds, and the cosines."""
    hits, = hits_of(search(index, documents, LowercaseEncoder().encode([text]), k), documents, [k])
    return [hit.line for hit in hits], [hit.score for hit in hits]


def test_vectors_are_numbered_by_their_first_rows(tmp_path):
    built = VectorMap.of_keys(np.array([9, 4, 9, 7, 4, 9]))
    built.save(str(tmp_path))
    for each in (built, VectorMap.load(str(tmp_path), 6)):
        assert each.keys.tolist() == [9, 4, 7] and each.vector_count == 3
        assert each.vector_of_row.tolist() == [0, 1, 0, 2, 1, 0]
        assert each.first_rows(slice(None)).tolist() == [0, 1, 3]
        assert each.first_rows(np.array([2, 0])).tolist() == [3, 0]
        assert each.vector_ids_of(np.array([5, -1, 3])).tolist() == [0, -1, 2]


@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_rows_of_vectors_against_lists(k):
    random = np.random.default_rng(k)
    keys = random.integers(0, 6, 20)
    mapped = VectorMap.of_keys(keys)
    vectors = np.array([random.permutation(mapped.vector_count)[:4] for _ in range(5)])
    vectors[3, 2:] = -1
    scores = -np.sort(random.random((5, 4)).astype("float32"))
    found = mapped.expand(SearchResult(vectors, scores), k)
    for query in range(5):
        expected = []
        for vector, score in zip(vectors[query], scores[query]):
            if vector >= 0:
                expected += [(row, score) for row in np.flatnonzero(keys == mapped.keys[vector])]
        expected = (expected + [(-1, -np.inf)] * k)[:k]
        assert list(zip(found.rows[query].tolist(), found.scores[query])) == expected


def test_texts_of_the_same_tokens_do_not_break_the_graph(tmp_path):
    """Five token sequences 2,000 times each among 2,000 others: hnswlib finds what exact search over all rows does."""
    random = np.random.default_rng(0)
    keys = random.permutation(np.append(np.arange(5, 2005), np.repeat(np.arange(5), 2000)))
    vector_of_key = random.standard_normal((2005, 32)).astype("float32")
    vector_of_key /= np.linalg.norm(vector_of_key, axis=1, keepdims=True)
    vectors = vector_of_key[keys]
    queries = vector_of_key[:50] + 0.1 * random.standard_normal((50, 32)).astype("float32")
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    exact = exact_search(queries, vectors, 10)
    index = ShardedIndex(manifest_of("hnswlib", len(keys), 32, 2, hnsw_m=16, hnsw_ef=50), 1, VectorMap.of_keys(keys))
    assert sum(len(rows) for rows in index.missing_rows) == 2005
    fill(index, vectors)
    found = index.search(queries, 10)
    assert ann_recall(found.scores, exact.scores) > 0.99
    np.testing.assert_allclose(np.take_along_axis(queries @ vectors.T, found.rows, axis=1), found.scores, atol=1e-5)
    nearest = [np.flatnonzero(keys == key)[:10].tolist() for key in keys[exact.rows[:, 0]]]
    assert found.rows[:5].tolist() == nearest[:5]  # the first ten of 2,000 rows
    assert (index.vectors(found.rows[0]) == vectors[found.rows[0]]).all()


@pytest.mark.parametrize("engine", for_engines())
def test_documents_that_the_encoder_cannot_tell_apart(tmp_path, capfd, engine):
    """One vector and one encoding for case, spacing and what is cut off; each line is found, with its own text."""
    lines = ["USB 线", "别的", "usb线", "一二三四五", "USB 线", "一二三四六七", "??", "?", "u s b 线"]
    index, documents, encoded = build(tmp_path, lines, engine)
    assert encoded == ["USB 线", "别的", "一二三四五", "??"]
    said = capfd.readouterr().err
    assert "4 vectors for 8 documents: those that are the same to the encoder share one" in said
    assert "encoding and indexing 4 of 8 documents in fp32; 1 more line is a copy, --distinct gives" in said
    assert "2 of 8 texts are longer than 6 tokens" in said and "2 of 8 texts are all [UNK]" in said
    found, scores = lines_found(index, documents, "usb线", 5)
    assert found[:4] == [1, 5, 3, 9] and scores[3] > 0.999 > scores[4]
    hits, = hits_of(search(index, documents, LowercaseEncoder().encode(["usb线"]), 9), documents, [9], distinct=True)
    assert [hit.document for hit in hits[:3]] == ["USB 线", "usb线", "u s b 线"] and len(hits) == 8
    assert lines_found(index, documents, "一二三四", 2)[0] == [4, 6]


def test_a_changed_corpus_encodes_token_sequences_that_are_new(tmp_path, capfd):
    build(tmp_path, ["USB 线", "别的", "usb线", "充电器"])
    lines = ["新的", "usb  线", "别的", "别 的", "新 的"]
    index, documents, encoded = build(tmp_path, lines, follows=True)
    assert encoded == ["新的"] and "5 documents: 4 new, 3 gone" in capfd.readouterr().err
    assert lines_found(index, documents, "别的", 2)[0] == [3, 4]
    followed = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    (tmp_path / "new").mkdir()
    build(tmp_path / "new", lines)
    assert followed == {path.name: path.read_bytes() for path in (tmp_path / "new" / "index").iterdir()}


@pytest.mark.parametrize("follows", [False, True])
def test_passages_share_a_vector_where_their_documents_have_the_same_tokens(tmp_path, follows):
    """So the mean that is blended in is the same; the cosines are those of an index without sharing."""
    lines = ["Ab。cd。", "ab 。 CD。", "ab。xx。", "？？。ab。", "ab。ab。", "??", "? ?"]
    if follows:
        build(tmp_path, lines[2:5], passages=True)
    index, documents, _ = build(tmp_path, lines, passages=True, follows=follows)
    assert documents.row_count == 12 and index.vector_map.vector_count == 12 - 2 - 1 - 1
    own = Documents(Corpus(str(tmp_path / "corpus.csv"), "--flag"))
    own.passages = Passages.split(own, LowercaseEncoder().tokenizer, LENGTH)
    pieces = [np.arange(12)]
    encoded = LowercaseEncoder().stream(own.passages, own.passages.rows_to_encode(pieces))
    vectors, = own.passages.blend_with_documents(pieces, encoded)
    np.testing.assert_allclose(index.vectors(np.arange(12)), vectors, atol=1e-6)
    queries = LowercaseEncoder().encode(["cd。", "ab。"])
    best = (queries @ vectors.T)
    of_documents = [[max(best[query][own.passages.rows_of(document)]) for document in range(7)] for query in range(2)]
    found = search(index, documents, queries, 7)
    np.testing.assert_allclose(found.scores, -np.sort(-np.array(of_documents)), atol=1e-6)
    hits, = hits_of(Ranking(*(column[:1] for column in found)), documents, [2])
    assert [(hit.line, hit.passage) for hit in hits] == [(1, "cd。"), (2, "CD。")]


def test_rows_that_a_collection_lacks_are_warned_of_before_it_is_changed(tmp_path, capfd, monkeypatch):
    """With --strict_data the rows that it has are looked at, too."""
    class Update:
        bytes_needed = 0
        changed = 0
        missing_rows = []

        def start(self):
            assert "longer than" in capfd.readouterr().err
            Update.changed += 1

        def has_to_be_measured(self):
            return False

        def add(self, *_):
            pass

        def finish(self):
            pass

    monkeypatch.setattr(ann_util, "MilvusIndex", lambda *_: SimpleNamespace(manifest=None))
    monkeypatch.setattr(ann_util, "compare_with_corpus", lambda *_: Update())
    (tmp_path / "corpus.csv").write_text("??\n一二三四五\nab\n一二三四六\ncd\n", encoding="utf-8")
    corpus = Corpus(str(tmp_path / "corpus.csv"), "--corpus_file")
    encoder = LowercaseEncoder()
    monkeypatch.setattr(console.settings, "strict_data", True)
    monkeypatch.setattr(Update, "missing_rows", [np.array([4])])
    with pytest.raises(InputError, match=r"2 of 5 texts are longer than 6 tokens and cut; .*corpus.csv:2, "):
        ann_util.open_collection("x.db", "texts", Manifest(ann_engine="milvus"), corpus=corpus, encoder=encoder)
    assert encoder.encoded == [] and not Update.changed
    monkeypatch.setattr(console.settings, "strict_data", False)
    monkeypatch.setattr(Update, "missing_rows", [np.array([1, 2])])
    ann_util.open_collection("x.db", "texts", Manifest(ann_engine="milvus"), corpus=corpus, encoder=encoder)
    assert encoder.encoded == ["一二三四五", "ab"] and Update.changed


def test_all_unknown_texts_have_one_key():
    inputs = LowercaseEncoder().tokenize(["?", "???", "a", "A"])
    keys = inputs.keys()
    assert keys[:2].tolist() == [UNKNOWN_KEY] * 2 and keys[2] == keys[3] != UNKNOWN_KEY


def test_a_tie_across_vectors_keeps_the_rows_of_a_vector_together(tmp_path):
    """All cosines of an unknown query are 0."""
    index, documents, _ = build(tmp_path, ["ab", "cd", "AB", "ef"])
    assert lines_found(index, documents, "?", 3)[0] == [1, 3, 2]


@pytest.mark.parametrize("passages", [False, True])
def test_a_corpus_without_new_texts_is_followed(tmp_path, passages):
    lines = ["Ab。cd。", "ab 。 CD。", "ab。xx。", "?"]
    build(tmp_path, lines, passages=passages)
    index, documents, encoded = build(tmp_path, lines[:2], passages=passages, follows=True)
    assert encoded == [] and lines_found(index, documents, "ab。", 9)[0] == [1, 2]


def test_an_index_is_measured_with_parts_of_documents_not_with_documents(tmp_path):
    texts = [f"{number}甲乙丙丁" for number in range(100, 350)]
    documents = documents_of(tmp_path, *texts)
    halves = ann_util.halves_of(documents)
    assert halves[:2] == ["甲乙丙丁", "甲乙丙丁"] and len(halves) == 84 and not set(halves) & set(texts)
