"""Image-caption pairs listed as URL and caption: CC3M (3.3M), CC12M (12.4M), LAION-2B-en (2.3B) and the like.

    python data_prep/pairs.py source=cc12m.tsv images=s3://images out=s3://corpora/cc12m
    python data_prep/pairs.py source=laion/ url=URL caption=TEXT images=s3://images out=s3://corpora/laion tasks=128

``source`` is tab-separated text without a header (``columns`` in order), JSON lines or parquet. Tars that img2dataset
wrote need none of this: ``python -m hpc_mm.index shards=ADDRESS`` indexes them in place. CC3M and CC12M may be used for
any purpose, LAION's metadata is CC-BY-4.0; the images belong to their owners.
"""

import sys
from collections.abc import Mapping

from pydantic import Field

from hpc_mm import prepare
from hpc_mm.data.documents import BrokenRecord, Record
from hpc_mm.data.schema import Image, Sample, Text, image_key


class Pairs(prepare.Preparation):
    columns: str = Field("url,caption", description="names of a .tsv file's values in order; it has no header")
    url: str = Field("url", description="name of the URL's column")
    caption: str = Field("caption", description="name of the caption's column")


def urls(record: Record, options: Pairs) -> list[str]:
    if not isinstance(record.get(options.url), str) or not isinstance(record.get(options.caption), str):
        raise BrokenRecord(f"{options.url} or {options.caption} is missing")
    return [record[options.url]]


def arrange(record: Record, sample_id: str, images: Mapping[str, bytes], options: Pairs) -> Sample:
    url = record[options.url]
    found = [Image(images[image_key(url)], facts={"url": url})] if image_key(url) in images else []
    return Sample(sample_id, (*found, Text(record[options.caption])))


if __name__ == "__main__":
    sys.exit(prepare.main(Pairs, urls, arrange))
