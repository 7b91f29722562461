"""What pytest begins with, whoever starts it, and what it says: which SQLite is tested, and whether there is a GIL."""

import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator

import pytest

from daemon_db import _schema
from support import CHANGES, FIRST, unprivileged, use_schema

# A shell without job control starts what is to run in the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.umask(0o022)  # what a test makes, another user may read


def pytest_report_header() -> str:
    is_enabled = getattr(sys, "_is_gil_enabled", lambda: True)  # from 3.13 on; before, there was no other way
    return f"SQLite {sqlite3.sqlite_version}, GIL {'on' if is_enabled() else 'off'}"


@pytest.fixture
def first_schema() -> Iterator[None]:
    """For a test that edits the schema's text: it sees `FIRST` as `schema.sql`, whatever a maintainer has added."""
    shipped = _schema.SQL
    use_schema(FIRST)
    yield
    use_schema(shipped)


@pytest.fixture
def sqlite3_program() -> None:
    """For a test that needs it, as one more program that opens the file, or as the README says."""
    if not shutil.which("sqlite3"):
        pytest.skip("needs the sqlite3 command-line program")


@pytest.fixture(scope="module", params=CHANGES)
def run_unprivileged(request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Runs Python code as a user to whom something is forbidden: one process for all tests of a module."""
    with unprivileged(request.param) as run:
        yield run
