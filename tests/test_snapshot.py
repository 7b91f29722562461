"""`snapshot()`: reads as of one moment, no write, and autocommit mode afterwards, whatever happens."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon_db import DB, OpenError
from support import in_thread, insert_run, make_rollback, make_wal, rounds, run


@pytest.fixture(params=["file", "memory", "read_only"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DB]:
    if request.param == "memory":
        with DB.open(":memory:") as db:
            insert_run(db.conn)
            yield db
    else:
        make_wal(tmp_path / "db")
        with DB.open(tmp_path / "db", read_only=request.param == "read_only") as db:
            yield db


def count(conn: sqlite3.Connection) -> int:
    return int(conn.execute("SELECT count(*) FROM runs").fetchone()[0])


def is_as_before(db: DB) -> None:
    """The thread is in autocommit mode, and may write if it might before."""
    assert not db.conn.in_transaction
    if db._state.file.read_only:
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            db.conn.execute("DELETE FROM units")
    else:
        with db.transaction() as conn:
            conn.execute("DELETE FROM units")


@pytest.mark.parametrize("read_only", [False, True])
def test_it_sees_one_moment(read_only: bool, tmp_path: Path) -> None:
    """From the block's beginning, not from the first SELECT in it."""
    with DB.open(tmp_path / "db") as db, DB.open(tmp_path / "db", read_only=read_only) as reader:
        with reader.snapshot() as conn:
            assert conn is reader.conn
            for run_id in ("run-1", "run-2"):
                insert_run(db.conn, run_id)
                assert count(conn) == 0
        assert count(reader.conn) == 2


def test_no_write_in_it(db: DB) -> None:
    with db.snapshot() as conn:
        with pytest.raises(sqlite3.OperationalError, match="readonly database"):
            insert_run(conn, "run-2")
        assert count(conn) == 1
    assert count(db.conn) == 1
    is_as_before(db)


@pytest.mark.parametrize("query_only", [0, 1])
def test_query_only_is_put_back_as_it_was(query_only: int, tmp_path: Path) -> None:
    with DB.open(tmp_path / "db", on_connect=lambda conn: conn.execute(f"PRAGMA query_only={query_only}")) as db:
        with db.snapshot():
            pass
        assert db.conn.execute("PRAGMA query_only").fetchone() == (query_only,)


@pytest.mark.parametrize("row_factory", [sqlite3.Row, lambda *_: 1])
def test_any_row_factory(row_factory: object, tmp_path: Path) -> None:
    def on_connect(conn: sqlite3.Connection) -> None:
        conn.row_factory = row_factory  # type: ignore[assignment]

    with DB.open(tmp_path / "db", on_connect=on_connect) as db:
        with db.snapshot():
            pass
        insert_run(db.conn)


@pytest.mark.parametrize("removed", ["db", "db-wal", "db-shm"])
def test_nothing_is_read_of_what_was_removed(removed: str, tmp_path: Path) -> None:
    with DB.open(tmp_path / "db") as db:
        insert_run(db.conn)
        (tmp_path / removed).unlink()
        with pytest.raises(OpenError, match=r"removed(,| or) replaced"), db.snapshot():
            raise AssertionError


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, sqlite3.OperationalError])
def test_an_exception_goes_on(error: type[BaseException], db: DB) -> None:
    raised = error("mine")
    with pytest.raises(error) as caught, db.snapshot():
        raise raised
    assert caught.value is raised
    is_as_before(db)


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "COMMIT; BEGIN", "END; PRAGMA query_only=OFF"])
def test_what_the_block_does_by_hand(statement: str, db: DB) -> None:
    with db.snapshot() as conn:
        for each in statement.split(";"):
            conn.execute(each)
    is_as_before(db)


def test_a_select_that_is_half_read(db: DB) -> None:
    """It goes on, as outside of a block, and is of the same moment."""
    with db.snapshot() as conn:
        cursor = conn.execute("SELECT 1 FROM runs UNION ALL SELECT 2 FROM runs")
        assert cursor.fetchone() == (1,)
    assert not db.conn.in_transaction
    assert cursor.fetchall() == [(2,)]
    is_as_before(db)


def count_in_snapshot(db: DB) -> int:
    with db.snapshot() as conn:
        return count(conn)


def test_other_threads_write_and_read_meanwhile(tmp_path: Path) -> None:
    with DB.open(tmp_path / "db", timeout=0) as db, db.snapshot() as conn:
        in_thread(lambda: insert_run(db.conn))
        assert count(conn) == 0
        assert in_thread(lambda: count_in_snapshot(db)) == 1


def test_a_file_that_cannot_be_read_yet(tmp_path: Path) -> None:
    """In rollback-journal mode, a reader waits for another program's commit."""
    make_rollback(tmp_path / "db")
    with (
        DB.open(tmp_path / "db", timeout=0.1, read_only=True) as db,
        contextlib.closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as other,
    ):
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError, match="^database is locked$"), db.snapshot():
            raise AssertionError
        other.execute("COMMIT")
        is_as_before(db)
        assert count_in_snapshot(db) == 1


def test_of_a_closed_db(tmp_path: Path) -> None:
    db = DB.open(tmp_path / "db")
    with db.snapshot():
        in_thread(db.close)
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"), db.snapshot():
        raise AssertionError


def test_a_generator_that_another_thread_closes(tmp_path: Path) -> None:
    """The thread whose snapshot it was gets a new connection."""
    with DB.open(tmp_path / "db") as db:

        def reads() -> Iterator[int]:
            with db.snapshot() as conn:
                yield count(conn)

        generator = reads()
        assert next(generator) == 0
        in_thread(generator.close)
        insert_run(db.conn)
        is_as_before(db)


SIGNALLED = """
import random, signal, sys, time
from daemon_db import DB


class Signal(Exception):
    pass


def handle(*_):
    if is_armed:  # on Python 3.11 a handler may be run late, if the signal comes while a thread takes the GIL
        raise Signal


signal.signal(signal.SIGALRM, handle)
db = DB.open(sys.argv[1])
struck, is_armed = 0, False
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    try:
        try:
            is_armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 120e-6))
            with db.snapshot():
                pass
        finally:
            is_armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Signal:
        struck += 1
    conn = db.conn
    assert not conn.in_transaction
    assert conn.execute("PRAGMA query_only").fetchone() == (0,)
print(struck)
"""


def test_a_signal_at_any_moment(tmp_path: Path) -> None:
    assert int(run(SIGNALLED, tmp_path / "db", rounds(1, 60))) > 100
