"""The WAL's size: bounded where readers overlap, and given back when one has kept it from shrinking."""

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from daemon_db import DB, _connection
from support import insert_run


def test_the_disk_is_given_back_when_the_reader_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "daemon.db"
    with DB.open(path) as db, closing(sqlite3.connect(path, isolation_level=None)) as reader:
        insert_run(db.conn)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM runs").fetchone()
        with caplog.at_level(logging.WARNING, "daemon_db"):
            for _ in range(20):  # MB
                with db.transaction() as conn:
                    conn.execute("UPDATE runs SET config_json = randomblob(?)", (2**20,))
        assert os.path.getsize(f"{path}-wal") > _connection.WAL_LIMIT
        assert "can't be emptied: a reader is in the way" in caplog.text
        reader.execute("COMMIT")
        for number in range(4):  # far less than twice the size: the next attempt to empty it isn't due
            with db.transaction() as conn:
                conn.execute("UPDATE runs SET parallelism = ?", (number,))
        assert os.path.getsize(f"{path}-wal") <= _connection.WAL_LIMIT
