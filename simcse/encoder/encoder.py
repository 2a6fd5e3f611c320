"""Encode texts: the one way from texts to embeddings, and the warnings about texts that the encoder does not read."""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from simcse import console
from simcse.console import InputError, NotFiniteError, progress, some_characters
from simcse.encoder.engine import Engine
from simcse.encoder.weights import CheckpointFiles
from simcse.files import prefetch
from simcse.machine import RANK
from simcse.ranks import gather_arrays
from simcse.text import tokens
from simcse.text.keys import UNKNOWN_KEY, sequence_keys
from simcse.text.prefixes import (
    DOCUMENT,
    INPUT_TYPES,
    NO_PREFIXES,
    QUERY,
    Prefixes,
    add_prefixes,
    check_prefixes,
    count_tokens,
)
from simcse.text.tokens import WINDOW, Ids, TokenBatch, Tokens
from simcse.text.wordpiece import find_unknown

import numpy as np

EXAMPLES = 3  # places that a warning names
BYTES_OF_TOKEN = 40  # of a token id: a Python integer in a list, then a number in an array
BatchMaker = Callable[[Sequence[Ids], int], Iterator[TokenBatch]]  # token ids of texts, pad id -> batches


class EncoderInput(NamedTuple):
    """Texts as the encoder reads them.

    Attributes:
        ids: the token ids of each text, cut to the encoder's length.
        lengths: int64 [texts], tokens of each text before the cut, counted up to max_seq_length + 1.
        unknown: rows of the texts that are all [UNK] to the encoder.
    """

    ids: Tokens
    lengths: np.ndarray
    unknown: list[int]

    def keys(self) -> np.ndarray:
        """Return the key of each text's token ids, int64 [texts], >= 0: texts with one embedding have one key.

        These are texts with the same token ids, and all texts that are all [UNK], whose embeddings are zeros. Two other
        texts have the same key with the probability that `text_keys` names.
        """
        keys = sequence_keys(self.ids.flat, self.ids.ends)
        keys[self.unknown] = UNKNOWN_KEY
        return keys


def tokenize(tokenizer: Any, texts: Sequence[str], max_seq_length: int, prefixes: Prefixes = NO_PREFIXES,
             input_type: str | Sequence[str] = DOCUMENT) -> EncoderInput:
    """Return the token ids of texts with their prefixes, cut to `max_seq_length`, and what is lost by that.

    Args:
        tokenizer: see `wordpiece.load_tokenizer`.
        texts: without prefixes.
        max_seq_length: tokens of a text at most, [CLS], [SEP] and its prefix included.
        prefixes: of each input type.
        input_type: that of all texts, one of INPUT_TYPES; or a sequence with that of each.
    """
    prefixed = add_prefixes(tokenizer, texts, prefixes, input_type)
    whole = Tokens.of(tokenizer(prefixed.texts, max_seq_length + 1))
    ids = whole.truncate(max_seq_length)
    return EncoderInput(ids, whole.lengths, find_unknown(tokenizer, ids, prefixed.count_prefix_tokens(ids)))


def check_length(network: Any, max_seq_length: int) -> None:
    """Raise InputError if `max_seq_length` exceeds the position embeddings of a network or an engine."""
    if max_seq_length > network.max_positions:
        raise InputError(f"--max_seq_length {max_seq_length}: the encoder has {network.max_positions} positions")


# ------------------------------------------------------------------------------------------------------------- warnings
@dataclass
class TextWarnings:
    """Count the texts that the encoder reads only in part, or nothing of.

    Attributes:
        max_seq_length: tokens that the encoder reads of a text.
        total: texts that were counted.
        truncated: texts that have more tokens.
        unknown: texts that are all [UNK].
        first_truncated, first_unknown: rows of the first EXAMPLES of them, rising.
    """

    max_seq_length: int
    total: int = 0
    truncated: int = 0
    unknown: int = 0
    first_truncated: list[int] = field(default_factory=list)
    first_unknown: list[int] = field(default_factory=list)

    def add(self, inputs: EncoderInput, rows: Sequence[int] | np.ndarray) -> None:
        """Count some texts; `rows` are their row numbers."""
        truncated = np.flatnonzero(inputs.lengths > self.max_seq_length).tolist()
        self.total += len(inputs.ids)
        self.truncated += len(truncated)
        self.unknown += len(inputs.unknown)
        self.first_truncated += [int(rows[row]) for row in truncated[: EXAMPLES - len(self.first_truncated)]]
        self.first_unknown += [int(rows[row]) for row in inputs.unknown[: EXAMPLES - len(self.first_unknown)]]

    def merge(self, other: "TextWarnings") -> None:
        """Add what another process has counted of other rows."""
        self.total += other.total
        self.truncated += other.truncated
        self.unknown += other.unknown
        self.first_truncated = sorted(self.first_truncated + other.first_truncated)[:EXAMPLES]
        self.first_unknown = sorted(self.first_unknown + other.first_unknown)[:EXAMPLES]

    def gather(self) -> "TextWarnings":
        """Return the sum of what all ranks have counted; all ranks call it together."""
        merged = TextWarnings(self.max_seq_length)
        for numbers in gather_arrays(self._to_array()):
            merged.merge(TextWarnings._of_array(numbers, self.max_seq_length))
        return merged

    def report(self, place_of: Callable[[int], str]) -> None:
        """Warn of truncated and of unknown texts; with --strict_data raise InputError.

        Args:
            place_of: names a row, as file:line.
        """
        if self.truncated:
            console.warn_data(
                f"{console.part(self.truncated, self.total, 'text', 'are')} longer than {self.max_seq_length} tokens "
                "and cut; raise --max_seq_length, in training too, to encode more of them: "
                f"{self._name_places(self.first_truncated, place_of)}")
        if self.unknown:
            console.warn_data(
                f"{console.part(self.unknown, self.total, 'text', 'are')} all [UNK] to the encoder, so that the cosine "
                "with any text is 0; use an encoder whose vocabulary has their words: "
                f"{self._name_places(self.first_unknown, place_of)}")

    @staticmethod
    def _name_places(rows: Iterable[int], place_of: Callable[[int], str]) -> str:
        """Return the places of rows, each once: pairs have two texts in one place."""
        return ", ".join(dict.fromkeys(place_of(row) for row in rows))

    def _to_array(self) -> np.ndarray:
        """Return all counts and rows as int64 [3 + 2 * EXAMPLES], rows filled up with -1."""
        numbers = [self.total, self.truncated, self.unknown]
        for rows in (self.first_truncated, self.first_unknown):
            numbers += rows + [-1] * (EXAMPLES - len(rows))
        return np.array(numbers, "int64")

    @classmethod
    def _of_array(cls, array: np.ndarray, max_seq_length: int) -> "TextWarnings":
        """Return the counts and rows that `_to_array` has written."""
        total, truncated, unknown, *rows = array.tolist()
        first_truncated = [row for row in rows[:EXAMPLES] if row >= 0]
        first_unknown = [row for row in rows[EXAMPLES:] if row >= 0]
        return cls(max_seq_length, total, truncated, unknown, first_truncated, first_unknown)


def places_of(texts: Sequence[str], places: Sequence[str] | None = None) -> Callable[[int], str]:
    """Return what names a row of `texts` in messages: its place, else its first characters.

    Args:
        places: the place of each text, as file:line; None: those of `texts`, if it is a `TextFile`.
    """
    if places is not None:
        return places.__getitem__
    if hasattr(texts, "place"):
        return texts.place
    return lambda row: repr(texts[row][:20])


class TokenizedRows(NamedTuple):
    """The texts of training rows, row after row.

    Attributes:
        places: the place of each text, as file:line.
        texts: the texts.
        inputs: the same, as the encoder reads them.
    """

    places: list[str]
    texts: list[str]
    inputs: EncoderInput

    def known_ids(self) -> list[Ids | None]:
        """Return the token ids of each text; None for a text that is all [UNK]."""
        all_ids: list[Ids | None] = list(self.inputs.ids)
        for row in self.inputs.unknown:
            all_ids[row] = None
        return all_ids


def tokenize_rows(rows: Sequence[tuple[str, str | Sequence[str]]], tokenizer: Any, max_seq_length: int,
                  prefixes: Prefixes = NO_PREFIXES) -> TokenizedRows:
    """Tokenize the texts of training rows. The first of several texts of a row is a query, the others are documents.

    A single text is trained on with both prefixes; here it has the longer one, with which more of it is cut.

    Args:
        rows: the place of each row, as file:line, and its text or texts.
        prefixes: of each input type.
    """
    places = []
    texts = []
    input_types = []
    longer = max((DOCUMENT, QUERY), key=lambda input_type: count_tokens(tokenizer, prefixes.of(input_type)))
    for place, row in rows:
        texts_of_row = [row] if isinstance(row, str) else row
        for column, text in enumerate(texts_of_row):
            places.append(place)
            texts.append(text)
            if len(texts_of_row) == 1:
                input_types.append(longer)
            else:
                input_types.append(QUERY if column == 0 else DOCUMENT)
    return TokenizedRows(places, texts, tokenize(tokenizer, texts, max_seq_length, prefixes, input_types))


def warn_unusable(rows: TokenizedRows, max_seq_length: int) -> None:
    """Warn on rank 0 of texts that training cannot use.

    These are truncated texts, texts that are all [UNK], and different texts that are the same after truncation.
    """
    if RANK:
        return
    warnings = TextWarnings(max_seq_length)
    warnings.add(rows.inputs, range(len(rows.texts)))
    warnings.report(rows.places.__getitem__)
    _warn_same_after_truncation(rows, max_seq_length)


def _warn_same_after_truncation(rows: TokenizedRows, max_seq_length: int) -> None:
    """Warn of different texts whose ids are the same once they are cut to `max_seq_length`."""
    first_row: dict[tuple, int] = {}
    same = []
    is_cut = rows.inputs.lengths > max_seq_length
    for row, ids in enumerate(rows.inputs.ids):
        if len(ids) < max_seq_length:
            continue
        first = first_row.setdefault(tuple(ids), row)
        if rows.texts[row] != rows.texts[first] and (is_cut[row] or is_cut[first]):
            same.append(rows.places[row])
    if same:
        texts_are = console.part(len(same), len(rows.texts), "text", "are")
        console.warn_data(f"{texts_are} the same as another text once cut to {max_seq_length} tokens; raise "
                          "--max_seq_length to tell them apart: "
                          f"{', '.join(same[:EXAMPLES])}")


# -------------------------------------------------------------------------------------------------------------- encoder
class Encoder:
    """Turn texts into embeddings, by an engine and a tokenizer.

    `model.Encoder.load` opens one of a checkpoint.

    Args:
        engine: see `engine.Engine`.
        tokenizer: see `wordpiece.load_tokenizer`.
        max_seq_length: tokens that are read of a text, [CLS] and [SEP] included.
        batch_size: texts of a batch; None: as many as fill the engine's `batch_tokens`.
        make_batches: forms the batches instead of `tokens.make_batches`; its arrays may have more rows than the batch
            has texts.
        checkpoint: the files that it is loaded from; None: it is being trained, or was exported.
        calibration: SHA-256 of the file that an int8 graph was calibrated with; None: it is not int8, or not known.
        prefixes: put before texts, by their input type.

    Raises:
        InputError: the engine has fewer positions than `max_seq_length`, or a prefix fills them all.
    """

    def __init__(self, engine: Engine, tokenizer: Any, max_seq_length: int, batch_size: int | None = None,
                 make_batches: BatchMaker | None = None, checkpoint: CheckpointFiles | None = None,
                 calibration: str | None = None, prefixes: Prefixes = NO_PREFIXES) -> None:
        check_length(engine, max_seq_length)
        check_prefixes(tokenizer, prefixes, max_seq_length)
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.checkpoint = checkpoint
        self.calibration = calibration
        self.prefixes = prefixes
        self._lock = threading.Lock()  # engines compute for one thread at a time
        self._make_batches = make_batches or functools.partial(
            tokens.make_batches, batch_size=batch_size, batch_tokens=engine.batch_tokens)

    @property
    def embedding_size(self) -> int:
        return self.engine.embedding_size

    @property
    def precision(self) -> str:
        """The number format of the matrix products: fp32, tf32, bf16, fp16 or int8."""
        return self.engine.precision

    @functools.cached_property
    def model_digest(self) -> str:
        """SHA-256 of the checkpoint, by which an index knows its model; computed when it is first asked for.

        Raises:
            InputError: a file of the checkpoint was written again after it was loaded.
        """
        if self.checkpoint is None:
            raise ValueError("the encoder is not that of a checkpoint")
        return self.checkpoint.digest()

    def bytes_needed(self, texts: int) -> int:
        """Return about the bytes of memory that encoding so many texts takes, beyond those of the loaded engine."""
        tokens_at_a_time = min(texts, 2 * WINDOW) * self.max_seq_length  # a window, and the next one is tokenized
        return self.engine.bytes_needed + BYTES_OF_TOKEN * tokens_at_a_time

    def max_document_length(self) -> int:
        """Return how many tokens of a document are read beside its prefix, [CLS] and [SEP] included."""
        return self.max_seq_length - count_tokens(self.tokenizer, self.prefixes.document)

    def encode(self, texts: Sequence[str], *, input_type: str | Sequence[str] = DOCUMENT,
               places: Sequence[str] | None = None, warn: bool = True) -> np.ndarray:
        """Return the embeddings of texts, float32 [texts, embedding_size], L2-normalized.

        Args:
            texts: a list, a column of a DataFrame, or a sequence that gives the texts of a slice, as `TextFile` does.
            input_type: "query" or "document", whose prefix is put before each text; or a sequence with that of each.
            places: where each text stands, as file:line, for warnings; see `places_of`.
            warn: warn of texts that are truncated or all [UNK].
        """
        texts = check_texts(texts)
        embeddings = np.empty((len(texts), self.embedding_size), "float32")
        row = 0
        for block in self.stream(texts, input_type=input_type, places=places, warn=warn):
            embeddings[row : row + len(block)] = block
            row += len(block)
        return embeddings

    def similarity(self, first: Sequence[str] | np.ndarray, second: Sequence[str] | np.ndarray) -> np.ndarray:
        """Return the cosine of each of `first` with each of `second`, float32 [first, second].

        Args:
            first, second: texts, which are encoded as documents, or vectors such as those of `encode`, float [vectors,
                embedding_size].
        """
        cosines = self._unit_vectors(first) @ self._unit_vectors(second).T
        return cosines.clip(-1, 1)  # rounding may go beyond 1

    def _unit_vectors(self, items: Sequence[str] | np.ndarray) -> np.ndarray:
        """Return the embeddings of texts, or vectors scaled to length 1, float32 [items, embedding_size]."""
        if not isinstance(items, np.ndarray) or items.dtype.kind != "f":
            return self.encode(items)
        if items.ndim != 2 or items.shape[1] != self.embedding_size:
            raise ValueError(f"vectors of shape {items.shape}, where those of the encoder are [vectors, "
                             f"{self.embedding_size}]")
        vectors = items.astype("float64")  # in float16 the norm may be inf or 0
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(lengths).all():
            raise ValueError("the vectors contain NaN or Inf")
        lengths[lengths == 0] = 1  # the embedding of an unknown text is zeros
        return (vectors / lengths).astype("float32")

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], *,
                     places: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the embeddings of the first texts and of the second texts, each float32 [pairs, embedding_size].

        The first texts are queries, the second ones documents.

        Args:
            places: where each pair stands, as file:line, for warnings.
        """
        texts = [first for first, _ in pairs] + [second for _, second in pairs]
        input_types = [QUERY] * len(pairs) + [DOCUMENT] * len(pairs)
        embeddings = self.encode(texts, input_type=input_types,
                                 places=None if places is None else [*places, *places])
        return embeddings[: len(pairs)], embeddings[len(pairs) :]

    def stream(self, texts: Sequence[str], *, input_type: str | Sequence[str] = DOCUMENT,
               places: Sequence[str] | None = None, windows: Sequence[range | np.ndarray] | None = None,
               warn: bool = True) -> Iterator[np.ndarray]:
        """Yield the embeddings of texts block by block, float32 [texts of the block, embedding_size].

        Args:
            texts: may be a `TextFile`, of which a window at a time is read.
            input_type: see `encode`.
            places: where each text stands, as file:line, for warnings; see `places_of`.
            windows: the rows of each block, in which batches are formed; None: all rows, WINDOW at a time.
            warn: warn of truncated and unknown texts at the end, and with --strict_data as soon as there is one.

        Raises:
            NotFiniteError: an embedding is not finite.
        """
        check_input_types(input_type, len(texts))
        if windows is None:
            windows = [range(start, min(start + WINDOW, len(texts))) for start in range(0, len(texts), WINDOW)]
        warnings = TextWarnings(self.max_seq_length)
        place_of = places_of(texts, places)
        # A thread tokenizes the next window while the engine computes this one.
        inputs_of_windows = prefetch(self._tokenize_window(texts, rows, input_type) for rows in windows)
        with progress("encoding", sum(map(len, windows)), "texts") as advance:
            for inputs, rows in zip(inputs_of_windows, windows):
                warnings.add(inputs, rows)
                if warn and console.settings.strict_data:
                    warnings.report(place_of)
                yield self.embed(inputs, advance)
        if warn:
            warnings.report(place_of)

    def tokenize(self, texts: Sequence[str], input_type: str | Sequence[str] = DOCUMENT) -> EncoderInput:
        """Return the token ids of texts with their prefixes, cut to `max_seq_length`, and what is lost by that.

        Args:
            input_type: see `encode`.
        """
        return tokenize(self.tokenizer, texts, self.max_seq_length, self.prefixes, input_type)

    def _tokenize_window(self, texts: Sequence[str], rows: range | np.ndarray,
                         input_type: str | Sequence[str]) -> EncoderInput:
        """Return what `tokenize` does of some rows."""
        types_of_rows = input_type if isinstance(input_type, str) else [input_type[row] for row in rows]
        return self.tokenize(_select(texts, rows), types_of_rows)

    def embed(self, inputs: EncoderInput, advance: Callable[[int], Any] = lambda count: None) -> np.ndarray:
        """Return the embeddings of tokenized texts, float32 [texts, embedding_size], L2-normalized.

        A text that is all [UNK] has an embedding of zeros, whose cosine with any other is 0.

        Args:
            advance: is told, for a progress bar, how many texts more are being computed.

        Raises:
            NotFiniteError: an embedding is not finite.
        """
        embeddings = np.empty((len(inputs.ids), self.embedding_size), "float32")
        with self._lock:
            self._compute(inputs, embeddings, advance)
        embeddings[inputs.unknown] = 0
        if not np.isfinite(embeddings).all():
            message = "embeddings contain NaN or Inf; training diverged or the checkpoint is damaged"
            raise NotFiniteError(f"{self.checkpoint.name}: {message}" if self.checkpoint else message)
        return embeddings


    def _compute(self, inputs: EncoderInput, embeddings: np.ndarray, advance: Callable[[int], Any]) -> None:
        """Compute tokenized texts batch by batch, and write what comes of each into its row of `embeddings`."""
        previous = None
        for rows, input_ids, token_type_ids in self._make_batches(inputs.ids, self.tokenizer.pad_token_id):
            started = _StartedBatch(rows, self.engine.embed(input_ids, token_type_ids))
            if previous is not None:  # read after the next one has been started; see `Engine.embed`
                previous.store_in(embeddings)
            previous = started
            advance(len(rows))
        if previous is not None:
            previous.store_in(embeddings)


class _StartedBatch(NamedTuple):
    """A batch that the engine has started to compute.

    Attributes:
        rows: which texts it has.
        result: what `Engine.embed` has returned.
    """

    rows: Sequence[int]
    result: Any

    def store_in(self, embeddings: np.ndarray) -> None:
        """Wait for the batch, and write its embeddings into their rows of `embeddings`."""
        computed = np.asarray(self.result)
        embeddings[self.rows] = computed[: len(self.rows)]  # a `make_batches` may have filled it up with more rows


def check_texts(texts: Sequence[str], name: str = "texts") -> Sequence[str]:
    """Return texts as a sequence whose rows are counted from 0: a list of those of a DataFrame's column or an array.

    Raises:
        InputError: it is no list, such as one text or a whole DataFrame; or it has something else than texts, such as
            the missing value of a column.
    """
    if getattr(texts, "ndim", 1) != 1:
        raise InputError(f"{name}: expected a list of texts or one column, got {type(texts).__name__} of {texts.ndim} "
                         "dimensions")
    if hasattr(texts, "tolist"):
        texts = texts.tolist()
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise InputError(f"{name}: expected a list of texts, got {type(texts).__name__}")
    if isinstance(texts, (list, tuple)):  # others, such as a `TextFile`, have texts only
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"{name}[{row}]: expected a text, got {some_characters(repr(text))}; remove it")
            if not console.is_unicode(text):
                raise InputError(f"{name}[{row}]: not valid Unicode: {ascii(text[:20])}")
    return texts


def check_input_types(input_type: str | Sequence[str], count: int) -> None:
    """Raise InputError if what `Encoder.encode` takes as input_type of so many texts is none."""
    input_types = {input_type} if isinstance(input_type, str) or input_type is None else set(input_type)
    for each in input_types - set(INPUT_TYPES):
        raise InputError(f"input_type: expected {' or '.join(INPUT_TYPES)}, got {each!r}")
    if not isinstance(input_type, str) and len(input_type) != count:
        raise InputError(f"input_type: {len(input_type)} of them for {count} texts")


def _select(texts: Sequence[str], rows: range | np.ndarray) -> Sequence[str]:
    """Return the texts of some rows; only `Documents` and `Passages` take an array of them."""
    return texts[rows.start : rows.stop] if isinstance(rows, range) else texts[rows]
