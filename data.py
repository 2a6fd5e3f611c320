"""Text files, tokens and batches: what goes into the network.

It imports numpy, and tokenizers when one is made; paddlenlp is imported by `load_tokenizer` alone.
"""

import argparse
import codecs
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from simcse.console import InputError, first_line, warn
from simcse.files import STDIN, prefetch, reading

import numpy as np

# Texts tokenized and sorted by length at a time: enough to make batches of even length, little enough to stream.
WINDOW = 16384
WHOLE = 512  # tokens of a text that views are cropped from
BOM = codecs.BOM_UTF8
Ids = list[int]  # of a text, [CLS] and [SEP] included


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
            cause = "it looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8"
        else:
            try:
                line.decode("gb18030")
                cause = "it looks like GBK; convert it: iconv -f GB18030 -t UTF-8"
            except UnicodeDecodeError:
                cause = "the file is damaged or not text"
        raise InputError(f"{where}: not UTF-8 at byte {error.start + 1} of the line; {cause}") from None


def _name(path: str) -> str:
    return "stdin" if path == STDIN else path


def _lines(path: str, flag: str) -> Iterator[tuple[str, int, str]]:
    """Yield (file:line, offset, line) of a UTF-8 file or of stdin as it comes, BOM and line ends (\\n, \\r\\n or \\r)
    removed, blank lines left out."""
    number = offset = 0
    stdin = path == STDIN
    with open(0 if stdin else path, "rb", closefd=not stdin) as file, reading(path) as advance:
        for chunk in file:
            advance(len(chunk))
            for line in chunk.splitlines(keepends=True):  # of bytes: splits at \n, \r\n and \r, and nowhere else
                number += 1
                where, start = f"{_name(path)}:{number}", offset
                offset += len(line)
                if number == 1 and line.startswith(BOM):
                    line, start = line.removeprefix(BOM), len(BOM)
                text = _decode(line.rstrip(b"\r\n"), f"{flag} {where}")
                if text.strip():
                    yield where, start, text


def read_rows(path: str, columns: int, flag: str, strict: bool = False,
              check: Callable[[list[str]], str | None] | None = None) -> Iterator[list[str]]:
    """Stream the rows of a tab-separated text file.

    Every field loses the white space around it and keeps what is inside. Blank lines are skipped. A row with
    another number of columns, an empty field, or for which `check(row)` returns a complaint is skipped, counted,
    and reported on stderr with file:line of the first three; of stdin these three are reported at once as well.

    Args:
        path: a UTF-8 file, with or without BOM, lines ending in \\n, \\r\\n or \\r; STDIN: stdin.
        columns: how many fields a good row has.
        flag: the flag that named the file, for messages.
        strict: raise at the first bad row.

    Raises:
        InputError: not UTF-8; a bad row where `strict`; more than half of the rows bad; no good row.
    """
    return (row for _, row in _good_rows(path, columns, flag, strict, check))


def _good_rows(path: str, columns: int, flag: str, strict: bool,
               check: Callable[[list[str]], str | None] | None = None) -> Iterator[tuple[int, list[str]]]:
    """The rows of `read_rows`, each with the offset at which its line starts."""
    good, bad, first_bad = 0, 0, []
    for where, offset, line in _lines(path, flag):
        row = [field.strip() for field in line.split("\t")]
        if len(row) != columns:
            complaint = f"columns: {len(row)} instead of {columns}"
        elif not all(row):
            complaint = "an empty field"
        else:
            complaint = check(row) if check else None
        if complaint is None:
            good += 1
            yield offset, row
        elif strict:
            raise InputError(f"{flag} {where}: {complaint} (--strict_data)")
        else:
            bad += 1
            if bad <= 3:
                first_bad.append(f"{where} ({complaint})")
                if path == STDIN:  # whoever waits for the answer has to know
                    warn(f"{flag} {where}: skipped; {complaint}")
    report = f"{bad} of {good + bad} lines are malformed: {', '.join(first_bad)}"
    if bad > good or not good:
        raise InputError(f"{flag} {_name(path)}: {report}" if bad else f"{flag} {_name(path)}: the file holds no text")
    if bad:
        warn(f"{flag} {_name(path)}: skipped; {report}")


def read_texts(path: str, flag: str, strict: bool = False) -> list[str]:
    """One text a line."""
    return [text for (text,) in read_rows(path, 1, flag, strict)]


class TextFile(Sequence):
    """The texts that `read_texts` gives, found by their offsets and read when asked for: 8 bytes of memory a line. Of
    several columns a row is a list of texts.

    Arguments and errors are those of `read_rows`. A pipe is copied to a temporary file first.
    """

    _CHUNK = 1 << 22
    _LINE = re.compile(rb"[^\r\n]*")

    def __init__(self, path: str, flag: str, strict: bool = False, columns: int = 1) -> None:
        self.columns = columns
        self._file = open(path, "rb")  # noqa: SIM115  read from as long as this object lives
        if not os.path.isfile(path):
            with self._file as pipe:
                self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115
                shutil.copyfileobj(pipe, self._file)
            path = self._file.name
            self._file.seek(0)
        self.path = path
        self._starts, self._size = np.zeros(0, "int64"), os.path.getsize(path)
        with reading(path) as advance:
            starts, doubtful = self._scan(advance) if columns == 1 else (None, array("q"))
        if starts is None:  # something is there to be reported, or to be left out
            starts, doubtful = array("q", (offset for offset, _ in _good_rows(path, columns, flag, strict))), []
        self._starts = np.frombuffer(starts, "int64")
        if blank := [row for row in doubtful if not self[row]]:
            self._starts = np.delete(self._starts, blank)
        if not len(self):
            raise InputError(f"{flag} {path}: the file holds no text")

    def _scan(self, advance: Callable[[int], Any]) -> tuple[array | None, array]:
        """The offsets of the lines that are not empty, None if any has a tab or is not UTF-8; and the numbers of those
        that may be white space alone, by their first byte."""
        starts, doubtful, offset, after_break = array("q"), array("q"), 0, True
        decoder = codecs.getincrementaldecoder("utf-8")()
        while chunk := self._file.read(self._CHUNK):
            if not offset and chunk.startswith(BOM):
                chunk = chunk.replace(BOM, b"\n" * len(BOM), 1)
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError:
                return None, doubtful
            if b"\t" in chunk:
                return None, doubtful
            codes = np.frombuffer(chunk, "uint8")
            breaks = (codes == 10) | (codes == 13)
            found = np.flatnonzero(~breaks & np.concatenate([[after_break], breaks[:-1]]))
            odd = np.flatnonzero((codes[found] <= 32) | np.isin(codes[found], (0xC2, 0xE1, 0xE2, 0xE3)))
            doubtful.frombytes((odd + len(starts)).tobytes())
            starts.frombytes((found + offset).tobytes())
            offset, after_break = offset + len(chunk), breaks[-1]
            advance(len(chunk))
        if decoder.getstate()[0]:
            return None, doubtful
        return starts, doubtful

    def __len__(self) -> int:
        return len(self._starts)

    def line_number(self, row: int) -> int:
        """The number, from 1, of a text's line in the file."""
        before, breaks = b"", 1
        for start in range(0, int(self._starts[row]), self._CHUNK):
            chunk = os.pread(self._file.fileno(), min(self._CHUNK, int(self._starts[row]) - start), start)
            breaks += chunk.count(b"\n") + chunk.count(b"\r") - (before[-1:] + chunk).count(b"\r\n")
            before = chunk
        return breaks

    def take(self, rows: Iterable[int]) -> list[str]:
        """The texts of some rows."""
        return [self[row] for row in rows]

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[each] for each in range(len(self))[row]]
        row = range(len(self))[row]
        start, end = int(self._starts[row]), int(self._starts[row + 1]) if row + 1 < len(self) else self._size
        line = self._LINE.match(os.pread(self._file.fileno(), end - start, start))[0].decode("utf-8").strip()
        return line if self.columns == 1 else [field.strip() for field in line.split("\t")]

    def sample(self, count: int) -> list[str]:
        """The different texts of so many rows from all over the file, in its order."""
        rows = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        return distinct(text for row in rows for text in ([self[row]] if self.columns == 1 else self[row]))


def read_text_pairs(path: str, flag: str, strict: bool = False) -> list[tuple[str, str]]:
    """Two texts a line: query and title."""
    return [(query, title) for query, title in read_rows(path, 2, flag, strict)]


def read_labeled_pairs(path: str, flag: str, strict: bool = False) -> list[tuple[str, str, float]]:
    """Two texts and a number a line."""
    def not_a_number(row: list[str]) -> str | None:
        try:
            return None if math.isfinite(float(row[2])) else f"label {row[2]!r} is not a finite number"
        except ValueError:
            return f"label {row[2]!r} is not a number"

    return [(a, b, float(label)) for a, b, label in read_rows(path, 3, flag, strict, not_a_number)]


def count_columns(path: str, flag: str, choices: tuple[int, ...]) -> int:
    """Which of `choices` is the number of columns of most of the first 1,000 lines; of as many the one that comes
    first."""
    counted = Counter(itertools.islice((line.count("\t") + 1 for _, _, line in _lines(path, flag)), 1000))
    if found := [count for count in counted if count in choices]:
        return max(found, key=counted.get)
    raise InputError(f"{flag} {path}: {'' if counted else 'the file holds no text; '}no line has "
                     f"{' or '.join(map(str, choices))} tab-separated columns")


def distinct(texts: Iterable[str]) -> list[str]:
    """The different texts, in the order of their first appearance."""
    return list(dict.fromkeys(texts))


# The tokenizers of PaddleNLP that are BERT WordPiece.
WORDPIECE_CLASSES = ("ErnieTokenizer", "BertTokenizer")
# Batches are padded to a multiple of this many tokens, so that kernels are made for few shapes.
LENGTH_MULTIPLE = 4


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

    def to_json(self) -> str:
        """This tokenizer for the tokenizers library alone, [CLS] and [SEP] included: what is in tokenizer.json."""
        from tokenizers import Tokenizer, processors

        whole = Tokenizer.from_str(self._rust.to_str())
        whole.no_truncation()
        whole.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", self.cls), ("[SEP]", self.sep)])
        return whole.to_str()

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


def tokenize_windows(texts: Sequence[str], tokenizer: Any, max_seq_length: int,
                     windows: Iterable[range] | None = None) -> Iterator[list[list[int]]]:
    """Yield the token ids of a window of texts at a time, one window ahead of whoever uses them.

    Args:
        windows: the rows of each; None: all, WINDOW at a time.
    """
    if windows is None:
        windows = (range(start, min(start + WINDOW, len(texts))) for start in range(0, len(texts), WINDOW))
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


class Batch(NamedTuple):
    """The texts of one step.

    Attributes:
        chunks: what the network is given at a time, arrays by name; one chunk, or with --chunk_size several.
        keys: see `model.same_texts`; None: equal texts are each other's negatives.
        rows: the texts' rows in the training file.
    """

    chunks: list[dict[str, np.ndarray]]
    keys: np.ndarray | None = None
    rows: Sequence[int] = ()


def crop(ids: Ids, rate: float, random: np.random.Generator) -> Ids:
    """A run of the tokens, `rate` of them less at most (independent cropping; Izacard et al. 2022, Contriever,
    arXiv:2112.09118)."""
    inner = len(ids) - 2
    length = random.integers(inner - int(rate * inner), inner + 1)
    start = 1 + random.integers(0, inner - length + 1)
    return [ids[0], *ids[start : start + length], ids[-1]]


def view(ids: Ids, args: argparse.Namespace, random: np.random.Generator) -> Ids:
    """A text's tokens as --crop_rate changes them, at most --max_seq_length."""
    ids = crop(ids, args.crop_rate, random)
    return ids if len(ids) <= args.max_seq_length else [*ids[: args.max_seq_length - 1], ids[-1]]


def chunks_of(sides: list[list[Ids]], size: int, pad_id: int) -> list[dict[str, np.ndarray]]:
    """The queries and their titles, `size` of each at a time, by the names of `SimCSE.forward`'s arguments."""
    chunks = []
    for start in range(0, len(sides[0]), size):
        query, *others = (side[start : start + size] for side in sides)
        chunk = {}
        for name, ids in (("query", query), ("title", list(itertools.chain(*others)))):
            chunk[f"{name}_input_ids"], chunk[f"{name}_token_type_ids"] = pad(ids, pad_id)
        chunks.append(chunk)
    return chunks


class Batches:
    """Makes the batches of train.py. What is random in them is a function of seed, epoch and row, so that a resumed
    run, or one of several processes, sees what an unbroken one does.

    Args:
        texts: the training file: a text a row, or a list of two or three.
        tokenizer: see `load_tokenizer`.
        args: of train.py.
    """

    def __init__(self, texts: Sequence[Any], tokenizer: Any, args: argparse.Namespace) -> None:
        self.texts, self.tokenizer, self.args = texts, tokenizer, args

    def sides(self, rows: Sequence[int], epoch: int) -> tuple[list[list[Ids]], list[list[Ids]]]:
        """Token ids of queries, titles and hard negatives; as the network sees them, and as they are in the file."""
        texts, args = [self.texts[row] for row in rows], self.args
        if not isinstance(texts[0], str):
            sides = [self.tokenizer(side, args.max_seq_length) for side in zip(*texts)]
            return sides, sides
        ids = self.tokenizer(texts, max(args.max_seq_length, WHOLE) if args.crop_rate else args.max_seq_length)
        if not args.crop_rate:
            return [ids, ids], [ids]
        views = [[view(each, args, np.random.default_rng([args.seed, epoch, row, side]))
                  for each, row in zip(ids, rows)] for side in range(2)]
        return views, [ids]

    def make(self, rows: Sequence[int], epoch: int) -> Batch:
        """The batch of some rows of the training file, in an epoch from 0."""
        sides, texts = self.sides(rows, epoch)
        chunks = chunks_of(sides, self.args.chunk_size or len(rows), self.tokenizer.pad_token_id)
        return Batch(chunks, None if self.args.keep_duplicate_negatives else keys_of(texts), rows)


def keys_of(sides: Sequence[list[Ids]]) -> np.ndarray:
    """`text_keys` of each side: int64 [texts, sides]."""
    return np.stack([text_keys(ids) for ids in sides], axis=1)


def batches_after(step: int, epochs: int, sampler: ShuffledBatches,
                  make: Callable[[Sequence[int], int], Batch]) -> Iterator[tuple[int, int, Batch]]:
    """Yield, for every step after `step`, its epoch and its place in it, both from 1, and its batch; the next batch is
    made while a step runs.

    Args:
        make: gives the batch of some rows in an epoch from 0.
    """
    for epoch in range(step // len(sampler), epochs):
        first = max(0, step - epoch * len(sampler))
        sampler.start_at(epoch, first)
        made = prefetch(make(rows, epoch) for rows in sampler)
        for number, batch in enumerate(made, start=first + 1):
            yield epoch + 1, number, batch
