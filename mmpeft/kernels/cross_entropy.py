"""Linear cross-entropy: the language-model head and its loss as one operation that never keeps the logits.

The logits of a vocabulary of 50k to 250k are the largest tensor of a training step, and a fine-tuning step needs them at
few positions. Choices made here:

- Only supervised rows (label != `ignore_index`) are computed at all.
- Rows go through the head `chunk_rows` at a time. Each chunk's logits give the loss and at once the gradient of the
  hidden states, [chunk, V] is then dropped; backward only scales what forward left (the Liger and TRL approach).
- The gradient of the head's weight (and bias) is computed only if it asks for one: a frozen head costs no matmul for it
  and no [V, H] buffer. Over several chunks a low-precision weight gradient is accumulated in fp32.
- With a frozen plain head in half precision on a GPU, softmax and gradient are one kernel over the logits (`xent`).
- Matmuls run in the dtype of the inputs, softmax and loss in fp32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft.errors import ConfigError, nearest
from mmpeft.kernels.dispatch import forced, use_triton

REDUCTIONS = ("sum", "mean")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    chunk_rows: int = 1024,
    reduction: str = "sum",
    logit_scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T + bias) against `labels`, without keeping the logits.

    Args:
        hidden: [N, H], the states that predict `labels` (the caller has shifted them already).
        weight: [V, H], the head.
        labels: [N] int64 in [0, V), or `ignore_index` for rows that are not supervised.
        ignore_index: None = every row is supervised; then nothing is filtered and an accelerator is never waited for.
        bias: [V] or None.
        chunk_rows: rows of logits alive at a time, [chunk_rows, V].
        reduction: "sum", or "mean" over the supervised rows (0 when there are none).
        logit_scale: multiplies the logits (Cohere; Granite divides, so it is 1 / `logits_scaling`).
        softcap: logits become softcap * tanh(logits / softcap), after the scale (Gemma 2).

    Returns:
        The loss, a scalar in fp32 (float64 for float64 inputs). Differentiable once, with respect to hidden, weight, bias.

    Raises:
        ConfigError: shapes that do not fit, labels that are not int64 or (seen on CPU) outside [0, V), an unknown reduction.
    """
    _check(hidden, weight, labels, bias, chunk_rows, reduction, logit_scale, softcap)
    if ignore_index is not None:
        rows = (labels != ignore_index).nonzero().squeeze(1)
        if rows.numel() < labels.numel():
            hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    if labels.numel() and labels.device.type == "cpu" and not 0 <= labels.min() <= labels.max() < weight.shape[0]:
        raise ConfigError(f"labels must be in [0, {weight.shape[0]}), given {labels.min()} to {labels.max()}")
    apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
    total = apply(hidden, weight, bias, labels, chunk_rows, logit_scale or 1.0, softcap)
    return total if reduction == "sum" else total / max(labels.numel(), 1)


def postprocess_logits(logits: Tensor, *, logit_scale: float | None = None, softcap: float | None = None) -> Tensor:
    """Scale, then softcap, logits [..., V] as models with `logit_scale` or `final_logit_softcapping` do."""
    if logit_scale is not None:
        logits = logits * logit_scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the rows' losses. Every row is supervised; gradients are made in forward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_rows: int,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        plain = bias is None and scale == 1.0 and softcap is None
        if wants_hidden and plain and not (wants_weight or wants_bias) and _kernel(hidden):
            from mmpeft.kernels.xent import head_loss

            one = torch.ones(1, dtype=torch.float32, device=hidden.device)
            total, gradient = head_loss(hidden, weight, labels, one, chunk_rows=chunk_rows)
            ctx.save_for_backward(gradient, None, None)
            ctx.dtypes = weight.dtype, None
            return total
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        several = hidden.shape[0] > chunk_rows
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact if several else weight.dtype) if wants_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=exact) if wants_bias else None
        total = torch.zeros((), dtype=exact, device=hidden.device)

        for start in range(0, hidden.shape[0], chunk_rows):
            part = slice(start, start + chunk_rows)
            raw = F.linear(hidden[part], weight, bias).to(exact)  # [chunk, V]
            logits = raw.mul_(scale) if scale != 1.0 else raw
            capped: Tensor | None = None
            if softcap is not None:
                capped = torch.tanh(logits / softcap)
                logits = capped * softcap
            target = labels[part].unsqueeze(1)
            normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (normaliser - logits.gather(1, target)).sum()
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            # d loss / d logits = softmax - one-hot, in place of the logits; then back through cap and scale
            grad = torch.sub(logits, normaliser, out=logits).exp_()
            grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            if capped is not None:
                grad *= 1 - capped.square()
            if scale != 1.0:
                grad *= scale
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            low = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = low @ weight
            if grad_weight is not None:
                grad_weight += (low.t() @ hidden[part]).to(grad_weight.dtype)

        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        scaled = (
            None if grad is None else (grad * grad_output.to(grad.dtype)).to(dtype)
            for grad, dtype in ((hidden, getattr(hidden, "dtype", None)), (weight, weight_dtype), (bias, bias_dtype))
        )
        return *scaled, None, None, None, None


def _kernel(hidden: Tensor) -> bool:
    """Whether the softmax and its gradient are one Triton kernel over a chunk's logits (`xent`)."""
    half = hidden.dtype in (torch.bfloat16, torch.float16) or forced() == "triton"
    return half and hidden.dtype != torch.float64 and hidden.shape[0] > 0 and use_triton(hidden)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunk_rows: int,
    reduction: str,
    logit_scale: float | None,
    softcap: float | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ConfigError(
            f"expected hidden [N, H] and weight [V, H], given {list(hidden.shape)} and {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ConfigError(f"expected int64 labels [{hidden.shape[0]}], given {labels.dtype} {list(labels.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigError(f"expected bias [{weight.shape[0]}], given {list(bias.shape)}")
    if chunk_rows < 1:
        raise ConfigError(f"chunk_rows must be 1 or more, given {chunk_rows}")
    if reduction not in REDUCTIONS:
        raise ConfigError(
            f"unknown reduction {reduction!r}; valid: {', '.join(REDUCTIONS)}{nearest(reduction, REDUCTIONS)}"
        )
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if value is not None and not 0.0 < value < float("inf"):
            raise ConfigError(f"{name} must be positive and finite, or None for none, given {value}")
