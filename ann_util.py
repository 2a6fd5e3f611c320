"""The index of a corpus: what has a vector, and which lines of the corpus that is; shards, each a graph of hnswlib or
an exact index; and how they are kept in a folder with the corpus, and follow it when it changes."""

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from data import WINDOW, Corpus
from simcse.console import InputError, as_it_is, log, progress, reported
from simcse.files import (
    OF_CORPUS,
    check_fingerprint,
    file_digest,
    new_folder,
    read_json,
    temporary_name,
    unrelated,
    write_json,
)
from simcse.machine import CPU_THREADS, RANK, RANKS
from simcse.nearest import (
    HNSW_BLOCK,
    QUERY_BLOCK,
    ExactIndex,
    Found,
    HnswIndex,
    ann_recall,
    exact_search,
    merge,
    report,
)
from simcse.passages import Passages

import numpy as np

Line = tuple[int | None, str | None]  # its number, from 1, and its document's id, None where they are not known
FORMAT = 2  # of a kept index: its rows are entries
MEASURED_K, DEEPER = 10, 4  # how deep an index is measured; a larger ef to compare


class Entries(Sequence):
    """What an index has a vector of: the distinct texts of a corpus, in the order of their first lines. Copies would
    break the graph: they are each other's neighbours, and nothing leads out of them.

    An entry is a row of the index, or, with `passages`, several. `rows`, int32, are the corpus' rows, entry by entry:
    rows[starts[e] : starts[e + 1]] have the text of entry e, in their order. Equal texts are found by a hash of 64
    bits, whose key is another in every process: the odds that any two of 8 million are taken for one are 2 in a
    million.

    Args:
        folder: where `save` has written the two, which are then mapped instead of read; None: they are found.
    """

    def __init__(self, corpus: Corpus, folder: str | None = None) -> None:
        self.corpus, self.documents = corpus, len(corpus)
        self.passages: Passages | None = None
        self._keys: np.ndarray | None = None
        if folder:
            both = np.load(os.path.join(folder, "entries.npy"), mmap_mode="r")
            self.rows, self.starts = np.split(both, [len(corpus)])
            return
        keys = _hashes(corpus)
        _, first, entry, lines = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        self.rows = np.argsort(first[entry], kind="stable").astype("int32")
        self.starts = np.append(0, np.cumsum(lines[np.argsort(first)])).astype("int32")
        self._keys = keys[np.sort(first)]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def vectors(self) -> "Entries | Passages":
        """What the rows of the index are."""
        return self if self.passages is None else self.passages

    def __getitem__(self, entry):
        rows = self.rows[self.starts[:-1][entry]]
        return self.corpus.take(rows) if rows.ndim else self.corpus[int(rows)]

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

    def hashes(self) -> np.ndarray:
        """Python's hash of each text, int64, the same for the same text in this process alone."""
        return _hashes(self.corpus)[self.rows[self.starts[:-1]]] if self._keys is None else self._keys

    def find(self, others: "Entries") -> np.ndarray:
        """Which entry has the text of each of the others, int64 [others]; -1: none."""
        own, theirs = self.hashes(), others.hashes()
        order = np.argsort(own)
        places = order[np.searchsorted(own, theirs, sorter=order).clip(max=len(own) - 1)]
        return np.where(own[places] == theirs, places, -1)

    def rows_from(self, first: np.ndarray) -> np.ndarray:
        """Where each row is in an index in which each entry's first row is at `first`, int64; -1: not there."""
        if self.passages is None:
            return first
        rows = np.arange(len(self.passages))
        own = self.passages.documents_of(rows)
        return np.where(first[own] < 0, -1, first[own] + rows - self.passages.starts[own])

    def save(self, folder: str) -> None:
        np.save(os.path.join(folder, "entries.npy"), np.append(self.rows, self.starts))
        if self.passages is not None:
            self.passages.save(folder)


def _hashes(corpus: Corpus) -> np.ndarray:
    """A hash of each text, int64 [rows], the same for the same text in this process alone."""
    with progress("looking for copies", len(corpus), "documents") as advance:
        keys, texts = np.empty(len(corpus), "int64"), iter(corpus)
        for block in np.split(keys, range(WINDOW, len(keys), WINDOW)):
            block[:] = np.fromiter(map(hash, islice(texts, len(block))), "int64")
            advance(len(block))
    return keys


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


def read_fingerprint(path: str, wanted: dict) -> dict:
    """What the index in the folder `path` was made of, with the "hnsw_ef" of `wanted`, if that has one, and its
    "corpus" or another; InputError where anything else is other than `wanted`, or it is no index."""
    found = {}
    with contextlib.suppress(InputError):
        found = read_json(os.path.join(path, "fingerprint.json"))
    if not found:
        raise InputError(f"--index_path {path}: exists, but is not an index that recall.py wrote")
    found = {"corpus_columns": 1, "passages": False, **found}  # as in indexes from before there were ids, and passages
    wanted, remedy = {**wanted, "index_format": FORMAT}, "name another folder, or remove this one to build it again"
    if wanted.get("precision", precision := found.get("precision")) != precision:
        device = " with --device cpu" * (precision == "int8")
        remedy = f"--precision {precision}{device} takes it as it is; or {remedy}"
    return check_fingerprint(found, {name: wanted[name] for name in wanted if name not in OF_CORPUS},
                             f"--index_path {path}", remedy)


def kept_precision(path: str, device: str) -> str:
    """What --precision auto is for queries to the index in the folder `path`: its own, where the device may have it."""
    found = {}
    with contextlib.suppress(InputError):  # of which `read_fingerprint` tells
        found = read_json(os.path.join(path, "fingerprint.json"))
    precision = found.get("precision", "auto")
    return "auto" if {"int8": "cpu", "fp16": "gpu", "tf32": "gpu"}.get(precision, device) != device else precision


def is_kept(path: str, wanted: dict) -> bool:
    """Whether there is such an index in the folder `path`, and of the corpus that is `wanted`, if any is."""
    if not os.path.exists(path):
        return False
    found = read_fingerprint(path, wanted)
    return all(found.get(name) == wanted[name] for name in OF_CORPUS if name in wanted)


def load_index(path: str, fingerprint: dict, dim: int, cpu_threads: int = 0,
               corpus: Corpus | None = None) -> tuple[Shards, Entries]:
    """This rank's part of the index in the folder `path`, whose fingerprint has been read, and its entries, of `corpus`
    or of the corpus in the folder; InputError where a file there is damaged. See `Shards`."""
    with reported(f"--index_path {path}: damaged", OSError, RuntimeError, ValueError):
        entries = _load_entries(path, fingerprint, corpus)
        index = Shards(fingerprint, len(entries.vectors), dim, cpu_threads, path)
    log(f"using the index in {path}")
    report(fingerprint.get("ann_recall"), fingerprint["hnsw_ef"])
    return index, entries


def _load_entries(path: str, fingerprint: dict, corpus: Corpus | None = None) -> Entries:
    kept = {name: digest for name, digest in fingerprint["files"].items() if name.endswith(".npy")}
    kept.update({} if corpus else {"corpus.csv": fingerprint["corpus"]})
    for name, digest in kept.items():
        if not os.path.isfile(os.path.join(path, name)) or file_digest(os.path.join(path, name)) != digest:
            raise ValueError(f"{name} is not what was written")
    with as_it_is():
        entries = Entries(corpus or Corpus(os.path.join(path, "corpus.csv"), "--index_path",
                                           fingerprint["corpus_columns"]), path)
    if fingerprint["passages"]:
        entries.passages = Passages.load(entries, path)
    return entries


class Kept:
    """What an index of another state of the corpus has of these `entries`: of the rows of `pieces`, this rank's, it
    gives the embeddings, but of those of `lacking`, int64 [rows] of each piece that has any. InputError where it has
    none of them, so that it is not that corpus' of before.

    Args:
        where: the flag that names the index, and its value.
        first: where the first row of each entry is there, int64; -1: it is not.
        before: how many entries it has.
        take: gives the embeddings, float32 [rows, dim], of rows that are there, -1 being none, for each piece in turn.
    """

    def __init__(self, where: str, entries: Entries, first: np.ndarray, before: int, pieces: list[range],
                 take: Callable[[np.ndarray], np.ndarray]) -> None:
        source = entries.rows_from(first)
        self._take, self._pieces = take, [source[rows.start : rows.stop] for rows in pieces]
        fresh = [piece.start + np.flatnonzero(own < 0) for piece, own in zip(pieces, self._pieces)]
        self.lacking = [rows for rows in fresh if len(rows)]
        new = int((first < 0).sum())
        if new == len(entries):
            raise unrelated(where, entries.corpus.name)
        if not RANK:
            log(f"{entries.documents:,} documents: {new:,} new, {before - len(entries) + new:,} gone, encoded {new:,}")

    def blocks(self, encoded: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the embeddings of each piece, those of `lacking` among them as they come, `encoded`."""
        for source in self._pieces:
            embeddings = self._take(source)
            if (source < 0).any():
                embeddings[source < 0] = next(encoded)
            yield embeddings
        next(encoded, None)  # what it has to say at its end


def kept_in(path: str, fingerprint: dict, entries: Entries, pieces: list[range], dim: int) -> Kept:
    """What the index in the folder `path` has of another state of its corpus; InputError where a file there is damaged.
    """
    where = f"--index_path {path}"
    with reported(f"{where}: damaged", OSError, RuntimeError, ValueError):
        old = _load_entries(path, fingerprint)
        known = old.find(entries)
        first = known if old.passages is None else np.where(known < 0, -1, old.passages.starts[known])
        source = entries.rows_from(first)
        rows = np.concatenate([np.empty(0, "int64"), *(source[piece.start : piece.stop] for piece in pieces)])
        embeddings = np.empty((len(rows), dim), "float32")
        count = fingerprint["index_shards"]
        for shard in range(count):  # one in memory at a time
            Shards(fingerprint, len(old.vectors), dim, 1, path, shard, count).take(rows, embeddings)
    parts = iter(np.split(embeddings, np.cumsum([len(piece) for piece in pieces])))
    return Kept(where, entries, first, len(old), pieces, lambda source: next(parts))


def save_index(path: str, index: Shards, entries: Entries, replaced: dict | None = None, hybrid: bool = False) -> None:
    """Write the index of all ranks, its entries and their corpus, and with `hybrid` BM25 of them, to the folder `path`,
    which appears when all is written; it takes the place of the one there whose fingerprint is `replaced`."""
    from simcse.ranks import gather_arrays, wait_for_ranks

    shared = temporary_name(path, gather_arrays(np.array([os.getpid()]))[0].item())  # that of rank 0
    gone = [*replaced["files"], "bm25"] if replaced else ()
    with contextlib.nullcontext(shared) if RANK else new_folder(path, gone=gone) as folder:
        wait_for_ranks()
        index.save(folder)
        wait_for_ranks()
        if not RANK:
            entries.save(folder)
            digests = {name: file_digest(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
            shutil.copyfile(entries.corpus.path, os.path.join(folder, "corpus.csv"))
            write_json(os.path.join(folder, "fingerprint.json"),
                       {**index.fingerprint, "index_format": FORMAT, "files": digests})
            if hybrid:
                from simcse.bm25 import Bm25

                Bm25(entries, os.path.join(folder, "bm25"), index.fingerprint["corpus"])
            elif replaced and os.path.isdir(os.path.join(path, "bm25")):
                log("BM25 of the corpus before is gone; --hybrid_bm25 makes it anew")
    if not RANK:
        log(f"kept the index in {path}")
