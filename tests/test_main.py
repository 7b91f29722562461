"""`python -m daemon_db`, as it is run: from a shell, on a terminal, on files that other programs made."""

import contextlib
import errno
import io
import json
import os
import pty
import re
import resource
import select
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

import daemon_db
from daemon_db import DB, __main__, _schema
from daemon_db.errors import AFTER_DAMAGE, NOT_A_DATABASE
from support import (
    ENVIRONMENT,
    LIMIT,
    append_event,
    end,
    files_in,
    fill_with_sqlite3,
    insert_run,
    make_hot,
    make_killed,
    make_rollback,
    make_wal,
    open_files,
    spare,
    start,
)


def command(*arguments: object, cwd: Path = Path()) -> subprocess.CompletedProcess[str]:
    """What `python -m daemon_db` does, done in this process: to start another one takes ten times as long."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
    ):
        patch.setattr(sys, "argv", ["daemon_db", *map(str, arguments)])
        try:
            status = __main__.main()
        except SystemExit as error:  # argparse's
            status = int(error.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    texts = [(stream.flush(), stream.buffer.getvalue().decode())[1] for stream in streams]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(arguments, status, *texts)


def in_a_process(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """What another process does: for its streams, its limits, signals, and the way from `-m` to the exit status."""
    defaults: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-W", "error", "-m", "daemon_db", *map(str, arguments)],
        env=ENVIRONMENT,
        encoding="utf-8",
        timeout=LIMIT,
        **(defaults | options),
    )


def report(output: str) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in output.splitlines())


def fails(done: subprocess.CompletedProcess[str], message: str) -> None:
    """That it ended with this one line on standard error, and nothing else."""
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"daemon_db: {message}\n")


HAS_BUG = __main__.has_wal_reset_bug(sqlite3.sqlite_version_info)
SQLITE = sqlite3.sqlite_version + ('  (see "The WAL-reset bug" in the README)' if HAS_BUG else "")


class TestWhatItFinds:
    def test_it_creates_a_database(self, tmp_path: Path) -> None:
        for opened in "opened         created\n", "":
            done = in_a_process(tmp_path / "daemon.db")
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout == (
                f"path           {tmp_path / 'daemon.db'}\n"
                f"SQLite         {SQLITE}\n"
                "journal mode   wal\n"
                "foreign keys   on\n" + "".join(f"{table:14} 0 rows\n" for table in _schema.tables()) + opened
            )
            assert list(files_in(tmp_path)) == ["daemon.db"]

    def test_check(self, tmp_path: Path) -> None:
        make_wal(tmp_path / "daemon.db")
        without, with_check = command(tmp_path / "daemon.db"), command("--check", tmp_path / "daemon.db")
        assert (with_check.returncode, with_check.stderr) == (0, "")
        assert with_check.stdout == without.stdout + "check          ok\n"

    @pytest.mark.parametrize("check", [[], ["--check"]])
    def test_json(self, check: list[str], tmp_path: Path) -> None:
        make_wal(tmp_path / "daemon.db")
        with DB.open(tmp_path / "daemon.db") as db:
            append_event(db.conn)
            append_event(db.conn)
        done = command("--json", *check, tmp_path / "daemon.db")
        assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
        assert json.loads(done.stdout) == {
            "path": str(tmp_path / "daemon.db"),
            "sqlite": sqlite3.sqlite_version,
            "wal_reset_bug": HAS_BUG,
            "network_file_system": None,
            "journal_mode": "wal",
            "foreign_keys": True,
            "rows": dict.fromkeys(_schema.tables(), 0) | {"runs": 1, "events": 2},
        } | ({"to_add": [], "damaged": False, "problems": []} if check else {"added": []})

    @pytest.mark.usefixtures("sqlite3_program")
    @pytest.mark.parametrize("check", [[], ["--check"]])
    def test_a_database_that_another_program_made(self, check: list[str], tmp_path: Path) -> None:
        """Without --check it is taken over, in WAL mode from then on."""
        path = tmp_path / "daemon.db"
        fill_with_sqlite3(path)
        before = path.read_bytes()
        done = command(path, *check)
        assert (done.returncode, done.stderr) == (0, "")
        lines = report(done.stdout)
        assert (lines["journal mode"], lines.get("check")) == (("delete", "ok") if check else ("wal", None))
        assert (lines["runs"], lines["units"], lines["events"]) == ("300 rows", "3000 rows", "6000 rows")
        assert (path.read_bytes() == before) is bool(check)
        with DB.open(path) as db:
            assert db.conn.execute("SELECT count(*), max(id) FROM events").fetchone() == (6000, 6000)

    def test_a_name_that_is_no_text(self, tmp_path: Path) -> None:
        path = os.fsdecode(bytes(tmp_path) + b"/\xff.db")
        try:
            Path(path).touch()
        except OSError:
            pytest.skip("this file system has no such names")
        done = command(path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "\\udcff.db" in done.stdout
        assert json.loads(command("--json", path).stdout)["path"] == path

    def test_version(self) -> None:
        done = command("--version")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"daemon_db {daemon_db.__version__}\n", "")

    def test_help(self) -> None:
        done = command("--help")
        assert (done.returncode, done.stderr) == (0, "")
        for word in ("PATH", "--check", "--json", "--version", "write nothing"):
            assert word in done.stdout


class TestCheckWritesNothing:
    def test_a_mistyped_path_is_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "deamon.db"
        fails(command("--check", path), f"cannot open {path}: it does not exist")
        assert files_in(tmp_path) == {}

    def test_an_empty_file_is_no_database_yet(self, tmp_path: Path) -> None:
        path = tmp_path / "daemon.db"
        path.touch()
        fails(command("--check", path), f"{path} is empty: no database yet")
        assert files_in(tmp_path) == {"daemon.db": b""}

    @pytest.mark.parametrize("make", [make_wal, make_rollback])
    def test_byte_for_byte(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        make(tmp_path / "daemon.db")
        before = files_in(tmp_path)
        assert report(command("--check", tmp_path / "daemon.db").stdout)["check"] == "ok"
        assert files_in(tmp_path) == before

    def test_what_a_killed_daemon_left(self, tmp_path: Path) -> None:
        make_killed(tmp_path / "daemon.db")
        (tmp_path / "daemon.db-shm").unlink()  # with it, the index would be recovered in there
        before = files_in(tmp_path)
        done = command("--check", tmp_path / "daemon.db")
        assert report(done.stdout)["runs"] == "1 row"
        assert {name: data for name, data in files_in(tmp_path).items() if not name.endswith("-shm")} == before

    def test_beside_a_running_daemon(self, tmp_path: Path) -> None:
        with DB.open(tmp_path / "daemon.db", timeout=0) as db:
            insert_run(db.conn)
            with db.transaction() as conn:
                append_event(conn)
                lines = report(command("--check", tmp_path / "daemon.db").stdout)
            assert (lines["runs"], lines["events"], lines["check"]) == ("1 row", "0 rows", "ok")


class TestErrors:
    """One line, which says the path once."""

    def test_a_file_that_cannot_be_opened(self, tmp_path: Path) -> None:
        text = tmp_path / "notes.txt"
        text.write_text("some notes", encoding="ascii")
        for check in [], ["--check"]:
            fails(command(*check, text), f"cannot open {text}: {NOT_A_DATABASE}")
            fails(command(*check, tmp_path), f"cannot open {tmp_path}: it is a directory")
            missing = tmp_path / "no" / "daemon.db"
            reason = f"parent directory {missing.parent} does not exist"
            fails(command(*check, missing), f"cannot open {missing}: {reason}")
        assert files_in(tmp_path) == {"notes.txt": b"some notes"}

    def test_a_hot_journal(self, tmp_path: Path) -> None:
        path = tmp_path / "daemon.db"
        make_hot(path)
        reason = "a killed process left a rollback journal, to be played back first: open it once without read_only"
        fails(command("--check", path), f"cannot open {path}: {reason}")
        assert command(path).returncode == 0
        assert command("--check", path).returncode == 0

    def test_a_schema_that_does_not_fit(self, tmp_path: Path) -> None:
        path = tmp_path / "other.db"
        with closing(sqlite3.connect(path)) as conn:
            conn.executescript(f"{_schema.SQL} ALTER TABLE runs RENAME COLUMN {spare('runs')} TO has_another_name")
            conn.executescript("DROP INDEX idx_units_status; CREATE INDEX idx_units_status ON units (id)")
        for check in [], ["--check"]:
            before = open_files()
            done = command(*check, path)
            assert open_files() == before
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr == (
                f"daemon_db: the schema of {path} does not fit: "
                "idx_units_status: index on units(id), should be index on units(status); "
                f"runs.{spare('runs')}: missing column; "
                f"runs.has_another_name: extra column{_schema._RENAMED}\n"
            )

    def test_a_working_directory_that_is_gone(self, tmp_path: Path) -> None:
        gone = tmp_path / "gone"
        gone.mkdir()
        code = "import os, sys\nfrom daemon_db import __main__\nos.rmdir(os.getcwd())\nsys.exit(__main__.main())"
        process = start(code, "--json", "daemon.db", cwd=gone)
        words = f"cannot open daemon.db: the working directory: {os.strerror(errno.ENOENT)}"
        output, errors = end(process)
        assert (json.loads(output), errors) == ({"path": "daemon.db", "error": words}, f"daemon_db: {words}\n")

    def test_a_name_of_two_lines(self, tmp_path: Path) -> None:
        done = command(tmp_path / "no" / "two\nlines")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)

    def test_an_error_after_opening(self, tmp_path: Path) -> None:
        path = tmp_path / "daemon.db"
        with DB.open(path) as db:
            (root,) = db.conn.execute("SELECT rootpage FROM sqlite_master WHERE name = 'idx_units_status'").fetchone()
        content = bytearray(path.read_bytes())
        content[(root - 1) * 4096] = 0xFF  # no kind of page
        path.write_bytes(content)
        fails(command(path), f"{path}: damaged (database disk image is malformed): {AFTER_DAMAGE}")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "the following arguments are required: PATH"),
            ([""], "path must be a file name, not ''"),
            (["daemon.db", "other.db"], "unrecognized arguments: other.db"),
            (["--no-such-option", "daemon.db"], "unrecognized arguments: --no-such-option"),
            (["--check", ":memory:"], "a :memory: database begins empty: there is nothing to read"),
        ],
    )
    def test_wrong_usage(self, arguments: list[str], message: str, tmp_path: Path) -> None:
        done = (command if arguments else in_a_process)(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        *usage, error = done.stderr.splitlines()
        assert " ".join("".join(usage).split()) == (
            "usage: python -m daemon_db [-h] [--check | --backup DEST] [--json] [--version] PATH"
        )
        assert error == f"python -m daemon_db: error: {message}"
        assert files_in(tmp_path) == {}


class TestOlderFiles:
    def make_older(self, path: Path) -> None:
        with closing(sqlite3.connect(path)) as conn:
            conn.executescript(f"{_schema.SQL} DROP INDEX idx_units_status; DROP TABLE events")

    def test_check_says_what_the_next_open_adds(self, tmp_path: Path) -> None:
        self.make_older(tmp_path / "daemon.db")
        before = files_in(tmp_path)
        added = "events, idx_units_status, idx_events_run_id, idx_events_sequence"
        done = command("--check", tmp_path / "daemon.db")
        lines = report(done.stdout)
        assert (done.returncode, done.stderr) == (0, "")
        assert (lines["next open"], lines["check"]) == (f"adds {added}", "ok")
        assert lines["events"] == "no such table: the file is an older version's, or the table was dropped"
        to_add = json.loads(command("--check", "--json", tmp_path / "daemon.db").stdout)["to_add"]
        assert [line.partition(":")[0] for line in to_add] == added.split(", ")
        assert files_in(tmp_path) == before
        assert report(command(tmp_path / "daemon.db").stdout)["opened"] == f"added {added}"
        assert "next open" not in report(command("--check", tmp_path / "daemon.db").stdout)


class TestFailuresAsJson:
    @pytest.mark.parametrize("option", [[], ["--check"], ["--backup", "copy.db"]])
    def test_as_on_standard_error(self, option: list[str], tmp_path: Path) -> None:
        done = in_a_process("--json", *option, "no/daemon.db", cwd=tmp_path)
        error = f"cannot open {tmp_path}/no/daemon.db: parent directory {tmp_path}/no does not exist"
        assert (done.returncode, done.stderr) == (1, f"daemon_db: {error}\n")
        assert json.loads(done.stdout) == {"path": f"{tmp_path}/no/daemon.db", "error": error}
        assert files_in(tmp_path) == {}

    def test_of_the_check(self, tmp_path: Path) -> None:
        make_wal(tmp_path / "daemon.db")
        damage(tmp_path / "daemon.db", "runs")
        done = command("--json", "--check", tmp_path / "daemon.db")
        found = json.loads(done.stdout)
        assert done.stderr == f"daemon_db: {found['error']}\n"
        assert (done.returncode, found["rows"].keys(), found["damaged"]) == (1, set(_schema.tables()), True)


def damage(path: Path, table: str) -> int:
    """Overwrite the table's first page; the page's number."""
    with closing(sqlite3.connect(path)) as conn:
        (page,) = conn.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    with open(path, "r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    return int(page)


BESIDE = (
    "{target}{suffix} lies beside it, and would be played back over the copy. If no program has {target} open, move it "
    "and {target}{suffix} away; or take another name"
)


class TestBackup:
    def test_beside_writers_it_is_of_one_moment(self, tmp_path: Path) -> None:
        """Each commit writes a run and an event: in the copy are as many of both."""
        path, copy = tmp_path / "daemon.db", tmp_path / "copy.db"
        stop = threading.Event()

        def write(number: int) -> int:
            count = 0
            while not stop.is_set():
                with db.transaction() as conn:
                    insert_run(conn, f"run-{number}-{count}")
                    append_event(conn, f"run-{number}-{count}")
                count += 1
            return count

        with DB.open(path) as db, ThreadPoolExecutor(4) as pool:
            writers = [pool.submit(write, number) for number in range(4)]
            try:
                counts = []
                for _ in range(5):
                    done = command("--backup", copy, path)
                    assert (done.returncode, done.stderr) == (0, "")
                    assert report(done.stdout)["backup"] == str(copy)
                    assert report(done.stdout)["check"] == "ok"
                    with DB.open(copy, read_only=True) as backup:
                        runs, events = (
                            backup.conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                            for table in ("runs", "events")
                        )
                        assert runs == events
                        counts.append(runs)
            finally:
                stop.set()
            assert counts == sorted(counts)
            assert sum(writer.result(LIMIT) for writer in writers) >= counts[-1] > 0
        assert sorted(os.listdir(tmp_path)) == ["copy.db", "daemon.db"]

    @pytest.mark.parametrize("make", [make_wal, make_rollback, make_killed])
    def test_the_database_stays_as_it_is(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        path = tmp_path / "daemon.db"
        make(path)
        before = files_in(tmp_path)
        (tmp_path / "copy").mkdir()
        done = command("--backup", tmp_path / "copy" / "copy.db", path)
        assert (done.returncode, done.stderr) == (0, "")
        after = files_in(tmp_path)
        for name in before.keys() - {"daemon.db-shm"}:  # the WAL's index is made anew in there
            assert after[name] == before[name]
        copy = report(command("--check", tmp_path / "copy" / "copy.db").stdout)
        assert (copy["runs"], copy["journal mode"], copy["check"]) == ("1 row", "delete", "ok")
        assert os.listdir(tmp_path / "copy") == ["copy.db"]

    @pytest.mark.parametrize(
        ("umask", "mode", "copied"), [(0o022, 0o640, 0o640), (0o077, 0o644, 0o644), (0o022, 0o444, 0o444)]
    )
    def test_who_may_read_it(self, umask: int, mode: int, copied: int, tmp_path: Path) -> None:
        make_wal(tmp_path / "daemon.db")
        (tmp_path / "daemon.db").chmod(mode)
        in_a_process("--backup", tmp_path / "copy.db", tmp_path / "daemon.db", preexec_fn=lambda: os.umask(umask))
        assert stat.S_IMODE((tmp_path / "copy.db").stat().st_mode) == copied

    @pytest.mark.parametrize(
        ("destination", "message"),
        [
            ("daemon.db", "it is the database itself, or belongs to it"),
            ("hard.db", "it is the database itself, or belongs to it"),
            ("link.db", "it is the database itself, or belongs to it"),
            ("daemon.db-wal", "it is the database itself, or belongs to it"),
            ("daemon.db-shm", "it is the database itself, or belongs to it"),
            ("directory", "it is no file, but a directory or a device"),
            ("pipe", "it is no file, but a directory or a device"),
            ("new/", "it is no file, but a directory or a device"),
            ("circle", "it is no file, but a directory or a device"),
            ("used.db", BESIDE.replace("{suffix}", "-wal")),
            ("hot.db", BESIDE.replace("{suffix}", "-journal")),
        ],
    )
    def test_what_would_do_harm_is_refused(self, destination: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "daemon.db"
        make_wal(path)
        os.link(path, tmp_path / "hard.db")
        (tmp_path / "link.db").symlink_to(path)
        (tmp_path / "directory").mkdir()
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "circle").symlink_to(tmp_path / "circle")
        make_killed(tmp_path / "used.db")
        make_hot(tmp_path / "hot.db")
        before = files_in(tmp_path)
        target = os.path.realpath(tmp_path / destination)
        fails(
            command("--backup", f"{tmp_path}/{destination}", path),
            f"cannot write {target}: {message.format(target=target)}",
        )
        assert files_in(tmp_path) == before

    def test_where_it_can_not_be_written(self, tmp_path: Path) -> None:
        make_wal(tmp_path / "daemon.db")
        done = command("--backup", tmp_path / "no" / "copy.db", tmp_path / "daemon.db")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr == f"daemon_db: cannot write {tmp_path}/no/copy.db: No such file or directory\n"
        for no_name in "", "-":
            assert command("--backup", no_name, tmp_path / "daemon.db", cwd=tmp_path).returncode == 2
        assert list(files_in(tmp_path)) == ["daemon.db"]

    def test_what_is_there_is_replaced_or_stays(self, tmp_path: Path) -> None:
        path, copy = tmp_path / "daemon.db", tmp_path / "copy.db"
        make_wal(path)
        copy.write_text("something else", encoding="ascii")
        (tmp_path / "link.db").symlink_to(copy)
        files = open_files()
        assert command("--backup", tmp_path / "link.db", path).returncode == 0
        assert open_files() == files
        assert (tmp_path / "link.db").is_symlink()
        good = copy.read_bytes()
        page = damage(path, "runs")
        done = command("--backup", copy, path)
        assert (done.returncode, report(done.stdout)["check"]) == (1, "failed")
        assert re.search(
            rf"failed the check: .*[Pp]age {page}\b.*: stop every program.*\. No backup was written$", done.stderr
        )
        assert copy.read_bytes() == good
        with DB.open(copy) as db:
            assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (1,)
        assert sorted(os.listdir(tmp_path)) == ["copy.db", "daemon.db", "link.db"]

    @pytest.mark.parametrize("script", ["PRAGMA encoding='UTF-16le';", "CREATE TABLE pragma_integrity_check (x);"])
    def test_a_sound_file_of_another_kind_is_no_damage(self, script: str, tmp_path: Path) -> None:
        """Nor does a table of that name hide what is."""
        path, copy = tmp_path / "daemon.db", tmp_path / "copy.db"
        make_rollback(path, script=script + _schema.SQL)
        assert command("--check", path).returncode == command("--backup", copy, path).returncode == 0
        damage(path, "runs")
        assert command("--check", path).returncode == command("--backup", copy, path).returncode == 1

    def test_rows_without_their_run_are_copied_and_said(self, tmp_path: Path) -> None:
        """A backup of them is better than none, but worse than the one that is there."""
        path = tmp_path / "daemon.db"
        TestDamage().make_orphans(path, 1)
        done = command("--backup", tmp_path / "copy.db", path)
        assert (done.returncode, report(done.stdout)["backup"]) == (1, str(tmp_path / "copy.db"))
        assert "events row 1 refers to a row of runs that isn't there" in done.stderr
        assert done.stderr.endswith(". The backup was written all the same\n")
        (tmp_path / "copy.db").write_text("a good one", encoding="ascii")
        done = command("--backup", tmp_path / "copy.db", path)
        assert (done.returncode, report(done.stdout).get("backup")) == (1, None)
        assert done.stderr.endswith(". No backup was written\n")
        assert (tmp_path / "copy.db").read_text(encoding="ascii") == "a good one"

    def test_without_space_and_interrupted(self, tmp_path: Path) -> None:
        path, copy = tmp_path / "daemon.db", tmp_path / "copy.db"
        with DB.open(path) as db:
            insert_run(db.conn)
            db.conn.execute(f"UPDATE runs SET {spare('runs')} = hex(zeroblob(3000000))")
        assert command("--backup", copy, path).returncode == 0
        before = files_in(tmp_path)

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))

        done = in_a_process("--backup", copy, path, preexec_fn=limit)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"daemon_db: cannot copy {path} to {copy}: disk I/O error\n"
        assert files_in(tmp_path) == before
        for number in signal.SIGINT, signal.SIGTERM:
            process = start(INTERRUPT_IN_BACKUP.replace("SIGNAL", str(int(number))), "--backup", copy, path)
            assert end(process) == ("", "daemon_db: interrupted\n")
            assert process.returncode == 130
            assert files_in(tmp_path) == before

    def test_what_comes_while_it_copies(self, tmp_path: Path) -> None:
        """A program that opens what is at DEST: its -wal would be played back over the copy."""
        path, copy = tmp_path / "daemon.db", tmp_path / "copy.db"
        make_wal(path)
        make_wal(copy)
        before = files_in(tmp_path)
        output, errors = end(start(USE_IN_BACKUP, "--backup", copy, path))
        assert (output, errors) == (
            "",
            f"daemon_db: cannot write {copy}: {BESIDE.format(target=copy, suffix='-wal')}\n",
        )
        assert files_in(tmp_path) == before | {"copy.db-wal": b"in use"}

    def test_an_older_file_is_copied_and_not_updated(self, tmp_path: Path) -> None:
        path, copy = tmp_path / "daemon.db", tmp_path / "copy.db"
        TestOlderFiles().make_older(path)
        before = path.read_bytes()
        assert command("--backup", copy, path).returncode == 0
        assert path.read_bytes() == before
        assert "next open" in report(command("--check", copy).stdout)


USE_IN_BACKUP = """
import sys
from pathlib import Path
from daemon_db import __main__

copy_and_check = __main__.copy_and_check


def use_meanwhile(conn, path, part, target, show):
    Path(f"{target}-wal").write_bytes(b"in use")
    return copy_and_check(conn, path, part, target, show)


__main__.copy_and_check = use_meanwhile
sys.exit(__main__.main())
"""


WAIT_IN_BACKUP = """
import sys
from daemon_db import __main__

copy_and_check = __main__.copy_and_check


def wait(conn, path, part, target, show):
    return copy_and_check(conn, path, part, target, lambda far: (show(far), sys.stdin.readline()))


__main__.copy_and_check = wait
sys.exit(__main__.main())
"""


INTERRUPT_IN_BACKUP = """
import os, runpy, signal, sys
from daemon_db import __main__

copy_and_check = __main__.copy_and_check


def interrupt(conn, path, part, target, show):
    copy_and_check(conn, path, part, target, lambda far: os.kill(os.getpid(), SIGNAL))


signal.signal(signal.SIGINT, signal.default_int_handler)
__main__.copy_and_check = interrupt
sys.exit(__main__.main())
"""


class TestWhereItCannotBeSaid:
    """An error, and no traceback, although Python would write what is left of its buffer once more when it exits."""

    def test_a_full_device(self, tmp_path: Path) -> None:
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full; the next test is the same with a pipe")
        with open("/dev/full", "w") as full:
            done = in_a_process(tmp_path / "daemon.db", stdout=full)
        words = f"daemon_db: cannot write to standard output: {os.strerror(errno.ENOSPC)}\n"
        assert (done.returncode, done.stderr) == (1, words)

    def test_a_pipe_that_nobody_reads(self, tmp_path: Path) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        try:
            done = in_a_process(tmp_path / "daemon.db", stdout=writer)
        finally:
            os.close(writer)
        words = f"daemon_db: cannot write to standard output: {os.strerror(errno.EPIPE)}\n"
        assert (done.returncode, done.stderr) == (1, words)

    def test_closed(self, tmp_path: Path) -> None:
        done = subprocess.run(
            ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-m", "daemon_db", str(tmp_path / "daemon.db")],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            timeout=LIMIT,
        )
        assert (done.returncode, done.stderr) == (0, b"")

    def test_no_standard_error_for_a_failure(self, tmp_path: Path) -> None:
        """It must not go to standard output, where somebody reads a report."""
        done = in_a_process(tmp_path / "no" / "db", preexec_fn=lambda: os.close(2), stderr=None)
        assert (done.returncode, done.stdout) == (1, "")

    def test_no_standard_error(self, tmp_path: Path) -> None:
        make_wal(tmp_path / "daemon.db")
        shell = ["sh", "-c", '"$@" 2>&-', "sh"]
        arguments = [sys.executable, "-m", "daemon_db", "--check", str(tmp_path / "daemon.db")]
        done = subprocess.run([*shell, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
        assert done.returncode == 0
        assert report(done.stdout)["check"] == "ok"


class TestDamage:
    def make_orphans(self, path: Path, count: int) -> None:
        with DB.open(path) as db:
            db.conn.execute("PRAGMA foreign_keys=OFF")
            for number in range(1, count + 1):
                append_event(db.conn, f"gone-{number}")

    def test_pages_that_nothing_uses(self, tmp_path: Path) -> None:
        """SQLite tells of all of them in one row, of which each line is a problem."""
        path = tmp_path / "daemon.db"
        make_wal(path)
        content = path.read_bytes()
        pages = len(content) // 4096
        more = (pages + 50).to_bytes(4, "big")  # https://sqlite.org/fileformat.html#in_header_database_size
        path.write_bytes(content[:28] + more + content[32:] + bytes(50 * 4096))
        done = command("--check", path)
        assert (done.returncode, report(done.stdout)["check"]) == (1, "failed")
        lines = done.stderr.splitlines()
        assert len(lines) == 1
        assert lines[0].count("never used") == 9  # after the name of the database
        assert lines[0].endswith(f" and 41 more: {AFTER_DAMAGE}")

    @pytest.mark.parametrize(("count", "more"), [(1, ""), (10, ""), (11, " and 1 more"), (15, " and 5 more")])
    def test_rows_without_their_run(self, count: int, more: str, tmp_path: Path) -> None:
        """On one line: the first ten, and how many more. As JSON: all."""
        path = tmp_path / "daemon.db"
        self.make_orphans(path, count)
        assert command(path).returncode == 0
        problems = [f"events row {number} refers to a row of runs that isn't there" for number in range(1, count + 1)]
        done = command("--check", path)
        assert report(done.stdout)["check"] == "failed"
        assert (done.returncode, done.stderr) == (
            1,
            f"daemon_db: {path} failed the check: {'; '.join(problems[:10])}{more}: add the rows that these refer to, "
            "from a backup for instance, or delete these (either they were written without PRAGMA foreign_keys=ON, or "
            "what they refer to was lost)\n",
        )
        done = command("--check", "--json", path)
        assert (done.returncode, json.loads(done.stdout)["problems"]) == (1, problems)

    def test_a_damaged_page(self, tmp_path: Path) -> None:
        path = tmp_path / "daemon.db"
        with DB.open(path) as db:
            insert_run(db.conn)
            (root,) = db.conn.execute("SELECT rootpage FROM sqlite_master WHERE name = 'runs'").fetchone()
            select = """
                SELECT i.name FROM pragma_index_list('runs') AS i, pragma_index_info(i.name) AS c
                WHERE c.name = 'status'"""
            indexes = [name for (name,) in db.conn.execute(select)]
        content = path.read_bytes()
        start, end = (root - 1) * 4096, root * 4096
        path.write_bytes(content[:start] + content[start:end].replace(b"running", b"rUnning") + content[end:])
        assert command(path).returncode == 0
        done = command("--check", path)
        assert done.returncode == 1
        begin, _, problems = done.stderr.strip().removesuffix(f": {AFTER_DAMAGE}").partition("check: ")
        assert begin == f"daemon_db: {path} failed the "
        assert sorted(problems.split("; ")) == sorted(f"row 1 missing from index {index}" for index in indexes)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small database that takes a minute to check: SQLite works out a long CHECK constraint for each row."""
    path = tmp_path_factory.mktemp("slow") / "daemon.db"
    make_rollback(path)
    with closing(sqlite3.connect(path)) as conn:
        conn.execute(f"CREATE TABLE slow (x CHECK ({' + '.join(['abs(x)'] * 500)} >= 0))")
        conn.execute("PRAGMA ignore_check_constraints=ON")
        conn.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000)"
            " INSERT INTO slow SELECT i FROM n"
        )
        conn.commit()
    return path


class Terminal:
    """A terminal for a program's standard error, and all that it has shown."""

    def __init__(self) -> None:
        self.ours, self.its = pty.openpty()
        self.shown = ""

    def read_until(self, pattern: str) -> None:
        deadline = time.monotonic() + LIMIT
        while not re.search(pattern, self.shown):
            if not select.select([self.ours], [], [], max(0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{pattern!r} is not in {self.shown!r}")
            self.shown += os.read(self.ours, 1000).decode()

    def close(self) -> None:
        os.close(self.ours)
        os.close(self.its)


def check(path: Path, **options: object) -> subprocess.Popen[str]:
    """Start to check `path`, with Ctrl-C as a terminal's foreground process has it."""
    arguments = [sys.executable, "-m", "daemon_db", "--check", str(path)]
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        arguments,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


def test_progress_on_a_terminal_and_an_interrupt_in_the_middle(slow: Path) -> None:
    """On a pipe the same check says nothing until it is interrupted. Either way it ends at once, in one line."""
    before = files_in(slow.parent)
    with contextlib.closing(Terminal()) as terminal:
        piped = check(slow, stderr=subprocess.PIPE)  # first, so that it is at least as far
        shown = check(slow, stderr=terminal.its)
        try:
            terminal.read_until(" [0-9]+ s.* [0-9]+ s")
            shown.send_signal(signal.SIGINT)
            assert end(shown) == ("", None)
            terminal.read_until("interrupted\r\n")
            piped.send_signal(signal.SIGINT)
            assert end(piped) == ("", "daemon_db: interrupted\n")
        finally:
            for process in shown, piped:
                process.kill()
                process.wait(LIMIT)
                process.stdout.close()
            piped.stderr.close()
    assert (shown.returncode, piped.returncode) == (130, 130)
    clear = "\r\x1b[K"
    lines = terminal.shown.split(clear)
    assert (lines[0], lines[-1]) == ("", "daemon_db: interrupted\r\n")
    seconds = [int(line.removeprefix(f"checking {slow}: ").removesuffix(" s")) for line in lines[1:-1]]
    assert seconds == sorted(set(seconds))
    assert seconds[0] >= 1
    assert files_in(slow.parent) == before


def test_how_far_a_backup_has_got(tmp_path: Path) -> None:
    path = tmp_path / "daemon.db"
    with DB.open(path) as db:
        insert_run(db.conn)
        db.conn.execute(f"UPDATE runs SET {spare('runs')} = hex(zeroblob(3000000))")  # two steps of 1,000 pages
    with contextlib.closing(Terminal()) as terminal:
        process = start(WAIT_IN_BACKUP, "--backup", tmp_path / "copy.db", path, stderr=terminal.its)
        terminal.read_until(f"copying {path}: 6[0-9] %")
        print(file=process.stdin, flush=True)
        terminal.read_until(f"copying {path}: 100 %")
        end(process)
    assert process.returncode == 0
    assert (tmp_path / "copy.db").exists()


def test_no_progress_on_a_terminal_for_what_is_quick(tmp_path: Path) -> None:
    make_wal(tmp_path / "daemon.db")
    with contextlib.closing(Terminal()) as terminal:
        quick = check(tmp_path / "daemon.db", stderr=terminal.its)
        output, _ = end(quick)
        assert report(output)["check"] == "ok"
        os.write(terminal.its, b"the end")
        terminal.read_until("the end")
    assert terminal.shown == "the end"


INTERRUPT_WHEN_CONNECTING = """
import os, runpy, signal, sys

def interrupt(event, _):
    global is_done
    if event == "sqlite3.connect" and not is_done:
        is_done = True
        os.kill(os.getpid(), signal.SIGINT)

import daemon_db
is_done = False
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(interrupt)
runpy.run_module("daemon_db", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_an_interrupt_before_anything_is_found(arguments: list[str], tmp_path: Path) -> None:
    """When SQLite is asked to open the file."""
    make_wal(tmp_path / "daemon.db")
    before = files_in(tmp_path)
    process = start(INTERRUPT_WHEN_CONNECTING, *arguments, tmp_path / "daemon.db")
    assert end(process) == ("", "daemon_db: interrupted\n")
    assert process.returncode == 130
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("version", "has_it"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 52, 0), False),
    ],
)
def test_which_versions_have_the_wal_reset_bug(version: tuple[int, int, int], has_it: bool) -> None:
    assert __main__.has_wal_reset_bug(version) is has_it
