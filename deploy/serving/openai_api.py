"""POST /v1/embeddings, as OpenAI's clients send it and read it."""

import base64
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal

from deploy.serving.searcher import Facts

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
    """What is wrong, in OpenAI's form."""

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


def error_of(path: str, status: int, message: str) -> dict[str, Any]:
    """The body of an error: one line, for paths of OpenAI's in its form."""
    if not path.startswith(PREFIX):
        return {"error": message}
    return {"error": {"message": message, "type": "server_error" if status >= 500 else "invalid_request_error",
                      "param": None, "code": None}}


def body_of(text: Any, most: int, facts: Facts) -> type[BaseModel]:
    """The body of a request: of texts of the type `text`, up to so many. Embeddings of a checkpoint that is not
    whitened have one size."""
    class Input(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)

        input: Annotated[text | Annotated[list[text], Field(min_length=1, max_length=most)],
                         Field(description="a text, or several; tokens of OpenAI's are not taken")]
        model: Annotated[str, Field(max_length=256, description="any name; there is one model")] = "simcse"
        encoding_format: Literal["float", "base64"] = "float"
        dimensions: Annotated[int | None, Field(
            ge=1 if facts.whitened else facts.embedding_size, le=facts.embedding_size,
            description="the first so many numbers, L2-normalized; a whitened checkpoint has them in the order of "
            "their variance, another is not shortened")] = None
        user: Annotated[str | None, Field(max_length=256, description="not looked at")] = None

    return Input


async def answer(body: Any, facts: Facts, ask: Callable[[Sequence[str]], Awaitable[Any]]) -> JSONResponse:
    """The embeddings of a body's texts; `ask` gives those of texts, and their numbers of tokens. HTTPException 400: a
    text is too long."""
    texts, dimensions = [body.input] if isinstance(body.input, str) else body.input, body.dimensions
    embeddings, lengths = await ask(texts)
    for number, length in enumerate(lengths):
        if length > facts.max_seq_length:
            raise HTTPException(400, f"input {number}: has more than {facts.max_seq_length} tokens, which are the most "
                                     "that the model takes; send it in parts")
    if dimensions:
        embeddings = embeddings[:, :dimensions]
        embeddings = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    rows = ([base64.b64encode(row.astype("<f4").tobytes()).decode() for row in embeddings]
            if body.encoding_format == "base64" else embeddings.tolist())
    tokens = int(np.sum(lengths))
    return JSONResponse({"object": "list", "model": body.model, "data": [
        {"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
