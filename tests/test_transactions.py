"""`DB.transaction`: committed as a whole or not at all, and never left open.

`DAEMON_DB_LONG=1` in the environment makes it go on for longer (see `support`).
"""

import gc
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daemon_db import DB
from support import append_event, insert_run, rounds, run, start


@pytest.fixture
def db(tmp_path: Path) -> Iterator[DB]:
    with DB.open(tmp_path / "daemon.db", timeout=0.2) as db:
        yield db


def runs(db: DB) -> list[str]:
    return [run_id for (run_id,) in db.conn.execute("SELECT id FROM runs ORDER BY id")]


def check_that_the_next_one_works(db: DB) -> None:
    """In this thread and in another, to which the turn must have been given back."""
    assert not db.conn.in_transaction

    def insert(run_id: str) -> None:
        with db.transaction() as conn:
            insert_run(conn, run_id)

    insert("next-1")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(insert, "next-2").result()
    assert runs(db)[:2] == ["next-1", "next-2"]


def test_the_end_of_the_block_commits(db: DB) -> None:
    with db.transaction() as conn:
        assert conn is db.conn
        assert conn.in_transaction
        insert_run(conn)
    with DB.open(db.path) as other:
        assert runs(other) == ["run-1"]


def test_it_holds_the_write_lock_from_its_beginning(db: DB) -> None:
    with db.transaction(), DB.open(db.path, timeout=0) as other:
        with pytest.raises(sqlite3.OperationalError, match="database is locked"):
            insert_run(other.conn)


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_rolls_back_and_goes_on(error: BaseException, db: DB) -> None:
    with pytest.raises(type(error)) as raised, db.transaction() as conn:
        insert_run(conn)
        raise error
    assert raised.value is error
    assert [entry.name for entry in raised.traceback] == ["test_an_exception_rolls_back_and_goes_on"]
    assert runs(db) == []
    check_that_the_next_one_works(db)


def test_a_stop_iteration_is_not_the_generators(db: DB) -> None:
    with pytest.raises(StopIteration), db.transaction() as conn:
        insert_run(conn)
        next(iter(()))
    assert runs(db) == []
    check_that_the_next_one_works(db)


def test_a_transaction_is_for_one_with_statement(db: DB) -> None:
    transaction = db.transaction()
    with transaction:
        pass
    with pytest.raises(RuntimeError, match="has been used"), transaction:
        pass


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3 has no other transaction control")
def test_rolling_back_does_not_depend_on_sqlite3s_transaction_control(tmp_path: Path) -> None:
    def autocommit(conn: sqlite3.Connection) -> None:
        conn.autocommit = True  # in which conn.rollback() does nothing

    with DB.open(tmp_path / "daemon.db", on_connect=autocommit) as db:
        with pytest.raises(ValueError), db.transaction() as conn:
            insert_run(conn)
            raise ValueError
        check_that_the_next_one_works(db)


def test_an_error_of_a_statement_rolls_back(db: DB) -> None:
    with pytest.raises(sqlite3.IntegrityError), db.transaction() as conn:
        insert_run(conn)
        insert_run(conn)
    assert runs(db) == []
    check_that_the_next_one_works(db)


def test_an_error_of_commit_rolls_back(db: DB) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"), db.transaction() as conn:
        insert_run(conn)
        conn.execute("PRAGMA defer_foreign_keys=ON")
        append_event(conn, "no such run")
    assert runs(db) == []
    check_that_the_next_one_works(db)


def test_sqlite_rolling_back_by_itself_is_no_commit(db: DB) -> None:
    with pytest.raises(sqlite3.OperationalError, match="no transaction is active"), db.transaction() as conn:
        insert_run(conn)
        with pytest.raises(sqlite3.IntegrityError):
            conn.execute("INSERT OR ROLLBACK INTO runs SELECT * FROM runs")
        assert not conn.in_transaction
    assert runs(db) == []
    check_that_the_next_one_works(db)


def test_when_rollback_fails_too_the_first_error_is_seen_and_the_connection_is_replaced(db: DB) -> None:
    def deny(action: int, argument: str | None, *_: object) -> int:
        denied = action == sqlite3.SQLITE_TRANSACTION and argument == "ROLLBACK"
        return sqlite3.SQLITE_DENY if denied else sqlite3.SQLITE_OK

    with pytest.raises(ValueError, match="first") as raised, db.transaction() as conn:
        insert_run(conn)
        conn.set_authorizer(deny)
        raise ValueError("first")
    assert "not authorized" in raised.value.__notes__[0]
    assert db.conn is not conn
    assert runs(db) == []
    check_that_the_next_one_works(db)


def test_a_block_that_closes_the_db_commits_nothing(db: DB) -> None:
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"), db.transaction() as conn:
        insert_run(conn)
        db.close()
    with DB.open(db.path) as db:
        assert runs(db) == []


def test_a_generator_dropped_in_the_middle_rolls_back(db: DB) -> None:
    def insert() -> Iterator[None]:
        with db.transaction() as conn:
            insert_run(conn)
            yield

    generator = insert()
    next(generator)
    assert db.conn.in_transaction
    del generator
    gc.collect()
    assert runs(db) == []
    check_that_the_next_one_works(db)


def test_one_within_another_is_refused_at_once_and_leaves_that_one_alone(db: DB) -> None:
    with db.transaction() as conn:
        insert_run(conn)
        with pytest.raises(sqlite3.OperationalError, match="cannot start a transaction within a transaction"):
            with db.transaction():
                pass
        insert_run(conn, "run-2")
    assert runs(db) == ["run-1", "run-2"]
    check_that_the_next_one_works(db)


def test_one_within_a_begin_by_hand_is_refused_and_leaves_that_alone(db: DB) -> None:
    db.conn.execute("BEGIN")
    insert_run(db.conn)
    with pytest.raises(sqlite3.OperationalError, match="cannot start a transaction within a transaction"):
        with db.transaction():
            pass
    db.conn.execute("COMMIT")
    assert runs(db) == ["run-1"]


def check_locked(db: DB) -> None:
    before = time.monotonic()
    with pytest.raises(sqlite3.OperationalError, match="^database is locked$") as raised, db.transaction():
        pass
    assert time.monotonic() - before >= 0.19
    assert raised.value.sqlite_errorcode == sqlite3.SQLITE_BUSY
    assert raised.value.sqlite_errorname == "SQLITE_BUSY"


def test_the_wait_for_another_thread_ends_after_timeout(db: DB) -> None:
    with ThreadPoolExecutor(1) as pool:
        with db.transaction():
            pool.submit(check_locked, db).result()
        pool.submit(check_that_the_next_one_works, db).result()


def test_the_wait_for_another_process_ends_after_timeout(db: DB) -> None:
    other = sqlite3.connect(db.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    check_locked(db)
    other.execute("COMMIT")
    other.close()
    check_that_the_next_one_works(db)


def test_threads_wait_for_their_turn_and_not_for_sqlites_lock(tmp_path: Path) -> None:
    def busy_at_once(conn: sqlite3.Connection) -> None:
        conn.execute("PRAGMA busy_timeout=0")

    order = []
    started = threading.Event()

    def insert() -> None:
        _ = db.conn
        started.set()
        with db.transaction() as conn:
            order.append("second")
            insert_run(conn, "run-2")

    path = tmp_path / "daemon.db"
    with DB.open(path, timeout=60, on_connect=busy_at_once) as db, ThreadPoolExecutor(1) as pool:
        with db.transaction() as conn:
            future = pool.submit(insert)
            started.wait()
            insert_run(conn)
            order.append("first")
        future.result()
        assert order == ["first", "second"]
        assert runs(db) == ["run-1", "run-2"]


INTERRUPTED = """
import os, random, signal, sys, threading
from support import append_event, insert_run
from daemon_db import DB

path, rounds, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random = random.Random(seed)

def interrupt(*_):
    raise KeyboardInterrupt

def work():
    while not stop.is_set():
        with db.transaction() as conn:
            append_event(conn)
        stop.wait(0.0005)

def append_until_interrupted():
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00001, 0.0004))
    while True:
        with db.transaction() as conn:
            append_event(conn)

signal.signal(signal.SIGALRM, interrupt)
stop = threading.Event()
with DB.open(path, on_connect=lambda conn: conn.execute("PRAGMA synchronous=OFF")) as db:
    insert_run(db.conn)
    other = threading.Thread(target=work)
    other.start()
    for number in range(rounds):
        try:
            append_until_interrupted()
        except KeyboardInterrupt:
            pass
        assert not db.conn.in_transaction, number
        with db.transaction():  # would wait for the other thread in vain, if that waited for this one
            pass
    stop.set()
    other.join()
    sequences = [sequence for (sequence,) in db.conn.execute("SELECT sequence FROM events ORDER BY sequence")]
    assert sequences == list(range(1, len(sequences) + 1))
"""


def test_a_signal_at_any_moment_leaves_no_transaction_open(tmp_path: Path) -> None:
    run(INTERRUPTED, tmp_path / "daemon.db", rounds(4000, 100_000), 1)


def test_control_c_in_the_middle(tmp_path: Path) -> None:
    code = """
import signal, sys
from support import insert_run
from daemon_db import DB
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background processes don't have
with DB.open(sys.argv[1]) as db:
    try:
        with db.transaction() as conn:
            insert_run(conn)
            print("ready", flush=True)
            sys.stdin.read()
    except KeyboardInterrupt:
        with db.transaction() as conn:
            insert_run(conn, "after")
"""
    process = start(code, tmp_path / "daemon.db")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert (process.returncode, output, errors) == (0, "", "")
    with DB.open(tmp_path / "daemon.db") as db:
        assert runs(db) == ["after"]
