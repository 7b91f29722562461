"""The errors of opening."""

import errno
import os
import pickle
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from daemon_db import DB, OpenError, SchemaError, errors
from support import files_in, make_wal, run


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_both_errors_survive_pickling(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "text.db").write_bytes(b"no database, but long enough to be one" * 9)
    with pytest.raises(OpenError) as caught:
        DB.open(tmp_path / "text.db")
    with closing(sqlite3.connect(tmp_path / "other.db")) as conn:
        conn.executescript("CREATE TABLE notes (id); CREATE TABLE more (id);")
    with pytest.raises(SchemaError) as schema_caught:
        DB.open(tmp_path / "other.db")
    for error, names in (
        (caught.value, ("reason", "sqlite_errorcode", "sqlite_errorname")),
        (schema_caught.value, ("problems",)),
    ):
        copy = pickle.loads(pickle.dumps(error, protocol))
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        for name in ("path", "args", *names):
            assert getattr(copy, name) == getattr(error, name)


def from_the_future(path: Path) -> None:
    make_wal(path)
    with open(path, "r+b") as file:
        file.seek(44)  # the schema's format: 4 is the last that there is (https://sqlite.org/fileformat2.html)
        file.write((5).to_bytes(4))


def a_directory_for_its_wal(path: Path) -> None:
    make_wal(path)
    Path(f"{path}-wal").mkdir()


@pytest.mark.parametrize(
    ("make", "read_only", "reason", "code"),
    [
        (from_the_future, False, "unsupported file format", "SQLITE_ERROR"),
        (from_the_future, True, "unsupported file format", "SQLITE_ERROR"),
        (
            a_directory_for_its_wal,
            False,
            "unable to open database file, its -wal or its -shm: each must be a plain file, on a local disk, and the "
            "process needs free file descriptors",
            "SQLITE_CANTOPEN",
        ),
    ],
)
def test_for_the_rest_sqlites_own_words(
    make: Callable[[Path], None], read_only: bool, reason: str, code: str, tmp_path: Path
) -> None:
    make(tmp_path / "db")
    before = files_in(tmp_path)
    with pytest.raises(OpenError) as caught:
        DB.open(tmp_path / "db", read_only=read_only)
    assert (caught.value.reason, caught.value.sqlite_errorname) == (reason, code)
    assert files_in(tmp_path) == before


LACKING = """
import os, resource, sqlite3
from daemon_db import _file

resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
for code in sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN:
    error = sqlite3.OperationalError("SQLite's words")
    error.sqlite_errorcode, error.sqlite_errorname = code, "its name"
    print(_file.locate("/a path", read_only=False).reason(error))
"""


def test_a_lack_of_descriptors_is_said_where_it_is_the_reason() -> None:
    """SQLite calls it SQLITE_CANTOPEN. What else it meets in a process without free ones is something else."""
    assert run(LACKING) == f"None\n{os.strerror(errno.EMFILE)}\n"


def test_an_error_of_pythons_own_has_no_code() -> None:
    cause = sqlite3.DataError("string longer than INT_MAX bytes")
    error = errors.open_error("the path", errors.in_words(cause), cause)
    assert str(error) == "cannot open the path: string longer than INT_MAX bytes"
    assert not hasattr(error, "sqlite_errorcode")
    assert not hasattr(error, "sqlite_errorname")
