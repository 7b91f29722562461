"""`DB`: one database for all threads of a daemon. Each has a connection of its own; in writing they take turns."""

import os
import sqlite3
import time
from collections.abc import Callable, Generator

from . import _connection
from ._connection import MEMORY
from .errors import OpenError, SchemaError

_LONGEST_TIMEOUT = 2_147_483  # SQLite counts milliseconds in 32 bits: more would turn negative, and that means no wait

_OTHER_FILE = "removed or replaced since this DB was opened; open a new DB"


class DB:
    """An open database, as `DB.open` returns it. Threads share it; the connections that it hands out they don't.

    `path` is the file, absolute, or ":memory:". Leaving a `with` block closes it, and so does dropping it.
    """

    _pid = 0  # for __del__ after an __init__ that failed

    def __init__(self, path: str, timeout: float, on_connect: Callable[[sqlite3.Connection], object] | None) -> None:
        import threading  # here, because it takes a fifth as long to import as sqlite3 does

        self.path = path
        self._timeout = timeout
        self._on_connect = on_connect
        self._file: _connection.FileId | None = None
        self._memory_uri = ""
        self._anchor: sqlite3.Connection | None = None
        self._local = threading.local()
        self._turn = threading.RLock()
        self._pid = _connection.pid
        self._open_in = self._pid  # 0 once it is closed: `conn` finds out both that and a fork by one comparison

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        timeout: float = 5.0,
        on_connect: Callable[[sqlite3.Connection], object] | None = None,
    ) -> "DB":
        """Create or open the database at `path`: in WAL mode, foreign keys enforced, the schema in place.

        `path` is a file name, made absolute at once, or ":memory:", a database in memory for this `DB`'s threads.
        `timeout` is how many seconds a wait for a lock may last: this call's, a statement's, a transaction's.
        `on_connect(conn)` is called with each new connection, last, in the thread that gets it: for `row_factory`,
        `PRAGMA synchronous` and the like; not for using this `DB`, nor for another transaction control. What it raises
        goes on to the caller, and the connection is closed.

        Raises `OpenError` if the file can't be opened, and `SchemaError` if it is a database but not one that fits:
        both before the first write. Raises `TypeError` or `ValueError` for a wrong argument.

        The specification's "Functions to Implement". https://sqlite.org/wal.html, https://sqlite.org/foreignkeys.html.
        """
        name = os.fspath(path)
        if not isinstance(name, str):
            raise TypeError(f"path must be str or os.PathLike[str], not {type(path).__name__}")
        if not name or "\0" in name:
            raise ValueError(f"path must be a file name, not {name!r}")
        if not 0 <= timeout <= _LONGEST_TIMEOUT:
            raise ValueError(f"timeout must be from 0 to {_LONGEST_TIMEOUT} seconds, not {timeout!r}")
        if name != MEMORY and not os.path.isabs(name):
            try:
                name = os.path.join(os.getcwd(), name)  # abspath() would take "link/.." for "."
            except OSError as error:
                raise OpenError(name, f"the working directory: {error.strerror}") from error
        db = cls(name, timeout, on_connect)
        try:
            db._connect(db._open_first)
        except BaseException:
            db.close()
            raise
        return db

    @property
    def conn(self) -> sqlite3.Connection:
        """The calling thread's own connection: opened when it first asks, closed when it ends.

        It is in autocommit mode: outside of `transaction()` each statement commits by itself. Don't close it, and don't
        hand it to another thread.

        Raises `sqlite3.ProgrammingError` after `close()` and in a forked child (https://sqlite.org/howtocorrupt.html,
        2.6). A thread's first use raises what `open` raises, for instance if the file was removed or replaced.
        """
        if self._open_in != _connection.pid:
            raise self._refusal()
        try:
            conn: sqlite3.Connection = self._local.conn
            return conn
        except AttributeError:
            pass
        return self._connect(self._open_another)

    def transaction(self) -> "Transaction":
        """One write transaction: `with db.transaction() as conn:`, where `conn` is the calling thread's connection.

        Threads take turns, each waiting up to `timeout` seconds for its own; then `BEGIN IMMEDIATE` waits up to
        `timeout` for other processes. The end of the block commits. Any exception rolls back and goes on.

        Raises `sqlite3.OperationalError`: "database is locked" after `timeout`, and inside of another transaction
        "cannot start a transaction within a transaction". Raises what `conn` raises, and what COMMIT does, rolled back.
        https://sqlite.org/lang_transaction.html.
        """
        return Transaction(self._transaction())

    def close(self) -> None:
        """Close the calling thread's connection, and refuse any later use. Any thread may call it, and more than once.

        Another thread in the middle of a transaction finishes it, and its connection closes when it ends. Don't call it
        from a signal handler: to close a connection in the middle of a statement crashes Python.
        """
        self._open_in = 0
        if self._pid == _connection.pid:  # else all connections are the parent's
            self._close_own()
            if self._anchor is not None:
                self._anchor.close()

    __del__ = close

    def __enter__(self) -> "DB":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<daemon_db.DB {self.path!r} {'open' if self._open_in else 'closed'}>"

    def _connect(self, open_connection: Callable[[], sqlite3.Connection]) -> sqlite3.Connection:
        """Make what `open_connection` returns the calling thread's connection."""
        try:
            conn = open_connection()
        except (OpenError, SchemaError, sqlite3.NotSupportedError):
            raise
        except sqlite3.Error as error:
            raise _connection.open_error(self.path, error, self._timeout) from error
        except UnicodeDecodeError as error:  # in SQLite's message, of SQL in the file
            raise OpenError(self.path, f"damaged ({error})") from error
        owner = _connection.Owner(conn, self._file)
        try:
            if self._on_connect is not None:
                self._on_connect(conn)
            if not self._open_in:  # closed by another thread meanwhile
                raise self._refusal()
        except BaseException:
            owner.close()
            raise
        self._local.owner = owner
        self._local.conn = conn
        return conn

    def _open_first(self) -> sqlite3.Connection:
        """Open the database: first refuse whatever is to be refused, then write."""
        from . import _schema  # here, because `import daemon_db` can do without

        deadline = time.monotonic() + self._timeout
        has_looked = False
        if self.path == MEMORY:
            uri = self._open_memory()
        else:
            self._file, real_path = _connection.find(self.path)
            _connection.refuse_inherited(self.path, self._file)
            uri = _connection.uri(self.path, _connection.open_mode(self.path, self._file))
            has_looked = _connection.has_wal(real_path)
            if has_looked:
                self._look(deadline)
        conn = _connection.connect(uri, max(0.0, deadline - time.monotonic()) if has_looked else self._timeout)
        try:
            if self.path != MEMORY:
                _connection.refuse_unwritable(self.path)
                self._file = self._file or _connection.file_id(self.path)
            is_unchanged = _schema.is_unchanged(conn)
            is_complete = is_unchanged or self._compare_schema(conn, deadline)
            is_wal = _connection.is_wal(conn, self.path)
            _connection.enforce_foreign_keys(conn)
            if not _connection.enforces_foreign_keys(conn):
                raise OpenError(self.path, "this SQLite was built without foreign keys")
            if not is_wal:
                _connection.switch_to_wal(conn, self.path, deadline)
            if not is_complete:
                _connection.set_busy_timeout(conn, deadline - time.monotonic())
                _schema.create(conn, self.path)
            if has_looked or not (is_unchanged and is_wal):  # which took from the timeout
                _connection.set_busy_timeout(conn, self._timeout)
        except BaseException:
            conn.close()
            raise
        return conn

    def _look(self, deadline: float) -> None:
        """Refuse a file that doesn't fit by a connection that can't write.

        The close() of the last connection is a checkpoint: it would write a killed process's WAL into the file.
        """
        from . import _schema

        conn = _connection.connect(_connection.uri(self.path, "ro"), self._timeout)
        try:
            if not _schema.is_unchanged(conn):
                self._compare_schema(conn, deadline)
        except sqlite3.OperationalError as error:
            if not _connection.is_readonly(error):
                raise  # else there is a rollback journal, too, and to look is to roll back
        finally:
            conn.close()

    def _compare_schema(self, conn: sqlite3.Connection, deadline: float) -> bool:
        from . import _schema

        _connection.set_busy_timeout(conn, deadline - time.monotonic())
        conn.execute("BEGIN")  # one snapshot: another process may be creating the schema
        is_complete = _schema.is_complete(conn, self.path)
        conn.execute("COMMIT")
        return is_complete

    def _open_memory(self) -> str:
        if sqlite3.sqlite_version_info >= (3, 36):
            # The memdb VFS shares a name that begins with "/" within the process, while a connection to it is open: the
            # anchor. No statement runs on that one, so that any thread may close it.
            self._memory_uri = f"file:/daemon_db-{os.urandom(16).hex()}?vfs=memdb"
            self._anchor = _connection.connect(self._memory_uri, 0, check_same_thread=False)
        else:
            self._memory_uri = "file::memory:"
        return self._memory_uri

    def _open_another(self) -> sqlite3.Connection:
        """Open one more connection, to what `_open_first` opened and to nothing else."""
        if self.path == MEMORY and self._anchor is None:
            raise sqlite3.NotSupportedError(
                f"SQLite {sqlite3.sqlite_version} has a {MEMORY} database for one thread only; 3.36 shares it"
            )
        self._refuse_other_file()
        conn = _connection.connect(self._memory_uri or _connection.uri(self.path, "rw"), self._timeout)
        try:
            # The first read opens the -wal file, by name. Only then is it certain which file this is, and so that it is
            # in WAL mode: the mode is the file's.
            conn.execute("PRAGMA schema_version")
            self._refuse_other_file()
            if not _connection.is_open(self._file) and not _connection.is_wal(conn, self.path):
                raise OpenError(self.path, _OTHER_FILE)  # one that has got the inode of the removed one
            _connection.enforce_foreign_keys(conn)
        except BaseException:
            conn.close()
            raise
        return conn

    def _refuse_other_file(self) -> None:
        if self.path != MEMORY and _connection.file_id(self.path) != self._file:
            raise OpenError(self.path, _OTHER_FILE)

    def _transaction(self) -> Generator[sqlite3.Connection, None, None]:
        conn = self.conn
        if conn.in_transaction:
            conn.execute("BEGIN IMMEDIATE")  # SQLite's own error; the outer transaction can go on
        try:
            if not self._turn.acquire(timeout=self._timeout):
                raise _connection.locked()
            if self._open_in != _connection.pid:  # closed meanwhile
                raise self._refusal()
            conn.execute("BEGIN IMMEDIATE")
            yield conn
            if self._pid != _connection.pid:
                raise self._refusal()
            conn.execute("COMMIT")
        except BaseException as error:
            if self._pid == _connection.pid:  # else it is the parent's to end
                self._roll_back(conn, error)
            raise
        finally:
            try:
                self._turn.release()
            except RuntimeError:
                pass  # it isn't this thread's: the wait for it timed out or was interrupted

    def _roll_back(self, conn: sqlite3.Connection, error: BaseException) -> None:
        try:
            if conn.in_transaction:  # else SQLite has rolled back by itself
                conn.execute("ROLLBACK")
        except sqlite3.Error as second:
            error.add_note(f"ROLLBACK failed, too: {second}")
            if getattr(self._local, "conn", None) is conn:
                self._close_own()

    def _close_own(self) -> None:
        mine = vars(self._local)
        mine.pop("conn", None)
        if owner := mine.pop("owner", None):
            owner.close()

    def _refusal(self) -> sqlite3.ProgrammingError:
        if self._pid != _connection.pid:
            return sqlite3.ProgrammingError(
                f"{self!r} was opened before a fork(), which no connection survives: "
                "close it in the parent before it forks, and open a new DB in the child"
            )
        return sqlite3.ProgrammingError("Cannot operate on a closed database.")


class Transaction:
    """What `DB.transaction` returns, for one `with` statement. `contextlib` does the same, and takes as long to import
    as all of this package.

    A signal handler's exception, such as KeyboardInterrupt, may come between the block and the first instruction of
    `__exit__`. Then the generator is closed, and rolls back, when that exception's traceback is dropped: at the end of
    the `except` clause that catches it.
    """

    def __init__(self, steps: Generator[sqlite3.Connection, None, None]) -> None:
        self._steps = steps

    def __enter__(self) -> sqlite3.Connection:
        for conn in self._steps:
            return conn
        raise RuntimeError("this transaction has been used: db.transaction() makes a new one")

    def __exit__(self, exc_type: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            next(self._steps, None)
            return
        try:
            self._steps.throw(error)
        except BaseException as raised:
            # A generator makes a RuntimeError of a StopIteration that passes through it.
            if raised is not error and raised.__cause__ is not error:
                raise
            error.__traceback__ = traceback  # type: ignore[assignment]  # as it was, without the steps
