"""What a plan is made from, and what it refuses."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet
import pytest
from scripts import run

from hpc_mm import prepare
from hpc_mm.data.documents import natural_urls
from hpc_mm.data.records import read_records
from hpc_mm.data.schema import image_key
from hpc_mm.data.store import FolderStore, open_store
from hpc_mm.data.wanted import Plan, read_plan, read_urls


def urls_of(out: Path) -> list[str]:
    store = open_store(str(out))
    plan = read_plan(store)
    assert isinstance(plan, Plan)
    return sorted(url for part in plan.parts for url in read_urls(store, part))


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def pairs(folder: Path, count: int = 3, hosts: int = 1) -> dict[str, Any]:
    for part in range(count):
        lines = [{"url": f"http://h{i % hosts}.org/{part}/{i}", "caption": "a"} for i in range(6)]
        write_lines(folder / "in" / f"part-{part}.jsonl", lines)
    return {"source": folder / "in", "out": folder / "out", "stage": "plan"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recode.size": 512}, "recode.size: 256 -> 512"),
        ({"recode.resize": "border"}, "recode.resize: none -> border"),
        ({"images": "other"}, "images: {images} -> {folder}/other"),
        ({"url": "caption"}, "url: url -> caption"),
        ({"columns": "url,caption"}, "columns: caption,url -> url,caption"),
    ],
)
@pytest.mark.parametrize("stage", ["plan", "fetch"])
def test_a_plan_with_other_values_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str, stage: str
) -> None:
    values = pairs(tmp_path)
    assert run("cc3m", **values) == 0
    change = {key: tmp_path / value if key == "images" else value for key, value in change.items()}
    assert run("cc3m", **{**values, "stage": stage}, **change) == 2
    told = said.format(images=tmp_path / "images", folder=tmp_path)
    assert f"holds a plan with other values ({told}): use another out\n" in capsys.readouterr().err


def test_values_of_packing_do_not_touch_a_plan(tmp_path: Path) -> None:
    values = pairs(tmp_path)
    assert run("cc3m", **values) == 0
    before = (tmp_path / "out/plan/plan.json").stat().st_mtime_ns
    more = {"shard_mb": 5, "filters.min_side": 9, "min_image_bytes": 7, "reads": 3, "web.deadline": 5}
    assert run("cc3m", **values, **more, images=f"{tmp_path}/images/") == 0
    assert (tmp_path / "out/plan/plan.json").stat().st_mtime_ns == before


def test_all_damaged_files_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = pairs(tmp_path)
    whole = gzip.compress((tmp_path / "in/part-0.jsonl").read_bytes())
    for name in ("a", "z"):
        (tmp_path / "in" / f"{name}.jsonl.gz").write_bytes(whole[:-9])
    write_lines(tmp_path / "in" / "other.jsonl", [{"text": "of another corpus"}])
    assert run("cc3m", **values) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4 and told[-1] == "3 of 6 files cannot be read: no plan yet"
    assert [line.partition(":")[0] for line in told[:3]] == ["a.jsonl.gz", "other.jsonl", "z.jsonl.gz"]
    assert read_plan(open_store(str(tmp_path / "out"))) is None
    for name in ("a.jsonl.gz", "z.jsonl.gz", "other.jsonl"):
        (tmp_path / "in" / name).unlink()
    assert run("cc3m", **values) == 0
    assert len(urls_of(tmp_path / "out")) == 18


@pytest.mark.parametrize(("tasks", "idle"), [(2, False), (600, True)])
def test_tasks_without_work_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tasks: int, idle: bool
) -> None:
    assert run("cc3m", **pairs(tmp_path, hosts=5), tasks=tasks, part_urls=4) == 0
    assert (
        f"tasks={tasks}: all URLs of a host are one task's, so fetch has work for" in capsys.readouterr().out
    ) == idle


def test_nothing_to_fetch_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "in.jsonl", [{"caption": "a", "url": None}])
    assert run("cc3m", source=tmp_path / "in.jsonl", out=tmp_path / "out", stage="plan", tasks=6) == 0
    assert capsys.readouterr().out == "1 files name 0 images by URL: nothing is to fetch\n"
    assert not (tmp_path / "images" / ".recode.json").exists(), "it has no say in how images are made"


def test_images_of_another_recode_are_not_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = pairs(tmp_path)
    small = {"recode.resize": "center_crop", "recode.size": 64}
    assert run("cc3m", **values, **small) == 0
    values["out"] = tmp_path / "second"
    for more, said in (({}, "resize: center_crop -> none"), ({**small, "recode.quality": 50}, "quality: 95 -> 50")):
        assert run("cc3m", **values, **more) == 2
        told = capsys.readouterr().err
        assert f"{tmp_path}/images holds images made otherwise (recode.{said}" in told and told.count("\n") == 1
        assert told.endswith("use another images=\n")
    assert run("cc3m", **values, **small) == 0, "what was refused has left no plan"
    other = {**values, "images": tmp_path / "others", "out": tmp_path / "third"}
    assert run("cc3m", **other, **{"recode.size": 128}) == 0
    assert run("cc3m", **{**other, "out": tmp_path / "fourth"}) == 0, "a size that nothing has"
    (tmp_path / "others" / ".recode.json").write_text('{"resize": "border"}')
    capsys.readouterr()
    assert run("cc3m", **{**other, "stage": "fetch"}, **{"recode.size": 128}) == 2
    assert "recode.resize: border -> none" in capsys.readouterr().err, "another plan was faster"


@pytest.mark.parametrize(
    ("out", "images"),
    [
        ("/x", "/images"),
        ("/x/", "/images"),
        ("x", "./images"),
        ("a/x", "a/images"),
        ("/a/x", "/a/images"),
        ("s3://b", "s3://b/images"),
        ("s3://b/x", "s3://b/images"),
    ],
)
def test_images_lie_beside_the_shards(out: str, images: str) -> None:
    assert prepare.Documents(source="in", out=out).images == images


class Table(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = b"caption\thttp://h.org/%d\n" % len(self.asked)  # another one each time
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("first", ["plan", "pack"])
def test_a_source_on_the_web_is_asked_for_once(tmp_path: Path, first: str) -> None:
    """By all stages and tasks together."""
    Table.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Table) as server:
        threading.Thread(target=server.serve_forever).start()
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / image_key("http://h.org/1")).write_bytes(b"an image")
        values = {"source": f"http://127.0.0.1:{server.server_port}/a.tsv", "out": tmp_path / "out", "tasks": 3}
        codes = [run("cc3m", **values, stage=stage) for stage in (first, "pack")]
        server.shutdown()
    assert codes == [0, 0] and Table.asked == ["/a.tsv"]
    assert json.loads((tmp_path / "out" / "stats.json").read_text())["samples"] == 1


def test_every_image_of_a_document_is_planned(tmp_path: Path) -> None:
    """Where an early one cannot be had, a later one is kept."""
    images = [f"http://h.org/{number}" for number in range(40)]
    write_lines(tmp_path / "in.jsonl", [{"images": images, "texts": [None] * 40}])
    assert run("obelics", source=tmp_path / "in.jsonl", out=tmp_path / "out", stage="plan", max_images=2) == 0
    assert urls_of(tmp_path / "out") == sorted(images)


class Reading(FolderStore):
    """A folder that counts the bytes that are read."""

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        data = super().read(key, start, end)
        BYTES.append(len(data))
        return data


BYTES = list[int]()
DOCUMENTS = [
    {
        "images": [f"http://h.org/{number}", None, "http://h.org/gone"],
        "texts": [None, f"{number} " * 4000, None],
        "valid_image": [True, number % 2 == 0],
        "metadata": None,
    }
    for number in range(600)
]


def test_a_plan_reads_the_columns_of_urls_alone(tmp_path: Path) -> None:
    store = Reading(str(tmp_path))
    table = pyarrow.Table.from_pylist(DOCUMENTS)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    columns = prepare.Documents(source="", out="out").url_columns()
    expected = [natural_urls(record) for record in read_records(store, "a.parquet")]  # type: ignore[arg-type]
    for name in ("a.parquet", "a.arrow"):
        BYTES.clear()
        found = list(read_records(store, name, only=columns))
        assert [natural_urls(record) for record in found] == expected  # type: ignore[arg-type]
        assert all(set(record) == {"images", "valid_image"} for record in found)  # type: ignore[arg-type]
        assert [record.place for record in found] == [f"{name} row {number + 1}" for number in range(600)]
        if name == "a.parquet":
            assert sum(BYTES) < (tmp_path / name).stat().st_size / 2


@pytest.mark.parametrize("script", ["omnicorpus", "obelics", "cc3m", "laion"])
def test_the_same_urls_of_a_table_and_of_lines(tmp_path: Path, script: str) -> None:
    placed: dict[str, Any] = {
        "sentences": [["a"]],
        "images_info": [{"name": ["http://h.org/placed"]}],
        "matrix": [[[2.0]]],
    }
    names = {"cc3m": ("url", "caption"), "laion": ("URL", "TEXT")}
    if script in names:
        records = [
            dict(zip(names[script], (f"http://h.org/{i}", "a" if i % 3 else None), strict=True)) for i in range(9)
        ]
    else:
        records = [*DOCUMENTS[:5], *([placed] if script == "omnicorpus" else [])]
    write_lines(tmp_path / "lines" / "a.jsonl", records)
    (tmp_path / "table").mkdir()
    every = {key: None for record in records for key in record}
    table = pyarrow.Table.from_pylist([{**every, **record} for record in records])
    pyarrow.parquet.write_table(table, tmp_path / "table" / "a.parquet")
    for kind in ("lines", "table"):
        assert run(script, source=tmp_path / kind, out=tmp_path / f"{kind}-out", stage="plan") == 0
    found = urls_of(tmp_path / "lines-out")
    assert found == urls_of(tmp_path / "table-out") and len(found) >= 6


ODD = ["HTTP://h.org/a", " http://h.org/b", "//h.org/c", "h.org/d", "", "data:image/png;base64,AA", "Https://h.org/e"]


@pytest.mark.parametrize("script", ["cc3m", "obelics", "mmc4"])
def test_no_url_is_left_out_for_its_form(tmp_path: Path, script: str) -> None:
    """What is none is told by fetch, with its reason."""
    records: list[dict[str, Any]] = {
        "cc3m": [{"url": url, "caption": "a"} for url in ODD],
        "obelics": [{"images": ODD, "texts": [None] * len(ODD)}],
        "mmc4": [
            {
                "image_info": [{"raw_url": url} for url in ODD],
                "text_list": ["a"],
                "similarity_matrix": [[1.0]] * len(ODD),
            }
        ],
    }[script]
    write_lines(tmp_path / "in.jsonl", records)
    assert run(script, source=tmp_path / "in.jsonl", out=tmp_path / "out", stage="plan") == 0
    assert urls_of(tmp_path / "out") == sorted(ODD)


def test_names_of_files_are_not_planned(tmp_path: Path) -> None:
    records = [{"file": name, "caption": "a"} for name in ("a.jpg", "b/c.jpg", *ODD[:2])]
    write_lines(tmp_path / "in.jsonl", records)
    values = {"source": tmp_path / "in.jsonl", "out": tmp_path / "out", "stage": "plan"}
    assert run("cc3m", **values, file="file") == 0
    assert urls_of(tmp_path / "out") == sorted(ODD[:2])


def test_a_plan_that_another_launch_has_made_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second lists the store while the first has fetched already; their parts never share a name."""
    values = pairs(tmp_path)
    made: list[bytes] = []
    read_all = prepare.all_urls

    def slow(*words: Any) -> Any:
        yield from read_all(*words)
        if not made:
            made.append(b"")
            assert run("cc3m", **values) == 0
            made.append((tmp_path / "out/plan/plan.json").read_bytes())

    monkeypatch.setattr(prepare, "all_urls", slow)
    assert run("cc3m", **values) == 0
    assert (tmp_path / "out/plan/plan.json").read_bytes() == made[1]


def test_addresses_of_hashes_are_whole_in_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["source=in", "out=out", "filters.against=a.npy,s3://b/c.npy", "filters.min_side=5"]
    options = prepare.read_options(prepare.Documents, words)
    assert options.filters.against == (f"{tmp_path}/a.npy", "s3://b/c.npy")
    said = prepare.script_words(words, options)
    monkeypatch.chdir("/")
    again = prepare.read_options(prepare.Documents, [word for word in said if "=" in word])
    assert (again.filters, again.source, again.out) == (options.filters, f"{tmp_path}/in", f"{tmp_path}/out")
