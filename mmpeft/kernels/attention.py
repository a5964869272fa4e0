"""Causal self-attention for hand-written backwards: forward and backward as plain functions on [B, S, H, D] views.

torch's own kernels do the work: cuDNN or flash, whichever is faster for the shape on this device (measured once a
shape, on an H100 cuDNN is up to 1.9 times flash at head dim 128), with grouped key/value heads read in place. On CPU
the reference is `F.scaled_dot_product_attention`, recomputed under autograd in the backward.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger("mmpeft.kernels")
aten = torch.ops.aten


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, tuple[Any, ...]]:
    """q [B, S, Hq, D], k, v [B, S, Hk, D] -> (o [B, S, Hq, D], what backward needs besides q, k, v, o)."""
    return _FORWARD[_kind(q, k)](q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, each [B, S, H, D] (strides as the kernel left them)."""
    do, qh, kh, vh, o = (t.transpose(1, 2) for t in (do, q, k, v, o))
    dq, dk, dv = _BACKWARD[_kind(q, k)](do, qh, kh, vh, o, saved, scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, tuple[Any, ...]]:
    o, *saved = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    return o.transpose(1, 2), tuple(saved)


def _cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, True, scale=scale
    )
    return dq, dk, dv


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, tuple[Any, ...]]:
    o, *saved = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return o.transpose(1, 2), tuple(saved)


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset, scale=scale
    )
    return dq, dk, dv


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, tuple[Any, ...]]:
    gqa = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    return o.transpose(1, 2), ()


def _torch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        again, _ = _torch(q, k, v, scale)
        dq, dk, dv = torch.autograd.grad(again, [q, k, v], do.transpose(1, 2))
    return dq, dk, dv


_FORWARD = {"cudnn": _cudnn, "flash": _flash, "torch": _torch}
_BACKWARD = {"cudnn": _cudnn_backward, "flash": _flash_backward, "torch": _torch_backward}


def _kind(q: Tensor, k: Tensor) -> str:
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return "torch"
    return pick(*q.shape, k.shape[2], q.dtype, q.device.index or 0)


@functools.cache
def pick(B: int, S: int, HQ: int, D: int, HK: int, dtype: torch.dtype, device: int) -> str:
    """The faster of cuDNN and flash for forward and backward at this shape, timed once on random data."""
    with torch.cuda.device(device):
        qkv = torch.randn(B, S, HQ + 2 * HK, D, dtype=dtype, device="cuda")
        q, k, v = qkv.split_with_sizes([HQ, HK, HK], 2)
        times: dict[str, float] = {}
        for kind in ("cudnn", "flash"):
            try:
                times[kind] = min(_time(kind, q, k, v) for _ in range(3))
            except RuntimeError as error:
                log.info("attention: %s cannot run at %s (%s)", kind, (B, S, HQ, HK, D), str(error).split("\n")[0])
    best = min(times, key=times.__getitem__, default="torch")
    log.info("attention at %s: %s (%s)", (B, S, HQ, HK, D), best, {k: f"{t:.3f} ms" for k, t in times.items()})
    return best


def _time(kind: str, q: Tensor, k: Tensor, v: Tensor) -> float:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    o, saved = _FORWARD[kind](q, k, v, 0.1)
    _BACKWARD[kind](o.transpose(1, 2), q, k, v, o.transpose(1, 2), saved, 0.1)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
