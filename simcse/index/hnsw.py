"""Approximate search by hnswlib's graph."""

import os
from typing import Any

from simcse.console import InputError, count
from simcse.huge_pages import huge_pages
from simcse.index.protocols import LocalEngine, SearchResult
from simcse.index.settings import HNSW_EF, HNSW_M, HNSW_MAX_ELEMENTS

import numpy as np

DEEPER = 4  # how many times larger an ef is measured for comparison


class HnswEngine(LocalEngine):
    """A graph of hnswlib (Malkov and Yashunin 2018) on inner products, which are cosines of L2-normalized vectors.

    Memory and recall grow with "hnsw_m", time and recall with "hnsw_ef".

    A graph is read at random over all of its memory. In pages of 2 MB a million vectors are searched about 1.3 times as
    fast, and built 1.2 times.
    """

    description = "an approximate graph"
    packages = ("hnswlib",)
    build_settings = (HNSW_M, HNSW_MAX_ELEMENTS)
    search_settings = (HNSW_EF,)
    approximate = True
    copies_to_read = True
    queries_per_thread = 4  # hnswlib uses a single thread if there are no more queries per thread

    def __init__(self, dimension: int, capacity: int, settings: dict[str, Any]) -> None:
        import hnswlib

        super().__init__(dimension, capacity, settings)
        self._index = hnswlib.Index(space="ip", dim=dimension)
        self._has_memory = False

    @classmethod
    def bytes_needed(cls, dimension: int, capacity: int, settings: dict[str, Any]) -> int:
        """Return the bytes of the vectors, their links and what hnswlib keeps of each; see `LocalEngine`."""
        vector = 4 * dimension
        links = 8 * settings["hnsw_m"]
        label_and_lock = 60
        return capacity * (vector + links + label_and_lock)

    @classmethod
    def complete_settings(cls, settings: dict[str, Any], rows: int) -> dict[str, Any]:
        """Return the settings, with "hnsw_max_elements" for so many vectors if it is None; see `LocalEngine`."""
        limit = settings["hnsw_max_elements"]
        if limit is not None and limit < rows:
            raise InputError(f"--hnsw_max_elements {limit}: the corpus takes {count(rows, 'vector')}")
        return {**settings, "hnsw_max_elements": limit or rows}

    @classmethod
    def deeper_settings(cls, settings: dict[str, Any], k: int) -> dict[str, Any]:
        """Return a larger ef than a search for k uses with these settings."""
        return {"hnsw_ef": DEEPER * max(settings["hnsw_ef"], 2 * k)}

    def __len__(self) -> int:
        if not self._has_memory:  # hnswlib crashes if it is asked before
            return 0
        return self._index.get_current_count()

    def add(self, vectors: np.ndarray) -> None:
        """Add vectors, float32 [n, dimension], by one thread, so that the same vectors make the same graph."""
        if not self._has_memory:
            self._allocate()
        labels = np.arange(len(self), len(self) + len(vectors))
        self._index.add_items(vectors, labels, num_threads=1)

    def search(self, queries: np.ndarray, k: int, threads: int) -> SearchResult:
        """Return about the k most similar vectors of each query, found among at least 2 k candidates.

        Raises:
            InputError: the graph has too few links: a search does not reach k vectors.
        """
        k = min(k, len(self))
        ef = max(self.settings["hnsw_ef"], 2 * k)
        while True:
            self._index.set_ef(ef)
            try:
                rows, distances = self._index.knn_query(queries, k, threads)
                return SearchResult(rows.astype("int64"), 1.0 - distances)
            except RuntimeError:  # hnswlib reached fewer than k with this ef
                if ef >= len(self):
                    raise InputError(f"--hnsw_m is too small: the index does not reach {k} documents from every query; "
                                     "raise --hnsw_m or --hnsw_ef") from None
                ef = min(2 * ef, len(self))

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of some rows, float32 [rows, dimension]."""
        return np.asarray(self._index.get_items(rows), "float32")

    def all_vectors(self) -> np.ndarray:
        """Return all vectors, float32 [len(self), dimension].

        They are a view of a copy of the graph's lowest level, with its links, which lives as long as the view.
        `get_items`, which makes a Python object of every number, takes 20 times as long.
        """
        if not len(self):
            return np.empty((0, self.dimension), "float32")
        # What pickle would write, in the layout of hnswlib 0.8. Nodes are in the order of labels: one thread adds them.
        state = self._index.__getstate__()[0]
        nodes = state["data_level0"].view("uint8").reshape(-1, state["size_data_per_element"])
        start = state["offset_data"]
        return nodes[: len(self), start : start + 4 * self.dimension].view("float32")

    def save(self, path: str) -> None:
        """Write the graph in hnswlib's format; see `LocalEngine`."""
        try:
            self._index.save_index(path)
        except RuntimeError as error:  # it cannot open the file
            raise OSError(str(error)) from None
        written = os.path.getsize(path)
        expected = self._index.index_file_size()
        if written != expected:  # hnswlib does not notice a full disk
            raise OSError(f"{written:,} of {expected:,} bytes were written; is the disk full?")

    def load(self, path: str) -> None:
        """Read a graph that `save` has written."""
        with huge_pages():
            # The graph is in small pages until Linux moves it. It could do that at once: for 200,000 vectors of 256
            # that takes as long as it saves in some 2,000 to 4,000 queries (0.1 to 0.3 s, 0.06 ms a query).
            self._index.load_index(path, self.capacity)
        self._has_memory = True

    def _allocate(self) -> None:
        """Reserve the memory of `capacity` vectors and their links."""
        try:
            with huge_pages():
                self._index.init_index(max_elements=self.capacity, ef_construction=self.settings["hnsw_ef"],
                                       M=self.settings["hnsw_m"])
        except (MemoryError, RuntimeError):
            needed = self.bytes_needed(self.dimension, self.capacity, self.settings)
            raise InputError(f"hnswlib gets no memory for a graph of {self.capacity:,} vectors of {self.dimension}, "
                             f"{needed / 1e9:.1f} GB; use several machines, or --ann_engine milvus"
                             ) from None
        self._has_memory = True
