"""Audio projectors that stack frames: 50 frames a second become fewer, wider tokens before the LLM sees them.

`ConcatLinear` (SLAM-ASR: 18.88 M from WavLM-Large to Vicuna-7B), `Conv1dLinear` (SLAM-LLM) and `StackSwiGLU` (Ultravox
v0.5). The last, incomplete stack is filled with zeros, so that Q = ceil(T / k), no speech is cut off, and a clip
padded in a batch gives what it gives alone. (SLAM-ASR drops the up to k - 1 last frames instead.)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.connectors.base import Connector, require_positive
from mmpeft.connectors.mlp import first_reader, projector
from mmpeft.errors import ConfigError


def stack_frames(tokens: Tensor, k: int) -> Tensor:
    """[B, T, D] -> [B, ceil(T / k), k * D]: k consecutive frames side by side, zeros after the last."""
    short = -tokens.shape[1] % k
    padded = F.pad(tokens, (0, 0, 0, short))
    return padded.reshape(len(padded), -1, k * padded.shape[2])


def stack_mask(mask: Tensor | None, k: int) -> Tensor | None:
    """[B, T] -> [B, ceil(T / k)]: a stack is valid when any of its frames is."""
    return None if mask is None else stack_frames(mask.unsqueeze(-1), k).any(-1)


class FrameStacker(Connector):
    """Common part: `stack` frames become one token."""

    stack: int

    def num_tokens(self, t: int) -> int:
        require_positive(self, t=t)
        return -(-t // self.stack)


class ConcatLinear(FrameStacker):
    """[B, T, d_a] -> [B, ceil(T / stack), d_l]: Linear(stack * d_a, hidden_dim), ReLU, Linear(hidden_dim, d_l).

    Raises:
        ConfigError: stack or hidden_dim not positive.

    Paper: Ma et al., An Embarrassingly Simple Approach for LLM with Strong ASR Capacity (SLAM-ASR), 2024.
    """

    layers: nn.Sequential

    def __init__(
        self,
        *,
        in_dim: int | None = None,
        out_dim: int | None = None,
        stack: int = 5,
        hidden_dim: int = 2048,
        output_norm: bool = False,
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, output_norm=output_norm)
        require_positive(self, stack=stack, hidden_dim=hidden_dim)
        self.stack = stack
        self.hidden_dim = hidden_dim
        self._build_if_given(in_dim, out_dim)

    def _build(self, in_dim: int, out_dim: int) -> None:
        self.layers = projector(self.stack * in_dim, self.hidden_dim, out_dim, depth=2, activation="relu")

    def channel_readers(self) -> list[nn.Linear | nn.LayerNorm]:
        return first_reader(self.layers)

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.layers(stack_frames(tokens, self.stack)), stack_mask(mask, self.stack)


class Conv1dLinear(FrameStacker):
    """[B, T, d_a] -> [B, ceil(T / stack), d_l]: Conv1d (kernel = stride = stack), ReLU, Linear, ReLU, Linear.

    Raises:
        ConfigError: stack or hidden_dim not positive.
    """

    def __init__(
        self,
        *,
        in_dim: int | None = None,
        out_dim: int | None = None,
        stack: int = 5,
        hidden_dim: int = 2048,
        output_norm: bool = False,
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, output_norm=output_norm)
        require_positive(self, stack=stack, hidden_dim=hidden_dim)
        self.stack = stack
        self.hidden_dim = hidden_dim
        self._build_if_given(in_dim, out_dim)

    def _build(self, in_dim: int, out_dim: int) -> None:
        self.conv = nn.Conv1d(in_dim, in_dim, kernel_size=self.stack, stride=self.stack)
        self.layers = projector(in_dim, self.hidden_dim, out_dim, depth=2, activation="relu")

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        padded = F.pad(tokens.transpose(1, 2), (0, -tokens.shape[1] % self.stack))
        return self.layers(F.relu(self.conv(padded).transpose(1, 2))), stack_mask(mask, self.stack)


class StackSwiGLU(FrameStacker):
    """[B, T, d_a] -> [B, ceil(T / stack), d_l]: RMSNorm, Linear, SwiGLU, RMSNorm, Linear; no biases.

    Args:
        stack: frames a token.
        hidden_dim: width after the first Linear, even; SwiGLU halves it.
        norm_init: initial weight of both norms.

    Raises:
        ConfigError: stack not positive, or hidden_dim not positive and even.

    Source: Ultravox v0.5 (its norms, 0.4 at first, stand before the first and before the second Linear).
    """

    def __init__(
        self,
        *,
        in_dim: int | None = None,
        out_dim: int | None = None,
        stack: int = 8,
        hidden_dim: int = 4096,
        norm_init: float = 0.4,
        output_norm: bool = False,
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, output_norm=output_norm)
        require_positive(self, stack=stack, hidden_dim=hidden_dim)
        if hidden_dim % 2:
            raise ConfigError(f"StackSwiGLU: hidden_dim must be even, given {hidden_dim} (nearest: {hidden_dim + 1})")
        self.stack = stack
        self.hidden_dim = hidden_dim
        self.norm_init = norm_init
        self._build_if_given(in_dim, out_dim)

    def _build(self, in_dim: int, out_dim: int) -> None:
        self.norm_in = nn.RMSNorm(self.stack * in_dim, eps=1e-6)
        self.up = nn.Linear(self.stack * in_dim, self.hidden_dim, bias=False)
        self.norm_mid = nn.RMSNorm(self.hidden_dim // 2, eps=1e-6)
        self.down = nn.Linear(self.hidden_dim // 2, out_dim, bias=False)
        for norm in (self.norm_in, self.norm_mid):
            nn.init.constant_(norm.weight, self.norm_init)

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        value, gate = self.up(self.norm_in(stack_frames(tokens, self.stack))).chunk(2, dim=-1)
        return self.down(self.norm_mid(F.silu(gate) * value)), stack_mask(mask, self.stack)
