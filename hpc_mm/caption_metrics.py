"""CIDEr-D, BLEU and ROUGE-L of captions, equal to pycocoevalcap's: pure functions on lists of text.

Every function takes one candidate and at least one reference per image; no image, or an image without one, is a
ValueError. ``*_each`` gives a score per image, for intervals and paired tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_mm import ptb_tokenizer
from hpc_mm.rules import OPENFLAMINGO, Rules

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Texts = Sequence[str]

LONGEST = 4  # words of the longest n-gram
SIGMA = 6.0  # words: width of the Gaussian that punishes a difference in length
BETA = 1.2  # weight of recall in ROUGE-L
TINY, SMALL = 1e-15, 1e-9  # what the reference adds to BLEU's counts, so that nothing is divided by 0


class Scored(NamedTuple):
    """A benchmark's score, and what each of its items scored."""

    score: float
    each: Floats


def cider(candidates: Texts, references: Sequence[Texts]) -> float:
    """Mean CIDEr-D of all images on the scale of pycocoevalcap, 0 to 10; papers and our tables show it times 100.

    The document frequencies come from ``references``, so scores of different image sets cannot be compared. They are
    log(images / images that have the n-gram): with one image every score is 0.
    """
    return float(cider_each(candidates, references).mean())


def cider_each(candidates: Texts, references: Sequence[Texts]) -> Floats:
    """CIDEr-D per image (Vedantam et al., arXiv 1411.5726, as pycocoevalcap computes it).

    Per n, the tf-idf vectors of candidate c and reference r score <min(c, r), r> / (|c| |r|), times
    exp(-(length difference)^2 / (2 sigma^2)); the result is 10 times the mean over n = 1..4 and over the references.
    """
    return _cider(Captions.of(candidates, references))


class Cider:
    """CIDEr-D of a benchmark's images of which some are scored now and others later. An image's score is to the bit
    that of ``cider_each`` for all images, whichever are scored beside it; references are counted once."""

    def __init__(self, references: Sequence[Texts], rules: Rules = OPENFLAMINGO) -> None:
        """``references`` of all images."""
        self.rules = rules
        words = tokens(list(chain.from_iterable(references)), rules.treebank)
        owner = np.repeat(np.arange(len(references)), [len(captions) for captions in references])
        self.documents = Documents(len(references), {})
        for grams in n_grams(Captions(words, [], 0, owner)):
            self.documents.frequency.update(zip(grams.texts(), _frequency(grams).tolist(), strict=True))
        following = iter(words)
        self.references = [[next(following) for _ in captions] for captions in references]

    def words(self, predictions: Texts) -> list[list[str]]:
        """Of what a model wrote. Whether an initial at a caption's end keeps its full stop depends on the next one, so
        all that there is of a model's is to be given together."""
        return tokens([self.rules.caption(text) for text in predictions], self.rules.treebank)

    def each(self, words: Sequence[list[str]], images: Sequence[int]) -> Floats:
        """Scores of these candidates' words for the images of these numbers."""
        truth = [self.references[image] for image in images]
        owner = np.repeat(np.arange(len(truth)), [len(captions) for captions in truth])
        every = [*words, *chain.from_iterable(truth)]
        return _cider(Captions(every, [], len(words), owner), self.documents)


def bleu(candidates: Texts, references: Sequence[Texts]) -> Floats:
    """BLEU-1 to BLEU-4 of the whole set, 0 to 1 (Papineni et al. 2002; the closest reference's length, the shorter of
    two equally close)."""
    return _bleu(Captions.of(candidates, references))[0]


def bleu_each(candidates: Texts, references: Sequence[Texts]) -> Floats:
    """BLEU-1 to BLEU-4 per image: (images, 4). Their mean is not the set's BLEU."""
    return _bleu(Captions.of(candidates, references))[1]


def rouge_l(candidates: Texts, references: Sequence[Texts]) -> float:
    """Mean ROUGE-L of all images, 0 to 1."""
    return float(rouge_l_each(candidates, references).mean())


def rouge_l_each(candidates: Texts, references: Sequence[Texts]) -> Floats:
    """ROUGE-L per image (Lin 2004, beta 1.2): from the longest common subsequences of candidate and references, the
    best precision and the best recall, which may come from two references."""
    return _rouge_l(Captions.of(candidates, references))


def caption_scores(
    predictions: Texts,
    references: Sequence[Texts],
    rules: Rules = OPENFLAMINGO,
) -> dict[str, Scored]:
    """cider, bleu_1 to bleu_4 and rouge_l of what a model wrote, cleaned by ``rules``, from one tokenisation."""
    candidates = [rules.caption(text) for text in predictions]
    captions = Captions.of(candidates, references, rules.treebank)
    cider, rouge_l = _cider(captions), _rouge_l(captions)
    scores = {"cider": Scored(float(cider.mean()), cider)}
    for n, (score, each) in enumerate(zip(*(array.T for array in _bleu(captions)), strict=True), 1):
        scores[f"bleu_{n}"] = Scored(float(score), each)
    return {**scores, "rouge_l": Scored(float(rouge_l.mean()), rouge_l)}


class Documents(NamedTuple):
    """All images of a benchmark, of which some are scored."""

    images: int
    frequency: dict[tuple[str, ...], int]  # of each n-gram, how many images have it in a reference


def tokens(captions: Texts, treebank: bool) -> list[list[str]]:
    return ptb_tokenizer.tokenize(captions) if treebank else [caption.split() for caption in captions]


class Captions(NamedTuple):
    """Words of all captions: first the candidates, then all references."""

    words: list[list[str]]
    spaced: list[list[str]]  # as ROUGE-L counts them: cut at each single space, so that no words are one empty word
    images: int
    owner: Integers  # the image of each reference, rising

    @classmethod
    def of(cls, candidates: Texts, references: Sequence[Texts], treebank: bool = True) -> Captions:
        images, counts = len(candidates), [len(captions) for captions in references]
        if images == 0 or len(references) != images or 0 in counts:
            raise ValueError(f"{images} candidates for {len(references)} images; each needs one, and a reference")
        parts = [candidates, list(chain.from_iterable(references))]
        words = [caption for part in parts for caption in tokens(part, treebank)]
        if treebank:
            spaced = [caption or [""] for caption in words]
        else:
            spaced = [caption.split(" ") for part in parts for caption in part]
        return cls(words, spaced, images, np.repeat(np.arange(images), counts))

    @property
    def references(self) -> slice:
        return slice(self.images, self.images + len(self.owner))


class Grams(NamedTuple):
    """The different n-grams of each caption, by caption and number."""

    captions: Captions
    row: Integers  # the caption's number
    gram: Integers  # stands for the n-gram's words
    times: Integers  # how often the caption has it
    first: int  # the first of a reference; what is before it belongs to the candidates
    text: list[str]  # words of all captions
    places: Integers  # of each n-gram, a place in the text where it stands
    n: int

    @property
    def kinds(self) -> int:
        """Different n-grams of all captions."""
        return len(self.places)

    def texts(self) -> Iterator[tuple[str, ...]]:
        """Words of each n-gram."""
        return (tuple(self.text[place : place + self.n]) for place in self.places.tolist())

    def in_candidate(self) -> tuple[Integers, NDArray[np.bool_]]:
        """Of each reference's n-gram: its place among the candidates' n-grams, and whether it is there."""
        keys = self.row * self.kinds + self.gram
        wanted = self.captions.owner[self.row[self.first :] - self.captions.images] * self.kinds
        wanted += self.gram[self.first :]
        places = np.searchsorted(keys[: self.first], wanted)
        places[places == self.first] = 0
        return places, (keys[places] == wanted) & (self.first > 0)


def n_grams(captions: Captions) -> Iterator[Grams]:
    """For n = 1..4. Those of a caption come in the order of their words' letters, whatever other captions there are:
    sums over them are then the same bits."""
    text = list(chain.from_iterable(captions.words))
    known = {word: number for number, word in enumerate(sorted(set(text)))}
    words = np.fromiter(map(known.__getitem__, text), np.int64, len(text))
    row = np.repeat(np.arange(len(captions.words)), [len(caption) for caption in captions.words])
    starts, names = np.arange(len(words)), words
    for n in range(1, LONGEST + 1):
        _, first, grams = np.unique(names, return_index=True, return_inverse=True)
        kinds = len(first)
        keys, counts = _counted(row[starts] * kinds + grams)
        rows = keys // max(kinds, 1)
        edge = int(np.searchsorted(rows, captions.images))
        yield Grams(captions, rows, keys - rows * kinds, counts, edge, text, starts[first], n)
        longer = starts + n < len(words)
        longer[longer] = row[starts[longer] + n] == row[starts[longer]]
        starts = starts[longer]
        names = grams[longer] * len(known) + words[starts + n]


def _counted(values: Integers) -> tuple[Integers, Integers]:
    """Different values, rising, and how often each occurs."""
    values = np.sort(values)
    edges = np.flatnonzero(np.diff(values, prepend=-1))
    return values[edges], np.diff(edges, append=len(values))


def _cider(captions: Captions, documents: Documents | None = None) -> Floats:
    """``documents``: those of the benchmark, where not all of its images are here."""
    images, owner = captions.images, captions.owner
    lengths = np.array([max(len(caption) - 1, 0) for caption in captions.words])  # in bigrams, as the reference counts
    penalty = np.exp(-((lengths[owner] - lengths[captions.references]) ** 2) / (2 * SIGMA**2))
    similarity = np.zeros(len(owner))
    for grams in n_grams(captions):
        similarity += _similarity(grams, _inverse_document_frequency(grams, documents))
    return np.asarray(10 * np.bincount(owner, similarity * penalty, images) / LONGEST / np.bincount(owner))


def _similarity(grams: Grams, inverse: Floats) -> Floats:
    """Of each reference to its image's candidate, before the penalty."""
    captions, first = grams.captions, grams.first
    images, references = captions.images, len(captions.owner)
    weight = inverse[grams.gram]
    norms = np.sqrt(np.bincount(grams.row, (grams.times * weight) ** 2, len(captions.words)))
    places, found = grams.in_candidate()
    shared = np.minimum(grams.times[places], grams.times[first:]) * grams.times[first:]
    products = np.where(found, shared * weight[first:] ** 2, 0)
    product = np.bincount(grams.row[first:] - images, products, references)
    scale = norms[captions.owner] * norms[captions.references]
    return np.asarray(np.divide(product, scale, out=np.zeros(references), where=scale > 0))


def _inverse_document_frequency(grams: Grams, documents: Documents | None) -> Floats:
    """Of each n-gram: log(images / images whose references have it)."""
    if documents is None:
        images, frequency = grams.captions.images, _frequency(grams)
    else:
        counts = (documents.frequency.get(text, 0) for text in grams.texts())
        images, frequency = documents.images, np.fromiter(counts, np.int64, grams.kinds)
    return np.asarray(np.log(images) - np.log(np.maximum(frequency, 1)))


def _frequency(grams: Grams) -> Integers:
    """Of each n-gram, images whose references have it."""
    captions, first = grams.captions, grams.first
    image = captions.owner[grams.row[first:] - captions.images]
    pairs, _ = _counted(image * grams.kinds + grams.gram[first:])
    return np.bincount(pairs % max(grams.kinds, 1), minlength=grams.kinds).astype(np.int64)


def _bleu(captions: Captions) -> tuple[Floats, Floats]:
    """Of the set (4,), and of each image (images, 4)."""
    images, owner = captions.images, captions.owner
    lengths = np.array([len(caption) for caption in captions.words])
    length, other = lengths[:images], lengths[captions.references]
    order = np.lexsort((other, np.abs(other - length[owner]), owner))  # the closest first, of two the shorter
    reference = other[order[np.searchsorted(owner, np.arange(images))]]
    correct = np.stack([_clipped(grams) for grams in n_grams(captions)], axis=1)
    possible = np.maximum(length[:, None] - np.arange(LONGEST), 0)
    each = _geometric(correct, possible, length, reference)
    return _geometric(*(part.sum(axis=0)[None] for part in (correct, possible, length, reference)))[0], each


def _clipped(grams: Grams) -> Integers:
    """N-grams of each candidate that a reference has, each counted at most as often as in one reference."""
    places, found = grams.in_candidate()
    most = np.zeros(grams.first, dtype=np.int64)
    np.maximum.at(most, places[found], grams.times[grams.first :][found])
    clipped = np.minimum(most, grams.times[: grams.first])
    return np.bincount(grams.row[: grams.first], clipped, grams.captions.images).astype(np.int64)


def _geometric(correct: Integers, possible: Integers, length: Integers, reference: Integers) -> Floats:
    """BLEU-1..4 (N, 4) from counts (N, 4) and lengths (N,)."""
    precision = np.cumprod((correct + TINY) / (possible + SMALL), axis=1) ** (1 / np.arange(1, LONGEST + 1))
    ratio = (length + TINY) / (reference + SMALL)
    return np.asarray(precision * np.exp(np.minimum(1 - 1 / ratio, 0))[:, None])


def _rouge_l(captions: Captions) -> Floats:
    precision, recall = np.zeros(captions.images), np.zeros(captions.images)
    for image, reference in zip(captions.owner.tolist(), captions.spaced[captions.references], strict=True):
        candidate = captions.spaced[image]
        common = _common(candidate, reference)
        precision[image] = max(precision[image], common / len(candidate))
        recall[image] = max(recall[image], common / len(reference))
    scale = recall + BETA**2 * precision
    return np.divide((1 + BETA**2) * precision * recall, scale, out=np.zeros(len(scale)), where=scale > 0)


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bits of an integer (Hyyro 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    whole = rest = (1 << len(first)) - 1
    for word in second:
        if hits := rest & places.get(word, 0):
            rest = (rest + hits | rest - hits) & whole
    return len(first) - rest.bit_count()
