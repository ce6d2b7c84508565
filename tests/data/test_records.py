import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from hpc_mm.config import ConfigError
from hpc_mm.data.documents import BrokenRecord
from hpc_mm.data.records import DamagedFile, read_records
from hpc_mm.data.store import Store, open_store

ROWS = [{"url": f"u/{i}", "caption": f"Ein roter Kreis, Nr. {i} ü"} for i in range(700)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, row_group_size=300)
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
    "a.tsv": TSV,
    "a.tsv.gz": gzip.compress(TSV),
}


def read(store: Store, key: str) -> list[Any]:
    return list(read_records(store, key, ["url", "caption"]))


@pytest.mark.parametrize("key", FILES)
def test_every_kind_gives_the_same_records(tmp_path: Path, key: str) -> None:
    store = open_store(str(tmp_path))
    store.write(key, FILES[key])
    assert read(store, key) == ROWS


def test_an_empty_archive_is_told(tmp_path: Path) -> None:
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").close()
    store = open_store(str(tmp_path))
    store.write("a.jsonl.zip", file.getvalue())
    with pytest.raises(DamagedFile, match=r"a.jsonl.zip is damaged: .*nothing is in it"):
        read(store, "a.jsonl.zip")


def test_a_wrong_byte_in_a_table_is_one_character(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a.tsv", b"u/1\ta \xff star\nu/2\tb\n")
    assert read(store, "a.tsv") == [{"url": "u/1", "caption": "a \ufffd star"}, {"url": "u/2", "caption": "b"}]


def test_lines_that_no_parser_takes_are_broken_lines(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a.jsonl", b"[" * 10**6 + b"\n" + b"1" * 10**4 + b"\n")
    assert [str(row) for row in read(store, "a.jsonl")] == ["a line is not JSON"] * 2


@pytest.mark.parametrize("key", ["a.jsonl.gz", "a.jsonl.zip", "a.json", "a.parquet", "a.tsv.gz"])
def test_a_file_that_is_cut_is_told(tmp_path: Path, key: str) -> None:
    store = open_store(str(tmp_path))
    store.write(key, FILES[key][: len(FILES[key]) * 2 // 3])
    with pytest.raises(DamagedFile, match=f"{key} is damaged"):
        read(store, key)


def test_broken_lines_keep_their_place(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a.jsonl", b'{"a": 1}\n{"a": \n[1]\n\xff\n{"a": 2}\n')
    store.write("a.tsv", b'u\tc\nu\nu\t"c\nu\tc\td\n')
    store.write("a.json", b'[{"a": 1}, 2]')
    kinds = [str(row) if isinstance(row, BrokenRecord) else row for row in read(store, "a.jsonl")]
    assert kinds == [{"a": 1}, "a line is not JSON", "a line is not a JSON object", "a line is not JSON", {"a": 2}]
    assert [isinstance(row, BrokenRecord) for row in read(store, "a.tsv")] == [False, True, False, True]
    assert [isinstance(row, BrokenRecord) for row in read(store, "a.json")] == [False, True]


def test_other_kinds_are_told(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(ConfigError, match=r"records come from .jsonl, "):
        read(store, "a.csv")
    store.write("a.json", b"{}")
    with pytest.raises(ConfigError, match="not a list of objects"):
        read(store, "a.json")
