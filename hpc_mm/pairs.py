"""What data_prep/ scripts of image-caption pairs share: a column of URLs or file names, a column of captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from hpc_mm.data.documents import BrokenRecord, Record
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.prepare import NamedImages, Preparation


class Pairs(NamedImages):
    """What scripts of image-caption pairs take."""

    columns: str = Field("", description="names of a .tsv file's values, with commas; empty = its first line has them")
    url: str = Field("url", description="column of the images' URLs")
    file: str = Field("", description="column of the names of image files, in place of url")
    caption: str = Field("caption", description="column of the captions")

    def forms(self) -> list[list[str]]:
        return [[self.file or self.url, self.caption]]

    def url_columns(self) -> list[str]:
        return self.forms()[0]

    def is_fetched(self, name: str) -> bool:
        return NamedImages.is_fetched(self, name) if self.file else True

    def key(self, name: str) -> str:
        return NamedImages.key(self, name) if self.file else Preparation.key(self, name)


def urls(record: Record, options: Pairs) -> list[str]:
    for name in options.forms()[0]:
        if not isinstance(record.get(name), str):
            raise BrokenRecord(f"{name} is missing")
    return [record[options.file or options.url]]


def arrange(record: Record, sample_id: str, images: Mapping[str, bytes], options: Pairs) -> Sample:
    """The image with everything else that is said of it, then the caption."""
    column = options.file or options.url
    data = images.get(options.key(record[column]))
    found = [Image(data, facts={"url" if column == options.url else "file": record[column], **facts(record, options)})]
    return Sample(sample_id, (*(found if data is not None else []), Text(record[options.caption])))


def facts(record: Record, options: Pairs) -> dict[str, Any]:
    """Scores, sizes and all else that is not empty, under the names that the corpus gives them."""
    return {name: value for name, value in record.items() if name not in options.forms()[0] and value is not None}
