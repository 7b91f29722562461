"""WAL mode is turned on, the WAL is kept small, and the WAL of a file that `open` refuses is left as it was."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator

from ._place import File
from .errors import OpenError, is_busy


def turn_on(conn: sqlite3.Connection, file: File, timeout: float) -> None:
    """Turn WAL mode on, which the file then keeps (https://sqlite.org/wal.html). Raise `OpenError` if it can't be had.

    A database in memory has no journal file, and needs none.
    """
    mode = _switch(conn, "WAL", timeout)
    if mode != file.journal_mode:
        raise OpenError(file.path, f"WAL mode is not available here: journal_mode stayed {mode!r}")


def turn_off(file: File, timeout: float) -> None:
    """Put the file back into rollback-journal mode, where WAL mode was turned on and the WAL can't be used.

    A connection that has the file to itself needs no shared memory (https://sqlite.org/wal.html#noshm).
    """
    with contextlib.closing(sqlite3.connect(file.uri("rw"), uri=True, isolation_level=None, timeout=0)) as conn:
        conn.execute("PRAGMA locking_mode=EXCLUSIVE")  # before this connection's first read
        _switch(conn, "DELETE", timeout)


def _switch(conn: sqlite3.Connection, journal_mode: str, timeout: float) -> str:
    """Try to switch until `timeout`. Return the mode in which the file is then."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            (mode,) = conn.execute(f"PRAGMA journal_mode={journal_mode}").fetchone()
            return str(mode)
        except sqlite3.OperationalError as error:
            # If a writer's lock is in the way of this switch, SQLite does not run its busy handler.
            if not is_busy(error) or time.monotonic() >= deadline:
                raise
            time.sleep(0.002)


@contextlib.contextmanager
def left_as_it_is(file: File) -> Iterator[None]:
    """While a connection closes in here, leave the WAL as it is: a killed process may have left rows in it.

    When the last connection to a file closes, SQLite checkpoints the WAL. So another connection is opened before, and
    closed after. It is read-only, and can't checkpoint. If it can't be opened, this WAL can't be used by anybody.
    """
    reader = None
    try:  # no ExitStack: on Python 3.15 its first use imports a module, for which there may be no free descriptor
        # To read another file would harm this process (see `open_another`), and to read an empty one removes the -wal.
        if file.wal_size() and file.is_there() and file.size():
            with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
                reader = sqlite3.connect(file.uri("ro"), uri=True, timeout=0)
                reader.execute("SELECT 1 FROM sqlite_master").fetchone()
        yield
    finally:
        if reader is not None:
            reader.close()


LIMIT = 16 * 2**20
"""Bytes that the WAL may have before a commit checkpoints all of it. SQLite's own checkpoints are at 4 MB."""

LOOK_EVERY = 0.01
"""Seconds from one look at the WAL's size to the next. A look after each commit would make each fsync take longer (see
`Guard.has_wal`).
"""

PATIENCE = 0.2
"""Seconds that a checkpoint of the whole WAL waits for readers. No thread of this `DB` can write in that time."""


class Checkpoints:
    """Keeps a file's WAL from growing for ever.

    SQLite writes at the WAL's beginning again only when no reader needs any of the WAL. If there is always one reader
    or another, the WAL grows and grows. A checkpoint that empties the WAL ends this: new readers then read the file
    itself, and the checkpoint waits for the old ones (https://sqlite.org/wal.html#avoiding_excessively_large_wal_files).
    """

    def __init__(self, file: File) -> None:
        self._file = file
        self._limit = LIMIT
        self._next_look = 0.0

    def after_commit(self, conn: sqlite3.Connection) -> str | None:
        """Empty the WAL if it is too big. For the thread that has the turn.

        Where readers are in the way, return a warning that says so, and try again at twice the size.
        """
        if time.monotonic() < self._next_look:
            return None
        size = self._file.wal_size()
        self._next_look = time.monotonic() + LOOK_EVERY
        if size <= LIMIT:
            self._limit = LIMIT
            return None
        is_due = size > self._limit
        if is_due:
            self._limit = 2 * size
        try:
            # With this limit, SQLite truncates the WAL when it next writes at the beginning, after the last reader.
            conn.execute(f"PRAGMA journal_size_limit={LIMIT}")
            if not is_due:
                return None
            if _empty(conn):
                self._limit = LIMIT  # now, not at the next look: one commit alone may be larger than the limit
                return None
            reason = (
                "a reader is in the way, here or in another process: a SELECT half read, a transaction left open, or a "
                "program that always reads, such as Litestream"
            )
        except sqlite3.Error as error:  # the commit is made all the same
            reason = str(error)
        return f"{self._file.path}: the WAL has {size // 10**6} MB and can't be emptied: {reason}"


def _empty(conn: sqlite3.Connection) -> bool:
    """Checkpoint the whole WAL. Return whether that has emptied the WAL.

    SQLite's own wait, by the busy handler, may be for a read lock that new readers share again and again, and that is
    never free. A checkpoint that is begun anew doesn't wait for readers that need nothing of the WAL. So this begins
    anew, and doesn't wait in SQLite.
    """
    cursor = conn.cursor()
    cursor.row_factory = None  # the caller's may make anything of a row
    (timeout,) = cursor.execute("PRAGMA busy_timeout").fetchone()
    try:
        cursor.execute("PRAGMA busy_timeout=0")  # inside `try`: a signal's exception must not leave it at 0
        deadline = time.monotonic() + PATIENCE
        while True:
            (busy, _, _) = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if not busy or time.monotonic() >= deadline:
                return not busy
            time.sleep(0.002)
    except sqlite3.OperationalError as error:
        if not is_busy(error):
            raise
        return False  # the reader is this very connection: a SELECT of the thread's own, half read
    finally:
        cursor.execute(f"PRAGMA busy_timeout={timeout}")
