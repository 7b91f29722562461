"""The WAL is kept where it is, whatever the daemon's process does to the file; and where it is lost, that is found out.

The daemon is a process of its own. "The others" are the `sqlite3` program, which opens the file, reads and closes it,
and another process with a `DB`, which writes and closes. `DAEMON_DB_LONG=1` in the environment makes it go on for
longer (see `support`).
"""

import importlib.util
import itertools
import logging
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from daemon_db import DB, OpenError, _guard
from support import (
    LIMIT,
    append_event,
    end,
    files_in,
    in_thread,
    insert_run,
    make_killed,
    make_rollback,
    make_wal,
    open_files,
    rounds,
    run,
    start,
)

has_lock = pytest.mark.skipif(_guard._SETLK is None, reason="this system has no locks of an open file description")

LOST = "its -wal or -shm was removed or replaced while it was open"

WAYS = {
    "read": "open(path, 'rb').read()",
    "header": "with open(path, 'rb') as file: file.read(16)",
    "write": "os.close(os.open(path, os.O_RDWR))",
    "copy": "shutil.copy(path, path + '-copy')",
    "zip": "zipfile.ZipFile(path + '-zip', 'w').write(path)",
    "tar": "tarfile.open(path + '-tar', 'w').add(path)",
    "hash": "hashlib.file_digest(open(path, 'rb'), 'sha256')",
    "mmap": "with open(path, 'rb') as file: mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ).close()",
    "link": "os.link(path, path + '-link'); open(path + '-link').close(); os.remove(path + '-link')",
    "the -shm": "open(path + '-shm', 'rb').read()",
    "all": "[open(path + suffix, 'rb').read() for suffix in ('', '-wal', '-shm')]",
    "apsw": "conn = apsw.Connection(path); conn.execute('SELECT count(*) FROM runs').fetchall(); conn.close()",
}
"""What drops SQLite's locks on `path` in the process that does it."""

WITH_APSW = [
    pytest.param(
        way,
        marks=pytest.mark.skipif(
            way == "apsw" and importlib.util.find_spec("apsw") is None,
            reason="apsw, a second SQLite in the process, is not installed",
        ),
    )
    for way in WAYS
]

OTHER = """
import sys
from daemon_db import DB
from support import insert_run

with DB.open(sys.argv[1], timeout=60) as db:
    for number in range(int(sys.argv[2])):
        with db.transaction() as conn:
            insert_run(conn, f"{sys.argv[3]}-{number}")
        print(f"{sys.argv[3]}-{number}", flush=True)
    print("done", flush=True)
    sys.stdin.readline()
"""
"""Writes so many runs, and closes when its standard input does."""

DAEMON = f"""
import hashlib, itertools, mmap, os, shutil, signal, sqlite3, subprocess, sys, tarfile, threading, warnings, zipfile
try:
    import apsw
except ImportError:
    pass
from daemon_db import DB, OpenError, _guard
from support import LIMIT, end, in_thread, insert_run, join, start

warnings.simplefilter("ignore")  # of a file that open() leaves to the garbage collector
path, way, threads, how, last, lock = sys.argv[1:]
OTHER = {OTHER!r}
WAYS = {WAYS!r}
if lock == "off":
    _guard._SETLK = None
acknowledged, stop, progress, errors = [], threading.Event(), threading.Semaphore(0), []

def write(number):
    try:
        for each in itertools.count():
            if stop.is_set():
                return
            name = f"{{number}}-{{each}}"
            if how == "transaction":
                with db.transaction() as conn:
                    insert_run(conn, name)
            else:
                insert_run(db.conn, name)
            acknowledged.append(name)
            progress.release()
    except BaseException as error:
        errors.append(error)
        progress.release()

def others():
    subprocess.run(["sqlite3", "-cmd", ".timeout 60000", path, "SELECT count(*) FROM runs"], check=True, capture_output=True)
    other = start(OTHER, path, 20, "other")
    while (line := other.stdout.readline()) not in ("done\\n", ""):
        acknowledged.append(line.strip())
    return other

db = DB.open(path, timeout=60, on_connect=lambda conn: conn.execute("PRAGMA synchronous=OFF"))
if threads == "1":
    for number in range(20):
        with db.transaction() as conn:
            insert_run(conn, f"before-{{number}}")
        acknowledged.append(f"before-{{number}}")
    exec(WAYS[way])
    other = others()
    if last == "daemon":
        assert end(other) == ("", ""), other
    try:
        for number in range(20):
            name = f"after-{{number}}"
            if how == "transaction":
                with db.transaction() as conn:
                    insert_run(conn, name)
            else:
                insert_run(db.conn, name)
            acknowledged.append(name)
        in_thread(lambda: insert_run(db.conn, "thread"))
        acknowledged.append("thread")
    except sqlite3.Error as error:
        errors.append(error)
else:
    workers = [threading.Thread(target=write, args=(number,), daemon=True) for number in range(int(threads))]
    for worker in workers:
        worker.start()
    for _ in range(50):
        assert progress.acquire(timeout=LIMIT)
    exec(WAYS[way])
    other = others()
    if last == "daemon":
        assert end(other) == ("", ""), other
    for _ in range(50):
        assert progress.acquire(timeout=LIMIT)
    stop.set()
    join(*workers)
db.close()
if last == "other":
    assert end(other) == ("", ""), other
print(*[f"error {{error}}" for error in errors], *acknowledged, sep="\\n")
"""


def the_daemon(path: Path, way: str, threads: int, how: str, last: str, lock: str) -> tuple[list[str], list[str]]:
    """Run it; what it and the other acknowledged, and the errors that it met."""
    said = run(DAEMON, path, way, threads, how, last, lock).splitlines()
    return [line for line in said if not line.startswith("error ")], [line for line in said if line.startswith("error ")]


def check_whole(path: Path, acknowledged: list[str]) -> None:
    """All that was acknowledged is there, for a stranger, and the file is in order."""
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        there = {run_id for (run_id,) in conn.execute("SELECT id FROM runs NOT INDEXED")}
    assert set(acknowledged) - there == set()


@has_lock
@pytest.mark.parametrize("way", WITH_APSW)
@pytest.mark.parametrize(
    ("threads", "how", "last"),
    [(1, "transaction", "daemon"), (8, "transaction", "other"), (8, "autocommit", "daemon"), (1, "autocommit", "other")],
)
def test_nothing_in_the_process_drops_the_lock(way: str, threads: int, how: str, last: str, tmp_path: Path) -> None:
    for number in range(rounds(1, 100)):
        path = tmp_path / f"{number}.db"
        acknowledged, errors = the_daemon(path, way, threads, how, last, "on")
        assert errors == []
        assert len(acknowledged) > 60
        check_whole(path, acknowledged)
        assert not Path(f"{path}-wal").exists()
