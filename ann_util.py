"""Nearest neighbours by cosine of L2-normalized embeddings: hnswlib's graph, and exact search as the reference; an
index of several of either, the shards, and how it is kept in a folder with its corpus."""

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat

from data import WINDOW, TextFile
from simcse.console import InputError, log, progress, reported
from simcse.files import check_fingerprint, file_digest, new_folder, read_json, temporary_name, write_json
from simcse.machine import CPU_THREADS, RANK, RANKS, available_memory

import numpy as np

# Exact search multiplies so many queries by so many documents at a time, on every core: 16 MB of cosines.
QUERY_BLOCK, CORPUS_BLOCK = 256, 16384
Found = tuple[np.ndarray, np.ndarray]  # of every query rows int64 [Q, k] and their cosines float32 [Q, k], best first


def merge(parts: Iterable[Found], k: int) -> Found:
    """The k best of several results of the same queries, or all where there are fewer; of equal cosines the lower row
    first."""
    rows, cosines = map(np.hstack, zip(*parts))
    order = np.lexsort((rows, -cosines), axis=1)[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(cosines, order, axis=1)


def exact_search(queries: np.ndarray, corpus: "np.ndarray | ExactIndex | HnswIndex", k: int) -> Found:
    """The k most similar corpus rows of every query, by a blocked matrix product.

    Queries [Q, dim] and corpus [N, dim], an array or an index, are float32 and L2-normalized. Rows, int64, and cosines,
    float32, are [Q, min(k, N)], best first; of equal cosines the lower row comes first.
    """
    best = np.empty((len(queries), 0), "int64"), np.empty((len(queries), 0), "float32")
    query_blocks = np.split(queries, range(QUERY_BLOCK, len(queries), QUERY_BLOCK))
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        for start in range(0, len(corpus), CORPUS_BLOCK):  # cosines depend on blocks, in their last bit
            block = corpus[start : start + CORPUS_BLOCK]
            found = workers.map(_search_block, query_blocks, repeat(block.T), repeat(k))
            rows, cosines = map(np.concatenate, zip(*found))
            best = merge([best, (rows + start, cosines)], k)
    return best


def _search_block(queries: np.ndarray, transposed: np.ndarray, k: int) -> Found:
    """The k most similar columns of `transposed`, float32 [dim, block], in rising order, and their cosines."""
    cosines = queries @ transposed
    columns = np.sort(np.argpartition(-cosines, min(k, cosines.shape[1]) - 1, axis=1)[:, :k], axis=1)
    return columns, np.take_along_axis(cosines, columns, axis=1)


class ExactIndex:
    """All embeddings in memory, searched by `exact_search`: for small corpora, and as the reference."""

    def __init__(self, path: str | None = None) -> None:
        self._embeddings = np.load(path) if path else np.empty((0, 0), "float32")

    def __len__(self) -> int:
        return len(self._embeddings)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._embeddings[rows]

    def add(self, embeddings: np.ndarray) -> None:
        """Add float32 [n, dim]; their rows are numbered on from those before."""
        self._embeddings = np.concatenate([self._embeddings, embeddings]) if len(self) else embeddings

    def search(self, queries: np.ndarray, k: int) -> Found:
        """See `exact_search`."""
        return exact_search(queries, self, k)

    def save(self, path: str) -> None:
        with open(path, "wb") as file:
            np.save(file, self._embeddings)


class HnswIndex:
    """hnswlib (Malkov and Yashunin 2018) on inner products, which are cosines for L2-normalized embeddings.

    Args:
        m: links a node (hnswlib's M); memory and recall grow with it.
        ef: candidates kept while building, and at least while searching; time and recall grow with it.
        threads: those of a search. Adding takes one, so that the same vectors give the same graph.
        path: where `save` has written an index; None: an empty one.
    """

    def __init__(self, dim: int, max_elements: int, m: int = 32, ef: int = 100, threads: int = 0,
                 path: str | None = None) -> None:
        import hnswlib

        self.ef, self.threads = ef, threads or -1
        self._index = hnswlib.Index(space="ip", dim=dim)
        needed = max_elements * (4 * dim + 8 * m + 60)  # the vector, the links of the lowest level, label and lock
        try:
            if needed > available_memory():
                raise MemoryError
            if not path:
                self._index.init_index(max_elements=max_elements, ef_construction=ef, M=m)
        except (MemoryError, RuntimeError):
            raise InputError(f"the graph of {max_elements:,} documents of {dim} needs {needed / 1e9:.1f} GB of memory, "
                             f"and {available_memory() / 1e9:.1f} are free: share it out among several processes or "
                             "machines, or take --ann_engine milvus") from None
        if path:
            self._index.load_index(path, max_elements)

    def __len__(self) -> int:
        return self._index.get_current_count()

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.asarray(self._index.get_items(np.arange(*rows.indices(len(self)))), "float32")

    def add(self, embeddings: np.ndarray) -> None:
        """Add float32 [n, dim]; their rows are numbered on from those before."""
        self._index.add_items(embeddings, np.arange(len(self), len(self) + len(embeddings)), 1)

    def search(self, queries: np.ndarray, k: int) -> Found:
        """As `exact_search`, approximately, with at least 2 k candidates; InputError where the graph, built with too
        small an `m`, does not reach k elements from some query."""
        k = min(k, len(self))
        ef = max(self.ef, 2 * k)
        while True:
            self._index.set_ef(ef)
            try:
                rows, distances = self._index.knn_query(queries, k, self.threads)
                return rows.astype("int64"), 1.0 - distances
            except RuntimeError:  # hnswlib: fewer than k reached with this ef
                if ef >= len(self):
                    raise InputError(f"--hnsw_m is too small: the index does not reach {k} documents from every query; "
                                     "raise --hnsw_m or --hnsw_ef") from None
                ef = min(2 * ef, len(self))

    def save(self, path: str) -> None:
        self._index.save_index(path)


class Shards:
    """An index in parts: the documents in pieces, piece i in shard i % shards, shard s on rank s % ranks. Which
    document goes where, and in what order, depends on neither ranks nor threads, so results do not either. `pieces` are
    the rows of this rank.

    Args:
        fingerprint: its "ann_engine", "index_shards", "hnsw_m", "hnsw_ef", "hnsw_max_elements", and with a folder
            "shards": the SHA-256 of its files by their names.
        documents, dim: how many embeddings of what size there are on all ranks.
        cpu_threads: those of a search, and of adding, a shard each; 0: all cores.
        folder: where `save` has written the shards; None: they are empty.

    InputError: more ranks than shards, or too little memory. OSError, RuntimeError, ValueError: a damaged file.
    """

    def __init__(self, fingerprint: dict, documents: int, dim: int, cpu_threads: int = 0, folder: str | None = None,
                 rank: int = RANK, ranks: int = RANKS) -> None:
        self._threads, self._count = cpu_threads or CPU_THREADS, fingerprint["index_shards"]
        if self._count < ranks:
            raise InputError(f"--index_shards {self._count}: there are {ranks} processes")
        self._piece = min(WINDOW, -(-documents // self._count))
        pieces = [range(start, min(start + self._piece, documents)) for start in range(0, documents, self._piece)]
        self.pieces = [rows for number, rows in enumerate(pieces) if number % self._count % ranks == rank]
        self._shards = {}
        for shard in range(rank, min(self._count, len(pieces)), ranks):
            name = f"shard_{shard}.bin"
            path = folder and os.path.join(folder, name)
            if path and file_digest(path) != fingerprint.get("shards", {}).get(name):
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
        with ThreadPoolExecutor(self._threads) as workers:
            for embeddings, rows in zip(blocks, self.pieces):
                # Pieces take turns with the shards, so that those in the queue are all of different ones.
                while len(adding) > min(self._threads, len(self._shards) - 1):
                    adding.popleft()[0].result()
                shard = self._shards[rows.start // self._piece % self._count]
                adding.append((workers.submit(shard.add, embeddings), len(rows)))
            with progress("indexing", sum(count for _, count in adding), "documents") as advance:
                for added, count in adding:
                    added.result()
                    advance(count)

    def search(self, queries: np.ndarray, k: int, exact: bool = False) -> Found:
        """The k best documents, approximately or exactly; where there are fewer, the last are rows -1 of cosine -inf.
        All ranks ask together, and find the same."""
        from simcse.ranks import gather_arrays

        missing = max(0, k - sum(map(len, self._shards.values())))
        parts = [(np.full((len(queries), missing), -1), np.full((len(queries), missing), -np.inf, "float32"))]
        with progress(f"searching {len(queries):,} queries", len(self._shards), "shards") as advance:
            for shard, index in self._shards.items():
                rows, cosines = exact_search(queries, index, k) if exact else index.search(queries, k)
                pieces, places = np.divmod(rows, self._piece)
                parts.append(((shard + pieces * self._count) * self._piece + places, cosines))
                advance()
        return merge(zip(*map(gather_arrays, merge(parts, k))), k)

    def save(self, folder: str) -> None:
        """Write this rank's shards to the folder."""
        for shard, index in self._shards.items():
            index.save(os.path.join(folder, f"shard_{shard}.bin"))

    def close(self) -> None:
        """Nothing is to be let go of, unlike in a `MilvusIndex`."""


def ann_recall(cosines: np.ndarray, exact_cosines: np.ndarray) -> float:
    """The part of the exact result that an approximate one has, both cosines [Q, k] of the same queries, best first;
    documents of equal cosine stand for each other."""
    return float(np.mean(cosines >= exact_cosines[:, -1:] - 1e-6))


def read_fingerprint(path: str, wanted: dict) -> dict:
    """What the index in the folder `path` was made of; InputError where that is other than `wanted`, or it is none."""
    found = {}
    with contextlib.suppress(InputError):
        found = read_json(os.path.join(path, "fingerprint.json"))
    if not found:
        raise InputError(f"--index_path {path}: exists, but is not an index that recall.py wrote")
    check_fingerprint({"vector_type": "float32", **found}, {**wanted, "vector_type": "float32"},  # there were others
                      f"--index_path {path}", "name another folder, or remove this one to build it again")
    return found


def load_index(path: str, fingerprint: dict, dim: int, cpu_threads: int = 0,
               corpus: TextFile | None = None) -> tuple[Shards, TextFile]:
    """This rank's part of the index in the folder `path`, whose fingerprint has been read, and its documents: `corpus`,
    or those in the folder; InputError where a file there is damaged. See `Shards`."""
    kept = os.path.join(path, "corpus.csv")
    with reported(f"--index_path {path}: damaged", OSError, RuntimeError, ValueError):
        if not corpus:
            if not os.path.isfile(kept) or file_digest(kept) != fingerprint["corpus"]:
                raise ValueError("corpus.csv is not what was written")
            corpus = TextFile(kept, "--index_path")
        index = Shards(fingerprint, len(corpus), dim, cpu_threads, path)
    log(f"using the index in {path}")
    return index, corpus


def save_index(path: str, index: Shards, fingerprint: dict, corpus: TextFile) -> None:
    """Write the index of all ranks, and the corpus, to the folder `path`, which appears when all is written."""
    from simcse.ranks import gather_arrays, wait_for_ranks

    shared = temporary_name(path, int(gather_arrays(np.array([os.getpid()]))[0]))  # that of rank 0
    with contextlib.nullcontext(shared) if RANK else new_folder(path) as folder:
        wait_for_ranks()
        index.save(folder)
        wait_for_ranks()
        if not RANK:
            digests = {name: file_digest(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
            shutil.copyfile(corpus.path, os.path.join(folder, "corpus.csv"))
            write_json(os.path.join(folder, "fingerprint.json"), {**fingerprint, "shards": digests})
    if not RANK:
        log(f"kept the index in {path}")
