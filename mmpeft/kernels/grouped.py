"""Many adapters in one batch: every row of the batch adds the update of its own adapter, found by an index on the device.

    y[b] += (x[b] A[i_b]^T) B[i_b]^T      x [N, T, in], A [n, r, in], B [n, out, r], index [N]; i_b >= n is the base

A row of the batch is one adapter, so a tile of it reads one A and one B where they lie in the stacks: nothing is
sorted, gathered or copied, and nothing waits for the device (a CUDA graph replays with another index). Decoding (T = 1)
is the same program with one row a tile: the time is that of reading the factors. The shrink sums over slices of `in`
(two passes in a fixed order, no atomics). With gradients the gathered batched products run, which autograd knows.

`shrink` alone, for linears that share their input: the expansion is then left to whatever reads y next (`expand`). All
members' A lie one under the other in a `Stack`, so it is one launch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.kernels.dispatch import forced, use_triton

FEW_ROWS = 512  # up to here a shrink runs beside its product


class Stack(NamedTuple):
    """n adapters of linears that share their input, in the weights' dtype.

    A: [n, R, in], the members' rows one under the other. B: [n, out, r], scales included; the outputs of each member use
    as many of its columns as the member has ranks. ranks: of the members, the largest of any adapter; their sum is R.
    """

    A: Tensor
    B: Tensor
    ranks: list[int]


def add_grouped(y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor) -> Tensor:
    """y [N, ..., out] plus each row's own update; y may be overwritten where nothing asks for gradients.

    Args:
        x: [N, ..., in]. A: [n, r, in], B: [n, out, r], scales included, of any float dtype.
        index: int64 [N] on x's device; n or more adds nothing.

    Raises:
        ConfigError: shapes that do not fit.
    """
    if x.shape[:1] != index.shape or y.shape[:-1] != x.shape[:-1] or A.shape[:2] != (B.shape[0], B.shape[2]):
        raise ConfigError(
            f"y {tuple(y.shape)}, x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, index {tuple(index.shape)}; "
            "expected y [N, ..., out], x [N, ..., in], A [n, r, in], B [n, out, r], index [N]"
        )
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, A, B))
    half = x.dtype in (torch.bfloat16, torch.float16) or forced() == "triton"
    if grad or not half or y.dtype != x.dtype or x.dtype == torch.float64 or not use_triton(x) or not x.numel():
        return reference(y, x, A, B, index)
    torch.ops.mmpeft.add_grouped_(y, x, A, B, index)
    return y


def shrink(x: Tensor, A: Tensor, index: Tensor, out: Tensor) -> None:
    """out [T, R] = x [T, in] times A^T of each of N equal runs of rows' own A [n, R, in], by index [N]; 0 for the base."""
    if use_triton(x):
        from mmpeft.kernels import grouped_kernels

        return grouped_kernels.shrink(x, A, index, out)
    there = (index < A.shape[0]).to(x.dtype)
    own = A[index.clamp_max(A.shape[0] - 1)] * there[:, None, None]
    out.copy_(torch.bmm(x.view(len(index), -1, x.shape[1]), own.mT).flatten(0, 1))


@contextmanager
def beside(x: Tensor) -> Iterator[AbstractContextManager[Any]]:
    """Within it, what runs under the context that this gives may run beside the rest, and both are done at its end.

    Two branches of a CUDA graph while one is captured, for few rows x [T, in]: a product of so few leaves most of the
    device idle. In order elsewhere.
    """
    if not x.is_cuda or x.shape[0] > FEW_ROWS:
        yield nullcontext()
        return
    main, other = torch.cuda.current_stream(x.device), _other_stream(x.device)
    if not torch.cuda.is_current_stream_capturing():
        yield nullcontext()
        return
    other.wait_stream(main)
    yield torch.cuda.stream(other)
    main.wait_stream(other)  # before anything that was read there can be freed


@functools.cache
def _other_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def reference(y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor) -> Tensor:
    """The same by gathered batched products, differentiable in y, x, A and B."""
    there = (index < A.shape[0]).to(x.dtype)
    index = index.clamp_max(A.shape[0] - 1)
    flat = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
    s = torch.bmm(flat, A.to(x.dtype)[index].mT) * there[:, None, None]
    return y + torch.bmm(s, B.to(x.dtype)[index].mT).view(y.shape)


@torch.library.custom_op("mmpeft::add_grouped_", mutates_args=("y",))
def _add_grouped(y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor) -> None:
    from mmpeft.kernels import grouped_kernels

    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    out = y if y.ndim == 3 else y.view(y.shape[0], -1, y.shape[-1]) if y.ndim > 3 else y.unsqueeze(1)
    grouped_kernels.add_grouped(out, rows, A, B, index)


@_add_grouped.register_fake
def _(y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor) -> None:
    return None
