"""An index in shards, each of a local engine, on one or several ranks."""

import os
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from simcse.console import InputError, count, progress
from simcse.files import file_digest
from simcse.index.ann_recall import ann_recall
from simcse.index.engines import LOCAL_ENGINES
from simcse.index.exact import QUERY_BLOCK, exact_search
from simcse.index.manifest import AnnRecall, Manifest
from simcse.index.protocols import NO_SCORE, NOT_FOUND, LocalEngine, SearchResult, merge_results
from simcse.index.vector_map import VectorMap
from simcse.machine import CPU_THREADS, LOCAL_RANKS, RANK, RANKS, available_memory
from simcse.text.tokens import WINDOW

import numpy as np


class ShardedIndex:
    """An index in parts: an `Index` of a local engine.

    Rows with the same token ids after truncation share a vector; see `VectorMap`. The vectors are cut into pieces.
    Piece i is in shard i % shards, and shard s on rank s % ranks. So which vector goes where, and in what order,
    depends on neither ranks nor threads, and results do not either. A shard numbers its vectors from 0 as they are
    added.

    It is empty at first: `add` its `missing_rows` or `load` what was saved.

    Args:
        manifest: its ann_engine, index_shards, dimension, rows, build_settings and search_settings; to `load` it
            also its files.
        threads: those of a search; as many shards are added to at a time. 0: all cores.
        vector_map: of rows to vectors; None: each row has its own.
        rank, ranks: those of this process, if it is to have the shards of another one.

    Raises:
        InputError: there are more ranks than shards, or the shards of this process need more memory than is free.
    """

    max_k = None

    def __init__(self, manifest: Manifest, threads: int = 0, vector_map: VectorMap | None = None, rank: int = RANK,
                 ranks: int = RANKS) -> None:
        if manifest.index_shards < ranks:
            raise InputError(f"--index_shards {manifest.index_shards} must be at least the number of processes "
                             f"({ranks})")
        self.manifest = manifest
        self.vector_map = vector_map or VectorMap.of_own_vectors(manifest.rows)
        self.search_settings = dict(manifest.search_settings)
        self._engine = LOCAL_ENGINES[manifest.ann_engine]
        self._threads = threads or CPU_THREADS
        self._workers = ThreadPoolExecutor(self._threads)
        self._adding = deque[tuple[Future, int]]()  # what the workers add, and how many rows each
        vector_count = self.vector_map.vector_count
        # How many vectors a piece has; the last piece may have fewer.
        self._piece_size = min(WINDOW, -(-vector_count // manifest.index_shards))
        self.missing_rows: list[np.ndarray] = []
        capacity_of: dict[int, int] = {}  # how many vectors each shard of this rank will have
        for start in range(0, vector_count, self._piece_size):
            shard = self._shard_of(start)
            if shard % ranks == rank:
                first_rows = self.vector_map.first_rows(slice(start, start + self._piece_size))
                self.missing_rows.append(first_rows)
                capacity_of[shard] = capacity_of.get(shard, 0) + len(first_rows)
        settings = {**manifest.build_settings, **self.search_settings}
        self.bytes_needed = self._count_bytes(capacity_of.values(), settings)
        self._shards: dict[int, _Shard] = {}
        for shard, capacity in capacity_of.items():
            self._shards[shard] = _Shard(self._engine(manifest.dimension, capacity, dict(settings)))
        # Most pieces that are added at a time: one more than there are threads, so that none waits. Consecutive pieces
        # go to different shards, so that with at most as many pieces as shards none gets two at a time.
        self._most_adding = min(self._threads + 1, len(self._shards))

    def _count_bytes(self, capacities: Collection[int], settings: dict[str, Any]) -> int:
        """Return the bytes that shards of so many vectors, those of this process, need.

        Raises:
            InputError: it is more memory than is free.
        """
        dimension = self.manifest.dimension
        needed = sum(self._engine.bytes_needed(dimension, capacity, settings) for capacity in capacities)
        needed_here = LOCAL_RANKS * needed
        free = max(0, available_memory())
        if needed_here > free:
            raise InputError(f"the index of {LOCAL_RANKS * sum(capacities):,} vectors of {dimension} needs "
                             f"{needed_here / 1e9:.2f} GB of memory, and {free / 1e9:.2f} are free: use several "
                             "machines, or --ann_engine milvus")
        return needed

    # ---------------------------------------------------------------------------------------- vectors of the shards
    def _shard_of(self, vectors: Any) -> Any:
        """Return the shard of a vector, or those of an array of vectors."""
        return vectors // self._piece_size % self.manifest.index_shards

    def _local_ids(self, vectors: np.ndarray) -> np.ndarray:
        """Return the numbers that vectors have in their shards, instead of those in the whole index."""
        piece, place = np.divmod(vectors, self._piece_size)
        piece_of_shard = piece // self.manifest.index_shards
        return piece_of_shard * self._piece_size + place

    def _global_ids(self, shard: int, local_ids: np.ndarray) -> np.ndarray:
        """Return the numbers in the whole index of vectors of a shard, the inverse of `_local_ids`; NOT_FOUND stays."""
        piece_of_shard, place = np.divmod(local_ids, self._piece_size)
        piece = piece_of_shard * self.manifest.index_shards + shard
        return np.where(local_ids == NOT_FOUND, NOT_FOUND, piece * self._piece_size + place)

    # ------------------------------------------------------------------------------------------------------- filling
    def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Add the vectors, float32 [rows, dim], of the next of `missing_rows` in the background; see `Index`."""
        while len(self._adding) >= self._most_adding:
            self._wait_for_oldest()
        shard = self._shards[self._shard_of(int(self.vector_map.vector_of_row[rows[0]]))]
        future = self._workers.submit(shard.add, vectors)
        self._adding.append((future, len(rows)))

    def finish(self) -> None:
        """Wait until all vectors are added."""
        with progress("indexing", sum(count for _, count in self._adding), "vectors") as advance:
            while self._adding:
                advance(self._wait_for_oldest())
        self.missing_rows = []

    def _wait_for_oldest(self) -> int:
        """Wait for what was given to the workers first; return how many rows that was."""
        added, count = self._adding.popleft()
        added.result()
        return count

    # ----------------------------------------------------------------------------------------------------- searching
    def set_search_settings(self, settings: dict[str, Any]) -> None:
        """Search with other values of some settings from now on."""
        self.search_settings.update(settings)
        for shard in self._shards.values():
            shard.engine.settings.update(settings)

    def search(self, queries: np.ndarray, k: int) -> SearchResult:
        """Return the k best rows of each query; rows that share a vector follow each other. See `Index`."""
        return self.vector_map.rows_of(self._search_vectors(queries, k), k)

    def _search_vectors(self, queries: np.ndarray, k: int, exact: bool = False) -> SearchResult:
        """Return the k best vectors of each query, as rows of the result.

        Args:
            queries: float32 [queries, dim], the same on all ranks.
            k: how many.
            exact: by a matrix product, whatever the engine.
        """
        from simcse.ranks import gather_arrays

        own = merge_results([_nothing_found(len(queries), k), *self._search_own(queries, k, exact)], k)
        results = map(SearchResult, gather_arrays(own.rows), gather_arrays(own.scores))
        return merge_results(results, k)

    def _search_own(self, queries: np.ndarray, k: int, exact: bool) -> list[SearchResult]:
        """Return what each shard of this rank finds."""
        shards = list(self._shards)
        queries_per_thread = QUERY_BLOCK if exact else self._engine.queries_per_thread
        results = []
        with progress(f"searching {count(len(queries), 'query')}", len(shards), "shards") as advance:
            if len(queries) <= self._threads * queries_per_thread:
                # Too few to share out among the threads: each thread searches a share of the shards instead.
                shares = [shards[thread :: self._threads] for thread in range(min(self._threads, len(shards)))]
                running = [self._workers.submit(self._search_shards, share, queries, k, exact, 1) for share in shares]
                for share, search in zip(shares, running):
                    results += search.result()
                    advance(len(share))
            else:
                for shard in shards:
                    results += self._search_shards([shard], queries, k, exact, self._threads)
                    advance(1)
        return results

    def _search_shards(self, shards: Sequence[int], queries: np.ndarray, k: int, exact: bool,
                       threads: int) -> list[SearchResult]:
        """Return the k best vectors of each of some shards, by their numbers in the whole index."""
        results = []
        for shard in shards:
            engine = self._shards[shard].engine
            found = exact_search(queries, engine, k, threads) if exact else engine.search(queries, k, threads)
            results.append(SearchResult(self._global_ids(shard, found.rows), found.scores))
        return results

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of some rows, float32 [rows, dim]; zeros for rows of other ranks and NOT_FOUND."""
        vectors = np.zeros((len(rows), self.manifest.dimension), "float32")
        self.copy_vectors(rows, vectors)
        return vectors

    def copy_vectors(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Write the vectors of those rows that are on this rank to their places in `vectors`, float32 [rows, dim]."""
        vector_ids = self.vector_map.vector_ids_of(rows)
        shard_of_row = np.where(vector_ids == NOT_FOUND, NOT_FOUND, self._shard_of(vector_ids))
        for number, shard in self._shards.items():
            places = np.flatnonzero(shard_of_row == number)
            if len(places):
                vectors[places] = shard.engine.vectors(self._local_ids(vector_ids[places]))

    def measure(self, queries: np.ndarray, k: int, kind: str) -> AnnRecall | None:
        """Return the recall@k against exact search, of a search with its settings and of one with deeper ones.

        Args:
            queries: float32 [queries, dim].
            k: how deep.
            kind: what the queries are, a plural, for the report.

        Returns:
            None: the engine is exact.
        """
        if not self._engine.approximate:
            return None
        k = min(k, self.vector_map.vector_count)
        settings = dict(self.search_settings)
        deeper_settings = self._engine.deeper_settings(settings, k)
        exact = self._search_vectors(queries, k, exact=True)
        recall = ann_recall(self._search_vectors(queries, k).scores, exact.scores)
        deeper_recall = recall
        if deeper_settings:
            self.set_search_settings(deeper_settings)
            deeper_recall = ann_recall(self._search_vectors(queries, k).scores, exact.scores)
            self.set_search_settings(settings)
        return AnnRecall(k=k, queries=f"{len(queries)} {kind}", recall=round(recall, 4), settings=settings,
                         deeper_recall=round(deeper_recall, 4), deeper_settings=deeper_settings)

    # ------------------------------------------------------------------------------------------------------- keeping
    def save(self, folder: str) -> None:
        """Write this rank's shards to a folder.

        Raises:
            OSError: a file cannot be written, or not all of it.
        """
        for number, shard in self._shards.items():
            shard.engine.save(os.path.join(folder, _file_of_shard(number)))

    def load(self, folder: str) -> None:
        """Read this rank's shards from a folder to which `save` has written them.

        Raises:
            OSError, RuntimeError, ValueError: a file is damaged.
        """
        for number, shard in self._shards.items():
            name = _file_of_shard(number)
            path = os.path.join(folder, name)
            if file_digest(path) != self.manifest.files.get(name):
                raise ValueError(f"{name} is not what was written")
            shard.engine.load(path)
        self.missing_rows = []

    def close(self) -> None:
        """End the threads."""
        self._workers.shutdown()


class _Shard:
    """Trains an engine with its first vectors, if it needs that, before they are added to it."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine = engine
        self._is_trained = engine.training_size == 0
        self._waiting: list[np.ndarray] = []  # vectors that are not added yet

    def add(self, vectors: np.ndarray) -> None:
        """Add vectors, float32 [n, dim]."""
        if self._is_trained:
            self.engine.add(vectors)
            return
        self._waiting.append(vectors)
        count = sum(len(block) for block in self._waiting)
        if count < min(self.engine.training_size, self.engine.capacity):
            return
        vectors = np.concatenate(self._waiting)
        self._waiting = []
        self.engine.train(vectors[: self.engine.training_size])
        self._is_trained = True
        self.engine.add(vectors)


def _file_of_shard(shard: int) -> str:
    return f"shard_{shard}.bin"


def _nothing_found(queries: int, k: int) -> SearchResult:
    """Return a result that is NOT_FOUND throughout; merged with others it pads queries that have fewer than k rows."""
    return SearchResult(np.full((queries, k), NOT_FOUND), np.full((queries, k), NO_SCORE, "float32"))
