"""The specification's five tests, by name: `python -m pytest -k TestOpen` is its `go test -run TestOpen`."""

import logging
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

import daemon_db
from daemon_db import DB
from support import append_event, insert, insert_run, insert_unit


def count(conn: sqlite3.Connection, table: str) -> int:
    return int(conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


class TestOpen:
    def test_in_memory(self) -> None:
        with DB.open(":memory:") as db:
            assert db.path == ":memory:"
            assert db.conn.execute("SELECT 1").fetchone() == (1,)

    def test_a_new_file(self, tmp_path: Path) -> None:
        with DB.open(tmp_path / "daemon.db") as db:
            assert db.path == str(tmp_path / "daemon.db")
            insert_run(db.conn)
        with DB.open(str(tmp_path / "daemon.db")) as db:
            assert count(db.conn, "runs") == 1

    def test_a_zero_length_file_is_a_new_one(self, tmp_path: Path) -> None:
        (tmp_path / "daemon.db").touch()
        with DB.open(tmp_path / "daemon.db") as db:
            insert_run(db.conn)

    def test_repr_says_path_and_state(self, tmp_path: Path) -> None:
        db = DB.open(tmp_path / "daemon.db")
        assert repr(db) == f"<DB {str(tmp_path / 'daemon.db')!r} open>"
        db.close()
        assert repr(db) == f"<DB {str(tmp_path / 'daemon.db')!r} closed>"

    def test_repr_names_a_subclass(self) -> None:
        class Store(DB):
            pass

        with Store.open(":memory:") as store:
            assert repr(store).endswith("Store ':memory:' open>")

    def test_it_says_what_it_created_or_added(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "daemon_db")
        path = tmp_path / "daemon.db"
        DB.open(path).close()
        assert [record.getMessage() for record in caplog.records] == [f"{path}: created"]
        with closing(sqlite3.connect(path)) as conn:
            conn.executescript("DROP INDEX idx_runs_status; DROP INDEX idx_units_status")
        caplog.clear()
        for _ in range(2):  # an up-to-date file is nothing to tell of
            DB.open(path).close()
        assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
            ("INFO", f"{path}: added idx_runs_status, idx_units_status")
        ]

    def test_each_statement_commits_by_itself(self, tmp_path: Path) -> None:
        with DB.open(tmp_path / "daemon.db") as db:
            insert_run(db.conn)
            assert not db.conn.in_transaction
            with DB.open(tmp_path / "daemon.db") as other:
                assert count(other.conn, "runs") == 1

    def test_on_connect_comes_last(self, tmp_path: Path) -> None:
        seen = []

        def on_connect(conn: sqlite3.Connection) -> None:
            conn.row_factory = sqlite3.Row
            pragmas = [conn.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "foreign_keys")]
            seen.append((*pragmas, conn.execute("PRAGMA busy_timeout").fetchone()[0], count(conn, "runs")))

        with DB.open(tmp_path / "daemon.db", timeout=1.5, on_connect=on_connect) as db:
            assert db.conn.execute("SELECT 1 AS one").fetchone()["one"] == 1
        assert seen == [("wal", 1, 1500, 0)]


class TestOpenWALMode:
    def test_on_and_still_on_after_reopening(self, tmp_path: Path) -> None:
        for _ in range(2):
            with DB.open(tmp_path / "daemon.db") as db:
                assert db.conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        with closing(sqlite3.connect(tmp_path / "daemon.db")) as conn:
            assert conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)

    def test_a_reader_is_not_held_up_by_a_writer(self, tmp_path: Path) -> None:
        with DB.open(tmp_path / "daemon.db", timeout=0) as db, DB.open(tmp_path / "daemon.db", timeout=0) as other:
            with db.transaction() as conn:
                insert_run(conn)
                assert count(other.conn, "runs") == 0
            assert count(other.conn, "runs") == 1


class TestOpenForeignKeys:
    @pytest.mark.parametrize("path", ["daemon.db", ":memory:"])
    def test_on(self, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for _ in range(2):
            with DB.open(path) as db:
                assert db.conn.execute("PRAGMA foreign_keys").fetchone() == (1,)

    @pytest.mark.parametrize("insert", [insert_unit, append_event])
    def test_what_belongs_to_no_run_is_refused(self, insert, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        with DB.open(tmp_path / "daemon.db") as db, pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
            insert(db.conn)

    def test_deleting_a_run_deletes_its_units_and_events_and_no_others(self, tmp_path: Path) -> None:
        with DB.open(tmp_path / "daemon.db") as db:
            for run_id in ("run-1", "run-2"):
                insert_run(db.conn, run_id)
                insert_unit(db.conn, run_id)
                append_event(db.conn, run_id)
            db.conn.execute("DELETE FROM runs WHERE id = 'run-1'")
            assert db.conn.execute("SELECT run_id FROM units").fetchall() == [("run-2",)]
            assert db.conn.execute("SELECT run_id FROM events").fetchall() == [("run-2",)]


def shape(conn: sqlite3.Connection) -> dict[str, list[object]]:
    """The columns, the foreign keys, the indexes and their columns."""
    found: dict[str, list[object]] = {}
    tables = conn.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
    for (table,) in tables.fetchall():
        for pragma in "table_info", "foreign_key_list", "index_list":
            found[f"{pragma}({table})"] = conn.execute(f"PRAGMA {pragma}({table})").fetchall()
        for _, name, *_ in conn.execute(f"PRAGMA index_list({table})").fetchall():
            found[name] = conn.execute(f"PRAGMA index_info({name})").fetchall()
    return found


class TestOpenMigration:
    def test_tables_columns_keys_and_indexes(self, tmp_path: Path) -> None:
        """What SQLite alone makes of `schema.sql`."""
        with DB.open(tmp_path / "daemon.db") as db, closing(sqlite3.connect(":memory:")) as plain:
            plain.executescript(Path(daemon_db.__file__).with_name("schema.sql").read_text(encoding="utf-8"))
            assert shape(db.conn) == shape(plain)

    def test_a_branch_has_one_run_in_a_repository(self, tmp_path: Path) -> None:
        with DB.open(tmp_path / "daemon.db") as db:
            insert_run(db.conn)
            with pytest.raises(sqlite3.IntegrityError, match=r"runs.feature_branch, runs.repo_path"):
                insert(db.conn, "runs", id="run-2", feature_branch="feature/run-1", repo_path="/repo/run-1")
            insert(db.conn, "runs", id="run-2", feature_branch="feature/run-1", repo_path="/elsewhere")

    def test_a_unit_is_in_a_run_once(self, tmp_path: Path) -> None:
        with DB.open(tmp_path / "daemon.db") as db:
            insert_run(db.conn)
            insert_unit(db.conn)
            with pytest.raises(sqlite3.IntegrityError, match=r"units.run_id, units.unit_id"):
                insert(db.conn, "units", id="x", run_id="run-1", unit_id="unit-1")

    def test_a_sequence_number_is_in_a_run_once(self, tmp_path: Path) -> None:
        with DB.open(tmp_path / "daemon.db") as db:
            insert_run(db.conn)
            append_event(db.conn)
            with pytest.raises(sqlite3.IntegrityError, match=r"events.run_id, events.sequence"):
                insert(db.conn, "events", run_id="run-1", sequence=1, event_type="again")

    def test_created_at_is_now_in_utc(self, tmp_path: Path) -> None:
        with DB.open(tmp_path / "daemon.db") as db:
            insert_run(db.conn)
            before = datetime.now(UTC).replace(microsecond=0, tzinfo=None)
            append_event(db.conn)
            (created_at,) = db.conn.execute("SELECT created_at FROM events").fetchone()
            assert before <= datetime.fromisoformat(created_at) <= datetime.now(UTC).replace(tzinfo=None)

    def test_an_event_id_is_never_used_again(self, tmp_path: Path) -> None:
        with DB.open(tmp_path / "daemon.db") as db:
            insert_run(db.conn)
            append_event(db.conn)
            db.conn.execute("DELETE FROM events")
        with DB.open(tmp_path / "daemon.db") as db:
            append_event(db.conn)
            assert db.conn.execute("SELECT id FROM events").fetchall() == [(2,)]

    def test_opening_again_changes_nothing(self, tmp_path: Path) -> None:
        with DB.open(tmp_path / "daemon.db") as db:
            insert_run(db.conn)
            insert_unit(db.conn)
            append_event(db.conn)
        before = (tmp_path / "daemon.db").read_bytes()
        with DB.open(tmp_path / "daemon.db") as db:
            assert [count(db.conn, table) for table in ("runs", "units", "events")] == [1, 1, 1]
        assert (tmp_path / "daemon.db").read_bytes() == before


class TestClose:
    def test_raises_nothing_however_often(self, tmp_path: Path) -> None:
        db = DB.open(tmp_path / "daemon.db")
        db.close()
        db.close()

    @pytest.mark.parametrize("path", ["daemon.db", ":memory:"])
    def test_everything_after_it_raises(self, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        db = DB.open(path)
        conn = db.conn
        db.close()
        closed = "^Cannot operate on a closed database.$"
        with pytest.raises(sqlite3.ProgrammingError, match=closed):
            _ = db.conn
        with pytest.raises(sqlite3.ProgrammingError, match=closed), db.transaction():
            pass
        with pytest.raises(sqlite3.ProgrammingError, match=closed):
            conn.execute("SELECT 1")

    def test_leaving_the_with_block_closes_also_on_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError), DB.open(tmp_path / "daemon.db") as db:
            raise KeyError
        with pytest.raises(sqlite3.ProgrammingError):
            _ = db.conn

    def test_leaves_only_the_file(self, tmp_path: Path) -> None:
        with DB.open(tmp_path / "daemon.db") as db:
            insert_run(db.conn)
            assert len(list(tmp_path.iterdir())) == 3
        assert [path.name for path in tmp_path.iterdir()] == ["daemon.db"]
