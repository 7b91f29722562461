"""The two errors of opening, and what SQLite's errors mean in a person's words. Both are `sqlite3.Error`."""

import sqlite3
from collections.abc import Iterable


class OpenError(sqlite3.OperationalError):
    """The file cannot be opened: `str(error)` says which file, and the reason, in a person's words.

    `path` is the file, and `reason` the reason. Where SQLite said no, `__cause__` is SQLite's error, and
    `sqlite_errorcode` and `sqlite_errorname` are those of that error (https://sqlite.org/rescode.html).
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that the error survives pickling on its way between processes
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot open {self.path}: {self.reason}"


class SchemaError(sqlite3.DatabaseError):
    """The file is a database, but not one this version can use. The file was left as it was.

    `path` is the file, `problems` the differences from `schema.sql`, each a line of the message.
    """

    def __init__(self, path: str, problems: Iterable[str]) -> None:
        self.path = path
        self.problems = tuple(problems)
        super().__init__(path, self.problems)

    def __str__(self) -> str:
        return "\n".join((f"the schema of {self.path} does not fit:", *self.problems))


NO_TRANSACTION = (
    "the block itself committed or rolled back (executescript() and `with conn:` commit), or SQLite rolled back after "
    "an error that the block caught: look which rows are there before you repeat it"
)
# What is left in the old file's WAL would be written over the new file. And if another program has begun a new WAL
# meanwhile, to remove that one destroys the program's commits: so every program is stopped first.
_PUT_BACK = (
    "stop every program that has it open, and copy away what is at the path now, with its -wal and -shm. Then put the "
    "old file back, with the -wal that was beside it; or remove these, and put a backup there (without one, the "
    "database begins empty). Then start again"
)
REPLACED = f"removed or replaced since this DB was opened: {_PUT_BACK}"
STILL_OPEN = f"removed or replaced while this process has it open: {_PUT_BACK}"
WAL_WITHOUT_FILE = (
    "the file is gone or empty, but its -wal is still there, maybe with the newest commits. Copy the -wal away, then "
    "stop every program that has it open. If the file was moved, put it back; if the -wal is gone then, put its copy "
    "back, too. If the file was emptied, keep the copy, and put a backup here. Before a backup or a new database comes "
    "here, remove the -wal and the -shm"
)
NOT_A_DATABASE = 'not a SQLite database (if it was one, see "Damage" in the README before you do anything)'
WAL_REMOVED = (
    "its -wal or -shm was removed or replaced while it was open: the newest commits may be lost. Before anything else "
    "opens it, let every program that has it open close it and end (kill -9 would lose more); copy the file, its -wal "
    "and its -shm away; start again, and remove nothing. If nobody removed them by hand, something in one of these "
    "programs has opened the file without SQLite or by another SQLite library, and closed it"
)
TWO_NAMES = "each of a file's names (hard links) has a WAL of its own, and commits get lost. Open it by one name only"
MOUNTED_ALONE = (
    "it is mounted by itself, so its -wal, with the newest commits, would lie in the container and go with the "
    "container. Stop every program that has it open; before the container is removed, copy it and the -wal beside it, "
    "if there is one, into a directory outside; and mount that directory"
)
READ_ONLY_FILE_SYSTEM = (
    "the file system is read-only: mount it so that it can be written, or look at a copy of the file and its -wal on "
    "another one"
)
NO_DESCRIPTORS = (
    "SQLite could open it, its -wal or its -shm for reading only: the process had no free file descriptor (raise the "
    "limit, ulimit -n, or open fewer files), or something like AppArmor or chattr forbids to write it"
)
# A WAL belongs to one file: what is left in the damaged file's WAL would be written over the backup.
AFTER_DAMAGE = (
    "stop every program that has it open; copy the file away, together with its -wal, -shm and -journal if they are "
    "there, because the -wal has the newest commits; then remove these files here, and put a backup here, or what can "
    'be salvaged from the copies (see "Damage" in the README)'
)
HOT_JOURNAL = "a killed process left a rollback journal, to be played back first: open it once without read_only"
NO_INDEX = (
    "no process has it open, so SQLite needs to make a -shm beside it, and this user can't: "
    "look at it as a user who can write there, or look at a copy of the file and its -wal"
)
NO_INDEX_ON_READ_ONLY_FILE_SYSTEM = (
    "no process has it open, so SQLite needs to make a -shm beside it, and the file system is read-only: "
    "look at a copy of the file and its -wal on another one"
)
_LACKS_SHARED_MEMORY = (
    "this file system lacks what WAL mode needs, locks and memory that processes share ({}): stop every program that "
    "has it open, then move the file, and the -wal beside it, if there is one, to a local disk"
)
_NO_ROOM_ERRORS = {sqlite3.SQLITE_IOERR_SHMOPEN, sqlite3.SQLITE_IOERR_SHMSIZE}
_SHARED_MEMORY_ERRORS = {
    sqlite3.SQLITE_IOERR_SHMMAP,
    sqlite3.SQLITE_IOERR_SHMLOCK,
    sqlite3.SQLITE_IOERR_LOCK,
    sqlite3.SQLITE_IOERR_RDLOCK,
    sqlite3.SQLITE_IOERR_UNLOCK,
    sqlite3.SQLITE_IOERR_CHECKRESERVEDLOCK,
}


def open_error(path: str, reason: str, cause: Exception) -> OpenError:
    """An `OpenError` with the code of SQLite's error `cause`. Python's own errors have no code."""
    error = OpenError(path, reason)
    if isinstance(cause, sqlite3.Error) and primary_code(cause):
        error.sqlite_errorcode, error.sqlite_errorname = cause.sqlite_errorcode, cause.sqlite_errorname
    return error


def in_words(error: Exception, timeout: float = 5.0) -> str:
    """What `error` means for a file, and what to do."""
    if isinstance(error, UnicodeDecodeError):  # SQLite's message quotes bytes of the file that are no text
        said = error.object.decode("utf-8", "replace")
        return f"damaged ({said}): {AFTER_DAMAGE}" if "malformed" in said else said
    if primary_code(error) == sqlite3.SQLITE_CORRUPT:
        return f"damaged ({error}): {AFTER_DAMAGE}"
    if getattr(error, "sqlite_errorcode", 0) in _NO_ROOM_ERRORS:
        # SQLite has found no room for the -shm, for whatever reason.
        return f"no space left for its -shm (a quota, or ulimit -f), or {lacks_shared_memory(error)}"
    if lacks_memory_or_locks(error):
        return lacks_shared_memory(error)
    if primary_code(error) == sqlite3.SQLITE_PROTOCOL:
        return f"another program was stopped while it opened the file, or {lacks_shared_memory(error)}"
    if is_busy(error):
        return f"locked for more than {timeout} s"
    if primary_code(error) == sqlite3.SQLITE_CANTOPEN:
        return (
            "unable to open database file, its -wal or its -shm: each must be a plain file, on a local disk, and the "
            "process needs free file descriptors"
        )
    if primary_code(error) == sqlite3.SQLITE_NOTADB:
        return NOT_A_DATABASE
    return str(error)


def lacks_memory_or_locks(error: Exception) -> bool:
    """Whether SQLite could not map its -shm or lock a file."""
    return getattr(error, "sqlite_errorcode", 0) in _SHARED_MEMORY_ERRORS


def lacks_shared_memory(error: Exception) -> str:
    """The words for it. `error` is SQLite's, or the system's own."""
    return _LACKS_SHARED_MEMORY.format(getattr(error, "sqlite_errorname", None) or getattr(error, "strerror", error))


def primary_code(error: Exception) -> int:
    """The low byte of the extended result code (https://sqlite.org/rescode.html); 0 for Python's own errors."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_busy(error: Exception) -> bool:
    """Whether another connection's lock was in SQLite's way (https://sqlite.org/rescode.html#busy)."""
    return primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def locked(note: str) -> sqlite3.OperationalError:
    """The error that SQLite raises when the busy timeout has passed."""
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_BUSY, "SQLITE_BUSY"
    error.add_note(note)
    return error


def whom_it_waited_for(error: sqlite3.Error, waited: float, timeout: float) -> str:
    """Why BEGIN IMMEDIATE was "busy". While this thread reads, SQLite doesn't wait for another one that writes."""
    if error.sqlite_errorcode == sqlite3.SQLITE_BUSY_SNAPSHOT or waited < timeout / 2:
        return (
            "SQLite didn't wait for the connection that writes, because this thread has a SELECT that is half read "
            "(fetchall() first), or a shorter busy timeout"
        )
    return (
        f"waited {waited:.1f} s for another connection that writes: another process's, or `db.conn` of another thread"
    )
