"""The WAL is kept where it is: by a lock that nobody's `close()` drops, and by knowing the WAL's inode.

A process loses all its POSIX locks on a file, and SQLite's locks are such, when anything in the process closes any
descriptor of that file (https://sqlite.org/howtocorrupt.html, 2.2): to read its header by `open()` is enough. The next
program that opens and closes the database then takes itself for the last one. It checkpoints the WAL and removes it,
while this process goes on to write into the removed one.

Where the system has locks of an open file description (Linux), such a lock prevents that. To others this looks like one
reader more. Elsewhere, and where somebody removes the WAL by hand, the loss is found out.
"""

import contextlib
import errno
import fcntl
import logging
import os
import resource
import select
import struct
import threading
import weakref
from collections.abc import Iterable, Iterator

from ._place import File, FileId

_log = logging.getLogger("daemon_db")

_SETLK: int | None = getattr(fcntl, "F_OFD_SETLK", None)

Bytes = tuple[int, int]  # the first one, and how many
_SHARED = (0x40000002, 510)  # of the file: SQLite's SHARED lock (SHARED_FIRST and SHARED_SIZE in os_unix.c)
_IN_USE = (128, 1)  # of the -shm: by this byte SQLite sees that somebody uses it (UNIX_SHM_DMS in os_unix.c)


class Guard:
    """What all connections of this process to one file share: which WAL they have, and the lock that keeps it."""

    def __init__(self) -> None:
        self.mutex = threading.RLock()
        """For `join`, and for `leave` with SQLite's close after it.

        The same thread may take it twice: the garbage collector closes connections at any moment.
        """
        self._connections: set[object] = set()
        self._wal_id: FileId | None = None
        self._index_id: FileId | None = None
        self._locks: dict[int, tuple[FileId, Bytes]] = {}
        """By the descriptor that they are on."""

    def join(self, conn: object, file: File, likely: Iterable[int]) -> bool:
        """For a connection that has just read for the first time, and so has opened the WAL.

        `likely` are the descriptors that SQLite has probably got for the file and the -shm. False if the WAL has been
        removed or replaced since that read.
        """
        with self.mutex:
            if not self._connections:
                self._wal_id, self._index_id = file.wal_id(), file.index_id()
                if not self._lock(file, likely):
                    return False
            if not (self.has_wal(file) and self.has_index(file)):
                return False
            self._connections.add(conn)
            return True

    def has(self, conn: object) -> bool:
        return conn in self._connections

    def leave(self, conn: object) -> None:
        """For a connection that will now be closed. The last one would find the lock in its own way."""
        self._connections.discard(conn)
        if not self._connections:
            self._unlock()

    def leave_locked(self, conn: object) -> None:
        """The same, but the lock is left in the way: SQLite's last close neither checkpoints nor removes the WAL."""
        self._connections.discard(conn)

    def is_locked(self) -> bool:
        return bool(self._locks)

    def has_wal(self, file: File) -> bool:
        """Whether the -wal beside the file is the one that the connections have."""
        return file.wal_id() == self._wal_id is not None

    def has_index(self, file: File) -> bool:
        """Whether the -shm beside the file is the one that the connections have."""
        return file.index_id() == self._index_id is not None

    def is_lost(self, file: File) -> bool:
        """Whether the -wal or the -shm of the connections was removed or replaced: nobody sees what they commit."""
        with self.mutex:  # while no last connection closes, which removes both
            is_whole = self.has_wal(file) and self.has_index(file)
            return bool(self._connections) and not is_whole and file.is_there()

    def may_checkpoint(self, file: File) -> bool:
        """Whether it is safe to write what is in the WAL into the file, though the WAL may be lost.

        While the lock was held, nobody's close can have removed the WAL: somebody did so by hand. If nobody has
        committed to another WAL since then, a checkpoint saves what is in the removed one.
        """
        return not self.is_lost(file) or self.is_locked() and not file.wal_size()

    def _lock(self, file: File, likely: Iterable[int]) -> bool:
        """Take the lock, if the system has such locks. False if SQLite's own lock has been lost meanwhile.

        Once is enough: as long as another connection of this process has the file open, SQLite doesn't close the
        descriptors of one that is closed, and the lock stays with them.
        """
        wanted = {file.id: _SHARED, self._index_id: _IN_USE}
        try:
            if _SETLK is None:
                raise OSError("this system has none")
            found = _descriptors(wanted.keys(), likely)
            for descriptor, file_id in found.items():
                with _unless_closed():
                    _set(descriptor, fcntl.F_RDLCK, wanted[file_id])
                    self._locks[descriptor] = file_id, wanted[file_id]
            if file.id not in found.values():
                raise OSError("SQLite's descriptor was not found")
        except BlockingIOError:
            return False  # another process checkpoints, and takes itself for the last one that has the file open
        except OSError as error:
            self._unlock()
            _log.info(
                "%s: without a lock of an open file description (%s), it is up to this program that nothing in this "
                "process opens and closes the file but SQLite",
                file.path,
                error,
            )
            return True
        return self._index_id in found.values()  # else SQLite has another -shm open than the one that is there now

    def _unlock(self) -> None:
        """Give the lock back. SQLite's own is taken again first, because something may have dropped it."""
        locks = [(each, area) for each, (file_id, area) in self._locks.items() if _find(each) == file_id]
        for descriptor, (start, length) in locks:
            with _unless_closed():
                fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, length, start)
        for descriptor, area in locks:
            with _unless_closed():
                _set(descriptor, fcntl.F_UNLCK, area)
        self._locks.clear()

    def let_go_in_child(self) -> None:
        """A forked child has the locks, too, until it ends: its parent's death would not release them.

        Nothing of the child's may close these descriptors, nor get their numbers: so they become /dev/null.
        """
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in self._locks:
            os.dup2(null, descriptor, inheritable=False)
        os.close(null)


_guards: dict[FileId, weakref.ref[Guard]] = {}
_mutex = threading.Lock()


def guard_of(file: File) -> Guard:
    """The one that this process has for the file."""
    if file.id is None:
        raise ValueError(f"{file.path} has not been opened")
    with _mutex:
        guard = _get(file.id)
        if guard is None:
            # Not by a WeakValueDictionary: it would lose a signal's exception in the callback of a reference.
            for each in [file_id for file_id in _guards if _get(file_id) is None]:
                del _guards[each]
            guard = Guard()
            _guards[file.id] = weakref.ref(guard)
        return guard


def is_lost(file: File) -> bool:
    """Whether this process has the file open and has lost its WAL. SQLite would use the old index for a new WAL."""
    guard = _get(file.id)
    return guard is not None and guard.is_lost(file)


def _get(file_id: FileId | None) -> Guard | None:
    reference = _guards.get(file_id) if file_id else None
    return reference() if reference else None


def _begin_anew() -> None:
    """In a forked child."""
    global _mutex
    for file_id in _guards:
        if guard := _get(file_id):
            guard.let_go_in_child()
    _guards.clear()
    _mutex = threading.Lock()  # another thread may have had it at the fork


os.register_at_fork(after_in_child=_begin_anew)


def next_descriptors() -> list[int]:
    """The lowest free ones, which the system gives to whoever opens files next. None of them if there are too few."""
    if _SETLK is None:
        return []
    try:
        taken = [select.epoll() for _ in range(4)]  # each takes a descriptor, and gives it back when it is freed
    except OSError:
        return []
    return [each.fileno() for each in taken]


def _descriptors(files: Iterable[FileId | None], likely: Iterable[int]) -> dict[int, FileId]:
    """Those that SQLite has for these files. To look at all that the process has takes long, if there are many."""
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
        return range(resource.getrlimit(resource.RLIMIT_NOFILE)[0])  # all are in use, so that these are not too many


def _find_sqlites(descriptor: int) -> FileId | None:
    """What is open there. None if it isn't SQLite that has opened it: SQLite follows no link at the end of a path."""
    try:
        is_sqlites = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_NOFOLLOW
    except OSError:
        return None  # another thread has closed it
    return _find(descriptor) if is_sqlites else None


def _find(descriptor: int) -> FileId | None:
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _unless_closed() -> Iterator[None]:
    """A descriptor may be another thread's, which opens the same file just now, and whose opening fails."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EBADF:
            raise


def _set(descriptor: int, kind: int, area: Bytes) -> None:
    assert _SETLK is not None
    fcntl.fcntl(descriptor, _SETLK, struct.pack("hhqqi", kind, os.SEEK_SET, *area, 0))
