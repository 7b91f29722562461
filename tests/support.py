"""What several test modules need: a run to hang things on, Python in child processes, and how long to go on.

`DAEMON_DB_LONG=1` in the environment makes the tests of races, crashes, threads and damage run at the numbers of the
README's table, which takes minutes. Without it the same tests run for a moment each.
"""

import multiprocessing
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import daemon_db

# So that child processes find what the tests find, in whatever directory they are.
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}

LONG = os.environ.get("DAEMON_DB_LONG") == "1"


def rounds(short: int, long: int) -> int:
    """How often to repeat: `long` with `DAEMON_DB_LONG=1`."""
    return long if LONG else short


def insert_run(conn: sqlite3.Connection, run_id: str = "run-1") -> None:
    conn.execute(
        "INSERT INTO runs (id, feature_branch, repo_path, target_branch, tasks_dir, parallelism, status)"
        " VALUES (?, ?, '/repo', 'main', 'tasks', 4, 'running')",
        (run_id, f"feature/{run_id}"),
    )


def append_event(conn: sqlite3.Connection, run_id: str = "run-1") -> int:
    """Append an event with the run's next sequence number, which is returned. For within a transaction."""
    (sequence,) = conn.execute(
        "SELECT coalesce(max(sequence), 0) + 1 FROM events WHERE run_id = ?", (run_id,)
    ).fetchone()
    conn.execute("INSERT INTO events (run_id, sequence, event_type) VALUES (?, ?, 'step')", (run_id, sequence))
    return int(sequence)


FILL = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300)
INSERT INTO runs SELECT 'run-' || i, 'feature/' || i, '/repo', 'main', 'tasks', 4, 'running', NULL, NULL, NULL, NULL
FROM n;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10)
INSERT INTO units (id, run_id, unit_id, status) SELECT runs.id || '/' || i, runs.id, i, 'pending' FROM runs, n;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20)
INSERT INTO events (run_id, sequence, event_type) SELECT runs.id, i, 'step' FROM runs, n;
"""


def fill_with_sqlite3(path: Path) -> None:
    """Have the `sqlite3` program make a database: 300 runs, each with 10 units and 20 events, rollback-journal mode."""
    schema = Path(daemon_db.__file__).with_name("schema.sql").read_text()
    subprocess.run(["sqlite3", path], input=schema + FILL, text=True, check=True)


def start(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start Python on `code`: `arguments` in `sys.argv[1:]`, pipes for its three streams, warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    defaults = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=ENVIRONMENT, **(defaults | options))


def run(code: str, *arguments: object, **options: object) -> str:
    """Run Python on `code` to its end, which must be exit status 0 and nothing on standard error; what it printed."""
    process = start(code, *arguments, **options)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, errors) == (0, ""), f"exit status {process.returncode}\n{errors}\n{output}"
    return output


def together(count: int, function: Callable[..., object], *arguments: object) -> list[object]:
    """Call `function(barrier, number, *arguments)` in `count` new processes; what each returned, or its exception.

    `barrier.wait()` in there lets all of them go on at the same moment.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    started = []
    for number in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_call, args=(sender, function, barrier, number, *arguments))
        process.start()
        sender.close()
        started.append((process, receiver))
    returned = []
    for process, receiver in started:
        try:
            returned.append(receiver.recv())
        except EOFError:
            process.join()
            returned.append(f"ended with exit status {process.exitcode}")
        receiver.close()
        process.join()
    return returned


def _call(sender, function, *arguments):  # type: ignore[no-untyped-def]
    try:
        sender.send(function(*arguments))
    except BaseException as error:
        sender.send(error)


def open_files() -> list[str]:
    """The files that this process has open."""
    names = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            names.append(str(descriptor.readlink()))
        except FileNotFoundError:
            pass  # the one that iterdir() itself had open
    return sorted(names)
