"""Text files, tokens and batches: what goes into the network. paddlenlp is imported by `load_tokenizer` alone."""

import argparse
import codecs
import itertools
import math
import os
import shutil
import tempfile
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from simcse import encodings, formats
from simcse.console import InputError, complain, reported, settings, warn
from simcse.files import STDIN, prefetch, read_json, reading
from simcse.tokens import Ids, Tokens, WordPiece

import numpy as np

WINDOW = 16384  # texts tokenized and sorted by length at a time: enough for batches of even length, in little memory
WHOLE = 512  # tokens of a text that views are cropped from
BOM, LOST = "\ufeff", "\ufffd"


def _decode(line: bytes, path: str, name: str, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        cause = formats.named(encodings.not_utf8(path, line, error), name)
        raise InputError(f"{where}: not UTF-8 at byte {error.start + 1} of the line; {cause}") from None


def _refuse_bytes(head: bytes, flag: str, name: str) -> None:
    if kind := encodings.known_bytes(head):
        raise InputError(f"{flag} {name}:1: not UTF-8 text in lines, but {formats.named(kind, name)}")


def _lines(path: str, flag: str, name: str) -> Iterator[tuple[int, str]]:
    """Yield number, from 1, and text of the lines of a UTF-8 file or of stdin as it comes; BOMs, wherever files were
    joined, are left out. `name` is that of the file in messages."""
    number, stdin = 0, path == STDIN
    with open(0 if stdin else path, "rb", encodings.BLOCK, closefd=not stdin) as file, reading(path) as advance:
        _refuse_bytes(file.peek(), flag, name)
        for chunk in file:
            advance(len(chunk))
            for line in chunk.splitlines():  # of bytes: splits at \n, \r\n and \r, and nowhere else
                number += 1
                yield number, _decode(line, path, name, f"{flag} {name}:{number}").replace(BOM, "")


def read_rows(path: str, columns: int, flag: str, check: Callable[[list[str]], str | None] | None = None,
              every: bool = False, name: str | None = None,
              known: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Stream the rows of a tab-separated UTF-8 file, or of stdin (STDIN), each with the number of its line, from 1.

    Lines end in \\n, \\r\\n or \\r. Every field loses the white space around it and keeps what is inside. Blank lines
    are skipped. A row with another number of columns, an empty field, or for which `check(row)` returns a complaint is
    skipped, counted, and reported on stderr with file:line of the first three; of stdin these three are reported at
    once as well. With `every` these and blank lines, which are reported too, come as they are. InputError, which names
    the `flag`: not UTF-8; another format, unless --plain_text; a bad row with --strict_data; more than half of the rows
    malformed, unless every line of stdin has been answered; no good row. Lines with U+FFFD, which stands for bytes that
    a conversion lost, are reported. `name` is that of the file in messages, if it is another than `path`; its format
    is `known` where `count_columns` has looked at it."""
    good, bad, blank, first_bad, lossy = 0, 0, 0, [], []
    name = name or ("stdin" if path == STDIN else path)
    fate = "no result (NaN, empty or null)" if every else "skipped"
    lines = _lines(path, flag, name)
    for number, line in lines if known else formats.checked(lines, name, flag, (columns,)):
        if LOST in line:
            lossy.append(f"{name}:{number}")
        row = [field.strip() for field in line.split("\t")]
        if not (any(row) or every):
            continue
        blank += not any(row)
        complaint = _complaint(row, columns) or (check(row) if check else None)
        if complaint is None:
            good += 1
            yield number, row
            continue
        bad, where = bad + 1, f"{name}:{number}"
        if settings.strict:
            raise InputError(f"{flag} {where}: {complaint} (--strict_data)")
        if bad <= 3:
            first_bad.append(f"{where} ({complaint})")
            if path == STDIN:  # whoever waits for the answer has to know
                warn(f"{flag} {where}: {fate}; {complaint}")
        if every:
            yield number, row
    report = f"{bad} of {good + bad} lines are {'blank or ' * every}malformed: {', '.join(first_bad)}"
    if not good or (bad - blank > good and not (every and path == STDIN)):
        raise InputError(f"{flag} {name}: {report if bad > blank else 'the file holds no text'}")
    if bad:
        warn(f"{flag} {name}: {fate}; {report}; mend them or take them out")
    if lossy:
        complain(f"{flag} {name}: {len(lossy)} of {good + bad} lines have U+FFFD, which stands for bytes that were "
                 f"lost when the file was converted; convert it again: {', '.join(lossy[:3])}")


def _complaint(row: list[str], columns: int) -> str | None:
    """What is wrong with a row of so many columns."""
    if not any(row):
        return "blank"
    if len(row) != columns:
        return f"columns: {len(row)} instead of {columns}"
    return None if all(row) else "an empty field"


def complete(row: list[str], columns: int) -> bool:
    """Whether a row of so many columns is neither blank nor malformed."""
    return _complaint(row, columns) is None


class TextFile(Sequence):
    """The rows of `read_rows`, whose arguments and errors it has, found by their offsets and read when asked for: 8
    bytes of memory a line. Of one column a row is a text, of several a list of texts. A pipe is copied first."""

    _CHUNK, _BLOCK = 1 << 22, 1024

    def __init__(self, path: str, flag: str, columns: int | tuple[int, ...] = 1) -> None:
        self._lines = None  # the numbers of the texts' lines, from 0; None: all of the file's
        self.name = path  # in messages
        self._file = open(path, "rb")  # noqa: SIM115  read from as long as this object lives
        if not os.path.isfile(path):
            with self._file as pipe:
                self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115
                shutil.copyfileobj(pipe, self._file)
            path = self._file.name
            self._file.seek(0)
        self.path = path
        _refuse_bytes(os.pread(self._file.fileno(), encodings.BLOCK, 0), flag, self.name)
        known = not isinstance(columns, int)
        self.columns = count_columns(path, flag, columns, self.name) if known else columns
        with reading(path) as advance:
            simple, maybe_blank = self._scan(advance)
        if self.columns > 1 or not simple:  # something may have to be reported, or left out
            rows = read_rows(path, self.columns, flag, name=self.name, known=known)
            self._lines = np.fromiter((number - 1 for number, _ in rows), "int32")
        elif blank := [row for row in maybe_blank if not self[row]]:
            self._lines = np.delete(np.arange(len(self), dtype="int32"), blank)
        if not len(self):
            raise InputError(f"{flag} {self.name}: the file holds no text")
        if not known and simple and not settings.plain_text:
            formats.refuse_other_formats(self[: formats.SAMPLE], self.name, flag, (columns,))

    def _scan(self, advance: Callable[[int], Any]) -> tuple[bool, array]:
        """Find where lines start. Returns whether all is UTF-8 without tabs; and the numbers, from 0, of the lines that
        may be blank, by their first byte."""
        starts, maybe_blank, simple, offset, after_break = array("q"), array("q"), True, 0, True
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while chunk := self._file.read(self._CHUNK):
            while chunk.endswith(b"\r") and (more := self._file.read(1)):  # \r\n is one break
                chunk += more
            codes = np.frombuffer(chunk, "uint8")
            breaks = codes == 10
            if b"\r" in chunk:
                breaks |= (codes == 13) & ~np.append(breaks[1:], False)
            begins = np.flatnonzero(np.concatenate([[after_break], breaks[:-1]]))
            first = codes[begins]
            odd = np.flatnonzero((first <= 32) | np.isin(first, (0xC2, 0xE1, 0xE2, 0xE3, 0xEF)))
            maybe_blank.frombytes((odd + len(starts)).tobytes())
            starts.frombytes((begins + offset).tobytes())
            offset, after_break = offset + len(chunk), breaks[-1]
            simple = simple and b"\t" not in chunk and "\ufffd" not in decoder.decode(chunk)
            advance(len(chunk))
        starts.append(offset)
        self._starts = np.frombuffer(starts, "int64")  # and where the last line ends
        return simple and not decoder.getstate()[0], maybe_blank

    def __len__(self) -> int:
        return len(self._starts) - 1 if self._lines is None else len(self._lines)

    def line_number(self, row: int) -> int:
        """The number, from 1, of a text's line in the file."""
        return 1 + int(row if self._lines is None else self._lines[row])

    def place(self, row: int) -> str:
        """Where a text stands, as file:line."""
        return f"{self.name}:{self.line_number(row)}"

    def take(self, rows: Sequence[int]) -> list[str]:
        """The texts of some rows; where they stand close together, their part of the file is read at once."""
        return list(map(self._row, self._take(rows)))

    def _take(self, rows: Sequence[int]) -> list[bytes]:
        lines = np.asarray(rows, "int64") if self._lines is None else self._lines[rows]
        begins, ends = self._starts[lines], self._starts[lines + 1]
        offset, end = int(begins.min(initial=self._starts[-1])), int(ends.max(initial=0))
        if end - offset > min(2 * (ends - begins).sum(), 1 << 30):
            return [os.pread(self._file.fileno(), end - begin, begin)
                    for begin, end in zip(begins.tolist(), ends.tolist())]
        block = os.pread(self._file.fileno(), max(0, end - offset), offset)
        places = zip((begins - offset).tolist(), (ends - offset).tolist())
        return [block[begin:end] for begin, end in places]

    def __getitem__(self, row):
        if isinstance(row, slice):
            return self.take(range(len(self))[row])
        return self.take([range(len(self))[row]])[0]

    def __iter__(self):
        """Yield the rows in their order, read by blocks of the file."""
        for start in range(0, len(self), self._BLOCK):
            yield from self[start : start + self._BLOCK]

    def _row(self, line: bytes) -> str | list[str]:
        text = line.decode("utf-8").replace(BOM, "").strip()
        return text if self.columns == 1 else [field.strip() for field in text.split("\t")]

    def spread(self, count: int) -> list[tuple[str, Any]]:
        """So many rows from all over the file, in its order, each with its place."""
        rows = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        return [(self.place(row), self[row]) for row in rows]

    def sample(self, count: int) -> list[str]:
        """The different texts of so many rows from all over the file, in its order."""
        return distinct(text for _, row in self.spread(count) for text in ([row] if isinstance(row, str) else row))


class Corpus(TextFile):
    """Documents, or queries: a row is a text, whose line is the text, or an id, a tab and the text. `columns` is 1 or
    2; None: what most of the first lines have. Ids are unique: a line with an earlier one is reported and left out, and
    where most are such ones, or with --strict_data, there is an InputError."""

    def __init__(self, path: str, flag: str, columns: int | None = None) -> None:
        super().__init__(path, flag, columns or formats.IDS)
        if not self.has_ids:
            return
        keys = np.fromiter(map(hash, self.all_ids()), "int64", len(self))
        again = np.delete(np.arange(len(keys)), np.unique(keys, return_index=True)[1])
        if not len(again):
            return
        said = (f"{flag} {self.name}: {len(again):,} of {len(keys):,} ids stand on an earlier line as well: "
                f"{', '.join(map(self.place, again[:3]))}")
        if settings.strict or len(again) > len(keys) / 2:
            raise InputError(said + (" (--strict_data)" if settings.strict else
                                     f"; {flag} has a text a line, or an id, a tab and a text"))
        warn(f"{said}; skipped")
        self._lines = np.delete(self._lines, again)

    @property
    def has_ids(self) -> bool:
        return self.columns == 2

    def ids(self, rows: Sequence[int]) -> list[str | None]:
        """The ids of some rows; None where there are none."""
        both = super()._row
        return [both(line)[0] for line in self._take(rows)] if self.has_ids else [None] * len(rows)

    def all_ids(self) -> Iterator[str | None]:
        """Yield the ids of all rows, read by blocks of the file."""
        for start in range(0, len(self), self._BLOCK):
            yield from self.ids(range(start, min(start + self._BLOCK, len(self))))

    def _row(self, line: bytes) -> str:
        return super()._row(line)[1] if self.has_ids else super()._row(line)


def read_targets(path: str, flag: str, corpus_file: str | None, every: bool = False) -> Iterator[tuple[int, list[str]]]:
    """The rows of query and target of `read_rows`; where there is a corpus, targets are ids, which become the texts of
    its documents. A row whose id it lacks is malformed, and with `every` has no target."""
    if not corpus_file:
        yield from read_rows(path, 2, flag, every=every)
        return
    corpus = Corpus(corpus_file, "--corpus_file", 2)
    row_of = {id: row for row, id in enumerate(corpus.all_ids())}

    def lacks(row: list[str]) -> str | None:
        return None if row[1] in row_of else f"no document has the id {row[1]}"

    for number, row in read_rows(path, 2, flag, lacks, every):
        if complete(row, 2):
            row = [row[0], corpus[row_of[row[1]]] if row[1] in row_of else ""]
        yield number, row


def read_text_pairs(path: str, flag: str) -> list[tuple[str, str]]:
    """Two texts a line: query and title."""
    return [(query, title) for _, (query, title) in read_rows(path, 2, flag)]


def not_a_number(row: list[str]) -> str | None:
    """What is wrong with the label of two texts and a label."""
    try:
        return None if math.isfinite(float(row[2])) else f"label {row[2]!r} is not a finite number"
    except ValueError:
        return f"label {row[2]!r} is not a number"


def count_columns(path: str, flag: str, choices: tuple[int, ...], name: str | None = None) -> int:
    """Which of `choices` is the number of columns of most of the first 1,000 lines; of as many the one that comes
    first. InputError: none, or another format, unless --plain_text. `name` is that of the file in messages."""
    name = name or path
    first = itertools.islice(formats.checked(_lines(path, flag, name), name, flag, choices), 1000)
    counted = Counter(line.count("\t") + 1 for _, line in first if line.strip())
    if found := [count for count in counted if count in choices]:
        return max(found, key=counted.get)
    raise InputError(f"{flag} {name}: {'' if counted else 'the file holds no text; '}no line has "
                     f"{' or '.join(map(str, choices))} tab-separated columns")


def plain(text: str) -> str:
    """A text without what the eye does not see: white space, invisible characters, and how wide characters are."""
    text = unicodedata.normalize("NFKC", text).replace(" ", "")
    return text if text.isprintable() else "".join(filter(str.isprintable, text))


def distinct(texts: Iterable[str]) -> list[str]:
    """The different texts, in the order of their first appearance."""
    return list(dict.fromkeys(texts))


WORDPIECE_CLASSES = ("ErnieTokenizer", "BertTokenizer")  # of PaddleNLP
LENGTH_MULTIPLE = 4  # batches are padded to a multiple of so many tokens, so that kernels are made for few shapes


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


def unseen(tokenizer: WordPiece | AnyTokenizer, ids: Sequence[Ids]) -> list[int]:
    """Which of the texts an encoder sees nothing of: they have no token, or [UNK] and no more than punctuation besides.
    All of them are one and the same to it, so that they would be each other's perfect match."""
    ids = Tokens.of(ids)
    words = np.isin(ids.flat, [*tokenizer.wordless], invert=True)
    words[ids.starts] = words[ids.ends - 1] = False  # [CLS] and [SEP]
    wordless = np.flatnonzero(~np.logical_or.reduceat(words, ids.starts)) if len(ids) else ()
    return [row for row in map(int, wordless) if ids.lengths[row] == 2 or tokenizer.unk_token_id in ids[row]]


def pad(sequences: Sequence[Ids], pad_id: int, length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pad token ids to `length`, or to the longest: input_ids and token_type_ids (all zero), int64 [batch, length]."""
    ids = Tokens.of(sequences)
    input_ids = ids.padded(slice(None), pad_id, length or ids.lengths.max())
    return input_ids, np.zeros_like(input_ids)


def make_batches(ids: Sequence[Ids], pad_id: int, batch_size: int | None = None,
                 batch_tokens: int = 2048) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Batch token ids of like length, longest first, each batch padded to a multiple of LENGTH_MULTIPLE, `batch_size`
    texts at a time or, None, as many as fill `batch_tokens`, padding included. Yields the positions of the batch's
    texts in `ids`, its input_ids and its token_type_ids, int64 [texts, length]."""
    ids = Tokens.of(ids)
    order, longest = np.argsort(-ids.lengths, kind="stable"), ids.lengths.max(initial=0)
    while len(order):
        length = int(min(longest, -(-ids.lengths[order[0]] // LENGTH_MULTIPLE) * LENGTH_MULTIPLE))
        size = batch_size or max(1, batch_tokens // length)
        rows, order = order[:size], order[size:]
        input_ids = ids.padded(rows, pad_id, length)
        yield rows.tolist(), input_ids, np.zeros_like(input_ids)


class ShuffledBatches:
    """The batches of `batch_size` of `count` texts for one rank of several: the order of
    paddle.io.DistributedBatchSampler(shuffle=True), for 4 bytes of memory a text. All ranks together take every text
    once, and the first ones again where the ranks would not have as many each. A last batch of a single text, which
    would have no negatives, is joined to the one before."""

    def __init__(self, count: int, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        self.count, self.batch_size, self.rank, self.ranks = count, batch_size, rank, ranks

    def __len__(self) -> int:
        """Batches of an epoch."""
        texts = -(-self.count // self.ranks)
        return -(-texts // self.batch_size) - (1 < self.batch_size < texts and texts % self.batch_size == 1)

    def epoch(self, number: int, first: int = 0) -> Iterator[np.ndarray]:
        """Yield the row numbers, int32 [batch], of an epoch, from 0, without its `first` batches."""
        order = np.resize(np.arange(self.count, dtype="int32"), -(-self.count // self.ranks) * self.ranks)
        np.random.RandomState(number).shuffle(order)
        size, last = self.batch_size * self.ranks, len(self) - 1
        for batch in range(first, len(self)):
            yield np.split(order[batch * size : (batch + 1) * size if batch < last else None], self.ranks)[self.rank]


def text_keys(sides: Sequence[Sequence[Ids]]) -> np.ndarray:
    """A number for each text's token ids, the same for the same ids in every process: int64 [texts, sides]."""
    return np.array([[hash(tuple(ids)) for ids in texts] for texts in zip(*sides)])  # of numbers it is no random one


INPUTS = ("query_input_ids", "query_token_type_ids", "title_input_ids", "title_token_type_ids")  # of SimCSE.forward


class Batch(NamedTuple):
    """The texts of one step: what the network is given of them at a time, in one chunk or with --chunk_size in several;
    the keys of `model.same_texts`, without which equal texts are each other's negatives; rows of the training file."""

    chunks: list[dict[str, np.ndarray]]
    keys: np.ndarray | None = None
    rows: Sequence[int] = ()


def crop(ids: Ids, rate: float, random: np.random.Generator, most: int = WHOLE) -> Ids:
    """A run of the tokens, `rate` of them less at most (independent cropping; Izacard et al. 2022, Contriever,
    arXiv:2112.09118), cut to `most` with [CLS] and [SEP]."""
    inner = len(ids) - 2
    length = random.integers(inner - int(rate * inner), inner + 1)
    start = 1 + random.integers(0, inner - length + 1)
    return [ids[0], *ids[start : start + min(length, most - 2)], ids[-1]]


def chunks_of(sides: list[list[Ids]], size: int, pad_id: int) -> list[dict[str, np.ndarray]]:
    """The queries and their titles, then hard negatives, `size` of each at a time, as INPUTS."""
    chunks = []
    for start in range(0, len(sides[0]), size):
        query, *others = (side[start : start + size] for side in sides)
        chunks.append(dict(zip(INPUTS, (*pad(query, pad_id), *pad(list(itertools.chain(*others)), pad_id)))))
    return chunks


def make_batch(texts: Sequence[Any], tokenizer: Any, args: argparse.Namespace, rows: Sequence[int],
               epoch: int) -> Batch:
    """The batch of some rows of the training file, a text a row or a list of two or three, in an epoch from 0. What is
    random in it is a function of seed, epoch and row, so that a resumed run, or one of several processes, sees what an
    unbroken one does."""
    taken = [texts[row] for row in rows]
    columns = [taken] if isinstance(taken[0], str) else zip(*taken)
    most = max(args.max_seq_length, WHOLE) if args.crop_rate else args.max_seq_length
    own = [tokenizer(column, most) for column in columns]  # as they are in the file
    sides = own if len(own) > 1 else own * 2
    if args.crop_rate:
        sides = [[crop(ids, args.crop_rate, np.random.default_rng([args.seed, epoch, row, side]), args.max_seq_length)
                  for ids, row in zip(each, rows)] for side, each in enumerate(sides)]
    chunks = chunks_of(sides, args.chunk_size or len(rows), tokenizer.pad_token_id)
    return Batch(chunks, None if args.keep_duplicate_negatives else text_keys(own), rows)


def batches_after(step: int, epochs: int, sampler: ShuffledBatches,
                  make: Callable[[Sequence[int], int], Batch]) -> Iterator[tuple[int, int, Batch]]:
    """Yield, for every step after `step`, its epoch and its place in it, both from 1, and its batch, which `make` gives
    of some rows in an epoch from 0; the next batch is made while a step runs."""
    for epoch in range(step // len(sampler), epochs):
        first = max(0, step - epoch * len(sampler))
        made = prefetch(make(rows, epoch) for rows in sampler.epoch(epoch, first))
        for number, batch in enumerate(made, start=first + 1):
            yield epoch + 1, number, batch
