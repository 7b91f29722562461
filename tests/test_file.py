"""What is refused before SQLite is asked: each `OpenError` with its words, and wrong arguments. And what is not: names.

Files that are databases but don't fit are in `test_schema` and `test_conflicts`, damaged ones in `test_damage`, locked
ones in `test_processes`.
"""

import errno
import math
import os
import re
import socket
import sqlite3
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from daemon_db import DB, OpenError, _connection, _file
from support import (
    append_event,
    files_in,
    in_thread,
    insert_run,
    make_hot,
    make_killed,
    make_nothing,
    make_rollback,
    make_wal,
    open_files,
    public_directory,
    run,
    something_is_forbidden,
)


def count_in_a_thread(db: DB) -> int:
    """How many runs a new connection sees."""
    return int(in_thread(lambda: db.conn.execute("SELECT count(*) FROM runs").fetchone()[0]))


def works(path: Path) -> None:
    """That it can be opened, written, and read by a second connection."""
    with DB.open(path) as db:
        before = count_in_a_thread(db)
        insert_run(db.conn, f"run-{os.urandom(8).hex()}")
        assert count_in_a_thread(db) == before + 1
        assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


class TestArguments:
    @pytest.mark.parametrize(
        ("path", "error", "words"),
        [
            ("", ValueError, "not ''"),
            ("a\0b", ValueError, r"not 'a\\x00b'"),
            ("\ud800", ValueError, r"can't encode character '\\ud800'"),  # a str that no file name decodes to
            ("file:db", ValueError, r"not a URI: .* '\./file:db'"),
            ("file:///tmp/db?mode=ro", ValueError, "not a URI"),
            (b"db", TypeError, "not bytes"),
            (7, TypeError, "not int"),
            (None, TypeError, "not NoneType"),
        ],
    )
    def test_not_a_path(
        self, path: object, error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for read_only in (False, True):
            with pytest.raises(error, match=words):
                DB.open(path, read_only=read_only)  # type: ignore[arg-type]
        assert files_in(tmp_path) == {}

    @pytest.mark.parametrize("timeout", [-1, -0.001, math.nan, math.inf, -math.inf, 2_147_484])
    def test_not_a_timeout(self, timeout: float, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"from 0 to 2147483 seconds, not {timeout}$"):
            DB.open(tmp_path / "db", timeout=timeout)
        assert files_in(tmp_path) == {}

    @pytest.mark.parametrize("timeout", ["5", None])
    def test_not_a_number(self, timeout: object, tmp_path: Path) -> None:
        with pytest.raises(TypeError):
            DB.open(tmp_path / "db", timeout=timeout)  # type: ignore[arg-type]
        assert files_in(tmp_path) == {}

    @pytest.mark.parametrize("timeout", [0, True, 1.5, Fraction(3, 2), Decimal("1.5"), 2_147_483])
    def test_any_number_is_a_timeout(self, timeout: float, tmp_path: Path) -> None:
        with DB.open(tmp_path / "db", timeout=timeout) as db:
            with db.transaction() as conn:
                insert_run(conn)
            assert db.conn.execute("PRAGMA busy_timeout").fetchone() == (int(timeout * 1000),)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_byte(path: Path) -> None:
    path.write_bytes(b"\n")


def make_text(path: Path) -> None:
    path.write_bytes(b"no database\n" * 10_000)


def make_file_for_parent(path: Path) -> None:
    path.parent.write_text("a file")


def make_link_for_parent(path: Path) -> None:
    path.parent.symlink_to(path.parent)


def make_circle(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


def make_link_to_nowhere(path: Path) -> None:
    path.symlink_to("no/db")


def make_link_to_a_device(path: Path) -> None:
    path.symlink_to(os.devnull)


NOT_REGULAR = "not a regular file"
NO_DATABASE = "not a SQLite database"
TOO_LONG = os.strerror(errno.ENAMETOOLONG)
LOOP = os.strerror(errno.ELOOP)
NOT_A_DIRECTORY = os.strerror(errno.ENOTDIR)
NOT_THERE = os.strerror(errno.ENOENT)


def refused(path: Path, reason: str, cause: type[Exception] | None = None, **options: bool) -> None:
    """That it is refused for this, with SQLite's code if it was SQLite, and nothing was created or left open."""
    before, open_before = files_in(path.parent), open_files()
    with pytest.raises(OpenError) as caught:
        DB.open(path, **options)
    error = caught.value
    assert re.search(reason, error.reason)
    assert (error.path, str(error)) == (str(path), f"{path}: {error.reason}")
    assert type(error.__cause__) is (cause or type(None))
    for code in "sqlite_errorcode", "sqlite_errorname":
        assert getattr(error, code, None) == getattr(error.__cause__, code, None)
    assert files_in(path.parent) == before
    assert open_files() == open_before


class TestNotToBeOpened:
    @pytest.mark.parametrize("read_only", [False, True])
    @pytest.mark.parametrize(
        ("make", "name", "reason", "cause"),
        [
            (Path.mkdir, "db", "it is a directory", None),
            (make_nothing, "no/db", f"{{parent}}: {NOT_THERE}", FileNotFoundError),
            (make_nothing, "no/no/db", f"{{parent}}: {NOT_THERE}", FileNotFoundError),
            (make_file_for_parent, "file/db", f"{{parent}}: {NOT_A_DIRECTORY}", NotADirectoryError),
            (make_link_for_parent, "link/db", f"{{parent}}: {LOOP}", OSError),
            (make_circle, "db", LOOP, OSError),
            pytest.param(make_nothing, "x" * 300, TOO_LONG, OSError, id="long name"),
            pytest.param(make_nothing, "x/" * 3000 + "x", f"{{parent}}: {TOO_LONG}", OSError, id="long path"),
            (os.mkfifo, "db", NOT_REGULAR, None),
            (make_socket, "db", NOT_REGULAR, None),
            (make_link_to_a_device, "db", NOT_REGULAR, None),  # SQLite would go on
            (make_byte, "db", NO_DATABASE, None),  # SQLite takes it for an empty one, and overwrites it
            (make_text, "db", NO_DATABASE, sqlite3.DatabaseError),  # here it is SQLite that says no
        ],
    )
    def test_refused_and_left_alone(
        self,
        make: Callable[[Path], object],
        name: str,
        reason: str,
        cause: type[Exception] | None,
        read_only: bool,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)  # a socket's path must be short
        make(Path(name))
        before = files_in(tmp_path)
        path = tmp_path / name
        if name.startswith("x/"):
            with pytest.raises(OpenError) as caught:  # too long to look for what is there
                DB.open(path, read_only=read_only)
            assert reason.format(parent=path.parent) in caught.value.reason
        else:
            refused(path, reason.format(parent=path.parent), cause, read_only=read_only)
        assert files_in(tmp_path) == before

    def test_a_working_directory_that_is_gone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        with pytest.raises(OpenError, match=f"^db: the working directory: {NOT_THERE}"):
            DB.open("db")
        works(tmp_path / "db")

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("no/../db", f"no/..: {NOT_THERE}"),
            ("file/../db", f"file/..: {NOT_A_DIRECTORY}"),
            ("new/", f"new: {NOT_THERE}"),
            ("new/.", f"new: {NOT_THERE}"),
            ("file/", f"file: {NOT_A_DIRECTORY}"),
            ("directory/", "it is a directory"),
            ("link", "unable to open"),
            ("link/db", f"link: {NOT_THERE}"),
        ],
    )
    def test_a_path_that_leads_nowhere_creates_nothing_elsewhere(self, name: str, reason: str, tmp_path: Path) -> None:
        """SQLite simplifies a path before it opens it: by its text, where the operating system says no."""
        (tmp_path / "file").touch()
        (tmp_path / "directory").mkdir()
        make_link_to_nowhere(tmp_path / "link")
        before = files_in(tmp_path)
        with pytest.raises(OpenError, match=reason):
            DB.open(f"{tmp_path}/{name}")
        assert files_in(tmp_path) == before

    @pytest.mark.parametrize("make", [Path.touch, make_rollback])
    def test_a_name_has_room_for_the_journals(self, make: Callable[[Path], object], tmp_path: Path) -> None:
        longest = os.pathconf(tmp_path, "PC_NAME_MAX")
        for length in range(longest - 8, longest + 1):
            make(tmp_path / "db")
            path = (tmp_path / "db").rename(tmp_path / ("x" * length))
            if length + len("-journal") <= longest:
                works(path)
            else:
                refused(path, "unable to open", sqlite3.OperationalError)

    @pytest.mark.parametrize("make", [make_nothing, make_rollback])
    def test_a_path_has_the_length_that_sqlite_has_room_for(
        self, make: Callable[[Path], object], tmp_path: Path
    ) -> None:
        directory = tmp_path
        while len(os.fsencode(directory)) < 300:
            directory /= "d" * 99
        directory.mkdir(parents=True)
        longest = 504 - len(os.fsencode(directory)) - len("/")
        for length in range(longest - 1, longest + 3):
            path = directory / ("x" * length)
            make(tmp_path / "db")
            if (tmp_path / "db").exists():
                (tmp_path / "db").rename(path)
            if length <= longest:
                works(path)
            else:
                refused(path, "at most 504 bytes", sqlite3.OperationalError)
        # A link is as long as where it leads.
        (tmp_path / "short").symlink_to(directory)
        works(tmp_path / "short" / ("x" * longest))

    @pytest.mark.parametrize("read_only", [False, True])
    def test_where_foreign_keys_are_not_available(
        self, read_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In a SQLite built without them, the pragma has no effect."""
        make_rollback(tmp_path / "db")
        execute = sqlite3.Connection.execute

        def execute_but_for_foreign_keys(conn: sqlite3.Connection, sql: str, *values: object) -> sqlite3.Cursor:
            return execute(conn, "SELECT 1" if sql == "PRAGMA foreign_keys=ON" else sql, *values)

        monkeypatch.setattr(_connection.Connection, "execute", execute_but_for_foreign_keys)
        refused(tmp_path / "db", "without foreign keys", read_only=read_only)


OPEN_WITHOUT_DESCRIPTORS = """
import os, resource, sys
from daemon_db import DB, OpenError

directory = sys.argv[1]
make, read_only = sys.argv[2] == "make", sys.argv[3] == "read_only"
resource.setrlimit(resource.RLIMIT_NOFILE, (50, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
for free in range(8):
    path = f"{directory}/{free}.db"
    if make:
        DB.open(path).close()
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    for _ in range(free):
        os.close(taken.pop())
    for _ in range(2):  # a refused one leaves nothing open
        try:
            with DB.open(path, read_only=read_only) as db:
                outcome = "works" if read_only else str(db.conn.execute("DELETE FROM runs").rowcount)
        except OpenError as error:
            outcome = f"{error.reason} {getattr(error, 'sqlite_errorname', '')} {type(error.__cause__).__name__}"
        print(free, outcome)
    for descriptor in taken:
        os.close(descriptor)
    with DB.open(path):
        pass
"""


@pytest.mark.parametrize(
    ("make", "read_only"), [("", ""), ("make", ""), ("make", "read_only")], ids=["new", "current", "read_only"]
)
def test_no_free_descriptors(make: str, read_only: str, tmp_path: Path) -> None:
    """In a person's words, whichever of its files it is that SQLite can't open; and once there are some, it works."""
    outcomes: dict[int, list[str]] = {}
    for line in run(OPEN_WITHOUT_DESCRIPTORS, tmp_path, make, read_only).splitlines():
        free, outcome = line.split(" ", 1)
        outcomes.setdefault(int(free), []).append(outcome)
    works = "works" if read_only else "0"
    for first, second in outcomes.values():
        assert first == second
        assert "free file descriptor" in first or first == works
    assert outcomes[0][0] != works
    assert outcomes[7][0] == works


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A database's path, in a directory that every user can get to."""
    with public_directory() as public:
        (public / "directory").mkdir()
        yield public / "directory" / "db"


OPEN_AND_DELETE = """
try:
    with daemon_db.DB.open(sys.argv[1]) as db:
        db.conn.execute("DELETE FROM runs")
except daemon_db.OpenError as error:
    print(error.reason)
else:
    print("opened")
"""


def open_there(
    path: Path, run_unprivileged: Callable[..., str], directory_mode: int, file_mode: int = 0o666, suffix: str = ""
) -> str:
    """What another user's open says, with these rights on the directory and on one file, and all on the others."""
    for file in path.parent.iterdir():
        file.chmod(file_mode if file.name == f"{path.name}{suffix}" else 0o666)
    path.parent.chmod(directory_mode)
    said = run_unprivileged(OPEN_AND_DELETE, path)
    path.parent.chmod(0o755)
    for file in path.parent.iterdir():
        file.chmod(0o644)
    return said


FORBIDDEN = "permission denied.*can't write "
FILE_FORBIDDEN = f"{FORBIDDEN}{{path}}\n"
DIRECTORY_FORBIDDEN = f"{FORBIDDEN}{{path.parent}}\n"


@pytest.mark.skipif(not something_is_forbidden(), reason="root can't become another user here")
class TestForbidden:
    """The effective user's permissions count, as they do for SQLite; the real user's may be more."""

    @pytest.mark.parametrize(
        ("make", "mode", "directory_mode", "reason"),
        [
            (make_nothing, 0, 0o555, DIRECTORY_FORBIDDEN),
            (make_nothing, 0, 0o000, os.strerror(errno.EACCES)),
            (make_rollback, 0o666, 0o555, DIRECTORY_FORBIDDEN),
            (make_wal, 0o666, 0o555, DIRECTORY_FORBIDDEN),
            (make_wal, 0o666, 0o000, os.strerror(errno.EACCES)),
            (make_rollback, 0o444, 0o777, FILE_FORBIDDEN),
            (make_wal, 0o444, 0o777, FILE_FORBIDDEN),
            (make_wal, 0o444, 0o555, FILE_FORBIDDEN),
            (make_wal, 0o222, 0o777, FILE_FORBIDDEN),
            (make_wal, 0o000, 0o777, FILE_FORBIDDEN),
            (os.mkfifo, 0o444, 0o777, NOT_REGULAR),  # SQLite's second try, to open it for reading, never returns
        ],
        ids=lambda value: oct(value) if isinstance(value, int) else getattr(value, "__name__", ""),
    )
    def test_by_permissions(
        self,
        make: Callable[[Path], object],
        mode: int,
        directory_mode: int,
        reason: str,
        run_unprivileged: Callable[..., str],
        public_path: Path,
    ) -> None:
        make(public_path)
        before = files_in(public_path.parent)
        said = open_there(public_path, run_unprivileged, directory_mode, mode)
        assert re.match(reason.format(path=public_path), said)
        assert files_in(public_path.parent) == before

    def test_a_directory_further_up(self, run_unprivileged: Callable[..., str], public_path: Path) -> None:
        """Nobody can say what is in there: so the reason is not that the database's own directory isn't writable."""
        path = public_path.parent / "inner" / "db"
        path.parent.mkdir()
        path.parent.chmod(0o777)
        public_path.parent.chmod(0o000)
        said = run_unprivileged(OPEN_AND_DELETE, path)
        public_path.parent.chmod(0o755)
        assert f"{path.parent}: {os.strerror(errno.EACCES)}" in said
        assert files_in(path.parent) == {}

    @pytest.mark.parametrize(("make", "suffix"), [(make_killed, "-wal"), (make_killed, "-shm"), (make_hot, "-journal")])
    @pytest.mark.parametrize("mode", [0o444, 0o222, 0o000], ids=oct)
    def test_a_file_beside_it(
        self,
        make: Callable[[Path], object],
        suffix: str,
        mode: int,
        run_unprivileged: Callable[..., str],
        public_path: Path,
    ) -> None:
        """SQLite opens the file all the same, and then every write fails; or can't say what it can't open."""
        make(public_path)
        before = files_in(public_path.parent)
        said = open_there(public_path, run_unprivileged, 0o777, mode, suffix)
        assert re.match(f"{FORBIDDEN}{public_path}{suffix}\n", said)
        assert files_in(public_path.parent) == before

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs the files of another user")
    def test_a_wal_without_its_file_that_cannot_be_renamed(
        self, run_unprivileged: Callable[..., str], public_path: Path
    ) -> None:
        """In such a directory each user renames only the user's own files."""
        beside_nothing(public_path)
        before = files_in(public_path.parent)
        said = open_there(public_path, run_unprivileged, 0o1777)
        assert said.startswith(f"can't rename {public_path}-wal")
        assert files_in(public_path.parent) == before

    def test_beside_a_daemon_the_directory_need_not_be_writable(
        self, run_unprivileged: Callable[..., str], public_path: Path
    ) -> None:
        """Its WAL is there, and stays there."""
        with DB.open(public_path) as daemon:
            insert_run(daemon.conn)
            assert open_there(public_path, run_unprivileged, 0o555) == "opened\n"
            assert daemon.conn.execute("SELECT count(*) FROM runs").fetchone() == (0,)

    @pytest.mark.parametrize("make", [make_wal, make_rollback, make_killed, make_hot])
    def test_what_is_allowed(
        self, make: Callable[[Path], object], run_unprivileged: Callable[..., str], public_path: Path
    ) -> None:
        make(public_path)
        assert open_there(public_path, run_unprivileged, 0o777) == "opened\n"


BEGIN_TO_WRITE = """
daemon_db.db.LOOK_EVERY = 0
daemon_db.held = daemon_db.DB.open(sys.argv[1])
with daemon_db.held.transaction() as conn:
    conn.execute("DELETE FROM runs WHERE id = 'run-1'")
"""

GO_ON_WRITING = """
import threading


def write():
    with daemon_db.held.transaction() as conn:
        conn.execute("DELETE FROM runs WHERE id = (SELECT min(id) FROM runs)")


def read():
    with daemon_db.held.snapshot():
        pass


def say(function):
    try:
        function()
    except daemon_db.OpenError as error:
        print(error.reason)
    else:
        print("works")


say(write)
say(read)
another = threading.Thread(target=say, args=[write])
another.start()
another.join()
"""


@pytest.mark.skipif(not something_is_forbidden(), reason="root can't become another user here")
@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize("name", ["db", "inner/db"])
def test_a_directory_that_may_not_be_read_any_more(
    name: str, is_closed: bool, run_unprivileged: Callable[..., str], public_path: Path
) -> None:
    """Its file isn't gone: once the right is given back the daemon goes on, and all that it has committed is there."""
    directory = public_path.parent
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    make_wal(path, 4)
    path.chmod(0o666)
    path.parent.chmod(0o777)
    run_unprivileged(BEGIN_TO_WRITE, path)
    directory.chmod(0o000)
    said = run_unprivileged(GO_ON_WRITING).splitlines()
    assert len(said) == 3
    for reason in said:
        assert "may not look at it" in reason
        assert "removed" not in reason
    if is_closed:
        run_unprivileged("daemon_db.held.close()")
    directory.chmod(0o777)
    if not is_closed:
        assert run_unprivileged(GO_ON_WRITING) == "works\n" * 3
        run_unprivileged("daemon_db.held.close()")
    with DB.open(path) as db:
        assert count_in_a_thread(db) == (3 if is_closed else 1)
        assert db.conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert [*files_in(path.parent)] == ["db"]


def test_a_wal_that_comes_and_goes_is_not_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process opens the file just while it is looked at: the WAL isn't there to be used, and then it exists."""
    wal = tmp_path / "db-wal"
    looks = []
    access = os.access

    def look(path: str, mode: int, **options: bool) -> bool:
        found = access(path, mode, **options)
        if path == str(wal):
            looks.append(found)
            wal.touch()
        return found

    make_wal(tmp_path / "db")
    monkeypatch.setattr(os, "access", look)
    DB.open(tmp_path / "db").close()
    assert looks[:2] == [False, True]


def beside_nothing(path: Path) -> None:
    """A daemon's file that was removed after `kill -9`, and its WAL wasn't."""
    make_killed(path)
    path.unlink()


def beside_an_empty_file(path: Path) -> None:
    make_killed(path)
    path.write_bytes(b"")


def junk(path: Path) -> None:
    Path(f"{path}-wal").write_bytes(b"junk" * 5000)


def junk_of_both(path: Path) -> None:
    junk(path)
    Path(f"{path}-shm").write_bytes(b"junk" * 10_000)


def an_empty_wal(path: Path) -> None:
    """What is left of a process that was killed before it wrote."""
    Path(f"{path}-wal").touch()
    Path(f"{path}-shm").write_bytes(bytes(32768))


class TestWhatIsLeftOfAnotherFile:
    """A WAL without its file: SQLite would remove it, with the commits that may be in it alone."""

    @pytest.mark.parametrize("make", [make_nothing, make_rollback, make_wal])
    def test_an_empty_wal_is_none(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        make(tmp_path / "db")
        if make is not make_nothing:
            an_empty_wal(tmp_path / "db")
            with DB.open(tmp_path / "db", read_only=True, timeout=0) as db:
                assert count_in_a_thread(db) == 1
        an_empty_wal(tmp_path / "db")
        works(tmp_path / "db")
        assert [*files_in(tmp_path)] == ["db"]  # nothing was put aside

    @pytest.mark.parametrize("make", [beside_nothing, beside_an_empty_file, junk, junk_of_both])
    @pytest.mark.parametrize("name", ["directory/db", "link", "links/link"])
    def test_is_put_aside(
        self, make: Callable[[Path], None], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A night's start goes on, and one warning says where it is. Who creates nothing renames nothing."""
        path = tmp_path / "directory" / "db"
        for directory in path.parent, tmp_path / "links":
            directory.mkdir()
        make(path)
        for link in "link", "links/link":
            (tmp_path / link).symlink_to(path)
        before = files_in(path.parent)
        for options in {"read_only": True}, {"create": False}:
            refused(tmp_path / name, "but its -wal is there", **options)
        assert files_in(path.parent) == before
        assert caplog.records == []
        works(tmp_path / name)
        (warning,) = caplog.records
        (aside,) = path.parent.glob("db-*-wal")
        assert (warning.name, warning.levelname) == ("daemon_db", "WARNING")
        assert re.search(f"^{tmp_path / name}: .* is now {aside}:", warning.getMessage())
        after = files_in(path.parent)
        assert after.pop("db")
        assert after == {
            f"{aside.name.removesuffix('-wal')}{suffix}": before[f"db{suffix}"]
            for suffix in ("-wal", "-shm")
            if f"db{suffix}" in before
        }

    def test_is_played_back_into_its_own_file(self, tmp_path: Path) -> None:
        """Once both have been put back."""
        path, moved = tmp_path / "db", tmp_path / "moved"
        make_killed(path)
        path.rename(moved)
        with DB.open(path) as db:
            assert count_in_a_thread(db) == 0
        moved.rename(path)
        next(tmp_path.glob("db-*-wal")).rename(tmp_path / "db-wal")
        with DB.open(path) as db:
            assert count_in_a_thread(db) == 1

    def test_who_creates_the_database_meanwhile_is_no_loss(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another process makes the file, and then the -wal, just after the first look at either."""
        path = tmp_path / "db"
        status_of = _file.status_of

        def look(name: str | int) -> os.stat_result | None:
            found = status_of(name)
            if not path.exists():
                make_killed(path)
            return found

        monkeypatch.setattr(_file, "status_of", look)
        with DB.open(path) as db:
            assert count_in_a_thread(db) == 1
        assert [*files_in(tmp_path)] == ["db"]

    def test_another_ones_new_index_is_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The other one is done between this one's look at the -wal and its look at the -shm."""
        path = tmp_path / "db"
        beside_nothing(path)
        others = []
        put_aside = _file.File.put_wal_aside

        def put_aside_late(file: _file.File, words: str, wal_id: _file.FileId | None) -> None:
            monkeypatch.setattr(_file.File, "put_wal_aside", put_aside)
            others.append(DB.open(path))
            insert_run(others[0].conn)
            index = (tmp_path / "db-shm").stat().st_ino
            put_aside(file, words, wal_id)
            assert (tmp_path / "db-shm").stat().st_ino == index

        monkeypatch.setattr(_file.File, "put_wal_aside", put_aside_late)
        with DB.open(path) as db:
            for number in range(2, 5):
                with others[0].transaction() as conn:
                    insert_run(conn, f"run-{number}")
            assert count_in_a_thread(db) == 4
        others[0].close()


class TestCreate:
    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (make_nothing, "it does not exist"),
            (make_link_to_nowhere, "it does not exist"),
            (Path.touch, "it is empty"),
        ],
    )
    def test_a_mistyped_path_or_an_empty_file(self, make: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
        make(tmp_path / "db")
        refused(tmp_path / "db", reason, create=False)

    @pytest.mark.parametrize("make", [make_rollback, make_wal, make_killed])
    def test_what_is_there_is_opened(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        make(tmp_path / "db")
        with DB.open(tmp_path / "db", create=False) as db:
            insert_run(db.conn, "run-2")
            assert count_in_a_thread(db) == 2

    def test_memory_is_always_made(self) -> None:
        DB.open(":memory:", create=False).close()


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            b"./file:x",
            b"./file:x?mode=memory",
            b"./file::memory:",
            b"a?b#c%20d",
            b"%41%00",
            b" spaces and 'quotes\" ",
            b"new\nline",
            "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve".encode(),
            b"\xff\xfe",
            b"-x",
            b":memory",
            b"./:memory:",
        ],
    )
    def test_any_name_is_a_file_name(self, name: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        path = os.fsdecode(name)
        try:
            Path(path).touch()
            Path(path).unlink()
        except OSError:
            pytest.skip("this file system has no such names")
        with DB.open(path) as db:
            insert_run(db.conn)
            assert db.path == f"{tmp_path}/{path}"
            assert count_in_a_thread(db) == 1
        assert os.listdir() == [path.removeprefix("./")]
        with DB.open(tmp_path / path) as db:
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

    @pytest.mark.parametrize("elsewhere", [None, "other", "nowhere"])
    @pytest.mark.parametrize("of", ["file", "directory"])
    def test_a_link_that_is_gone_or_leads_elsewhere_changes_nothing(
        self, of: str, elsewhere: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a deploy swaps `current`: where the link led at the open is what is open, and only there it is looked."""
        for name in "real", "other":
            (tmp_path / name).mkdir()
            make_wal(tmp_path / name / "db")
        link, named, target = tmp_path / "db", tmp_path / "db", "{}/db"
        if of == "directory":
            link, named, target = tmp_path / "current", tmp_path / "current" / "db", "{}"
        link.symlink_to(target.format("real"))
        monkeypatch.setattr("daemon_db.db.LOOK_EVERY", 0)
        with DB.open(named) as db:
            link.unlink()
            if elsewhere:
                link.symlink_to(target.format(elsewhere))
            for number in range(2, 5):
                with db.transaction() as conn:
                    insert_run(conn, f"run-{number}")
                with db.snapshot() as conn:
                    assert conn.execute("SELECT count(*) FROM runs").fetchone() == (number,)
                assert count_in_a_thread(db) == number
            assert db.path == str(named)
            with DB.open(tmp_path / "real" / "db") as other:
                assert count_in_a_thread(other) == 4
            (tmp_path / "real" / "db").rename(tmp_path / "moved")
            with pytest.raises(OpenError, match=f"^{named}: .* removed, replaced") as caught, db.transaction():
                pass
            assert caught.value.path == str(named)
            (tmp_path / "moved").rename(tmp_path / "real" / "db")
        with DB.open(tmp_path / "other" / "db") as db:
            assert count_in_a_thread(db) == 1

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
        assert (sorted(os.listdir("one")), sorted(os.listdir())) == (["db", "two"], ["link", "one"])


class TestFilesOfADatabase:
    """What SQLite keeps beside a database is not to be opened as one."""

    @pytest.mark.parametrize("ending", ["-wal", "-shm", "-journal"])
    @pytest.mark.parametrize("name", ["db", "link"])
    def test_is_refused(self, name: str, ending: str, tmp_path: Path) -> None:
        """Beside a daemon, whether it is there already or not, and by any name: empty, it would pass for a new one."""
        (tmp_path / "link").symlink_to(f"db{ending}")
        path = tmp_path / (f"db{ending}" if name == "db" else name)
        make_rollback(tmp_path / "db")
        for options in {}, {"read_only": True}, {"create": False}:
            refused(path, "it belongs to", **options)
        with DB.open(tmp_path / "db") as daemon:
            for _ in range(2):
                for options in {}, {"read_only": True}, {"create": False}:
                    with pytest.raises(OpenError, match=f"belongs to {tmp_path / 'db'}:"):
                        DB.open(path, **options)
                with daemon.transaction() as conn:
                    append_event(conn)
        with DB.open(tmp_path / "db") as db:
            assert db.conn.execute("SELECT count(*) FROM events").fetchone() == (2,)

    @pytest.mark.parametrize("name", ["agent-wal", "agent-shm", "agent-journal", "-wal"])
    def test_a_database_of_such_a_name_goes_on(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "agent").mkdir()  # no file that it could belong to
        for _ in range(2):
            works(tmp_path / name)
        assert sorted(os.listdir(tmp_path)) == sorted(["agent", name])


class TestMemory:
    """`":memory:"` is SQLite's memdb VFS, which is then what that connection takes other names for, too."""

    def test_other_databases_of_the_connection_are_in_memory_too(self, tmp_path: Path) -> None:
        with DB.open(":memory:") as db:
            db.conn.execute("ATTACH ? AS other", (str(tmp_path / "attached"),))
            db.conn.execute("CREATE TABLE other.t (x)")
            db.conn.execute("VACUUM INTO ?", (str(tmp_path / "copy"),))
        assert (files_in(tmp_path) == {}) is (sqlite3.sqlite_version_info >= (3, 36))

    def test_a_uri_names_the_file_system(self, tmp_path: Path) -> None:
        """Which is the way to save what is in memory, and to read a file beside it."""
        with DB.open(":memory:") as db:
            insert_run(db.conn)
            db.conn.execute("VACUUM INTO ?", (f"{(tmp_path / 'copy').as_uri()}?vfs=unix",))
            db.conn.execute("ATTACH ? AS other", (f"{(tmp_path / 'copy').as_uri()}?vfs=unix",))
            assert db.conn.execute("SELECT count(*) FROM other.runs").fetchone() == (1,)
        assert list(files_in(tmp_path)) == ["copy"]
        works(tmp_path / "copy")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_it(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with DB.open(tmp_path / "db") as db:
            os.umask(0)
            in_thread(lambda: insert_run(db.conn))
            assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
                ("db", "db-wal", "db-shm"), mode
            )
    finally:
        os.umask(before)
