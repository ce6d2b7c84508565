"""ImageNet's classification task (ILSVRC 2012, arXiv 1409.0575): images of 1,000 classes.

    python data_prep/imagenet.py source=names/ images=ILSVRC/Data/CLS-LOC out=s3://benchmarks/imagenet

``images`` holds train/n01440764/*.JPEG (1,281,167 images) and val/ (50,000), which is arranged like train/ or flat, as
published. ``source`` is a folder with classes.tsv, lines of a synset, a tab and the name of its class, and for a flat
val/ with LOC_val_solution.csv, the ground truth beside the images as published for the competition of Kaggle's. Papers
take OpenAI's names for CLIP: its notebook and open_flamingo list them in the order of the sorted synsets, and two
pairs of classes share a name there. The terms of access are for research and education that is not commercial.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from pydantic import Field

from hpc_mm import annotations
from hpc_mm.annotations import Disagreement, Split, complain
from hpc_mm.config import ConfigError
from hpc_mm.data.parts import SourcePart
from hpc_mm.data.records import DamagedFile
from hpc_mm.data.store import Store, open_store

CLASSES, TRUTH = "classes.tsv", "LOC_val_solution.csv"


class Imagenet(annotations.Benchmark):
    SPLITS: ClassVar[tuple[Split, ...]] = (Split("train", ()), Split("val", ()))

    source: str = Field(description=f"folder with {CLASSES}, and with {TRUTH} for a val/ without folders")

    def parts(self) -> tuple[Store, list[SourcePart]]:
        source = open_store(self.source)
        size = source.size(CLASSES)
        if size is None:
            raise ConfigError(f"source={self.source} has no {CLASSES}: lines of a synset, a tab and its class's name")
        size += source.size(TRUTH) or 0
        parts = []
        for split in self.wanted():
            names, total = images_in(self.images, split.name)
            if names:
                parts.append(SourcePart(f"{split.name}/", size + total, split.name))
            elif self.splits:
                raise ConfigError(f"images={self.images} has no {split.name}/*.JPEG and no {split.name}/*/*.JPEG")
        if not parts:
            raise ConfigError(f"images={self.images} has neither train/*/*.JPEG nor val/*.JPEG nor val/*/*.JPEG")
        return source, parts

    def read(self, split: Split) -> tuple[str, Sequence[Any]]:
        source = open_store(self.source)
        truth = rows(source, TRUTH, ",") if split.name == "val" and source.size(TRUTH) is not None else []
        return f"{CLASSES} and {split.name}/", [
            rows(source, CLASSES, "\t"),
            truth,
            images_in(self.images, split.name)[0],
        ]

    def images_of(self, split: Split, files: Sequence[Any]) -> Iterator[dict[str, Any]]:
        classes, truth, keys = files
        names = mapping(classes, CLASSES)
        of_image = {image: boxes.split()[0] for image, boxes in mapping(truth[1:], TRUTH).items()}
        flat = [key for key in keys if key.count("/") == 1]
        here = {stem(key) for key in flat}
        complain([stem(key) for key in flat if stem(key) not in of_image], f"images have no class in {TRUTH}")
        if flat:
            complain([image for image in of_image if image not in here], f"images of {TRUTH} are missing")
        synset_of = {key: of_image[stem(key)] if key.count("/") == 1 else key.split("/")[1] for key in keys}
        there = set(synset_of.values())
        complain(sorted(there - names.keys()), f"classes have no name in {CLASSES}")
        complain(sorted(names.keys() - there), "classes have no image")
        for key, synset in synset_of.items():
            facts = {"file_name": key, "synset": synset, "label": names[synset]}
            yield {"id": stem(key), "split": split.name, **facts}


@lru_cache(maxsize=2)
def images_in(address: str, split: str) -> tuple[list[str], int]:
    """The names of a split's images, sorted, and their bytes together."""
    entries = open_store(address).list(f"{split}/")
    sizes = {entry.key: entry.size for entry in entries if re.fullmatch(r"[^/]+(/[^/]+)?/[^/]+\.JPEG", entry.key)}
    return sorted(sizes), sum(sizes.values())


def stem(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".JPEG")


def rows(store: Store, key: str, delimiter: str) -> list[list[str]]:
    """The lines of a table of two columns. DamagedFile where one has not two values."""
    found = []
    for number, line in enumerate(store.read(key).splitlines(), 1):
        try:
            values = line.decode().split(delimiter)
        except UnicodeDecodeError:
            values = []
        if len(values) != 2 or not all(value.strip() for value in values):
            raise DamagedFile(f"{store.address}/{key} is damaged: line {number} has not two values: {line!r}")
        found.append(values)
    return found


def mapping(lines: Sequence[Sequence[str]], where: str) -> dict[str, str]:
    found = {key: value.strip() for key, value in lines}
    if len(found) < len(lines):
        raise Disagreement(f"{len(lines) - len(found)} lines of {where} begin like another")
    return found


if __name__ == "__main__":
    sys.exit(annotations.main(Imagenet))
