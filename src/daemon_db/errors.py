"""The two errors of opening, and what SQLite's errors mean in a person's words. Both are `sqlite3.Error`."""

import os
import sqlite3
from collections.abc import Iterable


class OpenError(sqlite3.OperationalError):
    """The file cannot be opened: `str(error)` says which and why, in a person's words.

    `path` is the file, `reason` the why. Where SQLite said no, `__cause__` is its error, and `sqlite_errorcode` and
    `sqlite_errorname` are that error's (https://sqlite.org/rescode.html).
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that the error survives pickling on its way between processes
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot open {self.path}: {self.reason}"


class SchemaError(sqlite3.DatabaseError):
    """The file is a database, but not one this version can use. It was left as it was.

    `path` is the file, `problems` the differences from `schema.sql`, each a line of the message.
    """

    def __init__(self, path: str, problems: Iterable[str]) -> None:
        self.path = path
        self.problems = tuple(problems)
        super().__init__(path, self.problems)

    def __str__(self) -> str:
        return "\n".join((f"the schema of {self.path} does not fit:", *self.problems))


# What is left in the old file's WAL would be written over another one's. And who removes it while another program has
# begun a new one takes that one's commits.
_BEGIN_ANEW = "stop every program that has it open, remove what is left of its -wal and -shm, and start again"
REPLACED = f"removed or replaced since this DB was opened: put the file back; or {_BEGIN_ANEW}"
STILL_OPEN = f"removed or replaced while this process has it open: put the file back; or {_BEGIN_ANEW}"
WAL_REMOVED = "its -wal was removed while it was open: stop every program that has it open, and start again"


def translated(error: BaseException, path: str, timeout: float, read_only: bool) -> OpenError | None:
    """What SQLite said of the file that was to be opened, in words that say what to do. None for any other error."""
    if isinstance(error, UnicodeDecodeError):  # in SQLite's message, which quotes SQL that is in the file
        return OpenError(path, _damaged(error))
    others = (OpenError, SchemaError, sqlite3.ProgrammingError)
    if not isinstance(error, sqlite3.Error) or isinstance(error, others):
        return None
    translation = OpenError(path, in_words(error, timeout, read_only))
    if primary_code(error):
        translation.sqlite_errorcode = error.sqlite_errorcode
        translation.sqlite_errorname = error.sqlite_errorname
    return translation


def in_words(error: sqlite3.Error, timeout: float = 5.0, read_only: bool = False) -> str:
    """What `error` means for a file, and what to do."""
    code = primary_code(error)
    if is_busy(error):
        return f"locked for more than {timeout} s"
    if code == sqlite3.SQLITE_NOTADB:
        return "not a SQLite database"
    if code == sqlite3.SQLITE_CORRUPT:
        return _damaged(error)
    if code == sqlite3.SQLITE_CANTOPEN and (lack := _lack_of_descriptors()):
        return lack
    if read_only and code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        return _unreadable(error)
    return str(error)


def _unreadable(error: sqlite3.Error) -> str:
    if error.sqlite_errorcode == sqlite3.SQLITE_READONLY_ROLLBACK:
        return "a killed process left a rollback journal, to be played back first: open it once without read_only"
    return (
        "no process has it open, so that SQLite needs to make a -shm beside it, and this user can't: "
        "look at it as a user who can write there, or at a copy of the file and its -wal"
    )


def _damaged(error: Exception) -> str:
    # A WAL belongs to one file: what is left of the old one's would be written over the backup.
    return (
        f"damaged ({error}): stop every program that has it open, remove its -wal and -shm, then restore a backup; "
        "or see https://sqlite.org/recovery.html"
    )


def _lack_of_descriptors() -> str | None:
    """The operating system's words for it, or None if there is no lack."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.strerror
    return None


def primary_code(error: sqlite3.Error) -> int:
    """The low byte of the extended result code (https://sqlite.org/rescode.html); 0 for Python's own errors."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another connection's lock is what SQLite met (https://sqlite.org/rescode.html#busy)."""
    return primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def locked() -> sqlite3.OperationalError:
    """The error that SQLite raises when the busy timeout has passed."""
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_BUSY, "SQLITE_BUSY"
    return error
