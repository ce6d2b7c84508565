import random
from typing import Any

import numpy as np
import pytest
import samples
import torch
from chat_samples import chat, image, t5_tokenizer
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from hpc_mm.config import IMAGE_PLACE, ConfigError, ImageSpec, Source
from hpc_mm.data.batch import IGNORED, LeftOut, Row, Unusable
from hpc_mm.data.chat import chat_row, collate_chats, spliced_ids
from hpc_mm.data.images import decode
from hpc_mm.data.schema import Image, Sample, Text

TOKENIZER = t5_tokenizer()
END = 1
SPEC = ImageSpec(16, samples.SPEC.mean, samples.SPEC.std, square="pad", tokens=4)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def user(text: str) -> Text:
    return Text(text, "user")


def answer(text: str) -> Text:
    return Text(text, "assistant")


def row(parts: tuple[Any, ...], epoch: int = 0, sample_id: str = "sample", **source: Any) -> Row:
    values = {"data": "x", "form": "chat", "template": "t5_v1", "batch": 1, "max_tokens": 400, **source}
    return chat_row(Sample(sample_id, parts), Source(**values), TOKENIZER, SPEC, seed=0, epoch=epoch)


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def shown(found: Row, *numbers: int) -> bool:
    """Whether the row's images are these pictures in this order."""
    expected = [decode(image(number).data or b"", SPEC) for number in numbers]
    return len(expected) == len(found.images) and all(map(np.array_equal, found.images, expected))


# ---------------------------------------------------------------- tokens around images


def test_every_chunk_around_an_image_has_its_end() -> None:
    assert spliced_ids("<image>", TOKENIZER).tolist() == [END, IMAGE_PLACE, END]
    assert spliced_ids("a red<image>\nstar", TOKENIZER).tolist() == [*ids("a red"), IMAGE_PLACE, *ids("star")]
    assert ids("a red")[-1] == ids("\nstar")[-1] == END
    assert spliced_ids("a<image>\n<image>b", TOKENIZER).tolist() == [*ids("a"), -200, END, -200, *ids("b")]
    assert spliced_ids("a", TOKENIZER).tolist() == ids("a")


def test_a_word_tokenizer_that_ends_text() -> None:
    """A tokenizer.json of the shapes corpus: its own end token, added by a post-processor."""
    words = samples.word_tokenizer()
    with pytest.raises(ConfigError, match="ends no text with its eos_token=</s>, as T5's does"):
        spliced_ids("a red star", words)
    end = words.eos_token_id
    words.backend_tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", end)])
    ended = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, eos_token="</s>", pad_token="<PAD>")
    red = ended.convert_tokens_to_ids("red")
    assert spliced_ids("<image>red", ended).tolist() == [end, IMAGE_PLACE, red, end]


# ---------------------------------------------------------------- chats


def test_a_question_and_its_answer() -> None:
    found = row((user("What is"), image(1, "user"), user("this? "), answer(" a red circle ")))
    question = f"{SYSTEM} USER: <image>\nWhat isthis? ASSISTANT: "
    before, after = question.split("<image>")
    assert found.input_ids.tolist() == [*ids(before), IMAGE_PLACE, *ids(after)]
    assert found.labels.tolist() == ids("a red circle") and found.labels[-1] == END
    assert shown(found, 1) and not found.cut
    assert found.length == len(found.input_ids) + 3 + len(found.labels)


def test_earlier_turns_are_part_of_the_question() -> None:
    talk = (image(1, "user"), user("\na star?"), answer("Yes"), user("left"), image(2, "user"), answer("right"))
    found = row(talk)
    before, between, after = f"{SYSTEM} USER: <image>\na star? ASSISTANT: Yes USER: <image>\nleft ASSISTANT: ".split(
        "<image>"
    )
    assert found.input_ids.tolist() == [*ids(before), IMAGE_PLACE, *ids(between), IMAGE_PLACE, *ids(after)]
    assert found.labels.tolist() == ids("right") and shown(found, 1, 2)


def test_what_comes_before_the_user_is_dropped() -> None:
    talk = (image(1, "user"), user("a star?"), answer("Yes"))
    before = (Text("be brief", "system"), answer("hello"))
    assert row((*before, *talk)).input_ids.tolist() == row(talk).input_ids.tolist()


def test_a_chat_without_an_image() -> None:
    found = row((user("a star?"), answer("Yes")))
    assert found.input_ids.tolist() == ids(f"{SYSTEM} USER: a star? ASSISTANT: ") and found.images == []


def test_a_pair_is_a_chat_without_a_question() -> None:
    found = row((image(1), Text(" "), Text("a red star")))
    before, after = f"{SYSTEM} USER: <image> ASSISTANT: ".split("<image>")
    assert found.input_ids.tolist() == [*ids(before), IMAGE_PLACE, *ids(after)]
    assert found.labels.tolist() == ids("a red star") and shown(found, 1)


@pytest.mark.parametrize("parts", [(image(1), Text("a red star")), (user("x"), image(1, "user"), answer("a red star"))])
def test_stage_one_rows(parts: tuple[Any, ...]) -> None:
    found = row(parts, template="t5_plain")
    assert found.input_ids.tolist() == [END, IMAGE_PLACE, END] and found.labels.tolist() == ids("a red star")
    split = row(parts, template="t5_plain_split_text")
    chance = random.Random("0/0/sample")
    chance.random()  # the coin that mirrors the image
    at = chance.randint(1, 5)
    assert split.input_ids.tolist() == [END, IMAGE_PLACE, *ids("a red star"[:at])]
    assert split.labels.tolist() == ids("a red star"[at:])


def test_splits_differ_by_epoch_and_sample_and_stay() -> None:
    def split(epoch: int, sample_id: str) -> list[int]:
        parts = (image(1), Text("a large red star left of the small blue circle"))
        return list(row(parts, epoch, sample_id, template="t5_plain_split_text").labels)

    found = [[split(epoch, f"s{i}") for i in range(30)] for epoch in (0, 1)]
    assert found == [[split(epoch, f"s{i}") for i in range(30)] for epoch in (0, 1)]
    assert sum(one == other for one, other in zip(*found, strict=True)) < 10  # 1 to 23: 1.3 would be expected
    assert len(set(map(tuple, found[0]))) > 10


def test_flips_mirror_the_picture() -> None:
    (found,) = row((image(1), Text("a")), flip=1.0).images
    assert np.array_equal(found[:, ::-1], decode(image(1).data or b"", SPEC))


# ---------------------------------------------------------------- text that looks like special tokens


PIECES = ["<image>", "</s>", "<pad>", "<extra_id_0>", "<", "image>", "<im", "age>", "s>", " ", "a"]


@given(st.lists(st.sampled_from(PIECES), max_size=8), st.sampled_from(["t5_v1", "t5_plain", "t5_plain_split_text"]))
def test_no_text_makes_a_special_token(pieces: list[str], template: str) -> None:
    text = "".join(pieces)
    talk = (user(f"{text}<im"), image(1, "user"), user(f"age>{text}"), answer(f"a {text}"))
    found = row(talk, template=template)
    assert (found.input_ids == IMAGE_PLACE).sum() == 1 == len(found.images)
    assert (found.input_ids == END).sum() == 2 and (found.labels == END).sum() == 1
    extra = set(TOKENIZER.convert_tokens_to_ids(["<pad>", "<extra_id_0>"]))
    assert not extra & {*found.input_ids.tolist(), *found.labels.tolist()}


# ---------------------------------------------------------------- cutting


def test_long_text_is_cut_on_the_right_and_counted() -> None:
    talk = (image(1, "user"), user("a red star " * 30), answer("a small circle " * 100))
    whole = row(talk, max_tokens=999)
    assert not whole.cut and min(len(whole.input_ids), len(whole.labels)) > 200
    for room in (200, len(whole.input_ids) - 1, len(whole.labels) - 1):
        found = row(talk, max_tokens=room)
        assert found.cut
        assert found.input_ids.tolist() == whole.input_ids[:room].tolist()
        assert found.labels.tolist() == whole.labels[:room].tolist()
    assert not row(talk, max_tokens=max(len(whole.input_ids), len(whole.labels))).cut


def test_no_image_is_cut() -> None:
    talk = (user("a"), answer("b"), image(1, "user"), user("a red star"), answer("a"))
    place = int(np.flatnonzero(row(talk).input_ids == IMAGE_PLACE)[0])
    assert row(talk, max_tokens=place + 1).input_ids[-1] == IMAGE_PLACE
    with pytest.raises(LeftOut, match=r"^image beyond max_tokens$"):
        row(talk, max_tokens=place)


# ---------------------------------------------------------------- what is left out


@pytest.mark.parametrize(
    ("parts", "source", "reason"),
    [
        ((), {}, "no answer at the end"),
        ((image(1),), {}, "no answer at the end"),
        ((image(1), Text(" <image> ")), {}, "no answer at the end"),
        ((user("a?"), answer("b"), user("c?")), {}, "no answer at the end"),
        ((answer("b"),), {}, "no answer at the end"),
        ((user("a?"), answer("</s>")), {}, "no answer at the end"),
        ((user("a?"), answer("b"), image(1, "assistant")), {}, "an image in the answer"),
        ((image(1, "system"), user("a?"), answer("b")), {}, "an image before the first question"),
        ((user("a?"), Text("x", "system"), answer("b")), {}, "a turn of system"),
        ((user("a?"), Text("x"), answer("b")), {}, "a turn of nobody"),
        ((user("a?"), answer("b"), Text("c", "chosen"), Text("d", "rejected")), {}, "a turn of chosen"),
        ((user(" "), answer("b")), {}, "an empty turn"),
        ((Text("a star"),), {}, "an empty turn"),
        ((Text("a star"),), {"template": "t5_plain"}, r"no image \(t5_plain\)"),
        ((user("a?"), answer("b")), {"template": "t5_plain_split_text"}, r"no image \(t5_plain_split_text\)"),
        (chat(1, questions=2).parts, {"template": "t5_plain"}, r"several questions \(t5_plain\)"),
        (chat(1, images=2).parts, {"max_images": 1}, r"2 images \(max_images\)"),
        ((image(1, similarity=0.1), Text("a")), {"min_similarity": 0.2}, "similarity"),
    ],
)
def test_what_rules_leave_out(parts: tuple[Any, ...], source: dict[str, Any], reason: str) -> None:
    with pytest.raises(LeftOut, match=f"^{reason}$"):
        row(parts, **source)


def test_an_image_that_cannot_be_read_takes_its_chat_along() -> None:
    with pytest.raises(Unusable, match="image 1: UnidentifiedImageError"):
        row((image(1, "user"), Image(b"no image", role="user"), user("a?"), answer("b")))
    with pytest.raises(Unusable, match="image 0: its bytes are not in the shard"):
        row((Image(key="elsewhere"), Text("a")))


# ---------------------------------------------------------------- properties and batches

speech = st.lists(st.sampled_from([*samples.WORDS, "<image>", "\n"]), min_size=1, max_size=9).map(" ".join)
asked = st.tuples(speech, st.integers(0, 2), speech)


@st.composite
def chats(draw: Any) -> tuple[Any, ...]:
    parts: list[Any] = []
    for question, images, reply in draw(st.lists(asked, min_size=1, max_size=3)):
        parts += [image(draw(st.integers(0, 3)), "user") for _ in range(images)]
        parts += [user(f"a {question}"), answer(f"a {reply}")]
    return tuple(parts)


@given(
    bodies=st.lists(chats(), min_size=1, max_size=4),
    max_tokens=st.integers(1, 260),
    template=st.sampled_from(["t5_v1", "t5_plain_split_text"]),
    epoch=st.integers(0, 3),
)
def test_rows_keep_their_images_and_ends_and_batches_count_them(
    bodies: list[tuple[Any, ...]], max_tokens: int, template: str, epoch: int
) -> None:
    rows, expected = [], []
    for place, parts in enumerate(bodies):
        try:
            found = row(parts, epoch, f"{place}", max_tokens=max_tokens, template=template)
        except LeftOut:
            continue
        rows.append(found)
        expected.append(sum(isinstance(part, Image) for part in parts))
        again = row(parts, epoch, f"{place}", max_tokens=max_tokens, template=template)
        assert (found.input_ids.tolist(), found.labels.tolist()) == (again.input_ids.tolist(), again.labels.tolist())
    assume(rows)
    for found, images in zip(rows, expected, strict=True):
        assert (found.input_ids == IMAGE_PLACE).sum() == len(found.images) == images
        assert found.cut or (found.labels[-1] == END and found.input_ids[-1] == END)
        assert 1 <= len(found.labels) <= max_tokens and 1 <= len(found.input_ids) <= max_tokens
    batch = collate_chats([[found] for found in rows], SPEC)
    encoders = [len(found.input_ids) + 3 * len(found.images) for found in rows]
    assert batch.tokens == sum(found.length for found in rows) == sum(encoders) + batch.targets
    assert batch.targets == sum(len(found.labels) for found in rows)
    assert batch.padded_tokens == len(rows) * (max(encoders) + max(len(found.labels) for found in rows))
    assert batch.pairs == sum(length**2 for length in encoders)
    assert batch.cut == [found.id for found in rows if found.cut]
    assert batch.image_counts.tolist() == expected and len(batch.images) == sum(expected)
    shared = collate_chats([rows[::2], rows[1::2]] if rows[1:] else [rows], SPEC)
    assert (shared.tokens, shared.targets, shared.pairs) == (batch.tokens, batch.targets, batch.pairs)
    assert sorted(shared.ids) == sorted(batch.ids) and sorted(shared.cut) == sorted(batch.cut)
    assert len(shared.images) == len(batch.images)


def test_chats_that_share_a_row_are_told_apart() -> None:
    long, short = row(chat(1, images=2).parts), row((user("a?"), answer("Yes")), sample_id="short")
    batch = collate_chats([[long, short], [short]], SPEC)
    assert batch.segments is not None and batch.answer_segments is not None
    for kept, segments, pad in (
        (batch.input_ids, batch.segments, 0),
        (batch.labels, batch.answer_segments, IGNORED),
    ):
        parts = ("input_ids", "labels")[kept is batch.labels]
        assert kept[0][segments[0] == 0].tolist() == getattr(long, parts).tolist()
        assert kept[0][segments[0] == 1].tolist() == getattr(short, parts).tolist()
        assert kept[1][segments[1] == 0].tolist() == getattr(short, parts).tolist()
        assert (kept[segments == -1] == pad).all()
        assert segments[0].tolist() == sorted(segments[0].tolist())
    assert torch.equal(batch.attention_mask, (batch.segments >= 0).long())
    assert batch.ids == ["sample", "short", "short"] and batch.image_counts.tolist() == [2, 0]
    moved = batch.to("cpu")
    assert moved.answer_segments is not None and torch.equal(moved.answer_segments, batch.answer_segments)


def test_a_batch_is_padded_on_the_right() -> None:
    long, short = row(chat(1, images=2).parts), row((user("a?"), answer("Yes")), sample_id="short")
    batch = collate_chats([[long], [short]], SPEC, [("x", "gone")], [("y", "rule")])
    assert len(long.labels) > len(short.labels) and len(long.input_ids) > len(short.input_ids)
    length, replied = len(short.input_ids), len(short.labels)
    assert batch.input_ids[0].tolist() == long.input_ids.tolist() and batch.labels[0].tolist() == long.labels.tolist()
    assert batch.input_ids[1].tolist() == [*short.input_ids, *[0] * (len(long.input_ids) - length)]
    assert batch.labels[1].tolist() == [*short.labels, *[IGNORED] * (len(long.labels) - replied)]
    assert batch.attention_mask.sum(1).tolist() == [len(long.input_ids), length]
    assert batch.attention_mask[1, :length].all() and batch.segments is batch.answer_segments is None
    assert batch.ids == ["sample", "short"] and batch.unreadable == [("x", "gone")]
    assert batch.left_out == [("y", "rule")] and batch.cut == [] and batch.lost_images == []
    moved = batch.to("cpu", torch.bfloat16)
    assert type(moved) is type(batch) and moved.images.shape == (2, 3, 16, 16) and moved.tokens == batch.tokens


def test_a_batch_of_nothing_is_one_row_without_target_and_image() -> None:
    batch = collate_chats([], SPEC)
    assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape == (1, 1)
    assert batch.attention_mask.tolist() == [[1]] and batch.labels.tolist() == [[IGNORED]]
    assert batch.targets == 0 and batch.image_counts.tolist() == [0]
    assert batch.ids == [] and batch.to("cpu").images.shape == (0, 3, 16, 16)
    assert (batch.tokens, batch.padded_tokens, batch.pairs) == (1, 2, 1)


# ---------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"form": "chat"}, "form=chat wants a template, one of t5_plain_split_text, t5_plain, t5_v1"),
        ({"form": "pairs", "template": "t5_v1"}, "template=t5_v1 is for form=chat alone; form=pairs has none"),
        ({"form": "chat", "template": "t5_v1", "pack_tokens": 31}, "pack_tokens=31 must be max_tokens=32 or more"),
    ],
)
def test_sources_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(data="x", batch=1, max_tokens=32, **values)
