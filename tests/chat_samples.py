"""Chats that tests start from, and a small T5 tokenizer."""

import random
import string
from functools import cache
from typing import Any

import samples
from transformers import T5TokenizerFast

from hpc_mm.data.schema import Image, Sample, Text


@cache
def t5_tokenizer() -> Any:
    """transformers' own T5 tokenizer over whole words and single characters: pad 0, end 1."""
    words = ["Yes", "USER", "ASSISTANT", *samples.WORDS]
    pieces = [(f"▁{word}", -2.0) for word in dict.fromkeys(words)]
    characters = [(piece, -9.0) for piece in ["▁", *string.ascii_letters, *string.digits, *string.punctuation]]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=special + pieces + characters)


def image(number: int, role: str = "", **facts: Any) -> Image:
    return Image(samples.encoded(samples.picture(number)), facts=facts, role=role)


def chat(number: int, questions: int = 1, images: int = 1) -> Sample:
    """Questions and answers; images stand in the first question, after its text."""
    draw = random.Random(number)
    parts: list[Any] = []
    for place in range(questions):
        parts.append(Text(samples.sentence(draw), "user"))
        if place == 0:
            parts += [image(100 * number + i, "user") for i in range(images)]
        parts.append(Text(samples.sentence(draw), "assistant"))
    return Sample(f"chat{number:05d}", tuple(parts))
