"""Answers are brought into the form that OpenFlamingo's and lmms-eval's own code compares."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from peers import peer

from hpc_mm.config import ConfigError
from hpc_mm.rules import EXPANDED, LMMS_EVAL, LMMS_EVAL_VQAV2, OPENFLAMINGO, RULES, VLMEVALKIT, official, rules_of

PIECES = (
    "yes no two Two none Ten red the a An THE it's its isnt Im dont couldntve couldn'tve somebody'd lets let's she's "
    "'ow'sat ow's'at twas o'clock 3 3.5 .5 5. 1,000 1,,000 10:30 50% $5 black-and-white t-shirt coca_cola a/b U.S. "
    "mr. e.g. (left) [x] {y} 'quoted' \"said\" don\u2019t caf\u00e9 \u0663,\u0664 \u00bd \u4f60\u597d a.b.c ... -- ?! "
    "` @ < > = + \\ ; ,"
)
WORDS = PIECES.split()
SPACES = [" ", " ", " ", " ", "", ", ", "  ", "\n", "\t", ". ", "? ", "-"]


def written(random: Random) -> str:
    pieces = [piece for _ in range(random.randint(0, 5)) for piece in (random.choice(WORDS), random.choice(SPACES))]
    return "".join(pieces)


def assert_equal_forms(random: Random, cases: int) -> None:
    flamingo, lmms = oracles()
    for _ in range(cases):
        text = written(random)
        assert official(text) == flamingo(text), text
        assert VLMEVALKIT.compared(text) == flamingo(text), text
        assert LMMS_EVAL.compared(text) == lmms(text), text
        commas = lmms.process_digit_article(
            lmms.process_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
        )
        assert LMMS_EVAL_VQAV2.compared(text) == commas, text


def oracles() -> tuple[Callable[[str], str], Any]:
    evaluation = peer("open_flamingo", "eval/vqa_metric.py").VQAEval(None, None)

    def flamingo(text: str) -> str:
        text = text.replace("\n", " ").replace("\t", " ").strip()
        return evaluation.processDigitArticle(evaluation.processPunctuation(text))

    return flamingo, peer("lmms_eval", "tasks/_task_utils/vqa_eval_metric.py").EvalAIAnswerProcessor()


def test_forms_equal_the_oracles() -> None:
    assert_equal_forms(Random(0), 5000)


@pytest.mark.chaos
def test_a_hundred_thousand_forms() -> None:
    assert_equal_forms(Random(1), 100_000)


def test_contractions_are_those_of_the_official_list() -> None:
    official_list = peer("open_flamingo", "eval/vqa_metric.py").VQAEval(None, None).contractions
    expected = {key: word for key, word in official_list.items() if key == key.lower() and key != word}
    assert expected == EXPANDED


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The two dogs", "2 dogs"),
        ("1,000 men", "1000 men"),
        ("black-and-white", "black and white"),
        ("black- white", "black white"),
        ("U.S.", "us"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("dont", "don't"),
        ("somebody'd", "somebodyd"),
        (" " + "." * 40, "." * 8),  # 32 full stops at most
        ("", ""),
    ],
)
def test_the_official_form_by_hand(text: str, form: str) -> None:
    assert official(text) == form


def test_what_a_model_wrote_is_cut() -> None:
    flamingo = peer("open_flamingo", "eval/vqa_metric.py")
    for text in ["red Question: what", "a, b, c", "Short", "blueAnswer", "no cut,here", "1, 2 Question", ""]:
        assert OPENFLAMINGO.answer(text) == flamingo.postprocess_vqa_generation(text)
        assert LMMS_EVAL.answer(text) == VLMEVALKIT.answer(text) == text
    assert OPENFLAMINGO.caption('a "red" cat Output: b Output') == "a red cat "
    assert VLMEVALKIT.caption('"a" Output') == '"a" Output'


def test_rules_by_name() -> None:
    assert [rules_of(name).name for name in RULES] == ["openflamingo", "lmms-eval", "vlmevalkit"]
    assert rules_of("lmms-eval", "vqav2") is LMMS_EVAL_VQAV2
    assert rules_of("openflamingo", "vqav2") is OPENFLAMINGO
    with pytest.raises(ConfigError, match="rules=lmms are not known: openflamingo, lmms-eval, vlmevalkit"):
        rules_of("lmms")
