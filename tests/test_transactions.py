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
from support import LIMIT, append_event, end, in_thread, insert_run, no_sync, rounds, run, runs, start


@pytest.fixture
def db(tmp_path: Path) -> Iterator[DB]:
    with DB.open(tmp_path / "daemon.db", timeout=0.1, on_connect=no_sync) as db:
        yield db


def check_that_the_next_one_works(db: DB, *there: str) -> None:
    """In another thread, to which the turn must have been given back, and in this one; and that no more is `there`."""

    def insert(run_id: str) -> None:
        with db.transaction() as conn:
            insert_run(conn, run_id)

    in_thread(lambda: insert("next-1"))  # first: this one would get a turn that it has kept
    assert not db.conn.in_transaction
    insert("next-2")
    assert runs(db) == {"next-1", "next-2", *there}


def test_it_has_the_write_lock_from_its_beginning_and_commits_at_its_end(db: DB) -> None:
    with DB.open(db.path, timeout=0) as other:
        with db.transaction() as conn:
            assert conn is db.conn
            assert conn.in_transaction
            with pytest.raises(sqlite3.OperationalError, match="database is locked"):
                insert_run(other.conn)
            insert_run(conn)
        assert runs(other) == {"run-1"}


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_rolls_back_and_goes_on(error: BaseException, db: DB) -> None:
    with pytest.raises(type(error)) as raised, db.transaction() as conn:
        insert_run(conn)
        raise error
    assert raised.value is error
    assert [entry.name for entry in raised.traceback] == ["test_an_exception_rolls_back_and_goes_on"]
    assert not hasattr(error, "__notes__")
    check_that_the_next_one_works(db)


def insert_it_again(conn: sqlite3.Connection) -> None:
    insert_run(conn)


def make_commit_fail(conn: sqlite3.Connection) -> None:
    conn.execute("PRAGMA defer_foreign_keys=ON")
    append_event(conn, "no such run")


def bind(value: object) -> Callable[[sqlite3.Connection], object]:
    return lambda conn: conn.execute("SELECT ?", (value,))


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        pytest.param(insert_it_again, sqlite3.IntegrityError, id="of a statement"),
        pytest.param(make_commit_fail, sqlite3.IntegrityError, id="of COMMIT"),
        pytest.param(bind("branch-\udcff"), UnicodeEncodeError, id="a text that is no UTF-8"),
        pytest.param(bind(2**63), OverflowError, id="a number too great"),
        pytest.param(bind(-(2**63) - 1), OverflowError, id="a number too small"),
        pytest.param(lambda _: next(iter(())), StopIteration, id="StopIteration"),
    ],
)
def test_an_error_rolls_back(fail: Callable[[sqlite3.Connection], object], error: type[Exception], db: DB) -> None:
    with pytest.raises(error) as raised, db.transaction() as conn:
        insert_run(conn)
        fail(conn)
    assert not hasattr(raised.value, "__notes__")
    check_that_the_next_one_works(db)


def test_a_transaction_is_for_one_with_statement(db: DB) -> None:
    transaction = db.transaction()
    with transaction as conn:
        insert_run(conn)
        with pytest.raises((AttributeError, RuntimeError)), transaction:  # contextlib's own words differ by version
            pass
        assert conn.in_transaction
        insert_run(conn, "run-2")
    with pytest.raises((AttributeError, RuntimeError)), transaction:
        pass
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
    assert runs(db) == {"run-1"}


def test_an_exit_stack(db: DB) -> None:
    with contextlib.ExitStack() as stack:
        conn = stack.enter_context(db.transaction())
        insert_run(conn)
        assert conn.in_transaction
    assert runs(db) == {"run-1"}
    error = ValueError("wrong")
    with pytest.raises(ValueError, match="wrong") as raised, contextlib.ExitStack() as stack:
        insert_run(stack.enter_context(db.transaction()), "run-2")
        raise error
    assert raised.value is error
    assert runs(db) == {"run-1"}
    with contextlib.ExitStack() as stack:
        insert_run(stack.enter_context(db.transaction()), "run-3")
        later = stack.pop_all()
    assert db.conn.in_transaction
    later.close()
    check_that_the_next_one_works(db, "run-1", "run-3")


def stack(db: DB) -> object:
    stack = contextlib.ExitStack()
    insert_run(stack.enter_context(db.transaction()))
    return stack


def generator(db: DB, kept: object = None) -> object:
    def insert() -> Iterator[object]:
        with db.transaction() as conn:
            insert_run(conn)
            yield kept

    begun = insert()
    next(begun)
    return begun


def generator_in_a_cycle(db: DB) -> object:
    cycle: list[object] = []
    cycle.append(generator(db, cycle))
    return cycle


@pytest.mark.parametrize("begin", [stack, generator, generator_in_a_cycle])
def test_what_is_dropped_in_the_middle_rolls_back(begin: Callable[[DB], object], db: DB) -> None:
    """Without a word: what is raised while an object is freed would be ignored, with a message."""
    kept = begin(db)
    assert db.conn.in_transaction
    del kept
    gc.collect()
    check_that_the_next_one_works(db)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3 has no other transaction control")
def test_rolling_back_does_not_depend_on_sqlite3s_transaction_control(tmp_path: Path) -> None:
    def autocommit(conn: sqlite3.Connection) -> None:
        conn.autocommit = True  # in which conn.rollback() does nothing

    with DB.open(tmp_path / "daemon.db", on_connect=autocommit) as db:
        with pytest.raises(ValueError), db.transaction() as conn:
            insert_run(conn)
            raise ValueError
        check_that_the_next_one_works(db)


def script(conn: sqlite3.Connection) -> None:
    conn.executescript("SELECT 1")


def with_statement(conn: sqlite3.Connection) -> None:
    with conn:
        pass


Commit = Callable[[sqlite3.Connection], None]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("commit", [sqlite3.Connection.commit, script, with_statement])
def test_a_block_that_commits_is_told_so(commit: Commit, error: type[BaseException] | None, db: DB) -> None:
    """Also if it then ends by an exception: its rows are there, and who repeats it writes them twice."""
    with pytest.raises(error or sqlite3.OperationalError) as raised, db.transaction() as conn:
        insert_run(conn, "run-1")
        commit(conn)
        insert_run(conn, "run-2")  # committed at once
        if error:
            raise error
    (note,) = raised.value.__notes__
    assert "ended inside the block" in note
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


def interrupt_after(statement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Ctrl-C come when the statement is done: then Python lets it in."""

    def execute_and_interrupt(conn: sqlite3.Connection, sql: str, *parameters: object) -> sqlite3.Cursor:
        cursor = execute(conn, sql, *parameters)  # type: ignore[arg-type]
        if sql == statement:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)
        return cursor

    execute = sqlite3.Connection.execute
    monkeypatch.setattr(Connection, "execute", execute_and_interrupt)


@pytest.mark.parametrize("kept", ["dropped", "kept"])
def test_control_c_during_the_rollback_is_seen(kept: str, db: DB, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the later of the two errors, and the one that must not be lost."""
    transaction = db.transaction() if kept == "kept" else None
    with pytest.raises(KeyboardInterrupt) as raised, contextlib.ExitStack() as stack:
        insert_run(stack.enter_context(transaction or db.transaction()))
        interrupt_after("ROLLBACK", monkeypatch)
        raise ValueError("first")
    assert repr(raised.value.__context__) == repr(ValueError("first"))
    check_that_the_next_one_works(db)


def test_control_c_when_the_commit_is_made(db: DB, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the block committed, as it should: the exception says nothing of that."""
    with pytest.raises(KeyboardInterrupt) as raised, db.transaction() as conn:
        insert_run(conn)
        interrupt_after("COMMIT", monkeypatch)
    assert not hasattr(raised.value, "__notes__")
    check_that_the_next_one_works(db, "run-1")


def test_a_block_that_closes_the_db_commits_nothing(db: DB) -> None:
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"), db.transaction() as conn:
        insert_run(conn)
        db.close()
    with DB.open(db.path) as db:
        assert runs(db) == set()


@contextlib.contextmanager
def begun_by_hand(db: DB) -> Iterator[sqlite3.Connection]:
    db.conn.execute("BEGIN")
    yield db.conn
    db.conn.execute("COMMIT")


Block = Callable[[DB], contextlib.AbstractContextManager[sqlite3.Connection]]


@pytest.mark.parametrize("outer", [DB.transaction, DB.snapshot, begun_by_hand])
@pytest.mark.parametrize("inner", [DB.transaction, DB.snapshot])
def test_one_within_another_is_refused_at_once_and_leaves_that_one_alone(
    outer: Block, inner: Block, tmp_path: Path
) -> None:
    with DB.open(tmp_path / "daemon.db", timeout=LIMIT) as db:
        insert_run(db.conn)
        with outer(db) as conn:
            with pytest.raises(sqlite3.OperationalError, match="within a transaction"), inner(db):
                raise AssertionError
            assert conn.in_transaction
            assert runs(db) == {"run-1"}
            if outer is not DB.snapshot:
                insert_run(conn, "run-2")
        assert runs(db) == ({"run-1"} if outer is DB.snapshot else {"run-1", "run-2"})


def check_locked(db: DB, whom_it_waited_for: str) -> None:
    before = time.monotonic()
    with pytest.raises(sqlite3.OperationalError, match=r"^database is locked(\n|$)") as raised, db.transaction():
        raise AssertionError
    assert time.monotonic() - before >= 0.09
    assert (raised.value.sqlite_errorcode, raised.value.sqlite_errorname) == (sqlite3.SQLITE_BUSY, "SQLITE_BUSY")
    (note,) = raised.value.__notes__
    assert re.match(rf"{re.escape(db.path)}: waited \d+\.\d s for {whom_it_waited_for}\b", note)


def test_the_wait_for_another_thread_ends_after_timeout(db: DB) -> None:
    with ThreadPoolExecutor(1) as pool:
        with db.transaction() as conn:
            insert_run(conn)
            whom = rf".* another thread\b.*{threading.current_thread().name}"
            pool.submit(check_locked, db, whom).result(LIMIT)
        pool.submit(check_that_the_next_one_works, db, "run-1").result(LIMIT)


def test_the_wait_for_another_process_ends_after_timeout(db: DB) -> None:
    with contextlib.closing(sqlite3.connect(db.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        check_locked(db, "another connection")
    check_that_the_next_one_works(db)


@pytest.mark.parametrize("other_one", ["has committed", "writes"])
def test_no_wait_while_a_select_is_half_read(other_one: str, tmp_path: Path) -> None:
    with DB.open(tmp_path / "db", timeout=LIMIT) as db, DB.open(tmp_path / "db") as other:
        insert_run(other.conn, "run-1")
        insert_run(other.conn, "run-2")
        cursor = db.conn.execute("SELECT id FROM runs")
        cursor.fetchone()
        with other.transaction() if other_one == "writes" else contextlib.nullcontext():
            if other_one == "has committed":
                insert_run(other.conn, "run-3")
            with pytest.raises(sqlite3.OperationalError, match="^database is locked") as raised, db.transaction():
                raise AssertionError
        (note,) = raised.value.__notes__
        assert "SELECT that is half read" in note
        cursor.close()


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
    no_wait = "PRAGMA busy_timeout=0"
    with DB.open(tmp_path / "daemon.db", timeout=LIMIT, on_connect=lambda conn: conn.execute(no_wait)) as db:
        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(insert, number) for number in range(4)]:
                future.result(LIMIT)
        assert len(runs(db)) == 80


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
            assert runs(other) == {"run-1"}


INTERRUPTED = """
import os, random, signal, sys, threading
from support import LIMIT, append_event, insert_run, join, no_sync
from daemon_db import DB

path, rounds = sys.argv[1], int(sys.argv[2])
random = random.Random(1)

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
with DB.open(path, timeout=LIMIT, on_connect=no_sync) as db:
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
    run(INTERRUPTED, tmp_path / "daemon.db", rounds(1000, 100_000))


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
from support import LIMIT, append_event, end, insert_run, no_sync, start
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
with ThreadPoolExecutor(1) as pool, DB.open(path, timeout=0, on_connect=no_sync) as db:
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


def test_a_write_that_another_db_refuses_leaves_this_connection_as_it_is(db: DB, tmp_path: Path) -> None:
    """That something else is open for reading only explains nothing."""
    insert_run(db.conn)
    DB.open(tmp_path / "other").close()
    with (
        DB.open(db.path, read_only=True) as reader,
        contextlib.closing(sqlite3.connect(f"{(tmp_path / 'other').as_uri()}?mode=ro", uri=True)) as other,
    ):
        other.execute("SELECT * FROM runs").fetchall()
        conn = db.conn
        with pytest.raises(sqlite3.OperationalError, match="readonly") as raised, db.transaction():
            reader.conn.execute("DELETE FROM runs")
        assert not hasattr(raised.value, "__notes__")
        assert db.conn is conn


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
