"""Hard negatives for supervised training, out of what was recalled for the queries of known pairs."""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

import cli
import console
import data
from ann_util import Found

KNOWN, SCORE, OVERLAP = "the query or a positive", "--negative_max_score", "--negative_max_overlap"

PER_PAIR, DEPTH, MAX_SCORE, MAX_OVERLAP = 1, (10, 50), 0.95, 0.8


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """--mine_negatives and its settings."""
    group.add_argument("--mine_negatives", metavar="OUT", type=cli.nonempty_text, default=None,
                       help="beside the result, write there query, positive and negative, tab-separated, to train on: "
                       "for every pair of --similar_text_pair what was recalled for the query and passes the filters, "
                       "nearest first; never the query or any of its positives")
    group.add_argument("--negatives_per_pair", type=cli.positive_int, metavar="N", default=None,
                       help=f"negatives of a pair, fewer where fewer pass; None: {PER_PAIR}")
    group.add_argument("--negative_depth", type=cli.positive_int, nargs=2, metavar=("FIRST", "LAST"), default=None,
                       help="ranks, from 1, of the documents that are looked at, whatever --recall_num is; None: "
                       f"{DEPTH[0]} {DEPTH[1]}")
    group.add_argument("--negative_max_score", type=cli.proportion, default=None,
                       help="highest cosine of query and negative, as a proportion of that of query and positive "
                       f"(Moreira et al. 2024); None: {MAX_SCORE}")
    group.add_argument("--negative_max_overlap", type=cli.proportion, default=None,
                       help="highest Jaccard similarity of a negative's pairs of letters with those of the query or of "
                       f"any of its positives; 1: any; None: {MAX_OVERLAP}")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace, result: str) -> None:
    """Refuse settings without --mine_negatives, and what it cannot do; make up its defaults.

    Args:
        result: the file that the result goes to.
    """
    defaults = {"negatives_per_pair": PER_PAIR, "negative_depth": DEPTH, "negative_max_score": MAX_SCORE,
                "negative_max_overlap": MAX_OVERLAP}
    given = [flag for flag in defaults if getattr(args, flag) is not None]
    for flag in defaults.keys() - given:
        setattr(args, flag, defaults[flag])
    first, last = args.negative_depth
    out, ranks = args.mine_negatives, last - first + 1
    if not out:
        if given:
            parser.error(f"--{given[0]} needs --mine_negatives")
    elif args.query:
        parser.error("--mine_negatives needs --similar_text_pair")
    elif args.hybrid_bm25:
        parser.error("--mine_negatives goes by cosines: not with --hybrid_bm25")
    elif ranks < 1:
        parser.error(f"--negative_depth {first} {last}: the first rank is behind the last")
    elif args.negatives_per_pair > ranks:
        parser.error(f"--negatives_per_pair {args.negatives_per_pair}: --negative_depth {first} {last} has only "
                     f"{cli.count(range(ranks), 'rank')}")
    elif os.path.isdir(out):
        parser.error(f"argument --mine_negatives: {out}: is a directory")
    elif os.path.abspath(out) == os.path.abspath(result):
        parser.error(f"--mine_negatives {out}: the result goes there")


def check_depth(depth: Sequence[int], documents: int) -> None:
    """Refuse, or warn of, a window of ranks that a corpus of so many documents does not have."""
    said = f"--negative_depth {depth[0]} {depth[1]}: the corpus has only {documents} documents"
    if depth[0] > documents:
        raise console.InputError(said)
    if depth[1] > documents:
        console.warn(said)


def bigrams(text: str) -> set[str]:
    """The pairs of neighbouring letters and digits of a text in lower case; of one letter that letter."""
    letters = "".join(filter(str.isalnum, text.lower()))
    return {letters[start : start + 2] for start in range(max(1, len(letters) - 1))}


def overlap(one: set[str], other: set[str]) -> float:
    """Jaccard's similarity, from 0 to 1."""
    return len(one & other) / len(one | other)


class Miner:
    """Negatives for pairs of query and positive: the nearest documents of a window of ranks that pass the filters.

    A document is skipped, and counted under the first that holds, which
    - has the text of the query or of any of its positives;
    - is nearly as near as the positive: cosine(query, document) > max_score * cosine(query, positive), the filter
      TopK-PercPos of Moreira et al. 2024 (NV-Retriever, arXiv:2407.15831);
    - has nearly the text of the query or of any of its positives: `overlap` of `bigrams` above max_overlap.

    Args:
        pairs: query and positive; one that is there several times counts once.
        depth: first and last rank of the window, from 1.
        per_pair: negatives wanted for a pair.
        max_score, max_overlap: from 0 to 1; an overlap of 1 filters nothing.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]], depth: Sequence[int], per_pair: int, max_score: float,
                 max_overlap: float) -> None:
        self._positives: dict[str, list[str]] = {}
        for query, positive in dict.fromkeys(pairs):
            self._positives.setdefault(query, []).append(positive)
        self.depth, self.per_pair, self.max_score, self.max_overlap = tuple(depth), per_pair, max_score, max_overlap
        self.skipped, self.mined = Counter[str](), Counter[int]()  # by reason; pairs by how many negatives they got

    def mine(self, queries: Sequence[str], embeddings: np.ndarray, found: Found, corpus: Sequence[str],
             encode: Callable[[list[str]], np.ndarray]) -> Iterator[str]:
        """Yield `query \\t positive \\t negative` lines, query by query; of a query that was here before none.

        Args:
            queries: distinct.
            embeddings: theirs, float32 [Q, dim], L2-normalized.
            found: what was recalled for them, [Q, at least the last rank of the window, or the corpus].
            corpus: the documents by row.
            encode: gives the embeddings of positives.
        """
        asked = [(number, query, self._positives.pop(query)) for number, query in enumerate(queries)
                 if query in self._positives]
        if not asked:
            return
        texts = data.distinct(positive for *_, positives in asked for positive in positives)
        embedding_of = dict(zip(texts, encode(texts)))
        window = slice(self.depth[0] - 1, self.depth[1])
        with console.progress("mining", len(asked), "queries") as advance:
            for number, query, positives in asked:
                candidates: dict[str, float] = {}  # a text that the corpus has twice is looked at once
                for row, cosine in zip(*(side[number, window].tolist() for side in found)):
                    if row >= 0:
                        candidates.setdefault(corpus[row], cosine)
                for positive in positives:
                    limit = self.max_score * float(embeddings[number] @ embedding_of[positive])
                    negatives = list(islice(self._passing(query, positives, candidates, limit), self.per_pair))
                    self.mined[len(negatives)] += 1
                    yield from (f"{query}\t{positive}\t{negative}\n" for negative in negatives)
                advance()

    def _passing(self, query: str, positives: list[str], candidates: dict[str, float], limit: float) -> Iterator[str]:
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
