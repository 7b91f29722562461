"""Files that are damaged or no database at all: an error or a working database, and what isn't ours stays as it is."""

import faulthandler
import multiprocessing
import random
import shutil
import signal
import sqlite3
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from daemon_db import DB, OpenError, SchemaError, _schema, errors
from support import FIRST, LIMIT, append_event, end, insert_run, insert_unit, make_rollback, open_files, rounds, start

SEEDS = range(rounds(100, 1000))
"""Of random damages, one each. To run a failing one again, put it here alone."""

PAGE = 4096
MAGIC = b"SQLite format 3\0"
OUTCOMES = {"works", "fails in use", "refused"}
Files = dict[str, bytes]  # by what their names end in: "" for the database, "-wal", "-journal"

MAKE = """
import os, signal, sqlite3, sys
from daemon_db import DB, _schema
from support import insert, spare
for name in "closed", "killed":
    if name == "closed":
        conn = sqlite3.connect(f"{sys.argv[1]}/{name}.db")
        conn.executescript(_schema.SQL.replace("  ", " "))
        conn.close()
    db = DB.open(f"{sys.argv[1]}/{name}.db")
    db.conn.execute("PRAGMA wal_autocheckpoint=0")
    db.conn.execute("PRAGMA synchronous=OFF")
    for run in range(12):
        with db.transaction() as conn:
            insert(conn, "runs", id=run, feature_branch=run, repo_path="/repo", parallelism=4, status="new")
            insert(conn, "units", id=run, run_id=run, unit_id="unit", status="ready")
    for sequence in range(1, 81):
        if sequence == 41:
            db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        payload = "x" * (10_000 if sequence % 20 == 0 else 100)
        insert(db.conn, "events", run_id="1", sequence=sequence, event_type="step", **{spare("events"): payload})
    if name == "closed":
        db.close()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """One that was closed, its schema in other spaces. One of a killed process: events 41 to 80 are in its WAL."""
    directory = tmp_path_factory.mktemp("good")
    child = start(MAKE, directory)
    assert (*end(child), child.returncode) == ("", "", -signal.SIGKILL)
    return {name: contents(directory / f"{name}.db") for name in ("closed", "killed")}


@pytest.fixture(scope="module")
def wal_without_page_1(good: dict[str, Files]) -> bytes:
    """A WAL's first commits, in which page 1 isn't: it changes when a commit takes new pages."""
    wal = good["killed"]["-wal"]
    starts = range(32, len(wal), 24 + PAGE)
    first = next(start for start in starts if wal[start : start + 4] == b"\0\0\0\1")
    frames = [start for start in starts if start < first]
    # A commit's last frame has the database's size.
    last = max(start for start in frames if wal[start + 4 : start + 8] != bytes(4))
    return wal[: last + 24 + PAGE]


def contents(path: Path) -> Files:
    """The file and what is beside it, but for the WAL index, which SQLite rebuilds, and for empty files."""
    found = {suffix: Path(f"{path}{suffix}") for suffix in ("", "-wal", "-journal")}
    return {suffix: file.read_bytes() for suffix, file in found.items() if file.exists() and file.stat().st_size}


def write(path: Path, files: Files) -> Path:
    for suffix, data in files.items():
        Path(f"{path}{suffix}").write_bytes(data)
    return path


def use(db: DB) -> None:
    for table in _schema.tables():
        db.conn.execute(f"SELECT * FROM {table}").fetchall()
    with db.transaction() as conn:
        insert_run(conn, "run-new")
        insert_unit(conn, "run-new")
        append_event(conn, "run-new")


def attempt(path: Path) -> str:
    """What comes of opening and using the file. An exception that `DB` shouldn't raise goes on."""
    before = contents(path)
    try:
        db = DB.open(path)
    except (OpenError, SchemaError) as error:
        if isinstance(error, SchemaError) or getattr(error, "sqlite_errorname", "") == "SQLITE_NOTADB":
            assert contents(path) == before, f"changed, and refused: {error}"
        outcome = "refused"
    else:
        with db:
            try:
                use(db)
                outcome = "works"
            except sqlite3.Error:
                outcome = "fails in use"
    left = [name for name in open_files() if name.startswith(str(path))]
    assert not left, f"{outcome}, and left open: {left}"
    return outcome


# No database at all


NO_DATABASES = {
    "text": b"This is a text, and not a short one.\n" * 300,
    "a line of text": b"hello\n",
    "random bytes": random.Random(1).randbytes(3 * PAGE),
    "zeros": bytes(2 * PAGE),
    "the first words of a database": MAGIC,
    "the first words and random bytes": MAGIC + random.Random(2).randbytes(3 * PAGE),
    "the first words and zeros": MAGIC + bytes(2 * PAGE),
    "SQLite 2": b"** This file contains an SQLite 2.1 database **\0" + bytes(PAGE),
}

COMPANIONS = ("nothing", "a garbage WAL", "a WAL", "a garbage journal")


@pytest.mark.parametrize("companion", COMPANIONS)
@pytest.mark.parametrize("data", NO_DATABASES.values(), ids=NO_DATABASES)
def test_what_is_no_database_is_refused_untouched(
    tmp_path: Path, wal_without_page_1: bytes, data: bytes, companion: str
) -> None:
    """But for the journal: SQLite plays one back, and deletes it, before it looks at the file."""
    beside: Files = {
        "nothing": {},
        "a garbage WAL": {"-wal": random.Random(3).randbytes(3 * PAGE)},
        "a WAL": {"-wal": wal_without_page_1},
        "a garbage journal": {"-journal": random.Random(4).randbytes(3 * PAGE)},
    }[companion]
    path = write(tmp_path / "notes.txt", {"": data} | beside)
    with pytest.raises(OpenError) as caught:
        DB.open(path)
    assert caught.value.sqlite_errorcode == sqlite3.SQLITE_NOTADB
    deleted = beside if companion == "a garbage journal" else {}
    assert contents(path) | deleted == {"": data} | beside


def test_a_header_and_garbage_is_refused_untouched(tmp_path: Path, good: dict[str, Files]) -> None:
    data = good["closed"][""]
    path = write(tmp_path / "daemon.db", {"": data[:100] + random.Random(5).randbytes(len(data) - 100)})
    before = contents(path)
    with pytest.raises(OpenError) as caught:
        DB.open(path)
    assert caught.value.sqlite_errorcode == sqlite3.SQLITE_CORRUPT
    assert contents(path) == before


@pytest.mark.parametrize("beside", [{}, {"-wal": b""}, {"-journal": b"x" * 9000}], ids=["alone", "wal", "journal"])
def test_a_zero_length_file_is_a_new_database(tmp_path: Path, beside: Files) -> None:
    with DB.open(write(tmp_path / "daemon.db", {"": b""} | beside)) as db:
        use(db)
        assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (1,)


# Damaged in one known way


@pytest.mark.parametrize("size", [15, 16, 50, 99, 100, 511, 512, 1000, PAGE - 1, PAGE, PAGE + 1, 10 * PAGE, -PAGE])
def test_a_file_with_pages_missing_is_refused_untouched(tmp_path: Path, good: dict[str, Files], size: int) -> None:
    path = write(tmp_path / "daemon.db", {"": good["closed"][""][:size]})
    before = contents(path)
    with pytest.raises(OpenError) as caught:
        DB.open(path)
    assert caught.value.sqlite_errorcode in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    assert contents(path) == before


@pytest.mark.parametrize("suffixes", ["-wal", "-shm", "-journal", "-wal -journal"])
@pytest.mark.parametrize("garbage", [b"x", random.Random(6).randbytes(9000), bytes(9000)], ids=["x", "any", "zeros"])
def test_garbage_beside_a_good_file_is_ignored(
    tmp_path: Path, good: dict[str, Files], suffixes: str, garbage: bytes
) -> None:
    with DB.open(write(tmp_path / "daemon.db", good["closed"] | dict.fromkeys(suffixes.split(), garbage))) as db:
        assert db.conn.execute("SELECT count(*), max(sequence) FROM events").fetchone() == (80, 80)
        use(db)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("how", ["cut", "flip"])
def test_a_damaged_wal_loses_its_last_commits_and_nothing_else(
    tmp_path: Path, good: dict[str, Files], how: str, fraction: float
) -> None:
    wal = bytearray(good["killed"]["-wal"])
    position = int(len(wal) * fraction)
    if how == "cut":
        del wal[position:]
    else:
        wal[position] ^= 1
    with DB.open(write(tmp_path / "daemon.db", good["killed"] | {"-wal": bytes(wal)})) as db:
        kept = [sequence for (sequence,) in db.conn.execute("SELECT sequence FROM events ORDER BY id")]
        assert kept == list(range(1, len(kept) + 1))
        assert 40 <= len(kept) < 80
        assert len(kept) > 40 or fraction < 0.1
        assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        use(db)


# What a damaged byte can make of a value in `sqlite_master`. Text becomes a blob, for one, by a single bit.
VALUES = {
    "NULL": "NULL",
    "a blob": "CAST({0} AS BLOB)",
    "a number": "7",
    "empty": "''",
    "a zero byte": "{0} || char(0) || 'x'",
    "not UTF-8": "{0} || CAST(x'ff' AS TEXT)",
    "not UTF-8 where SQL is malformed": "replace({0}, ' ', ') ' || CAST(x'ff' AS TEXT))",
    "another's": "(SELECT {0} FROM sqlite_master WHERE name = 'sqlite_autoindex_events_1')",
}


EXPECTED = {
    # In the order of VALUES. Not every change is one: "runs", for one, has no spaces to replace.
    ("runs", "type"): "damaged works damaged damaged schema damaged works damaged",
    ("runs", "name"): "damaged works damaged damaged refused damaged works damaged",
    ("runs", "tbl_name"): "damaged works damaged damaged works damaged works damaged",
    ("runs", "rootpage"): "damaged works use damaged works damaged works use",
    ("runs", "sql"): "damaged works damaged damaged works damaged unread damaged",
    ("idx_units_status", "type"): "damaged works damaged damaged schema damaged works works",
    ("idx_units_status", "name"): "damaged works damaged damaged refused damaged works damaged",
    ("idx_units_status", "tbl_name"): "damaged works damaged damaged schema damaged works damaged",
    ("idx_units_status", "rootpage"): "damaged works damaged damaged works damaged works works",
    ("idx_units_status", "sql"): "damaged works damaged damaged works damaged unread damaged",
    # SQLite looks at the name and the root page of an index that belongs to a constraint, and at nothing else.
    ("sqlite_autoindex_runs_1", "type"): "works works works works works works works works",
    ("sqlite_autoindex_runs_1", "name"): "damaged works damaged damaged works damaged works damaged",
    ("sqlite_autoindex_runs_1", "tbl_name"): "works works works works works works works works",
    ("sqlite_autoindex_runs_1", "rootpage"): "damaged works works damaged works damaged works use",
    ("sqlite_autoindex_runs_1", "sql"): "works works damaged works works works works works",
}


@pytest.fixture(scope="module")
def rollback(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An empty database."""
    path = tmp_path_factory.mktemp("rollback") / "daemon.db"
    make_rollback(path, runs=0, script=FIRST)
    return path.read_bytes()


@pytest.mark.usefixtures("first_schema")
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("name", "column"), EXPECTED)
def test_a_damaged_catalogue(rollback: bytes, tmp_path: Path, name: str, column: str, value: str) -> None:
    """What SQLite makes of it, and where that is nothing, the comparison; and what isn't damage works."""
    path = write(tmp_path / "daemon.db", {"": rollback})
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.executescript("PRAGMA synchronous=OFF; PRAGMA writable_schema=ON;")
        conn.execute(f"UPDATE sqlite_master SET {column} = {VALUES[value].format(column)} WHERE name = ?", (name,))
    before = contents(path)
    expected = dict(zip(VALUES, EXPECTED[name, column].split(), strict=True))[value]
    if expected in ("works", "use"):
        with DB.open(path) as db:
            if expected == "works":
                use(db)
            else:
                with pytest.raises(sqlite3.DatabaseError):
                    use(db)
    else:
        with pytest.raises(SchemaError if expected == "schema" else OpenError) as caught:
            DB.open(path)
        if expected == "damaged":
            assert caught.value.reason.startswith(errors.DAMAGED.format("").partition("(")[0])
        if expected == "unread":
            assert name in caught.value.reason.split("README")[0]
            assert not caught.value.reason.startswith(errors.DAMAGED.format("").partition("(")[0])
        if expected != "refused":  # that one is found out when the table is created, in WAL mode
            assert contents(path) == before
    assert not [file for file in open_files() if file.startswith(str(path))]


# Damaged at random


def flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 4, 32))):
        data[somewhere(rng, data)] ^= 1 << rng.randrange(8)


def overwrite(rng: random.Random, data: bytearray) -> None:
    position, size = somewhere(rng, data), rng.choice((1, 2, 16, 512, PAGE))
    data[position : position + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))


def truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def extend(rng: random.Random, data: bytearray) -> None:
    data += rng.randbytes(rng.randrange(1, 3 * PAGE))


def swap_pages(rng: random.Random, data: bytearray) -> None:
    a, b = (PAGE * rng.randrange(len(data) // PAGE) for _ in range(2))
    data[a : a + PAGE], data[b : b + PAGE] = data[b : b + PAGE], data[a : a + PAGE]


def somewhere(rng: random.Random, data: bytearray) -> int:
    """In the header as likely as on the first page, where the schema is, or anywhere."""
    return rng.randrange(rng.choice((100, PAGE, len(data))))


DAMAGES: tuple[Callable[[random.Random, bytearray], None], ...] = (flip, flip, overwrite, truncate, extend, swap_pages)


def damaged(seed: int, good: dict[str, Files]) -> Files:
    rng = random.Random(seed)
    files = dict(good[rng.choice(("closed", "killed"))])
    for suffix in rng.sample(sorted(files), rng.randint(1, len(files))):
        data = bytearray(files[suffix])
        rng.choice(DAMAGES)(rng, data)
        files[suffix] = bytes(data)
    return files


def attempt_all(reports: Connection, directory: Path, good: dict[str, Files], seeds: Sequence[int]) -> None:
    """In a child process: report each seed before it is tried, and again with what came of it."""
    for seed in seeds:
        reports.send((seed, "crash or hang"))
        folder = directory / str(seed)
        folder.mkdir()
        faulthandler.dump_traceback_later(LIMIT / 2, exit=True)
        try:
            outcome = attempt(write(folder / "daemon.db", damaged(seed, good)))
        except BaseException:
            outcome = traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(folder)
        reports.send((seed, outcome))


def outcomes_of(seeds: Sequence[int], directory: Path, good: dict[str, Files]) -> dict[int, str]:
    """What comes of each seed in a child process. If it ends before its time, the last seed was the reason."""
    context = multiprocessing.get_context("spawn")
    reports, sender = context.Pipe(duplex=False)
    child = context.Process(target=attempt_all, args=(sender, directory, good, seeds))
    child.start()
    sender.close()
    outcomes: dict[int, str] = {}
    with reports, suppress(EOFError):
        while reports.poll(LIMIT):
            outcomes.update([reports.recv()])
    child.kill()
    child.join(LIMIT)
    return outcomes


def test_random_damage(tmp_path: Path, good: dict[str, Files]) -> None:
    with ThreadPoolExecutor() as pool:
        parts = pool.map(lambda seeds: outcomes_of(seeds, tmp_path, good), (SEEDS[::2], SEEDS[1::2]))
        outcomes = dict(item for part in parts for item in part.items())
    failures = [f"seed {seed}: {outcome}" for seed, outcome in outcomes.items() if outcome not in OUTCOMES]
    assert not failures, "\n".join(failures)
    assert outcomes.keys() == set(SEEDS)
    assert set(outcomes.values()) == OUTCOMES
