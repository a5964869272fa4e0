"""Trunks: everything a policy senses in, feature tokens [B, N, D] for any head out.

    MLPTrunk          maps flattened through a narrow 1x1 convolution, and an MLP: small, fast, what `make robot` uses
    TransformerTrunk  all senses as tokens, N readout tokens that attend to them
    LLMTrunk          the same with a frozen causal language model in between (trunks_llm.py)

Flattening keeps the place of every cell, which a pooled vector or a spatial softmax loses; with few demonstrations that
is worth more than depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.policies.fusion import FusionName, make_fusion
from mmpeft.policies.heads.blocks import Block
from mmpeft.policies.parts import Part


@dataclass(frozen=True)
class Sizes:
    """What there is to sense: maps (C, h, w) of each view and frame, widths of state and text (0: none)."""

    maps: tuple[tuple[int, int, int], ...] = ()
    views: int = 1
    state: int = 0
    text: int = 0
    history: int = 1


@dataclass
class Observed:
    """What was sensed, frames from old to new.

    Attributes:
        maps: one a tap, [B, T, V, C, h, w]. state: [B, T, S], normalised. text: sentence vectors [B, E].
        state_mask: [B, T] bool, False = missing; None = all there.
        seen: [B, T] bool, False = before the episode began; None = all seen.
        instruction: the sentences themselves.
    """

    maps: list[Tensor]
    state: Tensor | None = None
    text: Tensor | None = None
    state_mask: Tensor | None = None
    seen: Tensor | None = None
    instruction: Sequence[str] | None = None

    @property
    def known(self) -> Tensor | None:
        """[B, T]: frames whose state is there to be read."""
        parts = [m for m in (self.state_mask, self.seen) if m is not None]
        return None if not parts else parts[0] if len(parts) == 1 else parts[0] & parts[1]


class Trunk(Part):
    """Base class; `dim` is D, and `build` creates the parameters once the sizes are known."""

    dim: int
    reads_text: bool = False  # whether it reads the sentences themselves

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Sizes | None = None
        self.readouts = 0

    def build(self, sizes: Sizes, *, readouts: int = 1) -> Self:
        """Create the parameters; again with the same sizes does nothing.

        Raises:
            ConfigError: nothing to sense, or other sizes than before.
        """
        if self.sizes is not None and (sizes, readouts) != (self.sizes, self.readouts):
            raise ConfigError(f"{type(self).__name__} was built for {self.sizes}, not for {sizes}")
        if not (sizes.maps or sizes.state or sizes.text or self.reads_text):
            raise ConfigError("a policy without pictures, state and instruction senses nothing: give it one of them")
        if self.sizes is None:
            self.sizes, self.readouts = sizes, readouts
            self._build(sizes)
        return self

    def _build(self, sizes: Sizes) -> None:
        raise NotImplementedError

    def forward(self, observed: Observed) -> Tensor:
        """[B, N, D]."""
        raise NotImplementedError


class FlattenMaps(nn.Module):
    """Maps of a frame to one vector: norm, 1x1 convolution and ReLU for each, flattened; then Linear, norm, tanh."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], views: int, channels: int, width: int) -> None:
        super().__init__()
        self.views = views
        self.norms = nn.ModuleList(nn.GroupNorm(1, c) for c, _, _ in shapes)
        self.narrow = nn.ModuleList(nn.Conv2d(c, channels, 1) for c, _, _ in shapes)
        cells = sum(h * w for _, h, w in shapes)
        self.project, self.norm = nn.Linear(views * channels * cells, width), nn.LayerNorm(width)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[B, T, V, C, h, w] each -> [B, T, width]."""
        batch, steps, views = maps[0].shape[:3]
        flat = []
        for m, norm, narrow in zip(maps, self.norms, self.narrow, strict=True):
            x = m.flatten(0, 2).float().contiguous()  # GroupNorm's backward crashes on channels_last in torch 2.11
            flat.append(torch.relu(narrow(norm(x))).flatten(1).view(batch, steps, views, -1))
        out: Tensor = torch.tanh(self.norm(self.project(torch.cat(flat, -1).flatten(2))))
        return out


class MLPTrunk(Trunk):
    """One vector (N = 1) from flattened maps, state and text.

    Args:
        width: of the vision vector and of the MLP, and so of the features.
        channels: of the maps after the 1x1 convolution.
        side: width of the state vector and of the text vector.
        depth: Linear layers of the MLP.
    """

    def __init__(self, *, width: int = 256, channels: int = 24, side: int = 64, depth: int = 2) -> None:
        super().__init__()
        if min(width, channels, side, depth) < 1:
            raise ConfigError("width, channels, side and depth of an MLPTrunk are at least 1")
        self.dim, self.width, self.channels, self.side, self.depth = width, width, channels, side, depth

    def _build(self, sizes: Sizes) -> None:
        if self.readouts != 1:
            raise ConfigError(f"an MLPTrunk gives one vector, the head wants {self.readouts} readouts: use readouts=1")
        self.connector = FlattenMaps(sizes.maps, sizes.views, self.channels, self.width) if sizes.maps else None
        self.state = nn.Linear(sizes.state + 1, self.side) if sizes.state else None
        self.text = nn.Linear(sizes.text, self.side) if sizes.text else None
        frame = (self.width if sizes.maps else 0) + (self.side if sizes.state else 0)
        widths = [sizes.history * frame + (self.side if sizes.text else 0)] + [self.width] * self.depth
        layers = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
        self.mlp = nn.Sequential(*layers)

    def forward(self, observed: Observed) -> Tensor:
        frames, parts = [], []
        if self.connector is not None:
            frames.append(self.connector(observed.maps))
        if self.state is not None and observed.state is not None:
            value, known = observed.state, observed.known
            there = torch.ones_like(value[..., :1], dtype=torch.bool) if known is None else known.unsqueeze(-1)
            value = torch.where(there, value, 0)
            frames.append(torch.tanh(self.state(torch.cat([value, there.to(value.dtype)], -1))))
        if frames:
            x = torch.cat(frames, -1)  # [B, T, F]
            parts.append((x if observed.seen is None else x * observed.seen.unsqueeze(-1)).flatten(1))
        if self.text is not None and observed.text is not None:
            parts.append(torch.tanh(self.text(observed.text)))
        out: Tensor = self.mlp(torch.cat(parts, -1)).unsqueeze(1)
        return out


class MapTokens(nn.Module):
    """Maps to tokens [B, T * V * cells, W]: LayerNorm over channels, Linear, learned places for cell, view and time."""

    def __init__(self, sizes: Sizes, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c, _, _ in sizes.maps)
        self.project = nn.ModuleList(nn.Linear(c, width) for c, _, _ in sizes.maps)
        self.cells = nn.ParameterList(torch.randn(h * w, width) * 0.02 for _, h, w in sizes.maps)
        self.frames = nn.Parameter(torch.randn(sizes.history, sizes.views, width) * 0.02)

    def forward(self, maps: Sequence[Tensor], seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, T, V, C, h, w] each -> tokens [B, N, W] and their mask [B, N] (None: all valid)."""
        found, masks = [], []
        for m, norm, project, place in zip(maps, self.norms, self.project, self.cells, strict=True):
            cells = m.flatten(4).transpose(3, 4).float()  # [B, T, V, cells, C]
            found.append((project(norm(cells)) + place + self.frames.unsqueeze(2)).flatten(1, 3))
            if seen is not None:
                masks.append(seen.repeat_interleave(cells.shape[2] * cells.shape[3], 1))
        return torch.cat(found, 1), torch.cat(masks, 1) if seen is not None else None


class TransformerTrunk(Trunk):
    """All senses as tokens of a small bidirectional transformer; N readout tokens, read in parallel.

    Args:
        width, depth, heads, dropout: of the transformer.
        state, text: how they come in: "token", "film" or "cross" (see `fusion`).
    """

    def __init__(
        self, *, width: int = 256, depth: int = 4, heads: int = 4, dropout: float = 0.0, state: FusionName = "token",
        text: FusionName = "token",
    ) -> None:  # fmt: skip
        super().__init__()
        if min(width, depth, heads) < 1 or width % heads:
            raise ConfigError(f"heads must divide width, given width={width}, depth={depth}, heads={heads}")
        for name in (state, text):
            make_fusion(name, width, 1, 1)  # refuses an unknown name before any weight is loaded
        self.dim, self.width, self.depth, self.heads, self.dropout = width, width, depth, heads, dropout
        self.state_by, self.text_by = state, text

    def _build(self, sizes: Sizes) -> None:
        self.tokens = MapTokens(sizes, self.width) if sizes.maps else None
        self.queries = nn.Parameter(torch.randn(self.readouts, self.width) * 0.02)
        self.state = make_fusion(self.state_by, self.width, sizes.state, sizes.history) if sizes.state else None
        self.text = make_fusion(self.text_by, self.width, sizes.text, 1) if sizes.text else None
        self.blocks = nn.ModuleList(Block(self.width, self.heads, dropout=self.dropout) for _ in range(self.depth))
        self.norm = nn.LayerNorm(self.width)

    def forward(self, observed: Observed) -> Tensor:
        batch = next(len(t) for t in (observed.text, observed.state, *observed.maps) if t is not None)
        x = self.queries.expand(batch, -1, -1)
        mask = None
        if self.tokens is not None:
            tokens, valid = self.tokens(observed.maps, observed.seen)
            x = torch.cat([x, tokens], 1)
            if valid is not None:
                mask = torch.cat([valid.new_ones(batch, self.readouts), valid], 1)
        if self.text is not None and observed.text is not None:
            x = self.text(x, observed.text.unsqueeze(1))
        if self.state is not None and observed.state is not None:
            x = self.state(x, observed.state, observed.known)
        if mask is not None and mask.shape[1] < x.shape[1]:  # tokens that a fusion appended are always valid
            mask = torch.cat([mask, mask.new_ones(batch, x.shape[1] - mask.shape[1])], 1)
        for block in self.blocks:
            x = block(x, mask=mask)
        out: Tensor = self.norm(x[:, : self.readouts])
        return out
