"""The two errors of opening. Both are `sqlite3.Error`, so `except sqlite3.Error` catches them too."""

import sqlite3
from collections.abc import Iterable


class OpenError(sqlite3.OperationalError):
    """The file cannot be opened: `str(error)` says which and why, in a person's words.

    `path` is the file, `reason` the why. Where SQLite said no, `__cause__` is its error, and `sqlite_errorcode` and
    `sqlite_errorname` are that error's (https://sqlite.org/rescode.html).
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that the error survives pickling on its way between processes
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot open {self.path}: {self.reason}"


class SchemaError(sqlite3.DatabaseError):
    """The file is a database, but not one this version can use. It was left as it was.

    `path` is the file, `problems` the differences from `schema.sql`, each a line of the message.
    """

    def __init__(self, path: str, problems: Iterable[str]) -> None:
        self.path = path
        self.problems = tuple(problems)
        super().__init__(path, self.problems)

    def __str__(self) -> str:
        return "\n".join((f"the schema of {self.path} does not fit:", *self.problems))
