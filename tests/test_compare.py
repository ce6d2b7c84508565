"""Two evaluations side by side, planned, scored and saved by the code that does so."""

import shutil
from pathlib import Path

import evaluations
import pytest
import questions
from evaluations import VQA, evaluate

from hpc_mm.compare import Compare, compare, main

ASKED = range(20)
RIGHT = [f"a{number % 10}" for number in range(2 * len(ASKED))]  # one of ten annotators says so


@pytest.fixture
def data(tmp_path: Path) -> str:
    return questions.write_splits(
        tmp_path / "data", test=questions.asked(*ASKED), train=questions.asked(*range(20, 40))
    )


def words(first: Path, second: Path) -> list[str]:
    return [f"{name}={folder}/eval/vqav2/step-9" for name, folder in (("first", first), ("second", second))]


def test_a_better_model(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = evaluate(tmp_path / "a", VQA, 9, data, ["wrong"] * 40, shots=(0, 2), seeds=(1, 2))
    after = evaluate(tmp_path / "b", VQA, 9, data, RIGHT, shots=(2, 4), seeds=(1, 2))
    (found,) = compare(Compare(first=f"{tmp_path}/a/eval/vqav2/step-9", second=f"{tmp_path}/b/eval/vqav2/step-9"))
    assert (found.first, found.second) == (before[1], after[0])
    assert found.difference.mean == pytest.approx(after[0]["score"] - before[1]["score"])
    assert found.difference.low > 0 and found.difference.p < 0.001
    assert main(words(tmp_path / "a", tmp_path / "b")) == 0
    assert "2shot-random8-s1,2" in capsys.readouterr().out


def test_a_model_beside_itself(data: str, tmp_path: Path) -> None:
    evaluate(tmp_path / "a", VQA, 9, data, RIGHT)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (found,) = compare(Compare(first=f"{tmp_path}/a/eval/vqav2/step-9", second=f"{tmp_path}/b/eval/vqav2/step-9"))
    assert found.difference == (0, 0, 0, 1)


def test_unlike_protocols_are_refused(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(tmp_path / "a", VQA, 9, data, RIGHT, seeds=(1, 2))
    evaluate(tmp_path / "b", VQA, 9, data, RIGHT, seeds=(1, 3))
    assert main(words(tmp_path / "a", tmp_path / "b")) == 2
    said = capsys.readouterr().err
    assert "unlike protocols are not compared: demonstrations.seeds: [1, 2] -> [1, 3]" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["shots=8"], "nothing in common"),
        (["rules=lmms-eval"], "nothing in common"),
        (["second="], "second=OUT is missing"),
        (["first=/nowhere/at/all"], "no folder /nowhere/at/all"),
        (["secnd=3"], "did you mean second?"),
    ],
)
def test_a_mistake_is_one_line(
    more: list[str], said: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        evaluations.evaluate(tmp_path / name, VQA, 9, data, RIGHT)
    own = {word.partition("=")[0] for word in more}
    given = [word for word in words(tmp_path / "a", tmp_path / "b") if word.partition("=")[0] not in own]
    assert main([*given, *more]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1
