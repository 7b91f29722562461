"""A `transaction()` that began in one thread and ends in another, as a framework's dependency with `yield` does.

The other thread can't end it. The turn comes back when the first thread next uses the `DB`, or ends.
"""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from daemon_db import DB
from support import LIMIT, in_thread, insert_run, runs


@pytest.fixture
def db(tmp_path: Path) -> Iterator[DB]:
    with DB.open(tmp_path / "daemon.db", timeout=0) as db:
        yield db


@pytest.fixture
def first() -> Iterator[ThreadPoolExecutor]:
    """The thread in which the transaction begins."""
    with ThreadPoolExecutor(1, thread_name_prefix="first") as pool:
        yield pool


def write(db: DB, name: str) -> None:
    with db.transaction() as conn:
        insert_run(conn, name)


def check_that_all_can_write(db: DB, *threads: ThreadPoolExecutor) -> None:
    for number in range(2):
        write(db, f"here-{number}")
        in_thread(lambda number=number: write(db, f"there-{number}"))  # type: ignore[misc]
        for thread in threads:
            thread.submit(write, db, f"first-{number}").result(LIMIT)


def check_that_all_must_wait(db: DB) -> None:
    """For their turn, and they are told for whom."""
    with pytest.raises(sqlite3.OperationalError, match="database is locked") as caught:
        in_thread(lambda: write(db, "never"))
    (note,) = caught.value.__notes__
    assert "another thread" in note
    assert db._writer in note


def as_it_is(_: sqlite3.Connection) -> None:
    """The block's transaction is still open when it ends."""


# How the block is ended


def end(block: AbstractContextManager[None]) -> None:
    block.__exit__(None, None, None)


def fail(block: AbstractContextManager[None]) -> None:
    error = ZeroDivisionError("a request that fails")
    if not block.__exit__(type(error), error, None):
        raise error


def close(block: AbstractContextManager[None]) -> None:
    block.gen.close()  # type: ignore[attr-defined]


class Left:
    """A block that has begun in the first thread."""

    def __init__(
        self, db: DB, first: ThreadPoolExecutor, before: Callable[[sqlite3.Connection], None] = as_it_is
    ) -> None:
        self._db, self._before = db, before
        self._seen: list[BaseException] = []
        self._block = contextmanager(self._dependency)()
        first.submit(self._block.__enter__).result(LIMIT)

    def _dependency(self) -> Iterator[None]:
        try:
            with self._db.transaction() as conn:
                insert_run(conn, "left")
                self._before(conn)
                yield
        except BaseException as error:
            self._seen.append(error)
            raise

    def leave(self, how: Callable[[AbstractContextManager[None]], None]) -> BaseException:
        """End it in this thread; the error that is seen where it ends. (`close()` of a generator passes none on.)"""
        try:
            how(self._block)
        except Exception as error:
            assert error is self._seen[0]
        (error,) = self._seen
        return error


WAYS = {end: sqlite3.ProgrammingError, fail: ZeroDivisionError, close: GeneratorExit}


@pytest.mark.parametrize("then", ["writes", "asks for its connection", "reads a snapshot", "ends"])
@pytest.mark.parametrize("before", [as_it_is, sqlite3.Connection.commit, sqlite3.Connection.rollback])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_an_error_there_and_the_turn_comes_back(
    way: Callable[..., None],
    before: Callable[[sqlite3.Connection], None],
    then: str,
    db: DB,
    first: ThreadPoolExecutor,
) -> None:
    def end_there() -> BaseException:
        threading.current_thread().name = "second"
        return left.leave(way)

    def use() -> None:
        if then == "writes":
            write(db, "first")
        elif then == "reads a snapshot":
            with db.snapshot() as conn:
                assert not conn.execute("SELECT 1 FROM runs WHERE id LIKE 'here-%'").fetchall()
        elif then == "asks for its connection":
            assert not db.conn.in_transaction

    left = Left(db, first, before)
    error = in_thread(end_there)
    assert type(error) is WAYS[way]
    assert ["first_0" in note and "second" in note for note in error.__notes__] == [True]
    assert db._writer.startswith("first_0")
    check_that_all_must_wait(db)
    with pytest.raises(sqlite3.OperationalError, match="database is locked"):
        write(db, "never")
    if then == "ends":
        first.shutdown()
        check_that_all_can_write(db)
    else:
        first.submit(use).result(LIMIT)
        check_that_all_can_write(db, first)
    assert ("left" in runs(db)) == (before is sqlite3.Connection.commit)
    assert "never" not in runs(db)


def close_connection(db: DB) -> None:
    """The thread goes on with another one."""
    db.conn.close()
    assert not db.conn.in_transaction


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("then", ["uses the DB", "ends", "uses the DB, and ends"])
def test_it_takes_no_turn_from_the_thread_in_which_it_ends(
    then: str, way: Callable[..., None], db: DB, first: ThreadPoolExecutor
) -> None:
    """By then the first one has given its own back, or has ended."""
    left = Left(db, first)
    if "uses" in then:
        first.submit(close_connection, db).result(LIMIT)
    if "ends" in then:
        first.shutdown()
    with db.transaction() as conn:
        insert_run(conn, "here")
        left.leave(way)
        check_that_all_must_wait(db)
        assert conn.in_transaction
    assert runs(db) == {"here"}
    check_that_all_can_write(db)


@pytest.mark.parametrize("way", WAYS)
def test_a_thread_with_the_number_of_the_first_one_is_another_thread(way: Callable[..., None], db: DB) -> None:
    """CPython gives the number of a thread that has ended to the next one."""

    def use() -> bool:
        if threading.get_ident() not in numbers:
            return False
        with db.transaction() as conn:
            insert_run(conn, "here")
            numbers[threading.get_ident()].leave(way)
            check_that_all_must_wait(db)
        return True

    numbers = {}
    for _ in range(20):
        with ThreadPoolExecutor(1) as first:
            numbers[first.submit(threading.get_ident).result(LIMIT)] = Left(db, first)
    if not any(in_thread(use) for _ in range(20)):
        pytest.skip("no number was given again")
    assert runs(db) == {"here"}
    check_that_all_can_write(db)
