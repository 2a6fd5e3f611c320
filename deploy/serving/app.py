"""The HTTP interface: what is asked and answered, limits, authentication, metrics.

Every error is JSON of one line, {"error": "..."}.
"""

import asyncio
import contextlib
import functools
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from deploy.serving import openai_api
from deploy.serving.batching import Batcher, Job, OverloadedError
from deploy.serving.middleware import BodyLimit, Watch
from deploy.serving.searcher import Searcher
from simcse.console import InputError

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from starlette.exceptions import HTTPException as HTTPError

PAGE = Path(__file__).parent / "page"
# A character that str.strip would leave; what \S means differs between Python, pydantic and JSON Schema.
MODES = ("embedding", "hybrid")
NOT_BLANK = r"[^\x09-\x0d\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
RETRY_AFTER = {"Retry-After": "1"}  # seconds
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src "
                               "'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
# Swagger's page starts itself by a script within the page.
DOCS_SECURITY = {**SECURITY, "Content-Security-Policy": SECURITY["Content-Security-Policy"].replace(
    "script-src 'self'; style-src 'self'", "script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'")}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Args:
        texts: texts, pairs or queries of a request.
        text_length: characters of a text.
        top_k: documents recalled for a query.
        body: bytes of a request's body.
        seconds: time to read a body, and to answer it.
        batch, waiting: texts that are computed together, and that wait for it.
    """

    texts: int = 64
    text_length: int = 2000
    top_k: int = 100
    body: int = 1 << 20
    seconds: float = 30.0
    batch: int = 64
    waiting: int = 1024


class Strict(BaseModel):
    """A body without fields that do nothing, and without values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Error(BaseModel):
    error: Annotated[str, Field(description="what is wrong, in one line")]


class Embeddings(BaseModel):
    embeddings: Annotated[list[list[float]], Field(description="of every text, L2-normalized")]


class Cosines(BaseModel):
    cosines: Annotated[list[float], Field(description="of every pair, from -1 to 1")]


class Hit(BaseModel):
    rank: int
    line: Annotated[int | None, Field(description="in the corpus, from 1; null where it is not known")]
    id: Annotated[str | None, Field(description="of the document; null where the corpus has none")]
    document: str
    cosine: float
    score: Annotated[float | None, Field(description="hybrid: the cosine plus BM25's score by the query's highest")]
    words: Annotated[list[str] | None, Field(description="hybrid: those of the query that the document has")]
    passage: Annotated[str | None, Field(description="that was found; null where the index has no passages")]


class Found(BaseModel):
    results: Annotated[list[list[Hit]], Field(description="of every query the documents, the most similar first")]
    documents: Annotated[int, Field(description="how many are searched")]
    milliseconds: Annotated[float, Field(description="from the arrival of the request to its answer")]


class Health(BaseModel):
    status: str
    documents: int
    embedding_size: int
    max_texts: int
    max_text_length: int
    max_top_k: int
    modes: Annotated[list[str], Field(description="of /search; the last is the default")]


def text_of(limits: Limits) -> Any:
    return Annotated[str, StringConstraints(min_length=1, max_length=limits.text_length, pattern=NOT_BLANK)]


def bodies(limits: Limits, modes: Sequence[str]) -> tuple[type[Strict], type[Strict], type[Strict]]:
    """The bodies of /embed, /similarity and /search, which have the limits in their schema."""
    text = text_of(limits)
    many = Field(min_length=1, max_length=limits.texts)
    pair = Annotated[list[text], Field(min_length=2, max_length=2)]
    # 3.0 is an integer of JSON Schema, too.
    whole = BeforeValidator(lambda given: int(given) if isinstance(given, float) and given.is_integer() else given)

    class Texts(Strict):
        texts: Annotated[list[text], many]

    class Pairs(Strict):
        pairs: Annotated[list[pair], many]

    class Queries(Strict):
        queries: Annotated[list[text], many]
        top_k: Annotated[int, Field(ge=1, le=limits.top_k, description="documents for each query"), whole] = min(
            10, limits.top_k)
        mode: Annotated[Literal[tuple(modes)], Field(
            description="embedding: by cosines; hybrid: fused with BM25, where the index has it")] = modes[-1]

    return Texts, Pairs, Queries


class Metrics:
    """What GET /metrics tells, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("simcse_requests", "Requests", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("simcse_request_seconds", "Time to answer a request", ["path"],
                                 registry=self.registry)
        self.batch_jobs = Histogram("simcse_batch_requests", "Requests of a batch", registry=self.registry,
                                    buckets=[2**i for i in range(9)])
        self.texts = Counter("simcse_texts", "Texts encoded, repeated ones included", registry=self.registry)
        self.waiting = Gauge("simcse_waiting_texts", "Texts that wait for a batch", registry=self.registry)
        self.documents = Gauge("simcse_documents", "Documents that are searched", registry=self.registry)

    def watch(self, searcher: Searcher, batcher: Batcher) -> None:
        """Tell of these from now on."""
        self.waiting.set_function(lambda: batcher.waiting)
        self.documents.set(searcher.facts.documents)
        batcher.batched = self._batched

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    def _batched(self, jobs: int, texts: int) -> None:
        self.batch_jobs.observe(jobs)
        self.texts.inc(texts)


def error(request: Request, status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(openai_api.error_of(request.url.path, status, message), status, headers)


def not_utf8(found: UnicodeDecodeError) -> str:
    """What is wrong with a body that could not be decoded."""
    try:
        found.object.decode("gb18030")
        looks = "it looks like GBK; send it as UTF-8"
    except UnicodeDecodeError:
        looks = "JSON is sent as UTF-8"
    return f"the body is not UTF-8 at byte {found.start + 1}; {looks}"


def handle_errors(app: FastAPI) -> None:
    """Every error as JSON of one line."""
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, found: RequestValidationError) -> JSONResponse:
        refused_as = 400 if request.url.path.startswith(openai_api.PREFIX) else 422
        if isinstance(found.body, bytes):  # what FastAPI leaves as it came
            given = request.headers.get("Content-Type")
            return error(request, refused_as, "Content-Type: application/json is needed, the request has "
                              + (ascii(given)[1:-1][:40] if given else "none"))
        first = found.errors()[0]
        # Not what was sent: it may be long, or no valid text; the name of a field that is not known is, too.
        where = ".".join(ascii(str(part))[1:-1][:40] for part in first["loc"])
        what = first["msg"]
        if first["type"] == "string_pattern_mismatch":
            what = "String should not be blank"
        elif first["type"] == "json_invalid":
            what = f"{what}: {first['ctx']['error']}"
        return error(request, refused_as, f"{where}: {what}")

    @app.exception_handler(HTTPError)
    async def refused(request: Request, found: HTTPError) -> JSONResponse:
        if isinstance(found.__cause__, UnicodeDecodeError):
            return error(request, 400, not_utf8(found.__cause__))
        return error(request, found.status_code, str(found.detail), found.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, found: Exception) -> JSONResponse:
        return error(request, 500, f"internal error: {type(found).__name__}")


def bearer(token: str | None) -> list[Any]:
    """What asks for `Authorization: Bearer <token>`, where there is a token."""
    if not token:
        return []

    def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]) -> None:
        # Headers are bytes, which starlette gives as Latin-1.
        if not given or not hmac.compare_digest(given.credentials.encode("latin-1"), os.fsencode(token)):
            raise HTTPException(401, "Authorization: Bearer and the token are needed", {"WWW-Authenticate": "Bearer"})

    return [Depends(check)]


def make_app(searcher: Searcher, limits: Limits, token: str | None = None, metrics: Metrics | None = None) -> FastAPI:
    """The service.

    Args:
        token: what clients have to send as bearer token; None: nothing. /, /docs and /healthz are open either way.
        metrics: those of the app before, which are gone on with.
    """
    batcher = Batcher(searcher.answer, limits.batch, limits.waiting)
    metrics = metrics or Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        metrics.watch(searcher, batcher)
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()

    app = FastAPIOffline(title="SimCSE semantic index", lifespan=lifespan, redoc_url=None,
                         description="Embeddings, cosines and semantic recall of texts.")
    handle_errors(app)
    app.add_middleware(BodyLimit, size=limits.body, seconds=limits.seconds)
    app.add_middleware(Watch, tell=metrics.request,
                       headers=lambda path: DOCS_SECURITY if path == "/docs" else SECURITY)
    add_endpoints(app, searcher, batcher, limits, bearer(token), metrics)
    return app


def asker(batcher: Batcher, limits: Limits) -> Callable[..., Awaitable[Any]]:
    """What asks the batcher for a `Job` of texts, and makes HTTP's errors of what goes wrong."""
    async def ask(texts: list[str], **what: Any) -> Any:
        try:
            return await asyncio.wait_for(batcher.ask(Job(texts, **what)), limits.seconds)
        except OverloadedError:
            raise HTTPException(503, "too many texts wait already; try again", RETRY_AFTER) from None
        except asyncio.TimeoutError:
            raise HTTPException(504, f"no answer within {limits.seconds:g} s") from None
        except InputError as found:  # Milvus is gone
            log.error("%s", found)
            raise HTTPException(503, "the index does not answer; try again", RETRY_AFTER) from None
        except Exception as found:
            log.exception("an error of the service itself")
            raise HTTPException(500, f"internal error: {type(found).__name__}") from None

    return ask


def add_endpoints(app: FastAPI, searcher: Searcher, batcher: Batcher, limits: Limits, guards: list[Any],
                  metrics: Metrics) -> None:
    modes = MODES if searcher.facts.hybrid else MODES[:1]
    Texts, Pairs, Queries = bodies(limits, modes)
    OfOpenai = openai_api.body_of(text_of(limits), limits.texts, searcher.facts)
    says = {400: "no UTF-8, or no JSON", **({401: "no token, or another one"} if guards else {}),
            408: "the body came too slowly", 413: "the body is too large", 422: "not what is asked for",
            500: "an error of the service", 503: "overloaded, or no index; try again after Retry-After seconds",
            504: "it took too long"}
    asked = {"dependencies": guards, "responses": {status: {"model": Error, "description": text}
                                                   for status, text in says.items()}}
    ask = asker(batcher, limits)

    @app.post("/embed", **asked)
    async def embed(body: Texts) -> Embeddings:
        """Embeddings of texts."""
        return JSONResponse({"embeddings": (await ask(body.texts)).tolist()})

    @app.post("/similarity", **asked)
    async def similarity(body: Pairs) -> Cosines:
        """Cosine of each pair of texts."""
        embeddings = await ask([text for pair in body.pairs for text in pair])
        # Rounding of two unit vectors may go beyond 1.
        cosines = (embeddings[::2] * embeddings[1::2]).sum(axis=1).clip(-1, 1)
        return JSONResponse({"cosines": cosines.tolist()})

    @app.post("/search", **asked)
    async def search(body: Queries) -> Found:
        """The documents that are most similar to each query, or, hybrid, that are and have its words."""
        started = time.perf_counter()
        found = await ask(body.queries, top_k=body.top_k, hybrid=body.mode == "hybrid")
        results = [[{"rank": rank, **hit._asdict()} for rank, hit in enumerate(hits, 1)] for hits in found]
        return JSONResponse({"results": results, "documents": searcher.facts.documents,
                             "milliseconds": round(1000 * (time.perf_counter() - started), 2)})

    @app.post(f"{openai_api.PREFIX}embeddings", dependencies=guards, responses={
        status: {"model": openai_api.Error, "description": text} for status, text in says.items() if status != 422})
    async def embeddings(body: OfOpenai) -> openai_api.Embeddings:
        """Embeddings of texts, by OpenAI's protocol. A text of more tokens than the model takes is refused."""
        return await openai_api.answer(body, searcher.facts, functools.partial(ask, counted=True))

    @app.get("/healthz")
    async def healthz() -> Health:
        """Whether the service is up, and what it serves."""
        return Health(status="ok", documents=searcher.facts.documents, embedding_size=searcher.facts.embedding_size,
                      max_texts=limits.texts, max_text_length=limits.text_length, max_top_k=limits.top_k,
                      modes=modes)

    @app.get("/metrics", dependencies=guards, response_class=Response, responses={
        200: {"content": {"text/plain": {}}}, **({401: asked["responses"][401]} if guards else {})})
    async def prometheus() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
