from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_mm.data.ledger import OK, RETRY, STATUSES, Ledger, Line, from_parquet, to_parquet
from hpc_mm.data.store import FolderStore, Store, open_store

KEYS = st.integers(0, 5).map(lambda number: f"{number:064x}")
LINES = st.builds(
    Line,
    key=KEYS,
    status=st.sampled_from(STATUSES),
    reason=st.text(max_size=5),
    attempts=st.integers(0, 3),
    bytes=st.integers(0, 2**40),
    time=st.floats(0, 2e9),
    retry_at=st.none() | st.floats(0, 2e9),
)


class Dying(FolderStore):
    """A folder whose process dies at its n-th change, before or after it."""

    def __init__(self, address: str, changes: int, after: bool) -> None:
        super().__init__(address)
        object.__setattr__(self, "left", changes)
        object.__setattr__(self, "after", after)

    def _change(self, action: Any) -> None:
        object.__setattr__(self, "left", self.left - 1)  # type: ignore[attr-defined]
        if self.left < 0 and not self.after:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        action()
        if self.left < 0:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    def write(self, key: str, data: bytes, metadata: Any = None) -> None:
        self._change(lambda: FolderStore.write(self, key, data))

    def delete(self, key: str) -> None:
        self._change(lambda: FolderStore.delete(self, key))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path), make=True)


def line(number: int, status: str = OK, attempts: int = 1) -> Line:
    return Line(f"{number:064x}", status, "", attempts)


@given(st.lists(LINES))
def test_lines_travel_through_parquet(lines: list[Line]) -> None:
    assert from_parquet(to_parquet(lines)) == lines


def test_a_ledger_remembers_what_was_flushed(store: Store) -> None:
    first = Ledger(store, "00000-00000")
    first.flush()
    first.add(line(1))
    first.flush()
    first.add(line(2))  # a process dies here
    again = Ledger(store, "00000-00000")
    assert again.begun and again.lines == {line(1).key: line(1)}
    again.add(line(2, RETRY))
    again.finish()
    whole = Ledger(store, "00000-00000")
    assert not whole.begun and set(whole.lines.values()) == {line(1), line(2, RETRY)}
    assert [entry.key for entry in store.list()] == ["ledger/00000-00000.parquet"]


def test_parts_do_not_meet(store: Store) -> None:
    Ledger(store, "00000-00001").add(line(1))
    other = Ledger(store, "00000-00010")
    other.add(line(2))
    other.finish()
    assert not Ledger(store, "00000-0001").lines


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("changes", range(7))
def test_dying_at_any_change_loses_only_what_was_not_flushed(tmp_path: Path, changes: int, after: bool) -> None:
    """Two runs: the first fails at one URL, the second mends it and dies somewhere in between."""
    store = open_store(str(tmp_path), make=True)
    first = Ledger(store, "part")
    for number in range(3):
        first.add(line(number, RETRY if number == 1 else OK))
    first.finish()
    flushed: set[Line] = set(first.lines.values())
    dying = Ledger(Dying(store.address, changes, after), "part")
    try:
        for number in (1, 1, 3):
            known = dying.lines.get(line(number).key)
            dying.add(replace(line(number), attempts=known.attempts + 1 if known else 1))
            dying.flush()
            flushed = set(dying.lines.values())
        dying.finish()
        survived = True
    except KeyboardInterrupt:
        survived = False
    found = Ledger(store, "part")
    assert flushed <= set(found.lines.values()) or not survived
    newest = {one.key: one.attempts for one in found.lines.values()}
    assert all(newest[one.key] >= one.attempts for one in flushed)
    if survived:
        assert not found.begun
