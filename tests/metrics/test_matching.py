"""Exact match, ANLS, yes/no scores and word error rate against hand-worked values."""

import random

import pytest
import torch

from mmpeft.errors import ConfigError, NameNotFound
from mmpeft.metrics import load_metric
from mmpeft.metrics.matching import anls_score, edit_distance


def test_exact_match_by_kind():
    metric = load_metric("exact_match")
    metric.update(
        ["7", " Odd. ", "yes"], [["7"], ["odd", "uneven"], ["no"]], ["which_digit", "odd_even", "larger_than"]
    )
    metric.update(["8", "a  b"], [["7"], ["a b"]], ["which_digit", None])
    result = {k: v.item() for k, v in metric.compute().items()}
    assert result == pytest.approx(
        {
            "exact_match": 3 / 5,
            "exact_match/which_digit": 1 / 2,
            "exact_match/odd_even": 1,
            "exact_match/larger_than": 0,
        }
    )
    strict = load_metric("exact_match", ignore_case=False, ignore_period=False)
    strict.update(["Odd", "odd.", "odd"], [["odd"]] * 3)
    assert strict.compute()["exact_match"].item() == pytest.approx(1 / 3)


def test_edit_distance():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    assert edit_distance("kitten", "sitting") == 3
    rng = random.Random(0)
    for _ in range(30):
        a, b = ("".join(rng.choice("abc") for _ in range(rng.randint(0, 5))) for _ in range(2))
        assert edit_distance(a, b) == edit_distance(b, a) == slow(a, b)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Hello ", ["hello"], 1.0),
        ("helo", ["hello", "xyz"], 0.8),
        ("ab", ["abcd"], 0.0),  # distance .5 reaches the threshold
        ("abc", ["abcde"], 0.6),
        ("", [""], 1.0),
        ("", ["a"], 0.0),
    ],
)
def test_anls(prediction, references, expected):
    assert anls_score(prediction, references) == pytest.approx(expected)


def test_anls_threshold_is_checked():
    assert anls_score("ab", ["abcd"], threshold=0.6) == 0.5
    with pytest.raises(ConfigError, match="threshold"):
        load_metric("anls", threshold=0)


def test_yes_no_reads_the_first_sentence():
    metric = load_metric("yes_no")
    said = ["Yes.", "No, there is not.", "There is nothing here. No.", "yes", "There is not a dog"]
    metric.update(said, [["yes"], ["yes"], ["yes"], ["no"], ["No"]])
    result = {k: v.item() for k, v in metric.compute().items()}
    # yes yes | yes no | yes yes ("nothing" is no "no") | no yes | no no
    assert result == pytest.approx(
        {
            "yes_no_accuracy": 3 / 5,
            "yes_no_precision": 2 / 3,
            "yes_no_recall": 2 / 3,
            "yes_no_f1": 2 / 3,
            "yes_no_ratio": 3 / 5,
        }
    )
    with pytest.raises(ConfigError, match="'yes' or 'no'"):
        metric.update(["yes"], [["maybe"]])


def test_word_error_rate():
    metric = load_metric("wer", normalizer="basic")
    metric.update(["The cat, sat!", "hello"], [["the cat sat down"], ["hello big world"]])
    assert metric.compute()["wer"].item() == pytest.approx(3 / 7)  # over all words, not the mean of 1/4 and 2/3
    plain = load_metric("wer", normalizer="none")
    plain.update(["The cat"], [["the cat"]])
    assert plain.compute()["wer"] == 0.5


def test_word_error_rate_with_whispers_normaliser():
    pytest.importorskip("transformers")
    metric = load_metric("wer", spelling={"colour": "color"})
    metric.update(
        ["Um, I can't see twenty-five dogs.", "the colour isn't red"],
        [["I can not see 25 dogs"], ["The color is not red"]],
    )
    assert metric.compute()["wer"] == 0


def test_wrong_input_is_refused():
    metric = load_metric("exact_match")
    with pytest.raises(ConfigError, match="'predictions': 2, 'references': 1"):
        metric.update(["a", "b"], [["a"]])
    with pytest.raises(ConfigError, match="kinds"):
        metric.update(["a"], [["a"]], ["x", "y"])
    with pytest.raises(ConfigError, match=r"references\[0\]"):
        metric.update(["a"], ["a"])
    with pytest.raises(ConfigError, match="non-empty"):
        metric.update(["a"], [[]])
    with pytest.raises(ConfigError, match="list of strings"):
        metric.update("a", "a")
    with pytest.raises(ConfigError, match="64 bytes"):
        metric.update(["a"], [["a"]], ["k" * 65])
    for name in ("cider", "bleu", "rouge_l_google", "wer", "rouge_l"):
        with pytest.raises(ConfigError):
            load_metric(name).update(["a", "b"], [["a"]])
    with pytest.raises(NameNotFound, match="nearest: whisper"):
        load_metric("wer", normalizer="wisper")


def test_nan_before_any_sample():
    assert torch.isnan(load_metric("exact_match").compute()["exact_match"])
    assert torch.isnan(load_metric("yes_no").compute()["yes_no_accuracy"])
