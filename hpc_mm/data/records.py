"""Records of a corpus file, one by one: JSON lines, JSON, parquet, arrow or tab-separated text, compressed or not."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import IO, Any, NoReturn

from hpc_mm.config import ConfigError
from hpc_mm.data.documents import BrokenRecord, Record
from hpc_mm.data.store import MissingKey, Store, opened
from hpc_mm.data.tables import arrow_batches, parquet_batches

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zip", ".json", ".parquet", ".arrow", ".tsv", ".tsv.gz")
# What the ``datasets`` library writes beside records.
BESIDE = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
BATCH = 256  # parquet rows in memory
PIECE = 2**20  # characters of a JSON list read at once
LONGEST = 2**28  # bytes of one line, characters of one entry of a JSON list
LOOKED_AT = 100  # records of a file of JSON in which its columns are looked for


class DamagedFile(ConfigError):
    """A file of records that cannot be read to its end; the message names it."""


class WrongColumns(DamagedFile):
    """A file of records of something else."""


def holds_records(key: str) -> bool:
    """Whether a file of a folder is one of records, by its name."""
    return key.endswith(ENDINGS) and key.rpartition("/")[2] not in BESIDE


def read_records(
    store: Store, key: str, columns: Sequence[str] = (), only: Sequence[str] = ()
) -> Iterator[Record | BrokenRecord]:
    """Every record of a file in order, each with its place; a BrokenRecord in the place of what cannot be read.

    ``columns`` names the values of tab-separated files. Without them the first line does; a first line that has just
    these names in any order does so too. ``only``: columns of a table (.parquet, .arrow) that are wanted; without them
    all are, and other kinds always give all.

    ConfigError where the file is of an unknown kind, DamagedFile where it cannot be read to its end.
    """
    if not key.endswith(ENDINGS):
        raise ConfigError(f"{store.address}/{key}: records come from {', '.join(ENDINGS)} files")
    size = store.size(key)
    if size is None:
        raise MissingKey(f"{key}: not in {store.address}")
    try:
        with opened(store, key, size) as file:
            if key.endswith((".parquet", ".arrow")):
                yield from table_rows(file, key, only)
            elif key.endswith(".json"):
                yield from JsonList(file, key).entries()
            elif key.endswith((".tsv", ".tsv.gz")):
                yield from tsv_rows(file, key, columns)
            else:
                yield from json_lines(file, key)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError, OverflowError, RuntimeError) as error:
        raise DamagedFile(f"{store.address}/{key} is damaged: {type(error).__name__}: {error}") from error


def check_columns(store: Store, key: str, forms: Sequence[Sequence[str]], columns: Sequence[str] = ()) -> None:
    """WrongColumns if no record of a file can have all columns of one of the ``forms``, since the file has others.

    Tables are known by their schema. In JSON a value may be missing by mistake: its first records are looked at.
    """
    size = store.size(key)
    if key.endswith(".parquet") and size is not None:
        with opened(store, key, size) as file:
            names = list(parquet_file(file, store, key).schema_arrow.names)
    else:
        found = islice(read_records(store, key, columns), LOOKED_AT)
        names = list({name: None for record in found if isinstance(record, dict) for name in record})
    missing = [", ".join(name for name in form if name not in names) for form in forms]
    if all(missing) and names:
        raise WrongColumns(f"{store.address}/{key} has no column {' or '.join(missing)}: it has {', '.join(names)}")


# ---------------------------------------------------------------- lines


def lines(file: io.BufferedReader, key: str) -> Iterator[tuple[str, str | BrokenRecord]]:
    """Place and text of every line of a file, which may be compressed."""
    for name, member in members(file, key):
        number = 0
        while line := member.readline(LONGEST):
            number += 1
            place = f"{name} line {number}"
            if len(line) == LONGEST:
                raise ValueError(f"line {number} has {LONGEST} bytes or more")
            try:
                yield place, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                yield place, BrokenRecord("a line is not UTF-8", place)


def members(file: io.BufferedReader, key: str) -> Iterator[tuple[str, IO[bytes]]]:
    """The file itself, decompressed, or all files in an archive (MMC4 and OBELICS pack one into each)."""
    if key.endswith(".gz"):
        yield key, gzip.GzipFile(fileobj=file)  # type: ignore[misc]
    elif key.endswith(".zip"):
        archive = zipfile.ZipFile(file)
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        if not names:
            raise zipfile.BadZipFile("nothing is in it")
        for name in names:
            yield key if len(names) == 1 else f"{key}/{name}", archive.open(name)
    else:
        yield key, file


def json_lines(file: io.BufferedReader, key: str) -> Iterator[Record | BrokenRecord]:
    for place, line in lines(file, key):
        yield line if isinstance(line, BrokenRecord) else json_line(line, place)


def json_line(line: str, place: str) -> Record | BrokenRecord:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return BrokenRecord("a line is not JSON", place)
    return Record(record, place) if isinstance(record, dict) else BrokenRecord("a line is not a JSON object", place)


def tsv_rows(file: io.BufferedReader, key: str, columns: Sequence[str]) -> Iterator[Record | BrokenRecord]:
    """Quotes are text: the published tables of captions have them in captions."""
    names = list(columns)
    for number, (place, line) in enumerate(lines(file, key)):
        if isinstance(line, BrokenRecord):
            yield line
            continue
        values = re.sub(r"\r?\n$", "", line).split("\t")
        if number == 0 and (not names or sorted(values) == sorted(names)):
            names = values
        elif len(values) != len(names):
            yield BrokenRecord("a line has other columns", place)
        else:
            yield Record(zip(names, values, strict=True), place)


# ---------------------------------------------------------------- JSON lists and tables


class JsonList:
    """The entries of a JSON file that is one list, read in pieces: a corpus of a gigabyte is one such file."""

    def __init__(self, file: io.BufferedReader, key: str) -> None:
        self.file, self.key = file, key
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at = "", 0  # what was read, from the start of an entry on; how far in it
        self.line = 1  # of the start of the text
        self.ended = False

    def entries(self) -> Iterator[Record | BrokenRecord]:
        if self.sign() != "[":
            raise ValueError("it is not a list of objects")
        if self.sign() == "]":
            return
        self.at -= 1
        number, sign = 0, ","
        while sign == ",":
            entry, number = self.entry(), number + 1
            place = f"{self.key} entry {number}"
            yield Record(entry, place) if isinstance(entry, dict) else BrokenRecord("it is not a JSON object", place)
            sign = self.sign()
        if sign != "]":
            self.fail("there is neither a comma nor the end of the list after an entry")

    def sign(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at].isspace():
                self.at += 1
            if self.at < len(self.text):
                self.at += 1
                return self.text[self.at - 1]
            if not self.more():
                return ""

    def entry(self) -> Any:
        if not self.sign():
            self.fail("the list does not end")
        self.at -= 1
        while True:
            try:
                entry, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not self.more():
                    self.fail(error.msg, error.pos)
                continue
            if end < len(self.text) or not self.more():  # a number may go on
                self.at = end
                return entry

    def more(self) -> bool:
        """Forget what is done with and read as much again as is left; False at the end of the file."""
        if self.ended:
            return False
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        if len(self.text) > LONGEST:
            self.fail(f"an entry has more than {LONGEST} characters or is not JSON")
        data = self.file.read(max(PIECE, len(self.text)))
        self.ended = not data
        try:
            self.text += self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise ValueError(f"line {line} is not UTF-8") from None
        return True

    def fail(self, reason: str, at: int | None = None) -> NoReturn:
        line = self.line + self.text.count("\n", 0, self.at if at is None else at)
        raise ValueError(f"line {line}: {reason}")


def table_rows(file: io.BufferedReader, key: str, only: Sequence[str]) -> Iterator[Record]:
    import pyarrow

    number = 0
    try:
        batches = parquet_batches if key.endswith(".parquet") else arrow_batches
        for batch in batches(file, BATCH, only):
            for row in batch.to_pylist():
                number += 1
                yield Record(row, f"{key} row {number}")
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error


def parquet_file(file: io.BufferedReader, store: Store, key: str) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedFile(f"{store.address}/{key} is damaged: {error}") from error
