"""The schema a file has, against the one it should have: what `schema.sql` makes of an empty database.

A file is compatible when every statement written against `schema.sql` works on it, as long as the statement names its
columns, and when nothing else there refuses a row that `schema.sql` accepts. Compared is what SQLite's pragmas show
(https://sqlite.org/pragma.html#pragma_table_xinfo). They don't show CHECK constraints, a column's collation (an index's
they do), ON CONFLICT clauses, DEFERRABLE, what a trigger does, nor whether an extra foreign key, or another table's to
ours, has a parent that fits: differences there are not seen.
"""

import functools
import itertools
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from .errors import OpenError, SchemaError

with open(os.path.join(os.path.dirname(__file__), "schema.sql"), encoding="utf-8") as _file:
    SQL = _file.read()

# lower(): SQLite's names are case-insensitive; and whatever a damaged file has there becomes text or NULL, as by CAST.
_OBJECTS = """
    SELECT type, lower(name), lower(tbl_name), coalesce(CAST(sql AS TEXT), '') FROM sqlite_master
    WHERE type <> 'trigger' AND tbl_name NOT GLOB 'sqlite_*' AND name NOT GLOB 'sqlite_*'"""
_COLUMNS = 'SELECT lower(name), upper(type), "notnull", dflt_value, pk, hidden FROM pragma_table_xinfo(?)'
# "to" is NULL where only the table was named: its primary key is meant.
_FOREIGN_KEYS = """
    SELECT id, lower("table"), on_update, on_delete, lower("from"),
        lower(coalesce("to", (SELECT name FROM pragma_table_info(fk."table") WHERE pk = fk.seq + 1)))
    FROM pragma_foreign_key_list(?) AS fk ORDER BY id, seq"""
_INDEXES = """
    SELECT lower(i.name), i.origin, i."unique", i.partial, lower(c.name), c."desc", upper(c.coll)
    FROM pragma_index_list(?) AS i, pragma_index_xinfo(i.name) AS c WHERE c.key ORDER BY i.seq, c.seqno"""


class Addition(NamedTuple):
    sql: str
    problem: str


def missing(conn, path):
    if is_unchanged(conn):
        return ()
    conn.execute("BEGIN")
    try:
        return () if is_complete(conn, path) else (Addition("x", "something missing"),)
    finally:
        conn.execute("COMMIT")


def update(conn, path):
    create(conn, path)


class Table:
    """A table's parts, each as the words that declare it: equal words are equal parts."""

    def __init__(self, conn: sqlite3.Connection, name: str, sql: str) -> None:
        self.columns: dict[str, str] = {}
        self.required: set[str] = set()  # NOT NULL without a default
        self.nullable: set[str] = set()  # NULL in a row that doesn't name them
        self.constraints: dict[str, set[str | None]] = {}  # unique and foreign keys, with their columns
        self.indexes: dict[str, str] = {}
        self._read_columns(conn, name, _has_autoincrement(sql))
        self._read_foreign_keys(conn, name)
        self._read_indexes(conn, name)

    def _read_columns(self, conn: sqlite3.Connection, table: str, autoincrement: bool) -> None:
        for name, declared, notnull, default, pk, hidden in conn.execute(_COLUMNS, (table,)):
            if default is not None and "'" not in default:
                default = default.upper()
            if default == "NULL":
                default = None
            if notnull and default is None:
                self.required.add(name)
            if not (notnull or default or pk or hidden):
                self.nullable.add(name)
            self.columns[name] = _words(
                declared,
                notnull and "NOT NULL",
                default and f"DEFAULT {default}",
                pk and "PRIMARY KEY",
                pk and autoincrement and "AUTOINCREMENT",
                hidden and "GENERATED",
            )

    def _read_foreign_keys(self, conn: sqlite3.Connection, table: str) -> None:
        rows = conn.execute(_FOREIGN_KEYS, (table,))
        for (_, parent, on_update, on_delete), group in itertools.groupby(rows, lambda row: row[:4]):
            columns, references = zip(*(row[4:] for row in group), strict=True)
            key = _words(
                f"foreign key {_names(columns)} -> {_name(parent)}"
                + (f"({_names(references)})" if all(references) else ""),
                on_update != "NO ACTION" and f"ON UPDATE {on_update}",
                on_delete != "NO ACTION" and f"ON DELETE {on_delete}",
            )
            self.constraints[key] = set(columns)

    def _read_indexes(self, conn: sqlite3.Connection, table: str) -> None:
        rows = conn.execute(_INDEXES, (table,))
        for (name, origin, unique, partial), group in itertools.groupby(rows, lambda row: row[:4]):
            keys = [row[4:] for row in group]
            where = partial and "WHERE ..."
            if origin == "c":  # of CREATE INDEX
                columns = (_words(_name(column), _collate(coll), desc and "DESC") for column, desc, coll in keys)
                self.indexes[name] = _words(unique and "unique", f"index on {table}({', '.join(columns)})", where)
            if unique:
                columns = (_words(_name(column), _collate(coll)) for column, _, coll in keys)
                key = _words(f"unique constraint ({', '.join(sorted(columns))})", where)
                self.constraints[key] = {column for column, _, _ in keys}


class Schema:
    """The tables, indexes and views that there are, and the parts of the tables: of those in `names`, or of all."""

    def __init__(self, conn: sqlite3.Connection, names: Collection[str] | None = None) -> None:
        self.objects: dict[str, tuple[str, str]] = {}
        self.tables: dict[str, Table] = {}
        for kind, name, table, sql in conn.execute(_OBJECTS).fetchall():
            self.objects[name] = kind, table
            if kind == "table" and (names is None or name in names):
                self.tables[name] = Table(conn, name, sql)


@functools.cache
def expected() -> tuple[set[str], Schema]:
    """What `schema.sql` makes of an empty database: its SQL text as SQLite stores it, and its structure."""
    conn = sqlite3.connect(":memory:")
    try:
        conn.executescript(SQL)
        schema = Schema(conn)
        return _texts(conn, schema.tables), schema
    finally:
        conn.close()


def _texts(conn: sqlite3.Connection, tables: Collection[str]) -> set[str]:
    """The SQL text of these tables and all their indexes."""
    rows = conn.execute("SELECT type, tbl_name, sql FROM sqlite_master WHERE sql NOT NULL")
    return {sql for kind, table, sql in rows if table in tables and kind != "trigger"}


def is_unchanged(conn: sqlite3.Connection) -> bool:
    """Whether the whole schema is there, word for word. One quick statement, and what nearly every file is."""
    texts, schema = expected()
    return _texts(conn, schema.tables) == texts


def is_complete(conn: sqlite3.Connection, path: str) -> bool:
    """Whether the whole schema is there, in any words. `SchemaError`, naming every difference, if it doesn't fit.

    Call it in a transaction, so that all its statements see one snapshot.
    """
    _, wanted = expected()
    found = Schema(conn, wanted.tables)
    if problems := [" ".join(problem.split()) for problem in differences(wanted, found)]:  # each on one line
        raise SchemaError(path, problems)
    return wanted.objects.keys() <= found.objects.keys()


def create(conn: sqlite3.Connection, path: str) -> None:
    """Create what is missing, in one transaction. Whatever fails, the file is as it was."""
    try:
        # BEGIN is in the script because executescript() first commits what was begun before it.
        conn.executescript(f"BEGIN IMMEDIATE;\n{SQL}")
        if not (is_unchanged(conn) or is_complete(conn, path)):
            raise OpenError(path, "damaged: what schema.sql creates is not there afterwards")
        conn.execute("COMMIT")
    finally:
        if conn.in_transaction:
            conn.execute("ROLLBACK")


def differences(wanted: Schema, found: Schema) -> Iterator[str]:
    """Each thing in `found` that keeps it from being `wanted`, in words. What is only missing is no difference."""
    others = sorted(name for name, (kind, _) in found.objects.items() if kind != "index")
    if others and not found.tables:
        yield f"no table {', '.join(sorted(wanted.tables))}, but {_names(others)}: the database of another program"
    for name, (kind, table) in sorted(wanted.objects.items()):
        found_kind, found_table = found.objects.get(name, (kind, table))
        if found_kind != kind:
            yield f"{name}: {found_kind}, should be {kind}"
        elif found_table != table:
            yield f"{name}: {kind} on {found_table}, should be on {table}"
    for name in sorted(found.tables):
        yield from _table_differences(name, wanted.tables[name], found.tables[name])


def _table_differences(name: str, wanted: Table, found: Table) -> Iterator[str]:
    for column, declaration in wanted.columns.items():
        if column not in found.columns:
            yield f"{name}.{column}: missing column"
        elif found.columns[column] != declaration:
            yield f"{name}.{column}: {found.columns[column] or 'no type'}, should be {declaration}"
    extra = found.columns.keys() - wanted.columns.keys()
    for column in sorted(extra & found.required):
        yield f"{name}.{_name(column)}: extra column, NOT NULL without a default"
    for constraint in sorted(wanted.constraints.keys() - found.constraints.keys()):
        yield f"{name}: no {constraint}"
    for constraint in sorted(found.constraints.keys() - wanted.constraints.keys()):
        # NULL is no duplicate and needs no parent, so that a column which our rows leave NULL makes it harmless.
        if not found.constraints[constraint] & extra & found.nullable:
            yield f"{name}: extra {constraint}"
    for index, declaration in wanted.indexes.items():
        if found.indexes.get(index, declaration) != declaration:
            yield f"{index}: {found.indexes[index]}, should be {declaration}"


def _words(*parts: str | int | None) -> str:
    return " ".join(str(part) for part in parts if part)


def _name(name: str | None) -> str:
    """A column's or table's name as SQL writes it, so that no name looks like other words. None: an expression."""
    if name is None:
        return "<expression>"
    return name if name.isidentifier() else '"' + name.replace('"', '""') + '"'


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(_name, names))


def _collate(collation: str) -> str | None:
    return None if collation == "BINARY" else f"COLLATE {collation}"


def _has_autoincrement(sql: str) -> bool:
    """Whether AUTOINCREMENT, which no pragma shows, is in a table's text: as a keyword, not in a comment or quotes."""
    import re  # here, because it takes half as long to import as sqlite3 does, and few files need it

    quoted = r"""--[^\n]*|/\*.*?(?:\*/|\Z)|'[^']*'|"[^"]*"|`[^`]*`|\[[^\]]*\]"""
    words = re.findall(r"[\w$\x80-\U0010ffff]+", re.sub(quoted, " ", sql, flags=re.DOTALL))
    return "AUTOINCREMENT" in map(str.upper, words)


TABLES = tuple(expected()[1].tables)
