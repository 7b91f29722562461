"""One connection: the process and the thread that it belongs to, WAL mode and foreign keys."""

import atexit
import contextlib
import functools
import logging
import os
import sqlite3
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any

from ._place import FileId, Memory, Place
from .errors import REPLACED, STILL_OPEN, WAL_REMOVED, OpenError, is_busy

_log = logging.getLogger("daemon_db")

# The process

pid = os.getpid()
"""This process; -1 while it forks. To ask the system each time takes as long as a quarter of a `SELECT 1`."""

_held: dict["ThreadConnection", FileId | str] = {}
"""The files on which SQLite may have locks, each from before it is asked to open it; by its path if it isn't there yet.

To set or delete an item is atomic, and so is to copy them all.
"""

_inherited: set[FileId | str] = set()
"""What was in there when this process was forked."""

_process = pid
"""The process that these two are about."""

_forking = threading.RLock()


def _before_fork() -> None:
    global pid
    _forking.acquire()  # or a thread that has forked would set `pid` while another is about to
    pid = -1  # so that the child looks from its first instruction on: others' at-fork functions may run before ours


def _after_fork() -> None:
    global pid
    _notice_fork()
    pid = os.getpid()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def _notice_fork() -> None:
    """In a forked child, once: know what the parent had open, and leave it alone.

    To close the parent's connections, or to free them, would roll back in the WAL index, in memory shared with the
    parent: "database disk image is malformed" there (https://sqlite.org/howtocorrupt.html, 2.6).
    """
    global _process
    if _process != os.getpid():
        _process = os.getpid()
        _inherited.update(_held.values())
        _held.clear()
        thread.__init__()  # type: ignore[misc]


def refuse_inherited(place: Place) -> None:
    """Raise `OpenError` where SQLite would take locks that the parent process holds for locks of this one.

    SQLite remembers a process's locks in memory. A fork copies the memory and not the locks, so that the parent's last
    `close()` finds the file free and removes the WAL under the child: what the child commits from then on is lost.
    """
    _notice_fork()
    if place.id in _inherited or place.real_path in _inherited:
        raise OpenError(
            place.path,
            "this process was forked while its parent had the file open, and SQLite's locks on it don't work here; "
            "close the DB before the fork, or start the process by spawn or exec",
        )


def refuse_replaced(place: Place) -> None:
    """Raise `OpenError` while this process has another file open whose WAL index is the one that is at this path.

    It is in this process's memory, and SQLite doesn't see locks of its own process: it would begin the index anew, and
    the threads that have the file open that was here before would crash, or write into the new one's.
    """
    if index := place.index_id():
        others = (own.place for own in list(_held) if own.place.id not in (None, place.id))
        if any(other.index_id() == index and not other.is_there() for other in others):
            raise OpenError(place.path, STILL_OPEN)


# The thread


class Shared:
    """What a `DB` shares with its threads' connections: whether it is open, and whose turn it is to write."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.open_in = self.process
        """The same while it is open, then 0: so that `DB.conn` finds out by one comparison that it can go on."""
        self.turn = threading.RLock()  # it knows its owner, wherever a signal's exception interrupts
        self._anchors: list[sqlite3.Connection] = []

    def is_inherited(self) -> bool:
        """Whether this is a forked child, and the `DB` its parent's."""
        return self.process != pid and self.process != os.getpid()

    def anchor(self, place: Memory) -> None:
        """Keep the memory while the `DB` is open, whichever threads end. No statement runs on this connection."""
        self._anchors.append(sqlite3.connect(place.uri(), uri=True, check_same_thread=False))
        _keep(self._anchors[0])

    def close(self) -> None:
        """Close the calling thread's connection now; the others' are closed by their threads."""
        self.open_in = 0
        if not self.is_inherited():  # else all connections are the parent's
            if own := thread.connections.get(self):
                thread.connections.close(own)
            self._release()

    def drop(self) -> None:
        """As `close()`, but what is in use stays open: the garbage collector may call in the middle of a statement."""
        self.open_in = 0
        if not self.is_inherited():
            thread.connections.close_unused()
            self._release()

    def _release(self) -> None:
        with contextlib.suppress(IndexError):
            self._anchors.pop().close()  # by one thread only: without the GIL, two at once crash the interpreter


def _keep(conn: sqlite3.Connection) -> None:
    """Let nothing but `close()` free it: SQLite holds the function, and the function the connection."""
    conn.create_function("daemon_db_connection", 0, functools.partial(repr, conn))


class ThreadConnection:
    """A connection, and what its thread must know to close it. It is freed by its `close()` and by nothing else."""

    def __init__(self, place: Place, timeout: float, shared: Shared, opened: "set[ThreadConnection]") -> None:
        self.shared = shared
        self.place = place
        self.is_refused = True
        """Until it has been opened to its end. If it is closed before, it leaves the WAL as it was."""
        self.transaction: weakref.ref[GeneratorType[Any, Any, Any]] | None = None
        """What runs a transaction on it, until that is committed or rolled back."""
        _held[self] = place.id or place.real_path
        try:
            self.conn = sqlite3.connect(place.uri(), timeout=timeout, isolation_level=None, uri=True)
            self._references = self._count_references()
            opened.add(self)  # here: a signal's exception may keep the caller from getting it
        except BaseException:
            opened.discard(self)
            del _held[self]
            raise

    def keep(self) -> None:
        """From now on nothing but `close()` frees it."""
        _keep(self.conn)
        self._references = self._count_references()

    def identify(self, place: Place) -> None:
        """Once SQLite has opened, and perhaps created, the file: know it by its inode."""
        place.identify()
        _held[self] = place.id or place.real_path

    def is_unused(self) -> bool:
        """Whether no caller has it. A running statement, a cursor with rows to fetch and an open blob have it, too."""
        return self._count_references() <= self._references

    def _count_references(self) -> int:
        return sys.getrefcount(self.conn)

    def end_transaction(self) -> None:
        """Roll back what isn't committed, and give the turn back."""
        if self.shared.is_inherited():
            return  # the transaction is the parent's
        try:
            if self.conn.in_transaction:  # else it is committed, or SQLite has rolled back by itself
                self.conn.execute("ROLLBACK")
            self.transaction = None
        finally:
            try:
                self.shared.turn.release()
            except RuntimeError:
                pass  # another thread has it, or none

    def end_abandoned_transaction(self) -> None:
        """Do what a signal's exception has kept from being done when the block of `transaction()` ended."""
        steps = self._steps()
        if steps is None or steps.gi_frame is None:
            self.end_transaction()

    def _steps(self) -> "GeneratorType[Any, Any, Any] | None":
        return None if self.transaction is None else self.transaction()

    def close(self) -> None:
        """Roll back what is open, and close. For its own thread, and not in the middle of a statement."""
        steps = self._steps()
        try:
            if steps is not None and not steps.gi_running:
                steps.close()  # a transaction in a generator that will not go on
            # While a cursor has rows to fetch, SQLite keeps a closed connection, and with it the lock of a transaction.
            if self.transaction is not None or self.conn.in_transaction:
                self.end_transaction()
        except sqlite3.Error:
            pass  # closed by hand; or ROLLBACK failed, and what remains is to close
        finally:
            keeps_wal = self.is_refused or self.place.read_only
            with _wal_kept(self.place) if keeps_wal else contextlib.nullcontext():
                self.conn.close()
            _held.pop(self, None)


@contextlib.contextmanager
def _wal_kept(place: Place) -> Iterator[None]:
    """Leave the file, and the WAL beside it, as they are while a connection closes in here.

    When the last connection to a file closes, SQLite checkpoints the WAL into it. So another is open meanwhile, which
    can't write. Where there can't be another, the first one had no use of the WAL.
    """
    with contextlib.ExitStack() as stack:
        if place.wal_size() and place.is_there():  # beside another file, it may be in use here (see open_another)
            with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
                reader = stack.enter_context(contextlib.closing(sqlite3.connect(place.uri("ro"), uri=True)))
                reader.execute("SELECT 1 FROM sqlite_master").fetchone()
        yield


class ThreadConnections(dict[Shared, ThreadConnection]):
    """A thread's connections, by their `DB`s."""

    def __init__(self) -> None:
        super().__init__()
        self._opened: set[ThreadConnection] = set()
        """All, from when they are opened until they are closed: those, too, that aren't ready to be given out."""

    def open(self, place: Place, timeout: float, shared: Shared) -> ThreadConnection:
        self.close_unused()
        own = ThreadConnection(place, timeout, shared, self._opened)
        try:
            own.keep()
        except BaseException:
            self.close(own)
            raise
        return own

    def close(self, own: ThreadConnection) -> None:
        own.close()
        self._opened.discard(own)
        if self.get(own.shared) is own:
            del self[own.shared]

    def close_unused(self) -> None:
        """Close those of closed `DB`s that nothing uses any more."""
        for own in list(self._opened):
            if not own.shared.open_in and own.is_unused():
                self.close(own)

    def close_all(self) -> None:
        for own in list(self._opened):
            self.close(own)


class _End:
    """What a thread drops when it ends, and nobody else holds: a traceback that is kept may hold the connections."""

    def __init__(self, connections: ThreadConnections) -> None:
        self._connections = connections
        self._process = os.getpid()

    # Defaults, because when the interpreter exits this module's globals go first.
    def __del__(
        self, is_finalizing: Callable[[], bool] = sys.is_finalizing, getpid: Callable[[], int] = os.getpid
    ) -> None:
        # Another thread drops it in a forked child, and at exit under a daemon thread: both leave them open.
        if not is_finalizing() and self._process == getpid():
            self._connections.close_all()


class _Thread(threading.local):
    def __init__(self) -> None:
        self.connections = ThreadConnections()
        self._end = _End(self.connections)


thread = _Thread()
"""The calling thread's own."""


@atexit.register
def _close_all() -> None:
    thread.connections.close_all()


# SQLite's settings


def use_wal(conn: sqlite3.Connection, place: Place, timeout: float) -> None:
    """Turn WAL mode on, which the file then keeps (https://sqlite.org/wal.html); `OpenError` where it isn't to be had.

    A database in memory has no journal file, and needs none.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            (mode,) = conn.execute("PRAGMA journal_mode=WAL").fetchone()
            break
        except sqlite3.OperationalError as error:
            # If a writer's lock is in the way of this switch, SQLite does not run its busy handler.
            if not is_busy(error) or time.monotonic() >= deadline:
                raise
            time.sleep(0.002)
    if mode != place.journal_mode:
        raise OpenError(place.path, f"WAL mode is not available here: journal_mode stayed {mode!r}")


def refuse_other_mode(conn: sqlite3.Connection, place: Place) -> None:
    """Raise `OpenError` if the file isn't in WAL mode: it is another, which has got the inode of a removed one.

    In WAL mode the connection's first read, which this is, opens the WAL by its name, or creates it.
    """
    conn.execute("PRAGMA schema_version")  # unlike journal_mode, it doesn't parse the schema
    if not place.has_wal() and not place.read_only:
        raise OpenError(place.path, REPLACED)


def enforce_foreign_keys(conn: sqlite3.Connection) -> None:
    """Turn foreign keys on: a connection begins with them off (https://sqlite.org/foreignkeys.html#fk_enable)."""
    conn.execute("PRAGMA foreign_keys=ON")


def refuse_unenforced_foreign_keys(conn: sqlite3.Connection, place: Place) -> None:
    """Raise `OpenError` if that had no effect: a SQLite that was built without them says nothing."""
    if conn.execute("PRAGMA foreign_keys").fetchone() != (1,):
        raise OpenError(place.path, "this SQLite was built without foreign keys")


def forbid_writing(conn: sqlite3.Connection) -> None:
    """Let SQLite refuse every write (https://sqlite.org/pragma.html#pragma_query_only)."""
    conn.execute("PRAGMA query_only=ON")


WAL_LIMIT = 16 * 2**20
"""Bytes that the WAL may have before a commit checkpoints all of it. SQLite's own checkpoints are at 4 MB."""

LOOK_EVERY = 0.01
"""Seconds from one look at its size to the next. One right after each fsync takes a quarter of eight threads' rate."""

_PATIENCE = 0.2
"""Seconds that this checkpoint waits: for readers of the WAL, and then for those that have begun meanwhile.

No thread of this `DB` can write in that time.
"""


class Wal:
    """Keeps a file's WAL from growing for ever.

    SQLite begins the WAL anew only where no reader needs any of it, and readers that overlap keep it from that for
    ever. In a checkpoint that empties it, new readers read the file itself, and the old ones are waited for
    (https://sqlite.org/wal.html#avoiding_excessively_large_wal_files).
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._limit = WAL_LIMIT
        self._next_look = 0.0

    def bound(self, conn: sqlite3.Connection) -> None:
        """After a commit, for whoever has the turn: empty the WAL if it is too big. Where readers are in the way, say
        so, and try again at twice the size. Raise `OpenError` if it is gone.
        """
        if not self._place.has_wal():  # what is committed to it is lost, and nobody else sees it
            raise OpenError(self._place.path, WAL_REMOVED)
        if time.monotonic() < self._next_look:
            return
        size = self._place.wal_size()
        self._next_look = time.monotonic() + LOOK_EVERY
        if size <= WAL_LIMIT:
            self._limit = WAL_LIMIT
            return
        if is_due := size > self._limit:
            self._limit = 2 * size
        try:
            # When this connection next begins the WAL anew, after the old one's last reader, it gives the disk back.
            conn.execute(f"PRAGMA journal_size_limit={WAL_LIMIT}")
            if not is_due:
                return
            if _truncate_wal(conn):
                self._limit = WAL_LIMIT  # here, too: the next commit alone may be larger
                return
            reason = "a reader is in the way: a SELECT half read, or a transaction left open, here or elsewhere"
        except sqlite3.Error as error:  # the commit is made all the same
            reason = str(error)
        _log.warning("%s: the WAL has %d MB and can't be emptied: %s", self._place.path, size / 1e6, reason)


def _truncate_wal(conn: sqlite3.Connection) -> bool:
    """Whether a checkpoint could empty the WAL.

    It doesn't wait by SQLite's busy handler: that may wait for one of the WAL's five read locks which new readers go on
    to share, each of them up to date. A new checkpoint sees that they are, and doesn't wait for them.
    """
    cursor = conn.cursor()
    cursor.row_factory = None  # the caller's may make anything of a row
    (timeout,) = cursor.execute("PRAGMA busy_timeout").fetchone()
    try:
        cursor.execute("PRAGMA busy_timeout=0")  # in here, where a signal's exception can't keep it so
        deadline = time.monotonic() + _PATIENCE
        while True:
            (busy, _, _) = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if not busy or time.monotonic() >= deadline:
                return not busy
            time.sleep(0.002)
    except sqlite3.OperationalError as error:
        if not is_busy(error):
            raise
        return False  # the reader is this very connection: a SELECT of the thread's own, half read
    finally:
        cursor.execute(f"PRAGMA busy_timeout={timeout}")
