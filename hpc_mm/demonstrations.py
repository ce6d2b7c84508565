"""Which answered questions stand before a question, and the prompt that they make with it."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from random import Random
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from hpc_mm.benchmark import BLANKS, Benchmark, Question
from hpc_mm.config import ENDOFCHUNK_TOKEN, IMAGE_TOKEN, ConfigError
from hpc_mm.data.schema import Image, Part, Sample, Text
from hpc_mm.data.store import Store
from hpc_mm.similarity import Encoder, read_features

QUERY_SET = 2048  # questions that random demonstrations are drawn from, as in OpenFlamingo's evaluation
TEXT_SHOTS = 2  # stand, without their images, before a zero-shot question
NO_IMAGES: Mapping[str, bytes] = MappingProxyType({})
SCALE = 2.0**26  # see ``most_similar``
QUERIES_AT_ONCE, FEATURES_AT_ONCE = 1024, 4096  # similarities in memory: 32 MiB of float64, and copies


def shown(shots: int) -> int:
    """Demonstrations in a prompt of so many shots."""
    return shots or TEXT_SHOTS


def answered(pool: Sequence[Question]) -> Sequence[Question]:
    """The pool itself. ConfigError where a question in it has no answer to show."""
    without = [question.id for question in pool if not question.references]
    if without:
        raise ConfigError(
            f"{len(without)} of {len(pool)} questions to demonstrate with have no answer, such as {without[0]}: "
            "take demonstrations from a split whose answers are public"
        )
    return pool


# ---------------------------------------------------------------- at random


class QuerySet:
    """The training questions that random demonstrations come from: ``size`` of the pool, or all if it has fewer.

    They depend on the seed and on the ids in the pool, and not on its order.
    """

    def __init__(self, pool: Sequence[Question], seed: int, size: int = QUERY_SET) -> None:
        self.seed = seed
        self.questions = heapq.nsmallest(
            size, answered(pool), lambda question: sha256(f"{seed}/{question.id}".encode()).digest()
        )
        self._of_image = Counter(question.image_key for question in self.questions)

    def check(self, shots: int, asked: Iterable[Question] = ()) -> None:
        """ConfigError where a prompt would show more demonstrations than there are. Before any work is planned."""
        if shown(shots) > len(self.questions):
            raise ConfigError(f"shots={shots} shows {shown(shots)} of a query set of {len(self.questions)}: too few")
        for question in asked:
            self._own(question, shots)

    def shots(self, question: Question, shots: int) -> list[Question]:
        """Different demonstrations for a question, none about its own image, whatever else is asked or when."""
        own, count = self._own(question, shots), shown(shots)
        drawn = Random(f"{self.seed}/{question.id}").sample(self.questions, count + own)
        return [other for other in drawn if other.image_key != question.image_key][:count]

    def _own(self, question: Question, shots: int) -> int:
        """How many of the set are about the question's own image. ConfigError where too few are left without them."""
        own = self._of_image[question.image_key]
        if shown(shots) > len(self.questions) - own:
            raise ConfigError(
                f"shots={shots} shows {shown(shots)} demonstrations, but only {len(self.questions) - own} of the query "
                f"set's {len(self.questions)} are about another image than question {question.id}"
            )
        return own


# ---------------------------------------------------------------- by similarity (RICES)


class Similar:
    """The whole pool by image. Questions about the images most similar to a question's are its demonstrations.

    As in OpenFlamingo, whose features are per question: all questions about one image are equally similar, and go by
    their place in the pool.
    """

    def __init__(self, pool: Sequence[Question]) -> None:
        self.of_image: dict[str, list[Question]] = {}
        for question in answered(pool):
            self.of_image.setdefault(question.image_key, []).append(question)
        self.images = list(self.of_image)  # row i of the features is of image i

    def check(self, shots: int) -> None:
        """ConfigError where not every prompt can show as many as it should. Before any work is planned."""
        if shown(shots) >= len(self.images):
            raise ConfigError(f"shots={shots} shows {shown(shots)} of a pool about {len(self.images)} images: too few")

    def nearest(
        self, questions: Sequence[Question], shots: int, store: Store, encoder: Encoder
    ) -> dict[str, NDArray[np.int64]]:
        """What ``shots`` wants for questions, by their image keys: enough for ``shots`` demonstrations or fewer.

        Computed at once for all images that are asked about. ConfigError where features are missing.
        """
        asked = {question.image_key: (question.shard, question.sample) for question in questions}
        if not asked:
            return {}
        images = [(some[0].shard, some[0].sample) for some in self.of_image.values()]
        features = read_features(store, encoder, [*images, *asked.values()])
        count = min(shown(shots) + 1, len(images))
        return dict(zip(asked, most_similar(features[: len(images)], features[len(images) :], count), strict=True))

    def shots(self, question: Question, shots: int, nearest: Sequence[int] | NDArray[np.int64]) -> list[Question]:
        """``nearest``: by ``most_similar``, one image more than demonstrations, since one may be its own (or all)."""
        found: list[Question] = []
        for place in nearest[::-1]:
            if self.images[place] != question.image_key:
                found += self.of_image[self.images[place]]
        if len(found) < shown(shots):
            raise ConfigError(
                f"shots={shots} shows {shown(shots)} demonstrations, question {question.id} has {len(found)}"
            )
        return found[: shown(shots)][::-1]


def most_similar(features: NDArray[np.float32], queries: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """(Q, count) rows of ``features`` (N, D) with the largest cosine to each of ``queries`` (Q, D), the largest last.

    Both L2-normalised. Among equals the lower row is the more similar. Values are rounded to multiples of 2^-26, finer
    than float32 keeps those above 1/8: every sum is then a whole number below 2^53, exact in float64 in any order, so
    that the result depends neither on the machine nor on which queries are asked for together.
    """
    if not 1 <= count <= len(features):
        raise ConfigError(f"the {count} most similar of {len(features)} images are asked for")
    best = [
        _best(features, _whole(queries[start : start + QUERIES_AT_ONCE]), count)
        for start in range(0, len(queries), QUERIES_AT_ONCE)
    ]
    return np.concatenate([np.empty((0, count), np.int64), *best])[:, ::-1]


def _best(features: NDArray[np.float32], queries: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """(Q, count) rows, the most similar first."""
    asked = len(queries)
    rows = np.empty((asked, 0), np.int64)
    scores = np.empty((asked, 0))
    for start in range(0, len(features), FEATURES_AT_ONCE):
        found = queries @ _whole(features[start : start + FEATURES_AT_ONCE]).T
        width = found.shape[1]
        kept = min(count, width)
        least = np.partition(found, width - kept, axis=1)[:, width - kept, None]  # of the best in this block
        who, where = np.nonzero(found >= least)
        rows_now = np.concatenate([rows.ravel(), where + start])
        scores_now = np.concatenate([scores.ravel(), found[who, where]])
        who = np.concatenate([np.repeat(np.arange(asked), rows.shape[1]), who])
        order = np.lexsort((rows_now, -scores_now, who))
        first = np.searchsorted(who[order], np.arange(asked))
        kept = min(count, rows.shape[1] + kept)
        picked = order[first[:, None] + np.arange(kept)]
        rows, scores = rows_now[picked], scores_now[picked]
    return rows


def _whole(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Normalised vectors as whole multiples of 1/SCALE. ValueError where they are not normalised."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    if not (np.abs(norms - 1) < 1e-3).all():
        raise ValueError("image features must be finite and L2-normalised")
    return np.rint(vectors.astype(np.float64) * SCALE)


# ---------------------------------------------------------------- the prompt


def prompt(
    question: Question,
    demonstrations: Sequence[Question],
    benchmark: Benchmark,
    shots: int,
    images: Mapping[str, bytes] = NO_IMAGES,
) -> Sample:
    """A question after its demonstrations; its last text is open. Of zero shots the demonstrations have no images.

    Images have the key ``Question.image_key``, and bytes where ``images`` has them under it.
    """
    parts: list[Part] = []
    text = ""
    for shot in (*demonstrations, question):
        template = benchmark.prompt.query if shot is question else benchmark.prompt.demonstration
        before, _, after = template.partition(IMAGE_TOKEN)
        values = blanks(shot, benchmark)
        text += filled(before, values)
        if shots or shot is question:
            parts += [Text(text)] if text else []
            parts.append(Image(images.get(shot.image_key), shot.image_key))
            text = ""
        text += filled(after, values)
    return Sample(question.id, (*parts, Text(text)))


def blanks(question: Question, benchmark: Benchmark) -> dict[str, str]:
    """What fills a template's blanks: the question's text and its first reference."""
    answer = question.references[0] if question.references else ""
    return {
        "question": plain(question.text),
        "answer": plain(answer.strip() if benchmark.kind == "caption" else answer),
    }


def filled(template: str, values: Mapping[str, str]) -> str:
    return BLANKS.sub(lambda blank: values[blank[1]], template)


def plain(text: str) -> str:
    """Text that opens no image and closes no chunk, whatever an annotator wrote."""
    for token in (IMAGE_TOKEN, ENDOFCHUNK_TOKEN):
        text = text.replace(token, " ")
    return text
