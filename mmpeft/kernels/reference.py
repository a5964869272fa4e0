"""Plain-torch references: what every kernel computes, run on CPU and used as the oracle of the tests.

All are differentiable by autograd and work in any floating dtype. Dropout masks come from a counter hash, not from a
generator: entry (row, col) of mask (seed) is a pure function of the three integers, so a backward pass redraws it
instead of storing it, and every device draws the same mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MASK32 = 0xFFFFFFFF


def _mix32(h: Tensor) -> Tensor:
    """A 32-bit finaliser (xor-shift, odd multiply) on int64 tensors of 32-bit values."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & MASK32
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & MASK32
    return h ^ (h >> 16)


def keep_threshold(p: float) -> int:
    """An entry is dropped when its 16-bit hash is below this: P(drop) is p rounded to 1/65536."""
    return min(round(p * 65536), 65535)


def inverse_keep(p: float) -> float:
    """One over the probability of an entry to stay, exactly that of the mask."""
    return 65536 / (65536 - keep_threshold(p))


def dropout_mask(rows: int, cols: int, p: float, seed: Tensor | int, device: torch.device | str = "cpu") -> Tensor:
    """Keep-mask [rows, cols], bool. Same seed, same mask, on every device.

    A 32-bit hash of the row's key and the pair's number gives two neighbouring columns 16 bits each. Two rounds of
    multiply and shift, the second with the row's key again, so that rows whose keys are near are not rearrangements of
    each other.

    Args:
        p: probability of a zero, 0 <= p < 1.
        seed: integer, or an int64 tensor of one element (read on the device: safe in a CUDA graph).
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(())
    key = _mix32((torch.arange(rows, device=device) + seed * 0x9E3779B1) & MASK32)[:, None]
    h = ((key ^ torch.arange((cols + 1) // 2, device=device)) * 0x7FEB352D) & MASK32
    h = h ^ (h >> 15) ^ ((key * 0x9E3779B1) & MASK32)
    h = (h * 0x846CA68B) & MASK32
    bits = torch.stack([(h ^ (h >> 16)) & 0xFFFF, h >> 16], -1)  # even columns, odd columns
    return bits.flatten(1)[:, :cols] >= keep_threshold(p)


def dropout(x: Tensor, p: float, seed: Tensor | int) -> Tensor:
    """Inverted dropout of x [..., in] with the mask of `seed`, rows counted over the flattened leading axes."""
    keep = dropout_mask(x[..., 0].numel(), x.shape[-1], p, seed, x.device).view(x.shape)
    return x * keep * inverse_keep(p)


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """x W^T + b + scale * (dropout(x) A^T) B^T, every product in x's dtype.

    x [..., in], weight [out, in], bias [out], A [r, in], B [out, r] -> [..., out].
    """
    inner = dropout(x, dropout_p, seed) if dropout_p and seed is not None else x
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(inner, A.to(x.dtype)), B.to(x.dtype))


def lowrank_updates(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[tuple[Tensor, Tensor, float, int, float]],
    *,
    row: Tensor | None = None,
    seed: Tensor | int | None = None,
) -> Tensor:
    """row * (x W^T + sum of scale * (dropout(x) A^T) B^T on the rows from `start`) + b; see `lowrank.Update`."""
    y = F.linear(x, weight, bias if row is None else None)
    for i, (A, B, scale, start, p) in enumerate(updates):
        inner = dropout(x, p, seed + i) if p and seed is not None else x
        update = scale * F.linear(F.linear(inner, A.to(x.dtype)), B.to(x.dtype))
        whole = B.shape[0] == y.shape[-1]
        y = y + (update if whole else F.pad(update, (start, y.shape[-1] - start - B.shape[0])))
    if row is None:
        return y
    y = (y * row).to(x.dtype)
    return y if bias is None else y + bias


def add_rmsnorm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, rmsnorm(x + delta) * weight) of [T, h]; statistics in fp32 or wider (arXiv 1910.07467)."""
    x = x if delta is None else x + delta
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return x, (wide * rstd).to(x.dtype) * weight


def rope(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of qk [T, heads, d], halves paired (i, i + d/2); cos, sin [T, d/2] (arXiv 2104.09864)."""
    first, second = qk.to(cos.dtype).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(qk.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [T, 2f] -> [T, f] (arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Summed cross-entropy of logits [N, V] against labels [N], in fp32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="sum")
