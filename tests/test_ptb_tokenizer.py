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
