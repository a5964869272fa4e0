"""Written-out blocks under autograd: their output (or loss) as one node whose inputs are x and the masters.

The compute copies must not change between a forward and its backward (the backward multiplies by them), so the node
notes the masters' versions and refuses a backward after an optimizer step in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmpeft.kernels.adamw import Slot
    from mmpeft.kernels.documents import Documents
    from mmpeft.kernels.llama import FusedLlama


class Blocks(Protocol):
    """What the node needs of written-out blocks."""

    masters: list[Tensor]
    slots: list[Slot]
    numel: int

    def record(self, x: Tensor, *more: Any) -> tuple[Tensor, Any]:
        """x [B, S, h] (and whatever else these blocks read) -> (output [B, S, h], tape)."""

    def backward(self, tape: Any, flat: Tensor, *, accumulate: bool = False, need_dx: bool = False) -> Tensor | None:
        """From `tape.gradient` [B * S, h]: the masters' gradients into flat, x's returned."""


def run(blocks: Any, x: Tensor, *more: Any) -> Tensor:
    """The output [B, S, h] of `Blocks` for x [B, S, h]; `more` goes to their `record`."""
    value: Tensor = _Output.apply(blocks, x, more, *blocks.masters)  # type: ignore[no-untyped-call]
    return value


def loss(
    model: FusedLlama, x: Tensor, labels: Tensor, rows: Tensor | None, documents: Documents | None = None
) -> Tensor:
    """Mean cross-entropy of the next token after embeddings x [B, S, h]."""
    value: Tensor = _Loss.apply(model, x, (labels, rows, documents), *model.masters)  # type: ignore[no-untyped-call]
    return value


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Blocks, x: Tensor, more: tuple[Any, ...], *masters: Tensor) -> Tensor:
        y, ctx.tape = blocks.record(x, *more)
        _note(ctx, blocks, masters)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def]
        ctx.tape.gradient = grad.reshape(-1, grad.shape[-1]).contiguous()
        dx, gradients = _gradients(ctx, ctx.needs_input_grad[1])
        return None, dx, None, *gradients


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, model: FusedLlama, x: Tensor, given: Any, *masters: Tensor) -> Tensor:
        value, ctx.tape = model.forward(x, *given)
        _note(ctx, model, masters)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def]
        if ctx.tape.blocks:
            ctx.tape.gradient.mul_(grad)
        dx, gradients = _gradients(ctx, ctx.needs_input_grad[1])
        return None, dx, None, *gradients


def _note(ctx: Any, blocks: Blocks, masters: tuple[Tensor, ...]) -> None:
    ctx.blocks, ctx.masters = blocks, masters
    ctx.versions = [m._version for m in masters]


def _gradients(ctx: Any, need_dx: bool) -> tuple[Tensor | None, list[Tensor]]:
    blocks: Blocks = ctx.blocks
    if [m._version for m in ctx.masters] != ctx.versions:
        raise RuntimeError("an adapter tensor was modified by an inplace operation between this forward and its backward")
    like = ctx.masters[0] if ctx.masters else ctx.tape.gradient  # frozen blocks pass a gradient through, and have none
    flat = like.new_empty(blocks.numel)
    dx = blocks.backward(ctx.tape, flat, need_dx=need_dx)
    parts = torch.split(flat, [s.numel for s in blocks.slots])
    return dx, [g.view(m.shape) for g, m in zip(parts, ctx.masters, strict=True)]
