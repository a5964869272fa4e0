"""open_clip's visual towers as image encoders, and what its text towers share with them: how a model is found and built."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmpeft.encoders.base import freeze
from mmpeft.encoders.files import PICKLED, check_weights, identify_folder, read_weights
from mmpeft.encoders.hub import reading
from mmpeft.encoders.image import ImageEncoder
from mmpeft.encoders.image_preprocess import ImagePreprocess, square_transform
from mmpeft.encoders.names import Name
from mmpeft.encoders.options import ImageOptions, Options
from mmpeft.errors import FileFormatError, NameNotFound, nearest, require


class OpenClipImage(ImageEncoder):
    """The visual tower of an open_clip model: its own ViT, its ResNet, or a timm trunk."""

    def prepare(self, num_layers: int) -> None:
        visual: Any = self.backbone
        trunk: Any = getattr(visual, "trunk", None)
        for part in (trunk, visual):
            if hasattr(part, "prune_intermediate_layers"):
                part.prune_intermediate_layers([self.index], prune_norm=not self.last, prune_head=True)
        stages = [f"layer{i}" for i in range(self.index + 1, num_layers)]  # of the ResNet
        for unused in ("head", "attnpool", *stages):
            if hasattr(visual, unused):
                setattr(visual, unused, nn.Identity())
        freeze(visual)
        # a timm trunk without prefix tokens refuses to be asked for them
        self.has_prefix = not _is_resnet(visual) and (
            trunk is None or "return_prefix_tokens" in inspect.signature(trunk.forward_intermediates).parameters
        )

    def features(self, backbone: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        out = backbone.forward_intermediates(
            pixels, indices=[self.index], normalize_intermediates=self.last, intermediates_only=True,
            output_fmt="NCHW", output_extra_tokens=self.has_prefix,
        )  # fmt: skip
        prefix = out.get("image_intermediates_prefix")
        has_prefix = prefix is not None and prefix[0] is not None and prefix[0].shape[1] > 0
        return (prefix[0] if has_prefix else None), out["image_intermediates"][0]


def load_open_clip_image(name: Name, options: ImageOptions) -> OpenClipImage:
    """A frozen open_clip visual tower; `load_encoder` says the names, options and errors."""
    open_clip: Any = require("open_clip", "vision")
    model = build(open_clip, name, options)
    cfg = open_clip.get_model_preprocess_cfg(model)
    native = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    size = options.image_size or native
    if size != native and not _is_resnet(model.visual):  # whose positions are in its pooling head, which is not used
        model = build(open_clip, name, options, force_image_size=size)
    cfg = {**cfg, "size": size}
    if options.resize == "library":
        library: Any = require("open_clip.transform", "vision")
        transform = library.image_transform_v2(library.PreprocessCfg(**cfg), is_train=False)
        preprocess = ImagePreprocess(transform, f"open_clip {sorted(cfg.items())}")
    else:
        pad = options.resize == "pad"
        preprocess = square_transform(size, cfg["interpolation"], cfg["mean"], cfg["std"], pad=pad)
    visual = model.visual
    if options.dtype is not None:
        visual = visual.to(options.dtype)
    return OpenClipImage(
        visual, name=name.text, preprocess=preprocess, image_size=size, num_layers=_num_layers(visual),
        layer=options.layer, pool=options.pool, drop_class_token=options.drop_class_token,
    )  # fmt: skip


def _is_resnet(visual: nn.Module) -> bool:
    return hasattr(visual, "layer4") and not hasattr(visual, "trunk")


def _num_layers(visual: Any) -> int:
    if hasattr(visual, "trunk"):
        return len(visual.trunk.feature_info)
    if hasattr(visual, "transformer"):
        return len(visual.transformer.resblocks)
    return 5  # the ResNet: stem and four stages


def build(open_clip: Any, name: Name, options: Options, **create: Any) -> Any:
    """The whole open_clip model with the weights that the name asks for.

    Raises:
        NameNotFound: an unknown architecture or weights tag, or a hub that does not give it.
        FileFormatError: another library's folder, pickled or misfitting weights.
    """
    source, tag, place = _locate(open_clip, name, options)
    pretrained = None if name.random else tag
    if options.weights is not None:
        read_weights(options.weights)  # refuses a pickle or a damaged file
        pretrained = options.weights
    local_random = name.random or (options.weights is not None and ":" in source)
    with reading(name.text, Path(options.weights) if options.weights else place):
        model = open_clip.create_model(
            source, pretrained=pretrained, load_weights=not local_random, pretrained_text=False, **create
        )
        if options.weights is not None and ":" in source:
            open_clip.load_checkpoint(model, options.weights, strict=True)
    return model


def _locate(open_clip: Any, name: Name, options: Options) -> tuple[str, str | None, Path | None]:
    """(open_clip's model name, weights tag, local folder)."""
    if name.rest.startswith("hf-hub:"):
        return name.rest, None, None
    folder = Path(name.rest.removeprefix("local-dir:")).expanduser()
    if folder.is_dir():
        if identify_folder(folder) != "open_clip":
            raise FileFormatError(f"{str(folder)!r} was written by {identify_folder(folder)!r}, not by open_clip")
        if not name.random:
            check_weights(folder)
        return f"local-dir:{folder}", None, folder
    architecture, _, tag = name.rest.partition("/")
    if architecture not in open_clip.list_models():
        raise NameNotFound(
            f"open_clip has no model {architecture!r}{nearest(architecture, open_clip.list_models())}; "
            f"a hub repository is 'open_clip:hf-hub:ORG/NAME', a folder is its path"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and Path(tag).suffix in (*PICKLED, ".safetensors"):
        raise NameNotFound(f"a weights file is given as load_encoder('open_clip:{architecture}', weights={tag!r})")
    if tag and tag not in tags:
        raise NameNotFound(
            f"open_clip's {architecture} has no weights {tag!r}, it has {', '.join(tags)}" + nearest(tag, tags)
        )
    if not tag and not name.random and options.weights is None:
        raise NameNotFound(
            f"{name.text!r} names no weights: write 'open_clip:{architecture}/TAG' with one of {', '.join(tags) or 'none'}, "
            f"or give weights=FILE, or say 'random:' for random ones"
        )
    return architecture, tag or None, None
