"""POST /v1/embeddings, as OpenAI's clients send it and read it."""

import base64
from typing import Annotated, Any, Literal

from deploy.serving.jobs import Embedded, Facts

import numpy as np
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

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


def error_body(path: str, status: int, message: str) -> dict[str, Any]:
    """Return the body of an error: {"error": message}, for paths under PREFIX in OpenAI's form."""
    if not path.startswith(PREFIX):
        return {"error": message}
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def request_body(text: Any, max_texts: int, facts: Facts) -> type[BaseModel]:
    """Return the body of a request.

    Args:
        text: the type of a text.
        max_texts: most texts of a request.
        facts: say whether embeddings may be shortened: only those of a whitened checkpoint.
    """
    class Input(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)

        input: Annotated[text | Annotated[list[text], Field(min_length=1, max_length=max_texts)],
                         Field(description="a text, or several; not OpenAI's tokens")]
        model: Annotated[str, Field(max_length=256, description="any name; there is one model")] = "simcse"
        encoding_format: Literal["float", "base64"] = "float"
        dimensions: Annotated[int | None, Field(
            ge=1 if facts.whitened else facts.embedding_size, le=facts.embedding_size,
            description="the first so many numbers, L2-normalized; a whitened checkpoint has them in the order of "
            "their variance, embeddings of another cannot be shortened")] = None
        user: Annotated[str | None, Field(max_length=256, description="ignored")] = None

    return Input


def texts_of(body: Any) -> list[str]:
    """Return the texts of a request."""
    return [body.input] if isinstance(body.input, str) else body.input


def answer(body: Any, embedded: Embedded, facts: Facts) -> JSONResponse:
    """Return the answer to a request, of whose texts these are the embeddings.

    Raises:
        HTTPException: 400, a text is too long.
    """
    for number, count in enumerate(embedded.token_counts):
        if count > facts.max_seq_length:
            raise HTTPException(400, f"input {number}: has more than {facts.max_seq_length} tokens, which are the most "
                                     "that the model takes; send it in parts")
    embeddings = embedded.embeddings
    if body.dimensions:
        embeddings = shorten(embeddings, body.dimensions)
    if body.encoding_format == "base64":
        values = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in embeddings]
    else:
        values = embeddings.tolist()
    data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
    tokens = int(embedded.token_counts.sum())
    return JSONResponse({"object": "list", "model": body.model, "data": data,
                         "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})


def shorten(embeddings: np.ndarray, dimensions: int) -> np.ndarray:
    """Return the first numbers of embeddings, L2-normalized."""
    first = embeddings[:, :dimensions]
    return first / np.maximum(np.linalg.norm(first, axis=1, keepdims=True), 1e-12)
