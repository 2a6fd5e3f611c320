"""Build, keep and open the index of a corpus, and search a kept one from Python (`Index`).

An index folder has a file for each shard, the map of rows to vectors (row_map.npy, vector_keys.npy), the corpus
(corpus.csv), its documents (documents.npy, keys.npy, passages.npy) and manifest.json, which says what the index is made
of. With --hybrid_bm25 it has a folder bm25, too.
"""

import contextlib
import dataclasses
import numbers
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from simcse import console
from simcse.console import InputError, accept_all_lines, as_input_error, log, progress
from simcse.files import file_digest, hidden_path, name_output, new_folder, read_json
from simcse.index.ann_recall import HALVES, MEASURED_K, pick_evenly, report_ann_recall
from simcse.index.documents import Documents, report_changes
from simcse.index.engines import DEFAULT_ENGINE, ENGINES, LOCAL_ENGINES, check_installed
from simcse.index.hits import Hit, hits_of
from simcse.index.hits import search as search_documents
from simcse.index.manifest import DAMAGE, MANIFEST_FILE, REBUILD, Manifest, check_digest, is_as_written
from simcse.index.milvus import MilvusIndex, manifest_for_corpus
from simcse.index.milvus_types import is_lite
from simcse.index.milvus_update import compare_with_corpus
from simcse.index.previous import PreviousIndex
from simcse.index.protocols import NOT_FOUND, DocumentStore, IndexFiller, VectorIndex
from simcse.index.settings import Setting
from simcse.index.shards import ShardedIndex, choose_shard_count
from simcse.index.vector_map import VectorMap
from simcse.machine import RANK, RANKS
from simcse.memory import announce_memory
from simcse.text.passages import Passages
from simcse.text.prefixes import QUERY
from simcse.text.textfile import Corpus
from simcse.text.tokens import WINDOW

import numpy as np

if TYPE_CHECKING:  # the encoder imports paddle, which opening an index does without
    from simcse.encoder.encoder import Encoder
    from simcse.index.bm25 import Bm25

DEVICE_OF_PRECISION = {"int8": "cpu", "fp16": "gpu", "tf32": "gpu"}  # the others are computed on both
CORPUS_FILE = "corpus.csv"
BM25_FOLDER = "bm25"


# ------------------------------------------------------------------------------------------------------- the manifest
def manifest_to_build(wanted: Manifest, previous: Manifest | None = None) -> Manifest:
    """Return the manifest of an index to build: as wanted, else as in the previous index, else the defaults.

    Defaults that depend on the corpus, the number of shards among them, are None: `build_index` finds them. They are
    never those of the previous index, so that an index of a corpus is the same whatever was there before.

    Args:
        wanted: what the flags ask for.
        previous: that of the index of another state of the corpus, which this one replaces.
    """
    previous = previous or Manifest()
    ann_engine = wanted.ann_engine or previous.ann_engine or DEFAULT_ENGINE
    engine = ENGINES[ann_engine]
    return dataclasses.replace(
        wanted.completed_by(previous),
        ann_engine=ann_engine,
        build_settings=choose_settings(engine.build_settings, wanted.build_settings, previous.build_settings),
        search_settings=choose_settings(engine.search_settings, wanted.search_settings, previous.search_settings))


def choose_settings(settings: Sequence[Setting], wanted: dict[str, Any], previous: dict[str, Any]) -> dict[str, Any]:
    """Return a value for each setting: the wanted one, else that of the previous index, else the default.

    Args:
        settings: those that an engine declares.
        wanted, previous: values by name; some or all may be missing.
    """
    values = {}
    for setting in settings:
        if setting.name in wanted:
            values[setting.name] = wanted[setting.name]
        elif setting.default is None:  # it depends on the corpus, which is another now than in the previous index
            values[setting.name] = None
        else:
            values[setting.name] = previous.get(setting.name, setting.default)
    return values


def read_manifest(path: str, wanted: Manifest) -> Manifest:
    """Return the manifest of the index in a folder.

    Args:
        path: the folder.
        wanted: what the index has to be made of, whatever state of the corpus it has.

    Raises:
        InputError: it is no index, or not as wanted.
    """
    where = f"--index_path {path}"
    manifest = Manifest.load(path, where, REBUILD)
    if manifest.ann_engine not in LOCAL_ENGINES:
        raise InputError(f"{where}: has ann_engine {manifest.ann_engine}, which is not among those of this version "
                         f"({', '.join(LOCAL_ENGINES)}); {REBUILD}")
    remedy = REBUILD
    if not manifest.differences(dataclasses.replace(wanted, document_prefix=None)):  # that alone, if anything
        remedy = f"--document_prefix {manifest.document_prefix!r} takes it as it is; or {remedy}"
    elif not manifest.differences(dataclasses.replace(wanted, precision=None)):
        device = DEVICE_OF_PRECISION.get(manifest.precision)
        with_device = f" with --device {device}" if device else ""
        remedy = f"--precision {manifest.precision}{with_device} takes it as it is; or {remedy}"
    manifest.check(wanted, where, remedy)
    return manifest


def peek_manifest(path: str) -> dict[str, Any]:
    """Return the fields of the manifest in a folder; {}: there is none, or it is damaged.

    With it a command finds out early what its flags mean; `read_manifest` refuses later what is wrong with the index.
    """
    content = {}
    with contextlib.suppress(InputError):  # not JSON
        content = read_json(os.path.join(path, MANIFEST_FILE))
    return content if is_as_written(content) else {}


def query_precision(path: str, device: str) -> str:
    """Return the --precision in which queries to a kept index are encoded, where the flag says auto.

    Returns:
        the precision of the index; "auto" if there is no index, or the device does not compute in its precision.
    """
    precision = peek_manifest(path).get("precision") or "auto"
    needed_device = DEVICE_OF_PRECISION.get(precision, device)
    return precision if needed_device == device else "auto"


# ------------------------------------------------------------------------------------------------------- opening
def load_index(path: str, manifest: Manifest, *, threads: int = 0, corpus: Corpus | None = None,
               search_settings: dict[str, Any] | None = None) -> tuple[ShardedIndex, Documents]:
    """Open the index in a folder; of several ranks each opens its shards.

    Args:
        path: the folder.
        manifest: what `read_manifest` has returned.
        threads: those of a search; 0: all cores.
        corpus: the corpus, if it is open; None: the one in the folder.
        search_settings: those that are other than when it was built.

    Raises:
        InputError: a file is damaged, or the memory does not suffice.
    """
    damaged = f"--index_path {path}: damaged"
    with as_input_error(damaged, *DAMAGE):
        documents = _load_documents(path, manifest, corpus)
        vector_map = VectorMap.load(path, manifest.rows)
    index = ShardedIndex(manifest, threads, vector_map)
    with as_input_error(damaged, *DAMAGE):
        index.load(path)
    index.set_search_settings(search_settings or {})
    log(f"using the index in {path}")
    report_ann_recall(manifest.ann_recall, index.search_settings)
    return index, documents


def _load_documents(path: str, manifest: Manifest, corpus: Corpus | None) -> Documents:
    """Open the documents of the index in a folder."""
    manifest.check_arrays(path)
    if corpus is None:
        corpus_path = os.path.join(path, CORPUS_FILE)
        check_digest(corpus_path, manifest.corpus)
        with accept_all_lines():
            corpus = Corpus(corpus_path, "--index_path", manifest.corpus_columns)
    documents = Documents(corpus, path)
    if manifest.passages:
        documents.passages = Passages.load(documents, path)
    return documents


class Index:
    """An index that recall.py --index_path has kept, opened to be searched; nothing in its folder is changed.

        with Index.open("my_index") as index:
            hits, = index.search(encoder, ["语义检索"], top_k=10)

    Args:
        folder: where it is kept, for messages.
        vector_index: the vectors.
        documents: those of its rows.
    """

    def __init__(self, folder: str, vector_index: VectorIndex, documents: DocumentStore) -> None:
        self.folder = folder
        self._vector_index: VectorIndex | None = vector_index  # None: it is closed
        self._documents = documents
        self._checked: Manifest | None = None  # the latest that was compared with the index's

    @staticmethod
    def open(folder: str | os.PathLike, *, threads: int = 0) -> "Index":
        """Open the index in a folder.

        Args:
            folder: the --index_path of recall.py.
            threads: those of a search; 0: all cores.

        Raises:
            InputError: there is no index, it is damaged or of another version, or the memory does not suffice.
        """
        path = os.fspath(folder)
        if not os.path.isdir(path):
            raise InputError(f"--index_path {path}: no such folder; build the index with recall.py --index_path {path}")
        manifest = read_manifest(path, Manifest())
        check_installed(manifest.ann_engine)
        return Index(path, *load_index(path, manifest, threads=threads))

    def search(self, encoder: "Encoder", queries: Sequence[str], top_k: int = 10, *,
               distinct: bool = False) -> list[list[Hit]]:
        """Return the best hits for each query, best first, as recall.py finds them without --hybrid_bm25.

        Args:
            encoder: that of the checkpoint with which the index was built, as `model.Encoder.load` returns it.
            queries: texts.
            top_k: how many hits; all lines of the corpus if there are fewer.
            distinct: give each text once, not once for every line of the corpus that has it.

        Raises:
            InputError: the index was built with another checkpoint, length, precision or prefix of documents, or a
                query is blank.
        """
        if self._vector_index is None:
            raise ValueError(f"{self.folder}: the index is closed")
        if not isinstance(top_k, numbers.Integral) or top_k < 1:
            raise InputError(f"top_k: expected an integer >= 1, got {top_k!r}")
        self._check_encoder(encoder)
        queries = check_queries(queries)
        if not queries:
            return []
        embeddings = encoder.encode(queries, input_type=QUERY)
        ranking = search_documents(self._vector_index, self._documents, embeddings, top_k)
        return hits_of(ranking, self._documents, [top_k] * len(queries), distinct)

    def _check_encoder(self, encoder: "Encoder") -> None:
        """Raise InputError if the vectors of an encoder cannot be compared with those of the index."""
        manifest = self._vector_index.manifest
        where = f"--index_path {self.folder}"
        of_encoder = Manifest(model=encoder.model_digest, max_seq_length=encoder.max_seq_length,
                              precision=encoder.precision, calibration=encoder.calibration,
                              document_prefix=encoder.prefixes.document)
        if of_encoder == self._checked:
            return
        device = DEVICE_OF_PRECISION.get(manifest.precision)
        on_device = f', device="{device}"' if device else ""
        manifest.check(of_encoder, where, "load the checkpoint that it was built with, by Encoder.load(CHECKPOINT, "
                       f'max_seq_length={manifest.max_seq_length}, precision="{manifest.precision}", '
                       f"document_prefix={manifest.document_prefix!r}{on_device})")
        manifest.warn_other_calibration(of_encoder, where, REBUILD)
        self._checked = of_encoder

    def __len__(self) -> int:
        """Return how many lines the corpus has, copies of a text included."""
        return self._documents.line_count

    def close(self) -> None:
        """End the threads and free the memory of the vectors; the index cannot be searched any more."""
        if self._vector_index is not None:
            self._vector_index.close()
            self._vector_index = None

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_queries(queries: Sequence[str]) -> list[str]:
    """Return queries as a list.

    Raises:
        InputError: they are no list of texts, or one is blank.
    """
    from simcse.encoder.encoder import check_texts

    queries = list(check_texts(queries, "queries"))
    for row, query in enumerate(queries):
        if not query.strip():
            raise InputError(f"queries[{row}]: expected a text that is not blank, got {query!r}; remove it")
    return queries


# ------------------------------------------------------------------------------------------------------- building
def build_index(corpus: Corpus, encoder: "Encoder", manifest: Manifest, *, threads: int = 0,
                previous_path: str | None = None) -> tuple[ShardedIndex, Documents]:
    """Encode a corpus and build its index; of several ranks each encodes a share and has its shards, if any.

    Args:
        corpus: the documents.
        encoder: turns them into vectors.
        manifest: what `manifest_to_build` has returned.
        threads: those of a search, and of building, a shard each; 0: all cores.
        previous_path: the folder of an index of another state of the corpus, whose vectors are used again.

    Raises:
        InputError: the settings do not suit the corpus, the memory does not suffice, or the previous index is damaged
            or has no text of this corpus.
    """
    documents = read_documents(corpus, encoder, manifest)
    manifest = with_sizes(manifest, documents, encoder)
    previous = PreviousIndex.open(previous_path) if previous_path else None
    if previous is not None:
        report_changes(documents, previous.document_keys, previous.where)
    vector_map = map_rows_to_vectors(documents, encoder, previous)
    engine = LOCAL_ENGINES[manifest.ann_engine]
    manifest.build_settings = engine.complete_settings(manifest.build_settings, vector_map.vector_count)
    manifest.index_shards = manifest.index_shards or choose_shard_count(vector_map.vector_count)
    index = ShardedIndex(manifest, threads, vector_map)
    if previous is None:
        add_missing(index, documents, encoder)
    else:
        add_with_previous(index, documents, encoder, previous)
    if engine.approximate:
        vectors = encoder.encode(halves_of(documents), warn=False)
        manifest.ann_recall = index.measure(vectors, MEASURED_K, HALVES)
        report_ann_recall(manifest.ann_recall)
    return index, documents


def halves_of(documents: Documents) -> list[str]:
    """Return the second halves of some documents, to measure an index with where there may be no queries.

    Whole documents would find themselves, which is easier than what queries ask. A text of one character has no half.
    """
    return [text[len(text) // 2 :] for text in pick_evenly(documents)]


def read_documents(corpus: Corpus, encoder: "Encoder", manifest: Manifest) -> Documents:
    """Return the documents of a corpus, split into passages if the manifest says so."""
    documents = Documents(corpus)
    if manifest.passages:
        documents.split(encoder.tokenizer, encoder.max_document_length())
    return documents


def with_sizes(manifest: Manifest, documents: Documents, encoder: "Encoder") -> Manifest:
    """Return the manifest with the dimension and the counts of an index of these documents."""
    return dataclasses.replace(manifest, dimension=encoder.embedding_size, lines=documents.line_count,
                               documents=len(documents), rows=documents.row_count)


def map_rows_to_vectors(documents: Documents, encoder: "Encoder", previous: PreviousIndex | None = None) -> VectorMap:
    """Return the map of rows to vectors, in which rows with the same tokens share one.

    All ranks call it together. The arguments are those of `keys_of_rows`.
    """
    keys = keys_of_rows(documents, encoder, previous)
    vector_map = VectorMap.of_keys(keys)
    if not RANK and vector_map.vector_count < len(keys):
        unit = "passages" if documents.has_passages else "documents"
        log(f"{vector_map.vector_count:,} vectors for {len(keys):,} {unit}: those that are the same to the encoder "
            "share one")
    return vector_map


def keys_of_rows(documents: Documents, encoder: "Encoder", previous: PreviousIndex | None = None) -> np.ndarray:
    """Return the key of each row's vector, int64 [rows], the same on all ranks; warn of what is cut or unknown.

    All ranks call it together; each tokenizes a share.

    Args:
        documents: the corpus.
        encoder: has the tokenizer.
        previous: of another state of the corpus. What it has is tokenized again only with --strict_data, which refuses
            a text that is cut wherever it is met.
    """
    from simcse.ranks import gather_arrays

    keys = np.zeros(documents.row_count, "int64")
    rows_to_tokenize = np.arange(len(keys))
    if previous is not None and not console.settings.strict_data:
        known_keys = previous.vector_keys(documents.row_keys())
        has_new_text = known_keys == NOT_FOUND
        rows_to_tokenize = np.flatnonzero(has_new_text)
        if not RANK:
            keys[~has_new_text] = known_keys[~has_new_text]
    windows = np.arange(len(rows_to_tokenize)) // WINDOW
    rows_of_rank = rows_to_tokenize[windows % RANKS == RANK]
    keys[rows_of_rank] = tokenize_rows(documents, encoder, rows_of_rank)
    keys = sum(gather_arrays(keys))  # one rank has the key of a row, the others 0
    if documents.passages is not None:
        keys[rows_to_tokenize] = documents.passages.keys_in_context(rows_to_tokenize, keys[rows_to_tokenize])
    return keys


def tokenize_rows(documents: Documents, encoder: "Encoder", rows: np.ndarray) -> np.ndarray:
    """Tokenize some rows, and warn of those that are truncated or all [UNK].

    All ranks call it together, each with other rows; rank 0 warns of those of all ranks.

    Args:
        documents: have their texts.
        encoder: has the tokenizer.
        rows: int64.

    Returns:
        The key of each row's tokens, int64 [rows]; see `EncoderInput.keys`.

    Raises:
        InputError: --strict_data is set, and there are such rows.
    """
    from simcse.encoder.encoder import TextWarnings, places_of

    keys = np.empty(len(rows), "int64")
    warnings = TextWarnings(encoder.max_seq_length)
    with progress("tokenizing", len(rows), "texts") as advance:
        for start in range(0, len(rows), WINDOW):
            window = rows[start : start + WINDOW]
            inputs = encoder.tokenize(documents.row_texts[window])
            warnings.add(inputs, window)
            keys[start : start + WINDOW] = inputs.keys()
            advance(len(window))
    warnings = warnings.gather()
    if not RANK or console.settings.strict_data:  # then it is an error, which ends all ranks
        warnings.report(places_of(documents.row_texts))
    return keys


def add_missing(filler: IndexFiller, documents: Documents, encoder: "Encoder") -> None:
    """Encode the rows that an index lacks and add them; one piece is added while the next is encoded.

    Args:
        filler: lacks some rows, of which `tokenize_rows` has warned.
        documents: have their texts.
        encoder: turns them into vectors.
    """
    pieces = list(filler.missing_rows)
    row_count = sum(map(len, pieces))
    if row_count:
        announce_memory(filler.bytes_needed + encoder.bytes_needed(row_count))
    with _log_encoding(documents, encoder, row_count):
        encoded = _encode_rows(encoder, documents, pieces)
        for vectors, rows in zip(encoded, pieces, strict=True):
            filler.add(rows, vectors)
    filler.finish()


def add_with_previous(index: ShardedIndex, documents: Documents, encoder: "Encoder", previous: PreviousIndex) -> None:
    """Add the rows that an index lacks: with the vector that a previous index has, or else by encoding them.

    The vectors of the previous index are in memory once, in the pieces that are not added yet or in the index.

    Args:
        index: lacks some rows, of which `tokenize_rows` has warned.
        documents: have their texts.
        encoder: turns them into vectors.
        previous: that of another state of the corpus.
    """
    row_count = sum(map(len, index.missing_rows))
    bytes_beside = max(previous.bytes_of_shard, encoder.bytes_needed(row_count))  # one after the other
    announce_memory(index.bytes_needed + bytes_beside)
    pieces = deque(previous.read_vectors(index.vector_map, index.missing_rows))
    rows_to_encode = [piece.rows_to_encode() for piece in pieces]
    with _log_encoding(documents, encoder, sum(map(len, rows_to_encode))):
        for vectors in _encode_rows(encoder, documents, rows_to_encode):
            piece = pieces.popleft()
            piece.fill(vectors)
            index.add(piece.rows, piece.vectors)
            del piece  # its vectors are freed as soon as they are added
    index.finish()


@contextlib.contextmanager
def _log_encoding(documents: Documents, encoder: "Encoder", row_count: int) -> Iterator[None]:
    """Log how many rows all ranks encode, and at the end how fast; nothing where there are none.

    All ranks call it together.

    Args:
        row_count: how many this rank encodes.
    """
    from simcse.ranks import gather_numbers

    row_count = sum(gather_numbers(row_count))
    if RANK or not row_count:
        yield
        return
    _log_start(documents, encoder, row_count)
    started = time.time()
    yield
    unit = "passages" if documents.has_passages else "documents"
    log(f"{row_count / (time.time() - started):.1f} {unit}/s")


def _log_start(documents: Documents, encoder: "Encoder", rows: int) -> None:
    unit = "passages of " if documents.has_passages else "of "
    message = f"encoding and indexing {rows:,} {unit}{console.count(len(documents), 'document')} in {encoder.precision}"
    copies = documents.line_count - len(documents)
    if copies:
        kind = "is a copy" if copies == 1 else "are copies"
        message += f"; {console.count(copies, 'more line')} {kind}, --distinct gives each text once"
    log(message)


def _encode_rows(encoder: "Encoder", documents: Documents, pieces: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Return an iterator over the vectors of each piece, float32 [rows, dim]; passages are in their documents' context.
    """
    passages = documents.passages
    if passages is None:
        return encoder.stream(documents, windows=pieces, warn=False)
    windows = passages.rows_to_encode(pieces)
    encoded = encoder.stream(passages, windows=windows, warn=False)
    return passages.blend_with_documents(pieces, encoded)


def open_collection(uri: str, collection: str, wanted: Manifest, *, corpus: Corpus | None = None,
                    encoder: "Encoder | None" = None) -> tuple[VectorIndex, DocumentStore]:
    """Open a collection of Milvus; with a corpus, make it or update it to the corpus.

    Args:
        uri: http://host:port of a server, or a path ending in .db: Milvus Lite.
        collection: its name.
        wanted: what it has to be made of.
        corpus: the documents; None: all are in the collection, which then maps rows to documents itself.
        encoder: turns them into vectors, where there is a corpus.

    Raises:
        InputError: there is no such server or collection, it is not as wanted, or lacks documents.
    """
    index = MilvusIndex(uri, collection)
    if index.manifest is not None:
        index.check(wanted)
    if corpus is None:
        return index, index.open(wanted.search_settings)
    manifest = manifest_for_corpus(wanted, index.manifest, is_lite(uri))
    documents = read_documents(corpus, encoder, manifest)
    update = compare_with_corpus(index, documents, with_sizes(manifest, documents, encoder))
    if update is not None:
        # For its warnings alone: the rows of a collection have keys of texts, not of tokens.
        tokenize_rows(documents, encoder, rows_to_check(update, documents))
        update.start()
        if update.has_to_be_measured():
            update.measure_with(encoder.encode(halves_of(documents), warn=False))
        add_missing(update, documents, encoder)
    return index, documents


def rows_to_check(filler: IndexFiller, documents: Documents) -> np.ndarray:
    """Return the rows that this rank checks for truncated and unknown texts, int64.

    They are those that it adds; with --strict_data, which refuses such a text wherever it is, a share of all rows.
    """
    if console.settings.strict_data:
        return np.arange(RANK, documents.row_count, RANKS)
    return np.concatenate([np.empty(0, "int64"), *filler.missing_rows])


# ------------------------------------------------------------------------------------------------------- keeping
def save_index(path: str, index: ShardedIndex, documents: Documents, hybrid: bool = False) -> None:
    """Keep an index in a folder, which appears, or takes the place of the one there, when all is written.

    All ranks call it together; each writes its shards.

    Args:
        path: the folder.
        index: all of its rows have been added.
        documents: those of its rows.
        hybrid: keep their BM25 index, too.

    Raises:
        InputError: a file cannot be written.
    """
    from simcse.ranks import gather_arrays

    pid_of_rank_0 = gather_arrays(np.array([os.getpid()]))[0].item()
    if RANK:  # where `new_folder` writes on rank 0
        _save_shards(index, hidden_path(path, pid_of_rank_0))
        return
    obsolete = _files_of_index(path) if os.path.exists(path) else []
    with name_output(path, "--index_path"), new_folder(path, obsolete=obsolete) as folder:
        _save_shards(index, folder)
        index.vector_map.save(folder)
        _write_documents(folder, index.manifest, documents, hybrid)
    if BM25_FOLDER in obsolete and not hybrid:
        log("removed the BM25 index of the previous corpus; --hybrid_bm25 builds it again")
    log(f"kept the index in {path}")


def _save_shards(index: ShardedIndex, folder: str) -> None:
    """Write the shards of each rank to a folder that rank 0 has made; return when all ranks have written theirs."""
    from simcse.ranks import wait_for_ranks

    wait_for_ranks()  # until there is the folder
    index.save(folder)
    wait_for_ranks()


def _files_of_index(path: str) -> list[str]:
    """Return the names of the files and folders that belong to the index in a folder; others are the user's."""
    names = list(Manifest.load(path, f"--index_path {path}", REBUILD).files)
    if os.path.isdir(os.path.join(path, BM25_FOLDER)):
        names.append(BM25_FOLDER)
    return names


def _write_documents(folder: str, manifest: Manifest, documents: Documents, hybrid: bool) -> None:
    """Write what is beside the shards in a folder: the documents, the corpus, the manifest and the BM25 index."""
    documents.save(folder)
    manifest.files = {name: file_digest(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
    copy = os.path.join(folder, CORPUS_FILE)
    shutil.copyfile(documents.corpus.path, copy)
    if manifest.corpus not in (None, file_digest(copy)):
        raise InputError(f"{documents.corpus.name}: was changed while the index was built; run recall.py again")
    manifest.save(folder)
    if hybrid:
        build_or_open_bm25(documents, manifest.corpus, folder)


def build_or_open_bm25(documents: Documents, corpus: str | None, folder: str | None) -> "Bm25":
    """Return the BM25 index of some documents: the one in an index folder, or a new one, which is kept there.

    Args:
        documents: their texts.
        corpus: SHA-256 of the file that they are of.
        folder: the index folder; None: a new one is built and not kept.
    """
    from simcse.index.bm25 import Bm25

    return Bm25(documents, folder and os.path.join(folder, BM25_FOLDER), corpus)
