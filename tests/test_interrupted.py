"""Preparing a corpus with processes that end too early: killed, told to end, or left by whoever started them."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_server import ImageServer, served_pictures
from scripts import command, prepared, running, shards, write_source

from hpc_mm.data.ledger import Ledger
from hpc_mm.data.store import open_store
from hpc_mm.data.wanted import read_plan

WORDS = ["tasks=2", "part_urls=300", "shard_mb=1"]
URLS = 1500
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageServer]:
    with served_pictures(tmp_path_factory.mktemp("images")) as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(server: ImageServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and where its shards lie that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = write_source(folder / "pairs.jsonl", server, URLS)
    prepared(source, folder / "quiet", *WORDS)
    assert shards(folder / "quiet")
    return source, folder / "quiet"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends them")
def test_tasks_end_with_their_launcher(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed alone while its tasks start, and while they fetch, it leaves nobody to work beside the next one."""
    source, quiet = undisturbed
    images = tmp_path / "killed" / "images"
    for stored in (0, 12):
        words = command(source, tmp_path / "killed", "web.host_rate=1", *WORDS)
        launcher = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        while len(running(str(tmp_path / "killed"))) < 3 or len(list(images.iterdir())) < stored:
            assert launcher.poll() is None
            time.sleep(0.01)
        launcher.kill()
        launcher.wait()
        end = time.monotonic() + 30
        while running(str(tmp_path / "killed")) and time.monotonic() < end:
            time.sleep(0.05)
        assert running(str(tmp_path / "killed")) == []
        assert len(list(images.iterdir())) < 200
    prepared(source, tmp_path / "killed", *WORDS[1:])
    assert shards(tmp_path / "killed") == shards(quiet)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends others")
def test_a_task_by_hand_outlives_its_shell(server: ImageServer, tmp_path: Path) -> None:
    source = write_source(tmp_path / "pairs.jsonl", server, 100)
    prepared(source, tmp_path / "hand", "stage=plan")
    words = command(source, tmp_path / "hand", "stage=fetch", "task=0", "web.host_rate=5")
    shell = subprocess.Popen(
        ["/bin/sh", "-c", '"$@" & read line', "sh", *words], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    while not stored(tmp_path / "hand"):
        time.sleep(0.01)
    assert stored(tmp_path / "hand") < 100
    shell.communicate()
    while running(str(tmp_path / "hand")):
        time.sleep(0.05)
    assert stored(tmp_path / "hand") == 100


def stored(folder: Path) -> int:
    """Images that are in the store."""
    return sum(not path.name.startswith(".") for path in (folder / "images").iterdir())


@pytest.mark.parametrize(("words", "code"), [([], 143), (["tasks=2"], -signal.SIGTERM), (["batch"], 143)])
def test_a_pack_that_is_told_to_end_leaves_no_temporary_files(
    undisturbed: tuple[Path, Path], tmp_path: Path, words: list[str], code: int
) -> None:
    """A launcher ends at once, and its tasks after it; a batch script, which Slurm tells too, waits for them."""
    source, quiet = undisturbed
    before = ["bash", "sbatch/data_prep.sbatch", "python"] if words == ["batch"] else [sys.executable]
    words = [*before, *command(source, tmp_path / "run", "stage=pack", *(word for word in words if "=" in word))[1:]]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/images").symlink_to(quiet / "images")
    process = started(words, tmp_path / "temporary")
    while not list((tmp_path / "temporary").glob("hpc_mm-shard-*/*")):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM) if "bash" in words else process.terminate()
    said = process.communicate()[1]  # at the end of the last of them
    assert (said, process.returncode) == ("", code)
    assert not list((tmp_path / "temporary").glob("hpc_mm-*"))
    assert not list((tmp_path / "run/out").glob("*.tar")), "it was told in the midst of its work"


def started(words: list[str], temporary: Path) -> subprocess.Popen[str]:
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_fetch_that_is_told_to_end_writes_its_ledger(server: ImageServer, tmp_path: Path) -> None:
    source = write_source(tmp_path / "pairs.jsonl", server, 200)
    prepared(source, tmp_path / "run", "stage=plan")
    process = started(command(source, tmp_path / "run", "stage=fetch", "web.host_rate=1"), tmp_path / "temporary")
    while stored(tmp_path / "run") < 8:
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert (process.communicate()[1], process.returncode) == ("", 143)
    out = open_store(str(tmp_path / "run/out"))
    plan = read_plan(out)
    assert plan is not None
    lines = [key for part in plan.parts for key in Ledger(out, part.name).lines]
    images = {path.name for path in (tmp_path / "run/images").iterdir()}
    assert lines and set(lines) <= images and len(images) < 200


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.chaos)])
def test_killed_at_any_moment_the_shards_are_the_same(
    undisturbed: tuple[Path, Path], tmp_path: Path, kills: int
) -> None:
    """Half of the kills while images come, half while a shard is being written."""
    source, quiet = undisturbed
    draw, fell = random.Random(7), Counter[str]()
    for kill in range(kills):
        stage, words = ("fetch", ["web.host_rate=5"]) if kill < kills // 2 else ("pack", ["stage=pack"])
        if kill == kills // 2:
            prepared(source, tmp_path / "killed", "stage=fetch", *WORDS)
        temporary = tmp_path / f"temporary{kill}"
        before = stored(tmp_path / "killed") if kill else 0
        process = started(command(source, tmp_path / "killed", *words, *WORDS), temporary)
        while process.poll() is None:
            fetched = (
                stage == "fetch" and (tmp_path / "killed/images").is_dir() and stored(tmp_path / "killed") > before
            )
            if fetched or (stage == "pack" and list(temporary.glob("hpc_mm-shard-*/*"))):
                break
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.5))
        fell[stage] += bool(running(str(tmp_path / "killed"), f"stage={stage}"))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert fell["fetch"] >= kills / 4 and fell["pack"] >= kills / 4, fell
    prepared(source, tmp_path / "killed", *WORDS)
    assert shards(tmp_path / "killed") == shards(quiet)
