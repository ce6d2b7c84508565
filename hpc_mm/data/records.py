"""Records of a corpus file, one by one: JSON lines, JSON, parquet or tab-separated text, compressed or not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

from hpc_mm.config import ConfigError
from hpc_mm.data.documents import BrokenRecord, Record
from hpc_mm.data.store import MissingKey, Store, opened

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zip", ".json", ".parquet", ".tsv", ".tsv.gz")
BATCH = 256  # parquet rows in memory
LONGEST_FIELD = 2**24  # characters of one tab-separated value


class DamagedFile(ConfigError):
    """A file of records that cannot be read to its end; the message names it."""


def read_records(store: Store, key: str, columns: Sequence[str] = ()) -> Iterator[Record | BrokenRecord]:
    """Every record of a file in order; a BrokenRecord in the place of a line that cannot be read.

    ``columns`` names the values of tab-separated files, which have no header. ConfigError where the file is of an
    unknown kind, DamagedFile where it cannot be read to its end.
    """
    if not key.endswith(ENDINGS):
        raise ConfigError(f"{store.address}/{key}: records come from {', '.join(ENDINGS)} files")
    size = store.size(key)
    if size is None:
        raise MissingKey(f"{key}: not in {store.address}")
    try:
        with opened(store, key, size) as file:
            if key.endswith(".parquet"):
                yield from parquet_rows(file)
            elif key.endswith(".json"):
                yield from json_rows(file)
            elif key.endswith((".tsv", ".tsv.gz")):
                yield from tsv_rows(uncompressed(file, key), columns)
            else:
                yield from map(json_line, uncompressed(file, key))
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, csv.Error, ValueError, RecursionError) as error:
        raise DamagedFile(f"{store.address}/{key} is damaged: {type(error).__name__}: {error}") from error


def uncompressed(file: io.BufferedReader, key: str) -> IO[bytes]:
    if key.endswith(".gz"):
        return gzip.open(file)  # type: ignore[return-value]
    if key.endswith(".zip"):
        archive = zipfile.ZipFile(file)
        if not archive.namelist():
            raise zipfile.BadZipFile("nothing is in it")
        return archive.open(archive.namelist()[0])  # MMC4 packs one file into each
    return file


def json_line(line: bytes) -> Record | BrokenRecord:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return BrokenRecord("a line is not JSON")
    return record if isinstance(record, dict) else BrokenRecord("a line is not a JSON object")


def json_rows(file: io.BufferedReader) -> Iterator[Record | BrokenRecord]:
    """A JSON file that is one list of objects, read whole."""
    records = json.load(file)
    if not isinstance(records, list):
        raise json.JSONDecodeError("not a list of objects", "", 0)
    for record in records:
        yield record if isinstance(record, dict) else BrokenRecord("an entry is not a JSON object")


def parquet_rows(file: io.BufferedReader) -> Iterator[Record]:
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(BATCH):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


def tsv_rows(file: IO[bytes], columns: Sequence[str]) -> Iterator[Record | BrokenRecord]:
    csv.field_size_limit(LONGEST_FIELD)
    text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
    for row in csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE):
        good = len(row) == len(columns)
        yield dict[str, Any](zip(columns, row, strict=True)) if good else BrokenRecord("a line has other columns")
