"""A backup that takes the daemon's file's place while the old file's -wal lies there: neither is destroyed.

SQLite would play that -wal over the backup. A backup is what `python -m daemon_db PATH --backup DEST` makes.
"""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
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
    runs_in,
    something_is_forbidden,
    start,
    unprivileged,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SQLite's own descriptor is found in /proc")

OLD = [f"old-{number}" for number in range(20)]
"""The runs that are in the backup."""
NEW = [f"new-{number}" for number in range(400)]
"""Those that are in the file by then, too."""
NEWEST = [f"newest-{number}" for number in range(20)]
"""Those that are in the file's -wal alone."""


def fill(db: DB) -> None:
    """A file with all its runs, and a backup of it as it was."""

    def insert(names: list[str]) -> None:
        for name in names:
            insert_run(db.conn, name)

    insert(OLD)
    command = [sys.executable, "-m", "daemon_db", db.path, "--backup", f"{db.path}-backup"]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=LIMIT)
    insert(NEW)
    db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    insert(NEWEST)


def check_backup(path: Path) -> None:
    """It is whole, and can be worked with."""
    assert runs_in(path) == {*OLD}
    with DB.open(path) as db, db.transaction() as conn:
        insert_run(conn, "run-1")
    assert runs_in(path) == {*OLD, "run-1"}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the logger has said, from warnings upwards."""
    assert {record.name for record in caplog.records} <= {"daemon_db"}
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def the_one_aside(path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    """The -wal that was renamed, of which one warning tells."""
    (wal,) = path.parent.glob(f"{path.name}-[0-9]*-wal")
    (warning,) = warnings(caplog)
    assert str(path) in warning and str(wal) in warning and "belongs to the old one" in warning
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
        assert runs_in(path) >= {*OLD, *NEW, *NEWEST}
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
        assert second.stdout.readline() == "ready\n"
        cp(path)
    the_one_aside(path, caplog)
    assert end(second) == ("", "")
    the_one_aside(path, caplog)
    check_backup(path)


# After a kill


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a daemon that was killed, with a backup."""
    live, killed = tmp_path_factory.mktemp("live"), tmp_path_factory.mktemp("killed")
    with DB.open(live / "daemon.db", on_connect=no_sync) as db:
        fill(db)
        shutil.copytree(live, killed, dirs_exist_ok=True)
    assert {"", "-wal", "-shm"} == bytes_of(killed / "daemon.db").keys()
    return killed


@pytest.fixture
def killed(template: Path, tmp_path: Path) -> Path:
    """The path of what a killed daemon left."""
    return shutil.copytree(template, tmp_path / "killed") / "daemon.db"


@pytest.mark.parametrize("earlier", ["nobody", "a reader"])
@pytest.mark.parametrize("put", PUTS)
def test_beside_the_wal_of_a_killed_daemon(
    put: Callable[[Path], None], earlier: str, killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader that was closed earlier has left its lock where it was: that is no reason not to look."""
    before = bytes_of(killed)
    if earlier == "a reader":
        reader = DB.open(killed, read_only=True)  # in a variable, and so is what it knows of the file
        reader.close()
    put(killed)
    with DB.open(killed) as db:
        assert {run_id for (run_id,) in db.conn.execute("SELECT id FROM runs NOT INDEXED")} == {*OLD}
    wal = the_one_aside(killed, caplog)
    assert wal.read_bytes() == before["-wal"]
    check_backup(killed)
    caplog.clear()
    # The old file was nowhere but in another's place: as it was, it has its newest commits again.
    killed.write_bytes(before[""])
    put_back(wal, killed)
    DB.open(killed).close()
    assert runs_in(killed) == {*OLD, *NEW, *NEWEST}
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
        assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (len(OLD + NEW + NEWEST),)
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
    assert runs_in(killed) == {*OLD, *NEW, *NEWEST}
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
    assert runs_in(killed) == {*OLD, *NEW}
    put_back(wal, killed)
    DB.open(killed).close()
    assert runs_in(killed) == {*OLD, *NEW, *NEWEST}


def test_an_empty_wal_beside_a_backup_is_nobodys(killed: Path, caplog: pytest.LogCaptureFixture) -> None:
    move(killed)
    os.truncate(f"{killed}-wal", 0)
    check_backup(killed)
    assert warnings(caplog) == []


# A rename that fails


FAIL_TO_RENAME = """
import logging, os, sys
from daemon_db import DB, OpenError

def content(suffix):
    with open(path + suffix, "rb") as file:
        return file.read()

path, put, moment = sys.argv[1:]
directory = os.path.dirname(path)
logging.getLogger("daemon_db").addHandler(logging.StreamHandler(sys.stdout))
if moment == "close":
    db = DB.open(path)
exec(put)
before = content(""), content("-wal")
os.chmod(directory, 0o555)
if moment == "close":
    db.close()
else:
    try:
        DB.open(path)
    except OpenError as error:
        print(error)
assert (content(""), content("-wal")) == before
os.chmod(directory, 0o755)
DB.open(path).close()
"""


@pytest.mark.skipif(not something_is_forbidden(), reason="root can't become another user here")
@pytest.mark.parametrize("put", ["os.replace(path + '-backup', path)", IN_PLACE], ids=["moved", "copied"])
@pytest.mark.parametrize("moment", ["close", "open"], ids=["a warning at the close", "an error at the open"])
def test_a_rename_that_fails(moment: str, put: str, template: Path) -> None:
    with public_directory() as public:
        directory = shutil.copytree(template, public / "daemon")
        for each in (directory, *directory.iterdir()):
            shutil.chown(each, 65534, 65534)
        with unprivileged() as run_there:
            said = run_there(FAIL_TO_RENAME, directory / "daemon.db", put, moment)
        first, then = said.splitlines()
        assert "can't rename" in first and "belongs to the old one" in then
        assert len(list(directory.glob("daemon.db-*-wal"))) == 1
        check_backup(directory / "daemon.db")
