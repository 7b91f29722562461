"""Where a database is, before SQLite looks: a file, or this process's memory."""

import os
import sqlite3
import stat

from .errors import REPLACED, OpenError

MEMORY = ":memory:"
FileId = tuple[int, int]
"""Device and inode: what SQLite, too, tells files apart by."""

_LONGEST_PATH = 504
"""Bytes: of the 512 that SQLite has for a path, 8 are for "-journal"."""


class File:
    """A database file: `path` is what the caller calls it, `real_path` where its links lead, with the WAL beside that.

    `id` is the file that is there. None: none yet.
    """

    journal_mode = "wal"

    def __init__(self, path: str, read_only: bool) -> None:
        self.path = path
        self.real_path = path
        self.read_only = read_only
        self.id: FileId | None = None
        self._mode = "ro" if read_only else "rw"

    def examine(self) -> None:
        """Raise `OpenError` for what SQLite would refuse in fewer words, or take for a database although it is none."""
        # Before 3.39, SQLite simplifies "link/.." by its text; the operating system goes where the link leads.
        if "/.." in self.path:
            self.real_path = os.path.realpath(self.path)
        try:
            status = os.lstat(self.path)
            if stat.S_ISLNK(status.st_mode):
                self.real_path = os.path.realpath(self.path)
                status = os.stat(self.path)
        except OSError as error:
            self._examine_absence(error)
        else:
            self.id = status.st_dev, status.st_ino
            self._examine_file(status)
        if len(os.fsencode(self.real_path)) > _LONGEST_PATH:
            raise OpenError(self.path, f"a path of more than {_LONGEST_PATH} bytes is too long for SQLite")
        self._examine_journal()

    def _examine_journal(self) -> None:
        journal = f"{self.real_path}-journal"
        try:
            os.lstat(journal)
        except FileNotFoundError:
            return
        except OSError as error:
            raise OpenError(self.path, f"{error.strerror}, with the -journal that SQLite adds") from error
        if not self.read_only:
            self._refuse_forbidden(journal, os.R_OK | os.W_OK)

    def _examine_absence(self, error: OSError) -> None:
        parent = os.path.dirname(self.path)
        try:
            os.stat(os.path.join(parent, ""))  # with the slash: as a directory
        except FileNotFoundError:
            raise OpenError(self.path, f"parent directory {parent} does not exist") from error
        except OSError as obstacle:
            raise OpenError(self.path, f"parent directory {parent}: {obstacle.strerror}") from error
        if isinstance(error, PermissionError) and not self.read_only:
            self._refuse_unwritable_directory()
        if not isinstance(error, FileNotFoundError):  # links in a circle, a name that is too long
            raise OpenError(self.path, str(error.strerror)) from error
        if self.read_only:
            raise OpenError(self.path, "it does not exist") from error
        directory = os.path.dirname(self.real_path)
        if not os.path.isdir(directory):
            raise OpenError(self.path, f"it is a link into {directory}, which does not exist") from error
        self._refuse_unwritable_directory()
        self._mode = "rwc"

    def _examine_file(self, status: os.stat_result) -> None:
        if stat.S_ISDIR(status.st_mode):
            raise OpenError(self.path, "it is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise OpenError(self.path, "not a regular file")  # to open one may take for ever
        if status.st_size == 1:
            raise OpenError(self.path, "not a SQLite database")  # SQLite takes one byte for none
        if self.read_only:
            self._examine_to_read(status)
        else:
            self._examine_to_write()

    def _examine_to_write(self) -> None:
        if not _allowed(self.path, os.R_OK | os.W_OK):
            raise OpenError(self.path, "permission denied: the file is not readable and writable by this user")
        there = self._beside("-wal", "-shm")
        for name in there:
            # SQLite opens it all the same, and fails at the first write.
            self._refuse_forbidden(name, os.R_OK | os.W_OK)
        if len(there) < 2:
            self._refuse_unwritable_directory()

    def _refuse_forbidden(self, name: str, mode: int) -> None:
        # Asked again, because other processes make and remove these files.
        if not _allowed(name, mode) and os.access(name, os.F_OK) and not _allowed(name, mode):
            rights = "readable and writable" if mode & os.W_OK else "readable"
            raise OpenError(self.path, f"permission denied: {name} is not {rights} by this user")

    def _beside(self, *suffixes: str) -> list[str]:
        """Those of SQLite's files that there are."""
        return [name for suffix in suffixes if os.access(name := self.real_path + suffix, os.F_OK)]

    def _can_write_beside(self) -> bool:
        return _allowed(os.path.dirname(self.real_path), os.W_OK | os.X_OK)

    def _refuse_unwritable_directory(self) -> None:
        if not self._can_write_beside():
            directory = os.path.dirname(self.real_path)
            raise OpenError(self.path, f"permission denied: directory {directory} is not writable by this user")

    def _examine_to_read(self, status: os.stat_result) -> None:
        if not _allowed(self.path, os.R_OK):
            raise OpenError(self.path, "permission denied: the file is not readable by this user")
        there = self._beside("-wal", "-shm")
        for name in there:
            self._refuse_forbidden(name, os.R_OK)
        if len(there) == 2 or not self._can_write_beside():
            return
        # SQLite makes what is missing, and only a connection that can write removes it again when it closes.
        if _allowed(self.path, os.W_OK):
            if not self._beside("-wal", "-journal"):  # which such a connection would checkpoint or play back
                self._mode = "rw"
        elif status.st_uid != os.geteuid():
            raise OpenError(
                self.path,
                "no process has it open, and SQLite would leave a -wal and a -shm of this user's in its owner's way: "
                "look at it as its owner, or at a copy of the file and its -wal",
            )

    def uri(self, mode: str = "") -> str:
        """As a URI, which alone can say `mode=rw`: create nothing (https://sqlite.org/uri.html)."""
        escaped = self.real_path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        # "//" and no authority: the path itself may begin with two slashes
        return f"file://{escaped}?mode={mode or self._mode}"

    def identify(self) -> None:
        """Know which file SQLite has opened, or created."""
        found = _find(self.path)
        if found is None or self.id not in (None, found):
            raise OpenError(self.path, "removed or replaced while it was opened")
        if self.id is None:
            self.id = found
            self._mode = "rw"

    def refuse_other(self) -> None:
        """Raise `OpenError` if another file, or none, is at the path now: what is written to the old one is lost."""
        if not self.is_there():
            raise OpenError(self.path, REPLACED)

    def is_there(self) -> bool:
        """Whether the path is the file that was opened. A link must still lead to where its WAL is, too."""
        return _find(self.path) == self.id and (self.real_path == self.path or _find(self.real_path) == self.id)

    def index_id(self) -> FileId | None:
        """The file, if there is one, that holds the WAL's index (https://sqlite.org/walformat.html)."""
        return _find(f"{self.real_path}-shm")

    def has_wal(self) -> bool:
        """Whether there is a WAL, be it empty: of a process that has the file open now, or of one that was killed."""
        return os.access(f"{self.real_path}-wal", os.F_OK)

    def wal_size(self) -> int:
        """How many bytes are in it."""
        try:
            return os.stat(f"{self.real_path}-wal").st_size
        except OSError:
            return 0


class Memory:
    """A database in memory, for the threads of one `DB`.

    SQLite's memdb VFS shares a name that begins with "/" within the process, as long as a connection to it is open.
    """

    path = MEMORY
    journal_mode = "memory"
    read_only = False
    id = None

    def __init__(self) -> None:
        self.is_shared = sqlite3.sqlite_version_info >= (3, 36)
        self.real_path = f"/daemon_db-{os.urandom(16).hex()}"

    def uri(self, mode: str = "") -> str:
        return f"file:{self.real_path}?vfs=memdb" if self.is_shared else "file::memory:"

    def examine(self) -> None: ...

    def identify(self) -> None: ...

    def refuse_other(self) -> None: ...

    def is_there(self) -> bool:
        return True

    def index_id(self) -> None: ...

    def has_wal(self) -> bool:
        return True

    def wal_size(self) -> int:
        return 0


Place = File | Memory


def locate(path: str | os.PathLike[str], read_only: bool) -> Place:
    """The place that `path` names: made absolute, because daemons change directory. Nothing is looked at yet."""
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"path must be str or os.PathLike[str], not {type(path).__name__}")
    if not name or "\0" in name:
        raise ValueError(f"path must be a file name, not {name!r}")
    if name == MEMORY:
        if read_only:
            raise ValueError(f"read_only is for files: a {MEMORY} database begins empty")
        return Memory()
    if not os.path.isabs(name):
        try:
            name = os.path.join(os.getcwd(), name)  # abspath() would take "link/.." for "."
        except OSError as error:
            raise OpenError(name, f"the working directory: {error.strerror}") from error
    return File(name, read_only)


def _find(path: str) -> FileId | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


_EFFECTIVE_IDS = os.access in os.supports_effective_ids


def _allowed(path: str, mode: int) -> bool:
    # Asked, not tried: closing any descriptor of the file drops all locks of this process on it
    # (https://sqlite.org/howtocorrupt.html, 2.2).
    return os.access(path, mode, effective_ids=_EFFECTIVE_IDS)
