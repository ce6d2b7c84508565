"""What tests of evaluation start from: questions, benchmarks, and shards of prepared benchmarks."""

from pathlib import Path
from typing import Any

import samples

from hpc_mm import benchmark
from hpc_mm.benchmark import Benchmark, Question
from hpc_mm.data.schema import Image, Sample
from hpc_mm.data.shards import ShardInfo, ShardWriter, write_manifest
from hpc_mm.data.store import open_store

CAPTIONS = Benchmark(name="coco", kind="caption", prompt=benchmark.CAPTION, metric="cider")
VQA = Benchmark(name="vqav2", kind="vqa", split="val", prompt=benchmark.VQA, metric="vqa")
MEMES = Benchmark(
    name="memes", kind="classes", split="dev", prompt=benchmark.HATEFUL_MEMES, metric="roc_auc", classes=("no", "yes")
)


def question(number: int, image: int | None = None, *references: str, text: str = "") -> Question:
    """About image ``number`` unless another is named."""
    about = str(number if image is None else image)
    return Question(f"q{number}", about, "train-000000.tar", int(about), text, references or (f"answer {number}",))


def write_splits(folder: Path, max_bytes: int = 2**30, **splits: dict[str, dict[str, Any]]) -> str:
    """Prepared shards of metadata by image id, by split; each image's bytes are ``image_of`` its id."""
    store, shards = open_store(str(folder), make=True), list[ShardInfo]()
    for split, images in splits.items():
        with ShardWriter(store, split.replace("_", "-"), max_bytes, manifest=False) as writer:
            for name, facts in images.items():
                writer.add(Sample(name, (Image(image_of(name)),), {"split": split, **facts}))
        shards += writer.shards
    write_manifest(store, shards)
    return str(folder)


def image_of(name: str) -> bytes:
    return samples.encoded(samples.picture(int(name)))


def captioned(*numbers: int) -> dict[str, dict[str, Any]]:
    return {str(i): {"captions": [f"caption {i}.{k} " for k in range(5)]} for i in numbers}


def asked(*numbers: int) -> dict[str, dict[str, Any]]:
    """Two questions about each image, with ten answers."""
    return {
        str(i): {
            "questions": [
                {
                    "question_id": 10 * i + k,
                    "question": f"What {k}?",
                    "answers": [{"answer": f"a{n}"} for n in range(10)],
                }
                for k in range(2)
            ]
        }
        for i in numbers
    }
