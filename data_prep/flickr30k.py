"""Flickr30k (TACL 2014, Young et al.) in A. Karpathy's splits: 31,014 images with five captions each.

    python data_prep/flickr30k.py source=caption_datasets.zip images=flickr30k-images/ out=s3://benchmarks/flickr30k

``source`` is Karpathy's archive or its dataset_flickr30k.json; splits: train (29,000 images), val (1,014) and test
(1,000). ``images`` is the folder of the images (4.4 GB), which are for non-commercial research and education, under
Flickr's terms.
"""

import sys
from typing import ClassVar

from hpc_mm import annotations
from hpc_mm.annotations import Split


class Flickr30k(annotations.Captions):
    SPLITS: ClassVar[tuple[Split, ...]] = annotations.karpathy("dataset_flickr30k.json", "train", "val", "test")


if __name__ == "__main__":
    sys.exit(annotations.main(Flickr30k))
