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
import struct
import sys
import threading
import time
import weakref

from . import errors
from ._file import File, FileId, find_id, id_of, status_of
from ._process import this_process
from ._wait import PAUSE, now
from .errors import OpenError

_log = logging.getLogger("daemon_db")

LOOK_EVERY = 0.01
"""Seconds from one look of `transaction()` to the next, while the lock is held."""

_PATIENCE = 60.0
"""Seconds for which a ROLLBACK without SQLite's write lock waits: it may destroy what another program is writing."""

# macOS has such locks, too, with another structure.
_SETLK: int | None = getattr(fcntl, "F_OFD_SETLK", None) if sys.platform == "linux" else None

Bytes = tuple[int, int]  # the first one, and how many
_SHARED = (0x40000002, 510)  # of the file: SQLite's SHARED lock (SHARED_FIRST and SHARED_SIZE in os_unix.c)
_IN_USE = (128, 1)  # of the -shm: by this byte SQLite sees that somebody uses it (UNIX_SHM_DMS in os_unix.c)
_WRITER = (120, 1)  # of the -shm: SQLite's lock of who writes (UNIX_SHM_BASE and WAL_WRITE_LOCK)
_FLOCK = "hhqqi"  # struct flock: l_type, l_whence, l_start, l_len, l_pid


class Guard:
    """What all connections of this process to one file share: which WAL they have, and the lock that keeps it there."""

    def __init__(self) -> None:
        self.mutex = threading.RLock()
        """For joining, for looking, and for leaving together with SQLite's close."""
        self.real_path = ""
        self.connections: set[object] = set()
        """Those that have joined."""
        self._wal_id: FileId | None = None
        self._index_id: FileId | None = None
        self._areas: dict[FileId | None, Bytes] = {}
        """Which bytes are locked: of the file, and of the -shm."""
        self._locks: dict[int, FileId] = {}
        """For each descriptor that the lock is on: which of the two is open there."""

    def join(self, conn: object, file: File) -> None:
        """For a connection that has just read for the first time, and so has opened the WAL.

        Raise `OpenError` if the WAL has been removed or replaced since that read, or SQLite can't write.
        """
        with self.mutex:
            if not self.connections:
                self.real_path = file.real_path
                self._wal_id, self._index_id = file.wal_id(), file.index_id()
                self._areas = {file.id: _SHARED, self._index_id: _IN_USE}
                self._lock(file)
            if not self._has(file.wal_id(), file.index_id()):
                raise OpenError(file.path, errors.WAL_REMOVED)
            self.connections.add(conn)

    @property
    def is_locked(self) -> bool:
        """Whether the connections have the lock: it can't be had everywhere."""
        return bool(self.connections and self._locks)

    def look(self, file: File) -> int | None:
        """Is it still the same file, and the same -wal and -shm? Return the WAL's size, or None if the WAL is lost.

        Raise `OpenError` if the file was removed or replaced: then what is beside it tells nothing of the WAL.
        """
        # First without the mutex: from Python 3.14 on, a signal's exception may come between `with` and its block, and
        # the mutex would stay taken for ever.
        size = self._look(file)
        if size is None:
            with self.mutex:  # a last connection may just have closed, and rightly removed both
                size = self._look(file)
        return size

    def _look(self, file: File) -> int | None:
        file.refuse_replaced()
        if self._is_overwritten(file):
            raise file.replaced()
        status = status_of(f"{file.real_path}-wal")
        is_whole = self._has(id_of(status) if status else None, file.index_id())
        if self.connections and not is_whole:
            return None
        return status.st_size if status else 0

    def is_read_only(self, file: File) -> bool:
        """Whether SQLite could open one of the files for reading only, and was asked to write.

        SQLite says nothing of that. A lack of descriptors for a moment is enough.
        """
        own = file.id, self._wal_id, self._index_id
        return any(file_id in own and mode == os.O_RDONLY for file_id, mode in _open_by_sqlite(file).values())

    def has_write_lock(self) -> bool:
        """Whether this process has SQLite's write lock. If it was dropped, others may have committed meanwhile."""
        for descriptor in self._locked(self._index_id):
            # A lock of another kind is asked for, so that this process's own is in its way. Another process's, too.
            question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *_WRITER, 0)
            with contextlib.suppress(OSError):
                *_, pid = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question))
                return bool(pid == os.getpid() or pid < -1)  # CephFS, for one, says of each lock that it is a server's
        return True

    def take_write_lock(self) -> None:
        """Take it again, for what SQLite does next. Wait for the program that has it now, up to `_PATIENCE` seconds."""
        deadline = now() + _PATIENCE
        for descriptor in self._locked(self._index_id):
            while now() < deadline:
                with contextlib.suppress(OSError):
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, _WRITER[1], _WRITER[0])
                    return
                time.sleep(PAUSE)

    def _locked(self, file_id: FileId | None) -> list[int]:
        """The descriptors of this file that the lock is on, and that are still proven to be this file's."""
        return [number for number, each in list(self._locks.items()) if each == file_id == find_id(number)]

    def leave(self, conn: object, file: File, keeps_lock: bool) -> None:
        """For a connection that SQLite will now close. The last one gives the lock back: it would block SQLite's close.

        If the last one keeps the lock, SQLite's close neither checkpoints nor removes the WAL.
        """
        self.connections.discard(conn)
        if not self.connections:
            self._put_wal_aside_if_replaced(file)
            if not keeps_lock:
                self._unlock(file)
            self._locks = {}  # SQLite closes these descriptors now: another file may get their numbers

    def may_checkpoint(self, file: File) -> bool:
        """Whether a checkpoint at the last close overwrites nothing that others have committed.

        While the lock is held, nobody's close removes the WAL: if the WAL is gone, somebody has removed it by hand. As
        long as nobody has committed to another WAL, a checkpoint saves what is in the removed one. An empty -wal proves
        that only beside the same -shm: with another -shm, a process may have emptied its WAL after its commits.

        If somebody has emptied the file, a checkpoint would write a part of the pages only, and the WAL would be gone.
        """
        if len(self.connections) > 1:
            return True  # this one isn't the last
        if file.size() == 0 or self._is_overwritten(file):
            return False
        wal_id, index_id = file.wal_id(), file.index_id()
        if self._has(wal_id, index_id) or find_id(file.real_path) != file.id:
            return True
        nobody_has_committed = wal_id is None or (index_id == self._index_id and not file.wal_size())
        return self.is_locked and nobody_has_committed

    def _put_wal_aside_if_replaced(self, file: File) -> None:
        """Rename the WAL if another file is at the path: SQLite would play the WAL over that file."""
        is_replaced = find_id(file.real_path) not in (None, file.id) or self._is_overwritten(file)
        if is_replaced and not file.read_only:
            try:
                file.put_wal_aside(errors.WAL_OF_ANOTHER, self._wal_id)
            except OpenError as error:  # close() raises nothing
                _log.warning("%s", error)

    def _has(self, wal_id: FileId | None, index_id: FileId | None) -> bool:
        """Whether these are the connections' own."""
        return None not in (wal_id, index_id) and (wal_id, index_id) == (self._wal_id, self._index_id)

    def is_beside(self, file: File) -> bool:
        """Whether the -wal or the -shm that is beside the file is the connections' own."""
        return file.wal_id() == self._wal_id is not None or file.index_id() == self._index_id is not None

    def _is_overwritten(self, file: File) -> bool:
        """Whether a backup was copied into the file: then its header says that it isn't in WAL mode."""
        return any(_journal_mode(descriptor, file) == "delete" for descriptor in self._locked(file.id))

    def _lock(self, file: File) -> None:
        """Take the lock, if this system has such locks. It is on SQLite's own descriptors.

        It is taken once. SQLite keeps a descriptor open, and the lock with it, for as long as any connection of this
        process has a lock on the file.
        """
        self._locks = {}
        found = _open_by_sqlite(file)
        writable = {file_id for file_id, mode in found.values() if mode != os.O_RDONLY}
        own = {file.id, self._wal_id, self._index_id} & {file_id for file_id, _ in found.values()}
        if not file.read_only and not own <= writable:
            raise OpenError(file.path, errors.NO_DESCRIPTORS)
        why_not: object = "SQLite's descriptor was not found" if _SETLK else "this system has none"
        for descriptor, (file_id, _) in found.items() if _SETLK else ():
            if file_id in self._areas:
                try:
                    _set(descriptor, fcntl.F_RDLCK, self._areas[file_id])
                    self._locks[descriptor] = file_id
                except BlockingIOError as error:  # another process checkpoints, and takes itself for the last one
                    self._release()
                    raise OpenError(file.path, errors.WAL_REMOVED) from error
                except OSError as error:  # none here; or another thread's open has failed, and closed it
                    why_not = error
        if file.id not in self._locks.values():
            self._release()
            _log.info(errors.NO_LOCK, file.path, why_not)
        elif self._index_id not in self._locks.values():  # SQLite has another -shm open than the one that is there now
            raise OpenError(file.path, errors.WAL_REMOVED)

    def _unlock(self, file: File) -> None:
        """Take SQLite's own locks again, because something may have dropped them, and give back ours."""
        try:
            for file_id, (start, length) in self._areas.items():
                for descriptor in self._locked(file_id):
                    fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, length, start)
        except OSError as error:
            _log.warning(errors.NO_LOCK_FOR_CLOSING, file.path, error)
        else:
            self._release()

    def _release(self) -> None:
        for file_id, area in self._areas.items():
            for descriptor in self._locked(file_id):
                with contextlib.suppress(OSError):  # closed meanwhile
                    _set(descriptor, fcntl.F_UNLCK, area)
        self._locks = {}


def guard_of(file: File) -> Guard:
    """The one that this process has for the file that SQLite has opened."""
    assert file.id is not None
    this = this_process()
    with this.lock:
        # No WeakValueDictionary: a signal's exception that strikes in its callbacks is lost.
        alive = {file_id: reference for file_id, reference in this.guards.items() if reference() is not None}
        guard: Guard = (file.id in alive and alive[file.id]()) or Guard()
        this.guards = alive | {file.id: weakref.ref(guard)}
        return guard


def refuse_lost(file: File) -> None:
    """Raise `OpenError` if this process has the file open, and the file was emptied, or its WAL is lost.

    SQLite would read a new WAL by the old index. The same if this process has open another file, which was here before,
    and whose -shm is still here. SQLite doesn't see locks of its own process: for the new file, it would empty that
    -shm, and begin its index anew. Threads that have the old file open would then crash (SIGBUS), or write into the new
    file's index.
    """
    for file_id, reference in this_process().guards.items():
        guard: Guard | None = reference()
        if guard is None or not guard.connections:
            continue
        if file_id == file.id and guard.look(file) is None:
            has_two_names = guard.real_path != file.real_path
            reason = errors.TWO_NAMES.format(guard.real_path) if has_two_names else errors.WAL_REMOVED
            raise OpenError(file.path, reason)
        if file_id not in (file.id, find_id(file.real_path)) and guard.is_beside(file):
            raise OpenError(file.path, errors.REPLACED)


def refuse_or_put_aside(file: File) -> None:
    """See to what SQLite would do wrongly at its first read, by the header of the file that it has just opened.

    If the header says that the file has no WAL, SQLite would play a -wal beside it over the file: that is another
    file's, and is renamed. If it says that there is one, SQLite makes the -wal and the -shm that are lacking. Those of
    a user who may not write the file stay there, and the daemon couldn't write them.
    """
    wal = status_of(f"{file.real_path}-wal")
    makes_files = file.read_only and not file.is_writable() and (wal is None or file.index_id() is None)
    if not makes_files and not (wal and wal.st_size):
        return
    found = [descriptor for descriptor, (file_id, _) in _open_by_sqlite(file).items() if file_id == file.id]
    modes = {_journal_mode(descriptor, file) for descriptor in found}
    if makes_files and "wal" in modes:
        raise OpenError(file.path, errors.NO_INDEX)
    if wal and wal.st_size and "delete" in modes:
        if file.read_only:
            raise OpenError(file.path, errors.WAL_OF_ANOTHER_KEPT)
        file.put_wal_aside(errors.WAL_OF_ANOTHER, id_of(wal))


def _journal_mode(descriptor: int, file: File) -> str | None:
    """By the header of the file, which was open there a moment ago (https://sqlite.org/fileformat2.html, 1.3.3)."""
    with contextlib.suppress(OSError):
        header = os.pread(descriptor, 2, 18)
        # Asked again: if another thread has closed the descriptor meanwhile, its number may be another file's now.
        if find_id(descriptor) == file.id:
            return {b"\1\1": "delete", b"\2\2": "wal"}.get(header)
    return None


def _open_by_sqlite(file: File) -> dict[int, tuple[FileId, int]]:
    """All descriptors that SQLite has in this process: which file is open there, and whether to read, or to write.

    SQLite opens files by O_NOFOLLOW, unlike `open()` and the like. Where there is no list of descriptors, none.
    """
    found: dict[int, tuple[FileId, int]] = {}
    try:
        descriptors = os.listdir("/proc/self/fd")
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise OpenError(file.path, errors.NO_DESCRIPTORS) from error
        return found
    for descriptor in map(int, descriptors):
        try:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        except OSError:
            continue  # another thread has closed it
        if flags & os.O_NOFOLLOW and (file_id := find_id(descriptor)):
            found[descriptor] = file_id, flags & os.O_ACCMODE
    return found


def _set(descriptor: int, kind: int, area: Bytes) -> None:
    assert _SETLK is not None
    fcntl.fcntl(descriptor, _SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, *area, 0))
