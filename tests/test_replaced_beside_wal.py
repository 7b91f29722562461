"""A backup that takes the daemon's file's place while the old file's -wal lies there: neither is destroyed.

SQLite would play that -wal over the backup. A backup is what `python -m daemon_db PATH --backup DEST` makes.
"""

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from daemon_db import DB, OpenError
from support import (
    ENVIRONMENT,
    LIMIT,
    bytes_of,
    end,
    files_in,
    in_thread,
    insert_run,
    no_sync,
    public_directory,
    run,
    something_is_forbidden,
    start,
    unprivileged,
)

OLD, NEW, NEWEST = 20, 400, 20
"""How many runs: in the backup; in the file by then, too; and besides in its -wal alone."""


def insert(conn: sqlite3.Connection, name: str, count: int) -> None:
    for number in range(count):
        insert_run(conn, f"{name}-{number}")


def back_up(path: Path) -> None:
    command = [sys.executable, "-m", "daemon_db", path, "--backup", f"{path}-backup"]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=LIMIT)


def fill(db: DB) -> None:
    """A file with all its runs, and a backup of it as it was."""
    insert(db.conn, "old", OLD)
    back_up(Path(db.path))
    insert(db.conn, "new", NEW)
    db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    insert(db.conn, "newest", NEWEST)


IN_BACKUP = {f"old-{number}" for number in range(OLD)}
IN_ALL = IN_BACKUP.union(
    *({f"{name}-{number}" for number in range(count)} for name, count in {"new": NEW, "newest": NEWEST}.items())
)


def runs(path: Path) -> set[str]:
    """For a stranger; and the file is in order."""
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {run_id for (run_id,) in conn.execute("SELECT id FROM runs NOT INDEXED")}


def check_backup(path: Path) -> None:
    """It is whole, and can be worked with."""
    assert runs(path) == IN_BACKUP
    with DB.open(path) as db, db.transaction() as conn:
        insert_run(conn, "run-1")
    assert runs(path) == IN_BACKUP | {"run-1"}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the logger has said, from warnings upwards."""
    assert {record.name for record in caplog.records} <= {"daemon_db"}
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def the_one_aside(path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    """The -wal that was renamed, of which one warning tells."""
    (wal,) = path.parent.glob(f"{path.name}-[0-9]*-wal")
    assert [
        str(path) in each and str(wal) in each and "belongs to the old one" in each for each in warnings(caplog)
    ] == [True]
    return wal


def put_back(wal: Path, path: Path) -> None:
    """By the README."""
    for suffix in ("-wal", "-shm"):
        aside = Path(str(wal).removesuffix("-wal") + suffix)
        if aside.exists():
            aside.rename(f"{path}{suffix}")


# How the backup gets there


def move(path: Path) -> None:
    os.replace(f"{path}-backup", path)


def move_the_old_one_away(path: Path) -> None:
    os.rename(path, f"{path}-old")
    os.rename(f"{path}-backup", path)


def cp(path: Path) -> None:
    subprocess.run(["cp", f"{path}-backup", path], check=True, timeout=LIMIT)


def copyfile(path: Path) -> None:
    """In this very process, whose locks are dropped by that."""
    shutil.copyfile(f"{path}-backup", path)


IN_PLACE = """
import sys
with open(f"{sys.argv[1]}-backup", "rb") as backup, open(sys.argv[1], "r+b") as file:
    file.write(backup.read())
    file.truncate()
"""


def copy_in_place(path: Path) -> None:
    """As `rsync --inplace` does: the file is never empty."""
    run(IN_PLACE, path)


def move_a_copy_in_wal_mode(path: Path) -> None:
    """As `.backup` of the `sqlite3` program makes one. Only while the daemon has the file open, that can be told."""
    with open(f"{path}-backup", "r+b") as backup:
        backup.seek(18)
        backup.write(b"\2\2")  # https://sqlite.org/fileformat2.html, 1.3.3
    move(path)


PUTS = [move, move_the_old_one_away, cp, copyfile, copy_in_place]


# How the daemon finds out


def write(db: DB) -> None:
    for _ in range(10_000):  # which takes far longer than a hundredth of a second
        with db.transaction() as conn:
            insert_run(conn, f"late-{os.urandom(9).hex()}")


def read_a_snapshot(db: DB) -> None:
    with db.snapshot():
        pass


def read_in_a_new_thread(db: DB) -> None:
    in_thread(lambda: db.conn)


def stop(_: DB) -> None:
    """It does nothing any more, and is closed."""


@pytest.mark.parametrize("look", [write, read_a_snapshot, read_in_a_new_thread, stop])
@pytest.mark.parametrize("put", [*PUTS, move_a_copy_in_wal_mode])
def test_while_the_daemon_has_the_file_open(
    put: Callable[[Path], None], look: Callable[[DB], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "daemon.db"
    with DB.open(path, on_connect=no_sync) as db:
        fill(db)
        before = bytes_of(path)
        put(path)
        if look is not stop:
            with pytest.raises(OpenError, match="removed, replaced"):
                look(db)
    wal = the_one_aside(path, caplog)
    assert wal.read_bytes().startswith(before["-wal"])
    check_backup(path)
    caplog.clear()
    if put is move_the_old_one_away:
        path.unlink()
        Path(f"{path}-old").rename(path)
        put_back(wal, path)
        DB.open(path).close()
        assert runs(path) >= IN_ALL
        assert warnings(caplog) == []


def test_the_second_process_that_closes_finds_nothing_to_rename(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "daemon.db"
    with DB.open(path, on_connect=no_sync) as db:
        fill(db)
        second = start(
            "import sys\nfrom daemon_db import DB\n"
            "with DB.open(sys.argv[1]):\n    print('ready', flush=True)\n    sys.stdin.readline()",
            path,
        )
        assert second.stdout and second.stdout.readline() == "ready\n"
        cp(path)
    the_one_aside(path, caplog)
    assert end(second) == ("", "")
    the_one_aside(path, caplog)
    check_backup(path)


# After a kill


DAEMON = """
import sys
from pathlib import Path
from daemon_db import DB
from test_replaced_beside_wal import fill

db = DB.open(sys.argv[1])
fill(db)
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a daemon that was killed, with a backup."""
    directory = tmp_path_factory.mktemp("killed")
    daemon = start(DAEMON, directory / "daemon.db")
    assert daemon.stdout and daemon.stdout.readline() == "ready\n"
    daemon.kill()
    end(daemon)
    assert {"", "-wal", "-shm"} == bytes_of(directory / "daemon.db").keys()
    return directory


@pytest.fixture
def killed(template: Path, tmp_path: Path) -> Path:
    """The path of what a killed daemon left."""
    return shutil.copytree(template, tmp_path / "killed") / "daemon.db"


@pytest.mark.parametrize("put", PUTS)
def test_beside_the_wal_of_a_killed_daemon(
    put: Callable[[Path], None], killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = bytes_of(killed)
    put(killed)
    with DB.open(killed) as db:
        assert {run_id for (run_id,) in db.conn.execute("SELECT id FROM runs NOT INDEXED")} == IN_BACKUP
    wal = the_one_aside(killed, caplog)
    assert wal.read_bytes() == before["-wal"]
    check_backup(killed)
    caplog.clear()
    # The old file was nowhere but in another's place: as it was, it has its newest commits again.
    killed.write_bytes(before[""])
    put_back(wal, killed)
    DB.open(killed).close()
    assert runs(killed) == IN_ALL
    assert warnings(caplog) == []


@pytest.mark.parametrize("put", PUTS)
def test_a_reader_refuses_and_renames_nothing(
    put: Callable[[Path], None], killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(killed)
    before = files_in(killed.parent)
    with pytest.raises(OpenError, match="belongs to the old one. Remove nothing"):
        DB.open(killed, read_only=True)
    assert files_in(killed.parent) == before
    assert warnings(caplog) == []


@pytest.mark.parametrize("put", PUTS)
def test_the_last_close_of_a_reader_renames_nothing(
    put: Callable[[Path], None], killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DB.open(killed, read_only=True) as db:
        assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (len(IN_ALL),)
        put(killed)
        before = files_in(killed.parent)
        with pytest.raises(OpenError, match="removed, replaced"):
            read_a_snapshot(db)
    assert files_in(killed.parent) == before
    assert warnings(caplog) == []
    DB.open(killed).close()
    the_one_aside(killed, caplog)
    check_backup(killed)


def replace_by_its_own_copy(path: Path) -> None:
    """As `sed -i` and editors do: the same bytes, another inode."""
    shutil.copyfile(path, f"{path}-new")
    os.replace(f"{path}-new", path)


def test_a_killed_daemons_file_that_was_replaced_by_its_own_copy_has_its_newest_commits(
    killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its header says WAL mode, as the old one's did: the -wal is its own."""
    replace_by_its_own_copy(killed)
    DB.open(killed).close()
    assert runs(killed) == IN_ALL
    assert warnings(caplog) == []
    assert not list(killed.parent.glob("*-wal"))


def test_a_live_file_that_was_replaced_by_its_own_copy_has_its_newest_commits_in_the_wal_put_aside(
    killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DB.open(killed) as db:
        replace_by_its_own_copy(killed)
        with pytest.raises(OpenError, match="removed, replaced"):
            read_a_snapshot(db)
    wal = the_one_aside(killed, caplog)
    assert runs(killed) == {run_id for run_id in IN_ALL if not run_id.startswith("newest")}
    put_back(wal, killed)
    DB.open(killed).close()
    assert runs(killed) == IN_ALL


@pytest.mark.parametrize("put", PUTS)
def test_a_reader_that_was_closed_before_is_no_reason_not_to_look(put: Callable[[Path], None], killed: Path) -> None:
    """It has left its lock where it was, so that SQLite left the -wal there."""
    reader = DB.open(killed, read_only=True)
    reader.close()
    put(killed)
    with DB.open(killed) as db:
        assert {run_id for (run_id,) in db.conn.execute("SELECT id FROM runs NOT INDEXED")} == IN_BACKUP
    assert repr(reader).endswith("closed>")
    check_backup(killed)


def test_an_empty_wal_beside_a_backup_is_nobodys(killed: Path, caplog: pytest.LogCaptureFixture) -> None:
    move(killed)
    os.truncate(f"{killed}-wal", 0)
    check_backup(killed)
    assert warnings(caplog) == []


# A rename that fails


PROLOGUE = """
import logging, os, sqlite3, sys
from daemon_db import DB, OpenError

def content(suffix):
    with open(path + suffix, "rb") as file:
        return file.read()

path = sys.argv[1]
directory = os.path.dirname(path)
logging.getLogger("daemon_db").addHandler(logging.StreamHandler(sys.stdout))
"""

AT_THE_CLOSE = """
db = DB.open(path)
{put}
before = content(""), content("-wal")
os.chmod(directory, 0o555)
db.close()
"""

AT_THE_OPEN = """
{put}
before = content(""), content("-wal")
os.chmod(directory, 0o555)
try:
    DB.open(path)
except OpenError as error:
    print(error)
"""

EPILOGUE = """
assert (content(""), content("-wal")) == before
os.chmod(directory, 0o755)
DB.open(path).close()
"""


@pytest.mark.skipif(not something_is_forbidden(), reason="root can't become another user here")
@pytest.mark.parametrize("put", ["os.replace(path + '-backup', path)", IN_PLACE], ids=["moved", "copied"])
@pytest.mark.parametrize("moment", [AT_THE_CLOSE, AT_THE_OPEN], ids=["a warning at the close", "an error at the open"])
def test_a_rename_that_fails(moment: str, put: str, template: Path) -> None:
    with public_directory() as public:
        directory = shutil.copytree(template, public / "daemon")
        for each in (directory, *directory.iterdir()):
            shutil.chown(each, 65534, 65534)
        with unprivileged() as run_there:
            said = run_there(PROLOGUE + moment.format(put=put) + EPILOGUE, directory / "daemon.db")
        first, then = said.splitlines()
        assert "can't rename" in first and "belongs to the old one" in then
        assert len(list(directory.glob("daemon.db-*-wal"))) == 1
        check_backup(directory / "daemon.db")
