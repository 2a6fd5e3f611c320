"""The index of a corpus: what has a vector, and which lines of the corpus that is; shards, each a graph of hnswlib or
an exact index; and how they are kept in a folder with the corpus, and follow it when it changes."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator

from simcse.console import InputError, accepting_all_lines, log, reported
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
from simcse.index.documents import Entries
from simcse.index.shards import Shards, report
from simcse.machine import RANK
from simcse.text.passages import Passages
from simcse.text.textfile import Corpus

import numpy as np

FORMAT = 2  # of a kept index: its rows are entries


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
    with accepting_all_lines():
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
                from simcse.index.bm25 import Bm25

                Bm25(entries, os.path.join(folder, "bm25"), index.fingerprint["corpus"])
            elif replaced and os.path.isdir(os.path.join(path, "bm25")):
                log("BM25 of the corpus before is gone; --hybrid_bm25 makes it anew")
    if not RANK:
        log(f"kept the index in {path}")
