"""What a plan keeps of the pool of demonstrations is all that tasks need of it."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from questions import CAPTIONS, MEMES, question

from hpc_mm import trials
from hpc_mm.benchmark import Benchmark, Question
from hpc_mm.config import ConfigError
from hpc_mm.demonstrations import QuerySet, Similar
from hpc_mm.protocol import digest_of
from hpc_mm.trials import Choice, Planned, Pool, Trial

ASKED = [question(1000 + number, number) for number in range(12)]
CLASSES = MEMES.model_copy(update={"classes": ()})


def planned(address: Path | str, choice: Choice, pool: list[Question], one: Benchmark = CAPTIONS) -> Planned:
    known = Pool.of(one, pool)
    return trials.save(
        Planned(str(address), choice, ASKED, known, {}), choice.shown(pool), trials.with_classes(one, known), {}, 4
    )


def pool_of(count: int, images: int = 100) -> list[Question]:
    return [question(number, number % images, f"label {number % 7}") for number in range(count)]


@settings(deadline=None, max_examples=30)
@given(st.integers(5, 60), st.integers(3, 70), st.lists(st.integers(0, 2**32), min_size=1, max_size=3, unique=True))
def test_random_demonstrations_are_those_of_the_whole_pool(
    tmp_path_factory: pytest.TempPathFactory, count: int, size: int, seeds: list[int]
) -> None:
    address, choice = tmp_path_factory.mktemp("out"), Choice((2,), tuple(seeds), size, "")
    pool = pool_of(count)
    planned(address, choice, pool)
    kept = trials.read(str(address), choice)
    for seed in seeds:
        whole, again = QuerySet(pool, seed, size), kept.queries(seed)
        assert again.questions == whole.questions
        for asked in ASKED:
            assert again.shots(asked, 1) == whole.shots(asked, 1)
    assert (kept.pool.count, kept.pool.digest) == (len(pool), digest_of(pool))


def test_similar_demonstrations_need_all_of_the_pool(tmp_path: Path) -> None:
    choice, pool = Choice((2,), (), 2048, "clip"), pool_of(30, images=9)
    planned(tmp_path, choice, pool)
    assert trials.read(str(tmp_path), choice).similar().of_image == Similar(pool).of_image


def test_of_a_large_pool_little_is_kept(tmp_path: Path) -> None:
    pool = pool_of(3000)
    planned(tmp_path, Choice((2, 4), (3, 4), 50, ""), pool)
    kept = {file.name: len(file.read_text().splitlines()) for file in tmp_path.glob("*.json*")}
    assert kept == {"pool.json": 1, "questions.jsonl": 12, "queries-50-s3.jsonl": 50, "queries-50-s4.jsonl": 50}


def test_classes_are_the_labels_of_the_whole_pool(tmp_path: Path) -> None:
    choice = Choice((2,), (3,), 2, "")
    plan = planned(tmp_path, choice, pool_of(50), CLASSES)
    kept = trials.read(str(tmp_path), choice)
    found = trials.with_classes(CLASSES, kept.pool)
    assert found.classes == tuple(f"label {number}" for number in range(7))
    assert trials.protocol(found, kept, [Trial(2, 3)], "openflamingo") == trials.protocol(
        found, plan, [Trial(2, 3)], "openflamingo"
    )
    trials.refuse_other(kept, found, {})


def test_further_trials_are_added_and_another_pool_is_refused(tmp_path: Path) -> None:
    pool = pool_of(60)
    for choice in (
        Choice((2,), (3,), 40, ""),
        Choice((2, 4), (3, 4), 40, ""),
        Choice((8,), (3,), 50, ""),
        Choice((2,), (), 40, "clip"),
    ):
        planned(tmp_path, choice, pool)
        for seed in choice.seeds:
            found = trials.read(str(tmp_path), choice).queries(seed)
            assert found.questions == QuerySet(pool, seed, choice.query_set).questions
    with pytest.raises(ConfigError, match=r"pool.json holds other questions than are asked for now: use another out"):
        planned(tmp_path, Choice((2,), (9,), 40, ""), pool[:-1])
    with pytest.raises(ConfigError, match=r"query_set: 40 -> 50"):
        planned(tmp_path, Choice((2,), (3,), 50, ""), pool)
    with pytest.raises(ConfigError, match=r"no folder .*/2shot-s9$"):
        trials.read(str(tmp_path), Choice((2,), (9,), 40, ""))


def test_what_is_kept_and_not_whole_is_told(tmp_path: Path) -> None:
    drawn, similar = Choice((2,), (3,), 5, ""), Choice((2,), (), 5, "clip")
    for choice in (drawn, similar):
        planned(tmp_path, choice, pool_of(60))
    for name in ("queries-5-s3.jsonl", "pool.jsonl"):
        (tmp_path / name).write_text("".join((tmp_path / name).read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ConfigError, match=r"queries-5-s3\.jsonl is damaged: remove it and plan again"):
        trials.read(str(tmp_path), drawn).queries(3)
    with pytest.raises(ConfigError, match=r"pool\.jsonl is damaged: remove it and plan again"):
        trials.read(str(tmp_path), similar).similar()
    (tmp_path / "pool.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"not all is planned there \(no pool.jsonl in .*or give the step="):
        trials.read(str(tmp_path), similar).similar()
    (tmp_path / "pool.json").write_text('{"count": 60')
    with pytest.raises(ConfigError, match=r"pool.json is damaged \(.*\): remove it and plan again$"):
        trials.read(str(tmp_path), drawn)
