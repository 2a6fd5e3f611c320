"""BERT WordPiece by the tokenizers library, and the tokenizer of an encoder or of a checkpoint."""

import itertools
import json
import os
import re
import string
import threading
from collections.abc import Sequence
from typing import Any

from simcse.console import reported
from simcse.files import read_json
from simcse.text.tokens import Ids, Tokens

import numpy as np

WASTE = re.compile("([0-9A-Za-z]{101})[0-9A-Za-z]+|( ) +")  # what a long text has more of than makes a difference
WORDPIECE_CLASSES = ("ErnieTokenizer", "BertTokenizer")  # of PaddleNLP


class WordPiece:
    """BERT WordPiece in Rust, token for token what PaddleNLP's ErnieTokenizer and BertTokenizer give, text being text:
    a literal "[SEP]" in it is no separator. `lowercase` also strips accents; `kind` is PaddleNLP's class name.

    Texts are taken many at a time as an array of their characters. A han character or a common mark is a token by
    itself, whose id a table gives. What is between these and blanks is words, of which there are few: their ids, which
    Rust gives, are kept."""

    # PaddleNLP splits at symbols and at some more code points; BertPreTokenizer only at punctuation.
    # The last range is missing from the Rust normalizer's han (a typo in its table).
    _SPLIT = r"[\p{S}\x{AD}\x{B2}\x{B5}\x{BA}\x{D8}\x{14B}\x{1B1}\x{3007}\x{2B820}-\x{2B91F}]"
    _ALONE = [*map(chr, range(0x4E00, 0xA000)), *string.punctuation, *"，。、；：？！“”‘’（）《》〈〉【】—…·～"]
    _WORD, _BLANK = -1, -2  # of a character that is no token by itself
    _KNOWN = 1 << 18  # words whose ids are kept
    _BLOCK = 1 << 16  # characters that are taken at a time

    def __init__(self, vocab: dict[str, int], lowercase: bool = True, kind: str = "ErnieTokenizer") -> None:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

        self.vocab, self.lowercase, self.kind = vocab, lowercase, kind
        self.unk_token_id = vocab.get("[UNK]")
        self.wordless = {self.unk_token_id, *(number for token, number in vocab.items()
                                              if not any(map(str.isalnum, token)))}
        self.cls, self.sep, self.pad_token_id = (vocab[token] for token in ("[CLS]", "[SEP]", "[PAD]"))
        self._rust = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
        self._rust.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        self._rust.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(Regex(self._SPLIT), "isolated")])
        self._rust.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", self.cls), ("[SEP]", self.sep)])
        self._known, self._lock = dict[str, Ids](), threading.Lock()
        self._kinds = np.full(0x110000, self._WORD, "int32")  # ids of the characters that are alone
        self._kinds[[*map(ord, self._ALONE)]] = [vocab.get(each, vocab.get("[UNK]", self._WORD))
                                                 for each in self._ALONE]
        self._kinds[[*map(ord, " \t\r\n")]] = self._BLANK

    def __call__(self, texts: Sequence[str], max_seq_length: int) -> Tokens:
        """Token ids of each text, [CLS] and [SEP] included, cut to `max_seq_length`."""
        with self._lock:  # evaluation runs beside the making of batches
            heads = self._heads(texts, max_seq_length)
            self._rust.no_truncation()
            ends = np.cumsum([*map(len, heads)])
            blocks = np.searchsorted(ends, np.arange(self._BLOCK, ends[-1] if heads else 0, self._BLOCK))
            bounds = [*dict.fromkeys([0, *blocks.tolist(), len(heads)])]
            parts = [self._block(heads[start:end]) for start, end in itertools.pairwise(bounds)]
        flat, lengths = map(np.concatenate, zip((np.empty(0, "int32"), np.empty(0, "int64")), *parts))
        return Tokens(flat, lengths).cut(max_seq_length)

    def _block(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The token ids of texts, one after the other, int32, and how many each has, int64."""
        lengths = np.fromiter(map(len, texts), "int64") + 2  # each between two line feeds, in [CLS]'s and [SEP]'s place
        ends = np.cumsum(lengths)
        joined = "\n" + "\n\n".join(texts) + "\n"
        kinds = self._kinds[np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "uint32")]
        is_word = kinds == self._WORD
        kinds[ends - lengths], kinds[ends - 1] = self.cls, self.sep
        changes = np.flatnonzero(is_word[1:] != is_word[:-1]) + 1
        words = [joined[start:end] for start, end in changes.reshape(-1, 2).tolist()]
        ids = self._ids_of(words)
        counts = (kinds >= 0).astype("int64")  # tokens at a character, those of a word at its first
        counts[changes[::2]] = np.fromiter(map(len, ids), "int64", len(ids))
        flat = np.repeat(kinds, counts)
        flat[flat == self._WORD] = np.fromiter(itertools.chain.from_iterable(ids), "int32")
        return flat, np.add.reduceat(counts, ends - lengths)

    def _ids_of(self, words: Sequence[str]) -> list[Ids]:
        """The ids of words, kept or new."""
        if len(self._known) > self._KNOWN:
            self._known = {}
        found = [*map(self._known.get, words)]
        if None in found:
            new = list(set(words).difference(self._known))
            self._known.update(zip(new, (encoding.ids[1:-1] for encoding in self._rust.encode_batch_fast(new))))
            found = [*map(self._known.__getitem__, words)]
        return found

    def encode(self, texts: Sequence[str], max_seq_length: int) -> list:
        """What the tokenizers library gives of each text: ids, and where in it each token stands."""
        return self._rust.encode_batch(self._heads(texts, max_seq_length, offsets=True))

    def _heads(self, texts: Sequence[str], max_seq_length: int, offsets: bool = False) -> list[str]:
        """Of each text a beginning with the same first tokens."""
        self._rust.enable_truncation(max_seq_length)
        room = max_seq_length - 2
        # A han character is a token and ends the one before it, so what follows the last that has room is cut anyway.
        enough = re.compile(f"(?:[^\u4e00-\u9fff]*[\u4e00-\u9fff]){{{room}}}").match
        return [found[0] if len(text) > room and (found := enough(text)) else text
                for text in (self._beginning(text, room, offsets) for text in texts)]

    def _beginning(self, text: str, room: int, offsets: bool) -> str:
        """A text, of a very long one a beginning with the same first `room` tokens, and unless `offsets` with less of
        [UNK]s and blanks. A word has 100 tokens at most, and [UNK] alone if it is longer than that: where there are 100
        tokens more than `room`, the word that the cut falls into is behind them."""
        size = 16 * (room + 100)
        if len(text) <= 4 * size:
            return text
        text = text if offsets else WASTE.sub(r"\1\2", text)
        while size < len(text):
            encoding, = self._rust.encode_batch_fast([text[:size]])
            if room * len(encoding.overflowing) >= room + 100:
                return text[:size]
            size *= 4
        return text

    def save_rust(self, folder: str) -> None:
        """Write tokenizer.json: this tokenizer for the tokenizers library alone."""
        self._rust.no_truncation()
        self._rust.save(os.path.join(folder, "tokenizer.json"), pretty=False)

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
        self._python, self.pad_token_id = tokenizer, tokenizer.pad_token_id
        self.unk_token_id, self.wordless = tokenizer.unk_token_id, {tokenizer.unk_token_id}
        self.save_pretrained = tokenizer.save_pretrained

    def __call__(self, texts: Sequence[str], max_seq_length: int) -> Tokens:
        return Tokens.of(self._python(list(texts), max_length=max_seq_length, truncation=True,
                                      return_token_type_ids=False, return_attention_mask=False)["input_ids"])


def load_tokenizer(name_or_path: str) -> WordPiece | AnyTokenizer:
    """The tokenizer of an encoder or of a checkpoint folder, by hub name or path; InputError where there is none. A
    folder with a vocab.txt is read without importing paddlenlp."""
    if tokenizer := _read_wordpiece(name_or_path):
        return tokenizer
    from paddlenlp.transformers import AutoTokenizer

    with reported(f"no tokenizer in {name_or_path}", Exception):  # OSError, ValueError, KeyError or paddlenlp's own
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)  # nosec B615  the user names what is fetched
    kind = type(tokenizer).__name__
    if kind in WORDPIECE_CLASSES:
        return WordPiece(dict(tokenizer.vocab.token_to_idx), tokenizer.do_lower_case, kind)
    return AnyTokenizer(tokenizer)


def _read_wordpiece(folder: str) -> WordPiece | None:
    """A folder's tokenizer; None where it is of another kind."""
    vocabulary = os.path.join(folder, "vocab.txt")
    config = read_json(os.path.join(folder, "tokenizer_config.json"))
    kind = config.get("tokenizer_class")
    if (not os.path.isfile(vocabulary) or kind not in WORDPIECE_CLASSES or config.get("added_tokens_decoder")
            or config.get("tokenize_chinese_chars") is False):
        return None
    with open(vocabulary, encoding="utf-8", newline="\n") as file:
        vocab = {line.rstrip("\r\n"): number for number, line in enumerate(file)}
    return WordPiece(vocab, config.get("do_lower_case", True), kind)


def find_unknown(tokenizer: WordPiece | AnyTokenizer, ids: Sequence[Ids]) -> list[int]:
    """Return the rows of the texts that the vocabulary has no word of: they have no token, or only [UNK] and
    punctuation. The encoder cannot tell such texts apart, so that each would match every other one perfectly."""
    ids = Tokens.of(ids)
    words = np.isin(ids.flat, [*tokenizer.wordless], invert=True)
    words[ids.starts] = words[ids.ends - 1] = False  # [CLS] and [SEP]
    wordless = np.flatnonzero(~np.logical_or.reduceat(words, ids.starts)) if len(ids) else ()
    return [row for row in map(int, wordless) if ids.lengths[row] == 2 or tokenizer.unk_token_id in ids[row]]
