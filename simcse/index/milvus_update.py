"""Bring a collection of Milvus in line with a corpus: make it, or change it in place.

A row is stored under the key of its text, so that the collection itself says which rows are there. A new corpus, a
changed one and a run that was interrupted differ only in how many rows are missing. Rows are added first, and those
that the corpus lacks are removed at the end; searches in between find all of the old rows and some of the new ones.
"""

import dataclasses
import secrets
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from simcse.console import InputError, count
from simcse.index.ann_recall import HALVES, MEASURED_K, measure_recall
from simcse.index.documents import Documents, report_changes
from simcse.index.exact import NearestCosines
from simcse.index.manifest import AnnRecall, Manifest
from simcse.index.milvus import MilvusIndex
from simcse.index.milvus_collection import (
    BUILDING,
    CHANGED_MEANWHILE,
    CHANGING,
    COMPLETE,
    DOCUMENT,
    IDS,
    INDEXED,
    KEY,
    LINES,
    PENDING,
    VECTOR,
    Record,
)
from simcse.index.milvus_rows import CorpusRows
from simcse.index.milvus_types import complete_settings, deeper_settings
from simcse.index.protocols import NOT_FOUND
from simcse.machine import RANK, RANKS

import numpy as np

PIECE = 4096  # rows that are encoded and stored together, and by which ranks share out the corpus
MAX_KEPT_TO_MEASURE = 2_000_000  # rows that stay, of which the vectors have to be read to measure the recall
MAX_PENDING_PIECES = 2  # pieces that a server adds at a time: one is made ready while it works on another


def compare_with_corpus(index: MilvusIndex, documents: Documents, manifest: Manifest) -> "CollectionUpdate | None":
    """Return the update that brings a collection in line with a corpus; change nothing yet. All ranks call it together.

    Args:
        index: the collection, whose rows are those of the corpus from now on.
        documents: the corpus.
        manifest: what the collection is to be made of, with the sizes of the corpus.

    Returns:
        None: the collection is that of the corpus, and can be searched.

    Raises:
        InputError: a text is too long for Milvus, or the collection has no text of the corpus.
    """
    from simcse.ranks import any_rank

    build_settings, search_settings = complete_settings(
        manifest.build_settings, manifest.search_settings, documents.row_count, manifest.dimension)
    index.manifest = dataclasses.replace(manifest, build_settings=build_settings, search_settings=search_settings)
    index.corpus_rows = CorpusRows(documents)
    if index.record is not None:
        index.manifest.ann_recall = index.record.manifest.ann_recall
    if any_rank(not _is_of_corpus(index)):
        index.search_settings = dict(search_settings)
        return CollectionUpdate(index, documents, find_changes(index))
    index.start_searching(search_settings)
    return None


def _is_of_corpus(index: MilvusIndex) -> bool:
    """Return whether a collection has all of its corpus, and nothing else."""
    if index.record is None or index.record.state != COMPLETE:
        return False
    if not index.record.manifest.has_corpus_of(index.manifest):
        return False
    index.collection.load()
    return index.collection.count() == len(index.corpus_rows)


@dataclass
class Changes:
    """The differences between a collection and the corpus.

    Attributes:
        missing: which rows of the corpus the collection lacks, bool [rows].
        outdated: rows that it has with another number of lines, or other ids.
        gone: keys of rows that the corpus lacks.
        stored_documents: the keys of the documents in the collection, int64.
    """

    missing: np.ndarray
    outdated: list[int]
    gone: list[int]
    stored_documents: np.ndarray

    @property
    def kept_count(self) -> int:
        """How many rows of the corpus the collection has already."""
        return int(np.count_nonzero(~self.missing))


def find_changes(index: MilvusIndex) -> Changes:
    """Compare the rows of a collection with those of its corpus."""
    corpus_rows = index.corpus_rows
    no_keys = np.empty(0, "int64")
    changes = Changes(missing=np.ones(len(corpus_rows), bool), outdated=[], gone=[], stored_documents=no_keys)
    if index.record is None:
        return changes
    index.collection.load()
    documents_of_pages = [no_keys]
    # A collection that is not of one corpus may have ids of another one. Where there are none they are not read: with
    # them a request has some hundred rows instead of 16,384.
    may_have_ids = index.record.state != COMPLETE or index.record.manifest.corpus_columns != 1
    compares_ids = corpus_rows.documents.corpus.has_ids or may_have_ids
    fields = [DOCUMENT, LINES, IDS] if compares_ids else [DOCUMENT, LINES]
    for page in index.collection.read_pages(fields):
        rows = corpus_rows.find(np.array([stored[KEY] for stored in page], "int64"))
        documents_of_pages.append(np.unique(np.array([stored[DOCUMENT] for stored in page], "int64")))
        changes.gone += [stored[KEY] for row, stored in zip(rows.tolist(), page) if row == NOT_FOUND]
        stored_rows = [stored for row, stored in zip(rows.tolist(), page) if row != NOT_FOUND]
        rows = rows[rows != NOT_FOUND]
        changes.missing[rows] = False
        for row, stored, lines, ids in zip(rows.tolist(), stored_rows, *corpus_rows.lines_and_ids(rows)):
            if (stored[LINES], stored.get(IDS, "")) != (lines, ids):
                changes.outdated.append(row)
    changes.stored_documents = np.unique(np.concatenate(documents_of_pages))
    return changes


class CollectionUpdate:
    """The update of a collection to its corpus, an `IndexFiller`.

    All ranks `start` it, `measure_with` some queries if it `has_to_be_measured`, `add` the missing rows, and `finish`.

    Args:
        index: the collection.
        documents: the corpus.
        changes: what `find_changes` has found.

    Attributes:
        missing_rows, bytes_needed: see `IndexFiller`.

    Raises:
        InputError: a text is too long for Milvus, or the collection has no text of the corpus.
    """

    bytes_needed = 0  # the server has the vectors

    def __init__(self, index: MilvusIndex, documents: Documents, changes: Changes) -> None:
        self._index = index
        self._collection = index.collection
        self._rows = index.corpus_rows
        self._changes = changes
        self._run_id = secrets.token_hex(8)
        self._has_changed_rows = False
        self._nearest: NearestCosines | None = None  # what a search of some queries has to find
        self._max_pending = 1 if self._collection.is_lite else MAX_PENDING_PIECES
        self._workers = ThreadPoolExecutor(self._max_pending)
        self._pending = deque[Future]()
        if len(changes.stored_documents):
            report_changes(documents, changes.stored_documents, self._collection.where)
        self._rows.check_lengths(np.flatnonzero(changes.missing))
        self.missing_rows = _pieces_of_rank(np.flatnonzero(changes.missing))

    def start(self) -> None:
        """Create the collection, or mark it as changing, by this run. All ranks call it together.

        Raises:
            InputError: another run has changed the collection since it was read.
        """
        from simcse.ranks import wait_for_ranks

        wait_for_ranks()  # none has found an error
        if not RANK:
            self._check_record()
            if self._index.record is None:
                self._collection.create(self._index.manifest)
                self._index.record = Record(self._index.manifest, BUILDING)
            manifest, state, _ = self._index.record
            if state == COMPLETE:
                state = CHANGING
            self._write_record(Record(manifest, state, self._run_id))
        wait_for_ranks()
        if RANK:
            self._index.record = self._collection.read_record()
        self._collection.load()

    def _check_record(self) -> None:
        """Raise InputError if another run has written the record since this one has.

        If this run has changed rows, the other one may not have seen them when it compared. So it must not complete the
        collection: it notices that the record has the name of this run; and if it has completed it, that is undone.
        """
        record = self._collection.read_record()
        if record == self._index.record:
            return
        if self._has_changed_rows and record is not None:
            state = CHANGING if record.state == COMPLETE else record.state
            self._collection.write_record(Record(record.manifest, state, self._run_id))
        raise InputError(f"{self._collection.where}: {CHANGED_MEANWHILE}")

    def _write_record(self, record: Record) -> None:
        """Replace the record.

        Raises:
            InputError: another run has written it at the same time.
        """
        self._collection.write_record(record)
        self._index.record = self._collection.read_record()
        written = self._index.record
        if written is None or (written.state, written.run_id) != (record.state, record.run_id):
            raise InputError(f"{self._collection.where}: {CHANGED_MEANWHILE}")

    # ------------------------------------------------------------------------------------------------------- adding
    def has_to_be_measured(self) -> bool:
        """Return whether the recall of the index has to be measured anew. All ranks call it together.

        The vectors of rows that stay have to be read for it; where they are too many the last measurement is kept.
        """
        from simcse.ranks import any_rank

        if not self._index.index_type.is_approximate:
            return False
        is_measured = self._index.manifest.ann_recall is not None
        rows_change = bool(self._changes.missing.any() or self._changes.gone)
        return any_rank((rows_change or not is_measured) and self._changes.kept_count <= MAX_KEPT_TO_MEASURE)

    def measure_with(self, queries: np.ndarray) -> None:
        """Have `finish` measure the recall of a search for some queries, float32 [queries, dim].

        Called before the first `add`.
        """
        self._nearest = NearestCosines(queries, min(MEASURED_K, len(self._rows)))

    def add(self, rows: Sequence[int], vectors: np.ndarray) -> None:
        """Add the vectors, float32 [rows, dim], of one piece of `missing_rows` in the background; see `IndexFiller`.

        Raises:
            InputError: another run has changed the collection meanwhile.
        """
        if self._nearest is not None:
            self._nearest.add(vectors)
        self.wait_for_pieces(self._max_pending - 1)
        self._check_record()
        self._has_changed_rows = True
        self._pending.append(self._workers.submit(self._store, np.asarray(rows), vectors))

    def wait_for_pieces(self, most: int = 0) -> None:
        """Wait until at most so many pieces are still being added; raise their errors."""
        while len(self._pending) > most:
            self._pending.popleft().result()

    def _store(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Write rows of the corpus to the collection, with their vectors, float32 [rows, dim]."""
        self._collection.upsert(self._rows.to_store(rows, vectors))

    # ---------------------------------------------------------------------------------------------------- finishing
    def finish(self) -> None:
        """Wait until all is added; remove what the corpus lacks. All ranks call it together.

        The record is written last: until then the next run compares the collection with the corpus again.

        Raises:
            InputError: another run has changed the collection meanwhile.
        """
        from simcse.ranks import wait_for_ranks

        self.wait_for_pieces()
        self._workers.shutdown()
        if self._nearest is not None:
            self._nearest.gather()
        if not RANK:
            self._check_record()
        self._has_changed_rows = True
        wait_for_ranks()
        self._update_outdated()
        wait_for_ranks()
        if not RANK:
            self._collection.delete(self._changes.gone)
            self._collection.flush()
            self._check_row_count()
        is_indexed = self._wait_until_indexed()
        if not RANK:
            self._complete(is_indexed)
        wait_for_ranks()
        self.missing_rows = []

    def _update_outdated(self) -> None:
        """Write this rank's share of the outdated rows again, with the vectors that they have."""
        for rows in _pieces_of_rank(np.array(self._changes.outdated, "int64")):
            self._store(rows, self._collection.get_vectors(self._rows.keys_of(rows).tolist()))

    def _check_row_count(self) -> None:
        """Raise InputError if the collection has more or fewer rows than the corpus."""
        rows = self._collection.count()
        if rows != len(self._rows):
            raise InputError(f"{self._collection.where}: has {count(rows, 'row')} instead of {len(self._rows):,}; "
                             f"{CHANGED_MEANWHILE}")

    def _wait_until_indexed(self) -> bool:
        """Wait until the server has indexed all rows, and return whether it has, which rank 0 alone knows.

        All ranks poll together: a rank that waited for rank 0 all the time would give up after half an hour.
        """
        from simcse.ranks import any_rank

        if not self._index.index_type.is_approximate:
            return True
        if RANK:
            while any_rank(False):  # until rank 0 has ended to wait
                pass
            return True
        for state in self._collection.watch_indexing():
            any_rank(state == PENDING)
        return state == INDEXED

    def _complete(self, is_indexed: bool) -> None:
        """Record that the collection has the corpus, and measure its recall if `measure_with` was called.

        Args:
            is_indexed: whether the index has all rows; otherwise it is not measured.
        """
        manifest = self._index.manifest
        if self._nearest is not None:
            manifest.ann_recall = None  # if measuring is interrupted, it stays so until the next update
        self._check_record()
        self._write_record(Record(manifest, COMPLETE))
        if is_indexed and self._nearest is not None:
            manifest.ann_recall = self._measure_recall()
            self._check_record()
            self._write_record(Record(manifest, COMPLETE))
        self._index.report_recall()

    def _measure_recall(self) -> AnnRecall:
        """Return the recall of a search for the queries of `measure_with`."""
        if self._changes.kept_count:
            self._add_kept_vectors()
        queries, k = self._nearest.queries, self._nearest.k
        settings = self._index.search_settings
        deeper = deeper_settings(self._index.manifest.build_settings, settings, k)
        return measure_recall(lambda settings: self._index.search_with(queries, k, settings).scores,
                              self._nearest.cosines, settings, deeper, HALVES, rows=len(self._rows))

    def _add_kept_vectors(self) -> None:
        """Add the vectors that were in the collection before to the exact search."""
        for page in self._collection.read_pages([VECTOR]):
            rows = self._rows.find(np.array([stored[KEY] for stored in page], "int64"))
            vectors = [stored[VECTOR] for row, stored in zip(rows.tolist(), page)
                       if row != NOT_FOUND and not self._changes.missing[row]]
            if vectors:
                self._nearest.add(np.array(vectors, "float32"))


def _pieces_of_rank(rows: np.ndarray) -> list[np.ndarray]:
    """Return those of some rows that this rank writes, in pieces; it depends on the numbers of the rows alone."""
    of_rank = rows[rows // PIECE % RANKS == RANK]
    return [of_rank[start : start + PIECE] for start in range(0, len(of_rank), PIECE)]
