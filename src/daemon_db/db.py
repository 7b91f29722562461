"""`DB`: one database for all threads of a daemon. Each has a connection of its own; in writing they take turns."""

import contextlib
import logging
import os
import sqlite3
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Never, Self

from . import _guard, _opening, _place, _process
from ._connection import Connection, State, close_this_threads, close_unused, references, thread
from ._wal import Checkpoints
from .errors import (
    NO_DESCRIPTORS,
    NO_TRANSACTION,
    WAL_REMOVED,
    OpenError,
    is_busy,
    locked,
    primary_code,
    whom_it_waited_for,
)

_log = logging.getLogger("daemon_db")

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

        `path` is a file name, made absolute at once, or ":memory:", a database in memory for this `DB`'s threads.
        `timeout` is how many seconds each wait for a lock may last: this call's, a statement's, a transaction's.
        `on_connect(conn)` is called with each new connection, last, in the thread that gets it: for `row_factory`,
        `PRAGMA synchronous` and the like; not for using this `DB`. What it raises goes on to the caller, and the
        connection is closed. If it leaves autocommit mode, `sqlite3.ProgrammingError` is raised. If an SQL function or
        a row factory refers to `conn`, another thread's `close()` doesn't close the connection before its thread ends.
        `read_only=True` writes nothing to the database, and needs no permission to write the file. The file's schema
        must be complete. This is for looking at a daemon's database, or at what a dead daemon left.
        `create=False` creates no file: for a command that must not make a database of a mistyped path.

        A subclass gets its own type; its `__init__` isn't called.

        Raises `OpenError` if the file can't be opened, and `SchemaError` if it is a database but not one that fits,
        before the first write. Raises `OpenError` if SQLite refuses an addition to the schema, or if the rows that are
        there don't allow it: tables and rows are then as they were. Raises `TypeError` or `ValueError` for a wrong
        argument.

        https://sqlite.org/wal.html, https://sqlite.org/foreignkeys.html, https://sqlite.org/lang_altertable.html.
        """
        try:
            is_in_range = 0 <= timeout <= _LONGEST_TIMEOUT
        except TypeError as error:
            raise TypeError(f"timeout must be a number of seconds, not {timeout!r}") from error
        if not is_in_range:
            raise ValueError(f"timeout must be from 0 to {_LONGEST_TIMEOUT} seconds, not {timeout!r}")
        db = cls.__new__(cls)
        db._open(State(_place.locate(path, read_only, create), float(timeout)), on_connect)
        return db

    def _open(self, state: State, on_connect: Callable[[sqlite3.Connection], object] | None) -> None:
        self.path = state.file.path
        self._state = state
        self._on_connect = on_connect
        self._checkpoints = Checkpoints(state.file)
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
        if self._state.is_open:
            conn = thread.connections.get(self._state)
            if conn is not None and conn.is_usable:
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
        raises. Raises what COMMIT raises, and rolls back. Raises `OpenError` if the file or its WAL was removed or
        replaced: nobody else sees what is committed there, so look after the restart what was. If it is the WAL, this
        `DB` has come to its end, for all threads.

        If a signal's exception strikes in the very instructions that begin or end the block, the rollback may wait
        until the exception's traceback is gone. Usually that is the end of the `except` clause.

        After a commit, where the WAL has more than 16 MB, it is checkpointed, which may wait 0.2 seconds for readers.
        Where they don't end, the logger "daemon_db" warns (https://sqlite.org/wal.html#ckpt).
        https://sqlite.org/lang_transaction.html.
        """
        state = self._state
        conn = self._connection()
        if conn.in_transaction:
            self._refuse_nested(conn)
        try:
            if not state.turn.acquire(True, state.timeout):  # by keyword, this takes three times as long
                raise locked(
                    f"{self.path}: waited {state.timeout} s for another thread's transaction() in this process"
                )
            self._refuse_use()  # another thread may have closed the DB meanwhile
            self._begin(conn)
            yield conn
            self._refuse_fork()
            state.refuse_lost_index()
            try:
                conn.execute("COMMIT")
            except sqlite3.OperationalError as error:
                if primary_code(error) == sqlite3.SQLITE_ERROR:  # "no transaction is active"
                    error.add_note(f"{self.path}: {NO_TRANSACTION}")
                elif is_busy(error):  # in a file in WAL mode, it never is
                    error.add_note(f"{self.path}: another thread reads, and in memory a writer waits for readers")
                raise
            state.refuse_unseen_commit()
            warning = self._checkpoints.after_commit(conn)
        # Python runs signal handlers where a Python function begins, and not where a method begins that is C code. So
        # execute() and release() are called here directly: no signal's exception can keep them from being done.
        except BaseException as error:
            try:
                if state.pid == _process.pid and conn.in_transaction:  # in a forked child, it is the parent's
                    conn.execute("ROLLBACK")
            except sqlite3.Error as second:  # for instance, another thread has closed this generator
                error.add_note(f"ROLLBACK failed, too: {second}")
                conn.close()
            if isinstance(error, sqlite3.OperationalError):
                self._explain_read_only(conn, error)
            raise
        finally:
            try:
                if conn.connections is thread.connections:  # else another thread has closed this generator
                    state.turn.release()
            except RuntimeError:
                pass  # this thread did not get the turn, or conn.close() has given it back
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
            self._refuse_nested(conn)
        cursor = sqlite3.Cursor(conn)
        cursor.row_factory = None  # the caller's may make anything of a row
        (query_only,) = cursor.execute("PRAGMA query_only").fetchone()
        put_back = f"PRAGMA query_only={query_only}"
        start = time.monotonic()
        try:
            conn.execute("PRAGMA query_only=ON")
            conn.execute("BEGIN")
            try:
                cursor.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()  # BEGIN alone fixes nothing
            except sqlite3.OperationalError as error:
                if is_busy(error):
                    error.add_note(f"{self.path}: waited {time.monotonic() - start:.1f} s for another connection")
                raise
            self._state.refuse_lost()  # what is read in a lost WAL is as old as the loss
            yield conn
        except sqlite3.OperationalError as error:
            if primary_code(error) == sqlite3.SQLITE_READONLY and not isinstance(error, OpenError):
                error.add_note(f"{self.path}: in a snapshot(), its connection only reads")
            raise
        finally:
            # As in transaction(): methods that are C code. A signal's exception may strike right after the first one.
            if self._state.pid == _process.pid:
                try:
                    try:
                        if conn.in_transaction:
                            conn.execute("ROLLBACK")
                    finally:
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
        self._state.is_open = False
        if self._state.pid == _process.pid:
            close_this_threads(self._state)
            self._state.file.close()
        self._finalizer.detach()  # last: if a signal's exception interrupts this, the finalizer does the rest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__} {self.path!r} {'open' if self._state.is_open else 'closed'}>"

    def __reduce__(self) -> Never:
        raise TypeError(f"cannot copy or pickle {self!r}: open a DB there")

    def _begin(self, conn: Connection) -> None:
        start = time.monotonic()
        try:
            conn.execute("BEGIN IMMEDIATE")
        except sqlite3.DatabaseError as error:
            waited = time.monotonic() - start
            if is_busy(error):
                error.add_note(f"{self.path}: {whom_it_waited_for(error, waited, self._state.timeout)}")
            self._state.end_if_wal_is_lost()  # SQLite's own words for a lost WAL may be "malformed"
            raise
        self._state.refuse_before_write()

    def _refuse_nested(self, conn: Connection) -> None:
        """Raise SQLite's own refusal. The outer transaction can go on."""
        try:
            conn.execute("BEGIN")
        except sqlite3.OperationalError as error:
            error.add_note(
                f"{self.path}: this thread is in a transaction(), a snapshot(), or a BEGIN or SAVEPOINT by hand"
            )
            raise

    def _explain_read_only(self, conn: Connection, error: sqlite3.OperationalError) -> None:
        """Say why SQLite can't write. If it could open the file for reading only, have the connection replaced."""
        if primary_code(error) != sqlite3.SQLITE_READONLY or isinstance(error, OpenError):
            return
        file = self._state.file
        if file.read_only:
            error.add_note(f"{self.path}: this DB was opened with read_only=True")
        elif not _process.has_reader(file) and _guard.has_one_to_read_only(file):
            error.add_note(f"{self.path}: {NO_DESCRIPTORS}. This thread's next use of the DB opens another connection")
            conn.is_usable = False

    def _connection(self) -> Connection:
        """The calling thread's connection, opened if the thread has none."""
        self._refuse_use()
        conn = thread.connections.get(self._state)
        if conn is None or not conn.is_usable:
            return self._connect(_opening.open_another)
        return conn

    def _refuse_use(self) -> None:
        """Raise an error in a forked child, and if the `DB` was closed or has lost its WAL."""
        self._refuse_fork()
        if not self._state.is_open:
            close_unused()
            if self._state.has_lost_wal:
                raise OpenError(self.path, WAL_REMOVED)
            raise sqlite3.ProgrammingError("Cannot operate on a closed database.")  # in sqlite3's words

    def _refuse_fork(self) -> None:
        if self._state.pid != _process.pid:
            raise sqlite3.ProgrammingError(
                f"{self!r} was opened before a fork(), which no connection survives: "
                "close it in the parent before it forks, and open a new DB in the child"
            )

    def _connect(self, open_connection: Callable[[State], Connection]) -> Connection:
        """Open the calling thread's connection."""
        close_this_threads(self._state)
        close_unused()
        try:
            conn = open_connection(self._state)
            conn.references = references(conn)
            if self._on_connect is not None:
                self._on_connect(conn)
                if conn.in_transaction or conn.isolation_level is not None:
                    raise sqlite3.ProgrammingError("on_connect must leave the connection in autocommit mode")
            self._refuse_use()  # another thread may have closed the DB meanwhile
            conn.is_usable = conn.was_opened = True
        except BaseException:
            close_this_threads(self._state)
            raise
        return conn


def _drop(state: State) -> None:
    """The finalizer of a `DB` that was not closed. It warns, as that of a file does.

    The garbage collector may call it at any moment. So the connections are left to their threads.
    """
    if state.pid != os.getpid():  # not _process.pid: in a forked child, this may be called before that is set
        return
    is_unclosed, state.is_open = state.is_open, False
    state.file.close()
    if is_unclosed:
        warnings.warn(f"unclosed database {state.file.path!r}", ResourceWarning, stacklevel=2)
