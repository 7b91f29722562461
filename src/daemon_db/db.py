"""`DB`: one database for all threads of a daemon. Each has a connection of its own; in writing they take turns."""

import functools
import os
import sqlite3
import warnings
import weakref
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Never, Self

from . import _connection, _opening, _place
from ._connection import Shared, ThreadConnection, Wal, thread
from ._place import Place
from .errors import locked

_LONGEST_TIMEOUT = 2_147_483  # SQLite counts milliseconds in 32 bits: more would turn negative, and that means no wait

_CLOSED = "Cannot operate on a closed database."  # in sqlite3's words


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
        before the first write. Rows that allow no addition to the schema are an `OpenError`, and left as they were.
        Raises `TypeError` or `ValueError` for a wrong argument.

        https://sqlite.org/wal.html, https://sqlite.org/foreignkeys.html, https://sqlite.org/lang_altertable.html.
        """
        if not 0 <= timeout <= _LONGEST_TIMEOUT:
            raise ValueError(f"timeout must be from 0 to {_LONGEST_TIMEOUT} seconds, not {timeout!r}")
        db = cls.__new__(cls)
        db._open(_place.locate(path, read_only), float(timeout), on_connect)
        return db

    def _open(self, place: Place, timeout: float, on_connect: Callable[[sqlite3.Connection], object] | None) -> None:
        self.path = place.path
        self._place = place
        self._timeout = timeout
        self._on_connect = on_connect
        self._shared = Shared()
        self._wal = Wal(place)
        self._finalizer = weakref.finalize(self, _drop, self._shared, self.path)
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
        try:
            own = thread.connections[self._shared]
            if own.transaction is None and self._shared.open_in == _connection.pid:
                return own.conn
        except KeyError:
            pass
        return self._own().conn  # which finds out what is to be done, or to be refused

    def transaction(self) -> "Transaction":
        """One write transaction: `with db.transaction() as conn:`, where `conn` is the calling thread's connection.

        Threads take turns, each waiting up to `timeout` seconds for its own; then `BEGIN IMMEDIATE` waits up to
        `timeout` for other processes. The end of the block commits. Any exception in the block rolls back and goes on;
        one that comes after COMMIT, such as a signal's, goes on with the commit made.

        Raises `sqlite3.OperationalError`: "database is locked" after `timeout`, and inside of another transaction
        "cannot start a transaction within a transaction". Raises what `conn` raises, and what COMMIT does, rolled back.
        Raises `OpenError` if the file or its WAL was removed or replaced: what is committed to the old one is lost,
        unless it is put back.

        After a commit, where the WAL has more than 16 MB, it is checkpointed, which may wait 0.2 seconds for readers.
        Where they don't end, the logger "daemon_db" warns (https://sqlite.org/wal.html#ckpt).
        https://sqlite.org/lang_transaction.html.
        """
        return Transaction(self._transaction())

    def close(self) -> None:
        """Close the calling thread's connection, and refuse any later use. Any thread may call it, and more than once.

        Another thread in the middle of a transaction finishes it. Its connection is closed when the thread ends, next
        opens a connection, or asks this `DB` for one. Don't call it from a signal handler or an SQL function: to close
        a connection in the middle of its statement crashes Python.
        """
        self._shared.close()
        self._finalizer.detach()  # last: what a signal's exception keeps the above from doing, it does

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<daemon_db.DB {self.path!r} {'open' if self._shared.open_in else 'closed'}>"

    def __reduce__(self) -> Never:
        raise TypeError(f"cannot copy or pickle {self!r}: open a DB there")

    def _own(self) -> ThreadConnection:
        self._refuse_use()
        own = thread.connections.get(self._shared)
        if own is None:
            return self._connect(_opening.open_another)
        if own.transaction is not None:
            own.end_abandoned_transaction()
        return own

    def _refuse_use(self) -> None:
        """Raise `sqlite3.ProgrammingError` in a forked child, and if this is closed."""
        self._refuse_fork()
        if not self._shared.open_in:
            thread.connections.close_unused()
            raise sqlite3.ProgrammingError(_CLOSED)

    def _refuse_fork(self) -> None:
        if self._shared.is_inherited():
            raise sqlite3.ProgrammingError(
                f"{self!r} was opened before a fork(), which no connection survives: "
                "close it in the parent before it forks, and open a new DB in the child"
            )

    def _connect(self, open_connection: Callable[[Place, float, Shared], ThreadConnection]) -> ThreadConnection:
        """Make what `open_connection` returns the calling thread's connection."""
        own = open_connection(self._place, self._timeout, self._shared)
        try:
            if self._on_connect is not None:
                self._on_connect(own.conn)
                if own.conn.in_transaction or own.conn.isolation_level is not None:
                    raise sqlite3.ProgrammingError("on_connect must leave the connection in autocommit mode")
            self._refuse_use()  # if another thread has closed it meanwhile
            thread.connections[self._shared] = own
        except BaseException:
            thread.connections.close(own)
            raise
        return own

    def _transaction(self) -> Generator[sqlite3.Connection | None, Any, None]:
        this = yield None
        own = self._own()
        conn = own.conn
        if conn.in_transaction:
            conn.execute("BEGIN IMMEDIATE")  # SQLite's own error; the outer transaction can go on
        own.transaction = this
        try:
            if not self._shared.turn.acquire(timeout=self._timeout):
                raise locked()
            self._refuse_use()  # if it was closed meanwhile
            conn.execute("BEGIN IMMEDIATE")
            self._place.refuse_other()
            yield conn
            self._refuse_fork()
            conn.execute("COMMIT")
            self._place.refuse_other()
            self._wal.bound(conn)
            own.end_transaction()
        except BaseException as error:
            self._roll_back(own, error)
            raise

    def _roll_back(self, own: ThreadConnection, error: BaseException) -> None:
        try:
            own.end_transaction()
        except sqlite3.Error as second:
            error.add_note(f"ROLLBACK failed, too: {second}")
            if thread.connections.get(self._shared) is own:  # else it is another thread's, to be rolled back there
                thread.connections.close(own)


def _drop(shared: Shared, path: str) -> None:
    """What becomes of a `DB` that is not closed: said as files say it."""
    if shared.is_inherited():
        return
    is_unclosed = shared.open_in
    shared.drop()
    if is_unclosed:
        warnings.warn(f"unclosed database {path!r}", ResourceWarning, stacklevel=2)


class _Exit:
    """`Transaction.__exit__`: a new object for each `with` statement, which holds it, and nothing else does.

    A signal's exception may come before the first instruction of an `__exit__` that is written in Python. Whoever keeps
    the exception keeps that call's arguments. Here they lead to the transaction by a weak reference only: it goes with
    the statement's own object, however the statement is left, and what goes is rolled back.
    """

    def __get__(self, transaction: "Transaction | None", owner: "type[Transaction]") -> Callable[..., None]:
        if transaction is None:
            return owner.leave  # contextlib.ExitStack asks the class
        steps, transaction.steps = transaction.steps(), transaction.reference
        leave = functools.partial(_leave, transaction.reference)
        vars(leave)["steps"] = steps
        return leave


class Transaction:
    """What `DB.transaction` returns, for one `with` statement: a `contextlib.contextmanager`, but for the above."""

    __exit__ = _Exit()

    def __init__(self, steps: Generator[Any, Any, None]) -> None:
        self.steps: Callable[[], Any] = lambda: steps
        self.reference = weakref.ref(steps)
        self._is_used = False
        next(steps)  # to where it waits for the reference

    def __enter__(self) -> sqlite3.Connection:
        if self._is_used or self.steps() is None:
            raise RuntimeError("this transaction has been used: db.transaction() makes a new one")
        self._is_used = True
        conn: sqlite3.Connection = self.steps().send(self.reference)
        return conn

    def leave(self, *error: Any) -> None:
        _leave(self.steps, *error)


def _leave(
    steps: Callable[[], Any],
    exc_type: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    """Let `steps` go on after its `yield`, or raise `error` there."""
    if error is None:
        if steps() is None or steps().gi_frame is None:
            raise sqlite3.ProgrammingError(_CLOSED)  # by the block itself
        next(steps(), None)
        return
    if steps() is None:
        return  # the garbage collector has them both, and clears references first: it ends the steps themselves, too
    try:
        steps().throw(error)
    except BaseException as raised:
        # A generator makes a RuntimeError of a StopIteration that passes through it.
        if raised is not error and raised.__cause__ is not error:
            raise
        error.__traceback__ = traceback  # as it was, without the steps
