"""Caption metrics: tokens as Stanford's tokenizer gives them, scores as pycocoevalcap 1.2 gives them."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from mmpeft.metrics import load_metric
from mmpeft.metrics.captions import longest_common_subsequence
from mmpeft.metrics.cider import cider_d
from mmpeft.metrics.ptb import tokenize

#: output of CoreNLP 3.4.1 (-preserveLines -lowerCase) with COCO's punctuation list dropped, recorded
STANFORD = [
    ("A man's riding a horse, isn't he?", "a man 's riding a horse is n't he"),
    ("They can't stop; we've said they'll win!", "they ca n't stop we 've said they 'll win"),
    ("James' dogs' bowls and the dog's bone", "james dogs bowls and the dog 's bone"),
    ("She said \"hello\" to 'everyone' on 'this' bus.", "she said hello to everyone on this bus"),
    (
        "Two (small) dogs - one brown -- and [one] {white}...",
        "two -lrb- small -rrb- dogs one brown and -lsb- one -rsb- -lcb- white -rcb-",
    ),
    (
        "The U.S. flag costs $5.00, 1,000 people at 3:30 p.m. and 50% off #1 & more.",
        "the u.s. flag costs $ 5.00 1,000 people at 3:30 p.m. and 50 % off # 1 & more",
    ),
    (
        "You cannot miss it, it's gonna rain, I wanna go, lemme see, 'tis late",
        "you can not miss it it 's gon na rain i wan na go lem me see 't is late",
    ),
    (
        "A well-known T-shirt in black/white and/or red,white,and blue",
        "a well-known t-shirt in black/white and/or red white and blue",
    ),
    (
        "Mr. Smith vs. Dr. Jones, etc. in front of the St. Louis Arch. The end",
        "mr. smith vs. dr. jones etc. in front of the st. louis arch the end",
    ),
    ("It is 5'6\" tall, 3/4 of a 10x10 pizza in the 1990s", "it is 5 6 tall 3/4 of a 10x10 pizza in the 1990s"),
    ("Write to me@x.com or @user about #tag * star a*b", "write to me@x.com or @user about #tag * star a * b"),
    ("café naïve “smart quotes” it’s ‘curly’ – en — em … done", "café naïve smart quotes it 's curly en em done"),
    ("What?? No!! ?!?! Really? Yes!", "what ?? no !! ?!?! really yes"),
    ("A man.A dog at 5 o'clock with O'Brien, ma'am", "a man.a dog at 5 o'clock with o'brien ma'am"),
    (
        "He should've known I'm the one who'd say it'll be -5 +3 = < > ~ 5-10",
        "he should 've known i 'm the one who 'd say it 'll be -5 +3 = < > ~ 5-10",
    ),
    ("A cat .  A\tdog !", "a cat a dog"),
    ("no. 5 and no. It's J. Crew, A.B.C. and a.k.a. John", "no. 5 and no it 's j. crew a.b.c. and a.k.a. john"),
    ("ice-cream-cone in a 2-story house on 1st-place", "ice-cream-cone in a 2-story house on 1st-place"),
]

CANDIDATES = [
    "A man rides a brown horse on the beach.",
    "Two dogs play with a red ball",
    "a plate",
    "the the the the street at night",
    "A child's drawing of a house, isn't it?",
]
REFERENCES = [
    ["A man riding a horse along the beach.", "A person on a brown horse at the beach"],
    ["Two dogs playing with a ball in the grass.", "Two dogs play with a red ball", "Dogs running after a ball"],
    ["A plate of food on a table", "A white plate"],
    ["A city street at night with cars", "The street at night", "Cars on the street"],
    ["A drawing of a house by a child", "A child's drawing of a house"],
]
#: what pycocoevalcap 1.2 gives for them
CIDER = [2.56486184, 4.35057032, 1.73180721, 2.89339288, 5.28983568]
BLEU = [0.7999999999771429, 0.7302967433176171, 0.6521297661790147, 0.5871598103776852]
ROUGE = [0.7134502923976607, 1.0, 0.7721518987341772, 0.7648902821316614, 0.850597609561753]
#: what rouge_score 0.1.2 gives (rougeL F1, best reference)
ROUGE_GOOGLE = [0.7058823529411765, 1.0, 0.8, 0.7272727272727273, 0.8235294117647058]


@pytest.mark.parametrize(("caption", "expected"), STANFORD)
def test_tokens_are_stanfords(caption, expected):
    assert " ".join(tokenize(caption)) == expected


def scores_of(name, candidates=CANDIDATES, references=REFERENCES, batch=2):
    metric = load_metric(name)
    for i in range(0, len(candidates), batch):
        metric.update(candidates[i : i + batch], references[i : i + batch])
    return metric.compute()


def test_scores_are_those_of_the_published_code():
    tokens = [tokenize(c) for c in CANDIDATES], [[tokenize(r) for r in refs] for refs in REFERENCES]
    assert cider_d(*tokens) == pytest.approx(CIDER, abs=1e-7)
    assert scores_of("cider")["cider"].item() == pytest.approx(3.3660935836475874, abs=1e-6)
    assert [scores_of("bleu")[f"bleu_{n}"].item() for n in (1, 2, 3, 4)] == pytest.approx(BLEU, abs=1e-6)
    assert scores_of("rouge_l")["rouge_l"].item() == pytest.approx(np.mean(ROUGE), abs=1e-6)
    assert scores_of("rouge_l_google")["rouge_l_google"].item() == pytest.approx(np.mean(ROUGE_GOOGLE), abs=1e-6)


def test_cider_by_hand():
    """Two images, one reference each. "cat" is in one image (idf log 2), "a" in both (idf 0), "dog" in the other.

    Candidate "a cat" against "a black cat": unigram vectors (cat: L) and (black: L, cat: L), cosine 1 / sqrt(2);
    bigrams "a cat" against "a black", "black cat": 0. One bigram against two: exp(-1 / 72). Over n = 1 .. 4, times 10:
    10 / (4 sqrt 2).
    """
    scores = cider_d([["a", "cat"], ["a", "dog"]], [[["a", "black", "cat"]], [["a", "dog"]]])
    assert scores[0] == pytest.approx(10 / (4 * math.sqrt(2)) * math.exp(-1 / 72))
    assert scores[1] == pytest.approx(10 * 2 / 4)  # equal, but of two words: there are no trigrams to score


def naive_cider(candidates, references):
    """The formula, an n-gram at a time."""

    def grams(words, n):
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    images, result = len(candidates), []
    for candidate, refs in zip(candidates, references, strict=True):
        total = 0.0
        for n in range(1, 5):
            df = Counter(g for texts in references for g in set().union(*(grams(t, n) for t in texts)))

            def vector(words, n=n, df=df):
                return {g: c * (math.log(images) - math.log(max(1, df[g]))) for g, c in grams(words, n).items()}

            for ref in refs:
                c, r = vector(candidate), vector(ref)
                norm = math.sqrt(sum(v * v for v in c.values()) * sum(v * v for v in r.values()))
                dot = sum(min(v, r[g]) * r[g] for g, v in c.items() if g in r)
                delta = max(len(candidate) - 1, 0) - max(len(ref) - 1, 0)
                total += dot / norm * math.exp(-(delta**2) / 72) / len(refs) if norm else 0.0
        result.append(10 * total / 4)
    return result


def test_cider_is_the_formula_on_random_corpora():
    rng = random.Random(0)
    words = ["a", "the", "man", "dog", "cat", "on", "in", "red", "big", "street", "two", "of", "and", "park"]

    def sentence():
        return [rng.choice(words) for _ in range(rng.choice([0, 1, 2, 5, 9, 14]))]

    for images in (2, 3, 17):
        references = [[sentence() for _ in range(rng.randint(1, 4))] for _ in range(images)]
        candidates = [rng.choice(r)[: rng.randint(0, 9)] if rng.random() < 0.6 else sentence() for r in references]
        assert cider_d(candidates, references) == pytest.approx(naive_cider(candidates, references), abs=1e-9)


def test_cider_edges():
    long = ["a", "small", "brown", "dog", "sleeps", "on", "the", "wooden", "floor"]
    other = ["two", "people", "ride", "bicycles", "along", "a", "busy", "street"]
    assert cider_d([long, other], [[long], [other]]) == pytest.approx([10, 10])
    assert cider_d([long], [[long]]) == pytest.approx([0])  # one image: every n-gram is in all documents
    assert cider_d([[], []], [[long], [other]]) == pytest.approx([0, 0])
    assert cider_d([[], other], [[[]], [other]])[0] == 0


def test_cider_is_fast_enough_for_coco():
    """5,000 images of five references: the published scorer takes seconds."""
    import time

    rng = random.Random(0)
    words = [f"w{i}" for i in range(2000)]
    references = [[[rng.choice(words) for _ in range(10)] for _ in range(5)] for _ in range(5000)]
    start = time.perf_counter()
    cider_d([r[0] for r in references], references)
    assert time.perf_counter() - start < 5


def test_longest_common_subsequence():
    def slow(a, b):
        if not a or not b:
            return 0
        return 1 + slow(a[1:], b[1:]) if a[0] == b[0] else max(slow(a[1:], b), slow(a, b[1:]))

    rng = random.Random(1)
    for _ in range(30):
        a, b = ([rng.choice("abc") for _ in range(rng.randint(0, 7))] for _ in range(2))
        assert longest_common_subsequence(a, b) == slow(a, b)


def test_bleu_takes_the_shorter_of_equally_close_references():
    result = scores_of("bleu", ["a b c d"], [["a b c d e", "a b c"]])
    assert result["bleu_1"] == 1  # length 3 is as close as 5: no brevity penalty
    result = scores_of("bleu", ["a b"], [["x y z w"]])
    assert all(v == 0 for v in result.values())
    assert scores_of("bleu", [""], [["x"]])["bleu_4"] == 0


def test_perfect_and_empty_captions():
    for name, best in (("rouge_l", 1.0), ("rouge_l_google", 1.0)):
        assert scores_of(name, ["A red bus."], [["nothing", "a red bus"]])[name] == best
        assert scores_of(name, [""], [["a red bus"]])[name] == 0
    assert torch.isnan(load_metric("cider").compute()["cider"])
