"""Indexes kept in a folder: the shards, the corpus, and in fingerprint.json what they were made of."""

import functools
import hashlib
import json
import os
import shutil

import console
import data


@functools.cache  # weights are large, and a process reads them once
def model_digest(params_path: str, model_name_or_path: str | None, output_emb_size: int | None = None) -> str:
    """SHA-256 of what makes the embeddings: the checkpoint and what is beside it, or the encoder named instead; and the
    size, where it is smaller than the checkpoint's."""
    from loading import read_record

    digest = hashlib.sha256((model_name_or_path or "").encode())
    if output_emb_size not in (None, read_record(os.path.dirname(params_path)).get("output_emb_size", output_emb_size)):
        digest.update(str(output_emb_size).encode())
    beside = (os.path.join(os.path.dirname(params_path), name) for name in ("simcse_config.json", "vocab.txt"))
    for path in [params_path, *filter(os.path.isfile, beside)]:
        digest.update(data.file_digest(path).encode())
    return digest.hexdigest()


def new_index(made_of: dict, documents: int, dim: int, cpu_threads: int = 0, rank: int = 0, ranks: int = 1):
    """An empty index for so many embeddings of `dim`, or this rank's part of it.

    Args:
        made_of: its "ann_engine", "index_shards", "hnsw_m", "hnsw_ef" and "hnsw_max_elements"; of an exact one its
            "vector_type" too, float32 where it is not said.
        cpu_threads: 0: all cores.
    """
    from ann_util import ExactIndex, HnswIndex, Shards
    from machine import default_threads

    threads = cpu_threads or default_threads()
    if ranks > made_of["index_shards"]:
        raise console.InputError(f"--index_shards {made_of['index_shards']}: there are {ranks} processes")
    room = -(-made_of["hnsw_max_elements"] // made_of["index_shards"])

    def shard(size: int) -> ExactIndex | HnswIndex:
        if made_of["ann_engine"] == "exact":
            return ExactIndex(made_of.get("vector_type", "float32"))
        return HnswIndex(dim, max(size, room), made_of["hnsw_m"], made_of["hnsw_ef"], threads)

    return Shards(shard, documents, rank, ranks, threads, made_of["index_shards"])


def read_made_of(path: str, wanted: dict) -> dict:
    """What the index in the folder `path` was made of.

    Raises:
        InputError: it was built for something other than `wanted`, or is none.
    """
    from ann_util import check_made_of

    try:
        with open(os.path.join(path, "fingerprint.json"), encoding="utf-8") as file:
            found = {"vector_type": "float32", **json.load(file)}  # those kept before there were others do not say
    except (OSError, TypeError, ValueError):
        raise console.InputError(f"--index_path {path}: exists, but is not an index that recall.py wrote") from None
    check_made_of(found, wanted, f"--index_path {path}", "name another folder, or remove this one to build it again")
    return found


def read_kept_corpus(path: str, digest: str) -> data.TextFile:
    """The documents in the folder of an index."""
    corpus = os.path.join(path, "corpus.csv")
    if not os.path.isfile(corpus) or data.file_digest(corpus) != digest:
        raise console.InputError(f"--index_path {path}: damaged: corpus.csv is not what was written")
    return data.TextFile(corpus, "--index_path")


def load_index(path: str, index, made_of: dict) -> None:
    """Read the shards in the folder `path` into an empty index of `new_index`."""
    try:
        index.load(path, made_of.get("shards", {}))
    except (OSError, RuntimeError, ValueError) as error:
        raise console.InputError(f"--index_path {path}: damaged: {console.first_line(error)}") from None
    console.log(f"using the index in {path}")


def save_index(path: str, index, made_of: dict, corpus: data.TextFile) -> None:
    """Write the index of all ranks, and the corpus, to the folder `path`, which appears when all is written."""
    from checkpoint import sync
    from model import is_first_rank, wait_for_ranks

    partial = f"{path.rstrip('/')}.partial"  # the same name on all ranks
    try:
        os.makedirs(partial, exist_ok=True)
        index.save(partial)
        wait_for_ranks()
        if is_first_rank():
            digests = {name: data.file_digest(os.path.join(partial, name)) for name in sorted(os.listdir(partial))}
            shutil.copyfile(corpus.path, os.path.join(partial, "corpus.csv"))
            with open(os.path.join(partial, "fingerprint.json"), "w", encoding="utf-8") as file:
                json.dump({**made_of, "shards": digests}, file, indent=2)
            sync(partial)
            os.rename(partial, path)
            console.log(f"kept the index in {path}")
    finally:
        if is_first_rank():
            shutil.rmtree(partial, ignore_errors=True)
