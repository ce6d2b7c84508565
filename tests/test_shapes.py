"""The shapes corpus: from a seed alone, true captions, and held-out scenes that training never saw."""

import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from transformers import PreTrainedTokenizerFast

from hpc_mm import benchmark
from hpc_mm.benchmark import Benchmark
from hpc_mm.config import ENDOFCHUNK_TOKEN, IMAGE_TOKEN, PAD_TOKEN
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.shards import read_samples
from hpc_mm.data.store import open_store

SCRIPT = Path(__file__).resolve().parents[1] / "data_prep" / "shapes.py"
SMALL = ("documents=60", "pairs=150", "questions=60", "chats=60", "demonstrations=40", "heldout=60")
COLORS = ("red", "green", "blue", "yellow", "purple")
TRAINING = ("train-pairs", "train-documents", "train-questions")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store")
    made = make(f"out={out}", "seed=3", *SMALL)
    assert made.returncode == 0, made.stderr
    return out / "shapes"


def samples(corpus: Path, name: str) -> list[Sample]:
    return list(read_samples(open_store(str(corpus / name))))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts(sample: Sample) -> list[str]:
    return [part.text for part in sample.parts if isinstance(part, Text)]


def test_the_same_seed_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    assert make(f"out={tmp_path}", "seed=3", *SMALL).returncode == 0
    assert files(tmp_path / "shapes") == files(corpus)


def test_another_seed_gives_other_scenes(corpus: Path, tmp_path: Path) -> None:
    assert make(f"out={tmp_path}", "seed=4", *SMALL).returncode == 0
    ours = {text for sample in samples(corpus, "train-pairs") for text in texts(sample)}
    theirs = {text for sample in samples(tmp_path / "shapes", "train-pairs") for text in texts(sample)}
    assert len(ours - theirs) > len(ours) / 2


def test_it_has_what_was_asked_for(corpus: Path) -> None:
    assert len(samples(corpus, "train-pairs")) == 150
    assert len(samples(corpus, "train-questions")) == 60
    documents = samples(corpus, "train-documents")
    assert len(documents) == 60
    assert {len(document.images) for document in documents} == {2, 3, 4}
    for document in documents:
        for part, following in zip(document.parts, [*document.parts[1:], None], strict=True):
            assert isinstance(part, Text) or isinstance(following, Text), "a picture stands before its sentence"


def shown(text: str) -> str:
    """The caption that a question of VQAScore quotes."""
    return text.split('"')[1]


def test_chats_ask_about_true_and_false_captions(corpus: Path) -> None:
    chats = samples(corpus, "train-chats")
    assert len(chats) == 60
    answers = Counter()
    for chat in chats:
        picture, question, answer = chat.parts
        assert isinstance(picture, Image) and [part.role for part in chat.parts] == ["user", "user", "assistant"]
        assert isinstance(question, Text) and isinstance(answer, Text)
        if '"' not in question.text:
            continue
        answers[answer.text] += 1
        words = re.findall("[a-z]+", shown(question.text))
        things = chat.metadata["scene"]["things"]
        colors = {thing["color"] for thing in things}
        told = colors == {word for word in words if word in COLORS}
        above = "above" in words or "below" in words
        assert (answer.text == "Yes") == (told and (len(things) != 2 or above == chat.metadata["scene"]["vertical"]))
    assert min(answers["Yes"], answers["No"]) > 12


def test_faithfulness_has_a_false_caption_of_each_kind(corpus: Path) -> None:
    lines = [json.loads(line) for line in (corpus / "faithfulness" / "pairs.jsonl").read_text().splitlines()]
    assert Counter(line["group"] for line in lines)["color"] == 60
    for line in lines:
        (false,) = line["false"]
        changed = [(one, two) for one, two in zip(line["true"].split(), false.split(), strict=False) if one != two]
        assert len(changed) == 1 if line["group"] == "color" else "above" in line["true"] + false
        with Picture.open(corpus / "faithfulness" / line["image"]) as picture:
            assert picture.size == (64, 64)


def test_no_held_out_scene_is_trained_on_or_demonstrated(corpus: Path) -> None:
    split = {sample.id: sample.metadata["split"] for sample in samples(corpus, "benchmark")}
    assert Counter(split.values()) == {"train": 40, "test": 60}
    scenes = {name: [] for name in ("train", "test")}
    for sample in samples(corpus, "benchmark"):
        scenes[sample.metadata["split"]].append(sample.metadata["scene"])
    trained = [sample.metadata["scene"] for sample in samples(corpus, "train-pairs")] + scenes["train"]
    for name in ("train-documents", "train-questions"):
        trained += [scene for sample in samples(corpus, name) for scene in sample.metadata["scenes"]]
    assert not {json.dumps(scene) for scene in scenes["test"]} & {json.dumps(scene) for scene in trained}
    captions = {sample.metadata["captions"][0] for sample in samples(corpus, "benchmark") if split[sample.id] == "test"}
    written = {text.rstrip(".") for name in TRAINING for sample in samples(corpus, name) for text in texts(sample)}
    assert not captions & written


def test_five_captions_of_each_scene_name_its_things(corpus: Path) -> None:
    for sample in samples(corpus, "benchmark"):
        captions = sample.metadata["captions"]
        assert len(set(captions)) == 5 and len(sample.images) == len(sample.parts) == 1
        for thing in sample.metadata["scene"]["things"]:
            assert all(thing["kind"] in caption and thing["color"] in caption for caption in captions)


HUES = {"red": 0, "yellow": 48, "green": 130, "blue": 222, "purple": 284}  # degrees


def patches_of(image: Image) -> dict[str, tuple[float, float, int]]:
    """By colour: mean x, mean y and number of the pixels that have it."""
    picture = Picture.open(io.BytesIO(image.data or b""))
    assert picture.size == (64, 64)
    hue, saturation, _ = np.moveaxis(np.asarray(picture.convert("HSV")).astype(float), -1, 0)
    distance = {color: np.abs((hue * 360 / 255 - wanted + 180) % 360 - 180) for color, wanted in HUES.items()}
    found = {}
    for color in HUES:
        ys, xs = np.nonzero((distance[color] < 24) & (saturation > 120))
        if len(xs) > 10:  # edges are mixtures
            found[color] = (float(xs.mean()), float(ys.mean()), len(xs))
    return found


def test_pictures_show_what_captions_say(corpus: Path) -> None:
    checked = 0
    for sample in samples(corpus, "train-pairs"):
        scene = sample.metadata["scene"]
        things, found = scene["things"], patches_of(sample.images[0])
        assert found.keys() == {thing["color"] for thing in things}
        if len(things) == 2 and len(found) == 2:
            (x1, y1, _), (x2, y2, _) = (found[thing["color"]] for thing in things)
            along, across = (y2 - y1, x2 - x1) if scene["vertical"] else (x2 - x1, y2 - y1)
            assert along > 2 * abs(across)
        if len(things) == len(found):
            areas = {thing["size"]: found[thing["color"]][2] for thing in things}
            assert areas.get("large", 64**2) > areas.get("small", 0)
            checked += 1
    assert checked > 50


def test_questions_have_ten_answers(corpus: Path) -> None:
    for sample in samples(corpus, "benchmark"):
        for question in sample.metadata["questions"]:
            assert len(question["answers"]) == 10
            answers = [answer["answer"] for answer in question["answers"]]
            assert answers.count(question["multiple_choice_answer"]) >= 7
            if question["question_type"] == "how many":
                assert question["multiple_choice_answer"] == str(len(sample.metadata["scene"]["things"]))


@pytest.mark.parametrize("split", ["train", "test"])
def test_it_is_a_benchmark_of_captions_and_of_questions(corpus: Path, split: str) -> None:
    captions = Benchmark(name="toy", kind="caption", prompt=benchmark.CAPTION, metric="cider")
    vqa = Benchmark(name="toy", kind="vqa", prompt=benchmark.VQA, metric="vqa")
    found = [benchmark.questions(str(corpus / "benchmark"), split, kind) for kind in (captions, vqa)]
    assert {len(question.references) for question in found[0]} == {5}
    assert {len(question.references) for question in found[1]} == {10}
    assert [q.image for q in found[0]] == list(dict.fromkeys(q.image for q in found[1]))


def test_documents_of_questions_hold_a_true_answer_for_each_picture(corpus: Path) -> None:
    """Of those about the number of things, which are easily counted."""
    counted = 0
    for sample in samples(corpus, "train-questions"):
        assert len(sample.images) == len(sample.metadata["scenes"]) == len(texts(sample))
        assert [isinstance(part, Image) for part in sample.parts] == [True, False] * len(sample.images)
        for text, scene in zip(texts(sample), sample.metadata["scenes"], strict=True):
            match = re.fullmatch(r"Question:([^:]+\?) Short answer:([a-z0-9 ]+)", text)
            assert match
            if match[1].startswith("how many"):
                assert match[2] == str(len(scene["things"]))
                counted += 1
    assert counted > 20


def test_the_tokenizer_keeps_every_text_and_knows_the_special_tokens(corpus: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(corpus / "tokenizer.json"))
    special = [PAD_TOKEN, "<s>", "</s>", IMAGE_TOKEN, ENDOFCHUNK_TOKEN]
    assert [len(tokenizer.encode(token)) for token in special] == [1] * 5
    for text in [
        "a large red circle",
        "caf\u00e9 \U0001f600 \u65e5\u672c",
        *texts(samples(corpus, "train-documents")[0]),
        *texts(samples(corpus, "train-questions")[0]),
    ]:
        assert tokenizer.decode(tokenizer.encode(text)).strip() == text
    assert len(tokenizer.encode("a large red circle to the left of a small blue square")) == 12


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sed=1", "unknown key 'sed': did you mean seed?"),
        ("pairs=0", "pairs='0': input should be greater than or equal to 1"),
        ("pairs", "'pairs' is not key=value"),
    ],
)
def test_a_users_mistake_is_one_line(tmp_path: Path, argument: str, message: str) -> None:
    made = make(f"out={tmp_path}", argument)
    assert made.returncode == 2
    assert message in made.stderr
    assert len(made.stderr.splitlines()) == 1
