"""`python -m daemon_db PATH`: create, open or update a database; or look for damage in it; or make a backup of it."""

import argparse
import contextlib
import json
import signal
import sqlite3
import sys
from collections.abc import Iterator
from typing import Any

from . import DB, OpenError, SchemaError, __version__, _file, _opening, _schema, errors
from ._backup import back_up, count_rows, let_interrupts_in, problems_and_rows
from ._connection import State, close_this_threads
from .errors import DAMAGED, in_words, primary_code

_MOST_PROBLEMS = 3
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
    instead.add_argument("--check", action="store_true", help="write nothing, and look for damage")
    instead.add_argument("--backup", metavar="DEST", help="copy it, also while in use; check the copy; replace DEST")
    parser.add_argument("--json", action="store_true", help="say it as JSON, also what failed")
    parser.add_argument("--version", action="version", version=f"daemon_db {__version__}")
    arguments = parser.parse_args()
    for number in signal.SIGTERM, signal.SIGHUP:  # as Ctrl-C: what a backup has begun is removed
        signal.signal(number, signal.default_int_handler)
    found: dict[str, Any] = {"path": arguments.path}
    status = 0
    try:
        if arguments.check or arguments.backup is not None:
            found |= look_at(arguments.path, arguments.backup)
        else:
            found |= open_or_create(arguments.path)
        if found.get("problems"):
            found["error"], status = what_failed(found), 1
    except (KeyboardInterrupt, sqlite3.Error, UnicodeDecodeError) as error:
        if isinstance(error, (OpenError, SchemaError)):
            found["error"], status = str(error).replace(":\n", ": ").replace("\n", "; "), 1
        elif isinstance(error, KeyboardInterrupt) or primary_code(error) == sqlite3.SQLITE_INTERRUPT:
            found["error"], status = "interrupted", 130
        else:
            found["error"], status = f"{arguments.path}: {in_words(error, _TIMEOUT)}", 1
    except OSError as error:
        found["error"], status = f"{error.filename or arguments.path}: {error.strerror}", 1
    except ValueError as error:
        found["error"], status = str(error), 2
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a name that is no text
    if arguments.json or "rows" in found:
        print(json.dumps(found) if arguments.json else "\n".join(lines(found)))
    if "error" in found and sys.stderr:
        print("daemon_db:", found["error"], file=sys.stderr)
    return status


def open_or_create(path: str) -> dict[str, Any]:
    """Create, open or update the database: what was added, and what is there."""
    with DB.open(path, timeout=_TIMEOUT, on_connect=let_interrupts_in) as db:
        return {"added": list(db._state.added)} | describe(db.conn, db._state.file) | {"rows": count_rows(db.conn)}


def look_at(path: str, destination: str | None) -> dict[str, Any]:
    """Look for damage in the database, and at what is there; or copy it to `destination`, and look at the copy."""
    with opened_as_it_is(path) as (conn, state):
        found = describe(conn, state.file) | {"to_add": list(state.added)}
        return found | (problems_and_rows(conn) if destination is None else back_up(conn, state, destination))


@contextlib.contextmanager
def opened_as_it_is(path: str) -> Iterator[tuple[sqlite3.Connection, State]]:
    """A connection that only reads, also to a file whose schema lacks something."""
    state = State(_file.locate(path, read_only=True), _TIMEOUT)
    if sys.stderr and sys.stderr.isatty():
        print(f"reading all of {path} ...", file=sys.stderr)
    try:
        conn = _opening.open_file(state)
        if _schema.is_everything(state.added):
            raise OpenError(state.file.path, errors.EMPTY)
        conn.text_factory = lambda text: text.decode("utf-8", "replace")  # a damaged file may have any bytes
        let_interrupts_in(conn)
        yield conn, state
    finally:
        close_this_threads(state)


def describe(conn: sqlite3.Connection, file: _file.File) -> dict[str, Any]:
    """What is known of the database but its rows, as `--json` prints it."""
    return {
        "path": file.path,
        "sqlite": sqlite3.sqlite_version,
        "wal_reset_bug": has_wal_reset_bug(sqlite3.sqlite_version_info),
        "network_file_system": file.network,
        "journal_mode": conn.execute("PRAGMA journal_mode").fetchone()[0],
        "foreign_keys": conn.execute("PRAGMA foreign_keys").fetchone() == (1,),
    }


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Whether that version of SQLite has it (https://sqlite.org/wal.html#walresetbug)."""
    if version[:2] in ((3, 44), (3, 50)):
        return version < ((3, 44, 6) if version[1] == 44 else (3, 50, 7))
    return (3, 7, 0) <= version < (3, 51, 3)


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
        yield f"{table:14} {'no such table' if count is None else '1 row' if count == 1 else f'{count} rows'}"
    if found.get("added"):
        yield f"opened         {_schema.what_was_added(found['added'])}"
    if found.get("to_add"):
        yield f"next open      adds {_schema.names(found['to_add'])}"
    if found.get("backup"):
        yield f"backup         {found['backup']}"
    if "problems" in found:
        yield f"check          {'failed' if found['problems'] else 'ok'}"


def what_failed(found: dict[str, Any]) -> str:
    """The first problems on one line, and what to do about them."""
    first, more = found["problems"][:_MOST_PROBLEMS], len(found["problems"]) - _MOST_PROBLEMS
    problems = "; ".join(first) + (f" and {more} more" if more > 0 else "")
    said = DAMAGED.format(problems) if found["damaged"] else f"{problems}: {errors.ORPHANS}"
    backup = ""
    if "backup" in found:
        backup = ". The backup was written all the same" if found["backup"] else ". No backup was written"
    return f"{found['path']} failed the check: {said}{backup}"


if __name__ == "__main__":
    sys.exit(main())
