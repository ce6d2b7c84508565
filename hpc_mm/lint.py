"""``python -m hpc_mm.lint shards=ADDRESS out=FOLDER``: what is wrong with shards, and what is in them. Never torch."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html import escape

import numpy as np
from pydantic import Field

from hpc_mm.charts import histogram
from hpc_mm.config import ConfigError, Part, Positive, parse_arguments, with_overrides
from hpc_mm.data.filters import hashes_at
from hpc_mm.data.perceptual import MAX_DISTANCE, NearHashes, perceptual_hash
from hpc_mm.data.pictures import UnreadableImage
from hpc_mm.data.recode import Recode, recode
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.shards import BrokenShard, ShardReader, Shards, check_shards, read_manifest
from hpc_mm.data.store import MissingKey, Store, StoreDown, StoreError, open_store, refuse_if_down
from hpc_mm.page import document, picture

AHEAD = 64  # samples per thread that are being read
LISTED = 50  # lines of a list on the page and on the screen that are written out
PICTURED = 12  # samples shown
THUMBNAIL = Recode(resize="center_crop", size=96, quality=80)

Tokens = Callable[[str], int]


class Lint(Part):
    """What hpc_mm.lint takes."""

    shards: str = Field("", description="folder of shards: a path or s3://bucket/prefix")
    out: str = Field("", description="folder that index.html is written to")
    samples: Positive = Field(20_000, description="samples that are read; of more, so many drawn evenly at random")
    against: tuple[str, ...] = Field(
        (), description=".npy files of perceptual hashes, such as those of evaluation sets"
    )
    distance: int = Field(
        4, ge=0, le=MAX_DISTANCE, description="bits in which a perceptual hash is still that of the same image"
    )
    tokenizer: str = Field("", description="tokenizer.json to count tokens with; empty = words are counted")
    patch: Positive = Field(14, description="pixels of a vision tower's patch, to count patches at full size")
    reads: Positive = Field(8, description="samples read at once")


@dataclass(frozen=True)
class Checked:
    """An image that decodes."""

    sha256: str  # of its bytes
    hash: int  # perceptual
    width: int
    height: int


@dataclass(frozen=True)
class Finding:
    """What was found in a sample."""

    id: str  # or its number, where it cannot be read
    shard: str
    readable: bool = True
    images: tuple[Checked, ...] = ()
    length: int = 0  # tokens or words
    broken: tuple[tuple[str, str], ...] = ()  # what is wrong, in words that many samples share, and the particulars
    shown: tuple[bytes | None, str] | None = None  # first image, small, and the start of the text


@dataclass
class Corpus:
    """All that was found; ``broken`` are the reasons for exit code 1, with where they were met."""

    address: str
    shards: int
    samples: int  # in the shards
    read: int = 0
    broken: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    ids: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # images per sample
    images: list[tuple[str, Checked]] = field(default_factory=list)  # id of the sample, image
    shown: list[tuple[str, bytes | None, str]] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        self.read += 1
        for reason, particulars in finding.broken:
            self.broken[reason].append(f"{finding.shard}: {finding.id}" + (f": {particulars}" if particulars else ""))
        if not finding.readable:
            return
        self.ids[finding.id] += 1
        self.lengths.append(finding.length)
        self.counts.append(len(finding.images))
        self.images += [(finding.id, image) for image in finding.images]
        if finding.shown is not None:
            self.shown.append((finding.id, *finding.shown))


# ---------------------------------------------------------------- reading


def lint(options: Lint) -> Corpus:
    """Check the shards' files, read samples, and check those. ConfigError where there is nothing to read."""
    store = open_store(options.shards)
    manifest = read_manifest(store)
    corpus = Corpus(store.address, len(manifest), int(manifest.samples.sum()))
    for problem in check_shards(store):
        corpus.broken["files that are missing or of another size"].append(problem)
    tokens = token_counter(options.tokenizer)
    for finding in findings(store, manifest, options, tokens):
        corpus.add(finding)
    twice = [f"{key}: {count} times" for key, count in corpus.ids.items() if count > 1]
    if twice:
        corpus.broken["ids of several samples"] = twice
    return corpus


def token_counter(address: str) -> Tokens:
    """How long a text is: in tokens of a tokenizer.json, else in words."""
    if not address:
        return lambda text: len(text.split())
    from tokenizers import Tokenizer

    folder, _, name = address.rpartition("/")
    try:
        tokenizer = Tokenizer.from_str(open_store(folder or ".").read(name).decode())
    except (MissingKey, StoreError) as error:
        raise ConfigError(f"tokenizer={address}: {error}") from None
    except Exception as error:  # the library raises no class of its own
        raise ConfigError(f"tokenizer={address} is no tokenizer.json: {error}") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def chosen(manifest: Shards, most: int) -> Iterator[tuple[str, int]]:
    """(shard, sample) in stored order: all of them, or ``most``, always the same ones."""
    total = int(manifest.samples.sum())
    drawn = np.random.default_rng(0).choice(total, most, replace=False) if total > most else np.arange(total)
    ends = np.cumsum(manifest.samples)
    for place in np.sort(drawn):
        shard = int(np.searchsorted(ends, place, side="right"))
        yield manifest.names[shard], int(place - (ends[shard] - manifest.samples[shard]))


def findings(store: Store, manifest: Shards, options: Lint, tokens: Tokens) -> Iterator[Finding]:
    """What is found in each sample, in stored order. StoreDown where the store answers nothing any more."""
    reader = ShardReader(store)
    places = list(chosen(manifest, options.samples))
    pictured = {round(i * (len(places) - 1) / PICTURED) for i in range(PICTURED)}
    gone: list[StoreDown] = []  # then nothing more is asked for, as every question takes a minute

    def looked(place: tuple[str, int], show: bool) -> Finding:
        if gone:
            raise gone[0]
        try:
            return look(reader, *place, tokens, show)
        except StoreDown as error:
            gone.append(error)
            raise

    threads = ThreadPoolExecutor(options.reads, "lint")
    try:
        for start in range(0, len(places), AHEAD * options.reads):
            numbered = enumerate(places[start : start + AHEAD * options.reads], start)
            waiting = [threads.submit(looked, place, number in pictured) for number, place in numbered]
            yield from (future.result() for future in waiting)
    finally:
        threads.shutdown(cancel_futures=True)


def look(reader: ShardReader, shard: str, number: int, tokens: Tokens, show: bool) -> Finding:
    try:
        sample = reader.read(shard, number)
        suffixes = [member.suffix for member in reader.index(shard).members(number)]
    except (MissingKey, StoreError, BrokenShard) as error:
        if isinstance(error, StoreError):
            refuse_if_down(reader.store)
        return Finding(f"sample {number}", shard, False, broken=(("samples that cannot be read", str(error)),))
    broken: list[tuple[str, str]] = []
    images: list[Checked] = []
    for place, image in enumerate(sample.images):
        try:
            images.append(checked(image))
        except UnreadableImage as error:
            broken.append(("images that do not decode", f"image {place}: {error}"))
    text = " ".join(part.text for part in sample.parts if isinstance(part, Text))
    if not text.strip():
        broken.append(("samples without text", ""))
    files, named = len(suffixes) - 1, sum(image.data is not None for image in sample.images)
    if files != named and all(re.fullmatch(r"json|\d+\.\w+", suffix) for suffix in suffixes):  # written by ShardWriter
        broken.append(("samples with image files that are not in their parts", f"{files} files, {named} images"))
    shown = (thumbnail(sample), text[:200]) if show else None
    return Finding(sample.id, shard, True, tuple(images), tokens(text), tuple(broken), shown)


def checked(image: Image) -> Checked:
    """UnreadableImage where the image has no bytes or they are no picture."""
    if image.data is None:
        raise UnreadableImage("it has a key and no bytes")
    stored = recode(image.data, Recode())
    return Checked(stored.sha256, perceptual_hash(image.data), stored.width, stored.height)


def thumbnail(sample: Sample) -> bytes | None:
    try:
        return recode(sample.images[0].data or b"", THUMBNAIL).data if sample.images else None
    except UnreadableImage:
        return None


# ---------------------------------------------------------------- what it comes to


@dataclass(frozen=True)
class Listing:
    """Things of one kind that were found: a line each."""

    title: str
    explained: str
    lines: list[str]


def repeated(corpus: Corpus, title: str, explained: str, key: Callable[[Checked], object]) -> Listing:
    """Images that are there more than once, most frequent first."""
    groups: defaultdict[object, list[str]] = defaultdict(list)
    for sample, image in corpus.images:
        groups[key(image)].append(sample)
    found = sorted((ids for ids in groups.values() if len(ids) > 1), key=len, reverse=True)
    lines = [f"{len(ids):,} times: {', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''}" for ids in found]
    return Listing(title, explained, lines)


def overlap(corpus: Corpus, address: str, known: NearHashes) -> Listing:
    lines = [f"{sample}: {image.hash:016x}" for sample, image in corpus.images if known.near(image.hash)]
    explained = f"perceptual hashes that differ from one of {address} in at most {known.distance} bits"
    return Listing(f"images of {address}", explained, lines)


def noticed(corpus: Corpus, sets: dict[str, NearHashes]) -> list[Listing]:
    """What a corpus may have and still be whole."""
    return [
        repeated(corpus, "images stored more than once", "equal bytes", lambda image: image.sha256),
        repeated(corpus, "images that look the same", "equal perceptual hashes", lambda image: image.hash),
        *(overlap(corpus, address, known) for address, known in sets.items()),
    ]


def broken(corpus: Corpus) -> list[Listing]:
    return [Listing(reason, "", lines) for reason, lines in sorted(corpus.broken.items())]


def contents(corpus: Corpus) -> str:
    read = f"{corpus.read:,} of {corpus.samples:,}" if corpus.read < corpus.samples else f"all {corpus.samples:,}"
    return f"{read} samples in {corpus.shards:,} shards, {len(corpus.images):,} images"


def charts(corpus: Corpus, options: Lint) -> list[str]:
    unit = "tokens" if options.tokenizer else "words"
    images = [image for _, image in corpus.images]
    patches = [math.ceil(image.width / options.patch) * math.ceil(image.height / options.patch) for image in images]
    drawn: list[tuple[str, str, Sequence[float]]] = [
        (f"{unit.capitalize()} per sample", unit, corpus.lengths),
        ("Images per sample", "images", corpus.counts),
        ("Short side of images", "pixels", [min(image.width, image.height) for image in images]),
        ("Long side of images", "pixels", [max(image.width, image.height) for image in images]),
        ("Patches per image", f"patches of {options.patch} x {options.patch} pixels at full size", patches),
        ("Shape of images", "width / height", [image.width / image.height for image in images]),
    ]
    return [histogram(title, about, values) for title, about, values in drawn if values]


def page(corpus: Corpus, others: list[Listing], options: Lint) -> str:
    wrong = sum(map(len, corpus.broken.values()))
    verdict = f"{wrong:,} things are broken" if wrong else "nothing is broken"
    tiles = [
        (f"{corpus.read:,}", "samples read"),
        (f"{len(corpus.images):,}", "images decoded"),
        (f"{wrong:,}", "broken"),
    ]
    tiles += [(f"{len(listing.lines):,}", listing.title) for listing in others]
    boxes = "".join(f'<div class="card tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in tiles)
    parts = [
        f"<h1>{escape(corpus.address)}</h1>\n<p>{escape(contents(corpus))}: {verdict}</p>",
        f'<div class="tiles">{boxes}</div>',
        "<h2>Broken</h2>",
        listed(broken(corpus), " open") if corpus.broken else "<p>Nothing.</p>",
        "<h2>Noticed</h2>",
        listed(others),
        '<h2>What is in it</h2>\n<div class="charts">' + "\n".join(charts(corpus, options)) + "</div>",
        "<h2>Samples</h2>\n<p>The first image and the start of the text.</p>",
        f'<div class="samples">{cards(corpus)}</div>',
    ]
    return document(f"{corpus.address}: lint", "\n".join(parts))


def listed(listings: list[Listing], is_open: str = "") -> str:
    """Titles with counts, which open to the first lines."""
    boxes = []
    for listing in listings:
        head = f"{escape(listing.title)}: {len(listing.lines):,}"
        about = f"<p>{escape(listing.explained)}</p>" if listing.explained else ""
        lines = f"<pre>{escape(chr(10).join(shortened(listing.lines)))}</pre>" if listing.lines else ""
        boxes.append(f'<details class="card"{is_open}><summary>{head}</summary>{about}{lines}</details>')
    return '<div class="charts">' + "\n".join(boxes) + "</div>"


def shortened(lines: Sequence[str]) -> list[str]:
    rest = len(lines) - LISTED
    return [*lines[:LISTED], *([f"and {rest:,} more"] if rest > 0 else [])]


def cards(corpus: Corpus) -> str:
    texts = [f"<dl><dt>{escape(sample)}</dt><dd>{escape(text)}</dd></dl>" for sample, _, text in corpus.shown]
    pictures = [picture(image, sample) for sample, image, _ in corpus.shown]
    return "\n".join(f'<div class="card sample">{a}{b}</div>' for a, b in zip(pictures, texts, strict=True))


def summary(corpus: Corpus, others: list[Listing]) -> Iterator[str]:
    yield f"{corpus.address}: {contents(corpus)}"
    for listing in broken(corpus):
        yield f"BROKEN {listing.title}: {len(listing.lines):,}"
        yield from (f"  {line}" for line in shortened(listing.lines))
    for listing in others:
        yield f"{listing.title}: {len(listing.lines):,}"


def main(arguments: Sequence[str] | None = None) -> int:
    """0, 1 where something is broken, or 2 after one line about a mistake of the user's."""
    try:
        options: Lint = with_overrides(Lint(), parse_arguments(sys.argv[1:] if arguments is None else arguments))
        for name in ("shards", "out"):
            if not getattr(options, name):
                raise ConfigError(f"{name}=FOLDER is missing: " + (Lint.model_fields[name].description or ""))
        sets = {address: NearHashes(hashes_at(address), options.distance) for address in options.against}
        corpus = lint(options)
        others = noticed(corpus, sets)
        out = open_store(options.out, make=True)
        out.write("index.html", page(corpus, others, options).encode(errors="replace"))
    except (ConfigError, StoreError, StoreDown, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(*summary(corpus, others), f"{out.address}/index.html", sep="\n")
    return 1 if corpus.broken else 0


if __name__ == "__main__":
    sys.exit(main())
