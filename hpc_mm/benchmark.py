"""A benchmark: what an eval/ script states of it, and its questions as data_prep/ prepared them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator
from pydantic_core import from_json

from hpc_mm.config import ENDOFCHUNK_TOKEN, IMAGE_TOKEN, ConfigError, Part, Positive
from hpc_mm.data.shards import DIGESTED, IMAGE_SUFFIXES, BrokenShard, ShardInfo, ShardReader, Shards, read_manifest
from hpc_mm.data.store import MissingKey, Store, StoreError, open_store

logger = logging.getLogger(__name__)

Kind = Literal["caption", "vqa", "classes"]
FIELDS = {"caption": "captions", "vqa": "questions", "classes": "label"}  # of a sample's metadata, by kind
SHARD = re.compile(r"(?P<split>.+)-\d{6,}(-[0-9a-f]{16})?\.tar")
FACTS = "facts"  # folder of the store
BLANKS = re.compile(r"\{(question|answer)\}")
READS = 16  # samples, or files of facts, read at once
DIGITS = 16  # of a SHA-256 in hex
TOLD = 3  # images that are missing


class Prompt(Part):
    """Text around a question: ``<image>`` stands for its image, {question} for its text, {answer} for a reference."""

    name: str = Field(pattern=r"^[a-z0-9-]+$", description="names it in protocols")
    query: str = Field(description="up to where the model goes on")
    demonstration: str = Field(description="a question with its answer, whole")

    @model_validator(mode="after")
    def blanks_are_in_their_places(self) -> Prompt:
        for name, text, answers in (("query", self.query, 0), ("demonstration", self.demonstration, 1)):
            if text.count(IMAGE_TOKEN) != 1:
                raise ValueError(f"{name}={text!r} needs one {IMAGE_TOKEN}")
            if text.count("{answer}") != answers:
                raise ValueError(f"{name}={text!r} needs {'one' if answers else 'no'} {{answer}}")
        return self

    @property
    def digest(self) -> str:
        return digest((self.query, self.demonstration))


def _prompt(name: str, query: str, after: str = "") -> Prompt:
    return Prompt(name=name, query=query, demonstration=f"{query}{{answer}}{ENDOFCHUNK_TOKEN}{after}")


# OpenFlamingo's (arXiv 2308.01390), exactly: no space after the colon, a newline where an answer is to be written.
CAPTION = _prompt("of-caption", "<image>Output:", "\n")
VQA = _prompt("of-vqa", "<image>Question:{question} Short answer:", "\n")
IMAGENET = _prompt("of-imagenet", "<image>Output:")
HATEFUL_MEMES = _prompt(
    "of-hateful-memes", "<image>is an image with: '{question}' written on it. Is it hateful? Answer:"
)


class Decoding(Part):
    """How an answer is searched for: by beams, without sampling. The defaults are OpenFlamingo's for captions."""

    beams: Positive = Field(3, description="beams; 1 = greedy")
    max_new_tokens: Positive = Field(20, description="tokens of an answer")
    length_penalty: float = Field(0.0, description="exponent of the length that a beam's score is divided by")


class Benchmark(Part):
    """What an eval/ script states."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$", description="names it in protocols")
    kind: Kind = Field(description="captions of images, questions about them, or classes that they are of")
    split: str = Field("test", description="split that is scored")
    demonstrations: str = Field("train", description="split that demonstrations are drawn from")
    prompt: Prompt = Field(description="text of a question and of a demonstration")
    decoding: Decoding = Field(Decoding(), description="how answers are searched for; classes are scored instead")
    classes: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="names to choose from; of kind=classes, none = the labels of the demonstrations' split"
    )
    metric: str = Field(description="what is computed, such as cider")

    @model_validator(mode="after")
    def only_classes_have_names(self) -> Benchmark:
        if self.classes and self.kind != "classes":
            raise ValueError(f"classes={self.classes}: kind=classes has names, kind={self.kind} is what was given")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes: {doubled(self.classes)} is there twice")
        return self


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked about one image, which is read by ``read_image`` when it is wanted."""

    id: str  # as published
    image: str  # id of its image
    shard: str
    sample: int  # of the shard
    text: str  # empty where only the image asks
    references: tuple[str, ...]  # captions, or the annotators' answers in their order; none where they are not public

    @property
    def image_key(self) -> str:
        """The same for all questions about one image, and for no others."""
        return f"{self.shard}/{self.image}"


def digest(texts: Iterable[str]) -> str:
    """Hexadecimal digits that name a sequence of texts."""
    whole = hashlib.sha256()
    for text in texts:
        data = text.encode()
        whole.update(len(data).to_bytes(8) + data)
    return whole.hexdigest()[:DIGITS]


def doubled(names: Iterable[str]) -> str | None:
    """The first name that is there twice."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


# ---------------------------------------------------------------- prepared shards


def questions(address: str, split: str, benchmark: Benchmark) -> list[Question]:
    """All questions of a split of prepared shards in their published order; of images only the metadata is read.

    What was read of a shard is kept beside it, for the next time.

    ConfigError where there is no such split, where its samples are of another kind than the benchmark, where an id is
    there twice, where images are missing, and where a label is none of the benchmark's classes.
    """
    store = open_store(address)
    shards = shards_of(read_manifest(store), split, address)
    found: list[Question] = []
    missing: list[str] = []
    with ThreadPoolExecutor(READS, "questions") as threads:
        try:
            for shard, sample, (image, facts, is_there) in facts_of(store, shards, threads):
                missing += [] if is_there else [image]
                found.extend(questions_of(facts, benchmark.kind, image, shard, sample))
        except (BrokenShard, MissingKey, StoreError) as error:
            raise ConfigError(f"{address}: {error}") from None
        except WrongKind as error:
            raise ConfigError(f"{address} split={split}: {error}") from None
        finally:
            threads.shutdown(cancel_futures=True)
    if missing:
        first = ", ".join(missing[:TOLD]) + (", ..." if len(missing) > TOLD else "")
        count = sum(shard.samples for shard in shards)
        raise ConfigError(f"{address} split={split}: {len(missing):,} of {count:,} images are missing: {first}")
    if not found:
        raise ConfigError(f"{address} split={split} holds no questions")
    twice = doubled(question.id for question in found)
    if twice is not None:
        raise ConfigError(f"{address} split={split}: question {twice} is there twice")
    if benchmark.classes:
        strange = dict.fromkeys(label for question in found for label in question.references).keys() - benchmark.classes
        if strange:
            raise ConfigError(
                f"{address} split={split}: {min(strange)!r} is none of the {len(benchmark.classes)} classes"
            )
    return found


def has_answers(address: str, split: str, benchmark: Benchmark) -> bool:
    """Whether the answers of a split are public, as its first image says. ConfigError as of ``questions``."""
    store = open_store(address)
    shard = shards_of(read_manifest(store), split, address)[0].name
    try:
        image, facts, _ = read_facts(ShardReader(store), shard, 0)
        return any(question.references for question in questions_of(facts, benchmark.kind, image, shard, 0))
    except (BrokenShard, MissingKey, StoreError, WrongKind) as error:
        raise ConfigError(f"{address} split={split}: {error}") from None


def shards_of(shards: Shards, split: str, address: str) -> list[ShardInfo]:
    """A split's shards, which are named after it."""
    named = [(SHARD.fullmatch(shard.name), shard) for shard in shards]
    splits = dict.fromkeys(match["split"] for match, _ in named if match)
    if split not in splits:
        there = f"it has {', '.join(splits)}" if splits else "its shards are not named after splits"
        raise ConfigError(f"{address} has no split {split!r}: {there}")
    return [shard for match, shard in named if match and match["split"] == split]


Facts = tuple[str, dict[str, Any], bool]
"""Id and metadata of a sample, and whether it has an image."""
KEPT = TypeAdapter(list[Facts])


def facts_of(
    store: Store, shards: Sequence[ShardInfo], threads: ThreadPoolExecutor
) -> Iterator[tuple[str, int, Facts]]:
    """Shard, number and facts of all samples in order. What a shard holds is read once and kept, if its name has the
    digest of its bytes (two that differ may have the same index): one read of ``facts/SHARD.json`` in place of one for
    each sample. What was kept and cannot be used is read from the samples, and kept, again.
    """
    reader, keeps, problems = ShardReader(store), True, list[str]()
    for start in range(0, len(shards), READS):
        some = shards[start : start + READS]
        for shard, kept in zip(some, threads.map(partial(kept_facts, store, problems), some), strict=True):
            rows = kept
            if rows is None:
                rows = list(threads.map(partial(read_facts, reader, shard.name), range(shard.samples)))
                keeps = keeps and keep_facts(store, shard, rows)
            yield from ((shard.name, sample, row) for sample, row in enumerate(rows))
    if problems:
        count, one = len(problems), min(problems)  # threads find them in any order
        logger.warning("questions of %d of %d shards were read from every sample again: %s", count, len(shards), one)


def kept_facts(store: Store, problems: list[str], shard: ShardInfo) -> list[Facts] | None:
    """What was kept of a shard that is there; None where nothing was, or nothing of use, which joins ``problems``."""
    key = key_of(shard)
    if not key or store.size(shard.name) != shard.bytes:
        return None
    try:
        rows = KEPT.validate_json(store.read(key), strict=True)
        if len(rows) == shard.samples:
            return rows
        problems.append(f"{store.address}/{key} is of {len(rows)} samples, not {shard.samples}")
    except MissingKey:
        pass
    except ValueError:
        problems.append(f"{store.address}/{key} is damaged")
    except (ConfigError, StoreError) as error:
        problems.append(str(error))
    return None


def keep_facts(store: Store, shard: ShardInfo, rows: Sequence[Facts]) -> bool:
    """Whether the next shard's are to be kept, too: the store may be one that others fill, which costs time alone."""
    key = key_of(shard)
    try:
        if key:
            store.write(key, json.dumps(rows, separators=(",", ":")).encode())
    except (ConfigError, StoreError) as error:
        logger.warning("questions are read from every sample again next time: %s", error)
        return False
    return True


def key_of(shard: ShardInfo) -> str:
    """Where a shard's facts lie; empty where its name may stand for other bytes another time."""
    return f"{FACTS}/{shard.name}.json" if DIGESTED.search(shard.name) else ""


def read_facts(reader: ShardReader, shard: str, sample: int) -> Facts:
    """Of one sample, without the bytes of its images: one ranged read of its JSON."""
    index = reader.index(shard)
    if sample >= len(index.keys):
        raise BrokenShard(f"{shard} has no sample {sample} in its index: index the shards again")
    key = index.keys[sample]
    members = index.members(sample)
    head = next((member for member in members if member.suffix == "json"), None)
    try:
        values = from_json(reader.store.read(shard, head.start, head.end)) if head else {}
    except ValueError as error:
        raise BrokenShard(f"{shard} sample {key}: {error}") from None
    facts = values.get("metadata") if isinstance(values, dict) else None
    is_there = any(member.suffix.rpartition(".")[2] in IMAGE_SUFFIXES for member in members)
    return key, facts if isinstance(facts, dict) else {}, is_there


def read_image(reader: ShardReader, question: Question) -> bytes:
    """The encoded image of a question: one ranged read. ConfigError where its sample has none."""
    for image in reader.read(question.shard, question.sample).images:
        if image.data is not None:
            return image.data
    raise ConfigError(f"question {question.id}: sample {question.image} of {question.shard} holds no image")


class WrongKind(Exception):
    """A sample that is not of the kind that a benchmark wants; the message says what it is."""


def questions_of(facts: Mapping[str, Any], kind: Kind, image: str, shard: str, sample: int) -> Iterator[Question]:
    """The questions about one image, from its metadata."""
    values = facts.get(FIELDS[kind])
    if values is None:
        others = [name for other, name in FIELDS.items() if name in facts and other != kind]
        holds = f"holds {others[0]}" if others else "is no sample of a benchmark"
        raise WrongKind(f"{kind} wants {FIELDS[kind]}, but image {image} {holds}")
    try:
        if kind == "vqa":
            for entry in values:
                answers = tuple(as_text(answer["answer"]) for answer in entry.get("answers", ()))
                number = str(entry["question_id"])
                yield Question(number, image, shard, sample, as_text(entry["question"]), answers)
        elif kind == "caption":
            if not values:
                raise WrongKind(f"image {image} has no caption")
            yield Question(image, image, shard, sample, "", tuple(map(as_text, values)))
        else:
            yield Question(image, image, shard, sample, as_text(facts.get("text", "")), (as_text(values),))
    except (KeyError, TypeError, AttributeError) as error:
        raise WrongKind(f"image {image}: not the prepared form ({type(error).__name__}: {error})") from None


def as_text(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no text")
    return text
