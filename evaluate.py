"""Recall@1/5/10/20/50 of a recall result.

    python evaluate.py --similar_text_pair recall/dev.csv --recall_result_file recall_result_dir/recall_result.txt

A query counts as hit at k if any of its targets is among its first k documents. Prints `recall@k=...` in percent and
appends the figures, tab-separated, as a row to result.tsv. Needs neither paddle nor paddlenlp.
"""

import argparse
from collections import Counter

import numpy as np

import cli
import console
import data
from ann_util import recall_at


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--similar_text_pair", type=cli.readable_file, default="recall/dev.csv",
                        help="query and target, tab-separated, a pair a line; a query may stand on several lines")
    parser.add_argument("--recall_result_file", type=cli.readable_file,
                        default="./recall_result_dir/recall_result.txt",
                        help="what recall.py wrote: query, document, cosine, best first")
    parser.add_argument("--recall_num", type=cli.positive_int, default=50,
                        help="documents looked at for each query; those below are ignored")
    cli.add_strict_argument(parser)
    return parser.parse_args()


def first_ranks(args: argparse.Namespace) -> np.ndarray:
    """The rank, from 0, at which each distinct query's first target was recalled; infinite where it was not."""
    targets: dict[str, set[str]] = {}
    for query, target in data.read_text_pairs(args.similar_text_pair, "--similar_text_pair", args.strict_data):
        targets.setdefault(query, set()).add(target)
    seen: Counter[str] = Counter()
    ranks = dict.fromkeys(targets, np.inf)
    unknown = 0
    for query, document, _ in data.read_rows(args.recall_result_file, 3, "--recall_result_file", args.strict_data):
        if query not in targets:
            unknown += 1
            continue
        rank = seen[query]
        seen[query] += 1
        # A query that recall.py wrote twice stands there twice: the second time its ranks are past recall_num.
        if rank < args.recall_num and document in targets[query]:
            ranks[query] = min(ranks[query], rank)
    report(args, [query for query in targets if query not in seen], unknown, max(seen.values(), default=0))
    return np.array(list(ranks.values()))


def report(args: argparse.Namespace, missing: list[str], unknown: int, most: int) -> None:
    """Say on stderr what makes the figures other than they seem."""
    if missing:
        console.log(f"{len(missing)} queries have no line in {args.recall_result_file} and count as missed: "
                    + ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else ""))
    if unknown:
        console.log(f"{unknown} lines of {args.recall_result_file} belong to no query of {args.similar_text_pair}")
    if (depth := min(args.recall_num, most)) < max(data.RECALL_KS):
        console.log(f"only {depth} documents a query were looked at: recall@k is recall@{depth} for every larger k")


def main() -> None:
    args = parse_args()
    recall = recall_at(first_ranks(args), data.RECALL_KS)
    for k, value in recall.items():
        print(f"recall@{k}={value}")
    with open("result.tsv", "a", encoding="utf-8") as file:
        file.write("\t".join(map(str, recall.values())) + "\n")


if __name__ == "__main__":
    console.run(main)
