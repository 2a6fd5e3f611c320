"""BERT WordPiece by the tokenizers library, and the token ids of many texts in one array."""

import itertools
import json
import os
import re
import string
import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Ids = list[int]  # of a text, [CLS] and [SEP] included
WASTE = re.compile("([0-9A-Za-z]{101})[0-9A-Za-z]+|( ) +")  # what a long text has more of than makes a difference


class Tokens(Sequence):
    """The token ids of texts, [CLS] and [SEP] included, one after the other in `flat`, int32, and how many each text
    has, `lengths`, int64; as a sequence the `Ids` of each text."""

    def __init__(self, flat: np.ndarray, lengths: np.ndarray) -> None:
        self.flat, self.lengths, self.ends = flat, lengths, np.cumsum(lengths)
        self.starts = self.ends - lengths

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> "Tokens":
        """The same of `Ids`, or of what already is `Tokens`."""
        if isinstance(sequences, cls):
            return sequences
        lengths = np.fromiter(map(len, sequences), "int64")
        return cls(np.fromiter(itertools.chain.from_iterable(sequences), "int32", lengths.sum()), lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[each] for each in range(len(self))[row]]
        return self.flat[self.starts[row] : self.ends[row]].tolist()

    def __iter__(self) -> Iterator[Ids]:
        flat = self.flat.tolist()
        return (flat[start:end] for start, end in zip(self.starts.tolist(), self.ends.tolist()))

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (Tokens, list)) else NotImplemented

    def cut(self, length: int) -> "Tokens":
        """With no more than `length` tokens of each text: its first ones, and its [SEP]."""
        longer = np.flatnonzero(self.lengths > length)
        if not len(longer):
            return self
        kept = np.ones(len(self.flat), bool)
        for start, end in zip((self.starts[longer] + length - 1).tolist(), (self.ends[longer] - 1).tolist()):
            kept[start:end] = False
        return Tokens(self.flat[kept], np.minimum(self.lengths, length))

    def padded(self, rows: Sequence[int], pad_id: int, length: int) -> np.ndarray:
        """Of some texts int64 [rows, length], filled up with `pad_id`."""
        places = np.arange(length)
        inside = places < self.lengths[rows][:, None]
        input_ids = np.full(inside.shape, pad_id, "int64")
        input_ids[inside] = self.flat[(self.starts[rows][:, None] + places)[inside]]
        return input_ids


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
