"""CIDEr-D, BLEU and ROUGE-L equal pycocoevalcap's."""

from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from captions import oracle_tokens, written
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from hpc_mm import caption_metrics
from hpc_mm.caption_metrics import bleu, bleu_each, caption_scores, cider, cider_each, rouge_l, rouge_l_each
from hpc_mm.rules import LMMS_EVAL, OPENFLAMINGO, VLMEVALKIT, Rules

SCORES = ["cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]
Scores = dict[str, tuple[float, Sequence[float]]]


def oracle(candidates: list[str], references: list[list[str]]) -> Scores:
    """Each score of the set and of its images, from text whose words are already apart."""
    truth, ours = dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)}
    columns = zip(*Bleu(4).compute_score(truth, ours, verbose=0), strict=True)
    scores = [Cider().compute_score(truth, ours), *columns, Rouge().compute_score(truth, ours)]
    return dict(zip(SCORES, scores, strict=True))


def assert_equal_scores(ours: Scores, theirs: Scores) -> None:
    for name in SCORES:
        assert ours[name][0] == pytest.approx(theirs[name][0], rel=0, abs=1e-9), name
        np.testing.assert_allclose(ours[name][1], theirs[name][1], rtol=0, atol=1e-9, err_msg=name)


captions = st.lists(st.sampled_from(["a", "red", "cat", "dog", "runs", "far"]), max_size=9).map(" ".join)
images = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=5)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=100)
@given(images)
def test_scores_equal_the_oracle(scored: list[tuple[str, list[str]]]) -> None:
    assume(any(caption for _, truth in scored for caption in truth))  # the oracle cannot count no words at all
    candidates, references = [list(column) for column in zip(*scored, strict=True)]
    assert_equal_scores(caption_scores(candidates, references), oracle(candidates, references))


def drawn(random: Random, images: int) -> tuple[list[str], list[list[str]]]:
    references = [[written(random) for _ in range(random.randint(1, 6))] for _ in range(images)]
    return [random.choice([random.choice(truth), written(random)]) for truth in references], references


def assert_equal_with_the_oracles_tokens(random: Random, images: int) -> None:
    candidates, references = drawn(random, images)
    found = iter([" ".join(tokens) for tokens in oracle_tokens([text for truth in references for text in truth])])
    truth = [[next(found) for _ in captions] for captions in references]
    theirs = oracle([" ".join(tokens) for tokens in oracle_tokens(candidates)], truth)
    assert_equal_scores(
        caption_scores(candidates, references, LMMS_EVAL), theirs
    )  # rules that leave captions as they are


def test_scores_with_the_oracles_own_tokens(java: None) -> None:
    assert_equal_with_the_oracles_tokens(Random(1), 800)


@pytest.mark.chaos
def test_scores_of_a_hundred_thousand_captions(java: None) -> None:
    random = Random(3)
    for _ in range(10):
        assert_equal_with_the_oracles_tokens(random, 2500)


def test_without_tokens_as_vlmevalkit_scores() -> None:
    candidates, references = drawn(Random(4), 300)
    candidates = [f" {text}" if i % 7 else text.replace(" ", "  \n", 1) for i, text in enumerate(candidates)]
    assert_equal_scores(caption_scores(candidates, references, VLMEVALKIT), oracle(candidates, references))


def test_one_score_alone_is_that_of_all() -> None:
    candidates, references = drawn(Random(5), 50)
    found = caption_scores(candidates, references)
    assert cider(candidates, references) == found["cider"].score
    assert rouge_l(candidates, references) == found["rouge_l"].score
    assert bleu(candidates, references).tolist() == [found[f"bleu_{n}"].score for n in range(1, 5)]
    np.testing.assert_array_equal(cider_each(candidates, references), found["cider"].each)
    np.testing.assert_array_equal(rouge_l_each(candidates, references), found["rouge_l"].each)
    np.testing.assert_array_equal(bleu_each(candidates, references)[:, 3], found["bleu_4"].each)


def test_what_the_model_wrote_is_cut_by_the_rules() -> None:
    references = [["a red cat runs"], ["two dogs sleep"]]
    wrote = ['a "red" cat runs Output: a dog', "two dogs sleep"]
    assert caption_scores(wrote, references)["cider"].score == pytest.approx(
        cider(["a red cat runs", wrote[1]], references)
    )
    assert caption_scores(wrote, references, VLMEVALKIT)["rouge_l"].score < 1


@pytest.mark.parametrize("rules", [OPENFLAMINGO, VLMEVALKIT], ids=lambda rules: rules.name)
def test_an_images_score_is_the_same_bits_whichever_are_scored_beside_it(rules: Rules) -> None:
    candidates, references = drawn(Random(6), 60)
    whole = caption_scores(candidates, references, rules)["cider"].each
    benchmark = caption_metrics.Cider(references, rules)
    words = benchmark.words(candidates)
    for images in (range(60), range(20), [59, 3, 41], [7]):
        part = benchmark.each([words[image] for image in images], images)
        np.testing.assert_array_equal(part, whole[list(images)])
    assert not np.allclose(whole[:20], cider_each(candidates[:20], references[:20]))


def test_cider_of_the_only_reference_is_ten() -> None:
    references = [["a red cat runs far away"], ["two dogs sleep under trees"]]
    assert cider([truth[0] for truth in references], references) == pytest.approx(10)


def test_scores_by_hand() -> None:
    candidates, references = ["the cat sat"], [["the cat lay down", "a cat sat"]]
    # unigrams 3 of 3, bigrams 2 of 2; the closer reference is as long as the candidate
    assert bleu(candidates, references)[:2] == pytest.approx([1, 1])
    precision = recall = 2 / 3
    assert rouge_l(candidates, references) == pytest.approx(
        (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    )


@pytest.mark.parametrize(("candidates", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_a_candidate_and_a_reference_per_image(candidates: list[str], references: list[list[str]]) -> None:
    for score in (cider, bleu, rouge_l, caption_scores):
        with pytest.raises(ValueError, match="needs one, and a reference"):
            score(candidates, references)
