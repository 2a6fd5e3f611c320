"""Documents in passages: where each begins, and the embedding of a passage in its document."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from simcse.console import progress
from simcse.text.keys import text_keys
from simcse.text.tokens import Tokens

import numpy as np

NAME = "passages.npy"
BLOCK = 4096  # documents that are split at a time
# A sentence ends at such marks, with the brackets and quotes behind them; at a full stop only before white space.
_END = re.compile(r"(?:[。！？；…!?;]+|\.(?=\s))[”’」』）》】)\]\"']*\s*|\n\s*")
_UNIT = re.compile(r"[^\W\u3400-\u9fff]+\s*|.\s*", re.DOTALL)  # a word, a han character or a mark


class Passages(Sequence):
    """The passages of documents, one after the other; each is a row of an index. A passage is as many whole sentences
    as have room, or as many words of a sentence that has none; together they are all of the document.

    The passages of document d are rows starts[d] to starts[d + 1], int32; row r begins at character offsets[r], int32,
    of its document. `first`, int32, are the first rows of the same text, by which equal ones are encoded once.

    Args:
        documents: sequence of texts, which takes an array of rows as well: `ann_util.Entries`.
    """

    def __init__(self, documents: Any, starts: np.ndarray, offsets: np.ndarray,
                 first: np.ndarray | None = None) -> None:
        self.documents, self.starts, self.offsets, self.first = documents, starts, offsets, first

    @classmethod
    def split(cls, documents: Any, tokenizer: Any, max_seq_length: int) -> "Passages":
        """The passages of at most so many tokens, [CLS] and [SEP] included."""
        counts, offsets, keys = np.empty(len(documents), "int32"), [], []
        with progress("splitting", len(documents), "documents") as advance:
            for start in range(0, len(documents), BLOCK):
                texts = documents[start : start + BLOCK]
                parts = begins(texts, tokenizer, max_seq_length)
                counts[start : start + len(texts)] = [*map(len, parts)]
                offsets.append(np.concatenate(parts).astype("int32"))
                keys.append(text_keys(text[begin:end].strip() for text, each in zip(texts, parts)
                                      for begin, end in zip(each, [*each[1:], None])))
                advance(len(texts))
        _, first, entry = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
        starts = np.append(0, np.cumsum(counts)).astype("int32")
        return cls(documents, starts, np.concatenate(offsets), first.astype("int32")[entry])

    @classmethod
    def load(cls, documents: Any, folder: str) -> "Passages":
        """What `save` has written."""
        both = np.load(os.path.join(folder, NAME), mmap_mode="r")
        return cls(documents, *np.split(both, [len(documents) + 1]))

    def save(self, folder: str) -> None:
        np.save(os.path.join(folder, NAME), np.append(self.starts, self.offsets))

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, row):
        """The text of a row, or those of a slice or of an array of rows."""
        if isinstance(row, slice):
            row = np.arange(len(self))[row]
        rows = np.atleast_1d(row)
        documents, place = np.unique(self.documents_of(rows), return_inverse=True)
        texts, ends = self.documents[documents], self.starts[documents + 1]
        found = [texts[at][self.offsets[each] : self.offsets[each + 1] if each + 1 < ends[at] else None].strip()
                 for each, at in zip(rows.tolist(), place.tolist())]
        return found if np.ndim(row) else found[0]

    def documents_of(self, rows: np.ndarray) -> np.ndarray:
        """Which document has each row, int64."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def rows_of(self, document: int) -> np.ndarray:
        """The rows of a document."""
        return np.arange(*self.starts[document : document + 2])

    def place(self, row: int) -> str:
        """Where its document stands, as file:line."""
        return self.documents.place(int(self.documents_of(row)))

    def _whole(self, rows: Sequence[int]) -> np.ndarray:
        """All rows of the documents that have any of these, which rise."""
        documents = np.unique(self.documents_of(np.asarray(rows)))
        counts = self.starts[documents + 1] - self.starts[documents]
        places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(self.starts[documents], counts) + places

    def windows(self, pieces: Iterable[Sequence[int]]) -> list[np.ndarray]:
        """The rows that have to be encoded for some pieces of the rows: the different texts of their documents."""
        return [np.unique(self.first[self._whole(rows)]) for rows in pieces]

    def in_context(self, pieces: Iterable[Sequence[int]], encoded: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the embeddings of the rows of each piece, float32 [rows, dim]. `encoded` are those of its `windows`.

        A passage's embedding is (p + m) / |p + m|, p that of its text, and m the mean of its document's passages,
        normalized: a query finds a document by what one passage says, and by what all of it is about. A document of one
        passage has its embedding; a passage that the encoder sees nothing of has zeros.
        """
        for rows, embeddings in zip(pieces, encoded):
            whole = self._whole(rows)
            own = embeddings[np.unique(self.first[whole], return_inverse=True)[1]]
            documents = self.documents_of(whole)
            begins = np.flatnonzero(np.diff(documents, prepend=-1))
            counts = np.diff(begins, append=len(whole))
            mean = _normalized(np.add.reduceat(own, begins))
            blended = _normalized(own + np.repeat(mean, counts, axis=0))
            blended[~own.any(axis=1)] = 0
            alone = np.repeat(counts == 1, counts)
            blended[alone] = own[alone]
            yield blended[np.searchsorted(whole, np.asarray(rows))]


def _normalized(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def begins(texts: Sequence[str], tokenizer: Any, max_seq_length: int) -> list[list[int]]:
    """The characters at which the passages of each text begin, the first at 0."""
    room = max(1, max_seq_length - 2)

    def count(parts: list[str]) -> list[int]:
        return (Tokens.of(tokenizer(parts, room + 3)).lengths - 2).tolist() if parts else []

    found = [[0] for _ in texts]
    longer = [row for row, tokens in enumerate(count(texts)) if tokens > room]
    sentences = [_cut(texts[row], _END) for row in longer]
    sizes = iter(count([sentence for each in sentences for sentence in each]))
    for row, each in zip(longer, sentences):
        parts = []
        for sentence in each:
            size = next(sizes)
            parts += [(sentence, size)] if size <= room else _words(sentence, count, room)
        found[row] = _pack(parts, room)
    return found


def _cut(text: str, end: re.Pattern) -> list[str]:
    """The parts of a text, each with its end; together they are the text."""
    bounds = [0, *(match.end() for match in end.finditer(text))]
    return [part for part in (text[begin:end] for begin, end in zip(bounds, [*bounds[1:], len(text)])) if part]


def _words(sentence: str, count: Any, room: int) -> list[tuple[str, int]]:
    """The words of a sentence, and how many tokens each has; one that has no room in a passage is taken by its
    characters."""
    units = _UNIT.findall(sentence)
    parts = []
    for unit, size in zip(units, count(units)):
        parts += [(unit, size)] if size <= room else [(character, 1) for character in unit]
    return parts


def _pack(parts: list[tuple[str, int]], room: int) -> list[int]:
    """Where the passages begin whose parts, of so many tokens each, fill the room."""
    found, offset, used = [0], 0, 0
    for part, size in parts:
        if used and used + size > room:
            found.append(offset)
            used = 0
        used += size
        offset += len(part)
    return found
