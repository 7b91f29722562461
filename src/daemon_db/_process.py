"""The process: which files it has open, and which it must leave alone because its parent had them open at the fork.

https://sqlite.org/howtocorrupt.html, 2.6.
"""

import os
import threading

from ._place import File, FileId
from .errors import STILL_OPEN, OpenError

pid = os.getpid()
"""The id of this process, asked for once: os.getpid() takes a quarter of the time of a `SELECT 1`."""

lock = threading.RLock()
"""For what a forked child reads while it is forked. Each fork waits for this lock.

Without the GIL, each dict and set has a lock of its own. If another thread has that lock at the fork, it stays taken in
the child for ever, and the child hangs.
"""

open_files: dict[object, File] = {}
"""The file of each connection, from before SQLite is asked to open the file until the connection is closed."""

_inherited: tuple[FileId | str, ...] = ()
"""What was in `open_files` when this process was forked: inodes, or the paths of files that were being created.

A tuple has no lock.
"""


def _after_fork_in_child() -> None:
    """Leave the parent's connections as they are.

    To close or free a connection rolls back its transaction, in the WAL's index. Parent and child have that index in
    memory that they share: the parent would get "database disk image is malformed".
    """
    global pid, lock, _inherited
    pid = os.getpid()
    lock = threading.RLock()  # not released: a signal handler may have forked in the middle of a change
    _inherited += tuple(file.id or file.real_path for file in open_files.values())
    open_files.clear()


os.register_at_fork(
    before=lambda: lock.acquire(), after_in_parent=lambda: lock.release(), after_in_child=_after_fork_in_child
)


def has_open(connection: object) -> bool:
    """Whether the connection is open, or being opened."""
    with lock:
        return connection in open_files


def _files() -> list[File]:
    with lock:
        return list(open_files.values())


def refuse_inherited(file: File) -> None:
    """Raise `OpenError` if the parent had the file open at the fork.

    SQLite remembers in memory which locks its process has. A fork copies that memory, and not the locks. So SQLite in
    the child believes in locks that it doesn't have: the parent's last `close()` finds the file free, and removes the
    WAL that the child writes to.
    """
    if file.id in _inherited or file.real_path in _inherited:
        raise OpenError(
            file.path,
            "this process was forked while its parent had the file open, and SQLite's locks on it don't work here; "
            "close the DB before the fork, or start the process by spawn or exec",
        )


def other_name(file: File) -> str | None:
    """By which other name this process has the file open. A file that has two names (hard links) has a WAL for each."""
    for other in _files():
        if other.id == file.id and os.path.realpath(other.real_path) != os.path.realpath(file.real_path):
            return other.path if other.is_there() else None
    return None


def has_reader(file: File) -> bool:
    """Whether this process has a connection to the file that may only read."""
    return any(other.id == file.id and other.mode() == "ro" for other in _files())


def refuse_index_in_use(file: File) -> None:
    """Raise `OpenError` if the -shm beside this file is one that this process uses for the file that was here before.

    SQLite doesn't see locks of its own process: for the new file, it would empty that -shm and begin its index anew.
    Threads that have the old file open would then crash (SIGBUS), or write into the new file's index.
    """
    index_id = file.index_id()
    for other in _files():
        is_another = other.id is not None and other.id != file.id
        if index_id and is_another and not other.is_there() and other.index_id() == index_id:
            raise OpenError(file.path, STILL_OPEN)
