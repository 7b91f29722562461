"""What `DB` is for a caller's code: a base class, and no object to be made in other ways, copied or pickled.

typed_caller.py is the same for `mypy --strict`.
"""

import copy
import inspect
import pickle
import pydoc
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import typed_caller
from daemon_db import DB, OpenError
from support import in_thread
from typed_caller import Store


@pytest.mark.usefixtures("first_schema")
def test_a_callers_program(tmp_path: Path) -> None:
    assert typed_caller.right(tmp_path / "daemon.db") == ["run.started", "unit.done"]


def test_a_subclass_gets_its_own_type_and_may_have_attributes(tmp_path: Path) -> None:
    class Named(DB):
        name = "default"

    with Named.open(tmp_path / "daemon.db") as named, DB.open(tmp_path / "daemon.db") as db:
        assert (type(named), type(db)) == (Named, DB)
        assert named.__enter__() is named
        named.name = "mine"
        assert (named.name, Named.name) == ("mine", "default")


def test_a_subclass_whose_close_needs_its_init_hides_no_error(tmp_path: Path) -> None:
    class Store(DB):
        def __init__(self) -> None:
            raise AssertionError("not called")

        def close(self) -> None:
            raise AssertionError("not of a DB that was never open")

    with pytest.raises(OpenError, match="it is a directory"):
        Store.open(tmp_path)


@pytest.mark.parametrize("cls", [DB, Store])
def test_calling_the_class_says_what_to_call(
    cls: Callable[..., DB], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (cls, partial(cls, "daemon.db"), partial(cls, "daemon.db", 5.0), partial(cls, path="daemon.db")):
        with pytest.raises(TypeError, match=r"^DB\.open\(path\) is"):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["daemon.db", ":memory:"])
def test_it_can_not_be_copied_or_pickled(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the attempt does no harm: a copy that is dropped would close the original's connection."""
    monkeypatch.chdir(tmp_path)
    ways: list[Callable[[DB], object]] = [copy.copy, copy.deepcopy]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        ways.append(partial(pickle.dumps, protocol=protocol))
    with DB.open(path) as db, db.transaction() as conn:
        for duplicate in ways:
            with pytest.raises(TypeError, match="cannot copy or pickle"):
                duplicate(db)
            assert conn.in_transaction, duplicate
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
