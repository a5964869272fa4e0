"""Pictures to pixels [3, H, W], by the configuration of the model's own library.

A preprocess object holds no weights, so it travels to dataloader workers by pickle, and `signature` says in words
everything that decides its output, which is what the feature cache keys on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from mmpeft.errors import BadSample, require


@dataclass(frozen=True)
class ImagePreprocess:
    """A picture to the pixels [3, H, W] that the backbone was trained on.

    `raw` is a PIL image, a path, an array [H, W] or [H, W, 3], or a tensor [1 | 3, H, W]; numbers are bytes or floats
    in 0..1. Photos are turned as their EXIF tag says.

    Args:
        transform: the library's own evaluation transform, PIL image to tensor.
        signature: what the transform does, in words.
        pad: make the picture square first, with bars of `fill`, so that nothing is cropped or distorted.
        random: the transform draws random numbers (an augmentation); such features are never cached.
    """

    transform: Callable[[Image.Image], Tensor] = field(repr=False, compare=False)
    signature: str
    pad: bool = False
    fill: tuple[int, int, int] = (127, 127, 127)
    random: bool = False

    def __call__(self, raw: Any) -> Tensor:
        image = load_image(raw)
        if self.pad and image.width != image.height:
            side = max(image.size)
            square = Image.new("RGB", (side, side), self.fill)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        return self.transform(image)


def square_transform(
    side: int, interpolation: str, mean: Sequence[float], std: Sequence[float], *, pad: bool = False
) -> ImagePreprocess:
    """Resize to `side` x `side` pixels and normalise: nothing is cropped; distorted, or padded to a square if `pad`."""
    transforms: Any = require("torchvision", "vision").transforms
    steps = [
        transforms.Resize((side, side), transforms.InterpolationMode[interpolation.upper()]),
        transforms.ToTensor(),
        transforms.Normalize(list(mean), list(std)),
    ]
    words = f"square {side} {interpolation} mean={tuple(mean)} std={tuple(std)}"
    red, green, blue = (round(255 * m) for m in mean)
    return ImagePreprocess(transforms.Compose(steps), words, pad=pad, fill=(red, green, blue))


def load_image(raw: Any) -> Image.Image:
    """Any accepted picture as an RGB PIL image.

    Raises:
        BadSample: a missing or damaged file, a file that is no image, or numbers that are no picture.
    """
    if isinstance(raw, (str, Path)):
        return _open_image(Path(raw))
    if isinstance(raw, Image.Image):
        return _to_rgb(raw)
    if isinstance(raw, Tensor):
        if raw.ndim != 3 or raw.shape[0] not in (1, 3):
            raise BadSample(f"an image tensor is [3, H, W] or [1, H, W], not {list(raw.shape)}")
        raw = raw.detach().cpu().permute(1, 2, 0).numpy()
    if isinstance(raw, np.ndarray):
        return _from_array(raw)
    raise BadSample(f"an image is a PIL image, a path, an array or a tensor, not {type(raw).__name__}")


def _open_image(path: Path) -> Image.Image:
    if not path.is_file():
        raise BadSample(f"image file not found: {str(path)!r}")
    try:
        with Image.open(path) as image:
            return _to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(f"{str(path)!r} is no image that can be read: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL would clip 16-bit values at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) // 257).astype(np.uint8))
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or array.size == 0:
        raise BadSample(f"an image array is [H, W] or [H, W, 3], not {list(array.shape)}")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0.0 and high <= 1.0):  # NaN fails this too
            raise BadSample(f"a float image has values in 0..1, this one has {low:.4g}..{high:.4g}")
        array = np.rint(array * 255)
    elif array.dtype != np.bool_ and (array.min() < 0 or array.max() > 255):
        raise BadSample(f"an integer image has values in 0..255, this one has {array.min()}..{array.max()}")
    scale = 255 if array.dtype == np.bool_ else 1
    return Image.fromarray(array.astype(np.uint8) * np.uint8(scale)).convert("RGB")
