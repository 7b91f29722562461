"""The errors of opening."""

import pickle
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from daemon_db import DB, OpenError, SchemaError


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
