"""LLaVA-1.5's instructions (arXiv 2310.03744): 665,298 chats, 624,610 with an image, of ten academic and GPT-4 sources.

    python data_prep/llava_mix665k.py source=llava_v1_5_mix665k.json images=playground/data out=s3://corpora/mix665k
    python data_prep/llava_mix665k.py flatten=true ... out=s3://corpora/mix665k-flat

``images`` holds the folders coco/train2017, gqa/images, ocr_vqa/images, textvqa/train_images and vg/VG_100K{,_2}. A
chat whose image is missing is left out (OCR-VQA's must all be .jpg). ``flatten`` makes a sample of each question and
answer, as CLIP-FlanT5 was trained, from the original file: the published flattened one has marks in chats without an
image. CC-BY-4.0 as far as the terms of GPT-4 and ShareGPT allow (as its page says; check); the images belong to their
owners.
"""

import sys
from collections.abc import Iterator

from pydantic import Field

from hpc_mm import prepare
from hpc_mm.chats import Chats, arrange, single_turns, urls
from hpc_mm.data.documents import BrokenRecord, Record
from hpc_mm.data.parts import SourcePart
from hpc_mm.data.store import Store


class Mix665k(Chats):
    flatten: bool = Field(False, description="a sample of each question and its answer, without the turns before")

    def records(self, store: Store, part: SourcePart) -> Iterator[Record | BrokenRecord]:
        found = super().records(store, part)
        return single_turns(found) if self.flatten else found


if __name__ == "__main__":
    sys.exit(prepare.main(Mix665k, urls, arrange))
