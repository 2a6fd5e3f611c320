"""Mine hard negatives for supervised training from what was recalled for the queries of known pairs.

    python recall.py --params_path ... --corpus_file ... --similar_text_pair recall/train.csv --recall_num 50
    python predict.py --params_path ... --text_pair_file recall/train.csv > cosines.txt
    python scripts/mine_negatives.py --similar_text_pair recall/train.csv --positive_scores cosines.txt \\
        --recall_result_file recall_result_dir/recall_result.txt --output_file train_triples.csv
    python train.py --init_from_ckpt ... --train_set_file train_triples.csv

Writes query, positive and negative, tab-separated. The negatives of a pair are documents that were recalled for its
query and pass the filters, nearest first; never the query or any of its positives. It needs neither paddle nor a
checkpoint.
"""

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from simcse import console, flags
from simcse.files import check_not_input, check_writable, new_file
from simcse.text import textfile

# Why a candidate is skipped, as the report says it.
KNOWN = "the query or a positive"
SCORE = "--negative_max_score"
OVERLAP = "--negative_max_overlap"


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
                       help="most negatives of a pair")
    group.add_argument("--negative_depth", type=flags.positive_int, nargs=2, metavar=("FIRST", "LAST"),
                       default=(10, 50), help="first and last rank of the candidates, counted from 1")
    group.add_argument("--negative_max_score", type=flags.fraction, default=0.95,
                       help="highest cosine of query and negative, as a fraction of the cosine of query and positive "
                       "(Moreira et al. 2024)")
    group.add_argument("--negative_max_overlap", type=flags.fraction, default=0.8,
                       help="highest Jaccard similarity of a negative's letter pairs with those of the query or of any "
                       "of its positives; 1: no filter")
    args = parser.parse_args()
    flags.check_target_texts(parser, args)
    first, last = args.negative_depth
    rank_count = last - first + 1
    if rank_count < 1:
        parser.error(f"--negative_depth {first} {last}: the first rank is larger than the last")
    if args.negatives_per_pair > rank_count:
        parser.error(f"--negatives_per_pair {args.negatives_per_pair}: --negative_depth {first} {last} has only "
                     f"{console.count(rank_count, 'rank')}")
    check_writable(args.output_file, "--output_file")
    check_not_input(args.output_file, "--output_file", {
        "--similar_text_pair": args.similar_text_pair, "--positive_scores": args.positive_scores,
        "--recall_result_file": args.recall_result_file, "--corpus_file": args.corpus_file})
    return args


def read_pairs(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Read the positives of every query, and the cosine of each pair.

    Blank and malformed lines, for which predict.py prints nan, are left out.

    Returns:
        Cosines by query and positive.

    Raises:
        InputError: the two files do not have as many lines, or a score is no number.
    """
    pairs = list(textfile.read_targets(args.similar_text_pair, "--similar_text_pair", args.corpus_file,
                                       keep_malformed=True))
    scores = list(textfile.read_rows(args.positive_scores, 1, "--positive_scores"))
    if len(scores) != len(pairs):
        raise console.InputError(f"--positive_scores {args.positive_scores}: {console.count(len(scores), 'line')} "
                                 f"for {console.count(len(pairs), 'line')} of {args.similar_text_pair}; predict.py "
                                 "prints one a line")
    positives: dict[str, dict[str, float]] = {}
    for pair, score in zip(pairs, scores):
        if pair.problem is None:
            query, positive = pair.fields
            place = f"{args.positive_scores}:{score.line_number}"
            positives.setdefault(query, {})[positive] = parse_cosine(score.fields[0], place)
    return positives


def parse_cosine(text: str, place: str) -> float:
    """Return the number that predict.py printed.

    Raises:
        InputError: the text is no finite number.
    """
    try:
        cosine = float(text)
    except ValueError:
        cosine = math.nan
    if not math.isfinite(cosine):
        raise console.InputError(f"--positive_scores {place}: {text!r} is not a number; predict.py prints numbers "
                                 "without --format")
    return cosine


def find_wrong_cosine(fields: list[str]) -> str | None:
    """Return what is wrong with a line of query, document and cosine."""
    try:
        float(fields[2])
    except ValueError:
        return f"cosine {fields[2]!r} is not a number"
    return None


def read_candidates(args: argparse.Namespace, queries: Mapping) -> dict[str, dict[str, float]]:
    """Read the documents that were recalled for every query at the ranks of --negative_depth.

    recall.py writes the documents of a query for each of its pairs, best first; only the first time counts. A text that
    is there twice is a candidate once.

    Args:
        queries: those of the pairs; other ones in the file are ignored.

    Returns:
        Cosines by query and document, best first.

    Raises:
        InputError: no query has as many documents as --negative_depth begins with.
    """
    first, last = args.negative_depth
    candidates: dict[str, dict[str, float]] = {query: {} for query in queries}
    document_counts: Counter[str] = Counter()  # by query, how many of its lines were read
    lowest: dict[str, float] = {}  # by query, the cosine of the last of these lines
    rows = textfile.read_rows(args.recall_result_file, 3, "--recall_result_file", find_wrong_cosine, check_format=False)
    for row in rows:
        query, document, cosine_text = row.fields
        cosine = float(cosine_text)
        if cosine > lowest.get(query, math.inf):  # the documents of this query begin again
            lowest[query] = -math.inf  # ignore all further lines of the query
            continue
        lowest[query] = cosine
        document_counts[query] += 1
        if query in candidates and first <= document_counts[query] <= last:
            candidates[query].setdefault(document, cosine)
    check_depth(args, max((document_counts[query] for query in queries), default=0))
    missing = [query for query in queries if not document_counts[query]]
    if missing:
        queries_have = f"{console.count(len(missing), 'query')} {console.verb(len(missing), 'have')}"
        console.warn(f"{queries_have} no line in {args.recall_result_file}: {console.some(missing, 3)}")
    return candidates


def check_depth(args: argparse.Namespace, deepest: int) -> None:
    """Warn if the recall result is not as deep as --negative_depth.

    Args:
        deepest: the most documents that a query has.

    Raises:
        InputError: it does not even have the first rank.
    """
    first, last = args.negative_depth
    problem = (f"--negative_depth {first} {last}: {args.recall_result_file} has at most "
               f"{console.count(deepest, 'document')} a query")
    if deepest < first:
        raise console.InputError(f"{problem}; recall.py --recall_num {last} gives more")
    if deepest < last:
        console.warn(problem)


def bigrams(text: str) -> set[str]:
    """Return the pairs of neighbouring letters and digits of a text, in lower case; if it has only one, that one."""
    letters = "".join(filter(str.isalnum, text.lower()))
    return {letters[start : start + 2] for start in range(max(1, len(letters) - 1))}


def overlap(one: set[str], other: set[str]) -> float:
    """Return Jaccard's similarity of two sets, in [0, 1]."""
    return len(one & other) / len(one | other)


class Miner:
    """Pick the negatives for pairs of query and positive: the nearest candidates that pass the filters.

    A candidate is skipped, and counted under the first reason that holds, if it

    - has the text of the query or of any of its positives (KNOWN);
    - is nearly as near as the positive (SCORE): cosine(query, document) > max_score * cosine(query, positive), the
      filter TopK-PercPos of Moreira et al. 2024 (NV-Retriever, arXiv:2407.15831);
    - has nearly the text of the query or of any of its positives (OVERLAP): `overlap` of `bigrams` above max_overlap.

    Args:
        per_pair: most negatives of a pair.
        max_score: in [0, 1].
        max_overlap: in [0, 1]; 1 filters nothing.

    Attributes:
        skipped: how many candidates each reason skipped.
        mined: how many pairs got 0, 1, 2... negatives.
    """

    def __init__(self, per_pair: int, max_score: float, max_overlap: float) -> None:
        self.per_pair = per_pair
        self.max_score = max_score
        self.max_overlap = max_overlap
        self.skipped: Counter[str] = Counter()
        self.mined: Counter[int] = Counter()

    def mine(self, query: str, positives: Mapping[str, float], candidates: Mapping[str, float]) -> Iterator[str]:
        """Yield lines of query, positive and negative, tab-separated.

        Args:
            query: the text.
            positives: all positives of the query with their cosines.
            candidates: documents with their cosines, best first.
        """
        for positive, cosine in positives.items():
            passing = self._filter(query, positives, candidates, self.max_score * cosine)
            negatives = list(islice(passing, self.per_pair))
            self.mined[len(negatives)] += 1
            for negative in negatives:
                yield f"{query}\t{positive}\t{negative}\n"

    def _filter(self, query: str, positives: Mapping[str, float], candidates: Mapping[str, float],
                max_cosine: float) -> Iterator[str]:
        """Yield the candidates that pass, in their order."""
        bigrams_of = {text: bigrams(text) for text in (query, *positives)}
        for document, cosine in candidates.items():
            if document in bigrams_of:
                self.skipped[KNOWN] += 1
            elif cosine > max_cosine:
                self.skipped[SCORE] += 1
            elif any(overlap(bigrams(document), known) > self.max_overlap for known in bigrams_of.values()):
                self.skipped[OVERLAP] += 1
            else:
                yield document

    def report(self) -> None:
        """Log how many pairs got how many negatives, and how many candidates each reason skipped."""
        pairs = ", ".join(f"{self.mined[count]} with {count}" for count in sorted(self.mined, reverse=True))
        console.log(f"negatives for {console.count(self.mined.total(), 'pair')}: {pairs}; candidates skipped: "
                    f"{self.skipped[KNOWN]} as {KNOWN}, {self.skipped[SCORE]} by {SCORE}, "
                    f"{self.skipped[OVERLAP]} by {OVERLAP}")


def main() -> None:
    args = parse_args()
    positives = read_pairs(args)
    candidates = read_candidates(args, positives)
    miner = Miner(args.negatives_per_pair, args.negative_max_score, args.negative_max_overlap)
    with (new_file(args.output_file, flag="--output_file") as file,
          console.progress("mining", len(positives), "queries") as advance):
        for query, positives_of_query in positives.items():
            file.writelines(miner.mine(query, positives_of_query, candidates[query]))
            advance()
    miner.report()
    console.log(f"wrote {args.output_file}")


if __name__ == "__main__":
    console.run(main)
