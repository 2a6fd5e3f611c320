"""Hard negatives for supervised training, out of what was recalled for the queries of known pairs.

    python recall.py --params_path ... --corpus_file ... --similar_text_pair recall/train.csv --recall_num 50
    python predict.py --params_path ... --text_pair_file recall/train.csv > cosines.txt
    python scripts/mine_negatives.py --similar_text_pair recall/train.csv --positive_scores cosines.txt \\
        --recall_result_file recall_result_dir/recall_result.txt --output_file train_triples.csv
    python train.py --init_from_ckpt ... --train_set_file train_triples.csv

Writes query, positive and negative, tab-separated: for every pair what was recalled for its query and passes the
filters, nearest first; never the query or any of its positives. It needs neither paddle nor a checkpoint.
"""

import argparse
import contextlib
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from simcse import console, flags
from simcse.files import new_file
from simcse.text import textfile

KNOWN, SCORE, OVERLAP = "the query or a positive", "--negative_max_score", "--negative_max_overlap"


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("files")
    group.add_argument("--similar_text_pair", type=flags.readable_file, required=True,
                       help="query and positive, tab-separated, a pair a line")
    group.add_argument("--positive_scores", type=flags.readable_file, required=True,
                       help="what predict.py printed for --similar_text_pair: the cosine of each pair, one a line")
    group.add_argument("--recall_result_file", type=flags.readable_file, required=True,
                       help="what recall.py wrote for --similar_text_pair: query, document, cosine, best first")
    group.add_argument("--output_file", type=flags.nonempty_text, required=True,
                       help="query, positive and negative, tab-separated, for train.py --train_set_file")
    flags.add_target_texts_arguments(group, "--similar_text_pair")
    flags.add_data_arguments(group)
    group = parser.add_argument_group("filters")
    group.add_argument("--negatives_per_pair", type=flags.positive_int, metavar="N", default=1,
                       help="negatives of a pair, fewer where fewer pass")
    group.add_argument("--negative_depth", type=flags.positive_int, nargs=2, metavar=("FIRST", "LAST"),
                       default=(10, 50), help="ranks, from 1, of the documents that are looked at")
    group.add_argument("--negative_max_score", type=flags.proportion, default=0.95,
                       help="highest cosine of query and negative, as a proportion of that of query and positive "
                       "(Moreira et al. 2024)")
    group.add_argument("--negative_max_overlap", type=flags.proportion, default=0.8,
                       help="highest Jaccard similarity of a negative's pairs of letters with those of the query or of "
                       "any of its positives; 1: any")
    args = parser.parse_args()
    flags.check_target_texts(parser, args)
    first, last = args.negative_depth
    ranks = last - first + 1
    if ranks < 1:
        parser.error(f"--negative_depth {first} {last}: the first rank is behind the last")
    if args.negatives_per_pair > ranks:
        parser.error(f"--negatives_per_pair {args.negatives_per_pair}: --negative_depth {first} {last} has only "
                     f"{console.count(ranks, 'rank')}")
    if os.path.isdir(args.output_file):
        parser.error(f"argument --output_file: {args.output_file}: is a directory")
    return args


def read_pairs(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of every query its positives and their cosines; blank and malformed lines, for which predict.py prints nan, are
    left out.

    Raises:
        InputError: the two files do not have as many lines, or a score is no number.
    """
    rows = textfile.read_targets(args.similar_text_pair, "--similar_text_pair", args.corpus_file, keep_malformed=True)
    pairs = list(rows)
    scores = [*textfile.read_rows(args.positive_scores, 1, "--positive_scores")]
    if len(scores) != len(pairs):
        raise console.InputError(f"--positive_scores {args.positive_scores}: {console.count(len(scores), 'line')} "
                                 f"for {console.count(len(pairs), 'line')} of {args.similar_text_pair}; predict.py "
                                 "prints one a line")
    positives: dict[str, dict[str, float]] = {}
    for pair, score in zip(pairs, scores):
        if pair.problem is None:
            query, positive = pair.fields
            place = f"{args.positive_scores}:{score.line_number}"
            positives.setdefault(query, {})[positive] = cosine_of(score.fields[0], place)
    return positives


def cosine_of(score: str, where: str) -> float:
    """The number that predict.py printed; InputError where that is another thing."""
    with contextlib.suppress(ValueError):
        if math.isfinite(cosine := float(score)):
            return cosine
    raise console.InputError(f"--positive_scores {where}: {score!r} is not a number; predict.py prints such ones "
                             "without --format")


def read_candidates(args: argparse.Namespace, queries: Mapping) -> dict[str, dict[str, float]]:
    """Of every query the documents of --negative_depth and their cosines, best first; a text that is there twice is
    looked at once.

    Raises:
        InputError: no query has as many documents as --negative_depth begins with.
    """
    first, last = args.negative_depth
    ranks: Counter[str] = Counter()
    candidates: dict[str, dict[str, float]] = {query: {} for query in queries}

    def not_a_number(row: list[str]) -> str | None:
        try:
            float(row[2])
        except ValueError:
            return f"cosine {row[2]!r} is not a number"
        return None

    rows = textfile.read_rows(args.recall_result_file, 3, "--recall_result_file", not_a_number, check_format=False)
    lowest: dict[str, float] = {}
    for row in rows:
        query, document, cosine = row.fields
        if float(cosine) > lowest.get(query, math.inf):  # recall.py wrote a query of several pairs once more
            lowest[query] = -math.inf
            continue
        lowest[query] = float(cosine)
        ranks[query] += 1
        if query in candidates and first <= ranks[query] <= last:
            candidates[query].setdefault(document, float(cosine))
    said = f"--negative_depth {first} {last}: {args.recall_result_file} has at most"
    deepest = max((ranks[query] for query in queries), default=0)
    if deepest < first:
        raise console.InputError(f"{said} {deepest} documents a query; recall.py --recall_num {last} gives more")
    if deepest < last:
        console.warn(f"{said} {deepest} documents a query")
    if missing := [query for query in queries if not ranks[query]]:
        console.warn(f"{len(missing)} queries have no line in {args.recall_result_file}: {console.some(missing, 3)}")
    return candidates


def bigrams(text: str) -> set[str]:
    """The pairs of neighbouring letters and digits of a text in lower case; of one letter that letter."""
    letters = "".join(filter(str.isalnum, text.lower()))
    return {letters[start : start + 2] for start in range(max(1, len(letters) - 1))}


def overlap(one: set[str], other: set[str]) -> float:
    """Jaccard's similarity, from 0 to 1."""
    return len(one & other) / len(one | other)


class Miner:
    """Negatives for pairs of query and positive: the nearest candidates that pass the filters.

    A candidate is skipped, and counted under the first that holds, which
    - has the text of the query or of any of its positives;
    - is nearly as near as the positive: cosine(query, document) > max_score * cosine(query, positive), the filter
      TopK-PercPos of Moreira et al. 2024 (NV-Retriever, arXiv:2407.15831);
    - has nearly the text of the query or of any of its positives: `overlap` of `bigrams` above max_overlap.

    Args:
        per_pair: negatives wanted for a pair.
        max_score, max_overlap: from 0 to 1; an overlap of 1 filters nothing.
    """

    def __init__(self, per_pair: int, max_score: float, max_overlap: float) -> None:
        self.per_pair, self.max_score, self.max_overlap = per_pair, max_score, max_overlap
        self.skipped, self.mined = Counter[str](), Counter[int]()  # by reason; pairs by how many negatives they got

    def mine(self, query: str, positives: Mapping[str, float], candidates: Mapping[str, float]) -> Iterator[str]:
        """Yield `query \\t positive \\t negative` lines.

        Args:
            positives: all of the query's, and their cosines.
            candidates: documents and their cosines, best first.
        """
        for positive, cosine in positives.items():
            passing = self._passing(query, positives, candidates, self.max_score * cosine)
            negatives = list(islice(passing, self.per_pair))
            self.mined[len(negatives)] += 1
            yield from (f"{query}\t{positive}\t{negative}\n" for negative in negatives)

    def _passing(self, query: str, positives: Sequence[str] | Mapping[str, float], candidates: Mapping[str, float],
                 limit: float) -> Iterator[str]:
        """The candidates that no filter holds back, in their order; `limit` is the highest cosine."""
        known = {text: bigrams(text) for text in (query, *positives)}
        for document, cosine in candidates.items():
            if document in known:
                self.skipped[KNOWN] += 1
            elif cosine > limit:
                self.skipped[SCORE] += 1
            elif any(overlap(bigrams(document), each) > self.max_overlap for each in known.values()):
                self.skipped[OVERLAP] += 1
            else:
                yield document

    def report(self) -> None:
        """Log how many pairs got how many negatives, and what held candidates back before that."""
        pairs = ", ".join(f"{self.mined[count]} with {count}" for count in sorted(self.mined, reverse=True))
        skipped = ", ".join(f"{self.skipped[why]} by {why}" for why in (SCORE, OVERLAP))
        console.log(f"negatives for {sum(self.mined.values())} pairs: {pairs}; candidates skipped: "
                    f"{self.skipped[KNOWN]} as {KNOWN}, {skipped}")


def main() -> None:
    args = parse_args()
    positives = read_pairs(args)
    candidates = read_candidates(args, positives)
    miner = Miner(args.negatives_per_pair, args.negative_max_score, args.negative_max_overlap)
    with (new_file(args.output_file) as file,
          console.progress("mining", len(positives), "queries") as advance):
        for query, each in positives.items():
            file.writelines(miner.mine(query, each, candidates[query]))
            advance()
    miner.report()
    console.log(f"wrote {args.output_file}")


if __name__ == "__main__":
    console.run(main)
