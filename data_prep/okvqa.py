"""OK-VQA (arXiv 1906.00067): 14,055 questions about images of COCO that need knowledge, each with ten answers.

    python data_prep/okvqa.py source=okvqa/ images=coco/ out=s3://benchmarks/okvqa splits=val

``source`` is a folder with the published files or archives; splits: train (9,009 questions) and val (5,046), which its
authors call test. The answers are stemmed, the raw ones stand beside them. ``images`` holds train2014/ and val2014/
(19 GB). Its licence stands in its files, if anywhere: check; the images are Flickr's.
"""

import sys
from typing import ClassVar

from hpc_mm import annotations
from hpc_mm.annotations import Split


class Okvqa(annotations.Questions):
    SPLITS: ClassVar[tuple[Split, ...]] = (
        Split(
            "train",
            (("OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"),),
            "train2014/COCO_train2014_{image:012d}.jpg",
        ),
        Split(
            "val",
            (("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"),),
            "val2014/COCO_val2014_{image:012d}.jpg",
        ),
    )


if __name__ == "__main__":
    sys.exit(annotations.main(Okvqa))
