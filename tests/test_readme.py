"""What both READMEs show is run, as written. The two commands that install it first are run by `.ci/run`."""

import inspect
import re
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import pytest

from daemon_db import DB, SchemaError
from support import ENVIRONMENT, LIMIT, copy, in_thread, insert, insert_run, insert_unit, insertion

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TESTS_README = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def execute(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=LIMIT)


def run(*arguments: str, cwd: Path) -> str:
    """What Python prints; it must end well."""
    done = execute(sys.executable, "-W", "error", *arguments, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def commands(pattern: str) -> list[str]:
    """What is in backquotes, within a line, and has the pattern."""
    return [code for code in re.findall(r"`([^`\n]+)`", README) if re.search(pattern, code)]


def in_its_directory(tmp_path: Path) -> None:
    """So that `.venv/bin/python` is this Python there."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)


def test_the_daemon_and_its_restart(tmp_path: Path) -> None:
    (code,) = blocks("python")
    first = [eval(line) for line in run("-c", code, cwd=tmp_path).splitlines()]
    assert [sequence for sequence, *_ in first] == [1, 2, 3, 4]
    for unit in ("api", "ui"):
        assert [event for _, event, unit_id in first if unit_id == unit] == ["unit.running", "unit.done"]
    again = [eval(line) for line in run("-c", code, cwd=tmp_path).splitlines()]
    assert again == first
    # Killed in its work, it does each unit once in the end.
    (tmp_path / "daemon.db").unlink()
    killed = code.replace("    ...  #", "    os._exit(1)  #", 1)
    for _ in range(3):
        assert execute(sys.executable, "-c", f"import os\n{killed}", cwd=tmp_path).returncode == 1
    events = [eval(line)[1:] for line in run("-c", code, cwd=tmp_path).splitlines()]
    for unit in ("api", "ui"):
        assert events.count(("unit.done", unit)) == 1
    with DB.open(tmp_path / "daemon.db") as db:
        assert db.conn.execute("SELECT status FROM runs").fetchall() == [("done",)]


def test_a_date_compares_as_time_does(tmp_path: Path) -> None:
    (expression,) = commands(r"strftime")
    now = eval(expression, {"UTC": UTC, "datetime": datetime})
    with DB.open(tmp_path / "daemon.db") as db:
        before, later = db.conn.execute("SELECT datetime('now', '-1 minute'), datetime('now', '+1 hour')").fetchone()
    assert before < now < later
    assert len(now) == len(before)


def test_the_operators_commands(tmp_path: Path) -> None:
    in_its_directory(tmp_path)
    check, backup = commands(r"-m daemon_db")
    run("-c", blocks("python")[0], cwd=tmp_path)
    for command in check, backup:
        done = execute("bash", "-c", command, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("check          ok\n")
    with DB.open(tmp_path / "DEST") as db:
        assert db.conn.execute("SELECT count(*) FROM units").fetchone() == (2,)


def test_old_runs_are_deleted_and_the_file_gets_smaller(tmp_path: Path) -> None:
    (delete,), (vacuum,), (truncate,) = commands("^DELETE"), commands("^VACUUM"), commands("^PRAGMA")
    path = tmp_path / "daemon.db"
    with DB.open(path) as db:
        insert(
            db.conn, "runs", id="old", feature_branch="a", repo_path="b", completed_at="2020-01-01 00:00:00", status="x"
        )
        insert_run(db.conn)
        row = {"run_id": "'old'", "sequence": "?", "event_type": "hex(zeroblob(1000))"}
        db.conn.execute("BEGIN")
        db.conn.executemany(insertion(db.conn, "events", **row), [(number,) for number in range(1000)])
        db.conn.execute("COMMIT")
        db.conn.execute(truncate).fetchall()
        before = path.stat().st_size
        db.conn.execute(delete)
        db.conn.execute(vacuum)
        db.conn.execute(truncate).fetchall()
        assert path.stat().st_size < before / 10
        assert db.conn.execute("SELECT id FROM runs").fetchall() == [("run-1",)]
        assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (0,)


def test_insert_or_replace_deletes_what_refers_to_the_run(tmp_path: Path) -> None:
    with DB.open(tmp_path / "daemon.db") as db:
        insert_run(db.conn)
        insert_unit(db.conn)
        statement = insertion(db.conn, "runs", id="'run-1'", feature_branch="'a'", repo_path="'b'", status="'again'")
        db.conn.execute(f"{statement} ON CONFLICT (id) DO UPDATE SET status = excluded.status")
        assert db.conn.execute("SELECT count(*) FROM units").fetchone() == (1,)
        db.conn.execute(statement.replace("INSERT INTO", "INSERT OR REPLACE INTO"))
        assert db.conn.execute("SELECT count(*) FROM units").fetchone() == (0,)


def test_rows_of_lost_and_found_come_back(tmp_path: Path) -> None:
    """`.recover` puts there what belongs to no table, with the rowid as `id`."""
    (statement,) = blocks("sql")
    with DB.open(tmp_path / "daemon.db") as db:
        insert_run(db.conn)
        db.conn.execute("CREATE TABLE lost_and_found (rootpgno, pgno, nfield, id, c0, c1, c2, c3, c4, c5, c6)")
        db.conn.execute(
            "INSERT INTO lost_and_found VALUES (5, 7, 7, 3, NULL, 'run-1', 1, 'step', NULL, NULL, '2026-01-31 10:00')"
        )
        db.conn.execute(statement)
        assert db.conn.execute("SELECT id, run_id, sequence FROM events").fetchall() == [(3, "run-1", 1)]


def test_with_conn_and_executemany_are_no_transactions(tmp_path: Path) -> None:
    with DB.open(tmp_path / "daemon.db") as db:
        with pytest.raises(sqlite3.IntegrityError), db.conn:
            insert_run(db.conn)
            insert_run(db.conn)
        with pytest.raises(sqlite3.IntegrityError):
            insert = insertion(db.conn, "units", id=":id", run_id=":run", unit_id="'unit'")
            db.conn.executemany(insert, [{"id": 1, "run": "run-1"}, {"id": 2, "run": "no"}])
        assert db.conn.execute("SELECT (SELECT count(*) FROM runs), (SELECT count(*) FROM units)").fetchone() == (1, 1)


def test_a_write_while_a_select_is_half_read(tmp_path: Path) -> None:
    with DB.open(tmp_path / "daemon.db", timeout=LIMIT) as db:  # which isn't waited for
        insert_run(db.conn)
        insert_run(db.conn, "run-2")
        cursor = db.conn.execute("SELECT id FROM runs")
        cursor.fetchone()
        in_thread(lambda: insert_run(db.conn, "run-3"))
        with pytest.raises(sqlite3.OperationalError, match="database is locked") as caught:
            insert_run(db.conn, "run-4")
        assert caught.value.sqlite_errorname == "SQLITE_BUSY_SNAPSHOT"
        cursor.fetchall()
        insert_run(db.conn, "run-4")


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
    in_its_directory(live)
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
    done = execute(sys.executable, "-m", "daemon_db", "--check", "--json", "daemon.db", cwd=live)
    assert done.returncode == 1
    assert all(re.search(rf"[Pp]age {page + 1}\b", done.stdout) for page in (100, 150, 200))
    assert (live / "daemon.db").read_bytes() == before
    if kept == "without it":
        (live / "daemon.db-wal").unlink()
        (live / "daemon.db-shm").unlink(missing_ok=True)
    salvaged = execute("bash", "-c", blocks("sh")[1], cwd=live)
    assert "check          ok" in salvaged.stdout
    counts = {name: int(count) for name, count in re.findall(r"^(\w+): events: (\d+)$", salvaged.stdout, re.MULTILINE)}
    assert counts["daemon"] == (6500 if kept == "with the -wal" else 6000)
    assert (live / "kept" / "daemon.db").read_bytes() == before
    shutil.copyfile(live / "work" / "new.db", tmp_path / "restored.db")
    with DB.open(tmp_path / "restored.db") as db:
        (late,) = db.conn.execute("SELECT count(*) FROM events WHERE event_type = 'late'").fetchone()
        (steps,) = db.conn.execute("SELECT count(*) FROM events WHERE event_type <> 'late'").fetchone()
    assert late == (500 if kept == "with the -wal" else 0)
    assert steps > 3000
    assert counts["new"] == late + steps < counts["daemon"]


@pytest.mark.usefixtures("sqlite3_program")
def test_a_lost_root_page_is_seen_in_the_counts(tmp_path: Path) -> None:
    """All events are lost, and "check ok" doesn't say so. By SQLite's own index the damaged file can still count."""
    in_its_directory(tmp_path)
    with DB.open(tmp_path / "daemon.db") as db:
        with db.transaction() as conn:
            insert_run(conn)
            row = {"run_id": "'run-1'", "sequence": "?", "event_type": "'step'"}
            conn.executemany(insertion(conn, "events", **row), [(number,) for number in range(5000)])
        (root,) = db.conn.execute("SELECT rootpage FROM sqlite_master WHERE name = 'events'").fetchone()
    with open(tmp_path / "daemon.db", "r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(b"\xff" * 4096)
    salvaged = execute("bash", "-c", blocks("sh")[1], cwd=tmp_path)
    assert "check          ok" in salvaged.stdout
    assert "daemon: events: 5000\n" in salvaged.stdout
    assert "new: events: 0\n" in salvaged.stdout


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
    assert len(README.split()) <= 1500
    assert max(map(len, README.splitlines())) <= 120


def test_each_heading_and_file_that_is_named_is_there() -> None:
    headings = re.findall(r"^#+ (.+)$", README + TESTS_README, flags=re.MULTILINE)
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
