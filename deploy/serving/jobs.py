"""What the process of the server and the process of the model tell each other: jobs, their answers and some facts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from simcse.text.prefixes import QUERY

import numpy as np
from pydantic import Field

EMBEDDING = "embedding"  # search by embeddings
HYBRID = "hybrid"  # search by embeddings and by words, where the index has BM25


class Facts(NamedTuple):
    """What the service serves.

    Attributes:
        documents: lines of the corpus.
        precision: the number format that the model runs in.
        modes: modes of a search; the last is the default.
        max_seq_length: tokens that the model takes of a text.
        whitened: whether embeddings are whitened, so that their first numbers have most of the variance.
    """

    documents: int
    embedding_size: int
    precision: str
    modes: tuple[str, ...]
    max_seq_length: int
    whitened: bool


class Input(NamedTuple):
    """A text to encode, and its input type, whose prefix it gets."""

    text: str
    input_type: str


@dataclass(frozen=True)
class EmbedJob:
    """Texts to encode; the answer is `Embedded`.

    Args:
        texts: each of them.
        input_types: the input type of each.
    """

    texts: Sequence[str]
    input_types: Sequence[str]

    @property
    def inputs(self) -> list[Input]:
        return [Input(*each) for each in zip(self.texts, self.input_types, strict=True)]


@dataclass(frozen=True)
class SearchJob:
    """Queries to search with; the answer is a list of `SearchHit` for each text, the best first.

    Args:
        texts: the queries.
        top_k: most hits of a query.
        mode: EMBEDDING or HYBRID.
    """

    texts: Sequence[str]
    top_k: int
    mode: str

    @property
    def inputs(self) -> list[Input]:
        return [Input(text, QUERY) for text in self.texts]


Job = EmbedJob | SearchJob


class Embedded(NamedTuple):
    """The answer to an `EmbedJob`.

    Attributes:
        embeddings: float32 [texts, embedding_size], L2-normalized.
        token_counts: int64 [texts], one more than `max_seq_length` for a longer text.
    """

    embeddings: np.ndarray
    token_counts: np.ndarray


@dataclass
class SearchHit:
    """A document that a query finds."""

    rank: int
    document: str
    line: Annotated[int | None, Field(description="in the corpus, from 1; null where it is not known")]
    id: Annotated[str | None, Field(description="of the document; null where the corpus has none")]
    cosine: float
    score: Annotated[float | None, Field(description="hybrid: the cosine plus BM25's score by the query's highest")]
    words: Annotated[list[str] | None, Field(description="hybrid: those of the query that the document has")]
    passage: Annotated[str | None, Field(description="the best one; null where the index has no passages")]
