"""Print what recall.py wrote in tsv, for reading: each query, and below it its documents with their scores.

    python recall.py ... --query 语义检索 | python scripts/print_answers.py

It reads stdin. A long document is cut. It needs nothing but Python.
"""

import os
import sys
from collections.abc import Iterable, Iterator

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from simcse import console

MAX_CHARACTERS = 100  # of a document


def format_answers(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines to print: each query after an empty line, then its documents, best first.

    Args:
        lines: query, document and score, tab-separated; those of a query stand together.
    """
    previous_query = None
    for line in lines:
        query, document, score = line.rstrip("\n").split("\t")
        if query != previous_query:
            yield ""
            yield query
            previous_query = query
        yield f"  {float(score):.3f}  {console.some_characters(document, MAX_CHARACTERS)}"


def main() -> None:
    with open(sys.stdin.fileno(), encoding="utf-8", newline="\n", closefd=False) as answers:
        for line in format_answers(answers):
            console.print_result(line)


if __name__ == "__main__":
    console.run(main)
