import io
import logging
import random
import tarfile
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import chat_samples
import numpy as np
import pytest
import samples
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hpc_mm.config import ConfigError, Language, Loader, Source
from hpc_mm.data import lengths
from hpc_mm.data.batch import LeftOut, special_text
from hpc_mm.data.chat import chat_row, ended_ids
from hpc_mm.data.lengths import (
    check_lengths,
    count,
    goes_by_word,
    key_of,
    lengths_of,
    name_of,
    row_of,
    shards_to_do,
    token_counter,
)
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.shards import ShardReader, ShardWriter, read_manifest, read_samples
from hpc_mm.data.store import FolderStore, Store, open_store
from hpc_mm.data.stream import make_loader
from hpc_mm.index import index_foreign

TOKENIZER = chat_samples.t5_tokenizer()
COUNTER = token_counter(TOKENIZER)
TEMPLATES = ("t5_v1", "t5_plain")  # t5_plain_split_text splits by chance
HUB = Language(name="google/flan-t5-xl")


def source(folder: Path | str, **more: Any) -> Source:
    values = {"form": "chat", "template": "t5_v1", "order": "length", "batch": 4, "max_tokens": 200, "max_images": 2}
    return Source(data=str(folder), **{**values, **more})


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """23 chats with no image, one or two, and one that has too many."""
    with ShardWriter(open_store(str(tmp_path / "chats"), make=True), "chats", max_bytes=16_000) as writer:
        for number in range(23):
            images = 3 if number == 7 else number % 3
            writer.add(chat_samples.chat(number, questions=1 + number % 4, images=images))
    assert len(read_manifest(open_store(str(tmp_path / "chats")))) > 4
    return tmp_path / "chats"


def count_all(folder: Path | str, **more: Any) -> Store:
    chosen, store = source(folder, **more), open_store(str(folder))
    name = name_of(chosen, HUB)
    count(store, shards_to_do(store, read_manifest(store).names, name), name, chosen, TOKENIZER)
    return store


def test_lengths_are_those_of_the_rows_that_are_trained_on(chats: Path) -> None:
    store = count_all(chats)
    found = lengths_of(source(chats), HUB)
    assert found is not None
    for number, sample in enumerate(read_samples(store)):
        texts = [part.text for part in sample.parts if isinstance(part, Text)]
        assert found.words[number] == len(" ".join(texts).split())
        assert found.images[number] == len(sample.images)
        got = found.encoder[number], found.decoder[number]
        if len(sample.images) > 2:
            assert got == (0, 0)
            continue
        row = chat_row(sample, source(chats), TOKENIZER, samples.SPEC, seed=3, epoch=5)
        assert got == (len(row.input_ids) - len(row.images), len(row.labels))
    assert len(np.unique(found.encoder)) > 10 and found.encoder.max() == 200


def test_images_are_not_read(chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only bytes of the members with text are asked for."""
    store, read = open_store(str(chats)), []
    reader, shard = ShardReader(store), read_manifest(store).names[0]
    member, image = reader.index(shard).members(1)
    plain = FolderStore.read
    monkeypatch.setattr(FolderStore, "read", lambda *words: read.append(words[1:]) or plain(*words))
    sample = reader.read_text(shard, 1)
    assert read == [(shard, member.start, member.end)] and member.suffix == "json"
    assert [part.data if isinstance(part, Image) else part for part in sample.parts] == [
        b"" if isinstance(part, Image) else part for part in reader.read(shard, 1).parts
    ]
    assert read[1][2] == image.end


def test_pairs_of_others_have_lengths_too(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in range(5):
            files = {"jpg": samples.encoded(samples.picture(number), "JPEG"), "txt": b"a red star " * (1 + number)}
            for suffix, data in {"json": b'{"width": 40}', **files}.items():
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index_foreign(open_store(str(tmp_path)))
    count_all(tmp_path, template="t5_plain")
    found = lengths_of(source(tmp_path, template="t5_plain"), HUB)
    assert found is not None
    assert found.words.tolist() == [3, 6, 9, 12, 15]
    assert found.decoder.tolist() == [1 + 3 * (1 + number) for number in range(5)]
    assert set(found.images) == {1} and set(found.encoder) == {2}  # an end before the image and one behind it


words = st.lists(st.sampled_from(samples.WORDS), min_size=1, max_size=30).map(" ".join)
SPECIAL = special_text(TOKENIZER)


@given(text=words, seed=st.integers(0, 99), epoch=st.integers(0, 99))
def test_a_split_by_chance_hardly_changes_the_sum(text: str, seed: int, epoch: int) -> None:
    """Of what is split in other epochs: by the pieces of the word that is cut."""
    chosen = source("x", template="t5_plain_split_text", max_tokens=500)
    sample = Sample("sample", (chat_samples.image(1), Text(text)))
    encoder, decoder, images, _ = row_of(sample, chosen, SPECIAL, COUNTER)
    row = chat_row(sample, chosen, TOKENIZER, samples.SPEC, seed, epoch)
    assert images == 1
    assert abs(encoder + decoder - (len(row.input_ids) - 1 + len(row.labels))) <= max(map(len, text.split())) + 1


# ---------------------------------------------------------------- counts of tokens


def charsmap(mapped: dict[str, str]) -> bytes:
    """What sentencepiece normalizes by: a double array of the keys' bytes, a block of 256 for each node, and values."""
    values, nodes, cells = "", {b"": 0}, [[0] * 256]
    for key, value in mapped.items():
        data = key.encode()
        for end in range(1, len(data) + 1):
            if data[:end] not in nodes:
                nodes[data[:end]] = len(nodes)
                cells.append([0] * 256)
                at = 256 * nodes[data[: end - 1]] + data[end - 1]
                cells[at // 256][at % 256] = (at ^ 256 * nodes[data[:end]]) << 10 | data[end - 1]
        at = 256 * nodes[data[:-1]] + data[-1]
        cells[at // 256][at % 256] |= 1 << 8  # a key ends here
        cells[nodes[data]][0] = len(values.encode()) | 1 << 31
        values += value + "\0"
    units = np.array(cells, dtype="<u4").tobytes()
    return len(units).to_bytes(4, "little") + units + values.encode()


def splitting(*steps: Any, normalizer: Any = None, added: str = "") -> Any:
    """The T5 tokenizer with other parts."""
    backend = Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str())
    if steps:
        backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    if normalizer is not None:
        backend.normalizer = normalizer
    if added:
        backend.add_tokens([added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


NORMALIZED = normalizers.Precompiled(charsmap({" ": " ", "\t": " ", "\u3000": " ", "ﬁ": "a b", "é": "e", "\u200b": ""}))
BY_WORD = [TOKENIZER, splitting(normalizer=NORMALIZED), splitting(added="red")]
OTHERS = [
    splitting(added="red star"),
    splitting(normalizer=NORMALIZED, added="red\u3000star"),
    splitting(normalizer=normalizers.Replace("d s", "t")),
    splitting(pre_tokenizers.Metaspace()),
    splitting(pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="first")),
]
ATOMS = [*"aéﬁ①한🙂▁!.<", *samples.WORDS[:5], "</s>", "<extra_id_7>", "red star"]
ATOMS += [*" \t\n\r\0\x1c\x7f\xa0\u3000\u2028\u200b\u200d\u0308\u0600\u0903\ufeff", "  "]
raw = st.lists(st.sampled_from(ATOMS) | st.just(" ") | st.characters(exclude_categories=["Cs"]), max_size=12).map(
    "".join
)


def test_the_map_normalizes_graphemes() -> None:
    """So that the next test sees that a space may not be taken from what it joins."""
    assert NORMALIZED.normalize_str("ﬁé\u3000x \u0308y") == "a be x y"


@pytest.mark.parametrize(("tokenizer", "tokens"), [(one, token_counter(one)) for one in (*BY_WORD, *OTHERS)])
@given(texts=st.lists(raw, max_size=4))
def test_a_count_is_that_of_the_tokenizer(tokenizer: Any, tokens: Callable[[str], int], texts: list[str]) -> None:
    assert list(map(tokens, texts + texts)) == [len(ended_ids(text, tokenizer)) for text in texts + texts]


def test_which_tokenizers_go_by_word() -> None:
    assert list(map(goes_by_word, [*BY_WORD, *OTHERS])) == [True] * len(BY_WORD) + [False] * len(OTHERS)
    with pytest.raises(ConfigError, match="the tokenizer ends no text"):
        token_counter(samples.word_tokenizer())


turns = st.tuples(raw, raw, st.integers(0, 2))


@given(found=st.lists(turns, min_size=1, max_size=3), limit=st.integers(1, 150), template=st.sampled_from(TEMPLATES))
def test_a_chat_has_the_lengths_of_its_row(found: list[Any], limit: int, template: str) -> None:
    """What a rule leaves out, too."""
    parts: list[Any] = []
    for question, answer, images in found:
        parts += [Text(question, "user"), *(chat_samples.image(i, "user") for i in range(images))]
        parts.append(Text(answer, "assistant"))
    sample = Sample("sample", tuple(parts))
    chosen = source("x", template=template, max_tokens=limit)
    tokens = row_of(sample, chosen, SPECIAL, COUNTER)
    try:
        row = chat_row(sample, chosen, TOKENIZER, samples.SPEC, 0, 0)
    except LeftOut:
        assert tokens[:3] == (0, 0, len(sample.images))
    else:
        assert tokens[:3] == (len(row.input_ids) - len(row.images), len(row.labels), len(row.images))
    assert tokens[3] == sum(len(question.split()) + len(answer.split()) for question, answer, _ in found)


# ---------------------------------------------------------------- the files


def test_what_is_done_is_not_done_again_and_comes_out_the_same(chats: Path) -> None:
    store = count_all(chats)
    chosen = source(chats)
    shards, name = read_manifest(store).names, name_of(chosen, HUB)
    whole = {shard: store.read(key_of(store, shard, name)) for shard in shards}
    assert shards_to_do(store, shards, name) == []
    for shard in shards[1:]:
        store.delete(key_of(store, shard, name))
    assert shards_to_do(store, shards, name) == shards[1:]
    for shard in random.Random(0).sample(shards[1:], len(shards) - 1):
        count(store, [shard], name, chosen, TOKENIZER)
    assert {shard: store.read(key_of(store, shard, name)) for shard in shards} == whole


@pytest.mark.parametrize(("run", "reads"), [(1, 1), (1, 2), (3, 2), (2, 50)])
def test_lengths_come_in_order_however_samples_are_read(
    chats: Path, run: int, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_all(chats)
    before = lengths_of(source(chats), HUB)
    monkeypatch.setattr(lengths, "RUN", run)
    monkeypatch.setattr(lengths, "READS", reads)
    store, name = open_store(str(chats)), name_of(source(chats), HUB)
    count(store, read_manifest(store).names, name, source(chats), TOKENIZER)
    after = lengths_of(source(chats), HUB)
    assert before is not None and after is not None and before.digest == after.digest


def test_a_shard_that_was_made_again_is_counted_again(chats: Path) -> None:
    store = count_all(chats)
    with ShardWriter(store, "chats", max_bytes=16_000) as writer:
        for number in range(23):
            writer.add(chat_samples.chat(number + (number > 15), images=1))
    with pytest.raises(ConfigError, match=r"shards at .* have none yet"):
        lengths_of(source(chats), HUB)


def test_names_are_of_what_decides(tmp_path: Path) -> None:
    one = name_of(source("x"), HUB)
    assert one.startswith("t5_v1-") and len(one) == 22
    for other in ({"max_tokens": 201}, {"template": "t5_plain"}, {"max_images": 1}, {"min_similarity": 0.1}):
        assert name_of(source("x", **other), HUB) != one
    for same in ({"batch": 8}, {"weight": 2.0}, {"order": "random"}):
        assert name_of(source("y", **same), HUB) == one
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    (tmp_path / "b.json").write_text("{}")
    file, folder = Language(tokenizer=str(tmp_path / "b.json")), Language(name=str(tmp_path / "a"))
    assert name_of(source("x"), file) == name_of(source("x"), folder) != one
    (tmp_path / "b.json").write_text("{ }")
    assert name_of(source("x"), file) != name_of(source("x"), folder)
    with pytest.raises(ConfigError, match=r"there is no c\.json"):
        name_of(source("x"), Language(tokenizer=str(tmp_path / "c.json")))


def test_lengths_that_are_not_there(chats: Path) -> None:
    said = r"order=length goes by lengths of samples, and \d+ of \d+ shards at .*python -m hpc_mm\.measure"
    for read in (lengths_of, check_lengths):
        with pytest.raises(ConfigError, match=said):
            read(source(chats), HUB)
        assert read(source(chats, order="random"), HUB) is None
    count_all(chats)
    check_lengths(source(chats), HUB)


@pytest.mark.parametrize("data", [b"", b"\x08\0\0\0\0\0\0\0{}      ", None])
def test_a_file_of_something_else(chats: Path, data: bytes | None) -> None:
    store = count_all(chats)
    first, last = (read_manifest(store).names[i] for i in (0, -1))
    name = name_of(source(chats), HUB)
    other = store.read(key_of(store, last, name)) if data is None else data
    store.write(key_of(store, first, name), other)
    with pytest.raises(ConfigError, match="remove it, and count again"):
        lengths_of(source(chats), HUB)


def test_a_broken_sample_has_no_tokens(chats: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(str(chats))
    shard = read_manifest(store).names[0]
    member = ShardReader(store).index(shard).members(1)[0]
    data = bytearray(store.read(shard))
    data[member.start : member.start + 4] = b"oops"
    store.write(shard, bytes(data))
    with caplog.at_level(logging.WARNING):
        count_all(chats)
    found = lengths_of(source(chats), HUB)
    assert found is not None
    assert [column[1] for column in astuple(found)] == [0, 0, 0, 0] and found.encoder[0] > 0
    assert "sample chat00001" in caplog.text


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("order", ["length", "modality_length"])
def test_batches_by_length_from_any_ranks_and_restarts(chats: Path, order: str) -> None:
    """To the last token and pixel, as one process without a stop reads them; a step has one modality."""
    chosen = source(chats, order=order)
    count_all(chats)
    lengths = lengths_of(chosen, HUB)

    def rows(world: int, accumulate: int, first: int, last: int) -> list[list[Any]]:
        settings, found = Loader(workers=0, by_length=True), [[] for _ in range(last - first)]
        for rank in range(world):
            loader = make_loader(
                chosen, settings, 7, TOKENIZER, samples.SPEC, rank, world, accumulate, first, last, lengths
            )
            for step, batches in zip(found, loader, strict=True):
                step += [row for batch in batches for row in rows_of(batch)]
        return found

    whole = rows(1, 1, 0, 12)
    for world, accumulate, first in ((2, 1, 0), (3, 2, 5), (4, 1, 11)):
        assert rows(world, accumulate, first, 12) == whole[first:]
    if order == "length":
        assert all(len({images > 0 for _, images, _, _ in step}) <= 1 for step in whole)


def rows_of(batch: Any) -> list[Any]:
    images = iter(batch.images.numpy())
    found = []
    for name, row, mask, labels in zip(batch.ids, batch.input_ids, batch.attention_mask, batch.labels, strict=False):
        ids = row[mask.bool()].tolist()
        pixels = [next(images).tobytes() for _ in range(ids.count(-200))]
        found.append((name, len(pixels), (ids, labels[labels != -100].tolist()), pixels))
    return found


def test_another_count_is_another_order(chats: Path) -> None:
    """A checkpoint says which order it is of, so that no run goes on in another."""
    count_all(chats)
    chosen = source(chats)
    lengths = lengths_of(chosen, HUB)
    assert lengths is not None
    lengths.encoder[0] += 1
    changed = make_loader(chosen, Loader(workers=0), 7, TOKENIZER, samples.SPEC, 0, 1, 1, 0, 1, lengths).dataset
    as_was = make_loader(
        chosen, Loader(workers=0), 7, TOKENIZER, samples.SPEC, 0, 1, 1, 0, 1, lengths_of(chosen, HUB)
    ).dataset
    assert changed.corpus != as_was.corpus  # type: ignore[attr-defined]
