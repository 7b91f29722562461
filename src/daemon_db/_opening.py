"""The steps of opening, in their order. Nothing is written before path, file and schema have been checked."""

import contextlib
import logging
import random
import sqlite3
import time
from collections.abc import Callable, Iterator

from . import _guard, _process, _schema, _wal
from ._connection import Connection, State, close_this_threads
from ._place import File, Memory
from .errors import (
    NO_DESCRIPTORS,
    REPLACED,
    TWO_NAMES,
    WAL_REMOVED,
    OpenError,
    SchemaError,
    in_words,
    is_busy,
    lacks_shared_memory,
    open_error,
    primary_code,
)

_log = logging.getLogger("daemon_db")


def open_first(state: State) -> Connection:
    """Open the database: create it, or bring it up to date, where that is needed."""
    conn = until_it_can_be_used(open_first_once, state)
    if state.file.read_only and state.added:
        conn.close()
        raise SchemaError(state.file.path, (f"{each}: an open without read_only adds it" for each in state.added))
    if state.added and not isinstance(state.file, Memory):
        _log.info("%s: %s", state.file.path, _schema.what_was_added(state.added))
    warn_of_network_file_system(state.file)
    return conn


def open_as_it_is(state: State) -> Connection:
    """Open a file to look at it, though its schema may lack something. What it lacks is then in `state.added`."""
    return until_it_can_be_used(open_first_once, state)


def open_another(state: State) -> Connection:
    """Open one more connection, for another thread, to what `open_first` opened and to nothing else."""
    return until_it_can_be_used(open_another_once, state)


class TryAgain(OpenError):
    """Something else in this process was in the way for a moment. Nothing was written.

    Either SQLite's lock was dropped before the guard's lock was taken, and the WAL removed; or there was no free
    descriptor, and SQLite opened one of the files for reading only.
    """


def until_it_can_be_used(open_once: Callable[[State], Connection], state: State) -> Connection:
    """Try again until the timeout. Whatever fails, the connection is closed."""
    deadline = time.monotonic() + state.timeout
    while True:
        try:
            return open_once(state)
        except BaseException as error:
            close_this_threads(state)
            if not isinstance(error, TryAgain) or time.monotonic() >= deadline:
                raise
        # A -shm that is open for reading only stays so until no connection of this process has it open. If threads
        # tried again at equal intervals, there might be one at any moment.
        time.sleep(random.uniform(0.002, 0.05))


def open_first_once(state: State) -> Connection:
    """As `open_first`, but raise `TryAgain` where it is worth another try."""
    file = state.file
    file.examine()
    _process.refuse_inherited(file)
    _process.refuse_index_in_use(file)
    refuse_lost_wal(file)
    file.refuse_wal_alone()
    likely = _guard.next_descriptors()
    with said_in_words(state):
        conn = Connection(state)
        file.remember_id()
        file.refuse_wal_alone()  # again: the file may have been emptied meanwhile
        read_first(conn)
        refuse_reading_only(conn, likely)
        file.remember_id()  # it must be the same: the read opens the WAL by the file's name
        has_wal = is_in_wal_mode(conn, file)
        if has_wal:
            keep_wal(conn, likely)
        missing = _schema.missing(conn, file.path)
        enforce_foreign_keys(conn, file)
        if file.read_only:
            state.added = tuple(addition.problem for addition in missing)
            forbid_writing(conn)
            return conn
        _wal.turn_on(conn, file, state.timeout)
        with contextlib.nullcontext() if has_wal else turned_off_if_unusable(conn):
            if not has_wal and not isinstance(file, Memory):
                read_first(conn)
                refuse_reading_only(conn, likely)
                keep_wal(conn, likely)
            if missing:
                state.added = _schema.update(conn, file.path)
    return conn


def open_another_once(state: State) -> Connection:
    """As `open_another`, but raise `TryAgain` where it is worth another try."""
    file = state.file
    if isinstance(file, Memory) and not file.is_shared:
        raise sqlite3.NotSupportedError(
            f"SQLite {sqlite3.sqlite_version} has a {file.path} database for one thread only; 3.36 shares it"
        )
    state.end_if_wal_is_lost()
    likely = _guard.next_descriptors()
    try:
        with said_in_words(state):
            conn = Connection(state)
            # Before the first read: of another file, the read would empty the -shm, and begin its index anew. This
            # process's connections to the old file have that index in memory: they would crash (SIGBUS).
            file.refuse_replaced()
            read_first(conn)
            file.refuse_replaced()  # the file may have been replaced between the first look and SQLite's
            refuse_reading_only(conn, likely)
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
        name = _process.other_name(file)
        raise OpenError(file.path, f"this process has it open as {name}: {TWO_NAMES}" if name else WAL_REMOVED)


def read_first(conn: sqlite3.Connection) -> None:
    """Read. In WAL mode the first read opens the WAL, by its name, or creates it."""
    conn.execute("PRAGMA schema_version")  # unlike journal_mode, it doesn't parse the schema


def refuse_reading_only(conn: Connection, likely: list[int]) -> None:
    """Raise `TryAgain` if SQLite could open the file or its WAL for reading only."""
    # Not all descriptors: SQLite keeps those of closed connections, which only read, as long as others have locks.
    if _guard.is_open_to_read_only(conn.state.file, likely):
        raise TryAgain(conn.state.file.path, NO_DESCRIPTORS)


_UNUSABLE = sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PROTOCOL


@contextlib.contextmanager
def turned_off_if_unusable(conn: Connection) -> Iterator[None]:
    """Turn WAL mode, which was just turned on, off again if the WAL can't be used where the file is."""
    state = conn.state
    try:
        yield
    except (OpenError, SchemaError):
        raise
    except BaseException as error:  # a signal's, too: SQLite tries for ten seconds to get a lock on the -shm
        is_unusable = not isinstance(error, sqlite3.Error) or primary_code(error) in _UNUSABLE
        try:
            is_unusable = is_unusable or _guard.refused_lock(state.file) is not None
            if isinstance(error, sqlite3.Error):
                raise explained(error, state) from error  # the connection is open: why it failed can still be seen
            raise
        finally:
            if is_unusable:
                conn.close()
                try:
                    _wal.turn_off(state.file, state.timeout if isinstance(error, sqlite3.Error) else 0)
                except sqlite3.Error as second:
                    _log.warning("%s: WAL mode can't be used, nor turned off again: %s", state.file.path, second)


def is_in_wal_mode(conn: sqlite3.Connection, file: File) -> bool:
    """Whether the first read has opened a WAL."""
    if file.wal_size():  # the quicker question; an empty -wal SQLite takes for none, if the file isn't in WAL mode
        return True
    return bool(conn.execute("PRAGMA journal_mode").fetchone() == ("wal",))


def keep_wal(conn: Connection, likely: list[int]) -> None:
    """Keep the WAL there that the first read has opened. Raise `TryAgain` if it isn't there any more, or unusable."""
    state = conn.state
    if reason := conn.join_guard(likely):
        state.refuse_lost()
        raise TryAgain(state.file.path, reason)


def enforce_foreign_keys(conn: sqlite3.Connection, file: File) -> None:
    """Turn foreign keys on: a connection begins with them off (https://sqlite.org/foreignkeys.html#fk_enable)."""
    conn.execute("PRAGMA foreign_keys=ON")
    if conn.execute("PRAGMA foreign_keys").fetchone() != (1,):  # a SQLite that was built without them says nothing
        raise OpenError(file.path, "this SQLite was built without foreign keys")


def forbid_writing(conn: sqlite3.Connection) -> None:
    """Let SQLite refuse every write (https://sqlite.org/pragma.html#pragma_query_only)."""
    conn.execute("PRAGMA query_only=ON")


_known_devices: set[int] = set()


def warn_of_network_file_system(file: File) -> None:
    """Warn once in this process for each device."""
    if file.id is None or file.id[0] in _known_devices:
        return
    _known_devices.add(file.id[0])
    if name := file.network_file_system():
        _log.warning(
            "%s is on %s, which machines may share: let the programs of one machine only have it open, because WAL "
            "mode doesn't work across machines (https://sqlite.org/wal.html)",
            file.path,
            name,
        )


@contextlib.contextmanager
def said_in_words(state: State) -> Iterator[None]:
    """Raise `OpenError` for what SQLite says in here."""
    try:
        yield
    except (OpenError, SchemaError):
        raise
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise explained(error, state) from error


def explained(error: Exception, state: State) -> OpenError:
    """SQLite's error in words. The connection is still open: so a lack of descriptors, for one, can still be seen."""
    state.end_if_wal_is_lost()  # SQLite's own words for a lost WAL may be "malformed"
    refuse_lost_wal(state.file)
    if is_busy(error) and (refusal := _guard.refused_lock(state.file)):
        reason = lacks_shared_memory(refusal)
    else:
        reason = state.file.reason(error) or in_words(error, state.timeout)
    return open_error(state.file.path, reason, error)
