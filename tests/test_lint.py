"""hpc_mm.lint: what is broken, what is noticed, the page and the exit code."""

import io
import json
import re
import shutil
import tarfile
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import ClassVar

import pytest
import samples
from PIL import Image as Picture

from hpc_mm.config import ConfigError
from hpc_mm.data.perceptual import perceptual_hash, write_hashes
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.shards import ShardWriter, read_manifest
from hpc_mm.data.store import FolderStore, StoreDown, StoreError, open_store
from hpc_mm.index import main as index
from hpc_mm.lint import Lint, findings, main

EVIL = '<script>alert("x")</script>'


def image(seed: int) -> Image:
    return Image(samples.encoded(samples.picture(seed, 120, 90), "JPEG"))


def written(folder: Path, *corpus: Sample, prefix: str = "part", max_bytes: int = 2**20) -> str:
    with ShardWriter(open_store(str(folder)), prefix, max_bytes) as writer:
        for sample in corpus:
            writer.add(sample)
    return str(folder)


def linted(capsys: pytest.CaptureFixture[str], shards: str, out: Path, *more: str) -> tuple[int, str, str]:
    code = main([f"shards={shards}", f"out={out}", *more])
    return code, capsys.readouterr().out, (out / "index.html").read_text()


def test_a_whole_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = [Sample(f"s{seed}", (Text("one two"), image(seed), Text(EVIL))) for seed in range(20)]
    shards = written(tmp_path / "shards", *corpus, max_bytes=20_000)
    code, told, page = linted(capsys, shards, tmp_path / "out")
    assert code == 0
    assert re.search(r"all 20 samples in [2-9] shards, 20 images", told) and "BROKEN" not in told
    assert page.count("<figure") == 6 and page.count('src="data:image/jpeg') == 12
    assert "script" not in re.sub(r"&lt;/?script", "", page)
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "Words per sample" in page and "median 3" in page
    again = linted(capsys, shards, tmp_path / "again")
    assert again[0] == 0 and again[2] == page


def test_everything_that_is_broken_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = image(0).data or b""
    bomb = samples.encoded(Picture.new("1", (20_000, 20_000)))
    shards = written(
        tmp_path / "shards",
        Sample("good", (image(1), Text("text"))),
        Sample("truncated", (Image(good[:-40]), image(2), Text("text"))),
        Sample("html", (Image(b"<html>"), Text("text"))),
        Sample("bomb", (Image(bomb), Text("text"))),
        Sample("empty", (Image(b""), Text("text"))),
        Sample("elsewhere", (Image(key="a" * 64), Text("text"))),
        Sample("silent", (image(3), Text(" \n"))),
    )
    code, told, page = linted(capsys, shards, tmp_path / "out")
    assert code == 1
    assert "BROKEN images that do not decode: 5\n" in told and "BROKEN samples without text: 1\n" in told
    for line in (
        "truncated: image 0: OSError",
        "html: image 0: UnidentifiedImageError",
        "bomb: image 0",
        "empty: image 0",
        "elsewhere: image 0: it has a key and no bytes",
        "silent\n",
    ):
        assert f"  part-000000.tar: {line}" in told
        assert line.strip() in page
    assert "good" not in told


def test_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = [Sample(f"s{seed}", (image(seed), Text("text"))) for seed in range(12)]
    shards = Path(written(tmp_path / "shards", *corpus, max_bytes=12_000))
    names = sorted(path.name for path in shards.glob("*.tar"))
    assert len(names) > 2
    (shards / names[0]).unlink()
    data = (shards / names[1]).read_bytes()
    (shards / names[1]).write_bytes(data[:3000])
    code, told, _ = linted(capsys, str(shards), tmp_path / "out")
    assert code == 1
    assert "BROKEN files that are missing or of another size: 2\n" in told
    assert f"{names[0]} is missing" in told and "BROKEN samples that cannot be read" in told
    assert f"  {names[1]}: sample" in told and f"  {names[2]}" not in told


class Dying(FolderStore):
    """A store that goes away after 20 reads."""

    asked: ClassVar[Iterator[int]] = count()

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        if next(self.asked) >= 20:
            time.sleep(0.02)
            raise StoreError(f"{key}: failed for 60 s")
        return super().read(key, start, end)

    def size(self, key: str) -> int | None:
        raise StoreError(f"{key}: failed for 60 s")


def test_a_store_that_goes_away_is_no_broken_sample(tmp_path: Path) -> None:
    store = Dying(written(tmp_path / "shards", *(Sample(f"s{i:03d}", (Text("a"),)) for i in range(300))))
    found = findings(store, read_manifest(store), Lint(reads=4), len)
    with pytest.raises(StoreDown, match=r"the store does not answer: index.json: failed for 60 s"):
        assert all(finding.readable for finding in found)
    assert next(Dying.asked) <= 24, "nothing more is asked for"


def test_a_folder_that_goes_away(tmp_path: Path) -> None:
    store = open_store(written(tmp_path / "shards", *(Sample(f"s{i:03d}", (Text("a"),)) for i in range(300))))
    gone = threading.Event()

    def tokens(text: str) -> int:
        if not gone.is_set():
            gone.set()
            (tmp_path / "shards").rename(tmp_path / "elsewhere")
        return 1

    with pytest.raises(ConfigError, match=f"no folder {tmp_path}/shards"):
        assert all(finding.readable for finding in findings(store, read_manifest(store), Lint(reads=1), tokens))


def test_image_files_that_no_part_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tar whose JSON names one of two images: the other would be lost without a word."""
    shards = tmp_path / "shards"
    shards.mkdir()
    head = json.dumps({"parts": [{"text": "a"}, {"image": "0.jpg"}], "metadata": {}}).encode()
    with tarfile.open(shards / "a.tar", "w") as tar:
        for name, data in (("s.json", head), ("s.0.jpg", image(0).data or b""), ("s.1.jpg", image(1).data or b"")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert index([f"shards={shards}"]) == 0
    code, told, _ = linted(capsys, str(shards), tmp_path / "out")
    assert code == 1 and "a.tar: s: 2 files, 1 images" in told


def test_ids_and_images_that_are_there_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tmp_path / "shards"
    written(shards, Sample("same", (image(0), Text("a"))), Sample("other", (image(0), Text("b"))), prefix="one")
    written(tmp_path / "two", Sample("same", (image(1), Text("c"))), prefix="two")
    for path in (tmp_path / "two").glob("two*"):
        shutil.copy(path, shards)
    (shards / "index.json").unlink()
    assert index([f"shards={shards}"]) == 0
    code, told, page = linted(capsys, str(shards), tmp_path / "out")
    assert code == 1
    assert "BROKEN ids of several samples: 1\n  same: 2 times" in told
    assert "images stored more than once: 1\n" in told and "images that look the same: 1\n" in told
    assert "2 times: same, other" in page


def test_images_of_evaluation_sets_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = written(tmp_path / "shards", *(Sample(f"s{i}", (image(i), Text("a"))) for i in range(5)))
    hashes = tmp_path / "coco.npy"
    write_hashes(open_store(str(tmp_path)), "coco.npy", [perceptual_hash(image(i).data or b"") ^ 0b11 for i in (1, 3)])
    code, told, page = linted(capsys, shards, tmp_path / "out", f"against={hashes}")
    assert code == 0 and f"images of {hashes}: 2\n" in told and "s1: " in page and "s3: " in page
    code, told, _ = linted(capsys, shards, tmp_path / "out", f"against={hashes}", "distance=1")
    assert f"images of {hashes}: 0\n" in told


def test_a_part_of_a_large_corpus_is_always_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = written(tmp_path / "shards", *(Sample(f"s{i:02d}", (image(i), Text("a"))) for i in range(30)))
    first = linted(capsys, shards, tmp_path / "out", "samples=7", "reads=1")
    assert "7 of 30 samples" in first[1]
    assert linted(capsys, shards, tmp_path / "out", "samples=7", "reads=4") == first


def test_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples.tokenizer(["red circle"]).save_pretrained(tmp_path / "tokenizer")
    shards = written(tmp_path / "shards", Sample("s", (image(0), Text("red circle red circle"))))
    path = tmp_path / "tokenizer" / "tokenizer.json"
    code, _, page = linted(capsys, shards, tmp_path / "out", f"tokenizer={path}")
    assert code == 0 and "Tokens per sample" in page and "median 4" in page


def test_text_alone_is_no_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = written(tmp_path / "shards", Sample("s", (Text("only words"),)))
    code, told, page = linted(capsys, shards, tmp_path / "out")
    assert code == 0 and "0 images" in told and page.count("<figure") == 2


def test_real_shards_of_img2dataset(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shards").mkdir()
    shutil.copy(shared_data / "cc12m-32.tar", tmp_path / "shards")
    assert index([f"shards={tmp_path / 'shards'}"]) == 0
    code, told, _ = linted(capsys, str(tmp_path / "shards"), tmp_path / "out")
    assert code == 0 and "all 32 samples in 1 shards, 32 images" in told


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["out=o"], "shards=FOLDER is missing"),
        (["shards=s"], "out=FOLDER is missing"),
        (["shards=nowhere", "out=o"], "no folder"),
        (["shards={}", "out=o"], "no shards at"),
        (["shards={}/good", "out=o", "tokenizer=nothing.json"], "tokenizer=nothing.json"),
        (["shards={}/good", "out=o", "tokenizer={}/good/index.json"], "is no tokenizer.json"),
        (["shards={}/good", "out=o", "against=nothing.npy"], "no hashes at"),
        (["shards={}/good", "outt=o"], "did you mean out?"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    answer: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "good", Sample("s", (image(0), Text("a"))))
    assert main([word.format(tmp_path) for word in arguments]) == 2
    told = capsys.readouterr().err
    assert answer in told and told.count("\n") == 1
