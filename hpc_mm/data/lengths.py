"""How long samples are as tokens: counted once per shard, tokenizer and template, and kept beside the shards.

``lengths/NAME/SHARD.safetensors`` has a row per sample, int32 (samples, 4), in the columns of ``Lengths``; NAME has a
digest of what decides them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hpc_mm.config import IMAGE_TOKEN, ConfigError, Language, Source
from hpc_mm.data.schema import Sample, Text
from hpc_mm.data.shards import BrokenShard, ShardInfo, ShardReader, Shards, read_manifest, version
from hpc_mm.data.store import MissingKey, Store, StoreError, open_store

logger = logging.getLogger(__name__)

FOLDER = ROWS = "lengths"  # of the store, and the tensor in its files
READS = 16  # runs of samples, or files of lengths, read at once
RUN = 64  # samples that a thread reads one after the other
DECIDING = {"template", "max_tokens", "max_images", "min_similarity"}  # values of a source
MOST_WORDS, LONGEST_WORD = 2**17, 32  # words, of so many characters, whose tokens are known at a time: some 30 MB
BETWEEN_WORDS = re.compile("(?<=[!-~]) (?=[!-~])")
WORDS = {  # how T5's tokenizer splits text, as tokenizer.json has it
    "type": "Sequence",
    "pretokenizers": [
        {"type": "WhitespaceSplit"},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    ],
}
TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer.model")  # files of a tokenizer's folder


@dataclass(frozen=True)
class Lengths:
    """Of N samples, int32 (N,) each. A sample that a rule leaves out, or that is broken, has no tokens."""

    encoder: NDArray[np.int32]  # tokens on the encoder's side, images not counted
    decoder: NDArray[np.int32]  # tokens that the decoder is to say
    images: NDArray[np.int32]
    words: NDArray[np.int32]  # of all turns, between spaces

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex."""
        return hashlib.sha256(np.stack([self.encoder, self.decoder, self.images, self.words]).tobytes()).hexdigest()


def goes_by_length(source: Source) -> bool:
    return source.order != "random"


def name_of(source: Source, language: Language) -> str:
    """Names the lengths of a source's samples by what decides them: its values, and the tokenizer's files or hub id.

    ConfigError where the tokenizer's file is missing.
    """
    deciding = [tokenizer_digest(language), source.model_dump(include=DECIDING)]
    text = json.dumps(deciding, sort_keys=True)
    return f"{source.template}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def tokenizer_digest(language: Language) -> str:
    """SHA-256 of the file that makes the tokenizer, or its hub id."""
    address = language.tokenizer or language.name
    folder, _, name = address.rpartition("/")
    if not address.endswith(".json"):
        found = [name for name in TOKENIZERS if (Path(address) / name).is_file()]
        if not found:
            return address
        folder, name = address, found[0]
    try:
        return hashlib.sha256(open_store(folder or ".").read(name)).hexdigest()
    except MissingKey:
        raise ConfigError(f"model.language.tokenizer: there is no {name} in {folder}") from None


def key_of(store: Store, shard: str, name: str) -> str:
    """Where a shard's lengths lie. MissingKey where its index is to say and is not there."""
    return f"{FOLDER}/{name}/{version(store, shard)}.safetensors"


# ---------------------------------------------------------------- counting


def shards_to_do(store: Store, shards: Sequence[str], name: str) -> list[str]:
    """The shards that have no lengths yet."""
    there = {entry.key for entry in store.list(f"{FOLDER}/{name}/")}
    return [shard for shard in shards if key_of(store, shard, name) not in there]


def count(store: Store, shards: Sequence[str], name: str, source: Source, tokenizer: Any) -> None:
    """Write the lengths of shards, each file whole; of samples only the text is read.

    BrokenShard, MissingKey and StoreError where a shard cannot be read.
    """
    from hpc_mm.data.batch import special_text

    reader, special, tokens = ShardReader(store, indexes=1), special_text(tokenizer), token_counter(tokenizer)
    with ThreadPoolExecutor(READS, FOLDER) as threads:
        for done, shard in enumerate(shards, 1):
            key = key_of(store, shard, name)  # before its samples are read: what replaces the shard has another key
            rows = [row_of(sample, source, special, tokens) for sample in texts_of(reader, shard, threads)]
            table = np.array(rows, dtype=np.int32).reshape(-1, 4)
            store.write(key, save({ROWS: table}, {"shard": shard}))
            logger.info("lengths of %s: %d samples (%d of %d shards)", shard, len(rows), done, len(shards))


def texts_of(reader: ShardReader, shard: str, threads: Executor) -> Iterator[Sample | None]:
    """The samples of a shard in order without the bytes of their images, a run for each thread read ahead."""
    size = len(reader.index(shard).keys)
    runs = [range(first, min(first + RUN, size)) for first in range(0, size, RUN)]
    read = partial(run_of, reader, shard)
    ahead = threads.map(read, runs[:READS])
    for first in range(READS, len(runs) + READS, READS):
        found, ahead = ahead, threads.map(read, runs[first : first + READS])
        yield from chain.from_iterable(found)


def run_of(reader: ShardReader, shard: str, numbers: range) -> list[Sample | None]:
    """These samples; None for one that is broken, as training finds it too and counts it."""
    found: list[Sample | None] = []
    for number in numbers:
        try:
            found.append(reader.read_text(shard, number))
        except BrokenShard as error:
            logger.warning("%s", error)
            found.append(None)
    return found


def row_of(
    sample: Sample | None, source: Source, special: re.Pattern[str], tokens: Callable[[str], int]
) -> tuple[int, int, int, int]:
    """A sample's columns. Where a template splits texts by chance, other epochs have about the same sum."""
    from hpc_mm.data.batch import LeftOut
    from hpc_mm.data.chat import chat_texts

    if sample is None:
        return 0, 0, 0, 0
    left_out = 0, 0, len(sample.images), sum(len(part.text.split()) for part in sample.parts if isinstance(part, Text))
    try:
        question, answer = chat_texts(sample, source, special, random.Random(sample.id))
    except LeftOut:
        return left_out
    *before, last = map(tokens, question.split(IMAGE_TOKEN))
    places = sum(before) + len(before)  # of the encoder, up to the last image
    if places > source.max_tokens:
        return left_out
    encoder, decoder = (min(size, source.max_tokens) for size in (places + last, tokens(answer)))
    return encoder - len(before), decoder, *left_out[2:]


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    """How many ids a text has with its end, as ``ended_ids`` makes them; of words that come again they are known.

    ConfigError where the tokenizer ends no text.
    """
    from hpc_mm.data.chat import ended_ids

    end = len(ended_ids("", tokenizer))  # after this call a fast tokenizer truncates nothing
    if not goes_by_word(tokenizer):
        return lambda text: len(ended_ids(text, tokenizer))
    encode = tokenizer.backend_tokenizer.encode

    def counted(text: str) -> int:
        return len(encode(text)) - end

    known = lru_cache(MOST_WORDS)(counted)

    def word(text: str) -> int:  # a passage without spaces would not come again
        return known(text) if len(text) <= LONGEST_WORD else counted(text)

    return lambda text: end + sum(map(word, text.split(" ") if text.isascii() else BETWEEN_WORDS.split(text)))


def goes_by_word(tokenizer: Any) -> bool:
    """Whether the ids of a text are those of its words one after another: it is split at white space first of all.

    Before that its normalizer may look at grapheme after grapheme, as sentencepiece's does; a space between two ASCII
    characters is one of its own. Added tokens are looked for even before, so none may have a space in it.
    """
    if not tokenizer.is_fast:
        return False
    made, normalizer = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.backend_tokenizer.normalizer
    by_grapheme = made["normalizer"] is None or made["normalizer"]["type"] == "Precompiled"
    added = (token["content"] for token in made["added_tokens"])
    no_space = not any(" " in (normalizer.normalize_str(text) if normalizer else text) + text for text in added)
    return by_grapheme and no_space and made["pre_tokenizer"] == WORDS


# ---------------------------------------------------------------- reading


def lengths_of(source: Source, language: Language) -> Lengths | None:
    """The lengths of all samples of a source, shard after shard; None where its order does not go by them.

    ConfigError where shards have none, or a file is none of theirs.
    """
    if not goes_by_length(source):
        return None
    store = open_store(source.data)
    shards, name = read_manifest(store), name_of(source, language)
    with ThreadPoolExecutor(READS, FOLDER) as threads:
        found = list(threads.map(partial(read_rows, store, name), shards))
    missing = [shard.name for shard, rows in zip(shards, found, strict=True) if rows is None]
    if missing:
        raise not_counted(source, missing, shards)
    return Lengths(*np.ascontiguousarray(np.concatenate([rows for rows in found if rows is not None]).T))


def read_rows(store: Store, name: str, shard: ShardInfo) -> NDArray[np.int32] | None:
    """(samples, 4) of a shard; None where it has none."""
    try:
        key = key_of(store, shard.name, name)
        data = store.read(key)
    except MissingKey:
        return None
    except StoreError as error:
        raise ConfigError(f"{store.address}: {error}") from None
    try:
        rows = load(data)[ROWS]
    except (SafetensorError, KeyError) as error:
        raise ConfigError(f"{store.address}/{key} cannot be read ({error}): remove it, and count again") from None
    if rows.shape != (shard.samples, 4) or rows.dtype != np.int32:
        raise ConfigError(
            f"{store.address}/{key} has {rows.dtype} {rows.shape}, not the lengths of {shard.samples} samples: remove "
            "it, and count again"
        )
    return rows


def check_lengths(source: Source, language: Language) -> None:
    """ConfigError where the order of a source goes by lengths that have not been counted."""
    if goes_by_length(source):
        store = open_store(source.data)
        shards = read_manifest(store)
        missing = shards_to_do(store, shards.names, name_of(source, language))
        if missing:
            raise not_counted(source, missing, shards)


def not_counted(source: Source, missing: Sequence[str], shards: Shards) -> ConfigError:
    return ConfigError(
        f"order={source.order} goes by lengths of samples, and {len(missing)} of {len(shards)} shards at {source.data} "
        "have none yet: python -m hpc_mm.measure with the same recipe=... or run=FOLDER counts them"
    )
