"""A small input for a model that brings its own facts: several tokens, two samples, odd sizes avoided where fixed.

Order: the model's own `example_inputs()`, then what timm, transformers, open_clip, torchaudio and torch's stock layers
say of themselves. Where nothing is known, the proof of liveness waits for the first real batch (`defer`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.liveness import prove
from mmpeft.adapters.probe import as_call
from mmpeft.errors import ConfigError

BATCH = 2


def example_of(model: nn.Module, *, device: torch.device | None = None) -> Any:
    """An input `model` can be called with (arguments as in `attach(example=)`), or None if nothing tells its shape.

    Args:
        device: None is the model's own.
    """
    own = getattr(model, "example_inputs", None)
    if callable(own):
        return own()
    place, dtype = _place(model)
    for knows, make in _SOURCES:
        if knows(model):
            made = make(model)
            return None if made is None else _to(made, device or place, dtype)
    return None


LENGTHENED = ("input_ids", "decoder_input_ids", "attention_mask", "input_values")  # [B, T] of any T


def resized(example: Any, *, batch: int | None = None, length: int | None = None) -> Any:
    """The shapes of an example, but for `batch` samples, and `length` tokens (or audio samples) where that is free.
    Floating inputs are on the meta device, as for `inspect`, which asks for their shapes only.

    Raises:
        ConfigError: no input has a free length.
    """
    args, kwargs = as_call(example)
    if length is not None and not set(kwargs) & set(LENGTHENED):
        raise ConfigError(f"length {length}, but this model's inputs have fixed shapes")

    def change(name: str, t: Tensor) -> Tensor:
        longer = length is not None and name in LENGTHENED
        shape = [batch or t.shape[0], length if longer else t.shape[1], *t.shape[2:]]
        if t.is_floating_point():
            return t.new_empty(shape, device="meta")
        return t.new_ones(shape) if longer else t[:1].expand(*shape).contiguous()

    made = {k: change(k, v) for k, v in kwargs.items()}
    return made if made else tuple(change("", a) for a in args)


class _FirstBatch:
    """A forward pre-hook that proves liveness on the first real batch and then removes itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.handle: Any = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Inference tensors cannot carry a gradient: wait on.
        if torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            return
        if any(p.is_meta for p in model.parameters()):
            return
        self.handle.remove()
        prove(model, self.name, (args, kwargs))


def defer(model: nn.Module, name: str) -> None:
    """Prove liveness of adapter `name` when the first real batch arrives."""
    hook = _FirstBatch(name)
    hook.handle = model.register_forward_pre_hook(hook, with_kwargs=True)


def waiting(model: nn.Module) -> bool:
    """Whether a proof waits for the first real batch."""
    return any(isinstance(hook, _FirstBatch) for hook in model._forward_pre_hooks.values())


def forget(model: nn.Module, names: Collection[str]) -> None:
    """Take back what `defer` waits for."""
    for hook in list(model._forward_pre_hooks.values()):
        if isinstance(hook, _FirstBatch) and hook.name in names:
            hook.handle.remove()


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    for p in model.parameters():
        if p.is_floating_point():
            return p.device, p.dtype
    return torch.device("cpu"), torch.float32


def _to(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {k: _to(v, device, dtype) for k, v in value.items()}
    return tuple(_to(v, device, dtype) for v in value)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _ids(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(1, max(2, vocabulary), shape, generator=torch.Generator().manual_seed(0))


def _from(package: str) -> Callable[[nn.Module], bool]:
    return lambda model: any(c.__module__.split(".")[0] == package for c in type(model).__mro__)


def _timm(model: Any) -> Any:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    channels, *fixed = config.get("input_size", (3, 224, 224)) if isinstance(config, dict) else config.input_size
    return _draw(BATCH, channels, *(size or fixed))


def _open_clip(model: Any) -> Any:
    visual = getattr(model, "visual", None)
    if visual is None:
        size = getattr(model, "image_size", None)
        return None if size is None else _draw(BATCH, 3, *_pair(size))
    image = _draw(BATCH, 3, *_pair(visual.image_size))
    text = _ids(model.vocab_size, BATCH, model.context_length)
    text[:, -1] = model.vocab_size - 1  # the end-of-text token that pooling looks for
    return {"image": image, "text": text}


def _pixels(vision: Any) -> dict[str, Tensor]:
    size, channels, patches = (getattr(vision, n, None) for n in ("image_size", "num_channels", "num_patches"))
    if size is not None:
        return {"pixel_values": _draw(BATCH, channels or 3, *_pair(size))}
    if patches is None:
        return {}
    n = 4 if patches >= 4 else 1  # SigLIP2 takes patches of any aspect: 2 x 2 of them and as many of padding
    return {
        "pixel_values": _draw(BATCH, min(2 * n, patches), (channels or 3) * vision.patch_size**2),
        "pixel_attention_mask": (torch.arange(min(2 * n, patches)) < n).long().expand(BATCH, -1),
        "spatial_shapes": torch.full((BATCH, 2), int(n**0.5)),
    }


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _transformers(model: Any) -> Any:
    config = model.config
    vision = getattr(config, "vision_config", config)
    text = getattr(config, "text_config", config)
    made: dict[str, Tensor] = {}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" or (hasattr(config, "vision_config") and hasattr(config, "text_config")):
        made |= _pixels(vision)
        if not made:
            return None
    if main == "input_ids":
        made["input_ids"] = _ids(min(text.vocab_size, 1000), BATCH, 6)
    elif main == "input_features":
        made["input_features"] = _draw(BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    elif main == "input_values":
        made["input_values"] = _draw(BATCH, 4000)
    elif main != "pixel_values":
        return None
    if getattr(config, "is_encoder_decoder", False) and any(n.endswith("decoder") for n, _ in model.named_modules()):
        made["decoder_input_ids"] = _ids(min(text.vocab_size, 1000), BATCH, 4)
    return made


def _torchaudio(model: Any) -> Any:
    return _draw(BATCH, 4000)


def _torch(model: Any) -> Any:
    if isinstance(model, nn.MultiheadAttention | nn.Transformer):
        width = model.embed_dim if isinstance(model, nn.MultiheadAttention) else model.d_model
        first = model.batch_first
        x = _draw(BATCH, 5, width) if first else _draw(5, BATCH, width)
        keys = [_draw(*x.shape[:-1], getattr(model, n, None) or width) for n in ("kdim", "vdim")]
        return (x, x) if isinstance(model, nn.Transformer) else (x, *keys)
    if isinstance(model, nn.TransformerEncoderLayer):
        return _draw(BATCH, 5, model.linear1.in_features)
    if isinstance(model, nn.TransformerEncoder):
        return _torch(model.layers[0])
    if isinstance(model, nn.RNNBase):
        return _draw(BATCH, 5, model.input_size)
    if isinstance(model, nn.Sequential) and len(model):
        return _torch(model[0])
    if isinstance(model, nn.Linear):
        return _draw(BATCH, 5, model.in_features)
    if isinstance(model, nn.Embedding | nn.EmbeddingBag):
        return _ids(model.num_embeddings, BATCH, 5)
    if isinstance(model, nn.modules.conv._ConvNd):
        side = max(d * (k - 1) + 2 for d, k in zip(model.dilation, model.kernel_size, strict=True)) + 5
        return _draw(BATCH, model.in_channels, *(side,) * len(model.kernel_size))
    return None


_SOURCES: tuple[tuple[Callable[[nn.Module], bool], Callable[[Any], Any]], ...] = (
    (_from("timm"), _timm),
    (_from("transformers"), _transformers),
    (_from("open_clip"), _open_clip),
    (_from("torchaudio"), _torchaudio),
    (_from("torch"), _torch),
)
