"""`DB.transaction`: committed as a whole or not at all, and never left open.

`DAEMON_DB_LONG=1` in the environment makes it go on for longer (see `support`).
"""

import contextlib
import gc
import re
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daemon_db import DB, OpenError
from daemon_db._connection import Connection
from support import LIMIT, append_event, end, in_thread, insert_run, join, no_sync, rounds, run, start, wait_for


@pytest.fixture
def db(tmp_path: Path) -> Iterator[DB]:
    with DB.open(tmp_path / "daemon.db", timeout=0.1, on_connect=no_sync) as db:
        yield db


def runs(db: DB) -> list[str]:
    return [run_id for (run_id,) in db.conn.execute("SELECT id FROM runs ORDER BY id")]


def check_that_the_next_one_works(db: DB, *there: str) -> None:
    """In another thread, to which the turn must have been given back, and in this one; and that no more is `there`."""

    def insert(run_id: str) -> None:
        with db.transaction() as conn:
            insert_run(conn, run_id)

    in_thread(lambda: insert("next-1"))  # first: this one would get a turn that it has kept
    assert not db.conn.in_transaction
    insert("next-2")
    assert runs(db) == ["next-1", "next-2", *there]


def test_the_end_of_the_block_commits(db: DB) -> None:
    with db.transaction() as conn:
        assert conn is db.conn
        assert conn.in_transaction
        insert_run(conn)
    with DB.open(db.path) as other:
        assert runs(other) == ["run-1"]


def test_it_holds_the_write_lock_from_its_beginning(db: DB) -> None:
    with db.transaction(), DB.open(db.path, timeout=0) as other:
        with pytest.raises(sqlite3.OperationalError, match="database is locked"):
            insert_run(other.conn)


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_rolls_back_and_goes_on(error: BaseException, db: DB) -> None:
    with pytest.raises(type(error)) as raised, db.transaction() as conn:
        insert_run(conn)
        raise error
    assert raised.value is error
    assert [entry.name for entry in raised.traceback] == ["test_an_exception_rolls_back_and_goes_on"]
    check_that_the_next_one_works(db)


def test_a_stop_iteration_is_not_the_generators(db: DB) -> None:
    with pytest.raises(StopIteration), db.transaction() as conn:
        insert_run(conn)
        next(iter(()))
    check_that_the_next_one_works(db)


def test_a_transaction_is_for_one_with_statement(db: DB) -> None:
    transaction = db.transaction()
    with transaction as conn:
        insert_run(conn)
    with pytest.raises((AttributeError, RuntimeError)), transaction:  # contextlib's own words differ by version
        pass
    check_that_the_next_one_works(db, "run-1")


def test_a_transaction_used_again_inside_itself(db: DB) -> None:
    transaction = db.transaction()
    with transaction as conn:
        insert_run(conn)
        with pytest.raises((AttributeError, RuntimeError)), transaction:
            pass
        assert conn.in_transaction
        insert_run(conn, "run-2")
    check_that_the_next_one_works(db, "run-1", "run-2")


def test_a_transaction_that_is_not_entered_is_nothing(db: DB) -> None:
    """Also if the `DB` is closed between."""
    db.transaction()
    kept = db.transaction()
    check_that_the_next_one_works(db)
    db.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"), kept:
        pass


def test_a_transaction_is_the_threads_that_enters_it(db: DB) -> None:
    transaction = db.transaction()

    def use() -> None:
        with transaction as conn:
            assert conn is db.conn
            insert_run(conn)

    in_thread(use)
    assert runs(db) == ["run-1"]


def test_an_exit_stack(db: DB) -> None:
    with contextlib.ExitStack() as stack:
        conn = stack.enter_context(db.transaction())
        insert_run(conn)
        assert conn.in_transaction
    assert runs(db) == ["run-1"]
    error = ValueError("wrong")
    with pytest.raises(ValueError, match="wrong") as raised, contextlib.ExitStack() as stack:
        insert_run(stack.enter_context(db.transaction()), "run-2")
        raise error
    assert raised.value is error
    assert runs(db) == ["run-1"]
    with contextlib.ExitStack() as stack:
        insert_run(stack.enter_context(db.transaction()), "run-3")
        later = stack.pop_all()
    assert db.conn.in_transaction
    later.close()
    check_that_the_next_one_works(db, "run-1", "run-3")


def test_an_exit_stack_that_is_dropped_rolls_back(db: DB) -> None:
    stack = contextlib.ExitStack()
    insert_run(stack.enter_context(db.transaction()))
    assert db.conn.in_transaction
    del stack
    gc.collect()
    check_that_the_next_one_works(db)


def test_enter_and_exit_by_hand(db: DB) -> None:
    transaction = db.transaction()
    insert_run(transaction.__enter__())
    transaction.__exit__(None, None, None)
    check_that_the_next_one_works(db, "run-1")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3 has no other transaction control")
def test_rolling_back_does_not_depend_on_sqlite3s_transaction_control(tmp_path: Path) -> None:
    def autocommit(conn: sqlite3.Connection) -> None:
        conn.autocommit = True  # in which conn.rollback() does nothing

    with DB.open(tmp_path / "daemon.db", on_connect=autocommit) as db:
        with pytest.raises(ValueError), db.transaction() as conn:
            insert_run(conn)
            raise ValueError
        check_that_the_next_one_works(db)


def test_an_error_of_a_statement_rolls_back(db: DB) -> None:
    with pytest.raises(sqlite3.IntegrityError), db.transaction() as conn:
        insert_run(conn)
        insert_run(conn)
    check_that_the_next_one_works(db)


def test_an_error_of_commit_rolls_back(db: DB) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"), db.transaction() as conn:
        insert_run(conn)
        conn.execute("PRAGMA defer_foreign_keys=ON")
        append_event(conn, "no such run")
    check_that_the_next_one_works(db)


def commit_by_a_script(conn: sqlite3.Connection) -> None:
    conn.executescript("SELECT 1")


def commit_by_a_with_statement(conn: sqlite3.Connection) -> None:
    with conn:
        pass


Commit = Callable[[sqlite3.Connection], None]
COMMITS: list[Commit] = [sqlite3.Connection.commit, commit_by_a_script, commit_by_a_with_statement]


@pytest.mark.parametrize("commit", COMMITS)
def test_a_block_that_commits(commit: Commit, db: DB) -> None:
    """What it then writes is committed at once, and the end of the block says that there is nothing to commit."""
    with pytest.raises(sqlite3.OperationalError, match="no transaction is active"), db.transaction() as conn:
        insert_run(conn, "run-1")
        commit(conn)
        insert_run(conn, "run-2")
    assert runs(db) == ["run-1", "run-2"]
    check_that_the_next_one_works(db, "run-1", "run-2")


def test_sqlite_rolling_back_by_itself_is_no_commit(db: DB) -> None:
    with pytest.raises(sqlite3.OperationalError, match="no transaction is active"), db.transaction() as conn:
        insert_run(conn)
        with pytest.raises(sqlite3.IntegrityError):
            conn.execute("INSERT OR ROLLBACK INTO runs SELECT * FROM runs")
        assert not conn.in_transaction
    check_that_the_next_one_works(db)


@pytest.mark.parametrize("error", [ValueError("first"), KeyboardInterrupt("first"), SystemExit("first")])
def test_when_rollback_fails_too_the_first_error_is_seen_and_the_connection_is_replaced(
    error: BaseException, db: DB
) -> None:
    def deny(action: int, argument: str | None, *_: object) -> int:
        denied = action == sqlite3.SQLITE_TRANSACTION and argument == "ROLLBACK"
        return sqlite3.SQLITE_DENY if denied else sqlite3.SQLITE_OK

    with pytest.raises(type(error), match="first") as raised, db.transaction() as conn:
        insert_run(conn)
        conn.set_authorizer(deny)
        raise error
    assert raised.value is error
    assert "not authorized" in raised.value.__notes__[0]
    assert db.conn is not conn
    check_that_the_next_one_works(db)


@pytest.mark.parametrize("kept", ["dropped", "kept"])
def test_control_c_during_the_rollback_is_seen(kept: str, db: DB, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the later of the two errors, and the one that must not be lost. Python lets it in when ROLLBACK is done."""

    def execute_and_interrupt(conn: sqlite3.Connection, sql: str, *parameters: object) -> sqlite3.Cursor:
        cursor = execute(conn, sql, *parameters)  # type: ignore[arg-type]
        if sql == "ROLLBACK":
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)
        return cursor

    execute = sqlite3.Connection.execute
    transaction = db.transaction() if kept == "kept" else None
    with pytest.raises(KeyboardInterrupt) as raised, contextlib.ExitStack() as stack:
        insert_run(stack.enter_context(transaction or db.transaction()))
        monkeypatch.setattr(Connection, "execute", execute_and_interrupt)
        raise ValueError("first")
    assert repr(raised.value.__context__) == repr(ValueError("first"))
    check_that_the_next_one_works(db)


def test_a_block_that_closes_the_db_commits_nothing(db: DB) -> None:
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"), db.transaction() as conn:
        insert_run(conn)
        db.close()
    with DB.open(db.path) as db:
        assert runs(db) == []


def test_a_generator_dropped_in_the_middle_rolls_back(db: DB) -> None:
    def insert() -> Iterator[None]:
        with db.transaction() as conn:
            insert_run(conn)
            yield

    generator = insert()
    next(generator)
    assert db.conn.in_transaction
    del generator
    gc.collect()
    check_that_the_next_one_works(db)


def test_a_generator_in_a_reference_cycle_rolls_back(db: DB) -> None:
    """Without a word: what the collector raises in there would be ignored, with a message."""

    def insert(kept: list[Iterator[None]]) -> Iterator[None]:
        with db.transaction() as conn:
            insert_run(conn)
            yield
        assert kept

    kept: list[Iterator[None]] = []
    kept.append(insert(kept))
    next(kept[0])
    assert db.conn.in_transaction
    del kept
    gc.collect()
    check_that_the_next_one_works(db)


def suspended_in_a_thread(db: DB, ended: threading.Event) -> tuple[threading.Thread, Iterator[None]]:
    """A generator inside a transaction, of a thread that has not ended before the event."""

    def insert() -> Iterator[None]:
        with db.transaction() as conn:
            insert_run(conn, "never")
            yield

    def work() -> None:
        next(generator)
        suspended.set()
        wait_for(ended)

    generator = insert()
    suspended = threading.Event()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    wait_for(suspended)
    return thread, generator


def test_a_thread_that_ends_inside_a_generators_transaction_gives_its_turn_back(db: DB) -> None:
    ended = threading.Event()
    thread, generator = suspended_in_a_thread(db, ended)
    with pytest.raises(sqlite3.OperationalError, match="database is locked"), db.transaction():
        pass
    ended.set()
    join(thread)
    check_that_the_next_one_works(db)
    # Its end comes too late to undo anything, whoever has the turn then.
    with db.transaction() as conn:
        insert_run(conn, "run-1")
        generator.close()  # type: ignore[attr-defined]
        assert conn.in_transaction
        assert not in_thread(lambda: db._state.turn.acquire(blocking=False))
        with pytest.raises(sqlite3.OperationalError, match="database is locked"):
            in_thread(lambda: db.transaction().__enter__())
    assert runs(db) == ["next-1", "next-2", "run-1"]


def test_threads_with_the_ident_of_one_that_ended_in_a_generator_wait_for_their_turn(db: DB) -> None:
    """CPython gives the ident of a thread that has ended to the next one."""
    generators = []
    for _ in range(5):
        ended = threading.Event()
        thread, generator = suspended_in_a_thread(db, ended)
        generators.append(generator)
        ended.set()
        join(thread)
    with db.transaction():
        for _ in range(2):
            with pytest.raises(sqlite3.OperationalError, match="database is locked"):
                in_thread(lambda: db.transaction().__enter__())
    check_that_the_next_one_works(db)


@pytest.mark.parametrize("then", ["asks", "ends"])
def test_a_generator_closed_by_another_thread_is_rolled_back_by_its_own(then: str, db: DB) -> None:
    """When that next asks for its connection, or ends."""
    generators = []

    def insert() -> Iterator[None]:
        with db.transaction() as conn:
            insert_run(conn, "never")
            yield

    def suspend() -> None:
        generators.append(insert())
        next(generators[0])

    with ThreadPoolExecutor(1) as pool:
        pool.submit(suspend).result(LIMIT)
        generators.pop().close()  # type: ignore[attr-defined]
        with pytest.raises(sqlite3.OperationalError, match="database is locked"), db.transaction():
            pass
        if then == "asks":
            assert not pool.submit(lambda: db.conn.in_transaction).result(LIMIT)
            check_that_the_next_one_works(db)
    if then == "ends":
        check_that_the_next_one_works(db)
    assert "never" not in runs(db)


def test_one_within_another_is_refused_at_once_and_leaves_that_one_alone(db: DB) -> None:
    with db.transaction() as conn:
        insert_run(conn)
        with pytest.raises(sqlite3.OperationalError, match="cannot start a transaction within a transaction"):
            with db.transaction():
                pass
        insert_run(conn, "run-2")
    check_that_the_next_one_works(db, "run-1", "run-2")


def test_one_within_a_begin_by_hand_is_refused_and_leaves_that_alone(db: DB) -> None:
    db.conn.execute("BEGIN")
    insert_run(db.conn)
    with pytest.raises(sqlite3.OperationalError, match="cannot start a transaction within a transaction"):
        with db.transaction():
            pass
    db.conn.execute("COMMIT")
    assert runs(db) == ["run-1"]


def check_locked(db: DB) -> None:
    before = time.monotonic()
    with pytest.raises(sqlite3.OperationalError, match=r"^database is locked(\n|$)") as raised, db.transaction():
        pass
    assert time.monotonic() - before >= 0.09
    assert raised.value.sqlite_errorcode == sqlite3.SQLITE_BUSY
    assert raised.value.sqlite_errorname == "SQLITE_BUSY"


def test_the_wait_for_another_thread_ends_after_timeout(db: DB) -> None:
    with ThreadPoolExecutor(1) as pool:
        with db.transaction():
            pool.submit(check_locked, db).result(LIMIT)
        pool.submit(check_that_the_next_one_works, db).result(LIMIT)


def test_the_wait_for_another_process_ends_after_timeout(db: DB) -> None:
    other = sqlite3.connect(db.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    check_locked(db)
    other.execute("COMMIT")
    other.close()
    check_that_the_next_one_works(db)


def test_threads_wait_for_their_turn_and_not_for_sqlites_lock(tmp_path: Path) -> None:
    """Which here nobody waits for: without turns, one of two that begin at once would be an error."""

    def insert(number: int) -> None:
        _ = db.conn
        for each in range(20):
            barrier.wait(LIMIT)
            try:
                with db.transaction() as conn:
                    insert_run(conn, f"run-{number}-{each}")
                    time.sleep(0.001)
            except sqlite3.Error:
                barrier.abort()
                raise

    barrier = threading.Barrier(4)
    with DB.open(
        tmp_path / "daemon.db", timeout=LIMIT, on_connect=lambda conn: conn.execute("PRAGMA busy_timeout=0")
    ) as db:
        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(insert, number) for number in range(4)]:
                future.result(LIMIT)
        assert len(runs(db)) == 80


def test_who_waits_for_the_turn_sees_what_was_committed(db: DB) -> None:
    with db.transaction() as conn:
        insert_run(conn)
        with pytest.raises(sqlite3.OperationalError, match=r"^database is locked(\n|$)"):
            in_thread(db.transaction().__enter__)
    assert in_thread(lambda: runs(db)) == ["run-1"]


def test_no_clock_is_asked_that_tests_stop(db: DB, monkeypatch: pytest.MonkeyPatch) -> None:
    """As freezegun does. What waits by such a clock would wait for ever."""

    def stopped() -> float:
        raise AssertionError

    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, stopped)
    select = "SELECT name FROM sqlite_master WHERE type = 'index' AND sql NOT NULL LIMIT 1"
    with DB.open(db.path, timeout=0.05) as other:
        db.conn.execute("DROP INDEX " + db.conn.execute(select).fetchone()[0])
        with db.transaction() as conn:
            insert_run(conn)
            with pytest.raises(sqlite3.OperationalError, match="database is locked"), other.transaction():
                pass
            with pytest.raises(OpenError, match="locked for more than"):  # which would add the index
                DB.open(db.path, timeout=0.05)
        with other.snapshot():
            assert runs(other) == ["run-1"]


INTERRUPTED = """
import os, random, signal, sys, threading
from support import LIMIT, append_event, insert_run, join
from daemon_db import DB

path, rounds, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random = random.Random(seed)

def interrupt(*_):
    raise KeyboardInterrupt

def work():
    while not stop.is_set():
        with db.transaction() as conn:
            append_event(conn)
        stop.wait(0.0005)

def append_until_interrupted():
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00001, 0.0004))
    while True:
        with db.transaction() as conn:
            append_event(conn)

signal.signal(signal.SIGALRM, interrupt)
stop = threading.Event()
with DB.open(path, timeout=LIMIT, on_connect=lambda conn: conn.execute("PRAGMA synchronous=OFF")) as db:
    insert_run(db.conn)
    other = threading.Thread(target=work, daemon=True)
    other.start()
    for number in range(rounds):
        try:
            append_until_interrupted()
        except KeyboardInterrupt:
            pass
        assert not db.conn.in_transaction, number
        with db.transaction():  # would wait for the other thread in vain, if that waited for this one
            pass
    stop.set()
    join(other)
    sequences = [sequence for (sequence,) in db.conn.execute("SELECT sequence FROM events ORDER BY sequence")]
    assert sequences == list(range(1, len(sequences) + 1))
"""


def test_a_signal_at_any_moment_leaves_no_transaction_open(tmp_path: Path) -> None:
    run(INTERRUPTED, tmp_path / "daemon.db", rounds(1000, 100_000), 1)


SENDER = """
import os, sys, time

process, signals, gap = int(sys.argv[1]), sys.argv[3].split(","), float(sys.argv[4])
done = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)

def spin(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass

while line := sys.stdin.readline():
    spin(float(line))
    for number in signals:
        os.kill(process, int(number))
        spin(gap)
    os.write(done, b"x")
"""
BURSTS = f"""
import os, random, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from support import LIMIT, append_event, end, insert_run, start
from daemon_db import DB

path, rounds, count, gap = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
random = random.Random(1)
# Each another signal: of one that is pending already the kernel would forget the second.
signals = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGHUP, signal.SIGXCPU][:count]
came, is_armed, number = [], False, 0

class Interrupt(BaseException):
    pass

def interrupt(*_):
    came.append(True)
    if is_armed:
        raise Interrupt  # not by a variable: this frame would keep the exception, and the exception this frame

def append():
    global is_armed
    is_armed = True
    while not came:
        with db.transaction() as conn:
            append_event(conn)

def until_all_have_come():
    global is_armed
    limit = time.monotonic() + LIMIT
    while os.stat(path + "-done").st_size <= number:
        assert time.monotonic() < limit
        time.sleep(0.0001)
    is_armed = False

def catch(each):
    try:
        if each:
            catch(each - 1)
        else:
            append()
        until_all_have_come()
    except Interrupt:
        pass

def is_turn_free():
    with db.transaction() as conn:
        append_event(conn)
    return True

for each in signals:
    signal.signal(each, interrupt)
open(path + "-done", "w").close()
sender = start({SENDER!r}, os.getpid(), path + "-done", ",".join(str(int(each)) for each in signals), gap)
with (
    ThreadPoolExecutor(1) as pool,
    DB.open(path, timeout=0, on_connect=lambda conn: conn.execute("PRAGMA synchronous=OFF")) as db,
):
    insert_run(db.conn)
    for number in range(rounds):
        came.clear()
        sender.stdin.write(f"{{random.uniform(0, 0.0003)}}\\n")
        sender.stdin.flush()
        catch(20)
        assert came and not is_armed, number
        if count == 1:
            assert pool.submit(is_turn_free).result(LIMIT), number  # at once: this thread may never come back
        assert not db.conn.in_transaction, number
        assert pool.submit(is_turn_free).result(LIMIT), number
    sequences = [sequence for (sequence,) in db.conn.execute("SELECT sequence FROM events ORDER BY sequence")]
    assert sequences == list(range(1, len(sequences) + 1))
assert end(sender) == ("", "") and sender.returncode == 0
"""


@pytest.mark.parametrize(("count", "gap"), [(1, 0), (2, 0.000015), (2, 0.000003), (3, 0), (5, 0)])
def test_signals_in_a_row_leave_no_transaction_open(count: int, gap: float, tmp_path: Path) -> None:
    """What the first has begun to undo, the next one interrupts. Nothing is open once their tracebacks are gone."""
    if count > 1 and sys.version_info < (3, 11, 7):
        pytest.skip("CPython 3.11.2 fails when a signal interrupts a handler, without daemon_db, too; 3.11.7 doesn't")
    process = start(BURSTS, tmp_path / "daemon.db", rounds(60, 20_000), count, gap)
    _, errors = end(process)  # among them what Python says of an exception that comes while it frees a generator
    assert process.returncode == 0, errors


def test_control_c_in_the_middle(tmp_path: Path) -> None:
    code = """
import signal, sys
from support import insert_run
from daemon_db import DB
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background processes don't have
with DB.open(sys.argv[1]) as db:
    try:
        with db.transaction() as conn:
            insert_run(conn)
            print("ready", flush=True)
            sys.stdin.read()
    except KeyboardInterrupt:
        with db.transaction() as conn:
            insert_run(conn, "after")
"""
    process = start(code, tmp_path / "daemon.db")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    output, errors = end(process)
    assert (process.returncode, output, errors) == (0, "", "")
    with DB.open(tmp_path / "daemon.db") as db:
        assert runs(db) == ["after"]


class TestNotes:
    """What is known beyond SQLite's own words."""

    def notes(self, db: DB) -> str:
        with pytest.raises(sqlite3.OperationalError, match=r"^database is locked(\n|$)") as caught, db.transaction():
            raise AssertionError
        (note,) = caught.value.__notes__
        assert note.startswith(f"{db.path}: ")
        return note.removeprefix(f"{db.path}: ")

    def test_another_thread(self, db: DB) -> None:
        with db.transaction():
            note = in_thread(lambda: self.notes(db))
        assert re.match(rf"waited 0\.1 s for .* another thread\b.*{threading.current_thread().name}", note)

    @pytest.mark.parametrize("timeout", [0, 0.1])
    def test_another_connection(self, timeout: float, tmp_path: Path) -> None:
        with DB.open(tmp_path / "db", timeout=timeout) as db, DB.open(tmp_path / "db") as other, other.transaction():
            note = self.notes(db)
        assert re.match(r"waited \d+\.\d s for another connection", note)

    @pytest.mark.parametrize("is_stale", [False, True])
    def test_a_select_that_is_half_read(self, is_stale: bool, tmp_path: Path) -> None:
        """SQLite doesn't wait then."""
        with DB.open(tmp_path / "db", timeout=600) as db, DB.open(tmp_path / "db") as other:
            insert_run(other.conn, "run-1")
            insert_run(other.conn, "run-2")
            cursor = db.conn.execute("SELECT id FROM runs")
            cursor.fetchone()
            with contextlib.nullcontext() if is_stale else other.transaction():
                if is_stale:
                    insert_run(other.conn, "run-3")
                assert "SELECT that is half read" in self.notes(db)
            cursor.close()

    @pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
    @pytest.mark.parametrize("commit", COMMITS)
    def test_a_block_that_commits(self, commit: Commit, error: type[BaseException] | None, db: DB) -> None:
        """Also if it then ends by an exception: its rows are there, and who repeats it writes them twice."""
        with pytest.raises(error or sqlite3.OperationalError) as caught, db.transaction() as conn:
            insert_run(conn)
            commit(conn)
            if error:
                raise error
        (note,) = caught.value.__notes__
        assert note.startswith(f"{db.path}: the transaction ended inside the block")
        assert runs(db) == ["run-1"]

    def test_a_block_whose_commit_was_interrupted_when_it_was_made(
        self, db: DB, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The end of the block committed, as it should: the exception says nothing of that."""

        def execute_and_interrupt(conn: sqlite3.Connection, sql: str) -> None:
            execute(conn, sql)
            if sql == "COMMIT":
                monkeypatch.undo()
                raise KeyboardInterrupt

        execute = sqlite3.Connection.execute
        with pytest.raises(KeyboardInterrupt) as caught, db.transaction() as conn:
            insert_run(conn)
            monkeypatch.setattr(Connection, "execute", execute_and_interrupt)
        assert not hasattr(caught.value, "__notes__")
        check_that_the_next_one_works(db, "run-1")

    @pytest.mark.parametrize("is_committed", [True, False])
    def test_a_block_that_ends_in_another_thread(self, is_committed: bool, db: DB) -> None:
        """As a `yield` dependency of a framework does. Its own thread rolls it back, when that next uses the `DB`."""
        block = db.transaction()
        error: Exception = ValueError("mine")

        def begin() -> str:
            insert_run(block.__enter__())
            return threading.current_thread().name

        with ThreadPoolExecutor(1) as pool:
            began = pool.submit(begin).result(LIMIT)
            if is_committed:
                with pytest.raises(sqlite3.ProgrammingError, match="that same thread") as caught:
                    block.__exit__(None, None, None)
                error = caught.value
            else:
                assert not block.__exit__(type(error), error, None)
            (note,) = error.__notes__
            ended = threading.current_thread().name
            assert re.match(rf"{re.escape(db.path)}: .* began in .*{began}\b.* ended in .*{ended}\b", note)
            assert pool.submit(runs, db).result(LIMIT) == []
            check_that_the_next_one_works(db)

    def test_a_write_where_there_is_none(self, db: DB) -> None:
        insert_run(db.conn)
        with DB.open(db.path, read_only=True) as reader:
            for block, words in (
                (db.snapshot(), "in a snapshot()"),
                (reader.transaction(), "opened with read_only"),
            ):
                with pytest.raises(sqlite3.OperationalError, match="attempt to write a readonly") as caught:
                    with block as conn:
                        conn.execute("DELETE FROM runs")
                (note,) = caught.value.__notes__
                assert note.startswith(f"{db.path}: ") and words in note
            conn = db.conn
            with pytest.raises(sqlite3.OperationalError, match="attempt to write a readonly") as caught:
                with db.transaction():
                    reader.conn.execute("DELETE FROM runs")
            assert not hasattr(caught.value, "__notes__")  # it says nothing of this connection, which stays
            assert db.conn is conn

    @pytest.mark.parametrize("error", [sqlite3.IntegrityError, ValueError, KeyboardInterrupt])
    def test_an_error_of_the_block_has_none(self, error: type[BaseException], db: DB) -> None:
        with pytest.raises(error) as caught, db.transaction() as conn:
            insert_run(conn)
            if error is sqlite3.IntegrityError:
                insert_run(conn)
            raise error
        assert not hasattr(caught.value, "__notes__")
        assert runs(db) == []


@pytest.mark.parametrize(
    ("value", "error"), [("branch-\udcff", UnicodeEncodeError), (2**63, OverflowError), (-(2**63) - 1, OverflowError)]
)
def test_a_value_that_sqlite_has_no_type_for(value: object, error: type[Exception], db: DB) -> None:
    """Python's own errors, and no `sqlite3.Error`: the block is rolled back all the same."""
    with pytest.raises(error), db.transaction() as conn:
        insert_run(conn)
        conn.execute("UPDATE runs SET feature_branch = ?", (value,))
    check_that_the_next_one_works(db)


COMMIT_WITHOUT_SPACE = """
import os, resource, sqlite3, sys
from daemon_db import DB
from support import insert_run

db = DB.open(sys.argv[1])
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
try:
    with db.transaction() as conn:
        for number in range(600):
            insert_run(conn, f"run-{number}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(f"{db.path}-wal") + 20_000, hard))
except sqlite3.OperationalError as error:
    print(error, getattr(error, "__notes__", None))
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
db.close()
"""


def test_a_commit_that_fails_for_lack_of_space_is_not_the_blocks_fault(tmp_path: Path) -> None:
    assert run(COMMIT_WITHOUT_SPACE, tmp_path / "db") == "disk I/O error None\n"
