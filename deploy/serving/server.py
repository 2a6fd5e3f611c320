"""A search service: an exported model and an index behind HTTP, with a search page.

    python deploy/serving/server.py --model_dir ./output --index_path my_index --device cpu
    python deploy/serving/server.py --model_dir ./output --milvus_uri ./recall.db --device cpu
    curl -s localhost:8000/search -H 'Content-Type: application/json' -d '{"queries": ["语义检索"], "top_k": 3}'

POST /embed, /similarity, /search, and /v1/embeddings as OpenAI's clients send it; GET /healthz and /metrics; / is the
search page and /docs describes all of it. With SIMCSE_TOKEN in the environment, clients have to send it as bearer
token. Ctrl-C and SIGTERM stop it after requests under way are answered. It opens an index folder again that has been
replaced, and after SIGHUP the model as well.
"""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from simcse import console, flags
from simcse.index import milvus_types
from simcse.machine import CPU_THREADS

KEEP_ALIVE = 75  # seconds that an idle connection stays open: longer than proxies keep theirs (60 s), as nginx does

if TYPE_CHECKING:
    from deploy.serving.reloading import ReloadingApp


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("model and index")
    group.add_argument("--model_dir", type=flags.folder, default="./output", help="folder that export_model.py wrote")
    group.add_argument("--index_path", type=flags.folder, default=None, help="folder that recall.py --index_path wrote")
    group.add_argument("--milvus_uri", type=flags.milvus_uri, default=None,
                       help="instead of --index_path: http://host:port of Milvus (MILVUS_TOKEN in the environment is "
                       "its token), or the .db file of Milvus Lite")
    group.add_argument("--milvus_collection", type=flags.nonempty_text, default=None,
                       help=f"collection that recall.py filled (default: {flags.COLLECTION})")
    group.add_argument("--milvus_index_params", type=milvus_types.parse_parameters, default={},
                       metavar="NAME=VALUE,...",
                       help="parameters of a search, such as ef=200, instead of those that the collection records")
    group.add_argument("--distinct", action="store_true",
                       help="give each text once, not once for every line of the corpus that has it")
    group.add_argument("--query_prefix", type=flags.prefix, metavar="TEXT",
                       help='put this before each query that is encoded; "": nothing (default: as the model records)')
    flags.add_device_arguments(group)
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16", "int8"), default=None,
                       help="number format of the matrix products (default: the one that the index records)")
    group = parser.add_argument_group("server")
    group.add_argument("--host", type=flags.nonempty_text, default="127.0.0.1",
                       help="address to listen on; 0.0.0.0: all addresses of this machine")
    group.add_argument("--port", type=flags.port, default=8000, help="port to listen on; 0: any free one")
    group = parser.add_argument_group("limits")
    group.add_argument("--max_texts", type=flags.positive_int, default=64,
                       help="most texts, pairs or queries of a request; /v1/embeddings takes 2048, as OpenAI's does")
    group.add_argument("--max_text_length", type=flags.positive_int, default=2000, help="most characters of a text")
    group.add_argument("--max_top_k", type=flags.positive_int, default=100, help="most documents for a query")
    group.add_argument("--max_body", type=flags.positive_int, default=8 << 20, help="most bytes of a request's body")
    group.add_argument("--max_seconds", type=flags.positive_float, default=30.0,
                       help="most seconds to read a body, to answer it, and to finish when stopped")
    group.add_argument("--max_batch", type=flags.positive_int, default=64,
                       help="most texts of concurrent requests that are computed together")
    group.add_argument("--max_waiting", type=flags.positive_int, default=1024,
                       help="most texts that may wait; further requests are answered 503")
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, or name no index."""
    if bool(args.index_path) == bool(args.milvus_uri):
        parser.error("one of --index_path and --milvus_uri is needed" + (", not both" if args.index_path else ""))
    if args.milvus_collection and not args.milvus_uri:
        parser.error("--milvus_collection needs --milvus_uri")
    if args.milvus_index_params and not args.milvus_uri:
        parser.error("--milvus_index_params needs --milvus_uri")
    to_build, _ = milvus_types.split_settings(args.milvus_index_params)
    if to_build:
        parser.error(f"--milvus_index_params: {', '.join(to_build)} cannot be changed after the collection was built")
    args.milvus_collection = args.milvus_collection or flags.COLLECTION
    flags.set_max_seq_length(args)
    flags.check_arguments(parser, args)
    token = os.environ.get("SIMCSE_TOKEN", "")
    if token != token.strip():
        parser.error("SIMCSE_TOKEN in the environment begins or ends with white space, which no client can send")


def listen(args: argparse.Namespace) -> socket.socket:
    """Return a socket that listens at --host and --port; opened before anything that takes time."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
    except (OSError, TypeError) as error:  # TypeError: no name of a host is like that
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise console.InputError(f"--host {args.host} --port {args.port}: {reason}") from None
    listener.listen(1024)
    return listener


def announce(args: argparse.Namespace) -> None:
    """Log what is about to be opened."""
    device = args.device
    if device == "cpu":
        device = f"cpu, {console.count(args.cpu_threads or CPU_THREADS, 'thread')}"
    precision = args.precision or "precision of the index"
    console.log(f"{console.PROGRAM}: {device}, {precision}; {args.model_dir} with {args.index_path or args.milvus_uri}")


def open_service(args: argparse.Namespace) -> "ReloadingApp":
    """Open the model and the index, and return the application that serves them."""
    from deploy.serving.app import make_app
    from deploy.serving.metrics import Metrics
    from deploy.serving.reloading import ReloadingApp, index_stamp
    from deploy.serving.remote import RemoteSearcher
    from deploy.serving.schemas import Limits

    limits = Limits(texts=args.max_texts, text_length=args.max_text_length, top_k=args.max_top_k, body=args.max_body,
                    seconds=args.max_seconds, batch=args.max_batch, waiting=args.max_waiting)
    metrics = Metrics()
    return ReloadingApp(
        new_searcher=lambda: RemoteSearcher(args),
        make_app=lambda searcher: make_app(searcher, limits, os.environ.get("SIMCSE_TOKEN"), metrics),
        stamp=lambda: index_stamp(args),
        patience=2 * args.max_seconds + 1,
        on_outdated=metrics.set_outdated)


def report(args: argparse.Namespace, app: "ReloadingApp", listener: socket.socket) -> None:
    """Log what is served, and where; warn where anybody can use it."""
    token = os.environ.get("SIMCSE_TOKEN")
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    facts = app.searcher.facts
    message = f"{console.count(facts.documents, 'document')} in {facts.precision} at {address}, API at {address}/docs"
    if token:
        message += ", with the token of SIMCSE_TOKEN"
    console.log(message)
    if not token and host not in ("127.0.0.1", "::1"):
        console.warn(f"--host {args.host}: whoever reaches this machine can use it; SIMCSE_TOKEN in the environment "
                     "asks for a token")


def drop_cancelled_requests(record: logging.LogRecord) -> bool:
    """Return False, which drops a log record, for the traceback of a request that was cut off.

    uvicorn says how many requests it cuts off when it stops, and would log a traceback for each.
    """
    is_cancelled = bool(record.exc_info) and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not is_cancelled


def serve(args: argparse.Namespace, listener: socket.socket) -> None:
    """Answer until SIGINT or SIGTERM."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is nothing to open again yet
    # While the index is opened; and uvicorn, which has its own handler, raises the signal again in the end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    import uvicorn

    app = open_service(args)
    report(args, app, listener)
    # h11 limits the size of headers; httptools, which uvicorn takes where it is installed, does not.
    config = uvicorn.Config(app, http="h11", log_config=None, access_log=False, server_header=False, lifespan="on",
                            timeout_keep_alive=KEEP_ALIVE,
                            timeout_graceful_shutdown=1 + round(args.max_seconds))
    logging.getLogger("uvicorn.error").addFilter(drop_cancelled_requests)
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
    announce(args)
    try:
        serve(args, listener)
    except ModuleNotFoundError as error:
        raise console.InputError(f"{error.name} is not installed; pip install -r requirements-serving.txt") from None


if __name__ == "__main__":
    console.run(main)
