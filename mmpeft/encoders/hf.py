"""What the transformers encoders share: where a model lies, which sense it reads, and a strict load.

A model that reads two senses (CLIP, SigLIP) is loaded as the tower of one. Parts that no token depends on (poolers) are
removed: a checkpoint often lacks them, and fresh random ones would change the encoder's fingerprint at every load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmpeft.encoders.base import Modality
from mmpeft.encoders.files import check_weights, identify_folder, read_weights
from mmpeft.encoders.hub import reading
from mmpeft.encoders.names import Name
from mmpeft.encoders.options import Options
from mmpeft.errors import FileFormatError, NameNotFound, Unsupported, require

INPUTS: dict[str, Modality] = {
    "pixel_values": "image",
    "input_values": "audio",
    "input_features": "audio",
    "input_ids": "text",
}
POOLERS = ("pooler",)


def locate(name: Name) -> str | Path:
    """The folder on disk, or the hub's id.

    Raises:
        NameNotFound: a path that does not exist.
        FileFormatError: another library's folder, or one without safetensors.
    """
    path = Path(name.rest).expanduser()
    if path.is_dir():
        if identify_folder(path) != "hf":
            raise FileFormatError(f"{str(path)!r} was written by {identify_folder(path)!r}, not by transformers")
        if not name.random:
            check_weights(path)
        return path
    if name.rest.startswith((".", "/", "~")):
        raise NameNotFound(f"no folder {name.rest!r}")
    return name.rest


def loading(name: Name) -> AbstractContextManager[None]:
    """Around a transformers load: a failure is worded by where the model should have come from."""
    place = locate(name)
    return reading(name.text, place if isinstance(place, Path) else None)


def read_config(name: Name, revision: str | None) -> Any:
    """The model's transformers configuration."""
    transformers: Any = require("transformers", "text")
    place = locate(name)
    with loading(name):
        return transformers.AutoConfig.from_pretrained(place, revision=revision)


def model_class(config: Any, modality: Modality | None = None) -> Any:
    """The class of the bare model, or of one tower ("...VisionModel", "...TextModel") of a model with two.

    Raises:
        Unsupported: transformers has no bare model for this configuration.
    """
    transformers: Any = require("transformers", "text")
    try:
        whole = transformers.MODEL_MAPPING[type(config)]
    except KeyError as error:
        raise Unsupported(f"transformers has no bare model of type {config.model_type!r}") from error
    if hasattr(config, "vision_config") and hasattr(config, "text_config"):
        tower = whole.__name__.removesuffix("Model") + ("TextModel" if modality == "text" else "VisionModel")
        if not hasattr(transformers, tower):
            raise Unsupported(f"{whole.__name__} has no tower of its own for {modality or 'image'} ({tower})")
        return getattr(transformers, tower)
    return whole


def detect_modality(name: Name, revision: str | None) -> Modality:
    """What a model reads, by the name of its main input; a model of two towers is read as an image encoder."""
    cls = model_class(read_config(name, revision))
    if cls.main_input_name not in INPUTS:
        raise Unsupported(f"{cls.__name__} reads {cls.main_input_name!r}, which no encoder gives")
    return INPUTS[cls.main_input_name]


def load_backbone(name: Name, options: Options, modality: Modality) -> Any:
    """The bare transformers model or tower, with every one of its weights from the checkpoint.

    Raises:
        FileFormatError: the checkpoint lacks weights of this model.
    """
    config = read_config(name, options.revision)
    cls = model_class(config, modality)
    if cls.config_class is not type(config):  # one tower of a configuration of two
        config = getattr(config, cls.config_class.base_config_key)
    if name.random and options.weights is None:
        return drop_poolers(cls(config)).to(options.dtype or torch.float32)
    place: Any = locate(name)
    source: dict[str, Any] = {"revision": options.revision, "use_safetensors": True}
    if options.weights is not None:
        place, source = None, {"state_dict": read_weights(options.weights)}
    with loading(name), _quiet():
        model, info = cls.from_pretrained(
            place, config=config, dtype=options.dtype or "auto", output_loading_info=True, **source
        )
    missing = [k for k in info["missing_keys"] if k.split(".")[0] not in POOLERS]
    if missing or info["mismatched_keys"]:
        raise FileFormatError(
            f"{options.weights or name.text!r} lacks {len(missing)} of the weights of {cls.__name__}: "
            f"{', '.join(sorted(missing)[:4])} {info['mismatched_keys'] or ''}"
        )
    return drop_poolers(model)


def cut_blocks(model: nn.Module, count: int, index: int) -> str | None:
    """Remove the transformer blocks after `index`, on which no token depends; returns the path of block `index`.

    The blocks are the one ModuleList that is `count` long. None, and nothing is removed, where there is no such list.
    """
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        return None
    path, blocks = lists[0]
    del blocks[index + 1 :]
    return f"{path}.{index}"


def output_of(model: nn.Module, path: str, run: Callable[[], Any]) -> Tensor:
    """The first output of the submodule at `path` while `run` runs."""
    taken: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(
        lambda module, args, out: taken.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        run()
    finally:
        hook.remove()
    return taken[-1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of unexpected keys: the other tower's are expected, and missing ones are checked here."""
    logging: Any = require("transformers.utils.logging", "text")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def drop_poolers(model: nn.Module) -> nn.Module:
    """Remove the heads that no token depends on."""
    for key in POOLERS:
        pooler = getattr(model, key, None)
        if isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):  # one without weights does no harm
            setattr(model, key, None)
    if getattr(model, "use_head", False):  # SigLIP's attention pooling
        cast(Any, model).use_head = False
        del model.head
    return model
