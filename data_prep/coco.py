"""COCO captions (arXiv 1504.00325) in A. Karpathy's splits: 123,287 images with five captions or more.

    python data_prep/coco.py source=caption_datasets.zip images=coco/ out=s3://benchmarks/coco splits=test

``source`` is Karpathy's archive or its dataset_coco.json; splits: train (82,783 images), restval (30,504), val and test
(5,000 each). ``images`` holds train2014/ and val2014/ (19 GB). The captions are CC-BY-4.0 (as its page says; check);
the images are Flickr's, under its terms.
"""

import sys
from typing import ClassVar

from hpc_mm import annotations
from hpc_mm.annotations import Split


class Coco(annotations.Captions):
    SPLITS: ClassVar[tuple[Split, ...]] = annotations.karpathy("dataset_coco.json", "train", "restval", "val", "test")


if __name__ == "__main__":
    sys.exit(annotations.main(Coco))
