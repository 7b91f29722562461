"""The steps of opening, in their order. Nothing is written before path, file and schema have been checked."""

import contextlib
import logging
import sqlite3
from collections.abc import Iterator

from . import _guard, _process, _schema, _wal, errors
from ._connection import Connection, State
from ._file import File, Memory
from .errors import OpenError, SchemaError, open_error

_log = logging.getLogger("daemon_db")


def open_first(state: State) -> Connection:
    """Open the database: create it, or bring it up to date, where that is needed."""
    file = state.file
    if isinstance(file, Memory):
        file.keep()
        return open_memory(state, is_first=True)
    conn = open_file(state)
    if file.read_only and state.added:
        raise SchemaError(file.path, map(errors.LACKS.format, state.added))
    if state.added:
        _log.info("%s: %s", file.path, _schema.what_was_added(state.added))
    warn_of_shared_file_system(file)
    return conn


def open_file(state: State) -> Connection:
    """The first connection. What a file that is only read lacks is no error here: it is in `state.added`."""
    file = state.file
    file.examine()
    _process.refuse_inherited(file)
    _guard.refuse_lost(file)
    file.put_lone_wal_aside()
    with said_in_words(state):
        conn = Connection(state)
        file.remember_id()
        state.guard = _guard.guard_of(file)
        if not state.guard.is_locked:  # else this process has it open, and has just looked
            _guard.refuse_or_put_aside(file)
        read_first(conn)
        file.remember_id()  # it must be the same: the read opens the WAL by the file's name
        had_wal = is_in_wal_mode(conn)
        if had_wal:
            conn.join_guard()
        missing = _schema.missing(conn, file.path)
        enforce_foreign_keys(conn, file)
        if file.read_only:
            state.added = tuple(addition.problem for addition in missing)
            conn.execute("PRAGMA query_only=ON")  # SQLite refuses every write
            return conn
        if not had_wal:
            _wal.turn_on(conn, file, state.timeout)
        try:
            if not had_wal:
                read_first(conn)
                conn.join_guard()
            if missing:
                state.added = _schema.update(conn, file.path, state.timeout)
        except BaseException:  # a signal's, too: SQLite tries for ten seconds to get a lock on the -shm
            if not had_wal:
                try:
                    conn.close()
                finally:  # a signal that came while SQLite tried interrupts the first one
                    conn.close()
                    _wal.turn_off(file)
            raise
    return conn


def open_another(state: State) -> Connection:
    """One more connection, for another thread, to what `open_first` opened and to nothing else."""
    file = state.file
    if isinstance(file, Memory):
        return open_memory(state, is_first=False)
    with said_in_words(state):
        conn = Connection(state)
        # Before the first read: of another file, the read would empty the -shm, and begin its index anew. This
        # process's connections to the old file have that index in memory: they would crash (SIGBUS).
        state.look()
        read_first(conn)
        state.look()  # the file may have been replaced between the first look and SQLite's
        if is_in_wal_mode(conn):
            conn.join_guard()
        elif not file.read_only:  # it was in WAL mode: so this is another file, which has the inode of a removed one
            raise file.replaced()
        enforce_foreign_keys(conn, file)
        if file.read_only:
            conn.execute("PRAGMA query_only=ON")
    return conn


def open_memory(state: State, is_first: bool) -> Connection:
    """The first connection to a database in memory, or another one. The first one makes the schema."""
    file = state.file
    if not is_first and isinstance(file, Memory) and not file.is_shared:
        raise sqlite3.NotSupportedError(errors.ONE_THREAD_ONLY.format(sqlite3.sqlite_version))
    conn = Connection(state)
    enforce_foreign_keys(conn, file)
    if is_first:
        state.added = _schema.update(conn, file.path, state.timeout)
    return conn


def read_first(conn: sqlite3.Connection) -> None:
    """Read. In WAL mode the first read opens the WAL, by its name, or creates it."""
    conn.execute("PRAGMA schema_version")  # unlike journal_mode, it doesn't parse the schema


def is_in_wal_mode(conn: sqlite3.Connection) -> bool:
    """Whether this connection has the WAL open. The -wal beside the file may be newer than this one's last read."""
    return bool(conn.execute("PRAGMA journal_mode").fetchone() == ("wal",))


def enforce_foreign_keys(conn: sqlite3.Connection, file: File) -> None:
    """Turn foreign keys on: a connection begins with them off (https://sqlite.org/foreignkeys.html#fk_enable)."""
    conn.execute("PRAGMA foreign_keys=ON")
    if conn.execute("PRAGMA foreign_keys").fetchone() != (1,):  # a SQLite that was built without them says nothing
        raise OpenError(file.path, errors.NO_FOREIGN_KEYS)


_known_devices: set[int] = set()


def warn_of_shared_file_system(file: File) -> None:
    """Warn once in this process for each device."""
    if file.network and file.id and file.id[0] not in _known_devices:
        _known_devices.add(file.id[0])
        _log.warning("%s", errors.SHARED_FILE_SYSTEM.format(file.path, file.network))


@contextlib.contextmanager
def said_in_words(state: State) -> Iterator[None]:
    """Raise `OpenError` for what SQLite says in here."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if state.guard and state.guard.connections:
            state.look()  # SQLite's own words for a lost WAL may be "malformed", or "disk I/O error"
        if isinstance(error, (OpenError, SchemaError)):
            raise
        raise open_error(state.file.path, state.file.reason(error, state.timeout), error) from error
