"""Nearest neighbours by cosine of L2-normalized embeddings: what has a vector, and which lines of the corpus that is;
hnswlib's graph, and exact search as the reference; an index of several of either, the shards, and how it is kept in a
folder with its corpus."""

import contextlib
import fcntl
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, repeat
from typing import Any, NamedTuple

from data import WINDOW, Corpus
from simcse.console import InputError, as_it_is, log, progress, reported, warn
from simcse.files import check_fingerprint, file_digest, new_folder, read_json, temporary_name, write_json
from simcse.machine import CPU_THREADS, RANK, RANKS, available_memory

import numpy as np

# Exact search multiplies so many queries by so many documents at a time, on every core: 16 MB of cosines.
QUERY_BLOCK, CORPUS_BLOCK = 256, 16384
HNSW_BLOCK = 4  # queries a thread up to which hnswlib searches in one thread alone
Found = tuple[np.ndarray, np.ndarray]  # of every query rows int64 [Q, k] and their cosines float32 [Q, k], best first
Line = tuple[int | None, str | None]  # its number, from 1, and its document's id, None where they are not known
FORMAT = 2  # of a kept index: its rows are entries
MEASURED, MEASURED_K, DEEPER = 100, 10, 4  # documents that an index is measured with; how deep; a larger ef to compare
POOR = 0.99  # ANN recall below which it is said what finds more


class Entries(Sequence):
    """What an index has a vector of: the distinct texts of a corpus, in the order of their first lines. Copies would
    break the graph: they are each other's neighbours, and nothing leads out of them.

    An entry is a row of the index. `rows`, int32, are the corpus' rows, entry by entry: rows[starts[e] : starts[e + 1]]
    have the text of entry e, in their order. Equal texts are found by a hash of 64 bits, whose key is another in every
    process: the odds that any two of 8 million texts are taken for one are 2 in a million.

    Args:
        folder: where `save` has written the two, which are then mapped instead of read; None: they are found.
    """

    def __init__(self, corpus: Corpus, folder: str | None = None) -> None:
        self.corpus, self.documents = corpus, len(corpus)
        if folder:
            both = np.load(os.path.join(folder, "entries.npy"), mmap_mode="r")
            self.rows, self.starts = np.split(both, [len(corpus)])
            return
        with progress("looking for copies", len(corpus), "documents") as advance:
            keys, texts = np.empty(len(corpus), "int64"), iter(corpus)
            for block in np.split(keys, range(WINDOW, len(keys), WINDOW)):
                block[:] = np.fromiter(map(hash, islice(texts, len(block))), "int64")
                advance(len(block))
        _, first, entry, lines = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        self.rows = np.argsort(first[entry], kind="stable").astype("int32")
        self.starts = np.append(0, np.cumsum(lines[np.argsort(first)])).astype("int32")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, entry):
        rows = self.rows[self.starts[:-1][entry]]
        return self.corpus.take(rows) if isinstance(entry, slice) else self.corpus[int(rows)]

    def lines(self, entry: int, most: int | None = None) -> list[Line]:
        """The first `most` lines of an entry in the corpus' file; None: all."""
        start, end = self.starts[entry : entry + 2]
        rows = self.rows[start:end][:most]
        return list(zip(map(self.corpus.line_number, rows), self.corpus.ids(rows)))

    def place(self, entry: int) -> str:
        """Where the first line of an entry stands, as file:line."""
        return self.corpus.place(int(self.rows[self.starts[entry]]))

    def take(self, entries: Sequence[int], most: int | None = None) -> list[tuple[str, list[Line]]]:
        """The texts of some entries, and their `lines`."""
        return [(self[entry], self.lines(entry, most)) for entry in entries]

    def save(self, folder: str) -> None:
        np.save(os.path.join(folder, "entries.npy"), np.append(self.rows, self.starts))


class Hit(NamedTuple):
    """A document that was found: the number of its line and its id are None where they are not known."""

    document: str
    line: int | None
    id: str | None
    score: float


def expand(found: Found, documents: Any, depths: Sequence[int], distinct: bool = False) -> list[list[Hit]]:
    """Of every query the documents that were found, best first, at most its depth: each line that has an entry's text,
    or, if `distinct`, the first of them alone. `documents` are `Entries` or a `MilvusIndex`."""
    sides = [side.tolist() for side in found]
    wanted = sorted({entry for entries, depth in zip(sides[0], depths) for entry in entries[:depth] if entry >= 0})
    of_entry = dict(zip(wanted, documents.take(wanted, 1 if distinct else max(depths))))
    return [[Hit(of_entry[entry][0], *line, score) for entry, score in zip(entries[:depth], scores) if entry >= 0
             for line in of_entry[entry][1]][:depth] for entries, scores, depth in zip(*sides, depths)]


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


@contextlib.contextmanager
def building(path: str, wanted: dict, new: dict) -> Iterator[None]:
    """While an index, `new`, is built in the folder `path`, no other process builds one there: it waits, or, where
    `new` is other than what it `wanted`, raises InputError."""
    lock = temporary_name(path, "lock")
    os.makedirs(os.path.dirname(lock), exist_ok=True)
    with open(lock, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            if other := file.read():
                check_fingerprint(json.loads(other), wanted, f"--index_path {path}, which another process is "
                                  "building", "name another folder")
            log(f"waiting for the process that is building the index in {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        json.dump(new, file)
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):  # the process that was waited for has removed it
                os.remove(lock)


def read_fingerprint(path: str, wanted: dict) -> dict:
    """What the index in the folder `path` was made of, with the "hnsw_ef" of `wanted`, if that has one; InputError
    where it is other than `wanted`, or it is no index."""
    found = {}
    with contextlib.suppress(InputError):
        found = read_json(os.path.join(path, "fingerprint.json"))
    if not found:
        raise InputError(f"--index_path {path}: exists, but is not an index that recall.py wrote")
    found.setdefault("corpus_columns", 1)  # as in indexes that were written before there were ids
    return check_fingerprint(found, {**wanted, "index_format": FORMAT}, f"--index_path {path}",
                             "name another folder, or remove this one to build it again")


def load_index(path: str, fingerprint: dict, dim: int, cpu_threads: int = 0,
               corpus: Corpus | None = None) -> tuple[Shards, Entries]:
    """This rank's part of the index in the folder `path`, whose fingerprint has been read, and its entries, of `corpus`
    or of the corpus in the folder; InputError where a file there is damaged. See `Shards`."""
    with reported(f"--index_path {path}: damaged", OSError, RuntimeError, ValueError):
        kept = {"entries.npy": fingerprint["files"]["entries.npy"], **({} if corpus else {
            "corpus.csv": fingerprint["corpus"]})}
        for name, digest in kept.items():
            if not os.path.isfile(os.path.join(path, name)) or file_digest(os.path.join(path, name)) != digest:
                raise ValueError(f"{name} is not what was written")
        with as_it_is():
            entries = Entries(corpus or Corpus(os.path.join(path, "corpus.csv"), "--index_path",
                                               fingerprint["corpus_columns"]), path)
        index = Shards(fingerprint, len(entries), dim, cpu_threads, path)
    log(f"using the index in {path}")
    report(fingerprint.get("ann_recall"), fingerprint["hnsw_ef"])
    return index, entries


def save_index(path: str, index: Shards, entries: Entries) -> None:
    """Write the index of all ranks, its entries and their corpus to the folder `path`, which appears when all is
    written."""
    from simcse.ranks import gather_arrays, wait_for_ranks

    shared = temporary_name(path, int(gather_arrays(np.array([os.getpid()]))[0]))  # that of rank 0
    with contextlib.nullcontext(shared) if RANK else new_folder(path) as folder:
        wait_for_ranks()
        index.save(folder)
        wait_for_ranks()
        if not RANK:
            entries.save(folder)
            digests = {name: file_digest(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
            shutil.copyfile(entries.corpus.path, os.path.join(folder, "corpus.csv"))
            write_json(os.path.join(folder, "fingerprint.json"),
                       {**index.fingerprint, "index_format": FORMAT, "files": digests})
    if not RANK:
        log(f"kept the index in {path}")
