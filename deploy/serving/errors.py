"""Every error as JSON of one line: {"error": "..."}, under /v1/ in OpenAI's form."""

from deploy.serving import openai_api

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as HTTPError

MAX_QUOTED = 40  # characters of a request that an error quotes


def error_response(request: Request, status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(openai_api.error_body(request.url.path, status, message), status, headers)


async def answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Answer a body that is not as its schema says."""
    status = 400 if request.url.path.startswith(openai_api.PREFIX) else 422
    if isinstance(error.body, bytes):  # FastAPI has not parsed it
        content_type = request.headers.get("Content-Type")
        return error_response(request, status, "Content-Type: application/json is needed, the request has "
                              + (quote(content_type) if content_type else "none"))
    first = error.errors()[0]
    # The names of unknown fields are the client's: quoted, since they may be long, or no valid text.
    place = ".".join(quote(str(part)) for part in first["loc"])
    problem = first["msg"]
    if first["type"] == "value_error":
        problem = str(first["ctx"]["error"])
    elif first["type"] == "string_pattern_mismatch":
        problem = "String should not be blank"
    elif first["type"] == "json_invalid":
        problem = f"{problem}: {first['ctx']['error']}"
    return error_response(request, status, f"{place}: {problem}")


async def answer_http_error(request: Request, error: HTTPError) -> JSONResponse:
    """Answer what FastAPI or an endpoint refuses."""
    if isinstance(error.__cause__, UnicodeDecodeError):
        return error_response(request, 400, describe_encoding(error.__cause__))
    return error_response(request, error.status_code, str(error.detail), error.headers)


async def answer_exception(request: Request, error: Exception) -> JSONResponse:
    """Answer an error of the service itself, without its message, which may hold what is secret."""
    return error_response(request, 500, f"internal error: {type(error).__name__}")


def describe_encoding(error: UnicodeDecodeError) -> str:
    """Return what is wrong with a body that is not UTF-8."""
    try:
        error.object.decode("gb18030")
        advice = "it looks like GBK; send it as UTF-8"
    except UnicodeDecodeError:
        advice = "JSON is sent as UTF-8"
    return f"the body is not UTF-8 at byte {error.start + 1}; {advice}"


def quote(text: str) -> str:
    """Return the beginning of a text of a request, in ASCII."""
    return ascii(text)[1:-1][:MAX_QUOTED]


def handle_errors(app: FastAPI) -> None:
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(HTTPError, answer_http_error)
    app.add_exception_handler(Exception, answer_exception)
