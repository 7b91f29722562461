"""The schema that a file has, against `schema.sql`: what has to be added to the file, and what in it doesn't fit.

A file fits when every statement written against `schema.sql` that names its columns works on it: everything that is in
`schema.sql` is there or can be added, and nothing else that is there refuses a row. Whether something can be added is
for SQLite to say, on copies in memory of what the file has.

Compared is what SQLite's pragmas show of a table (https://sqlite.org/pragma.html#pragma_table_xinfo). They don't show
CHECK and ON CONFLICT clauses, a column's collation (an index's they do), DEFERRABLE, what a trigger does, what the
expressions of indexes, generated columns and defaults can fail on, nor whether the parent of an extra foreign key, or
of another table's to ours, fits it: differences there are not seen.
"""

import functools
import importlib.resources
import itertools
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import NamedTuple

from .errors import OpenError, SchemaError, primary_code

SQL = importlib.resources.files(__package__).joinpath("schema.sql").read_text(encoding="utf-8")

# lower(): names are case-insensitive in ASCII. It and CAST make text or NULL of whatever a damaged file has there.
_CATALOGUE = """
    SELECT lower(type), lower(name), lower(tbl_name), CAST(sql AS TEXT) FROM sqlite_master
    WHERE type IS NOT 'trigger' AND name NOT GLOB 'sqlite_*' ORDER BY rowid"""
# hidden: 2 and 3 are generated columns (https://sqlite.org/pragma.html#pragma_table_xinfo).
_COLUMNS = 'SELECT lower(name), upper(type), "notnull", dflt_value, pk, hidden FROM pragma_table_xinfo(?)'
# "to" is NULL where only the table was named: its primary key is meant.
_FOREIGN_KEYS = """
    SELECT id, lower("table"), on_update, on_delete, lower("from"),
        lower(coalesce("to", (SELECT name FROM pragma_table_info(fk."table") WHERE pk = fk.seq + 1)))
    FROM pragma_foreign_key_list(?) AS fk ORDER BY id, seq"""
_INDEXES = """
    SELECT lower(i.name), i.origin, i."unique", i.partial, lower(c.name), c."desc", upper(c.coll)
    FROM pragma_index_list(?) AS i, pragma_index_xinfo(i.name) AS c WHERE c.key ORDER BY i.seq, c.seqno"""

Rows = tuple[tuple[bytes | None, ...], ...]


class Addition(NamedTuple):
    """What a file lacks: `sql` adds it, `problem` says so in words."""

    sql: str
    problem: str


class Object(NamedTuple):
    """A table, an index or a view, as `sqlite_master` has it. Names are in lower case."""

    kind: str
    name: str
    table: str
    sql: str


class Table:
    """A table's parts in words, so that parts that mean the same are the same words."""

    def __init__(self, conn: sqlite3.Connection, table: Object) -> None:
        self.columns: dict[str, str] = {}
        self.required: set[str] = set()  # a row has to name them
        self.nullable: set[str] = set()  # NULL in a row that doesn't name them
        self.constraints: dict[str, set[str | None]] = {}  # unique ones and foreign keys, with their columns
        self.indexes: dict[str, str] = {}
        self._read_columns(conn, table)
        self._read_foreign_keys(conn, table)
        self._read_indexes(conn, table)

    def _read_columns(self, conn: sqlite3.Connection, table: Object) -> None:
        # A column that is another name of the rowid needs no index for its primary key, and takes NULL even if it is
        # NOT NULL (https://sqlite.org/lang_createtable.html#rowid).
        is_rowid = not conn.execute("SELECT 1 FROM pragma_index_list(?) WHERE origin = 'pk'", (table.name,)).fetchall()
        autoincrement = _has_autoincrement(table.sql)
        for name, declared, not_null, default, pk, hidden in conn.execute(_COLUMNS, (table.name,)):
            if pk and is_rowid:
                not_null = 0
            if default is not None and "'" not in default:
                default = default.upper()
            if default == "NULL":
                default = None
            if not_null and default is None and not hidden:
                self.required.add(name)
            if not (not_null or default or pk or hidden):
                self.nullable.add(name)
            self.columns[name] = _words(
                declared,
                not_null and "NOT NULL",
                default and f"DEFAULT {default}",
                pk and "PRIMARY KEY",
                pk and autoincrement and "AUTOINCREMENT",
                hidden and "GENERATED",
            )

    def _read_foreign_keys(self, conn: sqlite3.Connection, table: Object) -> None:
        rows = conn.execute(_FOREIGN_KEYS, (table.name,))
        for (_, parent, on_update, on_delete), group in itertools.groupby(rows, lambda row: row[:4]):
            columns, references = zip(*(row[4:] for row in group), strict=True)
            key = _words(
                f"foreign key {_names(columns)} -> {_name(parent)}"
                + (f"({_names(references)})" if all(references) else ""),
                on_update != "NO ACTION" and f"ON UPDATE {on_update}",
                on_delete != "NO ACTION" and f"ON DELETE {on_delete}",
            )
            self.constraints[key] = set(columns)

    def _read_indexes(self, conn: sqlite3.Connection, table: Object) -> None:
        rows = conn.execute(_INDEXES, (table.name,))
        for (name, origin, unique, partial), group in itertools.groupby(rows, lambda row: row[:4]):
            keys = [row[4:] for row in group]
            where = partial and "WHERE ..."
            if origin == "c":  # made by CREATE INDEX
                columns = (_words(_name(column), _collate(coll), desc and "DESC") for column, desc, coll in keys)
                self.indexes[name] = _words(unique and "unique", f"index on {table.name}({', '.join(columns)})", where)
            if unique:
                columns = (_words(_name(column), _collate(coll)) for column, _, coll in keys)
                key = _words(f"unique constraint ({', '.join(sorted(columns))})", where)
                self.constraints[key] = {column for column, _, _ in keys}


class Schema(NamedTuple):
    """All objects of a schema, and the parts of its tables."""

    objects: dict[str, Object]
    tables: dict[str, Table]


@functools.cache
def expected() -> Schema:
    """What `schema.sql` makes of an empty database."""
    with closing(_memory()) as conn:
        conn.executescript(SQL)
        objects = _objects(_catalogue(conn))
        return Schema(objects, {name: Table(conn, table) for name, table in objects.items() if table.kind == "table"})


def tables() -> tuple[str, ...]:
    """The names of the tables of `schema.sql`, in its order."""
    return tuple(expected().tables)


def missing(conn: sqlite3.Connection, path: str) -> tuple[Addition, ...]:
    """What has to be added to the file for it to have all of `schema.sql`, in an order in which it can be executed.

    One SELECT of the schema table (https://sqlite.org/schematab.html), and so of one snapshot. Raises `SchemaError`,
    naming every difference, if the file doesn't fit, and what SQLite raises if it can't be read.
    """
    problems, additions = _compare(_catalogue(conn))
    if problems:
        raise SchemaError(path, problems)
    return additions


def update(conn: sqlite3.Connection, path: str) -> None:
    """Add what is missing, in one transaction. Whatever fails, the tables and their rows are as they were.

    It takes as long as its statements: for a column no time, however many rows there are, unless it has a CHECK
    constraint; for an index a pass over the rows (https://sqlite.org/lang_altertable.html#alter_table_add_column).
    Raises `OpenError` if the rows that are there don't allow it, and what `missing` and SQLite raise.
    """
    try:
        conn.execute("BEGIN IMMEDIATE")
        for addition in missing(conn, path):  # asked again: another process may have been quicker
            try:
                conn.execute(addition.sql)
            except sqlite3.Error as error:
                # ALTER TABLE reports a CHECK constraint that fails as a plain SQLITE_ERROR.
                if primary_code(error) not in (sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_ERROR):
                    raise
                # Not a SchemaError: that one promises that nothing was written, and WAL mode has been by now.
                reason = f"{addition.problem}, and with the rows there it can't be added: {error}"
                raise OpenError(path, f"{reason}; the file's tables and rows were left as they were") from error
        if missing(conn, path):
            raise OpenError(path, "damaged: what schema.sql creates is not there afterwards")
        conn.execute("COMMIT")
    finally:
        if conn.in_transaction:
            conn.execute("ROLLBACK")


def _catalogue(conn: sqlite3.Connection) -> Rows:
    text_factory = conn.text_factory
    conn.text_factory = bytes  # text in there needn't be UTF-8
    try:
        return tuple(conn.execute(_CATALOGUE).fetchall())
    finally:
        conn.text_factory = text_factory


def _objects(rows: Rows) -> dict[str, Object]:
    """By their names, in the order in which they were created."""
    decoded = (Object(*((value or b"").decode("utf-8", "replace") for value in row)) for row in rows)
    return {found.name: found for found in decoded}


@functools.lru_cache(maxsize=16)
def _compare(rows: Rows) -> tuple[tuple[str, ...], tuple[Addition, ...]]:
    """What in this catalogue doesn't fit, each thing on one line, and what has to be added to it."""
    objects = _objects(rows)
    problems = list(_object_differences(objects))
    with closing(_memory()) as copy:
        found = _copy(copy, objects, problems)
        additions = tuple(_additions(objects, found))
        refusals = _try_out(copy, found, additions)
        for name in sorted(found):
            differences = _table_differences(name, expected().tables[name], Table(copy, objects[name]))
            problems += (difference for difference in differences if difference not in refusals)
    problems += (f"{problem}, and it can't be added: {error}" for problem, error in refusals.items())
    return tuple(" ".join(problem.split()) for problem in problems), additions


def _object_differences(objects: Mapping[str, Object]) -> Iterator[str]:
    wanted = expected()
    others = sorted(found.name for found in objects.values() if found.kind != "index")
    if others and not any(name in objects and objects[name].kind == "table" for name in wanted.tables):
        yield f"no table {', '.join(sorted(wanted.tables))}, but {_names(others)}: the database of another program"
    for name, (kind, _, table, _) in sorted(wanted.objects.items()):
        found = objects.get(name)
        if found and found.kind != kind:
            yield f"{name}: {found.kind or 'no type'}, should be {kind}"
        elif found and found.table != table:
            yield f"{name}: {kind} on {found.table}, should be on {table}"


def _copy(conn: sqlite3.Connection, objects: Mapping[str, Object], problems: list[str]) -> dict[str, Table]:
    """Create our tables and their indexes as the file has them, each but for its rows."""
    tables = {}
    for found in objects.values():
        is_ours = found.kind == "table" and found.name in expected().tables
        if is_ours or found.kind == "index" and found.table in tables:
            try:
                _create(conn, found.sql)
                if is_ours:
                    tables[found.name] = Table(conn, found)
            except sqlite3.Error as error:
                problems.append(f"{found.name}: {error}")
    return tables


def _additions(objects: Mapping[str, Object], found: Mapping[str, Table]) -> Iterator[Addition]:
    wanted = expected()
    for name, table in wanted.tables.items():
        if name not in objects:
            yield Addition(wanted.objects[name].sql, f"{name}: missing table")
        elif name in found and found[name].columns.keys() < table.columns.keys():
            texts = _column_texts(wanted.objects[name].sql)
            for column, text in zip(table.columns, texts, strict=False):  # constraints of the table follow
                if column not in found[name].columns:
                    sql = f"ALTER TABLE {_quoted(name)} ADD COLUMN {text}"
                    yield Addition(sql, f"{name}.{column}: missing column")
    for name, index in wanted.objects.items():
        if index.kind == "index" and name not in objects and (index.table in found or index.table not in objects):
            yield Addition(index.sql, f"{name}: missing index")


def _try_out(
    copy: sqlite3.Connection, found: Mapping[str, Table], additions: Iterable[Addition]
) -> dict[str, sqlite3.Error]:
    """Make the additions to the copy, and what SQLite said to those that it refuses.

    They are tried on tables with rows first, because ALTER TABLE refuses less of an empty one: on tables of the same
    columns by name alone, with NULL in them, so that the rows meet the constraints of what is added and no others.
    """
    refusals = {}
    with closing(_memory()) as filled:
        filled.execute("PRAGMA foreign_keys=ON")  # else ALTER TABLE takes a REFERENCES with a default
        for name, table in found.items():
            if table.columns:
                filled.execute(f"CREATE TABLE {_quoted(name)} ({', '.join(map(_quoted, table.columns))})")
                filled.executescript(f"INSERT INTO {_quoted(name)} DEFAULT VALUES;" * 2)  # two: for a unique index
        for addition in additions:
            try:
                filled.execute(addition.sql)
                copy.execute(addition.sql)
            except sqlite3.Error as error:
                refusals[addition.problem] = error
    return refusals


def _table_differences(name: str, wanted: Table, found: Table) -> Iterator[str]:
    absent = wanted.columns.keys() - found.columns.keys()
    for column, declaration in wanted.columns.items():
        if column in absent:
            yield f"{name}.{column}: missing column"
        elif found.columns[column] != declaration:
            yield f"{name}.{column}: {found.columns[column] or 'no type'}, should be {declaration}"
    extra = found.columns.keys() - wanted.columns.keys()
    for column in sorted(extra):
        if column in found.required:
            yield f"{name}.{_name(column)}: extra column, NOT NULL without a default"
        elif absent:
            yield f"{name}.{_name(column)}: extra column, where another is missing: renamed?"
    for constraint in sorted(wanted.constraints.keys() - found.constraints.keys()):
        if not wanted.constraints[constraint] & absent:
            yield f"{name}: no {constraint}"
    for constraint in sorted(found.constraints.keys() - wanted.constraints.keys()):
        # UNIQUE and foreign keys take no notice of a row with a NULL: in these columns rows of ours have one.
        if not found.constraints[constraint] & extra & found.nullable:
            yield f"{name}: extra {constraint}"
    for index, declaration in wanted.indexes.items():
        if found.indexes.get(index, declaration) != declaration:
            yield f"{index}: {found.indexes[index]}, should be {declaration}"


def _memory() -> sqlite3.Connection:
    return sqlite3.connect(":memory:", isolation_level=None)


_ALLOWED = {
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_CREATE_INDEX,
    sqlite3.SQLITE_REINDEX,  # a part of CREATE INDEX
    sqlite3.SQLITE_READ,  # of columns, in CHECK constraints and the like
    sqlite3.SQLITE_FUNCTION,
}


def _authorize(action: int, name: str | None, *_: str | None) -> int:
    writes_catalogue = action in (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE) and name == "sqlite_master"
    return sqlite3.SQLITE_OK if action in _ALLOWED or writes_catalogue else sqlite3.SQLITE_DENY


def _create(conn: sqlite3.Connection, sql: str) -> None:
    """Execute a statement out of the file, which may be anyone's: to create a table or an index, and nothing else."""
    conn.set_authorizer(_authorize)
    try:
        conn.execute(sql)
    finally:
        conn.set_authorizer(None)


def _has_autoincrement(create_table: str) -> bool:
    """Whether AUTOINCREMENT is in there, which no pragma shows: the first such table makes SQLite create another one
    (https://sqlite.org/autoinc.html).
    """
    with closing(_memory()) as conn:
        _create(conn, create_table)
        return bool(conn.execute("SELECT 1 FROM sqlite_master WHERE name = 'sqlite_sequence'").fetchall())


_TOKENS = re.compile(r"""--[^\n]*|/\*.*?\*/|'[^']*'|"[^"]*"|`[^`]*`|\[[^]]*\]|.""", re.DOTALL)


def _column_texts(create_table: str) -> list[str]:
    """The parts between the outer commas of a CREATE TABLE of `schema.sql`, without comments: first all columns."""
    texts, depth = [""], 0
    for token in _TOKENS.findall(create_table):
        depth -= token == ")"
        if token == "," and depth == 1:
            texts.append("")
        elif depth:
            texts[-1] += " " if token.startswith(("--", "/*")) else token
        depth += token == "("
    return [text.strip() for text in texts]


def _words(*parts: str | int | None) -> str:
    return " ".join(str(part) for part in parts if part)


def _name(name: str | None) -> str:
    """A column's or table's name as SQL writes it, so that no name looks like other words. None: an expression."""
    if name is None:
        return "<expression>"
    return name if name.isidentifier() else _quoted(name)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(_name, names))


def _collate(collation: str) -> str | None:
    return None if collation == "BINARY" else f"COLLATE {collation}"
