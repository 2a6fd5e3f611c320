"""An index in shards, each a graph of hnswlib or an exact index, and what its approximation costs."""

import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from simcse.console import InputError, log, progress, warn
from simcse.files import file_digest
from simcse.index.exact import QUERY_BLOCK, ExactIndex, Found, exact_search, merge
from simcse.index.hnsw import HNSW_BLOCK, HnswIndex
from simcse.machine import CPU_THREADS, RANK, RANKS
from simcse.text.tokens import WINDOW

import numpy as np

MEASURED = 100  # documents, or queries, that an index is measured with
POOR = 0.99  # ANN recall below which it is said what finds more
MEASURED_K, DEEPER = 10, 4  # how deep an index is measured; a larger ef to compare


class Shards:
    """An index in parts: the entries in pieces, piece i in shard i % shards, shard s on rank s % ranks. Which entry
    goes where, and in what order, depends on neither ranks nor threads, so results do not either. `pieces` are the
    rows of this rank.

    Args:
        fingerprint: its "ann_engine", "index_shards", "hnsw_m", "hnsw_ef", "hnsw_max_elements", and with a folder
            "files": the SHA-256 of its files by their names.
        entries, dim: how many embeddings of what size there are on all ranks.
        cpu_threads: those of a search, and of adding, a shard each; 0: all cores.
        folder: where `save` has written the shards; None: they are empty.

    InputError: more ranks than shards, or too little memory. OSError, RuntimeError, ValueError: a damaged file.
    """

    def __init__(self, fingerprint: dict, entries: int, dim: int, cpu_threads: int = 0, folder: str | None = None,
                 rank: int = RANK, ranks: int = RANKS) -> None:
        self.fingerprint = fingerprint
        self._threads, self._count = cpu_threads or CPU_THREADS, fingerprint["index_shards"]
        self._workers = ThreadPoolExecutor(self._threads)
        if self._count < ranks:
            raise InputError(f"--index_shards {self._count}: there are {ranks} processes")
        self._piece = min(WINDOW, -(-entries // self._count))
        pieces = [range(start, min(start + self._piece, entries)) for start in range(0, entries, self._piece)]
        self.pieces = [rows for number, rows in enumerate(pieces) if number % self._count % ranks == rank]
        self._shards = {}
        for shard in range(rank, min(self._count, len(pieces)), ranks):
            name = f"shard_{shard}.bin"
            path = folder and os.path.join(folder, name)
            if path and file_digest(path) != fingerprint["files"].get(name):
                raise ValueError(f"{name} is not what was written")
            if fingerprint["ann_engine"] == "exact":
                self._shards[shard] = ExactIndex(path)
            else:
                size = max(sum(map(len, pieces[shard :: self._count])),
                           -(-fingerprint["hnsw_max_elements"] // self._count))
                self._shards[shard] = HnswIndex(dim, size, fingerprint["hnsw_m"], fingerprint["hnsw_ef"],
                                                self._threads, path)

    def fill(self, blocks: Iterable[np.ndarray]) -> None:
        """Add the embeddings of `pieces`, float32 [len(piece), dim] each, in the background while the next are made."""
        adding = deque[tuple[Future, int]]()
        for embeddings, rows in zip(blocks, self.pieces):
            # Pieces take turns with the shards, so that those in the queue are all of different ones.
            while len(adding) > min(self._threads, len(self._shards) - 1):
                adding.popleft()[0].result()
            shard = self._shards[rows.start // self._piece % self._count]
            adding.append((self._workers.submit(shard.add, embeddings), len(rows)))
        with progress("indexing", sum(count for _, count in adding), "documents") as advance:
            for added, count in adding:
                added.result()
                advance(count)

    def take(self, entries: np.ndarray, vectors: np.ndarray) -> None:
        """Write the embeddings of those of some entries that are on this rank to their rows of `vectors`."""
        pieces, places = np.divmod(entries, self._piece)
        for shard, index in self._shards.items():
            rows, = np.nonzero((entries >= 0) & (pieces % self._count == shard))
            if len(rows):
                vectors[rows] = index[pieces[rows] // self._count * self._piece + places[rows]]

    def search(self, queries: np.ndarray, k: int, exact: bool = False) -> Found:
        """The k best entries, approximately or exactly; where there are fewer, the last are rows -1 of cosine -inf.
        All ranks ask together, and find the same."""
        from simcse.ranks import gather_arrays

        missing = max(0, k - sum(map(len, self._shards.values())))
        parts = [(np.full((len(queries), missing), -1), np.full((len(queries), missing), -np.inf, "float32"))]
        exact, shards = exact or self.fingerprint["ann_engine"] == "exact", list(self._shards)

        def search_some(some: list[int]) -> list[Found]:
            found = []
            for shard in some:
                index = self._shards[shard]
                rows, cosines = exact_search(queries, index, k) if exact else index.search(queries, k)
                pieces, places = np.divmod(rows, self._piece)
                found.append(((shard + pieces * self._count) * self._piece + places, cosines))
            return found

        # A shard's search shares out blocks of the queries among the threads. Of few queries it would leave threads
        # idle; then each thread searches its share of the shards.
        few = len(queries) <= self._threads * (QUERY_BLOCK if exact else HNSW_BLOCK)
        shares = min(self._threads, len(shards)) if few else len(shards)
        with progress(f"searching {len(queries):,} queries", len(shards), "shards") as advance:
            for found in (self._workers.map if few else map)(search_some, [shards[n::shares] for n in range(shares)]):
                parts += found
                advance(len(found))
        return merge(zip(*map(gather_arrays, merge(parts, k))), k)

    def measure(self, queries: np.ndarray, k: int, what: str) -> dict:
        """What the graph's approximation costs `queries`, which are `what`: "recall", the part of the exact k best
        entries that is found with the search's "hnsw_ef", and with one DEEPER times as large."""
        ef, recalls = self.fingerprint["hnsw_ef"], []
        efs = [DEEPER * max(ef, 2 * k), ef]
        _, exact = self.search(queries, k, exact=True)
        for each in efs:
            for shard in self._shards.values():
                shard.ef = each
            recalls.append(round(ann_recall(self.search(queries, k)[1], exact), 4))
        return {"k": k, "queries": f"{len(queries)} {what}", "recall": recalls[1], "hnsw_ef": ef,
                "deeper_recall": recalls[0], "deeper_ef": efs[0]}

    def save(self, folder: str) -> None:
        """Write this rank's shards to the folder."""
        for shard, index in self._shards.items():
            index.save(os.path.join(folder, f"shard_{shard}.bin"))

    def close(self) -> None:
        """Nothing is to be let go of, unlike in a `MilvusIndex`."""


def sample(items: Any) -> Any:
    """Every nth of some entries or embeddings, MEASURED at most, to measure an index with."""
    return items[:: -(-len(items) // MEASURED)]


def ann_recall(cosines: np.ndarray, exact_cosines: np.ndarray) -> float:
    """The part of the exact result that an approximate one has, both cosines [Q, k] of the same queries, best first;
    documents of equal cosine stand for each other."""
    return float(np.mean(cosines >= exact_cosines[:, -1:] - 1e-6))


def report(measured: dict | None, ef: int = 0) -> None:
    """Say what `Shards.measure` has found, and, where much is missed, what has been seen to find more; and where the
    search has another `ef`, for which nothing was measured."""
    if RANK or not measured:
        return
    remedy = ""
    if measured["recall"] < POOR:
        helps = measured["deeper_recall"] > measured["recall"] + 0.001
        remedy = (f"; --hnsw_ef {measured['deeper_ef']} finds {measured['deeper_recall']:.4f}" if helps else
                  "; --ann_engine exact finds all, a larger --hnsw_ef does not help")
    (warn if remedy else log)(
        f"ANN recall@{measured['k']} against exact search, {measured['queries']}: {measured['recall']:.4f} "
        f"with --hnsw_ef {measured['hnsw_ef']}{remedy}"
        + (f"; this search has {ef}" if ef not in (0, measured["hnsw_ef"]) else ""))
