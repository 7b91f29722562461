"""The writer's lock: whatever drops it within a `transaction()`, no other process's commits are written over.

SQLite's lock of who writes is a POSIX lock on the -shm: the daemon's process loses it when anything in there closes a
descriptor of the -shm. `DAEMON_DB_LONG=1` in the environment makes it go on for longer (see `support`).
"""

import contextlib
import fcntl
import importlib
import os
import shutil
import signal
import sqlite3
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from daemon_db import DB, _guard
from daemon_db._wait import now
from daemon_db.db import LONG
from support import LIMIT, in_thread, insert_run, join, make_wal, no_sync, rounds, wait_for, worker

pytestmark = pytest.mark.skipif(_guard._SETLK is None, reason="this system has no locks of an open file description")


def copytree(path: Path) -> None:
    shutil.copytree(path.parent, f"{path.parent}-copy", dirs_exist_ok=True)


def tar(path: Path) -> None:
    with tarfile.open(f"{path.parent}.tar", "w") as archive:
        archive.add(path.parent)


def open_and_close(path: Path) -> None:
    open(f"{path}-shm", "rb").close()


def apsw(path: Path) -> None:
    conn = importlib.import_module("apsw").Connection(str(path))
    conn.execute("SELECT count(*) FROM runs").fetchall()
    conn.close()


OTHER = """
import time
from contextlib import ExitStack
from daemon_db import DB
from support import LIMIT, append_event, insert_run, no_sync

def connected(conn):
    no_sync(conn)
    conn.execute("PRAGMA cache_size=10")  # what is larger is in the WAL before its transaction ends

def insert(conn, name, count):
    for each in range(count):
        insert_run(conn, f"{name}-{each}")

db = DB.open(sys.argv[1], timeout=LIMIT, on_connect=connected)
block = ExitStack()
"""

COMMIT_AND_BEGIN = """
number, size = map(int, sys.argv[1:])
with db.transaction() as conn:
    insert(conn, f"done-{number}", 3)
    append_event(conn, f"done-{number}-0")  # in pages that the daemon has read, and not written
if size:
    insert(block.enter_context(db.transaction()), f"begun-{number}", size)
"""

END = """
number, size = map(int, sys.argv[1:])
time.sleep(0.1)  # the daemon's block may end before, or wait for this one: both are right
insert(db.conn, f"ended-{number}", size)
block.close()
"""

THEN = {"is done": 0, "writes": 1, "writes much": 500}
"""What the other process does when the block ends: how many rows its next transaction has inserted by then."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "daemon.db"


@pytest.fixture
def db(path: Path) -> Iterator[DB]:
    with DB.open(path, timeout=LIMIT, on_connect=no_sync) as db:
        yield db


@pytest.fixture
def other(db: DB) -> Iterator[Callable[..., str]]:
    with worker(OTHER, db.path) as other:
        yield other


def make_long() -> None:
    """Let the block that begins now be a long one."""
    end = now() + 2 * LONG
    while now() < end:
        pass


def check(db: DB, expected: set[str]) -> None:
    """These runs are there, and no others, for the daemon and for a stranger, and the file is in order."""
    with closing(sqlite3.connect(db.path)) as stranger:
        for conn in (stranger, db.conn):
            assert {run_id for (run_id,) in conn.execute("SELECT id FROM runs NOT INDEXED")} == expected
            events = {run_id for (run_id,) in conn.execute("SELECT run_id FROM events NOT INDEXED")}
            assert events == {run_id for run_id in expected if run_id.startswith("done-") and run_id.endswith("-0")}
            assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@contextmanager
def block_with_a_drop(
    db: DB, drop: Callable[[Path], None], other: Callable[..., str], number: int, size: int
) -> Iterator[None]:
    """A long one, which the other process's transaction outlives; what is in the `with` block ends it."""
    ending = threading.Thread(target=other, args=(END, number, size), daemon=True)
    try:
        with db.transaction() as conn:
            conn.execute("SELECT * FROM events NOT INDEXED").fetchall()
            insert_run(conn, f"ours-{number}")
            drop(Path(db.path))
            other(COMMIT_AND_BEGIN, number, size)
            make_long()
            if size:
                ending.start()
            yield
    finally:
        if ending.ident:
            join(ending)


def others(number: int, size: int) -> set[str]:
    """The runs of the other process in this round."""
    begun_and_ended = {f"{word}-{number}-{each}" for word in ("begun", "ended") for each in range(size)}
    return {f"done-{number}-{each}" for each in range(3)} | begun_and_ended


@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize(
    "drop",
    [
        copytree,
        tar,
        open_and_close,
        pytest.param(apsw, marks=pytest.mark.skipif(find_spec("apsw") is None, reason="no second SQLite: apsw")),
    ],
)
def test_a_block_in_which_the_lock_was_dropped_is_told_to_repeat(
    drop: Callable[[Path], None], then: str, db: DB, other: Callable[..., str]
) -> None:
    expected, size = set[str](), THEN[then]
    for number in range(rounds(2, 100)):
        with pytest.raises(sqlite3.OperationalError) as caught:
            with block_with_a_drop(db, drop, other, number, size):
                pass
        assert str(caught.value) == "database is locked"
        assert (caught.value.sqlite_errorcode, caught.value.sqlite_errorname) == (sqlite3.SQLITE_BUSY, "SQLITE_BUSY")
        assert ["repeat" in note and "rolled back" in note for note in caught.value.__notes__] == [True]
        assert not db.conn.in_transaction
        expected |= others(number, size)
        check(db, expected)
        with db.transaction() as conn:
            insert_run(conn, f"ours-{number}")
        expected.add(f"ours-{number}")
        check(db, expected)


@pytest.mark.parametrize("then", THEN)
def test_a_block_that_fails_after_the_lock_was_dropped_undoes_nothing_of_others(
    then: str, db: DB, other: Callable[..., str]
) -> None:
    with pytest.raises(ZeroDivisionError), block_with_a_drop(db, open_and_close, other, 0, THEN[then]):
        raise ZeroDivisionError
    check(db, others(0, THEN[then]))


def test_where_the_lock_can_not_be_asked_for_the_block_is_told_to_repeat(db: DB, other: Callable[..., str]) -> None:
    """A trigger of one's own, with a function that only another program has, lets each DELETE fail."""
    db.conn.execute("CREATE TRIGGER app_gone BEFORE DELETE ON runs BEGIN SELECT of_another_program(); END")
    with pytest.raises(sqlite3.OperationalError, match="database is locked"):
        with block_with_a_drop(db, open_and_close, other, 0, 0):
            pass
    check(db, others(0, 0))


def test_a_block_that_itself_committed_is_told_so(db: DB, path: Path, other: Callable[..., str]) -> None:
    with pytest.raises(sqlite3.OperationalError, match="no transaction is active") as caught:
        with db.transaction() as conn:
            insert_run(conn, "ours")
            conn.commit()
            open_and_close(path)
            other(COMMIT_AND_BEGIN, 0, 0)
            make_long()
    assert ["ended inside the block" in note for note in caught.value.__notes__] == [True]
    check(db, {"ours"} | others(0, 0))


@pytest.mark.parametrize("lock", ["with the lock", "without"])
def test_a_long_block_as_such_is_not_refused(lock: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside threads that read, come and wait for their turn, and a process that reads, and waits to write."""
    if lock == "without":
        monkeypatch.setattr(_guard, "_SETLK", None)
    count = rounds(5, 200)
    ended, read = threading.Event(), threading.Event()

    def read_on() -> None:
        while not ended.is_set():
            with db.snapshot() as conn:
                conn.execute("SELECT count(*) FROM runs").fetchall()
            with DB.open(path, on_connect=no_sync) as another:
                another.conn.execute("SELECT count(*) FROM runs").fetchall()
            read.set()

    def write(name: int) -> None:
        for number in range(count):
            with db.transaction() as conn:
                insert_run(conn, f"{name}-{number}")
                make_long()
                read.clear()
                wait_for(read)

    with DB.open(path, timeout=LIMIT, on_connect=no_sync) as db, worker(OTHER, path) as other:
        reader = threading.Thread(target=read_on, daemon=True)
        writers = [threading.Thread(target=write, args=(name,), daemon=True) for name in range(3)]
        for thread in (reader, *writers):
            thread.start()
        try:
            for number in range(count):
                other(COMMIT_AND_BEGIN, number, 0)
            join(*writers)
        finally:
            ended.set()
            join(reader)
        ours = {f"{name}-{number}" for name in range(3) for number in range(count)}
        check(db, ours.union(*(others(number, 0) for number in range(count))))


@pytest.mark.parametrize("end", ["commits", "raises"])
def test_a_block_that_reads_by_a_begin_of_its_own_has_no_lock_to_lose(
    end: str, db: DB, other: Callable[..., str]
) -> None:
    """It isn't told that its lock was dropped, and takes none that nobody would give back."""
    with DB.open(db.path):  # which keeps the -shm open, and what locks it may have
        with contextlib.suppress(ZeroDivisionError), db.transaction() as conn:
            insert_run(conn, "ours")
            conn.execute("COMMIT")
            conn.execute("BEGIN")
            conn.execute("SELECT * FROM runs").fetchall()
            make_long()
            if end == "raises":
                raise ZeroDivisionError
        other(COMMIT_AND_BEGIN, 0, 0)
    check(db, {"ours", *others(0, 0)})


def test_a_block_that_reads_by_a_begin_of_its_own_beside_a_writer(db: DB, other: Callable[..., str]) -> None:
    with DB.open(db.path):  # which keeps the -shm open
        with db.transaction() as conn:
            conn.execute("COMMIT")
            conn.execute("BEGIN")
            conn.execute("SELECT * FROM runs").fetchall()
            other(COMMIT_AND_BEGIN, 0, 1)
            make_long()
    other(END, 0, 1)
    check(db, others(0, 1))


def test_the_rollback_does_not_wait_for_ever(
    db: DB, path: Path, other: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        with db.transaction() as conn:
            insert_run(conn)
            open_and_close(path)
            other(COMMIT_AND_BEGIN, 0, 1)  # and it goes on
            raise ZeroDivisionError

    monkeypatch.setattr(_guard, "_PATIENCE", 0.01)
    with pytest.raises(ZeroDivisionError):
        in_thread(fail)
    other("block.pop_all()")


def test_the_connection_whose_lock_was_dropped_is_not_used_again(db: DB, other: Callable[..., str]) -> None:
    """What it has in memory is from before the others' commits."""
    with pytest.raises(sqlite3.OperationalError), block_with_a_drop(db, open_and_close, other, 0, 0):
        conn = db.conn
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        conn.execute("SELECT id FROM runs")


def test_control_c_while_the_rollback_waits(db: DB, other: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_guard.Guard, "take_write_lock", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), block_with_a_drop(db, open_and_close, other, 0, 0):
        conn = db.conn
    assert db.conn is not conn
    check(db, others(0, 0))


def test_a_lock_of_which_the_system_names_the_server_is_this_processs(db: DB, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CephFS does, of which no test can have one."""

    def ask(descriptor: int, command: int, *arguments: bytes) -> object:
        answer = ask_system(descriptor, command, *arguments)
        if command == fcntl.F_OFD_GETLK:
            answer = struct.pack(_guard._FLOCK, *struct.unpack(_guard._FLOCK, answer)[:4], -4711)
        return answer

    ask_system = fcntl.fcntl
    monkeypatch.setattr(_guard.fcntl, "fcntl", ask)
    with db.transaction() as conn:
        insert_run(conn)
        make_long()


def test_a_descriptor_that_another_sqlite_library_had_is_not_asked(path: Path) -> None:
    make_wal(path)
    other = pytest.importorskip("apsw").Connection(str(path))
    other.execute("SELECT count(*) FROM runs").fetchall()
    with DB.open(path) as db, contextlib.ExitStack() as stack:
        other.close()
        for _ in range(10):  # one of them gets its number
            stack.enter_context(open(os.devnull))
        with db.transaction() as conn:
            insert_run(conn, "run-2")
            make_long()
