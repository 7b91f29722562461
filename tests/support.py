"""What several test modules need: a run to hang things on, files, Python in child processes, and how long to go on.

`DAEMON_DB_LONG=1` in the environment makes the tests of races, crashes, threads and damage run at the numbers of the
README's table, which takes minutes. Without it the same tests run for a moment each.
"""

import atexit
import fcntl
import functools
import gc
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from daemon_db import DB, _schema

Result = TypeVar("Result")

# So that child processes find what the tests find, in whatever directory they are, and fail by `assert`; and so that
# they buffer their output, as a program does by itself.
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
for _variable in ("PYTHONOPTIMIZE", "PYTHONUNBUFFERED"):
    ENVIRONMENT.pop(_variable, None)

LONG = os.environ.get("DAEMON_DB_LONG") == "1"


def rounds(short: int, long: int) -> int:
    """How often to repeat: `long` with `DAEMON_DB_LONG=1`."""
    return long if LONG else short


LIMIT = rounds(60, 600)
"""Seconds, for what must come to its end however slow the machine is: far more than it takes."""


# The schema, which may have more than a test knows of


FIRST = Path(__file__).with_name("schemas").joinpath("0.1.0.sql").read_text(encoding="utf-8")
"""The first released `schema.sql`, for the tests that edit a schema's text: they need one that stays as it is."""


def use_schema(script: str) -> None:
    """Make this process's version one with another `schema.sql`."""
    _schema.SQL = script
    _schema.expected.cache_clear()
    _schema._complete.clear()


def spare(table: str) -> str:
    """A column of `table` that takes any text, also the same again, and NULL in a row that doesn't name it."""
    facts, _ = _schema.expected()
    texts = [
        key for (name, kind, key), words in facts.items() if (name, kind, words) == (table, "column", ("TEXT", ""))
    ]
    return next(column for column in texts if (table, "UNIQUE", column) not in facts)


_REQUIRED = """
    "notnull" AND dflt_value IS NULL
    AND (NOT pk OR EXISTS (SELECT 1 FROM pragma_index_list(:table) WHERE origin = 'pk'))  -- else it is the rowid"""


def insertion(conn: sqlite3.Connection, table: str, source: str = "", /, **values: str) -> str:
    """The INSERT of a row with these values, each written in SQL; with a `source`, "FROM n", of a row for each there.

    A column that must have a value and isn't among them gets some number, and a value without a column is left out. So
    a change of `schema.sql` fails no test that isn't about it.
    """
    named = f"lower(name) IN ({', '.join(map(repr, values))})"
    select = f"SELECT lower(name) FROM pragma_table_info(:table) WHERE {named} OR {_REQUIRED}"
    # Not by conn.execute(), which takes the connection's row factory. And the cursor is in no variable: a traceback
    # would keep it half read, and SQLite's lock with it.
    found = sqlite3.Cursor(conn).execute(select, {"table": table}).fetchall()
    row = {name: values.get(name, "abs(random() % 1000000000000)") for (name,) in found}
    names, expressions = ", ".join(f'"{name}"' for name in row), ", ".join(row.values())
    rows = f"SELECT {expressions} {source}" if source else f"VALUES ({expressions})"
    return f"INSERT INTO {table} ({names}) {rows}"


def insert(conn: sqlite3.Connection, table: str, **values: object) -> None:
    """Insert a row with these values, and in each other column that must have one some number."""
    conn.execute(insertion(conn, table, **{name: f":{name}" for name in values}), values)


def insert_run(conn: sqlite3.Connection, run_id: str = "run-1") -> None:
    insert(
        conn,
        "runs",
        id=run_id,
        feature_branch=f"feature/{run_id}",
        repo_path=f"/repo/{run_id}",
        target_branch=f"main/{run_id}",
        tasks_dir=f"tasks/{run_id}",
        parallelism=4,
        status="running",
    )


def insert_unit(conn: sqlite3.Connection, run_id: str = "run-1", unit_id: str = "unit-1") -> None:
    insert(conn, "units", id=f"{run_id}/{unit_id}", run_id=run_id, unit_id=unit_id, status="pending")


def append_event(conn: sqlite3.Connection, run_id: str = "run-1") -> int:
    """Append an event with the run's next sequence number, which is returned. For within a transaction."""
    (sequence,) = conn.execute(
        "SELECT coalesce(max(sequence), 0) + 1 FROM events WHERE run_id = ?", (run_id,)
    ).fetchone()
    insert(conn, "events", run_id=run_id, sequence=sequence, event_type="step")
    return int(sequence)


def runs(db: DB) -> set[str]:
    """The ids of the runs that this thread finds, by the table itself."""
    return {run_id for (run_id,) in db.conn.execute("SELECT id FROM runs NOT INDEXED")}


def runs_in(path: Path | str) -> set[str]:
    """The same for a stranger, who finds the file in order."""
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {run_id for (run_id,) in conn.execute("SELECT id FROM runs NOT INDEXED")}


def count_objects(conn: sqlite3.Connection) -> int:
    """How many tables and indexes there are, but for the indexes that constraints have."""
    select = "SELECT count(*) FROM sqlite_master WHERE type IN ('table', 'index') AND sql NOT NULL"
    return int(conn.execute(select).fetchone()[0])


def _filling() -> str:
    with closing(sqlite3.connect(":memory:")) as conn:
        conn.executescript(_schema.SQL)
        run = {"id": "'run-' || i", "feature_branch": "'feature/' || i", "status": "'running'"}
        unit = {"id": "runs.id || '/' || i", "run_id": "runs.id", "unit_id": "i", "status": "'pending'"}
        event = {"run_id": "runs.id", "sequence": "i", "event_type": "'step'"}
        return f"""
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300)
{insertion(conn, "runs", "FROM n", **run)};
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10)
{insertion(conn, "units", "FROM runs, n", **unit)};
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20)
{insertion(conn, "events", "FROM runs, n", **event)};
"""


def fill_with_sqlite3(path: Path) -> None:
    """Have the `sqlite3` program make a database: 300 runs, each with 10 units and 20 events, rollback-journal mode."""
    subprocess.run(["sqlite3", path], input=_schema.SQL + _filling(), text=True, check=True, timeout=LIMIT)


def no_sync(conn: sqlite3.Connection) -> None:
    """Don't wait for the disk: for what need not outlast a power cut."""
    conn.execute("PRAGMA synchronous=OFF")


def make_rollback(path: Path, runs: int = 1, script: str = _schema.SQL) -> None:
    """A database in rollback-journal mode, SQLite's default, with `runs` runs."""
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        no_sync(conn)
        conn.executescript(script)
        for number in range(1, runs + 1):
            insert_run(conn, f"run-{number}")


def make_wal(path: Path, runs: int = 1) -> None:
    """As `DB` leaves one that it closed in good order: in WAL mode, with nothing beside it."""
    with DB.open(path) as db:
        for number in range(1, runs + 1):
            insert_run(db.conn, f"run-{number}")


def make_killed(path: Path, runs: int = 1, mode: str = "wal") -> None:
    """What a process leaves that is killed while it changes the runs: a WAL that has them, too, or a hot journal."""
    source = path.with_name(f"{path.name}-source")
    with closing(sqlite3.connect(source, isolation_level=None)) as conn:
        no_sync(conn)
        conn.execute(f"PRAGMA journal_mode={mode}")
        make_rollback(source, runs)
        conn.executescript(f"PRAGMA cache_size=1; BEGIN; UPDATE runs SET {spare('runs')} = hex(zeroblob(10000))")
        copy(source, path)
    source.unlink()


def make_hot(path: Path) -> None:
    """What a process leaves that is killed in rollback-journal mode: a journal that is to be played back."""
    make_killed(path, mode="delete")


def make_nothing(path: Path) -> None:
    """A path where nothing is."""


def copy(source: Path, path: Path) -> Path:
    """Copy a database, and what is beside it; the path of the copy."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            shutil.copyfile(f"{source}{suffix}", f"{path}{suffix}")
    return path


def bytes_of(path: Path) -> dict[str, bytes]:
    """What a database consists of: the file and what is beside it, by suffix."""
    files = {suffix: Path(f"{path}{suffix}") for suffix in ("", "-journal", "-wal", "-shm")}
    return {suffix: file.read_bytes() for suffix, file in files.items() if file.exists()}


def files_in(directory: Path) -> dict[str, bytes | None]:
    """Each name under `directory`, with the bytes of those that are files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def start(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start Python on `code`: `arguments` in `sys.argv[1:]`, pipes for its three streams, warnings as errors.

    It ends after `LIMIT` seconds, whatever it waits for, and so does what waits for it.
    """
    code = f"import signal\nsignal.alarm({LIMIT})\n{code}"
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    defaults = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT}
    return subprocess.Popen(command, encoding="utf-8", errors="surrogateescape", **(defaults | options))


def run(code: str, *arguments: object, **options: object) -> str:
    """Run Python on `code` to its end, which must be exit status 0 and nothing on standard error; what it printed."""
    process = start(code, *arguments, **options)
    output, errors = end(process)
    if (process.returncode, errors) != (0, ""):
        raise AssertionError(f"exit status {process.returncode}\n{errors}\n{output}")
    return output


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Close its standard input and wait for its end; what it wrote to standard output and standard error."""
    try:
        return process.communicate(timeout=LIMIT)
    finally:
        process.kill()
        process.wait(LIMIT)


_WORKER = """
for line in sys.stdin:
    signal.alarm(LIMIT)
    code, *sys.argv[1:] = json.loads(line)
    printed, failure = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            exec(code, dict(globals()))
        except BaseException:
            failure = traceback.format_exc()
    print(json.dumps([printed.getvalue(), failure]), flush=True)
    signal.alarm(0)
"""


def ask(process: Any, *question: object) -> list[Any]:
    """Write a line of JSON to its standard input, and read one from its standard output."""
    process.stdin.write(json.dumps([*map(str, question)]) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise AssertionError(f"it ended: {end(process)}")
    return list(json.loads(answer))


@contextmanager
def worker(prologue: str, *arguments: object, **options: object) -> Iterator[Callable[..., str]]:
    """Start Python on `prologue`, and let it go on: yields a `run` for code there, which sees what `prologue` defines.

    For many short cases: to start a process takes longer than most of them. What one leaves, the next one finds.
    """
    imports = "import contextlib, io, json, signal, sys, traceback\n"  # first: `prologue` may make them impossible
    process = start(imports + prologue + _WORKER.replace("LIMIT", str(LIMIT)), *arguments, **options)

    def run_there(code: str, *arguments: object) -> str:
        printed, failure = ask(process, code, *arguments)
        if failure is not None:
            raise AssertionError(f"{failure}\n{printed}")
        return str(printed)

    try:
        yield run_there
    finally:
        outcome = *end(process), process.returncode
    if outcome != ("", "", 0):
        raise AssertionError(outcome)


class Fork:
    """Python on `code` in a process that is forked off this one, which must have no other thread and no database open.

    It is a tenth of the work of `start`: nothing is imported again. Like what `start` returns, it has `stdin`, `stdout`
    and `returncode`, is for `end`, and ends after `LIMIT` seconds.
    """

    _open: "list[Fork]" = []

    def __init__(self, code: str, *arguments: object) -> None:
        sys.stdout.flush()  # else both would write what is still to be written
        their_input, our_input = os.pipe()
        our_output, their_output = os.pipe()
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.returncode: int | None = None
        self.pid = os.fork()
        self.stdin, self.stdout = open(our_input, "w", encoding="utf-8"), open(our_output, encoding="utf-8")
        self._open.append(self)
        if self.pid == 0:
            signal.alarm(LIMIT)
            for number, descriptor in enumerate((their_input, their_output, self._errors.fileno())):
                os.dup2(descriptor, number)
            for each in self._open:
                each._close()  # else nobody's standard input would come to its end
        os.close(their_input)
        os.close(their_output)
        if self.pid == 0:
            sys.argv[1:] = map(str, arguments)
            self._execute(code)

    def _execute(self, code: str) -> None:
        """As a program, to the end of the process.

        Of the interpreter's end, there is what this program has brought about: what was registered for it is done, and
        the program's objects are freed. To free all that was there before the fork, too, takes longer than all else.
        """
        variables = dict(vars(sys.modules["__main__"]))
        status = 1
        try:
            exec(code, variables)
            status = 0
        except BaseException as error:
            if isinstance(error, SystemExit) and not isinstance(error.code, str):
                status = int(error.code or 0)
            else:
                traceback.print_exc()
        finally:
            threading._shutdown()  # type: ignore[attr-defined]  # waits for those that are no daemons
            atexit._run_exitfuncs()
            variables.clear()
            gc.collect()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _close(self) -> None:
        for file in self.stdin, self.stdout, self._errors:
            file.close()

    def communicate(self, timeout: float) -> tuple[str, str]:
        self.stdin.close()
        output = self.stdout.read()
        self.wait(timeout)
        self._errors.seek(0)
        errors = self._errors.read()
        self._close()
        self._open.remove(self)
        return output, errors

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float) -> None:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


FORKS = """
import gc, json, sys
from support import Fork, end

signal.alarm(0)  # each fork has an alarm of its own; this one ends when its standard input does
exec(sys.argv.pop())
gc.freeze()  # what a fork collects is its own
while line := sys.stdin.readline():
    process = Fork(*json.loads(line))
    print(json.dumps([*end(process), process.returncode]), flush=True)
"""


class Forks:
    """A process to fork others off: for many that one after another would import the same, or execute `beforehand`."""

    def __init__(self, beforehand: str = "", start: Callable[..., Any] = start) -> None:
        self._process = start(FORKS, beforehand)

    def run(self, code: str, *arguments: object) -> str:
        """As `run`."""
        output, errors, status = ask(self._process, code, *arguments)
        if (status, errors) != (0, ""):
            raise AssertionError(f"exit status {status}\n{errors}\n{output}")
        return str(output)

    def close(self) -> None:
        if (outcome := end(self._process)) != ("", ""):
            raise AssertionError(outcome)


def began_and_done(lines: str) -> tuple[list[int], list[int]]:
    """The numbers of what a process began and of what it had done."""
    said = [line.split() for line in lines.splitlines()]
    return [int(n) for word, n in said if word == "begin"], [int(n) for word, n in said if word == "done"]


def kill_at_random(code: str, *arguments: object) -> tuple[list[int], list[int]]:
    """Start `code`, and kill it soon after its first "begin"; the numbers of what it began and of what it had done."""
    process = start(code, *arguments)
    said = process.stdout.readline()
    time.sleep(random.uniform(0, 0.03))  # any moment will do
    process.kill()
    said += process.stdout.read()  # not left to communicate(): it doesn't know what readline() has in its buffer
    outcome = end(process), process.returncode
    if outcome != (("", ""), -signal.SIGKILL):  # no assert, which pytest keeps under -O in test modules only
        raise AssertionError(outcome)
    return began_and_done(said)


OPEN_AND_DIE = """
import gc, itertools, os, resource, shutil, signal, sys
from daemon_db import DB, _schema
from daemon_db._connection import Connection

directory, template, where = sys.argv[1:4]
moments = [0, 600, *range(3_000, 200_000, 3_700)] if where == "in a write" else itertools.count()
connect = Connection.__init__


def connect_traced(conn, state):
    connect(conn, state)
    conn.set_trace_callback(die)


def die(_):
    global statements_left
    if statements_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    statements_left -= 1


def was_killed(number, child):
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.waitstatus_to_exitcode(status) in (-signal.SIGKILL, -signal.SIGXFSZ), status
    print(number, flush=True)
    return status != 0


_schema.expected()  # once, not in each child
gc.freeze()
before = None  # two at a time
for number, moment in enumerate(moments):
    path = f"{directory}/{number}.db"
    if template:
        shutil.copyfile(template, path)
    child = os.fork()
    if child == 0:
        if where == "in a write":
            # Once a file has that size: what it is to be written to it beyond is the end.
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (moment, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        else:
            statements_left = moment
            Connection.__init__ = connect_traced
        db = DB.open(path)
        os._exit(0)
    if before and not was_killed(*before):
        os.waitpid(child, 0)
        break
    before = number, child
else:
    was_killed(*before)
"""
"""Opens copies of a database; each open is killed a moment later than the one before, the last one at its end.

Prints which ones, each as soon as it is.
"""


def opened_and_killed(directory: Path, template: Path | None, where: str, **options: object) -> Iterator[Path]:
    """Copies of a database; a process that opened one was killed a moment later than the one before.

    The last one has opened it, and has ended without a close.
    """
    process = start(OPEN_AND_DIE, directory, template or "", where, **options)
    try:
        for number in process.stdout:
            yield directory / f"{int(number)}.db"
    finally:
        outcome = end(process)
    if (outcome, process.returncode) != (("", ""), 0):
        raise AssertionError(outcome)


WAIT = """
import sys


def wait():
    print("ready", flush=True)
    sys.stdin.readline()
"""


TOGETHER = """
import gc, json, sys
from daemon_db import _schema
from support import Fork, end

count, code, *arguments = sys.argv[1:]
_schema.expected()  # once, not in each process
gc.freeze()
processes = [Fork(code, number, *arguments) for number in range(int(count))]
printed = [""] * len(processes)
running = set(range(len(processes)))
while running:
    for number in sorted(running):
        while (line := processes[number].stdout.readline()) not in ("ready\\n", ""):
            printed[number] += line
        if not line:
            running.remove(number)
            printed[number] += "".join(end(processes[number]))
            if status := processes[number].returncode:
                printed[number] += f"exit status {status}\\n"
    for number in running:
        processes[number].stdin.write("go\\n")
        processes[number].stdin.flush()
print(json.dumps(printed))
"""


def together(count: int, code: str, *arguments: object) -> list[str]:
    """Run Python on `code` in `count` processes; what each printed. Each has its number, too, in `sys.argv[1]`.

    `wait()` in there lets all of them go on at the same moment.
    """
    printed: list[str] = json.loads(run(TOGETHER, count, WAIT + code, *arguments))
    return printed


DESCRIPTORS = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"


def open_files() -> list[str]:
    """The files that this process has open."""
    names = []
    for name in os.listdir(DESCRIPTORS):
        try:
            names.append(_name_of(int(name)))
        except OSError:
            pass  # the one that listdir() itself had open
    return sorted(names)


def _name_of(descriptor: int) -> str:
    if sys.platform == "darwin":
        return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
    return os.readlink(f"{DESCRIPTORS}/{descriptor}")


# As another user


@contextmanager
def public_directory() -> Iterator[Path]:
    """A directory that every user can get to, which pytest's are not. Closed ones in it are opened again at the end."""
    base = Path(tempfile.gettempdir()).resolve()
    if not all(parent.stat().st_mode & 1 for parent in (base, *base.parents)):
        base = Path("/tmp")
    path = Path(tempfile.mkdtemp(dir=base))
    path.chmod(0o755)
    yield path
    for inner in path.iterdir():
        inner.chmod(0o755)
    shutil.rmtree(path)


UNPRIVILEGED = """
import os, sqlite3, sys
import daemon_db

daemon_db.DB.open(":memory:").close()  # imports what opening imports: for the other user, those files may be unreadable
if os.geteuid() == 0:  # to whom nothing is forbidden
    os.setgroups([])
    os.setgid(65534)
    getattr(os, sys.argv[1])(65534)
"""


@functools.cache
def something_is_forbidden() -> bool:
    """To this user, or to one that root can become: in some containers it can't."""
    process = start(UNPRIVILEGED, "setuid")
    _, errors = end(process)
    if process.returncode and "[Errno" not in errors:
        raise AssertionError(errors)
    return process.returncode == 0


CHANGES = ["setuid", "seteuid"] if os.geteuid() == 0 else ["as it is"]
"""How root becomes a user to whom something is forbidden."""


def unprivileged(change: str = "setuid") -> AbstractContextManager[Callable[..., str]]:
    """A `worker` of a user with no rights but everybody's, or else of the one who runs the tests."""
    return worker(UNPRIVILEGED, change)


# Threads


def in_thread(function: Callable[[], Result]) -> Result:
    """What `function` returns or raises in a thread that has then ended."""
    future: Future[Result] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    join(thread)
    return future.result(0)


def join(*threads: threading.Thread) -> None:
    """Wait for the end of `threads`."""
    for thread in threads:
        thread.join(LIMIT)
        if thread.is_alive():
            raise AssertionError(f"{thread} goes on")


def wait_for(event: threading.Event) -> None:
    if not event.wait(LIMIT):
        raise AssertionError("waited in vain")
