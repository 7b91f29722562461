"""A caller's program, for `mypy --strict`: what is right passes, and each misuse is an error.

`warn_unused_ignores` makes it a failure, too, when a misuse is no longer found. test_types.py runs the right half.
"""

import pathlib
import sqlite3
from collections.abc import Iterator
from typing import Self, assert_type

import daemon_db
from daemon_db import DB, OpenError, SchemaError


class Store(DB):
    """Runs, units and events: the next layer, as a subclass."""

    def create_run(self, run_id: str, branch: str) -> None:
        with self.transaction() as conn:
            conn.execute(
                "INSERT INTO runs (id, feature_branch, repo_path, target_branch, tasks_dir, parallelism, status)"
                " VALUES (?, ?, '/repo', 'main', 'tasks', 4, 'running')",
                (run_id, branch),
            )
            self._append(conn, run_id, "run.started")

    def add_unit(self, run_id: str, unit_id: str) -> Self:
        with self.transaction() as conn:
            conn.execute(
                "INSERT INTO units (id, run_id, unit_id, status) VALUES (?, ?, ?, 'pending')",
                (f"{run_id}/{unit_id}", run_id, unit_id),
            )
        return self

    def set_status(self, run_id: str, unit_id: str, status: str) -> int:
        """The sequence number of its event: both are there, or neither."""
        with self.transaction() as conn:
            conn.execute("UPDATE units SET status = ? WHERE run_id = ? AND unit_id = ?", (status, run_id, unit_id))
            return self._append(conn, run_id, f"unit.{status}", unit_id)

    def events(self, run_id: str) -> Iterator[str]:
        query = "SELECT event_type FROM events WHERE run_id = ? ORDER BY sequence"
        for (event_type,) in self.conn.execute(query, (run_id,)).fetchall():
            yield str(event_type)

    @staticmethod
    def _append(conn: sqlite3.Connection, run_id: str, event_type: str, unit_id: str | None = None) -> int:
        select = "SELECT coalesce(max(sequence), 0) + 1 FROM events WHERE run_id = ?"
        sequence = int(conn.execute(select, (run_id,)).fetchone()[0])
        conn.execute(
            "INSERT INTO events (run_id, sequence, event_type, unit_id) VALUES (?, ?, ?, ?)",
            (run_id, sequence, event_type, unit_id),
        )
        return sequence


def configure(conn: sqlite3.Connection) -> None:
    conn.execute("PRAGMA synchronous=OFF")


def right(path: pathlib.Path) -> list[str]:
    with Store.open(path, timeout=1, on_connect=configure) as store:
        assert_type(store, Store)
        assert_type(store.path, str)
        assert_type(store.conn, sqlite3.Connection)
        store.create_run("run-1", "feature/login")
        assert_type(store.add_unit("run-1", "api"), Store)
        assert_type(store.set_status("run-1", "api", "done"), int)
        try:
            with store.transaction() as conn:
                assert_type(conn, sqlite3.Connection)
                conn.execute("DELETE FROM runs")
                raise KeyError
        except KeyError:
            pass
        with DB.open(str(path), read_only=True, on_connect=lambda conn: conn.total_changes) as db:
            assert_type(db, DB)
        assert_type(store.close(), None)
    assert_type(Store.open(":memory:"), Store).close()
    with Store.open(path) as store:
        return list(store.events("run-1"))


def rights_of_errors(error: OpenError, problem: SchemaError) -> str:
    sqlite_error: sqlite3.OperationalError = error
    database_error: sqlite3.DatabaseError = problem
    assert_type(problem.problems, tuple[str, ...])
    return f"{error.path} {error.reason} {problem.path} {daemon_db.__version__} {sqlite_error} {database_error}"


def returns_from_a_transaction(db: DB) -> int:
    """A transaction lets every exception go on: mypy needs no return after it."""
    with db.transaction() as conn:
        return conn.total_changes


def misuse(db: DB, store: Store, error: OpenError) -> None:
    DB("daemon.db")  # type: ignore[arg-type]
    DB()  # a TypeError as it runs, which types can't say
    DB.open()  # type: ignore[call-arg]
    DB.open(b"daemon.db")  # type: ignore[arg-type]
    DB.open(None)  # type: ignore[arg-type]
    DB.open("daemon.db", 5.0)  # type: ignore[call-arg]
    DB.open("daemon.db", timeout="5")  # type: ignore[arg-type]
    DB.open("daemon.db", timeout=None)  # type: ignore[arg-type]
    DB.open("daemon.db", on_connect=lambda: None)  # type: ignore[arg-type, misc]
    DB.open("daemon.db", read_only=None)  # type: ignore[arg-type]
    DB.open("daemon.db", readonly=True)  # type: ignore[call-arg]
    db.conn = sqlite3.connect(":memory:")  # type: ignore[misc]
    db.conn()  # type: ignore[call-arg]
    db.transaction.begin()  # type: ignore[attr-defined]
    db.transaction().execute("SELECT 1")  # type: ignore[attr-defined]
    with db.transaction as conn:  # type: ignore[attr-defined]
        del conn
    db.execute("SELECT 1")  # type: ignore[attr-defined]
    db.close(True)  # type: ignore[call-arg]
    async_db: Store = db  # type: ignore[assignment]
    del async_db
    error.problems  # type: ignore[attr-defined]  # noqa: B018
    store.set_status("run-1", "api")  # type: ignore[call-arg]
    with DB.open("daemon.db") as other:
        other.create_run("run-1", "feature/login")  # type: ignore[attr-defined]
