"""From texts to batches of token ids: the tokenizer, windows of texts, batches of like length, shuffled batches.

This module is light (numpy, and tokenizers when one is made); paddlenlp is imported by `load_tokenizer` alone.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

import data
from console import InputError, first_line

# The tokenizers of PaddleNLP that are BERT WordPiece.
WORDPIECE_CLASSES = ("ErnieTokenizer", "BertTokenizer")
# Batches are padded to a multiple of this many tokens, so that kernels are made for few shapes.
LENGTH_MULTIPLE = 4
Item = TypeVar("Item")


class WordPiece:
    """BERT WordPiece in Rust, token for token what PaddleNLP's ErnieTokenizer and BertTokenizer give, text being text:
    a literal "[SEP]" in it is no separator.

    Args:
        vocab: token to id.
        lowercase: lower-case and strip accents.
        kind: PaddleNLP's class name, recorded by `save_pretrained`.
    """

    # PaddleNLP splits at symbols and at some more code points; BertPreTokenizer only at punctuation.
    # The last range is missing from the Rust normalizer's han (a typo in its table).
    _SPLIT = r"[\p{S}\x{AD}\x{B2}\x{B5}\x{BA}\x{D8}\x{14B}\x{1B1}\x{3007}\x{2B820}-\x{2B91F}]"

    def __init__(self, vocab: dict[str, int], lowercase: bool = True, kind: str = "ErnieTokenizer") -> None:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        self.vocab, self.lowercase, self.kind = vocab, lowercase, kind
        self.cls, self.sep, self.pad_token_id = (vocab[token] for token in ("[CLS]", "[SEP]", "[PAD]"))
        self._rust = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
        self._rust.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        self._rust.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(Regex(self._SPLIT), "isolated")])

    def __call__(self, texts: Sequence[str], max_seq_length: int) -> list[list[int]]:
        """Token ids of each text, [CLS] and [SEP] included, cut to `max_seq_length`."""
        return [[self.cls, *encoding.ids, self.sep] for encoding in self._encode(texts, max_seq_length)]

    def with_places(self, texts: Sequence[str], max_seq_length: int) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids as above; and where in its text each token between [CLS] and [SEP] starts."""
        encodings = self._encode(texts, max_seq_length, self._rust.encode_batch)
        return ([[self.cls, *encoding.ids, self.sep] for encoding in encodings],
                [[start for start, _ in encoding.offsets] for encoding in encodings])

    def _encode(self, texts: Sequence[str], max_seq_length: int, encode: Callable | None = None) -> list:
        room = max_seq_length - 2
        self._rust.enable_truncation(room)
        # A han character is a token and ends the one before it, so what follows the last that has room is cut anyway.
        enough = re.compile(f"(?:[^\u4e00-\u9fff]*[\u4e00-\u9fff]){{{room}}}").match
        texts = [found[0] if len(text) > room and (found := enough(text)) else text for text in texts]
        return (encode or self._rust.encode_batch_fast)(texts)  # the fast one leaves out where tokens are

    def save_pretrained(self, folder: str) -> None:
        """Write vocab.txt and tokenizer_config.json, as PaddleNLP's AutoTokenizer reads them."""
        with open(os.path.join(folder, "vocab.txt"), "w", encoding="utf-8") as file:
            file.writelines(token + "\n" for token in sorted(self.vocab, key=self.vocab.get))
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
        with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
            json.dump({"do_lower_case": self.lowercase, **names, "tokenizer_class": self.kind}, file)


class AnyTokenizer:
    """Any other tokenizer of PaddleNLP behind the interface of `WordPiece`; slower."""

    def __init__(self, tokenizer: Any) -> None:
        self._python, self.pad_token_id, self.save_pretrained = (
            tokenizer, tokenizer.pad_token_id, tokenizer.save_pretrained)

    def __call__(self, texts: Sequence[str], max_seq_length: int) -> list[list[int]]:
        return self._python(list(texts), max_length=max_seq_length, truncation=True, return_token_type_ids=False,
                            return_attention_mask=False)["input_ids"]


def load_tokenizer(name_or_path: str) -> WordPiece | AnyTokenizer:
    """The tokenizer of an encoder or of a checkpoint folder, by hub name or path.

    A folder with a vocab.txt is read without importing paddlenlp.

    Raises:
        InputError: there is none.
    """
    if (record := _read_wordpiece(name_or_path)) is not None:
        return WordPiece(*record)
    from paddlenlp.transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)  # nosec B615  the user names what is fetched
    except Exception as error:  # paddlenlp raises OSError, ValueError, KeyError or its own, for the same reason
        raise InputError(f"no tokenizer in {name_or_path}: {first_line(error)}") from None
    kind = type(tokenizer).__name__
    if kind in WORDPIECE_CLASSES:
        return WordPiece(dict(tokenizer.vocab.token_to_idx), tokenizer.do_lower_case, kind)
    return AnyTokenizer(tokenizer)


def _read_wordpiece(folder: str) -> tuple[dict[str, int], bool, str] | None:
    """Vocabulary, lowercase and class name of a folder's WordPiece tokenizer; None where it is another kind."""
    paths = [os.path.join(folder, name) for name in ("vocab.txt", "tokenizer_config.json")]
    if not all(map(os.path.isfile, paths)):
        return None
    with open(paths[1], encoding="utf-8") as file:
        config = json.load(file)
    kind = config.get("tokenizer_class")
    if kind not in WORDPIECE_CLASSES or config.get("added_tokens_decoder"):
        return None
    if config.get("tokenize_chinese_chars") is False:
        return None
    with open(paths[0], encoding="utf-8", newline="\n") as file:
        vocab = {line.rstrip("\r\n"): number for number, line in enumerate(file)}
    return vocab, config.get("do_lower_case", True), kind


def pad(sequences: Sequence[Sequence[int]], pad_id: int, length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pad token ids to `length`, or to the longest: input_ids and token_type_ids (all zero), int64 [batch, length]."""
    input_ids = np.full((len(sequences), length or max(map(len, sequences))), pad_id, dtype="int64")
    for row, sequence in zip(input_ids, sequences):
        row[: len(sequence)] = sequence
    return input_ids, np.zeros_like(input_ids)


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """Yield `items`; while one is in use, a thread makes the next."""
    end = object()
    with ThreadPoolExecutor(1) as worker:
        ahead = worker.submit(next, items, end)
        while (item := ahead.result()) is not end:
            ahead = worker.submit(next, items, end)
            yield item


def tokenize_windows(texts: Sequence[str], tokenizer: Any, max_seq_length: int,
                     windows: Iterable[range] | None = None) -> Iterator[list[list[int]]]:
    """Yield the token ids of a window of texts at a time, one window ahead of whoever uses them.

    Args:
        windows: the rows of each; None: all, data.WINDOW at a time.
    """
    if windows is None:
        windows = (range(start, min(start + data.WINDOW, len(texts))) for start in range(0, len(texts), data.WINDOW))
    return prefetch(tokenizer(texts[rows.start : rows.stop], max_seq_length) for rows in windows)


def make_batches(ids: Sequence[Sequence[int]], pad_id: int, batch_size: int | None = None,
                 batch_tokens: int = 2048) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Batch token ids of like length, longest first, each batch padded to a multiple of LENGTH_MULTIPLE.

    Args:
        batch_size: texts per batch; None: as many as fill `batch_tokens`, padding included.

    Yields:
        rows: the positions of the batch's texts in `ids`.
        input_ids, token_type_ids: int64 [len(rows), length].
    """
    order, longest = sorted(range(len(ids)), key=lambda i: -len(ids[i])), max(map(len, ids), default=0)
    while order:
        length = min(longest, -(-len(ids[order[0]]) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
        size = batch_size or max(1, batch_tokens // length)
        rows, order = order[:size], order[size:]
        yield rows, *pad([ids[i] for i in rows], pad_id, length)


def fixed_batches(ids: Sequence[Sequence[int]], pad_id: int, sizes: Sequence[int],
                  lengths: Sequence[int]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Batch token ids in few shapes, longest first, for an engine that has to make something anew for each shape.

    Args:
        sizes: texts of a batch, rising, the first 1; one that is two thirds full is filled up with its last text.
        lengths: tokens of a batch, rising, the last as long as any text may be.

    Yields:
        rows: the positions of the batch's texts in `ids`, without those that fill it up.
        input_ids, token_type_ids: int64 [one of `sizes`, one of `lengths`].
    """
    order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
    while left := len(order):
        size = max(size for size in sizes if size <= max(1, 1.5 * left))
        rows, order = order[:size], order[size:]
        length = next(length for length in lengths if length >= len(ids[rows[0]]))
        yield rows, *pad([ids[row] for row in rows + rows[-1:] * (size - len(rows))], pad_id, length)


class ShuffledBatches:
    """The batches of one rank of several: the order of paddle.io.DistributedBatchSampler(shuffle=True), epoch after
    epoch, for 4 bytes of memory a text.

    All ranks together take every text once, and the first ones again where the ranks would not have as many each.

    Args:
        count: how many texts there are.
        batch_size: texts per batch and rank.
    """

    def __init__(self, count: int, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        self.count, self.batch_size, self.rank, self.ranks, self.epoch = count, batch_size, rank, ranks, 0
        self._first = 0

    def start_at(self, epoch: int, batch: int) -> None:
        """Have the next iteration be that of an epoch, from 0, without its first batches."""
        self.epoch, self._first = epoch, batch

    def __len__(self) -> int:
        return -(-self.count // (self.batch_size * self.ranks))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield row numbers, int32 [batch]."""
        order = np.resize(np.arange(self.count, dtype="int32"), -(-self.count // self.ranks) * self.ranks)
        np.random.RandomState(self.epoch).shuffle(order)
        first, self._first = self._first, 0
        self.epoch += 1
        size = self.batch_size * self.ranks
        for start in range(first * size, len(order), size):
            yield np.split(order[start : start + size], self.ranks)[self.rank]


def text_keys(ids: Iterable[Sequence[int]]) -> np.ndarray:
    """A number for each list of token ids, the same for the same list in every process: int64 [texts]."""
    hashes = (hashlib.blake2b(array("l", each).tobytes(), digest_size=8).digest() for each in ids)
    return np.frombuffer(b"".join(hashes), "int64")
