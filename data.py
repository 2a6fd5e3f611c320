"""Everything that comes in: text files and, from texts, batches of token ids.

This module is light on purpose (numpy only); paddlenlp is imported by `load_tokenizer` alone.
"""

import codecs
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, TypeVar

from console import HOW_TO_INSTALL, InputError, first_line, log, progress, warn

# One thread a matrix product, so that what numpy computes does not depend on their number; ann_util runs several
# products side by side. This module is the first of the project's that a script imports.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
try:
    import numpy as np
except ModuleNotFoundError:
    sys.exit(f"numpy {HOW_TO_INSTALL}")

DEFAULT_MODEL = "rocketqa-zh-base-query-encoder"
RECALL_KS = (1, 5, 10, 20, 50)

# The tokenizers of PaddleNLP that are BERT WordPiece.
WORDPIECE_CLASSES = ("ErnieTokenizer", "BertTokenizer")
# Texts tokenized and sorted by length at a time: enough to make batches of even length, little enough to stream.
WINDOW = 16384
# Batches are padded to a multiple of this many tokens, so that kernels are made for few shapes.
LENGTH_MULTIPLE = 4
Item = TypeVar("Item")


# ------------------------------------------------------------------------------------------------ text files
def _runs(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def new_file(path: str, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file that takes the place of `path` when all is written; on an error `path` stays as it was."""
    parent, name = os.path.split(path)
    os.makedirs(parent or ".", exist_ok=True)
    for other in os.listdir(parent or "."):  # what a killed process left
        found = re.fullmatch(re.escape(name) + r"\.(\d+)\.tmp", other)
        if found and not _runs(int(found[1])):
            os.remove(os.path.join(parent, other))
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
            yield file
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save_embeddings(path: str, embeddings: np.ndarray) -> None:
    """Write embeddings as .npy, complete or not at all."""
    with new_file(path, "wb") as file:
        np.save(file, embeddings)
    log(f"wrote {embeddings.shape[0]} x {embeddings.shape[1]} float32 to {path}")


def reading(path: str) -> contextlib.AbstractContextManager[Callable]:
    """`console.progress` of reading a file, in bytes."""
    return progress(f"reading {path}", os.path.getsize(path) if os.path.isfile(path) else None, "B")


def file_digest(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, reading(path) as advance:
        while block := file.read(1 << 24):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


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


BOM = codecs.BOM_UTF8


def _lines(path: str, flag: str) -> Iterator[tuple[str, int, str]]:
    """Yield (file:line, offset, line) of a UTF-8 file, BOM and line ends (\\n, \\r\\n or \\r) removed, blank lines left
    out."""
    number = offset = 0
    with open(path, "rb") as file, reading(path) as advance:
        for chunk in file:
            advance(len(chunk))
            for line in chunk.splitlines(keepends=True):  # of bytes: splits at \n, \r\n and \r, and nowhere else
                number += 1
                where, start = f"{path}:{number}", offset
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
    and reported on stderr with file:line of the first three.

    Args:
        path: a UTF-8 file, with or without BOM, lines ending in \\n, \\r\\n or \\r.
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
    report = f"{bad} of {good + bad} lines are malformed: {', '.join(first_bad)}"
    if bad > good or not good:
        raise InputError(f"{flag} {path}: {report}" if bad else f"{flag} {path}: the file holds no text")
    if bad:
        warn(f"{flag} {path}: skipped; {report}")


def read_texts(path: str, flag: str, strict: bool = False) -> list[str]:
    """One text a line."""
    return [row[0] for row in read_rows(path, 1, flag, strict)]


class TextFile(Sequence[str]):
    """The texts that `read_texts` gives, found by their offsets and read when asked for: 8 bytes of memory a line.

    Arguments and errors are those of `read_rows`. A pipe is copied to a temporary file first.
    """

    _CHUNK = 1 << 22
    _LINE = re.compile(rb"[^\r\n]*")

    def __init__(self, path: str, flag: str, strict: bool = False) -> None:
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
            starts, doubtful = self._scan(advance)
        if starts is None:  # something is there to be reported, or to be left out
            starts, doubtful = array("q", (offset for offset, _ in _good_rows(path, 1, flag, strict))), []
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

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[each] for each in range(len(self))[row]]
        row = range(len(self))[row]
        start, end = int(self._starts[row]), int(self._starts[row + 1]) if row + 1 < len(self) else self._size
        return self._LINE.match(os.pread(self._file.fileno(), end - start, start))[0].decode("utf-8").strip()


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
    """How many columns the first line has whose number of columns is one of `choices`."""
    for _, _, line in _lines(path, flag):
        if line.count("\t") + 1 in choices:
            return line.count("\t") + 1
    raise InputError(f"{flag} {path}: no line has {' or '.join(map(str, choices))} tab-separated columns")


# --------------------------------------------------------------------------------------- texts to token ids
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
        room = max_seq_length - 2
        self._rust.enable_truncation(room)
        # A han character is a token and ends the one before it, so what follows the last that has room is cut anyway.
        enough = re.compile(f"(?:[^\u4e00-\u9fff]*[\u4e00-\u9fff]){{{room}}}").match
        texts = [found[0] if len(text) > room and (found := enough(text)) else text for text in texts]
        return [[self.cls, *encoding.ids, self.sep] for encoding in self._rust.encode_batch_fast(texts)]

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


def distinct(texts: Iterable[str]) -> list[str]:
    """The different texts, in the order of their first appearance."""
    return list(dict.fromkeys(texts))
