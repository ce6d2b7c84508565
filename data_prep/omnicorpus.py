"""OmniCorpus (arXiv 2406.08418): documents of the web, 988M of Common Crawl with 3.3 images and 757 tokens each.

    python data_prep/omnicorpus.py source=OmniCorpus-CC/ images=s3://images out=s3://corpora/omnicorpus tasks=512

``source`` holds the parquet files of OpenGVLab/OmniCorpus-CC (or -CC-210M), or the same as JSON lines. The documents
with similarities (``sentences``, ``matrix``, ``images_info``) are placed by them, and their images under 11,000
bytes are left out, as in its authors' training. Text and URLs are CC-BY-4.0; the images belong to their owners.
"""

import sys
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field

from hpc_mm import prepare
from hpc_mm.data.documents import BrokenRecord, Record, assigned_parts, matrix, natural_parts, natural_urls
from hpc_mm.data.schema import Sample


class OmniCorpus(prepare.Documents):
    PACKED: ClassVar[frozenset[str]] = prepare.Documents.PACKED | {"min_placed_image_bytes"}

    min_placed_image_bytes: int = Field(
        11_000, ge=0, description="smaller image files of documents with similarities are left out"
    )

    def url_columns(self) -> list[str]:
        return [*super().url_columns(), "matrix", "images_info"]

    def forms(self) -> list[list[str]]:
        return [["images", "texts"], ["sentences", "images_info", "matrix"]]

    def smallest(self, record: Record) -> int:
        return max(self.min_image_bytes, self.min_placed_image_bytes if has_matrix(record) else 0)


def has_matrix(record: Record) -> bool:
    return record.get("matrix") is not None


def urls(record: Record, options: OmniCorpus) -> list[str]:
    return image_urls(record) if has_matrix(record) else natural_urls(record)


def image_urls(record: Record) -> list[str]:
    try:
        return [info["name"][0] for info in record["images_info"]]
    except (KeyError, TypeError, IndexError):
        raise BrokenRecord("images_info has no name") from None


def arrange(record: Record, sample_id: str, images: Mapping[str, bytes], options: OmniCorpus) -> Sample:
    if not has_matrix(record):
        facts = {"general_metadata": record.get("general_metadata")}
        return Sample(sample_id, natural_parts(record, images, options.max_images), facts)
    try:
        sentences = [sentence for (sentence,) in record["sentences"]]
        raw = matrix([row for (row,) in record["matrix"]])
    except (KeyError, TypeError, ValueError):
        raise BrokenRecord("sentences or matrix are not lists of one-element lists") from None
    # Similarity is a probability over the document's sentences, as in the corpus authors' training.
    share = np.exp(raw - raw.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    return Sample(sample_id, assigned_parts(sentences, image_urls(record), share, images))


if __name__ == "__main__":
    sys.exit(prepare.main(OmniCorpus, urls, arrange))
