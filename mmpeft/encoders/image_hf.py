"""transformers' vision models as image encoders: CLIP, SigLIP, SigLIP 2 (fixed size), DINOv2, ViT, ResNet, ConvNeXt, ..."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from mmpeft.encoders.hf import cut_blocks, load_backbone, loading, locate, output_of
from mmpeft.encoders.image import ImageEncoder
from mmpeft.encoders.image_preprocess import ImagePreprocess, square_transform
from mmpeft.encoders.names import Name
from mmpeft.encoders.options import ImageOptions
from mmpeft.errors import FileFormatError, Unsupported, require


class HFImage(ImageEncoder):
    """A transformers vision model; position embeddings are interpolated to the picture's size where the model can."""

    def prepare(self, num_layers: int) -> None:
        self.interpolates = "interpolate_pos_encoding" in inspect.signature(self.backbone.forward).parameters
        self.block = None if self.last else cut_blocks(self.backbone, num_layers, self.index)
        self.native = getattr(self.backbone.config, "image_size", None)

    def features(self, backbone: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        options: dict[str, Any] = {}
        if self.interpolates and tuple(pixels.shape[-2:]) != (self.native, self.native):
            options["interpolate_pos_encoding"] = True
        if self.last:
            tap = backbone(pixels, **options).last_hidden_state
        elif self.block is not None:
            tap = output_of(backbone, self.block, lambda: backbone(pixels, **options))
        else:  # stages of a convolutional net; hidden_states[0] is the embedding
            tap = backbone(pixels, output_hidden_states=True, **options).hidden_states[self.index + 1]
        if tap.ndim == 4:  # convolutional: already a map
            return None, tap
        patch = backbone.config.patch_size
        height, width = (patch, patch) if isinstance(patch, int) else patch
        rows, columns = pixels.shape[-2] // height, pixels.shape[-1] // width
        prefix = tap.shape[1] - rows * columns
        if prefix < 0:
            raise Unsupported(f"{tap.shape[1]} tokens for {rows} x {columns} patches are no map")
        grid = tap[:, prefix:].transpose(1, 2).reshape(len(tap), -1, rows, columns)
        return (tap[:, :prefix] if prefix else None), grid


def load_hf_image(name: Name, options: ImageOptions) -> HFImage:
    """A frozen transformers vision encoder; `load_encoder` says the names, options and errors."""
    model = load_backbone(name, options, "image")
    config = model.config
    if config.model_type.startswith("siglip2"):
        raise Unsupported(
            f"{name.text!r} is a SigLIP 2 NaFlex model, whose pictures are ragged patch sequences; use a fixed-size one "
            f"such as 'hf:google/siglip2-base-patch16-224'"
        )
    layers = len(config.depths) if hasattr(config, "depths") else config.num_hidden_layers
    preprocess, size = hf_preprocess(name, config, options)
    return HFImage(
        model, name=name.text, preprocess=preprocess, image_size=size, num_layers=layers, layer=options.layer,
        pool=options.pool, drop_class_token=options.drop_class_token,
    )  # fmt: skip


class ProcessorTransform:
    """A transformers image processor as a function of one picture (picklable)."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels


def hf_preprocess(name: Name, config: Any, options: ImageOptions) -> tuple[ImagePreprocess, int]:
    """The model's own image processor and the side of its pictures, at `image_size` if given.

    Raises:
        FileFormatError: the model's folder has no preprocessor_config.json.
    """
    transformers: Any = require("transformers", "text")
    native = config.image_size if isinstance(getattr(config, "image_size", None), int) else 224
    place = locate(name)
    if isinstance(place, Path) and not (place / "preprocessor_config.json").is_file():
        if not name.random:
            raise FileFormatError(f"{str(place)!r} has no preprocessor_config.json, so its preprocessing is unknown")
        size = options.image_size or native
        return square_transform(size, "bicubic", (0.5,) * 3, (0.5,) * 3, pad=options.resize == "pad"), size
    with loading(name):
        processor = transformers.AutoImageProcessor.from_pretrained(place, revision=options.revision)
    size = options.image_size or _output_side(processor)
    if options.resize != "library":
        interpolation = Image.Resampling(int(processor.resample)).name.lower()
        return square_transform(
            size, interpolation, processor.image_mean, processor.image_std, pad=options.resize == "pad"
        ), size  # fmt: skip
    if options.image_size is not None:
        processor.size, processor.crop_size = _resized(processor, size)
    facts = {
        k: str(getattr(processor, k, None))
        for k in ("size", "crop_size", "do_center_crop", "do_resize", "resample", "image_mean", "image_std", "crop_pct")
    }
    signature = f"{type(processor).__name__} {sorted(facts.items())}"
    return ImagePreprocess(ProcessorTransform(processor), signature), size


def _output_side(processor: Any) -> int:
    """The side of the square pictures that a processor makes."""
    size = (
        processor.crop_size if getattr(processor, "do_center_crop", False) and processor.crop_size else processor.size
    )
    return int(size.get("height") or size.get("shortest_edge"))


def _resized(processor: Any, side: int) -> tuple[Any, Any]:
    """The processor's `size` and `crop_size` scaled to give pictures of another side, in the same proportion."""
    scale = side / _output_side(processor)
    size_type, sizes = type(processor.size), dict(processor.size)
    size = size_type(**{k: round(v * scale) for k, v in sizes.items() if v is not None})
    if not getattr(processor, "crop_size", None):
        return size, None
    crop = type(processor.crop_size)(**{k: side for k, v in dict(processor.crop_size).items() if v is not None})
    return size, crop
