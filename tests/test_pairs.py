import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import samples
from scripts import run, told, written

from hpc_mm.data.schema import image_key
from hpc_mm.data.store import Store, open_store


@pytest.fixture
def images(tmp_path: Path) -> Store:
    """Images of u/1 and u/2, and files cat and dog."""
    store = open_store(str(tmp_path / "images"))
    for number, name in enumerate((image_key("u/1"), image_key("u/2"), "cat", "dog")):
        store.write(name, samples.encoded(samples.picture(number)))
    return store


TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "as published": ('a "circle\tu/1\nno image\tu/99\nbroken\na square\tu/2\n', {}),
    "as published by CC12M": ('u/1\ta "circle\nu/99\tno image\nbroken\nu/2\ta square\n', {"columns": "url,caption"}),
    "with a header": ('url\tcaption\nu/1\ta "circle\nu/99\tno image\nu/2\ta square\nbroken', {}),
    "other names": ('TEXT\tURL\na "circle\tu/1\n\nno image\tu/99\na square\tu/2\n', {"url": "URL", "caption": "TEXT"}),
}


@pytest.mark.parametrize("name", TABLES)
def test_cc3m_of_a_table(name: str, tmp_path: Path, images: Store) -> None:
    text, values = TABLES[name]
    if name == "other names":
        values = {**values, "columns": ""}
    (tmp_path / "cc.tsv").write_text(text)
    assert run("cc3m", source=tmp_path / "cc.tsv", images=images.address, out=tmp_path / "out", **values) == 0
    samples_found = written(tmp_path / "out")
    assert [sample.images[0].facts for sample in samples_found] == [{"url": "u/1"}, {"url": "u/2"}]
    assert [told(sample.parts[1]) for sample in samples_found] == [("", 'a "circle'), ("", "a square")]
    counts = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert counts["left out: a line has other columns"] == counts["left out: no image"] == 1


def test_cc3m_of_files_in_a_folder(tmp_path: Path, images: Store) -> None:
    """FROMAGe's table."""
    (tmp_path / "cc3m_train.tsv").write_text("caption\timage\na cat\tcat\na dog\tdog\nout\t../cat\n")
    values = {"columns": "caption,image", "file": "image", "out": tmp_path / "out"}
    assert run("cc3m", source=tmp_path / "cc3m_train.tsv", images=images.address, **values) == 0
    found = [[told(part) for part in sample.parts] for sample in written(tmp_path / "out")]
    assert found == [[("", images.read("cat")), ("", "a cat")], [("", images.read("dog")), ("", "a dog")]]
    counts = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert counts["left out: an image's name is no path inside a folder"] == 1


def test_laion_keeps_what_is_said_of_an_image(tmp_path: Path, images: Store) -> None:
    rows = [
        {"URL": "u/1", "TEXT": "a", "similarity": 0.3, "NSFW": "UNLIKELY", "WIDTH": None, "punsafe": 0.1},
        {"URL": "u/2", "TEXT": None, "similarity": 0.3, "NSFW": "UNLIKELY", "WIDTH": 5, "punsafe": 0.1},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "part-0.parquet")
    assert run("laion", source=tmp_path / "part-0.parquet", images=images.address, out=tmp_path / "out") == 0
    (sample,) = written(tmp_path / "out")
    assert sample.images[0].facts == {"url": "u/1", "similarity": 0.3, "NSFW": "UNLIKELY", "punsafe": 0.1}
    assert told(sample.parts[1]) == ("", "a")


def test_a_wrong_column_is_told_before_any_work(
    tmp_path: Path, images: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, names in enumerate((["url", "caption"], ["URL", "TEXT"])):
        table = pyarrow.Table.from_pylist([dict(zip(names, ["u/1", "a"], strict=True))])
        (tmp_path / "in").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / "in" / f"{number}.parquet")
    values = {"images": images.address, "out": tmp_path / "out"}
    assert run("laion", source=tmp_path / "in", **values) == 2
    said = capsys.readouterr()
    assert said.err == f"{tmp_path}/in/0.parquet has no column URL, TEXT: it has url, caption\n"
    assert said.out == "" and not (tmp_path / "out").exists()
    assert run("cc3m", source=tmp_path / "in", **values) == 2
    said = capsys.readouterr()
    assert "0.parquet: 1 records, 1 samples" in said.out and "1.parquet has no column url, caption" in said.err
