"""Values from the command line, a site's defaults, and the frozen run."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_mm.config import (
    ConfigError,
    Flamingo,
    Run,
    Site,
    Source,
    Train,
    differences,
    parse_arguments,
    read_run,
    with_overrides,
)
from hpc_mm.recipes.clip_flant5_toy_stage2 import clip_flant5_toy_stage2
from hpc_mm.recipes.toy import toy
from hpc_mm.site import at_site, in_store, read_site


def small(**values: object) -> Run:
    source = Source(data="corpus", form="pairs", batch=24, max_tokens=32)
    defaults = {
        "name": "small",
        "model": Flamingo(),
        "sources": {"pairs": source},
        "train": Train(steps=10),
        "gpus_per_node": 1,
    }
    return Run.model_validate({**defaults, **values})


def test_overrides_reach_every_depth_and_type() -> None:
    overrides = {
        "nodes": "2",
        "train.learning_rate": "3e-4",
        "train.betas": "0.9,0.95",
        "model.trainable": "resampler,new_tokens",
        "model.vision.architecture.width": "64",
        "model.vision.architecture.pool": '"tok"',
        "sources.pairs.min_similarity": "0.24",
        "slurm.extra.reservation": "none",
        "slurm.constraint": "null",
        "model.compile": "true",
    }
    run = with_overrides(small(), overrides)
    assert run.nodes == 2
    assert run.train.learning_rate == 3e-4
    assert run.train.betas == (0.9, 0.95)
    assert run.model.trainable == ("resampler", "new_tokens")
    assert run.model.vision.architecture == {"width": 64, "pool": "tok"}
    assert run.sources["pairs"].min_similarity == 0.24
    assert run.slurm.extra == {"reservation": "none"} and run.slurm.constraint == "null"  # words, where words belong
    assert run.model.compile is True
    assert with_overrides(run, {"sources.pairs.min_similarity": "none"}).sources["pairs"].min_similarity is None


def test_an_override_leaves_the_recipe_as_it_was() -> None:
    run = small()
    with_overrides(run, {"model.vision.architecture.width": "64", "slurm.extra.a": "b"})
    assert run == small()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.step", "5", "unknown key 'train.step': did you mean train.steps?"),
        ("sources.pair.batch", "5", "did you mean sources.pairs?"),
        ("train", "5", "train is a group; set one of its values: train.steps"),
        ("nodes.x", "5", "nodes has no parts"),
        ("nodes", "two", "nodes='two'"),
        ("sources.pairs.flip", "1.5", "less than or equal to 1"),
        ("name", "../other", "name='../other'"),
        ("nodes", "25", "leaves ranks without samples: 25 nodes x 1 processes need 25 or more"),
        ("sources.pairs.batch", "0", "greater than or equal to 1"),
        ("slurm.time", "soon", "slurm.time='soon'"),
        ("slurm.memory", "much", "slurm.memory='much'"),
        ("model.trainable", "vision,tower", "model.trainable.1='tower'"),
    ],
)
def test_bad_overrides_are_told_in_one_line(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_overrides(small(), {key: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"), [(["a"], "not key=value"), (["=1"], "not key=value"), (["a=1", "a=2"], "twice")]
)
def test_words_that_are_no_assignments(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments(words)


def test_values_may_hold_equals_signs() -> None:
    assert parse_arguments(["a.b=c=d"]) == {"a.b": "c=d"}


@given(
    st.builds(
        Train,
        steps=st.integers(1, 10**7),
        learning_rate=st.floats(1e-8, 1),
        betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    )
)
def test_a_frozen_run_is_read_back_exactly(train: Train) -> None:
    run = small(train=train)
    assert Run.model_validate_json(run.model_dump_json()) == run


def test_read_run_takes_a_folder_and_tells_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run at"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(small().model_dump_json())
    assert read_run(tmp_path) == small()
    values = json.loads(small().model_dump_json())
    (tmp_path / "run.json").write_text(json.dumps({**values, "colour": 1}))
    with pytest.raises(ConfigError, match="unknown key 'colour'"):
        read_run(tmp_path)


def test_differences_name_keys_and_values() -> None:
    new = with_overrides(small(), {"train.steps": "20", "slurm.extra.a": "b"})
    assert differences(small(), new) == [
        "train.steps: 10 -> 20",
        "slurm.extra: {} -> null",
        'slurm.extra.a: null -> "b"',
    ]
    assert differences(new, new) == []


@pytest.mark.parametrize(
    ("address", "store", "expected"),
    [
        ("corpus", "s3://bucket/x/", "s3://bucket/x/corpus"),
        ("corpus", "/data", "/data/corpus"),
        ("/else/corpus", "s3://bucket", "/else/corpus"),
        ("s3://other/corpus", "/data", "s3://other/corpus"),
    ],
)
def test_names_in_the_store(address: str, store: str, expected: str) -> None:
    assert in_store(address, store) == expected
    assert in_store(expected, store) == expected


def test_at_site_sets_slurm_and_addresses() -> None:
    run = with_overrides(small(), {"model.language.tokenizer": "store:corpus/tokenizer.json"})
    placed = at_site(run, Site(store="s3://bucket", slurm={"partition": "gpu"}))
    assert placed.slurm.partition == "gpu"
    assert placed.sources["pairs"].data == "s3://bucket/corpus"
    assert placed.model.language.tokenizer == "s3://bucket/corpus/tokenizer.json"


def test_read_site(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text('runs = "/scratch/runs"\n[slurm]\naccount = "lab"\ntime = "60"\n')
    site = read_site({"HPC_MM_SITE": str(file), "HPC_MM_STORE": "s3://bucket", "SBATCH_TIMELIMIT": "30"})
    assert site == Site(store="s3://bucket", runs="/scratch/runs", slurm={"account": "lab", "time": "30"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs =", "site file"),
        ('stores = "x"', "unknown key 'stores'"),
        ('[slurm]\npartion = "gpu"', "did you mean partition?"),
    ],
)
def test_a_wrong_site_file_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "site.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_site({"HPC_MM_SITE": str(file)})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_named_site_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="site file"):
        read_site({"HPC_MM_SITE": str(tmp_path / "none.toml")})


def test_weights_that_lie_here_get_a_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job runs in another folder."""
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    run = with_overrides(toy(), {"model.language.name": "weights", "model.weights": "checkpoint.pt"})
    found = at_site(run, Site())
    assert found.model.language.name == str(tmp_path / "weights")
    assert found.model.weights == "checkpoint.pt"  # not here: left for the job to find, or to complain of
    assert found.model.vision.pretrained == "openai"


@pytest.mark.parametrize("word", ["train.clip=inf", "train.betas=0.9,1.5", "sources.pairs.weight=nan"])
def test_numbers_that_cannot_train_are_refused(word: str) -> None:
    key, _, value = word.partition("=")
    with pytest.raises(ConfigError, match=key.split(".")[-1]):
        with_overrides(toy(), {key: value})


CHATS = {"form": "chat", "template": "t5_v1"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**CHATS, "min_images": 0}, "min_images=0 is of form=interleaved, not of form=chat"),
        ({"form": "pairs", "min_images": 2}, "min_images=2 is of form=interleaved, not of form=pairs"),
        ({**CHATS, "drop_single_image": 0.5}, r"drop_single_image=0\.5 is of form=interleaved, not of form=chat"),
        ({"form": "pairs", "drop_single_image": 1}, r"drop_single_image=1\.0 is of form=interleaved"),
        ({**CHATS, "chunk": 2}, "chunk=2 is of order=modality_length, not of order=random"),
        ({"form": "interleaved", "chunk": 2}, "chunk=2 is of order=modality_length"),
        ({**CHATS, "pack_images": 7}, "pack_images=7 is of packed rows, and pack_tokens=0 makes none: it must be "),
    ],
)
def test_a_value_without_effect_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(data="x", batch=4, max_tokens=32, **values)


def test_what_is_wrong_in_a_part_is_told_without_all_of_it() -> None:
    with pytest.raises(
        ConfigError, match=r"^sources\.pairs: pack_images=7 is of packed rows, [a-z_ =0:]+ pack_images=24$"
    ):
        with_overrides(toy(), {"sources.pairs.pack_images": "7"})


def test_sorting_is_of_sources_without_an_order() -> None:
    run = clip_flant5_toy_stage2()
    assert with_overrides(run, {"loader.by_length": "true"}).loader.by_length
    with pytest.raises(ConfigError, match=r"loader\.by_length=true is of sources of order=random"):
        with_overrides(run, {"loader.by_length": "true", "sources.questions.order": "length"})
