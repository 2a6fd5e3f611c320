"""The HTTP interface: the endpoints, authentication and headers."""

import asyncio
import contextlib
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

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
    text_type,
)
from simcse.console import InputError, NotFiniteError

from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

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
    422: "the body is not as described", 500: "an error of the service",
    503: "overloaded, or no index; try again after Retry-After seconds", 504: "it took too long"}
log = logging.getLogger(__name__)


@dataclass
class Service:
    """What the endpoints share.

    Args:
        searcher: answers jobs: a `RemoteSearcher` or a `Searcher`.
        limits: those of requests.
        metrics: where the figures are counted.
        token: what clients have to send as bearer token; None: nothing.
    """

    searcher: Any
    limits: Limits
    metrics: Metrics
    token: str | None
    batcher: Batcher = field(init=False)

    def __post_init__(self) -> None:
        self.batcher = Batcher(self.searcher.answer, self.limits.batch, self.limits.waiting)

    @property
    def facts(self) -> Facts:
        return self.searcher.facts

    @property
    def guards(self) -> list[Any]:
        """The dependencies of endpoints that need the token."""
        return [Depends(self.check_token)] if self.token else []

    def check_token(self, sent: Annotated[HTTPAuthorizationCredentials | None,
                                          Depends(HTTPBearer(auto_error=False))]) -> None:
        # Headers are bytes, which starlette gives as Latin-1.
        if not sent or not hmac.compare_digest(sent.credentials.encode("latin-1"), os.fsencode(self.token)):
            raise HTTPException(401, "Authorization: Bearer and the token are needed", {"WWW-Authenticate": "Bearer"})

    def refusals(self) -> dict[int, dict[str, Any]]:
        """Return the error answers of an endpoint, for the OpenAPI description."""
        described = {status: {"model": Error, "description": reason} for status, reason in REFUSALS.items()}
        return described | UNAUTHORIZED if self.token else described

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


def make_app(searcher: Any, limits: Limits, token: str | None = None, metrics: Metrics | None = None) -> FastAPI:
    """Return the app of a searcher.

    Args:
        token: what clients have to send as bearer token; None: nothing. /, /docs and /healthz are open either way.
        metrics: those of the app before, whose figures go on; None: new ones.
    """
    service = Service(searcher, limits, metrics or Metrics(), token)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.metrics.watch(service.batcher, service.facts.documents)
        running = asyncio.create_task(service.batcher.run())
        yield
        running.cancel()

    app = FastAPIOffline(title="SimCSE semantic index", lifespan=lifespan, redoc_url=None,
                         description="Embeddings, cosines and semantic recall of texts.")
    handle_errors(app)
    app.add_middleware(BodyLimit, size=limits.body, seconds=limits.seconds)
    app.add_middleware(Watch, on_answer=service.metrics.count_request, headers_of=headers_of)
    add_model_endpoints(app, service)
    add_openai_endpoint(app, service)
    add_status_endpoints(app, service)
    add_page(app)
    return app


def headers_of(path: str) -> dict[str, str]:
    """Return the security headers of answers at a path."""
    return DOCS_HEADERS if path == "/docs" else HEADERS


def add_model_endpoints(app: FastAPI, service: Service) -> None:
    Texts = embed_body(service.limits)
    Pairs = similarity_body(service.limits)
    Queries = search_body(service.limits, service.facts.modes)
    options = {"dependencies": service.guards, "responses": service.refusals()}

    @app.post("/embed", **options)
    async def embed(body: Texts) -> Embeddings:
        """Embeddings of texts."""
        embedded: Embedded = await service.ask(EmbedJob(body.texts))
        return JSONResponse({"embeddings": embedded.embeddings.tolist()})

    @app.post("/similarity", **options)
    async def similarity(body: Pairs) -> Cosines:
        """Cosine of each pair of texts."""
        embedded: Embedded = await service.ask(EmbedJob([text for pair in body.pairs for text in pair]))
        first = embedded.embeddings[::2]
        second = embedded.embeddings[1::2]
        cosines = (first * second).sum(axis=1).clip(-1, 1)  # rounding of two unit vectors may go beyond 1
        return JSONResponse({"cosines": cosines.tolist()})

    @app.post("/search", **options)
    async def search(body: Queries) -> SearchResults:
        """The documents that are most similar to each query, or, hybrid, that are and have its words."""
        started = time.perf_counter()
        hits_of_queries = await service.ask(SearchJob(body.queries, body.top_k, body.mode))
        results = [[vars(hit) for hit in hits] for hits in hits_of_queries]
        return JSONResponse({"results": results, "documents": service.facts.documents,
                             "milliseconds": round(1000 * (time.perf_counter() - started), 2)})


def add_openai_endpoint(app: FastAPI, service: Service) -> None:
    Body = openai_api.request_body(text_type(service.limits), service.limits.texts, service.facts)
    refusals = {status: {**refusal, "model": openai_api.Error} for status, refusal in service.refusals().items()
                if status != 422}

    @app.post(f"{openai_api.PREFIX}embeddings", dependencies=service.guards, responses=refusals)
    async def embeddings(body: Body) -> openai_api.Embeddings:
        """Embeddings of texts, by OpenAI's protocol. A text of more tokens than the model takes is refused."""
        texts = openai_api.texts_of(body)
        return openai_api.answer(body, await service.ask(EmbedJob(texts)), service.facts)


def add_status_endpoints(app: FastAPI, service: Service) -> None:
    limits = service.limits
    responses = {200: {"content": {"text/plain": {}}}}
    if service.token:
        responses |= UNAUTHORIZED

    @app.get("/healthz")
    async def healthz() -> Health:
        """Whether the service is up, and what it serves."""
        return Health(status="ok", documents=service.facts.documents, embedding_size=service.facts.embedding_size,
                      max_texts=limits.texts, max_text_length=limits.text_length, max_top_k=limits.top_k,
                      modes=list(service.facts.modes))

    @app.get("/metrics", dependencies=service.guards, response_class=Response, responses=responses)
    async def prometheus() -> Response:
        """Figures for Prometheus."""
        content = generate_latest(service.metrics.registry)
        return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})


def add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
