import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_mm.config import ConfigError
from hpc_mm.data.store import FolderStore, Store, open_store
from hpc_mm.predictions import (
    Done,
    Plan,
    Row,
    done_parts,
    merged,
    name_of,
    parts_to_do,
    read_part,
    read_plan,
    save_plan,
    state,
    write_part,
)

WORK = {"checkpoint": "runs/toy/step-100", "protocol": {"decoding": {"beams": 3}, "seeds": (42,)}}
PLAN = Plan(WORK, tuple(f"q{number}" for number in range(23)), size=5)


def predicted(name: str) -> Row:
    return {"id": name, "answer": f"an “answer” to {name}\u2028\n", "scores": [len(name) / 3, -1e-300]}


def do(store: Store, plan: Plan, part: int) -> None:
    write_part(store, plan, part, [predicted(name) for name in plan.ids_of(part)], began=0.0)


def task(store: Store, plan: Plan, number: int = 0, tasks: int = 1) -> None:
    """What a task does, from its plan to its last part."""
    save_plan(store, plan)
    for part in parts_to_do(store, plan, number, tasks):
        do(store, plan, part)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


# ---------------------------------------------------------------- divided, killed, merged


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 9), st.lists(st.integers(1, 8), min_size=1, max_size=3))
def test_rows_are_the_same_for_any_division(
    tmp_path_factory: pytest.TempPathFactory, questions: int, size: int, launches: list[int]
) -> None:
    """The last launch does all of its tasks, those before it only the first half."""
    plan = Plan(WORK, tuple(f"q{number}" for number in range(questions)), size)
    store = open_store(str(tmp_path_factory.mktemp("parts")))
    for launch, tasks in enumerate(launches, 1):
        for number in range(tasks if launch == len(launches) else tasks // 2):
            task(store, plan, number, tasks)
    assert merged(store, plan) == [predicted(name) for name in plan.ids]


class Dying(FolderStore):
    """A folder whose process dies at its n-th verb: before it, in the middle of writing, or after it."""

    def __init__(self, address: str, verbs: int, when: str) -> None:
        super().__init__(address)
        object.__setattr__(self, "verbs", itertools.count())
        object.__setattr__(self, "last", verbs)
        object.__setattr__(self, "when", when)

    def _does(self, action: Callable[[], Any], middle: Callable[[], Any]) -> Any:
        dies = next(self.verbs) >= self.last  # type: ignore[attr-defined]
        if dies and self.when == "before":  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        if dies and self.when == "middle":  # type: ignore[attr-defined]
            middle()
            raise KeyboardInterrupt
        result = action()
        if dies:
            raise KeyboardInterrupt
        return result

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        data: bytes = self._does(lambda: FolderStore.read(self, key, start, end), lambda: None)
        return data

    def list(self, prefix: str = "") -> Any:
        return self._does(lambda: iter([*FolderStore.list(self, prefix)]), lambda: None)

    def write(self, key: str, data: bytes, metadata: Any = None) -> None:
        def middle() -> None:  # what a SIGKILL leaves: half of the bytes under a hidden name
            path = Path(self.address, key)
            path.parent.mkdir(exist_ok=True)
            path.with_name(f".{len(data)}.partial").write_bytes(data[: len(data) // 2])

        self._does(lambda: FolderStore.write(self, key, data), middle)


@pytest.mark.parametrize("when", ["before", "middle", "after"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_killed_at_every_verb_the_rows_are_the_same(tmp_path: Path, when: str, tasks: int) -> None:
    """A task dies at each of its verbs in turn and is run again, until one comes to its end."""
    whole = open_store(str(tmp_path / "whole"), make=True)
    task(whole, PLAN)
    for verbs in range(1000):
        folder = tmp_path / str(verbs)
        folder.mkdir()
        try:
            task(Dying(str(folder), verbs, when), PLAN, 0, tasks)
            break
        except KeyboardInterrupt:
            for number in range(tasks):
                task(open_store(str(folder)), PLAN, number, tasks)
            assert merged(open_store(str(folder)), PLAN) == merged(whole, PLAN)
    assert verbs == {1: 8, 3: 5}[tasks]  # read and write the plan, list the parts, write 5 of them or 2


def test_killed_again_and_again_it_comes_to_its_end(tmp_path: Path) -> None:
    """Each process dies at its fourth or fifth verb: a part or so is done by each."""
    for attempt in range(100):
        try:
            task(Dying(str(tmp_path), 4 + attempt % 2 + attempt // 2, "middle"), PLAN)
            break
        except KeyboardInterrupt:
            pass
    assert attempt > 3
    assert merged(open_store(str(tmp_path)), PLAN) == [predicted(name) for name in PLAN.ids]


def test_a_part_that_two_tasks_wrote_is_one(store: Store) -> None:
    task(store, PLAN)
    before = merged(store, PLAN)
    do(store, PLAN, 3)
    assert merged(store, PLAN) == before


# ---------------------------------------------------------------- what is refused


def edited(store: Store, part: int, change: Callable[[list[Any]], list[Any]]) -> None:
    lines = [json.loads(line) for line in store.read(name_of(part)).splitlines()]
    store.write(name_of(part), "".join(json.dumps(line) + "\n" for line in change(lines)).encode())


def truncated(store: Store) -> None:
    store.write(name_of(1), store.read(name_of(1))[:-9])


def other_plan(store: Store) -> None:
    do(store, Plan({**WORK, "checkpoint": "another"}, PLAN.ids, PLAN.size), 1)


MISTAKES: list[tuple[Callable[[Store], Any], str]] = [
    (lambda s: s.write(name_of(2), s.read(name_of(1))), "000002.jsonl is a copy of part 1: remove it"),
    (lambda s: s.write("parts/000001 (copy).jsonl", s.read(name_of(1))), "000001 (copy).jsonl is none of the plan's 5"),
    (lambda s: s.write("parts/000005.jsonl", s.read(name_of(1))), "000005.jsonl is none of the plan's 5 parts"),
    (other_plan, f"not of this one, {PLAN.digest}: remove it"),
    (truncated, r"000001.jsonl is damaged (JSONDecodeError: "),
    (lambda s: s.write(name_of(1), b""), "000001.jsonl is damaged (ValueError: "),
    (lambda s: s.write(name_of(1), b"\xff"), "000001.jsonl is damaged (UnicodeDecodeError: "),
    (lambda s: edited(s, 1, lambda lines: lines[:-1]), "000001.jsonl: question q9 is missing: remove it"),
    (lambda s: edited(s, 1, lambda lines: lines[:-3]), "000001.jsonl: 3 questions: q7, q8, q9 are missing"),
    (lambda s: edited(s, 1, lambda lines: [*lines, lines[1]]), "000001.jsonl: question q5 is there twice"),
    (lambda s: edited(s, 1, lambda lines: [*lines, {"id": "q0"}]), "question q0 is not of this part"),
    (lambda s: edited(s, 1, lambda lines: [*lines, {"id": 5}]), "question 5 is not of this part"),
    (lambda s: edited(s, 1, lambda lines: [lines[0], *lines[:0:-1]]), "its questions are in another order"),
    (lambda s: edited(s, 1, lambda lines: [*lines, {}]), "000001.jsonl is damaged (KeyError: 'id')"),
    (lambda s: s.delete(name_of(1)), "1 of 5 parts are not done: 1; run the same command again"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_what_is_not_the_plans_is_refused(store: Store, mistake: Callable[[Store], Any], message: str) -> None:
    task(store, PLAN)
    mistake(store)
    with pytest.raises(ConfigError) as told:
        merged(store, PLAN)
    assert message in str(told.value) and "\n" not in str(told.value) and store.address in str(told.value)
    if "not done" not in message:
        with pytest.raises(ConfigError):
            parts_to_do(store, PLAN)


def test_gaps_are_counted_and_the_first_named(store: Store) -> None:
    save_plan(store, PLAN)
    with pytest.raises(ConfigError, match=r"5 of 5 parts are not done: 0, 1, 2, \.\.\.; run the same command again"):
        merged(store, PLAN)


def test_a_part_takes_only_its_own_rows(store: Store) -> None:
    rows = [predicted(name) for name in PLAN.ids_of(0)]
    for wrong in (rows[:-1], rows[::-1], [*rows, rows[0]], []):
        with pytest.raises(ValueError, match="part 0"):
            write_part(store, PLAN, 0, wrong, 0.0)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_part(store, PLAN, 0, [{**row, "score": float("nan")} for row in rows], 0.0)
    assert list(store.list()) == []


# ---------------------------------------------------------------- the plan


def test_a_plan_is_kept_and_no_other_takes_its_place(store: Store) -> None:
    save_plan(store, PLAN)
    save_plan(store, PLAN)
    assert read_plan(store).digest == PLAN.digest and read_plan(store).ids == PLAN.ids
    others = [
        (
            Plan({**WORK, "checkpoint": "runs/toy/step-200"}, PLAN.ids, 5),
            "checkpoint: runs/toy/step-100 -> runs/toy/step-200",
        ),
        (
            Plan({**WORK, "protocol": {"decoding": {"beams": 1}, "seeds": [42]}}, PLAN.ids, 5),
            "of protocol.decoding.beams: 3 -> 1: ",
        ),
        (Plan({**WORK, "dtype": "fp32"}, PLAN.ids, 5), "of dtype is new: "),
        (Plan(WORK, PLAN.ids, 6), "of part size: 5 -> 6: "),
        (Plan(WORK, PLAN.ids[:-1], 5), "of other questions: "),
        (Plan(WORK, PLAN.ids[::-1], 5), "of other questions: "),
    ]
    for other, message in others:
        with pytest.raises(ConfigError) as told:
            save_plan(store, other)
        assert message in str(told.value) and "use another folder" in str(told.value)
    assert read_plan(store).digest == PLAN.digest


def test_a_plan_asks_each_question_once(store: Store) -> None:
    with pytest.raises(ConfigError, match="question a is planned twice"):
        save_plan(store, Plan(WORK, ("a", "b", "a")))
    with pytest.raises(ConfigError, match="no question to plan"):
        save_plan(store, Plan(WORK, ()))
    store.write("plan.json", b"[]")
    with pytest.raises(ConfigError, match=r"plan\.json is no plan"):
        read_plan(store)


@given(st.integers(1, 500), st.integers(1, 70))
def test_every_question_is_of_one_part(questions: int, size: int) -> None:
    plan = Plan(WORK, tuple(map(str, range(questions))), size)
    assert [name for part in range(plan.parts) for name in plan.ids_of(part)] == list(plan.ids)
    assert all(plan.ids_of(part) for part in range(plan.parts))


def test_tasks_divide_the_parts(store: Store) -> None:
    do(store, PLAN, 4)
    assert [parts_to_do(store, PLAN, number, 3) for number in range(3)] == [[0, 3], [1], [2]]
    assert parts_to_do(store, PLAN) == [0, 1, 2, 3]


# ---------------------------------------------------------------- while it runs


def test_the_state_while_it_runs(store: Store) -> None:
    empty = state(PLAN, done_parts(store, PLAN))
    assert (empty.parts, empty.questions, empty.total, empty.rate, empty.left) == (0, 0, 23, None, None)
    parts = {4: Done([predicted(name) for name in PLAN.ids_of(4)], 100.0, 104.0), 1: Done([{}] * 5, 98.0, 102.0)}
    half = state(PLAN, parts)
    assert (half.parts, half.questions, half.rate, half.left) == (2, 8, 8 / 6, 15 * 6 / 8)


def test_known_parts_are_not_read_again(store: Store) -> None:
    do(store, PLAN, 0)
    known = done_parts(store, PLAN)
    do(store, PLAN, 2)
    store.write(name_of(0), b"no longer looked at")
    again = done_parts(store, PLAN, known)
    assert again[0] is known[0] and again[2] == read_part(store, PLAN, 2) and list(again) == [0, 2]
