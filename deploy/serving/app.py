"""The HTTP interface: the endpoints, authentication and headers."""

import asyncio
import contextlib
import functools
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from deploy.serving import openai_api
from deploy.serving.batching import Batcher, OverloadedError
from deploy.serving.errors import handle_errors
from deploy.serving.jobs import Embedded, EmbedJob, Facts, Job, SearchJob
from deploy.serving.metrics import Metrics
from deploy.serving.middleware import BodyLimit, Watch
from deploy.serving.schemas import (
    Cosines,
    Embeddings,
    Error,
    Health,
    Limits,
    SearchResults,
    embed_body,
    search_body,
    similarity_body,
)
from simcse.console import InputError, NotFiniteError
from simcse.text.prefixes import DOCUMENT, QUERY

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import Receive, Scope, Send

PAGE = Path(__file__).parent / "page"
RETRY_AFTER = {"Retry-After": "1"}  # seconds
CONTENT_SECURITY = ("default-src 'none'; script-src 'self'{inline}; style-src 'self'{inline}; connect-src 'self'; "
                    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
HEADERS = {"Content-Security-Policy": CONTENT_SECURITY.format(inline=""), "X-Content-Type-Options": "nosniff",
           "Referrer-Policy": "no-referrer"}
# Swagger's page starts itself by a script within the page.
DOCS_HEADERS = {**HEADERS, "Content-Security-Policy": CONTENT_SECURITY.format(inline=" 'unsafe-inline'")}
UNAUTHORIZED = {401: {"model": Error, "description": "no token, or another one"}}
REFUSALS = {
    400: "no UTF-8, or no JSON", 408: "the body came too slowly", 413: "the body is too large",
    415: "the body is compressed", 422: "the body is not as described", 500: "an error of the service",
    503: "overloaded, or no index; try again after Retry-After seconds", 504: "it took too long"}
log = logging.getLogger(__name__)


class SearcherApp:
    """An ASGI application that answers by one searcher.

    The endpoints are shared by all searchers that serve the same kinds of requests: FastAPI keeps what it knows of an
    endpoint for ever, so that new ones for every searcher would fill the memory of a service that follows its index.
    Each request carries the `SearcherApp` that answers it.

    Args:
        searcher: answers jobs: a `RemoteSearcher` or a `Searcher`.
        endpoints: what `make_endpoints` has returned for this searcher.
        limits: those of requests.
        metrics: where the figures are counted.
    """

    def __init__(self, searcher: Any, endpoints: FastAPI, limits: Limits, metrics: Metrics) -> None:
        self.searcher = searcher
        self.endpoints = endpoints
        self.limits = limits
        self.metrics = metrics
        self.batcher = Batcher(searcher.answer, limits.batch, limits.waiting)

    @property
    def facts(self) -> Facts:
        return self.searcher.facts

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Answer, and show this searcher's figures, until the context ends."""
        self.metrics.watch(self.batcher, self.facts.documents)
        running = asyncio.create_task(self.batcher.run())
        try:
            yield
        finally:
            running.cancel()
            self.batcher.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = {**scope.get("state", {}), "app": self}
        scope = {**scope, "state": state}
        if scope.get("method") == "HEAD":  # a websocket has no method
            scope["method"] = "GET"  # the server leaves out the body
        await self.endpoints(scope, receive, send)

    async def ask(self, job: Job) -> Any:
        """Return the answer to a job.

        Raises:
            HTTPException: it cannot be answered.
        """
        try:
            return await asyncio.wait_for(self.batcher.ask(job), self.limits.seconds)
        except OverloadedError:
            raise HTTPException(503, "too many texts wait already; try again", RETRY_AFTER) from None
        except asyncio.TimeoutError:
            raise HTTPException(504, f"no answer within {self.limits.seconds:g} s") from None
        except NotFiniteError as error:
            log.error("%s", error)
            raise HTTPException(500, str(error)) from None
        except InputError as error:  # Milvus does not answer, for instance
            log.error("%s", error)
            raise HTTPException(503, "the index does not answer; try again", RETRY_AFTER) from None
        except Exception as error:
            log.exception("an error of the service itself")
            raise HTTPException(500, f"internal error: {type(error).__name__}") from None

    async def embed(self, texts: Sequence[str], input_type: str, request: Request) -> AsyncIterator[Embedded]:
        """Yield the embeddings of texts of one input type, in batches, between which other requests are answered.

        Raises:
            HTTPException: see `ask`; or the client of the request is gone.
        """
        for start in range(0, len(texts), self.limits.batch):
            if await request.is_disconnected():
                raise HTTPException(408, "the client is gone")
            batch = texts[start : start + self.limits.batch]
            yield await self.ask(EmbedJob(batch, [input_type] * len(batch)))


def app_of(request: Request) -> SearcherApp:
    """Return what answers a request."""
    return request.state.app


Answering = Annotated[SearcherApp, Depends(app_of)]


class Kinds(NamedTuple):
    """The kinds of requests that a searcher answers, and with them the endpoints' schemas.

    Attributes:
        modes: modes of a search; the last is the default.
        dimensions: the sizes that embeddings may be asked for.
    """

    modes: tuple[str, ...]
    dimensions: range


def kinds_of(facts: Facts) -> Kinds:
    """Return the kinds of requests that a searcher with these facts answers."""
    smallest = 1 if facts.whitened else facts.embedding_size  # only whitened embeddings may be shortened
    return Kinds(facts.modes, range(smallest, facts.embedding_size + 1))


def make_app(searcher: Any, limits: Limits, token: str | None = None, metrics: Metrics | None = None) -> SearcherApp:
    """Return the app of a searcher.

    Args:
        token: what clients have to send as bearer token; None: nothing. /, /docs and /healthz are open either way.
        metrics: those of the app before, whose figures go on; None: new ones.
    """
    metrics = metrics or Metrics()
    return SearcherApp(searcher, make_endpoints(kinds_of(searcher.facts), limits, token, metrics), limits, metrics)


@functools.cache
def make_endpoints(kinds: Kinds, limits: Limits, token: str | None, metrics: Metrics) -> FastAPI:
    """Return the endpoints of all searchers that answer some kinds of requests; the same for the same arguments."""
    app = FastAPIOffline(title="SimCSE semantic index", redoc_url=None,
                         description="Embeddings, cosines and semantic recall of texts.")
    handle_errors(app)
    app.add_middleware(BodyLimit, size=limits.body, seconds=limits.seconds)
    app.add_middleware(Watch, on_answer=metrics.count_request, headers_of=headers_of)
    add_model_endpoints(app, kinds, limits, token)
    add_openai_endpoints(app, kinds, token)
    add_status_endpoints(app, limits, token, metrics)
    add_page(app)
    return app


# ---------------------------------------------------------------------------------------------------------- the token
def guards_of(token: str | None) -> list[Any]:
    """Return the dependencies of endpoints that need the token."""
    if not token:
        return []

    def check_token(sent: Annotated[HTTPAuthorizationCredentials | None,
                                    Depends(HTTPBearer(auto_error=False))]) -> None:
        # Headers are bytes, which starlette gives as Latin-1.
        if not sent or not hmac.compare_digest(sent.credentials.encode("latin-1"), os.fsencode(token)):
            raise HTTPException(401, "Authorization: Bearer and the token are needed", {"WWW-Authenticate": "Bearer"})

    return [Depends(check_token)]


def refusals_of(token: str | None) -> dict[int, dict[str, Any]]:
    """Return the error answers of an endpoint, for the OpenAPI description."""
    described = {status: {"model": Error, "description": reason} for status, reason in REFUSALS.items()}
    return described | UNAUTHORIZED if token else described


# ------------------------------------------------------------------------------------------------------ the endpoints
def headers_of(path: str) -> dict[str, str]:
    """Return the security headers of answers at a path."""
    return DOCS_HEADERS if path == "/docs" else HEADERS


def add_model_endpoints(app: FastAPI, kinds: Kinds, limits: Limits, token: str | None) -> None:
    Texts = embed_body(limits)
    Pairs = similarity_body(limits)
    Queries = search_body(limits, kinds.modes)
    options = {"dependencies": guards_of(token), "responses": refusals_of(token)}

    @app.post("/embed", **options)
    async def embed(body: Texts, answering: Answering) -> Embeddings:
        """Embeddings of texts."""
        embedded: Embedded = await answering.ask(EmbedJob(body.texts, [body.input_type] * len(body.texts)))
        return JSONResponse({"embeddings": embedded.embeddings.tolist()})

    @app.post("/similarity", **options)
    async def similarity(body: Pairs, answering: Answering) -> Cosines:
        """Cosine of each pair of a query and a document."""
        texts = [text for pair in body.pairs for text in pair]
        embedded: Embedded = await answering.ask(EmbedJob(texts, [QUERY, DOCUMENT] * len(body.pairs)))
        first = embedded.embeddings[::2]
        second = embedded.embeddings[1::2]
        cosines = (first * second).sum(axis=1).clip(-1, 1)  # rounding of two unit vectors may go beyond 1
        return JSONResponse({"cosines": cosines.tolist()})

    @app.post("/search", **options)
    async def search(body: Queries, answering: Answering) -> SearchResults:
        """The documents that are most similar to each query, or, hybrid, that are and have its words."""
        started = time.perf_counter()
        hits_of_queries = await answering.ask(SearchJob(body.queries, body.top_k, body.mode))
        results = [[vars(hit) for hit in hits] for hits in hits_of_queries]
        return JSONResponse({"results": results, "documents": answering.facts.documents,
                             "milliseconds": round(1000 * (time.perf_counter() - started), 2)})


def add_openai_endpoints(app: FastAPI, kinds: Kinds, token: str | None) -> None:
    Body = openai_api.request_body(kinds.dimensions)
    guards = guards_of(token)
    refusals = {status: {**refusal, "model": openai_api.Error} for status, refusal in refusals_of(token).items()
                if status != 422}
    prefix = openai_api.PREFIX

    @app.post(f"{prefix}embeddings", dependencies=guards, responses=refusals)
    async def embeddings(body: Body, answering: Answering, request: Request) -> openai_api.Embeddings:
        """Embeddings of texts, by OpenAI's protocol. A text of more tokens than the model takes is refused."""
        embedded = []
        texts = openai_api.texts_of(body)
        async for batch in answering.embed(texts, body.input_type, request):
            openai_api.check_lengths(batch, len(embedded) * answering.limits.batch, answering.facts.max_seq_length)
            embedded.append(batch)
        return openai_api.answer(body, embedded)

    @app.get(f"{prefix}models", dependencies=guards, responses=refusals)
    async def models() -> openai_api.Models:
        """The one model of this service, by OpenAI's protocol."""
        return openai_api.Models(object="list", data=[openai_api.MODEL])

    @app.get(f"{prefix}models/{{name}}", dependencies=guards, responses=refusals)
    async def model(name: str) -> openai_api.Model:
        """The one model of this service, whatever a client calls it."""
        return openai_api.MODEL


def add_status_endpoints(app: FastAPI, limits: Limits, token: str | None, metrics: Metrics) -> None:
    responses = {200: {"content": {"text/plain": {}}}}
    if token:
        responses |= UNAUTHORIZED

    @app.get("/healthz")
    async def healthz(answering: Answering) -> Health:
        """Whether the service is up, and what it serves."""
        facts = answering.facts
        return Health(status="ok", documents=facts.documents, embedding_size=facts.embedding_size,
                      max_texts=limits.texts, max_text_length=limits.text_length, max_top_k=limits.top_k,
                      modes=list(facts.modes), index_is_outdated=metrics.index_is_outdated)

    @app.get("/metrics", dependencies=guards_of(token), response_class=Response, responses=responses)
    async def prometheus() -> Response:
        """Figures for Prometheus."""
        content = generate_latest(metrics.registry)
        return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})


def add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
