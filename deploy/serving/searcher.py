"""What the service serves: an exported model, and the index that was made with it."""

import argparse
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ann_util
from data import distinct, load_tokenizer, unseen
from deploy.python import predictor
from deploy.serving.batching import Job
from simcse import console
from simcse.tokens import Ids, Tokens

import numpy as np

SHAPES_BYTES = 2 << 30


class Searcher:
    """Answers batches of jobs.

    Args:
        engine: see `simcse.engine.Engine`.
        index: a `Shards` or a `MilvusIndex`.
        entries: what is in it: `ann_util.Entries`; a `MilvusIndex` has them itself.
        max_seq_length: tokens per text, of the corpus and of what is asked.
        shapes: texts and tokens that a batch may have.
        distinct: whether a text is given out once, however many lines have it.
    """

    def __init__(self, engine: Any, tokenizer: Any, index: Any, entries: Any, max_seq_length: int,
                 shapes: tuple[Sequence[int], Sequence[int]], distinct: bool = False) -> None:
        self.engine, self.tokenizer, self.index, self.entries = engine, tokenizer, index, entries
        self.documents, self.embedding_size = entries.documents, engine.embedding_size
        self.max_seq_length, self.shapes, self.distinct = max_seq_length, shapes, distinct
        self.has_cut = False

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings, float32 [texts, embedding_size], by batches of few shapes."""
        ids = Tokens.of(self.tokenizer(texts, self.max_seq_length + 1))
        if ids.lengths.max() > self.max_seq_length and not self.has_cut:
            console.warn(f"texts longer than {self.max_seq_length} tokens are cut; this is said once")
            self.has_cut = True
        ids = ids.cut(self.max_seq_length)
        embeddings = np.empty((len(ids), self.embedding_size), "float32")
        for rows, *batch in fixed_batches(ids, self.tokenizer.pad_token_id, *self.shapes):
            embeddings[rows] = np.asarray(self.engine.embed(*batch))[: len(rows)]
        embeddings[unseen(self.tokenizer, ids)] = 0  # as in model.encode_stream
        return embeddings

    def warm_up(self) -> None:
        """Have the engine make what it needs for each shape, before somebody waits for it."""
        for size, length in itertools.product(*self.shapes):
            self.engine.embed(*[np.ones([size, length], "int64")] * 2)

    def answer(self, jobs: list[Job]) -> list[Any]:
        """For every job its texts' embeddings, float32 [texts, embedding_size], or of every text its hits."""
        texts = distinct(text for job in jobs for text in job.texts)
        row_of = {text: row for row, text in enumerate(texts)}
        embeddings = self.encode(texts)
        asked: dict[str, int] = {}
        for job in jobs:
            for text in job.texts if job.top_k else ():
                asked[text] = max(job.top_k, asked.get(text, 0))
        hits = self._search(embeddings[[row_of[text] for text in asked]], list(asked.values())) if asked else []
        found = dict(zip(asked, hits))
        return [[found[text][: job.top_k] for text in job.texts] if job.top_k else
                embeddings[[row_of[text] for text in job.texts]] for job in jobs]

    def close(self) -> None:
        """Let go of the index."""
        self.index.close()

    def _search(self, queries: Any, depths: list[int]) -> list[list[ann_util.Hit]]:
        entries, cosines = self.index.search(queries, min(max(depths), len(self.entries)))
        return ann_util.expand((entries, cosines.clip(-1, 1)), self.entries, depths, self.distinct)


def fixed_batches(ids: Sequence[Ids], pad_id: int, sizes: Sequence[int],
                  lengths: Sequence[int]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Batch token ids in few shapes, longest first, for an engine that has to make something anew for each shape.

    Args:
        sizes: texts of a batch, rising, the first 1; one that is two thirds full is filled up with its last text.
        lengths: tokens of a batch, rising, the last as long as any text may be.

    Yields:
        rows: the positions of the batch's texts in `ids`, without those that fill it up.
        input_ids, token_type_ids: int64 [one of `sizes`, one of `lengths`].
    """
    ids = Tokens.of(ids)
    order = np.argsort(-ids.lengths, kind="stable").tolist()
    while left := len(order):
        size = max(size for size in sizes if size <= max(1, 1.5 * left))
        rows, order = order[:size], order[size:]
        length = next(length for length in lengths if length >= ids.lengths[rows[0]])
        input_ids = ids.padded(rows + rows[-1:] * (size - len(rows)), pad_id, length)
        yield rows, input_ids, np.zeros_like(input_ids)


def shapes_for(weights: int, max_seq_length: int) -> tuple[list[int], list[int]]:
    """Texts and tokens of batches, rising: a fine grid, or a coarse one for a large model.

    oneDNN keeps a copy of the weights for each shape.

    Args:
        weights: bytes of the weights.
    """
    for sizes, factors in (([1, 2, 4, 8, 16], (1, 1.5)), ([1, 4, 16], (2,))):
        steps = (round(factor * (8 << number)) for number in range(20) for factor in factors)
        lengths = [*itertools.takewhile(lambda length: length < max_seq_length, steps), max_seq_length]
        if len(sizes) * len(lengths) * weights <= SHAPES_BYTES:
            break
    return sizes, lengths


def open_searcher(args: argparse.Namespace) -> Searcher:
    """What the flags of server.py name.

    Raises:
        InputError: no exported model, no index, or one of another model.
    """
    from simcse.weights import CONFIG_FILE, read_record

    digest = read_record(args.model_dir).get("model")
    if not digest:
        raise console.InputError(f"--model_dir {args.model_dir}: its {CONFIG_FILE} does not say of which checkpoint it "
                                 "is; export it again")
    index, fingerprint = None, {"model": digest}
    if args.index_path:
        fingerprint = ann_util.read_fingerprint(args.index_path, fingerprint)
    else:
        index, fingerprint = _open_collection(args, fingerprint)
    weights = sum(file.stat().st_size for file in os.scandir(args.model_dir) if file.name.startswith("inference."))
    shapes = shapes_for(weights, fingerprint["max_seq_length"])
    engine = _open_engine(args, fingerprint["precision"], len(shapes[0]) * len(shapes[1]))
    if index is None:
        index, entries = ann_util.load_index(args.index_path, fingerprint, engine.embedding_size, args.cpu_threads)
    else:
        entries = index
    searcher = Searcher(engine, load_tokenizer(args.model_dir), index, entries, fingerprint["max_seq_length"], shapes,
                        args.distinct)
    searcher.warm_up()
    return searcher


def _open_collection(args: argparse.Namespace, fingerprint: dict) -> tuple[Any, dict]:
    from simcse.milvus import MilvusIndex

    if args.max_top_k > MilvusIndex.MOST:
        raise console.InputError(f"--max_top_k {args.max_top_k}: Milvus gives at most {MilvusIndex.MOST}")
    index = MilvusIndex(args.milvus_uri, args.milvus_collection, fingerprint)
    if index.pieces:
        raise console.InputError(f"--milvus_collection {index.collection}: not all documents are in it yet; finish it "
                                 "with recall.py")
    return index, index.fingerprint


def _open_engine(args: argparse.Namespace, precision: str, shapes: int) -> Any:
    """The exported model, in the precision that the corpus was encoded in where none is asked for; on a CPU its table,
    where it has one. ONNX has one precision."""
    if precision != "int8" and predictor.other_format(args.model_dir) == predictor.ONNX_FILE:
        precision = "fp32"
    if (predictor.read_record(args.model_dir).get("table") and args.device == "cpu"
            and (args.precision or precision) == "fp32"):
        from simcse.engine import TableEngine

        return TableEngine(args.model_dir)
    try:
        return predictor.Predictor(args.model_dir, args.device, args.cpu_threads, args.precision or precision, shapes)
    except predictor.InputError as error:
        raise console.InputError(str(error)) from None
