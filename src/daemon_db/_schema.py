"""The schema that a file has, against `schema.sql`: what has to be added to the file, and what in it doesn't fit.

A schema is a set of facts, such as "runs.status: TEXT NOT NULL". One statement asks SQLite for all of them, so they are
of one moment. Of the facts of `schema.sql`, a file must have each, or lack a whole table, index or column, which is
added. Beside them it may have what refuses no row: columns that a row needn't name, and whatever isn't in our tables.
And it may have more indexes: what somebody made by CREATE INDEX is that person's will, also where it refuses rows.

If SQLite can't make an addition, it says so, and the transaction is rolled back. SQL that is in the file isn't executed
here; when SQLite adds a column with a CHECK, it also asks the CHECKs that the file has.

Not seen is what SQLite's pragmas don't show (https://sqlite.org/pragma.html#pragma_table_xinfo): CHECK and ON CONFLICT,
the collation of a column, DEFERRABLE, triggers, expressions (of an index, its WHERE, a generated column), and whether
the parent of a foreign key fits. AUTOINCREMENT is seen where the word is, be it in a comment or in a name.
"""

import functools
import pkgutil
import re
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import NamedTuple

from . import _wait, errors
from .errors import OpenError, SchemaError, primary_code

# Not by importlib.resources, which takes as long to import as all else here. A loader that has no data gives None, and
# that is an error here.
SQL = str(pkgutil.get_data(__package__, "schema.sql"), "utf-8")  # type: ignore[arg-type]

# As a blob, because text in there needn't be UTF-8.
_TEXT = """
SELECT NULL, NULL, NULL, CAST(group_concat(type || ',' || name || ',' || tbl_name || ',' || sql) AS BLOB), NULL
FROM sqlite_master"""

# The first three columns say what a fact is about, the other two what it is:
#   a table, an index or a view, "object", "",          its type, what an index is on
#   a table, "column",           its name,              its type, what else is declared
#   a table, a constraint,       its column or columns, "", ""
# What means the same is spelt the same. lower() is right: names are case-insensitive in ASCII. It also makes text or
# NULL of whatever a damaged file has there. A column that is another name of the rowid has no index, and takes NULL
# even if it is NOT NULL (https://sqlite.org/lang_createtable.html#rowid). "to" is NULL where a foreign key names no
# column: the primary key is meant.
_FACTS = f"""
WITH object AS (
    SELECT lower(type) AS type, lower(name) AS name, lower(tbl_name) AS tbl, sql
    FROM sqlite_master WHERE type IS NOT 'trigger' AND name NOT GLOB 'sqlite_*'
), ours AS (SELECT * FROM object WHERE name IN (%s)), our_table AS (SELECT * FROM ours WHERE type = 'table')
{_TEXT}
UNION ALL
SELECT name, 'object', '', type, '' FROM object WHERE type IS NOT 'index'
UNION ALL
SELECT t.name, 'column', lower(c.name), upper(c.type), trim(
    iif(c.pk, 'PRIMARY KEY', '')
    || iif(c.pk AND t.sql LIKE '%%AUTOINCREMENT%%', ' AUTOINCREMENT', '')
    || iif("notnull" AND (NOT c.pk OR 'pk' IN (SELECT origin FROM pragma_index_list(t.name))), ' NOT NULL', '')
    || coalesce(' DEFAULT ' || nullif(iif(instr(dflt_value, ''''), dflt_value, upper(dflt_value)), 'NULL'), '')
    || iif(hidden, ' GENERATED', ''))
FROM our_table AS t, pragma_table_xinfo(t.name) AS c
UNION ALL
SELECT t.name, 'REFERENCES ' || lower(k."table") || '('
    || lower(coalesce(k."to", (SELECT name FROM pragma_table_info(k."table") WHERE pk = k.seq + 1), '')) || ')'
    || ' ON UPDATE ' || on_update || ' ON DELETE ' || on_delete || iif(k.seq, ' as column ' || (k.seq + 1), ''),
    lower("from"), '', ''
FROM our_table AS t, pragma_foreign_key_list(t.name) AS k
UNION ALL
SELECT t.name, 'UNIQUE', (SELECT group_concat(part, ', ') FROM (
    SELECT lower(name) || iif(coll = 'BINARY', '', ' COLLATE ' || upper(coll)) AS part
    FROM pragma_index_xinfo(i.name) WHERE key ORDER BY part)), '', ''
FROM our_table AS t, pragma_index_list(t.name) AS i WHERE origin <> 'c'
UNION ALL
SELECT o.name, 'object', '', 'index', 'on ' || tbl || '(' || (SELECT group_concat(part, ', ') FROM (
    SELECT coalesce(lower(name), '<expression>') || iif(coll = 'BINARY', '', ' COLLATE ' || upper(coll))
        || iif("desc", ' DESC', '') AS part
    FROM pragma_index_xinfo(o.name) WHERE key ORDER BY seqno)) || ')'
    || iif("unique", ' UNIQUE', '') || iif(partial, ' WHERE ...', '')
FROM ours AS o, pragma_index_list(tbl) AS i WHERE o.type = 'index' AND lower(i.name) = o.name"""

Facts = dict[tuple[str, str, str], tuple[str, str]]


class Addition(NamedTuple):
    """What a file lacks: `sql` adds it, `problem` says so in words."""

    sql: str
    problem: str


def _read(conn: sqlite3.Connection, names: Iterable[str]) -> tuple[bytes | None, Facts]:
    """The whole schema as text, and the facts of the tables and indexes with these names."""
    conn.text_factory = lambda text: text.decode("utf-8", "replace")
    try:
        names = tuple(names)
        (_, _, _, text, _), *rows = conn.execute(_FACTS % ", ".join("?" * len(names)), names).fetchall()
    finally:
        conn.text_factory = str
    return text, {row[:3]: row[3:] for row in rows}


@functools.cache
def expected() -> tuple[Facts, dict[str, str]]:
    """What `schema.sql` makes of an empty database, and its statements by the names of what they make, in its order."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        conn.executescript(SQL)
        made = "SELECT lower(name), sql FROM sqlite_master WHERE name NOT GLOB 'sqlite_*' ORDER BY rowid"
        statements = dict(conn.execute(made).fetchall())
        return _read(conn, statements)[1], statements


def tables() -> tuple[str, ...]:
    """The names of the tables of `schema.sql`, in its order."""
    return tuple(name for (name, _, _), words in expected()[0].items() if words == ("table", ""))


_complete: set[bytes | None] = set()
"""The schemas, as text, of files that were found to have all of `schema.sql`: they need no second comparison."""


def missing(conn: sqlite3.Connection, path: str) -> tuple[Addition, ...]:
    """What has to be added to the file for it to have all of `schema.sql`, in an order in which it can be executed.

    Raises `SchemaError`, naming every difference, if the file doesn't fit, and what SQLite raises if it can't be read.
    """
    problems, additions = _compare(conn)
    if problems:
        raise SchemaError(path, problems)
    return additions


def update(conn: sqlite3.Connection, path: str, timeout: float) -> tuple[str, ...]:
    """Add what is missing, in one transaction; return that. Whatever fails, the tables and their rows are as they were.

    It takes as long as its statements: for a column no time, however many rows there are, unless it has a CHECK
    constraint; for an index a pass over the rows (https://sqlite.org/lang_altertable.html#alter_table_add_column).
    Raises `OpenError` if SQLite, or the rows that are there, don't allow it, and what `missing` and SQLite raise.
    """
    try:
        _wait.execute(conn, "BEGIN IMMEDIATE", timeout)
        additions = missing(conn, path)  # asked again: another process may have been quicker
        for sql, problem in additions:
            try:
                conn.execute(sql)
            except sqlite3.Error as error:
                # ALTER TABLE reports a CHECK constraint that fails, and what it can't add, as a plain SQLITE_ERROR.
                if primary_code(error) not in (sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_ERROR):
                    raise
                raise _can_not_be_added(path, problem, str(error)) from error
        problems, more = _compare(conn)
        if lacks := [*problems, *(addition.problem for addition in more)]:  # such as UNIQUE (a, b) of new columns
            raise _can_not_be_added(path, "; ".join(lacks), errors.NO_CONSTRAINTS)
        conn.execute("COMMIT")
        return tuple(addition.problem for addition in additions)
    finally:
        if conn.in_transaction:
            conn.execute("ROLLBACK")


def _can_not_be_added(path: str, what: str, why: str) -> OpenError:
    """Not a `SchemaError`: that one promises that nothing was written, and WAL mode has been turned on by now."""
    return OpenError(path, errors.CANNOT_BE_ADDED.format(what, why))


def is_everything(problems: Sequence[str]) -> bool:
    """Whether `update` has to add, or has added, all tables: the file had nothing of `schema.sql`."""
    return set(tables()) <= {problem.partition(":")[0] for problem in problems}


def names(problems: Iterable[str]) -> str:
    """Of what `update` has to add, or has added."""
    return ", ".join(problem.partition(":")[0] for problem in problems)


def what_was_added(problems: Sequence[str]) -> str:
    """What `update` returned, in a few words."""
    return "created" if is_everything(problems) else f"added {names(problems)}"


def _compare(conn: sqlite3.Connection) -> tuple[list[str], tuple[Addition, ...]]:
    """What in this file doesn't fit, each thing on one line; and what can be added to it."""
    text = conn.execute(_TEXT).fetchone()[3]
    if text in _complete:
        return [], ()
    wanted, statements = expected()
    # The text again, in the same statement as the facts: another process may be updating the file meanwhile.
    text, found = _read(conn, statements) if text else (None, {})
    objects = {name: what for (name, kind, _), (what, _) in found.items() if kind == "object"}
    have = {name for name in tables() if objects.get(name) == "table"}
    if not have and (others := sorted(name for name, what in objects.items() if what != "index")):
        return [errors.ANOTHER_PROGRAMS.format(", ".join(tables()), ", ".join(others))], ()
    # What is wanted of a table that isn't there comes with the table.
    absent = [fact for fact in wanted if fact not in found and (fact[1] == "object" or fact[0] in have)]
    extra = sorted(fact for fact in found if fact not in wanted and fact[0] in have)
    problems = [
        f"{name}{key and '.'}{key}: {_words(found[name, kind, key])}, should be {_words(words)}"
        for (name, kind, key), words in wanted.items()
        if found.get((name, kind, key), words) != words
    ]
    additions = []
    for name, kind, key in absent:
        if kind == "object":
            additions.append(Addition(statements[name], f"{name}: missing {wanted[name, kind, key][0]}"))
        elif kind == "column" and _columns(name, extra):
            problems.append(f"{name}.{key}: missing column")
        elif kind == "column":
            additions.append(Addition(_add_column(name, key, statements[name]), f"{name}.{key}: missing column"))
        elif kind == "UNIQUE" or (name, "column", key) not in absent:  # ALTER TABLE adds REFERENCES with its column
            problems.append(f"{name}: no {kind} for {key}")
    for name, kind, key in extra:
        if kind == "column":
            required = ", NOT NULL without a default" if found[name, kind, key][1] == "NOT NULL" else ""
            renamed = errors.RENAMED if _columns(name, absent) else ""
            if required or renamed:
                problems.append(f"{name}.{key}: extra column{required}{renamed}")
        # Statements written for `schema.sql` leave NULL in an extra column of which nothing else is declared.
        elif (name, "column", key) not in extra or found[name, "column", key][1]:
            problems.append(f"{name}: extra {kind} for {key}")
    if not problems and not additions:
        _complete.add(text)
    return [" ".join(problem.split()) for problem in problems], tuple(additions)


def _columns(table: str, facts: list[tuple[str, str, str]]) -> list[str]:
    return [key for name, kind, key in facts if (name, kind) == (table, "column")]


def _words(what: tuple[str, str]) -> str:
    return " ".join(filter(None, what)) or "no type"


def _add_column(table: str, column: str, create_table: str) -> str:
    """`schema.sql` has one column a line: its text is that line, without the comma and without a comment at the end."""
    name = rf'["`[]?{re.escape(column)}["`\]]?(?![\w$])'
    text = r"""(?:'[^']*'|"[^"]*"|[^'"\n])*?"""  # in quotes may be anything
    line = re.search(rf"^\s*({name}{text})\s*,?\s*(?:--.*|/\*.*\*/)?$", create_table, re.IGNORECASE | re.MULTILINE)
    assert line, f"{column} has no line of its own in schema.sql"
    return f'ALTER TABLE "{table}" ADD COLUMN {line[1]}'
