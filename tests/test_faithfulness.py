"""Small folders in the published forms of benchmarks of faithfulness: what is read, what is refused, what comes out."""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from hpc_mm.config import ConfigError
from hpc_mm.faithfulness import BENCHMARKS, Item, image_bytes, image_versions, read, results
from hpc_mm.faithfulness_files import PICKAPIC, SUGARCREPE, TIFA_MODELS
from hpc_mm.intervals import mean_interval
from hpc_mm.metrics import pairwise_accuracy_each, roc_auc, tie_calibration


def as_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, ensure_ascii=False))


def as_lines(file: Path, entries: Sequence[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def as_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def pictures(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"an image")


# ---------------------------------------------------------------- folders as published


def winoground(folder: Path) -> None:
    tags = ("Object", "Relation", "Relation")
    as_lines(
        folder / "examples.jsonl",
        [
            {"id": number, "image_0": f"ex_{number}_img_0", "image_1": f"ex_{number}_img_1", "caption_0": f"a{number}",
             "caption_1": f"b{number}", "tag": "Noun", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": tag}
            for number, tag in enumerate(tags)
        ],
    )  # fmt: skip
    pictures(folder / "images", [f"ex_{number}_img_{side}.png" for number in range(3) for side in (0, 1)])


def eqben(folder: Path) -> None:
    names = ["eqbensd/0_{}.png", "eqbenkubric_cnt/3_{}.png", "eqbenkubric_loc/4_{}.png", "eqbenyoucook2/x/7_{}.npy"]
    as_json(
        folder / "all_select.json",
        [
            {"image0": name.format(0), "image1": name.format(1), "caption0": f"a{i}", "caption1": f"b{i}", "info": {}}
            for i, name in enumerate(names)
        ],
    )
    pictures(folder / "images", [name.format(side) for name in names for side in (0, 1)])


def tifa160(folder: Path) -> None:
    prompts = ("coco_1", "partiprompt_2")
    names = [(prompt, model) for prompt in prompts for model in TIFA_MODELS]
    as_json(
        folder / "tifa160.json",
        {
            f"{prompt}_{TIFA_MODELS[model]}": {
                "text_id": prompt, "image_path": f"{prompt}_{TIFA_MODELS[model]}.jpg", "text": f"text of {prompt}"
            }
            for prompt, model in names
        },
    )  # fmt: skip
    as_csv(
        folder / "dsg_tifa160_anns.csv",
        [
            {"data_type": "tifa160", "model_type": model, "item_id": "tifa160_1", "source_id": prompt,
             "worker_id": worker, "question": "How consistent is it?", "answer": 1 + (place + worker) % 5}
            for place, (prompt, model) in reversed(list(enumerate(names)))
            for worker in range(3 if place else 2)
        ],
    )  # fmt: skip
    pictures(folder, [f"{prompt}_{TIFA_MODELS[model]}.jpg" for prompt, model in names])


def pickapic(folder: Path) -> None:
    entries = [
        {"id": number, "caption": f"caption {number}", "label_0": (1, 0, 0.5)[number % 3],
         "label_1": (0, 1, 0.5)[number % 3], "image_0": f"images/{number}_0.jpg", "image_1": f"images/{number}_1.jpg"}
        for number in range(500)
    ]  # fmt: skip
    as_json(folder / "test_captions.json", entries)
    pictures(folder / "images", [f"{number}_{side}.jpg" for number in PICKAPIC for side in (0, 1)])


def seetrue(folder: Path) -> None:
    sources = ("drawbench", "coco_t2i", "editbench")
    as_csv(
        folder / "SeeTRUE.csv",
        [
            {"image": f"id_{row}_Rare Words_sd_2_1_0.png", "text": f'a "text", {row}', "label": row % 2,
             "original_dataset_id": f"text_{row}_image_{row}", "dataset_source": sources[row // 2 % 3]}
            for row in range(12)
        ],
    )  # fmt: skip
    pictures(folder / "images", [f"id_{row}_Rare Words_sd_2_1_0.png" for row in range(12)])


def sugarcrepe(folder: Path) -> None:
    for kind in SUGARCREPE:
        content = {
            str(key): {"filename": f"{key:012d}.jpg", "caption": f"true {kind}", "negative_caption": f"false {kind}"}
            for key in (0, 2)
        }
        as_json(folder / f"{kind}.json", content)
    pictures(folder / "val2017", ["000000000000.jpg", "000000000002.jpg"])


GENERATORS = ("DALLE_3", "SDXL_Turbo", "Midjourney_6")


def genai_bench(folder: Path) -> None:
    prompts = [f"{number:05d}" for number in range(4)]
    as_json(
        folder / "genai_image.json",
        {
            prompt: {"id": prompt, "prompt": f"prompt {prompt}", "prompt in Chinese": "面包师",
                     "models": {model: [1 + (int(prompt) + place) % 5, 2, 5] for place, model in enumerate(GENERATORS)}}
            for prompt in prompts
        },
    )  # fmt: skip
    as_json(folder / "genai_skills.json", {"basic": [0, 1], "advanced": [2], "negation": [2], "scene": [0, 1]})
    pictures(folder, [f"{model}/{prompt}.jpeg" for model in GENERATORS for prompt in prompts])


def pairs(folder: Path) -> None:
    as_lines(
        folder / "pairs.jsonl",
        [
            {"id": "a", "image": "one.png", "true": "a red disc", "false": ["a blue disc", "a green disc"],
             "group": "colour"},
            {"id": "b", "image": "one.png", "true": "a disc on a box", "false": ["a box on a disc"],
             "group": "relation"},
            {"id": "c", "image": "two.png", "true": "a box", "false": ["a disc"]},
        ],
    )  # fmt: skip
    pictures(folder, ["one.png", "two.png"])


FOLDERS: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (winoground, eqben, tifa160, pickapic, seetrue, sugarcrepe, genai_bench, pairs)
}


def test_every_benchmark_has_a_folder_here() -> None:
    assert FOLDERS.keys() == BENCHMARKS.keys()


# ---------------------------------------------------------------- what is read


def items_of(benchmark: str, folder: Path) -> list[Item]:
    FOLDERS[benchmark](folder)
    return read(benchmark, folder)


FIRST = {
    "winoground": Item("0", ("images/ex_0_img_0.png", "images/ex_0_img_1.png"), ("a0", "b0"), skills=("Object",)),
    "eqben": Item("0", ("images/eqbensd/0_0.png", "images/eqbensd/0_1.png"), ("a0", "b0"), group="eqbensd"),
    "tifa160": Item(
        "coco_1_mini_dalle", ("coco_1_mini_dalle.jpg",), ("text of coco_1",), 1.5, "coco_1", generator="mini_dalle"
    ),
    "pickapic": Item("1", ("images/1_0.jpg", "images/1_1.jpg"), ("caption 1",), 0.0),
    "seetrue": Item("0", ("images/id_0_Rare Words_sd_2_1_0.png",), ('a "text", 0',), 0.0, "drawbench"),
    "sugarcrepe": Item("add_att/0", ("val2017/000000000000.jpg",), ("true add_att", "false add_att"), group="add_att"),
    "genai_bench": Item(
        "DALLE_3/00000", ("DALLE_3/00000.jpeg",), ("prompt 00000",), 8 / 3, "00000", ("basic", "scene"), "DALLE_3"
    ),
    "pairs": Item("a", ("one.png",), ("a red disc", "a blue disc", "a green disc"), group="colour"),
}
COUNTS = {"winoground": 3, "eqben": 4, "tifa160": 10, "pickapic": 100, "seetrue": 12, "sugarcrepe": 14,
          "genai_bench": 12, "pairs": 3}  # fmt: skip


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_published_files_become_items(tmp_path: Path, benchmark: str) -> None:
    items = items_of(benchmark, tmp_path)
    assert len(items) == COUNTS[benchmark]
    assert items[0] == FIRST[benchmark]


def test_parts_and_labels_of_later_items(tmp_path: Path) -> None:
    assert [item.group for item in items_of("eqben", tmp_path / "e")] == [
        "eqbensd", "eqbenkubric", "eqbenkubric", "eqbenyoucook2"
    ]  # fmt: skip
    preferred = {int(item.id): item.human for item in items_of("pickapic", tmp_path / "p")}
    assert preferred == {number: float(number % 3 == 0) for number in PICKAPIC}
    assert len(set(PICKAPIC)) == 100
    assert [item.human for item in items_of("seetrue", tmp_path / "s")] == [0.0, 1.0] * 6


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_images_that_are_missing_are_counted(tmp_path: Path, benchmark: str) -> None:
    items = items_of(benchmark, tmp_path)
    names = list(dict.fromkeys(name for item in items for name in item.images))
    for name in names[:2]:
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError) as told:
        image_versions(benchmark, items, tmp_path)
    count = min(2, len(names))
    assert f"{count} of {len(names)} images of {benchmark} are missing: {names[0]}" in str(told.value)
    assert "\n" not in str(told.value)


def test_images_of_other_bytes_are_other_versions(tmp_path: Path) -> None:
    """By their sizes and times, whatever their items say; a benchmark of the same images is not another one."""
    items = items_of("winoground", tmp_path)
    first = image_versions("winoground", items, tmp_path)
    assert image_versions("winoground", items, tmp_path) == image_versions("eqben", items, tmp_path) == first
    found, image = {first}, tmp_path / items[1].images[1]
    facts = image.stat()
    for size, time in ((facts.st_size, facts.st_mtime_ns + 10**9), (facts.st_size + 1, facts.st_mtime_ns)):
        image.write_bytes(bytes(size))
        os.utime(image, ns=(time, time))
        found.add(image_versions("winoground", items, tmp_path))
    assert len(found) == 3


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_files_that_are_missing_or_others(tmp_path: Path, benchmark: str) -> None:
    FOLDERS[benchmark](tmp_path)
    for name in BENCHMARKS[benchmark].files:
        file = tmp_path / name
        whole = file.read_bytes()
        renamed = whole.replace(b'":', b'_":').replace(b"image", b"picture").replace(b"answer", b"no")
        damaged = [b"", b"\xff\xfe\x00", b'{"a": 1}\n', b"a,b\n1,2\n", b"[1, 2]\n", b'[{"id": NaN, "models": []}]\n']
        damaged += [
            whole[: len(whole) // 2],
            *([renamed] if name != "genai_skills.json" else []),
        ]  # skills' names are free
        for other in damaged:
            file.write_bytes(other)
            with pytest.raises(ConfigError) as told:
                read(benchmark, tmp_path)
            assert "\n" not in str(told.value)
            assert str(tmp_path) in str(told.value)
        file.unlink()
        with pytest.raises(ConfigError, match=f"has no {name}; {benchmark} is read from"):
            read(benchmark, tmp_path)
        file.write_bytes(whole)
    read(benchmark, tmp_path)


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean winoground"):
        read("winogrund", tmp_path)
    with pytest.raises(ConfigError, match="did you mean pairs"):
        results("pair", [], [])


def edited(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    as_json(file, content)


def test_annotations_that_are_not_of_each_other(tmp_path: Path) -> None:
    tifa160(tmp_path / "t")
    edited(tmp_path / "t/tifa160.json", lambda content: content.pop("coco_1_mini_dalle"))
    with pytest.raises(ConfigError, match="1 images are rated but not listed, or not rated: coco_1_mini_dalle"):
        read("tifa160", tmp_path / "t")
    tifa160(tmp_path / "t")
    ratings = tmp_path / "t/dsg_tifa160_anns.csv"
    ratings.write_text(ratings.read_text().replace("sd1dot1", "sd1dot2"))
    with pytest.raises(ConfigError, match="unknown model 'sd1dot2': did you mean sd"):
        read("tifa160", tmp_path / "t")
    genai_bench(tmp_path / "g")
    edited(tmp_path / "g/genai_skills.json", lambda content: content["scene"].append(7))
    with pytest.raises(ConfigError, match=r"genai_skills.json has prompt 00007, genai_image.json has not"):
        read("genai_bench", tmp_path / "g")
    genai_bench(tmp_path / "g")
    edited(tmp_path / "g/genai_image.json", lambda content: content["00002"]["models"].update(SDXL_Turbo=[]))
    with pytest.raises(ConfigError, match="1 images have no rating: SDXL_Turbo/00002"):
        read("genai_bench", tmp_path / "g")
    pickapic(tmp_path / "p")
    edited(tmp_path / "p/test_captions.json", lambda content: content.pop())
    read("pickapic", tmp_path / "p")
    edited(tmp_path / "p/test_captions.json", lambda content: content.__delitem__(slice(490, None)))
    with pytest.raises(ConfigError, match="lacks 2 of the 100 captions: id 490"):
        read("pickapic", tmp_path / "p")
    edited(tmp_path / "p/test_captions.json", lambda content: content.append(content[0]))
    with pytest.raises(ConfigError, match="has 1 ids of other captions"):
        read("pickapic", tmp_path / "p")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "holds no items of pairs"),
        ([{"id": "a", "image": "one.png", "true": "x", "false": []}], "item a has no false text"),
        ([{"id": "a", "image": "one.png", "true": "x", "false": ["y"]}] * 2, "item a of pairs is there twice"),
        ([{"id": "a", "image": "../one.png", "true": "x", "false": ["y"]}], "is not inside the folder"),
        ([{"id": "a", "image": "/etc/passwd", "true": "x", "false": ["y"]}], "is not inside the folder"),
        ([{"id": "a", "image": "one\0.png", "true": "x", "false": ["y"]}], "is not inside the folder"),
        (
            [{"id": "a", "image": "one.png", "true": "x"}, {}],
            r"pairs.jsonl is another file: 0.false: .* \(and 4 more\)",
        ),
    ],
)
def test_pairs_that_cannot_be_used(tmp_path: Path, entries: list[Any], message: str) -> None:
    pictures(tmp_path, ["one.png"])
    as_lines(tmp_path / "pairs.jsonl", entries)
    with pytest.raises(ConfigError, match=message):
        read("pairs", tmp_path)


def test_frames_in_arrays_become_images(tmp_path: Path) -> None:
    blue, green, red = 10, 20, 30
    np.save(tmp_path / "frame.npy", np.full((4, 6, 3), (blue, green, red), dtype=np.uint8))
    image = Image.open(io.BytesIO(image_bytes(tmp_path / "frame.npy")))
    assert (image.size, image.getpixel((0, 0))) == ((6, 4), (red, green, blue))
    pictures(tmp_path, ["other.png"])
    assert image_bytes(tmp_path / "other.png") == b"an image"
    np.save(tmp_path / "floats.npy", np.zeros((4, 6, 3)))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "several.npz", np.zeros(3))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    (tmp_path / "short.npy").write_bytes((tmp_path / "frame.npy").read_bytes()[:-1])
    pictures(tmp_path, ["none.npy", "empty.npy"])
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("floats", "objects", "several", "short", "none", "empty"):
        with pytest.raises(ConfigError, match=f"{name}.npy"):
            image_bytes(tmp_path / f"{name}.npy")


# ---------------------------------------------------------------- figures


def means(benchmark: str, items: Sequence[Item], scores: Sequence[Any]) -> dict[str, float]:
    return {name: found.mean for name, found in results(benchmark, items, scores).items()}


def test_winoground_and_eqben_count_text_image_and_group(tmp_path: Path) -> None:
    scores = [[[0.9, 0.1], [0.2, 0.8]], [[0.9, 0.5], [0.95, 0.96]], [[0.5, 0.5], [0.5, 0.5]]]
    items = items_of("winoground", tmp_path / "w")
    expected = {"text": 2 / 3, "image": 1 / 3, "group": 1 / 3, "group/Object": 1.0, "group/Relation": 0.0}
    assert means("winoground", items, scores) == pytest.approx(expected)
    assert results("winoground", items, scores)["text"] == mean_interval([1, 1, 0])
    found = means("eqben", items_of("eqben", tmp_path / "e"), [*scores, scores[0]])
    assert found["group/eqbenkubric"] == 0.0
    assert found["group"] == 0.5


def test_a_true_text_must_score_higher_than_each_false_one(tmp_path: Path) -> None:
    items = items_of("pairs", tmp_path)
    scores = [[[0.9, 0.1, 0.95]], [[0.5, 0.4]], [[0.5, 0.5]]]
    assert means("pairs", items, scores) == pytest.approx(
        {"accuracy": 2 / 4, "accuracy/colour": 1 / 2, "accuracy/relation": 1.0}
    )


def test_intervals_know_that_pairs_of_one_image_go_together() -> None:
    """Pairs of an image are all right or all wrong here: the share is as sure as that of the images."""
    right, wrong = [[0.9, 0.1, 0.2]], [[0.1, 0.9, 0.9]]
    apart = [Item(str(place), (f"{place}.png",), ("a", "b", "c")) for place in range(10)]
    found = results("pairs", apart, [right, right, wrong, right, wrong] * 2)["accuracy"]
    assert found == pytest.approx(mean_interval([1, 1, 0, 1, 0] * 2))
    twice = [Item(item.id + end, item.images, item.texts) for item in apart for end in "ab"]
    again = results("pairs", twice, [scores for scores in [right, right, wrong, right, wrong] * 2 for _ in "ab"])
    assert again["accuracy"] == pytest.approx(found)


def test_sugarcrepe_by_kind(tmp_path: Path) -> None:
    items = items_of("sugarcrepe", tmp_path)
    found = means("sugarcrepe", items, [[[1.0, 0.0 if item.id != "add_att/2" else 1.0]] for item in items])
    assert found["accuracy"] == pytest.approx(13 / 14)
    assert (found["accuracy/add_att"], found["accuracy/swap_obj"]) == (0.5, 1.0)


def test_pickapic_chooses_the_first_of_equals(tmp_path: Path) -> None:
    items = items_of("pickapic", tmp_path)
    assert means("pickapic", items, [[[0.5], [0.5]]] * 100) == {"accuracy": np.mean([item.human for item in items])}
    best = [[[item.human], [0.5]] for item in items]
    assert means("pickapic", items, best) == {"accuracy": 1.0}


def test_seetrue_by_source(tmp_path: Path) -> None:
    items = items_of("seetrue", tmp_path)
    scores = np.random.default_rng(0).random(12)
    found = means("seetrue", items, scores[:, None, None])
    assert found.keys() == {"auroc/coco_t2i", "auroc/drawbench", "auroc/editbench"}
    places = [place for place, item in enumerate(items) if item.group == "coco_t2i"]
    assert found["auroc/coco_t2i"] == pytest.approx(
        roc_auc(scores[places], [items[place].human == 1 for place in places])
    )
    with pytest.raises(ValueError, match="drawbench: 0 positive and 1 negative"):
        results("seetrue", items[:1], [[[0.5]]])


def test_ratings_correlate_as_scipy_says(tmp_path: Path) -> None:
    items = items_of("genai_bench", tmp_path)
    scores, human = np.random.default_rng(0).random(12), np.array([item.human for item in items])
    found = means("genai_bench", items, scores[:, None, None])
    assert found["pearson"] == pytest.approx(stats.pearsonr(scores, human).statistic)
    assert found["kendall"] == pytest.approx(stats.kendalltau(scores, human).statistic)
    assert found["pairwise_accuracy"] == pytest.approx(tie_calibration(scores, human).accuracy)
    rows = tie_calibration(scores.reshape(4, 3), human.reshape(4, 3))
    assert found["pairwise_accuracy_within_prompts"] == pytest.approx(rows.accuracy)
    assert found["pairwise_accuracy/negation"] == pytest.approx(tie_calibration(scores[6:9], human[6:9]).accuracy)
    assert found["score/DALLE_3"] == pytest.approx(scores[::3].mean())
    assert found["score/DALLE_3/basic"] == pytest.approx(scores[[0, 3]].mean())
    each = pairwise_accuracy_each(scores, human, tie_calibration(scores, human).eps)
    by_prompt = mean_interval(each.reshape(4, 3).mean(axis=1))
    assert results("genai_bench", items, scores[:, None, None])["pairwise_accuracy"] == pytest.approx(by_prompt)
    assert "score/vq_diffusion" in means("tifa160", items_of("tifa160", tmp_path / "t"), scores[:10, None, None])


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_scores_that_are_not_of_the_items(tmp_path: Path, benchmark: str) -> None:
    items = items_of(benchmark, tmp_path)
    scores = [
        np.random.default_rng(place).random((len(item.images), len(item.texts))) for place, item in enumerate(items)
    ]
    assert all(figure.low <= figure.mean <= figure.high for figure in results(benchmark, items, scores).values())
    with pytest.raises(ValueError, match=f"scores of {len(items) - 1} items for {len(items)} items of {benchmark}"):
        results(benchmark, items, scores[1:])
    with pytest.raises(ValueError, match=f"item {items[0].id} of {benchmark} has scores of shape"):
        results(benchmark, items, [np.full_like(scores[0], math.nan), *scores[1:]])
    with pytest.raises(ValueError, match=f"item {items[0].id} of {benchmark} has scores of shape"):
        results(benchmark, items, [scores[0][:, :1].T[:, :0], *scores[1:]])
