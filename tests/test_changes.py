"""An index that follows its corpus: what is encoded again, and that the result is as if built from nothing."""

import os
import re
import signal
import subprocess
import sys
import weakref
import zlib

import ann_util
from simcse.encoder.encoder import EncoderInput
from simcse.files import file_digest
from simcse.index import previous, shards
from simcse.index.engines import DEFAULT_ENGINE
from simcse.index.hits import hits_of, search
from simcse.index.manifest import Manifest
from simcse.text.textfile import Corpus
from simcse.text.tokens import Tokens

import numpy as np
import pytest
from conftest import FP32, ROOT, contents, read_texts, refuse, succeed, succeed_on
from indexes import for_engines


def write(path, texts):
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


@pytest.fixture
def changed(sample, tmp_path):
    """The sample's corpus in two states: with copies, lines gone, new ones at the beginning and in between.

    New ones have a multiple of LENGTH_MULTIPLE tokens, [CLS] and [SEP] included: the longest text of a window is not
    padded further, and on some processors the last bits of an embedding depend on the padding.
    """
    before = read_texts(sample / "corpus.csv")
    after = ["全新的文本啊", *before[3:60], "另一条也是新的文本啊", *before[60:], before[10], "末尾的文本啊"]
    write(tmp_path / "before.csv", [*before, before[0]])
    write(tmp_path / "after.csv", after)
    return tmp_path


def recall(checkpoint, sample, *flags):
    """Texts are encoded one by one, so that an embedding does not depend on what is beside it in a batch."""
    return ["recall.py", "--device", "cpu", "--params_path", checkpoint, "--similar_text_pair", sample / "dev.csv",
            *FP32, "--batch_size", 1, *flags]


def check_following(checkpoint, sample, changed, engine, ranks):
    """The result is that of an index built from nothing."""
    flags = recall(checkpoint, sample, "--ann_engine", engine)
    succeed(*flags, "--corpus_file", "before.csv", "--index_path", "kept", cwd=changed)
    (changed / "kept" / "bm25").mkdir()  # of the corpus of before
    (changed / "kept" / "notes.txt").write_text("the user's own")
    said = succeed_on(ranks, *flags, "--corpus_file", "after.csv", "--index_path", "kept", cwd=changed)
    assert "120 documents: 3 new, 3 gone" in said
    assert "removed the BM25 index of the previous corpus; --hybrid_bm25 builds it again" in said
    result = (changed / "recall_result_dir" / "recall_result.txt").read_bytes()
    succeed(*flags, "--corpus_file", "after.csv", "--index_path", "new", cwd=changed)
    assert (changed / "recall_result_dir" / "recall_result.txt").read_bytes() == result
    kept = contents(changed / "kept")
    assert kept.pop("notes.txt") and kept == contents(changed / "new") and not (changed / "kept" / "bm25").exists()


@pytest.mark.parametrize("engine", for_engines())
def test_the_result_is_that_of_an_index_built_from_nothing(checkpoint, sample, changed, engine):
    check_following(checkpoint, sample, changed, engine, ranks=1)


def test_the_result_of_two_ranks_is_that_of_an_index_built_from_nothing(checkpoint, sample, changed):
    check_following(checkpoint, sample, changed, DEFAULT_ENGINE, ranks=2)


def test_what_is_refused_and_what_is_nothing_new(checkpoint, sample, changed):
    flags = recall(checkpoint, sample, "--index_path", "kept")
    succeed(*flags, "--corpus_file", "before.csv", cwd=changed)
    before = contents(changed / "kept")
    assert "was built with max_seq_length 32, not 9" in refuse(
        *flags, "--corpus_file", "after.csv", "--max_seq_length", 9, cwd=changed)
    write(changed / "other.csv", ["没有一条", "是以前的"])
    assert "was built with another corpus, of which no text is in other.csv" in refuse(
        *flags, "--corpus_file", "other.csv", cwd=changed)
    assert contents(changed / "kept") == before
    write(changed / "numbered.csv", [f"d{row}\t{text}" for row, text in enumerate(read_texts(changed / "before.csv"))])
    said = succeed(*flags, "--corpus_file", "numbered.csv", cwd=changed).stderr
    assert "120 documents: 0 new, 0 gone" in said
    assert "d0" in succeed(*flags[:5], "--index_path", "kept", "--query", "甲", "--format", "jsonl", "--top_k", 121,
                           cwd=changed).stdout
    (changed / "kept" / "shard_0.bin").write_bytes(b"damaged")
    assert "shard_0.bin is not what was written" in refuse(*flags, "--corpus_file", "after.csv", cwd=changed)


def test_killed_while_it_follows_the_old_index_stays(checkpoint, sample, changed):
    flags = recall(checkpoint, sample, "--index_path", "kept")
    succeed(*flags, "--corpus_file", "before.csv", cwd=changed)
    before = contents(changed / "kept")
    code = ("import os, runpy, signal, sys, ann_util; sys.argv = sys.argv[1:]; "
            "ann_util.Documents.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    words = [sys.executable, "-c", code, *(str(ROOT / word) if word == "recall.py" else str(word) for word in flags)]
    killed = subprocess.run([*words, "--corpus_file", "after.csv"], cwd=changed, capture_output=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert contents(changed / "kept") == before
    said = succeed(*flags, "--corpus_file", "after.csv", cwd=changed).stderr
    assert "3 new, 3 gone" in said
    assert [path.name for path in changed.iterdir() if "kept" in path.name] == ["kept"]


class StandInEncoder:
    """Gives each text a vector of its own, and notes the texts that it was asked for."""

    embedding_size = 16
    max_seq_length = 8
    precision = "fp32"

    def __init__(self):
        self.encoded = []

    def tokenize(self, texts):
        """One token a character; a text is not cut."""
        ids = Tokens.of([[ord(character) for character in text] for text in texts])
        return EncoderInput(ids, np.ones_like(ids.lengths), [])

    def bytes_needed(self, texts):
        return 0

    def encode(self, texts, warn=True):
        vectors = np.array([np.random.default_rng(zlib.crc32(text.encode())).standard_normal(16) for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("float32")

    def stream(self, texts, windows, warn=True):
        for rows in windows:
            block = [texts[int(row)] for row in rows]
            self.encoded += block
            yield self.encode(block) if block else np.empty((0, 16), "float32")


def build(folder, name, engine, texts, previous=False, shard_count=3):
    """Build the index of some texts and keep it in a folder; returns the texts that were encoded."""
    write(folder / f"{name}.csv", texts)
    corpus = Corpus(str(folder / f"{name}.csv"), "--corpus_file")
    path, encoder = str(folder / name), StandInEncoder()
    kept = ann_util.read_manifest(path, Manifest(ann_engine=engine)) if previous else None
    manifest = ann_util.manifest_to_build(Manifest(ann_engine=engine, index_shards=shard_count), kept)
    manifest.corpus = file_digest(corpus.path)
    manifest.corpus_columns = corpus.columns
    index, documents = ann_util.build_index(corpus, encoder, manifest, threads=2,
                                            previous_path=path if previous else None)
    ann_util.save_index(path, index, documents)
    return encoder.encoded


def test_vectors_that_are_taken_over_are_in_memory_once(tmp_path, monkeypatch):
    """The memory is announced before they are read, and a piece of them is freed when it is added."""
    events = []
    pieces = []
    read_vectors = previous.PreviousIndex.read_vectors
    finish = shards.ShardedIndex.finish

    def note_pieces(*arguments):
        events.append("read")
        read = read_vectors(*arguments)
        pieces.extend(map(weakref.ref, read))
        return read

    def count_pieces(index):
        events.append(sum(piece() is not None for piece in pieces))
        finish(index)

    monkeypatch.setattr(shards, "WINDOW", 16)
    build(tmp_path, "kept", "exact", [f"文本 {number}" for number in range(100)])
    monkeypatch.setattr(ann_util, "announce_memory", lambda needed: events.append(needed))
    monkeypatch.setattr(previous.PreviousIndex, "read_vectors", note_pieces)
    monkeypatch.setattr(shards.ShardedIndex, "finish", count_pieces)
    build(tmp_path, "kept", "exact", [f"文本 {number}" for number in range(1, 101)], previous=True)
    assert events == [4 * 16 * (100 + 34), "read", 0] and len(pieces) == 7


@pytest.mark.parametrize("engine", for_engines())
def test_an_index_of_another_number_of_shards_is_searched_and_followed(engine, tmp_path):
    """One of eight, as earlier versions made them; of a changed corpus there are as many as in a new index."""
    before = [f"文本 {number}" for number in range(200)]
    build(tmp_path, "kept", engine, before, shard_count=8)
    assert (tmp_path / "kept" / "shard_7.bin").exists()
    manifest = ann_util.read_manifest(str(tmp_path / "kept"), Manifest())
    index, documents = ann_util.load_index(str(tmp_path / "kept"), manifest, threads=2)
    assert index.manifest.index_shards == 8
    ranking = search(index, documents, StandInEncoder().encode(before), 3)
    assert ranking.documents[:, 0].tolist() == list(range(200))

    assert build(tmp_path, "kept", engine, [*before[30:], "新"], previous=True, shard_count=None) == ["新"]
    build(tmp_path, "new", engine, [*before[30:], "新"], shard_count=None)
    assert contents(tmp_path / "kept") == contents(tmp_path / "new")
    assert not (tmp_path / "kept" / "shard_1.bin").exists()


@pytest.mark.parametrize("engine", for_engines())
def test_every_engine_is_built_kept_opened_searched_and_follows(engine, tmp_path, monkeypatch, capfd):
    """In small pieces, with copies; a changed corpus gives the files of an index that is built from nothing."""
    monkeypatch.setattr(shards, "WINDOW", 16)
    before = [f"文本 {number}" for number in range(200)]
    after = ["新 1", *before[30:150], "新 2", *before[150:], before[40], "新 3"]
    assert build(tmp_path, "kept", engine, [*before, before[7]]) == before
    assert build(tmp_path, "kept", engine, after, previous=True) == ["新 1", "新 2", "新 3"]
    said = capfd.readouterr().err
    assert "173 documents: 3 new, 30 gone" in said
    assert re.search("\nencoding and indexing 3 of 173 documents in fp32.*\n[0-9.]+ documents/s\n", said)
    assert len(build(tmp_path, "new", engine, after)) == 173
    assert contents(tmp_path / "kept") == contents(tmp_path / "new")

    manifest = ann_util.read_manifest(str(tmp_path / "kept"), Manifest())
    assert (manifest.ann_engine, manifest.lines, manifest.documents, manifest.rows) == (engine, 174, 173, 173)
    index, documents = ann_util.load_index(str(tmp_path / "kept"), manifest, threads=2)
    vectors = StandInEncoder().encode(documents[:])
    np.testing.assert_allclose(index.vectors(np.arange(173)), vectors, atol=1e-6)
    assert documents[:] == list(dict.fromkeys(after))
    ranking = search(index, documents, vectors, 5)
    assert ranking.documents[:, 0].tolist() == list(range(173))
    first, = hits_of(search(index, documents, vectors[documents[:].index(before[40])][None], 1), documents, [9])
    assert [(hit.document, hit.line) for hit in first] == [(before[40], 12), (before[40], 173)]
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith((
        "this process needs", "encoding and indexing", "using the index", "kept the index",
        "ANN recall")) and " documents/s" not in line]
    assert said == []
