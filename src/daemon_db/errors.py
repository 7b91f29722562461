"""Two errors, and all sentences that say what to do. Both errors are `sqlite3.Error`.

A sentence says what is wrong and one first thing to do, which does no harm; the README has the rest, under the heading
that the sentence names.
"""

import re
import sqlite3
from collections.abc import Iterable


class OpenError(sqlite3.OperationalError):
    """The file cannot be used: `str(error)` says which file, and the reason, in a person's words.

    `path` is the file, and `reason` the reason. Where SQLite said no, `__cause__` is SQLite's error, and
    `sqlite_errorcode` and `sqlite_errorname` are those of that error (https://sqlite.org/rescode.html).
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that the error survives pickling on its way between processes
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class SchemaError(sqlite3.DatabaseError):
    """The file is a database, but not one this version can use. The file was left as it was.

    `path` is the file, `problems` the differences from `schema.sql`, each a line of the message.
    """

    def __init__(self, path: str, problems: Iterable[str]) -> None:
        self.path = path
        self.problems = tuple(problems)
        super().__init__(path, self.problems)

    def __str__(self) -> str:
        first = f'{self.path}: the schema does not fit (see "Schema does not fit" in the README):'
        return "\n".join((first, *self.problems))


# The path

NOT_THERE = "it does not exist"
EMPTY = "it is empty: no database yet"
NOT_REGULAR = "not a regular file"
DIRECTORY = "it is a directory"
NO_PARENT = "parent directory {}: {}"
NO_WORKING_DIRECTORY = "the working directory: {}"
BELONGS_TO = "it belongs to {}: open that one"
FORBIDDEN = "permission denied, or a read-only file system: this user can't {} {}"
CANNOT_LOOK = "{}: this user may not look at it any more. Give the right back"
MOUNTED_ALONE = (
    "it is mounted without its directory (a container, or systemd's BindPaths=), so its -wal, with the newest commits, "
    'would be lost. Keep the container as it is: see "Mounted alone" in the README'
)
SHARED_FILE_SYSTEM = (
    "{} is on {}, which machines may share. Let one machine's programs only have it open (https://sqlite.org/wal.html)"
)

# Removed, replaced

REPLACED = (
    "the file that this process has open was removed, replaced or emptied. Stop, start and change nothing yet: first "
    'see "Removed or replaced" in the README'
)
REPLACED_FOR_READER = (
    "the file that this DB reads was removed, replaced or emptied. Nothing was written: close the DB, and open it again"
)
WAL_REMOVED = (
    "its -wal or -shm was removed or replaced: the newest commits may be lost. End every program that has it open, "
    'without kill -9, and start none: see "The WAL was lost" in the README'
)
TWO_NAMES = (
    "this process has it open as {}, and each name has a -wal of its own: commits get lost. Open it by that name"
)
LONE_WAL = (
    "the file is gone or empty, but its -wal was there, maybe with the newest commits. A new database begins, and the "
    'old -wal is now {}: see "Removed or replaced" in the README'
)
LONE_WAL_KEPT = (
    "the file is gone or empty, but its -wal is there, maybe with the newest commits. Remove nothing: "
    'see "Removed or replaced" in the README'
)
WAL_OF_ANOTHER = (
    "the file was replaced, and the -wal beside it belongs to the old one, maybe with its newest commits. That -wal "
    'is now {}: see "Removed or replaced" in the README'
)
WAL_OF_ANOTHER_KEPT = (
    "the file was replaced, and the -wal beside it belongs to the old one. Remove nothing: "
    'see "Removed or replaced" in the README'
)
CANNOT_RENAME = 'can\'t rename {} ({}). Start nothing before you have: see "Removed or replaced" in the README'

# What SQLite lacks

NO_DESCRIPTORS = (
    "SQLite could open it for reading only: no free file descriptor (see ulimit -n), or something like AppArmor, "
    "chattr or a sandbox forbids to write it, its -wal or its -shm"
)
HOT_JOURNAL = (
    "a killed process left a rollback journal, to be played back first: open it once without read_only (or --check)"
)
NO_INDEX = (
    "to read it, SQLite must make a -shm beside it, and can't (rights, a read-only file system, a sandbox, or no free "
    "file descriptor). Look at a copy of the file and its -wal, or look as its owner"
)
NO_SPACE = "no space left in {}: make some, and open it again"
NO_INODES = "no inode left in {} (see df -i): remove files there, and open it again"
NO_SPACE_SEEN = (
    "{}, though there is space: a quota, or the directory for temporary files is full. Set SQLITE_TMPDIR to one with "
    "more space than the file has"
)
NO_TEMPORARY_DIRECTORY = "no directory for temporary files that can be written: set SQLITE_TMPDIR to one"
IO_ERROR = (
    "disk I/O error ({}): a failing disk, a network file system, ulimit -f, or a removed -wal. Look at the logs first"
)
NO_WAL_MODE = "WAL mode is not available here: journal_mode stayed {!r}"
NO_FOREIGN_KEYS = "this SQLite was built without foreign keys"
_NO_SHARED_MEMORY = (
    "this file system lacks locks or memory that processes share ({}). Stop every program that has it open: "
    'see "No shared memory" in the README'
)
_NO_SPACE_FOR_INDEX = (
    "no space left for its -shm (disk, quota, ulimit -f): make some. Or this file system has no memory that processes "
    'share ({}): see "No shared memory" in the README'
)
_CANNOT_OPEN = (
    "unable to open database file, its -wal or its -shm: each must be a plain file, on a local disk with free space, "
    "its path at most 504 bytes, and the process needs free file descriptors"
)
NOT_A_DATABASE = 'not a SQLite database (if it was one, see "Damage" in the README before you do anything)'
DAMAGED = 'damaged ({}). Stop every program that has it open, and remove nothing: see "Damage" in the README'
# What SQLite's parser says of the text of a definition. All else about a malformed schema says that pages are damaged.
_NOT_UNDERSTOOD = re.compile(
    r"malformed database schema \((.*)\) - (?:near .*: syntax error|unrecognized token: .*|unknown table option: .*)",
    re.DOTALL,
)
_NEWER_SQLITE = (
    "SQLite {} doesn't understand the definition of {}: a newer SQLite has probably written it. Open it with that one; "
    'remove nothing: see "Schema does not fit" in the README'
)
_LOCKED = 'locked for more than {} s: another program, or thread, writes that long. See "Locked" in the README'
_OR_NO_LOCKS = ". Or {}, which machines may share, has no locks"

# The schema

RENAMED = ", where another is missing. If it was renamed, rename it back. Don't drop it: its rows would be lost"
CANNOT_BE_ADDED = "{}, and it can't be added: {}; its tables and rows are as they were"
NO_CONSTRAINTS = "ALTER TABLE adds columns, and no constraints of a table"
ANOTHER_PROGRAMS = "no table {}, but {}: the database of another program"
LACKS = "{}: an open without read_only adds it"

# Transactions and threads

NO_TRANSACTION = (
    "the transaction ended inside the block (executescript() and `with conn:` commit; an error may roll back). Look "
    "which rows are there before you repeat it"
)
LOCK_DROPPED = (
    "something in this process has opened and closed its -shm without SQLite, or by another SQLite library, and so "
    "dropped SQLite's lock. The transaction was rolled back: repeat it"
)
LEFT_IN_ANOTHER_THREAD = (
    "this transaction() began in thread {} and ended in {}, which can't end it. A dependency with `yield` "
    '(FastAPI) does that: see "Locked" in the README'
)
FORKED = (
    "opened before a fork(), and SQLite's locks don't work in the child. Close it in the parent before the fork, or "
    "start the process by spawn (forkserver: don't preload what opens it)"
)
WAITED_FOR_TURN = (
    "waited {} s for the transaction() of another thread: {}. It may itself wait for another program: "
    'see "Locked" in the README'
)
WAITED_FOR_CONNECTION = (
    "waited {:.1f} s for another connection that writes, another process's or another thread's: "
    'see "Locked" in the README'
)
HALF_READ = (
    "this thread has a SELECT that is half read, so SQLite didn't wait (or the busy timeout is shorter): fetchall() "
    'first. See "Locked" in the README'
)
READERS_IN_MEMORY = "another thread reads, and in memory a writer waits for readers"
OPENED_READ_ONLY = "this DB was opened with read_only=True"
IN_SNAPSHOT = "in a snapshot(), its connection only reads"
ONE_THREAD_ONLY = "SQLite {} has a :memory: database for one thread only; 3.36 shares it"
ROLLBACK_FAILED = "ROLLBACK failed, too: {}"

# The command line

NOT_A_FILE = "DEST must be a file, not {!r}"
ITSELF = "it is the database itself, or belongs to it: take another name for DEST"
WOULD_BE_PLAYED_BACK = "{} lies beside it, and would be played over the copy. Take another name for DEST"
COPY_FAILED = "the copy of {} failed: {}"
ORPHANS = "rows refer to rows that aren't there: copy those from a backup. Delete nothing before you know what was lost"
REFERS = "{} row {} refers to a row of {} that isn't there"

# Warnings

WAL_GROWS = "{}: the WAL has {} MB and can't be emptied: {}"
READER_IN_THE_WAY = (
    "a reader is in the way, here or in another process: a SELECT half read, a transaction left open, or a program "
    "that always reads, such as Litestream"
)
NO_LOCK = (
    "%s: there is no lock of an open file description (%s): see to it that nothing in this process but SQLite opens "
    "and closes the file"
)
NO_LOCK_FOR_CLOSING = "%s: no lock for closing (%s): its -wal stays there until the next close"

_NO_SHARED_MEMORY_ERRORS = {
    sqlite3.SQLITE_PROTOCOL,
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


def in_words(error: Exception, timeout: float, network: str | None = None) -> str:
    """What SQLite's `error` means for a file, and what to do. `network`: a file system that machines may share."""
    if isinstance(error, UnicodeDecodeError):  # SQLite's message quotes bytes of the file that are no text
        said = error.object.decode("utf-8", "replace")
        return DAMAGED.format(said) if "malformed" in said else said
    if unread := _NOT_UNDERSTOOD.match(str(error)):
        return _NEWER_SQLITE.format(sqlite3.sqlite_version, unread[1])
    primary, code = primary_code(error), getattr(error, "sqlite_errorcode", 0)
    if primary == sqlite3.SQLITE_CORRUPT:
        return DAMAGED.format(error)
    if code in _NO_SHARED_MEMORY_ERRORS:
        return _NO_SHARED_MEMORY.format(code_name(error))
    if code in (sqlite3.SQLITE_IOERR_SHMOPEN, sqlite3.SQLITE_IOERR_SHMSIZE):
        return _NO_SPACE_FOR_INDEX.format(code_name(error))
    if code == sqlite3.SQLITE_IOERR_GETTEMPPATH:
        return NO_TEMPORARY_DIRECTORY
    if primary == sqlite3.SQLITE_IOERR:
        return IO_ERROR.format(code_name(error))
    if is_busy(error):  # where there are no locks, SQLite says the same
        return _LOCKED.format(timeout) + (_OR_NO_LOCKS.format(network) if network else "")
    if primary == sqlite3.SQLITE_CANTOPEN:
        return _CANNOT_OPEN
    return NOT_A_DATABASE if primary == sqlite3.SQLITE_NOTADB else str(error)


def code_name(error: BaseException) -> str:
    """Of the extended result code; "" for Python's own errors."""
    return getattr(error, "sqlite_errorname", "")


def primary_code(error: BaseException) -> int:
    """The low byte of the extended result code (https://sqlite.org/rescode.html); 0 for Python's own errors."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_busy(error: BaseException) -> bool:
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
        return HALF_READ
    return WAITED_FOR_CONNECTION.format(waited)
