"""`python -m daemon_db PATH`: create or open a database and say what was found."""

import argparse
import os
import sqlite3
import sys
from collections.abc import Iterator

from . import DB, OpenError, SchemaError, _schema


def main() -> int:
    """Exit status 0; 1, with one line on standard error, if the database can't be opened or fails a check; 2: usage."""
    parser = argparse.ArgumentParser("python -m daemon_db", description="Create or open a database; say what is there.")
    parser.add_argument("path", metavar="PATH", help="the database file")
    parser.add_argument("--check", action="store_true", help="also run PRAGMA integrity_check and foreign_key_check")
    arguments = parser.parse_args()
    try:
        with DB.open(arguments.path) as db:
            lines = list(report(db))
            problems = list(check(db.conn)) if arguments.check else []
    except ValueError as error:
        parser.error(str(error))
    except (OpenError, SchemaError) as error:
        return fail(str(error))
    except sqlite3.Error as error:
        return fail(f"{arguments.path}: {error}")
    if arguments.check and not problems:
        lines.append("check          ok")
    try:
        if sys.stdout is not None:
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a name may be in no encoding
            print(*lines, sep="\n", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries again when it exits, and fails with a traceback
        return fail(f"cannot write to standard output: {error.strerror}")
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        return fail(f"{db.path} failed the check: {'; '.join(problems[:10])}{more}")
    return 0


def fail(message: str) -> int:
    """Print one line on standard error; the exit status that goes with it."""
    print("daemon_db:", message.replace(":\n", ": ").replace("\n", "; "), file=sys.stderr)
    return 1


def report(db: DB) -> Iterator[str]:
    """What was found, a line each."""
    yield f"path           {db.path}"
    bug = WAL_RESET_BUG if has_wal_reset_bug(sqlite3.sqlite_version_info) else ""
    yield f"SQLite         {sqlite3.sqlite_version}{bug}"
    yield f"journal mode   {db.conn.execute('PRAGMA journal_mode').fetchone()[0]}"
    yield f"foreign keys   {'on' if db.conn.execute('PRAGMA foreign_keys').fetchone()[0] else 'off'}"
    for table in _schema.expected()[1].tables:
        yield f"{table:14} {db.conn.execute(f'SELECT count(*) FROM {table}').fetchone()[0]} rows"


WAL_RESET_BUG = (
    " (has the WAL-reset bug, rare corruption when one connection writes while another checkpoints:"
    " upgrade SQLite to 3.51.3 or later, or to 3.50.7 or 3.44.6)"
)


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Whether that version of SQLite has it (https://sqlite.org/wal.html#walresetbug)."""
    if version[:2] in ((3, 44), (3, 50)):
        return version < ((3, 44, 6) if version[1] == 44 else (3, 50, 7))
    return (3, 7, 0) <= version < (3, 51, 3)


def check(conn: sqlite3.Connection) -> Iterator[str]:
    """What `PRAGMA integrity_check` and `PRAGMA foreign_key_check` find wrong, nothing if nothing."""
    for (found,) in conn.execute("PRAGMA integrity_check"):
        if found != "ok":
            yield found
    for table, rowid, parent, _ in conn.execute("PRAGMA foreign_key_check"):
        yield f"{table} row {rowid} refers to a row of {parent} that isn't there"


if __name__ == "__main__":
    sys.exit(main())
