"""Files and folders that are written completely or not at all, JSON and SHA-256 of files, and work done ahead."""

import contextlib
import ctypes
import hashlib
import json
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, NamedTuple, TypeVar

from simcse.console import InputError, as_input_error, progress, settings

Item = TypeVar("Item")
MAX_BLOCK = 16384  # most lines of stdin that are answered at a time
STDIN = "-"  # the path that means stdin


def hidden_path(path: str, owner: int | str) -> str:
    """Return the path of the hidden file or folder .NAME.OWNER.tmp beside `path`, whose name is NAME.

    A link is followed, as by `new_file` and `new_folder`.

    Args:
        path: what is going to be written.
        owner: id of the process that writes it, or "lock" for the file that locks `path` against other processes.
    """
    parent, name = os.path.split(os.path.realpath(path))
    return os.path.join(parent, f".{name}.{owner}.tmp")


@contextlib.contextmanager
def name_output(path: str, flag: str) -> Iterator[None]:
    """Raise InputError, with path and flag, where something cannot be written: the disk is full, or a folder a file.

    Errors that name a file elsewhere, and those of a pipe or a connection, pass.

    Args:
        path: the file or folder that is written within the context.
        flag: the flag that names it, or its folder.
    """
    try:
        yield
    except (ConnectionError, TimeoutError):  # BrokenPipeError is one of them
        raise
    except OSError as error:
        if error.errno is None:  # paddle's, of a GPU
            raise
        folder = os.path.dirname(os.path.realpath(path))
        if error.filename is not None and os.path.commonpath([os.path.realpath(error.filename), folder]) != folder:
            raise
        raise InputError(f"{flag} {path}: cannot be written: {(error.strerror or str(error)).lower()}") from None


@contextlib.contextmanager
def _temporary_path(path: str) -> Iterator[str]:
    """Yield this process's hidden path beside `path`, and remove what is there in the end.

    Its parent folder is made, and leftovers of killed processes there are removed first.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    _remove_leftovers(path)
    temporary = hidden_path(path, os.getpid())
    try:
        yield temporary
    finally:
        _remove(temporary)


def _remove_leftovers(path: str) -> None:
    """Remove the hidden files and folders beside `path` of processes that have been killed."""
    parent, name = os.path.split(os.path.abspath(path))
    for other in os.listdir(parent):
        match = re.fullmatch(rf"\.{re.escape(name)}\.(\d{{1,9}})\.tmp", other)
        if not match:
            continue
        owner = int(match[1])
        if owner == os.getpid():  # of an earlier process with this id, as in a container that was started again
            _remove(os.path.join(parent, other))
            continue
        try:
            os.kill(owner, 0)  # sends nothing, and raises if there is no such process
        except ProcessLookupError:
            _remove(os.path.join(parent, other))
        except PermissionError:  # the process runs, and is another user's
            continue


def _remove(path: str) -> None:
    """Remove a file or a folder, if there is one."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.remove(path)


@contextlib.contextmanager
def new_file(path: str, mode: str = "w", *, flag: str | None = None) -> Iterator[IO]:
    """Open a temporary file that takes the place of `path` when all is written; on an error `path` stays as it was.

    A link is followed. A device or a named pipe is written to as it is.

    Args:
        flag: the flag that names it, for the `name_output` of errors; None: they pass as they are.
    """
    with name_output(path, flag) if flag else contextlib.nullcontext(), _open_new(path, mode) as file:
        yield file


@contextlib.contextmanager
def _open_new(path: str, mode: str) -> Iterator[IO]:
    """See `new_file`."""
    text_options = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, mode, **text_options) as file:
            yield file
        return
    path = os.path.realpath(path)
    with _temporary_path(path) as temporary:
        with open(temporary, mode, **text_options) as file:
            yield file
        os.replace(temporary, path)


@contextlib.contextmanager
def new_folder(path: str, obsolete: Collection[str] = ()) -> Iterator[str]:
    """Make a folder that takes the place of `path` when all is written: `with new_folder(path) as temporary:`.

    The files are on the disk before the folder gets its name. Where `path` exists, the two are exchanged, on Linux in
    one step. On an error `path` stays as it was.

    Args:
        path: the folder; a link to one is followed. What only the older one has is copied to the new one: the user may
            keep files there.
        obsolete: names in the older folder that are not copied.
    """
    path = os.path.realpath(path)
    with _temporary_path(path) as temporary:
        os.mkdir(temporary)
        yield temporary
        if os.path.isdir(path):
            _copy_missing(path, temporary, obsolete)
        sync(temporary)
        _put_in_place(temporary, path)
        sync(os.path.dirname(path), files=False)


@contextlib.contextmanager
def new_cache_folder(path: str) -> Iterator[str]:
    """Make a folder like `new_folder`, without waiting for the disk and without a file of an older folder.

    It is for what can be made again, and is checked before it is used.
    """
    path = os.path.realpath(path)
    with _temporary_path(path) as temporary:
        os.mkdir(temporary)
        yield temporary
        _put_in_place(temporary, path)


def check_writable(path: str, flag: str, *, is_folder: bool = False) -> None:
    """Raise InputError, before any work, where a file or a folder cannot be written.

    Args:
        path: need not exist, and its parent folders need not either.
        flag: the flag that names it, for the message.
        is_folder: whether it is written by `new_folder`.
    """
    where = f"{flag} {path}"
    if not path:
        raise InputError(f"{flag}: an empty path")
    path = os.path.realpath(path)
    if is_folder and (os.getcwd() + os.sep).startswith(path + os.sep):
        raise InputError(f"{where}: is the current folder, or the current one is in it; name another folder")
    exists = os.path.exists(path)
    if exists and is_folder != os.path.isdir(path):
        raise InputError(f"{where}: is {'not a folder' if is_folder else 'a folder'}")
    if is_folder and os.path.ismount(path):
        raise InputError(f"{where}: is a mount point, which no new folder can replace; name a folder in it")
    is_special = exists and not is_folder and not os.path.isfile(path)  # a device or a named pipe
    parent = path if is_special else os.path.dirname(path)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not is_special and not os.path.isdir(parent):
        raise InputError(f"{where}: {parent} is no folder")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{where}: {parent} cannot be written")


def check_not_input(path: str, flag: str, inputs: Mapping[str, str | Sequence[str] | None]) -> None:
    """Raise InputError, before any work, where a file to write is also read, under this name or another.

    Args:
        path: the file to write; it need not exist.
        flag: the flag that names it, for the message.
        inputs: the path or the paths to read, by the flag that names them; stdin is skipped, and None, too.
    """
    if not os.path.isfile(path):  # a device may be both
        return
    for input_flag, value in inputs.items():
        input_paths = [value] if value is None or isinstance(value, str) else value
        for input_path in input_paths:
            is_file = input_path not in (None, STDIN) and os.path.isfile(input_path)
            if is_file and os.path.samefile(path, input_path):
                raise InputError(f"{flag} {path}: is the same file as {input_flag} {input_path}; name another file")


def _copy_missing(source: str, target: str, obsolete: Collection[str]) -> None:
    """Copy what only the folder `source` has to the folder `target`, except the names in `obsolete`."""
    for name in set(os.listdir(source)) - set(os.listdir(target)) - set(obsolete):
        path = os.path.join(source, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.copytree(path, os.path.join(target, name), symlinks=True)
        else:
            shutil.copy2(path, os.path.join(target, name), follow_symlinks=False)


def _put_in_place(temporary: str, path: str) -> None:
    """Rename a folder to `path`; the folder that was there, if any, gets the temporary name."""
    if os.path.isdir(path):
        exchange(temporary, path)
    else:
        os.rename(temporary, path)


def exchange(one: str, other: str) -> None:
    """Swap the names of two folders of one file system: on Linux in one step, elsewhere in three."""
    rename_exchange = 2  # RENAME_EXCHANGE of linux/fs.h
    at_cwd = -100  # AT_FDCWD of fcntl.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange)
        if not failed:
            return
    aside = f"{one}.aside"
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


def sync(folder: str, files: bool = True) -> None:
    """Wait until the entries of a folder, and its files, are on the disk."""
    paths = []
    if files:
        paths = [os.path.join(folder, name) for name in os.listdir(folder)]
    for path in [*filter(os.path.isfile, paths), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems sync no folders
            os.fsync(descriptor)
        os.close(descriptor)


def show_reading(path: str) -> contextlib.AbstractContextManager[Callable]:
    """Show how many bytes of a file are read: `with show_reading(path) as advance:`, as `console.progress`."""
    if path == STDIN:  # how long that takes is up to who writes it
        return contextlib.nullcontext(lambda count: None)
    size = os.path.getsize(path) if os.path.isfile(path) else None
    return progress(f"reading {path}", size, "B")


def file_digest(path: str) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, show_reading(path) as advance:
        while block := file.read(1 << 24):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def is_there(path: str) -> bool:
    """Return whether there is a file; raise InputError if a folder, or a link to nothing, has its name."""
    if os.path.isfile(path):
        return True
    if os.path.lexists(path):
        kind = "a folder" if os.path.isdir(path) else "a link to a file that does not exist"
        raise InputError(f"{path}: is {kind}")
    return False


def read_json(path: str) -> dict:
    """Return the object in a JSON file, {} where there is no such file.

    Raises:
        InputError: the file holds something else, or is no file.
    """
    if not is_there(path):
        return {}
    with as_input_error(f"{path}: not valid JSON", ValueError, RecursionError), open(path, encoding="utf-8") as file:
        content = json.load(file)
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object")
    return content


def write_json(path: str, content: dict) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=2)


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """Yield `items`; while the caller works on one, a thread makes the next.

    It is for items that take time to compute. `stream_blocks` is for those that take time to arrive.
    """
    end = object()
    with ThreadPoolExecutor(1) as worker:
        upcoming = worker.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = worker.submit(next, items, end)
            yield item


class _End(NamedTuple):
    """The last thing in the queue of `stream_blocks`: there are no more items.

    Attributes:
        error: what `items` raised; None: they ended.
    """

    error: Exception | None


def stream_blocks(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Yield the lines of stdin, or what is made of them, in blocks of all that have arrived: 1 to MAX_BLOCK.

    So a line that is typed is answered at once, and a long file is encoded in large batches. A thread reads on while
    the caller works; an error of `items` is raised after the items before it. The answers show how far the work is, so
    progress is off from now on.
    """
    settings.streaming = True
    arrived: queue.Queue[Item | _End] = queue.Queue(MAX_BLOCK)

    def read() -> None:
        try:
            for item in items:
                arrived.put(item)
            arrived.put(_End(None))
        except Exception as error:
            arrived.put(_End(error))

    threading.Thread(target=read, daemon=True).start()  # daemon: it may wait for a line when all else has ended
    while True:
        block = [arrived.get()]
        while len(block) < MAX_BLOCK and not arrived.empty():
            block.append(arrived.get())
        end = block.pop() if isinstance(block[-1], _End) else None
        if block:
            yield block
        if end is not None:
            break
    if end.error is not None:
        raise end.error
