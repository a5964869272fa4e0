"""VQA accuracy: the closed form is the leave-one-out loop, and each variant keeps its script's accidents."""

import pytest
import torch

from mmpeft.errors import NameNotFound
from mmpeft.metrics.vqa import CONTRACTIONS, VARIANTS, VQAAccuracy, normalize, soft_score, vqa_score


def leave_one_out(answer, references):
    """The published loop over records told apart by answer_id."""
    records = [{"answer": text, "answer_id": i} for i, text in enumerate(references)]
    accuracies = []
    for record in records:
        matching = [r for r in records if r != record and r["answer"] == answer]
        accuracies.append(min(1, len(matching) / 3))
    return sum(accuracies) / len(accuracies)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 13])
def test_closed_form_is_the_loop(n):
    for k in range(n + 1):
        assert soft_score(k, n) == pytest.approx(leave_one_out("x", ["x"] * k + ["y"] * (n - k)), abs=1e-12)


def test_published_scores_of_ten_answers():
    assert [soft_score(k, 10) for k in (0, 1, 2, 3, 4, 10)] == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])


def test_unanimous_references_are_compared_as_they_are_only_officially():
    ten = ["black"] * 10
    assert [vqa_score("Black.", ten, variant=v) for v in VARIANTS] == [0, 1, 1]  # lmms-eval#794
    nine = ["black"] * 9 + ["dark"]
    assert [vqa_score("Black.", nine, variant=v) for v in VARIANTS] == [1, 1, 1]
    assert vqa_score(" black\t\n", ten) == 1  # outer space and line breaks are dropped even so
    assert vqa_score("the cat", ["the cat"] * 10) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two  Dogs", "2 dogs"),
        ("none of the cats", "0 of cats"),
        ("dont know", "don't know"),
        ("id've", "id've"),  # the table's "Id've" cannot be reached: the text is lower-cased before
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("red/blue", "red blue"),  # a mark between letters becomes a space ...
        ("red/ blue/green", "red bluegreen"),  # ... unless it stands beside a space anywhere in the text
        ("1,000-2", "10002"),  # one comma in a number deletes every mark
        ("3.5 mm.", "3.5 mm"),
        (".5", ".5"),
        ("u.s.a", "usa"),
        ("x" + "." * 40, "x" + "." * 8),  # only 32 periods go
        ("an apple, a day", "apple day"),
    ],
)
def test_normalisation_with_its_accidents(text, expected):
    assert normalize(text) == expected


def test_contraction_table():
    """120 entries in the script, of which four have a capital and cannot be reached, and two map to themselves."""
    assert len(CONTRACTIONS) == 114 and all(k != v for k, v in CONTRACTIONS.items())
    assert {CONTRACTIONS[k] for k in ("ow's'at", "'ows'at", "'ow'sat")} == {"'ow's'at"}
    plain = {k: v for k, v in CONTRACTIONS.items() if k.replace("'", "") != v.replace("'", "")}
    assert plain == {}  # a contraction only ever gains or loses apostrophes


def test_evalai_sets_possessives_apart():
    references = ["man's hat"] * 5 + ["hat"] * 5
    assert vqa_score("MAN 's hat", references, variant="evalai") == 1
    assert vqa_score("MAN 's hat", references, variant="lmms") == 0
    assert vqa_score("1,000?", ["1000"] * 4 + ["2"] * 6, variant="evalai") == 1


def test_variants_differ_on_commas_in_a_row():
    assert normalize("1,,2-3", variant="official") == "1 2 3" and normalize("1,,2-3", variant="lmms") == "123"


def test_metric_by_kind_in_batches():
    metric = VQAAccuracy()
    metric.update(["yes"], [["yes"] * 10], ["yes/no"])
    metric.update(["2", "cat"], [["two"] * 3 + ["3"] * 7, ["dog"] * 10], ["number", "other"])
    result = metric.compute()
    assert {k: pytest.approx(v.item()) for k, v in result.items()} == {
        "vqa_official": (1 + 0.9 + 0) / 3,
        "vqa_official/yes/no": 1,
        "vqa_official/number": 0.9,
        "vqa_official/other": 0,
    }
    metric.reset()
    metric.update(["cat"], [["cat"]])
    assert metric.compute() == {"vqa_official": torch.tensor(0.0)}  # one answer, left out: nobody remains


def test_unknown_variant():
    with pytest.raises(NameNotFound, match="nearest: evalai"):
        VQAAccuracy(variant="eval_ai")
    with pytest.raises(NameNotFound, match="official, lmms, evalai"):
        vqa_score("a", ["a"], variant="x")
