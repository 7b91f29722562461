"""What the README shows is run, as written. The two commands that install it first are run by `.ci/run`."""

import re
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from daemon_db import DB, SchemaError
from support import ENVIRONMENT, LIMIT, insert_run, insertion

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def run(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=LIMIT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_daemon_and_its_restart(tmp_path: Path) -> None:
    code = blocks("python")[0]
    first = [line.split() for line in run("-c", code, cwd=tmp_path).splitlines()]
    assert [int(sequence) for sequence, *_ in first] == [1, 2, 3, 4, 5]
    assert first[0][1:] == ["run.started", "None"]
    for unit in ("api", "ui"):
        assert [event for _, event, unit_id in first if unit_id == unit] == ["unit.running", "unit.done"]
    again = [line.split() for line in run("-c", code, cwd=tmp_path).splitlines()]
    assert again == [*first, ["6", "run.resumed", "None"]]


def test_the_snapshot_and_the_command_line_after_it(tmp_path: Path) -> None:
    daemon, snapshot = blocks("python")
    run("-c", daemon, cwd=tmp_path)
    assert run("-c", f"{snapshot}print(runs, units)", cwd=tmp_path) == "1 2\n"
    (block,) = blocks("console")
    command, shown = block.split("\n", 1)
    assert command.startswith("$ .venv/bin/python -m daemon_db ")
    printed = run(*command.split()[2:], cwd=tmp_path)
    # A table that the README's program has no rows for, the README needn't show.
    printed = re.sub(r"^\w+ +0 rows\n", "", printed, flags=re.MULTILINE)
    printed = printed.replace(str(tmp_path), "/home/you")
    printed = re.sub(rf"{re.escape(sqlite3.sqlite_version)}.*", "3.51.3", printed)
    assert printed == shown


def test_with_conn_and_executemany_are_no_transactions(tmp_path: Path) -> None:
    with DB.open(tmp_path / "daemon.db") as db:
        with pytest.raises(sqlite3.IntegrityError), db.conn:
            insert_run(db.conn)
            insert_run(db.conn)
        with pytest.raises(sqlite3.IntegrityError):
            insert = insertion(db.conn, "units", id=":id", run_id=":run", unit_id="'unit'")
            db.conn.executemany(insert, [{"id": 1, "run": "run-1"}, {"id": 2, "run": "no"}])
        assert db.conn.execute("SELECT (SELECT count(*) FROM runs), (SELECT count(*) FROM units)").fetchone() == (1, 1)


def test_backup_inside_of_a_transaction_waits(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    statuses = []

    def progress(status: int, remaining: int, total: int) -> None:
        statuses.append(status)
        if len(statuses) == 20:
            raise Enough

    with DB.open(tmp_path / "daemon.db") as db, closing(sqlite3.connect(tmp_path / "backup.db")) as target:
        with pytest.raises(Enough), db.transaction() as conn:
            insert_run(conn)
            conn.backup(target, pages=1, progress=progress, sleep=0.001)
        assert statuses == [sqlite3.SQLITE_BUSY] * 20
        db.conn.backup(target)


def test_a_write_while_a_select_is_half_read(tmp_path: Path) -> None:
    def work() -> None:
        with db.transaction() as conn:
            insert_run(conn, "run-3")

    with DB.open(tmp_path / "daemon.db", timeout=60) as db:  # which isn't waited for
        insert_run(db.conn)
        insert_run(db.conn, "run-2")
        cursor = db.conn.execute("SELECT id FROM runs")
        cursor.fetchone()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(LIMIT)
        with pytest.raises(sqlite3.OperationalError, match="database is locked") as caught:
            insert_run(db.conn, "run-4")
        assert caught.value.sqlite_errorname == "SQLITE_BUSY_SNAPSHOT"
        cursor.fetchall()
        insert_run(db.conn, "run-4")


def test_vacuum_into_is_a_backup_of_a_live_daemon(tmp_path: Path) -> None:
    with DB.open(tmp_path / "daemon.db") as db:
        insert_run(db.conn)
        db.conn.execute(f"VACUUM INTO '{tmp_path / 'backup.db'}'")
    with DB.open(tmp_path / "backup.db") as db:
        assert db.conn.execute("SELECT id FROM runs").fetchall() == [("run-1",)]


@pytest.mark.usefixtures("first_schema")
def test_rows_are_copied_from_a_file_that_does_not_fit(tmp_path: Path) -> None:
    """By the recipe for a file that a tool has changed."""
    with DB.open(tmp_path / "daemon.db") as db:
        insert_run(db.conn)
        db.conn.execute("CREATE UNIQUE INDEX one_each ON runs(status)")
    with pytest.raises(SchemaError):
        DB.open(tmp_path / "daemon.db")
    (tmp_path / "daemon.db").rename(tmp_path / "old.db")
    with DB.open(tmp_path / "daemon.db") as db:
        db.conn.execute("ATTACH ? AS old", (str(tmp_path / "old.db"),))
        columns = ", ".join(name for _, name, *_ in db.conn.execute("PRAGMA table_info(runs)"))
        db.conn.execute(f"INSERT INTO runs ({columns}) SELECT {columns} FROM old.runs")
        assert db.conn.execute("SELECT id, status FROM runs").fetchall() == [("run-1", "running")]


def test_the_benchmark_starts() -> None:
    assert "`.venv/bin/python tests/benchmark.py`" in README
    assert "--quick" in run("tests/benchmark.py", "--help", cwd=ROOT)


def test_nothing_is_left_to_be_filled_in() -> None:
    assert re.findall("@[A-Z]+@", README) == []


def test_every_command_is_known_to_be_run() -> None:
    setup = "python3 -m venv .venv && .venv/bin/python -m pip install --quiet"
    assert blocks("sh") == [
        f"{setup} . && .venv/bin/python -m daemon_db daemon.db\n",
        f'{setup} -e ".[test]" && .venv/bin/python -m pytest\n',
    ]
