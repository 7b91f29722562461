"""The clock by which all waits and looks go, and the wait for a lock for which SQLite waits badly, or not at all."""

import contextlib
import functools
import sqlite3
import time
from collections.abc import Iterator

from .errors import is_busy

now = functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)
"""Seconds. Not `time.monotonic`: tests stop that one (freezegun), and what waits by it would wait for ever."""

PAUSE = 0.002
"""Seconds between two tries."""


def execute(conn: sqlite3.Connection, sql: str, timeout: float) -> tuple[object, ...] | None:
    """Execute `sql`, begun anew until `timeout` seconds have passed, while others' locks are in the way; its first row.

    SQLite itself sleeps up to 0.1 s between two tries: beside a few threads that write, it hardly ever gets its turn.
    And if a writer is in the way of a change of the journal mode, it doesn't wait.
    """
    with not_waiting(conn) as cursor:
        deadline = now() + timeout
        while True:
            try:
                row: tuple[object, ...] | None = cursor.execute(sql).fetchone()
                return row
            except sqlite3.OperationalError as error:
                if not is_busy(error) or now() >= deadline:
                    raise
            time.sleep(PAUSE)


@contextlib.contextmanager
def not_waiting(conn: sqlite3.Connection) -> Iterator[sqlite3.Cursor]:
    """A cursor of the connection. SQLite doesn't wait for locks in the block."""
    cursor = conn.cursor()
    cursor.row_factory = None  # the caller's may make anything of a row
    (timeout,) = cursor.execute("PRAGMA busy_timeout").fetchone()
    try:
        cursor.execute("PRAGMA busy_timeout=0")  # inside `try`: a signal's exception must not leave it at 0
        yield cursor
    finally:
        cursor.execute(f"PRAGMA busy_timeout={timeout}")
        cursor.close()  # a traceback may refer to it: half read, it would keep the file open
