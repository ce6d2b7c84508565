"""By which protocol a score was made, in one short id: scores of unlike protocols say nothing about each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hpc_mm.benchmark import Benchmark, Decoding, Prompt, Question, digest
from hpc_mm.config import ConfigError, Part, Positive, differences, validated
from hpc_mm.demonstrations import QUERY_SET, TEXT_SHOTS

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")]
SHOWN = 4  # digits of a digest in an id; comparing takes all of them
RANDOM, RICES = "random", "rices"


class Questions(Part):
    """Which questions: a split, how many of it, and a digest of them in order."""

    split: Name
    count: Positive
    digest: Digest

    @classmethod
    def of(cls, split: str, questions: Sequence[Question]) -> Questions:
        return cls(split=split, count=len(questions), digest=digest_of(questions))

    def __str__(self) -> str:
        return f"{self.split}-{self.count}@{self.digest[:SHOWN]}"


class Demonstrations(Part):
    """What stands before a question, and how it is chosen from a pool of answered questions."""

    shots: int = Field(ge=0, description=f"0 = {TEXT_SHOTS} demonstrations without their images")
    pool: Questions
    selection: Literal["random", "rices"] = "random"
    query_set: int = Field(QUERY_SET, ge=0, description="questions of the pool that they are drawn from; 0 = all")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="of random ones, a trial each")
    features: str = Field("", pattern=r"^[A-Za-z0-9._:-]*$", description="what makes images similar: model and weights")

    @field_validator("seeds")
    @classmethod
    def seeds_are_a_set(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is there twice")
        return tuple(sorted(seeds))

    @model_validator(mode="after")
    def drawn_or_found(self) -> Demonstrations:
        drawn = self.selection == RANDOM
        if drawn != bool(self.seeds) or drawn != bool(self.query_set) or drawn == bool(self.features):
            raise ValueError(f"{self.selection}: random ones have seeds and a query set, rices features and neither")
        return self

    def __str__(self) -> str:
        shots = f"{self.shots}shot" if self.shots else f"0+{TEXT_SHOTS}text"
        if self.selection == RICES:
            return f"{shots}-rices-{self.features}-{self.pool}"
        size = "" if self.query_set == QUERY_SET else str(self.query_set)
        return f"{shots}-random{size}-s{','.join(map(str, self.seeds))}-{self.pool}"


class Scoring(Part):
    """The metric, by whose rules it is computed, and the version of these rules here."""

    metric: Name
    rules: Name
    version: Positive = 1

    def __str__(self) -> str:
        return f"{self.metric}-{self.rules}@v{self.version}"


class Protocol(Part):
    """Everything about an evaluation that is not the model."""

    benchmark: Name
    questions: Questions
    prompt: Prompt
    demonstrations: Demonstrations
    decoding: Decoding | None = Field(description="none where classes are scored")
    classes: Digest | None = Field(description="of the names that are scored, where they are")
    scoring: Scoring

    @property
    def id(self) -> str:
        """One short word per part, the same on all machines: ``str`` of the parts, with slashes."""
        parts = (f"{self.benchmark}-{self.questions}", f"{self.prompt.name}@{self.prompt.digest[:SHOWN]}")
        return "/".join((*parts, str(self.demonstrations), self._search, str(self.scoring)))

    @property
    def _search(self) -> str:
        if self.decoding is None:
            return f"meanlogprob@{(self.classes or '')[:SHOWN]}"
        penalty = f"-lp{self.decoding.length_penalty}" if self.decoding.length_penalty else ""
        return f"beam{self.decoding.beams}-{self.decoding.max_new_tokens}tok{penalty}"


def digest_of(questions: Sequence[Question]) -> str:
    """Of ids, images, texts and references, in order: the same wherever and however often they are prepared."""
    return digest(text for one in questions for text in (one.id, one.image, one.text, *one.references, ""))


def protocol_of(
    benchmark: Benchmark, questions: Questions, demonstrations: Demonstrations, scoring: Scoring
) -> Protocol:
    """The protocol of a benchmark's evaluation on these questions."""
    scored = benchmark.kind == "classes"
    return Protocol(
        benchmark=benchmark.name,
        questions=questions,
        prompt=benchmark.prompt,
        demonstrations=demonstrations,
        decoding=None if scored else benchmark.decoding,
        classes=digest(benchmark.classes) if scored else None,
        scoring=scoring,
    )


def read_protocol(values: Mapping[str, Any]) -> Protocol:
    """A protocol from what ``model_dump`` made of it, on its way through JSON."""
    protocol: Protocol = validated(Protocol, values)
    return protocol


def refuse_unlike(one: Protocol, other: Protocol) -> None:
    """ConfigError with all differences, unless the two are the same protocol."""
    found = differences(one, other)
    if found:
        raise ConfigError(f"scores of unlike protocols are not compared: {'; '.join(found)}")
