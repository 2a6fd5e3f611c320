"""A BEIR or C-MTEB folder (Thakur et al. 2021: corpus.jsonl, queries.jsonl, qrels/*.tsv) in the layout of this project,
with its ids.

    python scripts/from_beir.py scifact --output_dir recall
    python recall.py --corpus_file recall/corpus.csv --query_file recall/queries.csv --format trec ...
    python evaluate.py --qrels recall/qrels.tsv --recall_result_file recall_result_dir/recall_result.txt

Writes corpus.csv (id, title and text), queries.csv (id and text of the queries that the split judges), qrels.tsv (query
id, document id, grade), dev.csv (query and document id, of grades above 0; for `--targets id`), train_unsupervised.csv
(the corpus' texts) and, where there are judgements for training, train.csv (query and text). A run of white space in a
text becomes a blank. What is left out is counted on stderr. It needs no paddle.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from simcse import console, flags
from simcse.console import InputError
from simcse.files import new_file
from simcse.measures import read_judgements

SPLITS = ("test", "dev", "validation")  # looked for in this order


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=flags.folder, help="with corpus.jsonl, queries.jsonl and qrels/")
    parser.add_argument("--output_dir", type=flags.nonempty_text, default="recall", help="made if need be")
    parser.add_argument("--split", default=None,
                        help=f"which file of qrels/ judges; None: the first of {', '.join(SPLITS)} that is there")
    args = parser.parse_args()
    for name in ("corpus.jsonl", "queries.jsonl"):
        if not os.path.isfile(os.path.join(args.folder, name)):
            parser.error(f"argument folder: {args.folder} has no {name}")
    there = [split for split in ([args.split] if args.split else SPLITS) if os.path.isfile(qrels(args, split))]
    if not there:
        parser.error(f"{qrels(args, args.split or SPLITS[0])}: no such file; --split names another")
    args.split = there[0]
    return args


def qrels(args: argparse.Namespace, split: str) -> str:
    return os.path.join(args.folder, "qrels", f"{split}.tsv")


def read_objects(path: str) -> Iterator[tuple[str, str]]:
    """Yield id and text, a title before it, of JSON lines; those without a text are counted and left out. InputError: a
    line is no such object, or an id has white space."""
    empty, count = [], 0
    with open(path, encoding="utf-8") as file, console.reported(path, UnicodeDecodeError):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            count += 1
            try:
                found = json.loads(line)
                id, text = str(found["_id"]), f"{found.get('title') or ''} {found['text'] or ''}"
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f'{path}:{number}: needed: a JSON object with "_id" and "text"') from None
            if len(id.split()) != 1:
                raise InputError(f"{path}:{number}: the id {id!r} is empty, or has white space") from None
            if text := " ".join(text.split()):
                yield id, text
            else:
                empty.append(f"{path}:{number}")
    if empty:
        console.warn(f"{len(empty):,} of {count:,} texts are empty, and left out: {console.some(empty, 3)}")


def write(args: argparse.Namespace, name: str, rows: Iterable[Iterable[str]], what: str) -> None:
    count, path = 0, os.path.join(args.output_dir, name)
    with new_file(path) as file:
        for count, row in enumerate(rows, 1):  # noqa: B007  the last of the numbers
            file.write("\t".join(row) + "\n")
    console.log(f"wrote {path}: {count:,} {what}")


def judged(path: str, queries: dict[str, str], documents: dict[str, str]) -> list[tuple[str, str, int]]:
    """Query id, document id and grade of each judgement of a query and a document that are there."""
    known, lost = [], 0
    for query, grades in read_judgements(path, "qrels").items():
        for document, grade in grades.items():
            if query in queries and document in documents:
                known.append((query, document, grade))
            else:
                lost += 1
    if lost:
        console.warn(f"{path}: {lost:,} judgements are of queries or documents that are not there, and left out")
    if not any(grade > 0 for *_, grade in known):
        raise InputError(f"{path}: judges no document that is there to be relevant")
    return known


def main() -> None:
    args = parse_args()
    documents, queries = (dict(read_objects(os.path.join(args.folder, name)))
                          for name in ("corpus.jsonl", "queries.jsonl"))
    judgements = judged(qrels(args, args.split), queries, documents)
    os.makedirs(args.output_dir, exist_ok=True)
    write(args, "corpus.csv", documents.items(), "documents")
    asked = dict.fromkeys(query for query, *_ in judgements)
    write(args, "queries.csv", ((query, queries[query]) for query in asked), f"queries of {args.split}")
    write(args, "qrels.tsv", ((query, document, str(grade)) for query, document, grade in judgements), "judgements")
    write(args, "dev.csv", ((queries[query], document) for query, document, grade in judgements if grade > 0),
          "queries and ids of relevant documents")
    write(args, "train_unsupervised.csv", ([text] for text in documents.values()), "texts")
    if args.split != "train" and os.path.isfile(path := qrels(args, "train")):
        with contextlib.suppress(InputError):
            pairs = [(queries[query], documents[document])
                     for query, document, grade in judged(path, queries, documents) if grade > 0]
            write(args, "train.csv", pairs, "queries and texts of relevant documents, of train")


if __name__ == "__main__":
    console.run(main)
