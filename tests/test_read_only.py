"""`DB.open(path, read_only=True)`: creates nothing, writes nothing, and sees all that is committed."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from daemon_db import DB, OpenError, SchemaError
from support import (
    FIRST,
    LIMIT,
    append_event,
    end,
    files_in,
    in_thread,
    insert_run,
    make_hot,
    make_killed,
    make_nothing,
    make_rollback,
    make_wal,
    open_files,
    public_directory,
    something_is_forbidden,
    spare,
    start,
)

DIE = """
import os, signal, sys
from daemon_db import DB
from support import insert_run

db = DB.open(sys.argv[1])
insert_run(db.conn, "run-of-the-dead")
os.kill(os.getpid(), signal.SIGKILL)
"""


def die(path: Path) -> None:
    """A daemon commits a run and is killed: it is in the WAL only."""
    process = start(DIE, path)
    assert end(process) == ("", "")
    assert process.returncode == -signal.SIGKILL
    assert Path(f"{path}-wal").stat().st_size > 0


def make_killed_without_index(path: Path) -> None:
    """As copied: without the -shm."""
    make_killed(path)
    Path(f"{path}-shm").unlink()


def make_wal_and_an_empty_one(path: Path) -> None:
    """As a process leaves it that was killed before it wrote."""
    make_wal(path)
    Path(f"{path}-wal").touch()


def without_index(files: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """But for the WAL's index, in which readers, too, say where they are."""
    return {name: data for name, data in files.items() if not name.endswith("-shm")}


def count(db: DB, table: str = "runs") -> int:
    return int(db.conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


READONLY = "write a readonly database"


class TestNothingIsWritten:
    @pytest.mark.parametrize("make", [make_wal, make_rollback])
    def test_a_file_with_nothing_beside_it(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        make(tmp_path / "db")
        os.utime(tmp_path / "db", (1_000_000_000, 1_000_000_000))
        before, opened = files_in(tmp_path), open_files()
        with DB.open(tmp_path / "db", read_only=True) as db:
            assert count(db) == 1
            assert db.path == str(tmp_path / "db")
            mode = "wal" if make is make_wal else "delete"
            assert db.conn.execute("PRAGMA journal_mode").fetchone() == (mode,)
        assert files_in(tmp_path) == before
        assert open_files() == opened
        assert (tmp_path / "db").stat().st_mtime == 1_000_000_000

    @pytest.mark.parametrize("make", [die, make_killed_without_index])
    def test_what_a_killed_daemon_left(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        """It is evidence: seen whole, and kept as it is, however often."""
        make(tmp_path / "db")
        before = without_index(files_in(tmp_path))
        for _ in range(2):
            with DB.open(tmp_path / "db", read_only=True) as db:
                assert count(db) == 1
            assert without_index(files_in(tmp_path)) == before
        with DB.open(tmp_path / "db") as db:
            assert count(db) == 1

    def test_what_a_daemon_left_that_was_killed_meanwhile(self, tmp_path: Path) -> None:
        make_wal(tmp_path / "db")
        with DB.open(tmp_path / "db", read_only=True) as db, ThreadPoolExecutor(1) as pool:
            assert pool.submit(count, db).result(LIMIT) == 1
            die(tmp_path / "db")
            before = without_index(files_in(tmp_path))
            assert count(db) == pool.submit(count, db).result(LIMIT) == 2
        assert without_index(files_in(tmp_path)) == before

    @pytest.mark.parametrize("make", [make_wal, make_rollback, make_killed])
    def test_no_statement_writes(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        make(tmp_path / "db")
        before = without_index(files_in(tmp_path))
        with DB.open(tmp_path / "db", read_only=True) as db:
            for statement in (
                "DELETE FROM runs",
                "CREATE TABLE t (x)",
                "PRAGMA user_version=7",
                "BEGIN IMMEDIATE; DELETE FROM runs",
            ):
                with pytest.raises(sqlite3.OperationalError, match=READONLY) as caught:
                    db.conn.executescript(statement)
                assert caught.value.sqlite_errorcode == sqlite3.SQLITE_READONLY
                if db.conn.in_transaction:
                    db.conn.execute("ROLLBACK")
            with pytest.raises(sqlite3.OperationalError, match=READONLY), db.transaction() as conn:
                insert_run(conn)
            assert not db.conn.in_transaction
            assert count(db) == 1
            with ThreadPoolExecutor(1) as pool, pytest.raises(sqlite3.OperationalError, match=READONLY):
                pool.submit(lambda: db.conn.execute("DELETE FROM runs")).result(LIMIT)
        assert without_index(files_in(tmp_path)) == before

    def test_on_connect_comes_last(self, tmp_path: Path) -> None:
        make_wal(tmp_path / "db")
        names = ("foreign_keys", "query_only", "busy_timeout")
        seen = []

        def on_connect(conn: sqlite3.Connection) -> None:
            seen.append([conn.execute(f"PRAGMA {name}").fetchone()[0] for name in names])

        with DB.open(tmp_path / "db", read_only=True, on_connect=on_connect, timeout=2) as db:
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(count, db).result(LIMIT) == 1
        assert seen == [[1, 1, 2000]] * 2


LIVE = """
import sys
from daemon_db import DB
from support import append_event, insert_run

with DB.open(sys.argv[1]) as db:
    for number in range(int(sys.argv[2])):
        with db.transaction() as conn:
            insert_run(conn, f"run-{number}")
            append_event(conn, f"run-{number}")
        print(number, flush=True)
        sys.stdin.readline()
"""


class TestBesideADaemon:
    def test_it_sees_what_is_in_the_wal(self, tmp_path: Path) -> None:
        """In each thread, at once, and after each commit; whoever closes first."""
        daemon = start(LIVE, tmp_path / "db", 3)
        try:
            assert daemon.stdout.readline() == "0\n"
            with DB.open(tmp_path / "db", read_only=True, timeout=0) as db, ThreadPoolExecutor(1) as pool:
                for number in range(1, 4):
                    assert count(db) == count(db, "events") == pool.submit(count, db).result(LIMIT) == number
                    if number < 3:
                        daemon.stdin.write("\n")
                        daemon.stdin.flush()
                        assert daemon.stdout.readline() == f"{number}\n"
            assert (tmp_path / "db-wal").stat().st_size > 0
        finally:
            assert end(daemon) == ("", "")
        assert daemon.returncode == 0
        assert list(files_in(tmp_path)) == ["db"]

    def test_in_the_middle_of_its_transaction(self, tmp_path: Path) -> None:
        with DB.open(tmp_path / "db") as daemon:
            insert_run(daemon.conn)
            with daemon.transaction() as conn:
                append_event(conn)
                with DB.open(tmp_path / "db", read_only=True, timeout=0) as db:
                    assert (count(db), count(db, "events")) == (1, 0)
            before = without_index(files_in(tmp_path))
            with DB.open(tmp_path / "db", read_only=True, timeout=0) as db:
                assert (count(db), count(db, "events")) == (1, 1)
            assert without_index(files_in(tmp_path)) == before

    def test_a_file_that_is_replaced_is_not_read_by_another_thread(self, tmp_path: Path) -> None:
        make_wal(tmp_path / "db")
        make_wal(tmp_path / "other")
        with DB.open(tmp_path / "db", read_only=True) as db, ThreadPoolExecutor(1) as pool:
            (tmp_path / "other").replace(tmp_path / "db")
            for _ in range(3):
                with pytest.raises(OpenError, match="was removed, replaced"):
                    pool.submit(count, db).result(LIMIT)

    @pytest.mark.usefixtures("sqlite3_program")
    def test_a_file_that_another_program_takes_out_of_wal_mode(self, tmp_path: Path) -> None:
        """After a killed daemon's WAL was left there, and no thread had it open."""
        path = tmp_path / "db"
        make_killed(path)
        with in_thread(lambda: DB.open(path, read_only=True)) as db:
            subprocess.run(
                ["sqlite3", path, "PRAGMA journal_mode=DELETE"], check=True, capture_output=True, timeout=LIMIT
            )
            with db.snapshot() as conn:
                assert conn.execute("SELECT count(*) FROM runs").fetchone() == (1,)


def make_damaged(path: Path) -> None:
    make_wal(path)
    with open(path, "r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 100)


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "code"),
        [
            (make_nothing, None),
            (Path.touch, None),
            (make_hot, "SQLITE_READONLY_ROLLBACK"),
            (make_damaged, "SQLITE_CORRUPT"),
        ],
    )
    def test_what_can_not_be_read(self, make: Callable[[Path], None], code: str | None, tmp_path: Path) -> None:
        make(tmp_path / "db")
        before, opened = files_in(tmp_path), open_files()
        with pytest.raises(OpenError) as caught:
            DB.open(tmp_path / "db", read_only=True)
        assert str(caught.value).startswith(f"{tmp_path / 'db'}: ")
        assert getattr(caught.value, "sqlite_errorname", None) == code
        assert files_in(tmp_path) == before
        assert open_files() == opened

    def test_what_is_to_be_played_back_is_there_afterwards(self, tmp_path: Path) -> None:
        make_hot(tmp_path / "db")
        with DB.open(tmp_path / "db") as db:
            assert db.conn.execute(f"SELECT count(*), max({spare('runs')}) FROM runs").fetchone() == (1, None)
        with DB.open(tmp_path / "db", read_only=True) as db:
            assert count(db) == 1

    def test_memory(self) -> None:
        with pytest.raises(ValueError, match="nothing to read"):
            DB.open(":memory:", read_only=True)

    def test_locked(self, tmp_path: Path) -> None:
        make_rollback(tmp_path / "db")
        with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as conn:
            conn.execute("BEGIN EXCLUSIVE")
            with pytest.raises(OpenError) as caught:
                DB.open(tmp_path / "db", read_only=True, timeout=0)
        assert caught.value.sqlite_errorname == "SQLITE_BUSY"

    @pytest.mark.parametrize("wal", [True, False])
    @pytest.mark.parametrize(
        ("script", "words"),
        [
            ("", ["runs", "units", "events"]),
            ("CREATE TABLE other (x)", ["other", "another program"]),
            (FIRST + "DROP INDEX idx_units_status; DROP TABLE events", ["idx_units_status", "events"]),
            (FIRST + "ALTER TABLE runs RENAME COLUMN error TO failure", ["runs.error"]),
            (FIRST.replace("status          TEXT", "status TEXT UNIQUE", 1), ["runs: extra UNIQUE for status"]),
        ],
    )
    @pytest.mark.usefixtures("first_schema")
    def test_a_schema_that_is_incomplete_or_does_not_fit(
        self, script: str, words: list[str], wal: bool, tmp_path: Path
    ) -> None:
        path = tmp_path / "db"
        with closing(sqlite3.connect(path, isolation_level=None)) as conn:
            conn.executescript(f"PRAGMA journal_mode={'wal' if wal else 'delete'}; PRAGMA user_version=1; {script}")
        before, opened = files_in(tmp_path), open_files()
        with pytest.raises(SchemaError) as caught:
            DB.open(path, read_only=True)
        for word in words:
            assert any(word in problem for problem in caught.value.problems), caught.value.problems
        assert files_in(tmp_path) == before
        assert open_files() == opened


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user can get to."""
    with public_directory() as path:
        (path / "directory").mkdir()
        yield path / "directory"


LOOK = """
try:
    with daemon_db.DB.open(sys.argv[1], read_only=True) as db:
        rows = db.conn.execute("SELECT count(*) FROM runs").fetchone()
        print(*rows)
        for begin in db.conn.execute, lambda _: db.transaction().__enter__():
            try:
                begin("DELETE FROM runs")
            except sqlite3.OperationalError as error:
                print(error)
except daemon_db.OpenError as error:
    print(error.reason, getattr(error, "sqlite_errorname", ""))
"""

NO_INDEX = ".* must make a -shm .*\n"
REFUSED_TO_WRITE = "attempt to write a readonly database\n" * 2


def look(run_unprivileged: Callable[..., str], directory: Path, file_mode: int, directory_mode: int) -> str:
    """What a user sees of "db", with these permissions on it, on what is beside it, and on the directory."""
    for file in directory.iterdir():
        file.chmod(file_mode)
    directory.chmod(directory_mode)
    output = run_unprivileged(LOOK, directory / "db")
    directory.chmod(0o755)
    for file in directory.iterdir():
        file.chmod(0o644)
    return output


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="SQLite's own descriptor is found in /proc")


@pytest.mark.skipif(not something_is_forbidden(), reason="root can't become another user here")
class TestForAUserWhoMayOnlyRead:
    @pytest.mark.parametrize(
        ("file_mode", "directory_mode"),
        [(0o444, 0o555), (0o666, 0o555), pytest.param(0o444, 0o777, marks=linux_only)],
        ids=oct,
    )
    @pytest.mark.parametrize(
        ("make", "output"),
        [
            (make_rollback, f"1\n{REFUSED_TO_WRITE}"),
            (make_killed, f"1\n{REFUSED_TO_WRITE}"),
            (make_wal, NO_INDEX),
            (make_killed_without_index, NO_INDEX),
            (make_wal_and_an_empty_one, NO_INDEX),
            (make_hot, ".* SQLITE_READONLY_ROLLBACK\n"),
        ],
        ids=["rollback", "killed", "wal", "killed without -shm", "empty wal", "hot"],
    )
    def test_where_it_may_not_write(
        self,
        make: Callable[[Path], None],
        output: str,
        file_mode: int,
        directory_mode: int,
        run_unprivileged: Callable[..., str],
        public: Path,
    ) -> None:
        """The file, or beside it. In a directory for all, a -shm of this user's would be in the daemon's way."""
        make(public / "db")
        before = files_in(public)
        assert re.fullmatch(output, look(run_unprivileged, public, file_mode, directory_mode))
        after = files_in(public)
        assert (after.keys(), without_index(after)) == (before.keys(), without_index(before))

    @pytest.mark.parametrize("directory_mode", [0o555, 0o777], ids=oct)
    def test_beside_a_daemon(self, directory_mode: int, run_unprivileged: Callable[..., str], public: Path) -> None:
        with DB.open(public / "db") as daemon:
            insert_run(daemon.conn)
            before = files_in(public)
            assert look(run_unprivileged, public, 0o444, directory_mode) == f"1\n{REFUSED_TO_WRITE}"
            assert files_in(public) == before
            insert_run(daemon.conn, "run-2")

    def test_where_it_may_write_it_leaves_nothing_behind(
        self, run_unprivileged: Callable[..., str], public: Path
    ) -> None:
        make_wal(public / "db")
        before = files_in(public)
        assert look(run_unprivileged, public, 0o666, 0o777) == f"1\n{REFUSED_TO_WRITE}"
        assert files_in(public) == before

    def test_an_empty_wal_is_none(self, run_unprivileged: Callable[..., str], public: Path) -> None:
        make_rollback(public / "db")
        (public / "db-wal").touch()
        before = files_in(public)
        assert look(run_unprivileged, public, 0o444, 0o555) == f"1\n{REFUSED_TO_WRITE}"
        assert files_in(public) == before

    @pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
    def test_what_may_not_be_read(self, suffix: str, run_unprivileged: Callable[..., str], public: Path) -> None:
        make_killed(public / "db")
        before = files_in(public)
        (public / f"db{suffix}").chmod(0)
        public.chmod(0o777)
        output = run_unprivileged(LOOK, public / "db")
        (public / f"db{suffix}").chmod(0o644)
        assert re.search(rf"{public}/db{suffix}\b(?!-)", output)
        assert files_in(public) == before
