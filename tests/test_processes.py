"""One file and many processes: opened at once, written at once, killed at any moment, locked by another.

`DAEMON_DB_LONG=1` in the environment makes it go on for longer (see `support`).
"""

import itertools
import math
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from daemon_db import DB, OpenError, _schema
from support import insert_run, rounds, start, together

PATIENCE = 60.0
"""Seconds, for what must work however slow the machine is: far more than it takes."""


def make_nothing(path: Path) -> None:
    """A fresh path."""


def make_rollback(path: Path) -> None:
    """A database in rollback-journal mode, SQLite's default, with three runs."""
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        fill(conn, _schema.SQL)


def make_partial(path: Path) -> None:
    """As `make_rollback`, but `runs` alone is there."""
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        fill(conn, RUNS)


def make_partial_wal(path: Path) -> None:
    """As `make_partial`, in WAL mode."""
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.execute("PRAGMA journal_mode=WAL")
        fill(conn, RUNS)


RUNS = _schema.SQL.partition(";")[0]


def fill(conn: sqlite3.Connection, script: str) -> None:
    conn.executescript(script)
    for number in range(3):
        insert_run(conn, f"run-{number}")


def make_killed(path: Path, mode: str) -> None:
    """With three runs, and what a process leaves that is killed while it changes them: a hot journal, or a WAL."""
    source = path.with_name(f"{path.name}-source")
    with closing(sqlite3.connect(source, isolation_level=None)) as conn:
        conn.execute(f"PRAGMA journal_mode={mode}")
        fill(conn, _schema.SQL)
        conn.executescript("PRAGMA cache_size=1; BEGIN; UPDATE runs SET config_json = hex(zeroblob(10000))")
        copy(source, path)


def copy(source: Path, path: Path) -> Path:
    """Copy a database, and its journal or WAL if it has one; the path of the copy."""
    for suffix in ("", "-journal", "-wal"):
        with suppress(FileNotFoundError):
            shutil.copyfile(f"{source}{suffix}", f"{path}{suffix}")
    return path


def make_current(path: Path) -> None:
    with DB.open(path) as db:
        for number in range(3):
            insert_run(db.conn, f"run-{number}")


def make_extra(path: Path) -> None:
    """As `make_current`, with a column that a newer version added."""
    make_current(path)
    with DB.open(path) as db:
        db.conn.execute("ALTER TABLE runs ADD COLUMN extra TEXT")


def contents(conn: sqlite3.Connection) -> tuple[str, int, int]:
    """Journal mode, how many objects of the schema there are, and how many runs as they were inserted."""
    (mode,) = conn.execute("PRAGMA journal_mode").fetchone()
    (objects,) = conn.execute("SELECT count(*) FROM sqlite_master WHERE sql NOT NULL").fetchone()
    (runs,) = conn.execute("SELECT count(*) FROM runs WHERE config_json IS NULL").fetchone()
    return mode, objects, runs


FRESH = ("wal", 9, 0)  # 3 tables, sqlite_sequence and 5 indexes
KEPT = ("wal", 9, 3)


def comes(path: Path) -> Generator[None, None, None]:
    yield
    with DB.open(path, timeout=0) as other:
        insert_run(other.conn, "other")
        yield


def comes_and_goes(path: Path) -> Generator[None, None, None]:
    yield
    with DB.open(path, timeout=0) as other:
        insert_run(other.conn, "other")


def goes(path: Path) -> Generator[None, None, None]:
    """The last to close a database removes its WAL."""
    with DB.open(path) as other:
        insert_run(other.conn, "other")
        yield


def open_and_step(path: Path, steps: Iterator[None], moment: int) -> tuple[DB, bool]:
    """Open `path`, with a step before the open's `moment`th call of a function in C: Python's, SQLite's, the system's.

    False: it makes fewer calls, and there was no step.
    """
    calls = itertools.count()
    stepped = False

    def step(_: object, event: str, __: object) -> None:
        nonlocal stepped
        if event == "c_call" and next(calls) == moment:
            stepped = True
            with suppress(OpenError):  # the open itself has a lock just then
                next(steps, None)

    sys.setprofile(step)
    try:
        return DB.open(path), stepped
    finally:
        sys.setprofile(None)


class TestTogether:
    @pytest.mark.parametrize("count", [3, 8, 32])
    def test_processes_open_one_path_at_the_same_moment(self, count: int, tmp_path: Path) -> None:
        templates = [tmp_path / name for name in ("none", "rollback", "killed", "killed-wal")]
        make_rollback(templates[1])
        make_killed(templates[2], "delete")
        make_killed(templates[3], "wal")
        times = math.ceil(rounds(96, 3000) / count)
        paths = [copy(path, path.with_suffix(f".{number}")) for number in range(times) for path in templates]
        assert together(count, open_each, paths) == [[FRESH, KEPT, KEPT, KEPT] * times] * count

    def test_processes_open_insert_and_close_in_a_loop(self, tmp_path: Path) -> None:
        cycles = rounds(20, 625)
        assert together(8, insert_and_close, tmp_path / "db", cycles) == [cycles] * 8
        with DB.open(tmp_path / "db") as db:
            found = {run_id for (run_id,) in db.conn.execute("SELECT id FROM runs")}
            assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert found == {f"{number}-{cycle}" for number in range(8) for cycle in range(cycles)}
        assert [file.name for file in tmp_path.iterdir()] == ["db"]

    @pytest.mark.parametrize(
        ("make", "other", "runs"),
        [
            (make_nothing, comes, 0),
            (make_partial, comes_and_goes, 3),
            (make_partial_wal, comes_and_goes, 3),
            (make_current, comes, 3),
            (make_current, goes, 3),
        ],
    )
    def test_another_connection_comes_or_goes_at_any_moment_of_an_open(
        self,
        make: Callable[[Path], None],
        other: Callable[[Path], Generator[None, None, None]],
        runs: int,
        tmp_path: Path,
    ) -> None:
        template = tmp_path / "template"
        make(template)
        for moment in itertools.count():
            path = copy(template, tmp_path / str(moment))
            steps = other(path)
            next(steps)
            db, stepped = open_and_step(path, steps, moment)
            with db:
                assert contents(db.conn) in (("wal", 9, runs), ("wal", 9, runs + 1))
            steps.close()
            if not stepped:
                break


def open_each(barrier: Barrier, number: int, paths: list[Path]) -> list[object]:
    """What each path has once it is open; an error instead, so that the other processes don't wait at the barrier."""
    seen: list[object] = []
    for path in paths:
        barrier.wait(PATIENCE)
        try:
            with DB.open(path, timeout=PATIENCE) as db:
                seen.append(contents(db.conn))
        except Exception as error:
            seen.append(repr(error))
    return seen


def insert_and_close(barrier: Barrier, number: int, path: Path, cycles: int) -> int:
    barrier.wait(PATIENCE)
    for cycle in range(cycles):
        with DB.open(path, timeout=PATIENCE) as db, db.transaction() as conn:
            insert_run(conn, f"{number}-{cycle}")
    return cycles


OPEN_IN_A_LOOP = """
import itertools, os, shutil, sys
from daemon_db import DB

directory, template = sys.argv[1:]
DB.open(":memory:").close()  # imports what opening imports, so that the kill doesn't land there
for number in itertools.count():
    path = f"{directory}/{number}.db"
    if template:
        shutil.copyfile(template, path)
    os.write(1, b"begin %d\\n" % number)
    db = DB.open(path)
    os.write(1, b"done %d\\n" % number)
    db.close()
"""

COMMIT_IN_A_LOOP = """
import itertools, os, sys
from daemon_db import DB

EVENT = "INSERT INTO events (run_id, sequence, event_type, payload_json) VALUES ('run-0', ?, 'step', ?)"
path, first = sys.argv[1], int(sys.argv[2])
with DB.open(path, on_connect=lambda conn: conn.execute("PRAGMA wal_autocheckpoint=20")) as db:
    for number in itertools.count(first):
        os.write(1, b"begin %d\\n" % number)
        with db.transaction() as conn:
            for sequence in range(10 * number, 10 * number + 10):
                conn.execute(EVENT, (sequence, "x" * 2000))
        os.write(1, b"done %d\\n" % number)
"""


def kill_at_random(chance: random.Random, code: str, *arguments: object) -> tuple[list[int], list[int]]:
    """Start `code`, and kill it soon after its first "begin"; the numbers of what it began and of what it had done."""
    with start(code, *arguments, stderr=None) as process:
        lines = [process.stdout.readline()]
        time.sleep(chance.uniform(0, 0.03))  # any moment will do
        process.kill()
        lines += process.stdout
    assert process.returncode == -9
    said = [line.split() for line in lines]
    return [int(n) for word, n in said if word == "begin"], [int(n) for word, n in said if word == "done"]


def objects_in(path: Path) -> int:
    """How many objects SQLite finds in the schema."""
    with closing(sqlite3.connect(path)) as conn:
        (objects,) = conn.execute("SELECT count(*) FROM sqlite_master WHERE sql NOT NULL").fetchone()
    return int(objects)


class TestKilled:
    @pytest.mark.parametrize("make", [make_nothing, make_partial, make_partial_wal])
    def test_while_opening(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        """The file is the old one or the new one; the next open works, and has the whole schema and the rows."""
        chance = random.Random(make.__name__)
        template = "" if make is make_nothing else tmp_path / "template"
        make(tmp_path / "template")
        objects = 1 if template else 0
        halfway = 0
        for kill in range(rounds(8, 75)):
            directory = tmp_path / str(kill)
            directory.mkdir()
            began, done = kill_at_random(chance, OPEN_IN_A_LOOP, directory, template)
            for number in began:
                path = directory / f"{number}.db"
                if number not in done and list(directory.glob(f"{number}.db-*")):
                    halfway += 1
                    assert objects_in(copy(path, directory / "copy")) in (objects, 9)
                with DB.open(path) as db:
                    assert contents(db.conn) == (KEPT if template else FRESH)
                    assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert halfway > 0

    def test_while_committing(self, tmp_path: Path) -> None:
        """Each transaction is there whole or not at all; each that was reported is there."""
        chance = random.Random("committing")
        path = tmp_path / "db"
        make_current(path)
        transactions = interrupted = 0
        for _ in range(rounds(8, 75)):
            began, done = kill_at_random(chance, COMMIT_IN_A_LOOP, path, transactions)
            interrupted += len(began) - len(done)
            with DB.open(path) as db:
                assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                sequences = [n for (n,) in db.conn.execute("SELECT sequence FROM events ORDER BY sequence")]
            assert sequences == list(range(len(sequences)))
            assert len(sequences) in (10 * (transactions + len(done)), 10 * (transactions + len(began)))
            transactions = len(sequences) // 10
        assert interrupted > 0


HOLD = """
import sqlite3, sys

path, begin = sys.argv[1:]
conn = sqlite3.connect(path, isolation_level=None)
conn.execute(begin)
conn.execute("PRAGMA user_version=7")
print("locked", flush=True)
sys.stdin.readline()
conn.execute("COMMIT")
conn.close()
"""


@contextmanager
def lock_held(path: Path, begin: str) -> Iterator[subprocess.Popen[str]]:
    """Another process in a write transaction on `path`, which it commits when its standard input is closed."""
    with start(HOLD, path, begin, stderr=None) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
    assert process.returncode == 0


BEGIN = pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
TO_BE_WRITTEN = pytest.mark.parametrize("make", [make_nothing, make_rollback, make_partial_wal])


class TestLocked:
    @BEGIN
    def test_a_current_database_opens_at_once(self, begin: str, tmp_path: Path) -> None:
        make_current(tmp_path / "db")
        with lock_held(tmp_path / "db", begin), DB.open(tmp_path / "db", timeout=0) as db:
            assert contents(db.conn) == KEPT

    @BEGIN
    @TO_BE_WRITTEN
    def test_a_database_to_be_written_waits_for_the_lock(
        self, make: Callable[[Path], None], begin: str, tmp_path: Path
    ) -> None:
        make(tmp_path / "db")
        found = []

        def open_it() -> None:
            with DB.open(tmp_path / "db", timeout=PATIENCE) as db:
                found.append((contents(db.conn), db.conn.execute("PRAGMA user_version").fetchone()))

        opener = threading.Thread(target=open_it)
        with lock_held(tmp_path / "db", begin) as holder:
            opener.start()
            opener.join(0.1)
            assert opener.is_alive()
            holder.stdin.close()
            opener.join(PATIENCE)
        assert found == [(FRESH if make is make_nothing else KEPT, (7,))]

    @BEGIN
    @TO_BE_WRITTEN
    @pytest.mark.parametrize("timeout", [0, 0.3])
    def test_longer_than_the_timeout(
        self, timeout: float, make: Callable[[Path], None], begin: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "db"
        make(path)
        with lock_held(path, begin):
            before = path.read_bytes()
            began = time.monotonic()
            with pytest.raises(OpenError) as caught:
                DB.open(path, timeout=timeout)
            assert timeout - 0.05 <= time.monotonic() - began < timeout + 3
            assert path.read_bytes() == before
        assert str(caught.value) == f"cannot open {path}: locked for more than {float(timeout)} s"
        assert caught.value.sqlite_errorcode == sqlite3.SQLITE_BUSY
        assert caught.value.sqlite_errorname == "SQLITE_BUSY"
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)

    @pytest.mark.parametrize("make", [make_nothing, make_rollback, make_partial_wal, make_current, make_extra])
    def test_what_is_left_of_the_timeout_is_for_opening_only(
        self, make: Callable[[Path], None], tmp_path: Path
    ) -> None:
        make(tmp_path / "db")
        with DB.open(tmp_path / "db", timeout=7) as db:
            assert db.conn.execute("PRAGMA busy_timeout").fetchone() == (7000,)

    @pytest.mark.parametrize("then", ["execute", "executescript"])
    def test_one_lock_after_another(self, then: str, tmp_path: Path) -> None:
        """Each is shorter than the timeout, which holds for all of them together.

        One comes before the open's first statement; once it is gone, the next comes before the next call of `then`.
        """
        path = tmp_path / "db"
        make_partial(path)
        _schema.expected()  # has a connection of its own
        locker = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        timers: list[threading.Timer] = []

        def lock_before(_: object, event: str, function: Callable[..., object]) -> None:
            method = then if timers else "execute"
            if event == "c_call" and function.__name__ == method and not locker.in_transaction:
                with suppress(sqlite3.OperationalError):  # the open itself has a lock just then
                    locker.execute("BEGIN EXCLUSIVE")
                    timers.append(threading.Timer(1.4, locker.rollback))
                    timers[-1].start()

        began = time.monotonic()
        sys.setprofile(lock_before)
        try:
            with pytest.raises(OpenError, match="locked for more than 1.5 s"):
                DB.open(path, timeout=1.5)
        finally:
            sys.setprofile(None)
            elapsed = time.monotonic() - began
            for timer in timers:
                timer.cancel()
                timer.join()
            locker.close()
        assert len(timers) > 1
        assert elapsed < 2.6
