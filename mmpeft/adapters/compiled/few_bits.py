"""Packed weights (`adapters.storage`) as the fused blocks read them: written out dense into an area they share.

The packed tensors are looked up at every call, so loading a checkpoint into them is seen.
"""

from __future__ import annotations

from torch import Tensor

from mmpeft.adapters.storage.on_kernels import kernel_form
from mmpeft.adapters.storage.packed_weight import PackedWeight
from mmpeft.kernels import quantised
from mmpeft.kernels.stored import Stored


def storage(weight: Tensor) -> Stored | None:
    """How a packed weight is written out; None for a dense one."""
    if not isinstance(weight, PackedWeight):
        return None

    def fill(out: Tensor) -> None:
        form = kernel_form(weight.scheme, weight.packed, weight.shape)
        if form is not None and quantised.runs(form, out.dtype):
            quantised.dequantise_into(form, out)
        else:
            out.copy_(weight.scheme.dequantise(weight.packed, weight.shape))

    return Stored((weight.shape[0], weight.shape[1]), weight.dtype, weight.device, fill)


def address(weight: Tensor) -> int:
    """Where a weight's numbers (of a packed one: its codes) lie."""
    return (weight.packed["codes"] if isinstance(weight, PackedWeight) else weight).data_ptr()


def schemes(weights: list[Tensor]) -> str:
    """The names of the storage schemes among some weights, for reports; empty if all are dense."""
    return ", ".join(sorted({w.scheme.name for w in weights if isinstance(w, PackedWeight)}))
