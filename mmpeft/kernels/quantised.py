"""Weights in few bits: dequantise one into a dense matrix, or multiply by it directly where x has few rows.

Every scheme here is a code an entry, a value a code and a scale a run of entries, counted along the flattened matrix:

    W[e] = value(code[e]) * scale[e // group] (+ zero[e // group])

value is a table look-up (NF4's 16 levels, the 256 of float8) or code - offset (integers); scales may be quantised again.
With many rows (training, prefill) the weight is formed, used by one matrix product and given back to the allocator, so
that one dense weight is alive at a time; with at most `FEW_ROWS` (decoding) reading 4 bits instead of 16 is the time,
and `linear` never forms it. The plain-torch references are the schemes of `adapters.storage`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft.kernels.dispatch import use_triton

FEW_ROWS = 64  # of x, up to which the weight is not formed


class Packed(NamedTuple):
    """A packed matrix [out, in] as the kernels read it; all tensors contiguous on one device.

    codes: uint8, `bits` an entry, the first of a byte in its upper bits. table: fp32 [2^bits] or None (then the value
    is code - offset). group: entries that share a scale. scale: fp32 [n / group], or with `nested` the uint8 codes of the
    scales, whose value is scale_table[code] * nested[i // nested_group] + mean[0]. zero: fp32 [n / group] or None.
    """

    shape: tuple[int, int]
    bits: int
    codes: Tensor
    group: int
    scale: Tensor
    table: Tensor | None = None
    offset: int = 0
    zero: Tensor | None = None
    scale_table: Tensor | None = None
    nested: Tensor | None = None
    nested_group: int = 1
    mean: Tensor | None = None


def runs(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether the kernels run for this matrix, read as `dtype`."""
    return dtype in (torch.bfloat16, torch.float16, torch.float32) and use_triton(packed.codes)


def dequantise(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The dense matrix [out, in]."""
    out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    dequantise_into(packed, out)
    return out


def dequantise_into(packed: Packed, out: Tensor) -> None:
    """The dense matrix into out [out, in] of its dtype, whose rows may lie any distance apart."""
    from mmpeft.kernels import quantised_kernels

    quantised_kernels.dequantise_into(packed, out)


def linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x W^T + b for x [..., in] of at most `FEW_ROWS` rows -> [..., out]; no gradients."""
    from mmpeft.kernels import quantised_kernels

    rows = x.reshape(-1, x.shape[-1])
    y = quantised_kernels.linear(rows, packed)
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], packed.shape[0])
