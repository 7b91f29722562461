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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

import daemon_db
from daemon_db import DB, OpenError, __main__, _schema
from support import (
    CHANGES,
    ENVIRONMENT,
    FIRST,
    LIMIT,
    UNPRIVILEGED,
    append_event,
    end,
    files_in,
    fill_with_sqlite3,
    insert_run,
    make_hot,
    make_killed,
    make_nothing,
    make_rollback,
    make_wal,
    open_files,
    public_directory,
    something_is_forbidden,
    spare,
    start,
    worker,
)
from test_mount import can_mount, in_a_namespace


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


def as_typed(value: object) -> str | None:
    """The name of a case: its arguments."""
    return " ".join(value) if isinstance(value, list) else None


def report(output: str) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in output.splitlines())


def fails(done: subprocess.CompletedProcess[str], path: object, words: str) -> None:
    """That it ended with one line on standard error, which begins with the path and has the words, and nothing else."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"daemon_db: {path}: ")
    assert words in done.stderr


@contextlib.contextmanager
def as_another_user() -> Iterator[tuple[Path, Callable[..., str]]]:
    """A directory that every user can get to; and the command, done by one with no rights but everybody's."""
    code = """
said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    status = daemon_db.__main__.main()
said.seek(0)
print(status)
print(end=said.read())
"""
    prologue = f"import locale, daemon_db.__main__\n{UNPRIVILEGED}"
    with public_directory() as public, worker(prologue, CHANGES[0]) as run_there:
        (public / "directory").mkdir()
        yield public / "directory", lambda *arguments: run_there(code, *arguments)


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
        for word in ("PATH", "--check", "--backup DEST", "--json", "--version", "write nothing"):
            assert word in done.stdout


class TestNothingIsWritten:
    """By --check, and by --backup to the file that it copies."""

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (make_nothing, "not exist"),  # mistyped, for instance
            (Path.touch, "no database yet"),
            (make_hot, "rollback journal"),
        ],
    )
    def test_refused(self, make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
        make(tmp_path / "daemon.db")
        before = files_in(tmp_path)
        for option in ["--check"], ["--backup", "copy.db"]:
            fails(command(*option, "daemon.db", cwd=tmp_path), tmp_path / "daemon.db", words)
            assert files_in(tmp_path) == before

    @pytest.mark.parametrize("option", [["--check"], ["--backup", "copy/copy.db"]], ids=as_typed)
    @pytest.mark.parametrize("make", [make_wal, make_rollback, make_killed])
    def test_the_database_stays_as_it_is(self, make: Callable[[Path], None], option: list[str], tmp_path: Path) -> None:
        """But for the WAL's index: in there, the WAL is read anew."""
        make(tmp_path / "daemon.db")
        (tmp_path / "copy").mkdir()
        before = files_in(tmp_path)
        done = command(*option, "daemon.db", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert report(done.stdout)["runs"] == "1 row"
        after = files_in(tmp_path)
        if option != ["--check"]:
            assert after.pop("copy/copy.db")
            copy = report(command("--check", tmp_path / "copy/copy.db").stdout)
            assert (copy["runs"], copy["journal mode"], copy["check"]) == ("1 row", "delete", "ok")
        assert after.keys() == before.keys()
        for name in before.keys() - {"daemon.db-shm"}:
            assert after[name] == before[name]

    @pytest.mark.skipif(not something_is_forbidden(), reason="root can't become another user here")
    def test_by_a_user_who_may_only_read(self) -> None:
        with as_another_user() as (directory, command_there), DB.open(directory / "daemon.db") as db:
            insert_run(db.conn)
            for file in directory.iterdir():
                file.chmod(0o444)
            directory.chmod(0o555)
            before = files_in(directory)
            status, _, output = command_there("--check", directory / "daemon.db").partition("\n")
            lines = report(output)
            assert (status, lines["runs"], lines["check"]) == ("0", "1 row", "ok")
            assert files_in(directory) == before

    def test_beside_a_running_daemon(self, tmp_path: Path) -> None:
        with DB.open(tmp_path / "daemon.db", timeout=0) as db:
            insert_run(db.conn)
            with db.transaction() as conn:
                append_event(conn)
                lines = report(command("--check", tmp_path / "daemon.db").stdout)
            assert (lines["runs"], lines["events"], lines["check"]) == ("1 row", "0 rows", "ok")


MODES = [[], ["--check"], ["--backup", "copy.db"]]
INTERRUPTED = "daemon_db: interrupted\n"


class TestErrors:
    """One line, which says the path once."""

    def test_a_file_that_cannot_be_opened(self, tmp_path: Path) -> None:
        text = tmp_path / "notes.txt"
        text.write_text("some notes", encoding="ascii")
        missing = tmp_path / "no" / "daemon.db"
        for option in MODES:
            fails(command(*option, text, cwd=tmp_path), text, "not a SQLite database")
            fails(command(*option, tmp_path, cwd=tmp_path), tmp_path, "directory")
            fails(command(*option, missing, cwd=tmp_path), missing, str(missing.parent))
            assert files_in(tmp_path) == {"notes.txt": b"some notes"}

    @pytest.mark.usefixtures("first_schema")
    def test_a_schema_that_does_not_fit(self, tmp_path: Path) -> None:
        path = tmp_path / "other.db"
        text = FIRST.replace("parallelism     INTEGER", "parallelism TEXT")
        make_rollback(path, script=f"{text} ALTER TABLE runs RENAME COLUMN error TO failure")
        before, files = open_files(), files_in(tmp_path)
        for option in MODES:
            fails(command(*option, path, cwd=tmp_path), path, "; runs.error: missing column; runs.failure: ")
            assert (open_files(), files_in(tmp_path)) == (before, files)

    @pytest.mark.parametrize(
        ("sql", "since"),
        [
            ("CREATE TABLE quota (n INTEGER DEFAULT 1_000_000)", (3, 46)),
            ("CREATE TABLE quota (n INTEGER) STRICT", (3, 37)),
            ("CREATE TABLE quota (n INTEGER) SOLID", (99,)),
            ("CREATE TABLE quota (n INTEGER CHECK (n IS NEITHER b))", (99,)),
        ],
    )
    def test_a_definition_that_only_a_newer_sqlite_understands(
        self, sql: str, since: tuple[int, ...], tmp_path: Path
    ) -> None:
        """It is no damage, and nothing is written. Where SQLite understands it, the file is opened."""
        path = tmp_path / "daemon.db"
        make_rollback(path, script=f"{_schema.SQL} CREATE TABLE quota (n);")
        with closing(sqlite3.connect(path, isolation_level=None)) as conn:
            conn.execute("PRAGMA writable_schema=ON")
            conn.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'quota'", (sql,))
        if sqlite3.sqlite_version_info >= since:
            DB.open(path).close()
            return
        files = files_in(tmp_path)
        for option in MODES:
            done = command(*option, path, cwd=tmp_path)
            fails(done, path, f" {sqlite3.sqlite_version} ")
            assert " quota" in done.stderr
            assert '"Damage"' not in done.stderr
        with pytest.raises(OpenError, match=" quota") as caught:
            DB.open(path, read_only=True)
        assert f"daemon_db: {caught.value}\n" == done.stderr
        assert files_in(tmp_path) == files

    def test_an_error_after_opening(self, tmp_path: Path) -> None:
        path = tmp_path / "daemon.db"
        make_rollback(path)
        for table in _schema.tables():
            damage(path, table)
        with closing(sqlite3.connect(path)) as conn:  # rows are counted by the smallest index that there is
            for (name,) in conn.execute("SELECT name FROM pragma_index_list('runs')").fetchall():
                damage(path, name)
        for option in [], ["--json"]:
            done = command(*option, path)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1)
            assert done.stderr.startswith(f"daemon_db: {path}: ")
            assert "malformed" in done.stderr
            assert done.stdout == (
                "" if not option else json.dumps({"path": str(path), "error": done.stderr[11:-1]}) + "\n"
            )

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], "required: PATH"),
            (["daemon.db", "other.db"], "unrecognized arguments: other.db"),
            (["--no-such-option", "daemon.db"], "unrecognized arguments: --no-such-option"),
            (["--check", "--backup", "copy.db", "daemon.db"], "not allowed with argument --check"),
        ],
        ids=as_typed,
    )
    def test_wrong_usage(self, arguments: list[str], words: str, tmp_path: Path) -> None:
        done = (command if arguments else in_a_process)(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        usage, *_, error = done.stderr.splitlines()
        assert usage.startswith("usage: python -m daemon_db ")
        assert error.startswith("python -m daemon_db: error: ")
        assert words in error
        assert files_in(tmp_path) == {}

    @pytest.mark.parametrize(
        ("arguments", "status", "words"),
        [
            *(([*mode, "no/daemon.db"], 1, "/no: ") for mode in MODES),
            *(([*mode, "notes.db"], 1, "another program") for mode in MODES),
            (["--backup", "daemon.db", "daemon.db"], 1, "the database itself"),
            (["no/two\nlines"], 1, "/no: "),
            ([""], 2, "a file name, not ''"),
            (["--check", "file:daemon.db"], 2, "not a URI"),
            (["--check", ":memory:"], 2, "nothing to read"),
            (["--backup", "copy.db", ":memory:"], 2, "nothing to read"),
        ],
        ids=as_typed,
    )
    def test_as_json_it_is_the_same(self, arguments: list[str], status: int, words: str, tmp_path: Path) -> None:
        with closing(sqlite3.connect(tmp_path / "notes.db")) as conn:
            conn.execute("CREATE TABLE notes (x)")
        make_wal(tmp_path / "daemon.db")
        before = files_in(tmp_path)
        done = command("--json", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (status, 1)
        assert words in done.stderr
        error = done.stderr.removeprefix("daemon_db: ").removesuffix("\n")
        assert done.stdout == json.dumps({"path": arguments[-1], "error": error}) + "\n"
        assert files_in(tmp_path) == before


def make_older(path: Path) -> list[str]:
    """A file without the last table, and without an index of another one; what the next open adds to it."""
    table, other = _schema.tables()[-1], _schema.tables()[0]
    made = "SELECT name FROM sqlite_master WHERE tbl_name = ? AND sql NOT NULL ORDER BY rowid"
    with closing(sqlite3.connect(path)) as conn:
        conn.executescript(_schema.SQL)
        lacking = [name for (name,) in conn.execute(made, (table,))]
        _, *indexes = [name for (name,) in conn.execute(made, (other,))]
        conn.executescript(f"DROP TABLE {table};" + "".join(f"DROP INDEX {name};" for name in indexes[:1]))
    return [name for name in _schema.expected()[1] if name in (*lacking, *indexes[:1])]


def test_check_says_what_the_next_open_adds(tmp_path: Path) -> None:
    lacking = make_older(tmp_path / "daemon.db")
    before = files_in(tmp_path)
    added = ", ".join(lacking)
    done = command("--check", tmp_path / "daemon.db")
    lines = report(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert (lines["next open"], lines["check"]) == (f"adds {added}", "ok")
    assert lines[_schema.tables()[-1]] == "no such table"
    found = json.loads(command("--check", "--json", tmp_path / "daemon.db").stdout)
    assert [line.partition(":")[0] for line in found["to_add"]] == lacking
    assert found["rows"][_schema.tables()[-1]] is None
    assert files_in(tmp_path) == before
    assert report(command(tmp_path / "daemon.db").stdout)["opened"] == f"added {added}"
    assert "next open" not in report(command("--check", tmp_path / "daemon.db").stdout)


def damage(path: Path, name: str) -> int:
    """Overwrite the first page of the table or index; the page's number."""
    with closing(sqlite3.connect(path)) as conn:
        (page,) = conn.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()
    with open(path, "r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    return int(page)


def make_orphans(path: Path, count: int) -> None:
    """Events whose runs aren't there."""
    with DB.open(path) as db:
        db.conn.execute("PRAGMA foreign_keys=OFF")
        for number in range(1, count + 1):
            append_event(db.conn, f"gone-{number}")


def meanwhile(step: str, code: str) -> str:
    """The command's code; where a backup comes to that step, it first does `code`."""
    return f"""
import os, sys
from pathlib import Path
from daemon_db import __main__, _backup

step = _backup.{step}


def do_meanwhile(*arguments):
    {code}
    return step(*arguments)


_backup.{step} = do_meanwhile
sys.exit(__main__.main())
"""


def back_up_meanwhile(step: str, code: str, copy: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """What --backup does when that happens at that step."""
    process = start(meanwhile(step, code), "--backup", copy, path)
    output, said = end(process)
    return subprocess.CompletedProcess([], process.returncode, output, said)


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

    @pytest.mark.parametrize("umask", [0o022, 0o077])
    @pytest.mark.parametrize("is_there", [False, True])
    @pytest.mark.parametrize(("mode", "copied"), [(0o640, 0o640), (0o644, 0o644), (0o444, 0o444), (0o6600, 0o600)])
    def test_whose_it_is(self, mode: int, copied: int, is_there: bool, umask: int, tmp_path: Path) -> None:
        """Its owner's, its group's and its mode's who was at DEST; or else as the source. Root may give all of it."""
        path, copy = tmp_path / "daemon.db", tmp_path / "copy.db"
        make_rollback(path)
        if is_there:
            copy.touch()
        like = copy if is_there else path
        before = os.umask(umask)
        try:
            for file in {path, like}:
                if os.geteuid() == 0:
                    os.chown(file, 1001 + (file == copy), 2001 + (file == copy))
                file.chmod(mode if file == like else 0o604)
            owners = like.stat().st_uid, like.stat().st_gid
            done = command("--backup", copy, path)
        finally:
            os.umask(before)
        assert (done.returncode, done.stderr) == (0, "")
        found = copy.stat()
        assert ((found.st_uid, found.st_gid), stat.S_IMODE(found.st_mode)) == (owners, copied)

    @pytest.mark.skipif(os.geteuid() != 0 or not something_is_forbidden(), reason="needs a second user")
    @pytest.mark.parametrize(
        ("source_group", "source_mode", "there", "expected"),
        [
            # The group can't be given, so the other user's own gets nothing. Or it is the other user's own.
            (0, 0o644, None, 0o604),
            (0, 0o664, None, 0o604),
            (0, 0o604, None, 0o600),  # that group had no rights: it mustn't get those of the others
            (65534, 0o640, None, 0o640),
            (65534, 0o640, (0, 0o660), 0o600),
            (65534, 0o640, (65534, 0o660), 0o660),
            (0, 0o644, (65534, 0o600), 0o600),
        ],
    )
    def test_whose_it_is_where_not_all_can_be_given(
        self, source_group: int, source_mode: int, there: tuple[int, int] | None, expected: int
    ) -> None:
        """A mode never lets in more than there."""
        with as_another_user() as (directory, command_there):
            path, copy = directory / "daemon.db", directory / "copy.db"
            make_rollback(path)
            os.chown(path, 0, source_group)
            path.chmod(source_mode)
            if there:
                copy.touch()
                os.chown(copy, 0, there[0])
                copy.chmod(there[1])
            os.chown(directory, 0, 2001)
            directory.chmod(0o2777)  # what is made in there begins with that group
            assert command_there("--backup", copy, path).startswith("0\n")
            group = 65534 if (there[0] if there else source_group) == 65534 else 2001
            found = copy.stat()
            assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (65534, group, expected)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can have files of another user")
    def test_of_a_user_whom_a_container_does_not_know(self, tmp_path: Path) -> None:
        """To give the copy to that user is no question of permission: it is "invalid"."""
        make_rollback(tmp_path / "daemon.db")
        os.chown(tmp_path / "daemon.db", 1001, 2001)
        tmp_path.chmod(0o777)
        user = ["unshare", "--user", "--map-root-user"]
        if subprocess.run([*user, "true"], capture_output=True, timeout=LIMIT).returncode:
            pytest.skip("no user namespaces")
        arguments = ["-m", "daemon_db", "--backup", tmp_path / "copy.db", tmp_path / "daemon.db"]
        done = subprocess.run(
            [*user, sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert stat.S_IMODE((tmp_path / "copy.db").stat().st_mode) == 0o604

    @pytest.mark.parametrize(
        ("destination", "status"),
        [
            # The database itself, and what belongs to it.
            ("daemon.db", 1),
            ("hard.db", 1),
            ("link.db", 1),
            ("daemon.db-wal", 1),
            ("daemon.db-shm", 1),
            ("daemon.db-journal", 1),
            ("other.db-wal", 1),
            # What is beside it would be played over the copy.
            ("used.db", 1),
            ("hot.db", 1),
            # No file.
            ("directory", 2),
            ("pipe", 2),
            ("new/", 2),
            ("circle", 2),
            ("", 2),
        ],
    )
    def test_what_would_do_harm_is_refused(self, destination: str, status: int, tmp_path: Path) -> None:
        path = tmp_path / "daemon.db"
        make_wal(path)
        os.link(path, tmp_path / "hard.db")
        (tmp_path / "link.db").symlink_to(path)
        (tmp_path / "directory").mkdir()
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "circle").symlink_to(tmp_path / "circle")
        make_killed(tmp_path / "used.db")
        make_hot(tmp_path / "hot.db")
        (tmp_path / "other.db-wal").symlink_to(f"{path}-wal")
        before = files_in(tmp_path)
        done = command("--backup", destination, path, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
        if status == 1:
            suffix = {"used.db": "-wal", "hot.db": "-journal"}.get(destination, "")
            target = os.path.realpath(tmp_path / destination)
            fails(done, target, f"{target}{suffix}")
        assert files_in(tmp_path) == before

    def test_where_it_can_not_be_written(self, tmp_path: Path) -> None:
        make_wal(tmp_path / "daemon.db")
        copy = tmp_path / "no" / "copy.db"
        fails(command("--backup", copy, tmp_path / "daemon.db"), copy, os.strerror(errno.ENOENT))
        assert list(files_in(tmp_path)) == ["daemon.db"]

    @can_mount
    @pytest.mark.parametrize(("options", "words"), [("size=60k", "full"), ("nr_inodes=1", os.strerror(errno.ENOSPC))])
    def test_a_full_disk(self, options: str, words: str, tmp_path: Path) -> None:
        """It names DEST: the source's has space."""
        make_wal(tmp_path / "daemon.db")
        (tmp_path / "full").mkdir()
        script = f"""
mount -t tmpfs -o {options} none full
daemon_db daemon.db --backup full/copy.db
ls full
"""
        said, *rest = in_a_namespace(script, tmp_path)
        assert said.startswith(f"daemon_db: {tmp_path}/full/copy.db: ")
        assert words in said
        assert rest == ["status 1"]
        assert list(files_in(tmp_path)) == ["daemon.db", "full"]

    @pytest.mark.parametrize(("step", "status"), [("copy_and_check", 1), ("show_progress", 0)])
    def test_the_source_is_moved_away(self, step: str, status: int, tmp_path: Path) -> None:
        """Before the first read: refused. After it: what was read is of one moment, and whole."""
        path, copy = tmp_path / "daemon.db", tmp_path / "copy.db"
        make_wal(path, runs=3)
        copy.write_text("a good one", encoding="ascii")
        done = back_up_meanwhile(step, f"os.rename({str(path)!r}, {str(tmp_path / 'away.db')!r})", copy, path)
        if status:
            fails(done, path, "removed")
            assert copy.read_text(encoding="ascii") == "a good one"
        else:
            assert (done.returncode, done.stderr, report(done.stdout)["check"]) == (0, "", "ok")
            assert report(command("--check", copy).stdout)["runs"] == "3 rows"
        assert report(command("--check", tmp_path / "away.db").stdout)["runs"] == "3 rows"
        assert not list(tmp_path.glob("*.part*"))

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
        assert re.search(rf"failed the check: .*[Pp]age {page}\b.*\. No backup was written$", done.stderr)
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
        make_orphans(path, 1)
        done = command("--backup", tmp_path / "copy.db", path)
        assert (done.returncode, report(done.stdout)["backup"]) == (1, str(tmp_path / "copy.db"))
        assert "events row 1 " in done.stderr
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

        limit = (resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        done = in_a_process("--backup", copy, path, preexec_fn=lambda: resource.setrlimit(*limit))
        fails(done, copy, "disk I/O error")
        assert files_in(tmp_path) == before
        for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
            done = back_up_meanwhile("show_progress", f"os.kill(os.getpid(), {int(number)})", copy, path)
            assert (done.returncode, done.stdout, done.stderr) == (130, "", INTERRUPTED)
            assert files_in(tmp_path) == before

    def test_what_comes_while_it_copies(self, tmp_path: Path) -> None:
        """A program that opens what is at DEST: its -wal would be played back over the copy."""
        path, copy = tmp_path / "daemon.db", tmp_path / "copy.db"
        make_wal(path)
        make_wal(copy)
        before = files_in(tmp_path)
        done = back_up_meanwhile("copy_and_check", f"Path('{copy}-wal').write_bytes(b'in use')", copy, path)
        fails(done, copy, f"{copy}-wal")
        assert files_in(tmp_path) == before | {"copy.db-wal": b"in use"}

    def test_an_older_file_is_copied_and_not_updated(self, tmp_path: Path) -> None:
        path, copy = tmp_path / "daemon.db", tmp_path / "copy.db"
        make_older(path)
        before = path.read_bytes()
        assert command("--backup", copy, path).returncode == 0
        assert path.read_bytes() == before
        assert "next open" in report(command("--check", copy).stdout)


class TestWhereItCannotBeSaid:
    @pytest.mark.parametrize("device", ["/dev/full", None])
    def test_a_full_device_and_a_pipe_that_nobody_reads(self, device: str | None, tmp_path: Path) -> None:
        """No success."""
        if device and not os.path.exists(device):
            pytest.skip("no /dev/full")
        reader, writer = os.pipe()
        os.close(reader)
        with open(device, "w") if device else open(writer, "w") as nowhere:
            done = in_a_process(tmp_path / "daemon.db", stdout=nowhere)
        assert done.returncode not in (0, 130)
        assert os.strerror(errno.ENOSPC if device else errno.EPIPE) in done.stderr

    @pytest.mark.parametrize(
        ("redirection", "name", "status", "check"),
        [(">&-", "daemon.db", 0, None), ("2>&-", "daemon.db", 0, "ok"), ("2>&-", "no/db", 1, None)],
    )
    def test_closed(self, redirection: str, name: str, status: int, check: str | None, tmp_path: Path) -> None:
        """Where there is no standard error, no error goes to standard output: somebody reads a report there."""
        make_wal(tmp_path / "daemon.db")
        done = subprocess.run(
            ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-m", "daemon_db", "--check", name],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert (done.returncode, done.stderr) == (status, "")
        assert report(done.stdout).get("check") == check


class TestDamage:
    @pytest.mark.parametrize("option", MODES[1:], ids=as_typed)
    def test_as_json(self, option: list[str], tmp_path: Path) -> None:
        make_wal(tmp_path / "daemon.db")
        damage(tmp_path / "daemon.db", "runs")
        done = command("--json", *option, "daemon.db", cwd=tmp_path)
        found = json.loads(done.stdout)
        assert done.stderr == f"daemon_db: {found['error']}\n"
        assert (done.returncode, found["rows"], found["damaged"], found.get("backup")) == (1, {}, True, None)
        assert list(files_in(tmp_path)) == ["daemon.db"]

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
        assert done.stderr.count("\n") == 1
        assert done.stderr.count("never used") == 2  # after the name of the database
        assert " and 48 more" in done.stderr
        problems = json.loads(command("--json", "--check", path).stdout)["problems"]
        assert sum("never used" in problem for problem in problems) == 50

    @pytest.mark.parametrize(("count", "more"), [(1, ""), (3, ""), (4, " and 1 more"), (8, " and 5 more")])
    def test_rows_without_their_run(self, count: int, more: str, tmp_path: Path) -> None:
        """On one line: the first three, and how many more. As JSON: all."""
        path = tmp_path / "daemon.db"
        make_orphans(path, count)
        assert command(path).returncode == 0
        done = command("--json", "--check", path)
        problems = json.loads(done.stdout)["problems"]
        assert len(problems) == count
        assert all(line.startswith(f"events row {number} ") for number, line in enumerate(problems, 1))
        done = command("--check", path)
        assert report(done.stdout)["check"] == "failed"
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith(f"daemon_db: {path} failed the check: {'; '.join(problems[:3])}{more}: ")

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
        done = command("--json", "--check", path)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert re.match(f"daemon_db: {path} failed the check: .*row 1 missing from index", done.stderr)
        problems = json.loads(done.stdout)["problems"]
        assert sorted(problems) == sorted(f"row 1 missing from index {index}" for index in indexes)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small database that takes ten minutes to check: SQLite works out long CHECK constraints for each row."""
    path = tmp_path_factory.mktemp("slow") / "daemon.db"
    make_rollback(path)
    with closing(sqlite3.connect(path)) as conn:
        check = f"CHECK ({' + '.join(['abs(x)'] * 500)} >= 0)"
        conn.execute(f"CREATE TABLE slow (x {' '.join([check] * 10)})")
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


CHECK = """
import sys
from daemon_db import __main__

problems_and_rows = __main__.problems_and_rows


def say_and_look(conn):
    print("looking", flush=True)
    return problems_and_rows(conn)


__main__.problems_and_rows = say_and_look
sys.exit(__main__.main())
"""


def test_a_line_on_a_terminal_and_an_interrupt_in_the_middle(slow: Path) -> None:
    """On a pipe the same check says nothing until it is interrupted. Each time it ends at once, in one line."""
    before = files_in(slow.parent)
    as_json = json.dumps({"path": str(slow), "error": "interrupted"}) + "\n"
    with closing(Terminal()) as terminal:
        for arguments, options, output, said in (
            ([], {"stderr": terminal.its}, "", None),
            ([], {}, "", INTERRUPTED),
            (["--json"], {}, as_json, INTERRUPTED),
        ):
            process = start(CHECK, *arguments, "--check", slow, **options)
            assert process.stdout.readline() == "looking\n"
            process.send_signal(signal.SIGINT)
            assert end(process) == (output, said)
            assert process.returncode == 130
        terminal.read_until("interrupted\r\n")
    assert terminal.shown == f"reading all of {slow} ...\r\ndaemon_db: interrupted\r\n"
    assert files_in(slow.parent) == before


def test_how_far_a_backup_has_got(tmp_path: Path) -> None:
    path = tmp_path / "daemon.db"
    with DB.open(path) as db:
        insert_run(db.conn)
        db.conn.execute(f"UPDATE runs SET {spare('runs')} = hex(zeroblob(3000000))")  # two steps of 1,000 pages
    with closing(Terminal()) as terminal:
        code = meanwhile("show_progress", "return step(*arguments), sys.stdin.readline()")
        process = start(code, "--backup", tmp_path / "copy.db", path, stderr=terminal.its)
        terminal.read_until("\r6[0-9] %")
        print(file=process.stdin, flush=True)
        terminal.read_until("\r100 %\r\n")
        end(process)
    assert process.returncode == 0
    assert (tmp_path / "copy.db").exists()


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
    assert end(process) == ("", INTERRUPTED)
    assert process.returncode == 130
    assert files_in(tmp_path) == before


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@pytest.mark.parametrize("version", ["3.7.0", "3.40.1", "3.44.5", "3.45.0", "3.50.6", "3.51.2"])
def test_these_versions_have_the_wal_reset_bug(version: str) -> None:
    assert __main__.has_wal_reset_bug(as_numbers(version))


@pytest.mark.parametrize("version", ["3.6.23", "3.44.6", "3.50.7", "3.51.3", "3.52.0"])
def test_these_have_it_not(version: str) -> None:
    assert not __main__.has_wal_reset_bug(as_numbers(version))
