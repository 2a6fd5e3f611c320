"""Split documents into passages, and blend the embedding of a passage with that of its document."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from simcse.console import progress
from simcse.text.keys import UNKNOWN_KEY, passage_keys, sequence_keys, text_keys
from simcse.text.tokens import Tokens

import numpy as np

FILE_NAME = "passages.npy"
BLOCK_DOCUMENTS = 4096  # documents that are split at a time
# A sentence ends after these marks and the brackets and quotes that follow; after a full stop only before white space.
SENTENCE_END = re.compile(r"(?:[。！？；…!?;]+|\.(?=\s))[”’」』）》】)\]\"']*\s*|\n\s*")
WORD = re.compile(r"[^\W\u3400-\u9fff]+\s*|.\s*", re.DOTALL)  # or one Chinese character, or one mark


class Passages(Sequence):
    """A sequence of the passages of documents, each of which is a row of an index.

    A passage has as many whole sentences as fit. A sentence that does not fit is split between words. Together the
    passages of a document are its whole text.

    Args:
        documents: sequence of texts, which can be indexed by an array too, such as `Documents`.
        starts: int32 [documents + 1], the first row of each document, and the number of rows.
        offsets: int32 [rows], the character of its document at which each passage begins.
        first_row_of_text: int32 [rows], the first row with the same text, so that equal passages are encoded once;
            None: unknown, then `rows_to_encode` and `blend_with_documents` cannot be called.
    """

    def __init__(self, documents: Any, starts: np.ndarray, offsets: np.ndarray,
                 first_row_of_text: np.ndarray | None = None) -> None:
        self.documents = documents
        self.starts = starts
        self.offsets = offsets
        self.first_row_of_text = first_row_of_text

    @classmethod
    def split(cls, documents: Any, tokenizer: Any, max_seq_length: int) -> "Passages":
        """Split documents into passages of at most `max_seq_length` tokens, [CLS] and [SEP] included."""
        counts = np.zeros(len(documents), "int32")
        offsets, keys = [], []  # an array for each block of documents
        with progress("splitting", len(documents), "documents") as advance:
            for start in range(0, len(documents), BLOCK_DOCUMENTS):
                texts = documents[start : start + BLOCK_DOCUMENTS]
                begins_of = find_passages(texts, tokenizer, max_seq_length)
                counts[start : start + len(texts)] = [len(begins) for begins in begins_of]
                offsets.append(np.concatenate(begins_of).astype("int32"))
                passages = []
                for text, begins in zip(texts, begins_of):
                    passages += _cut_at(text, begins)
                keys.append(text_keys(passage.strip() for passage in passages))
                advance(len(texts))
        _, first_of_key, key_of_row = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
        first_row_of_text = first_of_key.astype("int32")[key_of_row]
        starts = np.append(0, np.cumsum(counts)).astype("int32")
        return cls(documents, starts, np.concatenate(offsets), first_row_of_text)

    @classmethod
    def load(cls, documents: Any, folder: str) -> "Passages":
        """Return the passages that `save` wrote; the file is memory-mapped."""
        saved = np.load(os.path.join(folder, FILE_NAME), mmap_mode="r")
        starts, offsets = np.split(saved, [len(documents) + 1])
        return cls(documents, starts, offsets)

    def save(self, folder: str) -> None:
        """Write where the passages begin to a folder."""
        np.save(os.path.join(folder, FILE_NAME), np.append(self.starts, self.offsets))

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, rows):
        """Return the text of a row, or the list of the texts of a slice or of an array of rows."""
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        row_list = np.atleast_1d(rows).tolist()
        documents, places = np.unique(self.documents_of(np.atleast_1d(rows)), return_inverse=True)
        document_texts = self.documents[documents]
        document_ends = self.starts[documents + 1]  # the row after the last one of each document
        texts = []
        for row, place in zip(row_list, places.tolist()):  # `place` is that of the row's document in `documents`
            is_last = row + 1 == document_ends[place]
            end = None if is_last else self.offsets[row + 1]
            texts.append(document_texts[place][self.offsets[row] : end].strip())
        return texts if np.ndim(rows) else texts[0]

    def documents_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the document of each row, int64 [rows]."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def rows_of(self, document: int) -> np.ndarray:
        """Return the rows of a document, int64."""
        return np.arange(self.starts[document], self.starts[document + 1])

    def keys_in_context(self, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Return a key for each row, int64 [rows]; rows with the same key have the same embedding after the blending.

        That is so if two passages have the same tokens, and so have all passages of their documents.

        Args:
            rows: all rows of some documents, ascending.
            keys: int64 [rows], those of their texts alone.
        """
        documents = self.documents_of(rows)
        begins = np.flatnonzero(np.diff(documents, prepend=-1))  # of each document in `rows`
        ends = np.append(begins, len(rows))[1:]
        document_keys = np.repeat(sequence_keys(keys, ends), ends - begins)
        return np.where(keys == UNKNOWN_KEY, UNKNOWN_KEY, passage_keys(document_keys, keys))

    def place(self, row: int) -> str:
        """Return where a row's document stands, as file:line."""
        return self.documents.place(int(self.documents_of(row)))

    def _rows_of_same_documents(self, rows: Sequence[int]) -> np.ndarray:
        """Return all rows of the documents that these rows belong to, in ascending order."""
        documents = np.unique(self.documents_of(np.asarray(rows)))
        begins = self.starts[documents].astype("int64")
        counts = self.starts[documents + 1] - begins
        # np.arange of the rows of each document, one after the other
        before = np.cumsum(counts) - counts
        return np.arange(counts.sum()) + np.repeat(begins - before, counts)

    def rows_to_encode(self, pieces: Iterable[Sequence[int]]) -> list[np.ndarray]:
        """Return for each piece of the rows those that `blend_with_documents` needs.

        These are all passages of the piece's documents, passages with the same text once.
        """
        return [np.unique(self.first_row_of_text[self._rows_of_same_documents(rows)]) for rows in pieces]

    def blend_with_documents(self, pieces: Iterable[Sequence[int]],
                             encoded: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the embeddings of the rows of each piece, blended with those of their documents.

        A query matches a document by the content of one passage and by the topic of the whole. So the embedding of a
        passage is (p + m) / |p + m|: p is the embedding of its text, m the normalized mean over its document. The only
        passage of a document keeps p. A passage without a known word keeps zeros.

        Args:
            pieces: rows of each piece.
            encoded: for each piece the embeddings of its `rows_to_encode`, float32 [rows, dim].

        Yields:
            float32 [rows, dim].
        """
        for embeddings, rows in zip(encoded, pieces):  # `encoded` first: zip then runs it to its end
            document_rows = self._rows_of_same_documents(rows)
            _, embedding_of_row = np.unique(self.first_row_of_text[document_rows], return_inverse=True)
            text_embeddings = embeddings[embedding_of_row]
            documents = self.documents_of(document_rows)
            begins = np.flatnonzero(np.diff(documents, prepend=-1))  # of each document in `document_rows`
            counts = np.diff(begins, append=len(document_rows))
            means = _normalize(np.add.reduceat(text_embeddings, begins))  # sum and mean have the same direction
            blended = _normalize(text_embeddings + np.repeat(means, counts, axis=0))
            is_unknown = ~text_embeddings.any(axis=1)
            blended[is_unknown] = 0
            is_only = np.repeat(counts == 1, counts)
            blended[is_only] = text_embeddings[is_only]
            yield blended[np.searchsorted(document_rows, np.asarray(rows))]


def _normalize(vectors: np.ndarray) -> np.ndarray:
    """Return vectors scaled to length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


class Part(NamedTuple):
    """A sentence or a word, within which no passage begins, and its number of tokens."""

    text: str
    tokens: int


def find_passages(texts: Sequence[str], tokenizer: Any, max_seq_length: int) -> list[list[int]]:
    """Return the characters at which the passages of each text begin, the first at 0.

    Args:
        texts: the documents; those that fit in one passage are not split into sentences.
        tokenizer: gives the tokens of each of some texts.
        max_seq_length: tokens of a passage at most, [CLS] and [SEP] included.
    """
    room = max(1, max_seq_length - 2)
    begins = [[0] for _ in texts]
    token_counts = _count_tokens(texts, tokenizer, room)
    longer = [row for row, tokens in enumerate(token_counts) if tokens > room]
    sentences_of = [_split_sentences(texts[row]) for row in longer]
    # The sentences of all documents are tokenized together, which is faster.
    all_sentences = list(itertools.chain.from_iterable(sentences_of))
    all_counts = _count_tokens(all_sentences, tokenizer, room)
    start = 0
    for row, sentences in zip(longer, sentences_of):
        end = start + len(sentences)
        parts = []
        for sentence, tokens in zip(sentences, all_counts[start:end]):
            if tokens <= room:
                parts.append(Part(sentence, tokens))
            else:
                parts += _split_words(sentence, tokenizer, room)
        begins[row] = _fill_passages(parts, room)
        start = end
    return begins


def _count_tokens(texts: Sequence[str], tokenizer: Any, room: int) -> list[int]:
    """Return the number of tokens of each text, [CLS] and [SEP] excluded; `room` + 1 if it has more than `room`."""
    if not texts:
        return []
    lengths = Tokens.of(tokenizer(texts, room + 3)).lengths
    return (lengths - 2).tolist()


def _cut_at(text: str, begins: Sequence[int]) -> list[str]:
    """Return the parts of a text that begin at these characters, the first at 0."""
    ends = [*begins[1:], len(text)]
    return [text[begin:end] for begin, end in zip(begins, ends)]


def _split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, each with the marks and white space at its end; joined they are the text."""
    begins = [0] + [match.end() for match in SENTENCE_END.finditer(text)]
    return [sentence for sentence in _cut_at(text, begins) if sentence]


def _split_words(sentence: str, tokenizer: Any, room: int) -> list[Part]:
    """Return the words of a sentence; a word that does not fit in a passage is split into characters."""
    words = WORD.findall(sentence)
    parts = []
    for word, tokens in zip(words, _count_tokens(words, tokenizer, room)):
        if tokens <= room:
            parts.append(Part(word, tokens))
        else:
            parts += [Part(character, 1) for character in word]
    return parts


def _fill_passages(parts: Sequence[Part], room: int) -> list[int]:
    """Return the characters at which passages begin, each with as many parts as fit."""
    begins = [0]
    offset = 0  # characters of the text before the part
    used = 0  # tokens of the passage before the part
    for part in parts:
        if used > 0 and used + part.tokens > room:
            begins.append(offset)
            used = 0
        used += part.tokens
        offset += len(part.text)
    return begins
