"""Older files brought up to date: what is added, what is refused before the first write, versions mixed, kills.

An older version's file is made of the first released schema, and the newer version's schema is the same text edited: in
this process, or in others by a copy of the package. At the end of the file: `schema.sql` as it is.
"""

import functools
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

import daemon_db
from daemon_db import DB, OpenError, SchemaError, _schema
from daemon_db._schema import SQL as SHIPPED
from support import (
    ENVIRONMENT,
    LIMIT,
    bytes_of,
    copy,
    end,
    insert_run,
    insertion,
    kill_at_random,
    no_sync,
    opened_and_killed,
    rounds,
    run,
    start,
    use_schema,
)
from support import FIRST as SQL
from test_conflicts import HARMLESS, RUNS_UNIQUE, create, files, insert_everywhere, refused, schema
from test_processes import OPEN_IN_A_LOOP

pytestmark = pytest.mark.usefixtures("first_schema")

SCHEMAS = Path(__file__).with_name("schemas")


def with_column(text: str) -> str:
    """`schema.sql` with a column more, in the middle of `events`, on a line of its own."""
    return schema(events=("unit_id TEXT,", f"unit_id TEXT,\n{text},\n"))


def older_file(path: Path, script: str = SQL, journal_mode: str = "delete") -> Path:
    """An older version's file, with rows in it."""
    path.write_bytes(_older_bytes(script, journal_mode))
    return path


@functools.cache
def _older_bytes(script: str, journal_mode: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = create(Path(directory, "older.db"), script, journal_mode)
        with closing(sqlite3.connect(path, isolation_level=None)) as conn:
            no_sync(conn)
            insert_everywhere(conn, "old-1")
            insert_everywhere(conn, "old-2")
        assert os.listdir(directory) == ["older.db"]
        return path.read_bytes()


@functools.cache
def columns(script: str) -> dict[str, list[str]]:
    """Of each table."""
    with closing(sqlite3.connect(":memory:")) as conn:
        conn.executescript(script)
        tables = conn.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT GLOB 'sqlite_*'")
        return {
            table: [name.lower() for _, name, *_ in conn.execute(f"PRAGMA table_info({table})")]
            for (table,) in tables.fetchall()
        }


def rows(conn: sqlite3.Connection, script: str = SQL) -> list[list[Any]]:
    """The rows of all tables, in the columns of the schema as first released, or of another."""
    selected = {table: ", ".join(f'"{name}"' for name in names) for table, names in columns(script).items()}
    return [conn.execute(f"SELECT {names} FROM {table} ORDER BY 1").fetchall() for table, names in selected.items()]


def contents(path: Path) -> list[Any]:
    """The schema, and the rows."""
    with closing(sqlite3.connect(path)) as conn:
        return [catalogue(path), *rows(conn)]


def catalogue(path: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(path)) as conn:
        return conn.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()


# What is added


COLUMNS = {
    "nullable": ("level TEXT", None),
    "no type": ("level", None),
    "default": ("level INTEGER DEFAULT 3", 3),
    "NOT NULL with a default": ("level TEXT NOT NULL DEFAULT 'low'", "low"),
    "NOT NULL with a negative default": ("level INTEGER NOT NULL DEFAULT (-3)", -3),
    "default of many signs": ("level TEXT DEFAULT 'a,  b) -- /* \"''' /* , ( */", "a,  b) -- /* \"'"),
    "blob for a default": ("level BLOB DEFAULT x'00ff'", b"\0\xff"),
    "keyword for a name": ("\"order\" TEXT DEFAULT 'x'", "x"),
    "name with a comma": ('"a, b(" TEXT', None),
    "name in brackets": ("[a, ' b] TEXT", None),
    "name in backquotes": ("`a) b` TEXT", None),
    "name beyond ASCII": ("größe TEXT", None),
    "upper case": ("LEVEL TEXT DEFAULT 'X'", "X"),
    "type in parentheses": ("level VARCHAR (20, 3)", None),
    "CHECK": ("level INTEGER DEFAULT 1 CHECK (level IN (1, 2))", 1),
    "CHECK of two columns": ("level TEXT DEFAULT 'x' CHECK (level <> event_type)", "x"),
    "COLLATE": ("level TEXT DEFAULT 'x' COLLATE NOCASE", "x"),
    "REFERENCES": ("level TEXT REFERENCES units(id) ON DELETE SET NULL", None),
    "REFERENCES its table": ("level INTEGER REFERENCES events(id) ON DELETE CASCADE", None),
    "generated": ("level TEXT AS (event_type || sequence)", "step1"),
    "generated, NOT NULL": ("level TEXT NOT NULL AS (event_type)", "step"),
}

FILES = {
    "the same text": SQL,
    "other spaces": schema(),
    "a comment at the end": schema(events=("UNIQUE(run_id, sequence)", "UNIQUE(run_id, sequence) -- the end\n")),
    "a comment after the last column": schema(events=("CURRENT_TIMESTAMP,", "CURRENT_TIMESTAMP -- now\n,")),
    "CHECK": schema(events=("event_type TEXT NOT NULL", "event_type TEXT NOT NULL CHECK (length(event_type) > 1)")),
    "other indexes": SQL
    + "CREATE INDEX a ON runs(repo_path); CREATE INDEX b ON units(lower(status)) WHERE branch NOT NULL;"
    "CREATE UNIQUE INDEX c ON events(run_id, created_at DESC, event_type COLLATE NOCASE);",
    **{name: HARMLESS[name] for name in ("names in brackets", "other views", "other triggers", "other tables")},
    **{name: HARMLESS[name] for name in ("another encoding", "statistics")},
}


@pytest.mark.parametrize(("text", "value"), COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("script", FILES.values(), ids=FILES)
def test_a_missing_column_is_added(tmp_path: Path, script: str, text: str, value: object) -> None:
    path = older_file(tmp_path / "daemon.db", script)
    use_schema(with_column(text))
    with closing(sqlite3.connect(path)) as conn:
        before = rows(conn)
        (addition,) = _schema.missing(conn, "a name")
        assert addition.problem.startswith("events.") and addition.problem.endswith(": missing column")
    with DB.open(path, on_connect=no_sync) as db:
        assert rows(db.conn) == before
        insert_everywhere(db.conn)
        assert [row[-1] for row in db.conn.execute("SELECT * FROM events")] == [value] * 3
        assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert _schema.missing(db.conn, "a name") == ()
    before_opening_again = files(tmp_path)
    DB.open(path).close()
    assert files(tmp_path) == before_opening_again


def test_all_that_a_column_declares_is_added(tmp_path: Path) -> None:
    """Also what the comparison doesn't see."""
    path = older_file(tmp_path / "daemon.db")
    unit = "unit TEXT REFERENCES units ON DELETE SET NULL"
    use_schema(with_column(f"level TEXT COLLATE NOCASE CHECK (level <> 'x'),\n{unit}"))
    with DB.open(path) as db:
        db.conn.execute("UPDATE events SET level = 'LOW', unit = 'old-1/u' WHERE run_id = 'old-1'")
        assert db.conn.execute("SELECT count(*) FROM events WHERE level = 'low'").fetchone() == (1,)
        with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
            db.conn.execute("UPDATE events SET level = 'x'")
        with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
            db.conn.execute("UPDATE events SET unit = 'none'")
        db.conn.execute("DELETE FROM units")
        assert db.conn.execute("SELECT unit FROM events").fetchall() == [(None,), (None,)]


@pytest.mark.parametrize("comment", ["-- low, or high", "-- it's low", "-- \"low, it's (", "--, 'low' -- or ''high"])
def test_a_comment_at_the_end_of_a_columns_line(tmp_path: Path, comment: str) -> None:
    """It may have all signs that end a definition. In the middle of a table or at its end, the CHECK is kept."""
    path = older_file(tmp_path / "daemon.db", SQL + "CREATE TABLE hosts (name TEXT);")
    column = "level TEXT DEFAULT '--, ''low' CHECK (level <> 'x, '' -- y')"
    use_schema(
        schema(events=("unit_id TEXT,", f"unit_id TEXT, -- its 'unit\n{column}, {comment}\n"))
        + f"CREATE TABLE IF NOT EXISTS hosts (\nname TEXT,\n{column} {comment}\n);"
    )
    with DB.open(path, on_connect=no_sync) as db:
        db.conn.execute("INSERT INTO hosts (name) VALUES ('first')")
        for table in "events", "hosts":
            assert set(db.conn.execute(f"SELECT level FROM {table}")) == {("--, 'low",)}
            with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
                db.conn.execute(f"UPDATE {table} SET level = 'x, '' -- y'")
        assert _schema.missing(db.conn, "a name") == ()


def test_columns_tables_and_indexes_are_added_in_an_order_that_works(tmp_path: Path) -> None:
    path = older_file(tmp_path / "daemon.db", schema(idx_runs_status=""))
    use_schema(
        "CREATE TABLE IF NOT EXISTS hosts (name TEXT PRIMARY KEY, run_id TEXT REFERENCES runs);\n"
        + schema(
            runs=(
                "error TEXT,",
                "error TEXT,\nhost_name TEXT,\nhost TEXT REFERENCES hosts(name),\nrank INTEGER NOT NULL DEFAULT 0,\n",
            ),
            events=("unit_id TEXT,", "unit_id TEXT,\nlevel TEXT,\n"),
        )
        + "CREATE INDEX IF NOT EXISTS idx_events_level ON events(level) WHERE level NOT NULL;\n"
        "CREATE UNIQUE INDEX IF NOT EXISTS idx_runs_host ON runs(host, rank);\n"
        "CREATE INDEX IF NOT EXISTS idx_hosts_run_id ON hosts(run_id);\n"
    )
    with closing(sqlite3.connect(path)) as conn:
        before = rows(conn)
        additions = _schema.missing(conn, "a name")
    assert [addition.problem for addition in additions] == [
        "hosts: missing table",
        "runs.host_name: missing column",
        "runs.host: missing column",
        "runs.rank: missing column",
        "events.level: missing column",
        "idx_runs_status: missing index",
        "idx_events_level: missing index",
        "idx_runs_host: missing index",
        "idx_hosts_run_id: missing index",
    ]
    assert additions[2].sql == 'ALTER TABLE "runs" ADD COLUMN host TEXT REFERENCES hosts(name)'
    with DB.open(path) as db:
        assert rows(db.conn) == before
        assert _schema.missing(db.conn, "a name") == ()
        insert_everywhere(db.conn)


def test_a_table_with_a_keyword_for_a_name(tmp_path: Path) -> None:
    table = 'CREATE TABLE IF NOT EXISTS "order" ("from" TEXT{},\nUNIQUE ("from"));\n'
    path = older_file(tmp_path / "daemon.db", SQL + table.format(""))
    use_schema(SQL + table.format(',\n"to" TEXT DEFAULT 1') + 'CREATE INDEX IF NOT EXISTS "where" ON "order" ("to");')
    with DB.open(path) as db:
        db.conn.execute('INSERT INTO "order" ("from") VALUES (0)')
        assert db.conn.execute('SELECT "from", "to" FROM "order" INDEXED BY "where"').fetchall() == [("0", "1")]


# What can't be added


LEVEL = "events.level: missing column"
NO_CONSTRAINTS = "no constraints of a table"

STRANDED = {
    "NOT NULL": (with_column("level TEXT NOT NULL"), LEVEL, "Cannot add a NOT NULL column"),
    "a default that isn't constant": (
        with_column("level TEXT DEFAULT CURRENT_TIMESTAMP"),
        LEVEL,
        "non-constant default",
    ),
    "an expression for a default": (
        with_column("level TEXT DEFAULT (datetime('now'))"),
        LEVEL,
        "non-constant default",
    ),
    "REFERENCES and a default": (
        with_column("level TEXT DEFAULT 'x' REFERENCES units(id)"),
        LEVEL,
        "Cannot add a REFERENCES column",
    ),
    "STORED": (with_column("level TEXT AS (event_type) STORED"), LEVEL, "cannot add a STORED column"),
    "a foreign key of the table": (
        schema(units=("UNIQUE(run_id", "\nparent TEXT,\nFOREIGN KEY(parent) REFERENCES units(id), UNIQUE(run_id")),
        "units: no REFERENCES units(id) ON UPDATE NO ACTION ON DELETE NO ACTION for parent",
        NO_CONSTRAINTS,
    ),
    "a unique index that the rows don't allow": (
        SQL + "CREATE UNIQUE INDEX IF NOT EXISTS idx_one_each ON runs(status);",
        "idx_one_each: missing index",
        "UNIQUE constraint failed: runs.status",
    ),
}
if sqlite3.sqlite_version_info >= (3, 37):  # before, ALTER TABLE doesn't look at the rows for these
    STRANDED |= {
        "a default that CHECK refuses": (with_column("level TEXT DEFAULT 'x' CHECK (level <> 'x')"), LEVEL, "CHECK"),
        "rows that CHECK refuses": (
            with_column("level TEXT DEFAULT 'step' CHECK (level <> event_type)"),
            LEVEL,
            "CHECK",
        ),
    }


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
@pytest.mark.parametrize(("script", "problem", "why"), STRANDED.values(), ids=STRANDED)
def test_what_can_not_be_added_is_named_and_nothing_is(
    tmp_path: Path, script: str, problem: str, why: str, journal_mode: str
) -> None:
    """A column that could be added is missing, too."""
    path = older_file(tmp_path / "daemon.db", SQL, journal_mode)
    before = contents(path)
    use_schema(script.replace("status TEXT NOT NULL", "\nhost TEXT,\nstatus TEXT NOT NULL", 1))
    for _ in range(2):
        with pytest.raises(OpenError) as caught:
            DB.open(path)
        assert caught.value.reason.startswith(f"{problem}, and it can't be added: ")
        assert why in caught.value.reason
        assert "rows are as they were" in caught.value.reason
        assert why == NO_CONSTRAINTS or isinstance(caught.value.__cause__, sqlite3.Error)
        assert contents(path) == before
        with closing(sqlite3.connect(path)) as conn:
            assert conn.execute("PRAGMA journal_mode").fetchone() == (journal_mode,)


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            with_column("level INTEGER PRIMARY KEY").replace("PRIMARY KEY AUTOINCREMENT", ""),
            "events.id: INTEGER PRIMARY KEY AUTOINCREMENT, should be INTEGER",
        ),
        (with_column("level TEXT UNIQUE"), "events: no UNIQUE for level"),
        (
            schema(runs=(RUNS_UNIQUE, f",\nhost TEXT,\nshard TEXT\n{RUNS_UNIQUE}, UNIQUE(host, shard)")),
            "runs: no UNIQUE for host, shard",
        ),
    ],
    ids=["another primary key", "UNIQUE of a new column", "UNIQUE of two new columns"],
)
def test_a_key_is_refused_before_the_first_write(tmp_path: Path, script: str, problem: str) -> None:
    """ALTER TABLE adds none."""
    path = older_file(tmp_path / "daemon.db")
    use_schema(script)
    before = files(tmp_path)
    assert refused(path).problems == (problem,)
    assert files(tmp_path) == before


def test_an_empty_table_takes_more(tmp_path: Path) -> None:
    """NOT NULL without a default, for one: SQLite refuses that where there are rows."""
    path = create(tmp_path / "daemon.db", SQL)
    use_schema(STRANDED["NOT NULL"][0])
    with DB.open(path) as db:
        assert _schema.missing(db.conn, "a name") == ()


# In the middle of it


def test_another_process_makes_it_unfit(tmp_path: Path) -> None:
    path = older_file(tmp_path / "daemon.db")
    use_schema(with_column("level TEXT"))
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        assert len(_schema.missing(conn, "a name")) == 1
        with closing(sqlite3.connect(path)) as other:
            other.execute("ALTER TABLE events ADD kind TEXT")
        with pytest.raises(SchemaError, match="events.kind: extra column, where another is missing"):
            _schema.update(conn, "a name", 0)
        assert not conn.in_transaction


def test_errors_that_are_not_about_the_rows_pass_through(tmp_path: Path) -> None:
    path = older_file(tmp_path / "daemon.db")
    use_schema(SQL + "CREATE INDEX IF NOT EXISTS idx_type ON events(event_type);")
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.execute("PRAGMA max_page_count=1")  # of those that there are, no more
        with pytest.raises(sqlite3.OperationalError, match="^database or disk is full$"):
            _schema.update(conn, "a name", 0)
        assert not conn.in_transaction


class Interrupted(sqlite3.Connection):
    """Ctrl-C before or after its n-th statement."""

    statements = 0
    interrupt_at = 0
    is_before = False

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        self.statements += 1
        if self.is_before and self.statements == self.interrupt_at:
            raise KeyboardInterrupt
        cursor = super().execute(sql, *parameters)
        if not self.is_before and self.statements == self.interrupt_at:
            raise KeyboardInterrupt
        return cursor


@pytest.mark.parametrize("is_before", [True, False])
def test_interrupted(tmp_path: Path, is_before: bool) -> None:
    """At any statement: the old schema or the new one, and no transaction left open."""
    use_schema(with_column("level TEXT") + "CREATE INDEX IF NOT EXISTS idx_level ON events(level);")

    def update(path: Path, interrupt_at: int) -> int:
        """The number of statements."""
        _schema._complete.clear()
        with closing(sqlite3.connect(path, isolation_level=None, factory=Interrupted)) as conn:
            conn.interrupt_at, conn.is_before = interrupt_at, is_before
            try:
                _schema.update(conn, "a name", 0)
            finally:
                assert not conn.in_transaction
            return conn.statements

    last = update(older_file(tmp_path / "whole.db"), 0)
    for number in range(1, last + 1):
        path = older_file(tmp_path / f"{number}.db")
        old = catalogue(path)
        with pytest.raises(KeyboardInterrupt):
            update(path, number)
        is_committed = number == last and not is_before
        assert (catalogue(path) == old) is not is_committed


@pytest.mark.parametrize("text", ["level TEXT", "level TEXT NOT NULL DEFAULT 'x'", "level TEXT AS (event_type)"])
def test_adding_a_column_is_no_pass_over_the_rows(text: str) -> None:
    use_schema(with_column(text))
    steps = []
    for events in (10, 10_000):
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
            conn.executescript(SQL)
            insert_run(conn)
            numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {events})"
            conn.execute(f"{numbers} INSERT INTO events (run_id, sequence, event_type) SELECT 'run-1', i, '' FROM n")
            count = [0]
            conn.set_progress_handler(lambda count=count: count.__setitem__(0, count[0] + 1), 1)  # type: ignore[misc]
            _schema.update(conn, "a name", 0)
            steps += count
    assert steps[1] < steps[0] * 1.1


UPDATE_LIMITED = """
import os, resource, sys
sys.path.insert(0, sys.argv[1])
from daemon_db import DB, OpenError

DB.open(":memory:").close()
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), hard))
try:
    DB.open(sys.argv[2])
except OpenError as error:
    print(error.reason)
"""


@pytest.mark.parametrize("limit", [33_000, 50_000, 100_000, 200_000])
def test_a_file_size_limit(tmp_path: Path, limit: int) -> None:
    """In the middle of an update, in the WAL; the file itself is smaller."""
    path = older_file(tmp_path / "daemon.db", SQL, "wal")
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        insert_run(conn)
        conn.executescript(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)"
            "INSERT INTO events (run_id, sequence, event_type) SELECT 'run-1', i, 'x' FROM n;"
        )
        before = rows(conn)
    old = catalogue(path)
    new = version(
        tmp_path / "new",
        with_column("level TEXT") + "CREATE INDEX IF NOT EXISTS idx_level ON events(event_type, level, sequence);",
    )
    assert run(UPDATE_LIMITED, new, path, limit).startswith("disk I/O error (SQLITE_IOERR_WRITE)")
    assert catalogue(path) == old
    with closing(sqlite3.connect(path)) as conn:
        assert rows(conn) == before
    DB.open(path).close()


# Versions mixed


def version(directory: Path, script: str) -> Path:
    """A version of the package with another `schema.sql`: where to find it."""
    shutil.copytree(Path(daemon_db.__file__).parent, directory / "daemon_db")
    (directory / "daemon_db" / "schema.sql").write_text(script, encoding="utf-8")
    return directory


NEW = with_column("level TEXT NOT NULL DEFAULT 'low' CHECK (level <> '')") + (
    "CREATE TABLE IF NOT EXISTS hosts (name TEXT PRIMARY KEY);\n"
    "CREATE INDEX IF NOT EXISTS idx_level ON events(level);\n"
)


def test_an_older_version_goes_on_with_a_newer_file(tmp_path: Path) -> None:
    path = older_file(tmp_path / "daemon.db")
    use_schema(NEW)
    DB.open(path).close()
    updated = catalogue(path)
    use_schema(SQL)
    with DB.open(path) as db:
        insert_everywhere(db.conn)
        db.conn.execute("DELETE FROM runs WHERE id = 'old-1'")
        assert db.conn.execute("SELECT level FROM events").fetchall() == [("low",), ("low",)]
    assert catalogue(path) == updated


OPEN_AND_INSERT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import daemon_db
assert sys.argv[1] in daemon_db.__file__
from daemon_db import _schema
_schema.expected()  # once, not in each process
children = []
for _ in range(int(sys.argv[2]) - 1):
    child = os.fork()
    if child == 0:
        signal.alarm(int(sys.argv[3]))
        children.clear()
        break
    children.append(child)
print("ready", flush=True)
os.read(0, 1)
for path in sys.argv[4:]:
    with daemon_db.DB.open(path, timeout=int(sys.argv[3])) as db:
        with db.transaction() as conn:
            conn.execute(
                "INSERT INTO runs (id, feature_branch, repo_path, target_branch, tasks_dir, parallelism, status)"
                " VALUES (:id, :id, '/repo', 'main', 'tasks', 4, 'new')", {"id": os.getpid()}
            )
assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)
print("done")
"""


@pytest.mark.parametrize("count", [3, 8, 32])
def test_versions_open_an_old_file_at_once(tmp_path: Path, count: int) -> None:
    """So many processes, of the old version and the new one by turns. One of each version forks the others of it."""
    versions = [version(tmp_path / "old", SQL), version(tmp_path / "new", NEW)]
    paths = [tmp_path / f"{number}.db" for number in range(rounds(4, 3000 // count + 1))]
    for number, path in enumerate(paths):
        older_file(path, schema() if number % 4 < 2 else SQL, "wal" if number % 2 else "delete")
    counts = [count - count // 2, count // 2]
    processes = [start(OPEN_AND_INSERT, *each, LIMIT, *paths) for each in zip(versions, counts, strict=True)]
    try:
        for process, of_this_version in zip(processes, counts, strict=True):
            for _ in range(of_this_version):
                assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("g" * count)  # a letter for each, at least
            process.stdin.flush()
        for process, of_this_version in zip(processes, counts, strict=True):
            assert (end(process), process.returncode) == (("done\n" * of_this_version, ""), 0)
    finally:
        for process in processes:
            end(process)
    for path in paths:
        with closing(sqlite3.connect(path)) as conn:
            assert conn.execute("SELECT count(*) FROM runs").fetchone() == (count + 2,)
            assert conn.execute("SELECT level FROM events").fetchall() == [("low",), ("low",)]
            assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
def test_killed_while_updating(tmp_path: Path, journal_mode: str) -> None:
    """The old schema or the new one; the next open works, and has all rows."""
    new = version(tmp_path / "new", NEW)
    template = older_file(tmp_path / "template", SQL, journal_mode)
    with closing(sqlite3.connect(template)) as conn:
        before = rows(conn)
    old = catalogue(template)
    use_schema(NEW)
    shutil.copyfile(template, tmp_path / "updated")
    DB.open(tmp_path / "updated").close()
    updated = catalogue(tmp_path / "updated")

    def check(path: Path, is_done: bool) -> None:
        if not is_done:
            assert catalogue(copy(path, path.with_suffix(".copy"))) in (old, updated)
        with DB.open(path, on_connect=no_sync) as db:
            assert rows(db.conn) == before
            assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert catalogue(path) == updated

    newer_first = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(new), ENVIRONMENT["PYTHONPATH"]])}
    for where in ("before a statement", "in a write"):
        directory = tmp_path / where
        directory.mkdir()
        opened = 0
        checked = []
        for path in opened_and_killed(directory, template, where, env=newer_first):
            opened += 1
            if (found := bytes_of(path)) not in checked:  # most are alike
                checked.append(found)
                check(path, is_done=False)
        assert opened > 11
        assert any(found.get("-wal") for found in checked)
    open_in_a_loop = f"import sys\nsys.path.insert(0, {str(new)!r})\n{OPEN_IN_A_LOOP}"
    for kill in range(rounds(1, 75)):
        directory = tmp_path / str(kill)
        directory.mkdir()
        began, done = kill_at_random(open_in_a_loop, directory, template)
        for number in began:
            if (directory / f"{number}.db").stat().st_size >= template.stat().st_size:  # else not yet copied
                check(directory / f"{number}.db", number in done)


# SQL of a stranger's


RUNS = SQL[SQL.index("CREATE TABLE") : SQL.index(";")].replace("IF NOT EXISTS ", "")
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
HUGE = "hex(zeroblob(900000000))"


def after_error(text: str) -> str:
    """`runs`, with a text after `error TEXT`."""
    return RUNS.replace("error           TEXT", f"error TEXT {text}")


HOSTILE = {
    "VACUUM INTO": "VACUUM INTO 'out.db'",
    "ATTACH": "ATTACH 'out.db' AS out",
    "a second statement": f"{RUNS}; ATTACH 'out.db' AS out",
    "a second statement after a zero byte": f"{RUNS}\0; ATTACH 'out.db' AS out",
    "CREATE TABLE AS": "CREATE TABLE runs AS SELECT writefile('out.db', 'x')",
    "CREATE TABLE AS without an end": f"CREATE TABLE runs AS {ENDLESS}",
    "a view without an end": f"CREATE VIEW runs AS {ENDLESS}",
    "a temporary table": "CREATE TEMP TABLE runs (id)",
    "a virtual table": "CREATE VIRTUAL TABLE runs USING fts5(id)",
    "a virtual table of a file": "CREATE VIRTUAL TABLE runs USING csv(filename='/etc/passwd')",
    "a trigger": "CREATE TRIGGER runs AFTER INSERT ON units BEGIN SELECT load_extension('out'); END",
    "INSERT": "INSERT INTO sqlite_master VALUES ('table', 'x', 'x', 2, 'CREATE TABLE x (y)')",
    "PRAGMA": "PRAGMA journal_mode=OFF",
    "a function that loads code": after_error("DEFAULT (load_extension('out'))"),
    "a CHECK that loads code": after_error("CHECK (load_extension('out'))"),
    "a generated column that loads code": RUNS[:-1] + ", code AS (load_extension('out')))",
    "huge default": after_error(f", more TEXT DEFAULT ({HUGE})"),
    "huge CHECK": after_error(f"CHECK (error <> {HUGE})"),
    "huge generated column": after_error(f", more TEXT AS ({HUGE}) STORED"),
    "default without an end": after_error(f"DEFAULT (({ENDLESS}))"),
    "CHECK without an end": after_error(f"CHECK (({ENDLESS}))"),
    "generated column without an end": after_error(f", more AS (({ENDLESS}))"),
    "brackets not closed": RUNS[:-1] + "[" * 200_000,
    "brackets not closed, in a comment": RUNS + "/*" + "['\"`/*--" * 25_000,
    "quotes not closed": RUNS[:-1] + "'" * 199_999,
    "a string of quotes": after_error("DEFAULT '" + "''" * 100_000 + "'"),
    "deep parentheses": RUNS[:-1] + ", CHECK (" + "(" * 100_000 + "1" + ")" * 100_000 + "))",
    "deep parentheses that SQLite takes": RUNS[:-1] + ", CHECK (" + "(" * 80 + "1" + ")" * 80 + "))",
    "many columns": RUNS[: RUNS.index("UNIQUE")] + ", ".join(f"c{number}" for number in range(1900)) + ")",
    "many unique columns": RUNS[: RUNS.index("UNIQUE")] + ", ".join(f"c{n} UNIQUE" for n in range(1000)) + ")",
    "nothing": "",
    "a comment": "-- nothing",
}


HOSTILE_INDEXES = {
    "index of something huge": f"CREATE INDEX stranger ON runs({HUGE})",
    "index where something huge": f"CREATE INDEX stranger ON runs(id) WHERE {HUGE} > id",
    "index without an end": f"CREATE INDEX stranger ON runs(id) WHERE ({ENDLESS})",
    "index that loads code": "CREATE INDEX stranger ON runs(load_extension('out'))",
    "index and a second statement": "CREATE INDEX stranger ON runs(id); ATTACH 'out.db' AS out",
}

SQLITE_TAKES = {"a function that loads code", "a string of quotes", "many unique columns"}
"""Of these, what SQLite takes and this schema doesn't. Of two statements SQLite reads the first, and so does this."""

INCOMPLETE = {
    "complete": SQL,
    "without an index": schema(idx_runs_status=""),
    "without a table": schema(units="", idx_units_run_id="", idx_units_status=""),
    "without a column": schema(events=("payload_json TEXT,", "")),
}


@pytest.mark.parametrize("script", INCOMPLETE.values(), ids=INCOMPLETE)
@pytest.mark.parametrize("what", [*HOSTILE, *HOSTILE_INDEXES])
def test_hostile_sql_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, what: str) -> None:
    """Nothing of it runs, and it takes no time. SQLite itself refuses most of it."""
    monkeypatch.chdir(tmp_path)
    path = create(tmp_path / "daemon.db", script + "CREATE INDEX stranger ON runs(error);")
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.executescript("PRAGMA synchronous=OFF; PRAGMA writable_schema=ON")
        sql, name = (HOSTILE[what], "runs") if what in HOSTILE else (HOSTILE_INDEXES[what], "stranger")
        conn.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (sql, name))
    before = files(tmp_path)
    refused = SchemaError if what in SQLITE_TAKES else None
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        try:
            conn.execute("SELECT 1 FROM sqlite_master").fetchall()
        except sqlite3.DatabaseError:
            refused = OpenError
    with pytest.raises(refused) if refused else nullcontext():
        DB.open(path).close()
    assert (files(tmp_path) == before) if refused else files(tmp_path).keys() == {"daemon.db"}


# The habit


def filled(path: Path, script: str) -> Path:
    """A file with rows in every table."""
    older_file(path, script)
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        for table, names in columns(script).items():
            if table not in ("runs", "units", "events"):
                with suppress(sqlite3.IntegrityError):  # a CHECK wants something else
                    conn.execute(insertion(conn, table, **{names[0]: "1"}))
    return path


def refused_because(path: Path, script: str) -> Iterator[str]:
    """Why this version doesn't open the file, which was made by `script`. If it does, the rows must still be there."""
    with closing(sqlite3.connect(path)) as conn:
        before = rows(conn, script)
    try:
        db = DB.open(path)
    except SchemaError as error:
        yield from error.problems
    except OpenError as error:
        yield error.reason
    else:
        with db:
            assert rows(db.conn, script) == before
            assert _schema.missing(db.conn, "a name") == ()
            insert_everywhere(db.conn)


def lacks(path: Path) -> Iterator[str]:
    """What this version finds missing in the file, or wrong with it."""
    with closing(sqlite3.connect(path)) as conn:
        try:
            yield from (addition.problem for addition in _schema.missing(conn, "a name"))
        except SchemaError as error:
            yield from error.problems


STRANDED_FILES = """schema.sql was changed in a way that strands files, of released versions or of this one.
See "Changing the schema" in tests/README.md for what old files can be given, and for how to go about the rest."""


def test_a_file_of_a_released_version_is_brought_up_to_date(tmp_path: Path) -> None:
    """And a released version goes on with a file of this one."""
    new = filled(tmp_path / "new.db", SHIPPED)
    problems = []
    for released in sorted(SCHEMAS.glob("*.sql")):
        script = released.read_text(encoding="utf-8")
        old = filled(tmp_path / f"{released.stem}.db", script)
        use_schema(SHIPPED)
        problems += [f"a file of {released.stem}: {problem}" for problem in refused_because(old, script)]
        use_schema(script)
        problems += [f"{released.stem} with a new file: {problem}" for problem in lacks(new)]
    if problems:
        pytest.fail("\n".join([STRANDED_FILES, *problems]), pytrace=False)


def test_the_schema_of_this_version_is_kept() -> None:
    name = f"{daemon_db.__version__}.sql"
    assert (SCHEMAS / name).exists(), f"keep the release's schema: cp src/daemon_db/schema.sql tests/schemas/{name}"
