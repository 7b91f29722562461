"""Which files this process has open, and which it must leave alone because a parent had them open at the fork.

https://sqlite.org/howtocorrupt.html, 2.6.
"""

import os
import threading
import weakref
from typing import Any

from ._file import File, FileId
from .errors import FORKED, OpenError


class Process:
    """What a process has, and a child that is forked off it must not go on with."""

    def __init__(self, number: int, parent: "Process | None" = None) -> None:
        self.number = number
        self.parent = parent
        self.children: dict[int, Process] = {}  # only a child uses it, in its own memory
        self.lock = threading.RLock()
        self.open_files: tuple[tuple[object, File], ...] = ()
        """The file of each connection, from before SQLite opens the file until the connection is closed.

        A tuple: a child reads its parent's, and the fork may come in the middle of a change. Without the GIL, a dict
        has a lock of its own, which is then taken for ever.
        """
        self.guards: dict[FileId, weakref.ref[Any]] = {}
        """The `Guard` of each file, which lives as long as a `DB` or a connection refers to it."""

    def add(self, connection: object, file: File) -> None:
        with self.lock:
            self.open_files = (*self.open_files, (connection, file))

    def has_open(self, connection: object) -> bool:
        return any(each is connection for each, _ in self.open_files)

    def remove(self, connection: object) -> None:
        with self.lock:
            self.open_files = tuple(pair for pair in self.open_files if pair[0] is not connection)


_process = Process(os.getpid())


def this_process() -> Process:
    """This process's. A forked child gets a new one, at its first use.

    By the process's number, not by a hook: a fork in C code runs no hook of Python's (uWSGI's, for one). And no lock of
    the parent's is asked for: another thread of the parent may have had the lock, which is then taken for ever.
    """
    global _process
    process, number = _process, os.getpid()
    if process.number != number:
        process = _process = process.children.setdefault(number, Process(number, process))
    return process


def refuse_inherited(file: File) -> None:
    """Raise `OpenError` if a parent had the file open at the fork.

    SQLite remembers in memory which locks its process has. A fork copies that memory, and not the locks. So SQLite in
    the child believes in locks that it doesn't have: the parent's last `close()` finds the file free, and removes the
    WAL that the child writes to.
    """
    process = this_process().parent
    while process is not None:
        for _, other in process.open_files:
            # A file that was being created had no inode yet.
            if other.id == file.id if other.id else other.real_path == file.real_path:
                raise OpenError(file.path, FORKED)
        process = process.parent
