"""Make training pairs of query and document from documents alone, without labels.

    python scripts/make_pairs.py --corpus_file recall/corpus.csv --output_file pairs.csv
    python train.py --init_from_ckpt ... --train_set_file pairs.csv

Writes query and document, tab-separated. The pairs of a document stand together; train.py shuffles them. Duplicate
texts are used once. The same seed gives the same file, whatever the number of workers. It needs neither paddle nor a
checkpoint.
"""

import argparse
import functools
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from simcse import console, flags
from simcse.files import check_not_input, check_writable, name_output, new_file
from simcse.index.documents import Documents
from simcse.machine import CPU_CORES
from simcse.text import word_file
from simcse.text.formats import CORPUS_COLUMNS
from simcse.text.textfile import Corpus
from simcse.text.tokens import WINDOW
from simcse.text.word_file import WordFile
from simcse.text.words import load_dictionary, split_words
from simcse.training import pairs
from simcse.training.pairs import KINDS, Document, Pair, Statistics
from simcse.workers import map_in_order

import numpy as np

Result = TypeVar("Result")
BLOCK_DOCUMENTS = 256  # that a worker takes at a time


def kind_list(text: str) -> list[str]:
    """Return the kinds that a flag names, with commas between them, in the order of KINDS."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in KINDS:
            raise argparse.ArgumentTypeError(f"expected a comma-separated list of {', '.join(KINDS)}; got {name!r}")
    return [kind for kind in KINDS if kind in names]


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("files").add_argument
    add("--corpus_file", type=flags.readable_file, required=True,
        help="documents: a text a line, or an id, a tab and a text")
    add("--output_file", type=flags.nonempty_text, required=True,
        help="query and document, tab-separated, for train.py --train_set_file")
    add("--query_file", type=flags.readable_file, help="queries of users, one a line, or an id, a tab and a query; the "
        "queries that are made get lengths like theirs where possible")
    add("--corpus_columns", type=int, choices=CORPUS_COLUMNS,
        help="1: a text a line; 2: an id, a tab and the text (default: as most lines of --corpus_file)")
    flags.add_data_arguments(parser.add_argument_group("reading"))
    add = parser.add_argument_group("pairs").add_argument
    add("--pairs_per_document", type=flags.positive_int, metavar="N", default=10, help="most pairs of a document")
    descriptions = "; ".join(f"{name}: {kind.description}" for name, kind in KINDS.items())
    add("--kinds", type=kind_list, default=",".join(KINDS), help="comma-separated kinds of queries. Each gets the "
        "same share of --pairs_per_document; a later one makes up for what an earlier one cannot make of a "
        f"document. {descriptions}")
    add("--seed", type=flags.non_negative_int, default=1000, help="random seed")
    parser.add_argument_group("device").add_argument(
        "--workers", type=flags.positive_int, default=CPU_CORES, help="processes")
    args = parser.parse_args()
    check_writable(args.output_file, "--output_file")
    check_not_input(args.output_file, "--output_file", {
        "--corpus_file": args.corpus_file, "--query_file": args.query_file})
    return args


class Tally:
    """Count documents, and keep the numbers of the first ones.

    Attributes:
        count: how many there are.
        first: the numbers of up to FIRST of them.
    """

    FIRST = 3

    def __init__(self) -> None:
        self.count = 0
        self.first: list[int] = []

    def add(self, document: int) -> None:
        self.count += 1
        if len(self.first) < self.FIRST:
            self.first.append(document)

    def merge(self, later: "Tally") -> None:
        """Add a tally of documents that come after these."""
        self.count += later.count
        self.first = (self.first + later.first)[: self.FIRST]


class PairReport:
    """Count what was made of which documents.

    Attributes:
        pairs: how many pairs there are of each kind.
        without: for each kind the documents that were to give pairs of it, and gave none.
        empty: the documents that gave no pair of any kind.
    """

    def __init__(self) -> None:
        self.pairs: Counter[str] = Counter()
        self.without: defaultdict[str, Tally] = defaultdict(Tally)
        self.empty = Tally()

    def add(self, document: int, pairs_of_kind: Mapping[str, Sequence[Pair]]) -> None:
        """Count what `make_document_pairs` has made of a document, given by its number."""
        for kind, pairs_of_one_kind in pairs_of_kind.items():
            self.pairs[kind] += len(pairs_of_one_kind)
            if not pairs_of_one_kind:
                self.without[kind].add(document)
        if not any(pairs_of_kind.values()):
            self.empty.add(document)

    def merge(self, later: "PairReport") -> None:
        """Add the counts of documents that come after these."""
        self.pairs.update(later.pairs)
        for kind, tally in later.without.items():
            self.without[kind].merge(tally)
        self.empty.merge(later.empty)


class PairBlock(NamedTuple):
    """The pairs of some documents.

    Attributes:
        lines: those to write.
        report: what was made of which documents.
    """

    lines: list[str]
    report: PairReport


def map_blocks(function: Callable[[range], Result], documents: Documents, workers: int, work: str) -> Iterator[Result]:
    """Yield what a function returns for each block of documents, in their order, and show how far it is.

    Args:
        function: computes a block, given by the numbers of its documents.
        documents: all of them.
        workers: processes.
        work: a participle, for the progress.
    """
    starts = range(0, len(documents), BLOCK_DOCUMENTS)
    blocks = [range(start, min(start + BLOCK_DOCUMENTS, len(documents))) for start in starts]
    results = map_in_order(function, blocks, min(workers, len(blocks)))
    with console.progress(work, len(documents), "documents") as advance:
        for result, block in zip(results, blocks):
            yield result
            advance(len(block))


def read_query_lengths(args: argparse.Namespace) -> np.ndarray | None:
    """Return the lengths of the queries of --query_file, of a sample where there are many; None without the flag."""
    if not args.query_file:
        return None
    queries = Corpus(args.query_file, "--query_file")
    return np.array([pairs.query_length(query) for _, query in queries.sample_rows(WINDOW)])


class WordBlock(NamedTuple):
    """The words of some documents.

    Attributes:
        words: for `WordFile.append`.
        document_frequency: for each word, how many of these documents have it.
    """

    words: str
    document_frequency: Counter[str]


def tokenize_block(block: range, documents: Documents) -> WordBlock:
    """Return the words of a block of documents."""
    words_of_documents = [split_words(text) for text in documents[block.start : block.stop]]
    return WordBlock(word_file.encode(words_of_documents), pairs.count_documents(words_of_documents))


def tokenize_documents(args: argparse.Namespace, documents: Documents, words: WordFile) -> Counter[str]:
    """Write the words of all documents to `words`: the first pass. Return for each word how many documents have it."""
    document_frequency: Counter[str] = Counter()
    load_dictionary()  # the workers inherit it
    tokenize = functools.partial(tokenize_block, documents=documents)
    for block in map_blocks(tokenize, documents, args.workers, "splitting into words"):
        with name_output(args.output_file, "--output_file"):  # the words are in its folder
            words.append(block.words)
        document_frequency.update(block.document_frequency)
    with name_output(args.output_file, "--output_file"):
        words.flush()
    return document_frequency


def read_documents(block: range, documents: Documents, words: WordFile | None) -> list[Document]:
    """Return the documents of a block, with their words where there are any."""
    texts = documents[block.start : block.stop]
    if words is None:
        return [Document(text) for text in texts]
    words_of_documents = words.read(block.start // BLOCK_DOCUMENTS)
    return [Document(text, words_of_text) for text, words_of_text in zip(texts, words_of_documents)]


def make_block_pairs(block: range, args: argparse.Namespace, documents: Documents, words: WordFile | None,
                     statistics: Statistics) -> PairBlock:
    """Return the pairs of a block of documents.

    Each document has random numbers of its own, so that the pairs of a block do not depend on the others.
    """
    lines = []
    report = PairReport()
    for number, document in zip(block, read_documents(block, documents, words)):
        random = np.random.default_rng([args.seed, number])
        pairs_of_kind = pairs.make_document_pairs(document, args.kinds, args.pairs_per_document, random, statistics)
        report.add(number, pairs_of_kind)
        for pairs_of_one_kind in pairs_of_kind.values():
            lines += [f"{query}\t{title}\n" for query, title in pairs_of_one_kind]
    return PairBlock(lines, report)


def write_pairs(args: argparse.Namespace, documents: Documents, words: WordFile | None,
                statistics: Statistics) -> PairReport:
    """Write the pairs of all documents: the second pass.

    Raises:
        InputError: no document gives a pair; nothing is written.
    """
    make_pairs = functools.partial(make_block_pairs, args=args, documents=documents, words=words,
                                   statistics=statistics)
    report = PairReport()
    with new_file(args.output_file, flag="--output_file") as file:
        for block in map_blocks(make_pairs, documents, args.workers, "making pairs"):
            file.writelines(block.lines)
            report.merge(block.report)
        if not report.pairs.total():
            raise console.InputError(f"--corpus_file {args.corpus_file}: its texts are too short for --kinds "
                                     f"{','.join(args.kinds)}; not one gives a pair")
    return report


def describe(args: argparse.Namespace, documents: Documents, report: PairReport) -> str:
    """Return one line about what was made of which documents."""
    of_each_kind = ", ".join(f"{report.pairs[kind]:,} {kind}" for kind in args.kinds)
    parts = [f"wrote {args.output_file}: {console.count(report.pairs.total(), 'pair')} of "
             f"{console.count(len(documents) - report.empty.count, 'document')}, {of_each_kind}"]
    for kind, tally in report.without.items():
        places = ", ".join(documents.place(document) for document in tally.first)
        parts.append(f"{console.count(tally.count, 'document')} gave no {kind} pairs ({places})")
    if report.empty.count:
        places = ", ".join(documents.place(document) for document in report.empty.first)
        parts.append(f"{console.count(report.empty.count, 'document')} without any pair ({places})")
    copies = documents.copies()
    if len(copies):
        places = ", ".join(documents.corpus.place(row) for row in copies[:3])
        parts.append(f"{len(copies):,} {'copy' if len(copies) == 1 else 'copies'} of an earlier document ({places})")
    blank = documents.corpus.blank_or_skipped()
    if len(blank):
        places = ", ".join(f"{args.corpus_file}:{line}" for line in blank[:3])
        parts.append(f"{console.count(len(blank), 'line')} blank or skipped ({places})")
    return "; ".join(parts)


def make_corpus_pairs(args: argparse.Namespace, documents: Documents) -> PairReport:
    """Write the pairs of all documents, and keep their words meanwhile in a temporary file beside --output_file."""
    query_lengths = read_query_lengths(args)
    if not any(KINDS[kind].needs_words for kind in args.kinds):
        return write_pairs(args, documents, None, Statistics(len(documents), Counter(), query_lengths))
    with tempfile.TemporaryFile(dir=make_disk_folder(args.output_file)) as file:
        words = WordFile(file)
        document_frequency = tokenize_documents(args, documents, words)
        return write_pairs(args, documents, words, Statistics(len(documents), document_frequency, query_lengths))


def make_disk_folder(output_file: str) -> str | None:
    """Return the folder of a regular output file, which has room for its words; None for a device or a named pipe.

    The folder is made if it does not exist.
    """
    if os.path.exists(output_file) and not os.path.isfile(output_file):
        return None
    folder = os.path.dirname(os.path.realpath(output_file))
    with name_output(output_file, "--output_file"):
        os.makedirs(folder, exist_ok=True)
    return folder


def main() -> None:
    args = parse_args()
    documents = Documents(Corpus(args.corpus_file, "--corpus_file", args.corpus_columns))
    report = make_corpus_pairs(args, documents)
    console.log(describe(args, documents, report))


if __name__ == "__main__":
    console.run(main)
