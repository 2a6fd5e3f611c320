"""A search service: an exported model and an index behind HTTP, with a search page.

    python deploy/serving/server.py --model_dir ./output --index_path my_index --device cpu
    python deploy/serving/server.py --model_dir ./output --milvus_uri ./recall.db --device cpu
    curl -s localhost:8000/search -H 'Content-Type: application/json' -d '{"queries": ["语义检索"], "top_k": 3}'

POST /embed, /similarity, /search, and /v1/embeddings as OpenAI's clients send it; GET /healthz and /metrics; / is the
search page and /docs describes all of it. With SIMCSE_TOKEN in the environment, clients have to send it as bearer
token. Ctrl-C and SIGTERM stop it after what is being answered; an index folder that has been replaced, and after SIGHUP
the model as well, is opened again and takes over.
"""

import argparse
import asyncio
import functools
import logging
import os
import signal
import socket
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from simcse import console, flags


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("model and index")
    group.add_argument("--model_dir", type=flags.folder, default="./output", help="what export_model.py wrote")
    group.add_argument("--index_path", type=flags.folder, default=None, help="what recall.py --index_path kept")
    group.add_argument("--milvus_uri", type=flags.milvus_uri, default=None,
                       help="instead of --index_path: http://host:port of Milvus, its token in the environment as "
                       "MILVUS_TOKEN; or the .db file of Milvus Lite")
    group.add_argument("--milvus_collection", type=flags.nonempty_text, default=None,
                       help=f"collection that recall.py filled; None: {flags.COLLECTION}")
    group.add_argument("--distinct", action="store_true",
                       help="each text once, however many lines of the corpus have it")
    flags.add_device_arguments(group)
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16", "int8"), default=None,
                       help="number format of the matrix products; None: that of the index")
    group = parser.add_argument_group("server")
    group.add_argument("--host", type=flags.nonempty_text, default="127.0.0.1",
                       help="address to listen on; 0.0.0.0: all of this machine's")
    group.add_argument("--port", type=flags.port, default=8000, help="port to listen on; 0: any that is free")
    group = parser.add_argument_group("limits")
    group.add_argument("--max_texts", type=flags.positive_int, default=64, help="texts, pairs or queries of a request")
    group.add_argument("--max_text_length", type=flags.positive_int, default=2000, help="characters of a text")
    group.add_argument("--max_top_k", type=flags.positive_int, default=100, help="documents recalled for a query")
    group.add_argument("--max_body", type=flags.positive_int, default=1 << 20, help="bytes of a request's body")
    group.add_argument("--max_seconds", type=flags.positive_float, default=30.0,
                       help="seconds to read a body, to answer it, and to finish when stopped")
    group.add_argument("--max_batch", type=flags.positive_int, default=64,
                       help="texts of concurrent requests that are computed together")
    group.add_argument("--max_waiting", type=flags.positive_int, default=1024,
                       help="texts that may wait; what comes then is answered 503")
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that say too little, or two things."""
    if bool(args.index_path) == bool(args.milvus_uri):
        parser.error("one of --index_path and --milvus_uri is needed" + (", not both" if args.index_path else ""))
    if args.milvus_collection and not args.milvus_uri:
        parser.error("--milvus_collection needs --milvus_uri")
    args.milvus_collection = args.milvus_collection or flags.COLLECTION
    flags.check_arguments(parser, args)
    token = os.environ.get("SIMCSE_TOKEN", "")
    if token != token.strip():
        parser.error("SIMCSE_TOKEN in the environment begins or ends with white space, which no client can send")


def listen(args: argparse.Namespace) -> socket.socket:
    """A socket that listens where the flags say; opened before anything that takes time."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
    except (OSError, TypeError) as error:  # the latter of a name that cannot be one
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise console.InputError(f"--host {args.host} --port {args.port}: {reason}") from None
    listener.listen(1024)
    return listener


def serve(args: argparse.Namespace, listener: socket.socket) -> None:
    """Answer until SIGINT or SIGTERM."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nothing is open yet
    from deploy.serving.app import Limits, Metrics, make_app
    from deploy.serving.following import Following, stamp_of
    from deploy.serving.remote import RemoteSearcher

    import uvicorn

    limits = Limits(args.max_texts, args.max_text_length, args.max_top_k, args.max_body, args.max_seconds,
                    args.max_batch, args.max_waiting)
    token, metrics = os.environ.get("SIMCSE_TOKEN"), Metrics()
    # Also of what is opened; and uvicorn raises what stopped it again when all is answered.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    app = Following(lambda: RemoteSearcher(args), lambda searcher: make_app(searcher, limits, token, metrics),
                    functools.partial(stamp_of, args), 2 * args.max_seconds + 1)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    facts = app.searcher.facts
    console.log(f"{facts.documents:,} documents in {facts.precision} at {address}, API at {address}/docs"
                + (", with the token of SIMCSE_TOKEN" if token else ""))
    if not token and host not in ("127.0.0.1", "::1"):
        console.warn(f"--host {args.host}: whoever reaches this machine can use it; SIMCSE_TOKEN in the environment "
                     "asks for a token")
    # h11 bounds the size of headers; httptools, which uvicorn takes where it is installed, does not.
    config = uvicorn.Config(app, http="h11", log_config=None, access_log=False, server_header=False, lifespan="on",
                            timeout_graceful_shutdown=1 + round(args.max_seconds))
    # Of requests that are cut off then it says how many, and would add a traceback each.
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)))
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        app.searcher.close()
        console.log("stopped")
        if app.searcher.ended:
            raise SystemExit("server.py: error: the process of the model has ended")


def main() -> None:
    args = parse_args()
    listener = listen(args)
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.ERROR)
    flags.announce(argparse.Namespace(**{**vars(args), "precision": args.precision or "precision of the index"}),
                 f"{args.model_dir} with {args.index_path or args.milvus_uri}")
    try:
        serve(args, listener)
    except ModuleNotFoundError as error:
        raise console.InputError(f"{error.name} is not installed; pip install -r requirements-serving.txt") from None


if __name__ == "__main__":
    console.run(main)
