"""`DB`: one database for all threads of a daemon. Each has a connection of its own; in writing they take turns."""

import contextlib
import logging
import os
import sqlite3
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Never, Self

from . import _file, _opening, errors
from ._connection import (
    CLOSED,
    READY,
    SPENT,
    Connection,
    State,
    close_this_threads,
    close_unused,
    this_threads_name,
    thread,
)
from ._guard import LOOK_EVERY
from ._wait import now
from ._wal import Checkpoints
from .errors import OpenError, is_busy, locked, primary_code, whom_it_waited_for

_log = logging.getLogger("daemon_db")

LONG = 0.001
"""Seconds of a block after which SQLite's lock is asked for before COMMIT. To ask each time would cost a tenth."""

_LONGEST_TIMEOUT = 2_147_483  # SQLite counts milliseconds in 32 bits: more would turn negative, and that means no wait


class DB:
    """An open database, as `DB.open` returns it. Threads share the `DB`, and each has a connection of its own::

        from daemon_db import DB

        with DB.open("daemon.db") as db:  # once, for all threads
            with db.transaction() as conn:  # one write transaction
                conn.execute("DELETE FROM runs WHERE status = ?", ("done",))
            for run_id, status in db.conn.execute("SELECT id, status FROM runs"):
                print(run_id, status)

    `path` is the file, absolute, or ":memory:". Leaving the `with` block closes the `DB`.
    """

    path: str

    def __init__(self, *_: Never, **__: Never) -> None:
        raise TypeError("DB.open(path) is what opens a database")

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        timeout: float = 5.0,
        on_connect: Callable[[sqlite3.Connection], object] | None = None,
        read_only: bool = False,
        create: bool = True,
    ) -> Self:
        """Create or open the database at `path`: in WAL mode, foreign keys enforced, the schema in place.

        `path` is a file name, made absolute at once, or ":memory:", a database in memory for this `DB`'s threads. Links
        in it are followed now, and not again.
        `timeout` is how many seconds each wait for a lock may last: this call's, a statement's, a transaction's.
        `on_connect(conn)` is called with each new connection, last, in the thread that gets it: for
        `conn.row_factory = sqlite3.Row`, `PRAGMA synchronous` and the like; not for using this `DB`. What it raises
        goes on to the caller, and the connection is closed. If it leaves autocommit mode, `sqlite3.ProgrammingError` is
        raised. If an SQL function or a row factory refers to `conn`, another thread's `close()` doesn't close the
        connection before its thread ends.
        `read_only=True` writes nothing to the database, and needs no permission to write the file. The file's schema
        must be complete. This is for looking at a daemon's database, or at what a dead daemon left.
        `create=False` creates no file, and fills no empty one: for a command that must not make a database of a
        mistyped path.

        A subclass gets its own type; its `__init__` isn't called.

        Raises `OpenError` if the file can't be opened, and `SchemaError` if it is a database but not one that fits,
        before the first write. Raises `OpenError` if SQLite refuses an addition to the schema, or if the rows that are
        there don't allow it: tables and rows are then as they were. Raises `TypeError` or `ValueError` for a wrong
        argument. A -wal that belongs to another file is renamed, and the logger "daemon_db" warns: SQLite would remove
        such a -wal, or write it over this file.

        https://sqlite.org/wal.html, https://sqlite.org/foreignkeys.html, https://sqlite.org/lang_altertable.html.
        """
        if not 0 <= timeout <= _LONGEST_TIMEOUT:
            raise ValueError(f"timeout must be from 0 to {_LONGEST_TIMEOUT} seconds, not {timeout!r}")
        db = cls.__new__(cls)
        db._open(State(_file.locate(path, read_only, create), float(timeout)), on_connect)
        return db

    def _open(self, state: State, on_connect: Callable[[sqlite3.Connection], object] | None) -> None:
        self.path = state.file.path
        self._state = state
        self._on_connect = on_connect
        self._checkpoints = Checkpoints(self.path)
        self._next_look = 0.0
        """When `transaction()` is to look whether all is still there; 0: each time."""
        self._long_after = 0.0
        """When the block that is running becomes a long one."""
        self._writer = ""
        """The thread that has the turn, or had it last."""
        self._finalizer = weakref.finalize(self, _drop, state)
        self._finalizer.atexit = False  # a function that was registered for the exit earlier may want to use the DB
        try:
            self._connect(_opening.open_first)
        except BaseException:
            DB.close(self)  # not self.close(): a subclass's `close` may need what its __init__ would have made
            raise

    @property
    def conn(self) -> sqlite3.Connection:
        """The calling thread's own connection: opened when it first asks, closed when it ends.

        It is in autocommit mode: outside of `transaction()` each statement commits by itself. Don't close it, and don't
        hand it to another thread.

        Raises `sqlite3.ProgrammingError` after `close()` and in a forked child (https://sqlite.org/howtocorrupt.html,
        2.6). A thread's first use raises what `open` raises, for instance if the file was removed or replaced.
        """
        state = self._state
        if not state.ended and state.pid == os.getpid():
            conn = thread.connections.get(state)
            if conn is not None and conn.stage is READY:
                return conn
        return self._connection()  # opens one, or says why not

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One write transaction: `with db.transaction() as conn:`, where `conn` is the calling thread's connection.

        Threads take turns, each waiting up to `timeout` seconds for its own; then `BEGIN IMMEDIATE` waits up to
        `timeout` for other processes. The end of the block commits. Any exception in the block rolls back, and is
        raised again. If an exception comes after COMMIT, a signal's for instance, the commit is made all the same.

        Raises `sqlite3.OperationalError`: "database is locked" after `timeout` (a note on the error says for whom it
        waited), and inside of another transaction "cannot start a transaction within a transaction". Raises what `conn`
        raises. Raises what COMMIT raises, and rolls back. Raises `sqlite3.ProgrammingError` if the block ends in
        another thread than the one that began it.

        Raises "database is locked" also if something in this process has dropped SQLite's write lock in the block
        (https://sqlite.org/howtocorrupt.html, 2.2), if the block took more than a millisecond, and the system is Linux.
        The rollback then waits for a program that is writing, and the thread gets a new connection: repeat the block.

        Raises `OpenError` if the file or its WAL was removed or replaced, at the latest 10 ms after that. Nobody else
        sees what is committed there: look after the restart what was. If it is the WAL, this `DB` has come to its end,
        for all threads.

        If a signal's exception strikes in the very instructions that begin or end the block, the rollback may wait
        until the exception's traceback is gone. Usually that is the end of the `except` clause.

        Where the WAL has more than 16 MB, it is checkpointed first or last, which may wait 0.2 seconds for readers.
        Where they don't end, the logger "daemon_db" warns (https://sqlite.org/wal.html#ckpt).
        https://sqlite.org/lang_transaction.html.
        """
        state = self._state
        conn = self._connection()
        if conn.in_transaction:
            conn.execute("BEGIN")  # SQLite refuses it, and the outer transaction can go on
        warning, is_in_block, threads_connections = None, False, thread.connections
        try:
            if not state.turn.acquire(True, state.timeout):  # by keyword, this takes three times as long
                raise locked(f"{self.path}: {errors.WAITED_FOR_TURN.format(state.timeout, self._writer)}")
            self._writer = conn.thread_name
            try:
                warning = self._begin(conn)
                is_in_block = True
                yield conn
                is_in_block = False
                warning = self._commit(conn) or warning
            except BaseException as error:
                pid, second = state.pid, None
                try:
                    pid = os.getpid()
                    if pid == state.pid and conn.has_lost_lock():
                        conn.take_lock_again()
                finally:  # a signal's exception may come after each call: so none stands before ROLLBACK in here
                    try:
                        if conn.in_transaction:
                            is_in_block = False
                            if pid == state.pid:  # in a forked child, it is the parent's
                                conn.execute("ROLLBACK")
                    except sqlite3.Error as failure:
                        second = failure
                self._explain(conn, error, second, has_ended_itself=is_in_block)
                raise
        finally:
            try:
                if threads_connections is thread.connections:  # else another thread ends this generator
                    state.turn.release()
            except RuntimeError:
                pass  # this thread doesn't have the turn: it did not get it, or conn.close() has given it back
        if warning:
            _log.warning(warning)  # after the turn was given back: a handler may be slow, or write to this database

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Reads as of one moment: `with db.snapshot() as conn:`, where `conn` is the calling thread's connection.

        All reads in the block see the database as it was when the block began, whatever others commit meanwhile. A
        write in the block is `sqlite3.OperationalError`, "attempt to write a readonly database". Writers are not held
        up; but the WAL can't be emptied until the block ends, so keep it short. (If a SELECT of this thread is half
        read when the block begins, the moment is that SELECT's.)

        Raises `sqlite3.OperationalError`, "cannot start a transaction within a transaction", inside of
        `transaction()` or of another snapshot, and "database is locked" if the file can't be read within `timeout`.
        Raises what `conn` raises, and `OpenError` if the file or its WAL was removed or replaced. Afterwards, also
        after an exception, the thread is in autocommit mode.

        https://sqlite.org/isolation.html, https://sqlite.org/pragma.html#pragma_query_only.
        """
        conn = self._connection()
        if conn.in_transaction:
            conn.execute("BEGIN")  # SQLite refuses it, and the outer transaction can go on
        cursor = sqlite3.Cursor(conn)
        cursor.row_factory = None  # the caller's may make anything of a row
        (query_only,) = cursor.execute("PRAGMA query_only").fetchone()
        put_back = f"PRAGMA query_only={query_only}"
        try:
            conn.execute("PRAGMA query_only=ON")
            conn.execute("BEGIN")
            _opening.read_first(conn)  # BEGIN alone fixes nothing
            self._state.look()  # what is read in a lost WAL is as old as the loss
            yield conn
        except sqlite3.OperationalError as error:
            if primary_code(error) == sqlite3.SQLITE_READONLY and not isinstance(error, OpenError):
                error.add_note(f"{self.path}: {errors.IN_SNAPSHOT}")
            raise
        finally:
            pid = self._state.pid
            try:
                pid = os.getpid()
            finally:  # as in transaction()
                try:
                    try:
                        if pid == self._state.pid and conn.in_transaction:
                            conn.execute("ROLLBACK")
                    finally:
                        if pid == self._state.pid:
                            conn.execute(put_back)
                except sqlite3.Error:  # another thread has closed this generator, or the caller the connection
                    conn.close()  # so that the thread gets a new one: nothing is lost, what was read was read

    def close(self) -> None:
        """Close the calling thread's connection, and refuse any later use. Any thread may call it, and more than once.

        Another thread that is in the middle of a transaction finishes the transaction. Another thread's connection is
        closed when that thread ends, when it next opens a connection, or when it next asks this `DB` for one. Don't
        call this from a signal handler or an SQL function: to close a connection in the middle of its statement crashes
        Python.
        """
        self._state.ended = self._state.ended or CLOSED
        if self._state.pid == os.getpid():
            close_this_threads(self._state)
            self._state.file.close()
        self._finalizer.detach()  # last: if a signal's exception interrupts this, the finalizer does the rest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__} {self.path!r} {'closed' if self._state.ended else 'open'}>"

    def __reduce__(self) -> Never:
        raise TypeError(f"cannot copy or pickle {self!r}: open a DB there")

    def _begin(self, conn: Connection) -> str | None:
        """Return the warning of a look."""
        if self._state.ended:
            self._refuse_use()  # another thread has closed the DB meanwhile
        start = now()
        warning = self._look(conn) if start >= self._next_look else None
        try:
            conn.execute("BEGIN IMMEDIATE")
        except sqlite3.DatabaseError as error:
            if is_busy(error):
                error.add_note(f"{self.path}: {whom_it_waited_for(error, now() - start, self._state.timeout)}")
            self._state.look()  # SQLite's own words for a lost WAL may be "malformed"
            raise
        self._long_after = start + LONG
        return warning

    def _commit(self, conn: Connection) -> str | None:
        """Return the warning of a look."""
        state = self._state
        if state.pid != os.getpid():
            self._refuse_use()
        time = now()
        if time >= self._next_look:  # the block was long: others may have begun another WAL
            state.look()
        if time >= self._long_after and conn.has_lost_lock():
            raise locked(f"{self.path}: {errors.LOCK_DROPPED}")
        try:
            conn.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if primary_code(error) == sqlite3.SQLITE_ERROR:  # "no transaction is active"
                error.add_note(f"{self.path}: {errors.NO_TRANSACTION}")
            elif is_busy(error):  # in a file in WAL mode, it never is
                error.add_note(f"{self.path}: {errors.READERS_IN_MEMORY}")
            raise
        return self._look(conn) if now() >= self._next_look else None

    def _look(self, conn: Connection) -> str | None:
        """Is all of it still there, and is the WAL small? Return a warning if the WAL can't be made small.

        While the guard's lock is held, no program removes the WAL. If a person does, what was committed just before is
        lost, too. So to find out a hundredth of a second late loses nothing more; and each look takes time. Where there
        is no lock, the WAL may go at any moment, and `_next_look` stays 0.
        """
        state = self._state
        time, size = now(), state.look()
        if state.guard is None or state.guard.is_locked:
            self._next_look = time + LOOK_EVERY
        return self._checkpoints.keep_small(conn, size)

    def _explain(
        self, conn: Connection, error: BaseException, second: sqlite3.Error | None, has_ended_itself: bool
    ) -> None:
        """Add to the `error` of a block what we know of it. `second` is that of ROLLBACK."""
        if not conn.is_this_threads():  # the turn comes back when the other thread uses the `DB`
            words = errors.LEFT_IN_ANOTHER_THREAD.format(conn.thread_name, this_threads_name())
            error.add_note(f"{self.path}: {words}")
            conn.close()
        elif second is not None:
            error.add_note(f"{self.path}: {errors.ROLLBACK_FAILED.format(second)}")
            conn.close()
        elif has_ended_itself:
            error.add_note(f"{self.path}: {errors.NO_TRANSACTION}")
        if primary_code(error) == sqlite3.SQLITE_READONLY:
            if self._state.file.read_only:
                error.add_note(f"{self.path}: {errors.OPENED_READ_ONLY}")
            elif self._state.guard and self._state.guard.is_read_only(self._state.file):
                error.add_note(f"{self.path}: {errors.NO_DESCRIPTORS}")
                conn.stage = SPENT
        if conn.stage is SPENT:  # now, because the caller may go on to use it
            conn.close()

    def _connection(self) -> Connection:
        """The calling thread's connection, opened if the thread has none."""
        state = self._state
        if state.ended or state.pid != os.getpid():
            self._refuse_use()
        conn = thread.connections.get(state)
        if conn is None or conn.stage is not READY:
            return self._connect(_opening.open_another)
        return conn

    def _refuse_use(self) -> None:
        """Raise an error in a forked child, and if the `DB` was closed or has lost its WAL."""
        ended = self._state.ended
        if self._state.pid != os.getpid():
            raise sqlite3.ProgrammingError(f"{self!r}: {errors.FORKED}")
        if ended is not None:
            close_unused()
            raise sqlite3.ProgrammingError(ended) if ended is CLOSED else OpenError(self.path, ended)

    def _connect(self, open_connection: Callable[[State], Connection]) -> Connection:
        """Open the calling thread's connection."""
        close_this_threads(self._state)
        close_unused()
        try:
            conn = open_connection(self._state)
            conn.count_own_references()
            if self._on_connect is not None:
                self._on_connect(conn)
                if conn.in_transaction or conn.isolation_level is not None:
                    raise sqlite3.ProgrammingError("on_connect must leave the connection in autocommit mode")
            self._refuse_use()  # another thread may have closed the DB meanwhile
            conn.stage = READY
        except BaseException:
            close_this_threads(self._state)
            raise
        return conn


for _block in DB.transaction, DB.snapshot:  # help() shows what a caller gets, and not how it is made
    _block.__wrapped__.__annotations__ = {"return": contextlib.AbstractContextManager[sqlite3.Connection]}  # type: ignore[attr-defined]


def _drop(state: State) -> None:
    """The finalizer of a `DB` that was not closed. It warns, as that of a file does.

    The garbage collector may call it at any moment. So the connections are left to their threads.
    """
    if state.pid != os.getpid():
        return
    is_unclosed, state.ended = not state.ended, state.ended or CLOSED
    state.file.close()
    if is_unclosed:
        warnings.warn(f"unclosed database {state.file.path!r}", ResourceWarning, stacklevel=2)
