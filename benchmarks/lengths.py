"""Counting the tokens of chats: ours from shards, beside a tokenizer's call for one text after another from memory.

    python benchmarks/lengths.py [samples=10000] [rounds=3]

Chats of 3 to 5 questions and answers, two of three with an image, of words drawn by Zipf's law from 20,000, with full
stops and capitals; the tokenizer is T5's over pieces of them. One core, processor time, the median of rounds that
take turns, each of which begins with nothing known. The peer has the texts of encoder and decoder ready in memory, as
LLaVA has its JSON, of which it counts words. Ends with an error where the lengths differ.
"""

import os
import random
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from statistics import median
from typing import Any

import numpy as np
from transformers import T5TokenizerFast

from hpc_mm.config import IMAGE_TOKEN, Language, Source, parse_arguments
from hpc_mm.data.batch import special_text
from hpc_mm.data.chat import chat_texts
from hpc_mm.data.lengths import count, lengths_of, name_of, texts_of
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.shards import ShardReader, ShardWriter, read_manifest
from hpc_mm.data.store import Store, open_store

WORDS, SHARD_BYTES = 20_000, 8 << 20
LANGUAGE = Language(name="t5")


class Corpus:
    """All that is drawn."""

    def __init__(self) -> None:
        self.draw = random.Random(0)
        often = [1 / (1 + place) for place in range(26)]
        letters = "etaoinshrdlcumwfgypbvkjxqz"
        lengths = (min(max(round(self.draw.gauss(5, 2.5)), 1), 14) for _ in range(WORDS))
        self.words = ["".join(self.draw.choices(letters, often, k=length)) for length in lengths]
        self.often = list(accumulate(1 / (3 + place) for place in range(WORDS)))

    def text(self, median: float, end: str) -> str:
        """Sentences of 6 to 20 words."""
        left, sentences = max(2, int(median * self.draw.lognormvariate(0, 0.7))), []
        while left > 0:
            words = self.draw.choices(self.words, cum_weights=self.often, k=min(left, self.draw.randint(6, 20)))
            sentences.append(" ".join(words).capitalize())
            left -= len(words)
        return ". ".join(sentences) + end

    def chat(self, number: int) -> Sample:
        parts: list[Any] = [Image(b"\xff\xd8", role="user")] * (number % 3 > 0)
        for _ in range(self.draw.randint(3, 5)):
            parts += [Text(self.text(11, "?"), "user"), Text(self.text(40, "."), "assistant")]
        return Sample(f"chat{number:06d}", tuple(parts))

    def tokenizer(self) -> Any:
        """The more frequent half of the words, and pieces of all."""
        pieces = {f"▁{word}": -5 - place**0.5 / 20 for place, word in enumerate(self.words[: WORDS // 2])}
        for word in self.words:
            for start in range(len(word)):
                for end in range(start + 2, min(len(word), start + 4) + 1):
                    pieces.setdefault(word[start:end], -11.0)
        pieces |= {character: -14.0 for character in ("▁", *string.printable.strip())}
        return T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces.items()])


def texts(store: Store, source: Source, tokenizer: Any) -> Iterator[tuple[str, str]]:
    """The encoder's and the decoder's of every chat."""
    special, reader = special_text(tokenizer), ShardReader(store, indexes=1)
    with ThreadPoolExecutor(1) as thread:
        for shard in read_manifest(store).names:
            for sample in texts_of(reader, shard, thread):
                assert sample is not None
                yield chat_texts(sample, source, special, random.Random(sample.id))


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    arguments, corpus = parse_arguments(sys.argv[1:]), Corpus()
    samples, tokenizer = int(arguments.get("samples", "10000")), corpus.tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        source = Source(data=folder, form="chat", template="t5_v1", order="length", batch=1, max_tokens=2048)
        store, name = open_store(folder), name_of(source, LANGUAGE)
        with ShardWriter(store, "chats", max_bytes=SHARD_BYTES) as writer:
            for number in range(samples):
                writer.add(corpus.chat(number))
        shards, memory = read_manifest(store).names, list(texts(store, source, tokenizer))

        def one_by_one() -> list[list[int]]:
            return [
                [
                    sum(len(tokenizer(chunk).input_ids) for chunk in question.split(IMAGE_TOKEN)),
                    len(tokenizer(answer).input_ids),
                ]
                for question, answer in memory
            ]

        times: dict[str, list[float]] = {"peer": [], "ours": [], "reading": []}
        for _ in range(int(arguments.get("rounds", "3"))):
            spent, expected = seconds(one_by_one)
            times["peer"].append(spent)
            times["ours"].append(seconds(lambda: count(store, shards, name, source, tokenizer))[0])
            times["reading"].append(seconds(lambda: sum(1 for _ in texts(store, source, tokenizer)))[0])
        found = lengths_of(source, LANGUAGE)
        assert found is not None
        if (np.minimum(expected, source.max_tokens) != np.stack([found.encoder, found.decoder], axis=1)).any():
            sys.exit("the lengths differ")
    peer, ours, reading = (median(found) for found in times.values())
    print(f"chats of {np.mean(np.sum(expected, axis=1)):.0f} tokens, samples per second of one core")
    print(f"  tokenizer, one text after another, from memory{samples / peer:10.0f}")
    print(f"  hpc_mm, from shards                           {samples / ours:10.0f}, {peer / ours:.1f} times")
    print(f"  reading, JSON and templates take {reading / ours:.0%} of that")


if __name__ == "__main__":
    main()
