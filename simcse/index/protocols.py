"""The interfaces of the index: a local engine, an index of a whole corpus, and the documents of its rows.

Two levels search vectors. A `LocalEngine` holds vectors in the memory of one process; its rows are these vectors, in
the order in which they were added. A `VectorIndex` is what recall.py and the service search: `ShardedIndex`, which
wraps one `LocalEngine` a shard, or `MilvusIndex`. A `DocumentStore` says which document a row of an index is.

To add a local engine, write a subclass of `LocalEngine` and add it to LOCAL_ENGINES in engines.py. Its flags, their
checks, its entries in the manifest and its tests follow from that. README.md and README_en.md list its file in their
tree, and its name in the row of --ann_engine.

An engine that needs a package which requirements.txt does not bring also takes:

* `packages` and `requirements` of its class, and the package is imported inside functions only;
* a file requirements-<package>.txt with exact versions;
* that file in the sentence on optional packages in README.md and README_en.md, and in docs/zh/index.md and
  docs/en/index.md, where the engine is described;
* that file in scripts/run_tests.sh. Without the package the tests of the engine are skipped.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from simcse.index.manifest import AnnRecall, Manifest
from simcse.index.settings import Setting

import numpy as np

NOT_FOUND = -1  # the row of a result that has fewer than k
NO_SCORE = float("-inf")  # its score


class SearchResult(NamedTuple):
    """The best rows for each query, best first; of equal scores the lower row first. Rows of one vector stay together.

    Attributes:
        rows: int64 [queries, k]; NOT_FOUND where a query has fewer.
        scores: float [queries, k], cosines for instance; NO_SCORE where the row is NOT_FOUND.
    """

    rows: np.ndarray
    scores: np.ndarray


def merge_results(parts: Iterable[SearchResult], k: int) -> SearchResult:
    """Return the k best of one or more results for the same queries, or all if there are fewer.

    Of equal scores the lower row comes first.
    """
    parts = list(parts)
    if len(parts) == 1 and _is_strictly_descending(parts[0]):
        return SearchResult(parts[0].rows[:, :k], parts[0].scores[:, :k])
    rows = np.hstack([part.rows for part in parts])
    scores = np.hstack([part.scores for part in parts])
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return SearchResult(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1))


def _is_strictly_descending(result: SearchResult) -> bool:
    """Return whether each score is higher than the next; equal ones would have to be sorted by their rows."""
    return bool(np.all(result.scores[:, :-1] > result.scores[:, 1:]))


class LocalEngine(ABC):
    """Vectors in memory. A row is the number of one of them, from 0 in the order in which they are added.

    The rows of a `VectorIndex` are others; `ShardedIndex` maps them to the rows of its engines.

    All vectors are float32 and L2-normalized (an unknown text has zeros), so that inner products are cosines. Subclass
    it: what an engine does not define is as it stands here. An engine prints nothing, and turns errors of its library
    that a user can correct into `InputError`; it sets loggers of its library to WARNING.

    Attributes:
        description: what --help says of the engine.
        packages: the modules that it imports; recall.py and the service look for them before they load the model.
        requirements: the file that brings these packages.
        build_settings: what the vectors are indexed with. A kept index has them for good.
        search_settings: what a search may change. They are never compared with those of a kept index.
        approximate: whether `search` may miss some of the nearest. Then recall.py measures how many.
        copies_to_read: whether `all_vectors` takes as much memory as the index itself.
        training_size: how many vectors `train` asks for; 0: none.
        queries_per_thread: `search` uses all of its threads only for more queries than this per thread. For fewer
            `ShardedIndex` searches several shards at the same time, each by one thread.
    """

    description: str
    packages: Sequence[str] = ()
    requirements: str = "requirements.txt"
    build_settings: Sequence[Setting] = ()
    search_settings: Sequence[Setting] = ()
    approximate: bool = False
    copies_to_read: bool = False
    training_size: int = 0
    queries_per_thread: int = 1

    def __init__(self, dimension: int, capacity: int, settings: dict[str, Any]) -> None:
        """Make an empty index.

        Args:
            dimension: of the vectors.
            capacity: how many vectors will be added or loaded.
            settings: a value for each of `build_settings` and `search_settings`, by name. The latter may change between
                searches.
        """
        self.dimension = dimension
        self.capacity = capacity
        self.settings = settings

    @classmethod
    def bytes_needed(cls, dimension: int, capacity: int, settings: dict[str, Any]) -> int:
        """Return the bytes of memory that an index of these arguments will take; see `__init__`.

        `ShardedIndex` compares the sum over its shards with the memory that is free, before it makes any.
        """
        return 4 * dimension * capacity

    @classmethod
    def complete_settings(cls, settings: dict[str, Any], rows: int) -> dict[str, Any]:
        """Return build settings, with the defaults that depend on the corpus.

        Args:
            settings: a value for each of `build_settings`, by name; None where `Setting.default` is None.
            rows: vectors of the whole index, in all shards.

        Raises:
            InputError: the settings do not suit so many vectors.
        """
        return settings

    @classmethod
    def deeper_settings(cls, settings: dict[str, Any], k: int) -> dict[str, Any]:
        """Return search settings that find more than `settings` in a search for k; {}: there are none."""
        return {}

    def train(self, vectors: np.ndarray) -> None:
        """Learn from vectors how to index (cells, codebooks). Called once, before the first `add`.

        Args:
            vectors: float32 [n, dimension], the first that will be added: `training_size`, or all if there are fewer.
        """
        raise NotImplementedError

    @abstractmethod
    def add(self, vectors: np.ndarray) -> None:
        """Add vectors, float32 [n, dimension]; their rows follow those that are there.

        It uses one thread, and makes the same index of the same vectors.
        """

    @abstractmethod
    def search(self, queries: np.ndarray, k: int, threads: int) -> SearchResult:
        """Return the k most similar vectors of each query, or all if there are fewer, best first.

        Of equal scores the lower row comes first. An exact engine keeps to that at the cut of k, too: of rows that are
        as similar as the k-th it returns the lower ones. An approximate engine only orders what it has found.

        Args:
            queries: float32 [queries, dimension].
            k: how many.
            threads: how many threads may compute; the result does not depend on it.
        """

    @abstractmethod
    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of some rows, int64, as they were added, float32 [rows, dimension]."""

    def all_vectors(self) -> np.ndarray:
        """Return all vectors, float32 [len(self), dimension]."""
        return self.vectors(np.arange(len(self)))

    @abstractmethod
    def save(self, path: str) -> None:
        """Write the index to a file, the same bytes for the same vectors and settings.

        Raises:
            OSError: the file cannot be written, or not all of it.
        """

    @abstractmethod
    def load(self, path: str) -> None:
        """Read what `save` has written into this index, which is empty.

        Raises:
            OSError, RuntimeError, ValueError: the file is damaged.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Return how many vectors it has."""


class VectorIndex(Protocol):
    """What recall.py and the service search: all vectors of a corpus, on all ranks.

    A row is the number of a document, or of a passage, in the corpus' `Documents`. A collection that was opened without
    its corpus has no such numbers; there a row is the key of a text (`text_keys`, `passage_keys`), which is >= 0, too.

    Attributes:
        manifest: what it is made of.
        max_k: the most rows that `search` gives; None: no limit.
    """

    manifest: Manifest
    max_k: int | None

    def search(self, queries: np.ndarray, k: int) -> SearchResult:
        """Return the k best rows of each query, float32 [queries, dimension]. All ranks call it together."""

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of some rows, float32 [rows, dimension]; zeros for rows of other ranks and NOT_FOUND."""

    def measure(self, queries: np.ndarray, k: int, kind: str) -> AnnRecall | None:
        """Return what the approximation misses, None: it is exact, or that cannot be measured."""

    def close(self) -> None:
        """Release files, threads and connections."""


class IndexFiller(Protocol):
    """An index, or an update of one, to which the vectors of a corpus are added:

        for rows in filler.missing_rows:
            filler.add(rows, encode(rows))
        filler.finish()

    Attributes:
        missing_rows: the rows that this rank has to encode and add, in pieces, int64 [rows]. In a new folder index the
            first row of each vector; in a collection those whose keys it lacks.
        bytes_needed: the memory that its vectors take in a process of this machine, the mean of all.
    """

    missing_rows: list[Any]
    bytes_needed: int

    def add(self, rows: Sequence[int], vectors: np.ndarray) -> None:
        """Add the vectors, float32 [rows, dimension], of one piece of `missing_rows`; the pieces come in their order.

        It may return before they are added, so that the next ones are encoded meanwhile. An error is raised by a later
        call. It may wait for the other ranks, until they have called `add` or `finish` as well.
        """

    def finish(self) -> None:
        """Wait until all is added and can be searched; remove rows that the corpus lacks. All ranks call it together.
        """


class Line(NamedTuple):
    """A line of the corpus that has a document's text."""

    number: int | None  # from 1; None: not known without the corpus
    id: str | None  # None: the corpus has no ids


class Document(NamedTuple):
    """A distinct text of the corpus, and its lines, in the order of the file."""

    text: str
    lines: list[Line]


class DocumentStore(Protocol):
    """Maps rows of an index to documents: `Documents` of a corpus, or `CollectionDocuments` of a collection.

    Documents are numbered as rows are: by their place in the corpus, or by key in a collection without it.

    Attributes:
        line_count: lines of the corpus; several may have one text.
        row_count: rows of the index.
        has_passages: whether a row is a passage. Otherwise a row is a document and has its number.
    """

    line_count: int
    row_count: int
    has_passages: bool

    def __len__(self) -> int:
        """Return how many documents, distinct texts, there are."""

    def documents_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of each row's document, int64 of the same shape; NOT_FOUND stays."""

    def rows_of(self, document: int) -> np.ndarray:
        """Return the rows of a document, int64."""

    def read(self, documents: Sequence[int], max_lines: int | None = None) -> list[Document]:
        """Return some documents by their numbers, each with its first `max_lines` lines; None: all."""

    def passage_texts(self, rows: Sequence[int]) -> list[str]:
        """Return the texts of some passages."""
