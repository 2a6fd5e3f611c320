"""An index in a collection of Milvus; milvus_update.py fills the collection."""

import dataclasses
from typing import Any

from simcse.console import InputError, log, part, warn
from simcse.index.ann_recall import report_ann_recall
from simcse.index.manifest import AnnRecall, Manifest
from simcse.index.milvus_collection import BOUNDED, BUILDING, CHANGING, REBUILD, Collection
from simcse.index.milvus_documents import CollectionDocuments
from simcse.index.milvus_rows import CorpusRows
from simcse.index.milvus_types import (
    DEFAULT_TYPE,
    INDEX_TYPE,
    INDEX_TYPES,
    LITE_TYPE,
    IndexType,
    check_names,
    deeper_settings,
    parameters_to_search,
    to_text,
)
from simcse.index.protocols import NO_SCORE, NOT_FOUND, SearchResult
from simcse.index.settings import HNSW_EF, HNSW_M
from simcse.machine import RANK

import numpy as np

EXACT_ADVICE = "another collection with --milvus_index FLAT"  # where the recall is poor


class MilvusIndex:
    """A collection of Milvus, a `VectorIndex`.

    Without its corpus `open` makes it searchable. With a corpus `milvus_update.compare_with_corpus` does, or returns
    the update that has to come first.

    Args:
        uri, collection: see `Collection`.

    Attributes:
        manifest: what the collection is made of; None: it does not exist.
        collection: its connection.
        record: what the collection says of itself; None: it does not exist.
        corpus_rows: the corpus, whose rows a search returns; None: it was opened without one, and rows are keys.
        search_settings: those of a search, each with a value.

    Raises:
        InputError: see `Collection.read_record`.
    """

    description = "a collection of Milvus (requirements-milvus.txt)"
    packages = ("pymilvus",)
    requirements = "requirements-milvus.txt"
    build_settings = (HNSW_M,)  # of --milvus_index HNSW; those of all types are in milvus_types.py
    search_settings = (HNSW_EF,)
    max_k = 16384  # a limit of Milvus

    def __init__(self, uri: str, collection: str) -> None:
        self.collection = Collection(uri, collection)
        self.record = self.collection.read_record()
        self.manifest = self.record.manifest if self.record else None
        self.corpus_rows: CorpusRows | None = None
        self.search_settings: dict[str, Any] = {}
        self._has_warned = False

    # ------------------------------------------------------------------------------------------------------- opening
    def check(self, wanted: Manifest) -> None:
        """Raise InputError if the collection, which exists, is not as wanted; warn if it may be of another int8 graph.
        """
        where = self.collection.where
        if INDEX_TYPE not in wanted.build_settings:  # otherwise recall.py has checked them
            check_names(self.manifest.build_settings[INDEX_TYPE], [*wanted.build_settings, *wanted.search_settings])
        self.manifest.check(wanted, where, REBUILD)
        if not RANK:
            self.manifest.warn_other_calibration(wanted, where, REBUILD)

    def open(self, search_settings: dict[str, Any]) -> CollectionDocuments:
        """Make the collection searchable without its corpus, and return its documents.

        A search does not wait for what others are writing at the time: it finds the rows of some seconds ago.

        Args:
            search_settings: those that are other than when it was built; `check` has looked at their names.

        Raises:
            InputError: there is no such collection, or its first build has not been finished.
        """
        where = self.collection.where
        if self.record is None:
            raise InputError(f"{where}: {self.collection.uri} has no such collection; --corpus_file is needed to make "
                             "it")
        if self.record.state == BUILDING:
            raise InputError(f"{where}: not all documents are in it yet; run recall.py again with --corpus_file")
        if self.record.state == CHANGING and not RANK:
            warn(f"{where}: is being updated, or an update was interrupted: it may have documents of the corpus before "
                 "and after; if no recall.py is running, run it again with --corpus_file")
        self.collection.consistency = BOUNDED
        self.start_searching({**self.manifest.search_settings, **search_settings})
        return CollectionDocuments(self.collection, self.manifest)

    def start_searching(self, search_settings: dict[str, Any]) -> None:
        """Make the collection, which is complete, searchable, and report its recall.

        Args:
            search_settings: all of them.
        """
        self.collection.load()
        self.search_settings = dict(search_settings)
        log(f"using the collection {self.collection.name} in {self.collection.uri}")
        self.report_recall()

    def report_recall(self) -> None:
        """Log the recall of its index, as it was measured last, or that it was not measured."""
        measured = self.record.manifest.ann_recall
        if self.index_type.is_approximate and measured is None and not RANK:
            log(f"{self.collection.where}: the recall of its index was not measured")
        report_ann_recall(measured, self.search_settings, rows=self.manifest.rows, exact=EXACT_ADVICE,
                          as_flags=milvus_flag)

    @property
    def index_type(self) -> IndexType:
        """How its vectors are indexed."""
        return INDEX_TYPES[self.manifest.build_settings[INDEX_TYPE]]

    # ----------------------------------------------------------------------------------------------------- searching
    def set_search_settings(self, settings: dict[str, Any]) -> None:
        """Change some of the settings of a search."""
        self.search_settings.update(settings)

    def search(self, queries: np.ndarray, k: int) -> SearchResult:
        """Return the k best rows of each query on rank 0, and no rows on the other ranks; see `VectorIndex`.

        Raises:
            InputError: another collection has taken its place: its vectors may be of another model.
        """
        result = self.search_with(queries, k, self.search_settings)
        if not RANK:
            self.collection.check_is_same()
            self._warn_short(result)
        return result

    def search_with(self, queries: np.ndarray, k: int, settings: dict[str, Any]) -> SearchResult:
        """Search with some settings, without a warning; see `search`."""
        result = SearchResult(np.full((len(queries), k), NOT_FOUND), np.full((len(queries), k), NO_SCORE, "float32"))
        if RANK:
            return result
        parameters = parameters_to_search(self.index_type, settings, k)
        found = self.collection.search(queries, k, parameters, with_vectors=self.index_type.is_quantized)
        for query, hits in enumerate(found):
            rows = np.array([key for key, _ in hits], "int64")
            cosines = np.array([cosine for _, cosine in hits], "float32")
            if self.corpus_rows is not None:
                rows = self.corpus_rows.find(rows)
                cosines = cosines[rows != NOT_FOUND]
                rows = rows[rows != NOT_FOUND]
            order = np.lexsort((rows, -cosines))
            result.rows[query, : len(rows)] = rows[order]
            result.scores[query, : len(rows)] = cosines[order]
        return result

    def _warn_short(self, result: SearchResult) -> None:
        """Warn, once, of queries for which an approximate search has found fewer rows than there are."""
        queries, k = result.rows.shape
        available = min(k, self.manifest.rows)
        found = np.count_nonzero(result.rows != NOT_FOUND, axis=1)
        short = int(np.count_nonzero(found < available))
        if short and self.index_type.is_approximate and not self._has_warned:
            self._has_warned = True
            settings = deeper_settings(self.manifest.build_settings, self.search_settings, k)
            remedy = f"; {milvus_flag(settings)} looks further" if settings else ""
            warn(f"{self.collection.where}: {part(short, queries, 'query', 'have')} fewer than {available:,} hits "
                 f"with {milvus_flag(self.search_settings)}{remedy}")

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of some rows, float32 [rows, dim], on rank 0; zeros for NOT_FOUND and on other ranks."""
        vectors = np.zeros((len(rows), self.manifest.dimension), "float32")
        found = np.flatnonzero(rows != NOT_FOUND)
        if RANK or not len(found):
            return vectors
        keys = rows if self.corpus_rows is None else self.corpus_rows.keys_of(rows)
        vectors[found] = self.collection.get_vectors(keys[found].tolist())
        return vectors

    def measure(self, queries: np.ndarray, k: int, kind: str) -> AnnRecall | None:
        """Return None: the recall is measured by an update, through which all vectors pass."""
        return None

    def close(self) -> None:
        """Release the file, or the connection."""
        self.collection.close()


def manifest_for_corpus(wanted: Manifest, previous: Manifest | None, is_lite: bool) -> Manifest:
    """Return what a collection is to be made of: as wanted, else as it is, else the defaults.

    `milvus_update.compare_with_corpus` adds defaults that depend on the corpus.

    Args:
        wanted: what the flags ask for.
        previous: that of the collection, which has all that is wanted of its build settings; None: it does not exist.
        is_lite: whether it is in a file of Milvus Lite.

    Raises:
        InputError: a parameter is not one of the index type.
    """
    previous = previous or Manifest(build_settings={INDEX_TYPE: LITE_TYPE if is_lite else DEFAULT_TYPE})
    build_settings = {**previous.build_settings, **wanted.build_settings}
    check_names(build_settings[INDEX_TYPE], [*wanted.build_settings, *wanted.search_settings])
    return dataclasses.replace(
        wanted.completed_by(previous),
        ann_engine="milvus",
        build_settings=build_settings,
        search_settings={**previous.search_settings, **wanted.search_settings})


def milvus_flag(settings: dict[str, Any]) -> str:
    """Return search settings as they are given on the command line."""
    return f"--milvus_index_params {to_text(settings)}"
