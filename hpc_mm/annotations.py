"""What data_prep/ scripts of benchmarks share: published annotations are read, joined by image, and become shards.

A benchmark is one sample per image. Its id is the benchmark's image id, its metadata the split, the image's file name,
and its ``captions``, its ``questions``, each with its ``answers`` as published, or its ``label``, the name of a class;
test splits have no answers or labels. The shards of a split are named after it.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import zipfile
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from hpc_mm import prepare
from hpc_mm.config import ConfigError
from hpc_mm.data.documents import BrokenRecord, Record
from hpc_mm.data.parts import SourcePart
from hpc_mm.data.perceptual import perceptual_hash, write_hashes
from hpc_mm.data.pictures import UnreadableImage
from hpc_mm.data.records import DamagedFile
from hpc_mm.data.schema import Image, Sample
from hpc_mm.data.shards import corpus_digest, read_manifest, read_samples
from hpc_mm.data.sources import open_source
from hpc_mm.data.store import MissingKey, Store, StoreError, open_store, opened
from hpc_mm.site import read_options

ENDINGS = (".json", ".json.gz", ".jsonl", ".zip")
HASHES = "hashes.npy"  # of a benchmark's images, beside its shards
HASHED = "hashes.from"  # digest of the shards that HASHES was made from
LARGEST = 2**32  # bytes of a JSON file, uncompressed
TOLD = 3  # of several of the same mistakes
KEPT = ("question_id", "question", "question_type", "answer_type", "answerable", "multiple_choice_answer", "answers")


class Disagreement(Exception):
    """Questions and annotations that are not of each other; the message says which."""


@dataclass(frozen=True)
class Split:
    """A split by its published files: any of the choices, each one file that holds all, or questions and answers.

    ``images``: the name of an image's file by its id, such as ``val2014/COCO_val2014_{image:012d}.jpg``.
    """

    name: str
    choices: tuple[tuple[str, ...], ...]
    images: str = "{image}"


# ---------------------------------------------------------------- the published files


@dataclass(frozen=True)
class Published:
    """The JSON files of a source by their names; they may be compressed, or lie in folders or archives."""

    store: Store
    places: Mapping[str, list[tuple[str, str]]]  # name -> keys, each with a member of that archive or nothing

    def size(self, name: str) -> int:
        """Bytes of the file that holds it."""
        return self.store.size(self.places[name][0][0]) or 0

    def read(self, name: str) -> Any:
        """What is in a file; DamagedFile where it is no JSON."""
        (key, member), *others = self.places[name]
        if others:
            raise ConfigError(f"{self.store.address} has two files {name}: {key} and {others[0][0]}")
        where = f"{self.store.address}/{key}" + (f"/{member}" if member else "")
        try:
            with opened(self.store, key, self.store.size(key) or 0) as file:
                if key.endswith(".zip"):
                    with zipfile.ZipFile(file).open(member) as part:
                        data = part.read(LARGEST)
                else:
                    data = gzip.GzipFile(fileobj=file).read(LARGEST) if key.endswith(".gz") else file.read(LARGEST)
            if len(data) == LARGEST:
                raise DamagedFile(f"{where} has {LARGEST} bytes or more")
            text = data.decode("utf-8-sig")
            return json_lines(text) if name.endswith(".jsonl") else json.loads(text)
        except json.JSONDecodeError as error:
            raise DamagedFile(f"{where} is damaged: line {error.lineno}: {error.msg}") from None
        except UnicodeDecodeError as error:
            line = 1 + error.object.count(b"\n", 0, error.start)
            raise DamagedFile(f"{where} is damaged: line {line} is not UTF-8") from None
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
            raise DamagedFile(f"{where} is damaged: {type(error).__name__}: {error}") from error


def json_lines(text: str) -> list[Any]:
    """The values of lines of JSON. JSONDecodeError where one is none, with its place in the whole text."""
    values, start = [], 0
    for line in text.split("\n"):
        try:
            values += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise json.JSONDecodeError(error.msg, text, start + error.pos) from None
        start += len(line) + 1
    return values


def published(address: str, out: str) -> Published:
    """What lies at an address: one such file, or a folder of them. ``out``: where a copy of one on the web is kept."""
    store, only = open_source(address, ENDINGS, out)
    places: dict[str, list[tuple[str, str]]] = {}
    for key in [only] if only else [entry.key for entry in store.list() if entry.key.endswith(ENDINGS)]:
        members = json_members(store, key) if key.endswith(".zip") else [""]
        for member in members:
            name = (member or key).rpartition("/")[2].removesuffix(".gz")
            places.setdefault(name, []).append((key, member))
    return Published(store, places)


def json_members(store: Store, key: str) -> list[str]:
    try:
        with opened(store, key, store.size(key) or 0) as file:
            names = zipfile.ZipFile(file).namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise DamagedFile(f"{store.address}/{key} is damaged: {error}") from error
    return [name for name in names if name.endswith((".json", ".jsonl")) and not name.startswith("__MACOSX/")]


# ---------------------------------------------------------------- a benchmark


class Benchmark(prepare.NamedImages):
    """What scripts of benchmarks take. An image that is missing is an error: part of a benchmark is another one."""

    FETCHES: ClassVar[bool] = False
    WORK: ClassVar[frozenset[str]] = prepare.NamedImages.WORK | {"splits"}
    SPLITS: ClassVar[tuple[Split, ...]] = ()

    source: str = Field(description="the published files or archives: one, or a folder of them")
    splits: str = Field("", description="splits to prepare, with commas; empty = all in the source")

    def wanted(self) -> list[Split]:
        known = {split.name: split for split in self.SPLITS}
        names = [name for name in self.splits.split(",") if name] or list(known)
        for name in names:
            if name not in known:
                raise ConfigError(f"splits={name}: there are {', '.join(known)}")
        return [known[name] for name in names]

    def parts(self) -> tuple[Store, list[SourcePart]]:
        files = published(self.source, self.out)
        parts = []
        for split in self.wanted():
            names = chosen(split, files)
            if names:
                size = sum(files.size(name) for name in names)
                parts.append(SourcePart(files.places[names[0]][0][0], size, split.name))
            elif self.splits:
                raise ConfigError(f"source={self.source} has no {described([split])}")
        if not parts:
            raise ConfigError(f"source={self.source} has no {described(self.wanted())}")
        return files.store, parts

    def records(self, store: Store, part: SourcePart) -> Iterator[Record | BrokenRecord]:
        split = next(split for split in self.SPLITS if split.name == part.split)
        where, files = self.read(split)
        try:
            found = list(self.images_of(split, files))
        except Disagreement as error:
            raise DamagedFile(f"{where}: {error}") from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DamagedFile(f"{where}: not the published form ({type(error).__name__}: {error})") from None
        twice = [name for name, count in Counter(record["id"] for record in found).items() if count > 1]
        if twice:
            raise DamagedFile(f"{where}: several images have the id {twice[0]}")
        yield from (Record(record, f"{where} image {record['id']}") for record in found)

    def read(self, split: Split) -> tuple[str, Sequence[Any]]:
        """The names of a split's files, and what is in them."""
        files = published(self.source, self.out)
        names = chosen(split, files)
        return " and ".join(names), [files.read(name) for name in names]

    @abstractmethod
    def images_of(self, split: Split, files: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """Every image of a split: its ``id``, ``file_name``, and ``captions``, ``questions`` or ``label``."""


def chosen(split: Split, files: Published) -> tuple[str, ...]:
    """The first choice of a split's files that the source has; empty if it has none."""
    return next((names for names in split.choices if all(name in files.places for name in names)), ())


def described(splits: Iterable[Split]) -> str:
    return ", ".join(" or ".join(" with ".join(names) for names in split.choices) for split in splits)


def urls(record: Record, options: Benchmark) -> list[str]:
    return [record["file_name"]]


def arrange(record: Record, sample_id: str, images: Mapping[str, bytes], options: Benchmark) -> Sample:
    key = options.key(record["file_name"])
    if key not in images:
        raise DamagedFile(f"{record.place}: {key} is not in {options.images}; with part of it this is no benchmark")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", record["id"]):
        raise DamagedFile(f"{record.place}: an image id has only letters, digits, _ and -")
    facts = {name: value for name, value in record.items() if name != "id"}
    return Sample(record["id"], (Image(images[key]),), facts)


def main(kind: type[Benchmark], arguments: Sequence[str] | None = None) -> int:
    """The command line of a benchmark's script."""
    words = sys.argv[1:] if arguments is None else arguments
    code = prepare.main(kind, urls, arrange, words)
    if code:
        return code
    try:
        write_hash_index(open_store(read_options(kind, words).out))
    except (ConfigError, StoreError, MissingKey, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def write_hash_index(out: Store) -> None:
    """Beside whole shards, the perceptual hashes of their images: what filters.against=ADDRESS leaves out elsewhere.

    ConfigError where an image does not decode: with part of its images this is no benchmark.
    """
    try:
        made_from = corpus_digest(read_manifest(out)).encode()
    except ConfigError:  # not whole yet
        return
    try:
        if out.read(HASHED) == made_from:
            return
    except MissingKey:
        pass
    write_hashes(out, HASHES, map(hash_of, read_samples(out)))
    out.write(HASHED, made_from)


def hash_of(sample: Sample) -> int:
    (image,) = sample.images
    try:
        return perceptual_hash(image.data or b"")
    except UnreadableImage as error:
        raise ConfigError(f"image {sample.id} does not decode: {error}") from None


# ---------------------------------------------------------------- captions


class Captions(Benchmark):
    """Benchmarks in the form of A. Karpathy's splits: one file, of which each split is a part."""

    def images_of(self, split: Split, files: Sequence[Any]) -> Iterator[dict[str, Any]]:
        for image in files[0]["images"]:
            if image["split"] == split.name:
                yield {
                    "id": str(image["cocoid"] if "cocoid" in image else image["filename"].rpartition(".")[0]),
                    "split": split.name,
                    "file_name": "/".join(filter(None, [image.get("filepath"), image["filename"]])),
                    "captions": [sentence["raw"] for sentence in image["sentences"]],
                }


def karpathy(name: str, *splits: str) -> tuple[Split, ...]:
    return tuple(Split(split, ((name,),)) for split in splits)


# ---------------------------------------------------------------- questions


class Questions(Benchmark):
    """Benchmarks of questions about images in the form of VQA's two files, or with the answers beside the questions."""

    def images_of(self, split: Split, files: Sequence[Any]) -> Iterator[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for entry in joined(*map(listed, files)):
            name = entry["image"] if "image" in entry else entry["image_id"]
            image = {"id": str(name).partition(".")[0], "split": split.name, "questions": []}
            image["file_name"] = split.images.format(image=name)
            found.setdefault(str(name), image)["questions"].append(question(entry))
        yield from found.values()


def vqa_or(start: str, other: str) -> tuple[tuple[str, ...], ...]:
    """Two files in VQA's form, whose names start so, or one other file."""
    return ((f"{start}_questions.json", f"{start}_annotations.json"), (other,))


def listed(file: Any) -> list[dict[str, Any]]:
    """The list in a file, which is the file itself or stands under one of these names in it."""
    for name in ("questions", "annotations", "data"):
        if isinstance(file, dict) and name in file:
            file = file[name]
    if not isinstance(file, list) or not all(isinstance(entry, dict) for entry in file):
        raise TypeError("there is no list of questions or annotations")
    return file


def question(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a question. VizWiz has one for each image and no id of it; TextVQA's answers are bare texts."""
    kept = {name: entry[name] for name in KEPT if name in entry}
    kept.setdefault("question_id", entry.get("image"))
    if not isinstance(kept.get("question"), str) or kept["question_id"] is None:
        raise TypeError("a question has no text or no id")
    if "answers" in kept:
        kept["answers"] = [{"answer": answer} if isinstance(answer, str) else answer for answer in kept["answers"]]
    return kept


def joined(
    questions: list[dict[str, Any]], annotations: list[dict[str, Any]] | None = None
) -> Iterator[dict[str, Any]]:
    """Each question with its annotation, by ``question_id``. Disagreement where the two lists are not of each other."""
    if annotations is None:
        yield from questions
        return
    answers = by_id(annotations, "annotations")
    asked = by_id(questions, "questions")
    complain([number for number in asked if number not in answers], "questions have no annotation")
    complain([number for number in answers if number not in asked], "annotations have no question")
    for number, entry in asked.items():
        images = (entry["image_id"], answers[number]["image_id"])
        if images[0] != images[1]:
            raise Disagreement(f"question {number} is about image {images[0]}, its annotation about {images[1]}")
        yield {**answers[number], **entry}


def complain(numbers: Sequence[Any], what: str) -> None:
    if numbers:
        first = ", ".join(map(str, numbers[:TOLD]))
        raise Disagreement(f"{len(numbers)} {what}: {first}{', ...' if len(numbers) > TOLD else ''}")


def by_id(entries: list[dict[str, Any]], what: str) -> dict[Any, dict[str, Any]]:
    found = {entry["question_id"]: entry for entry in entries}
    if len(found) < len(entries):
        raise Disagreement(f"{len(entries) - len(found)} of the {what} have the question_id of another")
    return found
