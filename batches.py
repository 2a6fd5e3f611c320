"""What a training step is made of: views of one text, pairs with or without hard negatives, or texts with masked words.

Light on purpose (numpy only). Everything random is a function of seed, epoch and row, so that a resumed run, or one of
several processes, sees what an unbroken one does.
"""

import argparse
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

import tokenizing
from console import InputError

MASKED, KEPT = 0.8, 0.9  # of the chosen tokens 80 % become [MASK], 10 % any token, 10 % stay (Devlin et al. 2019)
WHOLE = 512  # tokens of a text that views are cropped from
Ids = list[int]  # of a text, [CLS] and [SEP] included


class Batch(NamedTuple):
    """Texts of one step, or of a part of it.

    Attributes:
        chunks: what the network is given at a time, arrays each; one chunk, or with --gradient_cache several.
        keys: see `losses.same_texts`; None: equal texts are each other's negatives.
        rows: the texts' rows in the training file.
        teacher: another encoder's embeddings of the texts, float32 [batch, any dim], or None.
    """

    chunks: list[tuple[np.ndarray, ...]]
    keys: np.ndarray | None = None
    rows: Sequence[int] = ()
    teacher: np.ndarray | None = None


def repeat_words(ids: Ids, rate: float, random: np.random.Generator) -> Ids:
    """Say some tokens twice: up to `rate` of them, but two may always be (Wu et al. 2021, ESimCSE, arXiv:2109.04380).
    """
    inner = len(ids) - 2
    count = min(inner, random.integers(0, max(2, int(rate * inner)) + 1))
    twice = {1 + place for place in random.choice(inner, count, replace=False).tolist()}
    return [token for place, token in enumerate(ids) for token in [token] * (1 + (place in twice))]


def crop(ids: Ids, rate: float, random: np.random.Generator) -> Ids:
    """A run of the tokens, `rate` of them less at most (independent cropping; Izacard et al. 2022, Contriever,
    arXiv:2112.09118)."""
    inner = len(ids) - 2
    length = random.integers(inner - int(rate * inner), inner + 1)
    start = 1 + random.integers(0, inner - length + 1)
    return [ids[0], *ids[start : start + length], ids[-1]]


def view(ids: Ids, args: argparse.Namespace, random: np.random.Generator) -> Ids:
    """A text's tokens as --crop_rate and --dup_rate change them, at most --max_seq_length."""
    if args.crop_rate:
        ids = crop(ids, args.crop_rate, random)
    if args.dup_rate:
        ids = repeat_words(ids, args.dup_rate, random)
    return ids if len(ids) <= args.max_seq_length else [*ids[: args.max_seq_length - 1], ids[-1]]


def chunks_of(sides: list[list[Ids]], size: int, pad_id: int) -> list[tuple[np.ndarray, ...]]:
    """The queries and their titles, `size` of each at a time: input_ids and token_type_ids of both."""
    chunks = []
    for start in range(0, len(sides[0]), size):
        query, *others = (side[start : start + size] for side in sides)
        chunks.append(tokenizing.pad(query, pad_id) + tokenizing.pad(list(itertools.chain(*others)), pad_id))
    return chunks


class Batches:
    """Makes the batches of train.py's contrastive objectives.

    Args:
        texts: the training file: a text a row, or a list of two or three.
        tokenizer: see tokenizing.py.
        args: of train.py.
        teacher: another encoder's embeddings of the rows, or None.
    """

    def __init__(self, texts: Sequence[Any], tokenizer: Any, args: argparse.Namespace,
                 teacher: np.ndarray | None = None) -> None:
        self.texts, self.tokenizer, self.args, self.teacher = texts, tokenizer, args, teacher

    def sides(self, rows: Sequence[int], epoch: int) -> tuple[list[list[Ids]], list[list[Ids]]]:
        """Token ids of queries, titles and hard negatives; as the network sees them, and as they are in the file."""
        texts, args = [self.texts[row] for row in rows], self.args
        if not isinstance(texts[0], str):
            sides = [self.tokenizer(side, args.max_seq_length) for side in zip(*texts)]
            return sides, sides
        ids = self.tokenizer(texts, max(args.max_seq_length, WHOLE) if args.crop_rate else args.max_seq_length)
        if not (args.crop_rate or args.dup_rate):
            return [ids, ids], [ids]
        views = [[view(each, args, np.random.default_rng([args.seed, epoch, row, side]))
                  for each, row in zip(ids, rows)] for side in range(2)]
        return views, [ids]

    def make(self, rows: Sequence[int], epoch: int) -> Batch:
        args = self.args
        sides, texts = self.sides(rows, epoch)
        size, pad_id = (args.chunk_size or 32) if args.gradient_cache else len(rows), self.tokenizer.pad_token_id
        keys = None if args.keep_duplicate_negatives else np.stack(list(map(tokenizing.text_keys, texts)), axis=1)
        teacher = None if self.teacher is None else np.asarray(self.teacher[rows], "float32")
        return Batch(chunks_of(sides, size, pad_id), keys, rows, teacher)


class MaskedBatches:
    """Makes the batches of `--objective mlm`: whole words masked (Sun et al. 2019, ERNIE, arXiv:1904.09223; Cui et al.
    2019, arXiv:1906.08101), words being jieba's. Arguments as in `Batches`, texts being one a row."""

    def __init__(self, texts: Sequence[str], tokenizer: Any, args: argparse.Namespace) -> None:
        if not isinstance(tokenizer, tokenizing.WordPiece):
            raise InputError("--objective mlm: the encoder's tokenizer is not ERNIE's or BERT's")
        import jieba

        jieba.setLogLevel(logging.WARNING)
        jieba.initialize()
        self.texts, self.tokenizer, self.args, self.jieba = texts, tokenizer, args, jieba
        self.mask, self.ordinary = tokenizer.vocab["[MASK]"], np.array(
            [number for token, number in tokenizer.vocab.items() if not (token[0] == "[" and token[-1] == "]")])

    def words(self, text: str, places: Sequence[int]) -> np.ndarray:
        """The number of the word, from 0, that each token is of; int64 [tokens].

        Args:
            places: where in the text each token starts.
        """
        starts = [start for _, start, _ in self.jieba.tokenize(text)]
        return np.searchsorted(starts, places, side="right") - 1

    def choose(self, words: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Which tokens to predict: a word, and more of them while they are --mlm_probability of the tokens or less;
        bool [tokens]."""
        chosen, budget = np.zeros(len(words), bool), self.args.mlm_probability * len(words)
        for word in random.permutation(np.unique(words)):
            same = words == word
            if not chosen.any() or same.sum() <= budget - chosen.sum():
                chosen |= same
        return chosen

    def make(self, rows: Sequence[int], epoch: int) -> Batch:
        """One chunk: input_ids, token_type_ids int64 [batch, length]; places of the tokens to predict among all of
        them, and their ids, int64 [tokens to predict]."""
        texts = [self.texts[row] for row in rows]
        ids, places = self.tokenizer.with_places(texts, self.args.max_seq_length)
        input_ids, types = tokenizing.pad(ids, self.tokenizer.pad_token_id)
        chosen = np.zeros(input_ids.shape, bool)
        for line, (row, text, starts) in enumerate(zip(rows, texts, places)):
            random = np.random.default_rng([self.args.seed, epoch, row])
            chosen[line, 1 : 1 + len(starts)] = self.choose(self.words(text, starts), random)
        labels = input_ids[chosen]
        random = np.random.default_rng([self.args.seed, epoch, *rows])
        lot, other = random.random(len(labels)), random.choice(self.ordinary, len(labels))
        input_ids[chosen] = np.where(lot < MASKED, self.mask, np.where(lot < KEPT, other, labels))
        return Batch([(input_ids, types, np.flatnonzero(chosen), labels)], rows=rows)


def groups_after(step: int, epoch_steps: int, args: argparse.Namespace, sampler: tokenizing.ShuffledBatches,
                 batches: Any) -> Iterator[tuple[int, int, list[Batch]]]:
    """Yield, for every step after `step`, its epoch and its place in it, both from 1, and its batches; the next batch
    is made while a step runs.

    Args:
        batches: its `make(rows, epoch)` gives a Batch.
    """
    size = args.gradient_accumulation_steps
    for epoch in range(step // epoch_steps, args.epochs):
        first = max(0, step - epoch * epoch_steps)
        sampler.start_at(epoch, first * size)
        made = tokenizing.prefetch(batches.make(rows, epoch) for rows in sampler)
        groups: Iterable = iter(lambda: list(itertools.islice(made, size)), [])  # noqa: B023
        for number, group in enumerate(groups, start=first + 1):
            yield epoch + 1, number, group

