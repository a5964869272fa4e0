"""One AdamW launch for all adapter tensors, which also rewrites their compute copies (arXiv 1711.05101).

Masters, gradients and moments of every tensor lie end to end in flat fp32 buffers. A table, one row a tensor, tells
where its compute copy lies (a block of a `PackedGroup` buffer), with which leading dimension and factor; the kernel
writes it in the same pass. Learning rate and step count live on the device, so a captured CUDA graph follows a
schedule.
"""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.kernels.dispatch import use_triton
from mmpeft.kernels.tritonlib import jit, tl

BLOCK = 1024
CHUNK = 1024  # tensors copied in one call without the kernel: what it makes in fp32 on the way stays small


@dataclass(frozen=True)
class Slot:
    """One tensor of the optimizer: the master's shape, where its compute copy lies, and its own factors."""

    shape: tuple[int, int]
    copy: Tensor  # [rows, cols] view with unit column stride; receives master * scale
    scale: float = 1.0
    lr_ratio: float = 1.0
    weight_decay: float = 0.0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@jit
def _adamw(p, g, m, v, lr, step, grad_scale, tensor_of, start_of, first, numel, cols, ld, address, factors,
           b1, b2, eps, COPY: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    block = tl.program_id(0)
    i = tl.load(tensor_of + block)
    e = tl.load(start_of + block) + tl.arange(0, BLOCK)
    inside = e < tl.load(numel + i)
    at = tl.load(first + i) + e
    t = tl.load(step)
    rate = tl.load(lr) * tl.load(factors + 3 * i + 1)
    grad = tl.load(g + at, mask=inside, other=0.0) * tl.load(grad_scale)
    w = tl.load(p + at, mask=inside, other=0.0)
    w -= rate * tl.load(factors + 3 * i + 2) * w
    m1 = b1 * tl.load(m + at, mask=inside, other=0.0) + (1 - b1) * grad
    m2 = b2 * tl.load(v + at, mask=inside, other=0.0) + (1 - b2) * grad * grad
    c1 = 1 - tl.exp2(t * tl.log2(b1))
    c2 = 1 - tl.exp2(t * tl.log2(b2))
    w -= rate * (m1 / c1) / (tl.sqrt(m2 / c2) + eps)
    tl.store(p + at, w, mask=inside)
    tl.store(m + at, m1, mask=inside)
    tl.store(v + at, m2, mask=inside)
    n = tl.load(cols + i)
    copy = tl.load(address + i).to(tl.pointer_type(COPY))
    tl.store(copy + (e // n) * tl.load(ld + i) + e % n, (w * tl.load(factors + 3 * i)).to(COPY), mask=inside)


@jit
def _copies(tensor_of, start_of, numel, cols, ld, source, address, scales, COPY: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    i = tl.load(tensor_of + block)
    e = tl.load(start_of + block) + tl.arange(0, BLOCK)
    inside = e < tl.load(numel + i)
    w = tl.load(tl.load(source + i).to(tl.pointer_type(tl.float32)) + e, mask=inside, other=0.0) * tl.load(scales + i)
    n = tl.load(cols + i)
    copy = tl.load(address + i).to(tl.pointer_type(COPY))
    tl.store(copy + (e // n) * tl.load(ld + i) + e % n, w.to(COPY), mask=inside)


class Refresher:
    """Rewrites every compute copy from its master, times its scale: one launch for all tensors of a GPU."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)
        self.copies, self.scales = [s.copy for s in self.slots], [s.scale for s in self.slots]
        self._tables: dict[tuple[int, ...], tuple[Tensor, ...]] = {}  # by the masters' addresses: one an adapter

    @torch.no_grad()
    def __call__(self, masters: Sequence[Tensor]) -> None:
        """Compute copies <- masters, which are fp32 [rows, cols], one a slot."""
        sources = tuple(map(Tensor.data_ptr, masters))
        tables = self._tables.get(sources)
        if tables is None and self._fits(masters):
            tables = self._tables[sources] = self._table(sources)
        if tables is not None:
            copy = _TL_DTYPE[self.slots[0].copy.dtype]()
            _copies[(tables[0].numel(),)](*tables, COPY=copy, BLOCK=BLOCK, num_warps=4)
        elif self.slots:
            for start in range(0, len(self.slots), CHUNK):
                part = slice(start, start + CHUNK)
                torch._foreach_copy_(self.copies[part], torch._foreach_mul(list(masters[part]), self.scales[part]))

    def _fits(self, masters: Sequence[Tensor]) -> bool:
        """Whether the kernel reads these masters (asked once an address: memory changes its type only by moving)."""
        fp32 = all(m.dtype == torch.float32 and m.is_contiguous() for m in masters)
        return bool(self.slots) and fp32 and self.slots[0].copy.dtype in _TL_DTYPE and use_triton(self.slots[0].copy)

    def _table(self, sources: tuple[int, ...]) -> tuple[Tensor, ...]:
        device = self.slots[0].copy.device
        blocks = [(i, e) for i, s in enumerate(self.slots) for e in range(0, s.numel, BLOCK)]
        columns: tuple[list[int], ...] = (
            [i for i, _ in blocks], [e for _, e in blocks], [s.numel for s in self.slots],
            [s.shape[1] for s in self.slots], [s.copy.stride(0) for s in self.slots], list(sources),
            [s.copy.data_ptr() for s in self.slots],
        )  # fmt: skip
        scales = torch.tensor([s.scale for s in self.slots], dtype=torch.float32, device=device)
        return (*(torch.tensor(c, dtype=torch.int64, device=device) for c in columns), scales)


class FlatAdamW:
    """AdamW over `slots`; the masters become views of `self.flat`, their gradients are views of `self.grad`.

    Args:
        masters: fp32 parameters [rows, cols], one a slot; their storage is replaced by a view of the flat buffer.
        lr, betas, eps: as in torch.optim.AdamW. `self.lr` is a device tensor: fill it to follow a schedule.
        after: run whenever the compute copies have been rewritten, for what else is made of the masters (DoRA's norms).
    """

    def __init__(
        self,
        masters: Sequence[Tensor],
        slots: Sequence[Slot],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        after: Callable[[], None] | None = None,
    ) -> None:
        self.after = after
        device = slots[0].copy.device
        sizes = [slot.numel for slot in slots]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.slots, self.betas, self.eps = list(slots), betas, eps
        self._refresher = Refresher(slots)
        self.flat = torch.cat([p.detach().float().reshape(-1) for p in masters]).to(device)
        self.grad, self.m, self.v = (torch.zeros_like(self.flat) for _ in range(3))
        self.lr = torch.tensor([lr], dtype=torch.float32, device=device)
        self.steps = torch.zeros(1, dtype=torch.float32, device=device)
        self.grad_scale = torch.ones(1, dtype=torch.float32, device=device)
        self.masters = [f.view(s.shape) for f, s in zip(self.flat.split(sizes), slots, strict=True)]
        self.grads = [f.view(s.shape) for f, s in zip(self.grad.split(sizes), slots, strict=True)]
        for p, view in zip(masters, self.masters, strict=True):
            p.data = view.view(p.shape)
        blocks = [(i, e) for i, n in enumerate(sizes) for e in range(0, n, BLOCK)]

        def as_long(values):
            return torch.tensor(values, dtype=torch.int64, device=device)

        self._table = (
            as_long([i for i, _ in blocks]),
            as_long([e for _, e in blocks]),
            as_long(starts),
            as_long(sizes),
            as_long([s.shape[1] for s in slots]),
            as_long([s.copy.stride(0) for s in slots]),
            as_long([s.copy.data_ptr() for s in slots]),
            torch.tensor([[s.scale, s.lr_ratio, s.weight_decay] for s in slots], dtype=torch.float32, device=device),
        )
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Rewrite every compute copy from the masters (after loading new ones)."""
        self._refresher(self.masters)
        if self.after is not None:
            self.after()

    @torch.no_grad()
    def step(self) -> None:
        """One update from `self.grad`, times `self.grad_scale` (a clipping factor, say)."""
        self.steps.add_(1)
        if use_triton(self.flat):
            _adamw[(self._table[0].numel(),)](
                self.flat, self.grad, self.m, self.v, self.lr, self.steps, self.grad_scale,
                *self._table, *self.betas, self.eps,
                COPY=_TL_DTYPE[self.slots[0].copy.dtype](), BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
            if self.after is not None:
                self.after()
            return
        b1, b2 = self.betas
        for slot, p, g, m, v in zip(
            self.slots, self.masters, self.grads, self._like(self.m), self._like(self.v), strict=True
        ):
            rate, g = self.lr * slot.lr_ratio, g * self.grad_scale
            p.sub_(p * (rate * slot.weight_decay))
            m.lerp_(g, 1 - b1)
            v.lerp_(g * g, 1 - b2)
            p.sub_(rate * (m / (1 - b1**self.steps)) / ((v / (1 - b2**self.steps)).sqrt() + self.eps))
        self.refresh()

    def _like(self, flat: Tensor) -> list[Tensor]:
        return [f.view(s.shape) for f, s in zip(flat.split([s.numel for s in self.slots]), self.slots, strict=True)]


_TL_DTYPE = {
    torch.bfloat16: lambda: tl.bfloat16,
    torch.float16: lambda: tl.float16,
    torch.float32: lambda: tl.float32,
}
