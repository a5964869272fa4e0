"""Cross-entropy through a large frozen head without keeping logits: loss and hidden gradient of each chunk at once.

A chunk's logits [rows, V] are one GEMM; one kernel turns them in place into the softmax gradient and leaves the rows'
losses; a second GEMM gives the hidden gradient. 4 h V FLOPs a token and no recomputation, so the backward of the loss
is only a product with the incoming gradient. Chunks of 1,024 rows or more are GEMM bound (measured: 128-row chunks
run at half the rate).
"""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft.kernels.dispatch import use_triton
from mmpeft.kernels.tritonlib import jit, tl, triton


@jit
def _softmax_gradient(logits, labels, scale, loss, ld, ignore, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    base = logits + row * ld
    cols = tl.arange(0, BLOCK)
    if label == ignore:
        tl.store(loss + row, 0.0)
        for start in range(0, V, BLOCK):
            tl.store(base + start + cols, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=start + cols < V)
    else:
        top = tl.full((BLOCK,), float("-inf"), tl.float32)  # a running maximum and sum for every lane
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            v = tl.load(base + start + cols, mask=start + cols < V, other=float("-inf")).to(tl.float32)
            new = tl.maximum(tl.maximum(top, v), -1e30)
            total = total * tl.exp(top - new) + tl.exp(v - new)
            top = new
        peak = tl.max(top, 0)
        lse = peak + tl.log(tl.sum(total * tl.exp(top - peak), 0))
        tl.store(loss + row, lse - tl.load(base + label).to(tl.float32))
        tl.debug_barrier()  # the label's logit is read before any lane overwrites it
        s = tl.load(scale)
        for start in range(0, V, BLOCK):
            inside = start + cols < V
            v = tl.load(base + start + cols, mask=inside, other=float("-inf")).to(tl.float32)
            p = tl.exp(v - lse)
            p = tl.where(start + cols == label, p - 1.0, p) * s
            tl.store(base + start + cols, p.to(logits.dtype.element_ty), mask=inside)


def softmax_gradient_(logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int = -100) -> Tensor:
    """Overwrites logits [N, V] with scale * (softmax - onehot); returns the rows' losses [N], fp32, 0 where ignored.

    `scale` is a tensor of one element (the upstream gradient over the token count), so nothing waits for the device.
    """
    N, V = logits.shape
    if use_triton(logits):
        loss = torch.empty(N, dtype=torch.float32, device=logits.device)
        if N:
            # 1,024 threads with 16 values each: one row a multiprocessor, so the second pass finds its 2V bytes in L2
            block = min(16384, triton.next_power_of_2(V))
            _softmax_gradient[(N,)](
                logits,
                labels,
                scale,
                loss,
                logits.stride(0),
                ignore_index,
                V=V,
                BLOCK=block,
                num_warps=32 if block == 16384 else 8,
            )
        return loss
    keep = labels != ignore_index
    target = torch.where(keep, labels, 0)[:, None]
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    loss = torch.where(keep, -log_p.gather(1, target)[:, 0], 0)
    gradient = log_p.exp().scatter_add_(1, target, torch.full_like(target, -1, dtype=log_p.dtype)) * scale
    logits.copy_(torch.where(keep[:, None], gradient, 0))
    return loss


def head_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, *, ignore_index: int = -100, chunk_rows: int = 1024
) -> tuple[Tensor, Tensor]:
    """(sum of losses * scale, its gradient by hidden [N, h]) for logits = hidden weight^T; weight [V, h] is frozen."""
    gradient, losses = torch.empty_like(hidden), []
    for start in range(0, hidden.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = torch.mm(hidden[rows], weight.mT)
        losses.append(softmax_gradient_(logits, labels[rows], scale, ignore_index))
        torch.mm(logits, weight, out=gradient[rows])
        del logits
    return torch.cat(losses).sum() * scale.reshape(()), gradient
