"""Which schemas are refused and which accepted: tables of differences, a row each with the problems that name it.

The differences are edits of the first released schema's text, which is what `schema.sql` is here.
"""

import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from daemon_db import DB, SchemaError
from support import FIRST as SQL
from support import append_event, insert_run, insert_unit, run

pytestmark = pytest.mark.usefixtures("first_schema")

STATEMENTS = {
    re.split(r"[ (]", statement.split("EXISTS ")[1])[0]: statement + ";\n"
    for statement in (" ".join(text.split()) for text in re.sub("--.*", "", SQL).split(";"))
    if statement
}
"""The statements of the schema by the names they create, one line each: not the text that a file normally has."""

NOTES = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT UNIQUE);\n"


def schema(**edits: str | tuple[str, str]) -> str:
    """The schema with some of its statements edited: (old part, new part), or the whole statement, "" for none."""
    statements = dict(STATEMENTS)
    for name, edit in edits.items():
        if isinstance(edit, tuple):
            assert statements[name].count(edit[0]) == 1, f"{edit[0]!r} is not in {name} exactly once"
            edit = statements[name].replace(*edit)
        statements[name] = edit
    return "".join(statements.values())


def autoincrement(replacement: str) -> str:
    return schema(events=("id INTEGER PRIMARY KEY AUTOINCREMENT,", f"id INTEGER PRIMARY KEY{replacement}"))


NO_AUTOINCREMENT = "events.id: INTEGER PRIMARY KEY, should be INTEGER PRIMARY KEY AUTOINCREMENT"
NO_UNITS_KEY = "units: no REFERENCES runs(id) ON UPDATE NO ACTION ON DELETE CASCADE for run_id"
NO_EVENTS_KEY = "events: no REFERENCES runs(id) ON UPDATE NO ACTION ON DELETE CASCADE for run_id"
NO_RUNS_UNIQUE = "runs: no UNIQUE for feature_branch, repo_path"
RUNS_UNIQUE = ", UNIQUE(feature_branch, repo_path)"
UNITS_KEY = "REFERENCES runs(id) ON DELETE CASCADE"

COLUMN_CONFLICTS = {
    "renamed column": (
        schema(events=("payload_json", "payload")),
        "events.payload_json: missing column",
        "events.payload: extra column, where another is missing",
    ),
    "missing column of a table with an extra one": (
        schema(units=("branch TEXT, worktree_path TEXT", '"work tree" TEXT DEFAULT 0, head TEXT')),
        "units.branch: missing column",
        "units.worktree_path: missing column",
        "units.head: extra column, where another is missing",
        "units.work tree: extra column, where another is missing",
    ),
    "renamed column that must have a value": (
        schema(runs=("target_branch", "target")),
        "runs.target_branch: missing column",
        "runs.target: extra column, NOT NULL without a default, where another is missing",
    ),
    "another type": (
        schema(runs=("parallelism INTEGER", "parallelism TEXT")),
        "runs.parallelism: TEXT NOT NULL, should be INTEGER NOT NULL",
    ),
    "no type": (schema(runs=(" error TEXT,", " error,")), "runs.error: no type, should be TEXT"),
    "NOT NULL added": (
        schema(units=("branch TEXT", "branch TEXT NOT NULL")),
        "units.branch: TEXT NOT NULL, should be TEXT",
    ),
    "NOT NULL removed": (
        schema(runs=("target_branch TEXT NOT NULL", "target_branch TEXT")),
        "runs.target_branch: TEXT, should be TEXT NOT NULL",
    ),
    "default removed": (
        schema(events=(" DEFAULT CURRENT_TIMESTAMP", "")),
        "events.created_at: DATETIME, should be DATETIME DEFAULT CURRENT_TIMESTAMP",
    ),
    "another default": (
        schema(events=("DEFAULT CURRENT_TIMESTAMP", "DEFAULT CURRENT_DATE")),
        "events.created_at: DATETIME DEFAULT CURRENT_DATE, should be DATETIME DEFAULT CURRENT_TIMESTAMP",
    ),
    "a string for a default": (
        schema(events=("DEFAULT CURRENT_TIMESTAMP", "DEFAULT 'CURRENT_TIMESTAMP'")),
        "events.created_at: DATETIME DEFAULT 'CURRENT_TIMESTAMP', should be DATETIME DEFAULT CURRENT_TIMESTAMP",
    ),
    "a string in double quotes for a default": (
        schema(events=("DEFAULT CURRENT_TIMESTAMP", 'DEFAULT "CURRENT_TIMESTAMP"')),
        'events.created_at: DATETIME DEFAULT "CURRENT_TIMESTAMP", should be DATETIME DEFAULT CURRENT_TIMESTAMP',
    ),
    "default added": (
        schema(runs=("config_json TEXT", "config_json TEXT DEFAULT 'none'")),
        "runs.config_json: TEXT DEFAULT 'none', should be TEXT",
    ),
    "primary key removed": (
        schema(runs=("id TEXT PRIMARY KEY", "id TEXT")),
        "runs.id: TEXT, should be TEXT PRIMARY KEY",
        "runs: no UNIQUE for id",
    ),
    "primary key only unique": (
        schema(runs=("id TEXT PRIMARY KEY", "id TEXT UNIQUE")),
        "runs.id: TEXT, should be TEXT PRIMARY KEY",
    ),
    "rowid not an alias": (
        schema(events=("id INTEGER PRIMARY KEY AUTOINCREMENT", "id INTEGER")),
        "events.id: INTEGER, should be INTEGER PRIMARY KEY AUTOINCREMENT",
    ),
    "primary key of two columns": (
        schema(units=(" PRIMARY KEY", ""), runs=(" PRIMARY KEY", "")).replace(
            "UNIQUE(run_id, unit_id)", "PRIMARY KEY(id, unit_id), UNIQUE(run_id, unit_id)"
        ),
        "runs.id: TEXT, should be TEXT PRIMARY KEY",
        "runs: no UNIQUE for id",
        "units.unit_id: TEXT PRIMARY KEY NOT NULL, should be TEXT NOT NULL",
        "units: no UNIQUE for id",
        "units: extra UNIQUE for id, unit_id",
    ),
    "primary key of ours and an extra column": (
        schema(runs=(" PRIMARY KEY", "")).replace(RUNS_UNIQUE, f", shard TEXT, PRIMARY KEY(id, shard){RUNS_UNIQUE}"),
        "runs: no UNIQUE for id",
        "runs: extra UNIQUE for id, shard",
    ),
    "generated column": (
        schema(runs=("config_json TEXT", "config_json TEXT AS (status)")),
        "runs.config_json: TEXT GENERATED, should be TEXT",
    ),
    "stored generated column": (
        schema(units=("error TEXT", "error TEXT AS (status) STORED")),
        "units.error: TEXT GENERATED, should be TEXT",
    ),
    "a line's end in a default and in a name": (
        schema(events=("CURRENT_TIMESTAMP", "(strftime('%s',\n'now'))"), units=("branch TEXT", '"a\nb" NOT NULL')),
        "events.created_at: DATETIME DEFAULT strftime('%s', 'now'), should be DATETIME DEFAULT CURRENT_TIMESTAMP",
        "units.branch: missing column",
        "units.a b: extra column, NOT NULL without a default, where another is missing",
    ),
    "WITHOUT ROWID": (
        schema(runs=(");", ") WITHOUT ROWID;")),
        "runs.id: TEXT PRIMARY KEY NOT NULL, should be TEXT PRIMARY KEY",
    ),
    "AUTOINCREMENT missing": (autoincrement(","), NO_AUTOINCREMENT),
}

CONSTRAINT_CONFLICTS = {
    "no foreign key": (schema(events=(f" {UNITS_KEY}", "")), NO_EVENTS_KEY),
    "foreign key without an action": (
        schema(units=(UNITS_KEY, "REFERENCES runs(id)")),
        NO_UNITS_KEY,
        "units: extra REFERENCES runs(id) ON UPDATE NO ACTION ON DELETE NO ACTION for run_id",
    ),
    "foreign key with another action": (
        schema(units=("ON DELETE CASCADE", "ON DELETE SET NULL")),
        NO_UNITS_KEY,
        "units: extra REFERENCES runs(id) ON UPDATE NO ACTION ON DELETE SET NULL for run_id",
    ),
    "foreign key with an action too many": (
        schema(events=(UNITS_KEY, f"{UNITS_KEY} ON UPDATE CASCADE")),
        NO_EVENTS_KEY,
        "events: extra REFERENCES runs(id) ON UPDATE CASCADE ON DELETE CASCADE for run_id",
    ),
    "foreign key to another table": (
        schema(events=("REFERENCES runs(id)", "REFERENCES units(id)")),
        NO_EVENTS_KEY,
        "events: extra REFERENCES units(id) ON UPDATE NO ACTION ON DELETE CASCADE for run_id",
    ),
    "foreign key to another column": (
        schema(units=("REFERENCES runs(id)", "REFERENCES runs(tasks_dir)")),
        NO_UNITS_KEY,
        "units: extra REFERENCES runs(tasks_dir) ON UPDATE NO ACTION ON DELETE CASCADE for run_id",
    ),
    "foreign key to a table without a primary key": (
        NOTES.replace(" PRIMARY KEY", "") + schema(units=("REFERENCES runs(id)", "REFERENCES notes")),
        NO_UNITS_KEY,
        "units: extra REFERENCES notes() ON UPDATE NO ACTION ON DELETE CASCADE for run_id",
    ),
    "foreign key from another column": (
        schema(events=("unit_id TEXT", f"unit_id TEXT {UNITS_KEY}")).replace(
            f"run_id TEXT NOT NULL {UNITS_KEY}, sequence", "run_id TEXT NOT NULL, sequence"
        ),
        NO_EVENTS_KEY,
        "events: extra REFERENCES runs(id) ON UPDATE NO ACTION ON DELETE CASCADE for unit_id",
    ),
    "extra foreign key on our column": (
        schema(events=("unit_id TEXT", "unit_id TEXT REFERENCES units(id)")),
        "events: extra REFERENCES units(id) ON UPDATE NO ACTION ON DELETE NO ACTION for unit_id",
    ),
    "extra foreign key on an extra column with a default": (
        schema(units=("error TEXT", "error TEXT, kind TEXT DEFAULT 'x' REFERENCES runs(id)")),
        "units: extra REFERENCES runs(id) ON UPDATE NO ACTION ON DELETE NO ACTION for kind",
    ),
    "extra foreign key on a column with a name like two": (
        schema(units=("error TEXT", "error TEXT, 'status, branch' TEXT DEFAULT 'x' REFERENCES runs(id)")),
        "units: extra REFERENCES runs(id) ON UPDATE NO ACTION ON DELETE NO ACTION for status, branch",
    ),
    "extra foreign key of two of our columns": (
        NOTES + schema(events=(");", ", FOREIGN KEY(unit_id, event_type) REFERENCES notes(id, text));")),
        "events: extra REFERENCES notes(id) ON UPDATE NO ACTION ON DELETE NO ACTION for unit_id",
        "events: extra REFERENCES notes(text) ON UPDATE NO ACTION ON DELETE NO ACTION as column 2 for event_type",
    ),
    "extra foreign key of our and an extra nullable column": (
        schema(units=("error TEXT,", "error TEXT, repo TEXT,")).replace(
            "UNIQUE(run_id, unit_id)",
            "UNIQUE(run_id, unit_id), FOREIGN KEY(branch, repo) REFERENCES runs(feature_branch, repo_path)",
        ),
        "units: extra REFERENCES runs(feature_branch) ON UPDATE NO ACTION ON DELETE NO ACTION for branch",
    ),
    "unique constraint an index": (
        schema(runs=(RUNS_UNIQUE, "")) + "CREATE UNIQUE INDEX branches ON runs(feature_branch, repo_path);",
        NO_RUNS_UNIQUE,
    ),
    "no unique constraint": (schema(runs=(RUNS_UNIQUE, "")), NO_RUNS_UNIQUE),
    "unique constraint a plain index": (
        schema(runs=(RUNS_UNIQUE, "")) + "CREATE INDEX plain ON runs(feature_branch, repo_path);",
        NO_RUNS_UNIQUE,
    ),
    "unique constraint with another collation": (
        schema(runs=(RUNS_UNIQUE, ""))
        + "CREATE UNIQUE INDEX nocase ON runs(feature_branch COLLATE nocase, repo_path);",
        NO_RUNS_UNIQUE,
    ),
    "primary key with another collation": (
        schema(runs=("PRIMARY KEY", "PRIMARY KEY COLLATE NOCASE")),
        "runs: no UNIQUE for id",
        "runs: extra UNIQUE for id COLLATE NOCASE",
    ),
    "unique constraint partial": (
        schema(runs=(RUNS_UNIQUE, ""))
        + "CREATE UNIQUE INDEX part ON runs(feature_branch, repo_path) WHERE status = 'running';",
        NO_RUNS_UNIQUE,
    ),
    "unique constraint narrower": (
        schema(units=("UNIQUE(run_id, unit_id)", "UNIQUE(unit_id)")),
        "units: no UNIQUE for run_id, unit_id",
        "units: extra UNIQUE for unit_id",
    ),
    "unique constraint wider": (
        schema(events=("UNIQUE(run_id, sequence)", "UNIQUE(run_id, sequence, unit_id)")),
        "events: no UNIQUE for run_id, sequence",
        "events: extra UNIQUE for run_id, sequence, unit_id",
    ),
    "unique constraint wider by an extra column": (
        schema(events=("UNIQUE(run_id, sequence)", "shard TEXT, UNIQUE(run_id, sequence, shard)")),
        "events: no UNIQUE for run_id, sequence",
        "events: extra UNIQUE for run_id, sequence, shard",
    ),
    "extra unique constraint on our column": (
        schema(runs=("tasks_dir TEXT NOT NULL", "tasks_dir TEXT NOT NULL UNIQUE")),
        "runs: extra UNIQUE for tasks_dir",
    ),
    # Refused, though it refuses no row that this version writes: that isn't seen.
    "extra unique constraint on our and an extra nullable column": (
        schema(runs=(RUNS_UNIQUE, f", shard TEXT{RUNS_UNIQUE}, UNIQUE(tasks_dir, shard)")),
        "runs: extra UNIQUE for shard, tasks_dir",
    ),
    "extra column NOT NULL without a default": (
        schema(runs=("config_json TEXT", "config_json TEXT, daemon_version TEXT NOT NULL")),
        "runs.daemon_version: extra column, NOT NULL without a default",
    ),
    "extra column NOT NULL with a name in quotes": (
        schema(runs=("config_json TEXT", 'config_json TEXT, "daemon ""version""" TEXT NOT NULL')),
        'runs.daemon "version": extra column, NOT NULL without a default',
    ),
    "extra column NOT NULL DEFAULT NULL": (
        schema(units=("error TEXT", "error TEXT, kind TEXT NOT NULL DEFAULT Null")),
        "units.kind: extra column, NOT NULL without a default",
    ),
}

OBJECT_CONFLICTS = {
    "view for a table": (
        schema(units="CREATE VIEW units AS SELECT id FROM runs;\n", idx_units_run_id="", idx_units_status=""),
        "units: view, should be table",
    ),
    "index for a table": (
        schema(units="CREATE INDEX units ON runs(tasks_dir);\n", idx_units_run_id="", idx_units_status=""),
        "units: index on runs(tasks_dir), should be table",
    ),
    "table for an index": (
        schema(idx_runs_status="CREATE TABLE idx_runs_status (status TEXT);"),
        "idx_runs_status: table, should be index on runs(status)",
    ),
    "view for an index": (
        schema(idx_runs_status="CREATE VIEW IDX_RUNS_STATUS AS SELECT status FROM runs;"),
        "idx_runs_status: view, should be index on runs(status)",
    ),
    "index on another of our tables": (
        schema(idx_units_status="CREATE INDEX idx_units_status ON runs(status);"),
        "idx_units_status: index on runs(status), should be index on units(status)",
    ),
    "index on another table": (
        NOTES + schema(idx_runs_status="CREATE INDEX idx_runs_status ON Notes(text);"),
        "idx_runs_status: index on notes(text), should be index on runs(status)",
    ),
    "renamed table": (
        schema() + "ALTER TABLE units RENAME TO unit;",
        "idx_units_run_id: index on unit(run_id), should be index on units(run_id)",
        "idx_units_status: index on unit(status), should be index on units(status)",
    ),
    "index on another column": (
        schema(idx_runs_status=("runs(status)", "runs(started_at)")),
        "idx_runs_status: index on runs(started_at), should be index on runs(status)",
    ),
    "index on a column more": (
        schema(idx_units_run_id=("(run_id)", "(run_id, branch)")),
        "idx_units_run_id: index on units(run_id, branch), should be index on units(run_id)",
    ),
    "index with its columns in another order": (
        schema(idx_events_sequence=("(run_id, sequence)", "(sequence, run_id)")),
        "idx_events_sequence: index on events(sequence, run_id), should be index on events(run_id, sequence)",
    ),
    "index on an expression": (
        schema(idx_runs_status=("(status)", "(lower(status))")),
        "idx_runs_status: index on runs(<expression>), should be index on runs(status)",
    ),
    "index descending": (
        schema(idx_events_sequence=("sequence)", "sequence DESC)")),
        "idx_events_sequence: index on events(run_id, sequence DESC), should be index on events(run_id, sequence)",
    ),
    "index with another collation": (
        schema(idx_units_status=("(status)", "(status COLLATE rtrim)")),
        "idx_units_status: index on units(status COLLATE RTRIM), should be index on units(status)",
    ),
    "index partial": (
        schema(idx_units_status=(";", " WHERE status <> 'done';")),
        "idx_units_status: index on units(status) WHERE ..., should be index on units(status)",
    ),
    "index unique": (
        schema(idx_runs_status=("CREATE INDEX", "CREATE UNIQUE INDEX")),
        "idx_runs_status: index on runs(status) UNIQUE, should be index on runs(status)",
    ),
    "index unique over an existing constraint": (
        schema(idx_events_sequence=("CREATE INDEX", "CREATE UNIQUE INDEX")),
        "idx_events_sequence: index on events(run_id, sequence) UNIQUE, should be index on events(run_id, sequence)",
    ),
    "another program's database": (
        NOTES + 'CREATE TABLE "Old Notes" (id); CREATE VIEW zero AS SELECT 0; CREATE INDEX a ON notes(text);',
        "no table runs, units, events, but notes, old notes, zero: the database of another program",
    ),
    "another program's database with a view of ours": (
        NOTES + "CREATE VIEW runs AS SELECT id FROM notes;",
        "no table runs, units, events, but notes, runs: the database of another program",
    ),
    "another program's table of the same name": (
        NOTES + "CREATE TABLE units (id INTEGER PRIMARY KEY, run_id, unit_id, status, label TEXT NOT NULL UNIQUE);",
        "units.id: INTEGER PRIMARY KEY, should be TEXT PRIMARY KEY",
        "units.run_id: no type, should be TEXT NOT NULL",
        "units.unit_id: no type, should be TEXT NOT NULL",
        "units.status: no type, should be TEXT NOT NULL",
        *(f"units.{name}: missing column" for name in "branch worktree_path started_at completed_at error".split()),
        "units.label: extra column, NOT NULL without a default, where another is missing",
        NO_UNITS_KEY,
        "units: no UNIQUE for id",
        "units: no UNIQUE for run_id, unit_id",
        "units: extra UNIQUE for label",
    ),
    "several problems at once": (
        schema(
            runs=("config_json TEXT", "config_json BLOB, host TEXT NOT NULL, daemon_version TEXT NOT NULL"),
            units=(UNITS_KEY, "UNIQUE"),
            idx_units_status=("(status)", "(status DESC)"),
            idx_runs_status="CREATE VIEW idx_runs_status AS SELECT 1;\n",
            events=("sequence INTEGER", "sequence TEXT"),
        ),
        "idx_runs_status: view, should be index on runs(status)",
        "events.sequence: TEXT NOT NULL, should be INTEGER NOT NULL",
        "runs.config_json: BLOB, should be TEXT",
        "runs.daemon_version: extra column, NOT NULL without a default",
        "runs.host: extra column, NOT NULL without a default",
        NO_UNITS_KEY,
        "units: extra UNIQUE for run_id",
        "idx_units_status: index on units(status DESC), should be index on units(status)",
    ),
}

CONFLICTS = COLUMN_CONFLICTS | CONSTRAINT_CONFLICTS | OBJECT_CONFLICTS

HARMLESS = {
    "the same text": SQL,
    "other spaces": schema(),
    "comments": schema(runs=("error TEXT,", "error /* of the run */ TEXT, -- or none\n"), events=(");", "/* end */);")),
    "lower case": schema().lower(),
    "upper case": schema().upper(),
    "names in double quotes": re.sub(r"\b(id|runs|run_id|status|idx_runs_status)\b", r'"\1"', schema()),
    "names in brackets": re.sub(r"\b(id|units|unit_id|sequence|error)\b", r"[\1]", schema()),
    "names in backquotes": re.sub(r"\b(id|events|event_type|idx_events_run_id)\b", r"`\1`", schema()),
    "foreign key without a column": schema(units=("runs(id)", "runs"), events=("runs(id)", "Runs")),
    "foreign key of the table": schema(units=(f" {UNITS_KEY}", "")).replace(
        "UNIQUE(run_id, unit_id)", f"UNIQUE(run_id, unit_id), FOREIGN KEY (run_id) {UNITS_KEY}"
    ),
    "unique constraint in another order": schema(runs=(RUNS_UNIQUE, ", UNIQUE(repo_path, feature_branch)")),
    "unique constraint descending": schema(runs=(RUNS_UNIQUE, ", UNIQUE(feature_branch DESC, repo_path)")),
    "unique constraint twice": SQL + "CREATE UNIQUE INDEX again ON runs(repo_path, feature_branch);",
    "primary key of the table": schema(runs=(" PRIMARY KEY", "")).replace(
        RUNS_UNIQUE, f", CONSTRAINT pk PRIMARY KEY (id){RUNS_UNIQUE}"
    ),
    "AUTOINCREMENT of the table": schema(events=(" PRIMARY KEY AUTOINCREMENT", "")).replace(
        "UNIQUE(run_id, sequence)", "PRIMARY KEY(id AUTOINCREMENT), UNIQUE(run_id, sequence)"
    ),
    "AUTOINCREMENT between comments": schema(events=("AUTOINCREMENT", "/* ' */ AutoIncrement -- '\n")),
    "default in parentheses": schema(events=("CURRENT_TIMESTAMP", "( current_timestamp )")),
    "default NULL": schema(runs=("error TEXT", "error TEXT DEFAULT NULL"), units=("branch TEXT", "branch TEXT NULL")),
    "columns in another order": schema(runs=("parallelism INTEGER NOT NULL, ", "")).replace(
        "id TEXT PRIMARY KEY, feature", "parallelism INTEGER NOT NULL, id TEXT PRIMARY KEY, feature"
    ),
    "extra column": schema(runs=("error TEXT,", "error TEXT, host TEXT,"), events=("unit_id TEXT", "unit_id TEXT, n")),
    "extra column added": SQL + "ALTER TABLE runs ADD COLUMN daemon_version TEXT;",
    "extra column with a default": SQL + "ALTER TABLE events ADD COLUMN level INTEGER DEFAULT 0;",
    "extra column NOT NULL with a default": SQL + "ALTER TABLE units ADD COLUMN kind TEXT NOT NULL DEFAULT '';",
    "extra column NOT NULL with an expression": schema(
        units=("error TEXT", "error TEXT, at TEXT NOT NULL DEFAULT (datetime('now'))")
    ),
    "NOT NULL on the rowid": schema(events=("INTEGER PRIMARY KEY", "INTEGER NOT NULL PRIMARY KEY")),
    "extra column generated, NOT NULL": schema(
        units=("error TEXT", "error TEXT, kind TEXT NOT NULL AS (status || id)")
    ),
    "extra column generated": SQL + "ALTER TABLE runs ADD COLUMN name TEXT AS (repo_path || feature_branch);",
    "extra unique constraint on an extra nullable column": schema(
        runs=("error TEXT,", "error TEXT, ticket TEXT UNIQUE, review TEXT DEFAULT NULL UNIQUE,")
    ),
    "extra unique index on our and an extra nullable column": SQL
    + "ALTER TABLE runs ADD ticket TEXT; CREATE UNIQUE INDEX tickets ON runs(tasks_dir, ticket);",
    "extra foreign key on an extra nullable column": schema(
        runs=("error TEXT,", "error TEXT, parent TEXT REFERENCES runs(id),")
    ),
    "AUTOINCREMENT in a comment": autoincrement(" /* not\nAUTOINCREMENT */,"),
    "AUTOINCREMENT a name": autoincrement(', "autoincrement" TEXT,'),
    "extra unique index on an expression": SQL + "CREATE UNIQUE INDEX lowered ON runs(lower(repo_path));",
    "extra unique index on an extra column with a default": SQL
    + "ALTER TABLE runs ADD kind TEXT DEFAULT 'x'; CREATE UNIQUE INDEX kinds ON runs(kind);",
    "extra unique index on an expression of an extra nullable column": SQL
    + "ALTER TABLE runs ADD kind TEXT; CREATE UNIQUE INDEX kinds ON runs(coalesce(kind, 'x'));",
    "extra unique index on an expression, beside a column of that name": SQL
    + 'ALTER TABLE runs ADD "<expression>" TEXT; CREATE UNIQUE INDEX lowered ON runs(lower(repo_path));',
    "extra unique index on an extra generated column": SQL
    + "ALTER TABLE runs ADD kind TEXT AS (lower(repo_path)); CREATE UNIQUE INDEX kinds ON runs(kind);",
    "unique column with a name like two": schema(runs=(RUNS_UNIQUE, ', "feature_branch, repo_path" TEXT UNIQUE')),
    "other tables": f"{SQL} {NOTES} CREATE TABLE tags (run_id REFERENCES runs(id), tag PRIMARY KEY) WITHOUT ROWID;",
    "other views": SQL + "CREATE VIEW running AS SELECT * FROM runs; CREATE VIEW dangling AS SELECT * FROM gone;",
    "other triggers": SQL
    + "CREATE TRIGGER runs AFTER INSERT ON runs BEGIN UPDATE runs SET error = NULL WHERE id = new.id; END;",
    "what pragmas don't show": schema(
        runs=("status TEXT NOT NULL", "status TEXT NOT NULL CHECK (length(status))"),
        units=("branch TEXT", "branch TEXT COLLATE NOCASE"),
        events=(UNITS_KEY, f"{UNITS_KEY} DEFERRABLE INITIALLY DEFERRED"),
    ),
    "statistics": SQL + "ANALYZE;",
    "another encoding": f"PRAGMA encoding = 'UTF-16'; {SQL}",
    "other settings of the file": f"PRAGMA page_size = 512; PRAGMA auto_vacuum = FULL; {SQL} PRAGMA user_version = 7;"
    "PRAGMA application_id = 7;",
}


UNKNOWN = {
    "function": (schema(units=("error TEXT", "error TEXT CHECK (known(error))")), "unknown function: known"),
    "collation": (SQL + "CREATE INDEX words ON runs(repo_path COLLATE words);", "no such collation sequence: words"),
}


@pytest.mark.parametrize(("script", "words"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_sqlite_does_not_have_is_said_by_the_insert_that_needs_it(script: str, words: str, tmp_path: Path) -> None:
    """And an `on_connect` can give it to each connection."""
    path = create(tmp_path / "daemon.db", script)
    with DB.open(path) as db, pytest.raises(sqlite3.OperationalError, match=words):
        insert_everywhere(db.conn)
    with DB.open(path, on_connect=with_a_function_and_a_collation) as db:
        insert_everywhere(db.conn, "run-3")


def with_a_function_and_a_collation(conn: sqlite3.Connection) -> None:
    conn.create_function("known", 1, lambda _: 1, deterministic=True)
    conn.create_collation("words", lambda a, b: (a > b) - (a < b))


def create(path: Path, script: str, journal_mode: str = "delete") -> Path:
    with closing(sqlite3.connect(path)) as conn:
        with_a_function_and_a_collation(conn)
        conn.execute("PRAGMA synchronous=OFF")
        conn.executescript(script)
        assert conn.execute(f"PRAGMA journal_mode={journal_mode}").fetchone() == (journal_mode,)
    return path


def files(directory: Path) -> dict[str, bytes]:
    """All that is in the directory, byte for byte, but for the WAL index, which SQLite may rebuild at any time."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.endswith("-shm")}


def insert_everywhere(conn: sqlite3.Connection, run_id: str = "run-2") -> None:
    insert_run(conn, run_id)
    insert_unit(conn, run_id, "u")
    assert append_event(conn, run_id) == 1


def refused(path: Path) -> SchemaError:
    with pytest.raises(SchemaError) as caught:
        DB.open(path)
    return caught.value


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_a_conflict_is_named_and_the_file_left_as_it_was(tmp_path: Path, conflict: str) -> None:
    script, *problems = CONFLICTS[conflict]
    path = create(tmp_path / "daemon.db", script)
    before = files(tmp_path)
    error = refused(path)
    said = [problem.split(". ")[0] for problem in error.problems]  # without what some of them say to do
    assert sorted(said) == sorted(problems)
    first, *rest = str(error).splitlines()
    assert first.startswith(f"{path}: the schema does not fit")
    assert rest == [*error.problems]
    assert error.path == str(path)
    assert (files(tmp_path), os.listdir(tmp_path)) == (before, ["daemon.db"])


@pytest.mark.parametrize("script", HARMLESS.values(), ids=HARMLESS)
def test_a_harmless_difference_is_accepted(tmp_path: Path, script: str) -> None:
    """And opening it again changes no byte."""
    path = create(tmp_path / "daemon.db", script)
    with DB.open(path) as db:
        with db.transaction() as conn:
            insert_everywhere(conn)
        assert db.conn.execute("SELECT parallelism, error FROM runs").fetchall() == [(4, None)]
        assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    before = files(tmp_path)
    DB.open(path).close()
    assert (files(tmp_path), os.listdir(tmp_path)) == (before, ["daemon.db"])


COMMAND = """
import sys
from daemon_db.__main__ import main
from support import FIRST, use_schema
use_schema(FIRST)
sys.exit(main())
"""


@pytest.mark.parametrize("is_complete", [True, False])
def test_an_index_of_a_users_own_is_let_in_from_each_mode(is_complete: bool, tmp_path: Path) -> None:
    """Made while a daemon runs, it keeps neither that one from going on, nor any from starting, and it is obeyed."""
    path, backup = tmp_path / "daemon.db", tmp_path / "backup.db"
    with DB.open(path) as daemon:
        insert_everywhere(daemon.conn)
        daemon.conn.executescript(
            "CREATE UNIQUE INDEX one_running ON runs(repo_path) WHERE status = 'running';"
            "CREATE UNIQUE INDEX one_each ON events(run_id, event_type);"
            "CREATE UNIQUE INDEX lowered ON runs(lower(repo_path));"
            "CREATE INDEX a ON runs(repo_path);"
            "CREATE INDEX b ON units(lower(status)) WHERE branch NOT NULL;"
            "CREATE INDEX c ON events(created_at DESC, event_type COLLATE NOCASE);"
        )
        if not is_complete:
            daemon.conn.execute("DROP INDEX idx_units_status")
        run(COMMAND, path, "--check")
        run(COMMAND, path, "--backup", backup)
        with daemon.transaction() as conn:
            insert_everywhere(conn, "run-3")
    for file in path, backup:  # the backup is in rollback-journal mode
        run(COMMAND, file, "--check")
        if is_complete:
            DB.open(file, read_only=True).close()
        for options in {"create": False}, {}, {"read_only": True}:
            with DB.open(file, **options) as db:
                own = "'one_running', 'one_each', 'lowered', 'a', 'b', 'c'"
                query = f"SELECT count(*) FROM sqlite_master WHERE name IN ({own}, 'idx_units_status')"
                assert db.conn.execute(query).fetchone() == (7,)
    with DB.open(path) as db:
        with pytest.raises(sqlite3.IntegrityError, match="runs.repo_path|lowered"):
            db.conn.execute("UPDATE runs SET repo_path = 'the same'")
        with pytest.raises(sqlite3.IntegrityError, match="events.run_id, events.event_type"):
            append_event(db.conn, "run-2")
