"""align-anything (arXiv 2412.15838), text and image to text and image: 27,012 questions with two judged answers each.

    python data_prep/chameleon.py source=train_27k.json images=images out=s3://corpora/align-anything

``source`` is a JSON list of one of three forms; its images are file names, URLs, lists of these, or null:
answers to learn from (question, image_url, response, output_image_url); pairs of them (input_text, input_image,
better_text, better_img, worse_text, worse_img); a question (question, image_url) and two judged answers (response_1,
output_image_url_1, response_2, output_image_url_2). These are the fields that align-anything's own code reads; which
one holds the judgement differs among its sets (``better``). Images stand before the text that they came with, as in the
published tokenisation. All other fields are kept as metadata. CC-BY-NC-4.0; 162 MB and 28 GB of images.
"""

import sys
from collections.abc import Mapping, Sequence

from pydantic import Field

from hpc_mm import prepare
from hpc_mm.chats import Chats, found_images, names_of
from hpc_mm.data.documents import BrokenRecord, Record, checked_text
from hpc_mm.data.schema import Part, Sample, Text

# role of the sample's parts, field of the text, field of the images
Form = Sequence[tuple[str, str, str]]
ANSWERS: Form = (("user", "question", "image_url"), ("assistant", "response", "output_image_url"))
PAIRS: Form = (
    ("user", "input_text", "input_image"),
    ("chosen", "better_text", "better_img"),
    ("rejected", "worse_text", "worse_img"),
)


class Chameleon(Chats):
    text_1: str = Field("response_1", description="field of the first of two judged answers")
    image_1: str = Field("output_image_url_1", description="field of its images")
    text_2: str = Field("response_2", description="field of the second answer")
    image_2: str = Field("output_image_url_2", description="field of its images")
    better: str = Field("overall_response", description="field that says which is better: 1 or 2")

    def forms(self) -> list[list[str]]:
        known = [[text for _, text, _ in form] for form in (PAIRS, ANSWERS)]
        return [*known, ["question", self.text_1, self.text_2, self.better]]


def form(record: Record, options: Chameleon) -> Form:
    """Which fields of a record become which parts."""
    for known in (PAIRS, ANSWERS):
        if all(text in record for _, text, _ in known):
            return known
    if options.better not in record:
        raise BrokenRecord("it has the fields of none of the three forms")
    better = str(record[options.better])
    if better not in ("1", "2"):
        raise BrokenRecord(f"{options.better} is neither 1 nor 2")
    roles = ("chosen", "rejected") if better == "1" else ("rejected", "chosen")
    first, second = (roles[0], options.text_1, options.image_1), (roles[1], options.text_2, options.image_2)
    return (ANSWERS[0], first, second) if better == "1" else (ANSWERS[0], second, first)


def urls(record: Record, options: Chameleon) -> list[str]:
    return [name for _, _, field in form(record, options) for name in names_of(record.get(field))]


def arrange(record: Record, sample_id: str, images: Mapping[str, bytes], options: Chameleon) -> Sample:
    fields = form(record, options)
    parts: list[Part] = []
    for role, text, image in fields:
        parts += found_images(names_of(record.get(image)), images, options, role)
        parts.append(Text(checked_text(record.get(text)), role))
    used = {field for _, text, image in fields for field in (text, image)}
    return Sample(sample_id, tuple(parts), {name: value for name, value in record.items() if name not in used})


if __name__ == "__main__":
    sys.exit(prepare.main(Chameleon, urls, arrange))
