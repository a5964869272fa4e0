"""A factor for every output channel (DoRA's magnitude, IA3): y = row z + b, and both gradients in one sweep over dy.

    scale            y [T, out] = row * z + b, products in fp32
    scale_backward   dz = row * dy and drow = sum_t dy z; partial sums over row chunks, added up in a fixed order
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft.kernels.dispatch import use_triton


def scale(z: Tensor, row: Tensor, bias: Tensor | None) -> Tensor:
    """row [out] * z [T, out] + bias [out], in z's dtype. z is contiguous."""
    if _kernel(z):
        from mmpeft.kernels import row_kernels

        return row_kernels.scale(z, row, bias)
    y = z * row if bias is None else torch.addcmul(bias.to(row.dtype), z.to(row.dtype), row)
    return y.to(z.dtype)


def scale_backward(dy: Tensor, z: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """(row * dy [T, out], sum over T of dy * z [out])."""
    if _kernel(z):
        from mmpeft.kernels import row_kernels

        return row_kernels.scale_backward(dy, z, row)
    return (dy * row).to(dy.dtype), (dy.to(row.dtype) * z).sum(0)


def scale_backward_into(dy: Tensor, z: Tensor, row: Tensor, dz: Tensor) -> Tensor:
    """dz <- row * dy (dz may be dy); returns the sum over T of dy * z [out], fp32 or wider. Any leading dimensions."""
    if _kernel(z):
        from mmpeft.kernels import row_kernels

        return row_kernels.scale_backward_into(dy, z, row, dz)
    total = (dy.to(row.dtype) * z).sum(0)
    dz.copy_(dy * row)
    return total


def _kernel(z: Tensor) -> bool:
    return z.dtype != torch.float64 and use_triton(z)
