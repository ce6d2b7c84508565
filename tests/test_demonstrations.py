from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from questions import CAPTIONS, MEMES, VQA, question

from hpc_mm import demonstrations
from hpc_mm.benchmark import Question
from hpc_mm.config import ENDOFCHUNK_TOKEN, IMAGE_TOKEN, ConfigError
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.demonstrations import QuerySet, Similar, most_similar, prompt

POOL = [question(number) for number in range(3000)]
ASKED = question(9000, text="How many?")


def spelled(sample: Sample) -> str:
    return "".join(part.text if isinstance(part, Text) else f"[{part.key}]" for part in sample.parts)


# ---------------------------------------------------------------- at random


def test_a_query_set_is_drawn_by_seed() -> None:
    sets = [QuerySet(POOL, seed).questions for seed in (42, 42, 43)]
    assert sets[0] == sets[1] != sets[2]
    assert len({q.id for q in sets[0]}) == 2048
    shared = len({q.id for q in sets[0]} & {q.id for q in sets[2]})
    assert abs(shared - 2048 * 2048 / 3000) < 100
    assert QuerySet(Random(1).sample(POOL, len(POOL)), 42).questions == sets[0]
    assert sorted(q.id for q in QuerySet(POOL[:50], 42).questions) == sorted(q.id for q in POOL[:50])


def test_the_draw_stays_what_it_was() -> None:
    """Results of another version of this package, or of Python, are only comparable if this holds."""
    assert [q.id for q in QuerySet(POOL, 42).shots(ASKED, 4)] == ["q1683", "q2164", "q1276", "q690"]


@given(st.data(), st.integers(0, 2**32), st.integers(0, 8))
def test_shots_depend_on_nothing_but_seed_and_question(data: st.DataObject, seed: int, shots: int) -> None:
    images = data.draw(st.lists(st.integers(0, 9), min_size=12, max_size=30))
    pool = [question(number, image) for number, image in enumerate(images)]
    asked = [question(1000 + number, number) for number in range(12)]
    drawn = QuerySet(pool, seed)
    enough = [q for q in asked if sum(p.image != q.image for p in pool) >= max(shots, 2)]
    found = {q.id: drawn.shots(q, shots) for q in enough}
    again = QuerySet(data.draw(st.permutations(pool)), seed)
    assert {q.id: again.shots(q, shots) for q in data.draw(st.permutations(enough))} == found
    for q in enough:
        assert len({shot.id for shot in found[q.id]}) == len(found[q.id]) == (shots or 2)
        assert q.image_key not in {shot.image_key for shot in found[q.id]}


def test_every_question_of_the_set_is_as_likely() -> None:
    drawn = QuerySet(POOL[:20], 7)
    counts = Counter(shot.id for number in range(4000) for shot in drawn.shots(question(10_000 + number), 4))
    places = Counter(drawn.shots(question(10_000 + number), 4)[0].id for number in range(4000))
    assert len(counts) == 20 and all(abs(count - 800) < 120 for count in counts.values())
    assert len(places) == 20 and all(abs(count - 200) < 70 for count in places.values())


def test_too_few_to_draw_from() -> None:
    drawn = QuerySet(POOL[:30], 42)
    drawn.check(30)
    with pytest.raises(ConfigError, match=r"shots=32 shows 32 of a query set of 30"):
        drawn.check(32)
    with pytest.raises(ConfigError, match=r"shots=0 shows 2 of a query set of 1"):
        QuerySet(POOL[:1], 42).check(0)
    with pytest.raises(ConfigError, match=r"only 29 of the query set's 30 are about another image than question q3"):
        drawn.shots(POOL[3], 30)


def test_what_has_no_answer_cannot_demonstrate() -> None:
    silent = Question("q1", "1", "test-000000.tar", 0, "Why?", ())
    for make in (lambda: QuerySet([silent], 42), lambda: Similar([silent])):
        with pytest.raises(ConfigError, match=r"1 of 1 questions to demonstrate with have no answer, such as q1"):
            make()


# ---------------------------------------------------------------- by similarity


def vectors(count: int, width: int, seed: int, values: int = 0) -> np.ndarray:
    """Normalised; with ``values``, of so few different ones that many are equal."""
    draw = np.random.default_rng(seed)
    found = draw.standard_normal((values or count, width))
    found = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    return found[draw.integers(0, values, count)] if values else found


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 2**20),
    st.integers(1, 7),
    st.integers(1, 7),
)
def test_the_nearest_by_definition(rows: int, asked: int, values: int, seed: int, block: int, batch: int) -> None:
    features, queries = vectors(rows, 4, seed, values), vectors(asked, 4, seed + 1, values)
    count = 1 + seed % rows
    whole = most_similar(features, queries, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstrations, "FEATURES_AT_ONCE", block)
        patch.setattr(demonstrations, "QUERIES_AT_ONCE", batch)
        assert np.array_equal(most_similar(features, queries, count), whole)
    quantum = 2**26
    exact = [
        [
            sum(round(float(x) * quantum) * round(float(y) * quantum) for x, y in zip(f, q, strict=True))
            for f in features
        ]
        for q in queries
    ]
    by_definition = [sorted(range(rows), key=lambda row: (-scores[row], row))[:count][::-1] for scores in exact]
    assert whole.tolist() == by_definition


def test_the_nearest_do_not_depend_on_what_is_asked_together() -> None:
    features, queries = vectors(5000, 64, 0), vectors(300, 64, 1)
    together = most_similar(features, queries, 9)
    for size in (1, 7, 128):
        apart = [most_similar(features, queries[start : start + size], 9) for start in range(0, 300, size)]
        assert np.array_equal(np.concatenate(apart), together)
    cosine = np.take_along_axis(queries.astype(np.float64) @ features.T.astype(np.float64), together, axis=1)
    assert (np.diff(cosine, axis=1) > -1e-7).all()
    assert np.array_equal(together[:, -1], (queries @ features.T).argmax(axis=1))


def test_features_are_normalised() -> None:
    for wrong in (2 * vectors(3, 4, 0), np.full((3, 4), np.nan, np.float32)):
        with pytest.raises(ValueError, match="L2-normalised"):
            most_similar(wrong, vectors(1, 4, 1), 1)
    with pytest.raises(ConfigError, match="the 4 most similar of 3 images"):
        most_similar(vectors(3, 4, 0), vectors(1, 4, 1), 4)


def test_questions_about_the_nearest_images() -> None:
    pool = [question(0, 5), question(1, 6), question(2, 5), question(3, 7)]
    similar = Similar(pool)
    assert [name.rpartition("/")[2] for name in similar.images] == ["5", "6", "7"]
    nearest = [2, 1, 0]  # image 5 is the most similar, and its first question comes last
    assert [q.id for q in similar.shots(ASKED, 3, nearest)] == ["q1", "q2", "q0"]
    assert [q.id for q in similar.shots(ASKED, 0, nearest)] == ["q2", "q0"]
    assert [q.id for q in similar.shots(question(9, 5), 2, nearest)] == ["q3", "q1"]
    with pytest.raises(ConfigError, match="shots=4 shows 4 demonstrations, question q9 has 2"):
        similar.shots(question(9, 5), 4, nearest)


# ---------------------------------------------------------------- the prompt


def test_a_prompt_of_captions() -> None:
    shots = [question(1, None, " a dog ", "another"), question(2, None, "a cat")]
    sample = prompt(question(3), shots, CAPTIONS, 2, {"train-000000.tar/1": b"one"})
    assert sample.id == "q3"
    assert sample.parts == (
        Image(b"one", "train-000000.tar/1"),
        Text("Output:a dog<|endofchunk|>\n"),
        Image(None, "train-000000.tar/2"),
        Text("Output:a cat<|endofchunk|>\n"),
        Image(None, "train-000000.tar/3"),
        Text("Output:"),
    )


def test_zero_shot_shows_two_texts_without_images() -> None:
    shots = [question(1, None, "a dog"), question(2, None, "a cat")]
    assert prompt(question(3), shots, CAPTIONS, 0).parts == (
        Text("Output:a dog<|endofchunk|>\nOutput:a cat<|endofchunk|>\n"),
        Image(None, "train-000000.tar/3"),
        Text("Output:"),
    )


def test_a_prompt_of_questions_and_of_classes() -> None:
    shot = question(1, None, "two", "2", text="How many dogs?")
    asked = question(3, None, "", text="Which {answer}?")
    assert spelled(prompt(asked, [shot], VQA, 1)) == (
        "[train-000000.tar/1]Question:How many dogs? Short answer:two<|endofchunk|>\n"
        "[train-000000.tar/3]Question:Which {answer}? Short answer:"
    )
    meme = question(4, None, "yes", text="ha")
    assert spelled(prompt(asked, [meme], MEMES, 1)) == (
        "[train-000000.tar/4]is an image with: 'ha' written on it. Is it hateful? Answer:yes<|endofchunk|>"
        "[train-000000.tar/3]is an image with: 'Which {answer}?' written on it. Is it hateful? Answer:"
    )


TEXTS = st.lists(
    st.sampled_from([IMAGE_TOKEN, ENDOFCHUNK_TOKEN, "<im", "age>", "{question}", "{answer}", "a", "<|"])
).map("".join)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), st.booleans())
def test_no_text_opens_an_image_or_closes_a_chunk(texts: list[tuple[str, str]], pictures: bool) -> None:
    *shots, asked = [question(number, None, answer or "-", text=text) for number, (text, answer) in enumerate(texts)]
    sample = prompt(asked, shots, VQA, len(shots) if pictures else 0)
    assert [image.key for image in sample.images] == [
        q.image_key for q in ([*shots, asked] if pictures and shots else [asked])
    ]
    text = "".join(part.text for part in sample.parts if isinstance(part, Text))
    assert IMAGE_TOKEN not in text
    assert text.count(ENDOFCHUNK_TOKEN) == len(shots)
    assert isinstance(sample.parts[-1], Text)
