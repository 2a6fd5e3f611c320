"""Convert a BEIR or C-MTEB folder to the files of this project, with its ids.

    python scripts/from_beir.py scifact --output_dir recall
    python recall.py --corpus_file recall/corpus.csv --query_file recall/queries.csv --format trec ...
    python evaluate.py --qrels recall/qrels.tsv --recall_result_file recall_result_dir/recall_result.txt

The folder (Thakur et al. 2021) has corpus.jsonl, queries.jsonl and qrels/*.tsv. Writes

- corpus.csv: id, and title and text, of every document;
- queries.csv: id and text of the queries that the split judges;
- qrels.tsv: query id, document id, grade;
- dev.csv: query and document id, of grades above 0, for `--targets id`;
- train_unsupervised.csv: the texts of the corpus;
- train.csv: query and text, where there are judgements for training; otherwise one of an earlier data set is removed.

A run of white space in a text becomes a blank. What is left out is counted on stderr. It needs no paddle.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from simcse import console, flags
from simcse.console import InputError
from simcse.files import check_not_input, check_writable, name_output, new_file
from simcse.measures import read_judgements

OUTPUTS = ("corpus.csv", "queries.csv", "qrels.tsv", "dev.csv", "train_unsupervised.csv", "train.csv")
SPLITS = ("test", "dev", "validation")  # without --split the first one that exists


class Judgement(NamedTuple):
    """How relevant a document is for a query: not at all (0 or less), or the more the higher the grade is."""

    query_id: str
    document_id: str
    grade: int


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=flags.folder, help="with corpus.jsonl, queries.jsonl and qrels/")
    parser.add_argument("--output_dir", type=flags.nonempty_text, default="recall",
                        help="folder to write to, made if it does not exist")
    parser.add_argument("--split", help="name of the file in qrels/ that judges, without .tsv (default: the first of "
                        f"{', '.join(SPLITS)} that exists)")
    args = parser.parse_args()
    for name in ("corpus.jsonl", "queries.jsonl"):
        if not os.path.isfile(os.path.join(args.folder, name)):
            parser.error(f"argument folder: {args.folder} has no {name}")
    args.split = find_split(parser, args)
    return args


def find_split(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """Return --split, or the first of SPLITS that exists."""
    splits = [args.split] if args.split else SPLITS
    for split in splits:
        if os.path.isfile(qrels_path(args, split)):
            return split
    parser.error(f"{qrels_path(args, splits[0])}: no such file; --split names another")


def qrels_path(args: argparse.Namespace, split: str) -> str:
    """Return the path of the judgements of a split."""
    return os.path.join(args.folder, "qrels", f"{split}.tsv")


def read_texts(path: str) -> dict[str, str]:
    """Return the texts of a file of JSON lines by id, a title before its text.

    Objects without a text, and those with the id of an earlier one, are left out, with a warning.

    Raises:
        InputError: a line is no such object, or an id has white space.
    """
    texts = {}
    empty = []
    duplicates = []
    count = 0
    with open(path, encoding="utf-8-sig") as file, console.as_input_error(path, UnicodeDecodeError):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            count += 1
            place = f"{path}:{number}"
            id, text = parse_object(line, place)
            if id in texts:
                duplicates.append(place)
            elif text:
                texts[id] = text
            else:
                empty.append(place)
    if duplicates:
        console.warn(f"{console.part(len(duplicates), count, 'id', 'repeat')} an earlier id; left out: "
                     f"{console.some(duplicates, 3)}")
    if empty:
        console.warn(f"{console.part(len(empty), count, 'text', 'are')} empty; left out: {console.some(empty, 3)}")
    return texts


def parse_object(line: str, place: str) -> tuple[str, str]:
    """Return the id and the text of a JSON object, the text with its title before it."""
    try:
        content = json.loads(line)
        if not isinstance(content["_id"], (str, int)):
            raise TypeError
        if not isinstance(content["text"], (str, type(None))):
            raise TypeError
        id = str(content["_id"])
        words = f"{content.get('title') or ''} {content['text'] or ''}".split()
        " ".join([id, *words]).encode()  # a half of a surrogate pair is a ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f'{place}: expected a JSON object with "_id" and "text", of valid Unicode') from None
    if id.split() != [id]:
        raise InputError(f"{place}: the id {id!r} is empty, or has white space")
    return id, " ".join(words)


def read_split(path: str) -> list[Judgement]:
    """Return all judgements of a split."""
    judgements = []
    for query, grades in read_judgements(path, "qrels").items():
        for document, grade in grades.items():
            judgements.append(Judgement(query, document, grade))
    return judgements


def select_known(judgements: Sequence[Judgement], queries: dict[str, str], documents: dict[str, str], path: str,
                 consequence: str) -> list[Judgement]:
    """Return the judgements of queries and documents that exist, and warn of the others.

    Args:
        path: the file of the judgements, for the warning.
        consequence: what becomes of the others, for the warning.
    """
    known = []
    for judgement in judgements:
        if judgement.query_id in queries and judgement.document_id in documents:
            known.append(judgement)
    unknown = len(judgements) - len(known)
    if unknown:
        console.warn(f"{path}: {console.part(unknown, len(judgements), 'judgement', 'are')} of queries or documents "
                     f"not in queries.jsonl or corpus.jsonl; {consequence}")
    return known


def write_rows(args: argparse.Namespace, name: str, rows: Iterable[Iterable[str]], noun: str,
               detail: str = "") -> None:
    """Write tab-separated rows to a file of the output folder, and log how many there are.

    Args:
        noun: what a row is, in the singular.
        detail: the rest of the line.
    """
    path = os.path.join(args.output_dir, name)
    count = 0
    with new_file(path, flag="--output_dir") as file:
        for row in rows:
            file.write("\t".join(row) + "\n")
            count += 1
    console.log(f"wrote {path}: {console.count(count, noun)}{detail}")


def select_relevant(args: argparse.Namespace, judgements: Sequence[Judgement], queries: dict[str, str],
                    documents: dict[str, str]) -> list[tuple[str, str]]:
    """Return the text of the query and the id of the document of each judgement of --split with a grade above 0.

    Raises:
        InputError: no judgement of a query and a document that exist has a grade above 0.
    """
    path = qrels_path(args, args.split)
    known = select_known(judgements, queries, documents, path,
                         "they stay in qrels.tsv, and what they judge relevant counts as missed")
    relevant = [(queries[query], document) for query, document, grade in known if grade > 0]
    if not relevant:
        raise InputError(f"{path}: no existing document is judged relevant")
    return relevant


def write_split(args: argparse.Namespace, judgements: Sequence[Judgement], relevant: Sequence[tuple[str, str]],
                queries: dict[str, str]) -> None:
    """Write the files of the queries that --split judges.

    The judgements stay as they came, so that measures by them are those of the set.

    Args:
        judgements: all of the split.
        relevant: what `select_relevant` returns.
        queries: texts by id.
    """
    judged = dict.fromkeys(judgement.query_id for judgement in judgements if judgement.query_id in queries)
    judged_queries = [(id, queries[id]) for id in judged]
    judgement_rows = [(query, document, str(grade)) for query, document, grade in judgements]
    write_rows(args, "queries.csv", judged_queries, "query", f" of {args.split}")
    write_rows(args, "qrels.tsv", judgement_rows, "judgement")
    write_rows(args, "dev.csv", relevant, "pair", " of query and id of a relevant document")


def read_training_pairs(args: argparse.Namespace, queries: dict[str, str],
                        documents: dict[str, str]) -> list[tuple[str, str]]:
    """Return the pairs of the split "train"; []: it is missing, or is the split that --split judges."""
    path = qrels_path(args, "train")
    if args.split == "train" or not os.path.isfile(path):
        return []
    known = select_known(read_split(path), queries, documents, path, "left out of train.csv")
    return [(queries[query], documents[document]) for query, document, grade in known if grade > 0]


def write_training_pairs(args: argparse.Namespace, pairs: Sequence[tuple[str, str]]) -> None:
    """Write train.csv; where there are no pairs, remove that of an earlier set, with a warning."""
    if pairs:
        write_rows(args, "train.csv", pairs, "pair", " of query and text of a relevant document, of train")
        return
    path = os.path.join(args.output_dir, "train.csv")
    if os.path.isfile(path):
        with name_output(path, "--output_dir"):
            os.remove(path)
        console.warn(f"no {path} was written, so that of an earlier data set was removed")


def check_outputs(args: argparse.Namespace) -> None:
    """Raise InputError, before any work, where a file cannot be written or is one of those to read."""
    inputs = [os.path.join(args.folder, name) for name in ("corpus.jsonl", "queries.jsonl")]
    inputs += [qrels_path(args, split) for split in (args.split, "train")]
    for name in OUTPUTS:
        path = os.path.join(args.output_dir, name)
        check_writable(path, "--output_dir")
        check_not_input(path, "--output_dir", {"folder": inputs})


def main() -> None:
    args = parse_args()
    check_outputs(args)
    documents = read_texts(os.path.join(args.folder, "corpus.jsonl"))
    queries = read_texts(os.path.join(args.folder, "queries.jsonl"))
    judgements = read_split(qrels_path(args, args.split))
    relevant = select_relevant(args, judgements, queries, documents)
    training_pairs = read_training_pairs(args, queries, documents)
    write_rows(args, "corpus.csv", documents.items(), "document")
    write_split(args, judgements, relevant, queries)
    write_rows(args, "train_unsupervised.csv", ([text] for text in documents.values()), "text")
    write_training_pairs(args, training_pairs)


if __name__ == "__main__":
    console.run(main)
