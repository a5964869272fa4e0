"""ProPETL: one prototype for all layers, under a mask of each layer's own (Zeng et al. 2023, arXiv 2305.17682).

    {"**.layer.*.output": mmpeft.ProPETL()}      the survey's "ProPETL adapter": after every feed-forward, width / 12

A layer sees the entries of the prototype whose scores are among the largest; scores learn by a straight-through gradient,
the mask's as their own. Everything else is the plain bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Tensors
from mmpeft.adapters.methods.bottleneck import Bottleneck, Projections
from mmpeft.adapters.methods.low_rank import kaiming
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class ProPETL(Bottleneck, name="propetl", aliases=("propetl-adapter",)):
    """`y + up(act(down(y)))` with down = D * top(s), up = U * top(t) (arXiv 2305.17682): D and U once for all sites of
    one width in the adapter, scores s and t the site's own, top(s) 1 on the `density` of entries with the largest |s|
    and 0 elsewhere. 2 width size parameters, and as many again a site; biases, if any, are shared and have no mask.

    D starts as nn.Linear does and U at 0 (the identity), scores as nn.Linear's weights do. The file holds the scores, so
    that training can go on; what a trained site needs of them is one bit each, `mask(score)`.

    Args:
        size, reduction, activation, scale, dropout, dim, bias: as in `Bottleneck`.
        density: share of the prototype that a layer keeps, of each projection.
        lr_ratio: learning rate of the scores over that of the prototype (30 in the authors' runs on RoBERTa).
    """

    reduction: int = 12
    bias: bool = False
    density: float = 0.5
    lr_ratio: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ConfigError(f"density {self.density}; expected 0 < density <= 1")
        if self.lr_ratio <= 0:
            raise ConfigError(f"lr_ratio {self.lr_ratio}; expected a positive factor")

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        plain = super().init(site, base, context).trained
        like = plain["down_weight"]
        scores = {f"{part}_score": kaiming(*plain[f"{part}_weight"].shape, like=like) for part in ("down", "up")}
        key = (self.name, *like.shape, self.bias)
        if key in context.shared:
            return Tensors(scores, derived=context.shared[key])
        context.shared[key] = {n: nn.Parameter(t) for n, t in plain.items()}
        return Tensors({**context.shared[key], **scores})

    def mask(self, score: Tensor) -> Tensor:
        """1 on the largest |score|, 0 elsewhere; the gradient passes to the scores as it is."""
        kept = max(1, round(self.density * score.numel()))
        size = score.abs().flatten()
        hard = torch.zeros_like(size).index_fill(0, size.topk(kept, sorted=False).indices, 1.0).view(score.shape)
        return hard.detach() + (size - size.detach()).view(score.shape)

    def update(self, x: Tensor, p: Delta) -> Tensor:
        down, up = p.down_weight * self.mask(p.down_score), p.up_weight * self.mask(p.up_score)
        biases = (p.down_bias, p.up_bias) if self.bias else ()
        seen = Projections(p.site, p.training, down, up, *biases)
        return super().update(x, cast(Delta, seen))

    def lr_ratio_of(self, parameter: str) -> float:
        return self.lr_ratio if parameter.endswith("_score") else 1.0

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        return 2 * (tensors["down_score"].numel() + tensors["up_score"].numel())
