"""The digits: real images, right answers, split by image, and questions that tell a language-only model nothing."""

import math
import pickle
from collections import Counter, defaultdict

import numpy as np
import pytest

from mmpeft.data.digits import CAPTIONS, QUESTIONS, SPLITS, DigitsCaptions, DigitsVQA, load_digits
from mmpeft.data.samples import check_sample, media_parts, question_text
from mmpeft.errors import ConfigError, NameNotFound

CHANCE = {"which_digit": 1 / 10, "odd_even": 1 / 2, "larger_than": 1 / 2, "larger_of_two": 1 / 2, "sum": 1 / 19}


def digit_of(split):
    """PIL bytes -> the digit, independent of the dataset's own bookkeeping."""
    images, by_digit = load_digits(split)
    return {images[i].tobytes(): d for d, where in enumerate(by_digit) for i in where}


def test_split_is_by_image_and_holds_every_digit_of_scikit_learn():
    from sklearn.datasets import load_digits as original

    (train, of_train), (test, of_test) = load_digits("train"), load_digits("test")
    assert (len(train), len(test)) == (1297, 500)
    pixels = np.stack([np.asarray(i)[..., 0] for i in train + test]).astype(float) * 16 / 255
    reference = original()
    assert sorted(map(bytes, pixels.round().astype("uint8").reshape(1797, 64))) == sorted(
        map(bytes, reference.images.astype("uint8").reshape(1797, 64))
    )
    assert [len(a) + len(b) for a, b in zip(of_train, of_test, strict=True)] == np.bincount(reference.target).tolist()
    assert all(20 < len(b) < 80 for b in of_test)


def test_recipes_are_chosen_without_the_test_images():
    pixels = {split: [image.tobytes() for image in load_digits(split)[0]] for split in SPLITS}
    assert pixels["fit"] + pixels["validation"] == pixels["train"] and len(pixels["validation"]) == 297
    with pytest.raises(NameNotFound, match="validation"):
        DigitsVQA("valid")


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_true(split):
    digit = digit_of(split)
    truth = {
        "which_digit": lambda q, d: str(d[0]),
        "odd_even": lambda q, d: ["even", "odd"][d[0] % 2],
        "larger_than": lambda q, d: "yes" if d[0] > int("".join(c for c in q if c.isdigit())) else "no",
        "larger_of_two": lambda q, d: "first" if d[0] > d[1] else "second",
        "sum": lambda q, d: str(sum(d)),
    }
    for sample in DigitsVQA(split, size=1001, seed=3):
        check_sample(sample)
        shown = [digit[part["image"].tobytes()] for part in media_parts(sample)]
        assert sample["messages"][-1]["content"] == truth[sample["kind"]](question_text(sample), shown)
        assert sample["answers"] == [sample["messages"][-1]["content"]]
        assert sample["kind"] != "larger_of_two" or shown[0] != shown[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_majority_answer_of_the_exact_question_text_is_at_chance(seed):
    """The language-only control, per kind on 2,000 held-out questions."""
    counts = defaultdict(Counter)
    for sample in DigitsVQA("train", size=20_000, seed=seed):
        counts[question_text(sample)][sample["answers"][0]] += 1
    right = defaultdict(list)
    for sample in DigitsVQA("test", size=10_000, seed=seed):
        majority = counts[question_text(sample)].most_common(1)[0][0]
        right[sample["kind"]].append(majority == sample["answers"][0])
    assert set(right) == set(CHANCE)
    for kind, hits in right.items():
        accuracy = sum(hits) / len(hits)
        print(f"{kind}: language-only {accuracy:.3f}, chance {CHANCE[kind]:.3f}, {len(hits)} questions")
        assert len(hits) == 2000 and abs(accuracy - CHANCE[kind]) < 0.01


def test_every_text_is_balanced_on_its_own():
    for split in ("train", "test"):
        counts = defaultdict(Counter)
        for sample in DigitsVQA(split, size=5 * 1234, seed=5):
            counts[question_text(sample)][sample["answers"][0]] += 1
        for text, answers in counts.items():
            assert max(answers.values()) - min(answers.values()) <= 1, text
    texts = {t for kind in QUESTIONS.values() for t, _ in kind.texts}
    assert set(counts) == texts  # every paraphrase and every N is asked


def test_each_digit_is_equally_often_behind_an_answer():
    """ "No" to larger than 5 is 0 to 5, not only an easy 0."""
    digit, shown = digit_of("train"), Counter()
    for sample in DigitsVQA("train", kinds=["larger_than"], size=24_000):
        if question_text(sample).endswith("than 5?"):
            shown[(sample["answers"][0], digit[next(media_parts(sample))["image"].tobytes()])] += 1
    assert set(shown) == {("no", d) for d in range(6)} | {("yes", d) for d in range(6, 10)}
    for answer in ("yes", "no"):
        hits = [n for (a, _), n in shown.items() if a == answer]
        assert max(hits) < 1.25 * min(hits)


def test_deterministic_by_seed_and_picklable():
    a, b, other = (DigitsVQA("test", size=303, seed=s) for s in (7, 7, 8))
    assert a.records == b.records != other.records
    again = pickle.loads(pickle.dumps(a))
    assert again.records == a.records and again[5]["messages"] == a[5]["messages"]
    assert len({s["id"] for s in a}) == len(a) == 303
    assert Counter(s["kind"] for s in a) == dict(zip(QUESTIONS, (61, 61, 61, 60, 60), strict=True))


def test_captions():
    digit = digit_of("train")
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    seen = set()
    for sample in DigitsCaptions("train", size=999):
        check_sample(sample)
        shown = [words[digit[part["image"].tobytes()]] for part in media_parts(sample)]
        expected = " next to ".join(("an " if w == "eight" else "a ") + w for w in shown)
        assert sample["answers"] == [expected]
        seen.add(sample["kind"])
    assert seen == set(CAPTIONS)


def test_wrong_arguments_are_refused_with_the_nearest_name():
    with pytest.raises(NameNotFound, match="nearest: which_digit"):
        DigitsVQA(kinds=["which_digits"])
    with pytest.raises(NameNotFound, match="train, test"):
        DigitsVQA("dev")
    for arguments in ({"size": 0}, {"size": 3}, {"kinds": []}, {"kinds": ["sum", "sum"]}):
        with pytest.raises(ConfigError):
            DigitsVQA(**arguments)


def test_chance_table_is_the_number_of_answers():
    for kind, chance in CHANCE.items():
        for n in QUESTIONS[kind].values:
            assert math.isclose(1 / len(QUESTIONS[kind].digits_by_answer(n)), chance)
