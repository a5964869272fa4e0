"""Which base an adapter was trained on: names, shapes and a sample of the values of its pretrained tensors.

The sample (64 values a tensor, evenly spaced, rounded to bf16) makes this cost milliseconds on a 7B model and lets the
same checkpoint match whether it was loaded in fp32 or bf16. Tensors that the adapter replaces whole (`full`) are left
out, since a freshly made head or connector is random and means nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from mmpeft.adapters.slot import Slot
from mmpeft.adapters.wrapped import class_name, plain_path, unwrap, whole

SAMPLE = 64


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the base, by path (wrappers left out), without any adapter."""
    found: dict[str, Tensor] = {}
    inside = tuple(path + "." for path, m in model.named_modules() if isinstance(m, Slot))
    for path, module in model.named_modules(remove_duplicate=False):
        if (path + ".").startswith(inside) if inside else False:
            continue
        own = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **own}.items():
            if tensor is not None:
                found[plain_path(f"{path}.{name}" if path else name)] = tensor
    return found


def fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> str:
    """A hex digest of the base; '' for a model on the meta device, which has no values yet.

    Args:
        exclude: paths of tensors to leave out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base_tensors(model).items()):
        if name in exclude:
            continue
        if tensor.is_meta:
            return ""
        full = whole(tensor)
        digest.update(f"{name} {tuple(full.shape)}\n".encode())
        if full.numel() and (
            full.is_floating_point() or full.dtype in (torch.int64, torch.int32, torch.uint8, torch.int8)
        ):
            digest.update(_sample(full).numpy().tobytes())
    return digest.hexdigest()


def _sample(t: Tensor) -> Tensor:
    flat = t.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLE, flat.numel()), dtype=torch.float64).round().long()
    picked = flat[index.to(flat.device)].cpu()
    return picked.to(torch.bfloat16).view(torch.int16) if picked.is_floating_point() else picked


def model_name(model: nn.Module) -> str:
    """The base's own name: its hub id or folder, its timm architecture, else its class."""
    model = unwrap(model)
    for value in (getattr(model, "name_or_path", None), (getattr(model, "pretrained_cfg", None) or {})):
        if isinstance(value, str) and value:
            return value
        if isinstance(value, dict) and value.get("architecture"):
            return str(value["architecture"])
    return class_name(model)
