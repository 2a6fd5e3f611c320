"""What the service serves: an exported model, and the index that was made with it."""

import argparse
import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

import console
import index_store
from data import distinct
from deploy.python.onnx_predictor import OnnxPredictor, holds_onnx
from deploy.serving.batching import Job
from tokenizing import fixed_batches, load_tokenizer

Hits = list[tuple[str, float]]  # documents and their cosines, best first
SHAPES_BYTES = 2 << 30


class Searcher:
    """Answers batches of jobs.

    Args:
        engine: see model.Engine.
        index: a `Shards` or a `MilvusIndex`.
        corpus: its documents, by row.
        max_seq_length: tokens per text, of the corpus and of what is asked.
        shapes: texts and tokens that a batch may have.
    """

    def __init__(self, engine: Any, tokenizer: Any, index: Any, corpus: Sequence[str], max_seq_length: int,
                 shapes: tuple[Sequence[int], Sequence[int]]) -> None:
        self.engine, self.tokenizer, self.index, self.corpus = engine, tokenizer, index, corpus
        self.max_seq_length, self.documents, self.embedding_size = max_seq_length, len(corpus), engine.embedding_size
        self.shapes = shapes

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings, float32 [texts, embedding_size], by batches of few shapes."""
        ids = self.tokenizer(texts, self.max_seq_length)
        embeddings = np.empty((len(ids), self.embedding_size), "float32")
        for rows, *batch in fixed_batches(ids, self.tokenizer.pad_token_id, *self.shapes):
            embeddings[rows] = np.asarray(self.engine.embed(*batch))[: len(rows)]
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

    def _search(self, queries: Any, depths: list[int]) -> list[Hits]:
        rows, cosines = self.index.search(queries, min(max(depths), self.documents))
        wanted = sorted({row for each, depth in zip(rows.tolist(), depths) for row in each[:depth] if row >= 0})
        document = dict(zip(wanted, self.corpus.take(wanted)))
        return [[(document[row], cosine) for row, cosine in zip(each[:depth], scores) if row >= 0]
                for each, scores, depth in zip(rows.tolist(), cosines.tolist(), depths)]


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
    from loading import CONFIG_FILE, read_record

    digest = read_record(args.model_dir).get("model")
    if not digest:
        raise console.InputError(f"--model_dir {args.model_dir}: its {CONFIG_FILE} does not say of which checkpoint it "
                                 "is; export it again")
    index, made_of = None, {"model": digest}
    if args.index_path:
        made_of = index_store.read_made_of(args.index_path, made_of)
    else:
        index, made_of = _open_collection(args, made_of)
    weights = sum(file.stat().st_size for file in os.scandir(args.model_dir) if file.name.startswith("inference."))
    shapes = shapes_for(weights, made_of["max_seq_length"])
    engine = _open_engine(args, made_of["precision"], len(shapes[0]) * len(shapes[1]))
    if index is None:
        corpus = index_store.read_kept_corpus(args.index_path, made_of["corpus"])
        index = index_store.new_index(made_of, len(corpus), engine.embedding_size, args.cpu_threads)
        index_store.load_index(args.index_path, index, made_of)
    else:
        corpus = index.texts
    searcher = Searcher(engine, load_tokenizer(args.model_dir), index, corpus, made_of["max_seq_length"], shapes)
    searcher.warm_up()
    return searcher


def _open_collection(args: argparse.Namespace, made_of: dict) -> tuple[Any, dict]:
    from milvus_index import MilvusIndex

    if args.max_top_k > MilvusIndex.MOST:
        raise console.InputError(f"--max_top_k {args.max_top_k}: Milvus gives at most {MilvusIndex.MOST}")
    index = MilvusIndex(args.milvus_uri, args.milvus_collection, made_of)
    if index.pieces:
        raise console.InputError(f"--milvus_collection {index.collection}: not all documents are in it yet; finish it "
                                 "with recall.py")
    console.log(f"using the collection {index.collection} in {args.milvus_uri}")
    return index, index.made_of


def _open_engine(args: argparse.Namespace, precision: str, shapes: int) -> Any:
    """The exported model, in the precision that the corpus was encoded in where none is asked for."""
    if holds_onnx(args.model_dir):
        if args.device != "cpu" or args.precision not in (None, "fp32"):
            raise console.InputError(f"--model_dir {args.model_dir}: holds ONNX, which runs with --device cpu, in fp32")
        return OnnxPredictor(args.model_dir, args.cpu_threads)
    from deploy.python.predictor import Predictor

    return Predictor(args.model_dir, args.device, args.cpu_threads, enable_mkldnn=args.device == "cpu",
                     precision=args.precision or precision, shapes=shapes)
