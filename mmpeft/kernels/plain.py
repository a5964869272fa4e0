"""Linears without an adapter inside written-out blocks: one product on weights side by side, and no rank columns.

`Plain` answers to the same calls as `group.Group`, so a block does not ask which of its linears are adapted. One linear is
used where it lies; several that share an input (separate q, k and v) are copied next to each other once, and views of
the copy become their storage.

A frozen MLP that keeps nothing has its tanh GELU in the product's epilogue (cuBLASLt's GELU is that one), where the device
is faster so: 2 f elements a token less.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmpeft.kernels import fused_ops, tuning
from mmpeft.kernels.adamw import Slot
from mmpeft.kernels.group import Dropped, linear


class Plain:
    """y = x W^T + bias with W [out, in] of all members.

    Args:
        weights: frozen [out_i, in]; several become one buffer, whose parts are `self.weights`.
        biases: [out_i] or None, one a weight.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        single = len(weights) == 1
        self.W = weights[0] if single else torch.cat(list(weights))
        self.weights = list(self.W.split_with_sizes([w.shape[0] for w in weights]))
        parts = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
        self.bias = None if all(b is None for b in biases) else parts[0] if single else torch.cat(parts)

    def wide(self, rows: int, n: int) -> Tensor:
        """An uninitialised [rows, n]."""
        return self.W.new_empty(rows, n)

    def slots(self, start: int) -> Iterator[tuple[Tensor, Slot]]:
        """Nothing trains here."""
        yield from ()

    def forward(self, x: Tensor, dropped: Dropped | None = None) -> tuple[Tensor, None]:
        """x [T, in] -> (y [T, out], nothing to keep)."""
        return linear(x, self.W, self.bias), None

    def gelu(self, x: Tensor, kind: str) -> Tensor:
        """gelu(x W^T + bias) [T, out], for a forward that needs nothing before the activation any more."""
        half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
        if half and kind == "tanh" and self.bias is not None:
            shape = (x.shape[0], x.shape[1], self.W.shape[0], x.dtype)
            if _epilogue_pays(*shape, x.device.index or 0):
                return torch._addmm_activation(self.bias, x, self.W.mT, use_gelu=True)
        y = linear(x, self.W, self.bias)
        fused_ops.gelu(y, y, kind)
        return y

    def backward(
        self, dy: Tensor, S: Tensor | None, flat: Tensor, accumulate: bool, dropped: Dropped | None = None
    ) -> Tensor:
        """dy [T, out] -> dx [T, in]."""
        return dy @ self.W

    def backward_A(
        self, dy: Tensor, x: Tensor, flat: Tensor, accumulate: bool, dropped: Dropped | None = None
    ) -> None:
        """Nothing trains here."""


@functools.cache
def _epilogue_pays(rows: int, n_in: int, out: int, dtype: torch.dtype, device: int) -> bool:
    """Whether the product with GELU in its epilogue beats product and sweep at this size, timed once a device."""
    place = torch.device("cuda", device)

    @functools.cache  # made only if something is timed
    def data() -> tuple[Tensor, Tensor, Tensor]:
        x, W = (torch.randn(n, n_in, dtype=dtype, device=place) for n in (rows, out))
        return x, W * n_in**-0.5, torch.randn(out, dtype=dtype, device=place)

    def epilogue() -> Tensor:
        x, W, bias = data()
        return torch._addmm_activation(bias, x, W.mT, use_gelu=True)

    def apart() -> Tensor:
        x, W, bias = data()
        y = linear(x, W, bias)
        fused_ops.gelu(y, y, "tanh")
        return y

    with torch.cuda.device(device):
        if not _epilogue_is_tanh(dtype, device):
            return False
        candidates = {"epilogue": epilogue, "apart": apart}
        key, timer = (rows, n_in, out, dtype), tuning.device_milliseconds
        return tuning.choose("gelu", key, candidates, place, otherwise="apart", timer=timer) == "epilogue"


@functools.cache
def _epilogue_is_tanh(dtype: torch.dtype, device: int) -> bool:
    """Whether this torch has the operator on this device, and it computes a GELU at all."""
    x = torch.linspace(-4, 4, 64, device=torch.device("cuda", device)).repeat(64, 1).to(dtype)
    W, bias = torch.eye(64, dtype=dtype, device=x.device), torch.zeros(64, dtype=dtype, device=x.device)
    try:
        y = torch._addmm_activation(bias, x, W, use_gelu=True)
    except (AttributeError, RuntimeError):
        return False
    return bool((y.float() - fused_ops.gelu_of(x.float(), "tanh")).abs().max() < 3e-2)
