import gzip
import json
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import samples
from scripts import SCRIPTS, run

from hpc_mm import pack
from hpc_mm.config import ConfigError, Loader, Source
from hpc_mm.data.schema import Sample, Text, image_key
from hpc_mm.data.shards import check_shards, read_manifest, read_samples
from hpc_mm.data.store import FolderStore, Store, StoreDown, StoreError, open_store
from hpc_mm.data.stream import make_loader


def write_lines(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def natural(number: int, *urls: str) -> dict[str, Any]:
    return {
        "images": [None, *urls, None],
        "texts": [f"before {number}", *(None for _ in urls), f"after {number}"],
        "metadata": [None, *({"width": 1} for _ in urls), None],
    }


@pytest.fixture
def images(tmp_path: Path) -> Store:
    """Images of u/0 to u/9; what is asked for beyond is not there."""
    store = open_store(str(tmp_path / "images"))
    for number in range(10):
        store.write(image_key(f"u/{number}"), samples.encoded(samples.picture(number)))
    return store


def texts(sample: Sample) -> list[str]:
    return [part.text for part in sample.parts if isinstance(part, Text)]


def urls_of(sample: Sample) -> list[str]:
    return [image.facts["url"] for image in sample.images]


# ---------------------------------------------------------------- real input


def test_real_documents_and_pairs_become_batches(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path / "images"))
    pairs = []
    with tarfile.open(shared_data / "cc12m-32.tar") as tar:
        files = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    for name in files:
        if name.endswith(".json"):
            url = json.loads(files[name])["url"]
            store.write(image_key(url), files[name.replace("json", "jpg")])
            pairs.append({"url": url, "caption": files[name.replace("json", "txt")].decode()})
    write_lines(tmp_path / "pairs.jsonl", pairs)
    documents = shared_data / "omnicorpus-8.jsonl"
    assert run("omnicorpus", source=documents, images=store.address, out=tmp_path / "documents") == 0
    assert run("cc3m", source=tmp_path / "pairs.jsonl", images=store.address, out=tmp_path / "pairs") == 0
    assert "8 records, 8 samples, 32 images\n" in capsys.readouterr().out

    written = list(read_samples(open_store(str(tmp_path / "documents"))))
    records = [json.loads(line) for line in documents.read_text().splitlines()]
    for sample, record in zip(written, records, strict=True):
        assert texts(sample) == [text for text in record["texts"] if text is not None]
        assert urls_of(sample) == [url for url in record["images"] if url is not None]
        assert [store.read(image_key(image.facts["url"])) for image in sample.images] == [
            image.data for image in sample.images
        ]
        assert sample.metadata["general_metadata"] == record["general_metadata"]

    tokenizer = samples.tokenizer([text for sample in written for text in texts(sample)])
    for data, form, count in (("documents", "interleaved", 8), ("pairs", "pairs", 32)):
        source = Source(data=str(tmp_path / data), form=form, batch=count, max_tokens=256)
        ((batch,),) = make_loader(source, Loader(workers=0), 0, tokenizer, samples.SPEC, 0, 1, 1, 0, 1)
        assert len(set(batch.ids)) == count and batch.unreadable == batch.left_out == batch.lost_images == []
        assert len(batch.images) == batch.image_counts.sum() == 32
        assert batch.targets > 100 and batch.to("cpu").images.std() > 0.5


# ---------------------------------------------------------------- the corpora


def test_obelics_and_what_is_left_out(tmp_path: Path, images: Store, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        {**natural(0, "u/1", "u/2"), "metadata": json.dumps([None, {"width": 1}, {"width": 2}, None])},
        natural(1, "u/77", "u/3", "u/4"),
        natural(2, "u/77"),
        natural(3),
        {"images": [None], "texts": []},
        {"images": [5], "texts": [None], "metadata": [{}]},
        natural(4, "u/\ud800"),
    ]
    write_lines(tmp_path / "in" / "a.jsonl", records)
    (tmp_path / "in" / "b.jsonl").write_text("{\n")
    assert run("obelics", source=tmp_path / "in", images=images.address, out=tmp_path / "out") == 0
    out = open_store(str(tmp_path / "out"))
    assert [(sample.id, urls_of(sample)) for sample in read_samples(out)] == [
        ("a-00000000", ["u/1", "u/2"]),
        ("a-00000001", ["u/3", "u/4"]),
    ]
    expected = {
        "records": 8,
        "samples": 2,
        "images": 4,
        "images left out: not in the store": 2,
        "left out: no image": 2,
        "left out: images, texts and metadata are not lists of one length": 1,
        "left out: a URL is not text": 2,
        "left out: a line is not JSON": 1,
    }
    assert json.loads(out.read("stats.json")) == expected
    said = capsys.readouterr().out
    assert "2 of 2 files are done" in said
    assert all(f"{count} {name}" in said for name, count in expected.items())
    assert "a.jsonl line 5: images, texts and metadata are not lists of one length\n" in said
    assert "a.jsonl line 6: a URL is not text\na.jsonl line 7: a URL is not text\nb.jsonl" in said
    assert "b.jsonl line 1: a line is not JSON\n" in said
    assert check_shards(out) == []


def test_mmc4_keeps_large_images_beside_their_sentences(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "images"))
    for number, size in enumerate((11_000, 10_999, 12_000)):
        store.write(image_key(f"u/{number}"), bytes(size))
    record = {
        "url": "http://page",
        "text_list": ["a", "b", "c"],
        "image_info": [{"raw_url": f"u/{number}", "image_name": "x.png"} for number in range(3)],
        "similarity_matrix": [[0.1, 0.2, 0.35], [0.9, 0.1, 0.1], [0.3, 0.2, 0.1]],
    }
    wrong = [{**record, "similarity_matrix": [[1]]}, {**record, "image_info": [{}]}, {"image_info": []}]
    write_lines(tmp_path / "docs.jsonl", [record, *wrong])
    assert run("mmc4", source=tmp_path / "docs.jsonl", images=store.address, out=tmp_path / "out") == 0
    (sample,) = read_samples(open_store(str(tmp_path / "out")))
    kinds = [part.text if isinstance(part, Text) else part.facts for part in sample.parts]
    assert kinds == [{"url": "u/2", "similarity": 0.3}, "a", "b", {"url": "u/0", "similarity": 0.35}, "c"]
    assert sample.metadata == {"url": "http://page"}


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (None, [["u/0"], ["u/1"]]),
        (0.15, [["u/0"], ["u/0", "u/1"], ["u/1"]]),
        (0, [["u/0"], ["u/0", "u/1"], ["u/0", "u/1"], ["u/0"]]),
    ],
)
def test_mmc4_leaves_images_out_that_are_not_similar(
    tmp_path: Path, value: float | None, kept: list[list[str]]
) -> None:
    """By default 0.24; their sentences stay, and a document without any other image is left out and counted."""
    store = open_store(str(tmp_path / "images"))
    for number in range(2):
        store.write(image_key(f"u/{number}"), bytes(11_000))

    def document(*similarity: float) -> dict[str, Any]:
        size = range(len(similarity))
        return {
            "text_list": [f"s{i}" for i in size],
            "image_info": [{"raw_url": f"u/{i}"} for i in size],
            "similarity_matrix": [[similarity[i] if i == j else -1.0 for j in size] for i in size],
        }

    records = [document(0.24), document(0.2, 0.2), document(0.1, 0.25), document(-0.1)]
    write_lines(tmp_path / "docs.jsonl", records)
    chosen = {} if value is None else {"min_similarity": value}
    assert run("mmc4", source=tmp_path / "docs.jsonl", images=store.address, out=tmp_path / "out", **chosen) == 0
    out = open_store(str(tmp_path / "out"))
    found = list(read_samples(out))
    assert [urls_of(sample) for sample in found] == kept
    assert [texts(sample) for sample in found if sample.id.endswith("2")] == [["s0", "s1"]]
    assert json.loads(out.read("stats.json")).get("left out: no image", 0) == 4 - len(kept)


def test_omnicorpus_with_similarities_has_shares_of_sentences(tmp_path: Path, images: Store) -> None:
    record: dict[str, Any] = {
        "sentences": [["a"], ["b"]],
        "images_info": [{"name": ["u/1"]}, {"name": ["u/2"]}],
        "matrix": [[[2.0, 1.0]], [[3.0, 0.0]]],
    }
    wrong = [{**record, "matrix": [[1.0]]}, {**record, "images_info": [{"name": []}]}]
    wrong += [{"sentences": [], "images_info": [{"name": ["u/1"]}], "matrix": [[[]]]}]
    wrong += [{"images": 5}, {"images": True}, {**natural(0, "u/1"), "valid_image": 5}]
    write_lines(tmp_path / "docs.jsonl", [record, *wrong])
    values = {"images": images.address, "out": tmp_path / "out", "min_placed_image_bytes": 0}
    assert run("omnicorpus", source=tmp_path / "docs.jsonl", **values) == 0
    (sample,) = read_samples(open_store(str(tmp_path / "out")))
    assert urls_of(sample) == ["u/2", "u/1"]
    found = [image.facts["similarity"] for image in sample.images]
    assert found == pytest.approx([0.9525741, 0.2689414])  # 1 / (1 + exp(-3)), 1 / (1 + exp(1))


def test_omnicorpus_leaves_small_images_out_where_it_has_similarities(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "images"))
    for number, size in enumerate((10_999, 11_000)):
        store.write(image_key(f"u/{number}"), bytes(size))
    placed = {
        "sentences": [["a"]],
        "images_info": [{"name": ["u/0"]}, {"name": ["u/1"]}],
        "matrix": [[[2.0]], [[1.0]]],
    }
    write_lines(tmp_path / "docs.jsonl", [placed, natural(0, "u/0", "u/1")])
    assert run("omnicorpus", source=tmp_path / "docs.jsonl", images=store.address, out=tmp_path / "out") == 0
    out = open_store(str(tmp_path / "out"))
    assert [urls_of(sample) for sample in read_samples(out)] == [["u/1"], ["u/0", "u/1"]]
    assert json.loads(out.read("stats.json"))["images left out: too small"] == 1


RECORDS: dict[str, list[dict[str, Any]]] = {  # with nulls and facts that not every image has
    "obelics": [
        {
            **natural(0, "u/1", "u/2"),
            "metadata": json.dumps([None, {"width": 1}, {}, None]),
            "general_metadata": json.dumps({"url": "x"}),
        },
        {**natural(1, "u/3"), "metadata": json.dumps([None, None, None]), "general_metadata": None},
    ],
    "omnicorpus": [
        {**natural(0, "u/1", "u/2"), "valid_image": [True, False], "general_metadata": {"url": "x", "pages": 2}},
        {
            "images": ["u/3", None, "u/4"],
            "texts": [None, "a", None],
            "metadata": [{"height": 5}, None, None],
            "valid_image": [True, True],
            "general_metadata": {"url": "y", "pages": 3},
        },
        {
            "sentences": [["a"], ["b"]],
            "images_info": [{"name": ["u/1"]}, {"name": ["u/2"]}],
            "matrix": [[[2.0, 1.0]], [[3.0, 0.0]]],
        },
    ],
    "mmc4": [
        {
            "url": "x",
            "text_list": ["a", "b"],
            "image_info": [{"raw_url": "u/1", "face_detections": None}, {"raw_url": "u/2", "matched_text_index": 1}],
            "similarity_matrix": [[0.1, 0.3], [0.4, 0.2]],
        },
        {"url": None, "text_list": ["c"], "image_info": [{"raw_url": "u/3"}], "similarity_matrix": [[0.5]]},
    ],
    "cc3m": [{"url": "u/1", "caption": "a"}, {"url": "u/2", "caption": None}, {"url": "u/3", "caption": "b"}],
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_kind_of_file_makes_the_same_shards(name: str, tmp_path: Path, images: Store) -> None:
    for folder in ("lines", "parquet"):
        (tmp_path / folder).mkdir()
    write_lines(tmp_path / "lines" / "a.jsonl", RECORDS[name])
    names = {key: None for record in RECORDS[name] for key in record}
    table = pyarrow.Table.from_pylist([{**names, **record} for record in RECORDS[name]])
    pyarrow.parquet.write_table(table, tmp_path / "parquet" / "a.parquet")
    small = {"mmc4": {"min_image_bytes": 0}, "omnicorpus": {"min_placed_image_bytes": 0}}.get(name, {})
    (tmp_path / "zip").mkdir()
    with zipfile.ZipFile(tmp_path / "zip" / "a.jsonl.zip", "w") as archive:
        archive.write(tmp_path / "lines" / "a.jsonl", "docs_shard_0_v2.jsonl")
    folders = ("lines", "parquet", "zip")
    for folder in folders:
        values = {"source": tmp_path / folder, "images": images.address, "out": tmp_path / f"{folder}-out"}
        assert run(name, **values, **small) == 0
    found = [list(read_samples(open_store(str(tmp_path / f"{folder}-out")))) for folder in folders]
    assert found[0] == found[1] == found[2] and len(found[0]) == {"omnicorpus": 3}.get(name, 2)


# ---------------------------------------------------------------- tasks, restarts, kills


def corpus(tmp_path: Path, files: int = 5, documents: int = 6) -> dict[str, Any]:
    for number in range(files):
        records = [natural(10 * number + i, f"u/{i}", f"u/{(number + i) % 12}") for i in range(documents)]
        write_lines(tmp_path / "in" / f"part-{number}.jsonl", records)
    return {"source": tmp_path / "in", "images": tmp_path / "images"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_tasks_in_any_order_make_what_one_makes(tmp_path: Path, images: Store) -> None:
    where = corpus(tmp_path)
    assert run("obelics", **where, out=tmp_path / "whole") == 0
    for task in (2, 0, 1):
        split = open_store(str(tmp_path / "split"), make=True)
        with pytest.raises(ConfigError, match=r"index.json is missing"):
            read_manifest(split)
        assert run("obelics", **where, out=tmp_path / "split", tasks=3, task=task) == 0
    assert content(tmp_path / "split") == content(tmp_path / "whole")
    assert len(list(read_samples(open_store(str(tmp_path / "whole"))))) == 30


def test_a_second_run_does_nothing(tmp_path: Path, images: Store) -> None:
    where = corpus(tmp_path)
    assert run("obelics", **where, out=tmp_path / "out") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    assert run("obelics", **where, out=tmp_path / "out", reads=2) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")} == before


def test_other_values_or_files_are_refused(tmp_path: Path, images: Store, capsys: pytest.CaptureFixture[str]) -> None:
    where = corpus(tmp_path)
    assert run("obelics", **where, out=tmp_path / "out") == 0
    assert run("obelics", **where, out=tmp_path / "out", max_images=1) == 2
    assert "prepared in another way (max_images: 16 -> 1)" in capsys.readouterr().err
    write_lines(tmp_path / "in" / "part-3.jsonl", [natural(0, "u/1")])
    assert run("obelics", **where, out=tmp_path / "out") == 2
    assert "part-3.jsonl of " in capsys.readouterr().err


@pytest.mark.parametrize("uploads", [1, 2, 3, 5, 8])
def test_a_killed_run_is_finished_by_the_next(tmp_path: Path, images: Store, uploads: int) -> None:
    """SIGKILL at the n-th file that is put into place; then the same command again makes what one run makes."""
    where = corpus(tmp_path, files=2)
    values = {**where, "out": tmp_path / "out", "stage": "pack", "cluster": "local"}
    words = [f"{key}={value}" for key, value in values.items()]
    program = f"""
import os, runpy, signal, sys
left, replace = {uploads}, os.replace
def replace_or_die(*paths):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = replace_or_die
sys.argv = {["obelics.py", *words]!r}
runpy.run_path({str(SCRIPTS / "obelics.py")!r}, run_name="__main__")
"""
    killed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(ConfigError, match=r"no shards|no folder"):
        read_manifest(open_store(str(tmp_path / "out")))
    assert run("obelics", **where, out=tmp_path / "out") == 0
    assert run("obelics", **where, out=tmp_path / "whole") == 0
    listed = [{entry.key: entry.size for entry in open_store(str(tmp_path / name)).list()} for name in ("out", "whole")]
    assert listed[0] == listed[1]
    found = [list(read_samples(open_store(str(tmp_path / name)))) for name in ("out", "whole")]
    assert found[0] == found[1]


# ---------------------------------------------------------------- what cannot be read


def test_an_image_that_always_fails_is_counted(tmp_path: Path, images: Store) -> None:
    """A link to itself: reading it fails every time, though the store is well."""
    path = Path(images.address, image_key("u/1"))
    path.unlink()
    path.symlink_to(path)
    write_lines(tmp_path / "a.jsonl", [natural(0, "u/1", "u/2")])
    assert run("obelics", source=tmp_path / "a.jsonl", images=images.address, out=tmp_path / "out") == 0
    out = open_store(str(tmp_path / "out"))
    assert [urls_of(sample) for sample in read_samples(out)] == [["u/2"]]
    assert json.loads(out.read("stats.json"))["images left out: could not be read"] == 1


class Down(FolderStore):
    """A store that has gone away."""

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        raise StoreError(f"{key}: failed for 60 s")

    def size(self, key: str) -> int | None:
        raise StoreError(f"{key}: failed for 60 s")


def test_a_store_that_is_down_loses_no_images(tmp_path: Path) -> None:
    with pytest.raises(StoreDown, match="failed for 60 s"):
        pack.fetch(Down(str(tmp_path)), "a", 0)


def test_a_damaged_file_does_not_stop_the_others(
    tmp_path: Path, images: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    where = corpus(tmp_path, files=3)
    good = (tmp_path / "in" / "part-0.jsonl").read_bytes()
    (tmp_path / "in" / "part-0.jsonl").unlink()
    (tmp_path / "in" / "part-0.jsonl.gz").write_bytes(gzip.compress(good)[:-20])
    assert run("obelics", **where, out=tmp_path / "out") == 2
    said = capsys.readouterr()
    assert "part-0.jsonl.gz is damaged" in said.err and "1 files are not done" in said.err
    assert "part-1.jsonl: 6 records" in said.out and "part-2.jsonl: 6 records" in said.out
    (tmp_path / "in" / "part-0.jsonl.gz").write_bytes(gzip.compress(good))
    assert run("obelics", **where, out=tmp_path / "out") == 0
    assert "part-1.jsonl: " not in capsys.readouterr().out
    assert len(list(read_samples(open_store(str(tmp_path / "out"))))) == 18


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"source": "nowhere"}, "no folder"),
        ({"source": "nowhere.jsonl"}, "no folder|does not exist"),
        ({"source": "empty"}, "holds no .jsonl"),
        ({"source": "nothing.jsonl"}, "nothing.jsonl holds no records"),
        ({"images": "nowhere"}, "no folder"),
        ({"stage": "fetch"}, "no folder|has no plan: stage=plan comes before"),
        ({"stage": "pak"}, "stage='pak'"),
        ({"recode.resize": "crop"}, "recode.resize='crop'"),
        ({"tasks": 2, "task": 2}, "task=2 is not one of tasks=2: 0 to 1"),
        ({"tasks": "x"}, "tasks='x'"),
        ({"max_image": 5}, "did you mean max_images"),
        ({"out": "file"}, "cannot make the folder"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, images: Store, capsys: pytest.CaptureFixture[str], values: dict[str, Any], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "nothing.jsonl").write_bytes(b"")
    paths = {key: tmp_path / value for key, value in values.items() if key in ("source", "images", "out")}
    assert run("obelics", **{**corpus(tmp_path), "out": tmp_path / "out", **values, **paths}) == 2
    complaint = capsys.readouterr().err
    assert any(word in complaint for word in said.split("|")) and complaint.count("\n") == 1


def test_what_is_needed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cc3m") == 2
    assert (
        capsys.readouterr().err
        == "source=... is missing: file or folder of records: a path, s3://bucket/prefix or https://...\n"
    )


def test_two_files_of_one_name_are_refused(tmp_path: Path, images: Store, capsys: pytest.CaptureFixture[str]) -> None:
    where = corpus(tmp_path)
    write_lines(tmp_path / "in" / "part" / "1.jsonl", [])
    assert run("obelics", **where, out=tmp_path / "out") == 2
    assert "several files would become shards named part-1" in capsys.readouterr().err
