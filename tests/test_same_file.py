"""A `DB` is to one file: once that is removed or replaced, no commit is acknowledged and no later connection made.

And what becomes of a -wal whose file is gone: it is put aside, and nothing in it is lost.
"""

import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from daemon_db import DB, OpenError, _guard, _opening, _process, _wait
from daemon_db._file import File
from support import (
    LIMIT,
    append_event,
    bytes_of,
    end,
    files_in,
    in_thread,
    insert_run,
    make_killed,
    make_rollback,
    make_wal,
    no_sync,
    open_files,
    rounds,
    run,
    runs,
    runs_in,
    start,
    wait_for,
)

GONE = "removed, replaced or emptied"
LONE = "gone or empty, but its -wal"


@pytest.fixture(autouse=True)
def looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each transaction looks, also within 10 ms after a look."""
    monkeypatch.setattr("daemon_db.db.LOOK_EVERY", 0)


def remove(file: Path) -> None:
    file.unlink()


def remove_all(file: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        os.remove(f"{file}{suffix}")


def move_away(file: Path) -> None:
    file.rename(file.with_name("moved.db"))


def move_the_directory_away(file: Path) -> None:
    file.parent.rename(file.parent.with_name("moved"))


def put_another_in_its_place(file: Path) -> None:
    make_wal(file.with_name("backup.db"))
    file.with_name("backup.db").replace(file)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def link_to_a_copy(file: Path) -> None:
    copy = shutil.copyfile(file, file.with_name("copy.db"))
    file.unlink()
    file.symlink_to(copy)


def remove_left(file: Path) -> None:
    for suffix in ("-wal", "-shm"):
        file.with_name(file.name + suffix).unlink(missing_ok=True)


changes = pytest.mark.parametrize(
    "change", [remove, remove_all, move_away, move_the_directory_away, put_another_in_its_place, link_to_a_copy]
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The path of a database in a directory of its own."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "daemon.db"


# Later connections


@pytest.mark.parametrize("change", ["moved", "replaced"])
def test_a_file_that_is_put_back_is_used_again(change: str, file: Path) -> None:
    """Until then there is no later connection and no transaction, and nothing is created."""
    moved, other = file.with_name("moved.db"), file.with_name("other.db")
    make_wal(other)
    with DB.open(file) as db:
        insert_run(db.conn)
        db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the other file could be read without an error
        file.rename(moved)
        if change == "replaced":
            other.rename(file)
        with pytest.raises(OpenError, match=GONE):
            in_thread(lambda: db.conn)
        with pytest.raises(OpenError, match=GONE), db.transaction():
            pass
        assert file.exists() == (change == "replaced")
        moved.rename(file)
        assert in_thread(lambda: runs(db)) == {"run-1"}
        with db.transaction() as conn:
            insert_run(conn, "run-2")


@changes
def test_ten_refused_connections_leave_no_file_open(change: Callable[[Path], None], file: Path) -> None:
    def ask() -> list[int]:
        opened = []
        for _ in range(10):
            with pytest.raises(OpenError, match=GONE):
                _ = db.conn
            opened.append(len(open_files()))
        return opened

    before = open_files()
    with DB.open(file) as db:
        insert_run(db.conn)
        change(file)
        with ThreadPoolExecutor(1) as pool:
            opened = pool.submit(ask).result(LIMIT)
            assert opened == opened[:1] * 10
    assert open_files() == before


def test_a_connection_has_its_own_files_wal_from_the_beginning(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()

    def work() -> list[object]:
        conn = db.conn
        connected.set()
        wait_for(replaced)
        return conn.execute("SELECT id FROM runs").fetchall()

    connected, replaced = threading.Event(), threading.Event()
    with (
        DB.open(tmp_path / "other" / "daemon.db") as other,
        DB.open(file) as db,
        ThreadPoolExecutor(1) as pool,
    ):
        insert_run(other.conn, "run-2")
        insert_run(db.conn)
        future = pool.submit(work)
        wait_for(connected)
        (tmp_path / "data").rename(tmp_path / "old")
        (tmp_path / "other").rename(tmp_path / "data")
        replaced.set()
        assert future.result(LIMIT) == [("run-1",)]


def test_a_file_replaced_by_one_with_its_inode(tmp_path: Path) -> None:
    """As may be, once no connection holds the old file. Here the new one is empty."""
    file = tmp_path / "daemon.db"
    db = in_thread(lambda: DB.open(file))
    file.write_bytes(b"")  # the same inode for certain
    with db, pytest.raises(OpenError, match=GONE):
        _ = db.conn
    assert file.read_bytes() == b""


@pytest.mark.parametrize(
    "step", ["Connection", "read_first"], ids=["once SQLite has opened it", "after its first read"]
)
@pytest.mark.parametrize("change", [remove, move_away, empty, put_another_in_its_place])
def test_a_file_that_vanishes_while_a_later_connection_is_opened(
    change: Callable[[Path], None], step: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only after the first read is it certain which WAL a connection has."""

    def take_step_and_change(argument: Any) -> object:
        monkeypatch.undo()
        result = getattr(_opening, step)(argument)
        change(file)
        return result

    with DB.open(file) as db:
        insert_run(db.conn)
        monkeypatch.setattr(_opening, step, take_step_and_change)
        with pytest.raises(OpenError, match=GONE):
            in_thread(lambda: db.conn)
        assert Path(f"{file}-wal").exists()  # which SQLite would remove when it reads the new file


@pytest.mark.parametrize("which", ["DB", "thread"])
@pytest.mark.parametrize("moment", ["sqlite3.connect", "sqlite3.connect/handle"])
def test_a_refused_connection_leaves_alone_what_others_have_in_memory(which: str, moment: str, tmp_path: Path) -> None:
    """The WAL's index, which is beside the path still when a backup is moved there.

    Whatever reads the new file begins it anew, and empties it first: a thread that reads the old one then would crash
    the process. The moments are Python's audit events, before SQLite opens the file and after it.
    """
    code = """
import logging, os, sys
from pathlib import Path
from daemon_db import DB, OpenError
from support import in_thread, insert_run, make_wal

logging.disable()  # of the old file's WAL, which the last close puts aside
path, moment, which = sys.argv[1:]
events = []

def hook(event, arguments):
    if event == moment and armed:
        armed.clear()
        os.replace(path + "-backup", path)
        os.utime(path + "-shm", (1, 1))
        events.append("replaced")

def ask():
    armed.append(True)
    try:
        db.conn if which == "thread" else DB.open(path)
    except OpenError as error:
        assert "removed, replaced or emptied" in str(error), error
        events.append("refused")

armed = []
make_wal(Path(path + "-backup"))
sys.addaudithook(hook)
with DB.open(path) as db:
    insert_run(db.conn, "run-of-the-old")
    in_thread(ask)
    assert events == ["replaced", "refused"], events
    assert os.stat(path + "-shm").st_mtime == 1
    assert db.conn.execute("SELECT id FROM runs").fetchall() == [("run-of-the-old",)]
"""
    run(code, tmp_path / "daemon.db", moment, which)


@pytest.mark.parametrize(
    ("change", "owner", "step"),
    [(remove, File, "remember_id"), (put_another_in_its_place, _opening, "read_first")],
    ids=["removed once SQLite has opened it", "replaced before the first read"],
)
def test_a_file_that_vanishes_while_it_is_created(
    change: Callable[[Path], None], owner: object, step: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change_first(argument: object) -> object:
        monkeypatch.undo()
        change(file)
        changed.update(files_in(file.parent))
        return getattr(owner, step)(argument)

    changed: dict[str, bytes | None] = {}
    before = open_files()
    monkeypatch.setattr(owner, step, change_first)
    with pytest.raises(OpenError, match=GONE):
        DB.open(file)
    assert files_in(file.parent) == changed
    assert open_files() == before


# Another DB


OPTIONS: list[dict[str, Any]] = [{}, {"read_only": True}, {"create": False}]


@pytest.mark.parametrize("change", [remove, move_away, put_another_in_its_place])
def test_the_new_file_is_not_opened_before_the_old_one_is_closed(change: Callable[[Path], None], file: Path) -> None:
    """Or SQLite would empty the WAL's index that is there, which threads of the old one have in memory.

    Nor is the WAL put aside, which they have open.
    """
    with DB.open(file) as db:
        insert_run(db.conn, "run-of-the-old")
        in_thread(lambda: db.conn)
        change(file)
        before = files_in(file.parent)
        is_gone = change is not put_another_in_its_place
        for options in OPTIONS * 2:
            with pytest.raises(OpenError, match=LONE if is_gone and options else GONE):
                DB.open(file, **options)
        assert files_in(file.parent) == before
        assert runs(db) == {"run-of-the-old"}
    remove_left(file)
    with DB.open(file) as new:
        assert runs(new) == (set() if is_gone else {"run-1"})


@pytest.mark.parametrize("removed", ["-wal", "-shm"])
def test_nor_where_only_one_of_them_is_left(removed: str, file: Path) -> None:
    with DB.open(file) as db:
        insert_run(db.conn)
        os.remove(file)
        os.remove(f"{file}{removed}")
        with pytest.raises(OpenError, match=GONE):
            DB.open(file)


def test_also_where_the_process_has_another_db_without_connections(file: Path) -> None:
    with in_thread(lambda: DB.open(file.with_name("another.db"))), DB.open(file) as db:
        insert_run(db.conn)
        put_another_in_its_place(file)
        with pytest.raises(OpenError, match=GONE):
            DB.open(file)


def test_nor_before_what_the_threads_of_the_closed_one_have_in_memory_is_removed(file: Path) -> None:
    def work() -> int:
        conn = db.conn
        connected.set()
        wait_for(opened)
        return len(conn.execute("SELECT * FROM runs").fetchall())

    connected, opened = threading.Event(), threading.Event()
    db = DB.open(file)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        wait_for(connected)
        put_another_in_its_place(file)
        db.close()
        with pytest.raises(OpenError, match=GONE):
            DB.open(file)
        remove_left(file)
        with DB.open(file) as new:
            opened.set()
            assert future.result(LIMIT) == 0
            assert runs(new) == {"run-1"}
    with DB.open(file) as new:
        assert runs(new) == {"run-1"}


def test_once_all_of_the_old_one_is_removed_the_new_one_may_be_opened(file: Path) -> None:
    with DB.open(file) as db:
        insert_run(db.conn)
        remove_all(file)
        with DB.open(file) as new:
            insert_run(new.conn, "run-of-the-new")
            assert (runs(db), runs(new)) == ({"run-1"}, {"run-of-the-new"})
    with DB.open(file) as new:
        assert runs(new) == {"run-of-the-new"}


@pytest.mark.parametrize(("old", "new"), [("link/daemon.db", "data/daemon.db"), ("data/./daemon.db", "data/daemon.db")])
def test_by_whatever_name_the_new_file_is_opened(old: str, new: str, file: Path) -> None:
    parent = file.parent.parent
    (parent / "link").symlink_to("data")
    with DB.open(os.path.join(parent, old)) as db:
        insert_run(db.conn)
        put_another_in_its_place(file)
        with pytest.raises(OpenError, match=GONE):
            DB.open(os.path.join(parent, new))
        assert runs(db) == {"run-1"}


def test_the_file_that_a_db_has_open_may_be_opened_by_whatever_name(file: Path) -> None:
    link = file.with_name("link.db")
    with DB.open(file) as db:
        link.symlink_to(file)
        with DB.open(link) as linked:
            link.unlink()  # so that the one is where it was, and the other isn't
            with DB.open(file) as another:
                insert_run(another.conn)
            assert runs(linked) == runs(db) == {"run-1"}


@changes
def test_another_file_may_be_opened_whatever_became_of_the_one(change: Callable[[Path], None], file: Path) -> None:
    with DB.open(file) as db:
        change(file)
        for _ in range(2):
            with DB.open(file.parent.with_name("another.db")) as another, DB.open(another.path) as same:
                insert_run(another.conn)
                same.conn.execute("DELETE FROM runs")
        assert runs(db) == set()


@pytest.mark.parametrize(
    ("owner", "step"),
    [(_process, "refuse_inherited"), (File, "remember_id")],
    ids=["when the path has been looked at", "when it is created"],
)
def test_two_create_a_file_at_once(owner: object, step: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(argument: object) -> None:
        monkeypatch.undo()
        others.extend(opened.enter_context(DB.open(file)) for _ in range(2))
        getattr(owner, step)(argument)

    others: list[DB] = []
    monkeypatch.setattr(owner, step, create)
    with ExitStack() as opened, DB.open(file) as db:
        insert_run(others[0].conn)
        assert runs(db) == {"run-1"}


# Transactions


@changes
def test_no_transaction_is_acknowledged_any_more(change: Callable[[Path], None], file: Path) -> None:
    with DB.open(file) as db:
        insert_run(db.conn)
        with pytest.raises(OpenError, match=GONE), db.transaction() as conn:
            append_event(conn)
            change(file)
            append_event(conn)
        assert not db.conn.in_transaction
        for _ in range(2):
            with pytest.raises(OpenError, match=GONE), db.transaction():
                pytest.fail("it has begun")
            assert not db.conn.in_transaction


def test_the_error_of_the_block_is_seen_although_the_file_is_gone(file: Path) -> None:
    with DB.open(file) as db, pytest.raises(ValueError, match="the block's"), db.transaction() as conn:
        insert_run(conn)
        file.unlink()
        raise ValueError("the block's")


def test_no_other_connection_to_an_emptied_file_removes_the_wal(file: Path) -> None:
    """SQLite would, at its first read: also a connection that only reads, and one that closes."""
    with DB.open(file) as db, DB.open(file, read_only=True) as reader:
        insert_run(db.conn)
        wal = Path(f"{file}-wal").read_bytes()
        os.truncate(file, 0)
        for options in OPTIONS:
            with pytest.raises(OpenError, match=LONE if options else GONE):
                DB.open(file, **options)
        with pytest.raises(OpenError, match=GONE):
            in_thread(lambda: db.conn)
        with pytest.raises(OpenError, match=GONE), db.transaction():
            raise AssertionError
        assert (file.stat().st_size, Path(f"{file}-wal").read_bytes()) == (0, wal)
        reader.close()
        assert Path(f"{file}-wal").read_bytes() == wal
    assert (file.stat().st_size, Path(f"{file}-wal").read_bytes()) == (0, wal)  # nor does the last close write a part


def test_an_emptied_file_is_got_back_as_the_words_say(file: Path) -> None:
    """With the file of before, and the -wal."""
    with DB.open(file) as db:
        for number in range(50):
            insert_run(db.conn, f"run-{number}")
        db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        before = shutil.copyfile(file, file.with_name("before.db"))
        for number in range(50, 100):
            insert_run(db.conn, f"run-{number}")
        os.truncate(file, 0)
        kept = shutil.copyfile(f"{file}-wal", file.with_name("kept-wal"))
    shutil.copyfile(before, file)
    if not Path(f"{file}-wal").exists():
        shutil.copyfile(kept, f"{file}-wal")
    with DB.open(file) as db:
        assert len(runs(db)) == 100
        assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_link_that_is_moved_with_its_file(tmp_path: Path) -> None:
    """The WAL stays beside the file's old name, and who opens the link from now on would find nothing of it."""
    (tmp_path / "data").mkdir()
    link, file = tmp_path / "daemon.db", tmp_path / "data" / "daemon.db"
    link.symlink_to(file)
    with DB.open(link) as db:
        insert_run(db.conn)
        file.rename(file.with_name("moved.db"))
        link.unlink()
        link.symlink_to(file.with_name("moved.db"))
        with pytest.raises(OpenError, match=GONE), db.transaction():
            pass
        with pytest.raises(OpenError, match=GONE):
            in_thread(lambda: db.conn)


@pytest.mark.parametrize("change", [remove, remove_all, put_another_in_its_place])
def test_eight_writers_and_no_commit_acknowledged_later_than_ten_milliseconds_after_the_change(
    change: Callable[[Path], None], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write() -> OpenError | None:
        """Until one is refused. The error, or None for a commit that was acknowledged though it was made too late."""
        while True:
            is_late = False
            try:
                with db.transaction() as conn:
                    append_event(conn)
                    is_late = bool(changed_at) and _wait.now() > changed_at[0] + _guard.LOOK_EVERY
            except OpenError as error:
                return error
            if is_late:
                return None
            appended.release()

    monkeypatch.undo()
    for _ in range(rounds(5, 300)):
        appended, changed_at = threading.Semaphore(0), list[float]()
        with DB.open(file, timeout=LIMIT, on_connect=no_sync) as db:
            with db.transaction() as conn:
                insert_run(conn)
            with ThreadPoolExecutor(8) as pool:
                futures = [pool.submit(write) for _ in range(8)]
                for _ in range(50):
                    assert appended.acquire(timeout=LIMIT)
                change(file)
                changed_at.append(_wait.now())
                errors = [str(future.result(LIMIT)) for future in futures]
        # For one that has just found the file in its place, the WAL's removal may be what it meets.
        unexpected = [error for error in errors if GONE not in error and "-shm was removed or replaced" not in error]
        assert unexpected == []
        for name in os.listdir(file.parent):
            (file.parent / name).unlink()


def test_what_read_only_sees_of_a_removed_file_stays_readable_and_no_new_thread_joins(tmp_path: Path) -> None:
    make_wal(tmp_path / "daemon.db")
    with DB.open(tmp_path / "daemon.db", read_only=True) as db:
        assert runs(db) == {"run-1"}
        (tmp_path / "daemon.db").unlink()
        assert runs(db) == {"run-1"}
        with pytest.raises(OpenError, match=GONE):
            in_thread(lambda: db.conn)
        with pytest.raises(sqlite3.OperationalError), db.transaction():
            pass


def test_two_hard_links(tmp_path: Path) -> None:
    """Each name would have a WAL of its own. By another path to the same name it is opened."""
    make_wal(tmp_path / "db")
    os.link(tmp_path / "db", tmp_path / "other.db")
    (tmp_path / "link").symlink_to(tmp_path)
    with DB.open(tmp_path / "db") as db:
        insert_run(db.conn, "run-2")
        for read_only in False, True:
            with pytest.raises(OpenError, match=f"has it open as {tmp_path / 'db'}, "):
                DB.open(tmp_path / "other.db", read_only=read_only)
        with DB.open(tmp_path / "link" / "db") as again:
            assert again.conn.execute("SELECT count(*) FROM runs").fetchone() == (2,)
        insert_run(db.conn, "run-3")
    with DB.open(tmp_path / "other.db") as db:
        assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (3,)


def test_a_backup_that_was_copied_into_the_file_while_no_thread_had_it_open(file: Path) -> None:
    """The inode is the same, but the file isn't in WAL mode."""
    with in_thread(lambda: DB.open(file)) as db:
        make_rollback(file.with_name("backup.db"))
        shutil.copyfile(file.with_name("backup.db"), file)
        before = files_in(file.parent)
        with pytest.raises(OpenError, match=GONE):
            insert_run(db.conn, "run-2")
    assert files_in(file.parent) == before


# A -wal without its file


def make_lone(file: Path, how: str = "gone") -> dict[str, bytes]:
    """Remove or empty the file of a killed process; what is beside it, by suffix."""
    make_killed(file, runs=3)
    file.rename(file.with_name("moved.db"))
    if how == "empty":
        file.touch()
    left = bytes_of(file)
    assert len(left["-wal"]) > 0
    return left


def test_a_lone_wal_that_cannot_be_renamed_stays_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For instance because the new name would be too long: a file's may have 255 bytes."""
    file = tmp_path / ("x" * 240)
    make_lone(file)
    before = files_in(tmp_path)
    with pytest.raises(sqlite3.OperationalError, match="can't rename") as caught:
        DB.open(file)
    assert isinstance(caught.value, OpenError)
    assert caught.value.path == str(file)
    assert files_in(tmp_path) == before
    assert caplog.records == []


OPEN_AND_WRITE = """
import logging, sys
from daemon_db import DB
from support import insert_run

logging.disable()
with DB.open(sys.argv[1]) as db:
    for number in range(2):
        with db.transaction() as conn:
            insert_run(conn, f"quick-{number}")
        print("written", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("how", ["gone", "empty"])
@pytest.mark.parametrize("renamed", [0, 1])
def test_two_open_at_once_and_what_the_quicker_one_commits_stays_there(
    renamed: int, how: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one is held up when it has looked at the -wal, before it renames it, or between its two renames."""

    def rename(source: str, target: str) -> None:
        calls.append(source)
        if len(calls) == renamed + 1:
            others.append(start(OPEN_AND_WRITE, file))
            assert others[0].stdout.readline() == "written\n"
        os_rename(source, target)

    left = make_lone(file, how)
    calls: list[str] = []
    others: list[subprocess.Popen[str]] = []
    os_rename = os.rename
    monkeypatch.setattr(os, "rename", rename)
    with DB.open(file) as db:
        insert_run(db.conn, "slow")
        others[0].stdin.write("\n")
        others[0].stdin.flush()
        assert others[0].stdout.readline() == "written\n"
        assert end(others[0]) == ("", "")
        insert_run(db.conn, "last")
    assert runs_in(file) == {"last", "quick-0", "quick-1", "slow"}
    assert left["-wal"] in [path.read_bytes() for path in file.parent.glob("*-wal")]
