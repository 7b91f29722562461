"""The steps of opening, in their order. Nothing is written before all that can be refused has been checked."""

import contextlib
import sqlite3
from collections.abc import Iterator

from . import _connection, _schema
from ._connection import Shared, ThreadConnection, thread
from ._place import Memory, Place
from .errors import SchemaError, translated


def open_first(place: Place, timeout: float, shared: Shared) -> ThreadConnection:
    """Open the database: create it, or bring it up to date, where that is needed."""
    place.examine()
    _connection.refuse_inherited(place)
    _connection.refuse_replaced(place)
    if isinstance(place, Memory) and place.is_shared:
        shared.anchor(place)
    with connected(place, timeout, shared) as own:
        own.identify(place)
        missing = _schema.missing(own.conn, place.path)
        _connection.enforce_foreign_keys(own.conn)
        _connection.refuse_unenforced_foreign_keys(own.conn, place)
        if place.read_only:
            refuse_incomplete(missing, place)
            _connection.forbid_writing(own.conn)
        else:
            _connection.use_wal(own.conn, place, timeout)
            if missing:
                _schema.update(own.conn, place.path)
    return own


def open_another(place: Place, timeout: float, shared: Shared) -> ThreadConnection:
    """Open one more connection, for another thread, to what `open_first` opened and to nothing else."""
    if isinstance(place, Memory) and not place.is_shared:
        raise sqlite3.NotSupportedError(
            f"SQLite {sqlite3.sqlite_version} has a {place.path} database for one thread only; 3.36 shares it"
        )
    try:
        with connected(place, timeout, shared) as own:
            # Before anything is read: of another file, that would begin the WAL's index anew, which this process's
            # connections to the old file have in memory. It is emptied first: they would crash the process (SIGBUS).
            place.refuse_other()
            _connection.refuse_other_mode(own.conn, place)
            place.refuse_other()  # only now is it certain which file, and which WAL, SQLite has opened
            _connection.enforce_foreign_keys(own.conn)
            if place.read_only:
                _connection.forbid_writing(own.conn)
    except sqlite3.OperationalError:
        place.refuse_other()  # in better words, if that is the reason: SQLite's may be "disk I/O error"
        raise
    return own


def refuse_incomplete(missing: tuple[_schema.Addition, ...], place: Place) -> None:
    """Raise `SchemaError` for a file that would have to be brought up to date."""
    if missing:
        raise SchemaError(
            place.path, (f"{addition.problem}: an open without read_only (or --check) adds it" for addition in missing)
        )


@contextlib.contextmanager
def connected(place: Place, timeout: float, shared: Shared) -> Iterator[ThreadConnection]:
    """A connection. Any error closes it, and leaves the file, and a killed process's WAL beside it, as they were."""
    own = None
    try:
        own = thread.connections.open(place, timeout, shared)
        yield own
        own.is_refused = False
    except BaseException as error:
        # First, because to close it frees descriptors, and a lack of them may be what SQLite means.
        words = translated(error, place.path, timeout, place.read_only)
        if own is not None:
            thread.connections.close(own)
        if words is not None:
            raise words from error
        raise
