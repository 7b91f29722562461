"""One `DB` for many threads: each has a connection of its own, which ends with it.

`DAEMON_DB_LONG=1` in the environment makes it go on for longer (see `support`).
"""

import asyncio
import gc
import os
import sqlite3
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daemon_db import DB, OpenError
from support import append_event, insert_run, open_files, rounds, run


def in_thread(function: Callable[[], object]) -> object:
    """What `function` returns or raises in a thread that has then ended."""
    results: list[Callable[[], object]] = []

    def call() -> None:
        try:
            value = function()
            results.append(lambda: value)
        except BaseException as error:
            raised = error
            results.append(lambda: throw(raised))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return results[0]()


def throw(error: BaseException) -> None:
    raise error


shares_memory = pytest.mark.skipif(
    sqlite3.sqlite_version_info < (3, 36), reason="SQLite before 3.36 has no memory database for several threads"
)


@pytest.fixture(params=["file", pytest.param("memory", marks=shares_memory)])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return ":memory:" if request.param == "memory" else str(tmp_path / "daemon.db")


def test_a_thread_keeps_its_own_connection(path: str) -> None:
    with DB.open(path) as db:
        assert db.conn is db.conn
        assert in_thread(lambda: db.conn is db.conn)
        theirs = in_thread(lambda: id(db.conn))
        assert theirs != id(db.conn)


def test_each_connection_is_set_up_alike(path: str) -> None:
    connected: list[str | None] = []

    def on_connect(conn: sqlite3.Connection) -> None:
        connected.append(conn.isolation_level)
        conn.execute("PRAGMA synchronous=OFF")

    def pragmas() -> list[object]:
        names = ("journal_mode", "foreign_keys", "busy_timeout", "synchronous")
        return [db.conn.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    with DB.open(path, timeout=1.25, on_connect=on_connect) as db:
        mode = "memory" if path == ":memory:" else "wal"
        assert pragmas() == in_thread(pragmas) == [mode, 1, 1250, 0]
    assert connected == [None, None]


def test_a_connection_is_for_its_thread_only(path: str) -> None:
    with DB.open(path) as db:
        conn = db.conn
        with pytest.raises(sqlite3.ProgrammingError, match="created in a thread can only be used in that same thread"):
            in_thread(lambda: conn.execute("SELECT 1"))


def test_eight_threads_append_to_one_run(path: str) -> None:
    each = rounds(100, 5000)

    def append() -> None:
        for _ in range(each):
            with db.transaction() as conn:
                append_event(conn)

    with DB.open(path, on_connect=lambda conn: conn.execute("PRAGMA synchronous=OFF")) as db:
        insert_run(db.conn)
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(append) for _ in range(8)]:
                future.result()
        sequences = [sequence for (sequence,) in db.conn.execute("SELECT sequence FROM events ORDER BY sequence")]
        assert sequences == list(range(1, 8 * each + 1))


def test_readers_neither_wait_for_a_writer_nor_see_what_it_has_not_committed(tmp_path: Path) -> None:
    def runs() -> int:
        return int(db.conn.execute("SELECT count(*) FROM runs").fetchone()[0])

    with DB.open(tmp_path / "daemon.db", timeout=0) as db:  # waiting for anything would be an error
        with db.transaction() as conn:
            insert_run(conn)
            assert in_thread(runs) == 0
        assert in_thread(runs) == 1


@shares_memory
def test_a_memory_database_is_its_own_threads_only() -> None:
    with DB.open(":memory:") as db, DB.open(":memory:") as other:
        insert_run(db.conn)
        assert in_thread(lambda: db.conn.execute("SELECT id FROM runs").fetchall()) == [("run-1",)]
        assert in_thread(lambda: other.conn.execute("SELECT id FROM runs").fetchall()) == []


@shares_memory
def test_a_memory_database_outlives_the_thread_that_opened_it() -> None:
    db = in_thread(lambda: DB.open(":memory:"))
    assert isinstance(db, DB)
    with db:
        insert_run(db.conn)
        assert in_thread(lambda: db.conn.execute("SELECT id FROM runs").fetchall()) == [("run-1",)]


def test_an_older_sqlite_refuses_a_memory_database_to_a_second_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 35, 5))
    with DB.open(":memory:") as db:
        insert_run(db.conn)
        with pytest.raises(sqlite3.NotSupportedError, match="3.36"):
            in_thread(lambda: db.conn)
        assert db.conn.execute("SELECT id FROM runs").fetchall() == [("run-1",)]


def test_no_file_stays_open_after_its_thread(tmp_path: Path) -> None:
    def write() -> None:
        with db.transaction() as conn:
            append_event(conn)

    at_start = open_files()
    gc.disable()  # what only the garbage collector would close is left open
    try:
        with DB.open(tmp_path / "daemon.db", on_connect=lambda conn: conn.execute("PRAGMA synchronous=OFF")) as db:
            insert_run(db.conn)
            # A descriptor of a file on which the process has a lock is not closed but kept for the next connection
            # (https://sqlite.org/howtocorrupt.html, 2.2): one for each that was open at the same time.
            in_thread(write)
            before = open_files()
            for _ in range(rounds(200, 1000)):
                in_thread(write)
            assert open_files() == before
            barrier = threading.Barrier(32)
            with ThreadPoolExecutor(32) as pool:
                list(pool.map(lambda _: (barrier.wait(), write(), barrier.wait()), range(32)))
            before = open_files()
            with ThreadPoolExecutor(32) as pool:
                list(pool.map(lambda _: (barrier.wait(), write(), barrier.wait()), range(32)))
            assert open_files() == before
    finally:
        gc.enable()
    assert open_files() == at_start
    assert [name.name for name in tmp_path.iterdir()] == ["daemon.db"]


def test_a_thread_that_outlives_the_db_closes_its_connection_when_it_ends(tmp_path: Path) -> None:
    before = open_files()
    used, end = threading.Event(), threading.Event()
    db = DB.open(tmp_path / "daemon.db")

    def work(db: DB) -> None:
        db.conn.execute("SELECT 1")
        del db
        used.set()
        end.wait()

    thread = threading.Thread(target=work, args=(db,))
    thread.start()
    used.wait()
    db.close()
    del db
    gc.collect()
    assert open_files() != before
    end.set()
    thread.join()
    assert open_files() == before
    assert [name.name for name in tmp_path.iterdir()] == ["daemon.db"]


def test_a_long_lived_thread_closes_the_connections_of_dropped_dbs_when_it_ends(tmp_path: Path) -> None:
    """Also if the garbage collector has run between, in another thread."""
    before = open_files()
    with ThreadPoolExecutor(1) as pool:
        for _ in range(20):
            db = DB.open(tmp_path / "daemon.db")
            pool.submit(lambda db: db.conn.execute("SELECT 1").fetchone(), db).result()
            db.close()
            del db
            gc.collect()
    assert open_files() == before
    assert [name.name for name in tmp_path.iterdir()] == ["daemon.db"]


def test_a_db_that_is_dropped_is_closed(path: str, tmp_path: Path) -> None:
    before = open_files()
    db = DB.open(path)
    insert_run(db.conn)
    del db
    assert open_files() == before


def test_asyncio_to_thread(path: str) -> None:
    def append() -> int:
        with db.transaction() as conn:
            return append_event(conn)

    async def main() -> list[int]:
        return await asyncio.gather(*(asyncio.to_thread(append) for _ in range(20)))

    with DB.open(path) as db:
        insert_run(db.conn)
        assert sorted(asyncio.run(main())) == list(range(1, 21))


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_later_connection_is_to_the_same_file_or_none(change: str, tmp_path: Path) -> None:
    file = tmp_path / "daemon.db"
    with DB.open(file) as db:
        insert_run(db.conn)
        db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        file.rename(tmp_path / "moved.db")
        if change == "replaced":
            with DB.open(file) as other:
                insert_run(other.conn, "run-2")
        with pytest.raises(OpenError, match="removed or replaced"):
            in_thread(lambda: db.conn)
        assert file.exists() == (change == "replaced")
        (tmp_path / "moved.db").rename(file)
        assert in_thread(lambda: db.conn.execute("SELECT id FROM runs").fetchall()) == [("run-1",)]


def test_a_connection_has_its_own_files_wal_from_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()

    def work() -> list[object]:
        conn = db.conn
        connected.set()
        replaced.wait()
        return conn.execute("SELECT id FROM runs").fetchall()

    connected, replaced = threading.Event(), threading.Event()
    with (
        DB.open(tmp_path / "other" / "daemon.db") as other,
        DB.open(tmp_path / "data" / "daemon.db") as db,
        ThreadPoolExecutor(1) as pool,
    ):
        insert_run(other.conn, "run-2")
        insert_run(db.conn)
        future = pool.submit(work)
        connected.wait()
        (tmp_path / "data").rename(tmp_path / "old")
        (tmp_path / "other").rename(tmp_path / "data")
        replaced.set()
        assert future.result() == [("run-1",)]


def test_a_file_replaced_by_one_with_its_inode(tmp_path: Path) -> None:
    """As may be, once no connection holds the file: here a zero-length one, which is another's or nobody's."""
    file = tmp_path / "daemon.db"
    db = in_thread(lambda: DB.open(file))
    assert isinstance(db, DB)
    file.write_bytes(b"")  # the same inode for certain
    with db, pytest.raises(OpenError, match="removed or replaced"):
        _ = db.conn
    assert file.read_bytes() == b""


def test_a_file_replaced_while_a_connection_is_opened(tmp_path: Path) -> None:
    file = tmp_path / "daemon.db"

    def connect() -> None:
        def replace(_: object, event: str, function: object) -> None:
            if event == "c_call" and getattr(function, "__name__", "") == "execute":  # of the new connection, the first
                sys.setprofile(None)
                file.rename(tmp_path / "moved.db")
                DB.open(file).close()

        sys.setprofile(replace)
        try:
            _ = db.conn
        finally:
            sys.setprofile(None)

    with DB.open(file) as db:
        db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with pytest.raises(OpenError, match="removed or replaced"):
            in_thread(connect)
        assert (tmp_path / "moved.db").exists()


def test_a_daemon_may_change_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with DB.open("daemon.db") as db:
        insert_run(db.conn)
        os.chdir("/")
        assert in_thread(lambda: db.conn.execute("SELECT id FROM runs").fetchall()) == [("run-1",)]


def test_a_connection_that_opens_while_the_db_is_closed_is_closed(path: str) -> None:
    opening, closed = threading.Event(), threading.Event()
    connections: list[sqlite3.Connection] = []
    before = open_files()

    def wait(conn: sqlite3.Connection) -> None:
        if connections:
            opening.set()
            closed.wait()
        connections.append(conn)

    db = DB.open(path, on_connect=wait)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: db.conn)
        opening.wait()
        db.close()
        closed.set()
        with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
            future.result()
    assert len(connections) == 2
    assert open_files() == before


@shares_memory
def test_a_memory_database_is_gone_when_it_is_closed() -> None:
    with DB.open(":memory:") as db:
        uri = db._memory_uri
    conn = sqlite3.connect(uri, uri=True)
    assert conn.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    conn.close()


def test_closed_by_one_thread_is_closed_for_all(path: str) -> None:
    asked, closed = threading.Event(), threading.Event()
    before = open_files()

    def work() -> str:
        with db.transaction() as conn:
            insert_run(conn)
            asked.set()
            closed.wait()
            with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
                _ = db.conn  # does not end the transaction, which goes on with the connection that it has
        with pytest.raises(sqlite3.ProgrammingError, match="closed database"), db.transaction():
            pass
        return "worked"

    db = DB.open(path)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        asked.wait()
        db.close()
        closed.set()
        assert future.result() == "worked"
    assert open_files() == before
    if path != ":memory:":
        with DB.open(path) as db:
            assert db.conn.execute("SELECT id FROM runs").fetchall() == [("run-1",)]


def test_a_transaction_that_waits_while_the_db_is_closed_does_not_begin(tmp_path: Path) -> None:
    waiting = threading.Event()

    def work() -> None:
        _ = db.conn
        waiting.set()
        with db.transaction() as conn:
            insert_run(conn)

    db = DB.open(tmp_path / "daemon.db", timeout=60)
    with ThreadPoolExecutor(1) as pool, db.transaction():
        future = pool.submit(work)
        waiting.wait()
        db._open_in = 0  # as close() does in another thread, which doesn't end this one's transaction
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        future.result()
    db.close()


def test_closing_with_a_cursor_half_read_ends_the_transaction(tmp_path: Path) -> None:
    """Else SQLite would keep the connection, and the lock, until the cursor is gone."""
    with DB.open(tmp_path / "daemon.db") as db:
        insert_run(db.conn)
        insert_run(db.conn, "run-2")
        db.conn.execute("BEGIN IMMEDIATE")
        cursor = db.conn.execute("SELECT * FROM runs")
        cursor.fetchone()
    with DB.open(tmp_path / "daemon.db", timeout=0) as db, db.transaction() as conn:
        insert_run(conn, "run-3")


def test_asking_in_the_middle_of_a_statement_whether_the_db_is_closed(tmp_path: Path) -> None:
    """Were the connection closed then and there, the interpreter would crash."""
    code = """
import sqlite3, sys, threading
from daemon_db import DB
from support import insert_run

def rows():
    for number in range(100):
        if number == 50:
            threading.Thread(target=db.close).start()
        while number == 50 and db._open_in:
            pass
        try:
            db.conn
        except sqlite3.ProgrammingError:
            pass
        yield (f"run-{number}",)

def work():
    insert_run(db.conn)
    db.conn.executemany("INSERT INTO events (run_id, sequence, event_type) VALUES ('run-1', ?, '')", rows())

db = DB.open(sys.argv[1])
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    run(code, tmp_path / "daemon.db")


CLOSE_WHILE_EIGHT_THREADS_WORK = """
import random, sqlite3, sys, threading
from support import append_event, insert_run
from daemon_db import DB

path, rounds, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random = random.Random(seed)
committed, unexpected = [], []

def work(db):
    try:
        while True:
            with db.transaction() as conn:
                sequence = append_event(conn)
            committed.append(sequence)
            progress.release()
            db.conn.execute("SELECT count(*) FROM events").fetchone()
    except sqlite3.Error:
        pass  # what close() is for
    except BaseException as error:
        unexpected.append(error)

for _ in range(rounds):
    db = DB.open(path, on_connect=lambda conn: conn.execute("PRAGMA synchronous=OFF"))
    if not committed:
        insert_run(db.conn)
    progress = threading.Semaphore(0)
    threads = [threading.Thread(target=work, args=(db,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(random.randrange(1, 40)):
        progress.acquire()
    db.close()
    for thread in threads:
        thread.join()
assert not unexpected, unexpected
with DB.open(path) as db:
    there = {sequence for (sequence,) in db.conn.execute("SELECT sequence FROM events")}
    assert there >= set(committed), set(committed) - there
    assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
"""


def test_close_while_eight_threads_work(tmp_path: Path) -> None:
    times = rounds(40, 1000)
    run(CLOSE_WHILE_EIGHT_THREADS_WORK, tmp_path / "daemon.db", times, 1)
    assert [name.name for name in tmp_path.iterdir()] == ["daemon.db"]


@pytest.mark.parametrize(
    "end", ["", "db = [db]", "threading.Thread(target=lambda: (db.conn, wait()), daemon=True).start(); ready()"]
)
def test_the_interpreter_may_exit_with_the_db_open(end: str, tmp_path: Path) -> None:
    code = f"""
import sys, threading
from daemon_db import DB
db = DB.open(sys.argv[1])
entered = threading.Event()
def wait(): entered.set(); threading.Event().wait()
def ready(): entered.wait()
{end}
"""
    run(
        code,
        tmp_path / "daemon.db",
    )
    with DB.open(tmp_path / "daemon.db") as db:
        assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
