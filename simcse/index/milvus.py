"""An index in a collection of Milvus, which is updated in place when the corpus changes."""

import dataclasses
import itertools
import secrets
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from simcse.console import InputError, count, log, part, warn
from simcse.index.ann_recall import MEASURED_K, ann_recall, report_ann_recall
from simcse.index.documents import Documents, report_changes
from simcse.index.exact import NearestCosines
from simcse.index.manifest import AnnRecall, Manifest
from simcse.index.milvus_collection import (
    BOUNDED,
    BUILDING,
    CHANGING,
    COMPLETE,
    DOCUMENT,
    IDS,
    INDEXED,
    KEY,
    LINES,
    PENDING,
    REBUILD,
    VECTOR,
    Collection,
    Record,
)
from simcse.index.milvus_documents import CollectionDocuments
from simcse.index.milvus_rows import CorpusRows
from simcse.index.milvus_types import (
    DEFAULT_TYPE,
    INDEX_TYPE,
    INDEX_TYPES,
    LITE_TYPE,
    IndexType,
    check_names,
    complete_settings,
    deeper_settings,
    parameters_to_search,
    to_text,
)
from simcse.index.protocols import NO_SCORE, NOT_FOUND, SearchResult
from simcse.index.settings import HNSW_EF, HNSW_M
from simcse.machine import RANK, RANKS

import numpy as np

PIECE = 4096  # rows that are encoded and stored together
MEASURED_KEPT = 2_000_000  # most rows whose stored vectors are read to measure the recall after a change
ADDING = 2  # how many pieces a server adds at a time: one is made ready while it works on another
EXACT = "another collection with --milvus_index FLAT"  # the advice where the recall is poor
OVERTAKEN = "another process has changed it meanwhile; run again when that has ended"


@dataclass
class Changes:
    """The differences between a collection and the corpus.

    Attributes:
        missing: which rows of the corpus the collection lacks, bool [rows].
        outdated: rows that it has, but whose text is on other lines, or has other ids.
        gone: keys of rows that the corpus lacks.
        previous: the keys of the documents in the collection, int64.
    """

    missing: np.ndarray
    outdated: list[int]
    gone: list[int]
    previous: np.ndarray


class MilvusIndex:
    """A collection of Milvus, an `Index`.

    A row is stored under the key of its text, so that the collection itself says which rows are there. A new corpus, a
    changed one and a run that was interrupted differ only in how many rows are missing. Rows are added, and those that
    the corpus lacks are removed at the end; searches in between find all of the old rows and some of the new ones.

    It is used in one of two ways. Without its corpus: `open` it, and search. With a corpus: `compare` it,
    `start_changing`, `measure_with` some queries if it `has_to_be_measured`, `add` the missing rows, `finish`, and
    search.

    Args:
        uri, collection: see `Collection`.

    Attributes:
        manifest: what the collection is made of; None: it does not exist.
        missing_rows: see `Index`.

    Raises:
        InputError: see `Collection.read_record`.
    """

    description = "a collection of Milvus (requirements-milvus.txt)"
    packages = ("pymilvus",)
    requirements = "requirements-milvus.txt"
    build_settings = (HNSW_M,)  # of --milvus_index HNSW; those of all types are in milvus_types.py
    search_settings = (HNSW_EF,)
    max_k = 16384  # a limit of Milvus
    bytes_needed = 0  # the server has the vectors

    def __init__(self, uri: str, collection: str) -> None:
        self.missing_rows: list[np.ndarray] = []
        self._collection = Collection(uri, collection)
        self._record = self._collection.read_record()
        self.manifest = self._record.manifest if self._record else None
        self._run = secrets.token_hex(8)
        self._search_settings: dict[str, Any] = {}
        self._rows: CorpusRows | None = None  # None: it was opened without its corpus
        self._changes: Changes | None = None
        self._nearest: NearestCosines | None = None  # what a search of some queries has to find
        self._has_warned = False
        self._most_adding = 1 if self._collection.is_lite else ADDING
        self._workers = ThreadPoolExecutor(self._most_adding)
        self._adding = deque[Future]()

    # ------------------------------------------------------------------------------------------------------- opening
    def check(self, wanted: Manifest) -> None:
        """Raise InputError if the collection, which exists, is not as wanted; warn if it may be of another int8 graph.
        """
        where = self._collection.where
        if INDEX_TYPE not in wanted.build_settings:  # otherwise recall.py has checked them
            index_type = self.manifest.build_settings[INDEX_TYPE]
            check_names(index_type, [*wanted.build_settings, *wanted.search_settings])
        self.manifest.check(wanted, where, REBUILD)
        if not RANK:
            self.manifest.warn_other_calibration(wanted, where, REBUILD)

    def open(self, search_settings: dict[str, Any]) -> CollectionDocuments:
        """Make the collection searchable without its corpus, and return its documents. Rows are keys then.

        A search does not wait for what others are writing at the time: it finds the rows of some seconds ago.

        Args:
            search_settings: those that are other than when it was built.

        Raises:
            InputError: there is no such collection, or its first build has not been finished.
        """
        where = self._collection.where
        if self._record is None:
            raise InputError(f"{where}: {self._collection.uri} has no such collection; --corpus_file is needed to make "
                             "it")
        if self._record.state == BUILDING:
            raise InputError(f"{where}: not all documents are in it yet; run recall.py again with --corpus_file")
        self._collection.consistency = BOUNDED
        self._load_to_search(self._record.manifest, search_settings)
        return CollectionDocuments(self._collection, self._record.manifest)

    def compare(self, documents: Documents, manifest: Manifest) -> None:
        """Find out what the collection lacks of a corpus, without changing it. All ranks call it together.

        `start_changing` comes next.

        Args:
            documents: the corpus; a row is one of theirs from now on.
            manifest: what the collection is to be made of, with all settings.

        Raises:
            InputError: a text is too long for Milvus, or the collection has no text of the corpus.
        """
        from simcse.ranks import any_rank

        build_settings, search_settings = complete_settings(
            manifest.build_settings, manifest.search_settings, documents.row_count, manifest.dimension)
        self.manifest = dataclasses.replace(manifest, build_settings=build_settings, search_settings=search_settings)
        self._rows = CorpusRows(documents)
        if self._record is not None:
            self.manifest.ann_recall = self._record.manifest.ann_recall
        if not any_rank(not self._is_current()):
            self._load_to_search(self.manifest, {})
            return
        self._changes = self._find_changes()
        if len(self._changes.previous):
            report_changes(documents, self._changes.previous, self._collection.where)
        self._rows.check_lengths(np.flatnonzero(self._changes.missing))
        self._search_settings = self.manifest.search_settings
        self.missing_rows = self._missing_pieces()

    def _load_to_search(self, manifest: Manifest, search_settings: dict[str, Any]) -> None:
        """Make the collection searchable as it is.

        Args:
            manifest: its own, or one that agrees with it.
            search_settings: those that are other than in the manifest.
        """
        check_names(manifest.build_settings[INDEX_TYPE], list(search_settings))
        self._collection.load()
        self._search_settings = {**manifest.search_settings, **search_settings}
        log(f"using the collection {self._collection.name} in {self._collection.uri}")
        report_ann_recall(manifest.ann_recall, self._search_settings, exact=EXACT, as_flags=_as_flag)

    def _is_current(self) -> bool:
        """Return whether the collection has all of the corpus, and nothing else."""
        if self._record is None or self._record.state != COMPLETE:
            return False
        if not self._record.manifest.has_corpus_of(self.manifest):
            return False
        self._collection.load()
        return self._collection.count() == len(self._rows)

    # ---------------------------------------------------------------------------------------------------- comparing
    def _find_changes(self) -> Changes:
        """Compare the rows of the collection with those of the corpus."""
        no_keys = np.empty(0, "int64")
        changes = Changes(missing=np.ones(len(self._rows), bool), outdated=[], gone=[], previous=no_keys)
        if self._record is None:
            return changes
        self._collection.load()
        documents_of_pages = [no_keys]
        # A collection that is not of one corpus may have ids of another one.
        may_have_ids = self._record.state != COMPLETE or self._record.manifest.corpus_columns != 1
        has_ids = self._rows.documents.corpus.has_ids or may_have_ids
        fields = [DOCUMENT, LINES, IDS] if has_ids else [DOCUMENT, LINES]
        for page in self._collection.read_pages(fields):
            rows = self._rows.find(np.array([stored[KEY] for stored in page], "int64"))
            documents_of_pages.append(np.unique(np.array([stored[DOCUMENT] for stored in page], "int64")))
            changes.gone += [stored[KEY] for row, stored in zip(rows.tolist(), page) if row == NOT_FOUND]
            stored_rows = [stored for row, stored in zip(rows.tolist(), page) if row != NOT_FOUND]
            rows = rows[rows != NOT_FOUND]
            changes.missing[rows] = False
            for row, stored, lines, ids in zip(rows.tolist(), stored_rows, *self._rows.lines_and_ids(rows)):
                if (stored[LINES], stored.get(IDS, "")) != (lines, ids):
                    changes.outdated.append(row)
        changes.previous = np.unique(np.concatenate(documents_of_pages))
        return changes

    def _missing_pieces(self) -> list[np.ndarray]:
        """Return the missing rows that this rank adds, in pieces."""
        pieces = []
        for start in range(RANK * PIECE, len(self._rows), RANKS * PIECE):
            rows = start + np.flatnonzero(self._changes.missing[start : start + PIECE])
            if len(rows):
                pieces.append(rows)
        return pieces

    # ------------------------------------------------------------------------------------------------------- filling
    @property
    def needs_changes(self) -> bool:
        """Whether the collection has to be made, or changed, to be that of the corpus of `compare`."""
        return self._changes is not None

    def start_changing(self) -> None:
        """Create the collection, or mark it as changing, by this run; do nothing if it is that of the corpus.

        All ranks call it together.

        Raises:
            InputError: another process has written the record since it was read.
        """
        from simcse.ranks import wait_for_ranks

        if not self.needs_changes:
            return
        wait_for_ranks()  # none has found an error
        if not RANK:
            self._check_record()
            if self._record is None:
                self._collection.create(self.manifest)
                self._record = Record(self.manifest, BUILDING)
            state = CHANGING if self._record.state == COMPLETE else self._record.state
            self._collection.write_record(Record(self._record.manifest, state, self._run))
            self._record = self._collection.read_record()
        wait_for_ranks()
        self._collection.load()

    def _check_record(self) -> None:
        """Raise InputError if another process has written the record since it was read."""
        if self._collection.read_record() != self._record:
            raise InputError(f"{self._collection.where}: {OVERTAKEN}")

    def _check_rows(self) -> None:
        """Raise InputError if the collection has more or fewer rows than the corpus."""
        rows = self._collection.count()
        if rows != len(self._rows):
            raise InputError(f"{self._collection.where}: has {count(rows, 'row')} instead of {len(self._rows):,}; "
                             f"{OVERTAKEN}")

    def has_to_be_measured(self) -> bool:
        """Return whether rows are about to change, and the index is approximate. All ranks call it together.

        The vectors of rows that stay have to be read for it; where they are too many the last measurement is kept.
        """
        from simcse.ranks import any_rank

        return any_rank(self._changes is not None and self._index_type.is_approximate
                        and self._count_kept() <= MEASURED_KEPT)

    def measure_with(self, queries: np.ndarray) -> None:
        """Have `finish` measure the recall of a search for some queries, float32 [queries, dim].

        Called before the first `add`.
        """
        self._nearest = NearestCosines(queries, min(MEASURED_K, len(self._rows)))

    @property
    def _index_type(self) -> IndexType:
        return INDEX_TYPES[self.manifest.build_settings[INDEX_TYPE]]

    def add(self, rows: Sequence[int], vectors: np.ndarray) -> None:
        """Add the vectors, float32 [rows, dim], of one piece of `missing_rows` in the background; see `Index`."""
        if self._nearest is not None:
            self._nearest.add(vectors)
        self._wait_for_adding(self._most_adding - 1)
        self._adding.append(self._workers.submit(self._store, np.asarray(rows), vectors))

    def _wait_for_adding(self, most: int = 0) -> None:
        """Wait until at most so many pieces are still being added; raise their errors."""
        while len(self._adding) > most:
            self._adding.popleft().result()

    def _store(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Write rows of the corpus to the collection, with their vectors, float32 [rows, dim]."""
        self._collection.upsert(self._rows.to_store(rows, vectors))

    def finish(self) -> None:
        """Wait until all is added; remove what the corpus lacks. All ranks call it together.

        The record is written last: until then the next run compares the collection with the corpus again.
        """
        from simcse.ranks import wait_for_ranks

        if self._changes is None:
            return
        self._wait_for_adding()
        if self._nearest is not None:
            self._nearest.gather()
        wait_for_ranks()
        if not RANK:
            self._check_record()
            self._update_outdated()
            self._collection.delete(self._changes.gone)
            self._collection.flush()
            self._check_rows()
        is_indexed = self._wait_until_indexed()
        if not RANK:
            if self._nearest is not None:
                self.manifest.ann_recall = None  # if measuring is interrupted, it stays so until the corpus changes
            self._collection.write_record(Record(self.manifest, COMPLETE))
            if is_indexed and self._nearest is not None:
                self.manifest.ann_recall = self._measure_recall()
                self._collection.write_record(Record(self.manifest, COMPLETE))
        wait_for_ranks()
        self._changes = None
        self._nearest = None
        self.missing_rows = []

    def _wait_until_indexed(self) -> bool:
        """Wait until the server has indexed all rows, and return, on rank 0, whether it has.

        All ranks poll together: a rank that waited for rank 0 all the time would give up after half an hour.
        """
        from simcse.ranks import any_rank

        if not self._index_type.is_approximate:
            return True
        states = itertools.repeat(INDEXED) if RANK else self._collection.watch_indexing()
        state = next(states)
        while any_rank(state == PENDING):
            state = next(states)
        return state == INDEXED

    def _update_outdated(self) -> None:
        """Write rows again whose lines or ids have changed, with the vectors that they have."""
        outdated = np.array(self._changes.outdated, "int64")
        for start in range(0, len(outdated), PIECE):
            rows = outdated[start : start + PIECE]
            self._store(rows, self._collection.get_vectors(self._rows.keys_of(rows).tolist()))

    def _count_kept(self) -> int:
        """Return how many rows were in the collection before."""
        return int(np.count_nonzero(~self._changes.missing))

    def _add_kept(self) -> None:
        """Add the vectors that were stored before to the exact search."""
        for page in self._collection.read_pages([VECTOR]):
            rows = self._rows.find(np.array([stored[KEY] for stored in page], "int64"))
            vectors = [stored[VECTOR] for row, stored in zip(rows.tolist(), page)
                       if row != NOT_FOUND and not self._changes.missing[row]]
            if vectors:
                self._nearest.add(np.array(vectors, "float32"))

    def _measure_recall(self) -> AnnRecall:
        """Return the recall of a search for the queries of `measure_with`."""
        if self._count_kept():
            self._add_kept()
        queries, k, exact = self._nearest.queries, self._nearest.k, self._nearest.cosines
        settings = self._search_settings
        deeper = deeper_settings(self.manifest.build_settings, settings, k)
        recall = ann_recall(self._search(queries, k, settings).scores, exact)
        deeper_recall = recall
        if deeper:
            deeper_recall = ann_recall(self._search(queries, k, deeper).scores, exact)
        measured = AnnRecall(k=k, queries=f"{len(queries)} halves of documents", recall=round(recall, 4),
                             settings=settings, deeper_recall=round(deeper_recall, 4), deeper_settings=deeper)
        report_ann_recall(measured, exact=EXACT, as_flags=_as_flag)
        return measured

    # ----------------------------------------------------------------------------------------------------- searching
    def search(self, queries: np.ndarray, k: int) -> SearchResult:
        """Return the k best rows of each query on rank 0, and no rows on the other ranks; see `Index`."""
        if k > self.max_k:
            raise InputError(f"--recall_num {k}: Milvus gives at most {self.max_k}")
        result = self._search(queries, k, self._search_settings)
        if not RANK:
            self._warn_short(result)
        return result

    def _search(self, queries: np.ndarray, k: int, settings: dict[str, Any]) -> SearchResult:
        """Search with some settings; see `search`."""
        result = SearchResult(np.full((len(queries), k), NOT_FOUND), np.full((len(queries), k), NO_SCORE, "float32"))
        if RANK:
            return result
        parameters = parameters_to_search(self._index_type, settings, k)
        found = self._collection.search(queries, k, parameters, with_vectors=self._index_type.is_quantized)
        for query, hits in enumerate(found):
            rows = np.array([key for key, _ in hits], "int64")
            cosines = np.array([cosine for _, cosine in hits], "float32")
            if self._rows is not None:
                rows = self._rows.find(rows)
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
        if short and self._index_type.is_approximate and not self._has_warned:
            self._has_warned = True
            settings = deeper_settings(self.manifest.build_settings, self._search_settings, k)
            remedy = f"; {_as_flag(settings)} looks further" if settings else ""
            warn(f"{self._collection.where}: {part(short, queries, 'query', 'have')} fewer than {available:,} hits "
                 f"with {_as_flag(self._search_settings)}{remedy}")

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of some rows, float32 [rows, dim], on rank 0; zeros for NOT_FOUND and on other ranks."""
        vectors = np.zeros((len(rows), self.manifest.dimension), "float32")
        found = np.flatnonzero(rows != NOT_FOUND)
        if RANK or not len(found):
            return vectors
        keys = rows if self._rows is None else self._rows.keys_of(rows)
        vectors[found] = self._collection.get_vectors(keys[found].tolist())
        return vectors

    def measure(self, queries: np.ndarray, k: int, kind: str) -> AnnRecall | None:
        """Return None: that takes all vectors, which are seen only when they are added; see `measure_with`."""
        return None

    def close(self) -> None:
        """Release the file, or the connection."""
        self._workers.shutdown()
        self._collection.close()


def manifest_for_corpus(wanted: Manifest, previous: Manifest | None, is_lite: bool) -> Manifest:
    """Return what a collection is to be made of: as wanted, else as it is, else the defaults.

    `MilvusIndex.compare` adds defaults that depend on the corpus.

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
        wanted,
        ann_engine="milvus",
        passages=bool(previous.passages if wanted.passages is None else wanted.passages),
        calibration=previous.calibration or wanted.calibration,  # most vectors are those of the collection
        build_settings=build_settings,
        search_settings={**previous.search_settings, **wanted.search_settings})


def _as_flag(settings: dict[str, Any]) -> str:
    """Return search settings as they are given on the command line."""
    return f"--milvus_index_params {to_text(settings)}"
