"""A collection of Milvus: its connection, its fields, the record of what it is made of; errors of one line."""

import contextlib
import fcntl
import functools
import itertools
import json
import logging
import os
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from simcse.console import InputError, progress, summarize_error, warn
from simcse.index.manifest import Manifest
from simcse.index.milvus_types import (
    DEFAULT_TYPE,
    EF,
    EF_CONSTRUCTION,
    INDEX_TYPE,
    INDEX_TYPES,
    LITE_TYPE,
    M,
    is_lite,
    parameters_to_build,
)
from simcse.machine import RANKS

import numpy as np

# The fields of a row.
KEY = "id"  # the key of the document, or of the passage. Hits of a 2.3 server call it so, whatever its name is
DOCUMENT = "document"  # the key of the document
TEXT = "text"  # the document; only its first passage has it, the others have ""
PASSAGE = "passage"  # "" where the rows are documents
LINES = "lines"  # how many lines of the corpus have the document; 0 for every passage after the first
IDS = "ids"  # the ids of these lines, separated by tabs, as many as the field can hold
VECTOR = "embedding"

MAX_BYTES = 65535  # of a text field
MAX_KEYS_PER_REQUEST = 1000
MAX_QUERIES_PER_REQUEST = 1000
MAX_ROWS_PER_RANGE = 16384  # that a request for a range of keys reads, on average
MAX_ROWS_PER_UPSERT = 4096
MESSAGE_BYTES = 32 << 20  # of a request or an answer: half of what a server takes (proxy.grpc.serverMaxRecvSize)
TEXT_FIELDS = (TEXT, PASSAGE, IDS)
METRIC = "COSINE"
# What a search or a read has to see.
STRONG = "Strong"  # all that was written before; a server waits for that, 0.2 s as a rule
BOUNDED = "Bounded"  # what was written some seconds before
POLL = 0.5  # seconds between two looks at how far the server has indexed
PATIENCE = 1800  # seconds without progress after which indexing is no longer waited for
SMALL_SEGMENT = 1024  # rows below which a segment has no index (indexCoord.segment.minSegmentNumRowsToEnableIndex)
REBUILD = "name another collection, or drop this one to build it again"
CHANGED_MEANWHILE = "another process has changed it meanwhile; run again when that has ended"
# States of a collection. One that is changing has every text of its last complete state until its deletions, which come
# last.
BUILDING = "building"
COMPLETE = "complete"
CHANGING = "changing"
STATES = (BUILDING, COMPLETE, CHANGING)
# States of the index of its vectors.
PENDING = "pending"
INDEXED = "indexed"
STALLED = "stalled"

# Codes of errors.
_CONNECT_FAILED = 2
_NO_COLLECTION = 100
_RECOVERING = "unrecoverable error"  # all that a 2.3 server says while it still looks for parts that were killed
_RECORD = "simcse"  # the property of a collection that has its record
_KEY_END = 2**63
_WITHOUT_PROXY = {"grpc.enable_http_proxy": 0}  # for addresses that no proxy could reach
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Every 10 seconds pymilvus pings a server that is busy with a request. Milvus Lite 3.2.2 takes the third ping for an
# attack and drops the connection, so that a search of more than half a minute would begin again and again.
_WITHOUT_PINGS = {"grpc.keepalive_time_ms": 2**31 - 1}
_LOGGERS = ("pymilvus", "milvus_lite", "grpc", "faiss")


class Record(NamedTuple):
    """What a collection says of itself.

    Attributes:
        manifest: what it is made of; while it is CHANGING, what it was before.
        state: BUILDING, COMPLETE or CHANGING.
        run_id: which run of recall.py is changing it, at random, so that two at the same time notice each other.
    """

    manifest: Manifest
    state: str
    run_id: str | None = None


class Collection:
    """A collection on a server, or in a file of Milvus Lite. It may not exist yet.

    The token of a server is read from the environment, MILVUS_TOKEN.

    Args:
        uri: http://host:port of a server, or a path ending in .db: Milvus Lite, which runs in this process.
        name: that of the collection, or an alias of it.

    Attributes:
        consistency: of searches, and of reading what they found: STRONG or BOUNDED.

    Raises:
        InputError: several ranks would use a file. All methods raise it if Milvus reports an error.
    """

    def __init__(self, uri: str, name: str) -> None:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before it is imported; what it logs, it raises as well
        self.uri = uri
        self.name = name
        self.where = f"--milvus_collection {name}"  # in messages
        self.is_lite = is_lite(uri)
        self.consistency = STRONG
        self._id: int | None = None  # by which the server tells it from a later one of the same name
        self._connected: Any = None
        if self.is_lite and RANKS > 1:
            raise InputError(f"--milvus_uri {uri}: a file can be used by one process; {RANKS} need a server")

    # ---------------------------------------------------------------------------------------------------- connection
    @property
    def _client(self) -> Any:
        """The connection. Milvus Lite makes the file when it connects, so it is made when it is first needed."""
        if self._connected is None:
            self._connected = self._connect()
        return self._connected

    def _connect(self) -> Any:
        from pymilvus import MilvusClient, MilvusException

        _silence_loggers()  # importing pymilvus sets their levels
        options = {}
        if self.is_lite:
            options |= _WITHOUT_PINGS
        if self.is_lite or self._host in _LOOPBACK:
            options |= _WITHOUT_PROXY
        with self._errors():
            try:
                return MilvusClient(uri=self.uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=30,
                                    grpc_options=options)
            except MilvusException:
                self._check_file()
                raise

    def _check_file(self) -> None:
        """Raise InputError if the folder of Milvus Lite is a file, or in use, of which Milvus Lite says nothing."""
        if not self.is_lite:
            return
        if os.path.isfile(self.uri):
            raise InputError(f"--milvus_uri {self.uri}: is a file, but this version of Milvus Lite has a folder; name "
                             "another")
        lock = os.path.join(self.uri, "LOCK")
        with contextlib.suppress(FileNotFoundError, PermissionError), open(lock, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"--milvus_uri {self.uri}: is in use by another process; a file of Milvus Lite serves "
                                 "one at a time: wait for it, stop it, or take a server") from None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of Milvus into an InputError of one line; it names a proxy that may be the reason."""
        import grpc
        from pymilvus import MilvusException

        try:
            yield
        except (MilvusException, grpc.RpcError, ValueError) as error:
            if getattr(error, "code", None) == _NO_COLLECTION:
                raise InputError(f"{self.where}: has been dropped meanwhile; run again") from None
            message = f"--milvus_uri {self.uri}: {describe_error(error)}"
            if _is_unauthenticated(error):
                message += "; MILVUS_TOKEN in the environment is the token, such as user:password"
            if message.endswith(_RECOVERING):
                message += "; after a crash the server answers so for some time: run again in a minute"
            proxy = self._proxy()
            if proxy is not None:
                message += f"; it was asked through the proxy {proxy}; no_proxy={self._host} asks it without"
            raise InputError(message) from None

    @property
    def _host(self) -> str | None:
        return urllib.parse.urlsplit(self.uri).hostname

    def _proxy(self) -> str | None:
        """Return the proxy through which gRPC reaches the server, by the environment; None: it needs none."""
        if self.is_lite or self._host in _LOOPBACK or urllib.request.proxy_bypass(self._host):
            return None
        names = ("grpc_proxy", "https_proxy", "http_proxy")  # gRPC looks at them in this order
        proxy = next((os.environ[name] for name in names if os.environ.get(name)), None)
        return proxy and proxy.rpartition("@")[2]  # without a password

    def close(self) -> None:
        """Release the file, or the connection."""
        if self._connected is None:
            return
        self._connected.close()
        self._connected = None
        if self.is_lite:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self.uri)

    # -------------------------------------------------------------------------------------------- the collection itself
    def exists(self) -> bool:
        """Return whether there is such a collection."""
        if self.is_lite and not os.path.exists(self.uri):  # connecting would make the file
            return False
        with self._errors():
            return self._client.has_collection(self.name)

    def create(self, manifest: Manifest) -> None:
        """Create the collection in state BUILDING. `read_record` has returned None.

        Args:
            manifest: its dimension, and its settings, with which vectors are indexed.
        """
        if self.exists():  # creating it was interrupted; `read_record` has looked that it has no rows
            self._drop()
        record = _record_to_json(Record(manifest, BUILDING))
        with self._errors():
            self._client.create_collection(self.name, schema=self._schema(manifest.dimension),
                                           consistency_level=STRONG, properties={_RECORD: record})
        try:
            with self._errors():
                self._client.create_index(self.name, self._index_params(manifest))
        except InputError:  # parameters that the server does not take, for instance
            self._drop()
            raise

    def _drop(self) -> None:
        """Remove the collection, if it exists."""
        with self._errors():
            self._client.drop_collection(self.name)

    def _schema(self, dimension: int) -> Any:
        """Return the fields of a row."""
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field(KEY, DataType.INT64, is_primary=True)
        schema.add_field(DOCUMENT, DataType.INT64)
        schema.add_field(TEXT, DataType.VARCHAR, max_length=MAX_BYTES)
        schema.add_field(PASSAGE, DataType.VARCHAR, max_length=MAX_BYTES)
        schema.add_field(LINES, DataType.INT64)
        schema.add_field(IDS, DataType.VARCHAR, max_length=MAX_BYTES)
        schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=dimension)
        return schema

    def _index_params(self, manifest: Manifest) -> Any:
        """Return how vectors are indexed."""
        params = parameters_to_build(manifest.build_settings)
        if self.is_lite:  # it reads the parameters from one that is called params
            params = {"params": params}
        index = self._client.prepare_index_params()
        index.add_index(field_name=VECTOR, index_name=VECTOR, index_type=manifest.build_settings[INDEX_TYPE],
                        metric_type=METRIC, params=params)
        return index

    def has_index(self) -> bool:
        """Return whether its vectors are indexed: the last step of making it, before which it has no rows."""
        with self._errors():
            return bool(self._client.list_indexes(self.name))

    def load(self) -> None:
        """Make it searchable."""
        with self._errors():
            self._client.load_collection(self.name)

    def flush(self) -> None:
        """Write its rows to the disk and have them indexed."""
        with self._errors():
            self._client.flush(self.name)

    def watch_indexing(self) -> Iterator[str]:
        """Yield PENDING every now and then until searches use the index of all rows on the disk; then INDEXED.

        A server builds it after the flush, and compares a query with every row until then. Where it gets nothing done
        for PATIENCE seconds, warn, and yield STALLED instead.
        """
        indexed = -1
        last_progress = time.monotonic()
        with self._errors():
            rows = self._client.describe_index(self.name, VECTOR)["total_rows"]
        with progress("indexing", rows, "rows") as advance:
            while not self.is_lite:
                now_indexed, rows = self._count_indexed()
                if now_indexed >= rows:
                    break
                if now_indexed > indexed:
                    last_progress = time.monotonic()
                    advance(now_indexed - max(0, indexed))
                    indexed = now_indexed
                elif time.monotonic() > last_progress + PATIENCE:
                    warn(f"{self.where}: the server has indexed {indexed:,} of {rows:,} rows and none for "
                         f"{PATIENCE / 60:.0f} minutes; searches compare queries with the others one by one until it "
                         "has. Its log says why: an index type that it lacks, or no disk or memory left")
                    yield STALLED
                    return
                time.sleep(POLL)
                yield PENDING
        yield INDEXED

    def _count_indexed(self) -> tuple[int, int]:
        """Return the number of rows whose segment is indexed and loaded, and the number of rows on the disk.

        Both count rows that were deleted and are still on the disk. Segments under SMALL_SEGMENT rows are never
        indexed, and count as indexed.
        """
        with self._errors():
            index = self._client.describe_index(self.name, VECTOR)
            segments = self._client.list_loaded_segments(self.name)
        rows_of = {segment.segment_id: segment.num_rows for segment in segments
                   if segment.index_name or segment.num_rows < SMALL_SEGMENT}  # replicas have the same segments
        return sum(rows_of.values()), index["total_rows"]

    # ------------------------------------------------------------------------------------------------------- the record
    def read_record(self) -> Record | None:
        """Return what the collection is made of; None: it does not exist, or creating it was interrupted.

        An alias is resolved here: `name` is that of the collection from then on.

        Raises:
            InputError: recall.py did not make it, or another version did, or its fields or its index are others.
        """
        if not self.exists():
            return None
        with self._errors():
            described = self._client.describe_collection(self.name)
        self.name = described.get("collection_name", self.name)
        self._id = described.get("collection_id")
        content = described.get("properties", {}).get(_RECORD) or described.get("description")  # earlier versions'
        record = _parse_record(content)
        if record is None:
            raise InputError(f"{self.where}: exists, but was not made by recall.py; name another")
        manifest = Manifest.from_dict(record.get("manifest", {}), self.where, REBUILD)
        state = record.get("state")
        index_type = manifest.build_settings.get(INDEX_TYPE, DEFAULT_TYPE)
        if state not in STATES or index_type not in INDEX_TYPES:
            raise InputError(f"{self.where}: another version of recall.py built it; {REBUILD}")
        self._convert_old_settings(manifest)
        self._check_fields(described["fields"], manifest)
        if self.has_index():
            self._check_index(manifest)
            return Record(manifest, state, record.get("run"))
        if state == BUILDING and self._count_written() == 0:
            return None
        raise InputError(f"{self.where}: the index of its field {VECTOR}, which recall.py had made, is gone; {REBUILD}")

    def check_is_same(self) -> None:
        """Raise InputError if somebody has dropped and created it since `read_record`."""
        if self.is_lite:  # nobody else can
            return
        with self._errors():
            described = self._client.describe_collection(self.name)
        if described["collection_id"] != self._id:
            raise InputError(f"{self.where}: was dropped and built again since it was opened; open it again (the "
                             "service: kill -HUP)")

    def _count_written(self) -> int:
        """Return how many rows are on the disk of the server, which can be asked without an index."""
        with self._errors():
            return self._client.get_collection_stats(self.name)["row_count"]

    def _check_fields(self, fields: Sequence[dict[str, Any]], manifest: Manifest) -> None:
        """Raise InputError if the fields of a row are not those that `create` makes."""
        schema = self._schema(manifest.dimension)
        found = {field["name"]: (field["type"], field["params"].get("dim")) for field in fields}
        wanted = {field.name: (field.dtype, field.params.get("dim")) for field in schema.fields}
        for name in sorted(wanted.keys() | found.keys()):
            if found.get(name) != wanted.get(name):
                problem = "another type" if name in found and name in wanted else "lacking" if name in wanted else "new"
                raise InputError(f"{self.where}: its fields are not those that recall.py makes: {name} is {problem}; "
                                 f"{REBUILD}")

    def _check_index(self, manifest: Manifest) -> None:
        """Raise InputError if index type, metric or parameters differ from those of `create`."""
        with self._errors():
            index = self._client.describe_index(self.name, VECTOR)
        found = {name: str(index.get(name)) for name in ("index_type", "metric_type")}
        wanted = {"index_type": manifest.build_settings[INDEX_TYPE], "metric_type": METRIC}
        if not self.is_lite:  # which does not report parameters
            to_build = parameters_to_build(manifest.build_settings)
            found |= {name: str(index.get(name)) for name in to_build}
            wanted |= {name: str(value) for name, value in to_build.items()}
        if found != wanted:
            raise InputError(f"{self.where}: the index of its field {VECTOR} is {' '.join(found.values())}, and not "
                             f"{' '.join(wanted.values())}, which recall.py had made; {REBUILD}")

    def _convert_old_settings(self, manifest: Manifest) -> None:
        """Change the settings of a manifest that was written before there was --milvus_index to those of today."""
        if INDEX_TYPE in manifest.build_settings:
            return
        ef = manifest.search_settings.get("hnsw_ef")
        links = manifest.build_settings.get("hnsw_m")
        if self.is_lite:
            manifest.build_settings, manifest.search_settings = {INDEX_TYPE: LITE_TYPE}, {}
        else:
            manifest.build_settings = {INDEX_TYPE: "HNSW", M.name: links, EF_CONSTRUCTION.name: ef}
            manifest.search_settings = {EF.name: ef}

    def write_record(self, record: Record) -> None:
        """Replace the record.

        It is written twice: after a restart a server of Milvus 2.3.5 has the properties of before the last change.
        """
        for _ in range(2):
            with self._errors():
                self._client.alter_collection_properties(self.name, properties={_RECORD: _record_to_json(record)})

    # --------------------------------------------------------------------------------------------------------- its rows
    def count(self) -> int:
        """Return how many rows it has."""
        with self._errors():
            return self._client.query(self.name, filter="", output_fields=["count(*)"])[0]["count(*)"]

    def read_pages(self, fields: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """Yield all rows, some thousand at a time, with the key and the given fields.

        A page is a range of keys, which are spread evenly. Milvus promises no order by which one could go on from the
        last row of a page. Counting waits until the server has seen all rows, so that reading need not wait again.
        """
        rows = self.count()
        pages = -(-rows // self._page_size(fields))
        bounds = [page * _KEY_END // max(1, pages) for page in range(pages + 1)]
        with progress("reading", rows, "rows") as advance:
            for start, end in itertools.pairwise(bounds):
                with self._errors():
                    page = self._client.query(self.name, filter=f"{KEY} >= {start} and {KEY} <= {end - 1}",
                                              output_fields=[KEY, *fields], consistency_level=BOUNDED)
                yield list(page)
                advance(len(page))

    def _page_size(self, fields: Sequence[str]) -> int:
        """Return how many rows of a range fit a message, on average with a third to spare."""
        return max(1, min(MAX_ROWS_PER_RANGE, 2 * MESSAGE_BYTES // 3 // self._row_bytes(fields)))

    def _keys_per_request(self, fields: Sequence[str]) -> int:
        """Return how many rows may be asked for by their keys, so that they fit a message whatever their texts hold."""
        return min(MAX_KEYS_PER_REQUEST, MESSAGE_BYTES // self._row_bytes(fields))

    def _row_bytes(self, fields: Sequence[str]) -> int:
        """Return how many bytes of a message some fields of a row take at most."""
        row_bytes = 64 + MAX_BYTES * sum(field in TEXT_FIELDS for field in fields)
        if VECTOR in fields:
            row_bytes += 4 * self._dimension
        return row_bytes

    @functools.cached_property
    def _dimension(self) -> int:
        """Return the size of its vectors."""
        with self._errors():
            fields = self._client.describe_collection(self.name)["fields"]
        return next(field["params"]["dim"] for field in fields if field["name"] == VECTOR)

    def keys_of_document(self, document: int) -> list[int]:
        """Return the keys of the rows of a document, given by its own key."""
        with self._errors():
            rows = self._client.query(self.name, filter=f"{DOCUMENT} == {document}", output_fields=[KEY],
                                      consistency_level=self.consistency)
        return [row[KEY] for row in rows]

    def find(self, keys: Sequence[int], fields: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Return the rows of some keys, by key, with the key and the given fields; those that are gone are missing."""
        row_of: dict[int, dict[str, Any]] = {}
        page = self._keys_per_request(fields)
        for start in range(0, len(keys), page):
            with self._errors():
                found = self._client.get(self.name, ids=list(keys[start : start + page]), output_fields=[KEY, *fields],
                                         consistency_level=self.consistency)
            for row in found:
                row_of[row[KEY]] = row
        return row_of

    def get_vectors(self, keys: Sequence[int]) -> np.ndarray:
        """Return the vectors of some keys, float32 [keys, dim].

        Raises:
            InputError: a row is gone.
        """
        row_of = self.find(keys, [VECTOR])
        if any(key not in row_of for key in keys):
            raise InputError(f"{self.where}: {CHANGED_MEANWHILE}")
        return np.array([row_of[key][VECTOR] for key in keys], "float32")

    def upsert(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows, or replace those that have the same keys."""
        for piece in split_by_size(rows):
            with self._errors():
                self._client.upsert(self.name, piece)

    def delete(self, keys: Sequence[int]) -> None:
        """Remove the rows of some keys."""
        for start in range(0, len(keys), MAX_KEYS_PER_REQUEST):
            with self._errors():
                self._client.delete(self.name, ids=list(keys[start : start + MAX_KEYS_PER_REQUEST]))

    def search(self, queries: np.ndarray, k: int, parameters: dict[str, Any],
               with_vectors: bool = False) -> Iterator[list[tuple[int, float]]]:
        """Yield the keys and cosines of the k nearest rows for each query, in Milvus's order.

        That is best first, but for `with_vectors`: Milvus has sorted them by the cosines of compressed vectors.

        Args:
            queries: float32 [queries, dim], L2-normalized.
            k: how many.
            parameters: those of the index type; see `parameters_to_search`.
            with_vectors: compute the cosines from the rows' vectors, where Milvus gives those of compressed ones.
        """
        hit_bytes = 16  # a key, a cosine and what separates them
        if with_vectors:
            hit_bytes += 4 * queries.shape[1]
        page = max(1, min(MAX_QUERIES_PER_REQUEST, MESSAGE_BYTES // (hit_bytes * k)))
        for start in range(0, len(queries), page):
            block = queries[start : start + page]
            with self._errors():
                found = self._client.search(self.name, data=block, anns_field=VECTOR, limit=k,
                                            output_fields=[VECTOR] if with_vectors else [],
                                            search_params={"params": parameters}, consistency_level=self.consistency)
            for query, hits in zip(block, found, strict=True):
                cosines = [hit["distance"] for hit in hits]
                if with_vectors and hits:
                    cosines = (np.array([hit["entity"][VECTOR] for hit in hits], "float32") @ query).tolist()
                yield [(hit[KEY], cosine) for hit, cosine in zip(hits, cosines)]


def describe_error(error: Exception) -> str:
    """Return one line about an error of Milvus, without the gRPC object that its text may hold."""
    text = getattr(error, "message", None) or str(error)
    cause = _grpc_cause(error)
    if cause is not None:  # of which pymilvus says only that connecting failed
        text = cause.details()
    elif getattr(error, "code", None) == _CONNECT_FAILED:
        text = "the server does not answer"
    details = re.search(r'details = "(.*)"', text)
    if details:
        text = details[1]
    return summarize_error(ValueError(text))


def _is_unauthenticated(error: Exception) -> bool:
    """Return whether a server refuses the token, or asks for one."""
    import grpc

    cause = _grpc_cause(error)
    return cause is not None and cause.code() == grpc.StatusCode.UNAUTHENTICATED


def _grpc_cause(error: BaseException) -> Any:
    """Return the error of gRPC that an error of pymilvus comes from, or is; None: there is none."""
    import grpc

    seen: list[BaseException | None] = []
    while error is not None and error not in seen:  # pymilvus has errors that are their own cause
        if isinstance(error, grpc.RpcError) and hasattr(error, "details"):
            return error
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


def split_by_size(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield rows in pieces of at most MAX_ROWS_PER_UPSERT rows and MESSAGE_BYTES."""
    piece: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        row_size = row[VECTOR].nbytes + sum(len(row[field].encode()) for field in TEXT_FIELDS)
        if piece and (len(piece) == MAX_ROWS_PER_UPSERT or size + row_size > MESSAGE_BYTES):
            yield piece
            piece = []
            size = 0
        piece.append(row)
        size += row_size
    if piece:
        yield piece


def _parse_record(content: str | None) -> dict[str, Any] | None:
    """Return the record of a collection, which earlier versions wrote without a manifest; None: it is something else.
    """
    with contextlib.suppress(TypeError, ValueError):
        record = json.loads(content)
        if isinstance(record, dict) and isinstance(record.get("manifest", {}), dict):
            return record
    return None


def _record_to_json(record: Record) -> str:
    content = {"manifest": json.loads(record.manifest.to_json()), "state": record.state, "run": record.run_id}
    return json.dumps(content, ensure_ascii=False)


def _silence_loggers() -> None:
    """Keep Milvus' libraries from logging: what they log, with a traceback, they raise as well."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
