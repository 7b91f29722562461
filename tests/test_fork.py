"""`fork()` with a `DB` open. Each test is a process of its own, which forks."""

import textwrap
from pathlib import Path

import pytest

from support import run

PROLOGUE = """
import gc, os, sqlite3, sys, threading, warnings
from support import append_event, insert_run
from daemon_db import DB, OpenError

warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
path, leave = sys.argv[1], {"sys.exit": sys.exit, "os._exit": os._exit}[sys.argv[2]]

def refused(use, error, words):
    try:
        use()
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError("not refused")

def wait_for(child):
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status

def fill(conn):
    "So much that uncommitted pages are in the WAL already."
    conn.execute("PRAGMA cache_size=10")
    conn.executemany("INSERT INTO events (run_id, sequence, event_type, payload_json) VALUES ('run-1', ?, 'x', ?)",
        ((number, "y" * 2000) for number in range(1000)))
"""


@pytest.fixture(params=["sys.exit", "os._exit"])
def leave(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run_forking(code: str, path: Path, leave: str) -> None:
    run(PROLOGUE + textwrap.dedent(code), path, leave)


def test_the_child_is_refused_and_the_parent_goes_on(leave: str, tmp_path: Path) -> None:
    run_forking(
        """
        with DB.open(path) as db:
            insert_run(db.conn)
            if not (child := os.fork()):
                refused(lambda: db.conn, sqlite3.ProgrammingError, "open a new DB in the child")
                refused(lambda: db.transaction().__enter__(), sqlite3.ProgrammingError, "fork()")
                db.close()
                db.close()
                leave(0)
            wait_for(child)
            with db.transaction() as conn:
                append_event(conn)
            assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        """,
        tmp_path / "daemon.db",
        leave,
    )
    assert [name.name for name in tmp_path.iterdir()] == ["daemon.db"]


def test_a_child_can_not_commit_the_parents_transaction(leave: str, tmp_path: Path) -> None:
    run_forking(
        """
        with DB.open(path) as db:
            insert_run(db.conn)
            try:
                with db.transaction() as conn:
                    append_event(conn)
                    child = os.fork()
            except sqlite3.ProgrammingError as error:
                assert "fork()" in str(error) and not child, error
                leave(0)
            assert child
            wait_for(child)
            assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (1,)
        """,
        tmp_path / "daemon.db",
        leave,
    )


@pytest.mark.parametrize("dropped", ["kept", "dropped"])
def test_a_transaction_of_the_forking_thread_survives_the_child(dropped: str, leave: str, tmp_path: Path) -> None:
    """Were the child to free the connection, it would roll back in the memory that it shares with the parent."""
    run_forking(
        f"""
        db = DB.open(path)
        insert_run(db.conn)
        with db.transaction() as conn:
            fill(conn)
            if not (child := os.fork()):
                if "{dropped}" == "dropped":
                    del db, conn
                    gc.collect()
                leave(0)
            wait_for(child)
            assert conn.execute("SELECT count(*), sum(length(payload_json)) FROM events").fetchone() == (1000, 2000000)
        assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (1000,)
        db.close()
        """,
        tmp_path / "daemon.db",
        leave,
    )


def test_a_transaction_of_another_thread_survives_the_child(leave: str, tmp_path: Path) -> None:
    run_forking(
        """
        filled, forked = threading.Event(), threading.Event()

        def work():
            with db.transaction() as conn:
                fill(conn)
                filled.set()
                forked.wait()
            assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (1000,)
            worked.append(True)

        worked = []
        with DB.open(path) as db:
            insert_run(db.conn)
            thread = threading.Thread(target=work)
            thread.start()
            filled.wait()
            if not (child := os.fork()):
                gc.collect()
                leave(0)
            wait_for(child)
            forked.set()
            thread.join()
            assert worked
        """,
        tmp_path / "daemon.db",
        leave,
    )


def test_the_child_may_not_open_the_same_file_while_the_parent_has_it_open(leave: str, tmp_path: Path) -> None:
    """It would get no locks on it: the parent's close would remove the WAL, with what the child commits after it."""
    run_forking(
        """
        os.symlink(path, path + "-link")
        with DB.open(path) as db:
            if not (child := os.fork()):
                for name in (path, path + "-link"):
                    refused(lambda: DB.open(name), OpenError, "forked while its parent had the file open")
                if not (grandchild := os.fork()):
                    refused(lambda: DB.open(path), OpenError, "forked while its parent had the file open")
                    leave(0)
                wait_for(grandchild)
                with DB.open(path + "-other") as other:
                    insert_run(other.conn)
                leave(0)
            wait_for(child)
            insert_run(db.conn)
        """,
        tmp_path / "daemon.db",
        leave,
    )


def test_the_child_may_open_what_the_parent_has_closed(leave: str, tmp_path: Path) -> None:
    run_forking(
        """
        with DB.open(path) as db:
            insert_run(db.conn)
        if not (child := os.fork()):
            with DB.open(path) as db:
                append_event(db.conn)
            leave(0)
        wait_for(child)
        with DB.open(path) as db:
            assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (1,)
        """,
        tmp_path / "daemon.db",
        leave,
    )


def test_a_memory_database_is_refused_to_the_child_too(leave: str, tmp_path: Path) -> None:
    run_forking(
        """
        with DB.open(":memory:") as db:
            insert_run(db.conn)
            if not (child := os.fork()):
                refused(lambda: db.conn, sqlite3.ProgrammingError, "open a new DB in the child")
                with DB.open(":memory:") as other:
                    assert other.conn.execute("SELECT count(*) FROM runs").fetchone() == (0,)
                leave(0)
            wait_for(child)
            assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (1,)
        """,
        tmp_path / "daemon.db",
        leave,
    )
