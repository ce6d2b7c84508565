"""Corpora that are packed again when images that they lacked have come, and by several launches at once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import samples
from image_server import image_server
from scripts import SCRIPTS, run

from hpc_mm import pack
from hpc_mm.data.documents import Record
from hpc_mm.data.ledger import OK, Ledger, Line
from hpc_mm.data.schema import Text, image_key
from hpc_mm.data.shards import check_shards, read_samples
from hpc_mm.data.store import FolderStore, open_store

FILES, RECORDS = 3, 8
MENDED = ["u/3", "u/9"]  # in part-0 and part-1; u/20, of part-2, never comes


def put(folder: Path, *names: str) -> None:
    store = open_store(str(folder), make=True)
    for name in names:
        store.write(image_key(name), samples.encoded(samples.picture(int(name[2:]))))


def corpus(folder: Path) -> dict[str, Any]:
    """Captions of u/0 to u/23 in three files, without the images of MENDED and of u/20; a shard for every image."""
    (folder / "in").mkdir()
    for part in range(FILES):
        lines = [json.dumps({"url": f"u/{part * RECORDS + i}", "caption": f"caption {i}"}) for i in range(RECORDS)]
        (folder / "in" / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n")
    put(folder / "images", *(f"u/{number}" for number in range(24) if number not in (3, 9, 20)))
    return {"source": folder / "in", "images": folder / "images"}


def content(folder: Path) -> dict[str, bytes]:
    """Every file but those that a killed process was writing."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".partial")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def shards(files: dict[str, bytes]) -> dict[str, bytes]:
    """Shards, their indexes and the manifest."""
    return {name: data for name, data in files.items() if name.endswith((".tar", "index.json"))}


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def captions(folder: Path) -> dict[str, str]:
    store = open_store(str(folder))
    assert check_shards(store) == []
    found = {}
    for sample in read_samples(store):
        (text,) = (part.text for part in sample.parts if isinstance(part, Text))
        found[sample.id] = text
    return found


def undisturbed(folder: Path, where: dict[str, Any], **more: Any) -> dict[str, bytes]:
    """What one run makes with all images there from the start."""
    assert run("cc3m", **where, out=folder / "quiet", **more) == 0
    return content(folder / "quiet")


# ---------------------------------------------------------------- images that come later


def test_what_has_come_is_packed_where_it_belongs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where, out = corpus(tmp_path), tmp_path / "out"
    assert run("cc3m", **where, out=out) == 0
    assert len(captions(out)) == 21
    before = times(out)
    put(tmp_path / "images", *MENDED)
    assert run("cc3m", **where, out=out) == 0
    assert times(out) == before, "nothing says that images have come"
    capsys.readouterr()
    assert run("cc3m", **where, out=out, recheck="1") == 0
    said = capsys.readouterr().out
    assert "part-0.jsonl: 8 records, 8 samples" in said and "part-1.jsonl: 8" in said and "part-2" not in said
    after = times(out)
    kept = {name for name in before if name.startswith("part-2") or name == "parts/part-2.missing.json"}
    assert len(kept) == 3 and all(before[name] == after[name] for name in kept)
    assert len(captions(out)) == 23
    assert content(out) == undisturbed(tmp_path, where, recheck="1")
    assert run("cc3m", **where, out=out, recheck="1") == run("cc3m", **where, out=out) == 0
    assert times(out) == after, "one word looks once"


def test_a_fetch_that_mended_images_is_noticed(tmp_path: Path) -> None:
    where, out = corpus(tmp_path), tmp_path / "out"
    assert run("cc3m", **where, out=out) == 0
    put(tmp_path / "images", *MENDED)
    for folder in (out, tmp_path / "quiet"):
        ledger = Ledger(open_store(str(folder), make=True), "00000-00000")
        ledger.add(Line(image_key("u/3"), OK, "", 2))
        ledger.finish()
        os.utime(folder / "ledger/00000-00000.parquet", (1, 1))
    assert run("cc3m", **where, out=out) == 0
    assert content(out) == undisturbed(tmp_path, where)
    after = times(out)
    assert run("cc3m", **where, out=out) == 0
    assert times(out) == after


def test_tasks_declare_the_corpus_once_all_have_looked(tmp_path: Path) -> None:
    where, out = corpus(tmp_path), tmp_path / "out"
    assert run("cc3m", **where, out=out) == 0
    put(tmp_path / "images", *MENDED)
    manifest = (out / "index.json").read_bytes()
    for task in (1, 2):
        assert run("cc3m", **where, out=out, tasks=3, task=task, recheck="1") == 0
        assert (out / "index.json").read_bytes() == manifest and len(captions(out)) == 21
    assert run("cc3m", **where, out=out, tasks=3, task=0, recheck="1") == 0
    assert content(out) == undisturbed(tmp_path, where, recheck="1")


def disturbed(moment: int, sent: signal.Signals, folder: Path, values: dict[str, Any]) -> int:
    """The process of a run to which a signal is sent before it puts its n-th file into place or deletes it."""
    child = os.fork()
    if child:
        return child
    moments = count(1)

    def with_signal(action: Callable[..., None]) -> Callable[..., None]:
        def act(*words: Any, **more: Any) -> None:
            if next(moments) == moment:
                os.kill(os.getpid(), sent)
            action(*words, **more)

        return act

    tempfile.tempdir = str(folder)
    try:
        os.replace, os.unlink = with_signal(os.replace), with_signal(os.unlink)  # type: ignore[assignment]
        os._exit(run("cc3m", **values))
    finally:
        os._exit(1)


def ended(child: int) -> int:
    """Its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_while_it_packs_again(tmp_path: Path) -> None:
    """SIGKILL before every change in turn, and then the same command."""
    where, out = corpus(tmp_path), tmp_path / "out"
    assert run("cc3m", **where, out=tmp_path / "before") == 0
    old = captions(tmp_path / "before")
    put(tmp_path / "images", *MENDED)
    expected = undisturbed(tmp_path, where, recheck="1")
    new = captions(tmp_path / "quiet")
    values, code, moment = {**where, "out": out, "recheck": "1"}, -signal.SIGKILL, 0
    while code:
        shutil.copytree(tmp_path / "before", out)
        moment += 1
        code = ended(disturbed(moment, signal.SIGKILL, tmp_path, values))
        assert code in (0, -signal.SIGKILL)
        assert captions(out) in (old, new), "a manifest never names a mixture"
        assert run("cc3m", **values) == 0
        assert content(out) == expected
        shutil.rmtree(out)
    assert moment > 15


# ---------------------------------------------------------------- launches side by side


def test_shards_that_are_gone_are_made_again(tmp_path: Path) -> None:
    """Another launch may take those of a part that is not marked yet for old ones."""
    where, out = corpus(tmp_path), tmp_path / "out"
    assert run("cc3m", **where, out=out) == 0
    before = content(out)
    next(out.glob("part-1-*.tar")).unlink()
    next(out.glob("part-2-*.tar.index.json")).unlink()
    assert run("cc3m", **where, out=out) == 0
    assert content(out) == before


@pytest.mark.parametrize(
    ("moments", "word"),
    [
        (range(1, 40, 7), ""),
        (range(2, 40, 7), "1"),
        (range(15, 18), "1"),
        *(pytest.param(range(1, 1000), word, marks=pytest.mark.chaos) for word in ("", "1")),
    ],
)
def test_a_launch_that_sees_other_images_mixes_nothing(tmp_path: Path, moments: range, word: str) -> None:
    """The first stands still between two changes that it makes, while images come and a second packs them."""
    where, out = corpus(tmp_path), tmp_path / "out"
    put(tmp_path / "images", *MENDED)
    expected = undisturbed(tmp_path, where)
    for moment in moments:
        for name in MENDED:
            (tmp_path / "images" / image_key(name)).unlink()
        first = disturbed(moment, signal.SIGSTOP, tmp_path, {**where, "out": out})
        if not os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1]):
            assert moment > 17, "it has fewer moments"
            break
        put(tmp_path / "images", *MENDED)
        assert run("cc3m", **where, out=out, recheck=word) == 0
        os.kill(first, signal.SIGCONT)
        assert ended(first) == 0
        captions(out)
        assert run("cc3m", **where, out=out, recheck="2") == 0
        assert shards(content(out)) == shards(expected)
        shutil.rmtree(out)


def test_two_launches_from_urls_to_shards(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.jpg").write_bytes(samples.encoded(samples.picture(number)))
    with image_server(folder) as server:
        lines = [json.dumps({"url": server.url(number), "caption": f"caption {number}"}) for number in range(200)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
        web = ["web.allow=127.0.0.0/8", "web.host_rate=0", "cluster=local", "part_urls=50", "shard_mb=1"]

        def launch(name: str) -> subprocess.Popen[bytes]:
            places = [f"source={tmp_path}/pairs.jsonl", f"out={tmp_path}/{name}/out"]
            command = [sys.executable, str(SCRIPTS / "cc3m.py"), *places, *web]
            return subprocess.Popen(command, stdout=subprocess.DEVNULL)

        assert launch("quiet").wait() == 0
        both = [launch("both"), launch("both")]
        assert [process.wait() for process in both] == [0, 0]
    found = [shards(content(tmp_path / name / "out")) for name in ("quiet", "both")]
    assert found[0] == found[1] and len(found[0]) >= 3


# ---------------------------------------------------------------- nothing at all, and too much


def test_what_is_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first three of each reason, those that filters drop too."""
    where = corpus(tmp_path)
    assert run("cc3m", **where, out=tmp_path / "out", **{"filters.min_side": 9999}) == 2
    told = capsys.readouterr().out
    assert "part-0.jsonl line 4: no image\n" in told and "part-2.jsonl line 5: no image\n" in told
    assert re.findall(r"part-1.jsonl line \d: image left out", told) == [
        f"part-1.jsonl line {line}: image left out" for line in (1, 3, 4)
    ]
    places = json.loads((tmp_path / "out/parts/part-1.json").read_text())["places"]
    assert places["no image"] == ["part-1.jsonl line 2"] and len(places["image left out"]) == 3
    assert run("cc3m", **where, out=tmp_path / "long", **{"filters.min_characters": 10}) == 2
    assert "part-0.jsonl line 3: min_characters=10\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "said"), [("", "holds no records"), ('{"caption": "a", "url": "u/1"}\n', "became a sample")]
)
def test_an_empty_corpus_is_told_by_one_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, said: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(lines)
    (tmp_path / "images").mkdir()
    values = {"source": tmp_path / "in", "images": tmp_path / "images", "out": tmp_path / "out", "tasks": 3}
    codes = [run("cc3m", **values, task=task) for task in (0, 1, 2)]
    told = capsys.readouterr()
    assert codes == [2, 0, 0] and told.err.count("\n") == 1 and said in told.err
    assert "there are 1 files for 3 tasks: none is of task 2\n" in told.out


def test_a_corpus_without_samples_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where, out = {**corpus(tmp_path), "images": tmp_path / "none"}, tmp_path / "out"
    (tmp_path / "none").mkdir()
    for _ in range(2):
        assert run("cc3m", **where, out=out) == 2
        told = capsys.readouterr().err
        assert "no record became a sample (24 records, 0 samples, 0 images, 24 images left out: not in the" in told
        assert told.count("\n") == 1 and not (out / "index.json").exists()
    (tmp_path / "none").rmdir()
    (tmp_path / "images").rename(tmp_path / "none")
    assert run("cc3m", **where, out=out, recheck="again") == 0
    assert len(captions(out)) == 21


class Counting(FolderStore):
    """Images of 1000 bytes; how many were read."""

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        with LOCK:
            READ.append(key)
        return bytes(1000)


LOCK, READ = threading.Lock(), list[str]()


@pytest.mark.parametrize(("images", "most"), [(1, 10), (3, 12), (50, 50)])
def test_reading_ahead_is_bounded_by_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int, most: int
) -> None:
    """Never more than 10 of them and those that are under way are held, or one record."""
    monkeypatch.setattr(pack, "HELD", 10_000)
    READ.clear()
    options = pack.Packing(source="", out="", reads=2)
    ahead = pack.ReadAhead(lambda record: record["urls"], Counting(str(tmp_path)), options)

    def records() -> Iterator[Record]:
        for number in range(100):
            yield Record({"urls": [f"u/{number}/{i}" for i in range(images)]})

    found, used = ahead.fetched(records()), 0
    for item in found:
        assert isinstance(item, pack.Fetched)
        time.sleep(0.002)  # so that what may be read is read
        used += images
        with LOCK:
            read = len(READ)
        assert read - used <= most + 2 * options.reads + images
    assert used == 100 * images and ahead.held == ahead.asked == 0
