"""What pytest says before it begins: which SQLite is tested, and whether threads run at the same time. And Ctrl-C."""

import signal
import sqlite3
import sys

# A shell without job control starts what is to run in the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    is_enabled = getattr(sys, "_is_gil_enabled", lambda: True)  # from 3.13 on; before, there was no other way
    return f"SQLite {sqlite3.sqlite_version}, GIL {'on' if is_enabled() else 'off'}"
