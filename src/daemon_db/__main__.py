"""`python -m daemon_db PATH`: create or open a database and say what was found; with `--check`, look for damage."""

import argparse
import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from typing import Any, Self

from . import DB, OpenError, SchemaError, __version__, _mount, _schema
from .errors import in_words, primary_code

_MOST_PROBLEMS = 10


def main() -> int:
    """Exit status 0; 1, with one line on standard error, if the database can't be opened or fails the check; 130 if
    interrupted; 2: wrong usage.
    """
    parser = argparse.ArgumentParser(
        "python -m daemon_db", description="Create or open a database, or bring it up to date, and say what is there."
    )
    parser.add_argument("path", metavar="PATH", help="the database file")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing, and look for damage by PRAGMA integrity_check and foreign_key_check",
    )
    parser.add_argument("--json", action="store_true", help="say it as JSON")
    parser.add_argument("--version", action="version", version=f"daemon_db {__version__}")
    arguments = parser.parse_args()
    try:
        with (
            Progress(arguments.path) as progress,
            DB.open(arguments.path, read_only=arguments.check, on_connect=progress.follow) as db,
        ):
            found = look(db)
            if arguments.check:
                found["problems"] = list(check(db.conn))
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except (OpenError, SchemaError) as error:
        return fail(str(error))
    except sqlite3.Error as error:
        if primary_code(error) == sqlite3.SQLITE_INTERRUPT:  # Ctrl-C came in the middle of a statement
            return fail("interrupted", 130)
        return fail(f"{os.path.abspath(arguments.path)}: {in_words(error)}")
    try:
        if sys.stdout is not None:
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # of a name in another encoding
            print(json.dumps(found) if arguments.json else "\n".join(lines(found)), flush=True)
    except OSError as error:
        # When Python exits, it writes what is left in the buffer: to a place where this doesn't fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return fail(f"cannot write to standard output: {error.strerror}")
    if problems := found.get("problems"):
        more = f" and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        return fail(f"{db.path} failed the check: {'; '.join(problems[:_MOST_PROBLEMS])}{more}")
    return 0


def fail(message: str, status: int = 1) -> int:
    """Print one line on standard error; the exit status that goes with it."""
    print("daemon_db:", message.replace(":\n", ": ").replace("\n", "; "), file=sys.stderr)
    return status


def look(db: DB) -> dict[str, Any]:
    """What is in the database, as `--json` prints it."""
    return {
        "path": db.path,
        "sqlite": sqlite3.sqlite_version,
        "wal_reset_bug": has_wal_reset_bug(sqlite3.sqlite_version_info),
        "network_file_system": _mount.network_file_system(db.path),
        "journal_mode": db.conn.execute("PRAGMA journal_mode").fetchone()[0],
        "foreign_keys": db.conn.execute("PRAGMA foreign_keys").fetchone() == (1,),
        "rows": {table: db.conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in _schema.tables()},
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What `look` and `check` found, as lines for a person."""
    yield f"path           {found['path']}"
    bug = "  (has the WAL-reset bug: see the README)" if found["wal_reset_bug"] else ""
    yield f"SQLite         {found['sqlite']}{bug}"
    if found["network_file_system"]:
        yield f"network        {found['network_file_system']}: only one machine's programs may have it open"
    yield f"journal mode   {found['journal_mode']}"
    yield f"foreign keys   {'on' if found['foreign_keys'] else 'off'}"
    for table, count in found["rows"].items():
        yield f"{table:14} {count} rows"
    if "problems" in found:
        yield f"check          {'failed' if found['problems'] else 'ok'}"


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Whether that version of SQLite has it (https://sqlite.org/wal.html#walresetbug)."""
    if version[:2] in ((3, 44), (3, 50)):
        return version < ((3, 44, 6) if version[1] == 44 else (3, 50, 7))
    return (3, 7, 0) <= version < (3, 51, 3)


def check(conn: sqlite3.Connection) -> Iterator[str]:
    """What `PRAGMA integrity_check` and `PRAGMA foreign_key_check` find wrong, nothing if nothing."""
    for (found,) in conn.execute("PRAGMA integrity_check"):
        if found != "ok":
            yield from found.splitlines()  # up to a hundred in one row
    for table, rowid, parent, _ in conn.execute("PRAGMA foreign_key_check"):
        yield f"{table} row {rowid} refers to a row of {parent} that isn't there"


class Progress:
    """A line on standard error, where that is a terminal, for what takes longer than a second."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._start = time.monotonic()
        self._shown = 0
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()

    def follow(self, conn: sqlite3.Connection) -> None:
        """Let SQLite call this while it works. That lets Ctrl-C in, too: Python handles signals in Python code only."""
        conn.set_progress_handler(self._show, 100_000)

    def _show(self) -> int:
        seconds = int(time.monotonic() - self._start)
        if self._is_terminal and seconds > self._shown:
            self._shown = seconds
            print(f"\r\x1b[Kreading {self._path}: {seconds} s", end="", file=sys.stderr, flush=True)
        return 0  # go on

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
