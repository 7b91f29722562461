"""A database file, or this process's memory: what to look at before SQLite is asked, and why SQLite said no."""

import contextlib
import errno
import os
import sqlite3
import stat

from ._mount import has_exact_times, mount_of, network_file_system
from .errors import (
    HOT_JOURNAL,
    MOUNTED_ALONE,
    NO_INDEX,
    NO_INDEX_ON_READ_ONLY_FILE_SYSTEM,
    NOT_A_DATABASE,
    READ_ONLY_FILE_SYSTEM,
    REPLACED,
    WAL_WITHOUT_FILE,
    OpenError,
    lacks_memory_or_locks,
    primary_code,
)

MEMORY = ":memory:"
FileId = tuple[int, int]
"""Device and inode, by which SQLite, too, tells files apart."""

_LEAST_SPACE = 2**16
"""Bytes: SQLite makes a -shm of 32 KiB, and the file system needs some for itself."""

_LONGEST_PATH = 504
"""Bytes: of the 512 that SQLite has for a path, 8 are for "-journal"."""


class File:
    """A database file.

    `path` is the caller's name for it. If that is a symbolic link, `real_path` is where the link leads: SQLite puts the
    -wal and the -shm there. `id` is None as long as there is no file. `file_system` is the name of the one that the
    file lies in, "" if nothing is known.
    """

    journal_mode = "wal"

    def __init__(self, path: str, read_only: bool, create: bool) -> None:
        self.path = path
        self.real_path = path
        self.read_only = read_only
        self.create = create
        self.id: FileId | None = None
        self.file_system = ""
        self._opens_to_write = not read_only

    # Before SQLite is asked

    def examine(self) -> None:
        """Find the file: set all that is known of it. Raise `OpenError` for what SQLite would wrongly accept.

        SQLite would wait for ever for a pipe, take a file of one byte for an empty one, create the file in another
        directory, or open a file that it can't write. All else SQLite refuses by itself, and `reason` says why.
        """
        try:
            status = os.lstat(self.path)
            # Before 3.39, SQLite shortens "link/.." by its text; the operating system goes where the link leads.
            if stat.S_ISLNK(status.st_mode) or "/.." in self.path:
                self.real_path = os.path.realpath(self.path)
                status = os.stat(self.path)
        except OSError as error:
            self._examine_what_is_not_there(error)
        else:
            self._examine_what_is_there(status)

    def _examine_what_is_not_there(self, error: OSError) -> None:
        parent = os.path.dirname(self.path)
        try:
            os.stat(os.path.join(parent, ""))  # with the slash: as a directory
        except FileNotFoundError:  # of "no/../db", SQLite would make "db", and create it, though there is no "no"
            raise OpenError(self.path, f"parent directory {parent} does not exist") from error
        except OSError as obstacle:
            raise OpenError(self.path, f"parent directory {parent}: {obstacle.strerror}") from error
        if not isinstance(error, FileNotFoundError):  # links in a circle, a name that is too long, no permission
            forbidden = isinstance(error, PermissionError) and self._forbidden_directory()
            raise OpenError(self.path, forbidden or str(error.strerror)) from error
        self.real_path = os.path.realpath(self.path)
        _, self.file_system = mount_of(self.real_path)
        if self.read_only or not self.create:
            self.refuse_wal_alone()
            raise OpenError(self.path, "it does not exist") from error
        if too_long := self._journal_name_too_long():  # SQLite would create the file, and then not the journal
            raise OpenError(self.path, too_long) from error

    def _examine_what_is_there(self, status: os.stat_result) -> None:
        if stat.S_ISDIR(status.st_mode):
            raise OpenError(self.path, "it is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise OpenError(self.path, "not a regular file")  # to open a pipe may take for ever
        if status.st_size == 1:
            raise OpenError(self.path, NOT_A_DATABASE)  # SQLite takes one byte for an empty file
        self.id = status.st_dev, status.st_ino
        is_mounted, self.file_system = mount_of(self.real_path)
        if is_mounted:
            raise OpenError(self.path, MOUNTED_ALONE)
        if forbidden := self._forbidden("", "-wal", "-shm"):
            raise OpenError(self.path, forbidden)
        if self.read_only:
            self._opens_to_write = self._must_open_to_write(status)

    def _forbidden(self, *suffixes: str) -> str | None:
        """Words for the first of these files that this user may not use. What it can't write, SQLite opens to read."""
        mode, rights = (os.R_OK, "readable") if self.read_only else (os.R_OK | os.W_OK, "readable and writable")
        for suffix in suffixes:
            name = self.real_path + suffix
            # Asked twice, because other processes make and remove these files.
            if all(not _allowed(name, mode) and _exists(name) for _ in range(2)):
                if not self.read_only and _is_on_read_only_file_system(name):
                    return READ_ONLY_FILE_SYSTEM
                return f"permission denied: {name if suffix else 'the file'} is not {rights} by this user"
        return None

    def _forbidden_directory(self) -> str | None:
        """Words for a directory in which this user may not create the files that SQLite needs."""
        directory = os.path.dirname(self.real_path)
        if self.read_only or self._can_write_beside():
            return None
        if _is_on_read_only_file_system(directory):
            return READ_ONLY_FILE_SYSTEM
        return f"permission denied: directory {directory} is not writable by this user"

    def _can_write_beside(self) -> bool:
        return _allowed(os.path.dirname(self.real_path), os.W_OK | os.X_OK)

    def _must_open_to_write(self, status: os.stat_result) -> bool:
        """Whether a read-only `DB` needs a connection that can write.

        SQLite may have to create a -wal and a -shm in order to read. Only a connection that can write removes them.
        """
        wal, index, journal = (_exists(self.real_path + suffix) for suffix in ("-wal", "-shm", "-journal"))
        if wal and index or not self._can_write_beside():
            return False
        if _allowed(self.real_path, os.W_OK):
            return not (wal or journal)  # if there is one, a connection that can write would write it into the file
        if status.st_uid == os.geteuid():
            return False
        raise OpenError(
            self.path,
            "no process has it open, and SQLite would leave a -wal and a -shm that the file's owner can't write: "
            "look at it as its owner, or look at a copy of the file and its -wal",
        )

    def mode(self) -> str:
        """SQLite's word for what a connection may do: only read, write, or also create the file."""
        if not self._opens_to_write:
            return "ro"
        return "rwc" if self.id is None else "rw"

    def uri(self, mode: str) -> str:
        """As a URI, which alone can say `mode=rw`: create nothing (https://sqlite.org/uri.html)."""
        escaped = self.real_path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        # "//" is followed by a host, here by none: without it, a path that begins with two slashes would name a host
        return f"file://{escaped}?mode={mode}"

    def refuse_wal_alone(self) -> None:
        """Raise `OpenError` if there is a -wal beside no file, or an empty one: the first read would remove that -wal.

        The -wal is looked at first, because who creates a database makes the file first.
        """
        if self.wal_size() and not self.size():
            raise OpenError(self.path, WAL_WITHOUT_FILE)

    # Once SQLite has opened it

    def remember_id(self) -> None:
        """Remember which file SQLite has opened or created: later connections are to this file, or to none."""
        found = find_id(self.path)
        if found is None or self.id not in (None, found):
            raise OpenError(self.path, "removed or replaced while it was opened")
        self.id = found

    def is_there(self) -> bool:
        """Whether the path still is the file that was opened. A link must still lead to where the WAL is, too."""
        status = status_of(self.path)
        return status is not None and self._is(status)

    def _is(self, status: os.stat_result) -> bool:
        is_at_path = (status.st_dev, status.st_ino) == self.id
        return is_at_path and (self.real_path == self.path or find_id(self.real_path) == self.id)

    def network_file_system(self) -> str | None:
        """The name of the file system, if machines may share it."""
        return network_file_system(self.file_system)

    def refuse_replaced(self) -> None:
        """Raise `OpenError` if another file, or none, is at the path now: nobody else sees the one that is open.

        And if the file was emptied: in its WAL are some of its pages only.
        """
        status = status_of(self.path)
        if status is None or not self._is(status):
            raise OpenError(self.path, REPLACED)
        if not status.st_size:
            raise OpenError(self.path, WAL_WITHOUT_FILE if self.wal_size() else REPLACED)

    def directory_status(self) -> os.stat_result | None:
        """The operating system's answer for the directory in which the file and its WAL are."""
        return status_of(os.path.dirname(self.real_path))

    def has_exact_times(self) -> bool:
        """Whether each change of the directory gives it another time."""
        return has_exact_times(self.file_system)

    def wal_id(self) -> FileId | None:
        """The -wal, if there is one: of a process that has the file open now, or of one that was killed."""
        return find_id(f"{self.real_path}-wal")

    def index_id(self) -> FileId | None:
        """The -shm, if there is one: it holds the WAL's index (https://sqlite.org/walformat.html)."""
        return find_id(f"{self.real_path}-shm")

    def may_write_index(self) -> bool:
        """Whether this user may write the -shm, which also a connection writes that only reads."""
        return _allowed(f"{self.real_path}-shm", os.W_OK)

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

    def reason(self, error: Exception) -> str | None:
        """What the operating system says to SQLite's `error`; None if the reason is another one."""
        code = primary_code(error)
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY) and (reason := self._why_not_opened(error)):
            return reason
        may_lack_space = code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL)
        if may_lack_space and not lacks_memory_or_locks(error) and self._has_no_space():
            return f"no space left in {os.path.dirname(self.real_path)}: make some, and open it again"
        if (
            code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
            and self.read_only
            and not self._can_write_beside()
        ):
            is_read_only = _is_on_read_only_file_system(os.path.dirname(self.real_path))
            return NO_INDEX_ON_READ_ONLY_FILE_SYSTEM if is_read_only else NO_INDEX
        return None

    def _why_not_opened(self, error: Exception) -> str | None:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_ROLLBACK:
            return HOT_JOURNAL
        directory = os.path.dirname(self.real_path)
        if not os.path.isdir(directory):
            return f"it is a link into {directory}, which does not exist"
        if len(os.fsencode(self.real_path)) > _LONGEST_PATH:
            return f"a path of more than {_LONGEST_PATH} bytes is too long for SQLite"
        return (
            _lack_of_descriptors()
            or self._journal_name_too_long()
            or self._forbidden_directory()
            or self._forbidden("-journal")
        )

    def _has_no_space(self) -> bool:
        try:
            found = os.statvfs(os.path.dirname(self.real_path))
        except OSError:
            return False
        if found.f_flag & os.ST_RDONLY:
            return False
        # Some file systems have no fixed number of inodes, and say 0; some say 0 to everything.
        lacks_blocks = found.f_blocks > 0 and found.f_bavail * found.f_frsize < _LEAST_SPACE
        return lacks_blocks or (found.f_files > 0 and found.f_favail == 0)

    def _journal_name_too_long(self) -> str | None:
        try:
            os.lstat(f"{self.real_path}-journal")
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return f"{error.strerror}, with the -journal that SQLite adds"
        return None


class Memory(File):
    """A database in memory, for the threads of one `DB`. There is no file to look at, and no WAL.

    Connections of one process that give SQLite's memdb VFS the same name, which begins with "/", have the same memory.
    """

    journal_mode = "memory"

    def __init__(self) -> None:
        super().__init__(MEMORY, read_only=False, create=True)
        self.is_shared = sqlite3.sqlite_version_info >= (3, 36)
        self.real_path = f"/daemon_db-{os.urandom(16).hex()}"
        self._anchors: list[sqlite3.Connection] = []

    def examine(self) -> None:
        """Open a connection that keeps the memory until `close`, whichever threads end. Nothing is executed on it."""
        if self.is_shared:
            self._anchors.append(sqlite3.connect(self.uri(self.mode()), uri=True, check_same_thread=False))

    def close(self) -> None:
        with contextlib.suppress(IndexError):
            # Popped, so that one thread alone closes it: without the GIL, two threads at once would crash Python.
            self._anchors.pop().close()

    def uri(self, mode: str) -> str:
        return f"file:{self.real_path}?vfs=memdb" if self.is_shared else "file::memory:"

    def remember_id(self) -> None: ...

    def is_there(self) -> bool:
        return True

    def refuse_replaced(self) -> None: ...

    def wal_id(self) -> None: ...

    def wal_size(self) -> int:
        return 0

    def network_file_system(self) -> None: ...

    def index_id(self) -> None: ...

    def reason(self, error: Exception) -> None: ...


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
            raise OpenError(name, f"the working directory: {error.strerror}") from error
    return File(name, read_only, create)


def find_id(path: str | int) -> FileId | None:
    """Which file is at the path, or open at the descriptor. None if there is none."""
    status = status_of(path)
    return (status.st_dev, status.st_ino) if status else None


def status_of(path: str | int) -> os.stat_result | None:
    """The operating system's answer. None if there is no file."""
    try:
        return os.stat(path)
    except OSError:
        return None


def _exists(path: str) -> bool:  # os.path.exists() takes twice as long
    return os.access(path, os.F_OK)


_EFFECTIVE_IDS = os.access in os.supports_effective_ids


def _allowed(path: str, mode: int) -> bool:
    # Asked, not tried: closing any descriptor of the file drops all locks of this process on it
    # (https://sqlite.org/howtocorrupt.html, 2.2).
    return os.access(path, mode, effective_ids=_EFFECTIVE_IDS)


def _is_on_read_only_file_system(path: str) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def _lack_of_descriptors() -> str | None:
    """The operating system's words for it, or None if there is no lack."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.strerror
    return None
