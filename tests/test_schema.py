"""What a schema comes to when it is opened: created where it is missing, left alone where it is there or is refused."""

import os
import re
import sqlite3
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

import daemon_db
from daemon_db import DB, _connection, _file, _schema
from daemon_db._schema import SQL as SHIPPED
from support import FIRST as SQL
from support import LIMIT, copy, run, use_schema
from test_conflicts import HARMLESS, NOTES, RUNS_UNIQUE, create, files, insert_everywhere, refused, schema

pytestmark = pytest.mark.usefixtures("first_schema")

EMPTY = {
    "no table left": NOTES + "DROP TABLE notes;",
    "only sqlite_sequence": "CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT); DROP TABLE t;",
    "only statistics": NOTES + "INSERT INTO notes VALUES (1, 'a'); ANALYZE; DROP TABLE notes;",
}

TABLES = _schema.tables()
INDEXES = tuple(name for (name, _, _), (what, _) in _schema.expected()[0].items() if what == "index")

MISSING = {
    **{name: (name,) for name in TABLES},
    "two tables": ("runs", "events"),
    **{name: (name,) for name in INDEXES},
    "all indexes": INDEXES,
    "a table and an index of another": ("units", "idx_events_run_id"),
}


@pytest.mark.parametrize("script", EMPTY.values(), ids=EMPTY)
def test_a_database_with_no_table_of_its_own_gets_the_schema(tmp_path: Path, script: str) -> None:
    with DB.open(create(tmp_path / "daemon.db", script)) as db:
        insert_everywhere(db.conn)


def test_tables_and_indexes_are_all_that_the_comparison_knows() -> None:
    """A view or a trigger in `schema.sql` would never be created."""
    with closing(sqlite3.connect(":memory:")) as conn:
        conn.executescript(SHIPPED)
        others = conn.execute("SELECT type, name FROM sqlite_master WHERE type NOT IN ('table', 'index')").fetchall()
    assert others == [], "schema.sql is for tables and indexes"


def without_spaces(sql: str) -> str:
    """And without comments. What is in quotes is kept."""
    return re.sub(r"""('[^']*'|"[^"]*")|--.*|\s+""", lambda found: found[1] or "", sql)


def not_one_column_a_line(script: str) -> list[str]:
    """The tables whose text is anything else than a line for each column, then constraints of the table."""
    with closing(sqlite3.connect(":memory:")) as conn, closing(sqlite3.connect(":memory:")) as empty:
        conn.executescript(script)
        empty.executescript("CREATE TABLE t (x)")

        def is_right(table: str, sql: str) -> bool:
            lines = []
            for _, column, *_ in conn.execute(f'PRAGMA table_xinfo("{table}")').fetchall():
                try:
                    lines.append(_schema._add_column(table, column, sql).partition(" ADD COLUMN ")[2])
                    empty.execute(f"ALTER TABLE t ADD COLUMN {lines[-1]}")
                except AssertionError:
                    return False
                except sqlite3.OperationalError as error:  # a primary key, for one, can't be added, and needn't
                    if "syntax error" in str(error):
                        return False
            whole, head = without_spaces(sql), without_spaces(f"{sql.partition('(')[0]}({', '.join(lines)}")
            rest = re.match(r"\)|,(CONSTRAINT|PRIMARY|UNIQUE|CHECK|FOREIGN)", whole[len(head) :], re.IGNORECASE)
            return whole.startswith(head) and rest is not None

        tables = "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name NOT GLOB 'sqlite_*'"
        return [table for table, sql in conn.execute(tables).fetchall() if not is_right(table, sql)]


def test_schema_sql_has_one_column_a_line() -> None:
    assert not_one_column_a_line(SHIPPED) == [], (
        "write one column a line, all of it, in schema.sql: older files get a new column by the text of its line. "
        "Comments are --, at the line's end or on a line of their own"
    )


COLUMN = "level TEXT DEFAULT 'a, b' CHECK (level <> '')"


@pytest.mark.parametrize(
    ("lines", "is_right"),
    [
        (f"id TEXT,\n{COLUMN}", True),
        (f"id TEXT, -- it's (one, or\n{COLUMN} -- another", True),
        (f"id TEXT,\n-- a line, (of its own\n{COLUMN},\nUNIQUE (id, level)", True),
        (f"{COLUMN},\nid TEXT,\nCHECK (id <> ''),\nFOREIGN KEY (id) REFERENCES t(id)", True),
        (f"id TEXT,\n{COLUMN}, UNIQUE (id, level)", False),
        (f"id TEXT, {COLUMN}", False),
        ("id TEXT,\nlevel TEXT DEFAULT 'a, b'\nCHECK (level <> '')", False),
        ("level TEXT DEFAULT 'a, b'\nCHECK (level <> ''),\nid TEXT", False),
        ("level TEXT CHECK (\nlevel <> ''\n),\nid TEXT", False),
        ("level TEXT -- of events\nCHECK (level <> ''),\nid TEXT", False),
    ],
)
def test_what_is_one_column_a_line(lines: str, is_right: bool) -> None:
    """So that the test above can fail, and does where a new column would lose its CHECK in older files."""
    assert not_one_column_a_line(f"CREATE TABLE IF NOT EXISTS t (\n{lines}\n);") == ([] if is_right else ["t"])


def test_schema_sql_can_be_executed_on_a_database_that_has_it() -> None:
    """By another program, for one. The error names the statement that doesn't say IF NOT EXISTS."""
    with closing(sqlite3.connect(":memory:")) as conn:
        conn.executescript(SHIPPED + SHIPPED)


@pytest.mark.parametrize("names", MISSING.values(), ids=MISSING)
def test_what_is_missing_is_created_and_rows_are_kept(tmp_path: Path, names: tuple[str, ...]) -> None:
    use_schema(SHIPPED)
    path = tmp_path / "daemon.db"
    with DB.open(path) as db:
        insert_everywhere(db.conn)
    with closing(sqlite3.connect(path)) as conn:
        rows = {table: conn.execute(f"SELECT * FROM {table}").fetchall() for table in TABLES}
        for name in names:
            conn.execute(f"DROP {'INDEX' if name in INDEXES else 'TABLE'} {name}")
            rows[name] = []
        problems = [addition.problem for addition in _schema.missing(conn, "a name")]
    for name in names:
        assert f"{name}: missing {'index' if name in INDEXES else 'table'}" in problems
    with DB.open(path) as db:
        assert _schema.missing(db.conn, "a name") == ()
        for table in TABLES:
            assert db.conn.execute(f"SELECT * FROM {table}").fetchall() == rows[table]


def test_a_conflict_in_wal_mode_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path: Path) -> None:
    path = create(tmp_path / "daemon.db", NOTES, "wal")
    before = files(tmp_path)
    refused(path)
    assert (files(tmp_path), os.listdir(tmp_path)) == (before, ["daemon.db"])


@pytest.mark.parametrize("script", [NOTES, schema(runs=(RUNS_UNIQUE, "")) + NOTES], ids=["another's", "conflict"])
@pytest.mark.parametrize("is_link", [False, True], ids=["file", "link"])
@pytest.mark.parametrize("is_interrupted", [False, True])
def test_the_wal_of_a_killed_process_is_not_checkpointed_into_a_refused_file(
    tmp_path: Path, script: str, is_link: bool, is_interrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint would write to the file. Its rows wait in the WAL for the program that it belongs to."""
    directory = tmp_path / "data"
    directory.mkdir()
    live = create(tmp_path / "live.db", script, "wal")
    with closing(sqlite3.connect(live, isolation_level=None)) as conn:
        conn.execute("INSERT INTO notes (text) VALUES ('in the WAL')")
        path = copy(live, directory / "daemon.db")
    before = files(directory)
    assert before["daemon.db-wal"]
    link = tmp_path / "link.db"
    link.symlink_to(path)
    if is_interrupted:  # while it closes: then it closes once more
        size = _file.File.wal_size

        def interrupted(file: _file.File) -> int:
            if sys._getframe(1).f_code.co_name != "_leave":
                return size(file)
            monkeypatch.setattr(_file.File, "wal_size", size)
            raise KeyboardInterrupt

        monkeypatch.setattr(_file.File, "wal_size", interrupted)
        with pytest.raises(KeyboardInterrupt):
            DB.open(link if is_link else path)
    else:
        refused(link if is_link else path)
    assert files(directory) == before
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute("SELECT text FROM notes").fetchall() == [("in the WAL",)]


def test_what_another_connection_changes_meanwhile_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    """At any moment: before each statement, and each pragma that one asks."""
    template = create(tmp_path / "template", HARMLESS["extra column added"], "wal")
    found = []

    def compare_and_change_at(moment: int) -> bool:
        """Whether there is such a moment."""
        path = copy(template, tmp_path / f"{moment}.db")
        statements = []

        def change(statement: str) -> None:
            if len(statements) == moment:
                other.executescript("DROP TABLE events; DROP INDEX idx_runs_status; ALTER TABLE units DROP error;")
            statements.append(statement)

        _schema._complete.clear()
        with closing(sqlite3.connect(path)) as conn, closing(sqlite3.connect(path)) as other:
            conn.set_trace_callback(change)
            found.append(len(_schema.missing(conn, "a name")))
            conn.set_trace_callback(None)
            is_changed = len(statements) > moment
            assert len(_schema.missing(conn, "a name")) == (5 if is_changed else 0)
        return is_changed

    moment = 0
    while compare_and_change_at(moment):
        moment += 1
    assert moment > 10
    assert set(found) == {0, 5}


def test_another_programs_virtual_table_is_not_asked(tmp_path: Path) -> None:
    """To ask for its columns would start the code of its module, or fail where there is no such module."""
    path = create(tmp_path / "daemon.db", SQL)
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.execute("PRAGMA writable_schema=ON")
        sql = "CREATE VIRTUAL TABLE other USING no_such_module(x)"
        conn.execute("INSERT INTO sqlite_master VALUES ('table', 'other', 'other', 0, ?)", (sql,))
    with DB.open(path) as db:
        insert_everywhere(db.conn)


def test_a_schema_is_compared_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a fresh file, what was made of it."""

    def connect_traced(conn: sqlite3.Connection, state: _connection.State) -> None:
        connect(conn, state)
        conn.set_trace_callback(statements.append)

    connect = _connection.Connection.__init__
    monkeypatch.setattr(_connection.Connection, "__init__", connect_traced)
    _schema._complete.clear()
    for script in "", HARMLESS["extra column added"]:
        for comparisons in (1, 0, 0):
            statements: list[str] = []
            DB.open(create(tmp_path / f"{len(os.listdir(tmp_path))}.db", script)).close()
            assert sum("pragma_table_xinfo" in sql.partition("--")[0] for sql in statements) == comparisons


# With "~" for a byte that isn't UTF-8.
LATIN_1 = {
    "a comment in another's table": schema() + NOTES.replace("(id", "(/* caf~ */ id"),
    "another's table's name": schema() + 'CREATE TABLE "caf~" (id);',
    "another's view": schema() + "CREATE VIEW other AS SELECT 'caf~' AS name;",
    "a trigger": schema() + "CREATE TRIGGER other AFTER INSERT ON runs BEGIN SELECT 'caf~'; END;",
    "another index": schema() + "CREATE INDEX \"caf~\" ON runs(repo_path) WHERE status <> 'caf~';",
    "an extra column's name": schema() + 'ALTER TABLE units ADD "caf~" TEXT;',
    "an extra column's default": schema() + "ALTER TABLE events ADD kind TEXT DEFAULT 'caf~';",
    "a comment in our table": schema(runs=("error TEXT", "error /* caf~ */ TEXT"), idx_runs_status=""),
}


@pytest.mark.parametrize("script", LATIN_1.values(), ids=LATIN_1)
def test_text_that_is_not_utf_8(tmp_path: Path, script: str) -> None:
    """It is no obstacle in the schema; what a caller reads is decoded as ever."""
    path = create(tmp_path / "daemon.db", script)
    assert b"caf~" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"caf~", b"caf\xe9"))
    with DB.open(path) as db:
        insert_everywhere(db.conn)
        assert db.conn.execute("SELECT 1 FROM sqlite_master WHERE name = 'idx_runs_status'").fetchall() == [(1,)]
        with pytest.raises(sqlite3.OperationalError, match="decode"):
            db.conn.execute("SELECT CAST(x'e9' AS TEXT)").fetchall()


def test_threads_that_compare_at_once() -> None:
    def compare(number: int) -> int:
        with closing(sqlite3.connect(":memory:")) as conn:
            conn.executescript(SQL + f"ALTER TABLE runs ADD column_{number % 20} TEXT; DROP INDEX idx_runs_status;")
            return len(_schema.missing(conn, "a name"))

    _schema.expected.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(compare, range(160), timeout=LIMIT)) == [1] * 160


def test_from_a_zip_file(tmp_path: Path) -> None:
    package = Path(daemon_db.__file__).parent
    with zipfile.ZipFile(tmp_path / "daemon.zip", "w") as archive:
        for file in package.iterdir():
            if file.is_file():
                archive.write(file, f"daemon_db/{file.name}")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from daemon_db import DB, _schema\n"
        "assert sys.argv[1] in _schema.__file__\n"
        "with DB.open(':memory:') as db:\n"
        "    print(db.conn.execute('SELECT count(*) FROM events').fetchone())"
    )
    assert run(code, tmp_path / "daemon.zip") == "(0,)\n"
