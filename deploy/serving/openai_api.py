"""POST /v1/embeddings, as OpenAI's clients send it and read it."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from deploy.serving.jobs import Embedded
from deploy.serving.schemas import NOT_BLANK, InputType
from simcse.console import is_unicode
from simcse.text.prefixes import DOCUMENT

import numpy as np
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

PREFIX = "/v1/"


class Cause(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """An error in OpenAI's form."""

    error: Cause


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: Annotated[list[float] | str, Field(description="L2-normalized; float32, little-endian, as base64")]


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: Annotated[int, Field(description="seconds since 1970; not known: 0")]
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


MODEL = Model(id="simcse", object="model", created=0, owned_by="simcse-semantic-index")
MAX_TEXTS = 2048  # texts of a request, as many as OpenAI takes
INPUT_SCHEMA = {
    "anyOf": [{"type": "string", "minLength": 1, "pattern": NOT_BLANK},
              {"type": "array", "minItems": 1, "maxItems": MAX_TEXTS,
               "items": {"type": "string", "minLength": 1, "pattern": NOT_BLANK}}],
    "description": "a text, or several; not token ids"}


def error_body(path: str, status: int, message: str) -> dict[str, Any]:
    """Return the body of an error: {"error": message}, for paths under PREFIX in OpenAI's form."""
    if not path.startswith(PREFIX):
        return {"error": message}
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def request_body(sizes: range) -> type[BaseModel]:
    """Return the body of a request.

    Args:
        sizes: the dimensions that embeddings may be asked for.
    """
    class Input(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)

        input: Annotated[str | list[str], PlainValidator(check_input), WithJsonSchema(INPUT_SCHEMA)]
        model: Annotated[str | None, Field(max_length=256, description="any name; there is one model")] = None
        encoding_format: Annotated[Literal["float", "base64"] | None, Field(description="null: float")] = None
        dimensions: Annotated[int | None, Field(
            ge=sizes.start, le=sizes[-1],
            description="the first so many numbers, L2-normalized; a whitened checkpoint has them in the order of "
            "their variance, embeddings of another cannot be shortened")] = None
        input_type: InputType = DOCUMENT
        user: Annotated[str | None, Field(max_length=256, description="ignored")] = None

    return Input


def check_input(value: Any) -> str | list[str]:
    """Return the input of a request.

    Raises:
        ValueError: it is no text and no list of texts, or one of them is empty or not valid Unicode.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise ValueError("should be a text or a list of texts")
    if not texts:
        raise ValueError("is an empty list; send at least one text")
    if holds_token_ids(texts):
        raise ValueError("holds token ids, of a tokenizer that is not this model's; send texts (in LangChain: "
                         "OpenAIEmbeddings(check_embedding_ctx_length=False))")
    if len(texts) > MAX_TEXTS:
        raise ValueError(f"has {len(texts):,} texts, and a request may have {MAX_TEXTS:,}; send them in parts")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"number {number} is no text")
        if not text.strip():
            raise ValueError(f"number {number} is {'blank' if text else 'an empty text'}; leave it out")
        if not is_unicode(text):
            raise ValueError(f"number {number} is not valid Unicode; it has half of a surrogate pair")
    return value


def holds_token_ids(values: list[Any]) -> bool:
    """Return whether the first value of an input is a token id, or a list of them."""
    first = values[0]
    if isinstance(first, list):
        first = first[0] if first else 0
    return isinstance(first, int) and not isinstance(first, bool)


def texts_of(body: Any) -> list[str]:
    """Return the texts of a request."""
    return [body.input] if isinstance(body.input, str) else body.input


def check_lengths(embedded: Embedded, start: int, max_seq_length: int) -> None:
    """Refuse texts that are too long.

    Args:
        embedded: texts of a request.
        start: the number of the first of them in the request.
        max_seq_length: tokens that the model takes.

    Raises:
        HTTPException: 400.
    """
    for number, count in enumerate(embedded.token_counts, start):
        if count > max_seq_length:
            raise HTTPException(400, f"input {number}: has more than {max_seq_length} tokens, its prefix included, "
                                     "which are the most that the model takes; send it in parts")


def answer(body: Any, embedded: Sequence[Embedded]) -> JSONResponse:
    """Return the answer to a request, of whose texts these are the embeddings, in their order."""
    embeddings = np.concatenate([part.embeddings for part in embedded])
    if body.dimensions:
        embeddings = shorten(embeddings, body.dimensions)
    if body.encoding_format == "base64":
        values = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in embeddings]
    else:
        values = embeddings.tolist()
    data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
    tokens = sum(int(part.token_counts.sum()) for part in embedded)
    return JSONResponse({"object": "list", "model": body.model or MODEL.id, "data": data,
                         "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})


def shorten(embeddings: np.ndarray, dimensions: int) -> np.ndarray:
    """Return the first numbers of embeddings, L2-normalized."""
    first = embeddings[:, :dimensions]
    return first / np.maximum(np.linalg.norm(first, axis=1, keepdims=True), 1e-12)
