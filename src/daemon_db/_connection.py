"""One connection to one file: how it is opened, set up and closed, and what SQLite's errors mean.

All of this is about one connection: the schema is `_schema`'s, threads and transactions are `db`'s.
"""

import os
import sqlite3
import stat
import time
from _thread import _local, get_ident  # what `threading` has, which takes a fifth as long to import as sqlite3 does

from .errors import OpenError

MEMORY = ":memory:"
FileId = tuple[int, int]  # device and inode

pid = os.getpid()
"""This process, kept up to date across fork: `os.getpid()` is a system call, as long as a quarter of a `SELECT 1`."""

_open_files: dict[int, FileId] = {}
"""The files of this process's connections, by the connections' ids."""

_inherited: set[FileId] = set()
"""The files that this process's parent had open when it forked."""

_thread = _local()
"""What is in it for a thread is dropped when the thread ends, by that thread."""


def uri(path: str, mode: str) -> str:
    """`path` as a URI, which alone can say `mode=rw`: create nothing (https://sqlite.org/uri.html)."""
    escaped = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return f"file://{escaped}?mode={mode}"  # "//" and no authority: the path itself may begin with two slashes


def connect(uri: str, timeout: float, *, check_same_thread: bool = True) -> sqlite3.Connection:
    """Connect in autocommit mode. The connection is freed by its `close()` and by nothing else.

    Freed in a forked child, it would roll back there, and so clear the parent's uncommitted frames out of the WAL index
    that they share: "database disk image is malformed", in the parent (https://sqlite.org/howtocorrupt.html, 2.6).
    """
    conn = sqlite3.connect(uri, timeout=timeout, isolation_level=None, check_same_thread=check_same_thread, uri=True)
    # SQLite holds the function and the function its connection: a cycle that the garbage collector doesn't see.
    conn.create_function("daemon_db_connection", 0, lambda: repr(conn))
    return conn


class Owner:
    """What closes a connection when the thread that opened it ends, unless the thread has closed it before."""

    def __init__(self, conn: sqlite3.Connection, file: FileId | None) -> None:
        self.conn = conn
        self._pid, self._ident = pid, get_ident()
        if file is not None:
            _open_files[id(conn)] = file
        vars(_thread).setdefault("owners", set()).add(self)

    def close(self) -> None:
        vars(_thread)["owners"].discard(self)
        self._close()

    # As defaults: when the interpreter exits, this module's globals are gone before the main thread's locals.
    def __del__(self, getpid=os.getpid, get_ident=get_ident) -> None:  # type: ignore[no-untyped-def]
        # Another thread's owners are dropped by the main thread: in a forked child, before functions registered to run
        # there do, and when the interpreter exits under a daemon thread. Both leave the connection open.
        if self._pid == getpid() and self._ident == get_ident():
            self._close()

    def _close(self, open_files: dict[int, FileId] = _open_files) -> None:
        try:
            # While a cursor has rows to fetch, SQLite keeps a closed connection, and with it the lock of a transaction.
            if self.conn.in_transaction:
                self.conn.execute("ROLLBACK")
        except sqlite3.Error:
            pass  # closed by hand already; or ROLLBACK failed, and what remains is to close
        finally:
            self.conn.close()
            open_files.pop(id(self.conn), None)


def _after_fork_in_child() -> None:
    global pid
    pid = os.getpid()
    _inherited.update(_open_files.values())


os.register_at_fork(after_in_child=_after_fork_in_child)


def file_id(path: str) -> FileId | None:
    """Which file is at `path`, by what SQLite, too, tells files apart. None: none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def refuse_inherited(path: str, file: FileId | None) -> None:
    """Raise `OpenError` where SQLite would take locks that the parent process holds for locks of this one.

    It lists a process's locks by inode. A fork copies the list and not the locks, so that the parent's last `close()`
    finds the file free, and removes the WAL under the child: what the child commits from then on is lost.
    """
    if file in _inherited:
        raise OpenError(
            path,
            "this process was forked while its parent had the file open, and SQLite's locks on it don't work here; "
            "close the DB before the fork, or start the process by spawn or exec",
        )


def find(path: str) -> tuple[FileId | None, str]:
    """Which file is at `path`, if there is one, and the path that a link leads to: SQLite puts the WAL beside that.

    `OpenError` for what SQLite would take for a database file, and isn't.
    """
    real_path = path
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            real_path = os.path.realpath(path)
            status = os.stat(path)
    except OSError:
        return None, real_path
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise OpenError(path, "not a regular file")  # to open one may wait forever
    if stat.S_ISREG(status.st_mode) and status.st_size == 1:
        raise OpenError(path, "not a SQLite database")  # SQLite takes one byte for none
    return (status.st_dev, status.st_ino), real_path


def open_mode(path: str, file: FileId | None) -> str:
    """The URI's `mode`: whether to create the file."""
    # SQLite simplifies a path by its text, and would create "no/../db" where the operating system says no.
    can_create = file is None and os.path.isdir(os.path.join(os.path.dirname(path), ""))
    return "rwc" if can_create else "rw"


def has_wal(real_path: str) -> bool:
    """Whether there is something in the WAL: of a process that has the file open now, or of one that was killed."""
    wal = f"{real_path}-wal"
    if not os.access(wal, os.F_OK):  # the usual case, and quicker found out than by an exception
        return False
    try:
        return os.stat(wal).st_size > 0
    except OSError:
        return False


def refuse_unwritable(path: str) -> None:
    """Raise `OpenError` for a file that was opened, but only to be read: SQLite's way when it can't be written."""
    if not _allowed(path, os.R_OK | os.W_OK):
        raise OpenError(path, _NOT_ALLOWED)


def is_open(file: FileId | None) -> bool:
    """Whether this process has a connection to the file, so that its inode can't be another file's by now."""
    return file in list(_open_files.values())


def is_wal(conn: sqlite3.Connection, path: str) -> bool:
    """Whether WAL mode is on, or needn't be: a database in memory has no journal file (https://sqlite.org/wal.html)."""
    wanted = "memory" if path == MEMORY else "wal"
    return bool(conn.execute("PRAGMA journal_mode").fetchone() == (wanted,))


def switch_to_wal(conn: sqlite3.Connection, path: str, deadline: float) -> None:
    """Turn WAL mode on, waiting for locks until `deadline`; `OpenError` where it isn't to be had."""
    while True:
        set_busy_timeout(conn, deadline - time.monotonic())
        try:
            (mode,) = conn.execute("PRAGMA journal_mode=WAL").fetchone()
            break
        except sqlite3.OperationalError as error:
            # If a writer's lock is in the way of this switch, SQLite does not run its busy handler.
            if not is_busy(error) or time.monotonic() >= deadline:
                raise
            time.sleep(0.002)
    if mode != "wal":
        raise OpenError(path, f"WAL mode is not available here: journal_mode stayed {mode!r}")


def enforce_foreign_keys(conn: sqlite3.Connection) -> None:
    """Turn foreign keys on: a connection begins with them off (https://sqlite.org/foreignkeys.html#fk_enable)."""
    conn.execute("PRAGMA foreign_keys=ON")


def enforces_foreign_keys(conn: sqlite3.Connection) -> bool:
    """Whether that had an effect: in a SQLite that was built without foreign keys it has none."""
    return bool(conn.execute("PRAGMA foreign_keys").fetchone() == (1,))


def set_busy_timeout(conn: sqlite3.Connection, seconds: float) -> None:
    """Let statements wait that long for a lock (https://sqlite.org/pragma.html#pragma_busy_timeout)."""
    conn.execute(f"PRAGMA busy_timeout={max(0, int(seconds * 1000))}")


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another connection's lock is what SQLite met (https://sqlite.org/rescode.html#busy)."""
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_readonly(error: sqlite3.Error) -> bool:
    """Whether what SQLite met is that it may not write (https://sqlite.org/rescode.html#readonly)."""
    return _code(error) == sqlite3.SQLITE_READONLY


def locked() -> sqlite3.OperationalError:
    """The error that SQLite raises when the busy timeout has passed."""
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_BUSY, "SQLITE_BUSY"
    return error


def open_error(path: str, error: sqlite3.Error, timeout: float) -> OpenError:
    """SQLite's `error`, met while opening `path`, in words that say what to fix."""
    code = _code(error)
    if is_busy(error):
        reason = f"locked for more than {float(timeout)} s"
    elif code == sqlite3.SQLITE_NOTADB:
        reason = "not a SQLite database"
    elif code == sqlite3.SQLITE_CORRUPT:
        reason = f"damaged ({error}): restore a backup, or see https://sqlite.org/recovery.html"
    else:
        reason = _obstacle(path) or str(error)
    translated = OpenError(path, reason)
    if code:
        translated.sqlite_errorcode, translated.sqlite_errorname = error.sqlite_errorcode, error.sqlite_errorname
    return translated


def _code(error: sqlite3.Error) -> int:
    """The primary result code: the low byte of the extended one. 0: Python's own error, not SQLite's."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


_NOT_ALLOWED = "permission denied: the file is not readable and writable by this user"


def _obstacle(path: str) -> str | None:
    """What in the file system is in the way, of which SQLite says only "unable to open database file"."""
    if path == MEMORY:
        return None
    parent = os.path.dirname(path)
    try:
        os.stat(os.path.join(parent, ""))  # with the slash: as a directory
    except FileNotFoundError:
        return f"parent directory {parent} does not exist"
    except OSError as error:
        return f"parent directory {parent}: {error.strerror}"
    if os.path.isdir(path):
        return "it is a directory"
    if os.path.exists(path) and not _allowed(path, os.R_OK | os.W_OK):
        return _NOT_ALLOWED
    if not _allowed(parent, os.W_OK | os.X_OK):
        return f"permission denied: directory {parent} is not writable by this user"
    return None


_EFFECTIVE_IDS = os.access in os.supports_effective_ids


def _allowed(path: str, mode: int) -> bool:
    # Asked, not tried: closing any descriptor of the file drops all locks of this process on it
    # (https://sqlite.org/howtocorrupt.html, 2.2).
    return os.access(path, mode, effective_ids=_EFFECTIVE_IDS)
