import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from questions import CAPTIONS, MEMES, question

from hpc_mm.benchmark import CAPTION, VQA, Decoding
from hpc_mm.config import ConfigError, differences
from hpc_mm.protocol import Demonstrations, Protocol, Questions, Scoring, protocol_of, read_protocol, refuse_unlike

TRAIN = Questions.of("train", [question(number) for number in range(100)])
TEST = [question(number) for number in range(5000)]
RANDOM = Demonstrations(shots=4, pool=TRAIN, seeds=(42,))
CIDER = Scoring(metric="cider", rules="openflamingo")
COCO = protocol_of(
    CAPTIONS.model_copy(update={"name": "coco-karpathy"}), Questions.of(CAPTIONS.split, TEST), RANDOM, CIDER
)
ID = "coco-karpathy-test-5000@92f3/of-caption@be91/4shot-random-s42-train-100@48c2/beam3-20tok/cider-openflamingo@v1"

QUESTIONS = st.builds(
    Questions,
    split=st.sampled_from(["val", "test"]),
    count=st.integers(1, 2),
    digest=st.sampled_from(["a" * 16, "b" * 16]),
)
SHOTS = st.builds(
    Demonstrations,
    shots=st.integers(0, 2),
    pool=QUESTIONS,
    query_set=st.integers(2047, 2049),
    seeds=st.sampled_from([(1,), (1, 2), (12,)]),
) | st.builds(
    Demonstrations,
    shots=st.integers(0, 2),
    pool=QUESTIONS,
    selection=st.just("rices"),
    query_set=st.just(0),
    features=st.sampled_from(["a", "b"]),
)
PROTOCOLS = st.builds(
    Protocol,
    benchmark=st.sampled_from(["coco", "vqav2"]),
    questions=QUESTIONS,
    prompt=st.sampled_from([CAPTION, VQA]),
    demonstrations=SHOTS,
    decoding=st.none()
    | st.builds(
        Decoding,
        beams=st.integers(1, 2),
        max_new_tokens=st.integers(1, 2),
        length_penalty=st.sampled_from([0.0, 1.0, 1.0000001]),
    ),
    classes=st.none(),
    scoring=st.builds(
        Scoring,
        metric=st.sampled_from(["cider", "vqa"]),
        rules=st.sampled_from(["of", "lmms"]),
        version=st.integers(1, 2),
    ),
)


def changed(**parts: Any) -> Protocol:
    return read_protocol({**COCO.model_dump(), **parts})


def test_an_id_says_all() -> None:
    assert COCO.id == ID


def test_an_id_is_the_same_in_another_process() -> None:
    code = (
        "import json, sys; from hpc_mm.protocol import read_protocol; print(read_protocol(json.load(sys.stdin)).id);"
        "sys.exit('torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], input=COCO.model_dump_json(), text=True, capture_output=True, check=True
    )
    assert found.stdout.strip() == COCO.id


def test_zero_shot_and_rices_are_named() -> None:
    zero = changed(demonstrations={"shots": 0, "pool": TRAIN, "seeds": [43, 42]})
    assert "/0+2text-random-s42,43-train-100@" in zero.id
    found = {"shots": 8, "pool": TRAIN, "selection": "rices", "query_set": 0, "features": "ViT-L-14-openai"}
    assert "/8shot-rices-ViT-L-14-openai-train-100@" in changed(demonstrations=found).id
    classes = protocol_of(
        MEMES, Questions.of(MEMES.split, TEST), RANDOM, Scoring(metric="roc_auc", rules="openflamingo")
    )
    assert classes.decoding is None and "/meanlogprob@" in classes.id


@given(PROTOCOLS, PROTOCOLS)
def test_equal_ids_are_equal_protocols(one: Protocol, other: Protocol) -> None:
    assert (one.id == other.id) == (one == other) == (not differences(one, other))
    assert read_protocol(json.loads(one.model_dump_json())) == one
    assert "\n" not in one.id and " " not in one.id


def test_unlike_protocols_are_refused_with_what_differs() -> None:
    refuse_unlike(COCO, read_protocol(json.loads(COCO.model_dump_json())))
    other = changed(decoding={"beams": 1}, scoring={"metric": "cider", "rules": "vlmevalkit"})
    with pytest.raises(ConfigError) as told:
        refuse_unlike(COCO, other)
    assert str(told.value) == (
        "scores of unlike protocols are not compared: decoding.beams: 3 -> 1; "
        'scoring.rules: "openflamingo" -> "vlmevalkit"'
    )
    fewer = changed(questions=Questions.of("test", TEST[:-1]))
    with pytest.raises(ConfigError, match=r"questions.count: 5000 -> 4999; questions.digest: "):
        refuse_unlike(COCO, fewer)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": []}, "random: random ones have seeds"),
        ({"seeds": [1, 1]}, "a seed is there twice"),
        ({"seeds": [1], "selection": "rices"}, "rices: random ones have seeds"),
        ({"seeds": [1], "features": "clip"}, "random: random ones have seeds"),
        ({"seeds": [1], "shots": -1}, "demonstrations.shots=-1"),
        ({"seeds": [1], "selection": "nearest"}, "demonstrations.selection='nearest'"),
    ],
)
def test_demonstrations_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        changed(demonstrations={"shots": 4, "pool": TRAIN, **values})
    assert message in str(told.value)
