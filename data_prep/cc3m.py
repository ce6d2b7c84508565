"""Conceptual Captions: CC3M, 3.3M images of the web with cleaned captions, CC12M (arXiv 2102.08981), and the like.

    python data_prep/cc3m.py source=Train_GCC-training.tsv images=s3://images out=s3://corpora/cc3m
    python data_prep/cc3m.py source=cc12m.tsv columns=url,caption images=s3://images out=s3://corpora/cc12m
    python data_prep/cc3m.py source=cc3m_train.tsv columns=caption,image file=image images=training out=s3://corpora/cc3m

``source`` is CC3M's table as published (caption, then URL, no header), one of other ``columns``, parquet or JSON lines.
The third command reads FROMAGe's table of captions and names of image files in a folder. Google allows any use of the
tables (as its page says; check); the images belong to their owners.
"""

import sys

from pydantic import Field

from hpc_mm import prepare
from hpc_mm.pairs import Pairs, arrange, urls


class Cc3m(Pairs):
    columns: str = Field(
        "caption,url", description="names of a .tsv file's values, with commas; empty = its first line has them"
    )


if __name__ == "__main__":
    sys.exit(prepare.main(Cc3m, urls, arrange))
