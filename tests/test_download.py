"""Fetching a corpus and packing it, disturbed and undisturbed."""

import hashlib
import json
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import samples
import scripts
from hostile import (
    CANARY,
    EXPECTED,
    SERVER,
    Names,
    Server,
    forget_peak,
    guarded_server,
    peak_mb,
    redirect,
    self_signed,
    slow_body,
    whole,
)
from image_server import ImageServer, served_pictures
from object_server import object_server
from PIL import Image as Picture
from PIL import PngImagePlugin
from scripts import prepared, write_source

from hpc_mm import download, prepare
from hpc_mm.config import ConfigError
from hpc_mm.data.ledger import Ledger, Line, from_parquet
from hpc_mm.data.recode import Recode
from hpc_mm.data.schema import image_key
from hpc_mm.data.shards import read_samples
from hpc_mm.data.store import NONE, FolderStore, Store, open_store
from hpc_mm.data.wanted import Plan, make_plan, read_plan
from hpc_mm.data.web import Web


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageServer]:
    with served_pictures(tmp_path_factory.mktemp("images")) as found:
        yield found


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
    stored = {path.name for path in (tmp_path / "run/images").glob("[!.]*")}
    assert stored == {image_key(server.url(number)) for number in range(count)}
    out = open_store(str(tmp_path / "run/out"))
    plan = read_plan(out)
    assert plan is not None
    lines = [line for part in plan.parts for line in Ledger(out, part.name).lines.values()]
    assert len(lines) == count and all(line.status == "ok" for line in lines)
    for line in lines:
        data = (tmp_path / "run/images" / line.key).read_bytes()
        assert (line.sha256, line.stored) == (hashlib.sha256(data).hexdigest(), len(data))


def test_a_store_that_is_down_too_long_ends_a_task_and_loses_nothing(
    server: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line and exit code 2; the next run fetches only what was not stored."""
    source = write_source(tmp_path / "pairs.jsonl", server, 200)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "value")
    words = {"source": source, "out": "s3://bucket/out", "web.allow": "127.0.0.0/8"}
    with object_server() as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.address)
        assert scripts.run("cc3m", stage="plan", **words) == 0
        store.lasts = 60
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "open_store", partial(open_store, deadline=2.0))
            assert scripts.run("cc3m", stage="fetch", **words) == 2
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1 and "in s3://bucket/" in said[0] and "failed for 2 s" in said[0]
        stored = {name.rpartition("/")[2] for name in store.objects if re.search("/images/[^.]", name)}
        assert 0 < len(stored) <= 60
        store.lasts = None
        server.requests()
        assert scripts.run("cc3m", stage="fetch", **words) == 0
        assert server.requests() == {number: 1 for number in range(200) if image_key(server.url(number)) not in stored}
        lines = ledger(open_store("s3://bucket/out"))
        found = store.objects.items()
        kept = {name.rpartition("/")[2]: data for name, data in found if re.search("/images/[^.]", name)}
    assert len(lines) == len(kept) == 200
    assert all(line.status == "ok" and line.attempts == 1 for line in lines)
    assert {line.key: line.sha256 for line in lines} == {
        key: hashlib.sha256(data).hexdigest() for key, data in kept.items()
    }


def planned(urls: list[str], folder: Path) -> tuple[Plan, Store, Store]:
    """A plan of these URLs, and the stores of what is written and of images."""
    out, images = (open_store(str(folder / name), make=True) for name in ("out", "images"))
    return make_plan(urls, {}, {}, images, out), out, images


def ledger(out: Store) -> list[Line]:
    """All lines, of ledgers that are done: each is one file."""
    return [line for entry in out.list("ledger") for line in from_parquet(out.read(entry.key))]


IMPATIENT = Web(deadline=1.5, host_rate=0, allow=("127.0.0.0/8",))  # for its URLs a pause of two seconds is too long


def test_images_that_were_lost_come_back(server: ImageServer, tmp_path: Path) -> None:
    source = write_source(tmp_path / "pairs.jsonl", server, 40)
    prepared(source, tmp_path / "run")
    server.requests()
    for number in (3, 17):
        (tmp_path / "run/images" / image_key(server.url(number))).unlink()
    for retry, asked in (("", {}), ("timeout", {}), ("missing", {3: 1, 17: 1}), ("missing", {})):
        prepared(source, tmp_path / "run", "stage=fetch", f"retry={retry}")
        assert server.requests() == asked
    lines = ledger(open_store(str(tmp_path / "run/out")))
    assert Counter((line.status, line.attempts) for line in lines) == {("ok", 1): 38, ("ok", 2): 2}
    assert len(list((tmp_path / "run/images").glob("[!.]*"))) == 40


class FullDisk(FolderStore):
    """A folder that takes one file of the ledger."""

    def write(self, key: str, data: bytes, metadata: Mapping[str, str] = NONE) -> None:
        if key.startswith("ledger/") and any(self.list("ledger")):
            raise ConfigError(f"cannot write {key}: No space left on device")
        super().write(key, data, metadata)


def test_a_ledger_that_cannot_be_written_ends_the_fetching(
    server: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "FLUSH", 0.2)
    plan, out, images = planned([server.url(number) for number in range(400)], tmp_path)
    slow = Web(host_rate=5, allow=("127.0.0.0/8",))
    with pytest.raises(ConfigError, match="No space left"):
        download.fetch(plan.parts, FullDisk(out.address), images, slow, Recode())
    assert len(list(images.list())) < 200, "not at its end"


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
    patient = IMPATIENT.model_copy(update={"come_back": 3.0})
    tally = download.fetch(plan.parts, out, images, patient, Recode())
    assert tally.done == {"retry: http_429": 100}
    asked = server.requests()
    assert sum(asked.values()) <= 4 * 3, "at once, and once or twice in the seconds after"
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


LONG = 6.0  # seconds for a URL where 350 hosts are asked at once, on a machine that may be busy


def test_hostile_servers_leave_one_line_each_and_nothing_else(tmp_path: Path) -> None:
    """In a new process, whose memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(fetch_from_hostile_servers, tmp_path, *self_signed(tmp_path)).result()


def fetch_from_hostile_servers(folder: Path, certificate: Path, key: Path) -> None:
    """One second beyond the deadline at most, and never more than 64 MB beyond what a harmless fetch has needed."""
    web = Web(deadline=LONG, max_mb=4, host_rate=0, allow=(f"{SERVER}/32",), come_back=0)
    with guarded_server() as server, guarded_server(certificate, key) as secure:
        server.pages = pages()
        harmless, out, images = planned([f"http://good.test:{server.port}/picture?{n}" for n in range(50)], folder)
        assert download.fetch(harmless.parts, out, images, web, Recode(), (), Names()).done == {"ok": 50}
        cases = hostile_cases(server, secure)
        plan, out, images = planned(list(cases), folder / "hostile")
        names = Names()
        names.answers["rebind.test"] = [[SERVER], [CANARY]]
        forget_peak()
        before = peak_mb()
        download.fetch(plan.parts, out, images, web, Recode(), (), names)
        grown = peak_mb() - before
    found = {line.key: line for line in ledger(out)}
    assert sum(1 for _ in out.list("ledger")) == 1 and len(ledger(out)) == len(found) == len(cases)
    rebound = [found.pop(image_key(url)) for url, expected in cases.items() if not expected]
    assert sorted(line.status + line.reason for line in rebound) == ["blockedaddress", "ok"]
    assert {url: (line.status, line.reason) for url in cases if (line := found.get(image_key(url)))} == {
        url: expected for url, expected in cases.items() if expected
    }
    lines = [*found.values(), *rebound]
    ended = sorted(line.time for line in lines)
    assert ended[-1] - ended[0] < LONG + 1, "all begin at once, and an address that is refused ends at once"
    good = {line.key for line in lines if line.status == "ok"}
    assert {entry.key for entry in images.list()} == good and len(good) == 2 + 1
    assert {images.read(name) for name in good} == {samples.encoded(samples.picture(1))}
    assert grown < 64, f"{grown} MB"


def test_large_pictures_take_the_memory_of_one(tmp_path: Path) -> None:
    """Just small enough to be decoded, 264 MB each, half of them broken, as if there were a core for each."""
    large = samples.encoded(Picture.new("RGB", (8190, 8190)))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        grown = pool.submit(fetch_large_pictures, tmp_path, large).result()
    assert 200 < grown < 400, f"{grown} MB"


def fetch_large_pictures(folder: Path, large: bytes) -> float:
    with pytest.MonkeyPatch.context() as patch, guarded_server() as server:
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
        bodies = {"large": large, "half": large[: len(large) // 2]}
        server.pages = pages() | {name: whole("200 OK", body) for name, body in bodies.items()}
        names = ("picture", "large", "half")
        urls = [f"http://good.test:{server.port}/{name}?{n}" for name in names for n in range(3)]
        plan, out, images = planned(urls, folder)
        before = peak_mb()
        web = Web(host_rate=0, allow=(f"{SERVER}/32",))
        done = download.fetch(plan.parts, out, images, web, Recode(), (), Names()).done
        assert done == {"ok": 6, "poison: not_an_image": 3}
        return peak_mb() - before


@pytest.mark.parametrize("resize", ["none", "keep_ratio"])
def test_a_line_that_a_kill_took_says_no_more_than_is_known(server: ImageServer, tmp_path: Path, resize: str) -> None:
    """Nobody knows what came over the wire, and how large a picture was that has been shrunk."""
    plan, out, images = planned([server.url(number) for number in range(4)], tmp_path)
    recoding = Recode.model_validate({"resize": resize, "size": 20})
    download.fetch(plan.parts, out, images, IMPATIENT, recoding)
    whole = {line.key: line for line in ledger(out)}
    for entry in list(out.list("ledger")):
        out.delete(entry.key)
    for part in plan.parts:
        Ledger(out, part.name).flush()  # begun, and killed before the first line was written
    server.requests()
    assert download.fetch(plan.parts, out, images, IMPATIENT, recoding).done == {"ok": 4}
    assert server.requests() == {}
    unknown = {} if resize == "none" else {"original_width": 0, "original_height": 0}
    found = {line.key: line for line in ledger(out)}
    assert {(line.original_width, line.original_height) for line in whole.values()} == {(40, 30)}
    assert found == {
        key: replace(line, bytes=0, time=found[key].time, **unknown)  # type: ignore[arg-type]
        for key, line in whole.items()
    }


def pages() -> dict[str, bytes]:
    """Bodies that only decoding tells from pictures, and one that is one."""
    good = samples.encoded(samples.picture(1))
    smooth = samples.encoded(samples.picture(2, 400, 300), "JPEG")
    words = PngImagePlugin.PngInfo()
    words.add(b"zTXt", b"comment\0\0" + zlib.compress(bytes(10**8)))
    bodies = {
        "picture": good,
        "truncated": smooth[: len(smooth) // 2],
        "bomb": samples.encoded(Picture.new("1", (10_000, 10_000))),
        "text_bomb": samples.encoded(samples.picture(3), pnginfo=words),
        "scans": samples.repeating_scans(1000),
    }
    return {name: whole("200 OK", body, "Content-Type: image/jpeg") for name, body in bodies.items()} | {
        "to_picture": redirect("picture")
    }


def hostile_cases(server: Server, secure: Server) -> dict[str, tuple[str, str] | None]:
    """URLs with the status and reason of each; None where that of one depends on that of another."""
    cases: dict[str, tuple[str, str] | None] = {}
    for name, expected in EXPECTED.items():  # "ok": bytes came, which the fetcher does not look at
        said = ("poison", "not_an_image") if expected[0] == "ok" else expected
        cases[f"http://{name}.test:{server.port}/{name}"] = said
    for name in ("truncated", "bomb", "text_bomb", "scans"):
        cases[f"http://{name}.test:{server.port}/{name}"] = ("poison", "not_an_image")
    for name in ("picture", "to_picture"):
        cases[f"http://{name}.test:{server.port}/{name}"] = ("ok", "")
    for number in range(3):
        cases[f"http://storm.test:{server.port}/storm?{number}"] = ("retry", "http_429")
    for number in range(300):
        cases[f"http://n{number}.nowhere/ok"] = ("retry", "dns")
    for address in (CANARY, "169.254.169.254"):
        cases[f"http://{address}:{server.port}/ok"] = ("blocked", "address")
    for port in (server.port, server.other_port):
        cases[f"http://rebind.test:{port}/picture"] = None
    cases[f"https://tls.test:{secure.port}/picture"] = ("retry", "tls")
    server.robots["drip.test"] = slow_body
    cases[f"http://drip.test:{server.port}/picture"] = ("retry", "timeout")
    return cases
