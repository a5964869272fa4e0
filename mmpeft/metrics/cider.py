"""CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726) as COCO's caption evaluation computes it, without Java and in NumPy.

For n = 1 .. 4 a caption is a vector of tf-idf weights of its n-grams, idf(g) = log N - log max(1, df(g)), with df the
number of images (of N) whose references hold g. Candidate c and reference r compare by

    sum_g min(w_c(g), w_r(g)) w_r(g) / (|w_c| |w_r|)  *  exp(-(l_c - l_r)^2 / (2 * 6^2))

averaged over n and references, times 10. The length l is the number of bigrams, as in the published code. Document
frequencies come from the references at hand: a subset scores differently from the full set, and a single image scores
0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from mmpeft.metrics.base import CorpusMetric
from mmpeft.metrics.ptb import tokenize

MAX_N = 4
SIGMA = 6.0
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def cider_d(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Floats:
    """CIDEr-D of each candidate.

    Args:
        candidates: a list of tokens an image.
        references: lists of tokens, one or more an image.

    Returns:
        [images] float64, 0 to 10; papers print the mean times 100.
    """
    images = len(candidates)
    counts = np.array([len(r) for r in references])
    captions = [*candidates, *chain.from_iterable(references)]  # the candidates first
    image_of = np.concatenate([np.arange(images), np.repeat(np.arange(images), counts)])
    words, owner = _ids(captions)
    start = np.arange(len(words))  # of each n-gram, in `words`
    size = np.bincount(owner, minlength=len(captions))
    last = np.cumsum(size)[owner]  # where the caption of each n-gram ends
    bigrams = np.maximum(size - 1, 0)
    reference_of = np.arange(images, len(captions))
    penalty = np.exp(-((bigrams[image_of[reference_of]] - bigrams[reference_of]) ** 2) / (2 * SIGMA**2))
    grams, total = words, np.zeros(len(reference_of))
    for n in range(1, MAX_N + 1):
        if n > 1:  # an n-gram is its (n-1)-gram and the next word, renumbered
            fits = start + n <= last
            grams, owner, start, last = grams[fits], owner[fits], start[fits], last[fits]
            following = words[start + n - 1]
            grams = np.unique(grams * (len(words) + 1) + following, return_inverse=True)[1].reshape(-1)
        total += penalty * _similarity(grams, owner, image_of, images)
    score = np.bincount(image_of[reference_of], weights=total, minlength=images)
    mean: Floats = 10.0 * score / (MAX_N * counts)
    return mean


def _similarity(grams: Ints, owner: Ints, image_of: Ints, images: int) -> Floats:
    """Clipped cosine similarity of each reference with its image's candidate, for n-grams of one length."""
    if not len(grams):
        return np.zeros(len(image_of) - images)
    vocabulary = int(grams.max()) + 1
    entries, frequency = np.unique(owner * vocabulary + grams, return_counts=True)
    caption, gram = np.divmod(entries, vocabulary)
    in_reference = caption >= images
    seen = np.unique(image_of[caption[in_reference]] * vocabulary + gram[in_reference]) % vocabulary
    documents = np.bincount(seen, minlength=vocabulary)
    weight = frequency * (np.log(float(images)) - np.log(np.maximum(1.0, documents)))[gram]
    norm = np.sqrt(np.bincount(caption, weights=weight**2, minlength=len(image_of)))

    mine, theirs = ~in_reference, in_reference
    keys = caption[mine] * vocabulary + gram[mine]  # sorted; a candidate's number is its image's
    wanted = image_of[caption[theirs]] * vocabulary + gram[theirs]
    if not len(keys):
        return np.zeros(len(image_of) - images)
    found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    shared = keys[found] == wanted
    w_r = weight[theirs]
    overlap = np.where(shared, np.minimum(weight[mine][found], w_r) * w_r, 0.0)
    dot = np.bincount(caption[theirs] - images, weights=overlap, minlength=len(image_of) - images)
    scale = norm[image_of[images:]] * norm[images:]
    cosine: Floats = np.divide(dot, scale, out=np.zeros_like(dot), where=scale > 0)
    return cosine


def _ids(captions: Sequence[Sequence[str]]) -> tuple[Ints, Ints]:
    """Word numbers of all captions in one row, and the caption of each."""
    numbers: dict[str, int] = {}
    flat = [numbers.setdefault(word, len(numbers)) for caption in captions for word in caption]
    owner = np.repeat(np.arange(len(captions)), [len(caption) for caption in captions])
    return np.array(flat, dtype=np.int64), owner


class CIDEr(CorpusMetric):
    """CIDEr-D over all captions added, 0 to 10 (papers print it times 100); a single image scores 0."""

    def corpus_score(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        candidates = [tokenize(p) for p in predictions]
        scores = cider_d(candidates, [[tokenize(r) for r in texts] for texts in references])
        return {"cider": float(scores.mean())}
