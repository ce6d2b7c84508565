"""Tokens are those of pycocoevalcap's Java tokenizer."""

import gzip
import json
import tarfile
from pathlib import Path
from random import Random

import pytest
from captions import oracle_tokens, written

from hpc_mm.ptb_tokenizer import tokenize


def assert_equal_tokens(captions: list[str]) -> None:
    for caption, ours, theirs in zip(captions, tokenize(captions), oracle_tokens(captions), strict=True):
        assert ours == theirs, caption


def test_tokens_of_written_captions(java: None) -> None:
    random = Random(0)
    assert_equal_tokens([written(random) for _ in range(5000)])


def test_tokens_of_real_captions(java: None, shared_data: Path) -> None:
    with tarfile.open(shared_data / "cc12m-32.tar") as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".txt")]
        captions = [file.read().decode() for file in files if file]
    with gzip.open(shared_data / "textvqa_val_questions.json.gz") as file:
        captions += [question["question"] for question in json.load(file)["questions"]]
    assert len(captions) == 5032
    assert_equal_tokens(captions)


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man isn't riding his friend's bike.", "a man is n't riding his friend 's bike"),
        ('The sign says "Stop!" (in red)', "the sign says stop -lrb- in red -rrb-"),
        ("1,000 people -- at 10:30 p.m. -- in the U.S.", "1,000 people at 10:30 p.m. in the u.s."),
        ("a black-and-white, 3.5-inch photo...", "a black-and-white 3.5-inch photo"),
        ("She cannot\nwin \U0001f600", "she can not win"),
        ("", ""),
    ],
)
def test_tokens_by_hand(caption: str, tokens: str) -> None:
    assert tokenize([caption]) == [tokens.split()]


def test_an_initial_before_the_next_captions_sentence() -> None:
    assert tokenize(["plan B.", "The dog"]) == [["plan", "b"], ["the", "dog"]]
    assert tokenize(["plan B.", "red dog"]) == [["plan", "b."], ["red", "dog"]]


def test_each_character_of_every_script(java: None) -> None:
    """All of the Basic Multilingual Plane but white space, controls and the digits that Unicode gained since."""
    characters = [chr(i) for i in range(0x21, 0x10000) if not 0x7F <= i < 0xA0 and not 0xD800 <= i < 0xE000]
    characters = [each for each in characters if not each.isspace() and each not in "\ufeff\u2028\u2029`\u058a"]
    found = oracle_tokens([f"do{each}ox" for each in characters])
    ours = tokenize([f"do{each}ox" for each in characters])
    differ = [each for each, a, b in zip(characters, ours, found, strict=True) if a != b]
    assert all(each.isdecimal() for each in differ)
    assert len(differ) < 50


@pytest.mark.parametrize(
    "captions",
    [
        ["1 1/2", "plan B.", "<b x> y", "(555) 123 4567", "no. 7"],  # each has a part that depends on what is beside it
        ["plan A.", "", "The dog", "fig.", "7 dogs"],
    ],
)
def test_words_beside_each_other(java: None, captions: list[str]) -> None:
    assert_equal_tokens(captions)


@pytest.mark.parametrize("last", ["who're", "she'll", "the dog's", "a smile :)", "plan B.", "no. 7", "1 1/2"])
def test_the_end_of_the_text(java: None, last: str) -> None:
    assert_equal_tokens(["a dog", last])


def test_no_captions() -> None:
    assert tokenize([]) == []


@pytest.mark.chaos
def test_tokens_of_a_hundred_thousand_captions(java: None) -> None:
    random = Random(2)
    assert_equal_tokens([written(random) for _ in range(100_000)])
