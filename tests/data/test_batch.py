import importlib.util
import random
import textwrap
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pytest
import samples
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import SPEC
from transformers import AddedToken

from hpc_mm.config import ENDOFCHUNK_TOKEN, IMAGE_TOKEN, ConfigError, Source
from hpc_mm.data.batch import (
    IGNORED,
    LeftOut,
    Row,
    Unusable,
    collate,
    document_text,
    interleaved_labels,
    normalised,
    plain,
    to_row,
    vocabulary,
)
from hpc_mm.data.images import decode
from hpc_mm.data.schema import Image, Sample, Text

TOKENIZER = samples.word_tokenizer()
WORDS = vocabulary(TOKENIZER)
BROKEN = Image(b"no image")


def image(number: int, **facts: Any) -> Image:
    return Image(samples.encoded(samples.picture(number)), facts=facts)


def row(parts: tuple[Any, ...], epoch: int = 0, sample_id: str = "sample", **source: Any) -> Row:
    values = {"data": "x", "form": "interleaved", "batch": 1, "max_tokens": 64, "max_images": 3, **source}
    return to_row(Sample(sample_id, parts), Source(**values), TOKENIZER, SPEC, seed=0, epoch=epoch)


def said(ids: Any) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=False).replace(ENDOFCHUNK_TOKEN, "|").replace(IMAGE_TOKEN, "*")


def shown(found: Row, *numbers: int) -> bool:
    """Whether the row's images are these pictures in this order."""
    expected = [decode(image(number).data or b"", SPEC) for number in numbers]
    return len(expected) == len(found.images) and all(map(np.array_equal, found.images, expected))


# ---------------------------------------------------------------- labels


def reference_lines(form: str) -> CodeType:
    """The lines of open_flamingo's training that make the labels of a batch of pairs or of documents."""
    spec = importlib.util.find_spec("open_flamingo")
    assert spec is not None and spec.submodule_search_locations
    text = Path(spec.submodule_search_locations[0], "train", "train_utils.py").read_text()
    _, pairs, documents = text.split("labels = input_ids.clone()\n")
    found = (pairs if form == "pairs" else documents).split("labels = labels.to(device_id)")[0]
    return compile(textwrap.dedent(found), f"open_flamingo's {form}", "exec")


REFERENCE = {form: reference_lines(form) for form in ("pairs", "interleaved")}


def reference_labels(ids: torch.Tensor, form: str, tokenizer: Any) -> torch.Tensor:
    """(B, T) labels of (B, T) ids as open_flamingo 2.0.1 makes them."""
    values = {"torch": torch, "tokenizer": tokenizer, "labels": ids.clone()}
    values |= {"media_token_id": WORDS.image, "endofchunk_token_id": WORDS.endofchunk}
    exec(REFERENCE[form], values)
    return values["labels"]


@given(st.lists(st.sampled_from([WORDS.image, WORDS.endofchunk, WORDS.eos, 20, 21]), min_size=1, max_size=24))
def test_document_labels_equal_the_references(ids: list[int]) -> None:
    expected = reference_labels(torch.tensor([ids]), "interleaved", TOKENIZER)
    assert interleaved_labels(np.array(ids, dtype=np.int64), WORDS).tolist() == expected[0].tolist()


@pytest.mark.parametrize("pad", ["<PAD>", "</s>"])
def test_labels_of_padded_batches_equal_the_references(pad: str) -> None:
    """Where padding is the end token the reference takes that from the captions too, and ours does not."""
    tokenizer = samples.word_tokenizer()
    tokenizer.pad_token = pad
    chunk = (image(1), Text("a red star"))
    documents = [chunk * 3, (Text("left of"), *chunk, image(2), image(3), Text("a"), *chunk), chunk]
    captions = [(image(1), Text("a")), (image(2), Text("a red star left of the square"))]
    for form, bodies in (("interleaved", documents), ("pairs", captions)):
        source = Source(data="x", form=form, batch=1, max_tokens=24)
        rows = [to_row(Sample(f"{i}", parts), source, tokenizer, SPEC, 0, 0) for i, parts in enumerate(bodies)]
        batch = collate([[row] for row in rows], tokenizer.pad_token_id, SPEC)
        ours = batch.labels.clone()
        if form == "pairs" and pad == "</s>":
            ours[ours == tokenizer.eos_token_id] = IGNORED
        assert ours.tolist() == reference_labels(batch.input_ids, form, tokenizer).tolist()
        assert batch.targets > len(bodies)


def test_document_row() -> None:
    found = row((Text("a red"), image(1), Text("square"), image(2), Text("left of"), Text("the star")))
    assert said(found.input_ids) == "a red * square | * left of the star | </s>"
    assert said(found.labels[found.labels != IGNORED]) == "square | left of the star |"
    assert shown(found, 1, 2)


def test_pair_row() -> None:
    found = row((image(1), Text(" a red square ")), form="pairs")
    assert said(found.input_ids) == "* a red square | </s>"
    assert found.labels.tolist() == [IGNORED, *found.input_ids[1:].tolist()]
    assert shown(found, 1)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (["a", None, "b", "", "c"], "a<image>b c<|endofchunk|></s>"),
        ([None, None, "a"], "<image><|endofchunk|><image>a<|endofchunk|></s>"),
        ([None, "a", None], "<image>a<|endofchunk|><image><|endofchunk|></s>"),
        ([], "<|endofchunk|></s>"),
    ],
)
def test_document_text(parts: list[str | None], text: str) -> None:
    assert document_text(parts, WORDS) == text


# ---------------------------------------------------------------- text that looks like special tokens


@given(
    st.lists(
        st.sampled_from(["<image>", "<|endofchunk|>", "</s>", "<", "image>", "<im", "age>", " ", "a", "<PAD>"]),
        max_size=8,
    )
)
def test_no_text_makes_a_special_token(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert not any(token in plain(text, WORDS) for token in ("<image>", "<|endofchunk|>", "</s>", "<PAD>"))
    found = row((Text(text), image(1), Text(f"a {text}"), image(2), Text("b")))
    assert (found.input_ids == WORDS.image).sum() == 2 == len(found.images)
    assert (found.input_ids == WORDS.endofchunk).sum() == 2


def test_special_tokens_without_a_name_are_no_text_either() -> None:
    """A chat tokenizer's <|eot_id|> is special, but no tokenizer attribute names it."""
    tokenizer = samples.word_tokenizer()
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=True), AddedToken("<keyword>", special=False)])
    assert "<|eot_id|>" not in tokenizer.all_special_tokens
    assert plain("a <|eot_id|> <keyword> star", vocabulary(tokenizer)) == "a  <keyword> star"


def test_half_a_surrogate_pair_is_no_error() -> None:
    assert said(row((image(1), Text("a \ud800 star"))).input_ids) == "* a <unk> star | </s>"


# ---------------------------------------------------------------- cutting


@given(max_tokens=st.integers(1, 40), seed=st.integers(0, 50))
def test_images_are_those_whose_token_is_left_after_cutting(max_tokens: int, seed: int) -> None:
    draw = random.Random(seed)
    parts = [Text(samples.sentence(draw)) if draw.random() < 0.6 else image(i) for i in range(8)]
    numbers = [i for i, part in enumerate(parts) if isinstance(part, Image)]
    try:
        found = row(tuple(parts), max_tokens=max_tokens, min_images=0)
    except LeftOut as reason:
        assert str(reason) == "no text after an image"
        return
    assert len(found.input_ids) <= max_tokens
    assert shown(found, *numbers[: int((found.input_ids == WORDS.image).sum())])


def test_images_that_are_cut_away_are_not_decoded() -> None:
    found = row((image(1), Text("a red star"), BROKEN, Text("a square")), max_tokens=4)
    assert said(found.input_ids) == "* a red star" and found.lost_images == []


@pytest.mark.parametrize("max_tokens", range(4, 12))
def test_a_long_caption_keeps_its_end_tokens(max_tokens: int) -> None:
    found = row((image(1), Text("a red star left of the square")), form="pairs", max_tokens=max_tokens)
    caption = ["a", "red", "star", "left", "of", "the", "square"][: max_tokens - 3]
    assert said(found.input_ids) == " ".join(["*", *caption, "|", "</s>"])


def test_no_room_for_a_caption_is_a_user_error() -> None:
    with pytest.raises(ConfigError, match="max_tokens=2 has no room"):
        row((image(1), Text("a star")), form="pairs", max_tokens=2)


# ---------------------------------------------------------------- images that fail, and rules


def test_an_unreadable_image_vanishes_and_the_next_takes_its_place() -> None:
    parts = (image(1), Text("a"), BROKEN, Text("red"), Image(key="elsewhere"), Text("star"), image(2), image(3))
    found = row((*parts, Text("square")))
    assert said(found.input_ids) == "* a red star | * | * square | </s>"
    assert shown(found, 1, 2, 3)
    assert [reason.split(":")[0] for reason in found.lost_images] == ["image 1", "image 2"]


def test_images_beyond_the_limit_leave_their_text() -> None:
    parts = [part for i in range(5) for part in (image(i), Text("star"))]
    found = row(tuple(parts), max_images=2)
    assert said(found.input_ids) == "* star | * star star star star | </s>"
    assert shown(found, 0, 1)


def test_images_that_are_not_similar_leave_their_text() -> None:
    parts = (image(1, similarity=0.3), Text("a"), image(2, similarity=0.1), Text("star"), image(3, similarity=0.24))
    found = row((*parts, Text("left")), min_similarity=0.24)
    assert said(found.input_ids) == "* a star | * left | </s>" and shown(found, 1, 3)
    with pytest.raises(LeftOut, match="0 images"):
        row(parts, min_similarity=0.5)
    with pytest.raises(LeftOut, match="similarity"):
        row((image(1, similarity=0.1), Text("a")), form="pairs", min_similarity=0.5)
    with pytest.raises(ConfigError, match="have no similarity"):
        row((image(1), Text("a")), min_similarity=0.5)


@pytest.mark.parametrize(
    ("parts", "source", "reason"),
    [
        ((Text("a star"),), {}, r"0 images \(min_images\)"),
        ((image(1), Text("a")), {"min_images": 2}, r"1 images \(min_images\)"),
        ((Text("a"), image(1)), {"max_tokens": 2}, "no text after an image"),
        ((Text("a star"), image(1), Text("a")), {"max_tokens": 2}, r"0 images \(min_images\)"),
        ((image(1), Text("a")), {"drop_single_image": 1.0}, "one image"),
        ((image(1), Text(" <image> ")), {"form": "pairs"}, "no caption"),
        ((Text("a"),), {"form": "pairs"}, "no image"),
    ],
)
def test_what_rules_leave_out(parts: tuple[Any, ...], source: dict[str, Any], reason: str) -> None:
    with pytest.raises(LeftOut, match=reason):
        row(parts, **source)


def test_without_any_readable_image_nothing_is_left() -> None:
    with pytest.raises(Unusable, match=r"image 0: Unidentified.*; image 1: its bytes are not in the shard"):
        row((BROKEN, Image(key="x"), Text("a star")))
    with pytest.raises(Unusable, match="image 0"):
        row((BROKEN, Text("a star")), form="pairs")


def test_a_document_without_images_is_all_text_where_that_is_allowed() -> None:
    found = row((Text("a star"),), min_images=0)
    assert said(found.labels) == said(found.input_ids) == "a star | </s>" and not found.images


def test_coins_are_fair_and_fixed_by_seed_epoch_and_sample() -> None:
    def dropped(sample_id: str, epoch: int) -> bool:
        try:
            row((image(1), Text("a")), epoch, sample_id, drop_single_image=0.5)
        except LeftOut:
            return True
        return False

    coins = [[dropped(f"s{i}", epoch) for i in range(200)] for epoch in (0, 1)]
    assert coins[0] == [dropped(f"s{i}", 0) for i in range(200)]
    assert all(60 < sum(epoch) < 140 for epoch in coins)  # 100 expected, deviation 7
    assert 60 < sum(a != b for a, b in zip(*coins, strict=True)) < 140


def test_flips_are_per_image() -> None:
    parts = (image(1), Text("a"), image(2), Text("b"))
    plain_images = [decode(image(number).data or b"", SPEC) for number in (1, 2)]
    seen = set()
    for epoch in range(40):
        pair = row(parts, epoch, flip=0.5).images
        flipped = tuple(np.array_equal(one, other[:, ::-1]) for one, other in zip(pair, plain_images, strict=True))
        assert all(f or np.array_equal(a, b) for f, a, b in zip(flipped, pair, plain_images, strict=True))
        seen.add(flipped)
    assert seen == {(False, False), (False, True), (True, False), (True, True)}


# ---------------------------------------------------------------- tokenizers


def test_tokenizers_without_the_tokens_of_training_are_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ConfigError, match="has no token <image>"):
        vocabulary(bare)
    full = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    full.add_tokens([IMAGE_TOKEN, ENDOFCHUNK_TOKEN], special_tokens=True)
    with pytest.raises(ConfigError, match="has no end-of-text token"):
        vocabulary(full)


def test_padding_that_is_the_end_token_does_not_hide_it() -> None:
    tokenizer = samples.word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    source = Source(data="x", form="pairs", batch=1, max_tokens=9)
    found = to_row(Sample("a", (image(1), Text("a star"))), source, tokenizer, SPEC, 0, 0)
    assert found.labels[-1] == tokenizer.eos_token_id


# ---------------------------------------------------------------- batches


def test_collate_pads_on_the_right_and_keeps_images_in_row_order() -> None:
    first = row((image(1), Text("a red star"), image(2), Text("left")))
    second = row((Text("a"), image(3), Text("b"), BROKEN), sample_id="second")
    batch = collate([[first], [second]], WORDS.pad, SPEC, [("x", "gone")], [("y", "rule")])
    assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape == (2, len(first.input_ids))
    short = len(second.input_ids)
    assert batch.input_ids[1, :short].tolist() == second.input_ids.tolist()
    assert (batch.input_ids[1, short:] == WORDS.pad).all() and (batch.labels[1, short:] == IGNORED).all()
    assert batch.attention_mask.sum(1).tolist() == [len(first.input_ids), short] and batch.segments is None
    assert batch.image_counts.tolist() == [2, 1] and batch.ids == ["sample", "second"]
    assert batch.targets == sum(int((found.labels[1:] != IGNORED).sum()) for found in (first, second))
    assert batch.unreadable == [("x", "gone")] and batch.left_out == [("y", "rule")]
    assert [name for name, _ in batch.lost_images] == ["second"]
    for found, number in zip(batch.to("cpu").images, (1, 2, 3), strict=True):
        pixels = torch.from_numpy(decode(image(number).data or b"", SPEC)).float() / 255
        expected = (pixels - torch.tensor(SPEC.mean)) / torch.tensor(SPEC.std)
        assert torch.equal(found.permute(1, 2, 0), expected)


def test_images_stay_bytes_until_they_are_moved() -> None:
    batch = collate([[row((image(1), Text("a"), image(2), Text("b")), flip=1.0)]], WORDS.pad, SPEC)
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (2, 16, 16, 3)
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.images.dtype == torch.bfloat16 and moved.images.shape == (2, 3, 16, 16)
    assert torch.equal(moved.images, normalised(list(batch.images.numpy()), SPEC).bfloat16())
    assert moved.input_ids.dtype == torch.int64 and moved.ids == batch.ids


def test_samples_that_share_a_row_keep_their_tokens_labels_and_images() -> None:
    alone = row((Text("a red star"),), min_images=0)  # all of it text, so its first token has a label
    two = row((image(1), Text("left of the star"), image(2), Text("a")), sample_id="two")
    one = row((image(3), Text("a")), form="pairs", sample_id="one")
    batch = collate([[two, alone], [one]], WORDS.pad, SPEC)
    lengths = [len(found.input_ids) for found in (two, alone, one)]
    padding = sum(lengths[:2]) - lengths[2]
    assert batch.ids == ["two", "sample", "one"] and batch.image_counts.tolist() == [2, 1]
    assert batch.segments is not None
    assert batch.segments[0].tolist() == [0] * lengths[0] + [1] * lengths[1]
    assert batch.segments[1].tolist() == [0] * lengths[2] + [-1] * padding
    assert batch.input_ids[0].tolist() == [*two.input_ids, *alone.input_ids]
    assert batch.labels[0, lengths[0]] == IGNORED and alone.labels[0] != IGNORED
    assert batch.labels[0, lengths[0] + 1 :].tolist() == alone.labels[1:].tolist()
    assert batch.targets == sum(int((found.labels[1:] != IGNORED).sum()) for found in (two, alone, one))
    for found, number in zip(batch.images, (1, 2, 3), strict=True):
        assert np.array_equal(found, decode(image(number).data or b"", SPEC))


@given(lengths=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=5))
def test_a_batch_counts_its_tokens(lengths: list[list[int]]) -> None:
    rows = [[tokens(length) for length in row] for row in lengths]
    batch = collate(rows, WORDS.pad, SPEC)
    assert batch.tokens == sum(map(sum, lengths))
    assert batch.padded_tokens == len(lengths) * max(map(sum, lengths))
    assert batch.pairs == sum(length**2 for row in lengths for length in row)


def tokens(length: int) -> Row:
    ids = np.full(length, WORDS.eos)
    return Row("sample", ids, ids, [], [])
