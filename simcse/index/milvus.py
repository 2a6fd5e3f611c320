# ruff: noqa: F821  is rewritten on another branch
"""A collection of Milvus behind the same `pieces`, `fill` and `search` as ann_util's `Shards`."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from simcse.console import InputError, check_installed, log, reported, some
from simcse.index.settings import HNSW_EF, HNSW_M
from simcse.machine import RANK, RANKS

import numpy as np

PLACES = 20  # bits of a passage's key that are its place in the document
NEXT, BEFORE = "next", "before"  # what is beside a collection: the one that will take its name, or that has left it
DIGITS = 16  # hexadecimal, of a digest that ends their names: no one else's collection is taken for one of them


class MilvusIndex:
    """A collection of Milvus: a corpus' distinct texts, each beside its embedding, the number of lines that have it,
    and their ids, as many as a field can hold; or, of documents in passages, each passage beside its embedding, and
    the rest beside the first one.

    The key of a text is the number of its first line in the corpus' file; that of a passage is this times 2^20, plus
    its place in the document. Rows are upserted in pieces, each in order, so that a broken run goes on where the last
    piece ends. `pieces` are those of this rank that are not there yet. The token of a server is read from the
    environment, MILVUS_TOKEN. InputError: no pymilvus, no such server, a file that is in use, no such collection, one
    made of something else, or a text that is too long for Milvus.

    Where the collection is of another state of the corpus, `follows` is true: a new one is filled beside it, and takes
    its name when `finish` is called. `known` are then for each entry the key of its first row in the old one, int64, -1
    being none, and `before` is how many texts that has.

    Args:
        uri: http://host:port of a server, or a path ending in .db: Milvus Lite, in this process, for one rank alone.
        wanted: what a collection that is there has to agree with; its "hnsw_ef", if any, is the search's.
        entries: the `ann_util.Entries` of the corpus, of which `search` then gives rows; None: all texts have to be in
            the collection, and `search` gives their keys.
        new: what a new collection depends on, kept with it: "dim", "metric" (COSINE), "passages" and "index_type":
            FLAT, or HNSW with "hnsw_m" and "hnsw_ef" as in `HnswIndex`.
        split: gives the entries their passages; called where the collection has any.
    """

    build_settings = (HNSW_M,)
    search_settings = (HNSW_EF,)
    _PIECE, _PAGE, _TEXT_BYTES, _KEY, _FORMAT = 4096, 1000, 65535, "simcse", 4
    MOST = 16384  # documents for a query

    def __init__(self, uri: str, collection: str, wanted: dict, entries: Any = None, new: dict | None = None,
                 split: Callable[[], None] = lambda: None) -> None:
        from simcse.ranks import wait_for_ranks

        check_installed("--ann_engine milvus", "requirements-milvus.txt", "pymilvus")
        for name in ("pymilvus", "milvus_lite", "grpc", "faiss"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # they log what they raise, with tracebacks
        self.uri, self.collection, self._entries, self._name = uri, collection, entries, collection
        self._lite, self.follows = not uri.startswith(("http://", "https://")), False
        if self._lite and RANKS > 1:
            raise InputError(f"--milvus_uri {uri}: a file can be used by one process; {RANKS} need a server")
        missing = f"--milvus_collection {collection}: {uri} has no such collection; --corpus_file is needed to make it"
        if self._lite and not entries and not os.path.exists(uri):  # a client would make it
            raise InputError(missing)
        self._connect()
        with self._errors():
            if not RANK:
                self._restore()
            wait_for_ranks()
            found = self._described(collection, wanted)
            if not found and not entries:
                raise InputError(missing)
            self.fingerprint = found or {**new, **wanted}
            if entries and self.fingerprint.get("passages"):
                split()
            if found and any(found.get(name) != wanted[name] for name in OF_CORPUS if name in wanted):
                self._follow(wanted)
            if entries:
                self._make(wanted)
            wait_for_ranks()
            self._client.load_collection(self.collection)
            self.documents, self.pieces = self.fingerprint["documents"], self._missing()
        self.passages = Stored(self) if self.fingerprint.get("passages") else None
        if not self.pieces:
            log(f"using the collection {collection} in {uri}")

    def _connect(self) -> None:
        from pymilvus import MilvusClient, MilvusException

        with self._errors():
            try:
                self._client = MilvusClient(uri=self.uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=30)
            except MilvusException:
                self._check_file()
                raise

    def _described(self, collection: str, wanted: dict) -> dict:
        """What a collection was made of, with the "hnsw_ef" of `wanted`; {}: there is none. InputError where anything
        but its corpus is other than `wanted`."""
        if not self._client.has_collection(collection):
            return {}
        described = self._client.describe_collection(collection)
        kept = described.get("properties", {}).get(self._KEY) or described.get("description")
        try:
            found = json.loads(kept or "")
        except ValueError:
            raise InputError(f"--milvus_collection {collection}: exists, but was not made by recall.py") from None
        same = {name: value for name, value in wanted.items() if name not in OF_CORPUS}
        return check_fingerprint(found, {**same, "index_format": self._FORMAT}, f"--milvus_collection {collection}",
                                 "name another collection, or drop this one to build it again")

    def _follow(self, wanted: dict) -> None:
        """Have another state of the corpus filled beside the collection."""
        named = self._client.describe_collection(self._name)["collection_name"]
        if named != self._name:
            raise InputError(f"--milvus_collection {self._name}: is an alias of {named}; to have it follow the corpus, "
                             "name that")
        self.follows, self.collection = True, self._name_beside(NEXT, {**self.fingerprint, **wanted})
        self.known, self.before = self._look_up()
        if (self.known < 0).all():
            raise unrelated(f"--milvus_collection {self._name}", self._entries.corpus.name)
        if not RANK:
            self._drop(self._beside(BEFORE))
            if self._client.has_collection(self.collection) and not self._client.list_indexes(self.collection):
                self._drop([self.collection])  # it was not made to its end

    def _make(self, wanted: dict) -> None:
        """Find the key of each row, and make the collection where there is none."""
        entries = self._entries
        self._keys = np.array([entries.lines(entry, 1)[0][0] for entry in range(len(entries))])
        if entries.passages is not None:
            rows = np.arange(len(entries.passages))
            own = entries.passages.documents_of(rows)
            self._keys = (self._keys[own] << PLACES) + rows - entries.passages.starts[own]
        self.fingerprint = {**self.fingerprint, **wanted, "documents": entries.documents, "entries": len(entries),
                            "rows": len(self._keys), "index_format": self._FORMAT}
        if not RANK and not self._client.has_collection(self.collection):
            self._check_lengths(entries.corpus)
            self._create(self.fingerprint)

    def _look_up(self) -> tuple[np.ndarray, int]:
        """`known` and `before`."""
        key_of: dict[int, int] = {}
        self._client.load_collection(self._name)
        bits = PLACES if self._entries.passages is not None else 0
        for first in itertools.count(1, self._PAGE):  # by key: for each page of an iterator Milvus Lite reads all again
            keys = [line << bits for line in range(first, first + self._PAGE)]
            page = self._client.get(self._name, ids=keys, output_fields=["text"])
            key_of.update((hash(each["text"]), each["id"]) for each in page)
            if not page and not self._client.query(self._name, filter=f"id >= {keys[0]}", limit=1,
                                                   output_fields=["id"]):
                break
        known = np.array([key_of.get(each, -1) for each in self._entries.hashes().tolist()], "int64")
        return known, len(key_of)

    def stored(self, keys: np.ndarray) -> np.ndarray:
        """The embeddings of some keys, float32 [keys, dim], in the collection that is followed; zeros for -1."""
        vectors = np.zeros((len(keys), self.fingerprint["dim"]), "float32")
        there = np.flatnonzero(keys >= 0)
        for start in range(0, len(there), self._PAGE):
            some_rows = there[start : start + self._PAGE]
            with self._errors():
                found = self._client.get(self._name, ids=keys[some_rows].tolist(), output_fields=["embedding"])
            of_key = {each["id"]: each["embedding"] for each in found}
            if len(of_key) < len(some_rows):
                raise InputError(f"--milvus_collection {self._name}: lacks a part of a document, or another took its "
                                 "place meanwhile; run again, or drop it to build it again")
            vectors[some_rows] = [of_key[key] for key in keys[some_rows].tolist()]
        return vectors

    def finish(self) -> None:
        """Give a collection that follows another its name; all ranks call it when all of them have filled it."""
        from simcse.ranks import wait_for_ranks

        if not self.follows:
            return
        with self._errors():
            if not RANK:
                before = self._name_beside(BEFORE, self.fingerprint)
                self._client.rename_collection(self._name, before)
                try:
                    self._client.rename_collection(self.collection, self._name)
                except Exception:
                    self._restore()
                    raise
                self._drop([before, *self._beside(NEXT)])
            wait_for_ranks()
            self.collection = self._name
            self._client.load_collection(self.collection)

    def _name_beside(self, what: str, fingerprint: dict) -> str:
        digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
        return f"{self._name}_{what}_{digest[:DIGITS]}"

    def _beside(self, what: str) -> list[str]:
        """The names of the collections beside this one that runs have left: NEXT or BEFORE."""
        form = re.compile(rf"{re.escape(self._name)}_{what}_[0-9a-f]{{{DIGITS}}}")
        return list(filter(form.fullmatch, self._client.list_collections()))

    def _restore(self) -> None:
        """Give the collection of before its name back, where `finish` ended between its two renames."""
        if not self._client.has_collection(self._name):
            for name in self._beside(BEFORE)[:1]:
                self._client.rename_collection(name, self._name)

    def _drop(self, names: Iterable[str]) -> None:
        """Drop collections beside this one, which gets their aliases: a server drops none that has any."""
        for name in names:
            for alias in self._client.list_aliases(name)["aliases"]:
                self._client.alter_alias(self._name, alias)
            self._client.drop_collection(name)

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
        count = self.fingerprint["rows"]
        pieces = [range(start, min(start + self._PIECE, count)) for start in range(0, count, self._PIECE)]
        if self._entries:
            return [rows for rows in pieces[RANK::RANKS] if not self._client.get(
                self.collection, ids=[int(self._keys[rows[-1]])], output_fields=["id"])]
        there = self._client.query(self.collection, filter="", output_fields=["count(*)"])[0]["count(*)"]
        return pieces if there < count else []

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
        schema.add_field("passage", DataType.VARCHAR, max_length=self._TEXT_BYTES)
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
        passages = self._entries.passages
        texts = self._entries.vectors[rows.start : rows.stop]
        with self._errors():
            self._client.upsert(self.collection, [
                {"id": int(self._keys[row]), "embedding": embedding, "passage": "" if passages is None else text,
                 **self._document(row)} for row, embedding, text in zip(rows, embeddings, texts)])

    def _document(self, row: int) -> dict:
        """What stands beside the first row of each document."""
        entry, passages = row, self._entries.passages
        if passages is not None:
            entry = int(passages.documents_of(row))
            if row > passages.starts[entry]:
                return {"text": "", "lines": 0, "ids": ""}
        lines = self._entries.lines(entry)
        return {"text": self._entries[entry], "lines": len(lines), "ids": self._joined([id for _, id in lines if id])}

    def _joined(self, ids: list[str]) -> str:
        """The ids in one field, a tab between them, which none has; the last are left out where they do not fit."""
        sizes = itertools.accumulate(len(id.encode()) + 1 for id in ids)
        return "\t".join(id for id, size in zip(ids, sizes) if size <= self._TEXT_BYTES)

    def take(self, keys: Sequence[int], most: int) -> list[tuple[str, list[tuple[int | None, str | None]]]]:
        """As `Entries.take`, by the key of a document's first row; of the lines only the first has a number, the others
        have None."""
        with self._errors():
            found = self._client.get(self.collection, ids=list(keys), output_fields=["text", "lines", "ids"])
        if len(found) < len(set(keys)):
            raise InputError(f"--milvus_collection {self._name}: another took its place meanwhile; ask again")
        by_key = {}
        for each in found:
            lines = range(min(most, each["lines"]))
            ids = filter(None, each["ids"].split("\t"))
            number = each["id"] if self.passages is None else each["id"] >> PLACES
            by_key[each["id"]] = each["text"], [(None if line else number, next(ids, None)) for line in lines]
        return [by_key[key] for key in keys]

    def passage_texts(self, keys: list[int]) -> list[str]:
        """The texts of some passages."""
        with self._errors():
            found = self._client.get(self.collection, ids=keys, output_fields=["passage"])
        by_key = {each["id"]: each["passage"] for each in found}
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
        for start in range(0, len(queries), self._PAGE):
            with self._errors():
                hits = self._client.search(self.collection, data=queries[start : start + self._PAGE],
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


class Stored:
    """The passages of a collection, by key: what `hits.search` and `hits.expand` ask of `Passages`."""

    def __init__(self, index: MilvusIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return self._index.fingerprint["rows"]

    def documents_of(self, keys: np.ndarray) -> np.ndarray:
        """The key of the first passage of each one's document."""
        return keys >> PLACES << PLACES

    def __getitem__(self, keys: np.ndarray) -> list[str]:
        return self._index.passage_texts(keys.tolist())
