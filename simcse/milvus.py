"""A collection of Milvus behind the same `pieces`, `fill` and `search` as ann_util's `Shards`."""

import contextlib
import fcntl
import itertools
import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from simcse.console import InputError, log, reported, some
from simcse.files import check_fingerprint
from simcse.machine import RANK, RANKS

import numpy as np


class MilvusIndex:
    """A collection of Milvus: a corpus' distinct texts, each beside its embedding, the number of lines that have it,
    and their ids, as many as a field can hold.

    The key of a text is the number of its first line in the corpus' file. Texts are upserted in pieces, each in order,
    so that a broken run goes on where the last piece ends. `pieces` are those of this rank that are not there yet. The
    token of a server is read from the environment, MILVUS_TOKEN. InputError: no pymilvus, no such server, a file that
    is in use, no such collection, one made of something else, or a text that is too long for Milvus.

    Args:
        uri: http://host:port of a server, or a path ending in .db: Milvus Lite, in this process, for one rank alone.
        wanted: what a collection that is there has to agree with; its "hnsw_ef", if any, is the search's.
        entries: the `ann_util.Entries` of the corpus, of which `search` then gives rows; None: all texts have to be in
            the collection, and `search` gives their keys.
        new: what a new collection depends on, kept with it: "dim", "metric" (COSINE) and "index_type": FLAT, or HNSW
            with "hnsw_m" and "hnsw_ef" as in `HnswIndex`.
    """

    _PIECE, _QUERIES, _TEXT_BYTES, _KEY, _FORMAT = 4096, 1000, 65535, "simcse", 3
    MOST = 16384  # documents for a query
    passages = None

    def __init__(self, uri: str, collection: str, wanted: dict, entries: Any = None,
                 new: dict | None = None) -> None:
        try:
            from pymilvus import MilvusClient, MilvusException
        except ModuleNotFoundError as error:
            raise InputError(f"--ann_engine milvus: {error.name} is not installed; "
                             "pip install -r requirements-milvus.txt") from None
        from simcse.ranks import wait_for_ranks

        for name in ("pymilvus", "milvus_lite", "grpc", "faiss"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # they log what they raise, with tracebacks
        self.uri, self.collection, self._entries = uri, collection, entries
        self._keys = np.array([entries.lines(entry, 1)[0][0] for entry in range(len(entries))]) if entries else None
        self._lite = not uri.startswith(("http://", "https://"))
        if self._lite and RANKS > 1:
            raise InputError(f"--milvus_uri {uri}: a file can be used by one process; {RANKS} need a server")
        missing = f"--milvus_collection {collection}: {uri} has no such collection; --corpus_file is needed to make it"
        if self._lite and not entries and not os.path.exists(uri):  # a client would make it
            raise InputError(missing)
        with self._errors():
            try:
                self._client = MilvusClient(uri=uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=30)
            except MilvusException:
                self._check_file()
                raise
            if not RANK and entries and not self._client.has_collection(collection):
                self._check_lengths(entries.corpus)
                self._create({**new, "documents": entries.documents, "entries": len(entries),
                              "index_format": self._FORMAT})
            wait_for_ranks()
            if not self._client.has_collection(collection):
                raise InputError(missing)
            described = self._client.describe_collection(collection)
            kept = described.get("properties", {}).get(self._KEY) or described.get("description")
            try:
                found = json.loads(kept or "")
            except ValueError:
                raise InputError(f"--milvus_collection {collection}: exists, but was not made by recall.py") from None
            self.fingerprint = check_fingerprint(
                found, {**wanted, "index_format": self._FORMAT}, f"--milvus_collection {collection}",
                "name another collection, or drop this one to build it again")
            self._client.load_collection(collection)
            self.documents, self.pieces = self.fingerprint["documents"], self._missing()
        if not self.pieces:
            log(f"using the collection {collection} in {uri}")

    def _errors(self) -> contextlib.AbstractContextManager:
        """What goes wrong in Milvus, as an InputError."""
        import grpc
        from pymilvus import MilvusException

        return reported(f"--milvus_uri {self.uri}", MilvusException, grpc.RpcError, ValueError)

    def _check_file(self) -> None:
        """InputError where the file is in use or another's: Milvus Lite only says that it cannot open it."""
        if self._lite and os.path.isfile(self.uri):
            raise InputError(f"--milvus_uri {self.uri}: is a file, and no folder of this Milvus Lite; name another")
        with contextlib.suppress(FileNotFoundError), open(os.path.join(self.uri, "LOCK"), "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"--milvus_uri {self.uri}: is in use by another process; a file of Milvus Lite serves "
                                 "one at a time: wait for it, stop it, or take a server") from None

    def _missing(self) -> list[range]:
        """The pieces of this rank whose last text is not there; without the entries all, where a text is missing."""
        pieces = [range(start, min(start + self._PIECE, len(self))) for start in range(0, len(self), self._PIECE)]
        if self._entries:
            return [rows for rows in pieces[RANK::RANKS] if not self._client.get(
                self.collection, ids=[int(self._keys[rows[-1]])], output_fields=["id"])]
        there = self._client.query(self.collection, filter="", output_fields=["count(*)"])[0]["count(*)"]
        return pieces if there < len(self) else []

    def _check_lengths(self, corpus: Any) -> None:
        """InputError where a text of the corpus is longer than a field of Milvus can be."""
        long = [corpus.place(row) for row, text in enumerate(corpus)
                if 4 * len(text) > self._TEXT_BYTES and len(text.encode()) > self._TEXT_BYTES]
        if long:
            raise InputError(f"--corpus_file {some(long, 3)}: {len(long)} of {len(corpus)} texts are longer than "
                             f"Milvus takes, {self._TEXT_BYTES:,} bytes; shorten them, or take another --ann_engine")

    def _create(self, fingerprint: dict) -> None:
        from pymilvus import DataType

        kept, build = json.dumps(fingerprint), {}
        if fingerprint["index_type"] == "HNSW":
            build = {"M": fingerprint["hnsw_m"], "efConstruction": fingerprint["hnsw_ef"]}
        # Milvus Lite forgets descriptions and reads an index's parameters from one called params.
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False, description=kept)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("text", DataType.VARCHAR, max_length=self._TEXT_BYTES)
        schema.add_field("lines", DataType.INT64)
        schema.add_field("ids", DataType.VARCHAR, max_length=self._TEXT_BYTES)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=fingerprint["dim"])
        index = self._client.prepare_index_params()
        index.add_index(field_name="embedding", index_type=fingerprint["index_type"], metric_type=fingerprint["metric"],
                        params={"params": build} if self._lite else build)
        self._client.create_collection(self.collection, schema=schema, index_params=index, consistency_level="Strong",
                                       **({"properties": {self._KEY: kept}} if self._lite else {}))

    def __len__(self) -> int:
        return self.fingerprint["entries"]

    def fill(self, blocks: Iterable[np.ndarray]) -> None:
        """Store the embeddings of `pieces`, float32 [len(piece), dim] each, in the background while the next are made,
        and have Milvus index them."""
        with ThreadPoolExecutor(1) as worker:
            storing = worker.submit(lambda: None)
            for embeddings, rows in zip(blocks, self.pieces):
                storing.result()
                storing = worker.submit(self._upsert, rows, embeddings)
            storing.result()
        with self._errors():
            self._client.flush(self.collection)

    def _upsert(self, rows: range, embeddings: np.ndarray) -> None:
        with self._errors():
            texts, lines = self._entries[rows.start : rows.stop], map(self._entries.lines, rows)
            self._client.upsert(self.collection, [
                {"id": int(self._keys[row]), "embedding": embedding, "text": text, "lines": len(each),
                 "ids": self._joined([id for _, id in each if id])}
                for row, embedding, text, each in zip(rows, embeddings, texts, lines)])

    def _joined(self, ids: list[str]) -> str:
        """The ids in one field, a tab between them, which none has; the last are left out where they do not fit."""
        sizes = itertools.accumulate(len(id.encode()) + 1 for id in ids)
        return "\t".join(id for id, size in zip(ids, sizes) if size <= self._TEXT_BYTES)

    def take(self, keys: Sequence[int], most: int) -> list[tuple[str, list[tuple[int | None, str | None]]]]:
        """As `Entries.take`, by key; of the lines only the first has a number, the others have None."""
        with self._errors():
            found = self._client.get(self.collection, ids=list(keys), output_fields=["text", "lines", "ids"])
        by_key = {}
        for each in found:
            lines = range(min(most, each["lines"]))
            ids = filter(None, each["ids"].split("\t"))
            by_key[each["id"]] = each["text"], [(None if line else each["id"], next(ids, None)) for line in lines]
        return [by_key[key] for key in keys]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Shards.search`, on rank 0, by key where there are no entries; other ranks find nothing."""
        rows, cosines = np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf, "float32")
        if RANK:
            return rows, cosines
        if k > self.MOST:
            raise InputError(f"--recall_num {k}: Milvus gives at most {self.MOST}")
        hnsw = self.fingerprint["index_type"] == "HNSW"
        depth = {"ef": max(self.fingerprint["hnsw_ef"], 2 * k)} if hnsw else {}
        for start in range(0, len(queries), self._QUERIES):
            with self._errors():
                hits = self._client.search(self.collection, data=queries[start : start + self._QUERIES],
                                           anns_field="embedding", limit=k, search_params={"params": depth})
            for number, one in enumerate(hits, start):
                best = sorted((-hit["distance"], hit["id"]) for hit in one)  # of equal cosines the lower line first
                for place, (negated, key) in enumerate(best):
                    rows[number, place], cosines[number, place] = key, -negated
        return rows if self._entries is None else np.where(rows < 0, -1, np.searchsorted(self._keys, rows)), cosines

    def close(self) -> None:
        """Let go of the file, or of the connection."""
        self._client.close()
        if self._lite:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self.uri)
