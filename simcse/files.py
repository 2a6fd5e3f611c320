"""Files and folders that are written whole or not at all, and what is in them by SHA-256."""

import contextlib
import ctypes
import hashlib
import json
import os
import queue
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, TypeVar

from simcse.console import InputError, be_answering, log, progress

import numpy as np

Item = TypeVar("Item")
BLOCK = 16384  # lines of stdin that are answered at a time, at most
STDIN = "-"  # the path that means stdin


def _runs(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def new_file(path: str, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file that takes the place of `path` when all is written; on an error `path` stays as it was."""
    parent, name = os.path.split(path)
    os.makedirs(parent or ".", exist_ok=True)
    for other in os.listdir(parent or "."):  # what a killed process left
        found = re.fullmatch(re.escape(name) + r"\.(\d+)\.tmp", other)
        if found and not _runs(int(found[1])):
            os.remove(os.path.join(parent, other))
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
            yield file
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


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


def save_embeddings(path: str, embeddings: np.ndarray) -> None:
    """Write embeddings as .npy, complete or not at all."""
    with new_file(path, "wb") as file:
        np.save(file, embeddings)
    log(f"wrote {embeddings.shape[0]} x {embeddings.shape[1]} float32 to {path}")


class new_folder:
    """`with new_folder(path) as temporary:` fill it, and it becomes `path` when all is written and on the disk.

    Where `path` exists, it is exchanged for the new folder in one step. On an error the temporary folder is removed,
    and `path` stays as it was.

    Args:
        cache: whether the content can be made again, and is checked before it is used. Then nothing waits for the
            disk, and all that the folder held goes; else files of other names are kept.
        temporary: the folder to fill, where others have to know its name; None: one of a name of its own.
    """

    def __init__(self, path: str, cache: bool = False, temporary: str | None = None) -> None:
        self.path, self.cache, self.temporary = os.path.abspath(path), cache, temporary

    def __enter__(self) -> str:
        parent, name = os.path.split(self.path)
        os.makedirs(parent, exist_ok=True)
        if self.temporary:
            os.makedirs(self.temporary, exist_ok=True)
        else:
            self.temporary = tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=parent)
            os.chmod(self.temporary, 0o755)  # nosec B103  as any folder that a user makes; mkdtemp's is closed to others
        return self.temporary

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            if kind is None and self.cache:
                self._take_the_place()
            elif kind is None:
                sync(self.temporary)
                self._take_the_place()
                sync(os.path.dirname(self.path), files=False)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _take_the_place(self) -> None:
        if not os.path.isdir(self.path):
            os.rename(self.temporary, self.path)
            return
        for name in () if self.cache else set(os.listdir(self.path)) - set(os.listdir(self.temporary)):
            copy = shutil.copytree if os.path.isdir(os.path.join(self.path, name)) else shutil.copy2
            copy(os.path.join(self.path, name), os.path.join(self.temporary, name))
        exchange(self.temporary, self.path)


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


def check_fingerprint(found: dict, wanted: dict, where: str, remedy: str) -> None:
    """Refuse an index that was made of something other than what is wanted.

    Args:
        found, wanted: what each depends on, by name; what `wanted` does not name may be anything.
        where: the flag and its value, for the message.
        remedy: what the user may do about it.
    """
    if other := [name for name in wanted if found.get(name) != wanted[name]]:
        raise InputError(f"{where}: was built with another {', '.join(other)}; {remedy}")


def write_json(path: str, content: dict) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=2)


# ----------------------------------------------------------------------------------------------- reading ahead
def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """Yield `items`; while one is in use, a thread makes the next."""
    end = object()
    with ThreadPoolExecutor(1) as worker:
        ahead = worker.submit(next, items, end)
        while (item := ahead.result()) is not end:
            ahead = worker.submit(next, items, end)
            yield item


def arriving(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Yield what has come of `items` so far, as soon as there is any, BLOCK at most at a time.

    So a line typed is answered at once, and a long file is encoded in large batches. A thread reads on meanwhile; an
    error of `items` is raised after what came before it.
    """
    be_answering()
    come: queue.Queue[Item | Exception] = queue.Queue(BLOCK)

    def read() -> None:
        try:
            while True:
                come.put(next(items))
        except Exception as end:  # StopIteration among them
            come.put(end)

    threading.Thread(target=read, daemon=True).start()  # daemon: it may wait for a line when all else has ended
    while True:
        block = [come.get()]
        while len(block) < BLOCK and not come.empty():
            block.append(come.get())
        end = block.pop() if isinstance(block[-1], Exception) else None
        if block:
            yield block
        if isinstance(end, StopIteration):
            return
        if end:
            raise end
