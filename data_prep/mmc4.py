"""MMC4 1.1 (arXiv 2304.06939): 101M documents of C4 with 571M images, beside the sentences they are most similar to.

    python data_prep/mmc4.py source=mmc4/ images=s3://images out=s3://corpora/mmc4 tasks=256

``source`` holds allenai/mmc4's docs_shard_*.jsonl.zip files, or the JSON lines in them. Images under 11,000 bytes are
left out, and so are those less similar than 0.24 to their sentence, which itself stays; both as in OpenFlamingo's
training. A document without any image left is left out. What the corpus adds to C4 is ODC-BY, and Common Crawl's terms
of use hold; the images belong to their owners.
"""

import sys
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field

from hpc_mm import prepare
from hpc_mm.data.documents import BrokenRecord, Record, assigned_parts, matrix
from hpc_mm.data.schema import Sample, Text


class Mmc4(prepare.Preparation):
    PACKED: ClassVar[frozenset[str]] = prepare.Preparation.PACKED | {"min_similarity"}

    min_image_bytes: int = Field(11_000, ge=0, description="smaller image files, mostly icons, are left out")
    min_similarity: float | None = Field(
        0.24, description="images less similar to their sentence are left out; 0 keeps all"
    )

    def forms(self) -> list[list[str]]:
        return [["text_list", "image_info", "similarity_matrix"]]


def urls(record: Record, options: Mmc4) -> list[str]:
    try:
        return [info["raw_url"] for info in record["image_info"]]
    except (KeyError, TypeError):
        raise BrokenRecord("image_info has no raw_url") from None


def arrange(record: Record, sample_id: str, images: Mapping[str, bytes], options: Mmc4) -> Sample:
    if "text_list" not in record or "similarity_matrix" not in record:
        raise BrokenRecord("text_list or similarity_matrix is missing")
    similarity = matrix(record["similarity_matrix"])
    parts = assigned_parts(record["text_list"], urls(record, options), similarity, images)
    smallest = options.min_similarity or -np.inf
    kept = (part for part in parts if isinstance(part, Text) or part.facts["similarity"] >= smallest)
    return Sample(sample_id, tuple(kept), {"url": record.get("url")})


if __name__ == "__main__":
    sys.exit(prepare.main(Mmc4, urls, arrange))
