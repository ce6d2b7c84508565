"""What data_prep/ scripts call: a corpus's records become shards in stages, here or as arrays of Slurm jobs.

``plan`` lists the URLs that the image store has not, ``fetch`` downloads them, ``pack`` joins records and images into
shards, ``verify`` checks what came out. Each skips what is done, so any of them is simply run again.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal

from pydantic import Field, field_validator, model_validator

from hpc_mm import pack
from hpc_mm.arrays import Stage, Work, run_stages
from hpc_mm.config import ConfigError, Positive, Slurm, unknown
from hpc_mm.data.documents import BrokenRecord
from hpc_mm.data.filters import Filters
from hpc_mm.data.pace import Pace
from hpc_mm.data.parts import changes
from hpc_mm.data.recode import Recode
from hpc_mm.data.records import DamagedFile
from hpc_mm.data.schema import image_key
from hpc_mm.data.store import MissingKey, Store, StoreDown, StoreError, checked, open_store, whole
from hpc_mm.data.wanted import PART_URLS, Plan, make_plan, read_plan
from hpc_mm.data.web import MEANING, MISSING, NOT_AN_IMAGE, Web
from hpc_mm.deadline import ended_in_order
from hpc_mm.site import read_options

STAGES = ("plan", "fetch", "pack", "verify")
READING = {"plan", "pack"}  # stages that read the source
SHARED = ("fetch", "pack")  # stages that several tasks divide
SNAPSHOT = ("hpc_mm", "data_prep", "sbatch")  # what a job reads of the checkout
RECODED = ".recode.json"  # in a store of images, how they were made; hidden in a folder, and no SHA-256


class Preparation(pack.Packing):
    """What every data_prep/ script takes."""

    WORK = pack.Packing.WORK | {"stage", "cluster", "name", "retry", "part_urls", "web", "recode", "slurm"}

    FETCHES: ClassVar[bool] = True
    """Whether records may name images by URL."""
    TELLS_SIZES: ClassVar[bool] = False
    """Whether records say how large images were on the web, which filters then go by."""
    PACKED: ClassVar[frozenset[str]] = frozenset({"filters", "shard_mb", "min_image_bytes"})
    """What matters to packing alone; everything else must be the same for all that is fetched."""

    stage: Literal["all", "plan", "fetch", "pack", "verify"] = Field("all", description="what to do; all = in turn")
    cluster: Literal["auto", "slurm", "local", "print"] = Field("auto", description="auto = Slurm where sbatch is")
    name: str = Field("", description="of the Slurm jobs and of their folder; empty = the last part of out")
    retry: str = Field(
        "",
        description="fetch only what failed so, with commas: timeout,dns; missing = what was fetched and is not in the "
        "image store any more (asks it for each, HEAD); empty = what is to do",
    )
    part_urls: Positive = Field(PART_URLS, description="URLs of a part of the plan")
    web: Web = Field(Web(), description="how URLs are asked for")
    recode: Recode = Field(Recode(), description="what becomes of an image on its way into the store")
    slurm: Slurm = Field(Slurm(), description="what sbatch is told")

    @model_validator(mode="before")
    @classmethod
    def images_lie_somewhere(cls, values: dict[str, Any]) -> dict[str, Any]:
        out = str(values.get("out", "")).rstrip("/")
        folder, slash, _ = out.rpartition("/")
        if folder.endswith("/"):  # out is a whole bucket
            folder = out
        return {**values, "images": values.get("images") or f"{folder or ('' if slash else '.')}/images"}

    @field_validator("filters")
    @classmethod
    def files_of_hashes_lie_somewhere(cls, filters: Filters) -> Filters:
        """Whole addresses, the same wherever a job runs."""
        return filters.model_copy(update={"against": tuple(map(whole, filters.against))})

    @model_validator(mode="after")
    def a_task_is_of_one_stage(self) -> Preparation:
        if self.task is not None and self.stage == "all":
            raise ValueError(f"task={self.task} is of one stage: give stage={' or stage='.join(SHARED)} too")
        return self

    @model_validator(mode="after")
    def filters_look_at_what_is_stored(self) -> Preparation:
        """Refuse filters of sizes that would drop all images or none, since those were shrunk before."""
        resize, size = self.recode.resize, self.recode.size
        if self.TELLS_SIZES or resize == "none":
            return self
        square = resize in ("border", "center_crop")
        for name in ("min_side", "max_side", "max_aspect"):
            limit = getattr(self.filters, name)
            if limit is not None and (square or (name == "min_side" and limit > size)):
                stored = f"{size} x {size} pixels" if square else f"{size} pixels at most on its short side"
                raise ValueError(
                    f"filters.{name}={limit} looks at stored images, of which recode.resize={resize} "
                    f"recode.size={size} makes each {stored}: leave one of them out"
                    + ("" if square else f", or recode.size={limit}")
                )
        return self

    @field_validator("retry")
    @classmethod
    def reasons_are_known(cls, retry: str) -> str:
        reasons = [*MEANING, NOT_AN_IMAGE, MISSING]
        for word in filter(None, retry.split(",")):
            if word not in reasons and not re.fullmatch(r"http_\d{3}", word):
                raise ValueError(str(unknown("reason", word, [*reasons, "http_503"])))
        return retry

    def is_fetched(self, name: str) -> bool:
        """Whether an image that a record names is fetched: what is in a column of URLs, be it one or not."""
        return True


class Documents(Preparation):
    """What scripts of documents in natural arrangement take.

    All images of a document are fetched, not ``max_images``: where an early one cannot be had, a later one is kept in
    its place, and so every image may be needed.
    """

    PACKED: ClassVar[frozenset[str]] = Preparation.PACKED | {"max_images"}

    max_images: Positive = Field(16, description="images kept per document; training takes its first readable ones")

    def url_columns(self) -> list[str]:
        return ["images", "valid_image"]


class NamedImages(Preparation):
    """What scripts take whose records name image files, or URLs, whose images lie under sha256(url)."""

    images: str = Field("", description="folder or store of the image files under their names; of URLs, sha256(url)")
    strip: str = Field("", description="start of the records' image names that is not in the store: /data/images/")

    def is_fetched(self, name: str) -> bool:
        return is_url(name)

    def key(self, name: str) -> str:
        if is_url(name):
            return image_key(name)
        try:
            name.encode()
            return checked(name.removeprefix(self.strip).removeprefix("./"))
        except ValueError:
            raise BrokenRecord("an image's name is no path inside a folder") from None


def is_url(name: str) -> bool:
    return name.strip().lower().startswith(("http://", "https://"))


@dataclass(frozen=True)
class Corpus(Generic[pack.Options]):
    """What a script says of its corpus."""

    urls: pack.Urls[pack.Options]
    arrange: pack.Arrange[pack.Options]


# ---------------------------------------------------------------- the stages


def plan(options: Preparation, corpus: Corpus[Any]) -> Plan:
    """List what is to fetch, unless that is done; what the source has now must be what it was made from."""
    store, parts = options.parts()
    pack.check_first(options, store, parts[0])
    out, images = open_store(options.out, make=True), open_store(options.images, make=True)
    made_from = {part.key: part.bytes for part in parts}
    found = read_plan(out)
    if found is None:
        check_recode(images, options, claim=False)  # before there is a plan to throw away
        urls = all_urls(options, corpus)
        found = make_plan(urls, made_from, planned_options(options), images, out, options.part_urls)
    if found.made_from != made_from:
        raise ConfigError(f"{options.out} holds a plan of other files than source={options.source}: use another out")
    check_plan(found, options)
    if not found.wanted:
        print(f"{len(parts)} files name {found.named} images by URL: nothing is to fetch")
        return found
    check_recode(images, options, claim=True)
    print(
        f"{len(parts)} files name {found.named} images by URL, {found.unique} of them different: {found.present} are "
        f"in {options.images}, {found.wanted} on {found.hosts} hosts are to fetch, in {len(found.parts)} parts"
    )
    if options.tasks > found.groups:
        print(
            f"tasks={options.tasks}: all URLs of a host are one task's, so fetch has work for {found.groups} tasks; "
            "the others end at once"
        )
    return found


def planned_options(options: Preparation) -> dict[str, Any]:
    """What decides which URLs are fetched, and what becomes of them."""
    kept = options.model_dump(mode="json", exclude=set((options.WORK - {"recode"}) | options.PACKED))
    return {"images": open_store(options.images).address, **kept}


def check_plan(found: Plan, options: Preparation) -> None:
    changed = changes(found.options, planned_options(options))
    if changed:
        raise ConfigError(f"{options.out} holds a plan with other values ({'; '.join(changed)}): use another out")


def check_recode(images: Store, options: Preparation, claim: bool) -> None:
    """ConfigError where the store has images of another recode. ``claim``: what is fetched into it now is of this one.

    Stores that something else has filled do not tell.
    """
    mine = options.recode.model_dump(mode="json")
    if options.recode.resize == "none":  # then no image has a size or a quality of ours
        mine = {name: mine[name] for name in ("resize", "max_pixels")}
    try:
        known = json.loads(images.read(RECODED))
    except MissingKey:
        if claim:
            images.write(RECODED, json.dumps(mine).encode())
        return
    changed = changes(known, mine, "recode.")
    if changed:
        raise ConfigError(f"{images.address} holds images made otherwise ({'; '.join(changed)}): use another images=")


def all_urls(options: Preparation, corpus: Corpus[Any]) -> Iterator[str]:
    """The URLs of all files. Every file is looked at before DamagedFile names those that cannot be read."""
    store, parts = options.parts()
    pace, damaged = Pace(parts), []
    for part in parts:
        try:
            options.check(store, part)
            for record in pace.through(part, options.records_with_urls(store, part)):
                if isinstance(record, BrokenRecord):
                    continue  # pack counts it
                with suppress(BrokenRecord):  # likewise
                    names = corpus.urls(record, options)
                    pack.keys_of(names, options)
                    yield from filter(options.is_fetched, names)
        except (DamagedFile, StoreError) as error:
            damaged.append(f"{part.key}: {error}")
    if damaged:
        raise DamagedFile("\n".join([*damaged, f"{len(damaged)} of {len(parts)} files cannot be read: no plan yet"]))


def fetch(options: Preparation) -> None:
    """Download this task's groups of parts."""
    out = open_store(options.out)
    found = read_plan(out)
    if found is None:
        raise ConfigError(f"{options.out} has no plan: stage=plan comes before stage=fetch")
    check_plan(found, options)
    parts = [part for part in found.parts if options.task is None or part.group % options.tasks == options.task]
    images = open_store(options.images, make=True)
    check_recode(images, options, claim=bool(parts))
    from hpc_mm.download import fetch as download

    retry = [word for word in options.retry.split(",") if word]
    tasks = min(options.tasks, max(found.groups, 1))
    tally = download(parts, out, images, options.web, options.recode, retry, tasks=tasks)
    print(f"fetched {tally.text()}")


def verify(options: Preparation) -> None:
    """Every URL of the plan has a line, every shard is whole; a table of what became of all."""
    from hpc_mm import verify

    verify.verify(options.out)


def run_stage(stage: str, options: Preparation, corpus: Corpus[Any]) -> None:
    if stage == "plan":
        plan(options, corpus)
    elif stage == "fetch":
        fetch(options)
    elif stage == "pack":
        pack.pack(options, corpus.urls, corpus.arrange)
    else:
        verify(options)


# ---------------------------------------------------------------- where they run


def script_words(words: Sequence[str], options: Preparation) -> list[str]:
    """This command again, for one stage and task of it here; addresses whole, since jobs run in another folder."""
    gone = {"stage", "task", "cluster", "source", "out", "images", "filters.against"}
    kept = [word for word in words if word.partition("=")[0] not in gone]
    places = [f"{key}={whole(getattr(options, key))}" for key in ("source", "out", "images")]
    if options.filters.against:
        places.append(f"filters.against={json.dumps(options.filters.against)}")  # a list, since names may have commas
    return [f"data_prep/{Path(sys.argv[0]).name}", "cluster=local", *places, *kept]


def work_for(stages: Sequence[str], words: Sequence[str], options: Preparation) -> Work:
    """The stages as jobs, by this command again."""
    name = options.name or Path(options.out.rstrip("/")).name
    return Work(
        name=name,
        folder=f"prepare-{name}",
        stages=[Stage(stage, options.tasks if stage in SHARED else None) for stage in stages],
        every=STAGES,
        words=script_words(words, options),
        places=(options.source, options.out, options.images, *options.filters.against),
        snapshot=SNAPSHOT,
        slurm=options.slurm,
    )


def main(
    kind: type[pack.Options],
    urls: pack.Urls[pack.Options],
    arrange: pack.Arrange[pack.Options],
    arguments: Sequence[str] | None = None,
) -> int:
    """The command line of a data_prep/ script: 0, 1 where a task failed, 2 after one line about a user's mistake."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = read_options(kind, words)
        every = STAGES if options.FETCHES else STAGES[2:]
        stages = every if options.stage == "all" else (options.stage,)
        if options.task is None and options.cluster != "print" and READING.intersection(stages):
            with ended_in_order():  # once for all tasks, before any queue: a file on the web is copied, a mistake told
                store, parts = options.parts()
                pack.check_first(options, store, parts[0])
        corpus, work = Corpus(urls, arrange), work_for(stages, words, options)
        return run_stages(work, options.cluster, options.task, lambda stage: run_stage(stage, options, corpus))
    except (ConfigError, StoreError, MissingKey, StoreDown, OSError, MemoryError) as error:  # OSError: of disks
        print(str(error) or repr(error), file=sys.stderr)
        return 2
