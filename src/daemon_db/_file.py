"""A database file, or this process's memory: what to look at before SQLite is asked, and why SQLite said no."""

import contextlib
import logging
import os
import sqlite3
import stat
import time

from . import errors
from ._mount import mount_of
from .errors import OpenError, in_words, primary_code

_log = logging.getLogger("daemon_db")

MEMORY = ":memory:"
_LEAST_SPACE = 64 * 1024
"""Bytes: with less, SQLite can't make a -shm and a -wal."""

FileId = tuple[int, int]
"""Device and inode, by which SQLite, too, tells files apart."""


class File:
    """A database file.

    `path` is the caller's name for it. `real_path` is where links in it led at the open: SQLite puts the -wal and the
    -shm there. `id` is None as long as there is no file. `network` is the name of the file system, if machines may
    share it.
    """

    def __init__(self, path: str, read_only: bool, create: bool) -> None:
        self.path = path
        self.real_path = path
        self.read_only = read_only
        self.create = create
        self.id: FileId | None = None
        self.network: str | None = None

    # Before SQLite is asked

    def examine(self) -> None:
        """Find the file: set all that is known of it. Raise `OpenError` for what SQLite would wrongly accept.

        SQLite would wait for ever for a pipe, take a file of one byte for an empty one, create the file in another
        directory, or open a file that it can't write. All else SQLite refuses by itself, and `reason` says why.
        """
        parent = os.path.dirname(self.path)
        try:
            os.stat(os.path.join(parent, ""))  # of "no/../db", SQLite would make "db", and create it, without a "no"
        except OSError as error:
            raise OpenError(self.path, errors.NO_PARENT.format(parent, error.strerror)) from error
        self.real_path = os.path.realpath(self.path)
        for ending in ("-wal", "-shm", "-journal"):
            owner = self.real_path.removesuffix(ending)
            if owner != self.real_path and os.path.isfile(owner):
                raise OpenError(self.path, errors.BELONGS_TO.format(owner))
        try:
            status = os.stat(self.real_path)
        except FileNotFoundError:
            status = None
        except OSError as error:  # links in a circle, a name that is too long, no permission
            raise OpenError(self.path, str(error.strerror)) from error
        is_mounted, self.network = mount_of(self.real_path)
        if status is not None:
            self._examine(status)
            if is_mounted:
                raise OpenError(self.path, errors.MOUNTED_ALONE)
        if (status is None or not status.st_size) and (self.read_only or not self.create):
            reason = errors.NOT_THERE if status is None else errors.EMPTY
            raise OpenError(self.path, errors.LONE_WAL_KEPT if self.wal_size() else reason)

    def _examine(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):  # to open a pipe may take for ever
            raise OpenError(self.path, errors.DIRECTORY if stat.S_ISDIR(status.st_mode) else errors.NOT_REGULAR)
        if status.st_size == 1:
            raise OpenError(self.path, errors.NOT_A_DATABASE)  # SQLite takes one byte for an empty file
        self.id = id_of(status)
        if forbidden := self._forbidden(self.real_path, f"{self.real_path}-wal", f"{self.real_path}-shm"):
            raise OpenError(self.path, forbidden)

    def _forbidden(self, *names: str) -> str | None:
        """Words for the first of these that this user may not use. What SQLite can't write, it opens to read."""
        mode, word = (os.R_OK, "read") if self.read_only else (os.R_OK | os.W_OK, "write")
        for name in names:
            # Asked twice, because other processes make and remove these files.
            if all(not _allowed(name, mode) and os.access(name, os.F_OK) for _ in range(2)):
                return errors.FORBIDDEN.format(word, name)
        return None

    def uri(self) -> str:
        """As a URI, which alone can say what SQLite may do: read, write, or also create (https://sqlite.org/uri.html).

        To read, SQLite may have to make a -wal and a -shm, and only a connection that can write removes these again.
        But such a connection plays a hot journal back.
        """
        mode = "rwc" if self.id is None else "rw"
        if self.read_only and os.path.exists(f"{self.real_path}-journal"):
            mode = "ro"
        escaped = self.real_path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        # "//" is followed by a host, here by none: without it, a path that begins with two slashes would name a host
        return f"file://{escaped}?mode={mode}"

    def is_writable(self) -> bool:
        """Whether this user may write the file."""
        return _allowed(self.real_path, os.W_OK)

    def put_lone_wal_aside(self) -> None:
        """Rename a -wal beside no file, or an empty one: SQLite's first read would remove it."""
        wal = status_of(f"{self.real_path}-wal")  # first, because who creates a database makes the file first
        if wal and wal.st_size and not self.size():
            self.put_wal_aside(errors.LONE_WAL, id_of(wal))

    def put_wal_aside(self, words: str, wal_id: FileId | None) -> None:
        """Rename this -wal, and the -shm: a process may still have the old file open. Warn by `words`."""
        aside, index_id = f"{self.real_path}-{time.time_ns()}", self.index_id()
        if self.wal_id() != wal_id:  # asked after the -shm, which else may be that of another one's new -wal
            return
        try:
            # The -wal last: as long as it is there, no other one that opens makes a new -shm.
            self._rename_aside("-shm", aside, index_id)
            if not self._rename_aside("-wal", aside, wal_id):
                return
        except OSError as error:
            raise OpenError(self.path, errors.CANNOT_RENAME.format(f"{self.real_path}-wal", error.strerror)) from error
        _log.warning("%s: %s", self.path, words.format(f"{aside}-wal"))

    def _rename_aside(self, suffix: str, aside: str, file_id: FileId | None) -> bool:
        """Return whether it was this one: another process that opens may have been quicker, and have made a new one."""
        try:
            os.rename(f"{self.real_path}{suffix}", f"{aside}{suffix}")
        except FileNotFoundError:
            return False
        if find_id(f"{aside}{suffix}") == file_id:
            return True
        os.rename(f"{aside}{suffix}", f"{self.real_path}{suffix}")
        return False

    # Once SQLite has opened it

    def remember_id(self) -> None:
        """Remember which file SQLite has opened or created: later connections are to this file, or to none."""
        found = find_id(self.real_path)
        if found is None or self.id not in (None, found):
            raise self.replaced()
        self.id = found

    def refuse_replaced(self) -> None:
        """Raise `OpenError` if another file, or none, is at the path now: nobody else sees the one that is open.

        And if the file was emptied: in its WAL are some of its pages only.
        """
        try:
            status = os.stat(self.real_path)
        except (FileNotFoundError, NotADirectoryError):
            status = None
        except OSError as error:  # the file may be there all the same
            raise OpenError(self.path, errors.CANNOT_LOOK.format(error.strerror)) from error
        if status is None or not status.st_size or id_of(status) != self.id:
            raise self.replaced()

    def replaced(self) -> OpenError:
        """The error of `refuse_replaced`."""
        return OpenError(self.path, errors.REPLACED_FOR_READER if self.read_only else errors.REPLACED)

    def wal_id(self) -> FileId | None:
        """The -wal, if there is one: of a process that has the file open now, or of one that was killed."""
        return find_id(f"{self.real_path}-wal")

    def index_id(self) -> FileId | None:
        """The -shm, if there is one: it holds the WAL's index (https://sqlite.org/walformat.html)."""
        return find_id(f"{self.real_path}-shm")

    def wal_size(self) -> int:
        """How many bytes are in the WAL."""
        status = status_of(f"{self.real_path}-wal")
        return status.st_size if status else 0

    def size(self) -> int | None:
        """How many bytes are in the file itself; None if it isn't there."""
        status = status_of(self.real_path)
        return status.st_size if status else None

    def close(self) -> None:
        """Nothing to do: only `Memory` has something open."""

    # Once SQLite has said no

    def reason(self, error: Exception, timeout: float) -> str:
        """What SQLite's `error` means here, and what to do."""
        code = primary_code(error)
        directory = os.path.dirname(self.real_path)
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            names = (self.real_path, f"{self.real_path}-wal", f"{self.real_path}-shm", f"{self.real_path}-journal")
            if forbidden := self._forbidden(*names if self.read_only else (directory, *names)):
                return forbidden
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL):
            if lacking := _what_is_lacking(directory):
                return lacking.format(directory)
            if code == sqlite3.SQLITE_FULL:
                return errors.NO_SPACE_SEEN.format(error)
        lacks_index = code == sqlite3.SQLITE_CANTOPEN and not os.path.exists(f"{self.real_path}-shm")
        if code == sqlite3.SQLITE_READONLY or self.read_only and lacks_index:
            is_hot = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_ROLLBACK
            return errors.HOT_JOURNAL if is_hot else errors.NO_INDEX if self.read_only else errors.NO_DESCRIPTORS
        return in_words(error, timeout, self.network)


class Memory(File):
    """A database in memory, for the threads of one `DB`. There is no file to look at, and no WAL.

    Connections of one process that give SQLite's memdb VFS the same name, which begins with "/", have the same memory.
    """

    def __init__(self) -> None:
        super().__init__(MEMORY, read_only=False, create=True)
        self.is_shared = sqlite3.sqlite_version_info >= (3, 36)
        self.real_path = f"/daemon_db-{os.urandom(16).hex()}"
        self._anchors: list[sqlite3.Connection] = []

    def uri(self) -> str:
        return f"file:{self.real_path}?vfs=memdb" if self.is_shared else "file::memory:"

    def keep(self) -> None:
        """Keep the memory until `close`, whichever threads end: by a connection on which nothing is executed."""
        if self.is_shared:
            self._anchors.append(sqlite3.connect(self.uri(), uri=True, check_same_thread=False))

    def close(self) -> None:
        with contextlib.suppress(IndexError):
            # Popped, so that one thread alone closes it: without the GIL, two threads at once would crash Python.
            self._anchors.pop().close()


def locate(path: str | os.PathLike[str], read_only: bool, create: bool = True) -> File:
    """What `path` names: made absolute, because daemons change directory. Nothing is looked at yet."""
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"path must be str or os.PathLike[str], not {type(path).__name__}")
    if not name or "\0" in name:
        raise ValueError(f"path must be a file name, not {name!r}")
    if name.startswith("file:"):
        raise ValueError(f"path must be a file name, not a URI: a file of that name is './{name}'")
    if name == MEMORY:
        if read_only:
            raise ValueError(f"a {MEMORY} database begins empty: there is nothing to read")
        return Memory()
    if not os.path.isabs(name):
        try:
            name = os.path.join(os.getcwd(), name)  # abspath() would take "link/.." for "."
        except OSError as error:
            raise OpenError(name, errors.NO_WORKING_DIRECTORY.format(error.strerror)) from error
    return File(name, read_only, create)


def find_id(path: str | int) -> FileId | None:
    """Which file is at the path, or open at the descriptor. None if there is none."""
    status = status_of(path)
    return id_of(status) if status else None


def id_of(status: os.stat_result) -> FileId:
    """Which file this is the status of."""
    return status.st_dev, status.st_ino


def status_of(path: str | int) -> os.stat_result | None:
    """The operating system's answer. None if there is no file."""
    try:
        return os.stat(path)
    except OSError:
        return None


_EFFECTIVE_IDS = os.access in os.supports_effective_ids


def _allowed(path: str, mode: int) -> bool:
    # Asked, not tried: closing any descriptor of the file drops all locks of this process on it
    # (https://sqlite.org/howtocorrupt.html, 2.2).
    return os.access(path, mode, effective_ids=_EFFECTIVE_IDS)


def _what_is_lacking(directory: str) -> str | None:
    """Words for a lack of space or of inodes, if that is seen. A quota isn't."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return None
    if found.f_flag & os.ST_RDONLY:
        return None
    # Some file systems have no fixed number of inodes, and say 0; some say 0 to everything.
    if found.f_blocks > 0 and found.f_bavail * found.f_frsize < _LEAST_SPACE:
        return errors.NO_SPACE
    return errors.NO_INODES if found.f_files > 0 and found.f_favail == 0 else None
