"""The two pieces every attending connector shares: masked attention as a pure function, and its mask.

The maths is PyTorch's `scaled_dot_product_attention`. A bool mask with True = "may attend" is the package's rule and
SDPA's too. A query that may attend to nothing (an empty clip in a batch) gives zeros here on every device and backend,
where plain SDPA gives NaN or zeros depending on which of its kernels runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, heads: int, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Multi-head attention of [B, Q, D] over [B, T, D] -> [B, Q, D].

    Args:
        query: [B, Q, D]; key, value: [B, T, D], already projected; D = heads * head width.
        mask: bool [B, T] (per key) or [B, Q, T] (per pair), True = may attend; None = everything.
        dropout: probability on the attention weights (pass 0 in eval).
    """
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
    if mask is None:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    else:
        pairs = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]  # [B, 1, 1 or Q, T]
        nothing = ~pairs.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=pairs | nothing, dropout_p=dropout)
        out = out.masked_fill(nothing, 0.0)
    return out.transpose(1, 2).flatten(2)


def join_masks(*parts: tuple[Tensor, Tensor | None]) -> Tensor | None:
    """Mask of the concatenation along T of [B, T_i, D] pieces with masks [B, T_i] or None; None when all are None."""
    if all(mask is None for _, mask in parts):
        return None
    masks = [x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask for x, mask in parts]
    return torch.cat(masks, dim=1)
