"""The WAL is kept where it is, whatever the daemon's process does to the file; and where it is lost, that is found out.

"The others" are the `sqlite3` program, which looks, and another process with a `DB`, which writes. Both close.
"""

import errno
import fcntl
import importlib.util
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from daemon_db import DB, OpenError, _guard, _opening, _process, _schema
from daemon_db._connection import thread
from daemon_db._file import File
from support import (
    LIMIT,
    Forks,
    end,
    files_in,
    in_thread,
    insert_run,
    make_nothing,
    make_rollback,
    make_wal,
    open_files,
    rounds,
    run,
    runs_in,
    start,
)

has_lock = pytest.mark.skipif(_guard._SETLK is None, reason="this system has no locks of an open file description")

LOST = "-shm was removed or replaced"

WAYS = {
    "read": "open(path, 'rb').read()",
    "header": "with open(path, 'rb') as file: file.read(16)",
    "write": "os.close(os.open(path, os.O_RDWR))",
    "copy": "shutil.copy(path, path + '-copy')",
    "zip": "zipfile.ZipFile(path + '-zip', 'w').write(path)",
    "tar": "tarfile.open(path + '-tar', 'w').add(path)",
    "hash": "hashlib.file_digest(open(path, 'rb'), 'sha256')",
    "mmap": "with open(path, 'rb') as file: mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ).close()",
    "link": "os.link(path, path + '-link'); open(path + '-link').close(); os.remove(path + '-link')",
    "the -shm": "open(path + '-shm', 'rb').read()",
    "all": "[open(path + suffix, 'rb').read() for suffix in ('', '-wal', '-shm')]",
    "apsw": "conn = apsw.Connection(path); conn.execute('SELECT count(*) FROM runs').fetchall(); conn.close()",
}
"""What drops SQLite's locks on `path` in the process that does it."""

WITH_SHM = "the -shm", "all", "apsw"
"""Those of them that close the -shm, too, and so drop the lock of who is writing: here nobody is, at that moment."""

APSW = pytest.param(
    "apsw",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("apsw") is None, reason="apsw, a second SQLite in the process, is not installed"
    ),
)


def look(path: object, check: bool = True) -> None:
    """As another program does that opens the file, reads and closes it."""
    command = ["sqlite3", "-cmd", f".timeout {1000 * LIMIT}", path, "SELECT count(*) FROM runs"]
    subprocess.run(command, check=check, capture_output=True, timeout=LIMIT)


IMPORTS = """
import contextlib, hashlib, itertools, logging, mmap, os, resource, shutil, sqlite3, subprocess, sys, tarfile
import threading, warnings, zipfile
try:
    import apsw
except ImportError:
    pass
import pytest
from daemon_db import DB, OpenError, _guard, _opening, _schema
from support import LIMIT, Fork, Forks, end, in_thread, insert_run, insertion, join, no_sync, open_files, spare
from support import wait_for
from test_guard import LOST, look

_schema.expected()  # which each would else find out, too
"""
"""What the daemons import. Each would take longer for that than for all else."""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """For daemons that are processes of their own, one after another."""
    forks = Forks(IMPORTS)
    yield forks
    forks.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of the clock by which `transaction()` looks: it stands still unless a test moves it."""
    time = [1000.0]
    monkeypatch.setattr("daemon_db.db.now", lambda: time[0])
    return time


WHEN_ASKED = """
import sys
if not sys.stdin.readline():
    sys.exit()
"""
"""Before the code of another process: a daemon with a database open can't fork it off any more."""

OTHER = """
import sys
from daemon_db import DB
from support import LIMIT, insert_run, no_sync

with DB.open(sys.argv[1], timeout=LIMIT, on_connect=no_sync) as db:
    for number in range(int(sys.argv[2])):
        with db.transaction() as conn:
            insert_run(conn, f"{sys.argv[3]}-{number}")
        print(f"{sys.argv[3]}-{number}", flush=True)
    print("done", flush=True)
    sys.stdin.readline()
"""
"""Writes so many runs, and closes when its standard input does."""

DAEMON = f"""
warnings.simplefilter("ignore")  # of a file that open() leaves to the garbage collector
logging.disable(logging.WARNING)  # of a reader that is in the way of a checkpoint, when the machine is busy
path, way, threads, how, last, lock = sys.argv[1:]
WAYS = {WAYS!r}
other = Fork({WHEN_ASKED + OTHER!r}, path, 20, "other")
if lock == "off":
    _guard._SETLK = None
acknowledged, stop, progress, errors = [], threading.Event(), threading.Semaphore(0), []
gate = threading.Lock() if way in {WITH_SHM!r} else contextlib.nullcontext()

def insert(name):
    if how == "transaction":
        with db.transaction() as conn:
            insert_run(conn, name)
    else:
        insert_run(db.conn, name)
    acknowledged.append(name)

def write(number):
    try:
        for each in itertools.count():
            if stop.is_set():
                return
            with gate:
                insert(f"{{number}}-{{each}}")
            progress.release()
    except BaseException as error:
        errors.append(error)
        progress.release()

def others():
    look(path)
    other.stdin.write("go\\n")
    other.stdin.flush()
    while (line := other.stdout.readline()) not in ("done\\n", ""):
        acknowledged.append(line.strip())

db = DB.open(path, timeout=LIMIT, on_connect=no_sync)
if threads == "1":
    for number in range(20):
        with db.transaction() as conn:
            insert_run(conn, f"before-{{number}}")
        acknowledged.append(f"before-{{number}}")
    exec(WAYS[way])
    others()
    if last == "daemon":
        assert end(other) == ("", ""), other
    try:
        for number in range(20):
            insert(f"after-{{number}}")
        in_thread(lambda: insert_run(db.conn, "thread"))
        acknowledged.append("thread")
    except sqlite3.Error as error:
        errors.append(error)
else:
    workers = [threading.Thread(target=write, args=(number,), daemon=True) for number in range(int(threads))]
    for worker in workers:
        worker.start()
    for _ in range(50):
        assert progress.acquire(timeout=LIMIT)
    with gate:
        exec(WAYS[way])
    others()
    if last == "daemon":
        assert end(other) == ("", ""), other
    for _ in range(50):
        assert progress.acquire(timeout=LIMIT)
    stop.set()
    join(*workers)
db.close()
if last == "other":
    assert end(other) == ("", ""), other
print(*[f"error {{error}}" for error in errors], *acknowledged, sep="\\n")
"""


def the_daemon(forks: Forks, path: Path, *how: object) -> tuple[list[str], list[str]]:
    """Run it; what it and the other acknowledged, and the errors that it met."""
    said = forks.run(DAEMON, path, *how).splitlines()
    errors = [line for line in said if line.startswith("error ")]
    return [line for line in said if line not in errors], errors


def check_whole(path: Path, acknowledged: list[str]) -> None:
    """All that was acknowledged is there, for a stranger, and the file is in order."""
    assert set(acknowledged) <= runs_in(path)


@pytest.mark.usefixtures("sqlite3_program")
@has_lock
@pytest.mark.parametrize("way", [*(way for way in WAYS if way != "apsw"), APSW])
@pytest.mark.parametrize(
    ("threads", "how", "last"),
    [
        (1, "transaction", "daemon"),
        (8, "transaction", "other"),
        (8, "autocommit", "daemon"),
        (1, "autocommit", "other"),
    ],
)
def test_nothing_in_the_process_drops_the_lock(
    way: str, threads: int, how: str, last: str, forks: Forks, tmp_path: Path
) -> None:
    for number in range(rounds(1, 25)):
        path = tmp_path / f"{number}.db"
        acknowledged, errors = the_daemon(forks, path, way, threads, how, last, "on")
        assert errors == []
        assert len(acknowledged) > 60
        check_whole(path, acknowledged)
        assert not Path(f"{path}-wal").exists()


THREADS_COME_AND_GO = f"""
others = Forks(start=Fork)
warnings.simplefilter("ignore")
path, rounds = sys.argv[1], int(sys.argv[2])
acknowledged, errors, ended = [], [], threading.Event()

def in_a_thread(use, name):
    try:
        use(name)
        acknowledged.append(name)
    except BaseException as error:
        errors.append(error)

def with_a_db_of_its_own(name):
    with DB.open(path, timeout=LIMIT, on_connect=no_sync) as own:
        thread = threading.Thread(target=lambda: own.conn.execute("SELECT 1").fetchone())
        thread.start()
        with own.transaction() as conn:
            insert_run(conn, name)
        join(thread)

def with_the_shared_one(name):
    with db.transaction() as conn:
        insert_run(conn, name)

def come_and_go(number):
    for each in range(rounds):
        use = with_the_shared_one if each % 2 else with_a_db_of_its_own
        thread = threading.Thread(target=in_a_thread, args=(use, f"{{number}}-{{each}}"), daemon=True)
        thread.start()
        join(thread)

def drop():
    while not ended.is_set():
        open(path, "rb").close()

db = DB.open(path, timeout=LIMIT, on_connect=no_sync)
dropper = threading.Thread(target=drop, daemon=True)
threads = [threading.Thread(target=come_and_go, args=(number,), daemon=True) for number in range(4)]
for thread in [dropper, *threads]:
    thread.start()
while any(thread.is_alive() for thread in threads):
    said = others.run({OTHER!r}, path, 5, f"other-{{len(acknowledged)}}")
    acknowledged += [line for line in said.splitlines() if line != "done"]
    look(path)
ended.set()
join(dropper, *threads)
db.close()
others.close()
assert errors == [], errors
print(*acknowledged, sep="\\n")
"""


@pytest.mark.usefixtures("sqlite3_program")
@has_lock
def test_threads_that_open_and_close_and_end_never_lose_it(forks: Forks, tmp_path: Path) -> None:
    """While another thread drops SQLite's locks all the time, and other processes come and go."""
    acknowledged = forks.run(THREADS_COME_AND_GO, tmp_path / "daemon.db", rounds(30, 3000)).splitlines()
    assert len(acknowledged) >= rounds(120, 12_000)
    check_whole(tmp_path / "daemon.db", acknowledged)
    assert list(files_in(tmp_path)) == ["daemon.db"]


HOLD_EXCLUSIVE = """
import fcntl, sys

with open(sys.argv[1], "r+b") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)  # as SQLite does to checkpoint at its last close
    print("locked", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.usefixtures("sqlite3_program")
@pytest.mark.parametrize("which", ["the first", "another"])
@pytest.mark.parametrize(
    ("then", "lock"),
    [
        pytest.param("nothing", "on", marks=has_lock),
        pytest.param(OTHER, "on", marks=has_lock, id="made anew"),
        pytest.param(HOLD_EXCLUSIVE, "on", marks=has_lock, id="locked"),
        ("nothing", "off"),
    ],
)
def test_what_is_lost_between_the_first_read_and_the_lock_is_an_error(
    which: str, then: str, lock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing more than that: what is there stays there, and the next try succeeds."""

    def read_and_lose(conn: sqlite3.Connection) -> None:
        monkeypatch.setattr(_opening, "read_first", read_first)
        read_first(conn)
        for suffix in "", "-shm":
            open(f"{path}{suffix}", "rb").close()
        if then != HOLD_EXCLUSIVE:
            look(path)
            assert not Path(f"{path}-wal").exists()
        if then != "nothing":
            others.append(start(then, path, 1, "other"))
            assert others[0].stdout.readline()  # it has written, or has the lock

    others: list[subprocess.Popen[str]] = []
    path = tmp_path / "daemon.db"
    make_wal(path)
    before = open_files()
    read_first = _opening.read_first
    if lock == "off":
        monkeypatch.setattr(_guard, "_SETLK", None)
    db = None
    if which == "another":
        db = in_thread(lambda: DB.open(path))  # whose thread has ended, and its connection with it
    monkeypatch.setattr(_opening, "read_first", read_and_lose)
    with pytest.raises(OpenError, match=LOST):
        _ = db.conn if db else DB.open(path)
    if then == HOLD_EXCLUSIVE:
        assert end(others.pop()) == ("", "")
    with db or DB.open(path) as db:
        with db.transaction() as conn:
            insert_run(conn, "run-2")
        assert _guard.guard_of(db._state.file).is_locked == (lock == "on")
    for other in others:
        assert end(other)[1] == ""
    check_whole(path, ["run-1", "run-2", *(["other-0"] if then == OTHER else [])])
    assert list(files_in(tmp_path)) == ["daemon.db"]
    assert open_files() == before


@has_lock
def test_between_the_lock_and_sqlites_own_there_is_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's has been dropped, and is taken again before the other one is given back."""

    def give_back(descriptor: int, kind: int, area: tuple[int, int]) -> None:
        set_lock(descriptor, kind, area)
        if kind == fcntl.F_UNLCK and area == _guard._SHARED:
            process = start(HOLD_EXCLUSIVE, path)
            attempts.append("BlockingIOError" in end(process)[1])

    attempts: list[bool] = []
    path = tmp_path / "daemon.db"
    set_lock = _guard._set
    with DB.open(path) as db:
        insert_run(db.conn)
        open(path, "rb").close()
        monkeypatch.setattr(_guard, "_set", give_back)
    assert attempts == [True]


def test_where_begin_fails_the_reason_is_the_lost_wal(clock: list[float], tmp_path: Path) -> None:
    path = tmp_path / "daemon.db"
    with DB.open(path, timeout=0) as db, DB.open(path) as other:
        with db.transaction():
            pass  # the next look is due in 10 ms, which never pass
        with other.transaction():
            os.remove(f"{path}-wal")
            with pytest.raises(OpenError, match=LOST), db.transaction():  # for SQLite it is locked
                pass


def test_a_wal_that_is_removed_while_a_later_connection_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That ends the `DB` at once, for all threads: the next try might find a new WAL, and nothing wrong with it."""

    def read_and_remove(conn: sqlite3.Connection) -> None:
        monkeypatch.undo()
        _opening.read_first(conn)
        os.remove(f"{path}-wal")

    path = tmp_path / "daemon.db"
    with DB.open(path) as db:
        insert_run(db.conn)
        monkeypatch.setattr(_opening, "read_first", read_and_remove)
        with pytest.raises(OpenError, match=LOST):
            in_thread(lambda: db.conn)
        with pytest.raises(OpenError, match=LOST):
            _ = db.conn


@pytest.mark.usefixtures("sqlite3_program")
@has_lock
def test_another_db_of_the_file_that_comes_and_goes_leaves_the_lock(tmp_path: Path) -> None:
    """Also where the process has opened other files meanwhile."""
    path = tmp_path / "daemon.db"
    with DB.open(path) as db:
        insert_run(db.conn)
        with DB.open(tmp_path / "other.db"):
            DB.open(path).close()
        open(path, "rb").close()
        look(path)
        assert Path(f"{path}-wal").exists()


def test_what_is_known_of_closed_files_is_forgotten(tmp_path: Path) -> None:
    with DB.open(tmp_path / "open.db"):
        known = len(_process.this_process().guards)
        for number in range(10):
            DB.open(tmp_path / f"{number}.db").close()
        assert len(_process.this_process().guards) <= known + 1


@pytest.mark.usefixtures("sqlite3_program")
@has_lock
@pytest.mark.parametrize(("step", "make"), [("missing", make_wal), ("update", make_nothing)])
def test_the_lock_is_taken_before_this_step(
    step: str, make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's own are dropped at its end, and another program looks."""

    def take_step_and_look(*arguments: object) -> object:
        result = take_step(*arguments)
        open(path, "rb").close()
        look(path)
        return result

    path, take_step = tmp_path / "daemon.db", getattr(_schema, step)
    make(path)
    monkeypatch.setattr(_schema, step, take_step_and_look)
    with DB.open(path) as db:
        insert_run(db.conn, "run-2")
        assert Path(f"{path}-wal").exists()


def test_another_thread_connects_in_the_middle_of_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes the -wal that this one has not found: nothing is lost."""

    def ask_and_connect(name: str) -> os.stat_result | None:
        monkeypatch.undo()
        status = _guard.status_of(name)
        pool.submit(lambda: db.conn).result(LIMIT)
        return status

    # The thread that opened it has ended, and its connection with it.
    with in_thread(lambda: DB.open(tmp_path / "daemon.db")) as db, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(_guard, "status_of", ask_and_connect)
        insert_run(db.conn)


def test_the_header_of_another_file_is_not_asked(tmp_path: Path) -> None:
    """That may be open at the number of a descriptor that another thread has just closed."""
    make_wal(tmp_path / "daemon.db")
    make_rollback(tmp_path / "other.db")
    file = File(str(tmp_path / "daemon.db"), read_only=False, create=False)
    file.remember_id()
    with open(tmp_path / "other.db", "rb") as other:
        assert _guard._journal_mode(other.fileno(), file) is None


# Without the lock, as on a system that has none


@pytest.mark.usefixtures("sqlite3_program")
@pytest.mark.parametrize("last", ["daemon", "other"])
@pytest.mark.parametrize("way", ["all", APSW])
def test_without_the_lock_the_loss_is_found_out(way: str, last: str, forks: Forks, tmp_path: Path) -> None:
    """Before a further commit is acknowledged; and the daemon's stop in good order overwrites nothing."""
    for number in range(rounds(1, 100)):
        path = tmp_path / f"{number}.db"
        acknowledged, errors = the_daemon(forks, path, way, 1, "transaction", last, "off")
        assert len(errors) == 1 and LOST in errors[0]
        assert len(acknowledged) == 40  # the daemon's before and the other's
        check_whole(path, acknowledged)


USE_A_LOST_ONE = """
path, who = sys.argv[1:]
_guard._SETLK = None
before = open_files()
reads, read_first = [], _opening.read_first
_opening.read_first = lambda conn: (reads.append(conn), read_first(conn))
db = DB.open(path)
beside = DB.open(path)
assert reads
insert_run(db.conn)
for suffix in "", "-shm":  # SQLite 3.53 asks for the lock on the -shm, too, before it takes itself for the last one
    open(path + suffix).close()
insert = insertion(db.conn, "units", id="'u'", run_id="'run-1'", unit_id="'u'")
subprocess.run(["sqlite3", path, insert], check=True)
assert not os.path.exists(path + "-wal")

uses = {
    "transaction": lambda: db.transaction().__enter__(),
    "a new thread": lambda: in_thread(lambda: db.conn),
    "a new DB": lambda: DB.open(path),
    "a new DB that reads": lambda: DB.open(path, read_only=True),
    "the connection": lambda: db.conn,
    "a new thread's transaction": lambda: in_thread(db.transaction().__enter__),
}
reads.clear()
for use in uses[who], *uses.values(), *uses.values(), beside.transaction().__enter__:
    with pytest.raises(OpenError, match=LOST):
        use()
assert reads == []  # SQLite would read a new WAL by the old index
db.close()
beside.close()
print(len(open_files()) - len(before))
"""


@pytest.mark.usefixtures("sqlite3_program")
@pytest.mark.parametrize("who", ["transaction", "a new thread", "a new DB"])
def test_the_first_loss_ends_the_db_for_all_threads(who: str, forks: Forks, tmp_path: Path) -> None:
    path = tmp_path / "daemon.db"
    still_open = int(forks.run(USE_A_LOST_ONE, path, who))
    # Before 3.12, nothing but to leave it open keeps SQLite from checkpointing the old WAL.
    assert still_open == 0 if sys.version_info >= (3, 12) else still_open > 0
    with DB.open(path) as db:
        assert db.conn.execute("SELECT id FROM units").fetchall() == [("u",)]
        assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_where_the_lock_is_not_to_be_had_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_guard, "_SETLK", None)
    path = tmp_path / "daemon.db"
    with caplog.at_level(logging.INFO, "daemon_db"), DB.open(path) as db:
        in_thread(lambda: db.conn)
        DB.open(path).close()
    first, second = caplog.records
    assert (first.levelname, second.levelname) == ("INFO", "INFO")
    assert "there is no lock" in first.getMessage()
    assert "created" in second.getMessage()


@has_lock
def test_half_a_lock_is_none(clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the -shm can be locked, and the file can't, each transaction looks."""

    def lock(descriptor: int, kind: int, area: tuple[int, int]) -> None:
        if area == _guard._SHARED:
            raise OSError(errno.ENOLCK, "no locks")
        set_lock(descriptor, kind, area)

    set_lock = _guard._set
    monkeypatch.setattr(_guard, "_set", lock)
    with DB.open(tmp_path / "daemon.db") as db:
        with db.transaction() as conn:
            insert_run(conn)
        os.remove(f"{db.path}-wal")
        with pytest.raises(OpenError, match=LOST), db.transaction():
            pass


@has_lock
def test_without_the_lock_a_backup_that_was_copied_into_the_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_guard, "_SETLK", None)
    path = tmp_path / "daemon.db"
    with DB.open(path) as db:
        insert_run(db.conn)
        copy_a_backup_into_it(db.path)
        backup = path.read_bytes()
        with pytest.raises(OpenError, match=LOST):
            DB.open(path, timeout=0)
    assert path.read_bytes() == backup


# Removed by hand


def remove_the_wal(path: str) -> None:
    os.remove(f"{path}-wal")


def remove_the_index(path: str) -> None:
    os.remove(f"{path}-shm")


def put_a_copy_of_the_wal_in_its_place(path: str) -> None:
    os.replace(shutil.copyfile(f"{path}-wal", f"{path}-copy"), f"{path}-wal")


def remove_the_file(path: str) -> None:
    os.remove(path)


def empty_the_file(path: str) -> None:
    os.truncate(path, 0)


def put_a_backup_in_its_place(path: str) -> None:
    make_rollback(Path(f"{path}-backup"))
    os.replace(f"{path}-backup", path)


def copy_a_backup_into_it(path: str) -> None:
    """Which leaves the inode. As each file that `--backup` makes, it isn't in WAL mode."""
    make_rollback(Path(f"{path}-backup"))
    shutil.copyfile(f"{path}-backup", path)


CHANGES = [
    remove_the_wal,
    remove_the_index,
    put_a_copy_of_the_wal_in_its_place,
    remove_the_file,
    empty_the_file,
    put_a_backup_in_its_place,
]
NOT_THERE = f"{LOST}|removed, replaced or emptied"


def at_commit(conn: sqlite3.Connection, action: Callable[[], object]) -> None:
    """Do it when the connection begins its next COMMIT."""
    conn.set_trace_callback(lambda sql: action() if sql == "COMMIT" else None)


def pass_ten_milliseconds(clock: list[float]) -> None:
    clock[0] += _guard.LOOK_EVERY


@pytest.mark.parametrize("moment", ["before the block", "in the block", "in COMMIT"])
@pytest.mark.parametrize(
    ("lock", "change"),
    [
        *(pytest.param("on", change, marks=has_lock) for change in (*CHANGES, copy_a_backup_into_it)),
        *(("off", change) for change in CHANGES),
    ],
)
def test_what_is_not_there_any_more_is_found_out_within_ten_milliseconds(
    lock: str,
    change: Callable[[str], None],
    moment: str,
    clock: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And where there is no lock, by the next transaction: the clock goes on only if there is one."""
    if lock == "off":
        monkeypatch.setattr(_guard, "_SETLK", None)
    with DB.open(tmp_path / "daemon.db") as db:

        def lose_it() -> None:
            change(db.path)
            if lock == "on":
                pass_ten_milliseconds(clock)

        with db.transaction() as conn:
            insert_run(conn)
        if moment == "before the block":
            lose_it()
        with pytest.raises(OpenError, match=NOT_THERE), db.transaction() as conn:
            insert_run(conn, "late")
            if moment == "in the block":
                lose_it()
            elif moment == "in COMMIT":
                at_commit(conn, lose_it)
        assert not conn.in_transaction
        if moment == "in the block":  # it was rolled back
            assert conn.execute("SELECT id FROM runs").fetchall() == [("run-1",)]


@has_lock
def test_the_look_comes_once_in_ten_milliseconds(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note_and_look(guard: _guard.Guard, file: File) -> int | None:
        looks.append(any(conn.in_transaction for conn in thread.connections.values()))
        return look(guard, file)

    def transact() -> list[bool]:
        looks.clear()
        with db.transaction() as conn:
            insert_run(conn, f"run-{clock[0]}")
            conn.execute("DELETE FROM runs")
        return looks.copy()

    looks: list[bool] = []  # of each, whether it came within the transaction
    look = _guard.Guard.look
    monkeypatch.setattr(_guard.Guard, "look", note_and_look)
    with DB.open(tmp_path / "daemon.db") as db:
        assert transact() == [False]  # the first one after the open, before its block
        for _ in range(3):
            assert [transact() for _ in range(10)] == [[]] * 10
            clock[0] += 0.9 * _guard.LOOK_EVERY
            assert [transact() for _ in range(10)] == [[]] * 10
            clock[0] += 0.2 * _guard.LOOK_EVERY
            assert transact() == [False]
        at_commit(db.conn, lambda: pass_ten_milliseconds(clock))
        assert transact() == [False]
        db.conn.set_trace_callback(None)
        assert transact() == []
        looks.clear()
        with db.transaction():
            pass_ten_milliseconds(clock)
        assert looks[:1] == [True]  # before COMMIT
        assert transact() == []


def test_ten_milliseconds_count_from_before_the_look(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is removed while the thread is held up after its look, as on a busy machine, is not found out later."""

    def look_and_lose(guard: _guard.Guard, file: File) -> int | None:
        monkeypatch.setattr(_guard.Guard, "look", look)
        found = look(guard, file)
        os.remove(f"{file.real_path}-wal")
        pass_ten_milliseconds(clock)
        return found

    look = _guard.Guard.look
    with DB.open(tmp_path / "daemon.db") as db:
        monkeypatch.setattr(_guard.Guard, "look", look_and_lose)
        with pytest.raises(OpenError, match=LOST), db.transaction() as conn:
            insert_run(conn)


@pytest.mark.parametrize(
    "use",
    [lambda db: DB.open(db.path), lambda db: in_thread(lambda: db.conn), lambda db: db.snapshot().__enter__()],
    ids=["a new DB", "a new thread", "a snapshot"],
)
def test_all_but_transactions_look_each_time(use: Callable[[DB], object], clock: list[float], tmp_path: Path) -> None:
    """The clock, which stands still, is that of `transaction()` alone."""
    path = tmp_path / "daemon.db"
    with DB.open(path) as db:
        with db.transaction() as conn:
            insert_run(conn)
        os.remove(f"{path}-wal")
        with pytest.raises(OpenError, match=LOST):
            use(db)


REMOVALS = {"-wal": ["-wal"], "-shm": ["-shm"], "both": ["-wal", "-shm"]}
removals = pytest.mark.parametrize("removed", REMOVALS.values(), ids=REMOVALS)

OPEN_AT_ONCE = f"""
{WHEN_ASKED}
import sqlite3
from support import insert_run

conn = sqlite3.connect(sys.argv[1], isolation_level=None)
try:
    insert_run(conn, "other") if sys.argv[2] == "writes" else conn.execute("SELECT * FROM runs").fetchall()
    print(sys.argv[2], flush=True)
except sqlite3.DatabaseError:
    print("can't", flush=True)  # of a WAL and an index that don't belong together SQLite can't make much
sys.stdin.readline()
"""
REMOVE_BY_HAND = f"""
def insert(name):
    with db.transaction() as conn:
        insert_run(conn, name)

sys.modules["daemon_db.db"].LOOK_EVERY = 0
path, lock, who, what, *removed = sys.argv[1:]
if lock == "off":
    _guard._SETLK = None
other = Fork({OPEN_AT_ONCE!r}, path, what)
db = DB.open(path, on_connect=no_sync)
for number in range(3):
    insert(f"in the WAL {{number}}")
for suffix in removed:
    os.remove(path + suffix)
if what != "nothing":
    other.stdin.write("go\\n")
    other.stdin.flush()
    print(other.stdout.readline(), end="")
try:
    insert("late") if who == "transaction" else in_thread(lambda: db.conn)
except OpenError as error:
    print(error)
end(other)
db.close()
"""


@removals
@pytest.mark.parametrize("lock", [pytest.param("on", marks=has_lock), "off"])
@pytest.mark.parametrize("who", ["transaction", "a new thread"])
@pytest.mark.parametrize("what", ["reads", "writes", "nothing"])
def test_what_was_removed_by_hand_is_found_out(
    removed: list[str], lock: str, who: str, what: str, forks: Forks, tmp_path: Path
) -> None:
    """Also where another process makes it anew at once. What that one commits, the daemon's close doesn't overwrite."""
    for number in range(rounds(1, 10)):
        path = tmp_path / f"{number}.db"
        make_wal(path)
        said = forks.run(REMOVE_BY_HAND, path, lock, who, what, *removed)
        assert LOST in said
        if removed == ["-wal", "-shm"]:
            assert said.startswith(what) or what == "nothing"
            check_whole(path, ["run-1", "other"] if what == "writes" else ["run-1"])


@pytest.mark.usefixtures("sqlite3_program")
@has_lock
@pytest.mark.parametrize(
    ("removed", "then"),
    [
        (["-wal"], "closed"),
        (["-shm"], "closed"),
        (["-wal", "-shm"], "closed"),
        (["-wal"], "found out"),
        (["-wal", "-shm"], "found out"),
        (["-wal"], "looked at"),
        (["-shm"], "looked at"),
    ],
)
def test_what_is_in_a_wal_that_was_removed_by_hand_is_saved_by_closing(
    removed: list[str], then: str, tmp_path: Path
) -> None:
    """Also when somebody has looked meanwhile, and made an empty -wal (but not if both are gone: that is a new WAL)."""
    path = tmp_path / "daemon.db"
    with DB.open(path) as db:
        for number in range(3):
            with db.transaction() as conn:
                insert_run(conn, f"run-{number}")
        in_thread(lambda: db.conn)
        for suffix in removed:
            os.remove(f"{path}{suffix}")
        if then == "looked at":
            look(path, check=False)
        if then != "closed":
            with pytest.raises(OpenError, match=LOST):
                in_thread(lambda: db.conn)
    with DB.open(path) as db:
        assert db.conn.execute("SELECT id FROM runs ORDER BY id").fetchall() == [("run-0",), ("run-1",), ("run-2",)]
        assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert list(files_in(tmp_path)) == ["daemon.db"]


# What others commit meanwhile

OTHER_WRITES = """
what = sys.stdin.readline().strip()
conn = sqlite3.connect(sys.argv[1], isolation_level=None)
conn.execute("PRAGMA synchronous=OFF")
for number in range(300):
    insert_run(conn, f"other-{number}")
if what == "truncate":
    assert conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
print("done", flush=True)
if what == "stay":
    sys.stdin.readline()
conn.close()
"""
LOSE = f"""
def write(name):
    with db.transaction() as conn:
        insert_run(conn, name)

def refused(use):
    with pytest.raises(OpenError, match=LOST):
        use()

def go_on_without_the_lock():
    global db
    db.close()
    _guard._SETLK = None
    db = DB.open(path)
    write("first")

def lose():
    for suffix in "", "-shm":
        open(path + suffix).close()
    look(path)

def remove(*suffixes):
    for suffix in suffixes:
        os.remove(path + suffix)

def other(what="close"):
    process.stdin.write(what + "\\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\\n", end(process)
    return process

path = sys.argv[1]
process = Fork({OTHER_WRITES!r}, path)
db = DB.open(path, on_connect=no_sync)
write("before")
"""
LOSE_BEFORE_THE_FIRST_READ = """
def lose_and_read(conn):
    _opening.read_first = read_first
    lose()
    other("stay")
    read_first(conn)

go_on_without_the_lock()
read_first, _opening.read_first = _opening.read_first, lose_and_read
"""
ENDS = {
    "removed by hand, and the other has emptied its WAL": """
remove("-wal", "-shm")
end(other("truncate"))
refused(lambda: write("late"))
""",
    "removed by hand, and the other has closed": """
remove("-wal", "-shm")
end(other())
refused(lambda: write("late"))
""",
    "the -shm removed within a block": """
with pytest.raises(OpenError, match=LOST), db.transaction() as conn:
    insert_run(conn, "late")
    remove("-shm")
    other("stay")
end(process)
""",
    "without the lock, within a block with an automatic checkpoint": """
go_on_without_the_lock()
with pytest.raises(OpenError, match=LOST), db.transaction() as conn:
    conn.execute(f"UPDATE runs SET {spare('runs')} = hex(randomblob(4000000)) WHERE id = 'before'")
    lose()
    end(other())
""",
    "without the lock, and a statement by itself has written into the lost WAL": """
go_on_without_the_lock()
lose()
end(other())
with contextlib.suppress(sqlite3.DatabaseError):  # by itself, SQLite may find out, or not
    insert_run(db.conn, "nobody sees this")
refused(lambda: write("late"))
""",
    "without the lock, between the look and the first read of another thread": f"""
{LOSE_BEFORE_THE_FIRST_READ}
refused(lambda: in_thread(lambda: db.conn))
end(process)
""",
    "without the lock, between the look and the first read of another DB": f"""
{LOSE_BEFORE_THE_FIRST_READ}
refused(lambda: DB.open(path))
end(process)
""",
}


@pytest.mark.usefixtures("sqlite3_program")
@has_lock
@pytest.mark.parametrize("how", ENDS.values(), ids=ENDS)
def test_a_daemon_that_has_lost_its_wal_overwrites_nothing(how: str, forks: Forks, tmp_path: Path) -> None:
    path = tmp_path / "daemon.db"
    make_wal(path)
    forks.run(f"{LOSE}{how}db.close()", path)
    check_whole(path, ["run-1", *(f"other-{number}" for number in range(300))])


@pytest.mark.usefixtures("sqlite3_program")
@has_lock
def test_a_daemon_that_only_reads_stays_up_to_date(forks: Forks, tmp_path: Path) -> None:
    """Others write, checkpoint, and begin the WAL anew: to them, the lock is one reader more."""

    def count() -> int:
        return int(db.conn.execute("SELECT count(*) FROM runs").fetchone()[0])

    path = tmp_path / "daemon.db"
    make_wal(path)
    for read_only in (False, True):
        with DB.open(path, read_only=read_only) as db:
            for number in range(3):
                open(path, "rb").close()
                look(path)
                with closing(sqlite3.connect(path)) as other:
                    assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
                forks.run(OTHER, path, 20, f"{read_only}-{number}")
                assert count() == in_thread(count) == 1 + 20 * (number + 1) + 60 * read_only


@has_lock
def test_what_another_process_has_committed_to_a_new_wal_beside_the_same_index_stays(tmp_path: Path) -> None:
    path = tmp_path / "daemon.db"
    with DB.open(path) as db:
        insert_run(db.conn)
        db.conn.execute("PRAGMA wal_checkpoint")  # so that the next commit begins the WAL anew
        os.remove(f"{path}-wal")
        assert run(OTHER, path, 3, "other").endswith("done\n")
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert conn.execute("SELECT count(*) FROM runs").fetchone() == (4,)


# Closing


def test_a_close_that_is_interrupted_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal's exception comes when SQLite has closed."""

    def interrupt(*_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    path = tmp_path / "daemon.db"
    before = open_files()
    db = DB.open(path)
    conn = db.conn
    insert_run(conn)
    monkeypatch.setattr(_process.Process, "remove", interrupt)
    with pytest.raises(KeyboardInterrupt):
        db.close()
    db.close()
    assert not _process.this_process().has_open(conn)
    with DB.open(path) as db:
        insert_run(db.conn, "run-2")
    assert open_files() == before


def test_a_connection_whose_generator_another_thread_has_closed_leaves_nothing_behind(tmp_path: Path) -> None:
    def insert() -> Iterator[None]:
        with db.transaction() as conn:
            insert_run(conn)
            yield

    with DB.open(tmp_path / "daemon.db") as db:
        insert_run(db.conn, "run-2")
        generator = insert()
        next(generator)
        in_thread(generator.close)  # type: ignore[attr-defined]
    assert list(files_in(tmp_path)) == ["daemon.db"]


def test_no_other_thread_joins_while_the_last_connection_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of the one that joins would be given back with that of the one that leaves."""

    def ask_and_leave(guard: _guard.Guard, *arguments: Any) -> None:
        free.append(in_thread(lambda: guard.mutex.acquire(blocking=False)))
        leave(guard, *arguments)

    free: list[bool] = []
    leave = _guard.Guard.leave
    monkeypatch.setattr(_guard.Guard, "leave", ask_and_leave)
    DB.open(tmp_path / "daemon.db").close()
    assert free == [False]


# Forks, and programs that are started


FORKED_CHILD_WRITES = """
warnings.simplefilter("ignore")
path, rounds = sys.argv[1], int(sys.argv[2])
db = DB.open(path, timeout=LIMIT, on_connect=no_sync)
in_thread(lambda: db.conn.execute("SELECT 1").fetchone())  # SQLite keeps its descriptor for the next connection
child = os.fork()
if child == 0:
    conn = sqlite3.connect(path, isolation_level=None, timeout=LIMIT)
    no_sync(conn)
for number in range(rounds):
    if child:
        with db.transaction() as conn:
            insert_run(conn, f"parent-{number}")
    else:
        insert_run(conn, f"child-{number}")
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
db.close()
"""


def test_a_forked_child_that_writes_all_the_same_by_sqlite3_alone(forks: Forks, tmp_path: Path) -> None:
    """The README forbids it: SQLite's lock on the file isn't the child's. But writers still wait for each other."""
    path = tmp_path / "daemon.db"
    make_wal(path)
    count = rounds(100, 3000)
    forks.run(FORKED_CHILD_WRITES, path, count)
    check_whole(path, [f"{who}-{number}" for who in ("parent", "child") for number in range(count)])


@has_lock
def test_a_fork_takes_nothing_from_the_parent(forks: Forks, tmp_path: Path) -> None:
    """The child frees other threads' locals before any at-fork function runs, and a `DB` among them."""
    code = """
def locks():
    inode = os.stat(sys.argv[1]).st_ino
    found = set()
    for _ in range(10):  # in one reading, some may be missing or twice, while other programs' locks come and go
        with open("/proc/locks") as lines:
            found |= {tuple(line.split()[1:]) for line in lines if f":{inode} " in line}
    return found

def hold():
    local.db = DB.open(sys.argv[1] + "-other")
    db.close()  # the main thread's connection is open still
    ready.set()
    ended.wait()
    local.db.close()

warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
local, ready, ended = threading.local(), threading.Event(), threading.Event()
db = DB.open(sys.argv[1])
insert_run(db.conn)
thread = threading.Thread(target=hold)
thread.start()
wait_for(ready)
before = locks()
assert any(kind == "OFDLCK" for kind, *_ in before), before
child = os.fork()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert locks() == before
ended.set()
join(thread)
"""
    forks.run(code, tmp_path / "daemon.db")


PARENT = """
import os, signal, subprocess, sys, time, warnings
from daemon_db import DB
from support import LIMIT, insert_run

warnings.simplefilter("ignore")
path, how = sys.argv[1:]
db = DB.open(path)
insert_run(db.conn, f"run-{os.getpid()}")
if how == "fork":
    child = os.fork()
    if child == 0:
        os.close(1)
        os.close(2)
        time.sleep(10 * LIMIT)
        os._exit(0)
else:
    nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(["sleep", str(10 * LIMIT)], close_fds=how == "subprocess", **nowhere)
    child = process.pid
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["fork", "subprocess", "subprocess that inherits"])
def test_a_child_that_outlives_its_killed_parent_is_in_nobodys_way(how: str, tmp_path: Path) -> None:
    path = tmp_path / "daemon.db"
    wal = Path(f"{path}-wal")
    for number in range(rounds(1, 100)):
        parent = start(PARENT, path, how)
        child = int(parent.stdout.readline())
        try:
            assert end(parent) == ("", "")
            with DB.open(path) as db:
                with db.transaction() as conn:
                    insert_run(conn, f"run-of-the-next-{number}")
                assert db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
            # A forked child has SQLite's descriptors, and the lock on them: as long as it lives, both stay there.
            assert list(files_in(tmp_path)) == ["daemon.db"] or how == "fork" and wal.stat().st_size == 0
        finally:
            os.kill(child, 9)
        wait_for_end(child)
        DB.open(path).close()
        assert list(files_in(tmp_path)) == ["daemon.db"]


def wait_for_end(process: int) -> None:
    """Of a process that isn't this one's child: it is gone, or what is left of it waits for its new parent."""
    limit = time.monotonic() + LIMIT
    with suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < limit
            time.sleep(0.001)


# What it costs, and what it leaves alone


@has_lock
def test_one_descriptor_more_than_sqlite_needs_is_needed_or_an_error_says_so(forks: Forks, tmp_path: Path) -> None:
    """To find SQLite's in the list of all."""
    code = """
with DB.open(sys.argv[1]) as db:
    insert_run(db.conn)
resource.setrlimit(resource.RLIMIT_NOFILE, (30, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
taken = []
with contextlib.suppress(OSError):
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))
for _ in range(3):  # the file, its -wal and its -shm
    os.close(taken.pop())
with pytest.raises(OpenError, match="no free file descriptor"):
    DB.open(sys.argv[1])
os.close(taken.pop())
with DB.open(sys.argv[1]) as db:
    assert _guard.guard_of(db._state.file).is_locked
    assert db.conn.execute("SELECT id FROM runs").fetchall() == [("run-1",)]
"""
    forks.run(code, tmp_path / "daemon.db")
    assert list(files_in(tmp_path)) == ["daemon.db"]


@pytest.mark.usefixtures("sqlite3_program")
@has_lock
def test_the_lock_is_not_on_a_descriptor_that_somebody_else_may_close(tmp_path: Path) -> None:
    path = tmp_path / "daemon.db"
    make_wal(path)
    with open(path, "rb") as somebodys:
        db = DB.open(path)
        assert somebodys.fileno() not in _guard.guard_of(db._state.file)._locks
    with db:
        insert_run(db.conn, "run-2")
        look(path)
        assert Path(f"{path}-wal").exists()


@has_lock
def test_a_plain_connection_of_the_process_is_no_obstacle(tmp_path: Path) -> None:
    """It has the -shm open already, and SQLite may use its descriptors again."""
    path = tmp_path / "daemon.db"
    make_wal(path)
    with closing(sqlite3.connect(path)) as plain, closing(sqlite3.connect(path)) as another:
        plain.execute("SELECT * FROM runs").fetchall()
        another.execute("SELECT * FROM runs").fetchall()
        another.close()
        with DB.open(path) as db:
            assert _guard.guard_of(db._state.file).is_locked
            insert_run(db.conn, "run-2")
        assert plain.execute("SELECT count(*) FROM runs").fetchone() == (2,)
    assert list(files_in(tmp_path)) == ["daemon.db"]


def test_a_reader_of_a_file_in_rollback_journal_mode_is_in_no_writers_way(tmp_path: Path) -> None:
    path = tmp_path / "daemon.db"
    make_rollback(path)
    with DB.open(path, read_only=True) as db:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as other:
            insert_run(other, "run-2")
        assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (2,)
