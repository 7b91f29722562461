"""`DB`: one database for all threads of a daemon. Each has a connection of its own; in writing they take turns."""

import contextlib
import logging
import os
import sqlite3
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Never, Self

from . import _opening, _place, _process
from ._connection import Connection, State, close_unused, references, thread
from ._wal import Checkpoints
from .errors import WAL_REMOVED, OpenError, locked

_log = logging.getLogger("daemon_db")

_LONGEST_TIMEOUT = 2_147_483  # SQLite counts milliseconds in 32 bits: more would turn negative, and that means no wait


class DB:
    """An open database, as `DB.open` returns it. Threads share it; the connections that it hands out they don't.

    `path` is the file, absolute, or ":memory:". Leaving a `with` block closes it.
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
    ) -> Self:
        """Create or open the database at `path`: in WAL mode, foreign keys enforced, the schema in place.

        `path` is a file name, made absolute at once, or ":memory:", a database in memory for this `DB`'s threads.
        `timeout` is how many seconds each wait for a lock may last: this call's, a statement's, a transaction's.
        `on_connect(conn)` is called with each new connection, last, in the thread that gets it: for `row_factory`,
        `PRAGMA synchronous` and the like; not for using this `DB`. What it raises goes on to the caller, and the
        connection is closed; so does `sqlite3.ProgrammingError` if it leaves autocommit mode. An SQL function or a row
        factory that holds `conn` keeps it from being closed before its thread ends.
        `read_only=True` creates and writes nothing, and needs no permission to write the file, whose schema must be
        complete: for looking at a daemon's database, or at what a dead one left.

        A subclass gets its own type; its `__init__` isn't called.

        Raises `OpenError` if the file can't be opened, and `SchemaError` if it is a database but not one that fits,
        before the first write. If SQLite, or the rows that are there, allow no addition to the schema, that is an
        `OpenError`, and tables and rows are left as they were. Raises `TypeError` or `ValueError` for a wrong argument.

        https://sqlite.org/wal.html, https://sqlite.org/foreignkeys.html, https://sqlite.org/lang_altertable.html.
        """
        if not 0 <= timeout <= _LONGEST_TIMEOUT:
            raise ValueError(f"timeout must be from 0 to {_LONGEST_TIMEOUT} seconds, not {timeout!r}")
        db = cls.__new__(cls)
        db._open(State(_place.locate(path, read_only), float(timeout)), on_connect)
        return db

    def _open(self, state: State, on_connect: Callable[[sqlite3.Connection], object] | None) -> None:
        self.path = state.file.path
        self._state = state
        self._on_connect = on_connect
        self._checkpoints = Checkpoints(state.file)
        self._finalizer = weakref.finalize(self, _drop, state)
        self._finalizer.atexit = False  # functions registered for the exit, also before this, may want to use it
        try:
            self._connect(_opening.open_first)
        except BaseException:
            DB.close(self)  # a subclass's may need what its __init__ would have made
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
        return self._connection()  # which finds out what is to be done, or to be refused

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One write transaction: `with db.transaction() as conn:`, where `conn` is the calling thread's connection.

        Threads take turns, each waiting up to `timeout` seconds for its own; then `BEGIN IMMEDIATE` waits up to
        `timeout` for other processes. The end of the block commits. Any exception in the block rolls back and goes on;
        one that comes after COMMIT, such as a signal's, goes on with the commit made.

        Raises `sqlite3.OperationalError`: "database is locked" after `timeout`, and inside of another transaction
        "cannot start a transaction within a transaction". Raises what `conn` raises, and what COMMIT does, rolled back.
        Raises `OpenError` if the file or its WAL was removed or replaced: what is committed to the old one is lost,
        unless it is put back.

        A signal's exception, at whatever moment, is rolled back like any other. If it strikes just when the block
        begins or ends, or if a second one strikes during the rollback, the transaction ends when the exception's
        traceback is gone.

        After a commit, where the WAL has more than 16 MB, it is checkpointed, which may wait 0.2 seconds for readers.
        Where they don't end, the logger "daemon_db" warns (https://sqlite.org/wal.html#ckpt).
        https://sqlite.org/lang_transaction.html.
        """
        state = self._state
        conn = self._connection()
        if conn.in_transaction:
            conn.execute("BEGIN IMMEDIATE")  # SQLite's own refusal; the outer transaction can go on
        try:
            if not state.turn.acquire(timeout=state.timeout):
                raise locked()
            self._refuse_use()  # if it was closed meanwhile
            self._begin(conn)
            yield conn
            self._refuse_fork()
            conn.execute("COMMIT")
            state.refuse_unseen_commit()
            warning = self._checkpoints.after_commit(conn)
        # From here on no Python function is called before the turn is given back: when a function begins, a signal's
        # exception may interrupt. When a method of C begins, none does.
        except BaseException as error:
            try:
                if state.pid == _process.pid and conn.in_transaction:  # in a forked child, it is the parent's
                    conn.execute("ROLLBACK")
            except sqlite3.Error as second:
                error.add_note(f"ROLLBACK failed, too: {second}")
                conn.close()
            raise
        finally:
            try:
                if conn.connections is thread.connections:  # else a generator is closed by another thread
                    state.turn.release()
            except RuntimeError:
                pass  # this thread did not get the turn, or has given it back in closing the connection
        if warning:
            _log.warning(warning)  # now that others may write: a handler may be slow, or write here

    def close(self) -> None:
        """Close the calling thread's connection, and refuse any later use. Any thread may call it, and more than once.

        Another thread in the middle of a transaction finishes it. Its connection is closed when the thread ends, next
        opens a connection, or asks this `DB` for one. Don't call it from a signal handler or an SQL function: to close
        a connection in the middle of its statement crashes Python.
        """
        self._state.is_open = False
        if self._state.pid == _process.pid:
            if conn := thread.connections.get(self._state):
                conn.close()
            self._state.file.close()
        self._finalizer.detach()  # last: what a signal's exception keeps the above from doing, it does

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<daemon_db.DB {self.path!r} {'open' if self._state.is_open else 'closed'}>"

    def __reduce__(self) -> Never:
        raise TypeError(f"cannot copy or pickle {self!r}: open a DB there")

    def _begin(self, conn: Connection) -> None:
        try:
            conn.execute("BEGIN IMMEDIATE")
        except sqlite3.DatabaseError:
            self._state.refuse_lost_wal()  # in better words, if that is the reason: SQLite's may be "malformed"
            raise
        self._state.refuse_replaced()

    def _connection(self) -> Connection:
        """The calling thread's, opened if it has none."""
        self._refuse_use()
        conn = thread.connections.get(self._state)
        if conn is None or not conn.is_usable:
            return self._connect(_opening.open_another)
        return conn

    def _refuse_use(self) -> None:
        """Raise `sqlite3.ProgrammingError` in a forked child, and if this is closed."""
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
        self._close_unusable()
        close_unused()
        try:
            conn = open_connection(self._state)
            conn.references = references(conn)
            if self._on_connect is not None:
                self._on_connect(conn)
                if conn.in_transaction or conn.isolation_level is not None:
                    raise sqlite3.ProgrammingError("on_connect must leave the connection in autocommit mode")
            self._refuse_use()  # if another thread has closed it meanwhile
            conn.is_usable = True
        except BaseException:
            self._close_unusable()
            raise
        return conn

    def _close_unusable(self) -> None:
        """Close this thread's connection if its opening failed or was interrupted."""
        if conn := thread.connections.get(self._state):
            conn.close()


def _drop(state: State) -> None:
    """What becomes of a `DB` that is not closed: said as files say it."""
    if state.pid != _process.pid:
        return
    is_unclosed, state.is_open = state.is_open, False
    close_unused()
    state.file.close()
    if is_unclosed:
        warnings.warn(f"unclosed database {state.file.path!r}", ResourceWarning, stacklevel=2)
