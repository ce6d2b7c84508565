"""Features beside what open_clip gives for each picture, and that nothing but the picture decides them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from clips import CLIP, SIZE, TEXT, TOWER, WIDTH, write_clip
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image as Picture
from questions import captioned, image_of, write_splits
from safetensors.torch import load_file

from hpc_mm import similarity
from hpc_mm.benchmark import Question
from hpc_mm.config import ConfigError
from hpc_mm.data.images import decode
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.shards import ShardWriter, read_manifest
from hpc_mm.data.store import Store, open_store
from hpc_mm.demonstrations import Similar, most_similar
from hpc_mm.similarity import Encoder, Tower, compute, key_of, read_features, shards_to_do

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two splits of several shards each."""
    train = captioned(*range(90))
    return open_store(write_splits(tmp_path / "store", 50_000, train=train, test=captioned(*range(200, 240))))


def shards_in(store: Store) -> list[str]:
    return list(read_manifest(store).names)


def files(store: Store) -> dict[str, bytes]:
    return {entry.key: store.read(entry.key) for entry in store.list("features/")}


def pictures(tower: Tower, *numbers: int) -> list[Any]:
    return [decode(image_of(str(number)), tower.spec) for number in numbers]


# ---------------------------------------------------------------- one row


def test_rows_are_what_open_clip_gives_each_picture_alone(encoder: Encoder) -> None:
    folder = Path(encoder.model.removeprefix("local-dir:"))
    clip = open_clip.CLIP(embed_dim=WIDTH, vision_cfg=dict(TOWER), text_cfg=dict(TEXT)).eval()
    clip.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    transform = image_transform_v2(PreprocessCfg(size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3), is_train=False)
    tower = Tower(encoder, "cpu")
    found = tower.encoded(pictures(tower, *range(5)))
    assert found.shape == (5, WIDTH) and found.dtype == np.float32
    with torch.no_grad():
        own = [clip.encode_image(transform(Picture.open(io.BytesIO(image_of(str(n)))))[None]) for n in range(5)]
    expected = torch.nn.functional.normalize(torch.cat(own), dim=-1).numpy()
    np.testing.assert_allclose(found, expected, atol=0.02)  # a level of 255 here and there
    assert ((expected @ found.T).argmax(axis=1) == np.arange(5)).all()


def test_a_row_does_not_depend_on_its_neighbours(encoder: Encoder) -> None:
    tower = Tower(encoder, "cpu")
    whole = tower.encoded(pictures(tower, *range(similarity.BATCH)))
    for count in (1, 2, 13, similarity.BATCH - 1):
        assert np.array_equal(tower.encoded(pictures(tower, *range(count))), whole[:count])
    others = tower.encoded(pictures(tower, *(n if n % 3 else 100 + n for n in range(similarity.BATCH))))
    kept = [n for n in range(similarity.BATCH) if n % 3]
    assert np.array_equal(others[kept], whole[kept])
    assert not np.array_equal(others[0], whole[0])


# ---------------------------------------------------------------- a store's features


def test_tasks_and_restarts_make_the_same_files(
    store: Store, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shards = shards_in(store)
    assert len(shards) > 4
    compute(store, shards_to_do(store, shards, encoder), encoder, "cpu")
    whole = files(store)
    assert len(whole) == len(shards) and shards_to_do(store, shards, encoder) == []
    for key in whole:
        store.delete(key)
    parts = [shards_to_do(store, shards, encoder, task, 3) for task in range(3)]
    assert sorted(shard for part in parts for shard in part) == shards
    compute(store, parts[2][:1], encoder, "cpu")  # and was killed
    assert shards_to_do(store, shards, encoder, 2, 3) == parts[2][1:]
    monkeypatch.setattr(similarity, "READS", 2)
    monkeypatch.setattr(similarity, "AHEAD", 1)
    for task in (2, 0, 1):
        compute(store, shards_to_do(store, shards, encoder, task, 3), encoder, "cpu")
    assert files(store) == whole
    other = write_clip(tmp_path / "other", seed=1)
    assert shards_to_do(store, shards, other) == shards


def test_rows_of_images_in_the_order_that_is_asked_for(store: Store, encoder: Encoder) -> None:
    shards = shards_in(store)
    compute(store, shards, encoder, "cpu")
    tower, number = Tower(encoder, "cpu"), 0
    places, expected = [], []
    for shard in read_manifest(store):
        first = 200 if shard.name.startswith("test") else 0
        number = first if shard.name.endswith("000000.tar") or "-000000-" in shard.name else number
        for start in range(0, shard.samples, similarity.BATCH):
            some = range(start, min(start + similarity.BATCH, shard.samples))
            expected.append(tower.encoded(pictures(tower, *(number + n for n in some))))
            places += [(shard.name, n) for n in some]
        number += shard.samples
    whole = np.concatenate(expected)
    assert len(places) == 130
    assert np.array_equal(read_features(store, encoder, places), whole)
    order = np.random.default_rng(0).integers(0, len(places), 50)
    assert np.array_equal(read_features(store, encoder, [places[i] for i in order]), whole[order])


def test_features_of_a_shard_that_was_made_again_do_not_count(tmp_path: Path, encoder: Encoder) -> None:
    store = open_store(str(tmp_path), make=True)
    for content in (range(3), range(4)):
        with ShardWriter(store, "train") as writer:  # no digest in its name
            for number in content:
                writer.add(Sample(str(number), (Image(image_of(str(number))),)))
        assert shards_to_do(store, ["train-000000.tar"], encoder) == ["train-000000.tar"]
        with pytest.raises(ConfigError, match=r"features of 1 of 1 shards: train-000000.tar; the stage features comp"):
            read_features(store, encoder, [("train-000000.tar", 0)])
        compute(store, ["train-000000.tar"], encoder, "cpu")
        assert len(read_features(store, encoder, [("train-000000.tar", n) for n in content])) == len(content)


def test_features_that_cannot_be_had(store: Store, encoder: Encoder) -> None:
    shards = shards_in(store)
    compute(store, shards[:1], encoder, "cpu")
    some = [(shard, 0) for shard in shards]
    with pytest.raises(ConfigError, match=rf"of {len(shards) - 1} of {len(shards)} shards: {shards[1]}, .*\.\.\.; the"):
        read_features(store, encoder, some)
    with pytest.raises(ConfigError, match=r"is not the features of its shard .*out of bounds"):
        read_features(store, encoder, [(shards[0], 10_000)])
    key = key_of(store, shards[0], encoder)
    store.write(key, store.read(key)[:-1])
    with pytest.raises(ConfigError, match=f"{key} is not the features of its shard .*: remove it"):
        read_features(store, encoder, some[:1])


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (Text("a"), "sample 7 of x-000000.tar holds no image"),
        (Image(b"no picture"), "image of sample 7 of x-000000.tar"),
    ],
)
def test_a_sample_without_a_picture(tmp_path: Path, encoder: Encoder, part: Text | Image, said: str) -> None:
    store = open_store(str(tmp_path), make=True)
    with ShardWriter(store, "x") as writer:
        writer.add(Sample("7", (part,)))
    with pytest.raises(ConfigError, match=said):
        compute(store, ["x-000000.tar"], encoder, "cpu")
    assert files(store) == {}


# ---------------------------------------------------------------- the encoder


def test_names(tmp_path: Path, encoder: Encoder) -> None:
    assert Encoder().name == "ViT-L-14:openai"
    assert Encoder(model="hf-hub:laion/CLIP-ViT-B-32").name == "hf-hub:laion:CLIP-ViT-B-32"
    file = tmp_path / "some weights.safetensors"
    file.write_bytes(b"one")
    assert Encoder(model="ViT-B-32", pretrained=str(file)).name == "ViT-B-32:7692c3ad"  # by sha256sum
    assert encoder.name.startswith("local-dir:") and encoder.name == write_clip(tmp_path / "copy").name
    assert (
        len({encoder.name, write_clip(tmp_path / "a", seed=1).name, write_clip(tmp_path / "b", mean=[0, 0, 0]).name})
        == 3
    )
    for wrong, said in (
        ({"pretrained": "openai.safetensors"}, "no weights at .*openai.safetensors"),
        ({"model": f"local-dir:{tmp_path}"}, "no weights at .*open_clip_config.json"),
        ({"pretrained": "open ai"}, "is no name of an open_clip model and its weights"),
    ):
        with pytest.raises(ConfigError, match=said):
            _ = Encoder(**wrong).name


def test_models_that_open_clip_knows(encoder: Encoder) -> None:
    for model in (*open_clip.list_models(), "ViT-B/32", "hf-hub:laion/anything", encoder.model):
        Encoder(model=model).check()
    with pytest.raises(ConfigError, match=r"unknown open_clip model rices.model 'ViT-L14': did you mean ViT-L-14\?"):
        Encoder(model="ViT-L14").check()


def test_an_encoder_that_wants_other_pictures(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resize_mode=squash; only shortest"):
        Tower(write_clip(tmp_path / "clip", resize_mode="squash"), "cpu")


class Trap:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_weights_run_no_code_and_must_be_there(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CLIP)
    folder = Path(encoder.model.removeprefix("local-dir:"))
    state = load_file(folder / "open_clip_model.safetensors")
    torch.save(state, tmp_path / "plain.pt")
    safe, plain = (
        Tower(Encoder(model="tiny", pretrained=str(file)), "cpu")
        for file in (folder / "open_clip_model.safetensors", tmp_path / "plain.pt")
    )
    assert np.array_equal(safe.encoded(pictures(safe, 1)), plain.encoded(pictures(plain, 1)))
    torch.save({**state, "more": Trap(tmp_path / "ran")}, tmp_path / "trap.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    for wrong in (str(tmp_path / "trap.pt"), str(tmp_path / "cut.safetensors"), "nowhere"):
        with pytest.raises(ConfigError, match="open_clip model 'tiny' with weights"):
            Tower(Encoder(model="tiny", pretrained=wrong), "cpu")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- demonstrations


def asked_about(store: Store, prefix: str) -> list[Question]:
    return [
        Question(f"{shard.name}/{n}", f"{shard.name}-{n}", shard.name, n, "", ("a",))
        for shard in read_manifest(store)
        if shard.name.startswith(prefix)
        for n in range(shard.samples)
    ]


def test_the_nearest_demonstrations(store: Store, encoder: Encoder) -> None:
    compute(store, shards_in(store), encoder, "cpu")
    pool, asked = asked_about(store, "train"), asked_about(store, "test")
    similar = Similar([*pool, *pool[:5]])  # of some images two questions
    nearest = similar.nearest([*asked, *asked[:3], *pool[:4]], 8, store, encoder)
    assert len(nearest) == 44
    features = read_features(store, encoder, [(q.shard, q.sample) for q in pool])
    for question_ in (*asked, *pool[:4]):
        own = read_features(store, encoder, [(question_.shard, question_.sample)])
        assert np.array_equal(nearest[question_.image_key], most_similar(features, own, 9)[0])
        eight = similar.shots(question_, 8, nearest[question_.image_key])
        assert similar.shots(question_, 4, nearest[question_.image_key]) == eight[-4:]
        assert question_.image_key not in {shot.image_key for shot in eight}
    few = Similar(pool[:3])
    assert [len(rows) for rows in few.nearest(asked[:1], 8, store, encoder).values()] == [3]
    assert few.nearest([], 8, store, encoder) == {}
