"""X-PEFT: masks over a bank of frozen adapters (Kwak et al. 2024, arXiv 2401.16137).

A profile trains and stores two masks a site over n frozen bottleneck adapters, and its adapter is their mixture. The
survey speaks of masks over weights; they select adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mmpeft.adapters.method import Context, Delta, Tensors, zeros
from mmpeft.adapters.methods.bottleneck import Activation, Bottleneck, Projections
from mmpeft.adapters.methods.low_rank import at_least, seeded_normal, site_seed
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class XPEFT(Bottleneck, name="x-peft"):
    """`y + up(act(down(y)))` with down = sum_k a_k D_k and up = sum_k b_k U_k over n frozen random adapters (arXiv
    2401.16137); trained: 2 n mask logits a site. Soft masks are softmax(logits); hard ones are 1 / k on the k largest,
    with the soft mask's gradient.

    The mixture of random adapters is not the identity; `std` keeps it near. The bank follows from the seed and is not
    saved.

    Args:
        adapters: n, the size of the bank.
        hard: k of the hard mask; None: soft.
        std: of the bank's weights.
        seed: of the bank.
        size, reduction, activation, scale, dropout, dim, bias: as in `Bottleneck`.
    """

    reduction: int = 16
    activation: Activation = "gelu"
    adapters: int = 100
    hard: int | None = None
    std: float = 0.02
    seed: int = 0
    identity_at_init = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, adapters=1)
        if self.hard is not None and not 1 <= self.hard <= self.adapters:
            raise ConfigError(f"hard {self.hard}; expected 1 to adapters, {self.adapters}")

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        plain = super().init(site, base, context).trained
        generator, n = site_seed(self.seed, site), self.adapters
        bank = {
            part: self.std
            * seeded_normal(n, *plain[f"{part}_weight"].shape, like=plain["up_weight"], generator=generator)
            for part in ("down", "up")
        }
        logits = {part: zeros(n, like=plain["up_weight"]) for part in ("a", "b")}
        return Tensors(logits, derived={**bank, **{n: t for n, t in plain.items() if n.endswith("bias")}})

    def mask(self, logits: Tensor) -> Tensor:
        """The mask [n] of weights that sum to 1."""
        soft = torch.softmax(logits, -1)
        if self.hard is None:
            return soft
        hard = torch.zeros_like(soft).scatter(-1, logits.topk(self.hard).indices, 1 / self.hard)
        return hard + soft - soft.detach()

    def update(self, x: Tensor, p: Delta) -> Tensor:
        mixed = Projections(
            down_weight=torch.tensordot(self.mask(p.a), p.down, 1),
            up_weight=torch.tensordot(self.mask(p.b), p.up, 1),
            **{n: getattr(p, n) for n in ("down_bias", "up_bias") if self.bias},
            site=p.site,
            training=p.training,
        )
        return super().update(x, cast(Delta, mixed))

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        return 2 * sum(t.numel() for t in tensors.values())
