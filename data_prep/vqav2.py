"""VQAv2 (arXiv 1612.00837): 1.1M questions about 204,721 images of COCO, each with ten human answers.

    python data_prep/vqav2.py source=vqav2/ images=coco/ out=s3://benchmarks/vqav2 splits=train,val

``source`` is a folder with the published archives (v2_Questions_Val_mscoco.zip, v2_Annotations_Val_mscoco.zip, ...) or
the files in them; splits: train (443,757 questions), val (214,354), test (447,793) and test-dev (107,394), these two
without answers. ``images`` holds train2014/, val2014/ and test2015/ (25 GB). CC-BY-4.0; the images are Flickr's.
"""

import sys
from typing import ClassVar

from hpc_mm import annotations
from hpc_mm.annotations import Split

TEST_IMAGES = "test2015/COCO_test2015_{image:012d}.jpg"


class Vqav2(annotations.Questions):
    SPLITS: ClassVar[tuple[Split, ...]] = (
        Split(
            "train",
            (("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"),),
            "train2014/COCO_train2014_{image:012d}.jpg",
        ),
        Split(
            "val",
            (("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),),
            "val2014/COCO_val2014_{image:012d}.jpg",
        ),
        Split("test", (("v2_OpenEnded_mscoco_test2015_questions.json",),), TEST_IMAGES),
        Split("test-dev", (("v2_OpenEnded_mscoco_test-dev2015_questions.json",),), TEST_IMAGES),
    )


if __name__ == "__main__":
    sys.exit(annotations.main(Vqav2))
