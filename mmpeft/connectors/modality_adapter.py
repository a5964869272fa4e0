"""A bottleneck after a connector: X-LLM's modality adapters (I-Adapter, V-Adapter, S-Adapter).

x + up(gelu(down(x))) in the LLM's width, its own for each modality while the connector before it may be one module
shared by several (image and video share a Q-Former: give the same connector object to both). `up` starts at zero, so
the adapter begins as the identity and can be added after the connector was trained. Size: 2 d m + m + d.

Video: with `num_frames`, inputs are `num_frames` equal runs of tokens, each goes through the connector alone, and its
outputs get a learned frame embedding (zero at first) before the bottleneck.

Paper: Chen et al., X-LLM, 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmpeft.connectors.base import Connector, require_positive
from mmpeft.connectors.mlp import activation_module
from mmpeft.errors import ConfigError


class ModalityAdapter(Connector):
    """[B, T, d_v] -> `connector` -> [B, Q, d_l] -> bottleneck -> [B, Q, d_l].

    Args:
        connector: what turns encoder tokens into LLM tokens; its widths are built with this one's.
        bottleneck_dim: m, the inner width.
        activation: "gelu", "relu" or "silu".
        num_frames: None, or the number of frames a sample's tokens consist of.

    Raises:
        ConfigError: sizes that are not positive, a connector built for other widths, or (num_tokens, forward) a
            token count that num_frames does not divide.
    """

    def __init__(
        self,
        *,
        connector: Connector,
        in_dim: int | None = None,
        out_dim: int | None = None,
        bottleneck_dim: int = 64,
        activation: str = "gelu",
        num_frames: int | None = None,
    ) -> None:
        in_dim = in_dim if in_dim is not None else connector.in_dim or None
        out_dim = out_dim if out_dim is not None else connector.out_dim or None
        super().__init__(in_dim=in_dim, out_dim=out_dim)
        require_positive(self, bottleneck_dim=bottleneck_dim, num_frames=num_frames)
        self.connector = connector
        self.bottleneck_dim = bottleneck_dim
        self.activation = activation_module(activation)
        self.num_frames = num_frames
        self._build_if_given(in_dim, out_dim)

    def _build(self, in_dim: int, out_dim: int) -> None:
        self.connector.build(in_dim, out_dim)
        self.down = nn.Linear(out_dim, self.bottleneck_dim)
        self.up = nn.Linear(self.bottleneck_dim, out_dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        if self.num_frames is not None:
            self.frame_embedding = nn.Parameter(torch.zeros(self.num_frames, 1, out_dim))

    def num_tokens(self, t: int) -> int:
        require_positive(self, t=t)
        frames = self.num_frames or 1
        if t % frames:
            near = max(frames, round(t / frames) * frames)
            raise ConfigError(f"{t} tokens are not {frames} equal frames (nearest: {near})")
        return frames * self.connector.num_tokens(t // frames)

    def channel_readers(self) -> list[nn.Linear | nn.LayerNorm]:
        return self.connector.channel_readers()

    def first_view(self, tokens: Tensor) -> Tensor:
        frames = tokens.reshape(len(tokens) * (self.num_frames or 1), -1, tokens.shape[2])
        return self.connector.first_view(frames)

    @property
    def scales_output(self) -> bool:
        return self.connector.scales_output

    def set_output_std(self, std: float) -> None:
        self.connector.set_output_std(std)

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.num_frames is None:
            out, valid = self.connector(tokens, mask)
        else:
            b, f = len(tokens), self.num_frames
            frames = tokens.reshape(b * f, -1, tokens.shape[2])
            out, valid = self.connector(frames, None if mask is None else mask.reshape(b * f, -1))
            out = out.reshape(b, f, *out.shape[1:]) + self.frame_embedding.to(out.dtype)  # [B, F, Q, d_l]
            out, valid = out.flatten(1, 2), None if valid is None else valid.reshape(b, -1)
        return out + self.up(self.activation(self.down(out))), valid
