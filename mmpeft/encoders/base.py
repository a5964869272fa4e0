"""The protocol of a frozen backbone: what every encoder is, whatever library its weights come from.

An encoder turns one raw input into tokens [B, T, d_v]. Three choices hold for all of them:

* **Frozen is three switches.** No parameter asks for a gradient; the backbone stays in eval mode through `train()`
  (only adapters attached inside it follow the mode); and no autograd graph is recorded, because autograd itself
  records none while nothing that flows in needs a gradient. The forward is deliberately *not* wrapped in `no_grad`:
  a visual prompt before or inside the frozen tower must receive its gradient.
* **`num_tokens` is the single source of counts.** Placeholders, packing, collation and forward all ask it.
* **`preprocess` is an object of its own**, without weights, so a dataloader worker pickles the recipe and not the model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError

log = logging.getLogger("mmpeft")

Modality = Literal["image", "audio", "text"]


class Encoder(nn.Module, ABC):
    """A frozen pretrained backbone that gives tokens [B, T, d_v].

    Attributes:
        modality: what it reads, "image", "audio" or "text".
        name: the name it was loaded from, such as "timm:vit_base_patch16_siglip_224".
        dim: d_v, the width of its tokens.
        backbone: the library's own module; adapters attach to paths under `backbone.`.
        preprocess: a picklable callable, raw input to one tensor (image [3, H, W], waveform [T], ids [T]).
    """

    modality: Modality
    name: str
    dim: int
    backbone: nn.Module
    preprocess: Callable[[Any], Tensor]

    def __init__(self, backbone: nn.Module, *, name: str, dim: int, preprocess: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.backbone = freeze(backbone)
        self.name = name
        self.dim = dim
        self.preprocess = preprocess
        self.train(False)

    @abstractmethod
    def num_tokens(self, shape: Any) -> int:
        """Tokens for one preprocessed input: image (C, H, W) or (H, W), audio samples, text ids (an int or (n,))."""

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Inputs to tokens [B, T, d_v] and their mask [B, T] (bool; None means that every token is valid)."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Everything beside the weights that decides the tokens (layer, pooling, preprocessing), as plain data."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what is trained; the frozen backbone stays in eval mode."""
        super().train(mode)
        for module in frozen_modules(self.backbone):
            module.training = False
        return self

    def fingerprint(self) -> str:
        """A hex digest of the backbone's weights (a sample of every tensor) and of `config()`.

        Equal fingerprints give equal tokens for equal inputs, so it is the key of the feature cache.
        """
        digest = hashlib.sha256(json.dumps(self.config(), sort_keys=True, default=str).encode())
        digest.update(weights_digest(self.backbone).encode())
        return digest.hexdigest()[:32]

    def extra_repr(self) -> str:
        count = sum(p.numel() for p in self.backbone.parameters())
        state = "frozen" if is_frozen(self.backbone) else "frozen, with trainable adapters inside"
        return f"{self.name!r}, dim={self.dim}, {count / 1e6:.2f} M parameters, {state}"


def resolve_layer(name: str, layer: int, count: int) -> int:
    """A layer counted from either end as an index from 0.

    Raises:
        ConfigError: there is no such layer.
    """
    if not -count <= layer < count:
        raise ConfigError(f"{name!r} has {count} layers, so layer is in {-count}..{count - 1}, not {layer}")
    return layer % count


def freeze(module: nn.Module) -> nn.Module:
    """No gradient for any parameter, eval mode for any module; returns the module."""
    return module.requires_grad_(False).eval()


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter inside asks for a gradient and no adapter is attached, so that its outputs cannot change."""
    return not any(p.requires_grad for p in module.parameters()) and not any(_is_slot(m) for m in _all_children(module))


def frozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The module and its descendants, leaving out what belongs to an attached adapter."""
    if not _is_slot(module):
        yield module
        for child in module._modules.values():
            if child is not None:
                yield from frozen_modules(child)


def weights_digest(module: nn.Module, per_tensor: int = 512) -> str:
    """A hex digest of the name, shape, dtype and `per_tensor` evenly spaced values of each base tensor."""
    digest = hashlib.sha256()
    seen: set[int] = set()
    for path, owner in _named_frozen(module, ""):
        tensors = {**owner._parameters, **owner._buffers}
        for key in sorted(tensors):
            value = tensors[key]
            if value is None or key in owner._non_persistent_buffers_set or id(value) in seen:
                continue
            seen.add(id(value))
            flat = value.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // per_tensor)].contiguous().cpu()
            digest.update(f"{path}.{key}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return digest.hexdigest()


def lengths_to_mask(lengths: Tensor, size: int) -> Tensor | None:
    """Lengths [B] to a mask [B, size], or None when every row is full."""
    if bool((lengths >= size).all()):
        return None
    return torch.arange(size, device=lengths.device)[None, :] < lengths[:, None]


def mask_to_lengths(mask: Tensor | None, batch: int, size: int, device: torch.device) -> Tensor:
    """The mask [B, T] of right-padded rows to lengths [B]; no mask means full rows."""
    if mask is None:
        return torch.full((batch,), size, device=device)
    return mask.long().sum(-1)


def _is_slot(module: nn.Module) -> bool:
    """Whether this child was put there by `mmpeft.attach`; nothing is imported to find out."""
    slots = sys.modules.get("mmpeft.adapters.slot")
    return slots is not None and isinstance(module, slots.Slot)


def _all_children(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _all_children(child)


def _named_frozen(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if not _is_slot(module):
        yield path, module
        for key, child in module._modules.items():
            if child is not None:
                yield from _named_frozen(child, f"{path}.{key}" if path else key)
