"""No space left: a limit on the size of files, in place of a full disk. SQLite meets the same failing writes.

And no space for temporary files, or no directory for them, on real file systems in a mount namespace.
"""

import os
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from daemon_db import DB, _schema
from support import insertion, make_nothing, make_rollback, make_wal, run
from test_mount import can_mount, do_in_a_namespace

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
    assert run(OPEN_LIMITED, path, limit).endswith(f" {name}\n")
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


# Temporary files


def make_without_index(path: Path) -> None:
    """A file to which the next open adds an index. To sort it, SQLite makes a temporary file of some megabytes."""
    make_rollback(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        for (name,) in conn.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql NOT NULL").fetchall():
            conn.execute(f'DROP INDEX "{name}"')
        n = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)"
        event = {"run_id": "hex(zeroblob(100))", "sequence": "i", "event_type": "'step'"}
        conn.execute(f"{n} {insertion(conn, 'events', 'FROM n', **event)}")


FULL = """
mount -t tmpfs -o size=256k none temporary
export SQLITE_TMPDIR=$PWD/temporary
"""
READ_ONLY = """
for each in /tmp /var/tmp /usr/tmp "$PWD"; do
    if [ -d "$each" ]; then mount --bind "$each" "$each"; mount -o remount,bind,ro "$each"; fi
done
cd "$PWD"
mount --bind writable writable
mount -o remount,bind,rw writable
export SQLITE_TMPDIR=$PWD/{} TMPDIR=/no/such/directory
"""
PLACES = {"full": FULL, "missing": READ_ONLY.format("no"), "read-only": READ_ONLY.format("temporary")}


def update_without_room(directory: Path, place: str) -> str:
    """Try to update "writable/db", where that is the place for temporary files; what it says."""
    for name in "writable", "temporary":
        (directory / name).mkdir()
    make_without_index(directory / "writable" / "db")
    script = f'set -e\n{PLACES[place]}\nexec "$@" -m daemon_db writable/db'
    done = do_in_a_namespace("bash", "-c", script, "bash", sys.executable, cwd=directory)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    return done.stderr.removeprefix("daemon_db: ")


can_mount_all = [can_mount, pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount /tmp read-only")]


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("full", marks=can_mount),
        pytest.param("missing", marks=can_mount_all),
        pytest.param("read-only", marks=can_mount_all),
    ],
)
def test_an_update_without_room_for_temporary_files(place: str, tmp_path: Path) -> None:
    """It names the variable by which another place is given. Nothing was added; with room, all is."""
    said = update_without_room(tmp_path, place)
    path = tmp_path / "writable" / "db"
    assert said.startswith(f"{path}: ")
    assert "SQLITE_TMPDIR" in said
    with closing(sqlite3.connect(path)) as conn:
        select = "SELECT count(*) FROM sqlite_master WHERE type = 'index' AND sql NOT NULL"
        assert conn.execute(select).fetchone() == (0,)
        assert conn.execute("SELECT count(*) FROM events").fetchone() == (30_000,)
    with DB.open(path) as db:
        assert _schema.expected()[1].keys() <= {name for (name,) in db.conn.execute("SELECT name FROM sqlite_master")}
        assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
