"""The factored plan: forwards of the stock layers that add `scale * B A x` beside the frozen call.

    y = W x + b + s B (A drop(x))          additive updates, any number of them, each on its own rows
    y = row * (W (col * x) + s B A x) + b  one scaled update a row range (DoRA, IA3)

One `Op` per layer type says how to run the frozen call, the shrink to rank r and the expansion; everything else is
shared. A linear's whole call is one operator of `mmpeft.kernels` where that is faster. Convolutions shrink with their
own geometry (stride, dilation, padding mode) and expand 1x1; grouped ones, whose A would have to differ by group, and
embeddings that renormalise in place, are left to the materialised plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.slot import Part, Slot
from mmpeft.adapters.stack import Piece, pieces_of
from mmpeft.adapters.state import SLOT, Active
from mmpeft.adapters.storage.packed_weight import PackedWeight
from mmpeft.errors import ConfigError, Unsupported
from mmpeft.kernels import Update, add_grouped, lowrank_updates, worth_fusing
from mmpeft.kernels.quantised import FEW_ROWS


@dataclass(frozen=True)
class Op:
    """How one layer type runs: frozen call, shrink, expand; `axis` is the output's channel axis."""

    base: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]  # (owner, x, W, bias)
    shrink: Callable[[Any, Tensor, Tensor], Tensor]  # (owner, x, A [r, in]) -> [..., r]
    expand: Callable[[Any, Tensor, Tensor], Tensor]  # (owner, s, B [out, r]) -> [..., out]
    axis: int = -1
    scales: bool = True  # may carry row and col factors
    drops: bool = True  # has an activation to drop
    mixes: bool = False  # may run rows= of a batch
    fits: Callable[[Any], bool] = lambda owner: True
    matrix: Callable[[Tensor], Tensor] | None = None  # the stored weight as [out, in], where the call is x W^T + b


def stock_op(cls: type[nn.Module]) -> Op | None:
    """The op of a stock layer class, or None where the class brings its own forward (its weight is materialised)."""
    forward = cls.forward
    if getattr(forward, "__qualname__", "") == "Conv1D.forward" and forward.__module__ == "transformers.pytorch_utils":
        return _HF_CONV1D
    return _OPS.get(forward)


def run(owner: nn.Module, op: Op, x: Tensor) -> Tensor:
    """The adapted call of a stock layer."""
    slot = cast(Slot, owner._modules[SLOT])
    base = owner._parameters.get("weight")
    state = slot.state
    if base is None or "weight" in slot.follows:  # recomputed by its module, or another owner has the delta
        return op.base(owner, x, cast(Tensor, owner.weight), cast("Tensor | None", getattr(owner, "bias", None)))
    if state.watching:
        slot.watch(x)
    if state.indexed == "rows" and not state.bare:
        return _indexed_rows(owner, op, x, base)
    active = state.current()
    if active.rows is not None and not (state.bare or active.base):
        return _mixed(owner, op, x, base, active)
    bias = cast("Tensor | None", getattr(owner, "bias", None))
    found = slot.parts("weight", base)
    if found is None or (not op.scales and any(not p.factors.additive for p in found[1])):
        if not state.indexed:
            _refuse_dropout(slot, active)
        return op.base(owner, x, cast(Tensor, owner.weight), bias)
    start, parts = found
    if state.probing and parts:
        slot.runs["weight"] = slot.runs.get("weight", 0) + 1
    if op.matrix is not None and (y := _fused(x, op.matrix(start), bias, parts)) is not None:
        return y
    if all(p.factors.additive for p in parts):
        y = op.base(owner, x, start, bias)
        for part in parts:
            y = _add(y, _low_rank(owner, op, x, part), part, op.axis)
        return y
    return _scaled(owner, op, x, start, bias, parts)


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[Part]) -> Tensor | None:
    """The whole call as one operator of `mmpeft.kernels`; None where torch's own are to run (no GPU, a size at which
    they are faster, column factors)."""
    if not parts or any(p.factors.col is not None for p in parts):
        return None
    if isinstance(weight, PackedWeight) and x.numel() <= FEW_ROWS * x.shape[-1]:
        return None  # so few rows multiply by the packed weight directly
    low_rank = [p for p in parts if p.factors.A is not None and p.factors.B is not None]
    updates = [Update(p.factors.A, p.factors.B, p.scale, p.start, _dropout(p)) for p in low_rank]  # type: ignore[arg-type]
    row = _whole_row(parts, weight.shape[0])
    if not worth_fusing(x, weight, updates, row):
        return None
    seed = torch.randint(2**31, (1,), device=x.device) if any(u.dropout for u in updates) else None
    return lowrank_updates(x, weight, bias, updates, row=row, seed=seed)


def _dropout(part: Part) -> float:
    return part.delta.method.dropout if part.delta is not None and part.delta.training else 0.0


def _whole_row(parts: list[Part], out: int) -> Tensor | None:
    """One factor a row of the weight, 1 where no part has one; None where none has any."""
    pieces, edge = [], 0
    for part in sorted((p for p in parts if p.factors.row is not None), key=lambda p: p.start):
        row = cast(Tensor, part.factors.row)
        pieces += [row.new_ones(part.start - edge), row]
        edge = part.stop
    if not pieces:
        return None
    return torch.cat([*pieces, pieces[-1].new_ones(out - edge)]) if len(pieces) > 2 or edge < out else pieces[1]


def _refuse_dropout(slot: Slot, active: Active) -> None:
    """A composition that has to be materialised has no input to drop."""
    for _, delta in slot.at("weight", active.names):
        if delta.training and delta.method.dropout:
            raise Unsupported(
                f"{delta.site.name}: this composition of {', '.join(active.names)} is formed as one weight, so the "
                f"dropout of {delta.method.name} cannot act; train with dropout=0 or with one adapter active"
            )


def _low_rank(owner: nn.Module, op: Op, x: Tensor, part: Part) -> Tensor:
    """scale * B A drop(x), in x's dtype (autocast decides under autocast)."""
    f = part.factors
    assert f.A is not None and f.B is not None
    if p := _dropout(part):
        x = F.dropout(x, p)
    dtype = x.dtype if x.is_floating_point() else owner._parameters["weight"].dtype  # type: ignore[union-attr]
    B = f.B if part.scale == 1 else f.B * part.scale
    return op.expand(owner, op.shrink(owner, x, f.A.to(dtype)), B.to(dtype))


def _add(y: Tensor, update: Tensor, part: Part, axis: int) -> Tensor:
    if update.shape[axis] == y.shape[axis]:
        return y + update
    after = y.shape[axis] - part.stop
    pad = (part.start, after) if axis == -1 else (0, 0) * (y.ndim - 2) + (part.start, after)
    return y + F.pad(update, pad)


def _scaled(owner: nn.Module, op: Op, x: Tensor, start: Tensor, bias: Tensor | None, parts: list[Part]) -> Tensor:
    """Row and column scales; the bias is added after them, as in the layer itself."""
    assert op.matrix is not None
    out = op.matrix(start).shape[0]
    if len(parts) == 1 and (parts[0].start, parts[0].stop) == (0, out):
        y = _scaled_rows(owner, op, x, start, None, parts[0])
    else:
        y = op.base(owner, x, start, None)
        pieces, edge = [], 0
        for part in sorted(parts, key=lambda p: p.start):
            pieces += [y.narrow(op.axis, edge, part.start - edge), _scaled_rows(owner, op, x, start, y, part)]
            edge = part.stop
        pieces.append(y.narrow(op.axis, edge, out - edge))
        y = torch.cat([p for p in pieces if p.shape[op.axis]], op.axis)
    return y if bias is None else y + _along(bias, y, op.axis)


def _scaled_rows(owner: nn.Module, op: Op, x: Tensor, start: Tensor, y: Tensor | None, part: Part) -> Tensor:
    """The rows of one update; `y` is the frozen call without bias, where it has been made for other rows."""
    f = part.factors
    if f.col is not None:
        y = op.base(owner, x * f.col.to(x.dtype), start, None)
    elif y is None:
        y = op.base(owner, x, start, None)
    z = y.narrow(op.axis, part.start, part.stop - part.start)
    if f.A is not None:
        z = z + _low_rank(owner, op, x, part).to(z.dtype)
    return z if f.row is None else z * _along(f.row, z, op.axis)


def _along(v: Tensor, y: Tensor, axis: int) -> Tensor:
    """A channel vector, shaped and cast to multiply `y` along `axis`."""
    v = v.to(y.dtype)
    return v if axis == -1 else v.view(-1, *(1,) * (y.ndim - 2))


def _mixed(owner: nn.Module, op: Op, x: Tensor, base: Tensor, active: Active) -> Tensor:
    """Row i of the batch under adapter `active.rows[i]`: stacked, rank-padded factors gathered by an index tensor."""
    slot = cast(Slot, owner._modules[SLOT])
    assert active.rows is not None
    start = slot.pinned.get("weight", base)
    touched = [d for _, d in slot.deltas(active.names) if d.site.kind == "weight"]
    bias = owner._parameters.get("bias")
    if not touched:
        return op.base(owner, x, start, bias)
    name = touched[0].site.name
    if not op.mixes:
        raise Unsupported(f"rows= at {name}: a {type(owner).__name__} cannot differ within a batch")
    groups = slot.rows_parts("weight", start)
    pieces = pieces_of(groups)
    if pieces is None:
        raise Unsupported(f"rows= at {name}: the methods there share rows of the weight; use one adapter a batch")
    biases = None if bias is None else slot.rows_vectors("bias", bias)
    _check_batch(slot, name, x, len(active.rows))
    return _gathered(owner, op, x, start, pieces, biases, slot.state.rows_of(active, x.device))


def _check_batch(slot: Slot, name: str, x: Tensor, rows: int) -> None:
    if slot.rows_fit is False or x.ndim < 2 or x.shape[0] != rows:
        raise ConfigError(
            f"rows= at {name}: {rows} rows were given, but this site's input of shape {tuple(x.shape)} does not keep "
            "the batch on its first axis"
        )


def _gathered(
    owner: nn.Module, op: Op, x: Tensor, start: Tensor, pieces: list[Piece], biases: Tensor | None, index: Tensor
) -> Tensor:
    """The call with each row's own update; `index` [B] into the pieces' and biases' first axis."""
    spread = (1,) * (x.ndim - 2)  # [B, n] -> [B, 1.., n]
    y = op.base(owner, x, start, None)
    for p in pieces:
        if p.A is not None and p.B is not None and p.row is None and p.col is None and x.dtype == y.dtype:
            part = y.narrow(-1, p.start, p.stop - p.start)
            z = add_grouped(part, x, p.A[:-1], p.B[:-1], index)  # the last of a stack is the base
            y = z if z.shape == y.shape else y if z is part else _put(y, z, p)
            continue
        z = y.narrow(-1, p.start, p.stop - p.start)
        if p.col is not None:
            scaled = x * p.col.to(x.dtype)[index].view(len(x), *spread, -1)
            z = op.base(owner, scaled, start, None).narrow(-1, p.start, p.stop - p.start)
        if p.A is not None and p.B is not None:
            s = torch.bmm(x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1), p.A.to(x.dtype)[index].mT)
            z = z + torch.bmm(s, p.B.to(x.dtype)[index].mT).view_as(z)
        if p.row is not None:
            z = z * p.row.to(z.dtype)[index].view(len(x), *spread, -1)
        y = _put(y, z, p)
    if biases is None:
        return y
    b = (biases[index] if len(biases) > 1 else biases).to(y.dtype)
    return y + b.view(len(b), *spread, -1)


def _put(y: Tensor, z: Tensor, p: Piece) -> Tensor:
    """y with its channels [start, stop) replaced by z."""
    return torch.cat([y.narrow(-1, 0, p.start), z, y.narrow(-1, p.stop, y.shape[-1] - p.stop)], -1)


def _indexed_rows(owner: nn.Module, op: Op, x: Tensor, base: Tensor) -> Tensor:
    """As `_mixed`, from the prebuilt stacks of `mmpeft.stack`."""
    slot = cast(Slot, owner._modules[SLOT])
    start = slot.pinned.get("weight", base)
    bias = owner._parameters.get("bias")
    weights, biases = slot.stacks.get("weight"), slot.stacks.get("bias")
    found = weights or biases
    if found is None:
        return op.base(owner, x, start, bias)
    index = found.rows()
    if not op.mixes or (weights is not None and weights.values is not None):
        raise Unsupported(f"rows= at {found.name}: it cannot differ within a batch")
    _check_batch(slot, found.name, x, len(index))
    vectors = biases.values if biases is not None else None if bias is None else bias.unsqueeze(0)
    return _gathered(owner, op, x, start, weights.pieces if weights is not None else [], vectors, index)


# --- the ops ---------------------------------------------------------------------------------------------------------


def _linear(owner: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, W, bias)


def _hf_conv1d(owner: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ W if bias is None else torch.addmm(bias, x.reshape(-1, x.shape[-1]), W)
    return y.view(*x.shape[:-1], W.shape[1])


def _conv(owner: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, owner._conv_forward(x, W, bias))


def _conv_shrink(owner: Any, x: Tensor, A: Tensor) -> Tensor:
    return cast(Tensor, owner._conv_forward(x, A.view(-1, *owner._parameters["weight"].shape[1:]), None))


def _conv_expand(owner: Any, s: Tensor, B: Tensor) -> Tensor:
    spatial = len(owner.kernel_size)
    conv = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    return conv(s, B.view(*B.shape, *(1,) * spatial))


def _embedding(owner: Any, ids: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return F.embedding(ids, W, owner.padding_idx, None, 2.0, owner.scale_grad_by_freq, owner.sparse)


def _rank_linear(owner: Any, x: Tensor, M: Tensor) -> Tensor:
    return F.linear(x, M)


_LINEAR = Op(_linear, _rank_linear, _rank_linear, mixes=True, matrix=lambda W: W)
_HF_CONV1D = Op(_hf_conv1d, _rank_linear, _rank_linear, mixes=True, matrix=lambda W: W.mT)
_CONV = Op(_conv, _conv_shrink, _conv_expand, axis=1, scales=False, fits=lambda m: m.groups == 1)
_EMBEDDING = Op(
    _embedding,
    lambda m, ids, A: F.embedding(ids, A.mT, m.padding_idx),
    _rank_linear,
    scales=False,
    drops=False,
    fits=lambda m: m.max_norm is None,
)
_OPS: dict[Any, Op] = {
    nn.Linear.forward: _LINEAR,
    nn.Conv1d.forward: _CONV,
    nn.Conv2d.forward: _CONV,
    nn.Conv3d.forward: _CONV,
    nn.Embedding.forward: _EMBEDDING,
}
