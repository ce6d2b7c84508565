"""Chats of multi_token (github.com/sshh12/multi_token): messages with marks, and a list of items for each kind of mark.

    python data_prep/multi_token.py source=llava-finetune/ strip=/data/images/ images=images out=s3://corpora/chats

``source`` holds the arrow files that ``Dataset.save_to_disk`` writes, parquet, or JSON lines: ``id``, ``messages``
(role and content) and ``images`` for the ``<image>`` marks (file names or URLs) or ``documents`` (chunks of text) for
``<document>``. Chats with sounds or videos are left out. The sets of its author have 0.1M to 1M chats under the
licences of what they were made from (LLaVA, Wikipedia, LongAlpaca, ...).
"""

import sys
from collections.abc import Mapping

from hpc_mm import prepare
from hpc_mm.chats import Chats, chat_parts, found_images, names_of
from hpc_mm.config import IMAGE_TOKEN
from hpc_mm.data.documents import BrokenRecord, Record, checked_text
from hpc_mm.data.schema import Sample

OTHER_MEDIA = ("speech_audios", "sounds", "videos", "imagebinds")


class MultiToken(Chats):
    def forms(self) -> list[list[str]]:
        return [["messages"]]


def urls(record: Record, options: Chats) -> list[str]:
    for name in OTHER_MEDIA:
        if record.get(name):
            raise BrokenRecord(f"it has {name}")
    return names_of(record.get("images"))


def arrange(record: Record, sample_id: str, images: Mapping[str, bytes], options: Chats) -> Sample:
    try:
        turns = [(message["role"], message["content"]) for message in record["messages"]]
    except (KeyError, TypeError):
        raise BrokenRecord("messages is not a list of messages with role and content") from None
    documents = record.get("documents") or []
    if not turns or not isinstance(documents, list):
        raise BrokenRecord("messages is empty" if not turns else "documents is not a list")
    found = found_images(urls(record, options), images, options)
    items = {IMAGE_TOKEN: found, "<document>": [checked_text(document) for document in documents]}
    return Sample(sample_id, chat_parts(turns, items), {"id": record.get("id")})


if __name__ == "__main__":
    sys.exit(prepare.main(MultiToken, urls, arrange))
