"""Fetching a corpus and packing it, disturbed and undisturbed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import samples
from image_server import ImageServer, image_server

from hpc_mm.data.ledger import Ledger
from hpc_mm.data.schema import image_key
from hpc_mm.data.shards import read_samples
from hpc_mm.data.store import open_store
from hpc_mm.data.wanted import read_plan

ROOT = Path(__file__).resolve().parents[1]
WEB = ["web.allow=127.0.0.0/8", "web.host_rate=0", "cluster=local"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageServer]:
    folder = tmp_path_factory.mktemp("images")
    for number in range(16):
        (folder / f"{number:02d}.jpg").write_bytes(samples.encoded(samples.picture(number)))
    with image_server(folder) as found:
        yield found


def write_source(path: Path, server: ImageServer, count: int) -> Path:
    lines = [json.dumps({"url": server.url(number), "caption": f"caption {number}"}) for number in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def command(source: Path, out: Path, *words: str) -> list[str]:
    places = [f"source={source}", f"out={out}/out", f"images={out}/images"]
    return [sys.executable, str(ROOT / "data_prep" / "cc3m.py"), *places, *WEB, *words]


def prepared(source: Path, out: Path, *words: str) -> str:
    result = subprocess.run(command(source, out, *words), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def shards(out: Path) -> dict[str, str]:
    """Every byte that training reads, by file."""
    folder = out / "out"
    files = [path for path in folder.iterdir() if path.name.endswith((".tar", ".json")) and path.name != "stats.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_from_urls_to_shards(server: ImageServer, tmp_path: Path) -> None:
    source = write_source(tmp_path / "pairs.jsonl", server, 40)
    server.requests()
    said = prepared(source, tmp_path / "one")
    assert "40 of them different: 0 are in" in said and "40 on 8 hosts are to fetch" in said and "fetched: ok" in said
    assert server.requests() == dict.fromkeys(range(40), 1)
    found = list(read_samples(open_store(str(tmp_path / "one/out"))))
    assert [sample.parts[1].text for sample in found] == [f"caption {number}" for number in range(40)]  # type: ignore[union-attr]
    assert json.loads((tmp_path / "one/out/stats.json").read_text())["fetched"] == {"ok": 40}
    prepared(source, tmp_path / "one")
    assert server.requests() == {}, "a second run fetches nothing"


@pytest.mark.parametrize("count", [2000, pytest.param(20_000, marks=pytest.mark.chaos)])
def test_a_rerun_fetches_only_what_failed(server: ImageServer, tmp_path: Path, count: int) -> None:
    source = write_source(tmp_path / "pairs.jsonl", server, count)
    failing = {number for number in range(count) if number * 37 % 100 < 30}
    server.down(30)
    server.requests()
    said = prepared(source, tmp_path / "run", "stage=plan") + prepared(source, tmp_path / "run", "stage=fetch")
    assert f"{len(failing)} retry: http_503" in said
    assert set(server.requests()) == set(range(count))
    server.down(0)
    assert "0 of 0" in prepared(source, tmp_path / "run", "stage=fetch", "retry=timeout,dns")
    assert server.requests() == {}
    prepared(source, tmp_path / "run", "stage=fetch", "retry=http_503")
    assert server.requests() == dict.fromkeys(failing, 1)
    stored = {path.name for path in (tmp_path / "run/images").iterdir()}
    assert stored == {image_key(server.url(number)) for number in range(count)}
    out = open_store(str(tmp_path / "run/out"))
    plan = read_plan(out)
    assert plan is not None
    lines = [line for part in plan.parts for line in Ledger(out, part.name).lines.values()]
    assert len(lines) == count and all(line.status == "ok" for line in lines)
    for line in lines:
        data = (tmp_path / "run/images" / line.key).read_bytes()
        assert (line.sha256, line.stored) == (hashlib.sha256(data).hexdigest(), len(data))


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.chaos)])
def test_killed_at_any_moment_the_shards_are_the_same(server: ImageServer, tmp_path: Path, kills: int) -> None:
    source = write_source(tmp_path / "pairs.jsonl", server, 1500)
    words = ["tasks=2", "part_urls=300", "shard_mb=1"]
    prepared(source, tmp_path / "quiet", *words)
    draw = random.Random(7)
    server.requests()
    for _ in range(kills):
        process = subprocess.Popen(
            command(source, tmp_path / "killed", *words),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(draw.uniform(0.3, 3.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    prepared(source, tmp_path / "killed", *words)
    assert shards(tmp_path / "killed") == shards(tmp_path / "quiet")
    assert shards(tmp_path / "quiet")
