"""`fork()` with a `DB` open, Python's and C's. Each test is a process of its own, which forks.

`DAEMON_DB_LONG=1` in the environment makes it go on for longer (see `support`).
"""

import textwrap
from pathlib import Path

import pytest

from support import files_in, rounds, run, something_is_forbidden

PROLOGUE = """
import ctypes, gc, os, signal, sqlite3, sys, threading, warnings
from support import (
    LIMIT, append_event, in_thread, insert_run, insertion, join, no_sync, open_files, spare, wait_for
)
from daemon_db import DB, OpenError

warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)

def refused(use, error, words):
    try:
        use()
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError("not refused")

def all_is_refused(db):
    for use in (lambda: db.conn, db.transaction().__enter__, db.snapshot().__enter__):
        refused(use, sqlite3.ProgrammingError, f"{db!r}: opened before a fork()")
    for read_only in (False, True):
        refused(lambda: DB.open(db.path, read_only=read_only), OpenError, f"{db.path}: opened before a fork()")

def fork_in_c():
    "As a server in C does it that runs Python (uWSGI): Python hears nothing of it."
    return ctypes.PyDLL(None).fork()

def fork():
    child = by()
    if not child:
        signal.alarm(LIMIT)  # the end of one that would hang
    return child

def check(child):
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status

def check_whole(db, table, count):
    assert db.conn.execute(f"SELECT count(*) FROM {table}").fetchone() == (count,)
    assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)

def fill(conn):
    "So much that uncommitted pages are in the WAL already."
    conn.execute("PRAGMA cache_size=10")
    values = {"run_id": "'run-1'", "sequence": "?", "event_type": "'x'", spare("events"): f"'{'y' * 2000}'"}
    conn.executemany(insertion(conn, "events", **values), ((number,) for number in range(1000)))
"""


IN_EACH_WAY = """
for by, leave in WAYS:
    path = os.path.join(sys.argv[1], f"{by.__name__} {leave.__name__}", "daemon.db")
    os.mkdir(os.path.dirname(path))
    print(path, flush=True)
"""

# In a child of C's, Python itself may hang where there was another thread: at its end, and, without the GIL, in
# gc.collect(); anywhere where that thread ran.
ONE_THREAD = "(os.fork, sys.exit), (os.fork, os._exit), (fork_in_c, sys.exit), (fork_in_c, os._exit)"
A_THREAD_WAITS = "(os.fork, sys.exit), (os.fork, os._exit), (fork_in_c, os._exit)"
SOME_THREADS = "(os.fork, sys.exit), (os.fork, os._exit)"
ONLY_FORK = "(os.fork, os._exit),"


def run_forking(code: str, directory: Path, ways: str = ONE_THREAD) -> None:
    """Run `code` with each way to fork, and for a child to `leave`: with Python's end or without. Each has a file.

    If it fails, the path that was printed last says in which way.
    """
    run(PROLOGUE + IN_EACH_WAY.replace("WAYS", ways) + textwrap.indent(textwrap.dedent(code), "    "), directory)


def test_the_child_is_refused_and_the_parent_goes_on(tmp_path: Path) -> None:
    run_forking(
        f"""
        with DB.open(path, on_connect=no_sync) as db:
            for number in range({rounds(2, 150)}):
                with db.transaction() as conn:
                    insert_run(conn, f"before-{{number}}")
                if not (child := fork()):
                    all_is_refused(db)
                    with DB.open(path + "-other", on_connect=no_sync) as other, other.transaction() as conn:
                        insert_run(conn, f"run-{{number}}")
                        if not (grandchild := fork()):
                            all_is_refused(db)
                            db.close()
                            leave(0)
                        check(grandchild)
                    db.close()
                    db.close()
                    all_is_refused(db)
                    leave(0)
                check(child)
                with db.transaction() as conn:
                    insert_run(conn, f"after-{{number}}")
                check_whole(db, "runs", 2 * number + 2)
        with DB.open(path + "-other") as other:
            check_whole(other, "runs", number + 1)
        """,
        tmp_path,
    )
    names = {Path(name).name for name, data in files_in(tmp_path).items() if data is not None}
    assert names == {"daemon.db", "daemon.db-other"}


@pytest.mark.parametrize(
    "act",
    [
        pytest.param("pass", id="leaves"),
        pytest.param("del db, block, conn; gc.collect()", id="drops it"),
        pytest.param("db.close(); conn.close()", id="closes it"),
        pytest.param(
            "refused(lambda: block.__exit__(None, None, None), sqlite3.ProgrammingError, 'before a fork()')",
            id="ends the block",
        ),
    ],
)
def test_the_parents_transaction_survives_what_the_child_does(act: str, tmp_path: Path) -> None:
    """Were the child to free the connection, it would roll back in the memory that it shares with the parent."""
    run_forking(
        f"""
        db = DB.open(path)
        insert_run(db.conn)
        block = db.transaction()
        with block as conn:
            fill(conn)
            if not (child := fork()):
                {act}
                leave(0)
            check(child)
            select = f"SELECT count(*), sum(length({{spare('events')}})) FROM events"
            assert conn.execute(select).fetchone() == (1000, 2000000)
        check_whole(db, "events", 1000)
        db.close()
        """,
        tmp_path,
    )


def test_a_transaction_of_another_thread_survives_the_child(tmp_path: Path) -> None:
    run_forking(
        """
        filled, forked = threading.Event(), threading.Event()

        def work():
            with db.transaction() as conn:
                fill(conn)
                filled.set()
                wait_for(forked)
            check_whole(db, "events", 1000)
            worked.append(True)

        worked = []
        with DB.open(path) as db:
            insert_run(db.conn)
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            wait_for(filled)
            if not (child := fork()):
                gc.collect()
                leave(0)
            check(child)
            forked.set()
            join(thread)
            assert worked
        """,
        tmp_path,
        ways=SOME_THREADS,
    )


def test_the_parents_snapshot_goes_on(tmp_path: Path) -> None:
    run_forking(
        """
        with DB.open(path) as db:
            with db.snapshot() as conn:
                if not (child := fork()):
                    all_is_refused(db)
                    leave(0)
                check(child)
                in_thread(lambda: insert_run(db.conn))
                assert conn.execute("SELECT count(*) FROM runs").fetchone() == (0,)
            insert_run(db.conn, "run-2")
            check_whole(db, "runs", 2)
        """,
        tmp_path,
    )


def test_a_child_may_open_only_what_no_process_before_it_has_open(tmp_path: Path) -> None:
    """It would get no locks on it: the parent's close would remove the WAL, with what the child commits after it."""
    run_forking(
        """
        directory, name = os.path.split(path)
        os.symlink(path, path + "-link")
        os.symlink(directory, directory + "-link")
        with DB.open(path) as db:  # which creates it: there was no inode to know it by
            if not (child := fork()):
                for name in (path, path + "-link", f"{directory}-link/{name}"):
                    refused(lambda: DB.open(name), OpenError, f"{name}: opened before a fork()")
                with DB.open(path + "-other") as other:
                    insert_run(other.conn)
                    if not (grandchild := fork()):
                        all_is_refused(db)
                        all_is_refused(other)
                        leave(0)
                    check(grandchild)
                    insert_run(other.conn, "run-2")
                    check_whole(other, "runs", 2)
                if not (grandchild := fork()):
                    all_is_refused(db)
                    DB.open(path + "-other").close()
                    leave(0)
                check(grandchild)
                leave(0)
            check(child)
            insert_run(db.conn)
        if not (child := fork()):
            with DB.open(path) as db:
                insert_run(db.conn, "run-2")
            leave(0)
        check(child)
        with DB.open(path) as db:
            check_whole(db, "runs", 2)
        """,
        tmp_path,
    )


def test_a_memory_database_is_refused_to_the_child_too(tmp_path: Path) -> None:
    run_forking(
        """
        with DB.open(":memory:") as db:
            insert_run(db.conn)
            if not (child := fork()):
                refused(lambda: db.conn, sqlite3.ProgrammingError, "opened before a fork()")
                with DB.open(":memory:") as other:
                    check_whole(other, "runs", 0)
                leave(0)
            check(child)
            check_whole(db, "runs", 1)
        """,
        tmp_path,
    )


def test_a_fork_in_the_middle_of_opening(tmp_path: Path) -> None:
    """By another thread, when SQLite is about to open the file, has opened it, and has been asked for the first time.

    Those moments are Python's audit events, and `on_connect`.
    """
    run_forking(
        """
        def pause(moment):
            if moment in pausing:
                pausing.remove(moment)
                paused.set()
                wait_for(go_on)

        def open_in_thread():
            DB.open(path, on_connect=lambda conn: pause("on_connect")).close()
            opened.append(True)

        pausing, opened = [], []
        sys.addaudithook(lambda event, arguments: pause(event))
        moments = ["sqlite3.connect", "sqlite3.connect/handle", "on_connect"]
        for is_there in (False, True):
            for moment in moments:
                if not is_there and os.path.exists(path):
                    os.remove(path)
                pausing[:] = [moment]
                paused, go_on = threading.Event(), threading.Event()
                thread = threading.Thread(target=open_in_thread, daemon=True)
                thread.start()
                wait_for(paused)
                if not (child := fork()):
                    refused(lambda: DB.open(path), OpenError, "opened before a fork()")
                    DB.open(path + "-other").close()
                    leave(0)
                check(child)
                go_on.set()
                join(thread)
        assert len(opened) == 6
        if not (child := fork()):
            with DB.open(path) as db:
                insert_run(db.conn)
            leave(0)
        check(child)
        """,
        tmp_path,
        ways=A_THREAD_WAITS,
    )


def test_no_child_slips_through_while_another_thread_opens_and_closes(tmp_path: Path) -> None:
    """A child that has a descriptor of the file has SQLite's list of its locks, too, and must be refused."""
    run_forking(
        f"""
        def open_and_close():
            while not ended.is_set():
                with DB.open(path) as db, db.transaction() as conn:
                    append_event(conn)
                counts.append(True)

        with DB.open(path) as db:
            insert_run(db.conn)
        counts, ended, refusals = [], threading.Event(), 0
        thread = threading.Thread(target=open_and_close, daemon=True)
        thread.start()
        for number in range({rounds(40, 5000)}):
            if not (child := fork()):
                if os.path.realpath(path) in open_files():
                    refused(lambda: DB.open(path), OpenError, "opened before a fork()")
                    os._exit(3)
                os._exit(4)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (3, 4), (number, status)
            refusals += status == 3
        ended.set()
        join(thread)
        assert refusals > 0
        with DB.open(path) as db:
            check_whole(db, "events", len(counts))
        """,
        tmp_path,
        ways=ONLY_FORK,
    )


def test_no_lock_of_the_parents_is_waited_for(tmp_path: Path) -> None:
    """Another thread of the parent may have had it. The thread that has it here has ended: nobody gives it back."""
    run_forking(
        """
        from daemon_db import _process
        with DB.open(path) as db:
            insert_run(db.conn)
            this, guard = _process.this_process(), db._state.guard
            kept = this.lock, guard.mutex, db._state.turn
            for lock in kept:
                in_thread(lock.acquire)
            if not (child := fork()):
                all_is_refused(db)
                with DB.open(path + "-other") as other, other.transaction() as conn:
                    insert_run(conn)
                db.close()
                leave(0)
            check(child)
            this.lock, guard.mutex, db._state.turn = (threading.RLock() for _ in range(3))
        """,
        tmp_path,
    )


def test_a_fork_at_any_moment_of_a_change(tmp_path: Path) -> None:
    """Without the GIL, the child would find a dict locked, for ever."""
    run_forking(
        f"""
        from daemon_db import _file, _process

        def change():
            this = _process.this_process()
            while not ended.is_set():
                this.add(ended, file)
                os.stat(path)  # another thread may run now
                this.remove(ended)

        def open_or_be_refused():
            try:
                DB.open(path).close()
            except OpenError as error:
                assert "opened before a fork()" in str(error), error

        DB.open(path).close()
        file, ended = _file.locate(path, read_only=False), threading.Event()
        file.id = os.stat(path).st_dev, os.stat(path).st_ino
        thread = threading.Thread(target=change, daemon=True)
        thread.start()
        for _ in range({rounds(20, 1000)}):
            if not (child := fork()):
                in_thread(open_or_be_refused)
                os._exit(0)
            check(child)
        ended.set()
        join(thread)
        """,
        tmp_path,
        ways=ONLY_FORK,
    )


def test_forks_while_other_threads_use_the_db(tmp_path: Path) -> None:
    """Each child is refused; the parent's threads notice nothing."""
    run_forking(
        f"""
        def work():
            while not ended.is_set():
                with db.transaction() as conn:
                    sequence = append_event(conn)
                assert db.conn.execute("SELECT max(sequence) FROM events").fetchone()[0] >= sequence
                sequences.append(sequence)

        sequences, ended = [], threading.Event()
        with DB.open(path, timeout=LIMIT, on_connect=no_sync) as db:
            insert_run(db.conn)
            threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
            for thread in threads:
                thread.start()
            for _ in range({rounds(5, 500)}):
                if not (child := fork()):
                    all_is_refused(db)
                    gc.collect()
                    db.close()
                    os._exit(0)
                check(child)
            ended.set()
            join(*threads)
            assert sorted(sequences) == list(range(1, len(sequences) + 1))
            check_whole(db, "events", len(sequences))
        """,
        tmp_path,
        ways=SOME_THREADS,
    )


@pytest.mark.parametrize(
    "use",
    ["all_is_refused(db)", "DB.open(path + '-other').close()", "db.close()"],
    ids=["is refused", "opens another file", "closes it"],
)
def test_a_hook_of_another_library_that_runs_first(use: str, tmp_path: Path) -> None:
    """It was registered before `daemon_db` was imported, and uses the `DB` in the child."""
    register = f"""
import os

def hook():
    global is_done
    signal.alarm(LIMIT)
    {use}
    is_done = True

is_done = False
os.register_at_fork(after_in_child=hook)
"""
    code = """
path = sys.argv[1]
with DB.open(path) as db:
    insert_run(db.conn)
    if not (child := os.fork()):
        all_is_refused(db)
        os._exit(not is_done)
    check(child)
    insert_run(db.conn, "run-2")
    check_whole(db, "runs", 2)
"""
    run(register + PROLOGUE + code, tmp_path / "daemon.db")


@pytest.mark.skipif(not something_is_forbidden(), reason="root can't become another user here")
def test_a_fork_that_the_system_refuses_changes_nothing(tmp_path: Path) -> None:
    code = """
import os, resource, sys
from daemon_db import DB
from support import insert_run

with DB.open(sys.argv[1]) as db:
    insert_run(db.conn)
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
    if os.geteuid() == 0:  # whom it doesn't limit
        os.setreuid(65534, 65534)
    try:
        os.fork()
    except BlockingIOError:
        insert_run(db.conn, "run-2")
    else:
        os._exit(9)
"""
    run(code, tmp_path / "daemon.db")
