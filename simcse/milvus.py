"""A collection of Milvus behind the same `pieces`, `fill` and `search` as ann_util's `Shards`."""

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from simcse.console import InputError, log, reported
from simcse.files import check_fingerprint
from simcse.machine import RANK, RANKS

import numpy as np


class MilvusIndex:
    """A collection of Milvus: documents by their row, the text beside the embedding.

    Rows are upserted in pieces, each in order, so that a broken run goes on where the last piece ends. `pieces` are
    those of this rank that are not there yet. The token of a server is read from the environment, MILVUS_TOKEN.
    InputError: no pymilvus, no such server, no such collection, or one made of something else.

    Args:
        uri: http://host:port of a server, or a path ending in .db: Milvus Lite, in this process, for one rank alone.
        fingerprint: what the collection depends on, kept with it. Of one that is there already it may name a part; to
            make one it takes "documents", how many, "dim", "metric" (COSINE) and "index_type": FLAT, or HNSW with
            "hnsw_m" and "hnsw_ef" as in `HnswIndex`.
        corpus: the documents; None: all of them have to be in the collection.
    """

    _PIECE, _QUERIES, _TEXT_BYTES, _KEY = 4096, 1000, 65535, "simcse"
    MOST = 16384  # documents for a query

    def __init__(self, uri: str, collection: str, fingerprint: dict, corpus: Sequence[str] | None = None) -> None:
        try:
            from pymilvus import MilvusClient
        except ModuleNotFoundError as error:
            raise InputError(f"--ann_engine milvus: {error.name} is not installed; "
                             "pip install -r requirements-milvus.txt") from None
        from simcse.ranks import wait_for_ranks

        for name in ("pymilvus", "milvus_lite", "grpc", "faiss"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # they log what they raise, with tracebacks
        self.uri, self.collection, self.corpus = uri, collection, corpus
        self._lite = not uri.startswith(("http://", "https://"))
        if self._lite and RANKS > 1:
            raise InputError(f"--milvus_uri {uri}: a file can be used by one process; {RANKS} need a server")
        with self._errors():
            self._client = MilvusClient(uri=uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=30)
            if not RANK and "documents" in fingerprint and not self._client.has_collection(collection):
                self._create(fingerprint)
            wait_for_ranks()
            if not self._client.has_collection(collection):
                raise InputError(f"--milvus_collection {collection}: {uri} has no such collection; --corpus_file is "
                                 "needed to make it")
            described = self._client.describe_collection(collection)
            kept = described.get("properties", {}).get(self._KEY) or described.get("description")
            try:
                self.fingerprint = json.loads(kept or "")
            except ValueError:
                raise InputError(f"--milvus_collection {collection}: exists, but was not made by recall.py") from None
            check_fingerprint(self.fingerprint, fingerprint, f"--milvus_collection {collection}",
                              "name another collection, or drop this one to build it again")
            self._client.load_collection(collection)
            pieces = [range(start, min(start + self._PIECE, len(self))) for start in range(0, len(self), self._PIECE)]
            self.pieces = [rows for rows in pieces[RANK::RANKS]
                           if not self._client.get(collection, ids=[rows[-1]], output_fields=["id"])]
        if not self.pieces:
            log(f"using the collection {collection} in {uri}")

    def _errors(self) -> contextlib.AbstractContextManager:
        """What goes wrong in Milvus, as an InputError."""
        import grpc
        from pymilvus import MilvusException

        return reported(f"--milvus_uri {self.uri}", MilvusException, grpc.RpcError, ValueError)

    def _create(self, fingerprint: dict) -> None:
        from pymilvus import DataType

        kept, build = json.dumps(fingerprint), {}
        if fingerprint["index_type"] == "HNSW":
            build = {"M": fingerprint["hnsw_m"], "efConstruction": fingerprint["hnsw_ef"]}
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

    def __len__(self) -> int:
        return self.fingerprint["documents"]

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
            self._client.upsert(self.collection, [
                {"id": row, "embedding": embedding,
                 "text": text.encode("utf-8")[: self._TEXT_BYTES].decode("utf-8", "ignore")}
                for row, embedding, text in zip(rows, embeddings, self.corpus[rows.start : rows.stop])])

    def take(self, rows: Sequence[int]) -> list[str]:
        """The texts of some rows."""
        with self._errors():
            found = self._client.get(self.collection, ids=list(rows), output_fields=["text"])
        text_of = {each["id"]: each["text"] for each in found}
        return [text_of[row] for row in rows]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Shards.search`, on rank 0; other ranks find nothing."""
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
                best = sorted((-hit["distance"], hit["id"]) for hit in one)  # of equal cosines the lower row first
                for place, (negated, row) in enumerate(best):
                    rows[number, place], cosines[number, place] = row, -negated
        return rows, cosines

    def close(self) -> None:
        """Let go of the file, or of the connection."""
        self._client.close()
        if self._lite:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self.uri)
