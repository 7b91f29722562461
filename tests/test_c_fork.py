"""`fork()` in C code, which runs no hook of Python's (uWSGI's master, for one), with a `DB` open.

And a hook of another library that runs in the child before anything of ours could. Each test is a process of its own.
"""

import os
import textwrap
from pathlib import Path

import pytest

from support import rounds, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")

PROLOGUE = """
import ctypes, os, signal, sqlite3, sys, threading
from support import LIMIT, append_event, in_thread, insert_run, join, wait_for

path = sys.argv[1]

def refused(use, error, words):
    try:
        use()
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError("not refused")

def all_is_refused(db):
    refused(lambda: db.conn, sqlite3.ProgrammingError, "opened before a fork()")
    refused(lambda: db.transaction().__enter__(), sqlite3.ProgrammingError, "opened before a fork()")
    refused(lambda: db.snapshot().__enter__(), sqlite3.ProgrammingError, "opened before a fork()")
    refused(lambda: DB.open(db.path), OpenError, "opened before a fork()")
    refused(lambda: DB.open(db.path, read_only=True), OpenError, "opened before a fork()")

def in_child(function):
    "Call it in a child; that must end well."
    child = ctypes.PyDLL(None).fork()
    if not child:
        signal.alarm(LIMIT)  # the end of one that would hang
        try:
            function()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status

def check_whole(db, runs):
    assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (runs,)
    assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
"""

IMPORTS = "from daemon_db import DB, OpenError, _connection, _process\n"


def run_forking(code: str, path: Path, before_the_import: str = "") -> None:
    run(PROLOGUE + textwrap.dedent(before_the_import) + IMPORTS + textwrap.dedent(code), path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "daemon.db"


def test_the_child_is_refused_and_the_parent_loses_nothing(path: Path) -> None:
    run_forking(
        f"""
        def child():
            all_is_refused(db)
            with DB.open(path + "-other") as other, other.transaction() as conn:
                insert_run(conn, f"run-{{number}}")
            in_child(grandchild)
            db.close()
            db.close()
            refused(lambda: db.conn, sqlite3.ProgrammingError, "opened before a fork()")

        def grandchild():
            all_is_refused(db)
            db.close()

        with DB.open(path) as db:
            for number in range({rounds(3, 300)}):
                with db.transaction() as conn:
                    insert_run(conn, f"before-{{number}}")
                in_child(child)
                with db.transaction() as conn:
                    insert_run(conn, f"after-{{number}}")
                in_child(lambda: None)
                check_whole(db, 2 * number + 2)
        with DB.open(path) as db, DB.open(path + "-other") as other:
            check_whole(db, 2 * number + 2)
            check_whole(other, number + 1)
        """,
        path,
    )


def test_the_grandchild_may_not_open_what_the_child_has_open(path: Path) -> None:
    run_forking(
        """
        def child():
            with DB.open(path + "-other") as other:
                insert_run(other.conn, "run-1")
                in_child(lambda: (all_is_refused(db), all_is_refused(other)))
                insert_run(other.conn, "run-2")
                check_whole(other, 2)
            in_child(lambda: DB.open(path + "-other").close())

        with DB.open(path) as db:
            in_child(child)
        in_child(lambda: DB.open(path).close())
        """,
        path,
    )


def test_a_child_in_the_middle_of_the_parents_transaction(path: Path) -> None:
    """Neither at its block's end nor by closing, nor by anything else, the child ends what is the parent's."""
    run_forking(
        """
        def child():
            all_is_refused(db)
            db.close()
            conn.close()
            refused(lambda: block.__exit__(None, None, None), sqlite3.ProgrammingError, "opened before a fork()")

        with DB.open(path) as db:
            block = db.transaction()
            with block as conn:
                insert_run(conn, "run-1")
                in_child(child)
                insert_run(conn, "run-2")
            check_whole(db, 2)
            with db.snapshot():
                in_child(lambda: all_is_refused(db))
            check_whole(db, 2)
        """,
        path,
    )


def test_the_child_leaves_by_pythons_own_end(path: Path) -> None:
    run_forking(
        """
        with DB.open(path) as db:
            insert_run(db.conn, "run-1")
            child = ctypes.PyDLL(None).fork()
            if not child:
                signal.alarm(LIMIT)
                sys.exit()
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0, status
            insert_run(db.conn, "run-2")
            check_whole(db, 2)
        """,
        path,
    )


@pytest.mark.parametrize(
    "lock",
    ["_process.this_process().lock", "db._state.guard.mutex", "db._state.turn"],
    ids=["of the process", "of the guard", "the turn"],
)
def test_whatever_lock_another_thread_of_the_parent_has_the_child_does_not_hang(lock: str, path: Path) -> None:
    run_forking(
        f"""
        def hold():
            with {lock}:
                held.set()
                wait_for(forked)

        def child():
            all_is_refused(db)
            DB.open(path + "-other").close()
            db.close()

        with DB.open(path) as db:
            insert_run(db.conn, "run-1")
            held, forked = threading.Event(), threading.Event()
            thread = threading.Thread(target=hold, daemon=True)
            thread.start()
            wait_for(held)
            in_child(child)
            forked.set()
            join(thread)
            insert_run(db.conn, "run-2")
            check_whole(db, 2)
        """,
        path,
    )


@pytest.mark.parametrize("moment", ["sqlite3.connect", "sqlite3.connect/handle", "on_connect"])
@pytest.mark.parametrize("before", ["nothing", "the file"])
def test_a_fork_in_the_middle_of_another_threads_opening(before: str, moment: str, path: Path) -> None:
    """When SQLite is about to open the file, and has opened it (Python's audit events); and in `on_connect`."""
    run_forking(
        f"""
        def pause(event):
            if event == "{moment}" and threading.current_thread() is thread:
                paused.set()
                wait_for(forked)

        def open_and_close():
            DB.open(path, on_connect=lambda conn: pause("on_connect")).close()
            opened.append(True)

        def child():
            refused(lambda: DB.open(path), OpenError, "opened before a fork()")
            DB.open(path + "-other").close()

        if "{before}" == "the file":
            DB.open(path).close()
        opened, paused, forked = [], threading.Event(), threading.Event()
        thread = threading.Thread(target=open_and_close, daemon=True)
        sys.addaudithook(lambda event, arguments: pause(event))
        thread.start()
        wait_for(paused)
        in_child(child)
        forked.set()
        join(thread)
        assert opened
        in_child(lambda: DB.open(path).close())
        """,
        path,
    )


@pytest.mark.parametrize("use", ["refused, all of it", "open", "close"])
def test_a_hook_of_another_library_that_runs_first(use: str, path: Path) -> None:
    """It was registered before `daemon_db` was imported, and uses the `DB` in the child."""
    run_forking(
        f"""
        USES = {{
            "refused, all of it": lambda: all_is_refused(db),
            "open": lambda: DB.open(path + "-other").close(),
            "close": lambda: db.close(),
        }}
        use = USES["{use}"]
        with DB.open(path) as db:
            insert_run(db.conn, "run-1")
            child = os.fork()
            if not child:
                try:
                    all_is_refused(db)
                except BaseException as error:
                    results.append(error)
                os._exit(results != [None])
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0, status
            insert_run(db.conn, "run-2")
            check_whole(db, 2)
        """,
        path,
        """
        def hook():
            signal.alarm(LIMIT)
            try:
                results.append(use())
            except BaseException as error:
                sys.excepthook(*sys.exc_info())

        results = []
        os.register_at_fork(after_in_child=hook)
        """,
    )
