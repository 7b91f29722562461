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

    A connection holds this and not the `DB`: a `DB` that its caller drops must be freed, to say that it was not closed.
    """

    def __init__(self, file: File, timeout: float) -> None:
        self.file = file
        self.timeout = timeout
        self.pid = _process.pid
        self.is_open = True
        self.has_lost_wal = False
        self.turn = threading.RLock()  # it knows its owner, wherever a signal's exception interrupts
        self.guard: Guard | None = None  # none of what is in memory, or in rollback-journal mode

    def refuse_replaced(self) -> None:
        """Raise `OpenError` if the file, or its WAL, was removed or replaced. For before anything is written."""
        self.file.refuse_replaced()
        if self.guard and not self.guard.has_index(self.file):
            self.refuse_lost_wal()

    def refuse_unseen_commit(self) -> None:
        """Raise `OpenError` if nobody sees what was committed, because the file or its WAL was removed or replaced."""
        self.file.refuse_replaced()
        if self.guard and not self.guard.has_wal(self.file):
            self.refuse_lost_wal()

    def refuse_lost_wal(self) -> None:
        """Raise `OpenError` if the WAL was removed or replaced. The `DB` has then come to its end, for all threads."""
        if self.guard and self.guard.is_lost(self.file):
            self.is_open, self.has_lost_wal = False, True
            raise OpenError(self.file.path, WAL_REMOVED)


class Connection(sqlite3.Connection):
    """A thread's connection. Nothing but `close()` frees it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.is_usable = False
        """Not while the connection is being opened, nor once another thread has ended this thread's transaction."""
        self.references = 0
        """How many there are to it while no caller has it."""
        self.connections = thread.connections
        """Those of the thread, of which this is one."""
        self._thread = threading.get_ident()
        _process.open_files[self] = state.file
        try:
            uri = state.file.uri(state.file.mode())
            super().__init__(uri, timeout=state.timeout, isolation_level=None, uri=True)
        except BaseException:
            del _process.open_files[self]
            raise
        self.connections[state] = self  # here: a signal's exception may keep the caller from getting it
        # SQLite holds the function, and the function the connection: a forked child must not free its parent's.
        self.create_function("daemon_db_connection", 0, functools.partial(repr, self))

    def keep_wal(self, likely: list[int]) -> bool:
        """Once it has read through the WAL: keep that there. False if the WAL has been lost since that read."""
        self.state.guard = guard_of(self.state.file)
        return self.state.guard.join(self, self.state.file, likely)

    def close(self) -> None:
        """Roll back what is open, close, and give the turn back. Not for the middle of a statement.

        In another thread, leave that to the connection's own thread; in a forked child, to the parent.
        """
        if self not in _process.open_files:
            return  # it is closed, or a parent's
        if self._thread != threading.get_ident():
            self.is_usable = False  # so that its thread closes it when that thread next uses the `DB`, or ends
            return
        with contextlib.suppress(sqlite3.Error):  # ROLLBACK fails: what remains is to close
            # Else SQLite keeps the transaction's lock as long as a cursor has rows to fetch.
            if self.in_transaction:
                self.execute("ROLLBACK")
        leaves_wal = self.state.file.read_only or not self.is_usable
        with _wal.left_as_it_is(self.state.file) if leaves_wal else contextlib.nullcontext():
            is_closed = self._close()
        if is_closed:
            del _process.open_files[self]
        if self.connections.get(self.state) is self:
            del self.connections[self.state]
        with contextlib.suppress(RuntimeError):  # another thread has the turn, or none has
            self.state.turn.release()

    def _close(self) -> bool:
        """As SQLite does: if it is the last connection to the file, it checkpoints the WAL and removes it.

        Where the WAL was lost, that would write over what others have committed since. Return False if the connection
        stays open, because there is no other way to keep SQLite from doing so.
        """
        guard, file = self.state.guard, self.state.file
        if guard is None:
            super().close()
            return True
        with guard.mutex:
            if guard.has(self) and guard.may_checkpoint(file):
                guard.leave(self)
            elif not guard.is_locked() and not self._forbid_checkpoint() and guard.has(self):
                return False
            else:
                guard.leave_locked(self)
            super().close()
        return True

    def _forbid_checkpoint(self) -> bool:
        if sys.version_info < (3, 12):
            return False
        self.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, True)
        return True


class _End:
    """What a thread drops when it ends. Nobody else holds it; a traceback that is kept may hold the connections."""

    def __init__(self, connections: dict[State, Connection]) -> None:
        self._connections = connections

    # A default, because when the interpreter exits this module's globals go first.
    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # a daemon thread may be in the middle of a statement
            for conn in list(self._connections.values()):
                conn.close()


class _Thread(threading.local):
    def __init__(self) -> None:
        self.connections: dict[State, Connection] = {}
        self._end = _End(self.connections)


thread = _Thread()
"""The calling thread's connections."""


def _forget_inherited() -> None:
    """In a forked child: `DB.conn` finds none of the parent's connections."""
    thread.connections.clear()


os.register_at_fork(after_in_child=_forget_inherited)


def references(conn: Connection) -> int:
    """How many there are to it. A running statement, a cursor with rows to fetch and an open blob have one, too."""
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
