"""No space left: a limit on the size of files, in place of a full disk. SQLite meets the same failing writes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from daemon_db import DB
from support import make_nothing, make_rollback, make_wal, run

OPEN_LIMITED = """
import resource, sys
from daemon_db import DB, OpenError

_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))
try:
    DB.open(sys.argv[1])
except OpenError as error:
    print(error.reason, error.sqlite_errorname)
"""

APPEND_LIMITED = """
import os, resource, sqlite3, sys
from daemon_db import DB
from support import insertion, spare

path, cache_size = sys.argv[1:]
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)


def append(count):
    ran = 0
    try:
        with db.transaction() as conn:
            for _ in range(count):
                conn.execute(insert)
                ran += 1
    except sqlite3.OperationalError as error:
        print(error, "in COMMIT" if ran == count else "in INSERT")
    assert not db.conn.in_transaction
    print(*db.conn.execute("SELECT count(*) FROM events").fetchone())


with DB.open(path, on_connect=lambda conn: conn.execute(f"PRAGMA cache_size={cache_size}")) as db:
    event = {"run_id": "'run-1'", "sequence": "(SELECT count(*) + 1 FROM events)", "event_type": "'step'"}
    insert = insertion(db.conn, "events", **event, **{spare("events"): "hex(zeroblob(2000))"})
    append(3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path + "-wal") + 100_000, hard))
    append(100)
    append(4)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    append(100)
"""


@pytest.mark.parametrize(
    ("make", "limit", "name"),
    [
        (make_nothing, 0, "SQLITE_IOERR_WRITE"),  # the rollback journal
        (make_nothing, 600, "SQLITE_IOERR_WRITE"),  # the first page
        (make_nothing, 8192, "SQLITE_IOERR_SHMSIZE"),  # the -shm
        (make_nothing, 40_000, "SQLITE_IOERR_WRITE"),  # the WAL, in the transaction that creates the schema
        (make_rollback, 0, "SQLITE_IOERR_WRITE"),
        (make_rollback, 600, "SQLITE_IOERR_WRITE"),
        (make_wal, 0, "SQLITE_IOERR_SHMOPEN"),
        (make_wal, 600, "SQLITE_IOERR_SHMSIZE"),
    ],
)
def test_opening(make: Callable[[Path], None], limit: int, name: str, tmp_path: Path) -> None:
    path = tmp_path / "db"
    make(path)
    said = run(OPEN_LIMITED, path, limit)
    assert said.endswith(f" {name}\n")
    is_index = name in ("SQLITE_IOERR_SHMOPEN", "SQLITE_IOERR_SHMSIZE")
    assert said.startswith("no space left for its -shm (a quota, or ulimit -f), or" if is_index else "disk I/O error")
    with DB.open(path) as db:
        assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (0 if make is make_nothing else 1,)
        assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize(("cache_size", "where"), [(-2000, "in COMMIT"), (10, "in INSERT")])
def test_a_transaction(cache_size: int, where: str, tmp_path: Path) -> None:
    """Rolled back whole; a smaller one fits, and with more space so does the next.

    With so few pages of cache, SQLite writes to the WAL before COMMIT.
    """
    path = tmp_path / "db"
    make_wal(path)
    assert run(APPEND_LIMITED, path, cache_size).splitlines() == ["3", f"disk I/O error {where}", "3", "7", "107"]
    with DB.open(path) as db:
        assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (107,)
        assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
