"""The end of a `DB`: closed by any thread, while others work; and when the interpreter exits.

`DAEMON_DB_LONG=1` in the environment makes it go on for longer (see `support`).
"""

import gc
import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daemon_db import DB
from support import LIMIT, insert_run, open_files, rounds, run, wait_for

shares_memory = pytest.mark.skipif(
    sqlite3.sqlite_version_info < (3, 36), reason="SQLite before 3.36 has no memory database for several threads"
)


@pytest.fixture(params=["file", pytest.param("memory", marks=shares_memory)])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return ":memory:" if request.param == "memory" else str(tmp_path / "daemon.db")


def test_closed_by_one_thread_is_closed_for_all(path: str) -> None:
    asked, closed = threading.Event(), threading.Event()
    before = open_files()

    def work() -> str:
        with db.transaction() as conn:
            insert_run(conn)
            asked.set()
            wait_for(closed)
            with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
                _ = db.conn  # does not end the transaction, which goes on with the connection that it has
        assert conn.execute("SELECT id FROM runs").fetchall() == [("run-1",)]
        with pytest.raises(sqlite3.ProgrammingError, match="closed database"), db.transaction():
            pass
        return "worked"

    db = DB.open(path)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        wait_for(asked)
        db.close()
        closed.set()
        assert future.result(LIMIT) == "worked"
    assert open_files() == before
    if path != ":memory:":
        with DB.open(path) as db:
            assert db.conn.execute("SELECT id FROM runs").fetchall() == [("run-1",)]


def test_a_connection_that_opens_while_the_db_is_closed_is_closed(path: str) -> None:
    opening, closed = threading.Event(), threading.Event()
    connections: list[sqlite3.Connection] = []
    before = open_files()

    def wait(conn: sqlite3.Connection) -> None:
        if connections:
            opening.set()
            wait_for(closed)
        connections.append(conn)

    db = DB.open(path, on_connect=wait)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: db.conn)
        wait_for(opening)
        db.close()
        closed.set()
        with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
            future.result(LIMIT)
        assert len(connections) == 2
        assert open_files() == before


def test_a_transaction_that_waits_while_the_db_is_closed_does_not_begin(tmp_path: Path) -> None:
    """The closing thread's own transaction goes back, and the next one finds out that it is too late."""
    waiting = threading.Event()
    seen = []

    def work() -> None:
        _ = db.conn
        waiting.set()
        with db.transaction() as conn:
            seen.append("begun")
            insert_run(conn)

    def hold() -> None:
        with db.transaction() as conn:
            insert_run(conn)
            held.set()
            wait_for(closed)

    held, closed = threading.Event(), threading.Event()
    db = DB.open(tmp_path / "daemon.db", timeout=LIMIT)
    with ThreadPoolExecutor(2) as pool:
        holding = pool.submit(hold)
        wait_for(held)
        working = pool.submit(work)
        wait_for(waiting)
        db.close()  # whether the other waits for its turn already or is about to
        closed.set()
        holding.result(LIMIT)
        with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
            working.result(LIMIT)
    assert seen == []
    with DB.open(tmp_path / "daemon.db") as db:
        assert db.conn.execute("SELECT id FROM runs").fetchall() == [("run-1",)]


@pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", ""], ids=["in a transaction", "alone"])
def test_a_half_read_cursor_that_is_kept_keeps_the_files_open_and_no_lock(begin: str, tmp_path: Path) -> None:
    """SQLite has no way to end it. It gives no rows any more."""
    before = open_files()
    with DB.open(tmp_path / "daemon.db") as db:
        insert_run(db.conn)
        insert_run(db.conn, "run-2")
        db.conn.execute(begin)
        cursor = db.conn.execute("SELECT * FROM runs")
        cursor.fetchone()
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        cursor.fetchone()
    assert open_files() != before
    with DB.open(tmp_path / "daemon.db", timeout=0) as db, db.transaction() as conn:
        insert_run(conn, "run-3")
    del cursor
    assert open_files() == before
    assert os.listdir(tmp_path) == ["daemon.db"]


CLOSE_WHILE_EIGHT_THREADS_WORK = """
import random, sqlite3, sys, threading
from support import LIMIT, append_event, insert_run, join, no_sync
from daemon_db import DB

path, rounds = sys.argv[1], int(sys.argv[2])
random = random.Random(1)
committed, unexpected = [], []

def work(db):
    try:
        while True:
            with db.transaction() as conn:
                sequence = append_event(conn)
            committed.append(sequence)
            progress.release()
            db.conn.execute("SELECT count(*) FROM events").fetchone()
    except sqlite3.ProgrammingError as error:
        if "closed database" not in str(error):
            unexpected.append(error)
    except BaseException as error:
        unexpected.append(error)

for _ in range(rounds):
    db = DB.open(path, timeout=LIMIT, on_connect=no_sync)
    if not committed:
        insert_run(db.conn)
    progress = threading.Semaphore(0)
    threads = [threading.Thread(target=work, args=(db,), daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(random.randrange(1, 40)):
        assert progress.acquire(timeout=LIMIT), unexpected
    db.close()
    join(*threads)
assert not unexpected, unexpected
with DB.open(path) as db:
    there = {sequence for (sequence,) in db.conn.execute("SELECT sequence FROM events")}
    assert there >= set(committed), set(committed) - there
    assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
"""


def test_close_while_eight_threads_work(tmp_path: Path) -> None:
    run(CLOSE_WHILE_EIGHT_THREADS_WORK, tmp_path / "daemon.db", rounds(8, 1000))
    assert os.listdir(tmp_path) == ["daemon.db"]


def test_eight_threads_close_at_once(path: str) -> None:
    before = open_files()
    for _ in range(rounds(8, 2000)):
        db = DB.open(path)
        barrier = threading.Barrier(8)

        def close(db: DB = db, barrier: threading.Barrier = barrier) -> None:
            _ = db.conn
            barrier.wait(LIMIT)
            db.close()

        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(close) for _ in range(8)]:
                future.result(LIMIT)
        with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
            _ = db.conn
        db.close()
    del db, close
    gc.collect()
    assert open_files() == before


# The interpreter's end

DAEMON_THREAD = """
def work():
    db.conn.execute("SELECT 1").fetchone()
    used.set()
    threading.Event().wait()

used = threading.Event()
threading.Thread(target=work, daemon=True).start()
wait_for(used)
"""
WRITING = """
def work():
    insert_run(db.conn)
    while True:
        with db.transaction() as conn:
            append_event(conn)
        used.set()

used = threading.Event()
threading.Thread(target=work, daemon=True).start()
wait_for(used)
"""
SUSPENDED = """
def work():
    with db.transaction() as conn:
        insert_run(conn, "never committed")
        yield

work = work()
next(work)
"""
PROLOGUE = """
import sys, threading, warnings
from daemon_db import DB
from support import append_event, insert_run, wait_for
"""


@pytest.mark.parametrize(
    "end",
    [
        pytest.param("", id="as it is"),
        pytest.param("db = [db]", id="in a list"),
        pytest.param("db.cycle = db", id="in a cycle"),
        pytest.param(DAEMON_THREAD, id="a daemon thread"),
        pytest.param(WRITING, id="a daemon thread writes"),
        pytest.param(SUSPENDED, id="suspended"),
        pytest.param("raise SystemExit", id="exit"),
        pytest.param("db.conn.execute('BEGIN')", id="begun"),
        pytest.param("conn = db.conn", id="in use"),
    ],
)
def test_the_interpreter_may_exit_with_the_db_open(end: str, tmp_path: Path) -> None:
    code = f"""{PROLOGUE}
warnings.simplefilter("ignore", ResourceWarning)
db = DB.open(sys.argv[1])
{end}
"""
    run(code, tmp_path / "daemon.db")
    if "daemon=True" not in end:  # a connection of a thread that is in the middle of something can't be closed
        assert os.listdir(tmp_path) == ["daemon.db"]
    with DB.open(tmp_path / "daemon.db") as db:
        assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.conn.execute("SELECT id FROM runs WHERE id <> 'run-1'").fetchall() == []


@pytest.mark.parametrize("path", ["daemon.db", pytest.param(":memory:", marks=shares_memory)])
def test_it_says_nothing_after_close(path: str, tmp_path: Path) -> None:
    """Also when a daemon thread has a connection still."""
    code = f"""{PROLOGUE}
db = DB.open(sys.argv[1])
{DAEMON_THREAD}
db.close()
"""
    run(code, path, cwd=tmp_path)


@pytest.mark.parametrize("registered", ["before the import", "before open", "after open"])
def test_a_function_called_at_exit_may_use_the_db_and_close_it(registered: str, tmp_path: Path) -> None:
    code = f"""
import atexit, sys

def finish():
    with db.transaction() as conn:
        append_event(conn)
    db.close()

def register(moment):
    if moment == {registered!r}:
        atexit.register(finish)

register("before the import")
from daemon_db import DB
from support import append_event, insert_run
register("before open")
db = DB.open(sys.argv[1])
insert_run(db.conn)
register("after open")
"""
    run(code, tmp_path / "daemon.db")
    assert os.listdir(tmp_path) == ["daemon.db"]
    with DB.open(tmp_path / "daemon.db") as db:
        assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (1,)
