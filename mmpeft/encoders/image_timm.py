"""timm's models as image encoders: registry names, the hub, local folders, packages, a weights file of one's own.

The map is read through timm's `forward_intermediates`; the blocks after the tap and the classifier are removed, so an
adapter plan finds only what the tokens depend on.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import Tensor

from mmpeft.encoders.base import freeze
from mmpeft.encoders.files import check_weights, identify_folder, load_strict, read_weights
from mmpeft.encoders.hub import reading
from mmpeft.encoders.image import ImageEncoder
from mmpeft.encoders.image_preprocess import ImagePreprocess, square_transform
from mmpeft.encoders.names import Name
from mmpeft.encoders.options import ImageOptions
from mmpeft.encoders.packages import efficientnet_lite0_state, find_package
from mmpeft.errors import FileFormatError, NameNotFound, Unsupported, nearest, require

NO_NORM = ("Hiera", "HieraDet")  # refuse to normalise a tap: their last one is as the block left it


class TimmImage(ImageEncoder):
    """A timm model whose tokens are the map of one tap."""

    def prepare(self, num_layers: int) -> None:
        model: Any = self.backbone
        if hasattr(model, "prune_intermediate_layers"):
            model.prune_intermediate_layers([self.index], prune_norm=not self.last, prune_head=True)
            freeze(model)  # pruning may put fresh modules in place
        self.norm = self.last and type(model).__name__ not in NO_NORM
        parameters = inspect.signature(model.forward_intermediates).parameters
        self.has_prefix = getattr(model, "num_prefix_tokens", 0) > 0 and "return_prefix_tokens" in parameters

    def features(self, backbone: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        options = {"return_prefix_tokens": True} if self.has_prefix else {}
        (tap,) = backbone.forward_intermediates(
            pixels, indices=[self.index], norm=self.norm, output_fmt="NCHW", intermediates_only=True, **options
        )
        return (tap[1], tap[0]) if self.has_prefix else (None, tap)


def load_timm(name: Name, options: ImageOptions) -> TimmImage:
    """A frozen timm encoder; `load_encoder` says the names, options and errors."""
    timm: Any = require("timm", "vision")
    model = _create(timm, name, options)
    if not hasattr(model, "forward_intermediates"):
        raise Unsupported(f"timm's {type(model).__name__} has no forward_intermediates, so it gives no feature map")
    if options.dtype is not None:
        model = model.to(options.dtype)
    config = timm.data.resolve_data_config(model=model)
    native = config["input_size"][-1]
    size = options.image_size or native
    if size != native and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(size, size))  # resamples the position embedding
    return TimmImage(
        model, name=name.text, preprocess=timm_preprocess(timm, config, size, options), image_size=size,
        num_layers=len(model.feature_info), layer=options.layer, pool=options.pool,
        drop_class_token=options.drop_class_token,
    )  # fmt: skip


def timm_preprocess(timm: Any, config: dict[str, Any], size: int, options: ImageOptions) -> ImagePreprocess:
    """timm's own evaluation transform, at `size`; "squash" and "pad" keep the borders that its crop would cut."""
    if options.resize != "library":
        mean, std = config["mean"], config["std"]
        return square_transform(size, config["interpolation"], mean, std, pad=options.resize == "pad")
    config = {**config, "input_size": (3, size, size)}
    transform = timm.data.create_transform(**config, is_training=False)
    return ImagePreprocess(transform, f"timm {sorted(config.items())}")


def _create(timm: Any, name: Name, options: ImageOptions) -> Any:
    """The model with the weights that the name asks for."""
    if name.source == "package":
        find_package(name.rest, "image")
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        if not name.random:
            load_strict(model, efficientnet_lite0_state(), name.text)
        return model
    architecture, folder = _architecture(timm, name, options)
    if name.random or options.weights is not None:
        model = timm.create_model(architecture, pretrained=False)
    else:
        if folder is not None:
            check_weights(folder)
        with reading(name.text, folder):
            model = timm.create_model(architecture, pretrained=True)
    if options.weights is not None:
        load_strict(model, read_weights(options.weights), options.weights)
    return model


def _architecture(timm: Any, name: Name, options: ImageOptions) -> tuple[str, Path | None]:
    """What timm.create_model is given, and the local folder if it is one.

    Raises:
        NameNotFound: timm has no such model.
        FileFormatError: a folder of another library.
    """
    for prefix in ("hf-hub:", "hf_hub:"):
        if name.rest.startswith(prefix):
            return name.rest + (f"@{options.revision}" if options.revision else ""), None
    folder = Path(name.rest.removeprefix("local-dir:")).expanduser()
    if folder.is_dir():
        if identify_folder(folder) != "timm":
            raise FileFormatError(f"{str(folder)!r} was written by {identify_folder(folder)!r}, not by timm")
        return f"local-dir:{folder}", folder
    architecture = name.rest.partition(".")[0]
    if not timm.is_model(architecture):
        raise NameNotFound(
            f"timm {timm.__version__} has no model {architecture!r}{nearest(architecture, timm.list_models())}; "
            f"a hub repository is 'timm:hf-hub:ORG/NAME', a folder is its path"
        )
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
    tag = name.rest.partition(".")[2]
    if tag and tag not in tags:
        raise NameNotFound(
            f"timm's {architecture} has no weights {tag!r}, it has {', '.join(tags) or 'none'}" + nearest(tag, tags)
        )
    return name.rest, None
