"""Compare an int8 graph with the network on the texts that it is about to encode, and remember the results.

How near int8 comes to fp32 depends on the texts: calibrated with English texts, a graph has a cosine of 0.9995 on other
English texts and of 0.5 on Chinese ones. So it is compared on a sample of everything that it encodes.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from simcse import console
from simcse.console import InputError, log
from simcse.encoder.encoder import Encoder
from simcse.files import file_digest, new_file, read_json
from simcse.machine import RANK

import numpy as np

CALIBRATION_ROWS = 256  # every second of them calibrates
FEWEST_ROWS = 32  # with fewer the ranges of activations are a guess
SAMPLE_ROWS = 64  # most rows of a file on which int8 is compared with fp32
MIN_MEAN_COSINE = 0.98  # mean cosine of int8 to float32: below, results are no longer those of the checkpoint
MIN_TEXT_COSINE = 0.9  # of a single text: below it there is a warning
COMPARISONS_FILE = "int8_comparisons.json"  # beside the graph
MOST_REMEMBERED = 100  # comparisons, the latest


class TextSource(NamedTuple):
    """Texts that are going to be encoded.

    Attributes:
        name: the file that they are of, or the flag that gives them.
        rows: texts, or rows of several texts.
    """

    name: str
    rows: Sequence[Any]


class Calibration(NamedTuple):
    """The texts that an int8 graph is calibrated with.

    Attributes:
        source: where they are from.
        texts: those that are used.
    """

    source: TextSource
    texts: list[str]

    def as_record(self) -> dict[str, Any]:
        """Return what is recorded of them: the name of the file, its SHA-256, and how many texts were used."""
        path = self.source.name
        digest = file_digest(path) if os.path.isfile(path) else None
        return {"file": os.path.basename(path), "sha256": digest, "texts": len(self.texts)}


class Comparison(NamedTuple):
    """How near int8 comes to fp32 on a sample of texts.

    Attributes:
        texts: how many were compared; texts that are all [UNK] are not.
        mean, lowest: cosine of the two embeddings of a text.
    """

    texts: int
    mean: float
    lowest: float

    def describe(self, name: str) -> str:
        """Return the comparison in words; `name` is that of the source."""
        if not self.texts:
            return f"{name} has no text that the encoder knows"
        return (f"cosine to fp32 on {console.count(self.texts, 'text')} of {name}: {self.mean:.4f} on the mean, "
                f"{self.lowest:.4f} at lowest")


Comparisons = dict[str, Comparison]  # by `sample_key`


# ----------------------------------------------------------------------------------------------------------- the texts
def choose_calibration(source: TextSource, params_path: str) -> Calibration:
    """Return what int8 is calibrated with: rows from all over a source, even ones only; see `pick_sample`.

    Args:
        params_path: the checkpoint, for the message.

    Raises:
        InputError: the source has too few rows.
    """
    rows = source.rows
    if len(rows) < FEWEST_ROWS:
        texts_are = f"{console.count(len(rows), 'text')} {console.verb(len(rows), 'are')}"
        raise InputError(f"--precision int8: {params_path} has no int8 graph beside it yet, and {texts_are} too few to "
                         "make it with; name a file of a hundred or more by --calibration_file")
    step = math.ceil(len(rows) / CALIBRATION_ROWS)
    return Calibration(source, _flatten(rows[:: 2 * step]))


def pick_sample(rows: Sequence[Any]) -> list[str]:
    """Return the texts of at most SAMPLE_ROWS rows at even distances; of a long source odd rows only.

    So a graph is not compared on the texts that it was calibrated with, unless there are no more than SAMPLE_ROWS.
    """
    if len(rows) <= SAMPLE_ROWS:
        return _flatten(rows[:])
    odd_rows = len(rows) // 2
    step = 2 * math.ceil(odd_rows / SAMPLE_ROWS)
    return _flatten(rows[1::step])


def _flatten(rows: Sequence[Any]) -> list[str]:
    """Return the texts of rows that are texts or sequences of texts."""
    texts = []
    for row in rows:
        texts += [row] if isinstance(row, str) else row
    return texts


def sample_key(texts: Sequence[str], encoder: Encoder) -> str:
    """Return a digest of what a comparison depends on, besides the graph. Texts are compared as documents."""
    prefix = [encoder.prefixes.document] if encoder.prefixes.document else []
    return hashlib.sha256(json.dumps([encoder.max_seq_length, *prefix, *texts]).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------ the comparison
def check_int8(int8: Encoder, load_network: Callable[[], Encoder], sources: Sequence[TextSource], *,
               calibration: Mapping[str, Any], known: Comparisons) -> Comparisons:
    """Compare int8 with fp32 on a sample of each source, and log the results.

    Args:
        int8: the encoder with the graph.
        load_network: returns the encoder with the network; it is called only if there is something to compare.
        sources: what is going to be encoded.
        calibration: what the graph records of its calibration; see `Calibration.as_record`.
        known: comparisons of this graph that need not be made again.

    Returns:
        The comparisons of all sources, in their order.

    Raises:
        InputError: the mean cosine of a source is below MIN_MEAN_COSINE.
    """
    network = None
    comparisons: Comparisons = {}
    calibrated = describe_calibration(calibration)
    descriptions = []
    for source in sources:
        texts = pick_sample(source.rows)
        key = sample_key(texts, int8)
        if not texts or key in comparisons:
            continue
        comparison = known.get(key)
        if comparison is None:
            network = network or load_network()
            comparison = compare(int8, network, texts)
        description = comparison.describe(source.name)
        if not comparison.mean >= MIN_MEAN_COSINE:
            raise InputError(f"--precision int8: {description}; the mean is below {MIN_MEAN_COSINE}; the graph was "
                             f"{calibrated}: calibrate it with texts like these (--calibration_file makes it again), "
                             "or use --precision bf16 or fp32")
        if comparison.lowest < MIN_TEXT_COSINE and not RANK:
            console.warn(f"--precision int8: {description}; the graph was {calibrated}, which some of these are unlike")
        comparisons[key] = comparison
        descriptions.append(description)
    if not RANK:
        log("; ".join([f"int8 graph {calibrated}", *descriptions]))
    return comparisons


def describe_calibration(record: Mapping[str, Any]) -> str:
    """Return in words what `Calibration.as_record` has returned."""
    return f"calibrated with {console.count(record['texts'], 'text')} of {record['file']}"


def compare(int8: Encoder, network: Encoder, texts: Sequence[str]) -> Comparison:
    """Return how near the embeddings of two encoders are. Texts that are all [UNK] have none, and do not count."""
    inputs = int8.tokenize(texts)
    cosines = (int8.embed(inputs) * network.embed(inputs)).sum(axis=1)
    cosines = np.delete(cosines, inputs.unknown)
    if not len(cosines):
        return Comparison(texts=0, mean=1.0, lowest=1.0)
    return Comparison(len(cosines), float(cosines.mean()), float(cosines.min()))


# ---------------------------------------------------------------------------------------------- remembered comparisons
def read_comparisons(folder: str) -> Comparisons:
    """Return the comparisons that are remembered beside a graph; {}: none, or the file is damaged."""
    try:
        content = read_json(os.path.join(folder, COMPARISONS_FILE))
        return {key: Comparison(**fields) for key, fields in content.items()}
    except (OSError, TypeError, InputError):
        return {}


def remember_comparisons(folder: str, comparisons: Comparisons) -> None:
    """Add comparisons to those beside a graph; in a folder that cannot be written they are made again next time."""
    known = read_comparisons(folder)
    if RANK or comparisons.keys() <= known.keys():
        return
    latest = list({**known, **comparisons}.items())[-MOST_REMEMBERED:]
    content = {key: comparison._asdict() for key, comparison in latest}
    with contextlib.suppress(OSError), new_file(os.path.join(folder, COMPARISONS_FILE)) as file:
        json.dump(content, file, ensure_ascii=False, indent=2)
