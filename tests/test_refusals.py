"""What can't be opened, or can't be written: each `OpenError` with its words, and wrong arguments.

Files that are databases but don't fit are in `test_schema`, damaged ones in `test_damage`, locked ones in
`test_processes`.
"""

import math
import os
import shutil
import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from daemon_db import DB, OpenError, _connection, _schema
from support import insert_run, open_files, run


def make_rollback(path: Path) -> None:
    """A database in rollback-journal mode, SQLite's default, with one run."""
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.executescript(_schema.SQL)
        insert_run(conn)


def make_wal(path: Path) -> None:
    with DB.open(path) as db:
        insert_run(db.conn)


def files_in(directory: Path) -> dict[str, bytes | None]:
    """Each name under `directory`, with the bytes of those that are files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


def count_in_a_thread(db: DB) -> int:
    """How many runs a new connection sees."""
    with ThreadPoolExecutor(1) as pool:
        return int(pool.submit(lambda: db.conn.execute("SELECT count(*) FROM runs").fetchone()[0]).result())


class TestArguments:
    @pytest.mark.parametrize(
        ("path", "error", "message"),
        [
            ("", ValueError, "path must be a file name, not ''"),
            ("a\0b", ValueError, r"path must be a file name, not 'a\\x00b'"),
            ("\ud800", ValueError, "surrogates not allowed"),  # a str that no file name decodes to
            (b"db", TypeError, "path must be str or os.PathLike.str., not bytes"),
            (7, TypeError, "expected str, bytes or os.PathLike object, not int"),
            (None, TypeError, "expected str, bytes or os.PathLike object, not NoneType"),
        ],
    )
    def test_not_a_path(
        self, path: object, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(error, match=message):
            DB.open(path)  # type: ignore[arg-type]
        assert files_in(tmp_path) == {}

    @pytest.mark.parametrize("timeout", [-1, -0.001, math.nan, math.inf, -math.inf, 2_147_484])
    def test_not_a_timeout(self, timeout: float, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"timeout must be from 0 to 2147483 seconds, not {timeout}"):
            DB.open(tmp_path / "db", timeout=timeout)
        assert files_in(tmp_path) == {}

    @pytest.mark.parametrize("timeout", ["5", None])
    def test_not_a_number(self, timeout: object, tmp_path: Path) -> None:
        with pytest.raises(TypeError):
            DB.open(tmp_path / "db", timeout=timeout)  # type: ignore[arg-type]
        assert files_in(tmp_path) == {}


def make_directory(path: Path) -> None:
    path.mkdir()


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_file_for_parent(path: Path) -> None:
    path.parent.write_text("a file")


def make_nothing(path: Path) -> None:
    """A path where nothing is."""


NOT_REGULAR = "not a regular file"


def check(error: OpenError, path: Path, reason: str, code: str | None) -> None:
    """That this is the error, and from which of SQLite's: `None` where SQLite need not have said no."""
    assert str(error) == f"cannot open {path}: {reason}"
    assert (error.path, error.reason) == (str(path), reason)
    if code is not None:
        assert error.sqlite_errorname == code
        assert isinstance(error.__cause__, sqlite3.Error)
        assert error.sqlite_errorcode == error.__cause__.sqlite_errorcode == getattr(sqlite3, code)


class TestNotToBeOpened:
    @pytest.mark.parametrize(
        ("make", "name", "reason", "code"),
        [
            (make_directory, "db", "it is a directory", "SQLITE_CANTOPEN"),
            (make_nothing, "no/db", "parent directory {parent} does not exist", "SQLITE_CANTOPEN"),
            (make_nothing, "no/no/db", "parent directory {parent} does not exist", "SQLITE_CANTOPEN"),
            (make_file_for_parent, "file/db", "parent directory {parent}: Not a directory", "SQLITE_CANTOPEN"),
            pytest.param(make_nothing, "x" * 300, "unable to open database file", "SQLITE_CANTOPEN", id="long name"),
            pytest.param(
                make_nothing, "x/" * 3000, "parent directory {parent}: File name too long", "SQLITE_CANTOPEN", id="long"
            ),
            (os.mkfifo, "db", NOT_REGULAR, None),
            (make_socket, "db", NOT_REGULAR, None),
        ],
    )
    def test_refused_and_left_alone(
        self, make: Callable[[Path], object], name: str, reason: str, code: str | None, tmp_path: Path
    ) -> None:
        path = tmp_path / name
        make(path)
        before, open_before = files_in(tmp_path), open_files()
        with pytest.raises(OpenError) as caught:
            DB.open(path)
        assert files_in(tmp_path) == before
        assert open_files() == open_before
        check(caught.value, path, reason.format(parent=path.parent), code)

    @pytest.mark.parametrize(
        "text",
        ["\n", "no database\n", "no database\n" * 10_000, "SQLite format 4\0" * 1000],
        ids=["one byte", "short", "long", "similar"],
    )
    def test_a_text_file_is_refused_untouched(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "text"
        path.write_text(text)
        open_before = open_files()
        with pytest.raises(OpenError) as caught:
            DB.open(path)
        assert files_in(tmp_path) == {str(path): text.encode()}
        assert open_files() == open_before
        # SQLite takes one byte for none, and has nothing against it.
        check(caught.value, path, "not a SQLite database", "SQLITE_NOTADB" if len(text) > 1 else None)

    def test_a_device(self) -> None:
        with pytest.raises(OpenError, match="^cannot open /dev/null: not a regular file$") as caught:
            DB.open("/dev/null")
        assert caught.value.__cause__ is None  # SQLite would go on

    def test_a_working_directory_that_is_gone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        with pytest.raises(OpenError, match="^cannot open db: the working directory: No such file or directory$"):
            DB.open("db")
        with DB.open(tmp_path / "db"):
            pass

    @pytest.mark.parametrize("name", ["no/../db", "file/../db", "new/", "new/."])
    def test_a_path_that_leads_nowhere_creates_nothing_elsewhere(self, name: str, tmp_path: Path) -> None:
        """SQLite simplifies a path before it opens it: by its text, where the operating system says no."""
        (tmp_path / "file").touch()
        before = files_in(tmp_path)
        with pytest.raises(OpenError):
            DB.open(f"{tmp_path}/{name}")
        assert files_in(tmp_path) == before

    def test_a_relative_path_in_a_directory_that_was_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "removed").mkdir()
        monkeypatch.chdir(tmp_path / "removed")
        (tmp_path / "removed").rmdir()
        with pytest.raises(OpenError, match="^cannot open db: the working directory: No such file or directory$"):
            DB.open("db")

    def test_where_wal_mode_is_not_available(self, tmp_path: Path) -> None:
        """Such as in a file system without shared memory: here, in a VFS without it."""
        uri = f"{(tmp_path / 'db').as_uri()}?vfs=unix-dotfile"
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as conn, pytest.raises(OpenError) as caught:
            _connection.switch_to_wal(conn, str(tmp_path / "db"), time.monotonic() + 5)
        assert caught.value.reason == "WAL mode is not available here: journal_mode stayed 'delete'"


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user can get to, which `tmp_path` is not."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for directory in path.iterdir():
        directory.chmod(0o755)
    shutil.rmtree(path)


OPEN_UNPRIVILEGED = """
import os, signal, sys
from daemon_db import DB, OpenError

DB.open(":memory:").close()  # imports what opening imports: for the other user, those files may be unreadable
if os.geteuid() == 0:  # to whom nothing is forbidden
    os.setgroups([])
    os.setgid(65534)
    getattr(os, sys.argv[2])(65534)
signal.alarm(10)  # the end of an open that waits forever
try:
    DB.open(sys.argv[1])
except OpenError as error:
    print(error.reason)
else:
    print("opened")
"""

FILE_FORBIDDEN = "permission denied: the file is not readable and writable by this user"
DIRECTORY_FORBIDDEN = "permission denied: directory {parent} is not writable by this user"


class TestForbidden:
    @pytest.mark.parametrize(
        ("make", "mode", "directory_mode", "reason"),
        [
            (make_wal, 0o666, 0o777, "opened"),
            (make_nothing, None, 0o555, DIRECTORY_FORBIDDEN),
            (make_nothing, None, 0o000, DIRECTORY_FORBIDDEN),
            (make_rollback, 0o666, 0o555, DIRECTORY_FORBIDDEN),
            (make_wal, 0o666, 0o555, DIRECTORY_FORBIDDEN),
            (make_rollback, 0o444, 0o777, FILE_FORBIDDEN),
            (make_wal, 0o444, 0o777, FILE_FORBIDDEN),
            (make_wal, 0o444, 0o555, FILE_FORBIDDEN),
            (make_wal, 0o222, 0o777, FILE_FORBIDDEN),
            (make_wal, 0o000, 0o777, FILE_FORBIDDEN),
            (os.mkfifo, 0o444, 0o777, NOT_REGULAR),  # SQLite's second try, to open it for reading, never returns
        ],
        ids=lambda value: oct(value) if isinstance(value, int) else getattr(value, "__name__", ""),
    )
    @pytest.mark.parametrize("change_user", ["setuid", "seteuid"])
    def test_by_permissions(
        self,
        make: Callable[[Path], object],
        mode: int | None,
        directory_mode: int,
        reason: str,
        change_user: str,
        public: Path,
    ) -> None:
        """The effective user's permissions count, as they do for SQLite; the real user's may be more."""
        path = public / "directory" / "db"
        path.parent.mkdir()
        make(path)
        if mode is not None:
            path.chmod(mode)
        before = files_in(public)
        path.parent.chmod(directory_mode)
        output = run(OPEN_UNPRIVILEGED, path, change_user)
        path.parent.chmod(0o755)
        assert output == f"{reason.format(parent=path.parent)}\n"
        assert files_in(public) == before


OPEN_LIMITED = """
import resource, sys
from daemon_db import DB, OpenError

_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))
try:
    DB.open(sys.argv[1])
except OpenError as error:
    print(error.reason, error.sqlite_errorname)
"""

APPEND_LIMITED = """
import os, resource, sqlite3, sys
from daemon_db import DB

path, cache_size = sys.argv[1:]
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)


def append(count):
    ran = 0
    try:
        with db.transaction() as conn:
            for _ in range(count):
                conn.execute(
                    "INSERT INTO events (run_id, sequence, event_type, payload_json)"
                    " SELECT 'run-1', count(*) + 1, 'step', hex(zeroblob(2000)) FROM events"
                )
                ran += 1
    except sqlite3.OperationalError as error:
        print(error, "in COMMIT" if ran == count else "in INSERT")
    assert not db.conn.in_transaction
    print(*db.conn.execute("SELECT count(*) FROM events").fetchone())


with DB.open(path, on_connect=lambda conn: conn.execute(f"PRAGMA cache_size={cache_size}")) as db:
    append(3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path + "-wal") + 100_000, hard))
    append(100)
    append(4)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    append(100)
"""


class TestNoSpace:
    """A limit on the size of files, in place of a disk that is full: SQLite meets the same failing writes."""

    @pytest.mark.parametrize(
        ("make", "limit", "name"),
        [
            (make_nothing, 0, "SQLITE_IOERR_WRITE"),  # the rollback journal
            (make_nothing, 600, "SQLITE_IOERR_WRITE"),  # the first page
            (make_nothing, 8192, "SQLITE_IOERR_SHMSIZE"),  # the WAL index
            (make_nothing, 40_000, "SQLITE_IOERR_WRITE"),  # the WAL, in the transaction that creates the schema
            (make_rollback, 0, "SQLITE_IOERR_WRITE"),
            (make_rollback, 600, "SQLITE_IOERR_WRITE"),
            (make_wal, 0, "SQLITE_IOERR_SHMOPEN"),
            (make_wal, 600, "SQLITE_IOERR_SHMSIZE"),
        ],
    )
    def test_opening(self, make: Callable[[Path], None], limit: int, name: str, tmp_path: Path) -> None:
        path = tmp_path / "db"
        make(path)
        assert run(OPEN_LIMITED, path, limit) == f"disk I/O error {name}\n"
        with DB.open(path) as db:
            assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (0 if make is make_nothing else 1,)
            assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)

    @pytest.mark.parametrize(("cache_size", "where"), [(-2000, "in COMMIT"), (10, "in INSERT")])
    def test_a_transaction(self, cache_size: int, where: str, tmp_path: Path) -> None:
        """Rolled back whole; a smaller one fits, and with more space so does the next.

        With so few pages of cache, SQLite writes to the WAL before COMMIT.
        """
        path = tmp_path / "db"
        make_wal(path)
        assert run(APPEND_LIMITED, path, cache_size).splitlines() == ["3", f"disk I/O error {where}", "3", "7", "107"]
        with DB.open(path) as db:
            assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (107,)
            assert db.conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            "file:x",
            "file:x?mode=memory",
            "file::memory:",
            "a?b#c%20d",
            "%41%00",
            " spaces and 'quotes\" ",
            "new\nline",
            "naïve",
            os.fsdecode(b"\xff\xfe"),
            "-x",
            ":memory",
            "./:memory:",
        ],
    )
    def test_any_name_is_a_file_name(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with DB.open(name) as db:
            insert_run(db.conn)
            assert db.path == f"{tmp_path}/{name}"
            assert count_in_a_thread(db) == 1
        assert os.listdir() == [name.removeprefix("./")]
        with DB.open(tmp_path / name) as db:
            assert count_in_a_thread(db) == 1

    def test_two_slashes_at_the_beginning(self, tmp_path: Path) -> None:
        """In a URI, what follows them would be a host."""
        with DB.open(f"/{tmp_path}/db") as db:
            insert_run(db.conn)
            assert db.path == f"/{tmp_path}/db"
            assert count_in_a_thread(db) == 1
        assert os.listdir(tmp_path) == ["db"]

    def test_a_relative_path_stays_the_same_file_after_chdir(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "later").mkdir()
        monkeypatch.chdir(tmp_path)
        with DB.open("db") as db:
            insert_run(db.conn)
            monkeypatch.chdir("later")
            assert db.path == str(tmp_path / "db")
            assert count_in_a_thread(db) == 1
            with pytest.raises(sqlite3.IntegrityError), db.transaction() as conn:
                insert_run(conn)
        assert os.listdir() == []

    @pytest.mark.parametrize("exists", [True, False])
    def test_a_symbolic_link_is_the_file_it_leads_to(self, exists: bool, tmp_path: Path) -> None:
        """The WAL, too, is beside that file: else the two names would be two databases."""
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "link").symlink_to("../db")
        if exists:
            make_rollback(tmp_path / "db")
        with DB.open(tmp_path / "links" / "link") as by_link, DB.open(tmp_path / "db") as by_name:
            insert_run(by_link.conn, "run-2")
            insert_run(by_name.conn, "run-3")
            assert count_in_a_thread(by_link) == count_in_a_thread(by_name) == 2 + exists
            assert (tmp_path / "db-wal").exists()
            assert os.listdir(tmp_path / "links") == ["link"]

    def test_dots_after_a_symbolic_link_are_the_operating_systems(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`link/..` is the parent of what the link leads to."""
        (tmp_path / "one" / "two").mkdir(parents=True)
        (tmp_path / "link").symlink_to("one/two")
        monkeypatch.chdir(tmp_path)
        with DB.open("link/../db") as db:
            insert_run(db.conn)
            assert count_in_a_thread(db) == 1
        assert sorted(os.listdir("one")) == ["db", "two"]
        assert os.listdir(".").count("db") == 0


class TestOnConnect:
    @pytest.mark.parametrize("error", [ValueError("no"), sqlite3.OperationalError("no"), KeyboardInterrupt()])
    @pytest.mark.parametrize("path", ["db", ":memory:"])
    def test_its_error_goes_on_and_the_connection_is_closed(
        self, path: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        connections = []

        def fail(conn: sqlite3.Connection) -> None:
            connections.append(conn)
            raise error

        before = open_files()
        with pytest.raises(type(error)) as caught:
            DB.open(path, on_connect=fail)
        assert caught.value is error
        assert open_files() == before
        with pytest.raises(sqlite3.ProgrammingError, match="Cannot operate on a closed database"):
            connections[0].execute("SELECT 1")

    @pytest.mark.parametrize("path", ["db", ":memory:"])
    def test_of_a_later_thread(self, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The thread can ask again, and the other threads' connections stay."""
        monkeypatch.chdir(tmp_path)
        connections = []

        def fail_ten_times(conn: sqlite3.Connection) -> None:
            connections.append(conn)
            if 2 <= len(connections) <= 11:
                raise ValueError(len(connections))

        def ask() -> None:
            opened = []
            for number in range(2, 12):
                with pytest.raises(ValueError, match=f"^{number}$"):
                    _ = db.conn
                with pytest.raises(sqlite3.ProgrammingError, match="Cannot operate on a closed database"):
                    connections[-1].execute("SELECT 1")
                opened.append(open_files())
            # While another connection of the process has locks on a file, SQLite keeps a descriptor to use again.
            assert opened == [opened[0]] * 10
            assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (1,)

        with DB.open(path, on_connect=fail_ten_times) as db, ThreadPoolExecutor(1) as pool:
            insert_run(db.conn)
            pool.submit(ask).result()
            assert db.conn.execute("SELECT count(*) FROM runs").fetchone() == (1,)
        assert len(connections) == 12
