"""TextVQA (arXiv 1904.08920): 45,336 questions about text in 28,408 images of OpenImages, with ten answers each.

    python data_prep/textvqa.py source=textvqa/ images=textvqa/ out=s3://benchmarks/textvqa splits=val

``source`` holds the published files (TextVQA_0.5.1_val.json) or those in the form of VQA (textvqa_val_questions.json
and textvqa_val_annotations.json), whose answers have ids and confidences; splits: train (34,602 questions), val (5,000)
and test (5,734, without answers). ``images`` holds train_images/ (of train and val) and test_images/ (8 GB). CC-BY-4.0;
the images are CC-BY-2.0.
"""

import sys
from typing import ClassVar

from hpc_mm import annotations
from hpc_mm.annotations import Split, vqa_or


class Textvqa(annotations.Questions):
    SPLITS: ClassVar[tuple[Split, ...]] = (
        Split("train", vqa_or("textvqa_train", "TextVQA_0.5.1_train.json"), "train_images/{image}.jpg"),
        Split("val", vqa_or("textvqa_val", "TextVQA_0.5.1_val.json"), "train_images/{image}.jpg"),
        Split("test", (("TextVQA_0.5.1_test.json",),), "test_images/{image}.jpg"),
    )


if __name__ == "__main__":
    sys.exit(annotations.main(Textvqa))
