"""From texts to embeddings: the tokenizer of an exported folder, and the batches that a predictor runs.

    tokenizer = Tokenizer("./output")
    embeddings = encode(predictor, tokenizer, ["语义检索"], max_seq_length=64).embeddings

This file imports nothing of the project. It needs numpy and tokenizers.
"""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

DEFAULT_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]"}  # BERT's and ERNIE's
WINDOW = 16384  # texts that are sorted by length at a time, for batches with little padding
TOKENIZED_TEXTS = 256  # at a time: the tokenizer holds all tokens of long texts, also those that are cut off
LONGEST_PREFIX = 512  # tokens that are counted of a prefix
LENGTH_MULTIPLE = 4  # batches are padded to a multiple of this, so that kernels are made for few shapes


class Tokenizer:
    """The tokenizer.json of an exported folder. tokenizer_config.json names its padding and its unknown token.

    Raises:
        OSError: the folder has none, or a damaged one, or one without these tokens.
    """

    def __init__(self, model_dir: str) -> None:
        path = os.path.join(model_dir, "tokenizer.json")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"--model_dir {model_dir}: no tokenizer.json; export the checkpoint again with "
                                    "export_model.py")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # tokenizers raises nothing narrower
            raise OSError(f"{path}: not a tokenizer: {error}") from None
        ids = {}
        for name, token in read_special_tokens(model_dir).items():
            ids[name] = self._tokenizer.token_to_id(token)
            if ids[name] is None:
                raise OSError(f"{path}: has no token {token}; name its {name} in tokenizer_config.json")
        self.pad_token_id = ids["pad_token"]
        self.unk_token_id = ids["unk_token"]
        self._without_word = {self.unk_token_id}  # [UNK] and punctuation
        for token, token_id in self._tokenizer.get_vocab().items():
            if not any(character.isalnum() for character in token):
                self._without_word.add(token_id)

    def __call__(self, texts: Sequence[str], max_seq_length: int) -> list[list[int]]:
        """Return the token ids of each text, [CLS] and [SEP] included, cut to `max_seq_length`."""
        self._tokenizer.enable_truncation(max_seq_length)
        token_ids = []
        for start in range(0, len(texts), TOKENIZED_TEXTS):
            encodings = self._tokenizer.encode_batch_fast(texts[start : start + TOKENIZED_TEXTS])
            token_ids += [encoding.ids for encoding in encodings]
        return token_ids

    def tokenize_prefix(self, prefix: str) -> list[int]:
        """Return the token ids of a prefix, [CLS] and [SEP] excluded."""
        return self([prefix], LONGEST_PREFIX)[0][1:-1] if prefix else []

    def is_unknown(self, token_ids: list[int], prefix_tokens: int = 0) -> bool:
        """Return whether a text has no known word: no token, or [UNK] and at most punctuation beside it.

        Args:
            token_ids: those of the text, with [CLS], its prefix and [SEP].
            prefix_tokens: how many of them are its prefix.
        """
        tokens = token_ids[1 + prefix_tokens : -1]
        if not tokens:
            return True
        return self.unk_token_id in tokens and self._without_word.issuperset(tokens)


def read_special_tokens(model_dir: str) -> dict[str, str]:
    """Return the padding and the unknown token that tokenizer_config.json names, as "pad_token" and "unk_token".

    Raises:
        OSError: the file is damaged.
    """
    path = os.path.join(model_dir, "tokenizer_config.json")
    special_tokens = dict(DEFAULT_TOKENS)
    if not os.path.isfile(path):
        return special_tokens
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        for name in special_tokens:
            token = config.get(name) or special_tokens[name]
            special_tokens[name] = token["content"] if isinstance(token, dict) else token
    except (ValueError, AttributeError, KeyError) as error:
        raise OSError(f"{path}: damaged: {error}") from None
    for name, token in special_tokens.items():
        if not isinstance(token, str):
            raise OSError(f"{path}: {name}: expected a string, got {json.dumps(token)}")
    return special_tokens


class Encoded(NamedTuple):
    """Embeddings, and what the encoder did not see of the texts.

    Attributes:
        embeddings: float32 [texts, embedding_size], in the order of the texts; zeros for an unknown text, so that its
            cosine with any text is 0.
        truncated: rows of the texts that are longer than the maximum length.
        unknown: rows of the texts of which the encoder sees nothing.
    """

    embeddings: np.ndarray
    truncated: list[int]
    unknown: list[int]


def encode(predictor: Any, tokenizer: Tokenizer, texts: Sequence[str], max_seq_length: int,
           batch_size: int | None = None, prefixes: Sequence[str] | None = None) -> Encoded:
    """Encode texts.

    Args:
        predictor: see `predictor.load_predictor`.
        max_seq_length: tokens of a text, [CLS] and [SEP] included; longer ones are cut.
        batch_size: texts of a batch; None: as many as fill the predictor's `batch_tokens`.
        prefixes: the prefix of each text; None: there is none.

    Raises:
        ValueError: the encoder has fewer positions than `max_seq_length`, or a prefix leaves none to the text.
    """
    if max_seq_length > predictor.max_positions:
        raise ValueError(f"max_seq_length {max_seq_length}: the encoder has {predictor.max_positions} positions")
    prefixes = [""] * len(texts) if prefixes is None else prefixes
    ids_of_prefix = {prefix: tokenizer.tokenize_prefix(prefix) for prefix in set(prefixes)}
    for prefix, ids in ids_of_prefix.items():
        if len(ids) + 2 >= max_seq_length:  # [CLS] and [SEP]
            raise ValueError(f"max_seq_length {max_seq_length}: the prefix {prefix!r} has {len(ids)} tokens")
    texts = [prefix + text for prefix, text in zip(prefixes, texts, strict=True)]
    encoded = Encoded(np.empty((len(texts), predictor.embedding_size), "float32"), [], [])
    for start in range(0, len(texts), WINDOW):
        window = tokenizer(texts[start : start + WINDOW], max_seq_length + 1)  # one token more tells what is cut
        for row, token_ids in enumerate(window, start):
            if len(token_ids) > max_seq_length:
                del token_ids[-2]  # the last one before [SEP]
                encoded.truncated.append(row)
            if tokenizer.is_unknown(token_ids, count_equal(token_ids[1:], ids_of_prefix[prefixes[row]])):
                encoded.unknown.append(row)
        embeddings = encoded.embeddings[start : start + WINDOW]
        for rows, length in make_batches([len(token_ids) for token_ids in window], predictor, batch_size):
            input_ids = np.full((len(rows), length), tokenizer.pad_token_id, "int64")
            for line, row in zip(input_ids, rows):
                line[: len(window[row])] = window[row]
            embeddings[rows] = predictor.embed(input_ids, np.zeros_like(input_ids))
    encoded.embeddings[encoded.unknown] = 0
    return encoded


def count_equal(token_ids: Sequence[int], prefix_ids: Sequence[int]) -> int:
    """Return how many first tokens of a text are those of its prefix; one that has grown together with the text is not.
    """
    count = 0
    for one, other in zip(token_ids, prefix_ids):
        if one != other:
            break
        count += 1
    return count


def make_batches(lengths: Sequence[int], predictor: Any, batch_size: int | None) -> Iterator[tuple[list[int], int]]:
    """Yield batches of texts of like length, longest first: the rows of the texts, and the length to pad them to."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        multiples = -(-lengths[order[start]] // LENGTH_MULTIPLE)  # rounded up
        length = min(multiples * LENGTH_MULTIPLE, lengths[order[0]])
        size = batch_size or max(1, predictor.batch_tokens // length)
        if predictor.max_batch_size:
            size = min(size, predictor.max_batch_size)
        yield order[start : start + size], length
        start += size
