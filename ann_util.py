"""Nearest neighbours by cosine of L2-normalized embeddings: hnswlib's graph, and exact search as the reference.

`HnswIndex` and `ExactIndex` have `add(embeddings)`, `search(queries, k)`, `blocks()`, `save(path)` and `load(path)`;
`Shards` is an index of several of them; `save_index` and `load_index` keep it in a folder with its corpus.
"""

import contextlib
import functools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from data import WINDOW, TextFile
from simcse import console
from simcse.console import InputError, first_line, progress
from simcse.files import check_fingerprint, file_digest, new_folder, write_json
from simcse.machine import available_memory, default_threads

import numpy as np

# Exact search multiplies so many queries by so many documents at a time, on every core: 16 MB of cosines.
QUERY_BLOCK, CORPUS_BLOCK = 256, 16384
Found = tuple[np.ndarray, np.ndarray]  # of every query rows int64 [Q, k] and their cosines float32 [Q, k], best first


def nothing(queries: np.ndarray) -> Found:
    """The result of an index without documents."""
    return np.empty((len(queries), 0), "int64"), np.empty((len(queries), 0), "float32")


def merge(parts: Sequence[Found], k: int) -> Found:
    """The k best of several results of the same queries, or all where there are fewer; of equal cosines the lower row
    first."""
    rows, cosines = (np.hstack(part) for part in zip(*parts))
    order = np.lexsort((rows, -cosines), axis=1)[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(cosines, order, axis=1)


def fill_up(found: Found, k: int) -> Found:
    """A result of k columns, what is missing as row -1 of cosine -inf, which `merge` puts last."""
    missing = ((0, 0), (0, k - found[0].shape[1]))
    return np.pad(found[0], missing, constant_values=-1), np.pad(found[1], missing, constant_values=-np.inf)


def exact_search(queries: np.ndarray, corpus: np.ndarray | Iterable[np.ndarray], k: int) -> Found:
    """The k most similar corpus rows of every query, by a blocked matrix product.

    Args:
        queries: L2-normalized float32 [Q, dim].
        corpus: L2-normalized float32 [N, dim], whole or as blocks one after the other.
        k: how many; at most N are returned.

    Returns:
        Corpus rows int64 [Q, min(k, N)] and cosines float32 of the same shape, best first; of equal cosines the
        lower row first.
    """
    best, seen = nothing(queries), 0
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        for block in blocks_of(corpus) if isinstance(corpus, np.ndarray) else corpus:
            search = functools.partial(_search_block, block.T, k)
            found = workers.map(search, blocks_of(queries, QUERY_BLOCK))
            rows, cosines = (np.concatenate(part) for part in zip(*found))
            best = merge([best, (rows + seen, cosines)], k)
            seen += len(block)
    return best


def _search_block(transposed: np.ndarray, k: int, queries: np.ndarray) -> Found:
    """The k most similar columns of `transposed`, float32 [dim, block], for some queries."""
    return _best(queries @ transposed, k)


def _best(similarity: np.ndarray, k: int) -> Found:
    """The columns of the k largest values of every row, in rising order of column, and those values."""
    if k >= similarity.shape[1]:
        return np.broadcast_to(np.arange(similarity.shape[1]), similarity.shape), similarity
    columns = np.sort(np.argpartition(-similarity, k - 1, axis=1)[:, :k], axis=1)
    return columns, np.take_along_axis(similarity, columns, axis=1)


def blocks_of(vectors: np.ndarray, size: int | None = None) -> Iterator[np.ndarray]:
    """The rows of `vectors`, `size` at a time; None: CORPUS_BLOCK."""
    size = size or CORPUS_BLOCK
    return (vectors[start : start + size] for start in range(0, len(vectors), size))


class ExactIndex:
    """All embeddings in memory, searched by `exact_search`: for small corpora, and as the reference."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []  # float32 [n, dim]

    def __len__(self) -> int:
        return sum(map(len, self._blocks))

    def add(self, embeddings: np.ndarray) -> None:
        """Add float32 [n, dim]; their rows are numbered on from those before."""
        if self._blocks and len(self._blocks[-1]) < CORPUS_BLOCK:  # cosines depend on blocks, in their last bit
            embeddings = np.concatenate([self._blocks.pop(), embeddings])
        self._blocks += blocks_of(embeddings)

    def blocks(self) -> Iterable[np.ndarray]:
        """The embeddings in the order in which they were added, float32 [n, dim] at a time."""
        return self._blocks

    def search(self, queries: np.ndarray, k: int) -> Found:
        """See `exact_search`."""
        return exact_search(queries, self._blocks, k)

    def save(self, path: str) -> None:
        with open(path, "wb") as file:
            np.save(file, np.concatenate(self._blocks))

    def load(self, path: str) -> None:
        self._blocks = list(blocks_of(np.load(path)))


class HnswIndex:
    """hnswlib (Malkov and Yashunin 2018) on inner products, which are cosines for L2-normalized embeddings.

    Args:
        dim: size of the embeddings.
        max_elements: how many embeddings the index can hold.
        m: links a node (hnswlib's M); memory and recall grow with it.
        ef: candidates kept while building, and at least while searching; time and recall grow with it.
        threads: those of a search, 0: all cores. Adding takes one, so that the same vectors give the same graph.
    """

    def __init__(self, dim: int, max_elements: int, m: int = 32, ef: int = 100, threads: int = 0) -> None:
        import hnswlib

        self.ef, self.max_elements, self.threads = ef, max_elements, threads or -1
        self._index = hnswlib.Index(space="ip", dim=dim)
        needed = max_elements * (4 * dim + 8 * m + 60)  # the vector, the links of the lowest level, label and lock
        try:
            if needed > available_memory():
                raise MemoryError
            self._index.init_index(max_elements=max_elements, ef_construction=ef, M=m)
        except (MemoryError, RuntimeError):
            raise InputError(f"the graph of {max_elements:,} documents of {dim} needs {needed / 1e9:.1f} GB of memory, "
                             f"and {available_memory() / 1e9:.1f} are free: share it out among several processes or "
                             "machines, or take --ann_engine milvus") from None

    def __len__(self) -> int:
        return self._index.get_current_count()

    def add(self, embeddings: np.ndarray) -> None:
        """Add float32 [n, dim]; their rows are numbered on from those before."""
        self._index.add_items(embeddings, np.arange(len(self), len(self) + len(embeddings)), 1)

    def blocks(self) -> Iterator[np.ndarray]:
        """The embeddings in the order in which they were added, float32 [n, dim] at a time."""
        for start in range(0, len(self), CORPUS_BLOCK):
            rows = np.arange(start, min(start + CORPUS_BLOCK, len(self)))
            yield np.asarray(self._index.get_items(rows), "float32")

    def search(self, queries: np.ndarray, k: int) -> Found:
        """As `exact_search`, approximately, with at least 2 k candidates.

        Raises:
            InputError: the graph, built with too small an `m`, does not reach k elements from some query.
        """
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

    def load(self, path: str) -> None:
        index = type(self._index)(space="ip", dim=self._index.dim)  # a failed load into one in use ends in a crash
        index.load_index(path, self.max_elements)
        self._index = index


class Shards:
    """An index in parts: the documents in pieces, piece i in shard i % shards, shard s on rank s % ranks.

    Which document goes where, and in what order, depends on neither ranks nor threads, so results do not either.

    Args:
        make: makes the index of a shard for so many documents.
        documents: how many there are in all.
        rank, ranks: this process, and how many there are.
        threads: shards that are added to at the same time.
        shards: how many there are, at least as many as ranks.
    """

    def __init__(self, make: Callable[[int], "HnswIndex | ExactIndex"], documents: int, rank: int = 0, ranks: int = 1,
                 threads: int = 1, shards: int = 8) -> None:
        self.piece, self._count = min(WINDOW, -(-documents // shards)), shards
        starts = range(0, documents, self.piece)
        mine = [number for number in range(len(starts)) if number % shards % ranks == rank]
        self.pieces = [range(starts[number], min(starts[number] + self.piece, documents)) for number in mine]
        sizes: dict[int, int] = {}
        for number, rows in zip(mine, self.pieces):
            sizes[number % shards] = sizes.get(number % shards, 0) + len(rows)
        self.shards = {shard: make(size) for shard, size in sizes.items()}
        self._workers, self._adding = ThreadPoolExecutor(threads), deque[tuple[int, Future, int]]()
        self._threads = threads

    def add(self, rows: range, embeddings: np.ndarray) -> None:
        """Add the next of `pieces`, float32 [len(rows), dim], in the background; `finish` waits for the last."""
        shard = rows.start // self.piece % self._count
        while len(self._adding) > self._threads or any(shard == other for other, *_ in self._adding):
            self._adding.popleft()[1].result()
        self._adding.append((shard, self._workers.submit(self.shards[shard].add, embeddings), len(rows)))

    def finish(self) -> None:
        """Wait until all is added."""
        with progress("indexing", sum(count for *_, count in self._adding), "documents") as advance:
            while self._adding:
                _, added, count = self._adding.popleft()
                added.result()
                advance(count)

    def search(self, queries: np.ndarray, k: int, exact: bool = False) -> Found:
        """The k best of this rank's documents, fewer where it has fewer; their rows are those of the whole corpus."""
        parts = [nothing(queries)]
        with progress(f"searching {len(queries):,} queries", len(self.shards), "shards") as advance:
            for shard, index in self.shards.items():
                rows, cosines = exact_search(queries, index.blocks(), k) if exact else index.search(queries, k)
                pieces, places = np.divmod(rows, self.piece)
                parts.append(((shard + pieces * self._count) * self.piece + places, cosines))
                advance()
        return merge(parts, k)

    def close(self) -> None:
        """End the threads."""
        self._workers.shutdown()

    def save(self, folder: str) -> None:
        """Write this rank's shards to the folder."""
        for shard, index in self.shards.items():
            index.save(os.path.join(folder, f"shard_{shard}.bin"))

    def load(self, folder: str, digests: dict[str, str]) -> None:
        """Read this rank's shards from the folder.

        Args:
            digests: SHA-256 of each file by its name.

        Raises:
            ValueError: a file is not what was written.
        """
        for shard, index in self.shards.items():
            name = f"shard_{shard}.bin"
            if file_digest(os.path.join(folder, name)) != digests.get(name):
                raise ValueError(f"{name} is not what was written")
            index.load(os.path.join(folder, name))


def ann_recall(cosines: np.ndarray, exact_cosines: np.ndarray) -> float:
    """The part of the exact result that an approximate one has; documents of equal cosine stand for each other.

    Args:
        cosines, exact_cosines: [Q, k] of the same queries, best first.
    """
    return float(np.mean(cosines >= exact_cosines[:, -1:] - 1e-6))


# --------------------------------------------------------------------------------------------------- kept in a folder
def new_index(fingerprint: dict, documents: int, dim: int, cpu_threads: int = 0, rank: int = 0,
              ranks: int = 1) -> Shards:
    """An empty index for so many embeddings of `dim`, or this rank's part of it.

    Args:
        fingerprint: its "ann_engine", "index_shards", "hnsw_m", "hnsw_ef" and "hnsw_max_elements".
        cpu_threads: 0: all cores.
    """
    threads = cpu_threads or default_threads()
    if ranks > fingerprint["index_shards"]:
        raise InputError(f"--index_shards {fingerprint['index_shards']}: there are {ranks} processes")
    room = -(-fingerprint["hnsw_max_elements"] // fingerprint["index_shards"])

    def shard(size: int) -> ExactIndex | HnswIndex:
        if fingerprint["ann_engine"] == "exact":
            return ExactIndex()
        return HnswIndex(dim, max(size, room), fingerprint["hnsw_m"], fingerprint["hnsw_ef"], threads)

    return Shards(shard, documents, rank, ranks, threads, fingerprint["index_shards"])


def read_fingerprint(path: str, wanted: dict) -> dict:
    """What the index in the folder `path` was made of.

    Raises:
        InputError: it was built for something other than `wanted`, or is none.
    """
    wanted = {**wanted, "vector_type": "float32"}  # there were others
    try:
        with open(os.path.join(path, "fingerprint.json"), encoding="utf-8") as file:
            found = {"vector_type": "float32", **json.load(file)}
    except (OSError, TypeError, ValueError):
        raise InputError(f"--index_path {path}: exists, but is not an index that recall.py wrote") from None
    check_fingerprint(found, wanted, f"--index_path {path}",
                      "name another folder, or remove this one to build it again")
    return found


def read_kept_corpus(path: str, digest: str) -> TextFile:
    """The documents in the folder of an index."""
    corpus = os.path.join(path, "corpus.csv")
    if not os.path.isfile(corpus) or file_digest(corpus) != digest:
        raise InputError(f"--index_path {path}: damaged: corpus.csv is not what was written")
    return TextFile(corpus, "--index_path")


def load_index(path: str, index: Shards, fingerprint: dict) -> None:
    """Read the shards in the folder `path` into an empty index of `new_index`."""
    try:
        index.load(path, fingerprint.get("shards", {}))
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"--index_path {path}: damaged: {first_line(error)}") from None
    console.log(f"using the index in {path}")


def save_index(path: str, index: Shards, fingerprint: dict, corpus: TextFile) -> None:
    """Write the index of all ranks, and the corpus, to the folder `path`, which appears when all is written."""
    from simcse.ranks import is_first_rank, wait_for_ranks

    partial = f"{path.rstrip('/')}.partial"  # the same name on all ranks
    with new_folder(path, temporary=partial) if is_first_rank() else contextlib.nullcontext():
        os.makedirs(partial, exist_ok=True)
        index.save(partial)
        wait_for_ranks()
        if is_first_rank():
            digests = {name: file_digest(os.path.join(partial, name)) for name in sorted(os.listdir(partial))}
            shutil.copyfile(corpus.path, os.path.join(partial, "corpus.csv"))
            write_json(os.path.join(partial, "fingerprint.json"), {**fingerprint, "shards": digests})
    if is_first_rank():
        console.log(f"kept the index in {path}")
