"""The steps of opening, in their order. Nothing is written before path, file and schema have been checked."""

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator

from . import _guard, _process, _schema, _wal
from ._connection import Connection, State
from ._place import File, Memory
from .errors import REPLACED, WAL_REMOVED, OpenError, SchemaError, in_words, open_error


def open_first(state: State) -> Connection:
    """Open the database: create it, or bring it up to date, where that is needed."""
    return until_it_keeps_its_wal(open_first_once, state)


def open_another(state: State) -> Connection:
    """Open one more connection, for another thread, to what `open_first` opened and to nothing else."""
    return until_it_keeps_its_wal(open_another_once, state)


class WalLost(OpenError):
    """The WAL was removed between the connection's first read and the lock. Nothing was written: try again."""


def until_it_keeps_its_wal(open_once: Callable[[State], Connection], state: State) -> Connection:
    """Open again if something in this process has dropped SQLite's lock before the guard's lock was taken."""
    deadline = time.monotonic() + state.timeout
    while True:
        try:
            return open_once(state)
        except WalLost:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.002)


def open_first_once(state: State) -> Connection:
    """As `open_first`, but raise `WalLost` where it is worth another try."""
    file = state.file
    file.examine()
    _process.refuse_inherited(file)
    _process.refuse_index_in_use(file)
    refuse_lost_wal(file)
    likely = _guard.next_descriptors()
    with said_in_words(state):
        conn = Connection(state)
        file.remember_id()
        read_first(conn)
        file.remember_id()  # it must be the same: the read opens the WAL by the file's name
        has_wal = is_in_wal_mode(conn, file)
        if has_wal:
            keep_wal(conn, likely)
        missing = _schema.missing(conn, file.path)
        enforce_foreign_keys(conn, file)
        if file.read_only:
            refuse_incomplete(missing, file)
            forbid_writing(conn)
            return conn
        _wal.turn_on(conn, file, state.timeout)
        if not has_wal and not isinstance(file, Memory):
            read_first(conn)
            keep_wal(conn, likely)
        if missing:
            _schema.update(conn, file.path)
    return conn


def open_another_once(state: State) -> Connection:
    """As `open_another`, but raise `WalLost` where it is worth another try."""
    file = state.file
    if isinstance(file, Memory) and not file.is_shared:
        raise sqlite3.NotSupportedError(
            f"SQLite {sqlite3.sqlite_version} has a {file.path} database for one thread only; 3.36 shares it"
        )
    state.end_if_wal_is_lost()
    has_lock = state.guard is not None and state.guard.is_locked()
    likely = [] if has_lock else _guard.next_descriptors()
    try:
        with said_in_words(state):
            conn = Connection(state)
            # Before the first read: of another file, the read would empty the -shm, and begin its index anew. This
            # process's connections to the old file have that index in memory: they would crash (SIGBUS).
            file.refuse_replaced()
            read_first(conn)
            file.refuse_replaced()  # the file may have been replaced between the first look and SQLite's
            if is_in_wal_mode(conn, file):
                keep_wal(conn, likely)
            elif state.guard:
                # The file was in WAL mode. So this is another file, which has got the inode of a removed one.
                raise OpenError(file.path, REPLACED)
            enforce_foreign_keys(conn, file)
            if file.read_only:
                forbid_writing(conn)
    except sqlite3.OperationalError:
        file.refuse_replaced()  # SQLite's own words for a removed file may be "disk I/O error"
        raise
    return conn


def refuse_lost_wal(file: File) -> None:
    """Raise `OpenError` if this process has lost the file's WAL: SQLite would read a new WAL by the old index."""
    if _guard.is_lost(file):
        raise OpenError(file.path, WAL_REMOVED)


def read_first(conn: sqlite3.Connection) -> None:
    """Read. In WAL mode the first read opens the WAL, by its name, or creates it."""
    conn.execute("PRAGMA schema_version")  # unlike journal_mode, it doesn't parse the schema


def is_in_wal_mode(conn: sqlite3.Connection, file: File) -> bool:
    """Whether the first read has opened a WAL."""
    if file.wal_size():  # the quicker question; an empty -wal SQLite takes for none, if the file isn't in WAL mode
        return True
    return bool(conn.execute("PRAGMA journal_mode").fetchone() == ("wal",))


def keep_wal(conn: Connection, likely: list[int]) -> None:
    """Keep the WAL there that the first read has opened. Raise `WalLost` if it isn't there any more."""
    state = conn.state
    if not conn.join_guard(likely):
        state.file.refuse_replaced()
        state.end_if_wal_is_lost()
        conn.close()
        raise WalLost(state.file.path, WAL_REMOVED)


def enforce_foreign_keys(conn: sqlite3.Connection, file: File) -> None:
    """Turn foreign keys on: a connection begins with them off (https://sqlite.org/foreignkeys.html#fk_enable)."""
    conn.execute("PRAGMA foreign_keys=ON")
    if conn.execute("PRAGMA foreign_keys").fetchone() != (1,):  # a SQLite that was built without them says nothing
        raise OpenError(file.path, "this SQLite was built without foreign keys")


def forbid_writing(conn: sqlite3.Connection) -> None:
    """Let SQLite refuse every write (https://sqlite.org/pragma.html#pragma_query_only)."""
    conn.execute("PRAGMA query_only=ON")


def refuse_incomplete(missing: tuple[_schema.Addition, ...], file: File) -> None:
    """Raise `SchemaError` for a file that would have to be brought up to date."""
    if missing:
        raise SchemaError(
            file.path, (f"{addition.problem}: an open without read_only (or --check) adds it" for addition in missing)
        )


@contextlib.contextmanager
def said_in_words(state: State) -> Iterator[None]:
    """Raise `OpenError` for what SQLite says in here.

    The connection is still open then. So if SQLite lacks descriptors, the lack can still be seen.
    """
    try:
        yield
    except (OpenError, SchemaError):
        raise
    except (sqlite3.Error, UnicodeDecodeError) as error:
        state.end_if_wal_is_lost()  # SQLite's own words for a lost WAL may be "malformed"
        refuse_lost_wal(state.file)
        reason = state.file.reason(error) or in_words(error, state.timeout)
        raise open_error(state.file.path, reason, error) from error
