"""A connection is one thread's: that thread alone uses and closes it, at the latest when the thread ends."""

import atexit
import contextlib
import functools
import os
import sqlite3
import sys
import threading
from collections.abc import Callable

from . import _process, _wal
from ._guard import Guard, guard_of
from ._place import File
from .errors import WAL_REMOVED, OpenError


class State:
    """What a `DB` and its connections both know.

    A connection refers to this, and not to the `DB`. So a `DB` that the caller drops is freed at once, and its
    finalizer can warn that it was not closed.
    """

    def __init__(self, file: File, timeout: float) -> None:
        self.file = file
        self.timeout = timeout
        self.pid = _process.pid
        self.is_open = True
        self.has_lost_wal = False
        self.turn = threading.RLock()  # an RLock knows its owner: a thread that doesn't have the turn can't release it
        self.added: tuple[str, ...] = ()
        """What opening has added to the file; for a file that is only read, what the next other open would add."""
        self.guard: Guard | None = None  # a database in memory or in rollback-journal mode has none

    def refuse_before_write(self) -> None:
        """Raise `OpenError` if the file or its -shm was removed or replaced, before anything is written."""
        self.file.refuse_replaced()
        self.refuse_lost_index()

    def refuse_lost_index(self) -> None:
        """Raise `OpenError` if the -shm was removed or replaced: another process may have begun another WAL."""
        if self.guard and not self.guard.has_index(self.file):
            self.end_if_wal_is_lost()

    def refuse_unseen_commit(self) -> None:
        """Raise `OpenError` if nobody else sees what was committed: the file or its -wal was removed or replaced."""
        self.file.refuse_replaced()
        if self.guard and not self.guard.has_wal(self.file):
            self.end_if_wal_is_lost()

    def refuse_lost(self) -> None:
        """Raise `OpenError` if the file, its -wal or its -shm was removed or replaced."""
        self.file.refuse_replaced()
        self.end_if_wal_is_lost()

    def end_if_wal_is_lost(self) -> None:
        """Raise `OpenError` if the WAL was removed or replaced. The `DB` then ends, for all threads."""
        if self.guard and self.guard.is_lost(self.file):
            self.has_lost_wal = True  # first: another thread that sees the DB closed asks why
            self.is_open = False
            raise OpenError(self.file.path, WAL_REMOVED)


class Connection(sqlite3.Connection):
    """A thread's connection. Nothing but `close()` frees it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.is_usable = False
        """False while the connection is being opened, and once its thread should close it and open another."""
        self.was_opened = False
        """False until all steps of opening are done. Before, closing leaves the file and its WAL as they were."""
        self.references = 0
        """How many references to the connection there are while no caller has it."""
        self.connections = thread.connections
        """All connections of the thread."""
        self._thread = threading.get_ident()
        try:
            with _process.lock:
                _process.open_files[self] = state.file
            uri = state.file.uri(state.file.mode())
            super().__init__(uri, timeout=state.timeout, isolation_level=None, uri=True)
        except BaseException:
            with _process.lock:
                _process.open_files.pop(self, None)
            raise
        self.connections[state] = self  # not by the caller, which a signal's exception may keep from getting this
        # A circle on purpose: SQLite refers to the function, and the function to the connection. So nothing but close()
        # frees the connection. In a forked child, to free the parent's would destroy the parent's transaction.
        self.create_function("daemon_db_connection", 0, functools.partial(repr, self))

    def join_guard(self, likely: list[int]) -> str | None:
        """Keep the WAL there that the first read has opened. Return why this connection must be closed, if it must."""
        self.state.guard = guard_of(self.state.file)
        return self.state.guard.join(self, self.state.file, likely)

    def close(self) -> None:
        """Roll back an open transaction, close, and give the turn back if this thread has it.

        In another thread, leave that to the connection's own thread; in a forked child, to the parent. Closing in the
        middle of a statement (in an SQL function, for one) crashes Python.
        """
        if self.state.pid != os.getpid() or not _process.has_open(self):
            return  # the parent's, or closed already
        if self._thread != threading.get_ident():
            self.is_usable = False  # its own thread closes it when that thread next uses the DB, or ends
            return
        with contextlib.suppress(sqlite3.Error):  # if ROLLBACK fails, SQLite's close rolls back
            # Without this, SQLite keeps the write lock after its close, as long as a cursor has rows to fetch.
            if self.in_transaction:
                self.execute("ROLLBACK")
        leaves_wal = self.state.file.read_only or not self.was_opened
        with _wal.left_as_it_is(self.state.file) if leaves_wal else contextlib.nullcontext():
            is_closed = self._close()
        if is_closed:
            with _process.lock:
                del _process.open_files[self]
        if self.connections.get(self.state) is self:
            del self.connections[self.state]
        with contextlib.suppress(RuntimeError):  # this thread doesn't have the turn
            self.state.turn.release()

    def _close(self) -> bool:
        """Let SQLite close. At the last connection to the file, SQLite checkpoints the WAL and removes it.

        Where the WAL was lost, that checkpoint would overwrite what others have committed since. Return False if the
        connection was left open, because nothing else prevents the checkpoint.
        """
        guard, file = self.state.guard, self.state.file
        if guard is None:
            super().close()
            return True
        with guard.mutex:
            if not guard.has(self):
                pass  # a connection that has not joined has written nothing
            elif guard.may_checkpoint(file):
                guard.leave(self, file)
            elif guard.is_locked() or self._can_forbid_checkpoint():
                guard.leave_locked(self)
            else:
                return False
            super().close()
        return True

    def _can_forbid_checkpoint(self) -> bool:
        """Forbid SQLite to checkpoint at its close, if this Python can."""
        if sys.version_info < (3, 12):
            return False
        self.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, True)
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
                conn.close()


class _ThreadLocal(threading.local):
    def __init__(self) -> None:
        self.connections: dict[State, Connection] = {}
        self._end = _ClosesAtThreadEnd(self.connections)


thread = _ThreadLocal()
"""`thread.connections` are the calling thread's connections, one for each `DB`."""


def _forget_inherited() -> None:
    """In a forked child, so that `DB.conn` finds none of the parent's connections."""
    thread.connections.clear()


os.register_at_fork(after_in_child=_forget_inherited)


def close_this_threads(state: State) -> None:
    """Close the thread's connection, if there is one: its opening failed, was interrupted, or it is unusable."""
    if conn := thread.connections.get(state):
        conn.close()


def references(conn: Connection) -> int:
    """How many references to the connection there are. A running statement, a cursor with rows to fetch, and an open
    blob have one, too.
    """
    return sys.getrefcount(conn)


def close_unused() -> None:
    """Close this thread's connections of closed and of dropped `DB`s, unless a caller still has the connection.

    To close a connection in the middle of its statement would crash Python.
    """
    for state in list(thread.connections):  # not of the connections themselves: such a list has references to them
        conn = thread.connections.get(state)  # the garbage collector may have closed it meanwhile
        if conn is not None and not state.is_open and references(conn) <= conn.references:
            conn.close()


@atexit.register
def _close_all() -> None:
    for conn in list(thread.connections.values()):
        conn.close()
