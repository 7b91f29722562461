"""`on_connect`: called with each new connection, last; and what becomes of the connection when it raises."""

import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daemon_db import DB
from support import LIMIT, insert_run, open_files

SHARED = pytest.mark.skipif(sqlite3.sqlite_version_info < (3, 36), reason="shares no database in memory")


@pytest.mark.parametrize("error", [ValueError("no"), sqlite3.OperationalError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("path", ["db", ":memory:"])
def test_its_error_goes_on_and_the_connection_is_closed(
    path: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    connections = []

    def fail(conn: sqlite3.Connection) -> None:
        connections.append(conn)
        raise error

    before = open_files()
    with pytest.raises(type(error)) as caught:
        DB.open(path, on_connect=fail)
    assert caught.value is error
    assert open_files() == before
    with pytest.raises(sqlite3.ProgrammingError, match="Cannot operate on a closed database"):
        connections[0].execute("SELECT 1")


@pytest.mark.parametrize("path", ["db", pytest.param(":memory:", marks=SHARED)])
def test_of_a_later_thread(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread can ask again, and the other threads' connections stay."""
    monkeypatch.chdir(tmp_path)
    connections = []

    def fail_ten_times(conn: sqlite3.Connection) -> None:
        connections.append(conn)
        if 2 <= len(connections) <= 11:
            raise ValueError(len(connections))

    def ask() -> None:
        opened = []
        for number in range(2, 12):
            with pytest.raises(ValueError, match=f"^{number}$"):
                _ = db.conn
            with pytest.raises(sqlite3.ProgrammingError, match="Cannot operate on a closed database"):
                connections[-1].execute("SELECT 1")
            opened.append(open_files())
        # While another connection of the process has locks on a file, SQLite keeps a descriptor to use again.
        assert opened == [opened[0]] * 10
        assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (1,)

    with DB.open(path, on_connect=fail_ten_times) as db, ThreadPoolExecutor(1) as pool:
        insert_run(db.conn)
        pool.submit(ask).result(LIMIT)
        assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (1,)
    assert len(connections) == 12


def begin(conn: sqlite3.Connection) -> None:
    conn.execute("BEGIN")


def leave_it_to_sqlite3(conn: sqlite3.Connection) -> None:
    """It begins a transaction before an INSERT, which nobody commits."""
    conn.isolation_level = "DEFERRED"


@pytest.mark.parametrize("on_connect", [begin, leave_it_to_sqlite3])
def test_another_transaction_control_is_refused(
    on_connect: Callable[[sqlite3.Connection], None], tmp_path: Path
) -> None:
    before = open_files()
    with pytest.raises(sqlite3.ProgrammingError, match="on_connect must leave the connection in autocommit mode"):
        DB.open(tmp_path / "db", on_connect=on_connect)
    assert open_files() == before
