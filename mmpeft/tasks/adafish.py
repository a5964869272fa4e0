"""AdaFish (Hu and Li 2024, arXiv 2403.13128): a second-order optimizer for low-rank fine-tuning.

    optimizer = AdaFish(mmpeft.parameter_groups(model, lr=1e-2))

One side of a low-rank factor is as small as the rank, so the Fisher information over that side is a rank x rank matrix:
it is averaged with momentum and inverted exactly. The survey takes AdaFish for a selection of parameters by gradient
magnitude; it selects nothing.

Choice: the paper's text could not be read in full. The step is (F + damping I)^-power m with F the average of G G^T / n
over the smaller side of the gradient G (n the larger) and m its momentum; power 1 is the natural gradient, 1/2 the
scale-free form that Adam has on the diagonal.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, InitVar, dataclass

import torch
from torch import Tensor

from mmpeft.adapters.selection.optimizer import Preconditioned, check_betas
from mmpeft.errors import ConfigError


@dataclass(eq=False, repr=False)
class AdaFish(Preconditioned):
    """Momentum, preconditioned by the Fisher information of each tensor's smaller side.

    Args:
        params: parameters or groups (`lr` and `weight_decay` of each are used).
        betas: of the momentum and of the Fisher information, both corrected for their start at 0.
        damping: added to the Fisher information.
        power: 1 or 0.5.

    Raises:
        ConfigError: values out of range.
    """

    lr: InitVar[float] = 1e-2
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.99)
    damping: float = 1e-3
    power: float = 1.0

    def check(self) -> None:
        if not self.damping > 0 or self.power not in (0.5, 1.0):
            raise ConfigError(f"damping {self.damping}, power {self.power}; expected a positive number, and 0.5 or 1")
        check_betas(*self.betas)

    def update(self, p: Tensor, g: Tensor) -> Tensor:
        G = g.unsqueeze(0) if g.ndim < 2 else g
        wide = G.shape[-2] <= G.shape[-1]
        G = G if wide else G.mT  # [*, small, large]
        state, (b1, b2) = self.state[p], self.betas
        if not state:
            eye = torch.zeros(*G.shape[:-1], G.shape[-2], dtype=G.dtype, device=G.device)
            state |= {"step": 0, "momentum": torch.zeros_like(G), "fisher": eye}
        state["step"] += 1
        state["momentum"].lerp_(G, 1 - b1)
        state["fisher"].lerp_(G @ G.mT / G.shape[-1], 1 - b2)
        m, F = state["momentum"] / (1 - b1 ** state["step"]), state["fisher"] / (1 - b2 ** state["step"])
        values, vectors = torch.linalg.eigh(F)
        inverse = (values.clamp_min(0) + self.damping) ** -self.power
        update = vectors @ (inverse.unsqueeze(-1) * (vectors.mT @ m))
        out: Tensor = (update if wide else update.mT).reshape(p.shape)
        return out
