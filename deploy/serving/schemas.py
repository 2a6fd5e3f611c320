"""The bodies of requests and answers, as the OpenAPI description has them, and the limits of requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from deploy.serving.jobs import SearchHit
from simcse.text.prefixes import DOCUMENT, INPUT_TYPES

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

DEFAULT_TOP_K = 10
# A character that str.strip would leave; what \S means differs between Python, pydantic and JSON Schema.
NOT_BLANK = r"[^\x09-\x0d\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Args:
        texts: texts, pairs or queries of a request.
        text_length: characters of a text.
        top_k: documents recalled for a query.
        body: bytes of a request's body.
        seconds: time to read a body, and to answer it.
        batch: texts that are computed together.
        waiting: texts that wait to be computed.
    """

    texts: int = 64
    text_length: int = 2000
    top_k: int = 100
    body: int = 8 << 20
    seconds: float = 30.0
    batch: int = 64
    waiting: int = 1024


# ------------------------------------------------------------------------------------------------------------- answers
class Error(BaseModel):
    error: Annotated[str, Field(description="what is wrong, in one line")]


class Embeddings(BaseModel):
    embeddings: Annotated[list[list[float]], Field(description="of every text, L2-normalized")]


class Cosines(BaseModel):
    cosines: Annotated[list[float], Field(description="of every pair, from -1 to 1")]


class SearchResults(BaseModel):
    results: Annotated[list[list[SearchHit]], Field(description="the documents of every query, most similar first")]
    documents: Annotated[int, Field(description="how many documents are searched")]
    milliseconds: Annotated[float, Field(description="from the arrival of the request to its answer")]


class Health(BaseModel):
    status: str
    documents: int
    embedding_size: int
    max_texts: int
    max_text_length: int
    max_top_k: int
    modes: Annotated[list[str], Field(description="of /search; the last is the default")]
    index_is_outdated: Annotated[bool, Field(description="whether the index on disk is newer than the one searched: "
                                             "it is being opened, or could not be")]


# ------------------------------------------------------------------------------------------------------------ requests
class Strict(BaseModel):
    """A body in which unknown fields and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


InputType = Annotated[Literal[INPUT_TYPES], Field(
    description="which prefix to put before the texts, if the model has one")]


def text_type(limits: Limits) -> Any:
    """Return the type of a text in a body."""
    return Annotated[str, StringConstraints(min_length=1, max_length=limits.text_length, pattern=NOT_BLANK)]


def embed_body(limits: Limits) -> type[Strict]:
    """Return the body of POST /embed."""
    text = text_type(limits)

    class Texts(Strict):
        texts: Annotated[list[text], Field(min_length=1, max_length=limits.texts)]
        input_type: InputType = DOCUMENT

    return Texts


def similarity_body(limits: Limits) -> type[Strict]:
    """Return the body of POST /similarity."""
    text = text_type(limits)
    pair = Annotated[list[text], Field(min_length=2, max_length=2)]

    class Pairs(Strict):
        pairs: Annotated[list[pair], Field(min_length=1, max_length=limits.texts)]

    return Pairs


def search_body(limits: Limits, modes: Sequence[str]) -> type[Strict]:
    """Return the body of POST /search."""
    text = text_type(limits)
    top_k_type = Annotated[int, Field(ge=1, le=limits.top_k, description="documents for each query"),
                           BeforeValidator(integer_of_float)]
    mode_type = Annotated[Literal[tuple(modes)], Field(
        description="embedding: by cosines; hybrid: fused with BM25, where the index has it")]

    class Queries(Strict):
        queries: Annotated[list[text], Field(min_length=1, max_length=limits.texts)]
        top_k: top_k_type = min(DEFAULT_TOP_K, limits.top_k)
        mode: mode_type = modes[-1]

    return Queries


def integer_of_float(value: Any) -> Any:
    """Return 3 for 3.0, which is an integer in JSON Schema too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
