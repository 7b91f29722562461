"""Each thread has a connection of its own, which it alone uses and closes; and when it does.

`DAEMON_DB_LONG=1` in the environment makes it go on for longer (see `support`).
"""

import asyncio
import gc
import os
import signal
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daemon_db import DB, OpenError, _guard, _schema
from support import (
    LIMIT,
    append_event,
    files_in,
    in_thread,
    insert_run,
    make_killed,
    no_sync,
    open_files,
    rounds,
    run,
)

shares_memory = pytest.mark.skipif(
    sqlite3.sqlite_version_info < (3, 36), reason="SQLite before 3.36 has no memory database for several threads"
)


@pytest.fixture(params=["file", pytest.param("memory", marks=shares_memory)])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return ":memory:" if request.param == "memory" else str(tmp_path / "daemon.db")


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What only the garbage collector would close is left open."""
    gc.collect()
    gc.freeze()  # so that a collection is quick
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


# Its own


def test_each_thread_has_a_connection_of_its_own_that_no_other_can_use(path: str) -> None:
    with DB.open(path) as db:
        conn = db.conn
        assert db.conn is conn
        assert in_thread(lambda: db.conn is db.conn)
        assert in_thread(lambda: db.conn is not conn)
        with pytest.raises(sqlite3.ProgrammingError, match="that same thread"):
            in_thread(lambda: conn.execute("SELECT 1"))


def test_each_connection_is_set_up_alike(path: str) -> None:
    connected: list[str | None] = []

    def on_connect(conn: sqlite3.Connection) -> None:
        connected.append(conn.isolation_level)
        no_sync(conn)

    def pragmas() -> list[object]:
        names = ("journal_mode", "foreign_keys", "busy_timeout", "synchronous")
        return [db.conn.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    with DB.open(path, timeout=1.25, on_connect=on_connect) as db:
        mode = "memory" if path == ":memory:" else "wal"
        assert pragmas() == in_thread(pragmas) == [mode, 1, 1250, 0]
    assert connected == [None, None]


def test_eight_threads_append_to_one_run(path: str) -> None:
    each = rounds(100, 5000)

    def append() -> None:
        for _ in range(each):
            with db.transaction() as conn:
                append_event(conn)

    with DB.open(path, timeout=LIMIT, on_connect=no_sync) as db:
        insert_run(db.conn)
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(append) for _ in range(8)]:
                future.result(LIMIT)
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


def test_asyncio_to_thread(path: str) -> None:
    def append() -> int:
        with db.transaction() as conn:
            return append_event(conn)

    async def main() -> list[int]:
        return await asyncio.gather(*(asyncio.to_thread(append) for _ in range(20)))

    with DB.open(path, timeout=LIMIT) as db:
        insert_run(db.conn)
        assert sorted(asyncio.run(main())) == list(range(1, 21))


# Closed when its thread ends


def test_no_file_stays_open_after_its_thread(no_collector: None, tmp_path: Path) -> None:
    def write() -> None:
        with db.transaction() as conn:
            append_event(conn)

    def write_together() -> None:
        barrier = threading.Barrier(32)
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(lambda _: (barrier.wait(LIMIT), write(), barrier.wait(LIMIT)), range(32)))

    at_start = open_files()
    with DB.open(tmp_path / "daemon.db", timeout=LIMIT, on_connect=no_sync) as db:
        insert_run(db.conn)
        # A descriptor of a file on which the process has a lock is not closed but kept for the next connection
        # (https://sqlite.org/howtocorrupt.html, 2.2): one for each that was open at the same time.
        in_thread(write)
        before = open_files()
        for _ in range(rounds(60, 1000)):
            in_thread(write)
        assert open_files() == before
        write_together()
        before = open_files()
        write_together()
        assert open_files() == before
    assert open_files() == at_start
    assert os.listdir(tmp_path) == ["daemon.db"]


# Closed DBs in threads that go on


def test_a_pools_worker_has_no_more_open_after_many_closed_dbs_than_after_one(no_collector: None, path: str) -> None:
    def use(db: DB) -> object:
        return db.conn.execute("SELECT count(*) FROM runs").fetchone()

    at_start = open_files()
    with ThreadPoolExecutor(1) as pool:
        after = []
        for _ in range(rounds(30, 10_000)):
            with DB.open(path, on_connect=no_sync) as db:
                assert pool.submit(use, db).result(LIMIT) == (0,)
            after.append(len(open_files()))
        assert after == after[:1] * len(after)
    assert open_files() == at_start


def test_what_is_closed_is_forgotten(path: str) -> None:
    def use(db: DB) -> weakref.ref[object]:
        db.conn.execute("SELECT 1").fetchone()
        return weakref.ref(db._state)

    with ThreadPoolExecutor(1) as pool:
        db = DB.open(path)
        closed = [use(db), pool.submit(use, db).result(LIMIT)]
        db.close()
        del db
        with DB.open(path) as other:
            pool.submit(use, other).result(LIMIT)
        gc.collect()
        assert [reference() for reference in closed] == [None, None]


@pytest.mark.parametrize("then", ["asks", "ends"])
def test_when_the_thread_next_asks_or_ends_its_connection_is_closed(then: str, tmp_path: Path) -> None:
    def use() -> None:
        db.conn.execute("SELECT 1").fetchone()

    before = open_files()
    with ThreadPoolExecutor(1) as pool:
        db = DB.open(tmp_path / "daemon.db")
        pool.submit(use).result(LIMIT)
        db.close()
        assert open_files() != before
        if then == "asks":
            with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
                pool.submit(use).result(LIMIT)
            assert open_files() == before
        else:
            del db
            gc.collect()
            assert open_files() != before
    assert open_files() == before
    assert os.listdir(tmp_path) == ["daemon.db"]


def half_read(conn: sqlite3.Connection) -> Callable[[], object]:
    cursor = conn.execute("SELECT id FROM runs ORDER BY id")
    assert cursor.fetchone() == ("run-1",)
    return cursor.fetchone


def in_a_variable(conn: sqlite3.Connection) -> Callable[[], object]:
    return lambda: conn.execute("SELECT max(id) FROM runs").fetchone()


def as_a_method(conn: sqlite3.Connection) -> Callable[[], object]:
    execute = conn.execute
    del conn
    return lambda: execute("SELECT max(id) FROM runs").fetchone()


def as_an_open_blob(conn: sqlite3.Connection) -> Callable[[], object]:
    (rowid,) = conn.execute("SELECT rowid FROM runs WHERE id = 'run-2'").fetchone()
    blob = conn.blobopen("runs", "id", rowid, readonly=True)
    return lambda: (blob.read().decode(),)


@pytest.mark.parametrize("keep", [half_read, in_a_variable, as_a_method, as_an_open_blob])
def test_a_connection_that_a_caller_still_has_works_on(
    keep: Callable[[sqlite3.Connection], Callable[[], object]], no_collector: None, tmp_path: Path
) -> None:
    """Of a `DB` that another thread has closed. When the caller has it no more, it is closed."""
    kept = []

    def open_another() -> None:
        DB.open(tmp_path / "other.db").close()

    def use() -> object:
        open_another()
        return kept.pop()()

    before = open_files()
    with ThreadPoolExecutor(1) as pool:
        with DB.open(tmp_path / "daemon.db") as db:
            insert_run(db.conn)
            insert_run(db.conn, "run-2")
            pool.submit(lambda: kept.append(keep(db.conn))).result(LIMIT)
        assert pool.submit(use).result(LIMIT) == ("run-2",)
        assert len(open_files()) > len(before)
        pool.submit(open_another).result(LIMIT)
        assert open_files() == before


# Dropped DBs


class Store:
    """What has a `DB`, and is called by it: a reference cycle."""

    def __init__(self, path: str | Path) -> None:
        self.db = DB.open(path, on_connect=self.configure)

    def configure(self, conn: sqlite3.Connection) -> None:
        no_sync(conn)


def test_a_db_that_is_dropped_is_closed_and_says_so(no_collector: None, path: str) -> None:
    before = open_files()
    db = DB.open(path)
    insert_run(db.conn)
    with pytest.warns(ResourceWarning, match=f"^unclosed database '{path}'$"):
        del db
    DB.open(path).close()  # when the thread next opens one, it closes what is left
    assert open_files() == before


def test_a_closed_db_and_one_that_was_not_opened_say_nothing(tmp_path: Path) -> None:
    def use() -> None:
        with DB.open(tmp_path / "daemon.db") as db:
            in_thread(lambda: db.conn)
        with pytest.raises(sqlite3.OperationalError, match="parent directory"):
            DB.open(tmp_path / "nowhere" / "daemon.db")

    use()
    gc.collect()  # a warning is an error in these tests


def test_the_connection_of_a_db_that_is_not_kept_simply_works(path: str) -> None:
    before = open_files()
    with pytest.warns(ResourceWarning, match="unclosed database"):
        assert DB.open(path).conn.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    with pytest.warns(ResourceWarning, match="unclosed database"):
        cursor = DB.open(path).conn.execute("SELECT 1 UNION SELECT 2")
    assert cursor.fetchall() == [(1,), (2,)]
    del cursor
    DB.open(path).close()
    assert open_files() == before


def test_a_db_in_a_cycle_collected_in_another_thread(no_collector: None, tmp_path: Path) -> None:
    """The thread that used it closes its connection when it next opens one."""

    def use() -> None:
        Store(tmp_path / "daemon.db").db.conn.execute("SELECT 1").fetchone()

    def open_another() -> None:
        DB.open(tmp_path / "other.db").close()

    before = open_files()
    with ThreadPoolExecutor(1) as pool:
        for _ in range(10):
            pool.submit(use).result(LIMIT)
            assert open_files() != before
            with pytest.warns(ResourceWarning, match="unclosed database"):
                gc.collect()
            pool.submit(open_another).result(LIMIT)
            assert open_files() == before
    assert sorted(os.listdir(tmp_path)) == ["daemon.db", "other.db"]


def test_a_db_collected_in_one_thread_while_the_thread_that_used_it_ends(tmp_path: Path) -> None:
    code = """
import gc, sys, threading, warnings
from daemon_db import DB
from support import LIMIT, join, open_files

warnings.simplefilter("ignore", ResourceWarning)
path, rounds = sys.argv[1], int(sys.argv[2])

class Store:
    def __init__(self):
        self.db = DB.open(path, on_connect=self.configure)

    def configure(self, conn):
        conn.execute("PRAGMA synchronous=OFF")

def use(barrier):
    Store().db.conn.execute("SELECT 1").fetchone()
    barrier.wait(LIMIT)

Store().db.close()
gc.disable()
gc.collect()
gc.freeze()  # so that a collection is quick
before = open_files()
for number in range(rounds):
    barrier = threading.Barrier(2)
    thread = threading.Thread(target=use, args=(barrier,), daemon=True)
    thread.start()
    barrier.wait(LIMIT)
    gc.collect()
    join(thread)
    gc.collect()
    assert open_files() == before, (number, open_files())
"""
    run(code, tmp_path / "daemon.db", rounds(50, 10_000))
    assert os.listdir(tmp_path) == ["daemon.db"]


def test_dbs_of_one_thread_that_others_close_and_drop(no_collector: None, tmp_path: Path) -> None:
    before = open_files()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(rounds(20, 300)):
            future = pool.submit(DB.close, DB.open(tmp_path / "daemon.db", on_connect=no_sync))
            future.result(LIMIT)
            del future
            # This thread's own, which it opens next, and this one's: SQLite may keep descriptors for another while
            # the file has locks.
            assert len(open_files()) <= len(before) + 6
    DB.open(tmp_path / "daemon.db").close()
    assert open_files() == before


def test_a_collection_in_the_middle_of_a_statement_closes_nothing_that_is_in_use(tmp_path: Path) -> None:
    """A connection that is closed inside its own running statement crashes the interpreter."""
    code = """
import gc, sys, warnings
from daemon_db import DB

warnings.simplefilter("ignore", ResourceWarning)

class Store:
    def __init__(self, path):
        self.db = DB.open(path, on_connect=self.configure)

    def configure(self, conn):
        conn.create_function("collect", 1, lambda number: (gc.collect(), number)[1])

gc.collect()
gc.freeze()  # so that a collection is quick
for number in range(5):
    conn = Store(sys.argv[1]).db.conn
    numbers = "WITH n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50) SELECT collect(i) FROM n"
    assert conn.execute(numbers).fetchall() == [(number,) for number in range(1, 51)]
    assert conn.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    cursor = Store(sys.argv[1]).db.conn.execute(numbers)
    assert len(cursor.fetchall()) == 50
    assert len(Store(sys.argv[1]).db.conn.execute(numbers).fetchall()) == 50
"""
    run(code, tmp_path / "daemon.db")


def test_asking_in_the_middle_of_a_statement_whether_the_db_is_closed(tmp_path: Path) -> None:
    """Were the connection closed then and there, the interpreter would crash."""
    code = """
import sqlite3, sys
from daemon_db import DB
from support import in_thread, insert_run, insertion

refused = []

def rows():
    for number in range(100):
        if number == 50:
            in_thread(db.close)
        try:
            db.conn
        except sqlite3.ProgrammingError:
            refused.append(number)
        yield (f"run-{number}",)

def work():
    insert_run(db.conn)
    insert = insertion(db.conn, "events", run_id="'run-1'", sequence="?", event_type="''")
    db.conn.executemany(insert, rows())

db = DB.open(sys.argv[1])
in_thread(work)
assert refused == list(range(50, 100)), refused
with DB.open(sys.argv[1]) as db:
    assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (100,)
"""
    run(code, tmp_path / "daemon.db")


# Signals


@pytest.mark.parametrize("read_only", [False, True])
def test_control_c_in_the_middle_of_opening_closes_the_connection(
    read_only: bool, no_collector: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a killed process's WAL is left as it was."""

    def interrupt(conn: sqlite3.Connection, _: str) -> None:
        conn.execute("SELECT count(*) FROM runs").fetchone()
        opened.append(conn)
        signal.raise_signal(signal.SIGINT)

    opened: list[sqlite3.Connection] = []
    make_killed(tmp_path / "daemon.db")
    (tmp_path / "daemon.db-shm").unlink()
    before, files = open_files(), files_in(tmp_path)
    monkeypatch.setattr(_schema, "missing", interrupt)
    with pytest.raises(KeyboardInterrupt):
        DB.open(tmp_path / "daemon.db", read_only=read_only)
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        opened[0].execute("SELECT 1")
    assert open_files() == before
    assert {name: data for name, data in files_in(tmp_path).items() if not name.endswith("-shm")} == files


def test_a_signal_at_any_moment_of_opening_and_closing_leaves_no_file_open(tmp_path: Path) -> None:
    code = """
import gc, random, signal, sys, time, warnings
from daemon_db import DB
from support import open_files

warnings.simplefilter("ignore")  # of a DB that is dropped, and of a connection that is dropped before it is set up
path, interrupted = sys.argv[1], int(sys.argv[2])
random = random.Random(1)

class Interrupt(Exception):
    pass

def interrupt(*_):
    raise Interrupt

def open_and_close():
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00001, longest))
    DB.open(path).close()
    while True:
        pass  # until the signal comes

signal.signal(signal.SIGALRM, interrupt)
DB.open(path).close()
started = time.perf_counter()
for _ in range(20):
    DB.open(path).close()
longest = (time.perf_counter() - started) / 20
gc.collect()
gc.disable()
before = open_files()
for number in range(interrupted):
    try:
        open_and_close()
    except Interrupt:
        pass
gc.collect()  # tracebacks
DB.open(path).close()
assert open_files() == before, open_files()
"""
    run(code, tmp_path / "daemon.db", rounds(300, 50_000))


def test_a_thread_ends_while_its_error_is_kept(tmp_path: Path) -> None:
    """The error's traceback keeps what it passed through; not the connections that the thread had, nor its turn."""
    file = tmp_path / "other.db"

    def work() -> None:
        block = db.transaction()
        blocks.append(block)
        block.__enter__()
        _ = other.conn

    blocks: list[object] = []
    errors: list[BaseException] = []
    with DB.open(tmp_path / "daemon.db", timeout=LIMIT) as db, DB.open(file) as other:
        insert_run(db.conn)
        before = open_files()
        file.rename(tmp_path / "moved.db")
        for _ in range(3):
            with pytest.raises(OpenError) as caught:
                in_thread(work)
            errors.append(caught.value)
            with db.transaction() as conn:  # would wait for the turn in vain
                append_event(conn)
        # While another connection of the process has locks on a file, SQLite keeps a descriptor to use again.
        assert len(open_files()) <= len(before) + 2
        assert len(errors) == 3


def test_what_on_connect_binds_to_the_connection_goes_with_its_thread(tmp_path: Path) -> None:
    def bind(conn: sqlite3.Connection) -> None:
        conn.create_function("changes", 0, lambda: conn.total_changes)

    def work() -> None:
        for _ in range(5):
            with DB.open(tmp_path / "daemon.db", on_connect=bind) as db:
                db.conn.execute("SELECT changes()").fetchone()

    before = open_files()
    in_thread(work)
    assert open_files() == before


@pytest.mark.parametrize("moment", ["sqlite3.connect", "sqlite3.connect/handle"])
def test_control_c_while_sqlite_opens_the_file_leaves_none_open(moment: str, tmp_path: Path) -> None:
    code = """
import gc, signal, sys, warnings
from daemon_db import DB
from support import open_files

warnings.simplefilter("ignore", ResourceWarning)  # Python's, from 3.13 on, when it frees the connection

def interrupt(event, _):
    if event == sys.argv[2] and before:
        signal.raise_signal(signal.SIGINT)

before = []
DB.open(sys.argv[1]).close()
sys.addaudithook(interrupt)
before = open_files()
try:
    DB.open(sys.argv[1])
    raise AssertionError
except KeyboardInterrupt:
    pass
gc.collect()
assert open_files() == before
"""
    run(code, tmp_path / "daemon.db", moment)


def test_a_thread_that_is_renamed_closes_its_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DB.open(tmp_path / "daemon.db"):
        monkeypatch.setattr(threading.current_thread(), "name", "renamed")
    assert list(files_in(tmp_path)) == ["daemon.db"]


def test_a_connection_whose_close_was_interrupted_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DB.open(tmp_path / "daemon.db") as db:
        conn = db.conn
        monkeypatch.setattr(_guard.Guard, "leave", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            conn.close()
        monkeypatch.undo()
        assert db.conn is not conn


def test_a_connection_that_is_closed_again_gives_no_turn_back(tmp_path: Path) -> None:
    with DB.open(tmp_path / "daemon.db", timeout=0) as db:
        closed = db.conn
        closed.close()
        with db.transaction():
            closed.close()
            with pytest.raises(sqlite3.OperationalError, match="locked") as caught:
                in_thread(lambda: db.transaction().__enter__())
            assert "for the transaction() of another thread" in caught.value.__notes__[0]
