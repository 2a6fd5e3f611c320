"""The one way from texts to embeddings."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from simcse import console
from simcse.console import InputError, progress
from simcse.encoder.engine import Engine
from simcse.files import prefetch
from simcse.machine import RANK
from simcse.text.tokens import WINDOW, Ids, Tokens, make_batches
from simcse.text.wordpiece import find_unknown

import numpy as np


def check_length(model: Engine, max_seq_length: int) -> None:
    """Raise InputError where texts of `max_seq_length` tokens have more positions than the encoder."""
    if max_seq_length > model.max_positions:
        raise InputError(f"--max_seq_length {max_seq_length}: the encoder has {model.max_positions} positions")


class Sight:
    """Texts as the encoder sees them: their token ids, and a count of those that it sees cut, or nothing of, which is
    said if there is to be a `remark`.

    `place` names a row, as file:line; None: that of the texts, which `data.TextFile` has, or their first characters."""

    REMARKS = {"cut": "are longer than {} tokens and are cut; a higher --max_seq_length, in training too, reads on",
               "unseen": "are all [UNK] to the encoder, so that their cosine with any text is 0; another encoder may "
               "have their words in its vocabulary"}

    def __init__(self, tokenizer: Any, texts: Sequence[str], max_seq_length: int,
                 place: Callable[[int], str] | None = None, remark: bool = True) -> None:
        self.tokenizer, self.texts, self.length, self.count = tokenizer, texts, max_seq_length, 0
        self.remarks = self.REMARKS if remark else {}
        self.place = place or getattr(texts, "place", lambda row: repr(texts[row][:20]))
        self.counts, self.first = dict.fromkeys(self.REMARKS, 0), {kind: [] for kind in self.REMARKS}

    def __call__(self, window: range | np.ndarray) -> tuple[Tokens, list[int]]:
        """The ids of the texts of some rows, and which of them the encoder does not see, from 0 in the window."""
        texts = self.texts[slice(window.start, window.stop) if isinstance(window, range) else window]
        whole = Tokens.of(self.tokenizer(texts, self.length + 1))
        ids = whole.cut(self.length)
        found = {"cut": np.flatnonzero(whole.lengths > self.length).tolist(),
                 "unseen": find_unknown(self.tokenizer, ids)}
        self.count += len(ids)
        for kind, rows in found.items():
            self.counts[kind] += len(rows)
            self.first[kind] += [int(window[row]) for row in rows[: 3 - len(self.first[kind])]]
        if console.settings.strict_data:
            self.report()
        return ids, found["unseen"]

    def gather(self) -> None:
        """Add up what all ranks have counted, and have the first of them; all ranks call it."""
        from simcse.ranks import gather_arrays

        first = [[*rows, -1, -1, -1][:3] for rows in self.first.values()]
        parts = gather_arrays(np.array([[self.count] * 3, [*self.counts.values()] + [0], *first], "int64"))
        self.count = int(sum(part[0, 0] for part in parts))
        for number, kind in enumerate(self.counts):
            self.counts[kind] = int(sum(part[1, number] for part in parts))
            self.first[kind] = sorted(int(row) for part in parts for row in part[2 + number] if row >= 0)[:3]
        self.remarks = {} if RANK and not console.settings.strict_data else self.REMARKS

    def report(self) -> None:
        """Say what was counted."""
        for kind, remark in self.remarks.items():
            if self.counts[kind]:
                console.warn_data(f"{self.counts[kind]:,} of {self.count:,} texts {remark.format(self.length)}: "
                                 f"{', '.join(dict.fromkeys(map(self.place, self.first[kind])))}")


def look_at(rows: Sequence[tuple[str, str | Sequence[str]]], tokenizer: Any, max_seq_length: int) -> list[Ids]:
    """The ids of the texts of some rows, each with its place, as file:line; those that the encoder does not see have
    none. Warns, on rank 0, of these, of cut ones, and of those that are another's twin once they are cut."""
    both = [(place, text) for place, row in rows for text in ([row] if isinstance(row, str) else row)]
    sight = Sight(tokenizer, [text for _, text in both], max_seq_length, lambda row: both[row][0], remark=not RANK)
    tokens, dark = sight(range(len(both)))
    ids = list(tokens)
    sight.report()
    first_of: dict[tuple, str] = {}
    twins = [place for (place, text), each in zip(both, ids)
             if len(each) == max_seq_length and first_of.setdefault(tuple(each), text) != text]
    if twins and not RANK:
        console.warn_data(f"{len(twins):,} of {len(both):,} texts, cut to {max_seq_length} tokens, are one with "
                          f"another text; a higher --max_seq_length tells them apart: {', '.join(twins[:3])}")
    for row in dark:
        ids[row] = []
    return ids


def encode_stream(model: Engine, sight: Sight, batch_size: int | None = None,
                  windows: Sequence[range | np.ndarray] | None = None) -> Iterator[np.ndarray]:
    """Yield the embeddings of a `Sight`'s texts in their order, float32 [texts of the window, embedding_size] at a
    time. `windows` are the rows that are wanted, by which texts are batched together; None: all, WINDOW at a time.
    InputError: an embedding is not finite.

    A batch is read back when the next one is under way, as OpenVINO computes two at a time. A GPU has no such gain: the
    next one is launched without waiting for it, but paddle's copies to and from a GPU wait for all that was launched.
    The ids of the next window are made meanwhile. Texts that the encoder sees nothing of have an embedding of zeros,
    whose cosine with any is 0.
    """
    check_length(model, sight.length)
    if windows is None:
        count = len(sight.texts)
        windows = [range(start, min(start + WINDOW, count)) for start in range(0, count, WINDOW)]
    with progress("encoding", sum(map(len, windows)), "texts") as advance:
        for ids, dark in prefetch(map(sight, windows)):
            embeddings = np.empty((len(ids), model.embedding_size), "float32")
            rows, under_way = [], embeddings[:0]
            batches = make_batches(ids, sight.tokenizer.pad_token_id, batch_size, model.batch_tokens)
            for next_rows, *batch in batches:
                launched = model.embed(*batch)
                embeddings[rows] = np.asarray(under_way)
                rows, under_way = next_rows, launched
                advance(len(rows))
            embeddings[rows] = np.asarray(under_way)
            embeddings[dark] = 0
            if not np.isfinite(embeddings).all():
                raise InputError("the checkpoint gives embeddings that are no numbers: its training has diverged, or "
                                 "it is damaged")
            yield embeddings
    sight.report()


def encode(model: Engine, tokenizer: Any, texts: Sequence[str], max_seq_length: int, batch_size: int | None = None,
           place: Callable[[int], str] | None = None, remark: bool = True) -> np.ndarray:
    """The one way from texts to embeddings: float32 [len(texts), embedding_size], in the order of `texts`. `place` and
    `remark` are those of `Sight`."""
    embeddings, row = np.empty((len(texts), model.embedding_size), "float32"), 0
    for block in encode_stream(model, Sight(tokenizer, texts, max_seq_length, place, remark), batch_size):
        embeddings[row : row + len(block)] = block
        row += len(block)
    return embeddings


def encode_pairs(model: Engine, tokenizer: Any, pairs: Sequence[tuple[str, str]], max_seq_length: int,
                 batch_size: int | None = None, places: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the first and of the second texts, each float32 [len(pairs), embedding_size]; `places` name the
    pairs, as file:line."""
    texts, place = [text for side in zip(*pairs) for text in side], places and [*places, *places].__getitem__
    return tuple(np.split(encode(model, tokenizer, texts, max_seq_length, batch_size, place), 2))
