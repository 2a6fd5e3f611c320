"""Python scripts without the seconds that importing paddle and paddlenlp takes: a server that has imported them once
forks a process for each.

    python tests/forkserver.py serve SOCKET
    python -I -S tests/forkserver.py run SOCKET recall.py --device cpu ...

The process has its own arguments, environment, working folder, standard streams, signals and exit code, as one that
was started with `python recall.py` has. What runs it passes signals on, and ends as it did; where that is killed, the
process is killed as well. Modules of the project are imported anew in each; what is different from a process of its
own is that libraries have read their settings (MKL_DEBUG_CPU_TYPE and the like) from the server's environment, and that
paddle's teardown does not run. What is no script (-m, -c), and what has a PYTHONPATH, whose sitecustomize.py has to
come before any import, is run by Python itself.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PRELOADED = ("paddlenlp.transformers", "hnswlib", "tokenizers", "visualdl", "scipy.stats", "bm25s", "jieba", "tqdm")
LENGTH = 8  # bytes that say how long a request is
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


# ------------------------------------------------------------------------------------------------------------- client
def run(address: str, words: list[str]) -> int:
    """Have the server run a script with this process's streams, environment and folder; its exit code, negative where
    a signal ended it."""
    with socket.socket(socket.AF_UNIX) as server:
        connect(server, address)
        request = json.dumps({"words": words, "cwd": os.getcwd(), "environment": dict(os.environ),
                              "cores": sorted(os.sched_getaffinity(0)),
                              "ignored": [s for s in PASSED_ON if signal.getsignal(s) == signal.SIG_IGN]},
                             ensure_ascii=True).encode()
        socket.send_fds(server, [len(request).to_bytes(LENGTH, "big")], [0, 1, 2])
        server.sendall(request)
        answers = server.makefile("r")
        pid = int(answers.readline())
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        return int(answers.readline() or -signal.SIGKILL)


def connect(server: socket.socket, address: str, seconds: float = 120) -> None:
    """Connect to a server that may not be there yet."""
    end = time.monotonic() + seconds
    while True:
        try:
            return server.connect(address)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def end_as(code: int) -> None:
    """End this process with an exit code, or by a signal."""
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


# ------------------------------------------------------------------------------------------------------------- server
def preload() -> dict[str, str]:
    """Import what takes long; what that added to the environment."""
    before = dict(os.environ)
    sys.path.insert(0, ROOT)
    import simcse  # noqa: F401  sets the environment in which numpy and paddle are imported

    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # not of this stack
            __import__(name)
    sys.modules["paddle"].distributed.parallel._global_parallel_env = None  # which rank a process is, asked meanwhile
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        if path.startswith(ROOT + os.sep) and os.sep + "site-packages" + os.sep not in path and name != "__main__":
            del sys.modules[name]
    sys.path.remove(ROOT)
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


def serve(address: str) -> None:
    """Fork a process for each request, until stdin is closed."""
    import select

    added = preload()
    reader, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    clients: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        while True:
            watched = [0, reader, listener, *clients.values()]
            for ready in select.select(watched, [], [])[0]:
                if ready == 0 and not os.read(0, 1):
                    for pid in clients:
                        os.kill(pid, signal.SIGKILL)
                    return
                if ready == reader:
                    os.read(reader, 4096)
                elif ready is listener:
                    client, _ = listener.accept()
                    if pid := start(client, added, listener, clients):
                        clients[pid] = client
                elif isinstance(ready, socket.socket):  # a client says nothing: it has gone
                    for pid in [pid for pid, client in clients.items() if client is ready]:
                        os.kill(pid, signal.SIGKILL)
            reap(clients)


def reap(clients: dict[int, socket.socket]) -> None:
    """Tell the clients whose processes have ended."""
    for pid in list(clients):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            with clients.pop(pid) as client, contextlib.suppress(OSError):
                client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def start(client: socket.socket, added: dict[str, str], listener: socket.socket, clients: dict) -> int:
    """Read a request and fork; 0 where the client had gone, else the process, which does not return from here."""
    length, streams, _, _ = socket.recv_fds(client, LENGTH, 3)
    if not length:
        return 0
    request, left = b"", int.from_bytes(length, "big")
    while len(request) < left:
        request += client.recv(left - len(request))
    pid = os.fork()
    if pid:
        for stream in streams:
            os.close(stream)
        client.sendall(f"{pid}\n".encode())
        return pid
    for each in (client, listener, *clients.values()):
        each.close()
    os._exit(become(json.loads(request), streams, added))


def become(request: dict, streams: list[int], added: dict[str, str]) -> int:
    """Be `python WORDS`; its exit code."""
    import atexit
    import runpy
    import threading
    import traceback

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in PASSED_ON:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else usual)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update({**added, **request["environment"]})
    os.chdir(request["cwd"])
    os.sched_setaffinity(0, request["cores"])
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    if "COVERAGE_PROCESS_START" in os.environ:
        import coverage

        coverage.process_startup()
    sys.argv = request["words"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.executable = os.environ["SIMCSE_FORKED_PYTHON"]  # what it starts is forked as well
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code == 1 and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 120
    return code


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    words = sys.argv[3:]
    if sys.argv[1] == "run":
        script = words[words[:1] == ["-u"] :]
        if script and script[0].endswith(".py") and "PYTHONPATH" not in os.environ:
            end_as(run(sys.argv[2], script))
        os.execv(sys.executable, [sys.executable, *words])
