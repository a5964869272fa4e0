"""Integrate-and-fire as a segmented sum in linear time: frames along accumulated weight, cut at every whole number.

With c = cumsum(w) and p = c - w, frame t covers [p_t, c_t] and token j is the sum over [j, j + 1] of the frames, each by
the length of its overlap. A frame gives to at most two tokens a part of itself (the one it begins in and the one it ends
in), and to those between, which it fills alone, all of it. So two scatters over frames and one gather over tokens do, in
O((T + J) D) time and memory instead of the O(T J D) of the overlap matrix; no differences of prefix sums, which would
cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def integrate(frames: Tensor, weights: Tensor, num_tokens: int) -> Tensor:
    """Frames [B, T, D] and weights [B, T] >= 0 -> the first `num_tokens` tokens [B, J, D], in fp32 or wider;
    differentiable in both."""
    wide = torch.float64 if torch.float64 in (weights.dtype, frames.dtype) else torch.float32
    w, x = weights.to(wide), frames.to(wide)
    end = w.cumsum(1)
    begin = end - w
    first, last = begin.detach().floor().clamp_min(0), end.detach().floor()
    head = torch.minimum(end, first + 1) - begin  # of the token it begins in
    tail = torch.where(last > first, end - last, 0.0)  # of the token it ends in
    out = x.new_zeros(x.shape[0], num_tokens + 1, x.shape[2])  # what fires later goes into the last row, dropped below
    for token, part in ((first, head), (last, tail)):
        place = token.clamp_max(num_tokens).long().unsqueeze(-1).expand_as(x)
        out = out.scatter_add(1, place, part.unsqueeze(-1) * x)
    out = out[:, :num_tokens]
    if not x.shape[1]:
        return out
    token = torch.arange(num_tokens, device=w.device, dtype=wide).expand(len(w), -1)
    frame = torch.searchsorted(end.detach(), token + 1).clamp_max(x.shape[1] - 1)  # [B, J], the one that completes it
    whole = (first.gather(1, frame) < token) & (end.detach().gather(1, frame) >= token + 1)
    return out + x.gather(1, frame.unsqueeze(-1).expand(-1, -1, x.shape[2])) * whole.unsqueeze(-1)
