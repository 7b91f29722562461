"""The WAL is kept where it is: by a lock that no `close()` drops, and by knowing the inodes of the -wal and the -shm.

SQLite's locks are POSIX locks. A process loses all that it has on a file when anything in the process closes any
descriptor of that file: to read the file's header by `open()` is enough (https://sqlite.org/howtocorrupt.html, 2.2).
The next program that opens and closes the database then takes itself for the last one. That program checkpoints the WAL
and removes it, while this process goes on writing into the removed WAL.

Linux has locks of another kind, of an open file description. No `close()` of another descriptor drops them, and other
programs see them as one more reader. Where they can't be had, or somebody removes the WAL by hand, the loss is found
out by the inodes.
"""

import contextlib
import errno
import fcntl
import logging
import os
import resource
import select
import struct
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator

from . import _process
from ._place import File, FileId, find_id
from .errors import NO_DESCRIPTORS, WAL_REMOVED

_log = logging.getLogger("daemon_db")

# macOS has such locks, too, with another structure.
_SETLK: int | None = getattr(fcntl, "F_OFD_SETLK", None) if sys.platform == "linux" else None

Bytes = tuple[int, int]  # the first one, and how many
Version = tuple[int, int, int]  # of a directory: its device, its inode, and when it was last changed
_SHARED = (0x40000002, 510)  # of the file: SQLite's SHARED lock (SHARED_FIRST and SHARED_SIZE in os_unix.c)
_IN_USE = (128, 1)  # of the -shm: by this byte SQLite sees that somebody uses it (UNIX_SHM_DMS in os_unix.c)

SETTLED_AFTER = 1.0
"""Seconds after a change of a directory from which on any later change is sure to give it another time."""


class Guard:
    """What all connections of this process to one file share: which WAL they have, and the lock that keeps it there."""

    def __init__(self) -> None:
        self.mutex = threading.RLock()
        """For joining, and for leaving together with SQLite's close."""
        self._connections: set[object] = set()
        self._directory: Version | None = None
        """What the directory was when the -wal was last seen there; None if a later change might not show."""
        self._shows_changes = False
        """Whether the directory's time tells of each change."""
        self._wal_id: FileId | None = None
        self._index_id: FileId | None = None
        self._locks: dict[int, tuple[FileId, Bytes]] = {}
        """For each descriptor that the lock is on: the file that is open there, and which bytes are locked.

        Always a new dict, because a forked child reads it (see `_process.lock`).
        """

    def join(self, conn: object, file: File, likely: Iterable[int]) -> str | None:
        """For a connection that has just read for the first time, and so has opened the WAL.

        `likely` are the descriptors that SQLite has probably got for the file and the -shm. Return why the connection
        must be closed: the WAL has been removed or replaced since that read, or SQLite can't write the -shm.
        """
        with self.mutex:
            if not self._connections:
                self._directory, self._shows_changes = None, file.has_exact_times()
                self._wal_id, self._index_id = file.wal_id(), file.index_id()
                if reason := self._lock(file, likely):
                    return reason
            if not self._is_whole(file):
                return WAL_REMOVED
            self._connections.add(conn)
            return None

    def has(self, conn: object) -> bool:
        """Whether the connection has joined."""
        return conn in self._connections

    def leave(self, conn: object, file: File) -> None:
        """For a connection that will now be closed. The last one gives the lock back: it would block SQLite's close."""
        self._connections.discard(conn)
        if not self._connections:
            self._unlock(file)

    def leave_locked(self, conn: object) -> None:
        """The same, but the lock stays in the way: SQLite's last close neither checkpoints nor removes the WAL."""
        self._connections.discard(conn)

    def is_locked(self) -> bool:
        """Whether the lock could be had."""
        return bool(self._locks)

    def has_wal(self, file: File) -> bool:
        """Whether the -wal beside the file is the one that the connections have.

        To look at the -wal makes the next fsync take a seventh longer: once somebody has seen a file's times, Linux
        keeps the next ones exactly, and has more to write (multigrain timestamps, from 6.13 on). So where this is so,
        the directory is looked at instead. The -wal is looked at if something was added there, removed or renamed, and
        for a second after that: the name may still be there when the directory has its new time.
        """
        status = file.directory_status() if self._shows_changes else None
        directory = (status.st_dev, status.st_ino, status.st_ctime_ns) if status else None
        if directory is not None and directory == self._directory:
            return True
        now = time.time()
        is_there = file.wal_id() == self._wal_id is not None
        is_settled = status is not None and now - status.st_ctime > SETTLED_AFTER
        self._directory = directory if is_there and is_settled else None
        return is_there

    def has_index(self, file: File) -> bool:
        """Whether the -shm beside the file is the one that the connections have."""
        return file.index_id() == self._index_id is not None

    def is_lost(self, file: File) -> bool:
        """Whether the connections' -wal or -shm was removed or replaced: what they commit, nobody else sees."""
        with self.mutex:  # so that no last connection closes meanwhile, and rightly removes both
            is_whole = self._is_whole(file)
            # If the file itself isn't there, what is beside it tells nothing.
            return bool(self._connections) and not is_whole and file.is_there()

    def may_checkpoint(self, file: File) -> bool:
        """Whether a checkpoint at the last close overwrites nothing that others have committed.

        While the lock is held, nobody's close removes the WAL: if the WAL is gone, somebody has removed it by hand. As
        long as nobody has committed to another WAL, a checkpoint saves what is in the removed one. An empty -wal proves
        that only beside the same -shm: with another -shm, a process may have emptied its WAL after its commits.

        If somebody has emptied the file, a checkpoint would write a part of the pages only, and the WAL would be gone.
        """
        if file.size() == 0:
            return False
        if not self.is_lost(file):
            return True
        nobody_has_committed = file.wal_id() is None or self.has_index(file) and not file.wal_size()
        return self.is_locked() and nobody_has_committed

    def _is_whole(self, file: File) -> bool:
        return self.has_wal(file) and self.has_index(file)

    def _lock(self, file: File, likely: Iterable[int]) -> str | None:
        """Take the lock, if this system has such locks. Return why not, where the connection must be closed.

        The lock is taken once. SQLite keeps a descriptor open, and the lock with it, for as long as any connection of
        this process has a lock on the file.
        """
        wanted = {file.id: _SHARED, self._index_id: _IN_USE}
        self._locks = {each: lock for each, lock in self._locks.items() if find_id(each) == lock[0]}
        try:
            if _SETLK is None:
                raise OSError("this system has none")
            found = _descriptors(wanted.keys(), likely)
            # A process has the -shm open once, for all its connections. So this is found out before another one joins.
            if file.may_write_index() and any(each == self._index_id and _is_read_only(n) for n, each in found.items()):
                return NO_DESCRIPTORS
            # Before there are locks: a fork may come between.
            self._locks = self._locks | {each: (file_id, wanted[file_id]) for each, file_id in found.items()}
            for descriptor, file_id in found.items():
                with _unless_closed():
                    _set(descriptor, fcntl.F_RDLCK, wanted[file_id])
            locked = {file_id for each, (file_id, _) in self._locks.items() if find_id(each) == file_id}
            if file.id not in locked:
                raise OSError("SQLite's descriptor was not found")
        except BlockingIOError:  # another process checkpoints: it takes itself for the last one that has the file open
            self._release()
            return WAL_REMOVED
        except OSError as error:
            self._release()
            _log.info(
                "%s: there is no lock of an open file description (%s): see to it that nothing in this process but "
                "SQLite opens and closes the file",
                file.path,
                error,
            )
            return None
        # If it isn't, SQLite has another -shm open than the one that is there now.
        return None if self._index_id in locked else WAL_REMOVED

    def _unlock(self, file: File) -> None:
        """Take SQLite's own locks again, because something may have dropped them, and give back ours."""
        try:
            for descriptor, (file_id, (start, length)) in self._locks.items():
                if find_id(descriptor) == file_id:
                    with _unless_closed():
                        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, length, start)
        except OSError as error:
            _log.warning("%s: no lock for closing (%s): its WAL stays there until the next close", file.path, error)
        else:
            self._release()

    def _release(self) -> None:
        for descriptor, (file_id, area) in self._locks.items():
            if find_id(descriptor) == file_id:
                with _unless_closed():
                    _set(descriptor, fcntl.F_UNLCK, area)
        self._locks = {}

    def let_go_in_child(self) -> None:
        """Close in a forked child what the lock is on: else the lock would outlive the parent.

        SQLite in the child may go on to use these descriptors. So the same files are opened anew there, with no lock.
        """
        for descriptor, (file_id, _) in self._locks.items():
            if find_id(descriptor) == file_id:
                mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
                anew = os.open(f"/proc/self/fd/{descriptor}", mode)
                os.dup2(anew, descriptor, inheritable=False)
                os.close(anew)


_guards: dict[FileId, weakref.ref[Guard]] = {}


def guard_of(file: File) -> Guard:
    """The one that this process has for the file."""
    if file.id is None:
        raise ValueError(f"{file.path} has not been opened")
    with _process.lock:
        guard = _get(file.id)
        if guard is None:
            # No WeakValueDictionary: a signal's exception that strikes in its callbacks is lost.
            for each in [file_id for file_id in _guards if _get(file_id) is None]:
                del _guards[each]
            guard = Guard()
            _guards[file.id] = weakref.ref(guard)
        return guard


def is_lost(file: File) -> bool:
    """Whether this process has the file open and has lost the WAL. SQLite would read a new WAL by the old index."""
    with _process.lock:
        guard = _get(file.id)
    return guard is not None and guard.is_lost(file)


def _get(file_id: FileId | None) -> Guard | None:
    reference = _guards.get(file_id) if file_id else None
    return reference() if reference else None


def _after_fork_in_child() -> None:
    guards = [_get(file_id) for file_id in _guards]
    _guards.clear()
    for guard in guards:
        if guard is not None:
            guard.let_go_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


def next_descriptors() -> list[int]:
    """The lowest free ones, which the system gives to the next files that are opened. Empty if there are too few."""
    if _SETLK is None:
        return []
    try:
        taken = [select.epoll() for _ in range(4)]  # an epoll object is a descriptor, which is closed with the object
    except OSError:
        return []
    return [each.fileno() for each in taken]


def is_open_to_read_only(file: File, likely: Iterable[int]) -> bool:
    """Whether SQLite has just opened the file or its -wal for reading only, which it was asked to open for writing.

    SQLite does so, and says nothing, where to open it for writing fails: a lack of descriptors for a moment is enough.
    `likely` are the descriptors that SQLite has probably got. On others, other connections may rightly only read.
    """
    if file.mode() == "ro":
        return False
    wanted = {file.id, file.wal_id()} - {None}
    return any(_is_read_only(each) and _find_sqlites(each) in wanted for each in likely)


def has_one_to_read_only(file: File) -> bool:
    """Whether SQLite has the file or its -wal open for reading only, for this connection or another."""
    try:
        return is_open_to_read_only(file, _all_descriptors() if _SETLK else ())
    except OSError:  # no list of them can be had
        return False


def refused_lock(file: File) -> OSError | None:
    """What the system says to a lock on SQLite's descriptors, if it refuses locks: SQLite takes that for "busy"."""
    if _SETLK is None:
        return None
    for descriptor in _descriptors([file.id, file.index_id()], ()):
        try:
            # Only asked, not taken: to take and drop it would drop SQLite's own.
            fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, *_SHARED, 0))
        except OSError as error:
            if error.errno != errno.EBADF:
                return error
    return None


def _is_read_only(descriptor: int) -> bool:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    except OSError:
        return False  # another thread has closed it


def _descriptors(files: Iterable[FileId | None], likely: Iterable[int]) -> dict[int, FileId]:
    """Those that SQLite has for these files. All descriptors of the process are looked at only if that is needed."""
    wanted = set(files) - {None}
    found = {each: file_id for each in likely if (file_id := _find_sqlites(each)) in wanted}
    if set(found.values()) != wanted:
        found = {each: file_id for each in _all_descriptors() if (file_id := _find_sqlites(each)) in wanted}
    return found  # type: ignore[return-value]


def _all_descriptors() -> Iterable[int]:
    try:
        return map(int, os.listdir("/proc/self/fd"))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return range(resource.getrlimit(resource.RLIMIT_NOFILE)[0])  # every descriptor is in use: the range is short


def _find_sqlites(descriptor: int) -> FileId | None:
    """Which file is open there, if it is SQLite that has opened it: by O_NOFOLLOW, unlike `open()` and the like."""
    try:
        is_sqlites = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_NOFOLLOW
    except OSError:
        return None  # another thread has closed it
    return find_id(descriptor) if is_sqlites else None


@contextlib.contextmanager
def _unless_closed() -> Iterator[None]:
    """Go on if the descriptor is closed: another thread may have opened the same file, and failed, at this moment."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EBADF:
            raise


def _set(descriptor: int, kind: int, area: Bytes) -> None:
    assert _SETLK is not None
    fcntl.fcntl(descriptor, _SETLK, struct.pack("hhqqi", kind, os.SEEK_SET, *area, 0))
