"""The perceiver resampler (Flamingo): learned latents repeatedly read [media; latents] and become a fixed token count.

Pre-norm blocks without biases, as OpenFlamingo builds them: latents + attention(latents over [media; latents]), then
latents + feed-forward, a final LayerNorm, and here Linear(d_v, d_l) to the LLM's width. The latents work in the
encoder's width d_v; `MediaAttention` and `feed_forward` are shared with the gated cross-attention blocks. The layers' norms of
the media differ in gain and bias only, so all their keys and values come from one product (`shared_kv`).

Paper: Alayrac et al., Flamingo, 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmpeft.connectors.attention import attend, join_masks
from mmpeft.connectors.base import Connector, require_positive
from mmpeft.connectors.shared_kv import normed_keys_and_values


class MediaAttention(nn.Module):
    """x [B, Q, D] over context [B, T, D_c] -> [B, Q, D]; projections without bias, inner width heads * head_dim."""

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, projected: Tensor | None = None) -> Tensor:
        """`projected`: the context's keys and values [B, T, 2 D], where they are known already."""
        both = self.to_kv(context) if projected is None else projected
        key, value = both.chunk(2, dim=-1)
        out: Tensor = self.to_out(attend(self.to_q(x), key, value, heads=self.heads, mask=mask))
        return out


def feed_forward(dim: int, multiple: int) -> nn.Sequential:
    """Pre-norm feed-forward [.., D] -> [.., D] without biases, inner width `multiple` * D."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, multiple * dim, bias=False),
        nn.GELU(),
        nn.Linear(multiple * dim, dim, bias=False),
    )


class PerceiverLayer(nn.Module):
    """Latents [B, Q, D] and media [B, T, D] -> latents [B, Q, D]."""

    def __init__(self, dim: int, heads: int, head_dim: int, ffn_multiple: int) -> None:
        super().__init__()
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.attention = MediaAttention(dim, dim, heads, head_dim)
        self.ffn = feed_forward(dim, ffn_multiple)

    def forward(self, latents: Tensor, media: Tensor, mask: Tensor | None, projected: Tensor | None = None) -> Tensor:
        """`projected`: keys and values [B, T, 2 D'] of the normed media, where they are known already."""
        x = self.norm_latents(latents)
        both = join_masks((media, mask), (x, None))
        if projected is None:
            seen, known = torch.cat([self.norm_media(media), x], dim=1), None
        else:
            seen, known = x, torch.cat([projected, self.attention.to_kv(x)], dim=1)
        latents = latents + self.attention(x, seen, both, known)
        out: Tensor = latents + self.ffn(latents)
        return out


class PerceiverResampler(Connector):
    """[B, T, d_v] -> [B, num_latents, d_l] whatever T; a sample without one valid token gives no valid output.

    Args:
        num_latents: Q, learned, from N(0, 1).
        depth, heads, head_dim, ffn_multiple: 6, 8, 64, 4 in Flamingo.
        output_norm: end with a LayerNorm over d_l; see `Connector.set_output_std`.

    Raises:
        ConfigError: a size that is not positive.
    """

    def __init__(
        self,
        *,
        in_dim: int | None = None,
        out_dim: int | None = None,
        num_latents: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        ffn_multiple: int = 4,
        output_norm: bool = False,
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, output_norm=output_norm)
        require_positive(
            self, num_latents=num_latents, depth=depth, heads=heads, head_dim=head_dim, ffn_multiple=ffn_multiple
        )
        self.num_latents = num_latents
        self.depth = depth
        self.heads = heads
        self.head_dim = head_dim
        self.ffn_multiple = ffn_multiple
        self._build_if_given(in_dim, out_dim)

    def _build(self, in_dim: int, out_dim: int) -> None:
        self.latents = nn.Parameter(torch.randn(self.num_latents, in_dim))
        self.layers = nn.ModuleList(
            PerceiverLayer(in_dim, self.heads, self.head_dim, self.ffn_multiple) for _ in range(self.depth)
        )
        self.norm = nn.LayerNorm(in_dim)
        self.project = nn.Linear(in_dim, out_dim)

    def num_tokens(self, t: int) -> int:
        require_positive(self, t=t)
        return self.num_latents

    def channel_readers(self) -> list[nn.Linear | nn.LayerNorm]:
        return [layer.norm_media for layer in self.layers if isinstance(layer, PerceiverLayer)]

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        latents = self.latents.to(tokens.dtype).expand(len(tokens), -1, -1)
        readers = {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, PerceiverLayer)}
        norms, linears = [m.norm_media for m in readers.values()], [m.attention.to_kv for m in readers.values()]
        found = normed_keys_and_values(tokens, norms, linears)
        projected = {} if found is None else dict(zip(readers, found, strict=True))
        for i, layer in enumerate(self.layers):
            latents = layer(latents, tokens, mask, projected.get(i))
        valid = None if mask is None else mask.any(1, keepdim=True).expand(-1, self.num_latents)
        return self.project(self.norm(latents)), valid
