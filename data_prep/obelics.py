"""OBELICS (arXiv 2306.16527): 141M documents of Common Crawl, 353M images, 115B tokens; text in the pages' own order.

    python data_prep/obelics.py source=OBELICS/data/ images=s3://images out=s3://corpora/obelics tasks=128

``source`` holds the parquet files of HuggingFaceM4/OBELICS (377 GB; data/ lacks the images that were opted out,
opt_out_docs_removed_2023_07_12/ whole such documents too: 135M are left), or the same as JSON lines, plain or in
archives (.jsonl.zip). The corpus is CC-BY-4.0; the images belong to their owners.
"""

import sys
from collections.abc import Mapping
from typing import ClassVar

from hpc_mm import prepare
from hpc_mm.data.documents import Record, natural_parts, natural_urls
from hpc_mm.data.schema import Sample


class Obelics(prepare.Documents):
    TELLS_SIZES: ClassVar[bool] = True

    def forms(self) -> list[list[str]]:
        return [["images", "texts"]]


def urls(record: Record, options: Obelics) -> list[str]:
    return natural_urls(record)


def arrange(record: Record, sample_id: str, images: Mapping[str, bytes], options: Obelics) -> Sample:
    facts = {"general_metadata": record.get("general_metadata")}
    return Sample(sample_id, natural_parts(record, images, options.max_images), facts)


if __name__ == "__main__":
    sys.exit(prepare.main(Obelics, urls, arrange))
