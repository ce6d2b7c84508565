"""Fetching a corpus and packing it, disturbed and undisturbed."""

import hashlib
import json
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
import samples
from image_server import ImageServer, image_server

from hpc_mm import download
from hpc_mm.data.ledger import Ledger, Line, from_parquet
from hpc_mm.data.recode import Recode
from hpc_mm.data.schema import image_key
from hpc_mm.data.shards import read_samples
from hpc_mm.data.store import Store, open_store
from hpc_mm.data.wanted import Plan, make_plan, read_plan
from hpc_mm.data.web import Web

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


def planned(urls: list[str], folder: Path) -> tuple[Plan, Store, Store]:
    """A plan of these URLs, and the stores of what is written and of images."""
    out, images = (open_store(str(folder / name), make=True) for name in ("out", "images"))
    return make_plan(urls, {}, images, out), out, images


def ledger(out: Store) -> list[Line]:
    """All lines, of ledgers that are done: each is one file."""
    return [line for entry in out.list("ledger") for line in from_parquet(out.read(entry.key))]


IMPATIENT = Web(deadline=1.5, host_rate=0, allow=("127.0.0.0/8",))  # for its URLs a pause of two seconds is too long


def test_hosts_that_ask_for_a_pause_are_asked_again(server: ImageServer, tmp_path: Path) -> None:
    """Their URLs wait, and cost no attempt: each image was asked for as often as its line says."""
    plan, out, images = planned([server.url(number) for number in range(400)], tmp_path)
    server.requests()
    server.pause(hosts=3, seconds=3, retry_after=2)
    tally = download.fetch(plan.parts, out, images, IMPATIENT, Recode())
    assert "400 of 400 URLs" in tally.text() and tally.done == {"ok": 400, "retry: http_429": 0}
    lines, asked = ledger(out), server.requests()
    assert Counter(line.key for line in lines) == dict.fromkeys({entry.key for entry in images.list()}, 1)
    assert {line.key: line.attempts for line in lines} == {
        image_key(server.url(number)): count for number, count in asked.items()
    }
    refused = sum(asked.values()) - 400
    assert 3 <= refused <= 3 * 4 * 2, "two times within three seconds, by no more than four connections to each host"


def test_a_long_pause_is_left_to_the_next_run(server: ImageServer, tmp_path: Path) -> None:
    plan, out, images = planned([server.url(8 * number) for number in range(100)], tmp_path)
    server.requests()
    server.pause(hosts=1, seconds=60, retry_after=3600)
    started = time.time()
    for runs in (1, 2):
        tally = download.fetch(plan.parts, out, images, IMPATIENT, Recode())
        assert "100 of 100 URLs" in tally.text() and tally.done == {"retry: http_429": 100}
        if runs == 1:
            asked = server.requests()
            assert 1 <= len(asked) <= 4 and set(asked.values()) == {1}
    assert server.requests() == {}, "it is not yet time"
    lines = ledger(out)
    assert len(lines) == 100 and sum(line.attempts for line in lines) == len(asked)
    assert all(line.status == "retry" and line.retry_at and line.retry_at > started + 3500 for line in lines)


def test_a_host_that_never_mends_does_not_keep_a_task(server: ImageServer, tmp_path: Path) -> None:
    plan, out, images = planned([server.url(8 * number) for number in range(100)], tmp_path)
    server.requests()
    server.pause(hosts=1, seconds=60, retry_after=2)
    patient = IMPATIENT.model_copy(update={"come_back": 4.0})
    tally = download.fetch(plan.parts, out, images, patient, Recode())
    assert tally.done == {"retry: http_429": 100}
    asked = server.requests()
    assert sum(asked.values()) <= 4 * 3, "at once, and in seconds 2 to 4"
    assert {line.attempts for line in ledger(out)} <= {0, 1, 2, 3}
    assert sum(line.attempts for line in ledger(out)) == sum(asked.values())
    server.pause(hosts=0, seconds=0, retry_after=0)
    tally = download.fetch(plan.parts, out, images, patient.model_copy(update={"come_back": 600.0}), Recode())
    assert "100 of 100 URLs" in tally.text() and tally.done["ok"] == 100, "the next run waits for the pause's end"
    for number, count in server.requests().items():
        asked[number] = asked.get(number, 0) + count
    assert {line.key: line.attempts for line in ledger(out)} == {
        image_key(server.url(number)): count for number, count in asked.items()
    }


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
