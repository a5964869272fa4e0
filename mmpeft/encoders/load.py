"""`load_encoder`: from a name and options to a frozen encoder, by a table of loaders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any, cast

import torch

from mmpeft.encoders.base import Encoder, Modality, log
from mmpeft.encoders.names import Name, parse
from mmpeft.encoders.options import OPTIONS, Resize, as_dtype
from mmpeft.encoders.packages import find_package
from mmpeft.errors import ConfigError

# What each source can load, and where: a module of this package and a function of (name, options). A module imports its
# library only when the function is called.
LOADERS: dict[str, dict[Modality, str]] = {
    "timm": {"image": "image_timm:load_timm"},
    "open_clip": {"image": "image_open_clip:load_open_clip_image", "text": "text:load_open_clip_text"},
    "hf": {"image": "image_hf:load_hf_image", "audio": "audio:load_hf_audio", "text": "text:load_hf_text"},
    "torchaudio": {"audio": "audio:load_torchaudio"},
    "package": {
        "image": "image_timm:load_timm",
        "text": "text:load_hf_text",
        "audio": "packages_whisper:load_package_whisper",
    },
}


def load_encoder(
    name: str,
    *,
    modality: Modality | None = None,
    layer: int = -1,
    image_size: int | None = None,
    pool: tuple[int, int] | None = None,
    drop_class_token: bool = True,
    resize: Resize = "library",
    full_window: bool = False,
    max_length: int | None = None,
    weights: str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
) -> Encoder:
    """Load a frozen backbone.

    Args:
        name: "timm:...", "open_clip:ARCH/TAG", "hf:ID", "torchaudio:BUNDLE", "package:...", a local folder; `random:` in
            front for random weights. `mmpeft.encoders.names` has the grammar.
        modality: which tower of a model that reads pictures and texts; None is the picture's, or the model's only one.
        layer: the tap, -1 the last (final norm included), -2 the second to last, or a block or stage counted from 0.
        image_size: side in pixels of the square pictures; None is the size of the pretraining.
        pool: (rows, columns) of an adaptive average pooling of the map into tokens.
        drop_class_token: leave out class, distillation and register tokens.
        resize: "library" as in pretraining (may crop the borders), "squash" to a square, "pad" to a square with bars.
        full_window: pad clips to Whisper's 30 s window as in its pretraining.
        max_length: cut texts at this many ids, where longer ones are otherwise refused.
        weights: a .safetensors file loaded into the named architecture in place of the source's own weights.
        dtype: of the backbone, such as torch.bfloat16 or "bfloat16"; None keeps what the source gives.
        revision: commit or tag of a hub repository.

    Returns:
        An encoder in eval mode whose parameters ask for no gradient.

    Raises:
        NameNotFound: an unknown source, model, tag or package, or a hub that does not give it.
        FileFormatError: a folder that is no model, pickled, damaged or misfitting weights.
        ConfigError: an option out of range, or one that this modality does not have.
        MissingExtra: the library is not installed.
    """
    given: dict[str, Any] = {
        "layer": layer, "image_size": image_size, "pool": pool, "drop_class_token": drop_class_token, "resize": resize,
        "full_window": full_window, "max_length": max_length, "weights": weights, "dtype": as_dtype(dtype), "revision": revision,
    }  # fmt: skip
    parsed = parse(name)
    kind = _modality(parsed, modality, revision)
    options_class = OPTIONS[kind]
    known = {f.name for f in fields(options_class)}
    defaults = {f.name: f.default for cls in OPTIONS.values() for f in fields(cls) if f.default is not MISSING}
    strange = [key for key, value in given.items() if key not in known and value != defaults[key]]
    if strange:
        raise ConfigError(
            f"{', '.join(strange)} do not apply to {name!r}, an encoder of {kind}s; options: {', '.join(sorted(known))}"
        )
    module, _, function = LOADERS[parsed.source][kind].partition(":")
    load: Callable[[Name, Any], Encoder] = getattr(import_module(f"mmpeft.encoders.{module}"), function)
    encoder = load(parsed, options_class(**{key: given[key] for key in known}))
    count = sum(p.numel() for p in encoder.backbone.parameters())
    log.info(
        "%s: %.2f M parameters, frozen (no gradient, eval through train(), no graph), tokens of width %d",
        name, count / 1e6, encoder.dim,
    )  # fmt: skip
    return encoder


def _modality(name: Name, asked: Modality | None, revision: str | None) -> Modality:
    """What the name reads, checked against what was asked for."""
    offers = LOADERS[name.source]
    kind: Modality
    if name.source == "package":
        kind = cast(Modality, find_package(name.rest, *offers).kind)
    elif asked is not None:
        kind = asked
    elif name.source == "hf":
        from mmpeft.encoders.hf import detect_modality

        kind = detect_modality(name, revision)
    else:
        kind = next(iter(offers))
    if kind not in offers or (asked is not None and asked != kind):
        raise ConfigError(
            f"{name.text!r} is no encoder of {asked}s; it reads {', '.join(offers) if kind == asked else kind}"
        )
    return kind
