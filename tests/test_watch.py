"""Running scores of an evaluation, part by part."""

import time
from pathlib import Path

import numpy as np
import pytest
import questions
from evaluations import TOY, VQA

from hpc_mm import benchmark, metrics, trials
from hpc_mm.benchmark import Benchmark
from hpc_mm.predictions import Done, write_part
from hpc_mm.trials import Choice, Planned, Pool, Trial
from hpc_mm.watch import Watched, clock, silence, time_left, watch


def planned(tmp_path: Path, one: Benchmark) -> Planned:
    make = questions.captioned if one.kind == "caption" else questions.asked
    data = questions.write_splits(tmp_path / one.name, test=make(*range(20)), train=make(*range(20, 30)))
    asked = benchmark.questions(data, "test", one)
    pool, choice = benchmark.questions(data, "train", one), Choice((2,), (1,), 8, "")
    plan = Planned(f"{tmp_path}/out-{one.name}", choice, asked, Pool.of(one, pool), {})
    return trials.save(plan, choice.shown(pool), one, {}, 4)


def answer(plan: Planned, part: int, text: str, began: float = 1.0) -> None:
    (trial,) = plan.plans
    rows = [{"id": number, "text": text if i else "nothing"} for i, number in enumerate(plan.plans[trial].ids_of(part))]
    write_part(plan.store(trial), plan.plans[trial], part, rows, began)


@pytest.mark.parametrize("one", [TOY, VQA], ids=lambda one: one.name)
def test_the_running_score_is_that_of_what_is_done(one: Benchmark, tmp_path: Path) -> None:
    plan = planned(tmp_path, one)
    seen = Watched(Trial(2, 1))
    state = seen.look(plan, one, "openflamingo")
    assert (state.questions, state.total, seen.score) == (0, len(plan.questions), None)
    said = "caption 3.1" if one.kind == "caption" else "a1"
    for part in (2, 0):
        answer(plan, part, said)
    state = seen.look(plan, one, "openflamingo")
    done = [*plan.questions[0:4], *plan.questions[8:12]]
    references = [question.references for question in done]
    if one.kind == "caption":
        every = [question.references for question in plan.questions]
        each = metrics.cider_each(["nothing", said, said, said] * 2, references, documents=every)
    else:
        each = metrics.vqa_accuracy_each(["nothing", said, said, said] * 2, references)
    assert state.questions == 8 and seen.score is not None
    expected = metrics.mean_interval(100 * np.asarray(each), len(plan.questions))
    assert seen.score == pytest.approx(expected)
    assert seen.score.low < seen.score.mean < seen.score.high


def test_it_ends_with_the_last_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(tmp_path, VQA)
    parts = plan.plans[Trial(2, 1)].parts
    for part in range(parts):
        answer(plan, part, "a1")
    assert watch(plan, VQA, ["openflamingo"], every=0) == 0
    said = capsys.readouterr().out
    assert "40 of 40 questions  2shot-s1 22.50 (22.50 to 22.50)" in said


def test_silence_is_told(tmp_path: Path) -> None:
    plan = planned(tmp_path, VQA)
    seen = Watched(Trial(2, 1))
    assert silence([seen]) == ""
    answer(plan, 0, "a1")
    seen.look(plan, VQA, "openflamingo")
    assert silence([seen]) == ""
    (part,) = seen.done.values()
    seen.done = {0: Done(part.rows, 1.0, time.time() - 3600.0)}
    assert "nothing new for 1:00:00: see the logs" in silence([seen])


def test_the_time_left_is_that_of_all_trials(tmp_path: Path) -> None:
    """Of two trials the first is done, by two tasks side by side, after a night's pause between its parts."""
    first, second = Watched(Trial(0, 1)), Watched(Trial(2, 1))
    rows = [{"id": "0"}] * 4
    first.done = {0: Done(rows, 0.0, 10.0), 1: Done(rows, 0.0, 10.0), 2: Done(rows, 50_000.0, 50_010.0)}
    assert time_left([first, second], 12, 24) == 20.0
    assert time_left([second], 0, 24) is None


def test_a_clock() -> None:
    assert [clock(seconds) for seconds in (None, 0.0, 61.5, 7322.0)] == ["", "0:00:00", "0:01:01", "2:02:02"]
