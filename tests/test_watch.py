"""Running scores of an evaluation, part by part."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import questions
from evaluations import TOY, VQA

from hpc_mm import benchmark, metrics, trials
from hpc_mm.benchmark import Benchmark
from hpc_mm.evaluate import score_so_far
from hpc_mm.predictions import Done, write_part
from hpc_mm.scoring import running
from hpc_mm.trials import Choice, Planned, Pool, Trial
from hpc_mm.watch import Queue, Watched, clock, silence, time_left, watch


def planned(tmp_path: Path, one: Benchmark) -> Planned:
    make = questions.captioned if one.kind == "caption" else questions.asked
    data = questions.write_splits(tmp_path / one.name, test=make(*range(20)), train=make(*range(20, 30)))
    asked = benchmark.questions(data, "test", one)
    pool, choice = benchmark.questions(data, "train", one), Choice((2,), (1,), 8, "")
    plan = Planned(f"{tmp_path}/out-{one.name}", choice, asked, Pool.of(one, pool), {})
    return trials.save(plan, choice.shown(pool), one, {}, 4)


def watched(plan: Planned, one: Benchmark) -> Watched:
    """Its only trial."""
    (trial,) = plan.plans
    scored = partial(score_so_far, plan, trial, running(one, "openflamingo", plan.questions)())
    return Watched(str(trial), plan.store(trial), plan.plans[trial], scored)


def answer(plan: Planned, part: int, text: str, began: float = 1.0) -> None:
    (trial,) = plan.plans
    rows = [{"id": number, "text": text if i else "nothing"} for i, number in enumerate(plan.plans[trial].ids_of(part))]
    write_part(plan.store(trial), plan.plans[trial], part, rows, began)


@pytest.mark.parametrize("one", [TOY, VQA], ids=lambda one: one.name)
def test_the_running_score_is_that_of_what_is_done(one: Benchmark, tmp_path: Path) -> None:
    plan = planned(tmp_path, one)
    seen = watched(plan, one)
    state = seen.look()
    assert (state.questions, state.total, seen.scores) == (0, len(plan.questions), {})
    said = "caption 3.1" if one.kind == "caption" else "a1"
    for part in (2, 0):  # one at a look
        answer(plan, part, said)
        state = seen.look()
    done = [*plan.questions[0:4], *plan.questions[8:12]]
    if one.kind == "caption":
        whole = ["nothing", said, said, said] * (len(plan.questions) // 4)
        every = metrics.cider_each(whole, [question.references for question in plan.questions])
        each = [*every[0:4], *every[8:12]]
    else:
        references = [question.references for question in done]
        each = list(metrics.vqa_accuracy_each(["nothing", said, said, said] * 2, references))
    assert state.questions == 8
    low, mean, high = sorted(metrics.mean_interval(each, len(plan.questions)))
    assert seen.scores == {"2 shots, seed 1": (100 * mean, 100 * low, 100 * high)}
    assert low < mean < high


def test_what_is_scored_is_not_read_again(tmp_path: Path) -> None:
    """Of a million rows a look keeps their scores, and when they were made."""
    plan = planned(tmp_path, VQA)
    seen = watched(plan, VQA)
    answer(plan, 0, "a1")
    seen.look()
    plan.store(Trial(2, 1)).write("parts/000000.jsonl", b"no longer looked at")
    answer(plan, 1, "a1")
    assert seen.look().questions == 8
    assert not any(part.rows for part in seen.done.values())


def test_without_scores_the_count_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(tmp_path, VQA)
    for part in range(10):
        answer(plan, part, "a1")
    assert watch([replace(watched(plan, VQA), scored=None)], "questions", "hidden", "interval", every=0) == 0
    said = capsys.readouterr().out
    assert said.startswith("40 of 40 questions\n") and "2 shots, seed 1" in said


def test_it_ends_with_the_last_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(tmp_path, VQA)
    parts = plan.plans[Trial(2, 1)].parts
    for part in range(parts):
        answer(plan, part, "a1")
    assert watch([watched(plan, VQA)], "questions", "vqa", "interval", every=0) == 0
    said = capsys.readouterr().out
    assert "40 of 40 questions  2 shots, seed 1: 22.50 (22.50 to 22.50)" in said


def test_silence_is_told(tmp_path: Path) -> None:
    plan = planned(tmp_path, VQA)
    seen = watched(plan, VQA)
    assert silence([seen]) == ""
    answer(plan, 0, "a1")
    seen.look()
    assert silence([seen]) == ""
    (part,) = seen.done.values()
    seen.done = {0: Done(part.rows, 1.0, time.time() - 3600.0)}
    assert "nothing new for 1:00:00: see the logs" in silence([seen])


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a squeue of shell commands, beside the file in which it notes how it was called."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    def make(commands: str) -> Path:
        program = tmp_path / "bin" / "squeue"
        program.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n{commands}\n')
        program.chmod(0o755)
        return tmp_path / "calls"

    return make


def test_jobs_that_are_gone_are_told(squeue: Callable[[str], Path]) -> None:
    told: list[str] = []
    names = ["toy-vqa-features", "toy-vqa-answer"]
    calls = squeue("echo '7_1 toy-vqa-answer'")
    queue = Queue(names, told.append, every=0)
    assert queue.words() == "" and "--me" in calls.read_text() and f"--name={','.join(names)}" in calls.read_text()
    squeue("true")
    assert queue.words() == (
        "; Slurm has no job toy-vqa-features or toy-vqa-answer: unless tasks run elsewhere, "
        "give the same command again, without watch=true"
    )
    squeue("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert [queue.words(), queue.words()] == ["", ""]
    assert len(told) == 1 and "Unable to contact slurm controller" in told[0] and "\n" not in told[0]
    squeue("true")
    assert "Slurm has no job" in queue.words()
    assert len(told) == 1


def test_slurm_is_not_asked_at_every_look(squeue: Callable[[str], Path]) -> None:
    calls = squeue("true")
    queue, nobody = Queue(["toy-answer"], print, every=3600.0), Queue([], print)
    found = [queue.words() for _ in range(3)]
    assert found[0] and len(set(found)) == 1
    assert nobody.words() == ""
    assert len(calls.read_text().splitlines()) == 1


def test_a_job_that_ends_with_the_last_part_is_not_told(
    tmp_path: Path, squeue: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(tmp_path, VQA)
    for part in range(10):
        answer(plan, part, "a1")
    last = tmp_path / "out-vqav2" / "2shot-s1" / "parts" / "000009.jsonl"
    last.rename(tmp_path / "last")
    squeue(f"mv {tmp_path}/last {last} 2>&1")
    assert watch([watched(plan, VQA)], "questions", "vqa", "interval", ["toy-answer"], every=0) == 0
    said = capsys.readouterr().out
    assert "40 of 40 questions" in said and "Slurm has no job" not in said


def test_the_time_left_is_that_of_all_trials(tmp_path: Path) -> None:
    """Of two trials the first is done, by two tasks side by side, after a night's pause between its parts."""
    first, second = (watched(planned(tmp_path / name, VQA), VQA) for name in ("first", "second"))
    rows = [{"id": "0"}] * 4
    first.done = {0: Done(rows, 0.0, 10.0), 1: Done(rows, 0.0, 10.0), 2: Done(rows, 50_000.0, 50_010.0)}
    assert time_left([first, second], 12, 24) == 20.0
    assert time_left([second], 0, 24) is None


def test_a_clock() -> None:
    assert [clock(seconds) for seconds in (None, 0.0, 61.5, 7322.0)] == ["", "0:00:00", "0:01:01", "2:02:02"]
