"""An index in shards, each of a local engine, on one or several ranks."""

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from simcse.console import InputError, count, progress
from simcse.files import file_digest
from simcse.index.ann_recall import measure_recall
from simcse.index.engines import LOCAL_ENGINES
from simcse.index.exact import exact_search
from simcse.index.manifest import AnnRecall, Manifest
from simcse.index.protocols import NO_SCORE, NOT_FOUND, LocalEngine, SearchResult, merge_results
from simcse.index.vector_map import VectorMap
from simcse.machine import CPU_THREADS, LOCAL_RANKS, RANK, RANKS, available_memory
from simcse.text.tokens import WINDOW

import numpy as np

# A search looks at every shard, so that it takes longer the more there are; a shard is built by one thread, so that
# building takes longer the fewer there are. Measured on 2 cores with clustered vectors of 256, at equal recall and
# against a single graph: 2 shards search 100,000 vectors at 0.7 of its speed, 8 shards at 0.26. Of a million vectors
# 2 shards search at 0.95 and 8 at 0.6, and on two threads 2 are built as fast as 8.
VECTORS_OF_ONE_SHARD = 200_000
VECTORS_PER_SHARD = 500_000
MAX_SHARDS = 8
# A single shard holds its vectors in their order, however they are cut into pieces. So a small corpus is cut into this
# many, for several ranks to encode.
PIECES_OF_ONE_SHARD = 8


def choose_shard_count(vector_count: int) -> int:
    """Return in how many shards so many vectors are indexed, where --index_shards does not say it.

    It depends on nothing else, so that the same corpus has the same index on every machine.
    """
    if vector_count <= VECTORS_OF_ONE_SHARD:
        return 1
    shards = -(-vector_count // VECTORS_PER_SHARD)
    return min(max(shards, 2), MAX_SHARDS)


class ShardedIndex:
    """An index in parts: a `VectorIndex` of a local engine.

    Rows with the same token ids after truncation share a vector; see `VectorMap`. The vectors are cut into pieces.
    Piece i is in shard i % shards, and shard s on rank s % ranks. So which vector goes where, and in what order,
    depends on neither ranks nor threads, and results do not either. A shard numbers its vectors from 0 as they are
    added.

    Rank r encodes the pieces r, r + ranks, r + 2 ranks and so on, so that all ranks encode about as many vectors. Where
    ranks divide shards, these are the pieces of its own shards. Otherwise, with fewer shards than ranks for instance,
    the ranks go in rounds: each encodes a piece, then they exchange these pieces, and each adds what belongs to its
    shards.

    It is empty at first: `add` its `missing_rows` or `load` what was saved.

    Args:
        manifest: its ann_engine, index_shards, dimension, rows, build_settings and search_settings; to `load` it
            also its files.
        threads: those of a search; as many shards are added to at a time. 0: all cores.
        vector_map: of rows to vectors; None: each row has its own.
        rank, ranks: those of this process, if it is to have the shards of another one.

    Raises:
        InputError: the shards on this machine need more memory than is free.
    """

    max_k = None

    def __init__(self, manifest: Manifest, threads: int = 0, vector_map: VectorMap | None = None, rank: int = RANK,
                 ranks: int = RANKS) -> None:
        self.manifest = manifest
        self.vector_map = vector_map or VectorMap.of_own_vectors(manifest.rows)
        self.search_settings = dict(manifest.search_settings)
        self._engine = LOCAL_ENGINES[manifest.ann_engine]
        self._threads = threads or CPU_THREADS
        self._workers = ThreadPoolExecutor(self._threads)
        self._adding = deque[tuple[Future, int]]()  # what the workers add, and how many rows each
        self._rank = rank
        self._ranks = ranks
        self._has_to_exchange = manifest.index_shards % ranks != 0
        vector_count = self.vector_map.vector_count
        pieces = PIECES_OF_ONE_SHARD if manifest.index_shards == 1 else manifest.index_shards
        # How many vectors a piece has; the last piece may have fewer.
        self._piece_size = min(WINDOW, -(-vector_count // pieces))
        self._piece_count = -(-vector_count // self._piece_size)
        self._next_round = 0  # of those in which each rank adds a piece
        self.missing_rows = [self.vector_map.first_rows(self._vectors_of(piece))
                             for piece in range(rank, self._piece_count, ranks)]
        capacities = self._count_vectors_of_shards()
        settings = {**manifest.build_settings, **self.search_settings}
        self.bytes_needed = self._count_bytes(capacities, settings)
        self._shards: dict[int, _Shard] = {}
        for shard in range(rank, len(capacities), ranks):
            self._shards[shard] = _Shard(self._engine(manifest.dimension, capacities[shard], dict(settings)))
        # How many blocks of vectors are added at a time: one more than there are threads, so that none waits.
        # Consecutive blocks go to different shards, so that with at most as many as shards none gets two at a time.
        self._most_adding = min(self._threads + 1, len(self._shards))

    def _vectors_of(self, piece: int) -> slice:
        """Return which vectors a piece has."""
        start = piece * self._piece_size
        return slice(start, min(start + self._piece_size, self.vector_map.vector_count))

    def _count_vectors_of_shards(self) -> list[int]:
        """Return how many vectors each shard has, on whatever rank; shards without a vector, the last, are left out."""
        counts = [0] * min(self.manifest.index_shards, self._piece_count)
        for piece in range(self._piece_count):
            vectors = self._vectors_of(piece)
            counts[piece % self.manifest.index_shards] += vectors.stop - vectors.start
        return counts

    def _count_bytes(self, capacities: Sequence[int], settings: dict[str, Any]) -> int:
        """Return the bytes that the shards on this machine need, per process.

        Args:
            capacities: how many vectors each shard has.
            settings: those of the engine.

        Raises:
            InputError: together they are more than is free.
        """
        dimension = self.manifest.dimension
        first_rank = self._rank - self._rank % LOCAL_RANKS  # the ranks of a machine follow each other
        ranks_here = range(first_rank, first_rank + LOCAL_RANKS)
        capacities_here = [capacity for shard, capacity in enumerate(capacities) if shard % self._ranks in ranks_here]
        bytes_of_shards = [self._engine.bytes_needed(dimension, capacity, settings) for capacity in capacities_here]
        needed = sum(bytes_of_shards)
        if self._engine.copies_to_read:  # while the recall is measured, each rank a shard at a time
            needed += sum(sorted(bytes_of_shards)[-LOCAL_RANKS:])
        free = max(0, available_memory())
        if needed > free:
            raise InputError(f"the index of {sum(capacities_here):,} vectors of {dimension} needs "
                             f"{needed / 1e9:.2f} GB of memory, and {free / 1e9:.2f} are free: use several machines, "
                             "or --ann_engine milvus")
        return needed // LOCAL_RANKS

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
        if self.manifest.index_shards == 1:
            return local_ids
        piece_of_shard, place = np.divmod(local_ids, self._piece_size)
        piece = piece_of_shard * self.manifest.index_shards + shard
        return np.where(local_ids == NOT_FOUND, NOT_FOUND, piece * self._piece_size + place)

    # ------------------------------------------------------------------------------------------------------- filling
    def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Add the vectors, float32 [rows, dim], of the next of `missing_rows` in the background; see `VectorIndex`.

        Where ranks exchange pieces, it waits until all ranks have called it, or `finish`.
        """
        expected = self._vectors_of(self._next_round * self._ranks + self._rank)
        if len(vectors) != expected.stop - expected.start:
            raise ValueError(f"{len(vectors)} vectors, where the next piece has {expected.stop - expected.start}")
        self._add_round(vectors)

    def _add_round(self, vectors: np.ndarray) -> None:
        """Add what this rank gets of the next round, to which it gives some vectors, float32 [vectors, dim]."""
        for shard, vectors_of_shard in self._share_out(vectors).items():
            while len(self._adding) >= self._most_adding:
                self._wait_for_oldest()
            future = self._workers.submit(self._shards[shard].add, vectors_of_shard)
            self._adding.append((future, len(vectors_of_shard)))

    def finish(self) -> None:
        """Wait until all vectors are added."""
        rounds = -(-self._piece_count // self._ranks)
        if self._has_to_exchange and self._next_round < rounds:  # the last round, in which this rank has no piece
            self._add_round(np.empty((0, self.manifest.dimension), "float32"))
        with progress("indexing", sum(count for _, count in self._adding), "vectors") as advance:
            while self._adding:
                advance(self._wait_for_oldest())
        self.missing_rows = []

    def _share_out(self, vectors: np.ndarray) -> dict[int, np.ndarray]:
        """Return the vectors of the next round that belong to the shards of this rank, by shard.

        Args:
            vectors: the piece that this rank has in the round, float32 [vectors, dim].
        """
        first_piece = self._next_round * self._ranks
        self._next_round += 1
        shards = self.manifest.index_shards
        if not self._has_to_exchange:
            return {(first_piece + self._rank) % shards: vectors}
        from simcse.ranks import gather_arrays

        padded = np.zeros((self._piece_size, self.manifest.dimension), "float32")  # ranks gather arrays of one shape
        padded[: len(vectors)] = vectors
        parts: dict[int, list[np.ndarray]] = {}
        for piece, part in enumerate(gather_arrays(padded), first_piece):
            shard = piece % shards
            if piece < self._piece_count and shard in self._shards:
                piece_vectors = self._vectors_of(piece)
                parts.setdefault(shard, []).append(part[: piece_vectors.stop - piece_vectors.start])
        return {shard: np.concatenate(parts_of_shard) for shard, parts_of_shard in parts.items()}

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
        """Return the k best rows of each query; rows that share a vector follow each other. See `VectorIndex`."""
        return self.vector_map.expand(self._search_vectors(queries, k), k)

    def _search_vectors(self, queries: np.ndarray, k: int, exact: bool = False) -> SearchResult:
        """Return the k best vectors of each query; the rows of the result are the numbers of vectors.

        Args:
            queries: float32 [queries, dim], the same on all ranks.
            k: how many.
            exact: by a matrix product, whatever the engine.
        """
        from simcse.ranks import gather_arrays

        local = [_nothing_found(len(queries))]
        if self._shards:
            local = self._search_own(queries, k, exact)
        found = _pad(merge_results(local, k), k)
        if self._ranks == 1:
            return found
        results = map(SearchResult, gather_arrays(found.rows), gather_arrays(found.scores))
        return merge_results(results, k)

    def _search_own(self, queries: np.ndarray, k: int, exact: bool) -> list[SearchResult]:
        """Return what each shard of this rank finds."""
        shards = list(self._shards)
        is_shared_by_shards = len(queries) <= self._threads * self._engine.queries_per_thread
        results = []
        with progress(f"searching {count(len(queries), 'query')}", len(shards), "shards") as advance:
            if len(shards) > 1 and is_shared_by_shards and not exact:  # which has a copy of one shard at a time
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
            if exact:
                found = exact_search(queries, engine.all_vectors(), k, threads)
            else:
                found = engine.search(queries, k, threads)
            results.append(SearchResult(self._global_ids(shard, found.rows), found.scores))
        return results

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of some rows, float32 [rows, dim]; zeros for rows of other ranks and NOT_FOUND."""
        vectors = np.zeros((len(rows), self.manifest.dimension), "float32")
        for number, shard in self._shards.items():
            places, local_ids = self._find_in_shard(number, rows)
            if len(places):
                vectors[places] = shard.engine.vectors(local_ids)
        return vectors

    def copy_vectors(self, rows_of_pieces: Sequence[np.ndarray], pieces: Sequence[np.ndarray]) -> None:
        """Write the vectors of rows to their places in some pieces; it is for many rows, and `vectors` for few.

        Args:
            rows_of_pieces: int64 [rows] each; those of other ranks and NOT_FOUND are left as they are.
            pieces: float32 [rows, dim] each.
        """
        for number, shard in self._shards.items():
            vectors_of_shard = shard.engine.all_vectors()
            for rows, piece in zip(rows_of_pieces, pieces, strict=True):
                places, local_ids = self._find_in_shard(number, rows)
                piece[places] = vectors_of_shard[local_ids]

    def _find_in_shard(self, shard: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of some rows a shard has, int64, and the numbers of their vectors in it, int64."""
        vector_ids = self.vector_map.vector_ids_of(rows)
        places = np.flatnonzero((vector_ids != NOT_FOUND) & (self._shard_of(vector_ids) == shard))
        return places, self._local_ids(vector_ids[places])

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

        def search(settings: dict[str, Any]) -> np.ndarray:
            self.set_search_settings(settings)
            return self._search_vectors(queries, k).scores

        measured = measure_recall(search, exact.scores, settings, deeper_settings, kind, self.manifest.rows)
        self.set_search_settings(settings)
        return measured

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


def _nothing_found(queries: int) -> SearchResult:
    """Return a result without columns."""
    return SearchResult(np.empty((queries, 0), "int64"), np.empty((queries, 0), "float32"))


def _pad(result: SearchResult, k: int) -> SearchResult:
    """Return a result with k columns; the added ones are NOT_FOUND."""
    missing = k - result.rows.shape[1]
    if not missing:
        return result
    rows = np.full((len(result.rows), missing), NOT_FOUND)
    scores = np.full((len(result.rows), missing), NO_SCORE, "float32")
    return SearchResult(np.hstack([result.rows, rows]), np.hstack([result.scores, scores]))
