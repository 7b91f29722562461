"""WAL mode is turned on, or off again where it can't be used, and the WAL is kept small."""

import contextlib
import sqlite3
import time

from . import _wait, errors
from ._file import File
from .errors import OpenError, is_busy


def turn_on(conn: sqlite3.Connection, file: File, timeout: float) -> None:
    """Turn WAL mode on, which the file then keeps (https://sqlite.org/wal.html).

    Raise `OpenError` if it can't be had.
    """
    (mode,) = _wait.execute(conn, "PRAGMA journal_mode=WAL", timeout) or ("",)
    if mode != "wal":
        raise OpenError(file.path, errors.NO_WAL_MODE.format(mode))


def turn_off(file: File) -> None:
    """Put the file back into rollback-journal mode, where WAL mode was turned on and the WAL can't be used.

    A connection that has the file to itself needs no shared memory (https://sqlite.org/wal.html#noshm).
    """
    with contextlib.suppress(sqlite3.Error):  # others use it: then it works for them
        with contextlib.closing(sqlite3.connect(file.uri(), uri=True, isolation_level=None, timeout=0)) as conn:
            conn.execute("PRAGMA locking_mode=EXCLUSIVE")  # before this connection's first read
            conn.execute("PRAGMA journal_mode=DELETE")


LIMIT = 16 * 2**20
"""Bytes that the WAL may have before all of it is checkpointed. SQLite's own checkpoints are at 4 MB."""

PATIENCE = 0.2
"""Seconds that a checkpoint of the whole WAL waits for readers. No thread of this `DB` can write in that time."""


class Checkpoints:
    """Keeps a file's WAL from growing for ever.

    SQLite writes at the WAL's beginning again only when no reader needs any of the WAL. If there is always one reader
    or another, the WAL grows and grows. A checkpoint that empties the WAL ends this: new readers then read the file
    itself, and the checkpoint waits for the old ones (https://sqlite.org/wal.html#avoiding_excessively_large_wal_files).
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._limit = LIMIT

    def keep_small(self, conn: sqlite3.Connection, size: int) -> str | None:
        """Empty the WAL, which has `size` bytes, if that is too much. For outside of a transaction.

        Where readers are in the way, return a warning that says so, and try again at twice the size.
        """
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
            reason = errors.READER_IN_THE_WAY
        except sqlite3.Error as error:  # the commit is made all the same
            reason = str(error)
        return errors.WAL_GROWS.format(self._path, size // 10**6, reason)


def _empty(conn: sqlite3.Connection) -> bool:
    """Checkpoint the whole WAL. Return whether that has emptied the WAL.

    SQLite's own wait, by the busy handler, may be for a read lock that new readers share again and again, and that is
    never free. A checkpoint that is begun anew doesn't wait for readers that need nothing of the WAL. So this begins
    anew, and doesn't wait in SQLite.
    """
    with _wait.not_waiting(conn) as cursor:
        deadline = _wait.now() + PATIENCE
        while True:
            try:
                (busy, _, _) = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.OperationalError as error:
                if not is_busy(error):
                    raise
                return False  # the reader is this very connection: a SELECT of the thread's own, half read
            if not busy or _wait.now() >= deadline:
                return not busy
            time.sleep(_wait.PAUSE)
