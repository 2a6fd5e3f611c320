"""Files and folders that are written whole or not at all, and what is in them by SHA-256."""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TypeVar

from simcse.console import InputError, log, progress, reported, settings

Item = TypeVar("Item")
BLOCK = 16384  # lines of stdin that are answered at a time, at most
STDIN = "-"  # the path that means stdin
SHA256 = 64  # hexadecimal digits
OF_CORPUS = ("corpus", "corpus_columns")  # parts of an index' fingerprint that may change


def temporary_name(path: str, pid: int | str) -> str:
    """Where a process writes what takes the place of `path`; "lock": what it holds while it makes that."""
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(parent, f".{name}.{pid}.tmp")


@contextlib.contextmanager
def _beside(path: str) -> Iterator[str]:
    """A path beside `path` for what takes its place; removed in the end, as is what killed processes left there."""
    parent, name = os.path.split(os.path.abspath(path))
    os.makedirs(parent, exist_ok=True)
    for other in os.listdir(parent):
        if found := re.fullmatch(rf"\.{re.escape(name)}\.(\d{{1,9}})\.tmp", other):
            try:
                os.kill(int(found[1]), 0)
            except ProcessLookupError:
                _remove(os.path.join(parent, other))
            except PermissionError:  # it runs, and is another user's
                continue
    temporary = temporary_name(path, os.getpid())
    try:
        yield temporary
    finally:
        _remove(temporary)


def _remove(path: str) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.remove(path)


@contextlib.contextmanager
def new_file(path: str, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file that takes the place of `path` when all is written; on an error `path` stays as it was."""
    with _beside(path) as temporary:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
            yield file
        os.replace(temporary, path)


def reading(path: str) -> contextlib.AbstractContextManager[Callable]:
    """`console.progress` of reading a file, in bytes."""
    if path == STDIN:  # how long that takes is not ours
        return contextlib.nullcontext(lambda count: None)
    return progress(f"reading {path}", os.path.getsize(path) if os.path.isfile(path) else None, "B")


def file_digest(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, reading(path) as advance:
        while block := file.read(1 << 24):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


@contextlib.contextmanager
def new_folder(path: str, cache: bool = False, gone: Collection[str] = ()) -> Iterator[str]:
    """`with new_folder(path) as temporary:` fill it, and it becomes `path` when all is written and on the disk. Where
    `path` exists, the two are exchanged in one step, and files of other names are kept, but those that are `gone`. On
    an error `path` stays as it was. A `cache`, which can be made again and is checked before it is used, waits for no
    disk and keeps no file."""
    path = os.path.abspath(path)
    with _beside(path) as temporary:
        os.mkdir(temporary)
        yield temporary
        if not cache:
            sync(temporary)
        if os.path.isdir(path):
            for name in () if cache else set(os.listdir(path)) - set(os.listdir(temporary)) - set(gone):
                copy = shutil.copytree if os.path.isdir(os.path.join(path, name)) else shutil.copy2
                copy(os.path.join(path, name), os.path.join(temporary, name))
            exchange(temporary, path)
        else:
            os.rename(temporary, path)
        if not cache:
            sync(os.path.dirname(path), files=False)


def exchange(one: str, other: str) -> None:
    """Swap two folders of one file system: on Linux in one step, elsewhere in three."""
    rename_exchange, at_cwd = 2, -100
    if hasattr(libc := ctypes.CDLL(None), "renameat2") and not libc.renameat2(
            at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange):
        return
    aside = f"{one}.aside"
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


def sync(folder: str, files: bool = True) -> None:
    """Have the folder's entries, and its files, on the disk before anything is renamed."""
    paths = [os.path.join(folder, name) for name in os.listdir(folder)] if files else []
    for path in [*filter(os.path.isfile, paths), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems sync no folders
            os.fsync(descriptor)
        os.close(descriptor)


def check_fingerprint(found: dict, wanted: dict, where: str, remedy: str) -> dict:
    """What an index, named by the flag and value `where`, was made of, with the "hnsw_ef" of the search, if `wanted`
    has one; InputError where it depends on other values than `wanted`, which may name a part of them."""
    other = [name for name in wanted if name != "hnsw_ef" and found.get(name) != wanted[name]]
    said = [f"another {name}" if name not in found or len(str(wanted[name])) == SHA256 else
            f"{name} {found[name]}, not {wanted[name]}" for name in other]
    if said:
        raise InputError(f"{where}: was built with {', and '.join(said)}; {remedy}")
    return {**found, **wanted}


@contextlib.contextmanager
def building(path: str, wanted: dict, new: dict) -> Iterator[None]:
    """While an index, `new`, is built in the folder `path`, no other process builds one there: it waits, or, where
    `new` is other than what it `wanted`, raises InputError."""
    lock = temporary_name(path, "lock")
    os.makedirs(os.path.dirname(lock), exist_ok=True)
    with open(lock, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            if other := file.read():
                check_fingerprint(json.loads(other), wanted, f"--index_path {path}, which another process is "
                                  "building", "name another folder")
            log(f"waiting for the process that is building the index in {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        json.dump(new, file)
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):  # the process that was waited for has removed it
                os.remove(lock)


def unrelated(where: str, corpus: str) -> InputError:
    """That the index named by the flag and value `where` has no text of a corpus, so that it is no state of it."""
    return InputError(f"{where}: was built with another corpus, of which no text is in {corpus}; name another, or "
                      "remove this one to build it again")


def read_json(path: str) -> dict:
    """The object in a JSON file; {} where there is no such file, InputError where something else is in it."""
    if not os.path.isfile(path):
        return {}
    with reported(f"{path}: not valid JSON", TypeError, ValueError), open(path, encoding="utf-8") as file:
        return dict(json.load(file))


def write_json(path: str, content: dict) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=2)


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """Yield `items`; while one is in use, a thread makes the next."""
    end = object()
    with ThreadPoolExecutor(1) as worker:
        ahead = worker.submit(next, items, end)
        while (item := ahead.result()) is not end:
            ahead = worker.submit(next, items, end)
            yield item


def read_ahead(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Yield what has come of `items` so far, as soon as there is any, BLOCK at most at a time: a line typed is answered
    at once, and a long file is encoded in large batches. A thread reads on meanwhile; an error of `items` is raised
    after what came before it."""
    settings.streaming = True
    come: queue.Queue[Item | Exception] = queue.Queue(BLOCK)

    def read() -> None:
        try:
            while True:
                come.put(next(items))
        except Exception as end:  # StopIteration among them
            come.put(end)

    threading.Thread(target=read, daemon=True).start()  # daemon: it may wait for a line when all else has ended
    end = None
    while end is None:
        block = [come.get()]
        while len(block) < BLOCK and not come.empty():
            block.append(come.get())
        end = block.pop() if isinstance(block[-1], Exception) else None
        if block:
            yield block
    if not isinstance(end, StopIteration):
        raise end
