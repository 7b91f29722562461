"""`fork()` with a `DB` open. Each test is a process of its own, which forks.

`DAEMON_DB_LONG=1` in the environment makes it go on for longer (see `support`).
"""

import textwrap
from pathlib import Path

import pytest

from support import files_in, rounds, run, something_is_forbidden

PROLOGUE = """
import ctypes, gc, os, signal, sqlite3, sys, threading, warnings
from support import LIMIT, append_event, in_thread, insert_run, insertion, join, spare, wait_for
from daemon_db import DB, OpenError

warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)

def refused(use, error, words):
    try:
        use()
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError("not refused")

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

ONE_THREAD = "(os.fork, sys.exit), (os.fork, os._exit), (fork_in_c, os._exit)"
SOME_THREADS = "(os.fork, sys.exit), (os.fork, os._exit)"  # Python itself may hang in a child of C's
ONLY_FORK = "(os.fork, os._exit),"


def run_forking(code: str, directory: Path, ways: str = ONE_THREAD) -> None:
    """Run `code` with each way to fork, and for a child to `leave`: with Python's end or without. Each has a file.

    If it fails, the path that was printed last says in which way.
    """
    run(PROLOGUE + IN_EACH_WAY.replace("WAYS", ways) + textwrap.indent(textwrap.dedent(code), "    "), directory)


def test_the_child_is_refused_and_the_parent_goes_on(tmp_path: Path) -> None:
    run_forking(
        """
        with DB.open(path) as db:
            insert_run(db.conn)
            if not (child := fork()):
                words = f"<DB {path!r} open>: opened before a fork()"
                for use in (lambda: db.conn, db.transaction().__enter__, db.snapshot().__enter__):
                    refused(use, sqlite3.ProgrammingError, words)
                db.close()
                db.close()
                leave(0)
            check(child)
            with db.transaction() as conn:
                append_event(conn)
            assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        """,
        tmp_path,
    )
    assert {Path(name).name for name, data in files_in(tmp_path).items() if data is not None} == {"daemon.db"}


def test_a_child_can_not_commit_the_parents_transaction(tmp_path: Path) -> None:
    run_forking(
        """
        with DB.open(path) as db:
            insert_run(db.conn)
            try:
                with db.transaction() as conn:
                    append_event(conn)
                    child = fork()
            except sqlite3.ProgrammingError as error:
                assert "fork()" in str(error) and not child, error
                leave(0)
            assert child
            check(child)
            assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (1,)
        """,
        tmp_path,
    )


@pytest.mark.parametrize("dropped", ["kept", "dropped"])
def test_a_transaction_of_the_forking_thread_survives_the_child(dropped: str, tmp_path: Path) -> None:
    """Were the child to free the connection, it would roll back in the memory that it shares with the parent."""
    run_forking(
        f"""
        db = DB.open(path)
        insert_run(db.conn)
        with db.transaction() as conn:
            fill(conn)
            if not (child := fork()):
                if "{dropped}" == "dropped":
                    del db, conn
                    gc.collect()
                leave(0)
            check(child)
            select = f"SELECT count(*), sum(length({{spare('events')}})) FROM events"
            assert conn.execute(select).fetchone() == (1000, 2000000)
        assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (1000,)
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
            assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (1000,)
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


def test_the_child_may_not_open_the_same_file_while_the_parent_has_it_open(tmp_path: Path) -> None:
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
                if not (grandchild := fork()):
                    refused(lambda: DB.open(path), OpenError, "opened before a fork()")
                    leave(0)
                check(grandchild)
                with DB.open(path + "-other") as other:
                    insert_run(other.conn)
                leave(0)
            check(child)
            insert_run(db.conn)
        """,
        tmp_path,
    )


def test_the_child_may_open_what_the_parent_has_closed(tmp_path: Path) -> None:
    run_forking(
        """
        with DB.open(path) as db:
            insert_run(db.conn)
        if not (child := fork()):
            with DB.open(path) as db:
                append_event(db.conn)
            leave(0)
        check(child)
        with DB.open(path) as db:
            assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (1,)
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
                    assert other.conn.execute("SELECT count(*) FROM runs").fetchone() == (0,)
                leave(0)
            check(child)
            assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (1,)
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
        ways=SOME_THREADS,
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

        def has_a_descriptor():
            status = os.stat(path)
            for descriptor in range(3, 100):
                try:
                    each = os.fstat(descriptor)
                except OSError:
                    continue
                if (each.st_dev, each.st_ino) == (status.st_dev, status.st_ino):
                    return True
            return False

        with DB.open(path) as db:
            insert_run(db.conn)
        counts, ended, refusals = [], threading.Event(), 0
        thread = threading.Thread(target=open_and_close, daemon=True)
        thread.start()
        for number in range({rounds(40, 5000)}):
            if not (child := fork()):
                if has_a_descriptor():
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
            assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (len(counts),)
            assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
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
                for use in (lambda: db.conn, db.transaction().__enter__, db.snapshot().__enter__):
                    refused(use, sqlite3.ProgrammingError, "opened before a fork()")
                refused(lambda: DB.open(path), OpenError, "opened before a fork()")
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
        with DB.open(path, timeout=LIMIT, on_connect=lambda conn: conn.execute("PRAGMA synchronous=OFF")) as db:
            insert_run(db.conn)
            threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
            for thread in threads:
                thread.start()
            for _ in range({rounds(5, 2000)}):
                if not (child := fork()):
                    refused(lambda: db.conn, sqlite3.ProgrammingError, "opened before a fork()")
                    refused(lambda: db.transaction().__enter__(), sqlite3.ProgrammingError, "opened before a fork()")
                    refused(lambda: DB.open(path), OpenError, "opened before a fork()")
                    gc.collect()
                    db.close()
                    os._exit(0)
                check(child)
            ended.set()
            join(*threads)
            assert sorted(sequences) == list(range(1, len(sequences) + 1))
            assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        """,
        tmp_path,
        ways=SOME_THREADS,
    )


@pytest.mark.skipif(not something_is_forbidden(), reason="root can't become another user here")
def test_a_fork_that_the_system_refuses_changes_nothing(tmp_path: Path) -> None:
    run_forking(
        """
        import resource
        with DB.open(path) as db:
            insert_run(db.conn)
            in_thread(lambda: db.conn)
            if not (child := fork()):
                with DB.open(path + "-child") as own:
                    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
                    resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
                    if os.geteuid() == 0:  # whom it doesn't limit
                        os.setreuid(65534, 65534)
                    try:
                        os.fork()
                    except BlockingIOError:
                        insert_run(own.conn)
                        own.conn.execute("SELECT 1").fetchone()
                    else:
                        os._exit(9)
                leave(0)
            check(child)
        """,
        tmp_path,
    )
