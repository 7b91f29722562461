"""The process: which files it has open, and which it must leave alone because its parent had them open at the fork.

https://sqlite.org/howtocorrupt.html, 2.6.
"""

import os

from ._place import File, FileId
from .errors import STILL_OPEN, OpenError

pid = os.getpid()
"""This process. To ask the system each time takes as long as a quarter of a `SELECT 1`."""

open_files: dict[object, File] = {}
"""The file of each connection, from before SQLite is asked to open the file until the connection is closed.

To set or delete an item is atomic, and so is to copy all of them.
"""

_inherited: set[FileId | str] = set()
"""What was in `open_files` when this process was forked: inodes, or the paths of files that were being created."""


def _begin_anew() -> None:
    """In a forked child: the parent's connections stay as they are.

    To close or free a connection of the parent's would roll back in the WAL's index, in memory that the two processes
    share: "database disk image is malformed" in the parent.
    """
    global pid
    pid = os.getpid()
    _inherited.update(file.id or file.real_path for file in open_files.values())
    open_files.clear()


os.register_at_fork(after_in_child=_begin_anew)


def refuse_inherited(file: File) -> None:
    """Raise `OpenError` where SQLite would take locks that the parent process holds for locks of this one.

    SQLite remembers a process's locks in memory. A fork copies the memory and not the locks: the parent's last
    `close()` finds the file free and removes the WAL under the child, and what the child then commits is lost.
    """
    if file.id in _inherited or file.real_path in _inherited:
        raise OpenError(
            file.path,
            "this process was forked while its parent had the file open, and SQLite's locks on it don't work here; "
            "close the DB before the fork, or start the process by spawn or exec",
        )


def refuse_index_in_use(file: File) -> None:
    """Raise `OpenError` if the -shm beside this file is one that this process uses for the file that was here before.

    SQLite doesn't see locks of its own process. It would begin that index anew, and the threads that have the old file
    open would crash (SIGBUS), or write into the new file's index.
    """
    for other in list(open_files.values()):
        if other.id not in (None, file.id) and not other.is_there():
            if other.index_id() == file.index_id() is not None:
                raise OpenError(file.path, STILL_OPEN)
