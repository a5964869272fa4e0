"""Frozen BatchNorm as what it is, a scale and a shift: a third less time for a training step through a frozen CNN on a CPU.

torch's batch norm in eval mode has a slow backward on CPUs (20 % of a step through EfficientNet-Lite0's later stages, where
the convolutions around it take 60 %). x * s + t with s = weight / sqrt(var + eps) and t = bias - mean * s is the same
map up to rounding, and its backward is one product. The modules keep their class (as a base class), their tensors and
their names; in training mode they are batch norms as before.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn


def scale_and_shift(norm: Any, x: Tensor) -> Tensor:
    """x [N, C, h, w] normalised with the running statistics of `norm`."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    shift = shift if norm.bias is None else shift + norm.bias
    return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])


def applies(norm: Any, x: Tensor) -> bool:
    """Whether the running statistics are what this call uses."""
    return not norm.training and norm.running_mean is not None and x.ndim == 4


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with a fast eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return scale_and_shift(self, x) if applies(self, x) else super().forward(x)


def speed_up(backbone: nn.Module) -> int:
    """Give every stock batch norm of a frozen backbone its fast eval mode, timm's with an activation included; how many."""
    kinds: dict[type, type] = {nn.BatchNorm2d: FrozenBatchNorm2d} | _timm_kinds()
    found = [m for m in backbone.modules() if type(m) in kinds]
    for module in found:
        module.__class__ = kinds[type(module)]
    return len(found)


def _timm_kinds() -> dict[type, type]:
    """timm's norm with an activation; its subclass is made when timm is there, and found by name when unpickled."""
    try:
        stock: Any = importlib.import_module("timm.layers").BatchNormAct2d
    except ImportError:
        return {}
    if "FrozenBatchNormAct2d" not in globals():

        class FrozenBatchNormAct2d(stock):  # type: ignore[misc]
            """timm's `BatchNormAct2d` with a fast eval mode."""

            def forward(self, x: Tensor) -> Tensor:
                if not applies(self, x):
                    plain: Tensor = super().forward(x)
                    return plain
                out: Tensor = self.act(self.drop(scale_and_shift(self, x)))
                return out

        FrozenBatchNormAct2d.__qualname__ = "FrozenBatchNormAct2d"
        globals()["FrozenBatchNormAct2d"] = FrozenBatchNormAct2d
    return {stock: globals()["FrozenBatchNormAct2d"]}


def __getattr__(name: str) -> Any:
    if name == "FrozenBatchNormAct2d" and _timm_kinds():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
