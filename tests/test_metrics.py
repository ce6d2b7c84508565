"""Caption scores equal pycocoevalcap's, tokens those of its Java tokenizer."""

import gzip
import json
import os
import shutil
import tarfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from hpc_mm.metrics import cider, cider_each
from hpc_mm.ptb_tokenizer import tokenize

# ---------------------------------------------------------------- the oracle


@pytest.fixture(scope="session")
def java() -> None:
    if shutil.which("java") is None:
        if os.environ.get("HPC_MM_REQUIRE_CLUSTER") == "1":
            pytest.fail("HPC_MM_REQUIRE_CLUSTER=1, but there is no java on PATH")
        pytest.skip("no java on PATH; the oracle's tokenizer is written in it")


def oracle_tokens(captions: list[str]) -> list[list[str]]:
    found = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions)})
    return [found[i][0].split() for i in range(len(captions))]


def oracle_cider(candidates: list[list[str]], references: list[list[list[str]]]) -> tuple[float, np.ndarray]:
    truth = {i: [" ".join(words) for words in captions] for i, captions in enumerate(references)}
    return Cider().compute_score(truth, {i: [" ".join(words)] for i, words in enumerate(candidates)})


def assert_equal_tokens(captions: list[str]) -> None:
    for caption, ours, theirs in zip(captions, tokenize(captions), oracle_tokens(captions), strict=True):
        assert ours == theirs, caption


# ---------------------------------------------------------------- tokens

PIECES = {  # words, and how often one of them is drawn
    "a the man woman dog's dogs sitting on of street in front large red bus stop tennis court": 12,
    "John O'Brien McDonald's Coca-Cola iPhone USA NYC London St. Louis U.S. Dr. Smith": 2,
    "isn't can't don't it's he's they're we've I'm you'll she'd who's let's won't cannot gonna": 2,
    "2 10 3.5 1,000 50% $5 $4.99 1/2 10:30 5pm 1980's 80s 1st 22nd 6-year-old #1 No. 7 12/25/2014 2x4": 2,
    "black-and-white t-shirt X-ray state-of-the-art well-dressed up-to-date -- 3-4 and/or his/her": 2,
    "p.m. a.m. etc. vs. Mr. Mrs. e.g. i.e. Inc. Co. Jr. J. R. R. approx. ft. Ave. Jan. Mon. B&B R&B AT&T": 2,
    "\u201cSTOP\u201d don\u2019t it\u2019s \u2018no\u2019 caf\u00e9 jalape\u00f1o \u2013 \u2014 \u00bd 5\u00b0": 1,
}
MARKS = [",", ".", "!", "?", ";", ":", "...", "!!", "?!", ")", '"', "'", ".)", '."', "'s", ".'"]
OPENINGS = ['"', "'", "(", "``", "[", "$", "#", "-"]


def written(random: Random) -> str:
    """A line as people type captions: any order, but each piece an ordinary one."""
    pieces = []
    for _ in range(random.randint(0, 14)):
        word = random.choice(random.choices(list(PIECES), list(PIECES.values()))[0].split())
        word = random.choice(OPENINGS) + word if random.random() < 0.05 else word
        word = word + random.choice(MARKS) if random.random() < 0.15 else word
        word = word.capitalize() if random.random() < 0.1 else word
        pieces.append(word.upper() if random.random() < 0.03 else word)
    return " ".join(pieces)


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


# ---------------------------------------------------------------- CIDEr

captions = st.lists(st.sampled_from(["a", "red", "cat", "dog", "runs", "far"]), max_size=9).map(" ".join)
images = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=5)), min_size=1, max_size=8)


@settings(deadline=None)
@given(images)
def test_cider_equals_the_oracle(scored: list[tuple[str, list[str]]]) -> None:
    assume(any(caption for _, truth in scored for caption in truth))  # the oracle cannot count no words at all
    candidates, references = [list(column) for column in zip(*scored, strict=True)]
    split = [[caption.split() for caption in truth] for truth in references]
    mean, each = oracle_cider([caption.split() for caption in candidates], split)
    np.testing.assert_allclose(cider_each(candidates, references), each, rtol=0, atol=1e-9)
    assert cider(candidates, references) == pytest.approx(mean, rel=0, abs=1e-9)


def test_cider_with_the_oracles_own_tokens(java: None) -> None:
    random = Random(1)
    references = [[written(random) for _ in range(5)] for _ in range(200)]
    candidates = [random.choice([random.choice(truth), written(random)]) for truth in references]
    tokens = oracle_tokens([caption for truth in references for caption in truth])
    mean, _ = oracle_cider(oracle_tokens(candidates), [tokens[5 * i : 5 * i + 5] for i in range(200)])
    assert cider(candidates, references) == pytest.approx(mean, rel=0, abs=1e-9)


def test_cider_of_the_only_reference_is_ten() -> None:
    references = [["a red cat runs far away"], ["two dogs sleep under trees"]]
    assert cider([truth[0] for truth in references], references) == pytest.approx(10)


@pytest.mark.parametrize(("candidates", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_cider_needs_a_candidate_and_a_reference_per_image(candidates: list[str], references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="needs one, and a reference"):
        cider(candidates, references)
