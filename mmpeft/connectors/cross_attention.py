"""Gated cross-attention (Flamingo): media enter inside the LLM, through blocks put before some of its layers.

A block computes x + tanh(a) attention(x over media), then x + tanh(b) feed-forward(x), with a = b = 0 at first: the
LLM starts as itself, bit for bit. Text sees only the last image before it: `last_media` gives each text token the
number of media that precede it, `see_last_media` turns that into a mask.

`GatedCrossAttention` owns the blocks for a list of decoder layers. Conditioning is a `with`: inside
`conditioned(layers, media, ...)` the blocks run before their layers, outside the LLM is untouched; no layer is replaced
and no state stays behind.

Paper: Alayrac et al., Flamingo, 2022. At 24 layers of width 2048 over 1024-wide media: .88 B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.connectors.base import require_positive, weight_dtype
from mmpeft.connectors.perceiver import MediaAttention, feed_forward
from mmpeft.errors import ConfigError


def last_media(is_media: Tensor) -> Tensor:
    """[B, L] bool, True where a medium's placeholder stands -> [B, L] count of media up to and including each token."""
    return is_media.long().cumsum(1)


def see_last_media(media_index: Tensor, tokens_per_media: int, num_media: int) -> Tensor:
    """Mask [B, L, num_media * tokens_per_media], True where a text token may look.

    Args:
        media_index: [B, L], number of the last medium before each token, from 1; 0 = none yet, which sees nothing.
    """
    owner = torch.arange(1, num_media + 1, device=media_index.device).repeat_interleave(tokens_per_media)
    return media_index.unsqueeze(-1) == owner


class GatedCrossAttentionBlock(nn.Module):
    """x [B, L, d_l] and media [B, T, d_v] -> [B, L, d_l]; the identity while both gates are 0."""

    def __init__(self, *, dim: int, media_dim: int, heads: int = 8, head_dim: int = 64, ffn_multiple: int = 4) -> None:
        super().__init__()
        require_positive(self, dim=dim, media_dim=media_dim, heads=heads, head_dim=head_dim, ffn_multiple=ffn_multiple)
        self.norm = nn.LayerNorm(dim)
        self.attention = MediaAttention(dim, media_dim, heads, head_dim)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.ffn = feed_forward(dim, ffn_multiple)
        self.ffn_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, media: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: bool [B, T] or [B, L, T], True = may attend; a token that may see nothing gets nothing."""
        y = x.to(weight_dtype(self))
        y = y + self.attention_gate.tanh() * self.attention(self.norm(y), media.to(y.dtype), mask)
        out: Tensor = y + self.ffn_gate.tanh() * self.ffn(y)
        return out.to(x.dtype)


class GatedCrossAttention(nn.Module):
    """Blocks before every `every`-th of an LLM's decoder layers (`llm.model.layers` in transformers).

    Args:
        num_layers: number of decoder layers.
        dim, media_dim: the LLM's and the media tokens' widths.
        every: a block before layers every - 1, 2 every - 1, ... (OpenFlamingo: 1, 2 or 4).
        heads, head_dim, ffn_multiple: of each block.

    Raises:
        ConfigError: a size that is not positive, or `every` larger than `num_layers`.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        dim: int,
        media_dim: int,
        every: int = 1,
        heads: int = 8,
        head_dim: int = 64,
        ffn_multiple: int = 4,
    ) -> None:
        super().__init__()
        require_positive(self, num_layers=num_layers, every=every)
        if every > num_layers:
            raise ConfigError(f"every={every} puts no block before any of {num_layers} layers (nearest: {num_layers})")
        self.num_layers = num_layers
        self.every = every
        self.blocks = nn.ModuleDict({
            str(i): GatedCrossAttentionBlock(
                dim=dim, media_dim=media_dim, heads=heads, head_dim=head_dim, ffn_multiple=ffn_multiple
            )
            for i in range(every - 1, num_layers, every)
        })  # fmt: skip

    @contextmanager
    def conditioned(
        self,
        layers: Sequence[nn.Module] | nn.ModuleList,
        media: Tensor,
        *,
        media_mask: Tensor | None = None,
        media_index: Tensor | None = None,
    ) -> Iterator[None]:
        """Run the blocks before their layers inside this `with`.

        Args:
            layers: the LLM's decoder layers; each takes its hidden states [B, L, d_l] first.
            media: [B, M, T, d_v], M media a sample, T tokens each (all seen by all text without `media_index`).
            media_mask: bool [B, M, T], True = valid.
            media_index: [B, L], `last_media` of the text; with a cache, later tokens keep its last column.

        Raises:
            ConfigError: another number of layers, or shapes that do not fit.
        """
        if len(layers) != self.num_layers:
            raise ConfigError(f"blocks were made for {self.num_layers} layers, given {len(layers)}")
        if media.dim() != 4 or (media_mask is not None and media_mask.shape != media.shape[:3]):
            given = None if media_mask is None else list(media_mask.shape)
            raise ConfigError(
                f"media must be [B, M, T, d_v] with mask [B, M, T], given {list(media.shape)} and {given}"
            )
        flat, valid = media.flatten(1, 2), None if media_mask is None else media_mask.flatten(1)
        seen = None if media_index is None else see_last_media(media_index, media.shape[2], media.shape[1])

        def mask_for(length: int) -> Tensor | None:
            if seen is None:
                return valid
            rows = seen if length == seen.shape[1] else seen[:, -1:].expand(-1, length, -1)
            return rows if valid is None else rows & valid.unsqueeze(1)

        def before(block: nn.Module) -> Any:
            def hook(
                _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                if args:
                    return (block(args[0], flat, mask_for(args[0].shape[1])), *args[1:]), kwargs
                x = kwargs["hidden_states"]
                return args, {**kwargs, "hidden_states": block(x, flat, mask_for(x.shape[1]))}

            return hook

        handles = [
            layers[int(i)].register_forward_pre_hook(before(b), with_kwargs=True) for i, b in self.blocks.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
