"""`python -m daemon_db`, as it is run: from a shell, on files that other programs made."""

import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from daemon_db import DB, __main__
from support import fill_with_sqlite3, insert_run


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "daemon_db", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def report(output: str) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in output.splitlines())


def test_it_creates_a_database_and_says_what_it_found(tmp_path: Path) -> None:
    for _ in range(2):
        done = command(tmp_path / "daemon.db", "--check")
        assert (done.returncode, done.stderr) == (0, "")
        lines = report(done.stdout)
        assert lines.pop("SQLite").split()[0] == sqlite3.sqlite_version
        assert lines == {
            "path": str(tmp_path / "daemon.db"),
            "journal mode": "wal",
            "foreign keys": "on",
            "runs": "0 rows",
            "units": "0 rows",
            "events": "0 rows",
            "check": "ok",
        }


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="needs the sqlite3 command-line program")
def test_a_database_that_another_program_made(tmp_path: Path) -> None:
    path = tmp_path / "daemon.db"
    fill_with_sqlite3(path)
    assert path.read_bytes()[18:20] == b"\1\1"  # https://sqlite.org/fileformat2.html: a rollback journal
    done = command(path, "--check")
    assert (done.returncode, done.stderr) == (0, "")
    lines = report(done.stdout)
    assert (lines["journal mode"], lines["check"]) == ("wal", "ok")
    assert (lines["runs"], lines["units"], lines["events"]) == ("300 rows", "3000 rows", "6000 rows")
    assert path.read_bytes()[18:20] == b"\2\2"
    with DB.open(path) as db:
        assert db.conn.execute("SELECT count(*), max(id) FROM events").fetchone() == (6000, 6000)


def check_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in ("daemon_db: ", *words):
        assert word in done.stderr


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("some notes")
    check_refused(command(text), f"cannot open {text}: not a SQLite database")
    assert text.read_text() == "some notes"
    check_refused(command(tmp_path), f"cannot open {tmp_path}: it is a directory")
    check_refused(command(tmp_path / "no" / "daemon.db"), f"parent directory {tmp_path / 'no'} does not exist")


def test_a_schema_that_does_not_fit(tmp_path: Path) -> None:
    conn = sqlite3.connect(tmp_path / "other.db")
    conn.executescript("CREATE TABLE runs (id TEXT PRIMARY KEY); CREATE TABLE units (id TEXT PRIMARY KEY)")
    conn.close()
    check_refused(command(tmp_path / "other.db"), "runs.status: missing column", "units.run_id: missing column", "; ")


def test_standard_output_that_is_full_or_closed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "daemon_db", str(tmp_path / "daemon.db")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    words = "daemon_db: cannot write to standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, words)
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    done = command(b"".join((bytes(tmp_path), b"/\xff.db")).decode(errors="surrogateescape"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\udcff.db" in done.stdout


@pytest.mark.parametrize("arguments", [[], [""], ["daemon.db", "other.db"], ["--no-such-option", "daemon.db"]])
def test_wrong_usage(arguments: list[str]) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: python -m daemon_db [-h] [--check] PATH\n")


def test_check_finds_rows_without_their_run(tmp_path: Path) -> None:
    with DB.open(tmp_path / "daemon.db") as db:
        db.conn.execute("PRAGMA foreign_keys=OFF")
        db.conn.execute("INSERT INTO events (run_id, sequence, event_type) VALUES ('gone', 1, 'step')")
    assert command(tmp_path / "daemon.db").returncode == 0
    done = command(tmp_path / "daemon.db", "--check")
    assert done.returncode == 1
    assert done.stderr.endswith("daemon.db failed the check: events row 1 refers to a row of runs that isn't there\n")


def test_check_finds_a_damaged_page(tmp_path: Path) -> None:
    path = tmp_path / "daemon.db"
    with DB.open(path) as db:
        insert_run(db.conn)
        (root,) = db.conn.execute("SELECT rootpage FROM sqlite_master WHERE name = 'runs'").fetchone()
    content = path.read_bytes()
    start, end = (root - 1) * 4096, root * 4096
    path.write_bytes(content[:start] + content[start:end].replace(b"running", b"rUnning") + content[end:])
    assert command(path).returncode == 0
    done = command(path, "--check")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{path} failed the check: row 1 missing from index idx_runs_status" in done.stderr


def test_an_error_after_opening_names_the_path_too(tmp_path: Path) -> None:
    path = tmp_path / "daemon.db"
    with DB.open(path) as db:
        (root,) = db.conn.execute("SELECT rootpage FROM sqlite_master WHERE name = 'idx_units_status'").fetchone()
    content = bytearray(path.read_bytes())
    content[(root - 1) * 4096] = 0xFF  # no kind of page
    path.write_bytes(content)
    done = command(path)
    assert (done.returncode, done.stderr) == (1, f"daemon_db: {path}: database disk image is malformed\n")


@pytest.mark.parametrize(
    ("version", "has_it"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 52, 0), False),
    ],
)
def test_which_versions_have_the_wal_reset_bug(version: tuple[int, int, int], has_it: bool) -> None:
    assert __main__.has_wal_reset_bug(version) is has_it


def test_it_says_so_where_this_sqlite_has_the_wal_reset_bug(tmp_path: Path) -> None:
    has_it = __main__.has_wal_reset_bug(sqlite3.sqlite_version_info)
    assert ("upgrade SQLite to 3.51.3" in command(tmp_path / "daemon.db").stdout) == has_it
