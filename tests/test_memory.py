"""`DB.open(":memory:")`: one database for all threads of a `DB`, and for nobody else."""

import gc
import sqlite3
from pathlib import Path

import pytest

from daemon_db import DB
from support import in_thread, insert_run, rounds, run, runs

shares_memory = pytest.mark.skipif(
    sqlite3.sqlite_version_info < (3, 36), reason="SQLite before 3.36 has no memory database for several threads"
)


@shares_memory
def test_it_is_its_own_threads_only_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with DB.open(":memory:") as db, DB.open(":memory:") as other:
        insert_run(db.conn)
        assert in_thread(lambda: runs(db)) == {"run-1"}
        assert in_thread(lambda: runs(other)) == set()
        assert list(tmp_path.iterdir()) == []


@shares_memory
def test_it_outlives_the_thread_that_opened_it() -> None:
    """And the one that filled it, and any moment at which no thread has a connection."""
    db = in_thread(lambda: DB.open(":memory:"))
    in_thread(lambda: insert_run(db.conn))
    gc.collect()
    assert in_thread(lambda: runs(db)) == {"run-1"}
    with db:
        assert runs(db) == {"run-1"}


def test_an_older_sqlite_refuses_it_to_a_second_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 35, 5))
    with DB.open(":memory:") as db:
        insert_run(db.conn)
        with pytest.raises(sqlite3.NotSupportedError, match="for one thread only"):
            in_thread(lambda: db.conn)
        assert runs(db) == {"run-1"}
        assert list(tmp_path.iterdir()) == []


@shares_memory
@pytest.mark.parametrize("end", ["db.close()", "del db", "in_thread(db.close)"])
def test_it_is_gone_when_it_is_closed_or_dropped(end: str) -> None:
    """Nothing holds the memory any more: who opens SQLite's name for it finds an empty database."""
    code = f"""
import gc, sqlite3, sys, warnings
from daemon_db import DB
from support import in_thread, insert_run

def tables():
    conn = sqlite3.connect(name, uri=True)
    count = conn.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    conn.close()
    return count

warnings.simplefilter("ignore", ResourceWarning)
names = []
sys.addaudithook(lambda event, arguments: names.append(arguments[0]) if event == "sqlite3.connect" else None)
db = DB.open(":memory:")
name = next(name for name in names if "memdb" in str(name))
insert_run(db.conn)
in_thread(lambda: db.conn)
assert tables() > 3
{end}
DB.open(":memory:").close()  # when this thread closes what another thread closed the DB of
assert tables() == 0
"""
    run(code)


@shares_memory
def test_a_commit_that_waits_for_a_reader() -> None:
    """As it never does in a file in WAL mode."""

    def write() -> None:
        with db.transaction() as conn:
            insert_run(conn, "run-2")

    with DB.open(":memory:", timeout=0) as db:
        insert_run(db.conn)
        half_read = db.conn.execute("SELECT id FROM runs UNION ALL SELECT id FROM runs")
        half_read.fetchone()
        with pytest.raises(sqlite3.OperationalError, match="^database is locked") as caught:
            in_thread(write)
        (note,) = caught.value.__notes__
        assert "another thread reads" in note
        half_read.close()
        in_thread(write)
        assert runs(db) == {"run-1", "run-2"}


@shares_memory
def test_two_threads_that_close_it_at_once() -> None:
    """`Connection.close` isn't made for two at once: without the GIL that would crash the interpreter."""
    code = """
import sys, threading
from daemon_db import DB
from support import LIMIT, join

def close(is_used):
    for db in dbs:
        if is_used:  # else only the connection is left to close that keeps the memory
            db.conn.execute("SELECT 1").fetchone()
        barrier.wait(LIMIT)
        db.close()

for is_used in (False, True) * int(sys.argv[1]):
    dbs, barrier = [DB.open(":memory:") for _ in range(200)], threading.Barrier(4)
    threads = [threading.Thread(target=close, args=(is_used,), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    join(*threads)
    for db in dbs:
        db.close()
"""
    run(code, rounds(1, 50))
