import pytest

from hpc_mm.data import pace
from hpc_mm.data.parts import SourcePart

PARTS = [SourcePart(f"{number}.jsonl", 100 * number) for number in range(1, 5)]


def test_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = pace.Pace(PARTS)
    assert list(told.through(PARTS[0], range(10))) == list(range(10))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(pace, "REPORT", 0)
    assert list(told.through(PARTS[1], range(2))) == [0, 1]
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["11 records", "12 records"]


def test_time_left_is_by_the_bytes_of_files() -> None:
    told = pace.Pace(PARTS)
    list(told.through(PARTS[0], range(10)))
    assert told.text(5.0) == "10 records, 2/s, 1 of 4 files, 45 s left"
    told.skip(PARTS[3])
    assert told.text(5.0) == "10 records, 2/s, 1 of 3 files, 25 s left"
    assert pace.Pace(PARTS).text(5.0) == "0 records, 0/s, 0 of 4 files"
