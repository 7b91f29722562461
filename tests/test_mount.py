"""Every place that a file can lie in: without shared memory, mounted by itself, shared by machines, full, read-only.

System calls that fail are made by a library for LD_PRELOAD, and real file systems in a mount namespace. Where there is
no C compiler, or no right to mount, the tests are skipped.
"""

import errno
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from daemon_db import DB, _mount, _opening
from support import (
    ENVIRONMENT,
    LIMIT,
    LONG,
    end,
    files_in,
    insert_run,
    make_killed,
    make_nothing,
    make_rollback,
    make_wal,
    rounds,
    run,
    start,
    worker,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts and LD_PRELOAD are Linux's")


@pytest.fixture(scope="session")
def failing_calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose system calls fail as FAULT says."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("failing") / "failing_calls.so"
    source = Path(__file__).with_name("failing_calls.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=LIMIT)
    return ENVIRONMENT | {"LD_PRELOAD": str(library)}


FAIL = """
import itertools, logging, os, sqlite3, sys, threading, time
from contextlib import closing
from pathlib import Path

from daemon_db import DB, OpenError
from support import copy, in_thread, insert_run

logging.disable()
numbers = itertools.count()


def fail(fault):
    os.environ["FAULT"] = f"{fault} {next(numbers)}"  # never the same: then the calls are counted anew
"""


@pytest.fixture(scope="module")
def run_failing(failing_calls: dict[str, str]) -> Iterator[Callable[..., str]]:
    """Runs Python code, which says what is to `fail`: one process for all tests."""
    with worker(FAIL, env=failing_calls) as run_there:
        yield lambda code, *arguments: run_there(f"fail('')\n{code}", *arguments)


# Without shared memory

WITH_FAILING_CALLS = """
def look(path):
    with closing(sqlite3.connect(path)) as conn:
        (mode,) = conn.execute("PRAGMA journal_mode").fetchone()
        (tables,) = conn.execute("SELECT count(*) FROM sqlite_master").fetchone()
        assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return mode, tables, tables and conn.execute("SELECT count(*), min(id) FROM runs").fetchone()


template = Path(sys.argv[1])
copy(template, Path(f"{template}-0"))
before = look(f"{template}-0")
files = os.listdir("/proc/self/fd")
cases = itertools.product(sys.argv[2].split(), map(int, sys.argv[3].split()), map(int, sys.argv[4].split()))
for number, (function, error, first) in enumerate(cases, 1):
    path = copy(template, Path(f"{template}-{number}"))
    fail(f"{function} -shm {error} {first} 1000000")
    try:
        with DB.open(path, timeout=0.05) as db:
            with db.transaction() as conn:
                insert_run(conn, "run-new")
        outcome = "works"
    except OpenError as refusal:
        outcome = refusal.reason
        if before[0] == "delete":
            assert look(path) == before, (look(path), before)
    except sqlite3.OperationalError as late:
        outcome = f"later: {late}"
    fail("")
    after = look(path)
    if outcome == "works":
        assert after[0] == "wal" and after[2][0] == (before[2] or (0,))[0] + 1, (after, before)
    elif not outcome.startswith("later"):
        assert after == before, (after, before)
    print(function, error, first, outcome)
assert os.listdir("/proc/self/fd") == files
"""

ERRORS = (errno.ENODEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EACCES, errno.EIO)


@pytest.mark.parametrize("make", [make_nothing, make_rollback, make_wal, make_killed])
def test_without_shared_memory(make: Callable[[Path], None], run_failing: Callable[..., str], tmp_path: Path) -> None:
    """A clear refusal, and the file as before: what was in rollback-journal mode can still be read there."""
    make(tmp_path / "db")
    functions = "mmap pwrite ftruncate open fcntl"
    output = run_failing(WITH_FAILING_CALLS, tmp_path / "db", functions, " ".join(map(str, ERRORS)), "0 1 2")
    lines = [line.split(" ", 3) for line in output.splitlines()]
    assert len(lines) == len(functions.split()) * len(ERRORS) * 3
    names = {
        "mmap": "lacks locks or memory.*SQLITE_IOERR_SHMMAP",
        "pwrite": "no space left for its -shm.*SQLITE_IOERR_SHMSIZE",
        "ftruncate": "no space left for its -shm.*SQLITE_IOERR_SHMOPEN",
        "open": "unable to open database file, its -wal or its -shm",
        "fcntl": "lacks locks or memory.*SQLITE_IOERR_LOCK",
    }
    for function, error, first, outcome in lines:
        if first == "0" or function in ("pwrite", "fcntl"):
            assert re.search(names[function], outcome), (function, error, first)
        else:  # the second call comes when the first 4,000 pages are in the WAL, or never
            assert outcome == "works", (function, error, first)


@pytest.mark.parametrize(
    ("make", "first", "words"),
    [
        (make_nothing, 16, "locked for more than"),
        *((make, 3, "lacks locks or memory.*SQLITE_PROTOCOL") for make in (make_nothing, make_rollback) if LONG),
    ],
)
def test_locks_that_fail_later(
    make: Callable[[Path], None], first: int, words: str, run_failing: Callable[..., str], tmp_path: Path
) -> None:
    """To SQLite each of them is "busy"; for most of them SQLite tries again for ten seconds."""
    make(tmp_path / "db")
    output = run_failing(WITH_FAILING_CALLS, tmp_path / "db", "fcntl", errno.ENOLCK, first)
    assert re.search(f"^fcntl {errno.ENOLCK} {first} .*{words}", output)


INTERRUPTED = """
import os, signal, sys
from daemon_db import DB

signal.signal(signal.SIGALRM, signal.default_int_handler)
os.environ["FAULT"] = sys.argv[2]
signal.setitimer(signal.ITIMER_REAL, 0.3)
try:
    DB.open(sys.argv[1], timeout=3600)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(not LONG, reason="SQLite waits for ten seconds")
def test_an_interrupt_while_sqlite_waits_for_a_lock(failing_calls: dict[str, str], tmp_path: Path) -> None:
    """It tries for ten seconds to get what it never gets. WAL mode is turned off again all the same."""
    make_rollback(tmp_path / "db")
    before = (tmp_path / "db").read_bytes()[18:20]  # https://sqlite.org/fileformat.html#file_format_version_numbers
    fault = f"fcntl -shm {errno.ENOLCK} 3 1000000"
    assert run(INTERRUPTED, tmp_path / "db", fault, env=failing_calls) == "interrupted\n"
    assert (tmp_path / "db").read_bytes()[18:20] == before == b"\1\1"


def test_an_interrupt_of_the_first_read_in_wal_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_rollback(tmp_path / "db")
    read_first = _opening.read_first

    def interrupted(conn: sqlite3.Connection) -> None:
        if (tmp_path / "db").read_bytes()[18:20] == b"\2\2":
            raise KeyboardInterrupt
        read_first(conn)

    monkeypatch.setattr(_opening, "read_first", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DB.open(tmp_path / "db")
    assert (tmp_path / "db").read_bytes()[18:20] == b"\1\1"
    assert files_in(tmp_path).keys() == {"db"}


def test_no_locks_on_the_file(run_failing: Callable[..., str], tmp_path: Path) -> None:
    """As on a network file system whose lock service doesn't run: SQLite says that it is busy."""
    make_wal(tmp_path / "db")
    code = """
fail(sys.argv[2])
try:
    DB.open(sys.argv[1], timeout=0.05)
except OpenError as error:
    print(error.reason, error.sqlite_errorname)
"""
    said = run_failing(code, tmp_path / "db", f"fcntl db {errno.ENOLCK} 0 1000000")
    assert said.startswith("locked for more than 0.05 s")
    assert said.endswith(" SQLITE_BUSY\n")


def test_an_interrupt_of_the_close_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the one that closes where the first read in WAL mode has failed."""

    def interrupt(*_: object) -> None:
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)

    def fail(conn: sqlite3.Connection) -> None:
        if (tmp_path / "db").read_bytes()[18:20] == b"\2\2":
            read_first(conn)
            raise OSError
        read_first(conn)

    make_rollback(tmp_path / "db")
    read_first = _opening.read_first
    monkeypatch.setattr(_opening, "read_first", fail)
    monkeypatch.setattr(_opening.Connection, "close", interrupt)
    with pytest.raises(KeyboardInterrupt):
        DB.open(tmp_path / "db")
    assert (tmp_path / "db").read_bytes()[18:20] == b"\1\1"
    assert files_in(tmp_path).keys() == {"db"}


# A moment without descriptors

OPENED_TO_READ = """
path, fault = sys.argv[1:]
files = len(os.listdir("/proc/self/fd"))
fail(fault)
try:
    DB.open(path)
except OpenError as error:
    print(error.reason)
assert len(os.listdir("/proc/self/fd")) == files
with DB.open(path) as db:
    with db.transaction() as conn:
        insert_run(conn, "run-new")
    print(*db.conn.execute("SELECT count(*) FROM runs").fetchone())
"""


@pytest.mark.parametrize(
    ("make", "suffix"),
    [(make_rollback, "db"), (make_wal, "db"), *((make_killed, suffix) for suffix in ("db", "-wal", "-shm"))],
)
def test_what_sqlite_opens_for_reading_only(
    make: Callable[[Path], None], suffix: str, run_failing: Callable[..., str], tmp_path: Path
) -> None:
    """For a lack of descriptors, of which SQLite says nothing: one clear error, and the next open works."""
    make(tmp_path / "db")
    output = run_failing(OPENED_TO_READ, tmp_path / "db", f"open {suffix} {errno.EMFILE} 0 1")
    reason, count = output.splitlines()
    assert "for reading only" in reason
    assert count == "2"


def test_what_this_process_opens_for_reading_only_by_sqlite3_alone(tmp_path: Path) -> None:
    """As a program that also looks at its own database: that is no reason to refuse it."""
    make_wal(tmp_path / "db")
    with closing(sqlite3.connect(f"{(tmp_path / 'db').as_uri()}?mode=ro", uri=True)) as reader:
        assert reader.execute("SELECT count(*) FROM runs").fetchone() == (1,)
        with DB.open(tmp_path / "db") as db:
            with db.transaction() as conn:
                insert_run(conn, "run-2")
        assert reader.execute("SELECT count(*) FROM runs").fetchone() == (2,)


FIRST_REFUSED_WRITE = """
from daemon_db.db import LONG

path, other, fault = sys.argv[1:]


def write_twice():
    if "-wal" not in fault:  # else it can't begin
        with db.transaction():  # a long one that only reads: it has no lock to lose
            time.sleep(2 * LONG)
    try:
        with db.transaction() as conn:
            insert_run(conn, "run-new")
        raise AssertionError
    except sqlite3.OperationalError as error:
        (note,) = error.__notes__
        print(error, note)
    with db.transaction() as conn:
        insert_run(conn, "run-new")


with DB.open(path) as db, DB.open(other), DB.open(other, read_only=True):  # a reader of another file explains nothing
    fail(fault)
    in_thread(write_twice)
    print(*db.conn.execute("SELECT count(*) FROM runs").fetchone())
"""


@pytest.mark.parametrize("make", [make_nothing, make_rollback, make_wal, make_killed])
@pytest.mark.parametrize("suffix", ["db", "-wal"])
def test_the_first_refused_write_finds_it_out(
    suffix: str, make: Callable[[Path], None], run_failing: Callable[..., str], tmp_path: Path
) -> None:
    """When it is another thread's connection. The -shm, this process has open already."""
    make(tmp_path / "db")
    output = run_failing(FIRST_REFUSED_WRITE, tmp_path / "db", tmp_path / "other", f"open {suffix} {errno.EMFILE} 0 1")
    said, count = output.splitlines()
    assert re.search(f"^attempt to write a readonly database {tmp_path / 'db'}: .* for reading only", said)
    assert count == ("1" if make is make_nothing else "2")


SCARCE = """
import os, random, resource, sqlite3, sys, threading, time
from daemon_db import DB
from support import LIMIT, append_event, insert_run, join

path, seconds = sys.argv[1], float(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
db = DB.open(path)
insert_run(db.conn)
end = time.monotonic() + seconds
acknowledged, errors, unexpected = [], [], []
barrier = threading.Barrier(21)


def append():
    with db.transaction() as conn:
        sequence = append_event(conn)
    acknowledged.append(sequence)


def try_to_append():
    try:
        append()
    except sqlite3.OperationalError as error:
        errors.append(str(error))


def work():
    while time.monotonic() < end:
        taken = []
        try:
            for _ in range(random.randrange(6)):
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        try_to_append()
        for descriptor in taken:
            os.close(descriptor)
        if random.random() < 0.2:
            helper = threading.Thread(target=try_to_append)
            try:
                helper.start()
            except RuntimeError:
                continue
            helper.join()
    barrier.wait(LIMIT)
    # There are enough descriptors now. A connection that can't write is found out by the first refused write.
    for attempt in range(2):
        try:
            append()
            break
        except sqlite3.OperationalError as error:
            if attempt or error.sqlite_errorname != "SQLITE_READONLY":
                unexpected.append(repr(error))


threads = [threading.Thread(target=work) for _ in range(20)]
for thread in threads:
    thread.start()
barrier.wait(LIMIT)
join(*threads)
db.close()
assert not unexpected, unexpected
with DB.open(path) as db:
    found = [sequence for (sequence,) in db.conn.execute("SELECT sequence FROM events ORDER BY sequence")]
    assert found == sorted(acknowledged), (len(found), len(acknowledged))
    assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
print(len(found), len(errors))
"""


def test_scarce_descriptors(tmp_path: Path) -> None:
    """64 of them for 20 threads: once there are some, every thread writes, and nothing acknowledged is lost."""
    count, errors = map(int, run(SCARCE, tmp_path / "db", rounds(1, 30)).split())
    assert count > 20
    assert errors > 0  # else they were not scarce


READER_FIRST = """
path, fault = sys.argv[1:]
fail(fault)
with DB.open(path, read_only=True), DB.open(path) as db:
    try:
        with db.transaction() as conn:
            insert_run(conn, "run-new")
    except sqlite3.OperationalError as error:
        print(error, *getattr(error, "__notes__", ()))
"""


def test_a_reader_that_opened_the_index_for_reading_only(run_failing: Callable[..., str], tmp_path: Path) -> None:
    """All connections of the process have that one, then."""
    with DB.open(tmp_path / "db") as daemon:
        insert_run(daemon.conn)
        said = run_failing(READER_FIRST, tmp_path / "db", f"open -shm {errno.EMFILE} 0 1")
    assert said.startswith("attempt to write a readonly database") and "for reading only" in said


# Mounted by itself


def do_in_a_namespace(*command: object, cwd: Path = Path()) -> subprocess.CompletedProcess[str]:
    """What becomes of the command where what it mounts is seen by nobody else."""
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    return subprocess.run(
        [*unshare, *map(str, command)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT,
    )


def can(*command: str) -> bool:
    """Whether that can be done in a mount namespace here."""
    try:
        return not do_in_a_namespace(*command).returncode
    except OSError:
        return False


can_mount = pytest.mark.skipif(not can("mount", "-t", "tmpfs", "none", "/tmp"), reason="this user may not mount")
can_bindfs = pytest.mark.skipif(
    os.geteuid() != 0 or not can("sh", "-ec", "d=$(mktemp -d); trap 'rmdir $d' EXIT; bindfs /tmp $d; umount $d"),
    reason="no bindfs, or this user may not mount it",
)


STEPS = """
import io, os, shlex, subprocess, sys
from contextlib import redirect_stderr, redirect_stdout
from daemon_db import __main__, _connection

for line in filter(None, sys.argv[1].splitlines()):
    command, *sys.argv[1:] = shlex.split(line)
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    if command == "daemon_db":
        with redirect_stdout(said), redirect_stderr(said):
            status = __main__.main()
        _connection._close_all()  # as at a process's end
        said.seek(0)
        print(said.read(), end="")
        if status:
            print("status", status)
    else:
        print(end=subprocess.run(["bash", "-ec", line], stdout=subprocess.PIPE, check=True, text=True).stdout)
"""
"""Does line after line as a shell does; where `daemon_db` is the command, without another process."""


def in_a_namespace(script: str, directory: Path) -> list[str]:
    """Do the script's `STEPS` in `directory`; the lines that they wrote."""
    done = do_in_a_namespace(sys.executable, "-W", "error", "-c", STEPS, script, cwd=directory)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@can_mount
def test_a_file_that_is_mounted_by_itself(tmp_path: Path) -> None:
    """As by a container's `-v daemon.db:/data/daemon.db`: the -wal would stay in the container."""
    host, data = tmp_path / "host", tmp_path / "data"
    host.mkdir()
    data.mkdir()
    (tmp_path / "link").symlink_to(data)
    mounts, paths = [], []
    for number, name in enumerate(("daemon.db", "a space.db", "back\\slash.db")):
        make_killed(host / name)
        (data / name).touch()
        (tmp_path / f"file-{number}.db").symlink_to(data / name)
        mounts.append(f"mount --bind 'host/{name}' 'data/{name}'")
        paths += [f"data/{name}", f"link/{name}", f"file-{number}.db"]
    before, in_data = files_in(host), files_in(data)
    script = [f"daemon_db {option}'{path}'" for path in paths for option in ("", "--check ")]
    lines = in_a_namespace("\n".join(mounts + script), tmp_path)
    assert lines[1::2] == ["status 1"] * (2 * len(paths))
    for path, line in zip([path for path in paths for _ in range(2)], lines[::2], strict=True):
        assert re.search(f"^daemon_db: {re.escape(f'{tmp_path}/{path}')}: .*mounted without its directory", line)
    assert files_in(host) == before
    assert files_in(data) == in_data


APPEND = """
import sys
from daemon_db import DB
from support import insert_run

with DB.open(sys.argv[1]) as db:
    for number in range(20):
        with db.transaction() as conn:
            insert_run(conn, f"{sys.argv[2]}-{number}")
"""


@can_mount
@pytest.mark.parametrize("directory", ["host", "data"])
def test_a_file_that_is_mounted_where_its_wal_is(directory: str, tmp_path: Path) -> None:
    """As by systemd's ReadWritePaths=, or bubblewrap: over itself, or into its directory. There is one WAL only."""
    for name in "host", "data":
        (tmp_path / name).mkdir()
    (tmp_path / "append.py").write_text(APPEND, encoding="ascii")
    path = tmp_path / "host" / "daemon.db"
    script = f"""
{"" if directory == "host" else "mount --bind host data"}
mount --bind host/daemon.db {directory}/daemon.db
daemon_db {directory}/daemon.db
daemon_db --check {directory}/daemon.db
{sys.executable} append.py {directory}/daemon.db {{}}
ls {directory}
"""
    with DB.open(path) as db:
        insert_run(db.conn, "outside-1")
        lines = in_a_namespace(script.format("beside"), tmp_path)
        assert lines[-3:] == ["daemon.db", "daemon.db-shm", "daemon.db-wal"]
        insert_run(db.conn, "outside-2")
        assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (22,)
    lines = in_a_namespace(script.format("alone"), tmp_path)
    assert lines[-1:] == ["daemon.db"]
    with DB.open(path) as db:
        assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (42,)
        assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert [*files_in(tmp_path / "data")] == []


WITHOUT_PROC = """
import logging, sqlite3, sys
from daemon_db import DB, OpenError
from support import insert_run

path, rollback = sys.argv[1:]
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
with DB.open(path) as db, db.transaction() as conn:
    insert_run(conn)
conn = sqlite3.connect(rollback, isolation_level=None)
conn.execute("BEGIN EXCLUSIVE")
try:
    DB.open(rollback, timeout=0)
except OpenError as error:
    print(error.reason)
conn.close()
"""


@can_mount
def test_without_proc(tmp_path: Path) -> None:
    """As in a chroot: there SQLite's descriptors aren't found. The rest works, and it is said."""
    path, rollback = tmp_path / "daemon.db", tmp_path / "rollback.db"
    make_rollback(rollback)
    hidden = ["sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    done = do_in_a_namespace(*hidden, sys.executable, "-W", "error", "-c", WITHOUT_PROC, path, rollback)
    assert (done.returncode, done.stderr) == (0, "")
    no_lock, created, locked = done.stdout.splitlines()
    assert no_lock.startswith(f"{path}: there is no lock ")
    assert created == f"{path}: created"
    assert locked.startswith("locked for more than 0.0 s")
    with DB.open(path, read_only=True) as db:
        assert db.conn.execute("SELECT id FROM runs").fetchall() == [("run-1",)]


@can_mount
def test_a_directory_that_is_mounted(tmp_path: Path) -> None:
    """As the words say: with what is in the -wal."""
    make_killed(tmp_path / "daemon.db")
    (tmp_path / "host").mkdir()
    (tmp_path / "data").mkdir()
    script = """
cp daemon.db daemon.db-wal host
mount --bind host data
daemon_db data/daemon.db
"""
    assert "runs           1 row" in in_a_namespace(script, tmp_path)
    with DB.open(tmp_path / "host" / "daemon.db") as db:
        assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (1,)


# Shared between machines

MOUNTS = r"""22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /srv rw shared:1 master:2 - nfs4 server:/srv rw
31 30 0:41 / /srv/local rw - xfs /dev/vdb rw
32 22 0:42 / /mnt/a\040b\134c rw - fuse.sshfs host:/ rw
33 22 0:43 / /over rw - cifs //server/share rw
34 33 0:44 / /over rw - tmpfs none rw
35 22 0:45 /share /home/you/share rw - 9p share rw
36 22 0:46 / /some rw - fuse bindfs rw
37 22 254:0 /opt/runs/db /opt/runs/db rw - ext4 /dev/vda rw
38 22 254:0 /host/db /opt/runs/alone.db rw - ext4 /dev/vda rw
39 22 254:1 /opt/runs/other.db /opt/runs/other.db rw - ext4 /dev/vdc rw
40 22 254:0 /host /mnt/host rw - ext4 /dev/vda rw
41 40 254:0 /host/db /mnt/host/db rw - ext4 /dev/vda rw
42 30 0:40 /runs/b\040c.db /srv/runs/b\040c.db rw - nfs4 server:/srv rw
"""


@pytest.mark.parametrize(
    ("path", "is_alone", "name"),
    [
        ("/db", False, None),
        ("/srv/db", False, "nfs4"),
        ("/srv/runs/db", False, "nfs4"),
        ("/srv2/db", False, None),
        ("/srv/local/db", False, None),
        ("/srv/local2/db", False, "nfs4"),
        ("/mnt/a b\\c/db", False, "fuse.sshfs"),
        ("/over/db", False, None),
        ("/home/you/share/db", False, "9p"),
        ("/some/db", False, None),
        ("/opt/runs/db", False, None),
        ("/opt/runs/alone.db", True, None),
        ("/opt/runs/other.db", True, None),
        ("/mnt/host/db", False, None),
        ("/srv/runs/b c.db", False, "nfs4"),
    ],
)
def test_the_list_of_mounts(
    path: str, is_alone: bool, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounts").write_text(MOUNTS, encoding="ascii")
    monkeypatch.setattr(_mount, "_LIST", str(tmp_path / "mounts"))
    assert _mount.mount_of(path) == (is_alone, name)


def test_without_a_list_of_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mount, "_LIST", str(tmp_path / "no"))
    assert _mount.mount_of("/db") == (False, None)
    DB.open(tmp_path / "db").close()


WARNED = """
import logging, os, sys
from daemon_db import DB

logging.basicConfig(format="%(message)s", stream=sys.stdout)
for name in sys.argv[1:]:
    for _ in range(2):
        DB.open(name).close()
"""


@can_bindfs
def test_a_network_file_system_is_warned_of_once(tmp_path: Path) -> None:
    """A real one of another kind, under that name: from FUSE 3 on, the program's."""
    for name in ("real", "net", "other"):
        (tmp_path / name).mkdir()
    for name in ("sshfs", "glusterfs"):
        (tmp_path / name).symlink_to(str(shutil.which("bindfs")))
    (tmp_path / "warned.py").write_text(WARNED, encoding="ascii")
    script = f"""
./sshfs -o subtype=sshfs real net
./glusterfs -o subtype=glusterfs real other
{sys.executable} warned.py net/a.db net/b.db other/a.db c.db
daemon_db --check net/a.db
daemon_db --json net/a.db
umount net other
"""
    words = "which machines may share"
    first, second, *rest = in_a_namespace(script, tmp_path)
    assert first.startswith(f"{tmp_path}/net/a.db is on fuse.sshfs, {words}")
    assert second.startswith(f"{tmp_path}/other/a.db is on fuse.glusterfs, {words}")
    assert "network        fuse.sshfs: only one machine's programs may have it open" in rest
    assert json.loads(rest[-1])["network_file_system"] == "fuse.sshfs"


@can_bindfs
@pytest.mark.usefixtures("sqlite3_program")
def test_a_file_system_without_shared_memory(tmp_path: Path) -> None:
    """FUSE with direct_io refuses mmap(), as the mounts of many containers do."""
    for name in ("real", "mount"):
        (tmp_path / name).mkdir()
    make_rollback(tmp_path / "real" / "rollback.db")
    make_wal(tmp_path / "real" / "wal.db")
    script = """
bindfs --direct-io real mount 2>no || bindfs -o direct_io real mount  # by FUSE 3 or 2
daemon_db mount/fresh.db
daemon_db mount/rollback.db
daemon_db mount/wal.db
daemon_db --check mount/wal.db
daemon_db --check mount/rollback.db
sqlite3 mount/rollback.db 'SELECT id FROM runs'
umount mount
"""
    lines = in_a_namespace(script, tmp_path)
    for number, name in enumerate(("fresh", "rollback", "wal", "wal")):
        refused = f"^daemon_db: {tmp_path}/mount/{name}.db: .*lacks locks or memory.*SQLITE_IOERR_SHMMAP"
        assert re.search(refused, lines[2 * number])
        assert lines[2 * number + 1] == "status 1"
    for line in "journal mode   delete", "runs           1 row", "check          ok":
        assert line in lines[8:-1]
    assert lines[-1] == "run-1"
    with DB.open(tmp_path / "real" / "wal.db") as db:
        assert db.conn.execute("SELECT id FROM runs").fetchall() == [("run-1",)]


# Full, and read-only


@can_mount
@pytest.mark.parametrize(
    ("options", "fill", "what"),
    [
        ("size=400k", "cat /dev/zero >full/fill || true", "no space left"),
        ("nr_inodes=4", "touch full/1 full/2 full/3 || true", "no inode left"),
    ],
)
@pytest.mark.parametrize("arguments", ["", "--check "])
def test_no_space_left(arguments: str, options: str, fill: str, what: str, tmp_path: Path) -> None:
    make_wal(tmp_path / "daemon.db")
    (tmp_path / "full").mkdir()
    script = f"""
mount -t tmpfs -o {options} none full
cp daemon.db full
{{ {fill}; }} 2>/dev/null
daemon_db {arguments}full/daemon.db
{"" if arguments else "daemon_db full/new.db"}
rm full/[f123]*
daemon_db {arguments}full/daemon.db
"""
    lines = in_a_namespace(script, tmp_path)
    for name in ["daemon.db"] if arguments else ["daemon.db", "new.db"]:
        assert lines.pop(0).startswith(f"daemon_db: {tmp_path}/full/{name}: {what} in {tmp_path}/full")
        assert lines.pop(0) == "status 1"
    assert "runs           1 row" in lines


@can_mount
def test_a_read_only_file_system(tmp_path: Path) -> None:
    make_wal(tmp_path / "wal.db")
    make_rollback(tmp_path / "rollback.db")
    (tmp_path / "fixed").mkdir()
    script = """
mount -t tmpfs none fixed
cp wal.db rollback.db fixed
mount -o remount,bind,ro fixed
daemon_db fixed/wal.db
daemon_db fixed/new.db
daemon_db --check fixed/wal.db
daemon_db --check fixed/rollback.db
cp fixed/wal.db copy.db
daemon_db --check copy.db
"""
    lines = in_a_namespace(script, tmp_path)
    reasons = {"wal.db": "read-only file system", "new.db": "read-only file system", "wal.db ": "must make a -shm"}
    for number, (name, reason) in enumerate(reasons.items()):
        assert re.search(f"^daemon_db: {tmp_path}/fixed/{name.strip()}: .*{reason}", lines[2 * number])
        assert lines[2 * number + 1] == "status 1"
    assert lines[6:].count("runs           1 row") == 2


# In a sandbox

SANDBOX = """
import ctypes, os, struct, sys

# https://docs.kernel.org/userspace-api/landlock.html
ALL, TO_READ = 0x1FFF, 0x1 | 0x4 | 0x8  # all rights of its first version; to execute, to read files and directories
libc = ctypes.CDLL(None, use_errno=True)
attributes = struct.pack("Q", ALL)
rules = libc.syscall(444, attributes, len(attributes), 0)
if rules < 0:
    print("no Landlock:", os.strerror(ctypes.get_errno()))
    sys.exit()
assert libc.syscall(445, rules, 1, struct.pack("=Qi", TO_READ, os.open("/", os.O_PATH)), 0) == 0
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.syscall(446, rules, 0) == 0
from daemon_db import DB, OpenError

for line in sys.stdin:
    path = line.strip()
    try:
        with DB.open(path, read_only=True) as db:
            with db.snapshot() as conn:
                (said,) = conn.execute("SELECT count(*) FROM runs").fetchone()
    except OpenError as error:
        said = error.reason
    print(said, flush=True)  # once it is closed
"""


@pytest.fixture
def ask_sandboxed() -> Iterator[Callable[[Path], str]]:
    """A process that may only read, whatever the files' modes say: how many runs it finds in a database."""
    process = start(SANDBOX)

    def ask(path: Path) -> str:
        try:
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has said why
        said = str(process.stdout.readline())
        if said.startswith("no Landlock"):
            pytest.skip(said.strip())
        return said.strip()

    yield ask
    assert (end(process)[1], process.returncode) == ("", 0)


def test_a_reader_in_a_sandbox_beside_a_daemon(ask_sandboxed: Callable[[Path], str], tmp_path: Path) -> None:
    path = tmp_path / "db"
    with DB.open(path) as daemon:
        for number in range(3):
            assert ask_sandboxed(path) == str(number)
            with daemon.transaction() as conn:
                insert_run(conn, f"run-{number}")
        assert ask_sandboxed(path) == "3"
    assert files_in(tmp_path).keys() == {"db"}


@pytest.mark.parametrize("make", [make_wal, make_killed])
def test_a_reader_in_a_sandbox_without_a_daemon(
    make: Callable[[Path], None], ask_sandboxed: Callable[[Path], str], tmp_path: Path
) -> None:
    """There SQLite would have to make what it reads by, and may not. A file without a WAL can be read."""
    make(tmp_path / "db")
    (tmp_path / "db-shm").unlink(missing_ok=True)
    make_rollback(tmp_path / "rollback")
    before = files_in(tmp_path)
    assert "must make a -shm" in ask_sandboxed(tmp_path / "db")
    assert ask_sandboxed(tmp_path / "rollback") == "1"
    assert files_in(tmp_path) == before
