"""Sample a corpus for scripts/quickstart.sh: write texts to train on and queries to search for.

    python scripts/sample_texts.py --corpus_file my_texts.txt --texts_file texts.txt \\
        --whitening_file whitening.txt --query_file queries.txt

The texts are distinct documents without their ids, the queries clauses of documents. Both are taken at even distances
in the corpus, so that the same corpus always gives the same files. It needs neither paddle nor a checkpoint. Prints

- documents=N: texts to train on;
- whitening_texts=N: texts to whiten on;
- tokens=N: an estimate of the tokens that nine tenths of the texts do not exceed;
- can_make_pairs=yes or no: whether scripts/make_pairs.py can take a query out of one of the texts.
"""

import argparse
import os
import sys
from collections.abc import Sequence

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from simcse import console, flags
from simcse.files import check_not_input, check_writable, new_file
from simcse.index.documents import Documents
from simcse.text.textfile import Corpus, distinct
from simcse.training.pairs import MIN_UNITS, UNIT, can_make_pairs, clauses_of, count_units

import numpy as np

QUERY_MAX_UNITS = 30  # Chinese characters, or words of another script, of a query: what one reads at a glance
ADD_CLAUSES_BELOW = 1000  # texts
QUANTILE = 0.9  # of the lengths
SPECIAL_TOKENS = 2  # [CLS] and [SEP]


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("files").add_argument
    add("--corpus_file", type=flags.readable_file, required=True,
        help="documents: a text a line, or an id, a tab and a text")
    add("--texts_file", type=flags.nonempty_text, required=True, help="texts to train on, one a line")
    add("--whitening_file", type=flags.nonempty_text, required=True,
        help=f"texts to whiten on: the same, and their clauses if there are fewer than {ADD_CLAUSES_BELOW:,}")
    add("--query_file", type=flags.nonempty_text, required=True, help="queries, one a line")
    add = parser.add_argument_group("sample").add_argument
    add("--max_texts", type=flags.positive_int, default=240000, help="most texts to write")
    add("--query", action="append", type=flags.given_text, default=[],
        help="a query, instead of clauses of documents; may be given several times")
    add("--queries", type=flags.positive_int, default=3, help="most queries to take out of documents")
    args = parser.parse_args()
    for flag in ("--texts_file", "--whitening_file", "--query_file"):
        path = getattr(args, flag[2:])
        check_writable(path, flag)
        check_not_input(path, flag, {"--corpus_file": args.corpus_file})
    return args


def sample_documents(documents: Documents, count: int) -> list[str]:
    """Return the texts of up to `count` documents at even distances, in the order of the corpus."""
    rows = np.linspace(0, len(documents) - 1, min(count, len(documents))).astype(int)
    return documents[rows]


def split_clauses(text: str) -> list[str]:
    """Return the clauses of a text that are not blank."""
    clauses = [text[span.begin : span.end].strip() for span in clauses_of(text)]
    return [clause for clause in clauses if clause]


def choose_whitening_texts(texts: Sequence[str]) -> list[str]:
    """Return the texts to whiten on.

    Few documents give too few embeddings for a covariance, so their clauses are added.
    """
    if len(texts) >= ADD_CLAUSES_BELOW:
        return list(texts)
    clauses = [clause for text in texts for clause in split_clauses(text)]
    return distinct([*texts, *clauses])


def cut_after_units(text: str, count: int) -> str:
    """Return the beginning of a text up to its Chinese character or word number `count`."""
    units = list(UNIT.finditer(text))
    if len(units) <= count:
        return text
    return text[: units[count - 1].end()]


def choose_query(text: str) -> str:
    """Return the longest clause of a text that can be read at a glance, or the text's beginning if there is none."""
    readable = [clause for clause in split_clauses(text) if MIN_UNITS <= count_units(clause) <= QUERY_MAX_UNITS]
    if not readable:
        return cut_after_units(text, QUERY_MAX_UNITS).strip()
    return max(readable, key=count_units)


def draw_queries(texts: Sequence[str], count: int) -> list[str]:
    """Return up to `count` different queries, each of the text in the middle of a part of the sequence."""
    middles = (np.arange(count) + 0.5) * len(texts) / count
    return distinct(choose_query(texts[int(middle)]) for middle in middles)


def estimate_tokens(texts: Sequence[str]) -> int:
    """Return the number of tokens that nine tenths of the texts do not exceed, by their characters and words."""
    units = [count_units(text) for text in texts]
    return int(np.quantile(units, QUANTILE)) + SPECIAL_TOKENS


def write_lines(path: str, lines: Sequence[str], flag: str) -> None:
    with new_file(path, flag=flag) as file:
        file.writelines(f"{line}\n" for line in lines)


def main() -> None:
    args = parse_args()
    documents = Documents(Corpus(args.corpus_file, "--corpus_file"))
    texts = sample_documents(documents, args.max_texts)
    whitening_texts = choose_whitening_texts(texts)
    queries = args.query or draw_queries(texts, args.queries)
    write_lines(args.texts_file, texts, "--texts_file")
    write_lines(args.whitening_file, whitening_texts, "--whitening_file")
    write_lines(args.query_file, queries, "--query_file")
    console.print_result(f"documents={len(texts)}")
    console.print_result(f"whitening_texts={len(whitening_texts)}")
    console.print_result(f"tokens={estimate_tokens(texts)}")
    console.print_result(f"can_make_pairs={'yes' if any(map(can_make_pairs, texts)) else 'no'}")


if __name__ == "__main__":
    console.run(main)
