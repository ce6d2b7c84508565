"""VizWiz-VQA (arXiv 1802.08218): 32,842 photographs by blind people, each with a spoken question and ten answers.

    python data_prep/vizwiz.py source=Annotations.zip images=vizwiz/ out=s3://benchmarks/vizwiz splits=train,val

``source`` is the published archive or a folder with its files; splits: train (20,523 questions), val (4,319) and test
(8,000, without answers). The images have no ids but names, and each has one question: both ids are the file's name.
``images`` holds train/, val/ and test/ (13 GB). CC-BY-4.0 (as its page says; check).
"""

import sys
from typing import ClassVar

from hpc_mm import annotations
from hpc_mm.annotations import Split


class Vizwiz(annotations.Questions):
    SPLITS: ClassVar[tuple[Split, ...]] = tuple(
        Split(name, ((f"{name}.json",),), f"{name}/{{image}}") for name in ("train", "val", "test")
    )


if __name__ == "__main__":
    sys.exit(annotations.main(Vizwiz))
