"""What both READMEs show is run, as written. The two commands that install it first are run by `.ci/run`."""

import inspect
import re
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import threading
from contextlib import closing
from pathlib import Path

import pytest

from daemon_db import DB, SchemaError
from support import ENVIRONMENT, LIMIT, copy, insert, insert_run, insertion

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TESTS_README = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")


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
    assert again == [*first, ["6", "run.started", "None"]]
    # Killed in its work, it does each unit once in the end.
    (tmp_path / "daemon.db").unlink()
    killed = code.replace("    ...  #", "    os._exit(1)  #", 1)
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", f"import os\n{killed}"], cwd=tmp_path, env=ENVIRONMENT, timeout=LIMIT
        )
        assert done.returncode == 1
    events = [line.split()[1:] for line in run("-c", blocks("python")[0], cwd=tmp_path).splitlines()]
    assert events.count(["run.started", "None"]) == 4
    for unit in ("api", "ui"):
        assert events.count(["unit.done", unit]) == 1


def test_a_date_compares_as_time_does(tmp_path: Path) -> None:
    names: dict[str, str] = {}
    exec(blocks("python")[2], names)
    with DB.open(tmp_path / "daemon.db") as db:
        before, later = db.conn.execute("SELECT datetime('now', '-1 minute'), datetime('now', '+1 hour')").fetchone()
    assert before < names["now"] < later
    assert len(names["now"]) == len(before)


def test_the_snapshot_and_the_command_line_after_it(tmp_path: Path) -> None:
    daemon, snapshot, _ = blocks("python")
    run("-c", daemon, cwd=tmp_path)
    opened = 'from daemon_db import DB\nstore = DB.open("daemon.db")\n'
    assert run("-c", f"{opened}{snapshot}store.close()\nprint(runs, units)", cwd=tmp_path) == "1 2\n"
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
        name = db.conn.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql NOT NULL").fetchone()[0]
        db.conn.executescript(f"DROP INDEX {name}; CREATE UNIQUE INDEX {name} ON runs(status)")
    with pytest.raises(SchemaError):
        DB.open(tmp_path / "daemon.db")
    (tmp_path / "daemon.db").rename(tmp_path / "old.db")
    with DB.open(tmp_path / "daemon.db") as db:
        db.conn.execute("ATTACH ? AS old", (str(tmp_path / "old.db"),))
        columns = ", ".join(name for _, name, *_ in db.conn.execute("PRAGMA table_info(runs)"))
        db.conn.execute(f"INSERT INTO runs ({columns}) SELECT {columns} FROM old.runs")
        assert db.conn.execute("SELECT id, status FROM runs").fetchall() == [("run-1", "running")]


def test_the_benchmark_starts() -> None:
    assert "`.venv/bin/python tests/benchmark.py`" in TESTS_README
    assert "--quick" in run("tests/benchmark.py", "--help", cwd=ROOT)


@pytest.mark.usefixtures("sqlite3_program")
@pytest.mark.parametrize("kept", ["with the -wal", "without it"])
def test_what_can_be_read_of_a_damaged_file(kept: str, tmp_path: Path) -> None:
    """To the letter: three pages are gone, and 500 commits are in the -wal alone."""
    live = tmp_path / "live"
    (live / ".venv" / "bin").mkdir(parents=True)
    (live / ".venv" / "bin" / "python").symlink_to(sys.executable)
    with DB.open(tmp_path / "daemon.db", on_connect=lambda conn: conn.execute("PRAGMA wal_autocheckpoint=0")) as db:
        with db.transaction() as conn:
            insert_run(conn)
            row = {"run_id": "'run-1'", "sequence": "?", "event_type": "'step' || hex(zeroblob(100))"}
            conn.executemany(insertion(conn, "events", **row), [(number,) for number in range(6000)])
        db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        for number in range(500):
            with db.transaction() as conn:
                insert(conn, "events", run_id="run-1", sequence=-1 - number, event_type="late")
        copy(tmp_path / "daemon.db", live / "daemon.db")
    with open(live / "daemon.db", "r+b") as file:
        for page in (100, 150, 200):
            file.seek(page * 4096)
            file.write(b"\xff" * 4096)
    before = (live / "daemon.db").read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "daemon_db", "--check", live / "daemon.db"],
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT,
    )
    assert done.returncode == 1
    assert all(re.search(rf"[Pp]age {page + 1}\b", done.stderr) for page in (100, 150, 200))
    assert (live / "daemon.db").read_bytes() == before
    if kept == "without it":
        (live / "daemon.db-wal").unlink()
        (live / "daemon.db-shm").unlink(missing_ok=True)
    salvaged = subprocess.run(
        ["bash", "-c", blocks("sh")[1]],
        cwd=live,
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT,
    )
    assert "check          ok" in salvaged.stdout
    assert (live / "kept" / "daemon.db").read_bytes() == before
    shutil.copyfile(live / "work" / "new.db", tmp_path / "restored.db")
    with DB.open(tmp_path / "restored.db") as db:
        (late,) = db.conn.execute("SELECT count(*) FROM events WHERE event_type = 'late'").fetchone()
        (steps,) = db.conn.execute("SELECT count(*) FROM events WHERE event_type <> 'late'").fetchone()
    assert late == (500 if kept == "with the -wal" else 0)
    assert steps > 3000


@pytest.mark.usefixtures("sqlite3_program")
def test_restore_into_a_live_file(tmp_path: Path) -> None:
    """The daemon goes on with what was restored. `cp` would destroy the file."""
    (command,) = re.findall(r"`([^`]* --check && sqlite3 [^`]*\.restore [^`]*)`", README)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    with DB.open(tmp_path / "daemon.db") as db:
        insert_run(db.conn)
        run("-m", "daemon_db", "--backup", "backup.db", "daemon.db", cwd=tmp_path)
        insert_run(db.conn, "run-2")
        for backup in "no.db", "backup.db":
            restored = subprocess.run(
                ["bash", "-c", command.replace("backup.db", backup)], cwd=tmp_path, env=ENVIRONMENT, timeout=LIMIT
            )
            assert restored.returncode == (backup == "no.db")
            rows = [("run-1",), ("run-2",)] if backup == "no.db" else [("run-1",)]
            assert db.conn.execute("SELECT id FROM runs").fetchall() == rows
        insert_run(db.conn, "run-3")
        assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_backup_is_restored(tmp_path: Path) -> None:
    """As "To restore" says: what was in the -wal must not be played over the backup."""
    path = tmp_path / "daemon.db"
    with DB.open(path) as db:
        insert_run(db.conn)
        run("-m", "daemon_db", "--backup", "backup.db", "daemon.db", cwd=tmp_path)
        insert_run(db.conn, "run-2")
        copy(path, tmp_path / "killed.db")
    copy(tmp_path / "killed.db", path)
    away = tmp_path / "away"
    away.mkdir()
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").rename(away / f"daemon.db{suffix}")
    shutil.copyfile(tmp_path / "backup.db", path)
    with DB.open(path) as db:
        assert db.conn.execute("SELECT id FROM runs").fetchall() == [("run-1",)]


def test_help_has_an_example() -> None:
    """And the example runs."""
    assert DB.__doc__ is not None
    example = textwrap.dedent(inspect.cleandoc(DB.__doc__).split("::\n", 1)[1].split("\n\n`path`")[0])
    assert "with db.transaction() as conn:" in example
    exec(example.replace('"daemon.db"', '":memory:"'), {})


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 180


def test_each_heading_and_file_that_is_named_is_there() -> None:
    headings = re.findall(r"^#+ (.+)$", README + TESTS_README, flags=re.MULTILINE)
    for name in re.findall(
        r'see "([^"]+)" in the README', (ROOT / "src" / "daemon_db" / "errors.py").read_text("utf-8")
    ):
        assert name in headings
    assert "The WAL-reset bug" in headings
    for folder, text in ((ROOT, README), (ROOT / "tests", TESTS_README)):
        for link in re.findall(r"\]\(([^):]+)\)", text):
            assert (folder / link).exists(), link


def test_nothing_is_left_to_be_filled_in() -> None:
    assert re.findall("@[A-Z]+@", README + TESTS_README) == []


def test_every_command_is_known_to_be_run() -> None:
    setup = "python3 -m venv .venv && .venv/bin/python -m pip install --quiet"
    assert blocks("sh")[0] == (
        f'{setup} . && .venv/bin/python -m daemon_db daemon.db\n{setup} -e ".[test]" && .venv/bin/python -m pytest\n'
    )
    assert len(blocks("sh")) == 2  # the other one is run on a damaged file
    commands = re.findall(r"^```sh\n(.*?)^```$", TESTS_README, flags=re.MULTILINE | re.DOTALL)
    assert all("takes long" in command for command in commands)
    assert "```python" not in TESTS_README
