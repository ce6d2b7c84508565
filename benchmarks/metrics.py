"""Seconds to score captions, answers and ratings: ours beside pycocoevalcap, OpenFlamingo's code and a definition.

    python benchmarks/metrics.py [images=5000] [questions=214354] [rated=5000] [rounds=3]

Captions: five references per image, words as frequent as in English (Zipf), with capitals, full stops, commas, quotes
and hyphens. pycocoevalcap's side includes its Java program that splits them, once for all three in the last line.
Answers: ten per question, tens of thousands of different ones; the peer is VQAEval.evaluate of open_flamingo, which is
the code of other evaluation suites too. Ratings: eight images per prompt, scores that tie nowhere; the definition tries
every eps on all pairs, with numpy, on a part of the prompts. Both sides' scores are compared. The best round counts;
open_flamingo and the definition have only one.
"""

import contextlib
import importlib.util
import io
import sys
import time
import warnings
from collections.abc import Callable
from itertools import islice, product
from string import ascii_lowercase
from typing import Any

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from hpc_mm import metrics
from hpc_mm.config import parse_arguments

WORDS, REFERENCES, ANSWERS = 12_000, 5, 10  # different words; per image; per question
DIFFERENT = 100_000  # answers of VQAv2
RATED, BY_DEFINITION = 8, 500  # images per prompt; prompts


def words(count: int) -> list[str]:
    """Different words of four small letters."""
    return ["".join(letters) for letters in islice(product(ascii_lowercase, repeat=4), count)]


def drawn(generator: np.random.Generator, kinds: int, shape: tuple[int, ...]) -> Any:
    chances = 1 / np.arange(1, kinds + 1)
    return generator.choice(kinds, shape, p=chances / chances.sum())


def captions(generator: np.random.Generator, count: int) -> list[str]:
    vocabulary = words(WORDS)
    lengths = np.clip(generator.normal(10.5, 2.4, count).astype(int), 5, 40)
    chosen = iter(drawn(generator, WORDS, (int(lengths.sum()),)).tolist())
    written = []
    for length in lengths.tolist():
        line = [vocabulary[next(chosen)] for _ in range(length)]
        mark = generator.integers(0, 20)
        line[1] += {0: ",", 1: "'s", 2: f"-{line[2]}"}.get(int(mark), "")
        line[2] = f'"{line[2]}"' if mark == 3 else line[2]
        written.append(" ".join(line).capitalize() + ("." if mark > 5 else ""))
    return written


def best(rounds: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest round, and what the last gave. What the peer prints is not shown."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            found = work()
        seconds.append(time.perf_counter() - started)
    return min(seconds), found


def line(name: str, ours: float, theirs: float, peer: str) -> None:
    print(f"{name:34}{ours:8.2f} s{theirs:8.2f} s{theirs / ours:8.1f} times {peer}", flush=True)


def of_captions(images: int, rounds: int) -> None:
    generator = np.random.default_rng(0)
    lines = iter(captions(generator, images * (REFERENCES + 1)))
    candidates = [next(lines) for _ in range(images)]
    references = [[next(lines) for _ in range(REFERENCES)] for _ in range(images)]

    def tokens() -> tuple[Any, Any]:
        truth = {i: [{"caption": text} for text in texts] for i, texts in enumerate(references)}
        return PTBTokenizer().tokenize(truth), PTBTokenizer().tokenize(
            {i: [{"caption": text}] for i, text in enumerate(candidates)}
        )

    splitting, split = best(rounds, tokens)
    scorers = {"cider": Cider(), "bleu": Bleu(4), "rouge_l": Rouge()}
    theirs = {
        name: best(rounds, lambda scorer=scorer: scorer.compute_score(*split)) for name, scorer in scorers.items()
    }
    for name, function in {"cider": metrics.cider, "bleu": metrics.bleu, "rouge_l": metrics.rouge_l}.items():
        ours, score = best(rounds, lambda function=function: function(candidates, references))
        seconds, (expected, _) = theirs[name]
        np.testing.assert_allclose(score, expected, rtol=0, atol=1e-9)
        line(f"{name}, {images:,} x {REFERENCES} captions", ours, splitting + seconds, "pycocoevalcap")
    ours, _ = best(rounds, lambda: metrics.caption_scores(candidates, references))
    line("all three, one tokenisation", ours, splitting + sum(found[0] for found in theirs.values()), "pycocoevalcap")


def of_answers(questions: int, rounds: int) -> None:
    generator = np.random.default_rng(1)
    pieces, options = words(DIFFERENT), drawn(generator, DIFFERENT, (questions, 3))
    chosen = np.take_along_axis(options, generator.choice(3, (questions, ANSWERS), p=[0.6, 0.3, 0.1]), axis=1)
    forms = ("{}", "{} {}", "The {}", "{}, {}", "{}-{}", "{}'s", "2 {}", "{} {} {}")
    kinds = [forms[index % len(forms)].format(word, word, word) for index, word in enumerate(pieces)]
    answers = [[kinds[index] for index in row] for row in chosen.tolist()]
    predictions = [kinds[index] for index in options[:, 0].tolist()]
    ours, found = best(rounds, lambda: metrics.vqa_accuracy_each(predictions, answers))
    theirs, expected = best(1, lambda: flamingo(predictions, answers))
    np.testing.assert_allclose(100 * found, expected, rtol=0, atol=1e-9)
    line(f"VQA accuracy, {questions:,} questions", ours, theirs, "open_flamingo")


def flamingo(predictions: list[str], answers: list[list[str]]) -> list[float]:
    """Each question's accuracy in percent by open_flamingo's file, which is run without the package's other imports."""
    place = importlib.util.find_spec("open_flamingo")
    assert place and place.submodule_search_locations, "open_flamingo is not installed"
    file = f"{place.submodule_search_locations[0]}/eval/vqa_metric.py"
    spec = importlib.util.spec_from_file_location("vqa_metric", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes in its regular expressions
        spec.loader.exec_module(module)
    evaluation = module.VQAEval(None, None, n=12)
    evaluation.vqa, evaluation.vqaRes = module.VQA(), module.VQA()
    evaluation.vqa.qa = {
        question: {"question_type": "", "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(given)]}
        for question, given in enumerate(answers)
    }
    cut = module.postprocess_vqa_generation
    evaluation.vqaRes.qa = {question: {"answer": cut(text)} for question, text in enumerate(predictions)}
    evaluation.evaluate(list(evaluation.vqa.qa))
    return list(evaluation.evalQA.values())


def of_ratings(prompts: int, rounds: int) -> None:
    generator = np.random.default_rng(2)
    human = generator.integers(3, 16, (prompts, RATED)) / 3  # means of three ratings of 1 to 5
    scores = human + generator.normal(size=human.shape)
    part = min(prompts, BY_DEFINITION)
    ours, found = best(rounds, lambda: metrics.tie_calibration(scores[:part], human[:part]))
    theirs, expected = best(1, lambda: calibrated(scores[:part], human[:part]))
    assert found == expected, (found, expected)
    line(f"tie calibration, {part:,} x {RATED}", ours, theirs, "the definition")
    ours, _ = best(rounds, lambda: metrics.tie_calibration(scores, human))
    print(f"{f'tie calibration, {prompts:,} x {RATED}':34}{ours:8.2f} s")


def calibrated(scores: np.ndarray, human: np.ndarray) -> tuple[float, float]:
    """Pairwise accuracy at every eps, and the least of the best: arXiv 2305.14324 as it stands."""
    first, second = np.triu_indices(scores.shape[1], 1)
    apart = np.abs(scores[:, first] - scores[:, second])
    in_order = np.sign(scores[:, first] - scores[:, second]) == np.sign(human[:, first] - human[:, second])
    wanted = human[:, first] == human[:, second]
    tried = np.unique([0.0, *apart.flat])
    right = [int(np.where(apart <= eps, wanted, in_order & ~wanted).sum()) for eps in tried]
    return max(right) / apart.size, float(tried[int(np.argmax(right))])


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    rounds = int(arguments.get("rounds", 3))
    print(f"{'':34}{'ours':>10}{'peer':>10}")
    of_captions(int(arguments.get("images", 5000)), rounds)
    of_answers(int(arguments.get("questions", 214_354)), rounds)
    of_ratings(int(arguments.get("rated", 5000)), rounds)


if __name__ == "__main__":
    main()
