"""The shapes corpus: rendered scenes of coloured shapes with captions, documents and questions, all drawn from a seed.

    python data_prep/shapes.py out=FOLDER_OR_S3 seed=0

Below ``out`` it writes the shards shapes/{train-documents,train-pairs,train-questions,train-chats}, a benchmark of
captions and questions (shapes/benchmark, whose split test is held-out scenes and whose split train is for
demonstrations), one of true and false captions of held-out scenes (shapes/faithfulness) and tokenizers trained on the
text (shapes/tokenizer.json, and for chats shapes/chat-tokenizer.json).
It stands in for web-scale corpora where there is no network: small enough to learn in minutes, and no held-out scene
description occurs in training.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from random import Random

from PIL import Image as Picture
from PIL import ImageDraw
from pydantic import Field
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hpc_mm.config import (
    ENDOFCHUNK_TOKEN,
    IMAGE_TOKEN,
    PAD_TOKEN,
    ConfigError,
    Part,
    Positive,
    parse_arguments,
    with_overrides,
)
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.shards import ShardInfo, ShardWriter, write_manifest
from hpc_mm.data.store import StoreError, open_store
from hpc_mm.data.templates import QUESTION, Turn, t5_v1_question
from hpc_mm.site import in_store, read_site

PIXELS = 64
OVERSAMPLE = 4  # drawn this much larger and averaged down: smooth edges
SHARD_BYTES = 2 << 20  # several shards even at this size, as in a real corpus
BOS_TOKEN, EOS_TOKEN = "<s>", "</s>"
VOCABULARY = 640  # 256 bytes, and merges until every word of the corpus is one token

COLORS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (36, 84, 200),
    "yellow": (244, 200, 24),
    "purple": (140, 60, 170),
}
RADIUS = {"large": 12.0, "small": 6.5}  # pixels
JITTER = 2.5  # pixels that a thing may lie off its place, along each axis
PAPER = (122, 117, 104)  # the mean colour of CLIP's training images: what a vision tower takes for nothing
KINDS = ("circle", "square", "triangle", "star")
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
NEAR_COLORS = {"red": "orange", "green": "dark green", "blue": "dark blue", "yellow": "gold", "purple": "violet"}
OTHER_KINDS = {"circle": "ball", "square": "box", "triangle": "pyramid", "star": "5 pointed star"}


class Shapes(Part):
    """What data_prep/shapes.py takes."""

    out: str = Field("", description="store or folder that the corpus is written below; empty = the site's store")
    seed: int = Field(0, ge=0, description="of everything drawn")
    documents: Positive = Field(1500, description="interleaved training documents")
    pairs: Positive = Field(4000, description="training pairs of image and caption")
    questions: Positive = Field(1500, description="training documents of pictures with a question each")
    chats: Positive = Field(12000, description="training chats of a picture, a question and its answer")
    demonstrations: Positive = Field(300, description="scenes of the benchmark's split train")
    heldout: Positive = Field(200, description="held-out scenes, the benchmark's split test")


# ---------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Thing:
    size: str
    color: str
    kind: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """One thing; two, beside or above each other; or two above a third. In reading order."""

    things: tuple[Thing, ...]
    vertical: bool = False

    @property
    def caption(self) -> str:
        """The canonical caption. Two scenes with the same one are the same scene."""
        first, *rest = (str(thing) for thing in self.things)
        if not rest:
            return first
        if len(rest) == 1:
            return f"{first} {'above' if self.vertical else 'to the left of'} {rest[0]}"
        return f"{first}, {rest[0]} and {rest[1]}"

    @property
    def references(self) -> list[str]:
        """Five captions as five people might write them, the canonical one first."""
        things = self.things
        first, *rest = (str(thing) for thing in things)
        colored = [f"{thing.color} {thing.kind}" for thing in things]
        plain = [f"a {thing.kind} that is {thing.color} and {thing.size}" for thing in things]
        if not rest:
            return [
                first,
                f"there is {first}",
                plain[0],
                f"one {colored[0]}",
                f"the {things[0].kind} is {things[0].color}",
            ]
        relation, inverse = ("above", "below") if self.vertical else ("to the left of", "to the right of")
        if len(rest) == 1:
            return [
                self.caption,
                f"{rest[0]} {inverse} {first}",
                f"{plain[0]} and {plain[1]}",
                f"the {colored[0]} is {relation} the {colored[1]}",
                f"two shapes, one {colored[0]} and one {colored[1]}",
            ]
        return [
            self.caption,
            f"there are three shapes: {self.caption}",
            f"{plain[0]}, {plain[1]} and {plain[2]}",
            f"the {colored[0]} and the {colored[1]} are above the {colored[2]}",
            f"three shapes, one {colored[0]}, one {colored[1]} and one {colored[2]}",
        ]

    @property
    def held_out(self) -> bool:
        """A tenth of all scenes, whatever the seed: no held-out description is ever trained on."""
        return hashlib.sha256(self.caption.encode()).digest()[0] < 26


def draw_scene(random: Random, held_out: bool) -> Scene:
    while True:
        count = random.choices((1, 2, 3), weights=(6, 12, 2))[0]
        things = tuple(
            Thing(random.choice(list(RADIUS)), random.choice(list(COLORS)), random.choice(KINDS)) for _ in range(count)
        )
        scene = Scene(things, vertical=count == 2 and random.random() < 0.5)
        if scene.held_out == held_out:
            return scene


# ---------------------------------------------------------------- pictures


PLACES = {  # (x, y) in pixels, by (number of things, vertical)
    (1, False): [(32, 32)],
    (2, False): [(16, 32), (48, 32)],
    (2, True): [(32, 16), (32, 48)],
    (3, False): [(16, 16), (48, 16), (32, 48)],
}


def centres(scene: Scene, random: Random) -> list[tuple[float, float]]:
    """Of each thing, in pixels."""
    places = PLACES[len(scene.things), scene.vertical]
    return [(x + random.uniform(-JITTER, JITTER), y + random.uniform(-JITTER, JITTER)) for x, y in places]


def outline(kind: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a polygon around (x, y), the first one straight up (a square's are diagonal)."""
    if kind == "star":
        corners = [(36 * step, radius * (1.15 if step % 2 == 0 else 0.5)) for step in range(10)]
    elif kind == "square":
        corners = [(45 + 90 * step, radius * 1.25) for step in range(4)]
    else:
        corners = [(120 * step, radius * 1.2) for step in range(3)]
    return [(x + r * math.sin(math.radians(angle)), y - r * math.cos(math.radians(angle))) for angle, r in corners]


def render(scene: Scene, random: Random) -> bytes:
    """The scene as a PNG; places, shades and the background vary."""
    shade = random.randint(-8, 8)
    paper = tuple(value + shade for value in PAPER)
    picture = Picture.new("RGB", (PIXELS * OVERSAMPLE, PIXELS * OVERSAMPLE), paper)
    canvas = ImageDraw.Draw(picture)
    for thing, (x, y) in zip(scene.things, centres(scene, random), strict=True):
        radius = RADIUS[thing.size] * random.uniform(0.92, 1.0) * OVERSAMPLE
        fill = tuple(max(0, min(255, value + random.randint(-12, 12))) for value in COLORS[thing.color])
        x, y = x * OVERSAMPLE, y * OVERSAMPLE
        if thing.kind == "circle":
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            canvas.polygon(outline(thing.kind, x, y, radius), fill=fill)
    file = io.BytesIO()
    picture.reduce(OVERSAMPLE).save(file, "PNG")
    return file.getvalue()


# ---------------------------------------------------------------- samples


def facts(scene: Scene) -> dict[str, object]:
    return {"things": [asdict(thing) for thing in scene.things], "vertical": scene.vertical}


def pair(seed: int, number: int) -> Sample:
    """An image with its caption: mostly the canonical one, sometimes another."""
    random = Random(f"{seed}/pair/{number}")
    scene = draw_scene(random, held_out=False)
    caption = scene.caption if random.random() < 0.8 else random.choice(scene.references[1:])
    return Sample(f"pair{number:06d}", (Image(render(scene, random)), Text(caption)), {"scene": facts(scene)})


def document(seed: int, number: int) -> Sample:
    """A page of two to four pictures, each before its sentence, sometimes with words around them."""
    random = Random(f"{seed}/document/{number}")
    scenes = [draw_scene(random, held_out=False) for _ in range(random.randint(2, 4))]
    parts: list[Image | Text] = []
    if random.random() < 0.6:
        parts.append(Text(f"Here are {NUMBERS[len(scenes)]} pictures of shapes."))
    for scene in scenes:
        parts += [Image(render(scene, random)), Text(f"{scene.caption}.")]
    if random.random() < 0.3:
        parts.append(Text(f"The last picture shows {NUMBERS[len(scenes[-1].things)]} of them."))
    return Sample(f"document{number:06d}", tuple(parts), {"scenes": [facts(scene) for scene in scenes]})


# ---------------------------------------------------------------- questions


def questions_about(scene: Scene) -> Iterator[tuple[str, str, str, str]]:
    """(question type, question, usual answer, another answer that a human might give)."""
    count = len(scene.things)
    yield "how many", "how many shapes are there?", str(count), NUMBERS[count]
    kinds = Counter(thing.kind for thing in scene.things)
    colors = Counter(thing.color for thing in scene.things)
    for thing in scene.things:
        if kinds[thing.kind] == 1:
            yield "what color is the", f"what color is the {thing.kind}?", thing.color, NEAR_COLORS[thing.color]
        if colors[thing.color] == 1:
            yield "what shape is", f"what shape is {thing.color}?", thing.kind, OTHER_KINDS[thing.kind]
    if count == 2 and scene.things[0] != scene.things[1]:
        first, second = scene.things
        relation, inverse = ("above", "below") if scene.vertical else ("to the left of", "to the right of")
        answer = f"{first.color} {first.kind}"
        yield "what is", f"what is {relation} the {second.size} {second.color} {second.kind}?", answer, first.kind
        if kinds[first.kind] == 1:
            yield "is the", f"is the {first.kind} {relation} the {second.kind}?", "yes", "no"
            yield "is the", f"is the {first.kind} {inverse} the {second.kind}?", "no", "yes"


def human_answers(random: Random, usual: str, other: str) -> list[dict[str, object]]:
    """Ten answers; as many as three people say something else."""
    others = random.choices((0, 1, 2, 3), weights=(6, 2, 1, 1))[0]
    words = [usual] * (10 - others) + [other] * others
    random.shuffle(words)
    return [
        {"answer": word, "answer_confidence": "yes" if word == usual else "maybe", "answer_id": position + 1}
        for position, word in enumerate(words)
    ]


def question_document(seed: int, number: int) -> Sample:
    """One to five pictures, each before a question about it with its usual answer."""
    random = Random(f"{seed}/questions/{number}")
    parts: list[Image | Text] = []
    scenes = [draw_scene(random, held_out=False) for _ in range(random.randint(1, 5))]
    for scene in scenes:
        _, question, usual, _ = random.choice(list(questions_about(scene)))
        parts += [Image(render(scene, random)), Text(f"Question:{question} Short answer:{usual}")]
    return Sample(f"questions{number:06d}", tuple(parts), {"scenes": [facts(scene) for scene in scenes]})


def benchmark_image(seed: int, split: str, number: int) -> Sample:
    """An image with its five captions and all questions about it, each with ten answers."""
    name = f"{split}{number:06d}"
    start = f"{seed}/{'heldout' if split == 'test' else 'demonstration'}/{number}"
    scene = draw_scene(Random(start), held_out=split == "test")
    random = Random(f"{start}/answers")
    questions = [
        {
            "question_id": f"{name}-{place}",
            "question": question,
            "question_type": kind,
            "multiple_choice_answer": usual,
            "answers": human_answers(random, usual, other),
        }
        for place, (kind, question, usual, other) in enumerate(questions_about(scene))
    ]
    metadata = {"split": split, "scene": facts(scene), "captions": scene.references, "questions": questions}
    return Sample(name, (Image(render(scene, Random(f"{start}/picture"))),), metadata)


# ---------------------------------------------------------------- true and false captions


def wrong_color(scene: Scene, random: Random) -> Scene:
    """The scene with one thing in a colour that no thing of it has."""
    place = random.randrange(len(scene.things))
    color = random.choice([name for name in COLORS if name not in {thing.color for thing in scene.things}])
    things = [replace(thing, color=color) if i == place else thing for i, thing in enumerate(scene.things)]
    return replace(scene, things=tuple(things))


def wrong_relation(scene: Scene) -> Scene | None:
    """The scene with its two things above each other instead of beside, or the other way round."""
    return replace(scene, vertical=not scene.vertical) if len(scene.things) == 2 else None


def wrong(scene: Scene, random: Random) -> Scene:
    other = wrong_relation(scene) if random.random() < 0.5 else None
    return other or wrong_color(scene, random)


def chat(seed: int, number: int) -> Sample:
    """A picture with a question and its answer: whether it shows a caption, or one of those about its things."""
    random = Random(f"{seed}/chat/{number}")
    scene = draw_scene(random, held_out=False)
    if random.random() < 0.8:
        true = random.random() < 0.5
        claimed = scene if true else wrong(scene, random)
        question = QUESTION.format(claimed.references[random.random() < 0.2])  # those that tell a relation
        answer = "Yes" if true else "No"
    else:
        _, question, answer, _ = random.choice(list(questions_about(scene)))
        question += "\nAnswer the question using a single word or phrase."
    parts = (Image(render(scene, random), role="user"), Text(f"\n{question}", "user"), Text(answer, "assistant"))
    return Sample(f"chat{number:06d}", parts, {"scene": facts(scene)})


def write_faithfulness(out: str, seed: int, count: int) -> None:
    """Held-out scenes as images, each with its caption and false ones: another colour, another relation."""
    store, lines = open_store(in_store("shapes/faithfulness", out), make=True), []
    for number in range(count):
        random = Random(f"{seed}/faithfulness/{number}")
        scene, name = draw_scene(random, held_out=True), f"images/{number:06d}.png"
        store.write(name, render(scene, random))
        for kind, other in (("color", wrong_color(scene, random)), ("relation", wrong_relation(scene))):
            if other is not None:
                pair = {"image": name, "true": scene.caption, "false": [other.caption], "group": kind}
                lines.append(json.dumps({"id": f"{number:06d}-{kind}", **pair}) + "\n")
    store.write("pairs.jsonl", "".join(lines).encode())
    Console().print(f"shapes/faithfulness: {count} images", highlight=False)


# ---------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE: lossless on any text, one token per word of this corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, IMAGE_TOKEN, ENDOFCHUNK_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# ---------------------------------------------------------------- all of it


def write_corpus(out: str, name: str, samples: Iterator[Sample]) -> list[str]:
    """Write a folder of shards; the texts in it."""
    texts = []
    count = 0
    with ShardWriter(open_store(in_store(f"shapes/{name}", out)), name, max_bytes=SHARD_BYTES) as writer:
        for sample in samples:
            writer.add(sample)
            count += 1
            texts += [part.text for part in sample.parts if isinstance(part, Text)]
    Console().print(f"shapes/{name}: {count} samples", highlight=False)
    return texts


def write_benchmark(out: str, seed: int, **splits: int) -> None:
    """Write so many images of each split into one folder of shards, which are named after their splits."""
    store, shards = open_store(in_store("shapes/benchmark", out), make=True), list[ShardInfo]()
    for split, count in splits.items():
        with ShardWriter(store, split, max_bytes=SHARD_BYTES, manifest=False) as writer:
            for number in range(count):
                writer.add(benchmark_image(seed, split, number))
        shards += writer.shards
    write_manifest(store, shards)
    counts = ", ".join(f"{count} of {split}" for split, count in splits.items())
    Console().print(f"shapes/benchmark: {counts}", highlight=False)


def make_corpus(options: Shapes) -> None:
    out = options.out or read_site().store
    seed, texts = options.seed, list[str]()
    for name, make, wanted in (
        ("train-documents", document, options.documents),
        ("train-pairs", pair, options.pairs),
        ("train-questions", question_document, options.questions),
    ):
        texts += write_corpus(out, name, (make(seed, number) for number in range(wanted)))
    write_benchmark(out, seed, train=options.demonstrations, test=options.heldout)
    write_faithfulness(out, seed, options.heldout)
    open_store(in_store("shapes", out)).write("tokenizer.json", train_tokenizer(texts).to_str(pretty=True).encode())
    chats = write_corpus(out, "train-chats", (chat(seed, number) for number in range(options.chats)))
    template = t5_v1_question([Turn("user", "")])  # its words stand in every chat
    tokenizer = train_tokenizer([*chats, *[template] * len(chats)])
    open_store(in_store("shapes", out)).write("chat-tokenizer.json", tokenizer.to_str(pretty=True).encode())


def main(arguments: list[str]) -> int:
    try:
        make_corpus(with_overrides(Shapes(), parse_arguments(arguments)))
    except (ConfigError, StoreError, OSError) as error:  # OSError: of disks
        print(f"shapes: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
