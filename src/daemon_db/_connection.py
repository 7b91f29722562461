"""A connection is one thread's: that thread alone uses and closes it, at the latest when the thread ends."""

import atexit
import contextlib
import functools
import os
import sqlite3
import sys
import threading
from collections.abc import Callable

from ._file import File
from ._guard import Guard
from ._process import this_process
from .errors import WAL_REMOVED, OpenError, primary_code

# The stages of a connection's life. No enum: to read an enum's member takes as long as all else in `DB.conn`.
OPENING = "opening"  # not all steps are done: to close it leaves the file and its WAL as they were
READY = "ready"  # its thread may use it
SPENT = "spent"  # its thread is to close it, and to open another

CLOSED = "Cannot operate on a closed database."  # in sqlite3's words


class State:
    """What a `DB` and its connections both know.

    A connection refers to this, and not to the `DB`. So a `DB` that the caller drops is freed at once, and its
    finalizer can warn that it was not closed.
    """

    def __init__(self, file: File, timeout: float) -> None:
        self.file = file
        self.timeout = timeout
        self.pid = os.getpid()
        self.ended: str | None = None
        """Why nobody can use the `DB` any more: `CLOSED` or `WAL_REMOVED`."""
        self.turn = threading.RLock()  # an RLock knows its owner: a thread that doesn't have the turn can't release it
        self.added: tuple[str, ...] = ()
        """What opening has added to the file; for a file that is only read, what the next other open would add."""
        self.guard: Guard | None = None
        """Set once SQLite has opened the file. A database in memory has none."""

    def look(self) -> int:
        """Is all of it still there: the file, its -wal and its -shm? Return the WAL's size, or raise `OpenError`.

        A lost WAL ends the `DB`, for all threads.
        """
        size = self.guard.look(self.file) if self.guard else 0
        if size is None:
            self.ended = WAL_REMOVED
            raise OpenError(self.file.path, WAL_REMOVED)
        return size


class Connection(sqlite3.Connection):
    """A thread's connection. Nothing but `close()` frees it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.stage = OPENING
        self.thread_name = this_threads_name()
        self._threads_connections = thread.connections
        self._own_references = 0
        try:
            this_process().add(self, state.file)
            super().__init__(state.file.uri(), timeout=state.timeout, isolation_level=None, uri=True)
        except BaseException:
            this_process().remove(self)
            raise
        thread.connections[state] = self  # not by the caller, which a signal's exception may keep from getting this
        # A circle on purpose: SQLite refers to the function, and the function to the connection. So nothing but close()
        # frees the connection. In a forked child, to free the parent's would destroy the parent's transaction.
        self.create_function("daemon_db_connection", 0, functools.partial(repr, self))

    def join_guard(self) -> None:
        """Keep the WAL there that the first read has opened. Raise `OpenError` if it isn't there any more."""
        if self.state.guard:
            self.state.guard.join(self, self.state.file)

    def is_this_threads(self) -> bool:
        """Whether the calling thread is the one that opened the connection."""
        return self._threads_connections is thread.connections  # not by its number, which the next thread gets

    def has_lost_lock(self) -> bool:
        """Whether SQLite's write lock, which this connection's transaction has, was dropped."""
        guard = self.state.guard
        try:
            if guard is None or not self.in_transaction or guard.has_write_lock():
                return False
            # A BEGIN by hand, or a connection that can only read, has none. This fails then, or takes the lock.
            self.execute("DELETE FROM runs WHERE 0")
        except sqlite3.Error as error:
            return primary_code(error) not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY, 0)
        return not guard.has_write_lock()

    def take_lock_again(self) -> None:
        """Take the lock before ROLLBACK, and have the connection replaced after it.

        ROLLBACK clears the WAL's index behind the last commit: what another process is writing just now. It also takes
        the others' commits for its own, and what the connection has in memory for current.
        """
        self.stage = SPENT
        if self.state.guard:
            self.state.guard.take_write_lock()

    def count_own_references(self) -> None:
        """Remember how many references there are while no caller has the connection."""
        self._own_references = sys.getrefcount(self)

    def is_in_use(self) -> bool:
        """Whether there are more: the caller's own, or a running statement's, a half-read cursor's, an open blob's."""
        return sys.getrefcount(self) > self._own_references

    def close(self) -> None:
        """Roll back an open transaction, close, and give the turn back if this thread has it.

        In another thread, leave that to the connection's own thread; in a forked child, to the parent. Closing in the
        middle of a statement (in an SQL function, for one) crashes Python.
        """
        if self.is_this_threads():
            self.close_in_its_thread()
        else:
            self.stage = SPENT

    def close_in_its_thread(self) -> None:
        """As `close`, also where the thread is ending, and doesn't know itself any more."""
        if not this_process().has_open(self):
            return  # closed already, or the parent's
        is_refused = self.stage is OPENING
        if not is_refused:  # a signal may interrupt this, and the next attempt must know both
            self.stage = SPENT
        with contextlib.suppress(sqlite3.Error):  # if ROLLBACK fails, SQLite's close rolls back
            # Without this, SQLite keeps the write lock after its close, as long as a cursor has rows to fetch.
            if self.in_transaction:
                self.execute("ROLLBACK")
        guard = self.state.guard
        with guard.mutex if guard else contextlib.nullcontext():
            if guard is None or self._leave(guard, is_refused):
                super().close()
                this_process().remove(self)
        if self._threads_connections.get(self.state) is self:  # a signal's handler may have opened another one
            del self._threads_connections[self.state]
        with contextlib.suppress(RuntimeError):  # this thread doesn't have the turn
            self.state.turn.release()

    def _leave(self, guard: Guard, is_refused: bool) -> bool:
        """Return whether SQLite may close: not if it would checkpoint over others' commits, and nothing prevents that.

        Where the file was refused, or is only read, its WAL is left there: a killed process may have left rows in it.
        """
        file = self.state.file
        leaves_wal = (file.read_only or is_refused) and file.wal_size() > 0
        if leaves_wal and self not in guard.connections:  # the first read has failed
            with contextlib.suppress(OpenError):
                self.join_guard()
        if self not in guard.connections:  # it has written nothing, and has no WAL
            return True
        may_checkpoint = guard.may_checkpoint(file)
        keeps_lock = leaves_wal or not may_checkpoint
        if keeps_lock and not guard.is_locked:  # so there is none that keeps a checkpoint off
            if sys.version_info >= (3, 12):
                self.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, True)
            elif not may_checkpoint:
                return False
        guard.leave(self, file, keeps_lock)
        return True


class _ClosesAtThreadEnd:
    """An object that is freed when its thread ends, and then closes the thread's connections.

    Nothing else refers to this object. To the connections something may: a traceback that the caller keeps, for one.
    """

    def __init__(self, connections: dict[State, Connection]) -> None:
        self._connections = connections

    # A default argument, because this module's globals may be gone when the interpreter exits.
    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # at exit, a daemon thread may be in the middle of a statement
            for conn in list(self._connections.values()):
                conn.close_in_its_thread()


class _ThreadLocal(threading.local):
    def __init__(self) -> None:
        self.connections: dict[State, Connection] = {}
        self._end = _ClosesAtThreadEnd(self.connections)


thread = _ThreadLocal()
"""`thread.connections` are the calling thread's connections, one for each `DB`. By this dict, a thread is known."""


def this_threads_name() -> str:
    """With the number that the system has for it, because a pool may give one name to all its threads."""
    return f"{threading.current_thread().name} ({threading.get_native_id()})"


def close_this_threads(state: State) -> None:
    """Close the thread's connection, if there is one: its opening failed, was interrupted, or it is spent."""
    if conn := thread.connections.get(state):
        conn.close()


def close_unused() -> None:
    """Close this thread's connections of closed and of dropped `DB`s, unless a caller still has the connection.

    To close a connection in the middle of its statement would crash Python.
    """
    for state in list(thread.connections):  # not of the connections themselves: such a list has references to them
        conn = thread.connections.get(state)  # the garbage collector may have closed it meanwhile
        if conn is not None and state.ended and not conn.is_in_use():
            conn.close()


@atexit.register
def _close_all() -> None:
    for conn in list(thread.connections.values()):
        conn.close()
