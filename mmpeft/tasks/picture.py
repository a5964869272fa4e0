"""A picture of answered questions: a grid of cells with the image or images, the question, the answer and the truth."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpeft.data.samples import Sample, media_parts, question_text
from mmpeft.encoders.image_preprocess import load_image

CELL, SHOWN, MARGIN = 250, 96, 12  # width of a cell, side of an image in it, free space; pixels
LINE = 17
INK, RIGHT, WRONG, PAPER = (30, 30, 30), (0, 120, 60), (190, 40, 30), (255, 255, 255)


def answer_grid(samples: Sequence[Sample], answers: Sequence[str], path: str | Path, *, columns: int = 4) -> Path:
    """Draw samples with their answers; a right answer is green, a wrong one red with the truth beside it.

    Args:
        samples: with images (up to two are shown) and `answers`.
        answers: what the model said, one a sample.
        path: of the .png.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows = -(-len(samples) // columns)
    height = SHOWN + 5 * LINE + 2 * MARGIN
    sheet = Image.new("RGB", (columns * CELL, rows * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    font: Any = ImageFont.load_default(size=14)
    for i, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        left, top = (i % columns) * CELL + MARGIN, (i // columns) * height + MARGIN
        images = [load_image(part["image"]) for part in media_parts(sample) if part.get("image") is not None]
        for j, image in enumerate(images[:2]):
            small = max(image.size) < SHOWN
            image = image.resize((SHOWN, SHOWN), Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC)
            sheet.paste(image, (left + j * (SHOWN + MARGIN), top))
        y = top + SHOWN + 6
        for line in textwrap.wrap(question_text(sample), 32)[:3]:
            draw.text((left, y), line, INK, font=font)
            y += LINE
        truth = sample["answers"][0]
        right = answer == truth
        draw.text((left, y), answer if right else f"{answer}   (truth: {truth})", RIGHT if right else WRONG, font=font)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
