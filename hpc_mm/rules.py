"""By whose rules answers and captions are scored: OpenFlamingo's, lmms-eval's or VLMEvalKit's.

The same predictions score differently under the three, so a score says by which it was made. Each set of rules cuts and
cleans what a model wrote, and brings answers into the form in which they are compared. All three leave one annotator
out by index here; OpenFlamingo and lmms-eval's VQAv2 do it by comparing dictionaries, which is the same where answers
have an ``answer_id`` and wrong where they have none (VizWiz).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from hpc_mm.config import ConfigError

Change = Callable[[str], str]

# ---------------------------------------------------------------- what the VQA challenge compares

PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!')
COMMAS_IN_NUMBER = re.compile(r"\d,+\d")
COMMA_IN_NUMBER = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")  # meant to spare a digit before it too, but the official expression does not
MOST_FULL_STOPS = 32  # the official code hands re.UNICODE over as the number of replacements
NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"},
    **{"seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
ARTICLES = frozenset(["a", "an", "the"])
# Contractions of the official list (https://visualqa.org/evaluation.html). Each is found with one apostrophe left out.
# "let's" and "she's" are on it unchanged, words with a capital are never found: neither needs a place here.
CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
EXPANDED = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTIONS.split()
    for place, character in enumerate(word)
    if character == "'"
}
EXPANDED["somebody'd"] = "somebodyd"  # turned round on the official list


def official(text: str, comma: re.Pattern[str] = COMMA_IN_NUMBER) -> str:
    """An answer as the VQA challenge compares it, quirks included: without punctuation, small letters, digits for the
    words up to ten, no articles, contractions with their apostrophes.

    A punctuation mark vanishes where it stands beside a space somewhere, or where the answer has a number with a comma;
    else it becomes a space. Source: the evaluation code of visualqa.org as OpenFlamingo has it (vqa_metric.py).
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    marks = PUNCTUATION.intersection(text)
    if marks:
        numeric = comma.search(text) is not None
        text = text.translate({ord(m): "" if numeric or f"{m} " in text or f" {m}" in text else " " for m in marks})
    if "." in text:
        text = FULL_STOP.sub("", text, count=MOST_FULL_STOPS)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(EXPANDED.get(word, word) for word in words if word not in ARTICLES)


def _lmms(text: str) -> str:
    """As lmms-eval's answer processor: commas and question marks go first, and 's becomes a word."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return official(text, COMMAS_IN_NUMBER)


# ---------------------------------------------------------------- three sets of rules

VERSION = 1  # of these rules and of the metrics that use them: a change that moves a score makes it another protocol


def _unchanged(text: str) -> str:
    return text


def _caption_before_next(text: str) -> str:
    return text.split("Output", 1)[0].replace('"', "")


def _answer_before_next(text: str) -> str:
    return re.split("Question|Answer|Short", text, maxsplit=1)[0].split(", ", 1)[0]


@dataclass(frozen=True)
class Rules:
    """How what a model wrote is cleaned and compared."""

    name: str
    caption: Change = _unchanged  # from what the model wrote to a caption
    treebank: bool = True  # captions are split by the Penn Treebank tokenizer, or else at white space
    answer: Change = _unchanged  # from what the model wrote to an answer
    compared: Change = official  # from that, or from an annotator's answer, to the form that is compared
    stems: bool = False  # predictions for OK-VQA are stemmed in between


# evaluate.py, coco_metric.py, vqa_metric.py of OpenFlamingo 2.0: annotators' answers are always normalised.
OPENFLAMINGO = Rules("openflamingo", caption=_caption_before_next, answer=_answer_before_next, stems=True)
# lmms_eval/tasks/{textvqa,ok_vqa,vizwiz_vqa,coco_cap}/utils.py and _task_utils/vqa_eval_metric.py of lmms-eval 0.7.
LMMS_EVAL = Rules("lmms-eval", compared=_lmms)
# lmms_eval/tasks/vqav2/utils.py of 0.7; earlier versions normalised only where the annotators' answers differed.
LMMS_EVAL_VQAV2 = replace(LMMS_EVAL, compared=partial(official, comma=COMMAS_IN_NUMBER))
# vlmeval/dataset/{image_vqa,image_caption}.py and utils/vqa_eval.py: nothing is cut, captions are not tokenised.
VLMEVALKIT = Rules("vlmevalkit", treebank=False)
RULES = {rules.name: rules for rules in (OPENFLAMINGO, LMMS_EVAL, VLMEVALKIT)}


def rules_of(name: str, benchmark: str = "") -> Rules:
    """The rules of that name for a benchmark ("vqav2" has its own in lmms-eval); an unknown name is a ConfigError."""
    if name not in RULES:
        raise ConfigError(f"rules={name} are not known: {', '.join(RULES)}")
    return LMMS_EVAL_VQAV2 if (name, benchmark) == ("lmms-eval", "vqav2") else RULES[name]
