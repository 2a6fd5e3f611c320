"""What the service serves: an exported model, and the index that was made with it."""

import argparse
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ann_util
from deploy.python import predictor
from deploy.serving.batching import Job
from simcse import console
from simcse.encoder.encoder import Encoder
from simcse.index.hits import FUSION_DEPTH, Ranking, hits_of, search
from simcse.index.manifest import Manifest
from simcse.text.textfile import distinct
from simcse.text.tokens import Ids, Tokens
from simcse.text.wordpiece import load_tokenizer

import numpy as np

SHAPES_BYTES = 2 << 30


class Facts(NamedTuple):
    """What the service says of what it serves."""

    documents: int
    embedding_size: int
    precision: str
    hybrid: bool
    max_seq_length: int
    whitened: bool


class Found(NamedTuple):
    """A document that was found; by words, too, its fused score, and which of the query's words it has."""

    document: str
    line: int | None
    id: str | None
    cosine: float
    score: float | None = None
    words: list[str] | None = None
    passage: str | None = None


class Searcher:
    """Answers batches of jobs.

    Args:
        encoder: an `Encoder` whose batches have the few `shapes`.
        index: an `Index`.
        documents: the `DocumentStore` of its rows.
        shapes: texts and tokens that a batch may have.
        distinct: whether a text is given out once, however many lines have it.
        bm25: a `Bm25` of the documents, for hybrid jobs; None: there are none.
        whitened: whether the model's embeddings are.
    """

    def __init__(self, encoder: Encoder, index: Any, documents: Any, shapes: tuple[Sequence[int], Sequence[int]],
                 distinct: bool = False, bm25: Any = None, whitened: bool = False) -> None:
        self.encoder, self.index, self.documents, self.bm25 = encoder, index, documents, bm25
        self.shapes, self.distinct = shapes, distinct
        encoder.make_batches = functools.partial(fixed_batches, sizes=shapes[0], lengths=shapes[1])
        self.facts = Facts(documents.line_count, encoder.embedding_size, encoder.precision, bm25 is not None,
                           encoder.max_seq_length, whitened)
        self.has_cut = False

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return embeddings, float32 [texts, embedding_size], and how many tokens each text has, int64 [texts], one
        more than are read where there are more."""
        inputs = self.encoder.tokenize(texts)
        if inputs.lengths.max() > self.encoder.max_seq_length and not self.has_cut:
            console.warn(f"texts longer than {self.encoder.max_seq_length} tokens are cut; this is said once")
            self.has_cut = True
        return self.encoder.embed(inputs), inputs.lengths

    def warm_up(self) -> None:
        """Have the engine make what it needs for each shape, before somebody waits for it."""
        for size, length in itertools.product(*self.shapes):
            self.encoder.engine.embed(*[np.ones([size, length], "int64")] * 2)

    def answer(self, jobs: list[Job]) -> list[Any]:
        """For every job its texts' embeddings, float32 [texts, embedding_size], and with `counted` their tokens; or of
        every text its `Found`, best first."""
        texts = distinct(text for job in jobs for text in job.texts)
        row_of = {text: row for row, text in enumerate(texts)}
        embeddings, lengths = self.encode(texts)
        asked: dict[tuple[str, bool], int] = {}  # how deep each text is looked for
        for job in jobs:
            for text in job.texts if job.top_k else ():
                asked[text, job.hybrid] = max(job.top_k, asked.get((text, job.hybrid), 0))
        found = self._search(embeddings[[row_of[text] for text, _ in asked]], asked) if asked else {}
        answers = []
        for job in jobs:
            rows = [row_of[text] for text in job.texts]
            if job.top_k:
                answers.append([found[text, job.hybrid][: job.top_k] for text in job.texts])
            else:
                answers.append((embeddings[rows], lengths[rows]) if job.counted else embeddings[rows])
        return answers

    def close(self) -> None:
        """Let go of the index."""
        self.index.close()

    def _search(self, queries: np.ndarray,
                asked: dict[tuple[str, bool], int]) -> dict[tuple[str, bool], list[Found]]:
        depths = [max(depth, FUSION_DEPTH) if hybrid else depth for (_, hybrid), depth in asked.items()]
        ranking = search(self.index, self.documents, queries, max(depths))
        alone = [0 if hybrid else depth for (_, hybrid), depth in asked.items()]  # the others' hits are fused below
        hits = hits_of(ranking, self.documents, alone, self.distinct)
        found = {key: [Found(*hit[:4], passage=hit.passage) for hit in each] for key, each in zip(asked, hits)}
        for row, ((text, hybrid), depth) in enumerate(zip(asked, depths)):
            if hybrid:
                near = Ranking(*(column[row : row + 1, :depth] for column in ranking))
                found[text, True] = self._fused(text, queries[row], near, asked[text, True], depth)
        return found

    def _fused(self, text: str, query: np.ndarray, near: Ranking, top_k: int, depth: int) -> list[Found]:
        """As recall.py --hybrid_bm25 fuses what is `near` with what BM25 finds."""
        from simcse.index.bm25 import fuse, words

        fused = fuse(near, self.bm25.search([text], depth), min(top_k, len(self.documents)))
        documents = fused.documents[0]
        documents = documents[documents >= 0]
        scores = fused.scores[0]
        rows, cosines = self._best_rows(documents, query)  # of those, too, that words alone have found
        asked_words = distinct(words(text))
        places = np.arange(len(documents))
        hits, = hits_of(Ranking(documents[None], places[None], rows[None]), self.documents, [top_k], self.distinct)
        found = []
        for document, line, id, place, passage in hits:
            there = set(words(document))
            found.append(Found(document, line, id, cosines[place], float(scores[place]),
                               [word for word in asked_words if word in there], passage))
        return found

    def _best_rows(self, documents: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, list[float]]:
        """The best row of each document, and its cosine."""
        best_rows, cosines = [], []
        for document in documents.tolist():
            rows = self.documents.rows_of(document)
            of_rows = (self.index.vectors(rows) @ query).clip(-1, 1)
            best = int(of_rows.argmax())
            best_rows.append(int(rows[best]))
            cosines.append(float(of_rows[best]))
        return np.array(best_rows, "int64"), cosines


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
    from simcse.encoder.weights import CONFIG_FILE, read_record

    digest = read_record(args.model_dir).get("model")
    if not digest:
        raise console.InputError(f"--model_dir {args.model_dir}: its {CONFIG_FILE} does not say of which checkpoint it "
                                 "is; export it again")
    index, wanted = None, Manifest(model=digest)
    if args.index_path:
        manifest = ann_util.read_manifest(args.index_path, wanted)
    else:
        index, documents = _open_collection(args, wanted)
        manifest = index.manifest
    weights = sum(file.stat().st_size for file in os.scandir(args.model_dir) if file.name.startswith("inference."))
    shapes = shapes_for(weights, manifest.max_seq_length)
    engine = _open_engine(args, manifest.precision, len(shapes[0]) * len(shapes[1]))
    if index is None:
        index, documents = ann_util.load_index(args.index_path, manifest, threads=args.cpu_threads)
    encoder = Encoder(engine, load_tokenizer(args.model_dir), manifest.max_seq_length)
    searcher = Searcher(encoder, index, documents, shapes, args.distinct,
                        _open_bm25(args.index_path, documents, manifest.corpus),
                        read_record(args.model_dir).get("whitened_at") is not None)
    searcher.warm_up()
    return searcher


def _open_collection(args: argparse.Namespace, wanted: Manifest) -> tuple[Any, Any]:
    from simcse.index.milvus import MilvusIndex

    if args.max_top_k > MilvusIndex.max_k:
        raise console.InputError(f"--max_top_k {args.max_top_k}: Milvus gives at most {MilvusIndex.max_k}")
    return ann_util.open_collection(args.milvus_uri, args.milvus_collection, wanted)


def _open_bm25(index_path: str | None, documents: Any, corpus: str | None) -> Any:
    """The index of words that recall.py --hybrid_bm25 keeps in that of embeddings; None: there is none."""
    folder = os.path.join(index_path or "", "bm25")
    if not index_path or not os.path.isdir(folder):
        return None
    from simcse.index.bm25 import Bm25

    bm25 = Bm25(documents, folder, corpus)
    bm25.search(["语义检索"], 1)  # jieba reads its dictionary before somebody waits for it
    return bm25


def _open_engine(args: argparse.Namespace, precision: str, shapes: int) -> Any:
    """The exported model, in the precision that the corpus was encoded in where none is asked for, fp32 being next to
    TF32, and on a CPU to fp16; on a CPU its table, where it has one. ONNX has one precision."""
    if precision == "tf32" or (precision == "fp16" and args.device == "cpu"):
        precision = "fp32"
    if precision != "int8" and predictor.find_graph(args.model_dir) == predictor.ONNX_FILE:
        precision = "fp32"
    if (predictor.read_record(args.model_dir).get("table") and args.device == "cpu"
            and (args.precision or precision) == "fp32"):
        from simcse.encoder.table import TableEngine

        return TableEngine(args.model_dir)
    try:
        return predictor.load_predictor(args.model_dir, device=args.device, precision=args.precision or precision,
                                        cpu_threads=args.cpu_threads, onednn_shapes=shapes)
    except predictor.InputError as error:
        of_index = not args.precision and str(error).startswith("--precision")
        advice = "; that is the precision of the index, --precision names another" * of_index
        raise console.InputError(f"{error}{advice}") from None
