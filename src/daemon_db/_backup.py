"""A checked copy of a database that is in use; and the check, by which damage is found in any database."""

import contextlib
import os
import sqlite3
import stat
import sys
import tempfile
from contextlib import closing
from typing import Any

from . import _schema, errors
from ._connection import State
from .errors import OpenError, primary_code


def back_up(conn: sqlite3.Connection, state: State, destination: str) -> dict[str, Any]:
    """Copy the database to a new file, check that, and rename it. Whatever fails, what is at `destination` stays."""
    target, source = os.path.realpath(destination), state.file.real_path
    refuse_destination(destination, target, source)
    like = os.stat(target if os.path.exists(target) else source)
    try:  # a file of its own, which nobody else may read
        descriptor, part = tempfile.mkstemp(prefix="daemon_db-", suffix=".part", dir=os.path.dirname(target))
    except OSError as error:
        raise OpenError(target, str(error.strerror)) from error
    os.close(descriptor)
    try:
        found = copy_and_check(conn, state, part, target)
        # Rows without their run are better than no backup, but worse than the one that is there.
        is_written = not found["problems"] or (not found["damaged"] and not os.path.exists(target))
        if is_written:
            refuse_destination(destination, target, source)  # again, because the copy took its time
            give_rights_of(like, part)
            os.replace(part, target)  # last: what fails, fails before
            with contextlib.suppress(OSError):  # as SQLite does: not every directory can be synced
                directory = os.open(os.path.dirname(target), os.O_RDONLY)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
        return found | {"backup": target if is_written else None}
    finally:
        for suffix in ("", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{part}{suffix}")


def refuse_destination(destination: str, target: str, source: str) -> None:
    """Raise `OpenError` for a file that is in use, or would not be the copy's alone."""
    if not destination or destination.endswith("/") or os.path.lexists(target) and not os.path.isfile(target):
        raise ValueError(errors.NOT_A_FILE.format(destination))
    beside = [f"{name}{suffix}" for suffix in ("-wal", "-shm", "-journal") for name in (source, target)]
    is_same = os.path.exists(target) and os.path.exists(source) and os.path.samefile(target, source)
    if is_same or target in (source, *beside):
        raise OpenError(target, errors.ITSELF)
    for name in (f"{target}-wal", f"{target}-journal"):
        if os.path.lexists(name):
            raise OpenError(target, errors.WOULD_BE_PLAYED_BACK.format(name))


def copy_and_check(conn: sqlite3.Connection, state: State, part: str, target: str) -> dict[str, Any]:
    """Copy as of one moment, however many write meanwhile. Return what is wrong with the copy."""
    with closing(sqlite3.connect(part, isolation_level=None)) as copy:
        copy.execute("PRAGMA locking_mode=EXCLUSIVE")  # so that WAL mode, which is copied, needs no shared memory there
        let_interrupts_in(copy)
        conn.execute("BEGIN")
        conn.execute("SELECT 1 FROM sqlite_master").fetchone()  # BEGIN alone reads nothing yet
        state.look()
        try:
            conn.backup(copy, pages=1000, progress=show_progress)  # between them, Python sees to Ctrl-C
            copy.execute("PRAGMA journal_mode=DELETE")  # so that nothing need be made beside it to read it
        except sqlite3.OperationalError as error:
            if primary_code(error) == sqlite3.SQLITE_INTERRUPT:
                raise
            raise OpenError(target, errors.COPY_FAILED.format(state.file.path, error)) from error
        conn.execute("COMMIT")
        return problems_and_rows(copy)


def show_progress(_: int, remaining: int, total: int) -> None:
    """On a terminal, how much is copied."""
    if sys.stderr and sys.stderr.isatty():
        print(f"\r{100 * (total - remaining) // max(total, 1)} %", end="" if remaining else "\n", file=sys.stderr)


def give_rights_of(like: os.stat_result, part: str) -> None:
    """Owner, group and mode, as far as this user may give them.

    Where the group can't be given, members of that group are among the others, and have a group's rights at most.
    """
    for owner in (like.st_uid, -1):
        with contextlib.suppress(OSError):
            os.chown(part, owner, like.st_gid)
            break
    mode = stat.S_IMODE(like.st_mode) & 0o777
    if os.stat(part).st_gid != like.st_gid:
        mode = mode & stat.S_IRWXU | mode & (mode >> 3) & stat.S_IRWXO
    os.chmod(part, mode)


def let_interrupts_in(conn: sqlite3.Connection) -> None:
    """Let SQLite call Python while it works: Python handles signals, such as Ctrl-C's, in Python code only."""
    conn.set_progress_handler(lambda: 0, 100_000)


def problems_and_rows(conn: sqlite3.Connection) -> dict[str, Any]:
    """What `PRAGMA integrity_check` finds wrong; if that is nothing, what `foreign_key_check` finds, and the rows."""
    rows: list[str] = []
    # After it has named the damaged pages, it goes on to read them, and fails. Python's cursor is a row ahead: it makes
    # the text of the row that names them, and then raises that error instead of giving the row.
    text_factory, conn.text_factory = conn.text_factory, lambda text: rows.append(text.decode("utf-8", "replace"))
    try:
        conn.execute("PRAGMA integrity_check").fetchall()
    except sqlite3.DatabaseError as error:
        if primary_code(error) != sqlite3.SQLITE_CORRUPT:
            raise
        rows.append(str(error))
    finally:
        conn.text_factory = text_factory
    if rows != ["ok"]:
        return {"damaged": True, "problems": [line for row in rows for line in row.splitlines()], "rows": {}}
    orphans = conn.execute("PRAGMA foreign_key_check").fetchall()
    problems = [errors.REFERS.format(table, rowid, parent) for table, rowid, parent, _ in orphans]
    return {"damaged": False, "problems": problems, "rows": count_rows(conn)}


def count_rows(conn: sqlite3.Connection) -> dict[str, int | None]:
    """How many each table has; None where an older file lacks the table."""
    rows: dict[str, int | None] = dict.fromkeys(_schema.tables())
    for table in rows:
        try:
            (rows[table],) = conn.execute(f"SELECT count(*) FROM {table}").fetchone()
        except sqlite3.DatabaseError as error:
            if primary_code(error) != sqlite3.SQLITE_ERROR:
                raise
    return rows
