"""The schema that a file has, against `schema.sql`: what has to be added to the file, and what in it doesn't fit.

A file fits if every statement that was written for `schema.sql`, and names the columns it uses, works on that file. So
all of `schema.sql` must be there, or be added, and nothing else in the file may refuse a row. If SQLite can't make an
addition, it says so, and the transaction is rolled back. SQL that is in the file isn't executed here; when SQLite adds
a column with a CHECK, it also asks the CHECKs that the file has.

Compared is what SQLite's pragmas show of a table (https://sqlite.org/pragma.html#pragma_table_xinfo). They don't show
CHECK and ON CONFLICT clauses, the collation of a column, or DEFERRABLE. They don't show what a trigger does, nor when
the expression of an index, of a generated column or of a default fails. They don't show whether the parent of a foreign
key fits, be the key an extra one of ours or another table's to ours. Differences of these kinds are not seen.
"""

import functools
import itertools
import pkgutil
import re
import sqlite3
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

from .errors import OpenError, SchemaError, primary_code

# Not by importlib.resources, which takes as long to import as all else here. A loader that has no data gives None, and
# that is an error here.
SQL = str(pkgutil.get_data(__package__, "schema.sql"), "utf-8")  # type: ignore[arg-type]

# As a blob, because text in there needn't be UTF-8.
_WHOLE_TEXT = """
    SELECT CAST(group_concat(type || ',' || name || ',' || tbl_name || ',' || sql) AS BLOB) FROM sqlite_master"""
# lower(): names are case-insensitive in ASCII. lower() and CAST make text or NULL of whatever a damaged file has there.
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
    """A table's columns, constraints and indexes in words: the same words for the same meaning, however it is spelt."""

    def __init__(self, conn: sqlite3.Connection, table: Object) -> None:
        self.columns: dict[str, str] = {}
        self.required: set[str] = set()  # a row has to name them
        self.nullable: set[str] = set()  # NULL in a row that doesn't name them
        self.constraints: dict[str, set[str | None]] = {}  # unique ones and foreign keys, with their columns
        self.indexes: dict[str, str] = {}  # made by CREATE INDEX
        self.unique_indexes: dict[str, str] = {}  # for a constraint that CREATE UNIQUE INDEX made, the index's name
        self._read_columns(conn, table)
        self._read_foreign_keys(conn, table)
        self._read_indexes(conn, table)

    def _read_columns(self, conn: sqlite3.Connection, table: Object) -> None:
        # A column that is another name of the rowid needs no index for its primary key, and takes NULL even if it is
        # NOT NULL (https://sqlite.org/lang_createtable.html#rowid).
        is_rowid = not conn.execute("SELECT 1 FROM pragma_index_list(?) WHERE origin = 'pk'", (table.name,)).fetchall()
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
                pk and _has_autoincrement(table.sql) and "AUTOINCREMENT",
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
                if origin == "c":
                    self.unique_indexes[key] = name


class Schema:
    """The objects of a database, by name in the order in which they were created, and the parts of its tables."""

    def __init__(self, conn: sqlite3.Connection, tables: Container[str] | None = None) -> None:
        """`tables` are the ones whose parts are wanted. None: all."""
        rows = conn.execute(_CATALOGUE).fetchall()
        self.objects = {found.name: found for found in (Object(*(value or "" for value in row)) for row in rows)}
        self.tables = {
            found.name: Table(conn, found)
            for found in self.objects.values()
            if found.kind == "table" and (tables is None or found.name in tables)
        }


@functools.cache
def expected() -> Schema:
    """What `schema.sql` makes of an empty database."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        conn.executescript(SQL)
        return Schema(conn)


def tables() -> tuple[str, ...]:
    """The names of the tables of `schema.sql`, in its order."""
    return tuple(expected().tables)


_complete: set[bytes | None] = set()
"""The schemas, as text, of files that were found to have all of `schema.sql`: they need no second comparison."""


def missing(conn: sqlite3.Connection, path: str) -> tuple[Addition, ...]:
    """What has to be added to the file for it to have all of `schema.sql`, in an order in which it can be executed.

    Raises `SchemaError`, naming every difference, if the file doesn't fit, and what SQLite raises if it can't be read.
    """
    if _whole_text(conn) in _complete:
        return ()
    conn.text_factory = _decode
    conn.execute("SAVEPOINT comparison")  # so that all reads are of one snapshot
    try:
        text = _whole_text(conn)  # read again: this one is of the snapshot
        found = Schema(conn, expected().tables)
    finally:
        conn.text_factory = str
        if conn.in_transaction:  # else SQLite has rolled back by itself
            conn.execute("RELEASE comparison")
    if problems := list(_differences(found)):
        raise SchemaError(path, (" ".join(problem.split()) for problem in problems))
    additions = tuple(_additions(found))
    if not additions:
        _complete.add(text)
    return additions


def update(conn: sqlite3.Connection, path: str) -> tuple[str, ...]:
    """Add what is missing, in one transaction; return that. Whatever fails, the tables and their rows are as they were.

    It takes as long as its statements: for a column no time, however many rows there are, unless it has a CHECK
    constraint; for an index a pass over the rows (https://sqlite.org/lang_altertable.html#alter_table_add_column).
    Raises `OpenError` if SQLite, or the rows that are there, don't allow it, and what `missing` and SQLite raise.
    """
    try:
        conn.execute("BEGIN IMMEDIATE")
        additions = missing(conn, path)  # asked again: another process may have been quicker
        for addition in additions:
            _add(conn, path, addition)
        if lacks := _what_it_lacks(conn, path):  # such as UNIQUE (a, b), where a and b are new columns
            raise _can_not_be_added(path, "; ".join(lacks), "ALTER TABLE adds columns, and no constraints of a table")
        conn.execute("COMMIT")
        return tuple(addition.problem for addition in additions)
    finally:
        if conn.in_transaction:
            conn.execute("ROLLBACK")


def is_everything(problems: Sequence[str]) -> bool:
    """Whether `update` has to add, or has added, all tables: the file had nothing of `schema.sql`."""
    return set(tables()) <= {problem.partition(":")[0] for problem in problems}


def names(problems: Iterable[str]) -> str:
    """Of what `update` has to add, or has added."""
    return ", ".join(problem.partition(":")[0] for problem in problems)


def what_was_added(problems: Sequence[str]) -> str:
    """What `update` returned, in a few words."""
    return "created" if is_everything(problems) else f"added {names(problems)}"


def _add(conn: sqlite3.Connection, path: str, addition: Addition) -> None:
    try:
        conn.execute(addition.sql)
    except sqlite3.Error as error:
        # ALTER TABLE reports a CHECK constraint that fails, and what it can't add, as a plain SQLITE_ERROR.
        if primary_code(error) not in (sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_ERROR):
            raise
        raise _can_not_be_added(path, addition.problem, str(error)) from error


def _what_it_lacks(conn: sqlite3.Connection, path: str) -> list[str]:
    try:
        return [addition.problem for addition in missing(conn, path)]
    except SchemaError as error:
        return list(error.problems)


def _can_not_be_added(path: str, what: str, why: str) -> OpenError:
    """Not a `SchemaError`: that one promises that nothing was written, and WAL mode has been turned on by now."""
    return OpenError(path, f"{what}, and it can't be added: {why}; the file's tables and rows were left as they were")


def _whole_text(conn: sqlite3.Connection) -> bytes | None:
    text: bytes | None = conn.execute(_WHOLE_TEXT).fetchone()[0]
    return text


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "replace")


_RENAMED = (
    "If it was renamed, rename it back. If another version of the schema has added it, let that version open the file. "
    "To drop it would lose what is in it"
)


def _differences(found: Schema) -> Iterator[str]:
    """What in this file doesn't fit, each thing on one line."""
    wanted = expected()
    others = sorted(each.name for each in found.objects.values() if each.kind != "index")
    if others and not found.tables:
        yield f"no table {', '.join(sorted(wanted.tables))}, but {_names(others)}: the database of another program"
    for name, (kind, _, table, _) in sorted(wanted.objects.items()):
        there = found.objects.get(name)
        if there and there.kind != kind:
            yield f"{name}: {there.kind or 'no type'}, should be {kind}"
        elif there and there.table != table:
            renamed = "" if table in found.objects else ", which is missing. If it was renamed, rename it back"
            yield f"{name}: {kind} on {there.table}, should be on {table}{renamed}"
    for name in sorted(found.tables):
        yield from _table_differences(name, wanted.tables[name], found.tables[name])


def _table_differences(name: str, wanted: Table, found: Table) -> Iterator[str]:
    absent = wanted.columns.keys() - found.columns.keys()
    extra = found.columns.keys() - wanted.columns.keys()
    for column, declaration in wanted.columns.items():
        if column in absent:
            if extra:  # else it is added
                yield f"{name}.{column}: missing column"
        elif found.columns[column] != declaration:
            yield f"{name}.{column}: {found.columns[column] or 'no type'}, should be {declaration}"
    for column in sorted(extra):
        required = ", NOT NULL without a default" if column in found.required else ""
        renamed = f", where another is missing. {_RENAMED}" if absent else ""
        if required or renamed:
            yield f"{name}.{_name(column)}: extra column{required}{renamed}"
    for constraint in sorted(wanted.constraints.keys() - found.constraints.keys()):
        is_added_with_its_column = wanted.constraints[constraint] & absent
        index = wanted.unique_indexes.get(constraint)
        is_added_with_its_index = index is not None and index not in found.indexes
        if not is_added_with_its_column and not is_added_with_its_index:
            yield f"{name}: no {constraint}"
    for constraint in sorted(found.constraints.keys() - wanted.constraints.keys()):
        # A row that has NULL in one of its columns passes UNIQUE and a foreign key. Statements written for `schema.sql`
        # leave NULL in a nullable extra column.
        if not found.constraints[constraint] & extra & found.nullable:
            index = found.unique_indexes.get(constraint)  # by its name, so that it can be dropped
            yield f"{name}: extra {constraint}{f', by the index {_name(index)}' if index else ''}"
    for index, declaration in wanted.indexes.items():
        if found.indexes.get(index, declaration) != declaration:
            yield f"{index}: {found.indexes[index]}, should be {declaration}"


def _additions(found: Schema) -> Iterator[Addition]:
    wanted = expected()
    for name, table in wanted.tables.items():
        if name not in found.objects:
            yield Addition(wanted.objects[name].sql, f"{name}: missing table")
        else:
            texts = _column_texts(wanted.objects[name].sql)
            for column, text in zip(table.columns, texts, strict=False):  # constraints of the table follow
                if column not in found.tables[name].columns:
                    yield Addition(f"ALTER TABLE {_quoted(name)} ADD COLUMN {text}", f"{name}.{column}: missing column")
    for name, index in wanted.objects.items():
        if index.kind == "index" and name not in found.objects:
            yield Addition(index.sql, f"{name}: missing index")


# In SQL, a name may have "$" in it, and all that isn't ASCII.
_TOKENS = re.compile(r"""--[^\n]*|/\*.*?\*/|'[^']*'|"[^"]*"|`[^`]*`|\[[^]]*\]|[\w$\x80-\U0010ffff]+|.""", re.DOTALL)


def _has_autoincrement(create_table: str) -> bool:
    """Whether AUTOINCREMENT is in there, which no pragma shows."""
    return "AUTOINCREMENT" in map(str.upper, _TOKENS.findall(create_table))


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
