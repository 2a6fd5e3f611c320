"""One process at a time builds an index in a folder."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from typing import IO

from simcse.console import log
from simcse.files import hidden_path, name_output
from simcse.index.manifest import Manifest


@contextlib.contextmanager
def lock_folder(path: str, wanted: Manifest, manifest: Manifest) -> Iterator[None]:
    """Keep other processes from building an index in a folder while this one does; wait for one that does already.

    Args:
        path: the folder, which need not exist.
        wanted: what the index has to be made of.
        manifest: what is built, for the others to compare.

    Raises:
        InputError: the other process builds an index that is not as wanted.
    """
    lock_path = hidden_path(path, "lock")
    with name_output(path, "--index_path"):
        os.makedirs(os.path.dirname(lock_path), exist_ok=True)
    with _open_locked(lock_path, path, wanted) as file:
        try:
            with name_output(path, "--index_path"):
                file.truncate(0)
                content = json.dumps(dataclasses.asdict(manifest))
                os.write(file.fileno(), content.encode())  # past the buffer, which would fail again when it is closed
            yield
        finally:
            os.remove(lock_path)


def _open_locked(lock_path: str, path: str, wanted: Manifest) -> IO:
    """Return the lock's file, locked.

    A process that waited may have got the lock of a file that the other one has removed meanwhile; a third could then
    lock a new file of that name. So it is opened again, until what is locked is the file that has the name.
    """
    while True:
        file = open(lock_path, "a+", encoding="utf-8")  # noqa: SIM115  closed by the caller
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _wait_for_other(file, path, wanted)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock_path)):
                return file
        file.close()


def _wait_for_other(file: IO, path: str, wanted: Manifest) -> None:
    """Wait for the process that holds the lock, if it builds what is wanted."""
    file.seek(0)
    content = file.read()
    if content:  # it is empty for a moment after the other process has got the lock
        where = f"--index_path {path}, which another process is building"
        other = Manifest.from_dict(json.loads(content), where, "name another folder")
        if other.index_shards is None:  # not known yet; it is compared when the index is there
            other.index_shards = wanted.index_shards
        other.check(wanted, where, "name another folder")
    log(f"waiting for the process that is building the index in {path}")
    fcntl.flock(file, fcntl.LOCK_EX)
