"""`PackedWeight`: a frozen weight kept in few bits that reads as an ordinary tensor.

It is a tensor subclass around a scheme's packed tensors (`nf4.py`, `integer.py`). Whatever code reads it gets the
dequantised values, so every part of the engine (plans, fingerprints, methods that look at W, merging) works on it
unchanged. `F.linear` is special: its backward keeps the packed tensors and dequantises again, so that no dense copy of
a weight outlives the operation that needs it. On a GPU the Triton kernels of `mmpeft.kernels.quantised` do both.

    load_state_dict with a dense checkpoint quantises while copying; `.to(device)` and deepcopy move the packed tensors;
    casts (`model.half()`) change what it reads as, not what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.adapters.storage.on_kernels import kernel_form
from mmpeft.kernels import quantised

aten = torch.ops.aten


class Scheme(Protocol):
    """How a tensor is packed. Frozen dataclasses: equal schemes are interchangeable."""

    @property
    def name(self) -> str:
        """nf4, int, fp8."""

    @property
    def bits(self) -> float:
        """Of one code."""

    def quantise(self, w: Tensor) -> dict[str, Tensor]:
        """Dense -> packed tensors."""

    def dequantise(self, t: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """Packed tensors -> dense fp32."""


class PackedWeight(Tensor):
    """Packed storage of a tensor of shape `shape` that reads as `dtype`."""

    scheme: Scheme
    packed: dict[str, Tensor]

    @staticmethod
    def __new__(
        cls: type[PackedWeight], packed: dict[str, Tensor], scheme: Scheme, shape: torch.Size, dtype: torch.dtype
    ) -> PackedWeight:
        device = next(iter(packed.values())).device
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, packed: dict[str, Tensor], scheme: Scheme, shape: torch.Size, dtype: torch.dtype) -> None:
        self.packed, self.scheme = packed, scheme

    @staticmethod
    def of(w: Tensor, scheme: Scheme) -> PackedWeight:
        """Quantise a dense tensor."""
        return PackedWeight(scheme.quantise(w), scheme, w.shape, w.dtype)

    def dense(self) -> Tensor:
        """The dequantised values in this tensor's dtype."""
        form = kernel_form(self.scheme, self.packed, self.shape)
        if form is not None and quantised.runs(form, self.dtype):
            return quantised.dequantise(form, self.dtype).view(self.shape)
        return self.scheme.dequantise(self.packed, self.shape).to(self.dtype)

    @property
    def packed_bytes(self) -> int:
        """What is really stored; tables that are the same for all weights not counted."""
        return sum(t.nbytes for n, t in self.packed.items() if not n.endswith("table"))

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """As `packed_bytes`, so that tables of sizes count what is stored."""
        return self.packed_bytes

    def like(self, packed: dict[str, Tensor], dtype: torch.dtype | None = None) -> PackedWeight:
        """The same scheme and shape around other packed tensors."""
        return PackedWeight(packed, self.scheme, self.shape, dtype or self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({self.scheme}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        for name, t in self.packed.items():
            self.__dict__[f"packed_{name}"] = t
        return [f"packed_{n}" for n in self.packed], (self.scheme, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: torch.Size, stride: Any) -> PackedWeight:
        packed = {n.removeprefix("packed_"): t for n, t in inner.items()}
        return PackedWeight(packed, meta[0], size, meta[1])

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) > 1 and isinstance(args[1], PackedWeight):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return PackedLinear.apply(args[0], args[1], bias)  # type: ignore[no-untyped-call]
        if func is Tensor.to and kwargs.get("copy"):  # an own copy to train ("full"), not a model that is moved or cast
            return args[0].dense().to(*args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # the default would wrap dense results in this class
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None and (done := special(args, kwargs)) is not None:
            return done
        args, kwargs = torch.utils._pytree.tree_map_only(PackedWeight, PackedWeight.dense, (args, dict(kwargs)))
        return func(*args, **kwargs)


class PackedLinear(torch.autograd.Function):
    """x W^T + b that saves W packed. W is frozen and gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: PackedWeight, bias: Tensor | None) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        ctx.packed, ctx.dtype, ctx.bias = w, dtype, bias is not None
        few = x.numel() <= quantised.FEW_ROWS * x.shape[-1]
        form = kernel_form(w.scheme, w.packed, w.shape) if few and x.ndim and x.dtype == (dtype or w.dtype) else None
        if form is not None and quantised.runs(form, x.dtype):
            return quantised.linear(x, form, bias)
        dense = w.dense()
        if dtype is not None:
            x, dense, bias = x.to(dtype), dense.to(dtype), None if bias is None else bias.to(dtype)
        return F.linear(x, dense, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (g,) = grads
        dx = g @ ctx.packed.dense().to(g.dtype) if ctx.needs_input_grad[0] else None
        db = g.flatten(0, -2).sum(0) if ctx.bias and ctx.needs_input_grad[2] else None
        return dx, None, db


def _same(args: Any, kwargs: Any) -> PackedWeight:
    return cast(PackedWeight, args[0].like(args[0].packed))


def _clone(args: Any, kwargs: Any) -> PackedWeight:
    return cast(PackedWeight, args[0].like({n: t.clone() for n, t in args[0].packed.items()}))


def _to_copy(args: Any, kwargs: Any) -> PackedWeight | None:
    """Another device moves the packed tensors; another dtype is only what it reads as. An integer type is read out."""
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if dtype is not None and not dtype.is_floating_point:
        return None
    packed = {n: t.to(device) if device is not None else t.clone() for n, t in args[0].packed.items()}
    return cast(PackedWeight, args[0].like(packed, dtype))


def _copy(args: Any, kwargs: Any) -> Any:
    """`packed.copy_(dense)` quantises."""
    target, source = args[0], args[1]
    if not isinstance(target, PackedWeight):
        return None
    same = isinstance(source, PackedWeight) and source.scheme == target.scheme
    dense = source.dense() if isinstance(source, PackedWeight) else source
    new = source.packed if same else target.scheme.quantise(dense)
    for name, t in target.packed.items():
        t.copy_(new[name])
    return target


_SPECIAL: dict[Any, Callable[[Any, Any], Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
}
