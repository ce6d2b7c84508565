"""What launcher tests start from: a small store, and a checkout whose training only notes what it sees of its node."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hpc_mm.data.schema import Sample, Text
from hpc_mm.data.shards import ShardWriter
from hpc_mm.data.store import open_store

ROOT = Path(__file__).resolve().parents[1]
TRAIN = """
import json, os, pathlib, sys, time
from hpc_mm import attempt, deadline
folder = pathlib.Path(sys.argv[1].removeprefix("run="))
rank = int(os.environ["RANK"])
if "TEST_IMPORTS" in os.environ:  # seconds in which a rank does not hear signals yet
    (folder / f"importing{rank}").touch()
    time.sleep(float(os.environ["TEST_IMPORTS"]))
deadline.die_with_parent()
until = deadline.Deadline.from_environment()
checkpoints = sorted((folder / "checkpoints").glob("step-*"))
first = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
if rank == 0:
    attempt.begin(folder, first)
    if "TEST_SLEEP" in os.environ:  # a run that goes on until it is told to stop: a step, and its checkpoint
        path = folder / "checkpoints" / f"step-{first + 1:08d}"
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
facts = {**os.environ, "file": __file__, "cwd": os.getcwd(), "cores": len(os.sched_getaffinity(0)), "version": VERSION}
facts.update(first=first, pid=os.getpid(), parent=os.getppid(), time=time.time(), end=until.end)
(folder / f".rank{rank}").write_text(json.dumps(facts))
os.replace(folder / f".rank{rank}", folder / f"rank{rank}.json")
if rank == int(os.environ.get("TEST_FAILS", -1)):
    sys.exit("the reason of the failure")
for step in (10, 20):
    if rank == 0:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), "loss": 1.5, "samples_per_s": 3.0}) + "\\n")
end = time.time() + float(os.environ.get("TEST_SLEEP", 0))
while time.time() < end and not until.reason(time.time()):
    time.sleep(0.1)
if rank == 0:
    attempt.end(folder, until.reason(time.time()) or "finished", first + 1)
"""


def make_checkout(folder: Path) -> Path:
    """A copy of the checkout with a train.py of a user's own."""
    for name in ("hpc_mm", "accelerate_configs", "eval", "sbatch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_train(folder, 1)
    return folder


def write_train(checkout: Path, version: int) -> None:
    (checkout / "hpc_mm" / "train.py").write_text(f"VERSION = {version}\n{TRAIN}")


def make_store(address: str) -> str:
    """What ``recipe=toy`` reads: three folders of shards and a tokenizer file."""
    for name in ("train-documents", "train-pairs", "train-questions"):
        with ShardWriter(open_store(f"{address}/shapes/{name}"), "shapes") as writer:
            for number in range(4):
                writer.add(Sample(f"sample{number}", (Text("a red circle"),)))
    open_store(address).write("shapes/tokenizer.json", b"{}")
    return address


def environment(checkout: Path, folder: Path, **more: str) -> dict[str, str]:
    """A user's environment: this checkout, runs below ``folder``, no site file but an empty one."""
    site = folder / "site.toml"
    site.touch()
    values = {name: value for name, value in os.environ.items() if not name.startswith(("SBATCH_", "HPC_MM_"))}
    values |= {"PYTHONPATH": str(checkout), "HPC_MM_SITE": str(site), "HPC_MM_RUNS": str(folder / "runs")}
    return {**values, "HPC_MM_STORE": str(folder / "store"), **more}


def launch(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc_mm.launch", *words]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=900)


def facts(run: Path, rank: int) -> dict[str, Any]:
    """What a rank noted."""
    found: dict[str, Any] = json.loads((run / f"rank{rank}.json").read_text())
    return found
