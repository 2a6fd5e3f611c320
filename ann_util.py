"""Build, keep and open the index of a corpus; simcse/index/hits.py searches it.

An index folder has a file a shard, the corpus (corpus.csv), its documents (documents.npy, keys.npy, passages.npy) and
manifest.json, which says what the index is made of. With --hybrid_bm25 it has a folder bm25, too.
"""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simcse import console
from simcse.console import InputError, accept_all_lines, as_input_error, log
from simcse.files import file_digest, hidden_path, new_folder, read_json
from simcse.index.documents import Documents, find_keys, report_changes
from simcse.index.engines import DEFAULT_ENGINE, ENGINES, LOCAL_ENGINES
from simcse.index.manifest import MANIFEST_FILE, Manifest
from simcse.index.protocols import NOT_FOUND, DocumentStore, Index
from simcse.index.shards import MEASURED_K, ShardedIndex, report_ann_recall, sample
from simcse.machine import RANK, RANKS
from simcse.text.passages import Passages
from simcse.text.textfile import Corpus

import numpy as np

if TYPE_CHECKING:  # what encodes imports paddle, which opening an index does without
    from simcse.encoder.encoder import Encoder, TextWarnings

SHARDS = 8  # parts of an index, if --index_shards is not given
CORPUS_FILE = "corpus.csv"
BM25_FOLDER = "bm25"
REBUILD = "name another folder, or remove this one to build it again"
DAMAGE = (OSError, RuntimeError, ValueError)  # what reading a damaged file raises


# ------------------------------------------------------------------------------------------------------- the manifest
def manifest_to_build(wanted: Manifest, previous: Manifest | None = None) -> Manifest:
    """Return the manifest of an index to build: as wanted, else as in the previous index, else the defaults.

    Args:
        wanted: what the flags ask for.
        previous: that of the index of another state of the corpus, which this one replaces.
    """
    settings = previous or Manifest()
    engine = ENGINES[wanted.ann_engine or settings.ann_engine or DEFAULT_ENGINE]
    build_settings = {}
    for setting in engine.build_settings:
        build_settings[setting.name] = setting.default
        if setting.default is not None:  # otherwise it depends on the corpus, as it is now
            build_settings[setting.name] = settings.build_settings.get(setting.name, setting.default)
    defaults = Manifest(
        ann_engine=wanted.ann_engine or settings.ann_engine or DEFAULT_ENGINE,
        index_shards=settings.index_shards or SHARDS,
        passages=bool(settings.passages),
        build_settings=build_settings,
        search_settings={setting.name: setting.default for setting in engine.search_settings}
        | settings.search_settings)
    return wanted.completed_by(defaults)


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
    remedy = REBUILD
    if wanted.precision not in (None, manifest.precision):
        device = " with --device cpu" if manifest.precision == "int8" else ""
        remedy = f"--precision {manifest.precision}{device} takes it as it is; or {remedy}"
    manifest.check(wanted, where, remedy)
    return manifest


def kept_precision(path: str, device: str) -> str:
    """Return what --precision auto means for queries to a kept index: its own precision, if the device has it."""
    content = {}
    with contextlib.suppress(InputError):  # `read_manifest` reports it
        content = read_json(os.path.join(path, MANIFEST_FILE))
    precision = content.get("precision") or "auto"
    needed_device = {"int8": "cpu", "fp16": "gpu", "tf32": "gpu"}.get(precision, device)
    return precision if needed_device == device else "auto"


def is_current(path: str, wanted: Manifest) -> bool:
    """Return whether a folder has an index as wanted, of the corpus as it is now, if one is wanted.

    Raises:
        InputError: see `read_manifest`.
    """
    return os.path.exists(path) and read_manifest(path, wanted).has_corpus_of(wanted)


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
        InputError: a file is damaged.
    """
    with as_input_error(f"--index_path {path}: damaged", *DAMAGE):
        documents = _load_documents(path, manifest, corpus)
        index = ShardedIndex(manifest, threads, path)
    index.set_search_settings(search_settings or {})
    log(f"using the index in {path}")
    report_ann_recall(manifest.ann_recall, index.search_settings)
    return index, documents


def _load_documents(path: str, manifest: Manifest, corpus: Corpus | None) -> Documents:
    """Open the documents of the index in a folder."""
    _check_digests(path, manifest)
    if corpus is None:
        corpus_path = os.path.join(path, CORPUS_FILE)
        _check_digest(corpus_path, manifest.corpus)
        with accept_all_lines():
            corpus = Corpus(corpus_path, "--index_path", manifest.corpus_columns)
    documents = Documents(corpus, path)
    if manifest.passages:
        documents.passages = Passages.load(documents, path)
    return documents


def _check_digests(path: str, manifest: Manifest) -> None:
    """Raise ValueError if a file of the documents is not what was written; shards are checked when they are read."""
    for name, digest in manifest.files.items():
        if name.endswith(".npy"):
            _check_digest(os.path.join(path, name), digest)


def _check_digest(path: str, digest: str) -> None:
    if not os.path.isfile(path) or file_digest(path) != digest:
        raise ValueError(f"{os.path.basename(path)} is not what was written")


# ------------------------------------------------------------------------------------------------------- building
def build_index(corpus: Corpus, encoder: "Encoder", manifest: Manifest, *, threads: int = 0,
                previous_path: str | None = None) -> tuple[ShardedIndex, Documents]:
    """Encode a corpus and build its index; of several ranks each encodes and has its shards.

    Args:
        corpus: the documents.
        encoder: turns them into vectors.
        manifest: what `manifest_to_build` has returned.
        threads: those of a search, and of building, a shard each; 0: all cores.
        previous_path: the folder of an index of another state of the corpus, whose vectors are used again.

    Raises:
        InputError: the settings do not suit the corpus, the memory does not suffice, or the previous index has no text
            of this corpus.
    """
    documents = read_documents(corpus, encoder, manifest)
    manifest = describe(manifest, documents, encoder)
    engine = LOCAL_ENGINES[manifest.ann_engine]
    manifest.build_settings = engine.complete_settings(manifest.build_settings, manifest.rows)
    index = ShardedIndex(manifest, threads)
    reused = None
    if previous_path:
        with as_input_error(f"--index_path {previous_path}: damaged", *DAMAGE):
            reused = read_reused_vectors(previous_path, documents, index.missing)
    add_missing(index, documents, encoder, reused)
    if engine.approximate:  # measured on documents, which unlike queries are always there
        vectors = encoder.encode(sample(documents), warn=False)
        manifest.ann_recall = index.measure(vectors, min(MEASURED_K, len(documents)), "documents")
        report_ann_recall(manifest.ann_recall)
    return index, documents


def read_documents(corpus: Corpus, encoder: "Encoder", manifest: Manifest) -> Documents:
    """Return the documents of a corpus, split into passages if the manifest says so."""
    documents = Documents(corpus)
    if manifest.passages:
        documents.split(encoder.tokenizer, encoder.max_seq_length)
    return documents


def describe(manifest: Manifest, documents: Documents, encoder: "Encoder") -> Manifest:
    """Return a manifest with the sizes of an index of these documents."""
    return dataclasses.replace(manifest, dimension=encoder.embedding_size, lines=documents.line_count,
                               documents=len(documents), rows=documents.row_count)


@dataclass
class ReusedVectors:
    """Vectors of a previous index, for each piece of the rows that this rank adds.

    Attributes:
        vectors: float32 [rows of the piece, dim]; undefined for missing rows.
        missing: the rows of the piece that the previous index has not, int64.
    """

    vectors: list[np.ndarray]
    missing: list[np.ndarray]


def read_reused_vectors(path: str, documents: Documents, pieces: Sequence[range]) -> ReusedVectors:
    """Return the vectors that the index in a folder has of some rows, and log what of the corpus is new, and gone.

    Args:
        path: the folder of an index of another state of the corpus.
        documents: the corpus now.
        pieces: its rows that this rank needs.

    Raises:
        InputError: the index has none of the documents.
        OSError, RuntimeError, ValueError: a file is damaged.
    """
    where = f"--index_path {path}"
    previous = Manifest.load(path, where, REBUILD)
    _check_digests(path, previous)
    document_keys = Documents.load_keys(path)
    report_changes(documents, document_keys, where)
    row_of = find_keys(documents.row_keys(), Documents.load_row_keys(path, previous.passages))
    rows_of_pieces = [row_of[piece.start : piece.stop] for piece in pieces]
    rows = np.concatenate(rows_of_pieces) if pieces else np.empty(0, "int64")
    vectors = np.empty((len(rows), previous.dimension), "float32")
    for shard in range(previous.index_shards):  # as if each were on a rank of its own, so that one is in memory
        ShardedIndex(previous, 1, path, shard, previous.index_shards).copy_vectors(rows, vectors)
    ends = np.cumsum([len(piece) for piece in pieces])
    missing = [piece.start + np.flatnonzero(own == NOT_FOUND) for piece, own in zip(pieces, rows_of_pieces)]
    return ReusedVectors(np.split(vectors, ends)[:-1], missing)


def add_missing(index: Index, documents: Documents, encoder: "Encoder", reused: ReusedVectors | None = None) -> None:
    """Encode the rows that an index lacks and add them; one piece is added while the next is encoded.

    Args:
        index: lacks some rows.
        documents: have their texts.
        encoder: turns them into vectors.
        reused: vectors that are not encoded again; None: there are none, and the rate is logged.
    """
    from simcse.encoder.encoder import TextWarnings, places_of

    pieces = list(index.missing)
    to_encode = pieces if reused is None else reused.missing
    started = time.time()
    if pieces and reused is None:
        _log_start(documents, encoder, sum(map(len, pieces)))
    # What a rank has to say of its texts is said once for all ranks.
    warnings = TextWarnings(encoder.max_seq_length) if RANKS > 1 else None
    for number, encoded in enumerate(_encode_rows(encoder, documents, to_encode, warnings)):
        rows = pieces[number]
        vectors = encoded
        if reused is not None:
            vectors = reused.vectors[number]
            vectors[reused.missing[number] - rows.start] = encoded
        index.add(rows, vectors)
    index.finish()
    if pieces and reused is None:
        unit = "passages" if documents.has_passages else "documents"
        log(f"{sum(map(len, pieces)) / (time.time() - started):.1f} {unit}/s")
    if warnings is not None:
        warnings = warnings.gather()
        if not RANK or console.settings.strict_data:  # then it is an error, which ends all ranks
            warnings.report(places_of(documents.row_texts))


def _log_start(documents: Documents, encoder: "Encoder", rows: int) -> None:
    copies = documents.line_count - len(documents)
    unit = "passages of " if documents.has_passages else "of "
    message = f"encoding and indexing {rows} {unit}{len(documents)} documents in {encoder.precision}"
    if copies:
        message += f"; {copies} more lines are copies, --distinct gives each text once"
    log(message)


def _encode_rows(encoder: "Encoder", documents: Documents, pieces: Sequence[Sequence[int]],
                 warnings: "TextWarnings | None") -> Iterator[np.ndarray]:
    """Return an iterator over the vectors of each piece, float32 [rows, dim]; passages are in their documents' context.
    """
    passages = documents.passages
    if passages is None:
        return encoder.stream(documents, windows=pieces, warn=warnings is None, warnings=warnings)
    encoded = encoder.stream(passages, windows=passages.windows(pieces), warn=warnings is None, warnings=warnings)
    return passages.in_context(pieces, encoded)


def open_collection(uri: str, collection: str, wanted: Manifest, *, corpus: Corpus | None = None,
                    encoder: "Encoder | None" = None) -> tuple[Index, DocumentStore]:
    """Open a collection of Milvus; with a corpus, make it or have it follow the corpus.

    Args:
        uri: http://host:port of a server, or a path ending in .db: Milvus Lite.
        collection: its name.
        wanted: what it has to be made of.
        corpus: the documents; None: all are in the collection, which then maps rows to documents itself.
        encoder: turns them into vectors, where there is a corpus.

    Raises:
        InputError: there is no such server or collection, it is not as wanted, or lacks documents.
    """
    from simcse.index.milvus import MilvusIndex
    from simcse.ranks import wait_for_ranks

    index = MilvusIndex(uri, collection)
    if index.manifest is not None:
        index.manifest.check(wanted, f"--milvus_collection {collection}",
                             "name another collection, or drop this one to build it again")
    if corpus is None:
        index.open(wanted.search_settings)
        return index, index
    manifest = manifest_to_build(wanted, index.manifest)
    documents = read_documents(corpus, encoder, manifest)
    index.follow(documents, describe(manifest, documents, encoder))
    add_missing(index, documents, encoder)
    wait_for_ranks()
    return index, documents


# ------------------------------------------------------------------------------------------------------- keeping
def save_index(path: str, index: ShardedIndex, documents: Documents, hybrid: bool = False) -> None:
    """Keep an index in a folder, which appears, or takes the place of the one there, when all is written.

    All ranks call it together; each writes its shards.

    Args:
        path: the folder.
        index: all of its rows have been added.
        documents: those of its rows.
        hybrid: keep the index of words, too.
    """
    from simcse.ranks import gather_arrays, wait_for_ranks

    replaced = os.path.exists(path)
    obsolete = _files_of_index(path) if replaced else []
    process_of_rank_0 = gather_arrays(np.array([os.getpid()]))[0].item()
    folder_of_rank_0 = hidden_path(path, process_of_rank_0)
    with contextlib.nullcontext(folder_of_rank_0) if RANK else new_folder(path, obsolete=obsolete) as folder:
        wait_for_ranks()
        index.save(folder)
        wait_for_ranks()
        if not RANK:
            _write_documents(folder, index.manifest, documents, hybrid)
            if BM25_FOLDER in obsolete and not hybrid:
                log("BM25 of the corpus before is gone; --hybrid_bm25 builds it again")
    if not RANK:
        log(f"kept the index in {path}")


def _files_of_index(path: str) -> list[str]:
    """Return the names of the files and folders that belong to the index in a folder; others are the user's."""
    names = list(Manifest.load(path, f"--index_path {path}", REBUILD).files)
    if os.path.isdir(os.path.join(path, BM25_FOLDER)):
        names.append(BM25_FOLDER)
    return names


def _write_documents(folder: str, manifest: Manifest, documents: Documents, hybrid: bool) -> None:
    """Write what is beside the shards in a folder: the documents, the corpus, the manifest and the index of words."""
    documents.save(folder)
    manifest.files = {name: file_digest(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
    shutil.copyfile(documents.corpus.path, os.path.join(folder, CORPUS_FILE))
    manifest.save(folder)
    if hybrid:
        open_bm25(documents, manifest.corpus, folder)


def open_bm25(documents: DocumentStore, corpus: str | None, folder: str | None) -> Any:
    """Return the index of words of some documents, kept in an index folder; None: it is not kept.

    Args:
        documents: their texts.
        corpus: SHA-256 of the file that they are of.
        folder: that of the index.
    """
    from simcse.index.bm25 import Bm25

    return Bm25(documents, folder and os.path.join(folder, BM25_FOLDER), corpus)
