"""LAION-2B-en (arXiv 2210.08402) and its subsets: up to 2.3B images of Common Crawl with their alternative texts.

    python data_prep/laion.py source=laion2B-en/ images=s3://images out=s3://corpora/laion tasks=128

``source`` holds the parquet files (URL, TEXT, similarity, punsafe, AESTHETIC_SCORE, ...), or tables or JSON lines of
the same. It was withdrawn in 2023; the columns of its successor re-LAION are ``url=url caption=caption``. All other
columns are kept with the image. Tars that img2dataset wrote need none of this: ``python -m hpc_mm.index
shards=ADDRESS`` indexes them in place. The metadata is CC-BY-4.0 (as its page says; check); the images belong to their
owners.
"""

import sys
from typing import ClassVar

from pydantic import Field

from hpc_mm import prepare
from hpc_mm.pairs import Pairs, arrange, urls


class Laion(Pairs):
    TELLS_SIZES: ClassVar[bool] = True

    url: str = Field("URL", description="column of the images' URLs")
    caption: str = Field("TEXT", description="column of the captions")


if __name__ == "__main__":
    sys.exit(prepare.main(Laion, urls, arrange))
