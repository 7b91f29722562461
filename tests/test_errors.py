"""The errors of opening; and the table of all sentences that people see, each with what raises it.

The words are pinned here, and only here. So whoever changes a sentence changes one line of the table. Elsewhere, two to
four words tell what is meant.
"""

import errno
import os
import pickle
import re
import resource
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from daemon_db import DB, OpenError, SchemaError, _connection, _guard, _mount, _opening, _schema, errors
from support import (
    CHANGES,
    FIRST,
    append_event,
    end,
    files_in,
    in_thread,
    insert_run,
    join,
    make_hot,
    make_killed,
    make_rollback,
    make_wal,
    public_directory,
    run,
    something_is_forbidden,
    spare,
    start,
    unprivileged,
    use_schema,
    wait_for,
)
from test_main import command, in_a_process, make_orphans
from test_mount import can_bindfs, can_mount, in_a_namespace
from test_no_space import can_mount_all, update_without_room

needs_another_user = pytest.mark.skipif(not something_is_forbidden(), reason="root can't become another user here")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux's")

Situation = Callable[[Path], str | None]
TABLE: dict[str, tuple[str, Situation]] = {}
ROWS = []


def says(names: str, words: str, *marks: pytest.MarkDecorator) -> Callable[[Situation], Situation]:
    """Put a text into the table, whole. `names` are those of the sentences of `errors` that it consists of.

    The function that follows is the situation: it gets the path "DIR/db". What is said there is what it returns; or
    what it raises, of an error with notes the last note; or else what it logs, the gravest. A number that is another
    one each time is written "N".
    """

    def add(situation: Situation) -> Situation:
        TABLE[names] = words, situation
        ROWS.append(pytest.param(names, marks=marks, id=names))
        return situation

    return add


SAY = """
import os, sys
from daemon_db import DB, OpenError

path = sys.argv[1]
"""
LIMIT_FILES = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))\n"


def said_by(code: str, path: Path, **options: object) -> str:
    """The last line that a process writes which `code` ends by an error, without the error's name."""
    process = start(SAY + code, path, **options)
    _, said = end(process)
    assert process.returncode == 1, said
    return said.splitlines()[-1].partition(": ")[2]


def said_to_another_user(code: str, make: Callable[[Path], None], file_mode: int, directory_mode: int) -> str:
    """The same, as another user, with these rights on the files and on their directory."""
    with public_directory() as public, unprivileged(CHANGES[0]) as run_there:
        (public / "directory").mkdir()
        make(public / "directory" / "db")
        for file in (public / "directory").iterdir():
            file.chmod(file_mode)
        (public / "directory").chmod(directory_mode)
        said = run_there(
            f"{SAY}try:\n    exec({code!r})\nexcept OpenError as e:\n    print(e)", public / "directory" / "db"
        )
        return said.strip().replace(f"{public}/directory", "DIR")


def first_line(script: str, path: Path) -> str:
    """The first line that the script writes in a mount namespace."""
    return in_a_namespace(script, path.parent)[0].removeprefix("daemon_db: ")


def backed_up(path: Path, destination: Path) -> str:
    """What `--backup` says."""
    make_wal(path)
    return command("--backup", destination, path).stderr.removeprefix("daemon_db: ")


def problem(path: Path, **options: bool) -> str:
    """The only one that the schema has."""
    with pytest.raises(SchemaError) as caught:
        DB.open(path, **options)
    (said,) = caught.value.problems
    return said


def begin(db: DB) -> None:
    with db.transaction():
        raise AssertionError


@contextmanager
def on_nfs(path: Path) -> Iterator[None]:
    """By a list of mounts of its own."""
    mounts = path.with_name("mounts")
    mounts.write_text("22 1 0:40 / / rw - nfs4 server:/ rw\n", encoding="ascii")
    with patch.object(_mount, "_LIST", str(mounts)), patch.object(_opening, "_known_devices", set()):
        yield


# The path


@says("NOT_THERE", "DIR/db: it does not exist")
def _(path: Path) -> None:
    DB.open(path, create=False)


@says("EMPTY", "DIR/db: it is empty: no database yet")
def _(path: Path) -> None:
    path.touch()
    DB.open(path, create=False)


@says("NOT_REGULAR", "DIR/db: not a regular file")
def _(path: Path) -> None:
    os.mkfifo(path)
    DB.open(path)


@says("DIRECTORY", "DIR/db: it is a directory")
def _(path: Path) -> None:
    path.mkdir()
    DB.open(path)


@says("NO_PARENT", f"DIR/no/db: parent directory DIR/no: {os.strerror(errno.ENOENT)}")
def _(path: Path) -> None:
    DB.open(path.parent / "no" / "db")


@says("NO_WORKING_DIRECTORY", f"db: the working directory: {os.strerror(errno.ENOENT)}")
def _(path: Path) -> str:
    path.mkdir()
    return said_by("os.rmdir(os.getcwd())\nDB.open('db')", path, cwd=path)


@says("BELONGS_TO", "DIR/db-wal: it belongs to DIR/db: open that one")
def _(path: Path) -> None:
    make_killed(path)
    DB.open(f"{path}-wal")


@says(
    "FORBIDDEN",
    "DIR/db: permission denied, or a read-only file system: this user can't write DIR/db",
    needs_another_user,
)
def _(path: Path) -> str:
    return said_to_another_user("DB.open(path)", make_wal, 0o444, 0o755)


@says(
    "CANNOT_LOOK",
    f"DIR/db: {os.strerror(errno.EACCES)}: this user may not look at it any more. Give the right back",
    needs_another_user,
)
def _(path: Path) -> str:
    code = """
directory = os.path.join(os.path.dirname(path), "closed")
os.mkdir(directory)
with DB.open(os.path.join(directory, "db")) as db:
    os.chmod(directory, 0)
    try:
        with db.transaction():
            raise AssertionError
    finally:
        os.chmod(directory, 0o777)
"""
    return said_to_another_user(code, lambda path: None, 0o777, 0o777).replace("DIR/closed", "DIR")


@says(
    "MOUNTED_ALONE",
    "DIR/db: it is mounted without its directory (a container, or systemd's BindPaths=), so its -wal, with the newest "
    'commits, would be lost. Keep the container as it is: see "Mounted alone" in the README',
    can_mount,
)
def _(path: Path) -> str:
    make_wal(path.with_name("host.db"))
    path.touch()
    return first_line("mount --bind host.db db\ndaemon_db db", path)


@says(
    "SHARED_FILE_SYSTEM",
    "DIR/db is on nfs4, which machines may share. Let one machine's programs only have it open "
    "(https://sqlite.org/wal.html)",
)
def _(path: Path) -> None:
    with on_nfs(path):
        DB.open(path).close()


# Removed, replaced


@says(
    "REPLACED",
    "DIR/db: the file that this process has open was removed, replaced or emptied. Stop, start and change nothing yet: "
    'first see "Removed or replaced" in the README',
)
def _(path: Path) -> None:
    with DB.open(path) as db:
        path.unlink()
        begin(db)


@says(
    "REPLACED_FOR_READER",
    "DIR/db: the file that this DB reads was removed, replaced or emptied. Nothing was written: close the DB, and open "
    "it again",
)
def _(path: Path) -> None:
    make_wal(path)
    with DB.open(path, read_only=True) as db:
        path.unlink()
        with db.snapshot():
            raise AssertionError


@says(
    "WAL_REMOVED",
    "DIR/db: its -wal or -shm was removed or replaced: the newest commits may be lost. End every program that has it "
    'open, without kill -9, and start none: see "The WAL was lost" in the README',
)
def _(path: Path) -> None:
    with DB.open(path) as db:
        Path(f"{path}-wal").unlink()
        begin(db)


@says(
    "TWO_NAMES",
    "DIR/two: this process has it open as DIR/db, and each name has a -wal of its own: commits get lost. Open it by "
    "that name",
)
def _(path: Path) -> None:
    with DB.open(path):
        os.link(path, path.with_name("two"))
        DB.open(path.with_name("two"))


@says(
    "LONE_WAL",
    "DIR/db: the file is gone or empty, but its -wal was there, maybe with the newest commits. A new database begins, "
    'and the old -wal is now DIR/db-N-wal: see "Removed or replaced" in the README',
)
def _(path: Path) -> None:
    make_killed(path)
    path.unlink()
    DB.open(path).close()


@says(
    "LONE_WAL_KEPT",
    "DIR/db: the file is gone or empty, but its -wal is there, maybe with the newest commits. Remove nothing: see "
    '"Removed or replaced" in the README',
)
def _(path: Path) -> None:
    make_killed(path)
    path.unlink()
    DB.open(path, create=False)


@says(
    "WAL_OF_ANOTHER",
    "DIR/db: the file was replaced, and the -wal beside it belongs to the old one, maybe with its newest commits. That "
    '-wal is now DIR/db-N-wal: see "Removed or replaced" in the README',
    linux_only,
)
def _(path: Path) -> None:
    make_killed(path)
    make_rollback(path.with_name("backup"))
    path.with_name("backup").rename(path)
    DB.open(path).close()


@says(
    "WAL_OF_ANOTHER_KEPT",
    "DIR/db: the file was replaced, and the -wal beside it belongs to the old one. Remove nothing: see "
    '"Removed or replaced" in the README',
    linux_only,
)
def _(path: Path) -> None:
    make_killed(path)
    make_rollback(path.with_name("backup"))
    path.with_name("backup").rename(path)
    DB.open(path, read_only=True)


@says(
    "CANNOT_RENAME",
    f"DIR/db: can't rename DIR/db-wal ({os.strerror(errno.EACCES)}). Start nothing before you have: see "
    '"Removed or replaced" in the README',
    needs_another_user,
)
def _(path: Path) -> str:
    def make(path: Path) -> None:
        make_killed(path)
        path.write_bytes(b"")

    return said_to_another_user("DB.open(path)", make, 0o666, 0o555)


# What SQLite lacks


@says(
    "NO_DESCRIPTORS",
    "DIR/db: SQLite could open it for reading only: no free file descriptor (see ulimit -n), or something like "
    "AppArmor, chattr or a sandbox forbids to write it, its -wal or its -shm",
    linux_only,
)
def _(path: Path) -> str:
    code = """
DB.open(":memory:").close()
import resource
limit = min(set(range(100)) - set(map(int, os.listdir("/proc/self/fd")[:-1]))) + 3  # the file, its -wal and its -shm
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
DB.open(path)
"""
    make_wal(path)
    return said_by(code, path)


@says(
    "HOT_JOURNAL",
    "DIR/db: a killed process left a rollback journal, to be played back first: open it once without read_only "
    "(or --check)",
)
def _(path: Path) -> None:
    make_hot(path)
    DB.open(path, read_only=True)


@says(
    "NO_INDEX",
    "DIR/db: to read it, SQLite must make a -shm beside it, and can't (rights, a read-only file system, a sandbox, or "
    "no free file descriptor). Look at a copy of the file and its -wal, or look as its owner",
    needs_another_user,
)
def _(path: Path) -> str:
    return said_to_another_user("DB.open(path, read_only=True)", make_wal, 0o444, 0o555)


FULL = """
mkdir full
mount -t tmpfs -o {} none full
cp db full
{{ {}; }} 2>errors
daemon_db full/db
"""


@says("NO_SPACE", "DIR/full/db: no space left in DIR/full: make some, and open it again", can_mount)
def _(path: Path) -> str:
    make_wal(path)
    return first_line(FULL.format("size=400k", "cat /dev/zero >full/fill || true"), path)


@says(
    "NO_INODES",
    "DIR/full/db: no inode left in DIR/full (see df -i): remove files there, and open it again",
    can_mount,
)
def _(path: Path) -> str:
    make_wal(path)
    return first_line(FULL.format("nr_inodes=4", "touch full/1 full/2 full/3 || true"), path)


@says(
    "NO_SPACE_SEEN",
    "DIR/writable/db: database or disk is full, though there is space: a quota, or the directory for temporary files "
    "is full. Set SQLITE_TMPDIR to one with more space than the file has",
    can_mount,
)
def _(path: Path) -> str:
    return update_without_room(path.parent, "full")


@says(
    "NO_TEMPORARY_DIRECTORY",
    "DIR/writable/db: no directory for temporary files that can be written: set SQLITE_TMPDIR to one",
    *can_mount_all,
)
def _(path: Path) -> str:
    return update_without_room(path.parent, "missing")


@says(
    "IO_ERROR",
    "DIR/db: disk I/O error (SQLITE_IOERR_WRITE): a failing disk, a network file system, ulimit -f, or a removed "
    "-wal. Look at the logs first",
)
def _(path: Path) -> str:
    return said_by(f"{LIMIT_FILES}DB.open(path)", path)


@says("NO_WAL_MODE", "DIR/db: WAL mode is not available here: journal_mode stayed 'delete'")
def _(path: Path) -> str:
    """Where SQLite locks by files, on a file system without locks. Its own library makes it do so from now on."""
    return said_by(
        """
import _sqlite3, ctypes

sqlite = ctypes.CDLL(_sqlite3.__file__)
sqlite.sqlite3_vfs_find.restype = ctypes.c_void_p
sqlite.sqlite3_vfs_register(ctypes.c_void_p(sqlite.sqlite3_vfs_find(b"unix-dotfile")), 1)
DB.open(path)
""",
        path,
    )


@says("NO_FOREIGN_KEYS", "DIR/db: this SQLite was built without foreign keys")
def _(path: Path) -> None:
    """There is none here: one that ignores the pragma stands in."""
    connect = _connection.Connection.__init__

    def without_foreign_keys(conn: _connection.Connection, state: _connection.State) -> None:
        connect(conn, state)
        conn.set_authorizer(lambda _, what, *__: sqlite3.SQLITE_IGNORE if what == "foreign_keys" else sqlite3.SQLITE_OK)

    with patch.object(_connection.Connection, "__init__", without_foreign_keys):
        DB.open(path)


@says(
    "_NO_SHARED_MEMORY",
    "DIR/mount/db: this file system lacks locks or memory that processes share (SQLITE_IOERR_SHMMAP). Stop every "
    'program that has it open: see "No shared memory" in the README',
    can_bindfs,
)
def _(path: Path) -> str:
    mount = "mkdir real mount\nbindfs --direct-io real mount 2>no || bindfs -o direct_io real mount"
    return first_line(f"{mount}\ndaemon_db mount/db\numount mount", path)


@says(
    "_NO_SPACE_FOR_INDEX",
    "DIR/db: no space left for its -shm (disk, quota, ulimit -f): make some. Or this file system has no memory that "
    'processes share (SQLITE_IOERR_SHMOPEN): see "No shared memory" in the README',
)
def _(path: Path) -> str:
    make_wal(path)
    return said_by(f"{LIMIT_FILES}DB.open(path)", path)


@says(
    "_CANNOT_OPEN",
    "DIR/db: unable to open database file, its -wal or its -shm: each must be a plain file, on a local disk with free "
    "space, its path at most 504 bytes, and the process needs free file descriptors",
)
def _(path: Path) -> None:
    make_wal(path)
    Path(f"{path}-wal").mkdir()
    DB.open(path)


@says(
    "NOT_A_DATABASE",
    'DIR/db: not a SQLite database (if it was one, see "Damage" in the README before you do anything)',
)
def _(path: Path) -> None:
    path.write_bytes(b"some notes\n")
    DB.open(path)


@says(
    "DAMAGED",
    "DIR/db: damaged (database disk image is malformed). Stop every program that has it open, and remove nothing: see "
    '"Damage" in the README',
)
def _(path: Path) -> None:
    make_rollback(path)
    path.write_bytes(path.read_bytes()[:100] + b"\xff" * 50_000)
    DB.open(path)


@says(
    "_NEWER_SQLITE",
    f"DIR/db: SQLite {sqlite3.sqlite_version} doesn't understand the definition of quota: a newer SQLite has probably "
    'written it. Open it with that one; remove nothing: see "Schema does not fit" in the README',
)
def _(path: Path) -> None:
    make_rollback(path, script=_schema.SQL + "CREATE TABLE quota (n);")
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.execute("PRAGMA writable_schema=ON")
        conn.execute("UPDATE sqlite_master SET sql = 'CREATE TABLE quota (n) SOLID' WHERE name = 'quota'")
    DB.open(path)


@says(
    "_LOCKED _OR_NO_LOCKS",
    'DIR/db: locked for more than 0.0 s: another program, or thread, writes that long. See "Locked" in the README. Or '
    "nfs4, which machines may share, has no locks",
)
def _(path: Path) -> None:
    make_rollback(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as conn, on_nfs(path):
        conn.execute("BEGIN EXCLUSIVE")
        DB.open(path, timeout=0)


# The schema


@says(
    "RENAMED",
    'DIR/db: the schema does not fit (see "Schema does not fit" in the README):\n'
    "runs.error: missing column\n"
    "runs.failure: extra column, where another is missing. If it was renamed, rename it back. Don't drop it: its rows "
    "would be lost",
)
def _(path: Path) -> None:
    use_schema(FIRST)
    make_rollback(path, script=f"{FIRST} ALTER TABLE runs RENAME COLUMN error TO failure")
    DB.open(path)


@says(
    "CANNOT_BE_ADDED",
    "DIR/db: once: missing index, and it can't be added: UNIQUE constraint failed: runs.status; its tables and rows "
    "are as they were",
)
def _(path: Path) -> None:
    make_wal(path, runs=2)
    use_schema(f"{_schema.SQL} CREATE UNIQUE INDEX once ON runs (status);")
    DB.open(path)


@says(
    "NO_CONSTRAINTS",
    "DIR/db: units: no REFERENCES units(id) ON UPDATE NO ACTION ON DELETE NO ACTION for parent, and it can't be added: "
    "ALTER TABLE adds columns, and no constraints of a table; its tables and rows are as they were",
)
def _(path: Path) -> None:
    make_rollback(path, script=FIRST)
    end = "    UNIQUE(run_id, unit_id)\n"
    use_schema(FIRST.replace(end, f"    parent TEXT,\n    FOREIGN KEY(parent) REFERENCES units(id),\n{end}"))
    DB.open(path)


@says("ANOTHER_PROGRAMS", "no table runs, units, events, but notes: the database of another program")
def _(path: Path) -> str:
    use_schema(FIRST)
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("CREATE TABLE notes (x)")
    return problem(path)


@says("LACKS", "idx_units_status: missing index: an open without read_only adds it")
def _(path: Path) -> str:
    use_schema(FIRST)
    make_rollback(path, script=f"{FIRST} DROP INDEX idx_units_status")
    return problem(path, read_only=True)


# Transactions and threads


@says(
    "NO_TRANSACTION",
    "DIR/db: the transaction ended inside the block (executescript() and `with conn:` commit; an error may roll back). "
    "Look which rows are there before you repeat it",
)
def _(path: Path) -> None:
    with DB.open(path) as db, db.transaction() as conn:
        conn.commit()


@says(
    "LOCK_DROPPED",
    "DIR/db: something in this process has opened and closed its -shm without SQLite, or by another SQLite library, "
    "and so dropped SQLite's lock. The transaction was rolled back: repeat it",
    linux_only,
)
def _(path: Path) -> None:
    with DB.open(path) as db, db.transaction():
        Path(f"{path}-shm").read_bytes()
        time.sleep(0.01)  # longer than the blocks for which nothing is asked


@says(
    "LEFT_IN_ANOTHER_THREAD",
    "DIR/db: this transaction() began in thread MainThread (N) and ended in first (N), which can't end it. A "
    'dependency with `yield` (FastAPI) does that: see "Locked" in the README',
)
def _(path: Path) -> None:
    with DB.open(path) as db:
        transaction = db.transaction()
        transaction.__enter__()

        def end() -> None:
            threading.current_thread().name = "first"
            transaction.__exit__(None, None, None)

        in_thread(end)


@says(
    "FORKED",
    "DIR/db: opened before a fork(), and SQLite's locks don't work in the child. Close it in the parent before the "
    "fork, or start the process by spawn (forkserver: don't preload what opens it)",
)
def _(path: Path) -> str:
    code = """
db = DB.open(path)
child = os.fork()
if child:
    os.waitpid(child, 0)
    db.close()
else:
    try:
        DB.open(path)
    except OpenError as error:
        os.write(1, str(error).encode())
    os._exit(0)
"""
    return run(f"import warnings\nwarnings.simplefilter('ignore')\n{SAY}{code}", path)


@says(
    "WAITED_FOR_TURN",
    "DIR/db: waited 0.0 s for the transaction() of another thread: MainThread (N). It may itself wait for another "
    'program: see "Locked" in the README',
)
def _(path: Path) -> None:
    with DB.open(path, timeout=0) as db, db.transaction():
        in_thread(lambda: begin(db))


@says(
    "WAITED_FOR_CONNECTION",
    "DIR/db: waited N s for another connection that writes, another process's or another thread's: "
    'see "Locked" in the README',
)
def _(path: Path) -> None:
    with DB.open(path, timeout=0) as db, closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.execute("BEGIN IMMEDIATE")
        begin(db)


@says(
    "HALF_READ",
    "DIR/db: this thread has a SELECT that is half read, so SQLite didn't wait (or the busy timeout is shorter): "
    'fetchall() first. See "Locked" in the README',
)
def _(path: Path) -> None:
    make_wal(path, runs=2)
    with DB.open(path) as db:
        rows = db.conn.execute("SELECT * FROM runs")
        rows.fetchone()
        in_thread(lambda: insert_run(db.conn, "run-3"))
        with closing(rows):
            begin(db)


@says(
    "READERS_IN_MEMORY",
    ":memory:: another thread reads, and in memory a writer waits for readers",
    pytest.mark.skipif(sqlite3.sqlite_version_info < (3, 36), reason="there a :memory: database is one thread's"),
)
def _(path: Path) -> None:
    with DB.open(":memory:", timeout=0) as db:
        insert_run(db.conn)
        reads, is_done = threading.Event(), threading.Event()

        def read() -> None:
            with db.snapshot():
                reads.set()
                wait_for(is_done)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            wait_for(reads)
            with db.transaction() as conn:
                append_event(conn)
        finally:
            is_done.set()
            join(reader)


@says("OPENED_READ_ONLY", "DIR/db: this DB was opened with read_only=True")
def _(path: Path) -> None:
    make_wal(path)
    with DB.open(path, read_only=True) as db:
        begin(db)


@says("IN_SNAPSHOT", "DIR/db: in a snapshot(), its connection only reads")
def _(path: Path) -> None:
    with DB.open(path) as db, db.snapshot() as conn:
        conn.execute("DELETE FROM runs")


@says("ONE_THREAD_ONLY", f"SQLite {sqlite3.sqlite_version} has a :memory: database for one thread only; 3.36 shares it")
def _(path: Path) -> None:
    with patch.object(sqlite3, "sqlite_version_info", (3, 35, 5)), DB.open(":memory:") as db:
        in_thread(lambda: db.conn)


@says("ROLLBACK_FAILED", "DIR/db: ROLLBACK failed, too: Cannot operate on a closed database.")
def _(path: Path) -> None:
    with DB.open(path) as db, db.transaction() as conn:
        conn.close()
        raise sqlite3.IntegrityError


# The command line


@says("NOT_A_FILE", "DEST must be a file, not 'DIR'")
def _(path: Path) -> str:
    return backed_up(path, path.parent)


@says("ITSELF", "DIR/db: it is the database itself, or belongs to it: take another name for DEST")
def _(path: Path) -> str:
    return backed_up(path, path)


@says(
    "WOULD_BE_PLAYED_BACK",
    "DIR/copy: DIR/copy-wal lies beside it, and would be played over the copy. Take another name for DEST",
)
def _(path: Path) -> str:
    path.with_name("copy-wal").touch()
    return backed_up(path, path.with_name("copy"))


@says("COPY_FAILED", "DIR/copy: the copy of DIR/db failed: disk I/O error")
def _(path: Path) -> str:
    make_wal(path)
    limit = (resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))  # more than a -shm has, and less than the copy
    done = in_a_process("--backup", path.with_name("copy"), path, preexec_fn=lambda: resource.setrlimit(*limit))
    return done.stderr.removeprefix("daemon_db: ")


@says(
    "ORPHANS REFERS",
    "DIR/db failed the check: events row 1 refers to a row of runs that isn't there: rows refer to rows that aren't "
    "there: copy those from a backup. Delete nothing before you know what was lost",
)
def _(path: Path) -> str:
    make_orphans(path, 1)
    return command("--check", path).stderr.removeprefix("daemon_db: ")


# Warnings


@says(
    "WAL_GROWS READER_IN_THE_WAY",
    "DIR/db: the WAL has N MB and can't be emptied: a reader is in the way, here or in another process: a SELECT half "
    "read, a transaction left open, or a program that always reads, such as Litestream",
)
def _(path: Path) -> None:
    with DB.open(path) as db, closing(sqlite3.connect(path, isolation_level=None)) as reader:
        insert_run(db.conn)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM runs").fetchall()
        db.conn.execute(f"UPDATE runs SET {spare('runs')} = hex(zeroblob(10000000))")
        with db.transaction():
            pass


@says(
    "NO_LOCK",
    "DIR/db: there is no lock of an open file description (this system has none): see to it that nothing in this "
    "process but SQLite opens and closes the file",
)
def _(path: Path) -> None:
    make_rollback(path)
    with patch.object(_guard, "_SETLK", None):
        DB.open(path).close()


@says(
    "NO_LOCK_FOR_CLOSING",
    f"DIR/db: no lock for closing ([Errno {errno.ENOLCK}] {os.strerror(errno.ENOLCK)}): its -wal stays there until the "
    "next close",
    linux_only,
)
def _(path: Path) -> None:
    """A kernel that has no more locks is none that a test can have: `lockf` says so in its place."""

    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    db = DB.open(path)
    with patch.object(_guard.fcntl, "lockf", lockf):
        db.close()
    assert Path(f"{path}-wal").exists()


@pytest.fixture
def schema_put_back() -> Iterator[None]:
    shipped = _schema.SQL
    yield
    use_schema(shipped)


@pytest.mark.parametrize("names", ROWS)
@pytest.mark.usefixtures("schema_put_back")
def test_the_words(names: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words, situation = TABLE[names]
    caplog.set_level("INFO", "daemon_db")
    try:
        said = situation(tmp_path / "db") or max(caplog.records, key=lambda r: r.levelno).getMessage()
    except sqlite3.Error as error:
        said = (getattr(error, "__notes__", None) or [str(error)])[-1]
    said = said.strip().replace(str(tmp_path), "DIR")
    for changing in (
        r"(?<=/db-)\d+(?=-wal)",
        r"(?<=waited )\d+\.\d(?= s for another c)",
        r"(?<=\()\d+(?=\))",
        r"\d+(?= MB)",
    ):
        said = re.sub(changing, "N", said)
    assert said == words


def test_each_sentence_is_in_the_table() -> None:
    constants = {name for name, value in vars(errors).items() if name.strip("_").isupper() and isinstance(value, str)}
    assert constants == set(" ".join(TABLE).split()), "put it into the table, with what raises it"


def test_each_is_short() -> None:
    """But for paths, and for what SQLite says."""
    for words, _ in TABLE.values():
        for line in words.splitlines():
            line = re.sub(r"DIR[/\w-]*(: )?|database or disk is full|UNIQUE constraint failed: runs.status", "", line)
            assert len(line) <= 200, line


def test_each_heading_is_in_the_readme() -> None:
    readme = Path(__file__).parent.with_name("README.md").read_text(encoding="utf-8")
    headings = re.findall("^##+ (.+)$", readme, re.MULTILINE)
    for words, _ in TABLE.values():
        for heading in re.findall('[Ss]ee "([^"]+)" in', words):
            assert heading in headings


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_both_errors_survive_pickling(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "text.db").write_bytes(b"no database, but long enough to be one" * 9)
    with pytest.raises(OpenError) as caught:
        DB.open(tmp_path / "text.db")
    with closing(sqlite3.connect(tmp_path / "other.db")) as conn:
        conn.executescript("CREATE TABLE notes (id); CREATE TABLE more (id);")
    with pytest.raises(SchemaError) as schema_caught:
        DB.open(tmp_path / "other.db")
    for error, names in (
        (caught.value, ("reason", "sqlite_errorcode", "sqlite_errorname")),
        (schema_caught.value, ("problems",)),
    ):
        copy = pickle.loads(pickle.dumps(error, protocol))
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        for name in ("path", "args", *names):
            assert getattr(copy, name) == getattr(error, name)


@pytest.mark.parametrize("read_only", [False, True])
def test_for_the_rest_sqlites_own_words(read_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "db"
    make_wal(path)
    with open(path, "r+b") as file:
        file.seek(44)  # the schema's format: 4 is the last that there is (https://sqlite.org/fileformat2.html)
        file.write((5).to_bytes(4))
    before = files_in(tmp_path)
    with pytest.raises(OpenError) as caught:
        DB.open(path, read_only=read_only)
    assert (caught.value.reason, caught.value.sqlite_errorname) == ("unsupported file format", "SQLITE_ERROR")
    assert files_in(tmp_path) == before


def test_an_error_of_pythons_own_has_no_code() -> None:
    cause = sqlite3.DataError("string longer than INT_MAX bytes")
    error = errors.open_error("the path", errors.in_words(cause, 0), cause)
    assert str(error) == "the path: string longer than INT_MAX bytes"
    assert not hasattr(error, "sqlite_errorcode")
    assert not hasattr(error, "sqlite_errorname")
