"""Hateful Memes (arXiv 2005.04790): 10,000 memes, each with the text that is written on it, hateful or not.

    python data_prep/hateful_memes.py source=hateful_memes/ images=hateful_memes/ out=s3://benchmarks/hateful_memes

``source`` is a folder with the published files; splits: train (8,500 memes), dev (500; dev.jsonl, or dev_seen.jsonl of
the challenge's second phase), dev-unseen (540), test (1,000) and test-unseen (2,000), these two as published, without
labels. A label is kept as ``yes`` or ``no``: whether it is hateful. ``images`` holds img/ (4 GB). For research alone,
under the licence that its page asks to be accepted.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from hpc_mm import annotations
from hpc_mm.annotations import Disagreement, Split

LABELS = {0: "no", 1: "yes"}


class HatefulMemes(annotations.Benchmark):
    SPLITS: ClassVar[tuple[Split, ...]] = (
        Split("train", (("train.jsonl",),)),
        Split("dev", (("dev.jsonl",), ("dev_seen.jsonl",))),
        Split("dev-unseen", (("dev_unseen.jsonl",),)),
        Split("test", (("test.jsonl",), ("test_seen.jsonl",))),
        Split("test-unseen", (("test_unseen.jsonl",),)),
    )

    def images_of(self, split: Split, files: Sequence[Any]) -> Iterator[dict[str, Any]]:
        for entry in files[0]:
            name = str(entry["id"])
            if not isinstance(entry["text"], str):
                raise Disagreement(f"the text of image {name} is {entry['text']!r}")
            image = {"id": name, "split": split.name, "file_name": entry["img"], "text": entry["text"]}
            if "label" in entry or not split.name.startswith("test"):
                if entry["label"] not in LABELS:
                    raise Disagreement(f"the label of image {name} is {entry['label']!r}, not 0 or 1")
                image["label"] = LABELS[entry["label"]]
            yield image


if __name__ == "__main__":
    sys.exit(annotations.main(HatefulMemes))
