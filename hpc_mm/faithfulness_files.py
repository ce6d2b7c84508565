"""The published annotation files of benchmarks of faithfulness: each a function from the folder to its items.

What a file must hold is stated by a class; other fields are passed over. Anything else is told in one line.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from hpc_mm.annotations import json_lines
from hpc_mm.config import ConfigError, unknown


@dataclass(frozen=True)
class Item:
    """What is scored at once. ``images``: files relative to the benchmark's folder."""

    id: str
    images: tuple[str, ...]
    texts: tuple[str, ...]
    human: float | None = None  # mean rating, or 1 and 0 for yes and no; None where the order of the texts says it
    group: str = ""  # prompt, source or kind
    skills: tuple[str, ...] = ()
    generator: str = ""  # of the image


@dataclass(frozen=True)
class _Winoground:
    id: int
    image_0: str
    image_1: str
    caption_0: str
    caption_1: str
    collapsed_tag: str = ""


@dataclass(frozen=True)
class _EqBen:
    image0: str
    image1: str
    caption0: str
    caption1: str


@dataclass(frozen=True)
class _Tifa:
    text_id: str
    image_path: str
    text: str


@dataclass(frozen=True)
class _TifaRating:
    model_type: str
    source_id: str
    answer: FiniteFloat


@dataclass(frozen=True)
class _Preference:
    id: int
    caption: str
    label_0: FiniteFloat
    image_0: str
    image_1: str


@dataclass(frozen=True)
class _SeeTrue:
    image: str
    text: str
    label: bool
    dataset_source: str


@dataclass(frozen=True)
class _SugarCrepe:
    filename: str
    caption: str
    negative_caption: str


@dataclass(frozen=True)
class _GenAI:
    prompt: str
    models: dict[str, list[FiniteFloat]]


@dataclass(frozen=True)
class _Pair:
    id: str
    image: str
    true: str
    false: list[str]
    group: str = ""


def _read(file: Path, kind: Any) -> Any:
    """A file's JSON, JSON lines or CSV as values of a kind; ConfigError where it is something else."""
    try:
        text = file.read_text("utf-8-sig")
        if file.suffix == ".csv":
            values: Any = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            values = json_lines(text) if file.suffix == ".jsonl" else json.loads(text)
        return TypeAdapter(kind).validate_python(values)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is damaged: line {error.lineno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is damaged: byte {error.start} is not UTF-8") from None
    except csv.Error as error:
        raise ConfigError(f"{file} is damaged: {error}") from None
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        place = ".".join(map(str, first["loc"])) or "the whole"
        more = f" (and {len(others):,} more)" if others else ""
        raise ConfigError(
            f"{file} is another file: {place}: {first['msg'][0].lower()}{first['msg'][1:]}{more}"
        ) from None


def _images(folder: Path, *names: str) -> str:
    """Where a benchmark's images lie in its folder, with a slash: the first of these folders, or itself."""
    return next((f"{name}/" for name in names if (folder / name).is_dir()), "")


def winoground(folder: Path) -> list[Item]:
    """facebook/winoground on Hugging Face, its folder data/: ``examples.jsonl``, and images.zip unpacked. Image names
    have no ending there; the files are PNG."""
    place = _images(folder, "images")
    items = []
    for entry in _read(folder / "examples.jsonl", list[_Winoground]):
        names = [name if PurePosixPath(name).suffix else f"{name}.png" for name in (entry.image_0, entry.image_1)]
        texts = (entry.caption_0, entry.caption_1)
        skills = (entry.collapsed_tag,) if entry.collapsed_tag else ()
        items.append(Item(str(entry.id), tuple(place + name for name in names), texts, skills=skills))
    return items


def eqben(folder: Path) -> list[Item]:
    """EqBen's small set (Wang et al. 2023) as its archive eqben_vllm.zip has it: ``all_select.json`` and images/, whose
    folders are the parts; the three of Kubric are one. Known from code that reads it, not seen; frames may be .npy."""
    place = _images(folder, "images")
    items = []
    for number, entry in enumerate(_read(folder / "all_select.json", list[_EqBen])):
        part = entry.image0.partition("/")[0].partition("_")[0]
        texts = (entry.caption0, entry.caption1)
        items.append(Item(str(number), (place + entry.image0, place + entry.image1), texts, group=part))
    return items


TIFA_MODELS = {  # a model's name in the ratings -> in the images' names
    "mini-dalle": "mini_dalle",
    "vq-diffusion": "vq_diffusion",
    "sd1dot1": "stable_diffusion_v1_1",
    "sd1dot5": "stable_diffusion_v1_5",
    "sd2dot1": "stable_diffusion_v2_1",
}


def tifa160(folder: Path) -> list[Item]:
    """TIFA's 160 prompts with five models' images (Hu et al. 2023) and DSG's ratings of 1 to 5 (Cho et al. 2024):
    ``tifa160.json`` and ``dsg_tifa160_anns.csv`` as in t2v_metrics' datasets/. A few images have fewer ratings."""
    ratings: dict[str, list[float]] = {}
    for rating in _read(folder / "dsg_tifa160_anns.csv", list[_TifaRating]):
        if rating.model_type not in TIFA_MODELS:
            raise ConfigError(f"{folder}/dsg_tifa160_anns.csv: {unknown('model', rating.model_type, TIFA_MODELS)}")
        ratings.setdefault(f"{rating.source_id}_{TIFA_MODELS[rating.model_type]}", []).append(rating.answer)
    entries: dict[str, _Tifa] = _read(folder / "tifa160.json", dict[str, _Tifa])
    if ratings.keys() != entries.keys():
        wrong = sorted(ratings.keys() ^ entries.keys())
        raise ConfigError(f"{folder}: {len(wrong):,} images are rated but not listed, or not rated: {wrong[0]}, ...")
    place = _images(folder, "images", "tifa160")
    return [
        Item(key, (place + entry.image_path,), (entry.text,), fmean(ratings[key]), entry.text_id,
             generator=key.removeprefix(f"{entry.text_id}_"))
        for key, entry in entries.items()
    ]  # fmt: skip


# Which of the 500 captions of Pick-a-Pic's test split VQAScore's paper has scored, by their ids.
# fmt: off
PICKAPIC = (
    1, 5, 9, 14, 17, 21, 31, 33, 35, 39, 43, 53, 54, 57, 59, 60, 62, 76, 78, 82, 91, 98, 99, 105, 110, 111, 112, 113,
    118, 119, 124, 138, 141, 142, 144, 148, 149, 150, 153, 159, 162, 163, 172, 196, 197, 214, 220, 221, 228, 236, 252,
    257, 259, 266, 268, 274, 277, 278, 281, 285, 286, 301, 308, 312, 316, 317, 318, 319, 326, 334, 335, 339, 340, 345,
    347, 350, 352, 367, 368, 374, 375, 376, 382, 384, 385, 387, 399, 405, 411, 412, 417, 419, 441, 444, 472, 475, 478,
    479, 490, 493,
)
# fmt: on


def pickapic(folder: Path) -> list[Item]:
    """Pick-a-Pic v1's test captions (Kirstain et al. 2023) as zhiqiulin/vqascore_ablation has them in
    pickapic_v1.zip: ``test_captions.json``; the 100 of VQAScore's paper. Known from code that reads it, not seen.

    ``human`` is 1 where people prefer the first image (``label_0`` 1), else 0: a draw counts for the second, as there.
    """
    captions: list[_Preference] = _read(folder / "test_captions.json", list[_Preference])
    entries = {entry.id: entry for entry in captions}
    if len(entries) < len(captions):
        raise ConfigError(f"{folder}/test_captions.json has {len(captions) - len(entries)} ids of other captions")
    absent = [number for number in PICKAPIC if number not in entries]
    if absent:
        raise ConfigError(f"{folder}/test_captions.json lacks {len(absent)} of the 100 captions: id {absent[0]}, ...")
    chosen = [entries[number] for number in PICKAPIC]
    return [
        Item(str(entry.id), (entry.image_0, entry.image_1), (entry.caption,), float(entry.label_0 == 1))
        for entry in chosen
    ]


def seetrue(folder: Path) -> list[Item]:
    """yonatanbitton/SeeTRUE on Hugging Face (Yarom et al. 2023): ``SeeTRUE.csv`` and images.zip unpacked. ``group``
    is the source (drawbench, editbench, coco_t2i), ``human`` whether the text is true. Ids are rows from 0."""
    place = _images(folder, "images")
    return [
        Item(str(row), (place + entry.image,), (entry.text,), float(entry.label), entry.dataset_source)
        for row, entry in enumerate(_read(folder / "SeeTRUE.csv", list[_SeeTrue]))
    ]


SUGARCREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def sugarcrepe(folder: Path) -> list[Item]:
    """SugarCrepe (Hsieh et al. 2023): the seven files of its data/ and COCO's val2017/ beside them. The first text is
    true, the second its hard negative; ``group`` is the kind of change."""
    place = _images(folder, "val2017", "images")
    return [
        Item(f"{kind}/{key}", (place + entry.filename,), (entry.caption, entry.negative_caption), group=kind)
        for kind in SUGARCREPE
        for key, entry in _read(folder / f"{kind}.json", dict[str, _SugarCrepe]).items()
    ]


def genai_bench(folder: Path) -> list[Item]:
    """GenAI-Bench's images (Li et al. 2024): zhiqiulin/GenAI-Bench-527 or BaiqiL/GenAI-Bench-1600 on Hugging Face, that
    is ``genai_image.json``, ``genai_skills.json`` and each model's archive unpacked: <model>/<prompt's id>.jpeg.

    ``human`` is the mean of the three ratings of 1 to 5, ``group`` the prompt, ``generator`` the model.
    """
    prompts: dict[str, _GenAI] = _read(folder / "genai_image.json", dict[str, _GenAI])
    skills: dict[str, list[str]] = {prompt: [] for prompt in prompts}
    for skill, numbers in _read(folder / "genai_skills.json", dict[str, list[int]]).items():
        for prompt in (f"{number:05d}" for number in numbers):
            if prompt not in skills:
                raise ConfigError(f"{folder}/genai_skills.json has prompt {prompt}, genai_image.json has not")
            skills[prompt].append(skill)
    unrated = [
        f"{model}/{prompt}" for prompt, entry in prompts.items() for model, given in entry.models.items() if not given
    ]
    if unrated:
        raise ConfigError(f"{folder}/genai_image.json: {len(unrated):,} images have no rating: {unrated[0]}, ...")
    return [
        Item(f"{model}/{prompt}", (f"{model}/{prompt}.jpeg",), (entry.prompt,), fmean(given), prompt,
             tuple(skills[prompt]), model)
        for prompt, entry in prompts.items()
        for model, given in entry.models.items()
    ]  # fmt: skip


def pairs(folder: Path) -> list[Item]:
    """Any images with a true text and false ones: ``pairs.jsonl``, a line each {"id", "image", "true": text, "false":
    [texts]}, with "group" where figures of parts are wanted."""
    entries = _read(folder / "pairs.jsonl", list[_Pair])
    for entry in entries:
        if not entry.false:
            raise ConfigError(f"{folder}/pairs.jsonl: item {entry.id} has no false text")
    return [Item(entry.id, (entry.image,), (entry.true, *entry.false), group=entry.group) for entry in entries]
