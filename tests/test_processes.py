"""One file and many processes: opened at once, written at once, killed at any moment, locked by another."""

import itertools
import math
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from daemon_db import DB, OpenError, _schema
from daemon_db._connection import Connection, State
from support import (
    LIMIT,
    ask,
    began_and_done,
    bytes_of,
    copy,
    count_objects,
    end,
    insert_run,
    kill_at_random,
    make_killed,
    make_nothing,
    make_rollback,
    make_wal,
    no_sync,
    opened_and_killed,
    rounds,
    spare,
    start,
    together,
    worker,
)

RUNS = _schema.expected()[1]["runs"]


def make_partial(path: Path) -> None:
    """In rollback-journal mode, and `runs` alone is there."""
    make_rollback(path, 3, RUNS)


def make_partial_wal(path: Path) -> None:
    make_rollback(path, 3, f"PRAGMA journal_mode=WAL; {RUNS}")


def state(conn: sqlite3.Connection) -> tuple[str, int, int]:
    """Journal mode, how many objects of the schema there are, and how many runs as they were inserted."""
    (mode,) = conn.execute("PRAGMA journal_mode").fetchone()
    (runs,) = conn.execute(f"SELECT count(*) FROM runs WHERE {spare('runs')} IS NULL").fetchone()
    return mode, count_objects(conn), runs


with closing(sqlite3.connect(":memory:")) as _conn:
    _conn.executescript(_schema.SQL)
    ALL = count_objects(_conn)
FRESH = ("wal", ALL, 0)
KEPT = ("wal", ALL, 3)


class Other:
    """Another one that opens the file, in this process or in another one."""

    def __init__(self) -> None:
        self.opened = ExitStack()

    def comes(self, path: Path) -> None:
        with suppress(sqlite3.OperationalError):  # the open itself has a lock just then
            db = self.opened.enter_context(DB.open(path, timeout=0, on_connect=no_sync))
            insert_run(db.conn, "other")

    def goes(self, _: Path) -> None:
        """The last to close a database removes its WAL."""
        self.opened.close()


class Moments:
    """Take a step before the `moment`th of what an open asks of the system and of SQLite, one statement at a time."""

    def __init__(self, path: Path, moment: int, step: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = str(path)
        self.moments_left = moment
        self.step = step
        self.errors: list[BaseException] = []
        for name in ("stat", "lstat", "access"):
            monkeypatch.setattr(os, name, partial(self.ask, getattr(os, name)))
        connect = Connection.__init__
        monkeypatch.setattr(Connection, "__init__", lambda conn, state: self.connect(connect, conn, state))

    def ask(self, function: Callable[..., object], path: object, *arguments: object, **options: object) -> object:
        if str(path).startswith(self.path):
            self.pass_by()
        return function(path, *arguments, **options)

    def connect(self, connect: Callable[[Connection, State], None], conn: Connection, state: State) -> None:
        self.pass_by()
        connect(conn, state)
        conn.set_trace_callback(self.pass_by)

    def pass_by(self, *_: object) -> None:
        self.moments_left -= 1
        if self.moments_left == 0:
            try:
                self.step()
            except BaseException as error:  # SQLite would swallow it
                self.errors.append(error)


OPEN_EACH = """
from daemon_db import DB
from support import LIMIT, count_objects, no_sync, spare

for path in sys.argv[2:]:
    wait()
    try:
        with DB.open(path, timeout=LIMIT, on_connect=no_sync) as db:
            (mode,) = db.conn.execute("PRAGMA journal_mode").fetchone()
            (runs,) = db.conn.execute(f"SELECT count(*) FROM runs WHERE {spare('runs')} IS NULL").fetchone()
            print(mode, count_objects(db.conn), runs)
    except Exception as error:
        print(repr(error))
"""

INSERT_AND_CLOSE = """
from daemon_db import DB
from support import LIMIT, insert_run, no_sync

wait()
for cycle in range(int(sys.argv[3])):
    with DB.open(sys.argv[2], timeout=LIMIT, on_connect=no_sync) as db, db.transaction() as conn:
        insert_run(conn, f"{sys.argv[1]}-{cycle}")
print("done")
"""


class TestTogether:
    @pytest.mark.parametrize("count", [3, 8, 32])
    def test_processes_open_one_path_at_the_same_moment(self, count: int, tmp_path: Path) -> None:
        templates = [tmp_path / name for name in ("none", "rollback", "hot", "killed")]
        make_rollback(templates[1], 3)
        make_killed(templates[2], 3, "delete")
        make_killed(templates[3], 3, "wal")
        times = math.ceil(rounds(16, 3000) / count)
        paths = [copy(path, path.with_suffix(f".{number}")) for number in range(times) for path in templates]
        printed = f"wal {ALL} 0\n" + f"wal {ALL} 3\n" * 3
        assert together(count, OPEN_EACH, *paths) == [printed * times] * count

    def test_processes_open_insert_and_close_in_a_loop(self, tmp_path: Path) -> None:
        cycles = rounds(10, 625)
        assert together(8, INSERT_AND_CLOSE, tmp_path / "db", cycles) == ["done\n"] * 8
        with DB.open(tmp_path / "db") as db:
            found = {run_id for (run_id,) in db.conn.execute("SELECT id FROM runs")}
            assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert found == {f"{number}-{cycle}" for number in range(8) for cycle in range(cycles)}
        assert [file.name for file in tmp_path.iterdir()] == ["db"]

    @pytest.mark.parametrize("where", ["here", "in another process"])
    @pytest.mark.parametrize(
        ("make", "before", "then", "runs"),
        [
            (make_nothing, "", "comes", 0),
            (make_partial, "", "comes goes", 3),
            (make_partial_wal, "", "comes goes", 3),
            (partial(make_wal, runs=3), "", "comes", 3),
            (partial(make_wal, runs=3), "comes", "goes", 3),
        ],
        ids=["both make it", "rollback-journal mode", "WAL mode", "one comes to a current one", "one goes"],
    )
    def test_another_one_comes_or_goes_at_any_moment_of_an_open(
        self,
        make: Callable[[Path], None],
        before: str,
        then: str,
        runs: int,
        where: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def take(steps: str) -> None:
            for step in steps.split():
                if where == "here":
                    getattr(here, step)(path)
                else:
                    in_another_process(f"other.{step}(sys.argv[1])", path)

        template, here = tmp_path / "template", Other()
        make(template)
        with worker("from test_processes import Other; other = Other()") as in_another_process:
            for moment in itertools.count(1):
                path = copy(template, tmp_path / f"{moment}.db")
                take(before)
                with monkeypatch.context() as patch:
                    moments = Moments(path, moment, partial(take, then), patch)
                    db = DB.open(path, on_connect=no_sync)
                with db:
                    assert state(db.conn) in (("wal", ALL, runs), ("wal", ALL, runs + 1))
                    assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                take("goes")
                assert moments.errors == []
                if moments.moments_left > 0:
                    break
        assert moment > 10


OPEN_IN_A_LOOP = """
import itertools, os, shutil, sys
from daemon_db import DB

directory, template = sys.argv[1:]
for number in itertools.count():
    path = f"{directory}/{number}.db"
    if template:
        shutil.copyfile(template, path)
    os.write(1, b"begin %d\\n" % number)
    db = DB.open(path)
    os.write(1, b"done %d\\n" % number)
    db.close()
"""

COMMIT_IN_A_LOOP = """
import itertools, os, resource, signal, sys
from daemon_db import DB
from support import insertion, spare

path, first, moment = sys.argv[1], int(sys.argv[2]), sys.argv[3]


def configure(conn):
    if moment == "in a write":
        conn.execute("PRAGMA wal_autocheckpoint=0")  # so that the WAL grows
    else:
        conn.execute("PRAGMA wal_autocheckpoint=20")
        conn.execute("PRAGMA cache_size=2")  # so that SQLite writes to the WAL before COMMIT
    conn.set_trace_callback(die)


def die(statement):
    if statement == moment:
        os.kill(os.getpid(), signal.SIGKILL)


with DB.open(path, on_connect=configure) as db:
    event = {"run_id": "'run-1'", "sequence": ":sequence", "event_type": "'step'", spare("events"): ":payload"}
    insert = insertion(db.conn, "events", **event)
    for number in itertools.count(first):
        os.write(1, b"begin %d\\n" % number)
        with db.transaction() as conn:
            for sequence in range(10 * number, 10 * number + 10):
                conn.execute(insert, {"sequence": sequence, "payload": "x" * 2000})
            if number == first + 2:
                if moment == "in a write":
                    size = os.path.getsize(path + "-wal")
                    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5_000, resource.RLIM_INFINITY))
                    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                conn.execute("SELECT 'written'")
                moment = moment.removeprefix("later ")
        os.write(1, b"done %d\\n" % number)
"""


def check_killed(path: Path, is_new: bool) -> None:
    """The file is the old one or the new one; the next open works, and has the whole schema and the rows."""
    with closing(sqlite3.connect(copy(path, path.with_suffix(".copy")))) as conn:
        assert count_objects(conn) in (0 if is_new else 1, ALL)
    with DB.open(path, on_connect=no_sync) as db:
        assert state(db.conn) == (FRESH if is_new else KEPT)
        assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.conn.execute("PRAGMA foreign_key_check").fetchall() == []


AT_OPEN = pytest.mark.parametrize("make", [make_nothing, make_partial, make_partial_wal])


class TestKilled:
    @AT_OPEN
    @pytest.mark.parametrize("where", ["before a statement", "in a write"])
    def test_at_each_moment_of_an_open(self, where: str, make: Callable[[Path], None], tmp_path: Path) -> None:
        template = tmp_path / "template"
        make(template)
        opened = 0
        checked = []
        for path in opened_and_killed(tmp_path, template if template.exists() else None, where):
            opened += 1
            if (found := bytes_of(path)) not in checked:  # most are alike
                checked.append(found)
                check_killed(path, make is make_nothing)
        assert opened > 9  # so many moments there are at least
        assert any(found.get("-wal") for found in checked)
        if where == "in a write" and make is not make_partial_wal:
            assert any(found.get("-journal") for found in checked)

    @AT_OPEN
    def test_at_any_moment_of_an_open(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        template = tmp_path / "template"
        make(template)
        for kill in range(rounds(1, 75)):
            directory = tmp_path / str(kill)
            directory.mkdir()
            began, _ = kill_at_random(OPEN_IN_A_LOOP, directory, template if template.exists() else "")
            for number in began:
                path = directory / f"{number}.db"
                if path.exists():
                    check_killed(path, make is make_nothing)

    @pytest.mark.parametrize("moment", ["later BEGIN IMMEDIATE", "SELECT 'written'", "later COMMIT", "in a write"])
    def test_at_a_moment_of_a_transaction(self, moment: str, tmp_path: Path) -> None:
        path = tmp_path / "db"
        make_wal(path)
        process = start(COMMIT_IN_A_LOOP, path, 0, moment)
        output, errors = end(process)
        assert process.returncode == (-signal.SIGXFSZ if moment == "in a write" else -signal.SIGKILL), errors
        began, done = began_and_done(output)
        assert began == [*done, len(done)]
        assert len(done) == (3 if moment == "later BEGIN IMMEDIATE" else 2)
        self.check_committed(path, began, done)

    def test_at_any_moment_of_a_transaction(self, tmp_path: Path) -> None:
        path = tmp_path / "db"
        make_wal(path)
        transactions = 0
        for _ in range(rounds(2, 75)):
            began, done = kill_at_random(COMMIT_IN_A_LOOP, path, transactions, "")
            transactions = self.check_committed(path, began, done)

    def check_committed(self, path: Path, began: list[int], done: list[int]) -> int:
        """Each transaction is there whole or not at all; each that was reported is there. How many there are."""
        with DB.open(path, on_connect=no_sync) as db:
            assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            sequences = [n for (n,) in db.conn.execute("SELECT sequence FROM events ORDER BY sequence")]
        assert sequences == list(range(len(sequences)))
        transactions, rest = divmod(len(sequences), 10)
        assert rest == 0
        assert transactions in (began[0] + len(done), began[0] + len(began))
        return transactions


HOLD = """
import json, sqlite3, sys

signal.alarm(0)
while line := sys.stdin.readline():
    path, begin = json.loads(line)
    conn = sqlite3.connect(path, isolation_level=None)
    conn.execute("PRAGMA synchronous=OFF")
    conn.execute(begin)
    conn.execute("PRAGMA user_version=7")
    print("[]", flush=True)
    sys.stdin.readline()
    conn.execute("COMMIT")
    conn.close()
    print("[]", flush=True)
"""


class Holder:
    """Another process that takes the lock on one file after another."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @contextmanager
    def hold(self, path: Path, begin: str) -> Iterator[None]:
        """It is in a write transaction on `path`, until `free()` or the end of the block, which commit."""
        ask(self._process, path, begin)
        self._is_free = False
        try:
            yield
        finally:
            self.free()

    def free(self) -> None:
        if not self._is_free:
            self._is_free = True
            ask(self._process)


@pytest.fixture(scope="module")
def holder() -> Iterator[Holder]:
    process = start(HOLD)
    yield Holder(process)
    assert (end(process), process.returncode) == (("", ""), 0)


BEGIN = pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
TO_BE_WRITTEN = pytest.mark.parametrize(
    "make",
    [make_nothing, partial(make_rollback, runs=3), make_partial_wal],
    ids=["nothing", "rollback-journal mode", "runs alone in WAL mode"],
)

WRITE_WITHOUT_A_PAUSE = """
import sqlite3, sys, threading
from contextlib import closing
from support import append_event


def append(number):
    with closing(sqlite3.connect(path, isolation_level=None, timeout=LIMIT)) as conn:
        while not is_over:
            conn.execute("BEGIN IMMEDIATE")
            for _ in range(20):
                append_event(conn)
            conn.execute("COMMIT")
            appended[number] += 20


while path := sys.stdin.readline().strip():
    is_over = False
    appended = [0] * int(sys.argv[1])
    threads = [threading.Thread(target=append, args=[number]) for number in range(len(appended))]
    for thread in threads:
        thread.start()
    print("writing", flush=True)
    sys.stdin.readline()
    is_over = True
    for thread in threads:
        thread.join()
    print(sum(appended), flush=True)
""".replace("LIMIT", str(LIMIT))


class TestLocked:
    @pytest.mark.parametrize("threads", [2, 4])
    def test_an_update_beside_writers_that_never_pause(self, threads: int, tmp_path: Path) -> None:
        """A new daemon starts beside the old one. SQLite itself waits up to 0.1 s between two tries: too seldom."""
        older = _schema.SQL[: _schema.SQL.rindex("CREATE INDEX")]
        writer = start(WRITE_WITHOUT_A_PAUSE, threads)
        try:
            for number in range(rounds(3, 20)):
                path = tmp_path / f"{number}.db"
                make_rollback(path, 1, f"PRAGMA journal_mode=WAL; {older}")
                writer.stdin.write(f"{path}\n")
                writer.stdin.flush()
                assert writer.stdout.readline() == "writing\n"
                with DB.open(path) as db:
                    assert count_objects(db.conn) == ALL
                    writer.stdin.write("enough\n")
                    writer.stdin.flush()
                    appended = int(writer.stdout.readline())
                    assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (appended,)
        finally:
            outcome = end(writer)
        assert (outcome, writer.returncode) == (("", ""), 0)

    @BEGIN
    def test_a_current_database_opens_at_once(self, begin: str, holder: Holder, tmp_path: Path) -> None:
        make_wal(tmp_path / "db", 3)
        with holder.hold(tmp_path / "db", begin), DB.open(tmp_path / "db", timeout=0) as db:
            assert state(db.conn) == KEPT

    @BEGIN
    @TO_BE_WRITTEN
    def test_a_database_to_be_written_waits_for_the_lock(
        self, make: Callable[[Path], None], begin: str, holder: Holder, tmp_path: Path
    ) -> None:
        make(tmp_path / "db")
        found = []

        def open_it() -> None:
            with DB.open(tmp_path / "db", timeout=LIMIT) as db:
                found.append((state(db.conn), db.conn.execute("PRAGMA user_version").fetchone()))

        opener = threading.Thread(target=open_it)
        with holder.hold(tmp_path / "db", begin):
            opener.start()
            opener.join(0.1)
            assert opener.is_alive()
            holder.free()
            opener.join(LIMIT)
        assert found == [(FRESH if make is make_nothing else KEPT, (7,))]

    @BEGIN
    @TO_BE_WRITTEN
    @pytest.mark.parametrize("timeout", [0, 0.1])
    def test_longer_than_the_timeout(
        self, timeout: float, make: Callable[[Path], None], begin: str, holder: Holder, tmp_path: Path
    ) -> None:
        path = tmp_path / "db"
        make(path)
        with holder.hold(path, begin):
            before = path.read_bytes()
            began = time.monotonic()
            with pytest.raises(OpenError) as caught:
                DB.open(path, timeout=timeout)
            assert time.monotonic() - began >= 0.9 * timeout
            assert path.read_bytes() == before
        assert caught.value.reason.startswith(f"locked for more than {float(timeout)} s")
        assert caught.value.sqlite_errorcode == sqlite3.SQLITE_BUSY
        assert caught.value.sqlite_errorname == "SQLITE_BUSY"
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
