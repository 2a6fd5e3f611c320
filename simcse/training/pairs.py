"""Make training pairs of query and document from documents alone.

A kind of pairs is a function and an entry in KINDS.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from simcse.text.words import split_words

import numpy as np

# A full stop ends a sentence before white space, and before or after a letter that is not ASCII: "4.2" has none.
SENTENCE_MARK = r"[。！？；…!?;]+|．(?!\d)|(?<=[^\x00-\x7f])\.|\.(?=\s|$|[^\x00-\x7f])|\n"
COMMA = r"，|,(?!\d)|(?<!\d),"  # a comma between digits is none: "10,000"
CLOSING = r"[”’」』）》】)\]\"']*\s*"  # what belongs to the sentence before it
SENTENCE_END = re.compile(f"(?:{SENTENCE_MARK}){CLOSING}")
CLAUSE_END = re.compile(f"(?:{SENTENCE_MARK}|{COMMA}){CLOSING}")
# A Chinese character, or a word of another script: a clause of either has about as many.
UNIT = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")
# Units of a cloze query. Shorter ones are phrases such as "研究结果表明", which stand in many documents.
MIN_UNITS = 8
MAX_UNITS = 64
LEFT_OUT = 0.9  # fraction of the cloze pairs whose document lacks the query, as in Lee et al. (2019)
# Words of a query of words.
MIN_WORDS = 2
MAX_WORDS = 6
ROUNDS = 8  # of drawing the queries of words that are missing, since some draw what was drawn before
MOST_NUMBERS = 10**6  # that a round draws, one for each query and word of the document


class Pair(NamedTuple):
    """A query and a document that answers it."""

    query: str
    document: str


class Document(NamedTuple):
    """A document that pairs are made of.

    Attributes:
        text: as it is in the corpus.
        words: those of `split_words`; empty where no kind draws words.
    """

    text: str
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Statistics:
    """What pairs depend on besides the text of their document.

    Attributes:
        document_count: how many documents the corpus has.
        document_frequency: for each word, how many documents have it; empty where no kind draws words.
        query_lengths: int64 [queries], as `query_length` counts them, of queries to imitate; None: there are none.
    """

    document_count: int
    document_frequency: Counter[str]
    query_lengths: np.ndarray | None = None

    def draw_length(self, random: np.random.Generator) -> int | None:
        """Return the length of one of the queries to imitate; None: there are none."""
        if self.query_lengths is None:
            return None
        return int(random.choice(self.query_lengths))


def query_length(query: str) -> int:
    """Return the number of characters of a query, white space excluded."""
    return len("".join(query.split()))


# --------------------------------------------------------------------------------------------------------------- cloze
class Span(NamedTuple):
    """A sentence or clause within a text.

    Attributes:
        begin: its first character.
        end: the character after its last one, where the marks that end it begin.
        next: the character after these marks and the white space that follows.
    """

    begin: int
    end: int
    next: int


def sentences_of(text: str) -> list[Span]:
    """Return the sentences of a text."""
    return _split(text, SENTENCE_END)


def clauses_of(text: str) -> list[Span]:
    """Return the clauses of a text: the parts of its sentences between commas."""
    return _split(text, CLAUSE_END)


def _split(text: str, end_marks: re.Pattern) -> list[Span]:
    """Return the parts of a text that are not empty and end with these marks, or with the text."""
    spans = []
    begin = 0
    for match in end_marks.finditer(text):
        if match.start() > begin:
            spans.append(Span(begin, match.start(), match.end()))
        begin = match.end()
    if begin < len(text):
        spans.append(Span(begin, len(text), len(text)))
    return spans


def count_units(text: str) -> int:
    """Return the number of Chinese characters and of words of other scripts."""
    return len(UNIT.findall(text))


def cloze_queries(text: str) -> dict[str, Span]:
    """Return the sentences and clauses of a text that can be queries, each with its place.

    They have MIN_UNITS to MAX_UNITS, and no more than half of the text's, so that the rest is still a document. What
    the text has twice is no query: the text would still have it without the one at its place.
    """
    most = min(MAX_UNITS, count_units(text) // 2)
    queries: dict[str, Span] = {}
    for span in sentences_of(text) + clauses_of(text):
        query = text[span.begin : span.end].strip()
        if MIN_UNITS <= count_units(query) <= most and text.count(query) == 1:
            queries[query] = span
    return queries


def cloze_pairs(document: Document, count: int, random: np.random.Generator, statistics: Statistics) -> list[Pair]:
    """Return pairs of a sentence or clause and its document, which mostly lacks it (inverse cloze task; Lee et al.
    2019, arXiv:1906.00300).

    Args:
        document: what they are made of.
        count: pairs to make; fewer if the document has fewer sentences and clauses.
        random: draws the queries, and whether the document lacks them.
        statistics: has the query lengths to imitate; without them each query is as likely as any other.
    """
    span_of = cloze_queries(document.text)
    queries = list(span_of)
    random.shuffle(queries)
    pairs = []
    for query in choose_by_length(queries, count, random, statistics):
        answer = document.text
        if random.random() < LEFT_OUT:
            span = span_of[query]
            answer = (answer[: span.begin] + answer[span.next :]).strip()
        pairs.append(Pair(query, answer))
    return pairs


def choose_by_length(queries: Sequence[str], count: int, random: np.random.Generator,
                     statistics: Statistics) -> list[str]:
    """Return up to `count` of the queries, each once: for each length that is drawn the first one that comes nearest.

    Without lengths to imitate these are the first ones.
    """
    if statistics.query_lengths is None:
        return list(queries[:count])
    left = list(queries)
    chosen = []
    while left and len(chosen) < count:
        length = statistics.draw_length(random)
        distances = [abs(query_length(query) - length) for query in left]
        chosen.append(left.pop(distances.index(min(distances))))
    return chosen


# --------------------------------------------------------------------------------------------------------------- words
def count_documents(words_of_documents: Iterable[Sequence[str]]) -> Counter[str]:
    """Return for each word how many of the documents have it, which are given by their words."""
    document_frequency: Counter[str] = Counter()
    for words in words_of_documents:
        document_frequency.update(set(words))
    return document_frequency


def word_weights(words: Sequence[str], statistics: Statistics) -> dict[str, float]:
    """Return the tf-idf of each distinct word, in the order of their first appearance.

    It is tf * ln((N + 1) / df), which is near 0 for a word that nearly all of the N documents have.

    Args:
        words: those of one document, each as often as it has them.
        statistics: have the document frequency of each.
    """
    weights = {}
    for word, frequency in Counter(words).items():
        weights[word] = frequency * math.log((statistics.document_count + 1) / statistics.document_frequency[word])
    return weights


def draw_words(weights: np.ndarray, draws: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw words by their weights without replacement, several times.

    In each draw every word gets an exponential waiting time whose rate is its weight, and the first ones count. That is
    the same as drawing one after the other, by the weights of those that are left (Efraimidis and Spirakis 2006).

    Args:
        weights: float64 [words], above 0.
        draws: how many times.
        count: words of a draw.
        random: draws them.

    Returns:
        int64 [draws, count], places of words, in the order in which they are drawn.
    """
    waiting_times = random.exponential(size=(draws, len(weights))) / weights
    return np.argsort(waiting_times, axis=1)[:, :count]


def word_pairs(document: Document, count: int, random: np.random.Generator, statistics: Statistics) -> list[Pair]:
    """Return pairs of MIN_WORDS to MAX_WORDS words of a document, in their order, and the document (query extraction;
    Meng et al. 2022, arXiv:2212.08841).

    The words are drawn by their tf-idf, without replacement, and folded (see `words.fold`). At least one of the
    document's words is left out.

    Args:
        document: what they are made of.
        count: pairs to make; there are fewer where it has not enough words for as many different queries.
        random: draws the words, and how many.
        statistics: of the corpus.
    """
    weight_of = word_weights(document.words, statistics)
    words = list(weight_of)
    weights = np.array(list(weight_of.values()))
    most = min(MAX_WORDS, len(words) - 1)
    if most < MIN_WORDS:
        return []
    queries: dict[str, None] = {}  # a set in the order of drawing
    for _ in range(ROUNDS):
        missing = min(count - len(queries), max(1, MOST_NUMBERS // len(words)))
        for drawn in draw_words(weights, missing, most, random).tolist():
            kept = choose_word_count([words[place] for place in drawn], random, statistics)
            queries[" ".join(words[place] for place in sorted(drawn[:kept]))] = None
        if len(queries) == count:
            break
    return [Pair(query, document.text) for query in queries]


def choose_word_count(words: Sequence[str], random: np.random.Generator, statistics: Statistics) -> int:
    """Return how many of the words, the first ones, become a query: MIN_WORDS to all.

    With query lengths to imitate it is the number that comes nearest to one of them, otherwise it is drawn.
    """
    length = statistics.draw_length(random)
    if length is None:
        return int(random.integers(MIN_WORDS, len(words) + 1))
    lengths = np.cumsum([query_length(word) for word in words])[MIN_WORDS - 1 :]
    return MIN_WORDS + int(np.argmin(np.abs(lengths - length)))


# --------------------------------------------------------------------------------------------------------------- kinds
class Kind(NamedTuple):
    """A way to make pairs.

    Attributes:
        make: returns up to `count` pairs of a document: `make(document, count, random, statistics)`.
        needs_words: whether it needs `Document.words` and `Statistics.document_frequency`.
        description: of its queries, for the help text.
    """

    make: Callable[[Document, int, np.random.Generator, Statistics], list[Pair]]
    needs_words: bool
    description: str


# What may give fewer pairs than it is asked for comes first: the kinds after it make up for them.
KINDS = {
    "cloze": Kind(cloze_pairs, needs_words=False,
                  description="a sentence or clause of the document, which mostly lacks it"),
    "words": Kind(word_pairs, needs_words=True,
                  description=f"{MIN_WORDS} to {MAX_WORDS} words of the document, drawn by tf-idf"),
}


def make_document_pairs(document: Document, kinds: Sequence[str], count: int, random: np.random.Generator,
                        statistics: Statistics) -> dict[str, list[Pair]]:
    """Return the pairs of a document by kind, of the kinds that were to make any.

    All kinds get the same share of `count`, and what one of them cannot make is shared by those after it.

    Args:
        document: what they are made of.
        kinds: names of KINDS, in its order.
        count: pairs of all kinds together.
        random: the document's own.
        statistics: of the corpus.
    """
    pairs_of_kind = {}
    left = count
    for place, kind in enumerate(kinds):
        share = left / (len(kinds) - place)
        wanted = int(share + random.random())  # a share of 2.5 is 2 or 3, each half of the time
        if wanted:
            pairs_of_kind[kind] = KINDS[kind].make(document, wanted, random, statistics)
            left -= len(pairs_of_kind[kind])
    return pairs_of_kind


def can_make_pairs(text: str) -> bool:
    """Return whether one of the KINDS can make a pair of a text."""
    words = split_words(text)
    statistics = Statistics(1, count_documents([words]))
    one_of_each_kind = len(KINDS)
    pairs_of_kind = make_document_pairs(Document(text, words), list(KINDS), one_of_each_kind, np.random.default_rng(0),
                                        statistics)
    return any(pairs_of_kind.values())
