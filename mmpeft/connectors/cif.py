"""Continuous integrate-and-fire (CIF) in closed form: frames with weights become tokens where the weights add up to 1.

With c = cumsum(w) and p = c - w, frame t covers the interval [p_t, c_t] of accumulated weight and token j the interval
[j, j + 1]; the token is the sum of the frames weighted by the length of the overlap,
W[j, t] = relu(min(c_t, j + 1) - max(p_t, j)). The sums take linear time (`kernels.segmented`); no loop, several
firings within one frame (w > 1) included, and nothing after a sample's last valid frame can matter, because its weight
is 0.

Paper: Dong and Xu, CIF: Continuous Integrate-and-Fire for End-to-End Speech Recognition, 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.kernels import segmented

TAIL = 0.5  # what is left after the last full token becomes a token when it is more than this


def overlap(weights: Tensor, num_tokens: int) -> Tensor:
    """Weights [B, T] >= 0 -> overlap matrix [B, num_tokens, T] (fp32 or wider: cumulative sums need it)."""
    weights = weights if weights.dtype == torch.float64 else weights.float()
    after = weights.cumsum(1).unsqueeze(1)
    before = after - weights.unsqueeze(1)
    token = torch.arange(num_tokens, device=weights.device, dtype=weights.dtype)[:, None]
    return (torch.minimum(after, token + 1) - torch.maximum(before, token)).clamp_min(0)


def integrate(frames: Tensor, weights: Tensor, num_tokens: int) -> Tensor:
    """Frames [B, T, D] and weights [B, T] -> the first `num_tokens` tokens [B, num_tokens, D], in the frames' dtype."""
    return segmented.integrate(frames, weights, num_tokens).to(frames.dtype)


def scale_weights(weights: Tensor, lengths: Tensor) -> Tensor:
    """Scale weights [B, T] so that each row sums to its length [B]; a row of zeros stays zero."""
    total = weights.sum(1, keepdim=True)
    return weights * (lengths.to(weights.dtype).unsqueeze(1) / total.clamp_min(torch.finfo(weights.dtype).tiny))


def fire(frames: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As many tokens as the weights say: [B, T, D], [B, T] -> tokens [B, J, D] and their mask [B, J].

    J is the largest count in the batch (reading it synchronises with the device). A rest above one half fires a last
    token, normalised to weight 1.
    """
    if (weights < 0).any():
        raise ConfigError("CIF weights must not be negative")
    total = weights.double().sum(1)
    counts = total.floor() + (total - total.floor() > TAIL)
    most = max(1, int(counts.max()))
    tokens = segmented.integrate(frames, weights, most)
    sums = segmented.integrate(torch.ones_like(frames[..., :1]), weights, most)
    tokens = (tokens / sums.clamp_min(TAIL)).to(frames.dtype)  # only a last, partial token has a sum below 1
    mask = torch.arange(most, device=weights.device) < counts.unsqueeze(1)
    return tokens.masked_fill(~mask.unsqueeze(-1), 0.0), mask


def quantity_loss(weights: Tensor, lengths: Tensor) -> Tensor:
    """Mean absolute difference between each row's sum of weights [B, T] and its target length [B]; a scalar."""
    return (weights.sum(1) - lengths.to(weights.dtype)).abs().mean()
