"""Chats as the exact strings that LLaVA and CLIP-FlanT5 are trained on, and which of their parts are targets."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hpc_mm.config import IMAGE_TOKEN, Template

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'  # VQAScore's, of a caption (arXiv 2404.01291)
SPEAKERS = {"user": "USER", "assistant": "ASSISTANT"}
END = "</s>"  # closes an answer of v1; the end token of LLaMA, whose tokenizer reads it as that

Segment = tuple[str, bool]  # text, and whether its tokens are targets


class Turn(NamedTuple):
    """One message of a chat, without the marks of its images."""

    role: str  # a key of SPEAKERS
    text: str
    images: int = 0


def message(turn: Turn) -> str:
    """A turn's text with the marks of its images, which all come first whatever their places were."""
    return (f"{IMAGE_TOKEN}\n" * turn.images + turn.text.strip()).strip() if turn.images else turn.text


# ---------------------------------------------------------------- encoder-decoder: (the encoder's text, the target)


def t5_plain(turns: Sequence[Turn], chance: random.Random) -> tuple[str, str]:
    """A caption from its image alone; what the user says is not used."""
    question, answer = turns
    return IMAGE_TOKEN * question.images, answer.text


def t5_plain_split_text(turns: Sequence[Turn], chance: random.Random) -> tuple[str, str]:
    """The rest of a caption from its image and its first characters: 1 to half of them, each number as likely."""
    question, answer = turns
    split = chance.randint(1, len(answer.text) // 2) if len(answer.text) >= 2 else 0
    return IMAGE_TOKEN * question.images + answer.text[:split], answer.text[split:]


def t5_v1(turns: Sequence[Turn], chance: random.Random) -> tuple[str, str]:
    """The last answer from all that was said before it."""
    return t5_v1_question(turns[:-1]), turns[-1].text


def t5_v1_question(turns: Sequence[Turn]) -> str:
    """The encoder's text of ``t5_v1``: what was said, up to the answer that is to come."""
    said = "".join(f"{SPEAKERS[turn.role]}: {message(turn)} " for turn in turns)
    return f"{SYSTEM} {said}{SPEAKERS['assistant']}: "


TEMPLATES: dict[Template, Callable[[Sequence[Turn], random.Random], tuple[str, str]]] = {
    "t5_plain_split_text": t5_plain_split_text,
    "t5_plain": t5_plain,
    "t5_v1": t5_v1,
}


# ---------------------------------------------------------------- decoder-only: segments, whose texts join to the row's


def plain(turns: Sequence[Turn]) -> list[Segment]:
    """A caption after its image; what the user says is not used."""
    question, answer = turns
    return [(IMAGE_TOKEN * question.images, False), (f"{answer.text}\n", True)]


def v1(turns: Sequence[Turn]) -> list[Segment]:
    """Every answer with its end; the blank before an answer is part of its first token."""
    segments: list[Segment] = []
    before = f"{SYSTEM} "
    for turn in turns:
        if turn.role == "user":
            before += f"{SPEAKERS['user']}: {message(turn)} "
        else:
            segments += [(f"{before}{SPEAKERS['assistant']}:", False), (f" {message(turn)}{END}", True)]
            before = ""
    return segments
