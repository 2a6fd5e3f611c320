"""Answer jobs with an exported model and the index that was made with it."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from deploy.serving.jobs import EMBEDDING, HYBRID, Embedded, EmbedJob, Facts, Input, Job, SearchHit, SearchJob
from deploy.serving.shapes import BatchShapes
from simcse import console
from simcse.encoder.encoder import Encoder
from simcse.index.hits import FUSION_DEPTH, Ranking, hits_of, search
from simcse.index.protocols import NOT_FOUND, DocumentStore, VectorIndex
from simcse.text.prefixes import QUERY
from simcse.text.textfile import distinct

import numpy as np


class BestRow(NamedTuple):
    """The row of the index by which a document is most similar to a query: the document's best passage, or itself."""

    row: int
    cosine: float


class Searcher:
    """Answer batches of jobs.

    Args:
        encoder: the exported model, with the batches of `shapes`.
        index: its embeddings of the corpus.
        documents: maps rows of the index to documents.
        shapes: those that batches of the encoder may have.
        distinct: give each text once, not once for every line that has it.
        bm25: the BM25 index of the documents, a `Bm25`; None: there is none, and no hybrid search.
        whitened: whether the model's embeddings are.
    """

    def __init__(self, encoder: Encoder, index: VectorIndex, documents: DocumentStore, shapes: BatchShapes, *,
                 distinct: bool = False, bm25: Any = None, whitened: bool = False) -> None:
        self.encoder = encoder
        self.index = index
        self.documents = documents
        self.shapes = shapes
        self.distinct = distinct
        self.bm25 = bm25
        self._warned_truncated = False
        self._search_in_mode = {EMBEDDING: self.search_by_embedding}
        if bm25 is not None:
            self._search_in_mode[HYBRID] = self.search_hybrid
        self.facts = Facts(documents.line_count, encoder.embedding_size, encoder.precision,
                           tuple(self._search_in_mode), encoder.max_seq_length, whitened)

    def warm_up(self) -> None:
        """Run a batch of each shape, so that no request waits for the kernels of its shape."""
        for size, length in self.shapes.all():
            input_ids = np.ones([size, length], "int64")
            np.asarray(self.encoder.engine.embed(input_ids, np.ones_like(input_ids)))

    def close(self) -> None:
        """Close the index."""
        self.index.close()

    def answer(self, jobs: Sequence[Job]) -> list[Any]:
        """Return the answer to each job; texts that several jobs have are encoded and searched once."""
        inputs = distinct(each for job in jobs for each in job.inputs)
        row_of = {each: row for row, each in enumerate(inputs)}
        encoded = self.encode(inputs)
        hits_in_mode = {}
        for mode, search_in_mode in self._search_in_mode.items():
            depth_of = collect_depths([job for job in jobs if isinstance(job, SearchJob) and job.mode == mode])
            if depth_of:
                rows = [row_of[Input(text, QUERY)] for text in depth_of]
                hits_in_mode[mode] = search_in_mode(depth_of, encoded.embeddings[rows])
        answers: list[Any] = []
        for job in jobs:
            if isinstance(job, SearchJob):
                answers.append([hits_in_mode[job.mode][text][: job.top_k] for text in job.texts])
            elif isinstance(job, EmbedJob):
                rows = [row_of[each] for each in job.inputs]
                answers.append(Embedded(encoded.embeddings[rows], encoded.token_counts[rows]))
            else:
                raise TypeError(job)
        return answers

    def encode(self, inputs: Sequence[Input]) -> Embedded:
        """Encode texts; warn once in the life of the service of those that are cut."""
        texts = [each.text for each in inputs]
        tokenized = self.encoder.tokenize(texts, [each.input_type for each in inputs])
        most = self.encoder.max_seq_length
        if tokenized.lengths.max() > most and not self._warned_truncated:
            console.warn(f"texts longer than {most} tokens are cut; further ones are not reported")
            self._warned_truncated = True
        return Embedded(self.encoder.embed(tokenized), tokenized.lengths)

    def search_by_embedding(self, depth_of: dict[str, int], embeddings: np.ndarray) -> dict[str, list[SearchHit]]:
        """Return the hits of each text by cosine.

        Args:
            depth_of: the texts, and the most hits of each.
            embeddings: float32 [texts, embedding_size], theirs.
        """
        depths = list(depth_of.values())
        ranking = search(self.index, self.documents, embeddings, max(depths))
        hits_of_text = {}
        for text, hits in zip(depth_of, hits_of(ranking, self.documents, depths, self.distinct)):
            hits_of_text[text] = [
                SearchHit(rank, hit.document, hit.line, hit.id, hit.score, score=None, words=None, passage=hit.passage)
                for rank, hit in enumerate(hits, 1)]
        return hits_of_text

    def search_hybrid(self, depth_of: dict[str, int], embeddings: np.ndarray) -> dict[str, list[SearchHit]]:
        """Return the hits of each text by cosine and words, fused as recall.py --hybrid_bm25 does.

        Args:
            depth_of: the texts, and the most hits of each.
            embeddings: float32 [texts, embedding_size], theirs.
        """
        from simcse.index.bm25 import fuse

        by_cosine = search(self.index, self.documents, embeddings, max(FUSION_DEPTH, *depth_of.values()))
        hits_of_text = {}
        for row, (text, top_k) in enumerate(depth_of.items()):
            depth = max(FUSION_DEPTH, top_k)  # of both rankings
            dense = Ranking(*(column[row : row + 1, :depth] for column in by_cosine))
            lexical = self.bm25.search([text], depth)
            fused = fuse(dense, lexical, min(top_k, len(self.documents)))
            hits_of_text[text] = self._hybrid_hits(text, embeddings[row], fused, top_k)
        return hits_of_text

    def _hybrid_hits(self, text: str, embedding: np.ndarray, fused: Ranking, top_k: int) -> list[SearchHit]:
        """Return the hits of a text, whose documents are the only row of `fused`."""
        from simcse.index.bm25 import query_words, words

        numbers = [number for number in fused.documents[0].tolist() if number != NOT_FOUND]
        scores = fused.scores[0].tolist()
        best_rows = self._best_rows(numbers, embedding)
        documents = self.documents.read(numbers, 1 if self.distinct else top_k)
        passages: list[str | None] = [None] * len(numbers)
        if self.documents.has_passages:
            passages = list(self.documents.passage_texts([best.row for best in best_rows]))
        words_of_text = distinct(query_words(text))
        hits: list[SearchHit] = []
        for document, score, best, passage in zip(documents, scores, best_rows, passages):
            words_of_document = set(words(document.text))
            common = [word for word in words_of_text if word in words_of_document]
            for line in document.lines[: top_k - len(hits)]:
                hits.append(SearchHit(len(hits) + 1, document.text, line.number, line.id, best.cosine, score, common,
                                      passage))
        return hits

    def _best_rows(self, documents: Sequence[int], embedding: np.ndarray) -> list[BestRow]:
        """Return the best row of each document, also of those that words alone have found."""
        if not documents:
            return []
        rows_of = [self.documents.rows_of(document) for document in documents]
        rows = np.concatenate(rows_of)
        cosines = (self.index.vectors(rows) @ embedding).clip(-1, 1)  # rounding of two unit vectors may go beyond 1
        ends = itertools.accumulate(len(rows) for rows in rows_of)
        best_rows = []
        for end, rows_of_document in zip(ends, rows_of):
            start = end - len(rows_of_document)
            place = start + int(cosines[start:end].argmax())
            best_rows.append(BestRow(int(rows[place]), float(cosines[place])))
        return best_rows


def collect_depths(jobs: Sequence[SearchJob]) -> dict[str, int]:
    """Return the texts of jobs, each with the highest `top_k` that is asked for it."""
    depth_of: dict[str, int] = {}
    for job in jobs:
        for text in job.texts:
            depth_of[text] = max(job.top_k, depth_of.get(text, 0))
    return depth_of
