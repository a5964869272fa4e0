"""The controls a score must be read beside, and the picture of answers."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmpeft.data.samples import question_answer
from mmpeft.tasks.controls import blanked, by_kind, majority_answers
from mmpeft.tasks.picture import CELL, answer_grid


def test_majority_answer_of_the_exact_text_and_of_all():
    rows = [("q", "a"), ("q", "b"), ("q", "b"), ("r", "a"), ("r", "a"), ("r", "a")]
    data = [question_answer(str(i), q, a) for i, (q, a) in enumerate(rows)]
    assert majority_answers(data) == {"q": "b", "r": "a", "": "a"}


def test_blank_media_keep_their_size_and_lose_their_content():
    wave = torch.randn(50)
    parts = [Image.fromarray(np.random.randint(0, 255, (9, 7, 3), dtype=np.uint8))]
    sample = question_answer("s", "What?", "x", images=parts, audio=[wave])
    sample["messages"][0]["content"].append({"type": "image", "features": torch.ones(4, 3)})
    image, sound, text, cached = blanked(sample)["messages"][0]["content"]
    assert image["image"].size == (7, 9) and len(set(image["image"].getdata())) == 1
    assert torch.equal(sound["audio"], torch.zeros(50)) and torch.equal(cached["features"], torch.zeros(4, 3))
    assert text["text"] == "What?" and sample["messages"][0]["content"][1]["audio"] is wave  # the original is untouched


def test_shares_by_kind():
    assert by_kind([True, False, True, True], ["a", "a", "b", None]) == {"a": 0.5, "b": 1.0, "all": 0.75}


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (5, 2)])
def test_the_picture_has_a_cell_for_each_question(tmp_path, count, rows):
    image = Image.new("RGB", (8, 8), (200, 10, 10))
    data = [question_answer(str(i), "What is it, then, if one may ask?", "red", images=[image, image]) for i in range(count)]
    path = answer_grid(data, ["red"] * (count - 1) + ["blue"], tmp_path / "deep" / "grid.png")
    drawn = Image.open(path)
    assert drawn.width == 4 * CELL and drawn.height % rows == 0 and drawn.height // rows > 150
    assert (200, 10, 10) in set(drawn.convert("RGB").getdata())
