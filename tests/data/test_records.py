import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_mm.config import ConfigError
from hpc_mm.data.documents import BrokenRecord
from hpc_mm.data.records import PIECE, DamagedFile, JsonList, check_columns, read_records
from hpc_mm.data.store import Store, open_store

ROWS = [{"url": f"u/{i}", "caption": f"Ein roter Kreis, Nr. {i} ü"} for i in range(700)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, row_group_size=300)
    return file.getvalue()


def arrow() -> bytes:
    file, table = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=400)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("docs.jsonl", LINES)
    return file.getvalue()


TSV = "".join(f"{row['url']}\t{row['caption']}\n" for row in ROWS).encode()
FILES = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zip": zipped(),
    "a.json": json.dumps(ROWS).encode(),
    "a.parquet": parquet(),
    "a.arrow": arrow(),
    "a.tsv": TSV,
    "headed.tsv": b"caption\turl\r\n" + "".join(f"{row['caption']}\t{row['url']}\r\n" for row in ROWS).encode(),
    "a.tsv.gz": gzip.compress(TSV),
}
PLACES = {".parquet": "row", ".arrow": "row", ".json": "entry"}


def read(store: Store, key: str) -> list[Any]:
    return list(read_records(store, key, ["url", "caption"]))


@pytest.mark.parametrize("key", FILES)
def test_every_kind_gives_the_same_records(tmp_path: Path, key: str) -> None:
    store = open_store(str(tmp_path))
    store.write(key, FILES[key])
    found = read(store, key)
    assert found == ROWS
    kind = PLACES.get(Path(key).suffix, "line")
    first = 2 if key == "headed.tsv" else 1
    assert [record.place for record in found] == [f"{key} {kind} {first + i}" for i in range(len(ROWS))]


def test_every_file_of_an_archive_is_read(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.mkdir("docs")
        archive.writestr("docs/1.jsonl", b'{"a": 1}\n')
        archive.writestr("docs/2.jsonl", b'{"a": 2}')
    store = open_store(str(tmp_path))
    store.write("a.jsonl.zip", file.getvalue())
    found = [(record["a"], record.place) for record in read(store, "a.jsonl.zip")]
    assert found == [(1, "a.jsonl.zip/docs/1.jsonl line 1"), (2, "a.jsonl.zip/docs/2.jsonl line 1")]


def test_an_empty_archive_is_told(tmp_path: Path) -> None:
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").close()
    store = open_store(str(tmp_path))
    store.write("a.jsonl.zip", file.getvalue())
    with pytest.raises(DamagedFile, match=r"a.jsonl.zip is damaged: .*nothing is in it"):
        read(store, "a.jsonl.zip")


def test_lines_that_no_parser_takes_are_broken_lines(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a.jsonl", b"[" * 10**6 + b"\n" + b"1" * 10**4 + b"\n")
    assert [str(row) for row in read(store, "a.jsonl")] == ["a line is not JSON"] * 2


@pytest.mark.parametrize("key", ["a.jsonl.gz", "a.jsonl.zip", "a.json", "a.parquet", "a.arrow", "a.tsv.gz"])
def test_a_file_that_is_cut_is_told(tmp_path: Path, key: str) -> None:
    store = open_store(str(tmp_path))
    store.write(key, FILES[key][: len(FILES[key]) * 2 // 3])
    with pytest.raises(DamagedFile, match=f"{key} is damaged"):
        read(store, key)


def test_broken_lines_keep_their_place(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\n{"a": \n[1]\n\xff\n{"a": 2}\n')
    store.write("a.tsv", b'u\tc\nu\nu\t"c\nu\tc\td\nu\ta \xff star\n')
    store.write("a.json", b'[{"a": 1}, 2]')

    def told(key: str) -> list[Any]:
        return [(str(row), row.place) if isinstance(row, BrokenRecord) else row for row in read(store, key)]

    wrong = [("a line is not JSON", "a.jsonl line 2"), ("a line is not a JSON object", "a.jsonl line 3")]
    wrong += [("a line is not UTF-8", "a.jsonl line 4")]
    assert told("a.jsonl") == [{"a": 1}, *wrong, {"a": 2}]
    assert told("a.tsv") == [
        {"url": "u", "caption": "c"},
        ("a line has other columns", "a.tsv line 2"),
        {"url": "u", "caption": '"c'},
        ("a line has other columns", "a.tsv line 4"),
        ("a line is not UTF-8", "a.tsv line 5"),
    ]
    assert told("a.json") == [{"a": 1}, ("it is not a JSON object", "a.json entry 2")]


values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda inner: st.lists(inner))
entries = st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3) | values, max_size=5)


@given(entries=entries, indent=st.sampled_from([None, 0, 3]), size=st.integers(1, 40))
def test_a_list_is_read_in_pieces_of_any_size(entries: list[Any], indent: int | None, size: int) -> None:
    data = json.dumps(entries, indent=indent, ensure_ascii=False).encode(errors="replace")
    small = pytest.MonkeyPatch()
    with small.context() as patch:
        patch.setattr("hpc_mm.data.records.PIECE", size)
        found = list(JsonList(io.BufferedReader(io.BytesIO(data)), "a.json").entries())  # type: ignore[arg-type]
    expected = json.loads(data)
    assert [row if isinstance(row, dict) else None for row in found] == [
        row if isinstance(row, dict) else None for row in expected
    ]
    assert [row.place for row in found] == [f"a.json entry {i + 1}" for i in range(len(expected))]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'[\n{"a": 1},\n{"a" 2}\n]', "line 3: Expecting ':' delimiter"),
        (b'[\n{"a": 1}\n{"a": 2}\n]', "line 3: there is neither a comma nor the end of the list"),
        (b'[{"a": 1},\n', "line 2: "),
        (b'[\n{"a": 1},\n{"a": "\xff"}]', "line 3 is not UTF-8"),
        (b'[{"a": 1}' + b",\n" + b" " * PIECE + b'{"a": }', "line 2: Expecting value"),
        (b"{}", "not a list of objects"),
        (b"", "not a list of objects"),
    ],
)
def test_a_list_that_is_not_json_is_told_with_its_line(tmp_path: Path, data: bytes, said: str) -> None:
    store = open_store(str(tmp_path))
    store.write("a.json", data)
    with pytest.raises(DamagedFile) as caught:
        read(store, "a.json")
    assert f"{tmp_path}/a.json is damaged: " in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize("key", FILES)
def test_a_wrong_column_is_told_before_any_record(tmp_path: Path, key: str) -> None:
    store = open_store(str(tmp_path))
    store.write(key, FILES[key])
    check_columns(store, key, [["caption", "url"]], ["url", "caption"])
    with pytest.raises(DamagedFile, match=rf"{key} has no column URL: it has (url, caption|caption, url)"):
        check_columns(store, key, [["URL", "caption"]], ["url", "caption"])


def test_other_kinds_are_told(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(ConfigError, match=r"records come from .jsonl, "):
        read(store, "a.csv")
