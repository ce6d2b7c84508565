"""Every script of data_prep/ with input that is not its corpus's, and with disks that are full or cannot be written."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone
from datetime import time as clock_time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import samples
from image_server import image_server
from required import absent
from scripts import SCRIPTS, run, written

from hpc_mm.data.schema import image_key

URL, FILE = "http://host/1.jpg", "1.jpg"
CHAT = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
LLAVA = {"id": "1", "image": FILE, "conversations": CHAT}
NATURAL = {"images": [URL, None], "texts": [None, "a"], "metadata": [{}, None]}
ANSWER = {"question_id": 10, "image_id": 1, "answers": []}
ASKED = {"question_id": 10, "image_id": 1, "question": "?"}
KARPATHY = {"split": "test", "filename": FILE, "sentences": [{"raw": "a"}]}
READ = {"question_id": 10, "image_id": "1", "question": "?"}
SEEN = {"image": FILE, "question": "?", "answers": []}
MEME = {"id": 1, "img": FILE, "text": "a", "label": 0}
SMALL = {"recode.resize": "keep_ratio", "recode.size": 64}
LENGTHS = "images, texts and metadata are not lists of one length"

# Of the corpora of records: a good one, one whose images and texts do not match and the reason, the file.
RECORDS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "obelics": (NATURAL, {**NATURAL, "texts": [None]}, LENGTHS, "in.jsonl"),
    "omnicorpus": (NATURAL, {**NATURAL, "images": [URL]}, LENGTHS, "in.jsonl"),
    "mmc4": (
        {"text_list": ["a"], "image_info": [{"raw_url": URL}], "similarity_matrix": [[0.5]]},
        {"text_list": ["a"], "image_info": [{"raw_url": URL}], "similarity_matrix": [[0.5, 0.1]]},
        "the similarity matrix is not images x sentences",
        "in.jsonl",
    ),
    "cc3m": ({"url": URL, "caption": "a"}, {"url": URL}, "caption is missing", "in.jsonl"),
    "laion": ({"URL": URL, "TEXT": "a"}, {"URL": URL, "TEXT": None}, "TEXT is missing", "in.jsonl"),
    "multi_token": (
        {"messages": [{"role": "user", "content": "<image>"}], "images": [FILE]},
        {"messages": [{"role": "user", "content": "<image>"}], "images": [FILE, FILE]},
        "there are fewer marks than items for them",
        "in.jsonl",
    ),
    "llava_pretrain": (LLAVA, {**LLAVA, "image": [FILE] * 2}, "there are fewer marks than items for them", "in.json"),
    "llava_mix665k": (LLAVA, {**LLAVA, "image": [FILE] * 2}, "there are fewer marks than items for them", "in.json"),
    "chameleon": (
        {"question": "q", "image_url": FILE, "response": "r"},
        {"question": "q", "image_url": [FILE, None], "response": "r"},
        "an image's name is not text",
        "in.json",
    ),
}

# Of the benchmarks: the entries of each published file and where in it they stand, the last one being looked at; how
# an entry of one image too many is told.
BENCHMARKS: dict[str, tuple[dict[str, tuple[str, list[dict[str, Any]]]], str]] = {
    "coco": ({"dataset_coco.json": ("images", [KARPATHY])}, "2.jpg is not in"),
    "flickr30k": ({"dataset_flickr30k.json": ("images", [KARPATHY])}, "2.jpg is not in"),
    "hateful_memes": ({"dev.jsonl": ("", [MEME])}, "2.jpg is not in"),
    "vizwiz": ({"val.json": ("", [SEEN])}, "val/2.jpg is not in"),
    "textvqa": ({"TextVQA_0.5.1_val.json": ("data", [READ])}, "train_images/2.jpg is not in"),
    "vqav2": (
        {
            "v2_OpenEnded_mscoco_val2014_questions.json": ("questions", [ASKED]),
            "v2_mscoco_val2014_annotations.json": ("annotations", [ANSWER]),
        },
        "1 annotations have no question: 20",
    ),
    "okvqa": (
        {
            "OpenEnded_mscoco_val2014_questions.json": ("questions", [ASKED]),
            "mscoco_val2014_annotations.json": ("annotations", [ANSWER]),
        },
        "1 annotations have no question: 20",
    ),
}
SECOND = {
    "question_id": 20,
    "image_id": "2",
    "image": "2.jpg",
    "filename": "2.jpg",
    "id": 2,
    "img": "2.jpg",
}  # what differs in a second entry
OTHERS = {"imagenet", "shapes"}  # whose input is files of other kinds: test_labels.py, test_shapes.py
MORE = {"mmc4": {"min_image_bytes": 0}, "coco": {"splits": "test"}, "flickr30k": {"splits": "test"}}


def test_every_script_is_here() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == {*RECORDS, *BENCHMARKS, *OTHERS}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Where a script reads and writes; image 1 lies under all names that the benchmarks give it."""
    numbered = f"{1:012d}.jpg"
    names = [FILE, image_key(URL), f"val/{FILE}", f"train_images/{FILE}", f"val2014/COCO_val2014_{numbered}"]
    for name in names:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(samples.encoded(samples.picture(1)))
    (tmp_path / "in").mkdir()
    return {"source": tmp_path / "in", "images": tmp_path / "images", "out": tmp_path / "out"}


def records(source: Path, entries: list[dict[str, Any]], name: str) -> Path:
    path = source / name
    listed = json.dumps(entries, indent=1) if name.endswith(".json") else "\n".join(map(json.dumps, entries)) + "\n"
    path.write_text(listed)
    return path


def published(source: Path, name: str, *more: dict[str, Any]) -> Path:
    """The files of a benchmark with so many more entries in the last one, which is returned."""
    files = BENCHMARKS[name][0]
    for number, (file, (where, entries)) in enumerate(files.items(), 1):
        found = [*entries, *(more if number == len(files) else ())]
        path = source / file
        if file.endswith(".jsonl"):
            path = records(source, found, file)
        else:
            path.write_text(json.dumps({where: found} if where else found, indent=1))
    return path


def prepared(name: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = run(name, **places, **MORE.get(name, {}))
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    if code:
        first, *rest = told.err.splitlines()
        assert code == 2 and rest in ([], ["1 files are not done"])
        return code, told.out, first
    return code, told.out, told.err


@pytest.mark.parametrize("name", [*RECORDS, *BENCHMARKS])
def test_good_input(name: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    if name in RECORDS:
        records(places["source"], [RECORDS[name][0]], RECORDS[name][3])
    else:
        published(places["source"], name)
    assert prepared(name, places, capsys)[0] == 0
    (sample,) = written(places["out"])
    assert len(sample.images) == 1


@pytest.mark.parametrize("name", [*RECORDS, *BENCHMARKS])
def test_a_missing_column(name: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Told with the file before any work; one that is missing in one entry of a benchmark too."""
    if name in RECORDS:
        path = records(places["source"], [{"Url": URL, "text": "a"}] * 2, RECORDS[name][3])
        answer = f"{path} has no column "
    else:
        path = published(places["source"], name, {"text": "a"})
        answer = f"{path.name}: not the published form (KeyError: "
    code, _, told = prepared(name, places, capsys)
    assert code == 2 and answer in told
    assert not list(places["out"].glob("*.tar"))


@pytest.mark.parametrize("name", [*RECORDS, *BENCHMARKS])
@pytest.mark.parametrize(("broken", "reason"), [(b",,", "not JSON"), (b'"\xff"', "not UTF-8")])
def test_malformed_json_and_text(
    name: str, broken: bytes, reason: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken line is left out and counted; a file that is one JSON value can have no broken part."""
    good, _, _, file = RECORDS.get(name, ({}, {}, "", ""))
    path = records(places["source"], [good], file) if good else published(places["source"], name)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:1], broken, *lines[1:], b""]))
    code, told, error = prepared(name, places, capsys)
    if file.endswith(".jsonl"):
        assert code == 0 and f"{file} line 2: a line is {reason}\n" in told
        assert json.loads((places["out"] / "stats.json").read_text())[f"left out: a line is {reason}"] == 1
        assert len(written(places["out"])) == 1
    else:
        assert code == 2 and str(path) in error and "line 2" in error


@pytest.mark.parametrize("name", RECORDS)
def test_images_and_texts_of_different_length(
    name: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    good, unequal, reason, file = RECORDS[name]
    records(places["source"], [good, unequal], file)
    code, told, _ = prepared(name, places, capsys)
    place = f"{file} line 2" if file.endswith(".jsonl") else f"{file} entry 2"
    assert code == 0 and f"{place}: {reason}\n" in told
    assert json.loads((places["out"] / "stats.json").read_text())[f"left out: {reason}"] == 1
    assert len(written(places["out"])) == 1


@pytest.mark.parametrize("name", BENCHMARKS)
def test_more_texts_than_images(name: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    files, answer = BENCHMARKS[name]
    first = [*files.values()][-1][1][0]
    path = published(places["source"], name, {**first, **{key: SECOND[key] for key in SECOND if key in first}})
    code, _, told = prepared(name, places, capsys)
    assert code == 2 and path.name in told and answer in told


@pytest.mark.parametrize("name", [*RECORDS, *BENCHMARKS])
@pytest.mark.parametrize("empty", ["a folder", "a file", "a list"])
def test_an_empty_source(name: str, empty: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    if name in RECORDS:
        path = places["source"] / RECORDS[name][3]
        nothing = "[]" if path.suffix == ".json" and empty == "a list" else ""
    else:
        path = published(places["source"], name)
        where = [*BENCHMARKS[name][0].values()][-1][0]
        nothing = "" if empty == "a file" else json.dumps({where: []} if where else [])
    if empty == "a folder":
        for file in places["source"].iterdir():
            file.unlink()
    else:
        path.write_text(nothing)
    code, _, told = prepared(name, places, capsys)
    assert code == 2 and (str(places["source"]) in told or path.name in told)


@pytest.mark.parametrize("name", [*RECORDS, *BENCHMARKS, "imagenet"])
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([], "source=... is missing: "),
        (["sorce=in", "out=out"], "unknown key 'sorce': did you mean source? known: "),
        (["source=in", "outt=out"], "unknown key 'outt': did you mean out? known: "),
        (["source=in", "out=out", "web.host_rat=1"], "unknown key 'web.host_rat': did you mean web.host_rate? known: "),
        (["source=in", "out=out", "slurm.tim=1"], "unknown key 'slurm.tim': did you mean slurm.time? known: "),
        (["source=in", "out=out", "task=0", "tasks=2", "stage=all"], "task=0 is of one stage: give stage=fetch or"),
    ],
)
def test_words_that_are_not_the_scripts(
    name: str, words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name, **dict(word.split("=", 1) for word in words)) == 2
    told = capsys.readouterr().err
    assert told.startswith(answer) and told.count("\n") == 1


def test_values_that_json_has_not_are_text(places: dict[str, Path]) -> None:
    zone = timezone(timedelta(hours=2))
    values = {
        "seen": datetime(2024, 5, 6, 7, 8, 9, tzinfo=zone),
        "day": date(2024, 5, 6),
        "hour": clock_time(7, 8),
        "age": timedelta(days=1, seconds=5),
        "price": Decimal("1.50"),
        "md5": b"\x00\xff",
        "nested": [{"day": date(2024, 5, 6)}],
    }
    images = {"images": [URL], "texts": [None], "metadata": [{"day": date(2024, 5, 6)}]}
    table = pyarrow.Table.from_pylist([{**images, "general_metadata": values}])
    pyarrow.parquet.write_table(table, places["source"] / "a.parquet")
    assert run("omnicorpus", **places) == 0
    (sample,) = written(places["out"])
    assert sample.images[0].facts["day"] == "2024-05-06"
    assert sample.metadata["general_metadata"] == {
        "seen": "2024-05-06T07:08:09+02:00",
        "day": "2024-05-06",
        "hour": "07:08:00",
        "age": "1 day, 0:00:05",
        "price": "1.50",
        "md5": "AP8=",
        "nested": [{"day": "2024-05-06"}],
    }


def test_a_date_beyond_every_calendar_is_told(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    table = pyarrow.table({"URL": [URL], "TEXT": ["a"], "day": pyarrow.array([2**31 - 1], pyarrow.date32())})
    pyarrow.parquet.write_table(table, places["source"] / "a.parquet")
    code, _, told = prepared("laion", places, capsys)
    assert code == 2 and "a.parquet is damaged: OverflowError: " in told


# ---------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        absent("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".json")}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of eight captions, the images of which are served: noise of 40 kB each."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "0.png").write_bytes(samples.encoded(samples.picture(1, 200, 200).effect_spread(100)))
    with image_server(folder / "pictures") as server:
        rows = [{"url": server.url(number), "caption": "a"} for number in range(8)]
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield folder / "in.jsonl"


def prepare(source: Path, places: dict[str, Path]) -> subprocess.CompletedProcess[str]:
    words = [f"source={source}", "web.allow=127.0.0.0/8", "web.host_rate=0", "cluster=local"]
    words += [f"out={places['out']}", f"images={places['images']}"]
    command = [sys.executable, str(SCRIPTS / "cc3m.py"), *words]
    environment = {**os.environ, "TMPDIR": str(places["TMPDIR"])}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def somewhere(folder: Path) -> dict[str, Path]:
    (folder / "temporary").mkdir(parents=True)
    return {"out": folder / "out" / "out", "images": folder / "images", "TMPDIR": folder / "temporary"}


@pytest.fixture(scope="module")
def undisturbed(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    places = somewhere(tmp_path_factory.mktemp("undisturbed"))
    assert prepare(pairs, places).returncode == 0
    return files(places["out"])


@pytest.mark.parametrize(
    ("full", "options", "reason"),
    [
        ("out", "ro", "Read-only file system"),
        ("out", "size=64k", "No space left on device"),
        ("images", "size=64k", "No space left on device"),
        ("TMPDIR", "size=64k", "No space left on device"),
    ],
)
def test_a_disk_that_takes_no_more(
    small_disk: Path, pairs: Path, undisturbed: dict[str, bytes], tmp_path: Path, full: str, options: str, reason: str
) -> None:
    """One line, exit code 2; once there is room, the same command completes."""
    places = {**somewhere(tmp_path), full: small_disk if full == "TMPDIR" else small_disk / "below"}
    remount(small_disk, options)
    failed = prepare(pairs, places)
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert reason in failed.stderr and str(small_disk) in failed.stderr and failed.stderr.count("\n") == 1
    remount(small_disk, "rw,size=16m")
    assert prepare(pairs, places).returncode == 0
    assert files(places["out"]) == undisturbed
    assert len(written(places["out"])) == 8


@pytest.mark.parametrize(
    ("script", "values", "said"),
    [
        ("cc3m", {**SMALL, "filters.min_side": 100}, "64 pixels at most on its short side: leave one of them out, or "),
        ("cc3m", {**SMALL, "recode.resize": "border", "filters.min_side": 20}, "filters.min_side=20 looks at stored"),
        ("mmc4", {**SMALL, "recode.resize": "border", "filters.max_side": 500}, "makes each 64 x 64 pixels"),
        ("cc3m", {**SMALL, "recode.resize": "center_crop", "filters.max_aspect": 2}, "makes each 64 x 64 pixels"),
        ("cc3m", {**SMALL, "filters.min_side": 64}, ""),
        ("cc3m", {"recode.size": 64, "filters.min_side": 100}, ""),
        ("laion", {**SMALL, "filters.min_side": 100}, ""),  # the corpus says how large its images were
        ("obelics", {**SMALL, "recode.resize": "border", "filters.max_aspect": 2}, ""),
    ],
)
def test_filters_of_what_recoding_has_changed_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str, values: dict[str, Any], said: str
) -> None:
    """One line before any work; what is not refused goes on to the source, which is not there."""
    assert run(script, source=tmp_path / "no.jsonl", out=tmp_path / "out", stage="plan", **values) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and (said or "no.jsonl") in complaint
    assert ("filters." in complaint) == bool(said) and not (tmp_path / "out").exists()
