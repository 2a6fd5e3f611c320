"""Documents in passages: where each begins, and the embedding of a passage in its document."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from simcse.console import progress
from simcse.text.keys import text_keys
from simcse.text.tokens import Tokens

import numpy as np

NAME = "passages.npy"
BLOCK = 4096  # documents that are split at a time
# A sentence ends at such marks, with the brackets and quotes behind them; at a full stop only before white space.
SENTENCE_END = re.compile(r"(?:[。！？；…!?;]+|\.(?=\s))[”’」』）》】)\]\"']*\s*|\n\s*")
WORD = re.compile(r"[^\W\u3400-\u9fff]+\s*|.\s*", re.DOTALL)  # or a han character, or a mark


class Passages(Sequence):
    """The passages of documents, one after the other; each is a row of an index.

    A passage is as many whole sentences as have room, or as many words of a sentence that has none. The passages of a
    document are all of its text.

    Args:
        documents: sequence of texts, which takes an array of rows as well: `documents.Entries`.
        starts: int32 [documents + 1], the first row of each document; its last row stands before the next one's first.
        offsets: int32 [rows], the character of its document at which each passage begins.
        first: int32 [rows], the first row with the same text, by which equal passages are encoded once; None: it is
            not known, and `windows` and `in_context` cannot be called.
    """

    def __init__(self, documents: Any, starts: np.ndarray, offsets: np.ndarray,
                 first: np.ndarray | None = None) -> None:
        self.documents = documents
        self.starts = starts
        self.offsets = offsets
        self.first = first

    @classmethod
    def split(cls, documents: Any, tokenizer: Any, max_seq_length: int) -> "Passages":
        """Split documents into passages of at most `max_seq_length` tokens, [CLS] and [SEP] included."""
        counts = np.zeros(len(documents), "int32")
        offsets, keys = [], []  # an array for each block of documents
        with progress("splitting", len(documents), "documents") as advance:
            for start in range(0, len(documents), BLOCK):
                texts = documents[start : start + BLOCK]
                begins_of = find_passages(texts, tokenizer, max_seq_length)
                counts[start : start + len(texts)] = [len(begins) for begins in begins_of]
                offsets.append(np.concatenate(begins_of).astype("int32"))
                passages = []
                for text, begins in zip(texts, begins_of):
                    passages += _cut_at(text, begins)
                keys.append(text_keys(passage.strip() for passage in passages))
                advance(len(texts))
        _, first_of_key, key_of_row = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
        first = first_of_key.astype("int32")[key_of_row]
        starts = np.append(0, np.cumsum(counts)).astype("int32")
        return cls(documents, starts, np.concatenate(offsets), first)

    @classmethod
    def load(cls, documents: Any, folder: str) -> "Passages":
        """Return what `save` has written; it is mapped instead of read."""
        saved = np.load(os.path.join(folder, NAME), mmap_mode="r")
        starts, offsets = np.split(saved, [len(documents) + 1])
        return cls(documents, starts, offsets)

    def save(self, folder: str) -> None:
        """Write where passages begin to a folder."""
        np.save(os.path.join(folder, NAME), np.append(self.starts, self.offsets))

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, row):
        """Return the text of a row, or the list of those of a slice or of an array of rows."""
        if isinstance(row, slice):
            row = np.arange(len(self))[row]
        rows = np.atleast_1d(row)
        documents, text_of_row = np.unique(self.documents_of(rows), return_inverse=True)
        texts = self.documents[documents]
        next_starts = self.starts[documents + 1]
        passages = []
        for passage, place in zip(rows.tolist(), text_of_row.tolist()):
            is_last = passage + 1 == next_starts[place]
            end = None if is_last else self.offsets[passage + 1]
            passages.append(texts[place][self.offsets[passage] : end].strip())
        return passages if np.ndim(row) else passages[0]

    def documents_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the document that each row is of, int64 [rows]."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def rows_of(self, document: int) -> np.ndarray:
        """Return the rows of a document, int64."""
        return np.arange(self.starts[document], self.starts[document + 1])

    def place(self, row: int) -> str:
        """Return where a row's document stands, as file:line."""
        return self.documents.place(int(self.documents_of(row)))

    def _rows_of_documents(self, rows: Sequence[int]) -> np.ndarray:
        """Return all rows, rising, of the documents that have any of these rows."""
        documents = np.unique(self.documents_of(np.asarray(rows)))
        begins = self.starts[documents].astype("int64")
        counts = self.starts[documents + 1] - begins
        # np.arange of each document's rows, one after the other
        before = np.cumsum(counts) - counts
        return np.arange(counts.sum()) + np.repeat(begins - before, counts)

    def windows(self, pieces: Iterable[Sequence[int]]) -> list[np.ndarray]:
        """Return which rows have to be encoded for each piece of the rows: the different texts of their documents."""
        return [np.unique(self.first[self._rows_of_documents(rows)]) for rows in pieces]

    def in_context(self, pieces: Iterable[Sequence[int]], encoded: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the embeddings of the rows of each piece, which are those of passages in their documents.

        A query finds a document by what one passage says, and by what the whole of it is about. So a passage's
        embedding is (p + m) / |p + m|: p is that of its text, m the mean of those of its document, normalized. The only
        passage of a document keeps its own embedding; a passage that the encoder has no word of keeps zeros.

        Args:
            pieces: rows of each piece.
            encoded: for each piece the embeddings of its `windows`, float32 [rows, dim].

        Yields:
            float32 [rows, dim].
        """
        for embeddings, rows in zip(encoded, pieces):  # `encoded` first: asked for more it ends, and reports
            whole = self._rows_of_documents(rows)
            _, place_of_text = np.unique(self.first[whole], return_inverse=True)
            own = embeddings[place_of_text]
            documents = self.documents_of(whole)
            begins = np.flatnonzero(np.diff(documents, prepend=-1))  # of each document in `whole`
            counts = np.diff(begins, append=len(whole))
            means = _normalize(np.add.reduceat(own, begins))  # the direction of the mean is that of the sum
            blended = _normalize(own + np.repeat(means, counts, axis=0))
            blended[~own.any(axis=1)] = 0
            is_only = np.repeat(counts == 1, counts)
            blended[is_only] = own[is_only]
            yield blended[np.searchsorted(whole, np.asarray(rows))]


def _normalize(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of length 1; zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


class Part(NamedTuple):
    """A sentence or a word, which a passage is not split within, and how many tokens it has."""

    text: str
    tokens: int


def find_passages(texts: Sequence[str], tokenizer: Any, max_seq_length: int) -> list[list[int]]:
    """Return the characters at which the passages of each text begin, the first at 0.

    Args:
        texts: one or more documents; those that are one passage are not split into sentences.
        tokenizer: gives the tokens of each of some texts.
        max_seq_length: tokens of a passage, [CLS] and [SEP] included.
    """
    room = max(1, max_seq_length - 2)
    begins = [[0] for _ in texts]
    longer = [row for row, tokens in enumerate(_count_tokens(texts, tokenizer, room)) if tokens > room]
    sentences_of = [_split_sentences(texts[row]) for row in longer]
    counts = iter(_count_tokens([sentence for sentences in sentences_of for sentence in sentences], tokenizer, room))
    for row, sentences in zip(longer, sentences_of):
        parts = []
        for sentence in sentences:
            tokens = next(counts)
            if tokens <= room:
                parts.append(Part(sentence, tokens))
            else:
                parts += _split_words(sentence, tokenizer, room)
        begins[row] = _fill_passages(parts, room)
    return begins


def _count_tokens(texts: Sequence[str], tokenizer: Any, room: int) -> list[int]:
    """Return how many tokens each text has, [CLS] and [SEP] excluded; `room` + 1 for all that have more."""
    if not texts:
        return []
    lengths = Tokens.of(tokenizer(texts, room + 3)).lengths
    return (lengths - 2).tolist()


def _cut_at(text: str, begins: Sequence[int]) -> list[str]:
    """Return the parts of a text that begin at these characters."""
    ends = [*begins[1:], len(text)]
    return [text[begin:end] for begin, end in zip(begins, ends)]


def _split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, each with the marks and white space at its end; together they are the text."""
    begins = [0] + [match.end() for match in SENTENCE_END.finditer(text)]
    return [sentence for sentence in _cut_at(text, begins) if sentence]


def _split_words(sentence: str, tokenizer: Any, room: int) -> list[Part]:
    """Return the words of a sentence; the characters of a word that has no room in a passage."""
    words = WORD.findall(sentence)
    parts = []
    for word, tokens in zip(words, _count_tokens(words, tokenizer, room)):
        if tokens <= room:
            parts.append(Part(word, tokens))
        else:
            parts += [Part(character, 1) for character in word]
    return parts


def _fill_passages(parts: Sequence[Part], room: int) -> list[int]:
    """Return the characters at which passages begin, each of as many parts as have room in it."""
    begins = [0]
    offset = used = 0  # characters of the text, tokens of the passage
    for part in parts:
        if used > 0 and used + part.tokens > room:
            begins.append(offset)
            used = 0
        used += part.tokens
        offset += len(part.text)
    return begins
