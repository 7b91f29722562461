"""The WAL stays bounded: readers that overlap can't make it grow for ever, and where one won't end, that is said."""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest

from daemon_db import DB, OpenError, _guard, _wal
from support import LIMIT, append_event, end, in_thread, insert_run, make_rollback, no_sync, rounds, spare, start

LOW = 1_000_000
"""The limit for these tests, in bytes: a WAL is beyond it after five of `grow`'s transactions."""


@pytest.fixture(autouse=True)
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is `LOW`, each commit is followed by a look, and the wait for readers is short: here they don't end."""
    monkeypatch.setattr(_wal, "LIMIT", LOW)
    monkeypatch.setattr("daemon_db.db.LOOK_EVERY", 0)
    monkeypatch.setattr(_wal, "PATIENCE", 0.02)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[DB]:
    """A database with two runs."""
    with DB.open(tmp_path / "daemon.db", timeout=LIMIT, on_connect=no_sync) as db:
        insert_run(db.conn)
        insert_run(db.conn, "run-2")
        yield db


def wal_size(db: DB) -> int:
    return os.stat(f"{db.path}-wal").st_size


def grow(db: DB, size: int = 200_000) -> int:
    """One transaction with so many bytes; the size of the WAL after it."""
    with db.transaction() as conn:
        conn.execute(f"UPDATE runs SET {spare('runs')} = hex(randomblob(?)) WHERE id = 'run-1'", (size // 2,))
    return wal_size(db)


def grow_until(db: DB, done: Callable[[int], bool]) -> list[int]:
    """The sizes, up to the one that is `done`."""
    sizes = [grow(db)]
    while not done(sizes[-1]):
        assert len(sizes) < 200, sizes
        sizes.append(grow(db))
    return sizes


def read_half(conn: sqlite3.Connection) -> sqlite3.Cursor:
    cursor = conn.execute("SELECT id FROM runs ORDER BY id")
    cursor.fetchone()
    return cursor


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    for record in caplog.records:
        assert (record.name, record.levelno) == ("daemon_db", logging.WARNING)
    return [record.getMessage() for record in caplog.records]


def test_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert _wal.LIMIT == 16 * 2**20
    assert f"may wait {_wal.PATIENCE} seconds for readers" in str(DB.transaction.__doc__)


def test_it_is_emptied_when_it_is_beyond_the_limit(db: DB, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        sizes = grow_until(db, lambda size: size == 0)
        assert len(sizes) > 3
        assert LOW / 2 < max(sizes) <= LOW
    assert warnings_in(caplog) == []


def test_readers_that_overlap_do_not_let_it_grow(db: DB, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any moment one of two is in the middle of a SELECT: SQLite alone would never begin the WAL anew."""
    monkeypatch.setattr(_wal, "PATIENCE", LIMIT)
    times = rounds(60, 3000)
    ended = threading.Event()
    turns = [threading.Semaphore(1), threading.Semaphore(0)]

    def read(number: int) -> None:
        cursor = None
        while not ended.is_set():
            assert turns[number].acquire(timeout=LIMIT)
            if cursor is not None:
                cursor.close()
            cursor = read_half(db.conn)
            turns[1 - number].release()  # which now ends what it reads, and reads anew
        turns[1 - number].release()

    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(read, number) for number in range(2)]
        try:
            sizes = [grow(db) for _ in range(times)]
        finally:
            ended.set()
        for future in reading:
            future.result(LIMIT)
    assert max(sizes) < 4 * LOW, sizes
    assert sizes.count(0) > times // 40, sizes


# A reader that doesn't end


@contextmanager
def in_another_thread(db: DB) -> Iterator[None]:
    cursors = []
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: cursors.append(read_half(db.conn))).result(LIMIT)
        yield
        pool.submit(cursors.clear).result(LIMIT)


@contextmanager
def in_this_thread(db: DB) -> Iterator[None]:
    cursor = read_half(db.conn)
    yield
    cursor.close()


@contextmanager
def in_another_process(db: DB) -> Iterator[None]:
    code = """
import sqlite3, sys
conn = sqlite3.connect(sys.argv[1])
cursor = conn.execute("SELECT id FROM runs ORDER BY id")
cursor.fetchone()
print("reading", flush=True)
sys.stdin.readline()
cursor.close()
conn.close()
"""
    process = start(code, db.path)
    try:
        assert process.stdout.readline() == "reading\n"
        yield
    finally:
        assert end(process) == ("", "")


@contextmanager
def by_a_transaction(db: DB) -> Iterator[None]:
    """One that only reads, in another connection of the thread's."""
    conn = sqlite3.connect(db.path, isolation_level=None)
    conn.execute("BEGIN")
    conn.execute("SELECT count(*) FROM runs").fetchone()
    yield
    conn.execute("COMMIT")
    conn.close()


readers = pytest.mark.parametrize("reading", [in_another_thread, in_this_thread, in_another_process, by_a_transaction])


@readers
def test_a_reader_that_does_not_end_is_warned_of_each_time_the_size_has_doubled(
    reading: Callable[[DB], AbstractContextManager[None]],
    db: DB,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []
    empty = _wal._empty
    monkeypatch.setattr(_wal, "_empty", lambda conn: (tried.append(wal_size(db)), empty(conn))[1])
    with reading(db):
        sizes = grow_until(db, lambda size: size > 6 * LOW)
        expected = [next(size for size in sizes if size > LOW)]
        while later := [size for size in sizes if size > 2 * expected[-1]]:
            expected.append(later[0])
        assert len(expected) >= 3
        assert tried == expected
        warned = [
            warning.partition(" MB and can't be emptied: a reader is in the way")[0] for warning in warnings_in(caplog)
        ]
        assert warned == [f"{db.path}: the WAL has {int(size / 1e6)}" for size in expected]
    caplog.clear()
    # When it has ended, SQLite begins the WAL anew, and gives the disk back: all is as before.
    grow_until(db, lambda size: size <= LOW)
    for _ in range(3):
        assert max(grow_until(db, lambda size: size == 0)) <= LOW
    assert LOW < tried[-1] < 2 * LOW
    assert warnings_in(caplog) == []


def test_commits_that_are_larger_than_the_limit(db: DB, caplog: pytest.LogCaptureFixture) -> None:
    """Each is followed by a checkpoint: the size at which it was tried the last time doesn't matter."""
    for _ in range(5):
        assert grow(db, 3 * LOW) == 0
    assert warnings_in(caplog) == []


def test_the_disk_is_given_back_when_the_reader_is_gone(
    db: DB, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limit that callers have."""
    monkeypatch.undo()
    monkeypatch.setattr("daemon_db.db.LOOK_EVERY", 0)
    with by_a_transaction(db):
        grow_until(db, lambda size: size > 20_000_000)
        assert len(warnings_in(caplog)) == 1
    for _ in range(4):  # far less than twice the size: the next attempt to empty it isn't due
        grow(db, 10)
    assert wal_size(db) <= _wal.LIMIT


# What callers set


def as_dict(cursor: sqlite3.Cursor, row: tuple[object, ...]) -> dict[str, object]:
    return {column[0]: value for column, value in zip(cursor.description, row, strict=True)}


def one_value(_: sqlite3.Cursor, row: tuple[object, ...]) -> object:
    return row[0]


@readers
def test_the_busy_timeout_is_what_it_was(
    reading: Callable[[DB], AbstractContextManager[None]], db: DB, caplog: pytest.LogCaptureFixture
) -> None:
    db.conn.execute("PRAGMA busy_timeout=777")
    with reading(db):
        grow_until(db, lambda size: size > LOW)
        assert len(warnings_in(caplog)) == 1
        assert db.conn.execute("PRAGMA busy_timeout").fetchone() == (777,)
    grow_until(db, lambda size: size == 0)
    assert db.conn.execute("PRAGMA busy_timeout").fetchone() == (777,)


@pytest.mark.parametrize("row_factory", [sqlite3.Row, as_dict, one_value])
def test_any_row_factory(row_factory: Callable[..., object], db: DB, caplog: pytest.LogCaptureFixture) -> None:
    db.conn.row_factory = row_factory
    grow_until(db, lambda size: size == 0)
    assert db.conn.row_factory is row_factory
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("pragma", ["wal_checkpoint", "busy_timeout", "journal_size_limit"])
def test_its_error_is_logged_and_the_commit_stands(pragma: str, db: DB, caplog: pytest.LogCaptureFixture) -> None:
    def deny(action: int, argument: str | None, *_: object) -> int:
        denied = action == sqlite3.SQLITE_PRAGMA and argument == pragma
        return sqlite3.SQLITE_DENY if denied else sqlite3.SQLITE_OK

    db.conn.execute("PRAGMA busy_timeout=777")
    db.conn.set_authorizer(deny)
    grow_until(db, lambda size: size > LOW)
    assert [message.partition("emptied: ")[2] for message in warnings_in(caplog)] == ["not authorized"]
    assert not db.conn.in_transaction
    if pragma != "busy_timeout":
        assert db.conn.execute("PRAGMA busy_timeout").fetchone() == (777,)
    in_thread(lambda: grow(db))  # the turn is free
    with db.transaction() as conn:
        append_event(conn)
    with DB.open(db.path) as other:
        assert other.conn.execute("SELECT count(*) FROM events").fetchone() == (1,)
        assert other.conn.execute(f"SELECT max(length({spare('runs')})) > 1000 FROM runs").fetchone() == (1,)


@pytest.mark.skipif(
    sqlite3.sqlite_version_info < (3, 40),
    reason="3.34 doesn't let a progress handler interrupt a checkpoint; 3.40 does",
)
def test_an_error_of_the_checkpoint_that_is_no_reader(db: DB, caplog: pytest.LogCaptureFixture) -> None:
    def interrupt_checkpoint(action: int, argument: str | None, *_: object) -> int:
        is_interrupted.append(action == sqlite3.SQLITE_PRAGMA and argument == "wal_checkpoint")
        return sqlite3.SQLITE_OK

    is_interrupted = [False]
    db.conn.set_authorizer(interrupt_checkpoint)
    db.conn.set_progress_handler(lambda: is_interrupted[-1], 1)
    grow_until(db, lambda size: size > LOW)
    assert [message.partition("emptied: ")[2] for message in warnings_in(caplog)] == ["interrupted"]


def test_a_logging_handler_may_write_to_the_database(db: DB, monkeypatch: pytest.MonkeyPatch) -> None:
    """And holds up no other thread."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with db.transaction() as conn:
                append_event(conn)
            in_thread(lambda: grow(db))

    logger = logging.getLogger("daemon_db")
    monkeypatch.setattr(logger, "handlers", [Handler()])
    with in_another_thread(db):
        grow_until(db, lambda size: size > LOW)
    assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (1,)


# By the clock


def test_it_is_not_looked_at_after_each_of_many_commits(db: DB, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("daemon_db.db.LOOK_EVERY", _guard.LOOK_EVERY)
    monkeypatch.setattr("daemon_db.db.now", lambda: clock[0])
    db._next_look = 0.0  # by the clock of before
    for _ in range(10):
        grow(db)
    assert wal_size(db) > LOW
    clock[0] += _guard.LOOK_EVERY
    with db.transaction():
        pass
    assert wal_size(db) == 0


@contextmanager
def stopped_by_hand() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("time", "monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: 1.0)
            monkeypatch.setattr(time, f"{name}_ns", lambda: 10**9)
        yield


@pytest.fixture(params=["by hand", "freezegun"])
def stopped_clock(request: pytest.FixtureRequest) -> AbstractContextManager[None]:
    """A clock that callers' tests have stopped: waits and looks go on."""
    if request.param == "by hand":
        return stopped_by_hand()
    freezer: AbstractContextManager[None] = pytest.importorskip("freezegun").freeze_time("2026-01-01")
    return freezer


def test_a_stopped_clock_and_the_wait_for_readers(
    stopped_clock: AbstractContextManager[None], db: DB, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        with by_a_transaction(db):
            grow_until(db, lambda size: size > LOW)

    with stopped_clock:
        in_thread(work)
    assert len(warnings_in(caplog)) == 1


def test_a_stopped_clock_and_the_wait_for_wal_mode(stopped_clock: AbstractContextManager[None], tmp_path: Path) -> None:
    file = tmp_path / "daemon.db"
    make_rollback(file)
    with closing(sqlite3.connect(file, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with stopped_clock, pytest.raises(OpenError, match="locked for more than"):
            in_thread(lambda: DB.open(file, timeout=0.05))


def test_a_stopped_clock_and_the_look(
    stopped_clock: AbstractContextManager[None], db: DB, monkeypatch: pytest.MonkeyPatch
) -> None:
    def transact() -> None:
        while not given_up.is_set():
            with db.transaction():
                pass

    given_up = threading.Event()
    monkeypatch.setattr("daemon_db.db.LOOK_EVERY", _guard.LOOK_EVERY)
    with stopped_clock:
        with db.transaction():
            pass
        os.remove(f"{db.path}-wal")
        try:
            with pytest.raises(OpenError, match="-shm was removed or replaced"):
                in_thread(transact)
        finally:
            given_up.set()
