"""The FAST head: a chunk as a short sequence of `FASTTokeniser` tokens, decoded one after the other.

A small causal transformer reads the features by cross-attention. Decoding is constrained: a token is allowed only if
the coefficients it stands for still fit into the chunk, so every sequence decodes; as single coefficients are tokens
too, there always is one. A sequence ends where the chunk is full, hence no end token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import ConfigError, FileFormatError
from mmpeft.policies.heads.base import Head
from mmpeft.policies.heads.blocks import Block
from mmpeft.policies.heads.fast_tokeniser import FASTTokeniser

IGNORE = -100


class FASTHead(Head):
    """Autoregressive head over FAST tokens; `fit` learns the tokeniser from the demonstrations before training.

    Args:
        scale: levels a unit of a coefficient (10 in the paper, on quantile-normalised actions).
        vocabulary: tokens at most.
        width, depth, heads: of the decoder.
    """

    def __init__(
        self, *, scale: float = 10.0, vocabulary: int = 512, width: int = 128, depth: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        if scale <= 0 or vocabulary < 2:
            raise ConfigError(f"scale is positive and vocabulary at least 2, given {scale} and {vocabulary}")
        self.scale, self.vocabulary, self.width, self.depth, self.heads = scale, vocabulary, width, depth, heads
        self.tokeniser: FASTTokeniser | None = None

    def _build(self) -> None:
        width = self.width
        self.embed = nn.Embedding(self.vocabulary + 1, width)  # the last one starts a sequence
        self.place = nn.Embedding(self.chunk * self.action_dim, width)
        self.read_features = nn.Linear(self.in_dim, width)
        self.blocks = nn.ModuleList(Block(width, self.heads, context_dim=width) for _ in range(self.depth))
        self.norm, self.to_logits = nn.LayerNorm(width), nn.Linear(width, self.vocabulary)

    def fit(self, chunks: Tensor) -> None:
        self.tokeniser = FASTTokeniser.fit(chunks, scale=self.scale, vocabulary=self.vocabulary)

    def facts(self) -> dict[str, Any]:
        return {"fast": self._tokens().to_dict()}

    def facts_differ(self, facts: Mapping[str, Any]) -> bool:
        return self.tokeniser is None or self.tokeniser.to_dict() != facts.get("fast")

    def set_facts(self, facts: Mapping[str, Any]) -> None:
        if "fast" not in facts:
            raise FileFormatError("the adapter's head lacks 'fast', the tokeniser that its actions are written in")
        given = FASTTokeniser.from_dict(facts["fast"])
        if (given.chunk, given.action_dim) != (self.chunk, self.action_dim) or given.size > self.vocabulary:
            raise ConfigError(
                f"a FAST tokeniser of {given.size} tokens for chunks [{given.chunk}, {given.action_dim}] does not fit "
                f"a head of {self.vocabulary} tokens for chunks [{self.chunk}, {self.action_dim}]"
            )
        self.tokeniser = given

    def _tokens(self) -> FASTTokeniser:
        if self.tokeniser is None:
            raise ConfigError("FASTHead has no tokeniser yet: fit(chunks) learns it, an adapter's metadata brings it")
        return self.tokeniser

    def logits(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Features [B, N, D] and tokens so far [B, T] -> logits [B, T + 1, vocabulary] of what follows each prefix."""
        start = tokens.new_full((len(tokens), 1), self.vocabulary)
        ids = torch.cat([start, tokens], 1)
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        context = self.read_features(features)
        for block in self.blocks:
            x = block(x, context, causal=True)
        logits: Tensor = self.to_logits(self.norm(x))
        return logits

    def _loss(self, features: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        tokeniser, valid = self._tokens(), mask.any(-1)
        rows = tokeniser.encode(hold_last(actions, valid))
        longest = max(map(len, rows))
        targets = torch.tensor([row + [IGNORE] * (longest - len(row)) for row in rows], device=actions.device)
        targets[~valid.any(1)] = IGNORE
        logits = self.logits(features, targets[:, :-1].clamp_min(0))
        count = (targets != IGNORE).sum().clamp_min(1)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORE) / count

    def predict(self, features: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        features, tokeniser = self._features(features), self._tokens()
        sizes = torch.tensor([len(e) for e in tokeniser.expansions], device=features.device)
        missing = torch.full((len(features),), tokeniser.length, device=features.device)
        tokens = torch.zeros(len(features), 0, dtype=torch.long, device=features.device)
        while bool((missing > 0).any()):
            logits = self.logits(features, tokens)[:, -1, : tokeniser.size]
            best = logits.masked_fill(sizes > missing[:, None].clamp_min(1), float("-inf")).argmax(-1)
            tokens = torch.cat([tokens, best[:, None]], 1)
            missing = missing - torch.where(missing > 0, sizes[best], 0)
        return torch.stack([self._row(row) for row in tokens.tolist()]).to(features)

    def _row(self, row: list[int]) -> Tensor:
        """A row of decoded tokens, cut where its chunk is full."""
        tokeniser, kept, size = self._tokens(), [], 0
        for token in row:
            if size == tokeniser.length:
                break
            kept.append(token)
            size += len(tokeniser.expansions[token])
        return tokeniser.decode(kept)


def hold_last(actions: Tensor, valid: Tensor) -> Tensor:
    """[B, C, A] with each invalid step replaced by the last valid one before it, which keeps the chunk smooth."""
    steps = torch.arange(actions.shape[1], device=actions.device).expand(valid.shape)
    last = torch.where(valid, steps, 0).cummax(1).values
    return actions.gather(1, last.unsqueeze(-1).expand_as(actions))
