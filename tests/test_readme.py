"""What the README shows is run, as written. The two commands that install it first are run by `.ci/run`."""

import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from support import ENVIRONMENT, fill_with_sqlite3

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def run(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_daemon_and_its_restart(tmp_path: Path) -> None:
    (code,) = blocks("python")
    first = [line.split() for line in run("-c", code, cwd=tmp_path).splitlines()]
    assert [int(sequence) for sequence, *_ in first] == [1, 2, 3, 4, 5]
    assert first[0][1:] == ["run.started", "None"]
    for unit in ("api", "ui"):
        assert [event for _, event, unit_id in first if unit_id == unit] == ["unit.running", "unit.done"]
    again = [line.split() for line in run("-c", code, cwd=tmp_path).splitlines()]
    assert again == [*first, ["6", "run.resumed", "None"]]


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="needs the sqlite3 command-line program")
def test_the_command_line(tmp_path: Path) -> None:
    (block,) = blocks("console")
    command, shown = block.split("\n", 1)
    assert command.startswith("$ .venv/bin/python -m daemon_db ")
    fill_with_sqlite3(tmp_path / "daemon.db")
    printed = run(*command.split()[2:], cwd=tmp_path)
    printed = printed.replace(str(tmp_path), "/home/you")
    printed = re.sub(rf"{sqlite3.sqlite_version}.*", "3.51.3", printed)
    assert printed == shown


def test_the_benchmark_starts() -> None:
    assert "`python tests/benchmark.py`" in README
    assert "--quick" in run("tests/benchmark.py", "--help", cwd=ROOT)


def test_every_command_is_known_to_be_run() -> None:
    setup = "python3 -m venv .venv && .venv/bin/python -m pip install --quiet"
    assert blocks("sh") == [
        f"{setup} . && .venv/bin/python -m daemon_db daemon.db\n",
        f'{setup} ".[test]" && .venv/bin/python -m pytest\n',
    ]
