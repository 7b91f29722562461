"""`python -m daemon_db PATH`: create, open or update a database; or look for damage in it; or make a backup of it."""

import argparse
import contextlib
import json
import os
import signal
import sqlite3
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from . import DB, OpenError, SchemaError, __version__, _mount, _opening, _place, _schema
from ._connection import State
from .errors import AFTER_DAMAGE, in_words, primary_code

_MOST_PROBLEMS = 10
_TIMEOUT = 5.0


def main() -> int:
    """Exit status 0; 1, with one line on standard error, if it failed or found damage; 130 if interrupted; 2: wrong
    usage.
    """
    parser = argparse.ArgumentParser(
        "python -m daemon_db",
        description="Create or open a database, or bring it up to date, and say what is there.",
    )
    parser.add_argument("path", metavar="PATH", help="the database file")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--check",
        action="store_true",
        help="write nothing, and look for damage by PRAGMA integrity_check and foreign_key_check",
    )
    instead.add_argument(
        "--backup",
        metavar="DEST",
        help="copy the database, which may be in use, to the file DEST; check the copy, then replace what is at DEST",
    )
    parser.add_argument("--json", action="store_true", help="say it as JSON, also what failed")
    parser.add_argument("--version", action="version", version=f"daemon_db {__version__}")
    arguments = parser.parse_args()
    for number in signal.SIGTERM, signal.SIGHUP:  # as Ctrl-C: what a backup has begun is removed
        signal.signal(number, signal.default_int_handler)
    found: dict[str, Any] = {"path": absolute(arguments.path)}
    status = 0
    try:
        if arguments.check:
            found |= check(arguments.path)
        elif arguments.backup is not None:
            found |= back_up(arguments.path, arguments.backup)
        else:
            found |= open_or_create(arguments.path)
    except KeyboardInterrupt:
        found["error"], status = "interrupted", 130
    except (OpenError, SchemaError, Refused) as error:
        found["error"], status = one_line(str(error)), 1
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if primary_code(error) == sqlite3.SQLITE_INTERRUPT:  # Ctrl-C came in the middle of a statement
            found["error"], status = "interrupted", 130
        else:
            found["error"], status = one_line(f"{found['path']}: {in_words(error, _TIMEOUT)}"), 1
    except OSError as error:
        found["error"], status = f"{error.filename or found['path']}: {error.strerror}", 1
    except ValueError as error:
        if arguments.json:
            say(json.dumps(found | {"error": str(error)}))
        parser.error(str(error))
    if found.get("problems"):
        found["error"], status = what_failed(found), 1
    if arguments.json or "rows" in found:
        status = say(json.dumps(found) if arguments.json else "\n".join(lines(found))) or status
    if "error" in found and sys.stderr is not None:
        print("daemon_db:", found["error"], file=sys.stderr)
    return status


def absolute(path: str) -> str:
    """As `DB.path` is: "link/.." is left to the operating system."""
    try:
        return os.path.join(os.getcwd(), path)
    except OSError:  # the working directory is gone
        return path


class Refused(Exception):
    """What a backup would have done harm to, in words."""


def open_or_create(path: str) -> dict[str, Any]:
    """Create, open or update the database: what was added, and what is there."""
    with progress(f"opening {path}"), DB.open(path, timeout=_TIMEOUT, on_connect=let_interrupts_in) as db:
        return {"added": list(db._state.added)} | look(db.conn, db.path) | {"rows": count_rows(db.conn)}


def check(path: str) -> dict[str, Any]:
    """Look for damage first, because to count the rows of a damaged table fails."""
    with progress(f"checking {path}"), opened_as_it_is(path) as (conn, state):
        found = problems_of(conn)
        found |= {"rows": count_rows(conn, found["damaged"]), "to_add": list(state.added)}
        return look(conn, state.file.path) | found


def back_up(path: str, destination: str) -> dict[str, Any]:
    """Copy the database to a new file, check that, and rename it. Whatever fails, what is at `destination` stays."""
    if destination in ("", "-"):
        raise ValueError(f"DEST must be a file name, not {destination!r}")
    target = os.path.realpath(destination)
    with progress(f"copying {path}") as show, opened_as_it_is(path) as (conn, state):
        refuse_destination(destination, target, path)
        with writing(target):  # a file of its own, which nobody else may read
            descriptor, part = tempfile.mkstemp(prefix="daemon_db-", suffix=".part", dir=os.path.dirname(target))
            os.close(descriptor)
        try:
            found = (
                look(conn, state.file.path)
                | {"to_add": list(state.added)}
                | copy_and_check(conn, state.file.path, part, target, show)
            )
            # Rows without their run are better than no backup, but worse than the one that is there.
            is_written = not found["problems"] or (not found["damaged"] and not os.path.exists(target))
            found["backup"] = target if is_written else None
            if is_written:
                refuse_destination(destination, target, path)  # again, because that took its time
                with writing(target):
                    like = target if os.path.exists(target) else state.file.real_path
                    os.chmod(part, stat.S_IMODE(os.stat(like).st_mode))
                    replace(part, target)  # last: what fails, fails before
            return found
        finally:
            for suffix in ("", "-journal", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{part}{suffix}")


@contextlib.contextmanager
def writing(target: str) -> Iterator[None]:
    """Name the destination in the operating system's errors."""
    try:
        yield
    except OSError as error:
        raise Refused(f"cannot write {target}: {error.strerror}") from error


def refuse_destination(destination: str, target: str, path: str) -> None:
    """Raise `Refused` for a file that is in use, or would not be the copy's alone."""
    if destination.endswith("/") or os.path.lexists(target) and not os.path.isfile(target):
        raise Refused(f"cannot write {target}: it is no file, but a directory or a device")
    source = os.path.realpath(path)
    if target in (f"{source}-wal", f"{source}-shm", f"{source}-journal") or (
        os.path.exists(target) and os.path.samefile(target, path)
    ):
        raise Refused(f"cannot write {target}: it is the database itself, or belongs to it")
    for suffix in ("-wal", "-journal"):
        if os.path.lexists(f"{target}{suffix}"):
            raise Refused(
                f"cannot write {target}: {target}{suffix} lies beside it, and would be played back over the copy. "
                f"If no program has {target} open, move it and {target}{suffix} away; or take another name"
            )


def copy_and_check(
    conn: sqlite3.Connection, path: str, part: str, target: str, show: Callable[[str], None]
) -> dict[str, Any]:
    """Copy as of one moment, however many write meanwhile. Return what is wrong with the copy."""

    def follow(_: int, remaining: int, total: int) -> None:
        show(f"{100 * (total - remaining) // max(total, 1)} %")

    with closing(sqlite3.connect(part, isolation_level=None)) as copy:
        copy.execute("PRAGMA locking_mode=EXCLUSIVE")  # so that WAL mode, which is copied, needs no shared memory there
        let_interrupts_in(copy)
        conn.execute("BEGIN")
        conn.execute("SELECT 1 FROM sqlite_master").fetchone()  # BEGIN alone reads nothing yet
        try:
            conn.backup(copy, pages=1000, progress=follow)
            copy.execute("PRAGMA journal_mode=DELETE")  # so that nothing need be made beside it to read it
        except sqlite3.OperationalError as error:
            if primary_code(error) == sqlite3.SQLITE_INTERRUPT:
                raise
            # Python doesn't say which of the two it was.
            raise Refused(f"cannot copy {path} to {target}: {error}") from error
        conn.execute("COMMIT")
        found = problems_of(copy)
        return {"rows": count_rows(copy, found["damaged"])} | found


def replace(part: str, target: str) -> None:
    """Rename, and see that the new name is on the disk, where that can be had."""
    os.replace(part, target)
    with contextlib.suppress(OSError):  # as SQLite does: it may not be readable, or have no fsync
        directory = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextlib.contextmanager
def opened_as_it_is(path: str) -> Iterator[tuple[sqlite3.Connection, State]]:
    """A connection that only reads, also to a file whose schema lacks something."""
    state = State(_place.locate(path, read_only=True), _TIMEOUT)
    conn = _opening.open_as_it_is(state)
    try:
        if _schema.is_everything(state.added):
            raise Refused(f"{state.file.path} is empty: no database yet")
        conn.text_factory = lambda text: text.decode("utf-8", "replace")  # a damaged file may have any bytes
        let_interrupts_in(conn)
        yield conn, state
    finally:
        conn.close()


def let_interrupts_in(conn: sqlite3.Connection) -> None:
    """Let SQLite call Python while it works: Python handles signals, such as Ctrl-C's, in Python code only."""
    conn.set_progress_handler(lambda: 0, 100_000)


def look(conn: sqlite3.Connection, path: str) -> dict[str, Any]:
    """What is known of the database but its rows, as `--json` prints it."""
    return {
        "path": path,
        "sqlite": sqlite3.sqlite_version,
        "wal_reset_bug": has_wal_reset_bug(sqlite3.sqlite_version_info),
        "network_file_system": _mount.network_file_system(_mount.mount_of(path)[1]),
        "journal_mode": conn.execute("PRAGMA journal_mode").fetchone()[0],
        "foreign_keys": conn.execute("PRAGMA foreign_keys").fetchone() == (1,),
    }


def count_rows(conn: sqlite3.Connection, is_damaged: bool = False) -> dict[str, int | None]:
    """How many each table has; None where an older file lacks the table, or it is damaged."""
    unknown = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT) if is_damaged else (sqlite3.SQLITE_ERROR,)
    rows: dict[str, int | None] = {}
    for table in _schema.tables():
        try:
            (rows[table],) = conn.execute(f"SELECT count(*) FROM {table}").fetchone()
        except sqlite3.DatabaseError as error:
            if primary_code(error) not in unknown:
                raise
            rows[table] = None
    return rows


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What was found, as lines for a person."""
    yield f"path           {found['path']}"
    bug = '  (see "The WAL-reset bug" in the README)' if found["wal_reset_bug"] else ""
    yield f"SQLite         {found['sqlite']}{bug}"
    if found["network_file_system"]:
        yield f"network        {found['network_file_system']}: only one machine's programs may have it open"
    yield f"journal mode   {found['journal_mode']}"
    yield f"foreign keys   {'on' if found['foreign_keys'] else 'off'}"
    for table, count in found["rows"].items():
        if f"{table}: missing table" in found.get("to_add", ()):
            yield f"{table:14} no such table: the file is an older version's, or the table was dropped"
        else:
            yield f"{table:14} {'unknown' if count is None else '1 row' if count == 1 else f'{count} rows'}"
    if found.get("added"):
        yield f"opened         {_schema.what_was_added(found['added'])}"
    if found.get("to_add"):
        yield f"next open      adds {_schema.names(found['to_add'])}"
    if found.get("backup"):
        yield f"backup         {found['backup']}"
    if "problems" in found:
        yield f"check          {'failed' if found['problems'] else 'ok'}"


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Whether that version of SQLite has it (https://sqlite.org/wal.html#walresetbug)."""
    if version[:2] in ((3, 44), (3, 50)):
        return version < ((3, 44, 6) if version[1] == 44 else (3, 50, 7))
    return (3, 7, 0) <= version < (3, 51, 3)


def problems_of(conn: sqlite3.Connection) -> dict[str, Any]:
    """What `PRAGMA integrity_check` finds wrong; if that is nothing, what `PRAGMA foreign_key_check` finds."""
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
        return {"damaged": True, "problems": [line for row in rows for line in row.splitlines()]}
    orphans = conn.execute("PRAGMA foreign_key_check").fetchall()
    problems = [
        f"{table} row {rowid} refers to a row of {parent} that isn't there" for table, rowid, parent, _ in orphans
    ]
    return {"damaged": False, "problems": problems}


def what_failed(found: dict[str, Any]) -> str:
    """The first problems on one line, and what to do about them."""
    problems = found["problems"]
    more = f" and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
    said = f"{found['path']} failed the check: {'; '.join(problems[:_MOST_PROBLEMS])}{more}"
    backup = ""
    if "backup" in found:
        backup = ". The backup was written all the same" if found["backup"] else ". No backup was written"
    if not found["damaged"]:
        return (
            f"{said}: add the rows that these refer to, from a backup for instance, or delete these (either they were "
            f"written without PRAGMA foreign_keys=ON, or what they refer to was lost){backup}"
        )
    return f"{said}: {AFTER_DAMAGE}{backup}"


def one_line(message: str) -> str:
    return message.replace(":\n", ": ").replace("\n", "; ")


def say(text: str) -> int:
    """Print on standard output; the exit status."""
    if sys.stdout is None:
        return 0
    try:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # of a name in another encoding
        print(text, flush=True)
    except OSError as error:
        # When Python exits, it writes what is left in the buffer: to a place where this doesn't fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if sys.stderr is not None:
            print(f"daemon_db: cannot write to standard output: {error.strerror}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """A line on standard error, where that is a terminal, for what takes longer than a second.

    Yields a function that takes how far it has got.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    far = ""
    start = time.monotonic()
    is_done = threading.Event()

    def show() -> None:
        while not is_done.wait(1):
            print(f"\r\x1b[K{what}: {far or f'{time.monotonic() - start:.0f} s'}", end="", file=sys.stderr, flush=True)

    def set_far(text: str) -> None:
        nonlocal far
        far = text

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield set_far
    finally:
        is_done.set()
        thread.join()
        if time.monotonic() - start >= 1:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
