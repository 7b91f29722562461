"""How many tests a change of `schema.sql` makes red: none if old files can be given it, else one to four that name it.

The whole suite runs once, with all the changes at once. What is red then is tried again with each change alone. So what
is green with all of them counts as green with each. `.ci/run` starts this, by a Python with pytest and pytest-xdist.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "src/daemon_db/schema.sql"


class Change(NamedTuple):
    pattern: str
    replacement: str
    named: str = ""  # what red tests must say


# The names of what is added are such as `schema.sql` will never have.
GIVEN_TO_OLD_FILES = {
    "a nullable column": Change(r"EXISTS runs \(", r"\g<0>\n    nullable_column TEXT, -- it's one more, or none"),
    "a column NOT NULL with a default": Change(
        r"EXISTS units \(", r"\g<0>\n    default_column INTEGER NOT NULL DEFAULT 1,"
    ),
    "an index": Change(r"\Z", "CREATE INDEX IF NOT EXISTS one_more_index ON runs(status, started_at);\n"),
    "a table": Change(
        r"\A", "CREATE TABLE IF NOT EXISTS first_table (\n    name TEXT PRIMARY KEY,\n    address TEXT\n);\n"
    ),
    "a table with an index and a foreign key": Change(
        r"\Z",
        "CREATE TABLE IF NOT EXISTS last_table (\n    id INTEGER PRIMARY KEY,\n"
        "    run_id TEXT NOT NULL REFERENCES runs(id)\n);\n"
        "CREATE INDEX IF NOT EXISTS last_table_index ON last_table(run_id);\n",
    ),
}
STRANDS_OLD_FILES = {
    "a column in two lines": Change(
        r"EXISTS runs \(", r"\g<0>\n    long_column TEXT\n        CHECK (long_column <> ''),", "one column a line"
    ),
    "a column that is UNIQUE": Change(
        r"EXISTS runs \(", r"\g<0>\n    unique_column TEXT UNIQUE,", "runs: no UNIQUE for unique_column"
    ),
    "a column NOT NULL without a default": Change(
        r"EXISTS runs \(", r"\g<0>\n    required_column TEXT NOT NULL,", "runs.required_column"
    ),
    "a column removed": Change(r"config_json .*\n", "", "runs.config_json"),
    "a column renamed": Change("payload_json", "renamed_column", "events.payload_json"),
    "another type": Change(r"(parallelism +)INTEGER", r"\1TEXT", "runs.parallelism"),
    "UNIQUE": Change(r"UNIQUE\(feature_branch", r"UNIQUE(repo_path, target_branch), \g<0>", "repo_path, target_branch"),
    "no IF NOT EXISTS": Change("IF NOT EXISTS idx_units_status", "idx_units_status", "idx_units_status"),
    "a view": Change(r"\Z", "CREATE VIEW IF NOT EXISTS some_view AS SELECT id FROM runs;\n", "some_view"),
    "a trigger": Change(
        r"\Z", "CREATE TRIGGER IF NOT EXISTS trigger_ AFTER UPDATE ON runs BEGIN DELETE FROM units; END;\n", "trigger_"
    ),
}
MOST_AT_ONCE = 20


def run_tests(changes: list[Change], *arguments: str) -> tuple[list[str], str]:
    """The tests that are red with these changes, and what pytest printed."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for name in "src", "tests":
            shutil.copytree(ROOT / name, copy / name)
        for name in "README.md", "pyproject.toml":
            shutil.copy(ROOT / name, copy / name)
        schema = (copy / SCHEMA).read_text(encoding="utf-8")
        for change in changes:
            before, schema = schema, re.sub(change.pattern, change.replacement, schema)
            assert schema != before, f"{change.pattern} is not in schema.sql: write another change here"
        (copy / SCHEMA).write_text(schema, encoding="utf-8")
        done = subprocess.run(
            # Each has its own directory: two that clean the usual one at once may both fail.
            [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--basetemp={copy / 'tmp'}", *arguments],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": "src"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode in (0, 1, 2), done.stdout  # 2: a file of tests couldn't be read, which is red, too
        failed = copy / ".pytest_cache/v/cache/lastfailed"
        red = sorted(json.loads(failed.read_text(encoding="utf-8"))) if failed.exists() else []
        assert bool(red) is bool(done.returncode), done.stdout
        return red, done.stdout


def main() -> int:
    changes = GIVEN_TO_OLD_FILES | STRANDS_OLD_FILES
    at_once, output = run_tests(list(changes.values()), "-n", "4", f"--maxfail={MOST_AT_ONCE}")
    print(f"{len(at_once)} red with all changes at once:", *at_once, sep="\n    ")
    if not 0 < len(at_once) < MOST_AT_ONCE:
        print(output)
        return 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        each = pool.map(lambda change: run_tests([change], *at_once), changes.values())
        results = dict(zip(changes, each, strict=True))
    is_as_it_should_be = True
    for name, (red, output) in results.items():
        is_good = not red if name in GIVEN_TO_OLD_FILES else 1 <= len(red) <= 4 and changes[name].named in output
        print(f"{len(red)} red with {name}{'' if is_good else ', WHICH IS WRONG'}:", *red, sep="\n    ")
        if not is_good:
            print(output)
            is_as_it_should_be = False
    return 0 if is_as_it_should_be else 1


if __name__ == "__main__":
    sys.exit(main())
