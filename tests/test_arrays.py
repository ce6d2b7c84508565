"""The array jobs of data preparation as text; tests/cluster/test_corpora.py submits them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, environment


def printed(folder: Path, *words: str) -> str:
    command = [sys.executable, "data_prep/cc3m.py", "cluster=print", *words]
    result = subprocess.run(command, cwd=ROOT, env=environment(ROOT, folder), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_stage_is_a_script(tmp_path: Path) -> None:
    said = printed(
        tmp_path, "source=in.tsv", "out=s3://corpora/cc3m", "tasks=8", "slurm.partition=long", "web.host_rate=5"
    )
    scripts = [f"#!/bin/bash{text}" for text in said.split("#!/bin/bash")[1:]]
    assert [re.findall(r"stage=(\w+)", text) for text in scripts] == [["plan"], ["fetch"], ["pack"], ["verify"]]
    assert ["--array=0-7" in text for text in scripts] == [False, True, True, False]
    for text in scripts:
        assert "--partition=long" in text and "web.host_rate=5" in text and f"source={ROOT}/in.tsv" in text
        assert "out=s3://corpora/cc3m images=s3://corpora/images" in text
        assert subprocess.run(["/bin/bash", "-n"], input=text, text=True).returncode == 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("tasks", [1, 2500])
def test_more_tasks_than_an_array_holds_are_several_arrays(tmp_path: Path, tasks: int) -> None:
    said = printed(tmp_path, "source=in.tsv", "out=out", f"tasks={tasks}", "stage=fetch")
    lengths = [int(last) + 1 for last in re.findall(r"--array=0-(\d+)", said)]
    starts = [int(first) for first in re.findall(r"task=\$\(\((\d+) \+", said)]
    assert sum(lengths) == tasks and max(lengths) <= 1001
    assert starts == [sum(lengths[:number]) for number in range(len(lengths))]
