"""How fast daemon_db is, beside a plain recipe that does the same with `sqlite3` alone.

    PYTHONPATH=src python tests/benchmark.py            all of it, in five minutes
    PYTHONPATH=src python tests/benchmark.py --quick    in one minute: fewer measurements, at most 100,000 events
    PYTHONPATH=src python tests/benchmark.py --json     the same as JSON, in seconds and bytes
    PYTHONPATH=src python tests/benchmark.py --svg      also draw the appends of 8 threads: tests/append-latency.svg

Each line shows how long it takes beside daemon_db, by the plain recipe for one, and how long daemon_db takes: the
median and, in parentheses, the quartiles, between which half of the measurements are. Then how many times as long
daemon_db takes, what is promised, and "ok" or "MISSED", or "-" where nothing is promised. If a promise was missed, the
exit status is 1. At the end all of it comes once more, in short, as the table of tests/README.md.

The two are measured in turn, and take turns in being first; the ratio is the median of the ratios of these pairs. So
what else the machine does meanwhile matters little. The databases are made in the directory for temporary files: set
TMPDIR to choose the disk.
"""

import argparse
import functools
import itertools
import json
import math
import os
import platform
import resource
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import daemon_db
from daemon_db import DB
from support import insertion

SCHEMA = Path(daemon_db.__file__).with_name("schema.sql").read_text(encoding="utf-8")
CHART = Path(__file__).with_name("append-latency.svg")

DESCRIPTORS = 1000
THREADS = 8
READERS = 4
READING = 0.050
"""Seconds that each of them takes, again and again."""
ENOUGH_WAL = 2e9
"""Bytes: more would only fill the disk."""

with closing(sqlite3.connect(":memory:")) as _conn:
    _conn.executescript(SCHEMA)
    _run = {"id": "?1", "feature_branch": "?2", "repo_path": "'/srv/repositories/main'", "target_branch": "'main'"}
    _run |= {"tasks_dir": "'tasks'", "parallelism": "4", "status": "?3"}
    _event = {"run_id": "?1", "sequence": "?2", "event_type": "'unit.completed'", "payload_json": "?3"}
    INSERT_RUN = insertion(_conn, "runs", **_run)
    INSERT_EVENT = insertion(_conn, "events", **_event)
NEXT_SEQUENCE = "SELECT coalesce(max(sequence), 0) + 1 FROM events WHERE run_id = ?"
PAYLOAD = '{"unit": "unit-1", "attempt": 1, "seconds": 12.5, "log": "/srv/logs/run-1/unit-1.log"}'


# The plain recipe, and what both sides do with a connection


def plain_connect(path: str) -> sqlite3.Connection:
    conn = sqlite3.connect(path, isolation_level=None)
    conn.execute("PRAGMA journal_mode=WAL")
    conn.execute("PRAGMA foreign_keys=ON")
    return conn


def plain_open(path: str) -> sqlite3.Connection:
    conn = plain_connect(path)
    conn.executescript(SCHEMA)
    return conn


@contextmanager
def plain_transaction(conn: sqlite3.Connection) -> Iterator[None]:
    conn.execute("BEGIN IMMEDIATE")
    try:
        yield
        conn.execute("COMMIT")
    except BaseException:
        conn.rollback()
        raise


def a_run(name: str) -> tuple[str, str, str]:
    """What to bind to `INSERT_RUN`."""
    return name, f"feature/{name}", "running"


def append_event(conn: sqlite3.Connection, run: str = "run-1") -> None:
    (sequence,) = conn.execute(NEXT_SEQUENCE, (run,)).fetchone()
    conn.execute(INSERT_EVENT, (run, sequence, PAYLOAD))


def without_fsync(conn: sqlite3.Connection) -> None:
    conn.execute("PRAGMA synchronous=OFF")


def fsync_on_checkpoints(conn: sqlite3.Connection) -> None:
    conn.execute("PRAGMA synchronous=NORMAL")


def fsync_on_commits(conn: sqlite3.Connection) -> None:
    """As it is with nothing configured: FULL."""


# Measuring

Action = Callable[[], object]
Configure = Callable[[sqlite3.Connection], object]


def clock(action: Action) -> float:
    """The seconds that `action` takes. What it returns, if anything, is called when the clock has stopped."""
    start = time.perf_counter()
    finish = action()
    seconds = time.perf_counter() - start
    if finish is not None:
        finish()
    return seconds


def clock_in_new_thread(action: Action) -> float:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(clock, action).result()


def in_turn(what: str, seconds: float, *things: object, measure: Callable = clock) -> list[list[float]]:
    """Measure `things` in turn, back and forth, for so many seconds in all; each one's measurements, after a first."""
    for thing in things:
        measure(thing)
    measured = [[] for _ in things]
    order = list(zip(things, measured, strict=True))
    start = time.monotonic()
    while (spent := time.monotonic() - start) < seconds or len(measured[0]) < 20:
        progress.show(what, spent / seconds)
        for thing, values in order:
            values.append(measure(thing))
        order.reverse()
    return measured


@dataclass
class Row:
    """A line of the table: what was measured, of daemon_db and of what it is beside, and what is promised."""

    what: str
    base: list[float]
    ours: list[float]
    unit: str = "s"
    beside: str = "plain recipe"
    at_most: float | None = None  # the ratio
    at_least: float | None = None  # the ratio
    below: float | None = None  # daemon_db's median
    more: float | None = None  # at most: the median of the differences

    @property
    def ratio(self) -> float:
        return statistics.median(own / base for base, own in zip(self.base, self.ours, strict=True))

    @property
    def bounds(self) -> dict[str, bool]:
        """What is promised, and whether it is kept."""
        bounds = {}
        if self.at_most is not None:
            bounds[f"<= {self.at_most:.2f} x"] = self.ratio <= self.at_most
        if self.at_least is not None:
            bounds[f">= {self.at_least:.2f} x"] = self.ratio >= self.at_least
        if self.below is not None:
            bounds[f"< {amount([self.below], self.unit)}"] = statistics.median(self.ours) < self.below
        if self.more is not None:
            difference = statistics.median(own - base for base, own in zip(self.base, self.ours, strict=True))
            bounds[f"<= {amount([self.more], self.unit)} more"] = difference <= self.more
        return bounds

    @property
    def bound(self) -> str:
        return ", ".join(self.bounds)

    @property
    def verdict(self) -> str:
        return ("ok" if all(self.bounds.values()) else "MISSED") if self.bounds else "-"


def compare(what: str, seconds: float, plain: object, ours: object, measure: Callable = clock, **more: object) -> Row:
    return Row(what, *in_turn(what, seconds, plain, ours, measure=measure), **more)


class Progress:
    """A line on standard error, if that is a terminal: what is being measured, and how far it is."""

    def __init__(self) -> None:
        self.step, self.steps = 0, 0
        self.shown = 0.0

    def show(self, what: str, part: float) -> None:
        if sys.stderr.isatty() and time.monotonic() - self.shown > 0.2:
            self.shown = time.monotonic()
            self.write(f"{self.step}/{self.steps}  {what}: {min(part, 1):.0%}")

    def write(self, line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


progress = Progress()


# The rows. Where something is written, each side has a file of its own.


def open_current(folder: str, seconds: float) -> Iterator[Row]:
    """By itself, beside a running daemon (then the WAL is there already, and stays), and with many files open."""
    path = f"{folder}/current.db"
    DB.open(path).close()

    def plain() -> None:
        plain_open(path).close()

    def ours() -> None:
        DB.open(path).close()

    def measure(files: Callable[[], AbstractContextManager[None]]) -> float:
        with files():
            return clock(ours)

    yield compare("open and close a current database", seconds, plain, ours, at_most=2.40, below=0.0012)
    with DB.open(path) as daemon:
        daemon.conn.execute(INSERT_RUN, a_run("run-1"))
        yield compare("the same beside a running daemon", seconds, plain, ours, at_most=2.70)
    what = f"the same with {DESCRIPTORS:,} open files"
    yield compare(what, seconds, nullcontext, many_open_files, measure, beside="with few", more=0.004)


@contextmanager
def many_open_files() -> Iterator[None]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with ExitStack() as stack:
        for _ in range(DESCRIPTORS):
            stack.enter_context(open(os.devnull, "rb", buffering=0))
        yield


def open_fresh(folder: str, seconds: float) -> Iterator[Row]:
    numbers = itertools.count()

    def plain() -> Action:
        path = f"{folder}/fresh-{next(numbers)}.db"
        plain_open(path).close()
        return lambda: os.remove(path)

    def ours() -> Action:
        path = f"{folder}/fresh-{next(numbers)}.db"
        DB.open(path).close()
        return lambda: os.remove(path)

    yield compare("open and close a fresh file", seconds, plain, ours, at_most=1.05)


def new_thread(folder: str, seconds: float) -> Iterator[Row]:
    path = f"{folder}/thread.db"
    with DB.open(path) as db:

        def plain() -> Action:
            conn = plain_connect(path)
            return conn.close

        def ours() -> None:
            _ = db.conn  # closed when the thread ends

        yield compare("a new thread's first `db.conn`", seconds, plain, ours, clock_in_new_thread)


def transaction(folder: str, seconds: float) -> Iterator[Row]:
    numbers = itertools.count()
    with (
        closing(plain_open(f"{folder}/transaction-plain.db")) as bare,
        DB.open(f"{folder}/transaction.db", on_connect=without_fsync) as db,
    ):
        without_fsync(bare)
        for conn in (bare, db.conn):
            conn.execute(INSERT_RUN, a_run("run-1"))

        def plain() -> None:
            bare.execute("BEGIN IMMEDIATE")
            try:
                bare.execute(INSERT_EVENT, ("run-1", next(numbers), PAYLOAD))
                bare.execute("COMMIT")
            except BaseException:
                bare.rollback()
                raise

        def ours() -> None:
            with db.transaction() as conn:
                conn.execute(INSERT_EVENT, ("run-1", next(numbers), PAYLOAD))

        yield compare("`transaction()` around an insert, no fsync", seconds, plain, ours, at_most=1.45)


def select(folder: str, seconds: float) -> Iterator[Row]:
    path = f"{folder}/select.db"
    with DB.open(path) as db, closing(plain_connect(path)) as conn:

        def plain() -> None:
            for _ in range(1000):
                conn.execute("SELECT 1")

        def ours() -> None:
            for _ in range(1000):
                db.conn.execute("SELECT 1")

        yield compare('1,000 times `db.conn.execute("SELECT 1")`', seconds, plain, ours, at_most=1.60)


def eight_threads(folder: str, seconds: float, rounds: int, latencies: tuple[list, list]) -> Iterator[Row]:
    """Appending to one run, for so many seconds in each round. Every latency is added to `latencies`, for the chart."""
    sides = {
        "plain recipe": plain_threads,
        "a lock by hand": locking_threads,
        "daemon_db": our_threads,
        "a lock, NORMAL": functools.partial(locking_threads, configure=fsync_on_checkpoints),
        "daemon_db, NORMAL": functools.partial(our_threads, configure=fsync_on_checkpoints),
    }
    appended: dict[str, list[Appended]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in list(sides) if number % 2 else reversed(sides):
            progress.write(f"{progress.step}/{progress.steps}  {THREADS} threads: round {number + 1} of {rounds}")
            appended[side].append(sides[side](f"{folder}/threads-{number}-{side}.db", seconds))
    for side, found in zip(latencies, ("plain recipe", "daemon_db"), strict=True):
        side.extend(itertools.chain.from_iterable(each.latencies for each in appended[found]))
    rates = {side: [each.rate for each in found] for side, found in appended.items()}
    slowest = {side: [max(each.latencies) for each in found] for side, found in appended.items()}
    what = f"{THREADS} threads append to one run"
    plain, lock, ours, normal_lock, our_normal = sides
    yield Row(f"{what}: appends a second", rates[lock], rates[ours], "/s", lock, at_least=0.85)
    yield Row(f"{what} at NORMAL: the same", rates[normal_lock], rates[our_normal], "/s", lock, at_least=0.75)
    yield Row(f"{what}: appends a second", rates[plain], rates[ours], "/s")
    yield Row(f"{what}: the slowest append", slowest[plain], slowest[ours], at_most=0.10)


def overlapping_readers(folder: str, seconds: float) -> Iterator[Row]:
    """The same beside threads that read, always at least one of them: SQLite by itself never begins its WAL anew."""
    what = f"{THREADS} threads append, {READERS} read for {READING * 1000:.0f} ms each"
    plain = plain_threads(f"{folder}/readers-plain.db", seconds, READERS)
    os.remove(f"{folder}/readers-plain.db")
    ours = our_threads(f"{folder}/readers.db", seconds, READERS)
    yield Row(f"{what}: the greatest WAL", [plain.greatest_wal], [ours.greatest_wal], "B", below=64e6)
    yield Row(f"{what}: the slowest append", [max(plain.latencies)], [max(ours.latencies)])


@dataclass
class Appended:
    """What threads have done together."""

    rate: float  # appends a second
    latencies: list[float]  # of each append
    greatest_wal: int  # bytes


def plain_threads(path: str, seconds: float, readers: int = 0) -> Appended:
    """By hand, with care: a connection for each thread, BEGIN IMMEDIATE, and sqlite3's busy timeout of 5 seconds."""

    def append(conn: sqlite3.Connection) -> None:
        while True:
            try:
                with plain_transaction(conn):
                    append_event(conn)
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    raise  # else again: "database is locked", this append has lasted the timeout and goes on

    with closing(plain_open(path)) as conn:
        conn.execute(INSERT_RUN, a_run("run-1"))
        return append_together(path, seconds, readers, lambda: closing(plain_connect(path)), append)


def locking_threads(path: str, seconds: float, configure: Configure = fsync_on_commits) -> Appended:
    """The fair way by hand: the same, and a lock of the program's own, for which its threads wait."""
    lock = threading.Lock()

    def connect() -> AbstractContextManager[sqlite3.Connection]:
        conn = plain_connect(path)
        configure(conn)
        return closing(conn)

    def append(conn: sqlite3.Connection) -> None:
        with lock, plain_transaction(conn):
            append_event(conn)

    with closing(plain_open(path)) as conn:
        conn.execute(INSERT_RUN, a_run("run-1"))
        return append_together(path, seconds, 0, connect, append)


def our_threads(path: str, seconds: float, readers: int = 0, configure: Configure = fsync_on_commits) -> Appended:
    def append(_: sqlite3.Connection) -> None:
        with db.transaction() as conn:
            append_event(conn)

    with DB.open(path, on_connect=configure) as db:
        db.conn.execute(INSERT_RUN, a_run("run-1"))
        return append_together(path, seconds, readers, lambda: nullcontext(db.conn), append)


def append_together(
    path: str,
    seconds: float,
    readers: int,
    connect: Callable[[], AbstractContextManager[sqlite3.Connection]],
    append: Callable[[sqlite3.Connection], None],
) -> Appended:
    """Let threads append events for so many seconds, or until the WAL is as big as a benchmark may make it."""
    latencies: list[float] = []
    stop = threading.Event()

    def work() -> None:
        with connect() as conn:
            while not stop.is_set():
                latencies.append(clock(functools.partial(append, conn)))

    def read(number: int) -> None:
        with connect() as conn:
            stop.wait(READING * number / readers)  # so that they begin, and end, one after another
            while not stop.is_set():
                conn.execute("BEGIN")
                conn.execute("SELECT count(*) FROM runs").fetchone()
                stop.wait(READING)
                conn.execute("COMMIT")

    with ThreadPoolExecutor(THREADS + readers) as pool:
        try:
            start = time.perf_counter()
            threads = [pool.submit(read, number) for number in range(readers)]
            threads += [pool.submit(work) for _ in range(THREADS)]
            greatest_wal = watch_wal(f"{path}-wal", seconds)
            rate = len(latencies) / (time.perf_counter() - start)
        finally:
            stop.set()
        for thread in threads:
            thread.result()
    with closing(plain_connect(path)) as conn:
        assert conn.execute("SELECT count(*), max(sequence) FROM events").fetchone() == (len(latencies),) * 2
    return Appended(rate, latencies, greatest_wal)


def watch_wal(wal: str, seconds: float) -> int:
    """The greatest size that it has, within so many seconds."""
    greatest = 0
    start = time.monotonic()
    while (spent := time.monotonic() - start) < seconds and greatest < ENOUGH_WAL:
        greatest = max(greatest, os.path.getsize(wal))
        progress.show(f"{THREADS} threads: the WAL has {greatest / 1e6:.0f} MB", spent / seconds)
        time.sleep(0.02)
    return greatest


def with_fsync(folder: str, seconds: float) -> Iterator[Row]:
    """With nothing configured: each commit waits for the disk."""
    with closing(plain_open(f"{folder}/fsync-plain.db")) as bare, DB.open(f"{folder}/fsync.db") as db:
        for conn in (bare, db.conn):
            conn.execute(INSERT_RUN, a_run("run-1"))

        def plain() -> None:
            with plain_transaction(bare):
                append_event(bare)

        def ours() -> None:
            with db.transaction() as conn:
                append_event(conn)

        yield compare("an event appended, fsync on each commit", seconds, plain, ours, at_most=1.15)


def growth(folder: str, seconds: float, sizes: list[int]) -> Iterator[Row]:
    """As the events grow, 1,000 in each run: daemon_db's own first size is what stands in for the plain recipe."""
    paths = [f"{folder}/{size}-events.db" for size in sizes]
    for path, size in zip(paths, sizes, strict=True):
        fill(path, size)

    def appender(db: DB, size: int) -> Action:
        run = f"run-{size // 2000}"

        def append() -> Action:
            with db.transaction() as conn:
                append_event(conn, run)
            return lambda: conn.execute("DELETE FROM events WHERE run_id = ? AND sequence > 1000", (run,))

        return append

    def opener(path: str) -> Action:
        def open_and_close() -> None:
            DB.open(path).close()

        return open_and_close

    beside = f"at {sizes[0]:,} events"
    with ExitStack() as stack:
        databases = [stack.enter_context(DB.open(path, on_connect=without_fsync)) for path in paths]
        first, *others = in_turn("append as the events grow", seconds, *map(appender, databases, sizes))
    for size, other in zip(sizes[1:], others, strict=True):
        yield Row(f"append at {size:,} events, no fsync", first, other, beside=beside, at_most=1.30)
    first, *others = in_turn("open and close as the events grow", seconds, *map(opener, paths))
    for size, other in zip(sizes[1:], others, strict=True):
        yield Row(f"open and close at {size:,} events", first, other, beside=beside, at_most=1.30)


def fill(path: str, size: int) -> None:
    with DB.open(path, on_connect=without_fsync) as db:
        for begin in range(0, size, 100_000):
            progress.show(f"filling in {size:,} events", begin / size)
            part = range(begin, min(begin + 100_000, size))
            with db.transaction() as conn:
                conn.executemany(INSERT_RUN, (a_run(f"run-{i // 1000}") for i in part[::1000]))
                conn.executemany(INSERT_EVENT, ((f"run-{i // 1000}", i % 1000 + 1, PAYLOAD) for i in part))


# Writing it down


def amount(values: list[float], unit: str) -> str:
    """The median, to three digits, and the quartiles."""
    median = statistics.median(values)
    if unit == "s":
        scale, unit = (1, "s") if median >= 1 else (1e3, "ms") if median >= 1e-3 else (1e6, "us")
    elif unit == "B":
        scale, unit = 1e-6, "MB"
    else:
        scale = 1
    digits = max(0, 2 - math.floor(math.log10(median * scale)))
    if len(values) == 1:
        return f"{median * scale:.{digits}f} {unit}"
    low, _, high = statistics.quantiles(values, method="inclusive")
    return f"{median * scale:.{digits}f} {unit} ({low * scale:.{digits}f} - {high * scale:.{digits}f})"


def table(rows: list[Row]) -> str:
    lines = [("", rows[0].beside, "daemon_db", "ratio", "bound", "")]
    for row in rows:
        measured = amount(row.base, row.unit), amount(row.ours, row.unit)
        lines.append((row.what, *measured, f"{row.ratio:.3f}", row.bound, row.verdict))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def readme_table(rows: list[Row]) -> str:
    """The medians, in Markdown, and which bounds were missed."""
    lines = ["| what | beside | daemon_db | ratio | bound |", "|---|---|---|---|---|"]
    for row in rows:
        base, ours = (amount([statistics.median(values)], row.unit) for values in (row.base, row.ours))
        bound = f"{row.bound}: missed" if row.verdict == "MISSED" else row.bound
        lines.append(f"| {row.what} | {row.beside}: {base} | {ours} | {row.ratio:.2f} | {bound} |")
    return "\n".join(lines)


def as_json(row: Row) -> dict[str, object]:
    def spread(values: list[float]) -> dict[str, object]:
        low, median, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
        return {"median": median, "quartiles": [low, high], "measurements": len(values)}

    return {
        "what": row.what,
        "unit": row.unit,
        "beside": row.beside,
        "base": spread(row.base),
        "daemon_db": spread(row.ours),
        "ratio": row.ratio,
        "bound": row.bound,
        "verdict": row.verdict,
    }


DECADES = "1 us", "10 us", "100 us", "1 ms", "10 ms", "100 ms", "1 s", "10 s", "100 s"


def chart(plain: list[float], ours: list[float]) -> str:
    """Each side's appends from the quickest to the slowest. With each step to the right ten times fewer are left."""
    left, right, top, bottom = 80, 700, 84, 304
    low, high = math.floor(math.log10(min(plain + ours))), math.ceil(math.log10(max(plain + ours)))
    steps = math.log10(max(len(plain), len(ours)))

    def x(quicker: float) -> float:
        return left - (right - left) * math.log10(1 - quicker) / steps

    def y(seconds: float) -> float:
        return bottom - (bottom - top) * (math.log10(seconds) - low) / (high - low)

    def curve(latencies: list[float], color: str) -> str:
        count, latencies = len(latencies), sorted(latencies)
        ranks = sorted({count - round(count ** (i / 300)) for i in range(301)})
        points = " ".join(f"{x(rank / count):.1f},{y(latencies[rank]):.1f}" for rank in ranks)
        return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>'

    def legend(at: int, color: str, name: str, latencies: list[float]) -> str:
        median, slowest = (amount([f(latencies)], "s") for f in (statistics.median, max))
        return (
            f'<path d="M{left} {at - 4}h24" stroke="{color}" stroke-width="2"/>'
            f'<text x="{left + 32}" y="{at}">{name}: median {median}, slowest {slowest}</text>'
        )

    def line(path: str) -> str:
        return f'<path d="{path}" stroke="#888" stroke-opacity=".3"/>'

    def text(at_x: float, at_y: float, words: str, more: str = "") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" {more}>{words}</text>'

    blue, orange = "#3b82f6", "#e8650a"
    parts = [
        # Greys and colours that are readable on white and on black.
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 360" width="720" height="360" role="img"'
        ' font-family="system-ui, sans-serif" font-size="12" fill="#7a7a7a">',
        f"<title>How long an append takes when {THREADS} threads append to one run</title>",
        text(left, 20, f"How long an append takes when {THREADS} threads append to one run", 'font-size="15"'),
        legend(44, orange, "plain recipe: BEGIN IMMEDIATE, busy timeout alone", plain),
        legend(64, blue, "daemon_db: transaction(), threads taking turns", ours),
    ]
    for decade in range(low, high + 1):
        at = y(10**decade)
        parts += line(f"M{left} {at:.1f}H{right}"), text(left - 8, at + 4, DECADES[decade + 6], 'text-anchor="end"')
    for percent in (0, 50, 90, 99, 99.9, 99.99, 99.999):
        at = x(percent / 100)
        if at <= right:
            parts += line(f"M{at:.1f} {top}V{bottom}"), text(at, bottom + 18, f"{percent} %", 'text-anchor="middle"')
    middle = (left + right) / 2, (top + bottom) / 2
    parts += [
        text(middle[0], bottom + 42, "share of the appends that are quicker", 'text-anchor="middle"'),
        text(-middle[1], 16, "time to append", 'text-anchor="middle" transform="rotate(-90)"'),
        curve(plain, orange),
        curve(ours, blue),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="How fast daemon_db is, beside a plain recipe with sqlite3 alone.")
    parser.add_argument("--quick", action="store_true", help="a minute instead of five, at most 100,000 events")
    parser.add_argument("--json", action="store_true", help="write JSON, in seconds and bytes, instead of the tables")
    parser.add_argument("--svg", nargs="?", const=CHART, metavar="PATH", help="also draw the appends of 8 threads")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="daemon_db-") as folder:
            rows, latencies = measure_all(folder, arguments.quick)
    except KeyboardInterrupt:
        return 130
    finally:
        progress.write("")
    versions = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    if arguments.json:
        print(json.dumps(versions | {"quick": arguments.quick, "rows": [as_json(row) for row in rows]}, indent=2))
    else:
        print(f"Python {versions['python']}, SQLite {versions['sqlite']}. Median (quartiles)")
        for _, group in itertools.groupby(rows, lambda row: row.beside):
            print(f"\n{table(list(group))}")
        print(f"\n{readme_table(rows)}")
    if arguments.svg:
        Path(arguments.svg).write_text(chart(*latencies), encoding="utf-8")
    return 1 if any(row.verdict == "MISSED" for row in rows) else 0


def measure_all(folder: str, quick: bool) -> tuple[list[Row], tuple[list[float], list[float]]]:
    seconds, rounds = (2, 3) if quick else (12, 7)
    sizes = [1_000, 100_000] if quick else [1_000, 1_000_000]
    latencies: tuple[list[float], list[float]] = [], []
    steps = [
        functools.partial(open_current, folder, seconds),
        functools.partial(open_fresh, folder, seconds),
        functools.partial(new_thread, folder, seconds),
        functools.partial(transaction, folder, seconds),
        functools.partial(select, folder, seconds),
        functools.partial(eight_threads, folder, min(seconds, 3), rounds, latencies),
        functools.partial(overlapping_readers, folder, 6 if quick else 60),
        functools.partial(with_fsync, folder, seconds),
        functools.partial(growth, folder, seconds, sizes),
    ]
    rows: list[Row] = []
    progress.steps = len(steps)
    for progress.step, step in enumerate(steps, start=1):
        rows.extend(step())
    return rows, latencies


if __name__ == "__main__":
    sys.exit(main())
