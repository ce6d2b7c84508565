"""The shapes corpus: from a seed alone, true captions, and held-out scenes that training never saw."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from transformers import PreTrainedTokenizerFast

from hpc_mm.config import ENDOFCHUNK_TOKEN, IMAGE_TOKEN, PAD_TOKEN
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.shards import read_samples
from hpc_mm.data.store import open_store

SCRIPT = Path(__file__).resolve().parents[1] / "data_prep" / "shapes.py"
SMALL = ("documents=60", "pairs=150", "heldout=60")


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
    assert len(samples(corpus, "heldout-pairs")) == 60
    documents = samples(corpus, "train-documents")
    assert len(documents) == 60
    assert {len(document.images) for document in documents} == {2, 3, 4}
    for document in documents:
        for part, following in zip(document.parts, [*document.parts[1:], None], strict=True):
            assert isinstance(part, Text) or isinstance(following, Text), "a picture stands before its sentence"


def test_no_held_out_scene_is_trained_on(corpus: Path) -> None:
    held_out = [sample.metadata["scene"] for sample in samples(corpus, "heldout-pairs")]
    trained = [sample.metadata["scene"] for sample in samples(corpus, "train-pairs")]
    trained += [scene for sample in samples(corpus, "train-documents") for scene in sample.metadata["scenes"]]
    assert not {json.dumps(scene) for scene in held_out} & {json.dumps(scene) for scene in trained}
    references = {text for sample in samples(corpus, "heldout-pairs") for text in sample.metadata["references"][:1]}
    written = {
        text.rstrip(".")
        for name in ("train-pairs", "train-documents")
        for s in samples(corpus, name)
        for text in texts(s)
    }
    assert not references & written


def test_five_captions_of_each_held_out_scene_name_its_things(corpus: Path) -> None:
    for sample in samples(corpus, "heldout-pairs"):
        references = sample.metadata["references"]
        assert len(set(references)) == 5
        assert texts(sample) == references[:1]
        for thing in sample.metadata["scene"]["things"]:
            assert all(thing["kind"] in caption and thing["color"] in caption for caption in references)


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


def test_questions_have_ten_answers_and_an_image(corpus: Path) -> None:
    asked = json.loads((corpus / "heldout-questions.json").read_text())
    scenes = {sample.id: sample.metadata["scene"] for sample in samples(corpus, "heldout-pairs")}
    assert len(asked["questions"]) == len(asked["annotations"]) > len(scenes)
    for question, annotation in zip(asked["questions"], asked["annotations"], strict=True):
        assert (question["question_id"], question["image_id"]) == (annotation["question_id"], annotation["image_id"])
        assert len(annotation["answers"]) == 10
        usual = [answer["answer"] for answer in annotation["answers"]].count(annotation["multiple_choice_answer"])
        assert usual >= 7
        if annotation["question_type"] == "how many":
            assert annotation["multiple_choice_answer"] == str(len(scenes[question["image_id"]]["things"]))


def test_the_tokenizer_keeps_every_text_and_knows_the_special_tokens(corpus: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(corpus / "tokenizer.json"))
    special = [PAD_TOKEN, "<s>", "</s>", IMAGE_TOKEN, ENDOFCHUNK_TOKEN]
    assert [len(tokenizer.encode(token)) for token in special] == [1] * 5
    for text in [
        "a large red circle",
        "caf\u00e9 \U0001f600 \u65e5\u672c",
        *texts(samples(corpus, "train-documents")[0]),
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
