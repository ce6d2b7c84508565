"""Strings byte for byte as the specification of CLIP-FlanT5 has them: sections 2.1 and 2.2."""

import random
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_mm.config import Template
from hpc_mm.data.templates import (
    TEMPLATES,
    Turn,
    message,
    plain,
    t5_plain,
    t5_plain_split_text,
    t5_v1,
    t5_v1_question,
    v1,
)

ASKED = Turn("user", "What is this?", 1)
ANSWERED = Turn("assistant", "A red circle.")
TALK = [ASKED, ANSWERED, Turn("user", "Is it large?"), Turn("assistant", "No.")]

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def chance(name: object = 0) -> random.Random:
    return random.Random(str(name))


def test_every_template_of_the_configuration_is_there() -> None:
    assert set(TEMPLATES) == set(get_args(Template))


# ---------------------------------------------------------------- images before the text


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        (Turn("user", "What is this?", 1), "<image>\nWhat is this?"),
        (Turn("user", "\nWhat is this? ", 1), "<image>\nWhat is this?"),
        (Turn("user", "Which differs?", 2), "<image>\n<image>\nWhich differs?"),
        (Turn("user", "", 1), "<image>"),
        (Turn("user", " as it is\n"), " as it is\n"),
    ],
)
def test_message(turn: Turn, text: str) -> None:
    assert message(turn) == text


# ---------------------------------------------------------------- encoder-decoder


def test_t5_plain() -> None:
    assert t5_plain([ASKED, ANSWERED], chance()) == ("<image>", "A red circle.")


@pytest.mark.parametrize(
    ("caption", "splits"),
    [("", {0}), ("a", {0}), ("ab", {1}), ("abc", {1}), ("abcd", {1, 2}), ("a red star", {1, 2, 3, 4, 5})],
)
def test_t5_plain_split_text_splits_anywhere_in_the_first_half(caption: str, splits: set[int]) -> None:
    found = {t5_plain_split_text([ASKED, Turn("assistant", caption)], chance(i)) for i in range(100)}
    assert found == {(f"<image>{caption[:split]}", caption[split:]) for split in splits}


def test_splits_are_uniform() -> None:
    """5,000 draws of 10 splits: 500 each, deviation 21."""
    found = Counter(t5_plain_split_text([ASKED, Turn("assistant", "x" * 20)], chance(i))[0] for i in range(5000))
    assert len(found) == 10
    assert all(400 < count < 600 for count in found.values())


@given(caption=st.text(max_size=30), seed=st.integers(0, 100))
def test_a_split_loses_no_character(caption: str, seed: int) -> None:
    question, answer = t5_plain_split_text([ASKED, Turn("assistant", caption)], chance(seed))
    assert question + answer == f"<image>{caption}"


def test_t5_v1() -> None:
    assert t5_v1([ASKED, ANSWERED], chance()) == (
        f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: ",
        "A red circle.",
    )


def test_t5_v1_of_several_turns_answers_the_last_one() -> None:
    question = f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: A red circle. USER: Is it large? ASSISTANT: "
    assert t5_v1(TALK, chance()) == (question, "No.")
    assert t5_v1_question(TALK[:-1]) == question


def test_t5_v1_without_an_image() -> None:
    assert t5_v1_question([Turn("user", "Say yes.")]) == f"{SYSTEM} USER: Say yes. ASSISTANT: "


# ---------------------------------------------------------------- decoder-only


def test_plain() -> None:
    assert plain([ASKED, ANSWERED]) == [("<image>", False), ("A red circle.\n", True)]


def test_v1() -> None:
    segments = v1(TALK)
    assert "".join(text for text, _ in segments) == (
        f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: A red circle.</s>USER: Is it large? ASSISTANT: No.</s>"
    )
    assert [text for text, target in segments if target] == [" A red circle.</s>", " No.</s>"]
