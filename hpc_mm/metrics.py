"""Scores of model output: pure functions on lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from hpc_mm import ptb_tokenizer

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

LONGEST = 4  # words of the longest n-gram
SIGMA = 6.0  # words: width of the Gaussian that punishes a difference in length


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean CIDEr-D of all images on the scale of pycocoevalcap, 0 to 10; papers and our tables show it times 100.

    The document frequencies come from ``references``, so scores of different image sets cannot be compared. They are
    log(images / images that have the n-gram): with one image every score is 0. No image at all is a ValueError.
    """
    return float(cider_each(candidates, references).mean())


def cider_each(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """CIDEr-D per image (Vedantam et al., arXiv 1411.5726, as pycocoevalcap computes it): one candidate and at least
    one reference each, split into words by ptb_tokenizer.

    Per n, the tf-idf vectors of candidate c and reference r score <min(c, r), r> / (|c| |r|), times
    exp(-(length difference)^2 / (2 sigma^2)); the result is 10 times the mean over n = 1..4 and over the references.
    """
    images = len(candidates)
    counts = np.array([len(captions) for captions in references])
    if images == 0 or len(references) != images or (counts == 0).any():
        raise ValueError(f"{images} candidates for {len(references)} images; each needs one, and a reference")
    words = ptb_tokenizer.tokenize(candidates)
    words += ptb_tokenizer.tokenize([caption for captions in references for caption in captions])
    owner = np.repeat(np.arange(images), counts)  # of each reference
    lengths = np.array([max(len(caption) - 1, 0) for caption in words])  # in bigrams, as the reference counts them
    penalty = np.exp(-((lengths[owner] - lengths[images:]) ** 2) / (2 * SIGMA**2))
    similarity = np.zeros(len(owner))
    for rows, grams in n_grams(words):
        similarity += _similarity(rows, grams, len(words), owner)
    return np.asarray(10 * np.bincount(owner, similarity * penalty, images) / LONGEST / counts)


def n_grams(captions: Sequence[Sequence[str]]) -> Iterator[tuple[Integers, Integers]]:
    """For n = 1..4, one entry per n-gram in the text: its caption's number, and a number that stands for its words."""
    known: dict[str, int] = {}
    words = np.array([known.setdefault(word, len(known)) for caption in captions for word in caption], dtype=np.int64)
    row = np.repeat(np.arange(len(captions)), [len(caption) for caption in captions])
    starts, grams = np.arange(len(words)), words
    for n in range(1, LONGEST + 1):
        yield row[starts], grams
        longer = starts + n < len(words)
        longer[longer] = row[starts[longer] + n] == row[starts[longer]]
        starts = starts[longer]
        grams = np.unique(grams[longer] * len(known) + words[starts + n], return_inverse=True)[1]


def _similarity(rows: Integers, grams: Integers, captions: int, owner: Integers) -> Floats:
    """Of each reference to its image's candidate, before the penalty. The candidates are the first rows."""
    images = captions - len(owner)
    shape = (captions, int(grams.max(initial=0)) + 1)
    vectors = csr_array((np.ones(len(rows)), (rows, grams)), shape=shape)  # equal entries are added up
    in_reference = rows >= images
    pairs = np.unique(owner[rows[in_reference] - images] * shape[1] + grams[in_reference])
    document_frequency = np.bincount(pairs % shape[1], minlength=shape[1])
    vectors.data *= (np.log(images) - np.log(np.maximum(document_frequency, 1)))[vectors.indices]
    norms = np.sqrt(vectors.multiply(vectors).sum(axis=1))
    candidate, reference = vectors[owner], vectors[images:]
    product: Floats = candidate.minimum(reference).multiply(reference).sum(axis=1)
    scale = norms[owner] * norms[images:]
    return np.asarray(np.divide(product, scale, out=np.zeros(len(owner)), where=scale > 0))
