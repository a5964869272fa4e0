"""Self-attention, causal or not, for hand-written backwards: forward and backward as plain functions on [B, S, H, D] views.

cuDNN, flash or, for few tokens without a mask, `short_attention` (or its backward after cuDNN's forward) does the work,
whichever is faster for the shape on this device (measured once a shape; on an H100 cuDNN is up to 1.9 times flash at
head dim 128), with grouped key/value heads read in place. On CPU the reference is `F.scaled_dot_product_attention`,
recomputed under autograd in the backward.

The gradients go where the caller wants them (`out`): `short_attention` writes them there, from others they are copied.

Packed documents (`documents.Documents`) attend causally, each within itself: by flash's varlen kernels, which torch's
`nn.attention.varlen` calls too, so that no mask is read and no work is done between documents; elsewhere by the
reference under a mask [B, 1, S, S].
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.kernels import short_attention, tuning
from mmpeft.kernels.dispatch import use_triton
from mmpeft.kernels.documents import Documents

aten = torch.ops.aten
Grads = tuple[Tensor, Tensor, Tensor]


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True, documents: Documents | None = None, *,
    keep: bool = True,
) -> tuple[Tensor, tuple[Any, ...]]:  # fmt: skip
    """q [B, S, Hq, D], k, v [B, S, Hk, D] -> (o [B, S, Hq, D], what backward needs besides q, k, v, o).

    With `documents`, whose attention is always causal, o's tokens see those of their own document only. Without `keep`
    no backward follows: the kernel is the one that is faster forward.
    """
    if documents is not None:
        return _PACKED[packed_kind(q)][0](q, k, v, scale, documents)
    return _forward_by(_kind(q, k, causal, keep), q, k, v, scale, causal, keep)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...], scale: float, causal: bool = True,
    documents: Documents | None = None, *, out: Grads | None = None,
) -> Grads:  # fmt: skip
    """Gradients of q, k, v, each [B, S, H, D]: in `out`, views of any buffer, or where the kernel left them."""
    if documents is not None:
        return _put(_PACKED[packed_kind(q)][1](do, q, k, v, o, saved, scale, documents), out)
    return _backward_by(_kind(q, k, causal), do, q, k, v, o, saved, scale, causal, out)


def _forward_by(
    kind: str, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, keep: bool
) -> tuple[Tensor, tuple[Any, ...]]:
    if kind == "short":
        o, lse = short_attention.forward(q, k, v, scale, keep=keep)
        return o, (lse,)
    if kind == "mixed":
        o, (lse, *_) = _FORWARD["cudnn"](q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, causal)
        return o, (lse.reshape(-1, q.shape[1]) / math.log(2),)  # [B Hq, S], to base 2 as our backward takes it
    return _FORWARD[kind](q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, causal)


def _backward_by(
    kind: str, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...], scale: float,
    causal: bool, out: Grads | None,
) -> Grads:  # fmt: skip
    if kind in SHORT:
        return short_attention.backward(do, q, k, v, o, saved[0], scale, out=out)
    do, q, k, v, o = (t.transpose(1, 2) for t in (do, q, k, v, o))
    dq, dk, dv = _BACKWARD[kind](do, q, k, v, o, saved, scale, causal)
    return _put((dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)), out)


def _put(grads: Grads, out: Grads | None) -> Grads:
    if out is None:
        return grads
    for d, made in zip(out, grads, strict=True):
        d.copy_(made)
    return out


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, tuple[Any, ...]]:
    o, *saved = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return o.transpose(1, 2), tuple(saved)


def _cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...], scale: float, causal: bool
) -> Grads:
    lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, causal, scale=scale
    )
    return dq, dk, dv


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, tuple[Any, ...]]:
    o, *saved = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return o.transpose(1, 2), tuple(saved)


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...], scale: float, causal: bool
) -> Grads:
    lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset, scale=scale
    )
    return dq, dk, dv


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, tuple[Any, ...]]:
    gqa = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa)
    return o.transpose(1, 2), ()


def _torch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...], scale: float, causal: bool
) -> Grads:
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        again, _ = _torch(q, k, v, scale, causal)
        dq, dk, dv = torch.autograd.grad(again, [q, k, v], do.transpose(1, 2))
    return dq, dk, dv


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents) -> tuple[Tensor, tuple[Any, ...]]:
    starts, longest = documents.starts, documents.longest
    lines = (t.flatten(0, 1) for t in (q, k, v))
    o, *saved = aten._flash_attention_forward(*lines, starts, starts, longest, longest, 0.0, True, False, scale=scale)
    return o.view(q.shape), (saved[0], saved[1], saved[2])  # log-sum-exp, and the random state that dropout would need


def _varlen_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...], scale: float, documents: Documents
) -> Grads:
    starts, longest, (lse, state, unused) = documents.starts, documents.longest, saved
    lines = (t.flatten(0, 1) for t in (do, q, k, v, o))
    grads = aten._flash_attention_backward(
        *lines, lse, starts, starts, longest, longest, 0.0, True, state, unused, scale=scale
    )
    dq, dk, dv = (d.view(t.shape) for d, t in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


def _masked(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents) -> tuple[Tensor, tuple[Any, ...]]:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa, mask = q.shape[1] != k.shape[1], documents.mask(q.shape[2])
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return o.transpose(1, 2), ()


def _masked_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: tuple[Any, ...], scale: float, documents: Documents
) -> Grads:
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        again, _ = _masked(q, k, v, scale, documents)
        dq, dk, dv = torch.autograd.grad(again, [q, k, v], do)
    return dq, dk, dv


_PACKED = {"varlen": (_varlen, _varlen_backward), "masked": (_masked, _masked_backward)}


def packed_kind(q: Tensor) -> str:
    """How packed documents attend: flash's "varlen" kernels, or the "masked" reference. q: [..., D]."""
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    return "varlen" if half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 else "masked"


SHORT = ("short", "mixed")  # both ways in `short_attention`; cuDNN's forward before its backward
_FORWARD = {"cudnn": _cudnn, "flash": _flash, "torch": _torch}
_BACKWARD = {"cudnn": _cudnn_backward, "flash": _flash_backward, "torch": _torch_backward}


def _kind(q: Tensor, k: Tensor, causal: bool, keep: bool = True) -> str:
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return "torch"
    return pick(*q.shape, k.shape[2], q.dtype, q.device.index or 0, causal, keep, triton=use_triton(q))


@functools.cache
def pick(
    B: int, S: int, HQ: int, D: int, HK: int, dtype: torch.dtype, device: int, causal: bool, keep: bool = True, *,
    triton: bool = False,
) -> str:  # fmt: skip
    """The fastest of cuDNN, flash and, with `triton`, `short_attention` (its backward alone or both) at this shape, timed
    once a device on random views of one qkv: forward and backward, or forward alone where nothing is kept. Where the last
    is in question, the gradients' way into a wide buffer is part of the time."""
    place = torch.device("cuda", device)
    short = triton and not causal and HQ == HK and short_attention.fits(S, D, dtype)

    @functools.cache  # made only if something is timed
    def data() -> tuple[list[Tensor], Tensor, Grads | None]:
        make = functools.partial(torch.randn, dtype=dtype, device=place)
        heads = [HQ, HK, HK]
        q, k, v = make(B, S, sum(heads), D).split_with_sizes(heads, 2)
        dq, dk, dv, _ = make(B, S, sum(heads) + 1, D).split_with_sizes([*heads, 1], 2)
        return [q, k, v], make(B, S, HQ, D), (dq, dk, dv) if short else None

    def run(kind: str) -> tuple[Tensor, ...]:
        (q, k, v), do, out = data()
        o, saved = _forward_by(kind, q, k, v, D**-0.5, causal, keep)
        return (o, *_backward_by(kind, do, q, k, v, o, saved, D**-0.5, causal, out)) if keep else (o,)

    def results(kind: str) -> list[Tensor]:
        return [t.clone() for t in run(kind)]  # the next run writes into the same buffer

    candidates = {kind: functools.partial(run, kind) for kind in ("cudnn", "flash", *SHORT[: short * (1 + keep)])}
    with torch.cuda.device(device):
        op = "attention" + "_forward" * (not keep) + "_views" * short
        return tuning.choose(
            op, (B, S, HQ, D, HK, dtype, causal), candidates, place, otherwise="torch", timer=tuning.device_milliseconds,
            proof=("cudnn", results) if short else None,
        )  # fmt: skip
