"""A collection of Milvus behind the same `pieces`, `add`, `finish` and `search` as ann_util's `Shards`."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from simcse.console import InputError, first_line
from simcse.files import check_fingerprint

import numpy as np


class MilvusIndex:
    """A collection of Milvus: documents by their row, the text beside the embedding.

    Rows are upserted in pieces, each in order, so that a broken run goes on where the last piece ends. The token of a
    server is read from the environment, MILVUS_TOKEN.

    Args:
        uri: http://host:port of a server, or a path ending in .db: Milvus Lite, in this process.
        collection: its name.
        fingerprint: what the collection depends on, kept with it. Of one that is there already it may name a part; to
            make one it takes "documents", how many, "dim", "metric" (COSINE) and "index_type": FLAT, or HNSW with
            "hnsw_m" and "hnsw_ef" as in `HnswIndex`.
        rank, ranks: this process, and how many there are; a .db file can be used by one alone.
        wait: waits for all ranks.

    Raises:
        InputError: no pymilvus, no such server, no such collection, or one made of something else.
    """

    _PIECE, _QUERIES, _TEXT_BYTES, _KEY = 4096, 1000, 65535, "simcse"
    MOST = 16384  # documents for a query

    def __init__(self, uri: str, collection: str, fingerprint: dict, rank: int = 0, ranks: int = 1,
                 wait: Callable[[], None] = int) -> None:
        try:
            from pymilvus import MilvusClient
        except ModuleNotFoundError as error:
            raise InputError(f"--ann_engine milvus: {error.name} is not installed; "
                             "pip install -r requirements-milvus.txt") from None
        for name in ("pymilvus", "milvus_lite", "grpc", "faiss"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # they log what they raise, with tracebacks
        self.uri, self.collection, self.rank = uri, collection, rank
        self._lite = not uri.startswith(("http://", "https://"))
        if self._lite and ranks > 1:
            raise InputError(f"--milvus_uri {uri}: a file can be used by one process; {ranks} need a server")
        with self._errors():
            self._client = MilvusClient(uri=uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=30)
            if rank == 0 and "documents" in fingerprint and not self._client.has_collection(collection):
                self._create(fingerprint)
            wait()
            if not self._client.has_collection(collection):
                raise InputError(f"--milvus_collection {collection}: {uri} has no such collection; --corpus_file is "
                                 "needed to make it")
            self.fingerprint = self._read_fingerprint()
            check_fingerprint(self.fingerprint, fingerprint, f"--milvus_collection {collection}",
                          "name another collection, or drop this one to build it again")
            self._client.load_collection(collection)
            documents = self.fingerprint["documents"]
            pieces = [range(start, min(start + self._PIECE, documents)) for start in range(0, documents, self._PIECE)]
            self.pieces = [rows for rows in pieces[rank::ranks] if not self._has(rows[-1])]
        self._worker, self._adding, self.texts = ThreadPoolExecutor(1), None, MilvusTexts(self)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What goes wrong in Milvus, as an InputError."""
        import grpc
        from pymilvus import MilvusException

        try:
            yield
        except (MilvusException, grpc.RpcError, ValueError) as error:
            raise InputError(f"--milvus_uri {self.uri}: {first_line(error)}") from None

    def _parameters(self, fingerprint: dict) -> tuple[dict, dict]:
        """Of the index type, how to build and how to search, without the depth that k asks for."""
        if fingerprint["index_type"] == "HNSW":
            ef = fingerprint["hnsw_ef"]
            return {"M": fingerprint["hnsw_m"], "efConstruction": ef}, {"ef": ef}
        return {}, {}

    def _create(self, fingerprint: dict) -> None:
        from pymilvus import DataType

        kept, build = json.dumps(fingerprint), self._parameters(fingerprint)[0]
        # Milvus Lite forgets descriptions and reads an index's parameters from one called params.
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False, description=kept)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("text", DataType.VARCHAR, max_length=self._TEXT_BYTES)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=fingerprint["dim"])
        index = self._client.prepare_index_params()
        index.add_index(field_name="embedding", index_type=fingerprint["index_type"], metric_type=fingerprint["metric"],
                        params={"params": build} if self._lite else build)
        self._client.create_collection(self.collection, schema=schema, index_params=index, consistency_level="Strong",
                                       **({"properties": {self._KEY: kept}} if self._lite else {}))

    def _read_fingerprint(self) -> dict:
        about = self._client.describe_collection(self.collection)
        try:
            return json.loads(about.get("properties", {}).get(self._KEY) or about.get("description") or "")
        except ValueError:
            raise InputError(f"--milvus_collection {self.collection}: exists, but was not made by recall.py") from None

    def _has(self, row: int) -> bool:
        return bool(self._client.get(self.collection, ids=[row], output_fields=["id"]))

    def __len__(self) -> int:
        return self.fingerprint["documents"]

    def add(self, rows: range, embeddings: np.ndarray, texts: Sequence[str]) -> None:
        """Upsert one of `pieces`, float32 [len(rows), dim], in the background; `finish` waits for the last."""
        if self._adding:
            self._adding.result()
        self._adding = self._worker.submit(self._upsert, rows, embeddings, texts)

    def _upsert(self, rows: range, embeddings: np.ndarray, texts: Sequence[str]) -> None:
        with self._errors():
            self._client.upsert(self.collection, [
                {"id": row, "embedding": embedding,
                 "text": text.encode("utf-8")[: self._TEXT_BYTES].decode("utf-8", "ignore")}
                for row, embedding, text in zip(rows, embeddings, texts)])

    def finish(self) -> None:
        """Wait until all is stored, and have Milvus index it."""
        if self._adding:
            self._adding.result()
            with self._errors():
                self._client.flush(self.collection)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Shards.search`, on rank 0; other ranks find nothing. Of fewer than k the rest are rows -1, cosines -inf.
        """
        if self.rank:
            return np.empty((len(queries), 0), "int64"), np.empty((len(queries), 0), "float32")
        if k > self.MOST:
            raise InputError(f"--recall_num {k}: Milvus gives at most {self.MOST}")
        depth = self._parameters(self.fingerprint)[1]
        if "ef" in depth:
            depth["ef"] = max(depth["ef"], 2 * k)
        rows, cosines = np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf, "float32")
        for start in range(0, len(queries), self._QUERIES):
            with self._errors():
                hits = self._client.search(self.collection, data=queries[start : start + self._QUERIES],
                                           anns_field="embedding", limit=k, search_params={"params": depth})
            for number, one in enumerate(hits, start):
                best = sorted((-hit["distance"], hit["id"]) for hit in one)  # of equal cosines the lower row first
                rows[number, : len(best)] = [row for _, row in best]
                cosines[number, : len(best)] = [-negated for negated, _ in best]
        return rows, cosines

    def close(self) -> None:
        """Let go of the file, or of the connection."""
        self._client.close()
        if self._lite:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self.uri)


class MilvusTexts(Sequence[str]):
    """The documents' texts in a collection, by row."""

    def __init__(self, index: MilvusIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, row: int) -> str:
        return self.take([row])[0]

    def take(self, rows: Sequence[int]) -> list[str]:
        """The texts of some rows."""
        with self._index._errors():
            found = self._index._client.get(self._index.collection, ids=list(rows), output_fields=["text"])
        text_of = {each["id"]: each["text"] for each in found}
        return [text_of[row] for row in rows]
