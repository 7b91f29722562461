"""What `DB` is for a caller's code: a base class, and no object to be made in other ways, copied or pickled.

typed_caller.py is the same for `mypy --strict`.
"""

import copy
import inspect
import pickle
import pydoc
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import typed_caller
from daemon_db import DB, OpenError
from support import in_thread
from typed_caller import Store


@pytest.mark.usefixtures("first_schema")
def test_a_callers_program(tmp_path: Path) -> None:
    assert typed_caller.right(tmp_path / "daemon.db") == ["run.started", "unit.done"]


@pytest.mark.usefixtures("first_schema")
def test_a_subclass_gets_its_own_type(tmp_path: Path) -> None:
    with Store.open(tmp_path / "daemon.db") as store:
        assert type(store) is Store
        assert store.__enter__() is store
        in_thread(lambda: store.create_run("run-1", "feature/login"))
        assert store.add_unit("run-1", "api").set_status("run-1", "api", "done") == 2
        assert list(store.events("run-1")) == ["run.started", "unit.done"]
        with DB.open(tmp_path / "daemon.db") as db:
            assert type(db) is DB


def test_a_subclass_may_have_attributes_of_its_own(tmp_path: Path) -> None:
    class Named(DB):
        name = "default"
        sequence: int

        def connect_count(self) -> int:
            self.sequence = 1 + getattr(self, "sequence", 0)
            return self.sequence

    with Named.open(tmp_path / "daemon.db") as db:
        db.name = "mine"
        assert (db.name, db.connect_count(), db.connect_count()) == ("mine", 1, 2)


def test_a_subclass_whose_close_needs_its_init_hides_no_error(tmp_path: Path) -> None:
    class Store(DB):
        def __init__(self) -> None:
            raise AssertionError("not called")

        def close(self) -> None:
            raise AssertionError("not of a DB that was never open")

    with pytest.raises(OpenError, match="it is a directory"):
        Store.open(tmp_path)


@pytest.mark.parametrize("arguments", [(), ("daemon.db",), ("daemon.db", 5.0)])
def test_calling_the_class_says_what_to_call(
    arguments: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for cls in (DB, Store):
        with pytest.raises(TypeError, match=r"^DB\.open\(path\) is what opens a database$"):
            cls(*arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^DB\.open\(path\) is what opens a database$"):
        DB(path="daemon.db")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


duplicates = pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, *(lambda db, p=p: pickle.dumps(db, p) for p in range(pickle.HIGHEST_PROTOCOL + 1))],
    ids=["copy", "deepcopy", *(f"pickle {protocol}" for protocol in range(pickle.HIGHEST_PROTOCOL + 1))],
)


@duplicates
@pytest.mark.parametrize("path", ["daemon.db", ":memory:"])
def test_it_can_not_be_copied_or_pickled(
    path: str, duplicate: Callable[[DB], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the attempt does no harm: a copy that is dropped would close the original's connection."""
    monkeypatch.chdir(tmp_path)
    with DB.open(path) as db, db.transaction() as conn:
        with pytest.raises(TypeError, match=r"^cannot copy or pickle <DB '.*' open>: open a DB there$"):
            duplicate(db)
        assert conn.in_transaction
        assert conn.execute("SELECT count(*) FROM runs").fetchone() == (0,)


def test_the_documented_defaults(tmp_path: Path) -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(DB.open).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert defaults == {"timeout": 5.0, "on_connect": None, "read_only": False, "create": True}
    with DB.open(tmp_path / "daemon.db") as db:
        assert db.conn.execute("PRAGMA busy_timeout").fetchone() == (5000,)
        assert in_thread(lambda: db.conn.execute("PRAGMA busy_timeout").fetchone()) == (5000,)


def test_help_shows_what_is_for_callers() -> None:
    """And what a block gets."""
    text = pydoc.render_doc(DB, renderer=pydoc.plaintext)
    shown = set(re.findall(r"^ \|  (\w+)", text, re.MULTILINE))
    assert {"open", "conn", "transaction", "snapshot", "close"} <= shown
    assert not {name for name in shown if re.match("_[a-z]", name)}
    for block in "transaction", "snapshot":
        assert re.search(rf"{block}\(self\) -> .*ContextManager\[sqlite3\.Connection\]", text), block


class Float:
    """As numpy's: a number that isn't a float, but can be made one."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        return self.value

    def __ge__(self, other: float) -> bool:
        return self.value >= other

    def __le__(self, other: float) -> bool:
        return self.value <= other


def test_any_number_is_a_timeout_also_of_a_transaction(tmp_path: Path) -> None:
    timeout: float = Float(1.5)  # type: ignore[assignment]
    with DB.open(tmp_path / "daemon.db", timeout=timeout) as db, db.transaction() as conn:
        assert conn.execute("PRAGMA busy_timeout").fetchone() == (1500,)
