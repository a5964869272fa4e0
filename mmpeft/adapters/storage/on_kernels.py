"""The schemes' packed tensors as the kernels of `mmpeft.kernels.quantised` read them; None where they do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmpeft.adapters.storage.integer import FP8, Int
from mmpeft.adapters.storage.nf4 import E4M3_MAX, NF4, e4m3
from mmpeft.kernels.quantised import Packed


def kernel_form(scheme: Any, t: Mapping[str, Tensor], shape: torch.Size) -> Packed | None:
    """The packed matrix, seen as [shape[0], rest]; None for a scheme that has no kernels."""
    form = _FORMS.get(type(scheme))
    if form is None or len(shape) < 2 or not all(p.is_contiguous() for p in t.values()):
        return None
    return form(scheme, t, (shape[0], shape[1:].numel()))


def _nf4(scheme: NF4, t: Mapping[str, Tensor], shape: tuple[int, int]) -> Packed:
    codes = t["codes"].view(-1)
    if "scale" in t:
        return Packed(shape, 4, codes, scheme.block, t["scale"].float(), t["table"])
    return Packed(
        shape, 4, codes, scheme.block, t["scale_codes"], t["table"], scale_table=t["scale_table"].float(),
        nested=t["nested"].float(), nested_group=scheme.nested_block, mean=t["offset"].float(),
    )  # fmt: skip


def _int(scheme: Int, t: Mapping[str, Tensor], shape: tuple[int, int]) -> Packed:
    zero = t["zero"].float() if scheme.affine else None
    top = 0 if scheme.affine else scheme.top
    return Packed(shape, scheme.bits, t["codes"], scheme.group or shape[1], t["scale"].float(), offset=top, zero=zero)


def _fp8(scheme: FP8, t: Mapping[str, Tensor], shape: tuple[int, int]) -> Packed:
    codes = t["codes"]
    table = e4m3(codes.device)  # in [-1, 1]
    return Packed(shape, 8, codes.view(-1), shape[1], t["scale"].float() * E4M3_MAX, table)


_FORMS: dict[type, Callable[[Any, Mapping[str, Tensor], tuple[int, int]], Packed]] = {NF4: _nf4, Int: _int, FP8: _fp8}
