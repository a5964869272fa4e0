"""Behaviour transformer with residual vector quantisation (VQ-BeT, Lee et al. 2024, arXiv 2403.03181): choose, then adjust.

A chunk is a coarse code plus a finer code plus an offset: r codebooks, each made on what the one before left. The head
classifies the codes (which way to go) and regresses the offset that belongs to the chosen codes (how exactly), so several
ways survive, and none is averaged with another. The paper learns its codebooks in an autoencoder; here they are residual
k-means on the normalised chunks themselves, which needs no training of its own and no decoder, and are kept with the
adapter as numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import ConfigError, FileFormatError
from mmpeft.policies.heads.base import Head, valid_mean
from mmpeft.policies.heads.fast import hold_last


def k_means(x: Tensor, k: int, *, rounds: int = 25, seed: int = 0) -> Tensor:
    """Centres [k, D] of points [N, D] by Lloyd's rounds, seeded by k-means++; an empty centre moves to the farthest point."""
    g = torch.Generator().manual_seed(seed)
    centres = x[torch.randint(len(x), (1,), generator=g)]
    while len(centres) < k:
        far = torch.cdist(x, centres).amin(1).square()
        far = far if float(far.sum()) > 0 else torch.ones_like(far)
        centres = torch.cat([centres, x[torch.multinomial(far, 1, generator=g)]])
    for _ in range(rounds):
        distance, owner = torch.cdist(x, centres).min(1)
        for i in range(k):
            own = x[owner == i]
            centres[i] = own.mean(0) if len(own) else x[distance.argmax()]
    return centres


def residual_codes(x: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
    """Points [N, D] under codebooks [R, K, D]: the codes [N, R], and what they add up to [N, D]."""
    codes, total = [], torch.zeros_like(x)
    for book in books:
        index = torch.cdist(x - total, book).argmin(1)
        codes.append(index)
        total = total + book[index]
    return torch.stack(codes, 1), total


class VQBeTHead(Head):
    """Codes and offsets.

    Args:
        codes: entries of each codebook. books: how many, coarse to fine.
        offset_weight: of the offset's L1 loss beside the classification.
        focus: gamma of the focal loss (Lin et al. 2017, arXiv 1708.02002) on the codes.
        sample: draw codes by probability instead of taking the likeliest.
        width: of the hidden layer before both outputs.
    """

    def __init__(
        self, *, codes: int = 16, books: int = 2, offset_weight: float = 1.0, focus: float = 2.0, sample: bool = True,
        width: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        if codes < 2 or books < 1 or offset_weight < 0 or focus < 0 or width < 1:
            raise ConfigError("codes is at least 2, books and width at least 1, offset_weight and focus not negative")
        self.codes, self.levels, self.offset_weight, self.focus = codes, books, offset_weight, focus
        self.sample, self.width = sample, width
        self.books: Tensor | None = None  # [R, K, chunk * A]

    def _build(self) -> None:
        self.hidden = nn.Linear(self.readouts * self.in_dim, self.width)
        self.to_codes = nn.Linear(self.width, self.levels * self.codes)
        self.to_offsets = nn.Linear(self.width, self.levels * self.codes * self.chunk * self.action_dim)

    def fit(self, chunks: Tensor) -> None:
        x = chunks.flatten(1).float().cpu()
        if len(x) < self.codes:
            raise ConfigError(f"{len(x)} chunks are too few for {self.codes} codes")
        books, rest = [], x
        for level in range(self.levels):
            book = k_means(rest, self.codes, seed=level)
            books.append(book)
            rest = rest - book[torch.cdist(rest, book).argmin(1)]
        self.books = torch.stack(books)

    def facts(self) -> dict[str, Any]:
        return {"vqbet": self._books(torch.device("cpu")).tolist()}

    def facts_differ(self, facts: Mapping[str, Any]) -> bool:
        return self.books is None or self.books.tolist() != facts.get("vqbet")

    def set_facts(self, facts: Mapping[str, Any]) -> None:
        if "vqbet" not in facts:
            raise FileFormatError("the adapter's head lacks 'vqbet', the codebooks that its actions are written in")
        books, shape = torch.tensor(facts["vqbet"]), (self.levels, self.codes, self.chunk * self.action_dim)
        if tuple(books.shape) != shape:
            raise ConfigError(f"codebooks of shape {list(books.shape)} do not fit this head's {list(shape)}")
        self.books = books

    def _books(self, device: torch.device) -> Tensor:
        if self.books is None:
            raise ConfigError(
                "VQBeTHead has no codebooks yet: fit(chunks) makes them, an adapter's metadata brings them"
            )
        return self.books.to(device)

    def outputs(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, R, K], and every code's own offset [B, R, K, chunk * A]."""
        h = F.relu(self.hidden(features.flatten(1)))
        logits: Tensor = self.to_codes(h).view(len(h), self.levels, self.codes)
        return logits, self.to_offsets(h).view(len(h), self.levels, self.codes, -1)

    def _loss(self, features: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        books, valid = self._books(actions.device), mask.any(-1)
        target = hold_last(actions, valid).flatten(1)
        codes, total = residual_codes(target, books)
        logits, offsets = self.outputs(features)
        log_p = logits.log_softmax(-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)  # [B, R]
        focal = -((1 - log_p.exp()) ** self.focus * log_p).mean(1)
        steps = valid.sum(1).to(focal.dtype)  # a chunk counts by its valid steps, as everywhere
        classify = (focal * steps).sum() / steps.sum().clamp_min(1)
        chosen = offsets.gather(2, codes[:, :, None, None].expand(-1, -1, 1, offsets.shape[-1])).squeeze(2).sum(1)
        adjusted = (total + chosen).view_as(actions)
        return classify + self.offset_weight * valid_mean((adjusted - actions).abs(), mask)

    def predict(self, features: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        features = self._features(features)
        books = self._books(features.device)
        logits, offsets = self.outputs(features)
        flat = logits.softmax(-1).flatten(0, 1)
        drawn = torch.multinomial(flat, 1, generator=generator).squeeze(1) if self.sample else flat.argmax(-1)
        codes = drawn.view(len(logits), self.levels)
        coarse = torch.stack([books[r][codes[:, r]] for r in range(self.levels)], 1).sum(1)
        chosen = offsets.gather(2, codes[:, :, None, None].expand(-1, -1, 1, offsets.shape[-1])).squeeze(2).sum(1)
        return (coarse + chosen).view(len(logits), self.chunk, self.action_dim)
