"""Small indexes for tests, without an encoder."""

import dataclasses
import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from ann_util import manifest_to_build
from simcse.index.documents import Documents
from simcse.index.engines import LOCAL_ENGINES
from simcse.index.manifest import Manifest
from simcse.text.textfile import Corpus

import pytest
from conftest import ENCODER

INSTALLED_ENGINES = [name for name, engine in LOCAL_ENGINES.items()
                     if all(importlib.util.find_spec(package) for package in engine.packages)]


def for_engines(names=tuple(LOCAL_ENGINES)):
    """Values for a test over local engines; of those that lack a package it is skipped."""
    values = []
    for name in names:
        reason = f"{LOCAL_ENGINES[name].requirements} is not installed"
        values.append(pytest.param(name, marks=pytest.mark.skipif(name not in INSTALLED_ENGINES, reason=reason)))
    return values


def manifest_of(engine, rows, dimension, shards, **settings):
    """Return the manifest of an index to build; settings are those of the engine, the others have their defaults."""
    build = {setting.name for setting in LOCAL_ENGINES[engine].build_settings}
    manifest = manifest_to_build(Manifest(
        ann_engine=engine, index_shards=shards, rows=rows, dimension=dimension,
        build_settings={name: value for name, value in settings.items() if name in build},
        search_settings={name: value for name, value in settings.items() if name not in build}))
    manifest.build_settings = LOCAL_ENGINES[engine].complete_settings(manifest.build_settings, rows)
    return manifest


def fill(index, vectors):
    """Add the vectors, float32 [rows, dim], of the rows that an index lacks."""
    for rows in list(index.missing_rows):
        index.add(rows, vectors[rows])
    index.finish()


class ThreadRanks:
    """Ranks that are threads of this process and gather arrays as processes do: all together, of one shape."""

    def __init__(self, count):
        self.count = count
        self.barrier = threading.Barrier(count, timeout=60)
        self.thread = threading.local()
        self.arrays = [None] * count

    def gather_arrays(self, array):
        self.arrays[self.thread.rank] = array
        self.barrier.wait()
        gathered = list(self.arrays)
        self.barrier.wait()
        assert {(part.shape, part.dtype) for part in gathered} == {(array.shape, array.dtype)}
        return gathered

    def call(self, function, rank, *arguments):
        self.thread.rank = rank
        try:
            return function(rank, *arguments)
        except BaseException:
            self.barrier.abort()  # so that the others do not wait for it
            raise

    def run(self, function, *arguments):
        """Return what function(rank, *arguments) returns on each rank."""
        with (mock.patch("simcse.ranks.gather_arrays", self.gather_arrays),
              ThreadPoolExecutor(self.count) as threads):
            running = [threads.submit(self.call, function, rank, *arguments) for rank in range(self.count)]
            return [rank.result() for rank in running]


def engine_of(name, dimension, capacity, **settings):
    """Return an empty local engine; settings that are not given have their defaults."""
    engine = LOCAL_ENGINES[name]
    defaults = {setting.name: setting.default for setting in (*engine.build_settings, *engine.search_settings)}
    return engine(dimension, capacity, {**defaults, **settings})


def encode_csl(real_data):
    """Return the 6,092 abstracts of csl, their vectors and those of 250 titles, of the beginning of each."""
    from model import SimCSE
    from simcse.encoder.encoder import Encoder
    from simcse.encoder.engine import make_engine
    from simcse.encoder.pretrained import load_pretrained
    from simcse.text.textfile import read_text_pairs
    from simcse.text.wordpiece import load_tokenizer

    folder = real_data / "csl" / "recall"
    documents = Documents(Corpus(str(folder / "corpus.csv"), "--flag"))
    queries = [query for query, _ in read_text_pairs(str(folder / "dev.csv"), "--flag")[:250]]
    encoder = Encoder(make_engine(SimCSE(load_pretrained(str(ENCODER)))), load_tokenizer(str(ENCODER)), 16)
    return documents, encoder.encode(documents[:]), encoder.encode(queries)


def documents_of(folder, *lines):
    """Return the documents of a corpus with these lines, written to a folder."""
    (folder / "corpus.csv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return Documents(Corpus(str(folder / "corpus.csv"), "--corpus_file"))


def milvus_manifest(documents, **values):
    """Return the manifest of a collection of these documents, in Milvus Lite and with vectors of 8 if not told."""
    from simcse.index.milvus import manifest_for_corpus

    manifest = manifest_for_corpus(Manifest(), None, is_lite=True)
    values = {"lines": documents.line_count, "documents": len(documents), "rows": documents.row_count, **values}
    return dataclasses.replace(manifest, passages=documents.has_passages, **{"dimension": 8, **values})


def fill_collection(documents, vectors, collection="texts", uri="x.db", **values):
    """Return a collection with these documents and the vectors, float32 [rows, dim], of all rows."""
    from simcse.index.milvus import MilvusIndex
    from simcse.index.milvus_update import compare_with_corpus

    index = MilvusIndex(uri, collection)
    update = compare_with_corpus(index, documents, milvus_manifest(documents, dimension=vectors.shape[1], **values))
    update.start()
    for rows in update.missing_rows:
        update.add(rows, vectors[rows])
    update.finish()
    return index
