"""GaLore (Zhao et al. 2024, arXiv 2403.03507) and Natural GaLore (Das 2024, arXiv 2410.16029): full training whose
optimizer lives in the gradient's own low-rank subspace.

    task = GenerationTask(model, {"llm.**": "full"}, optimizer=lambda groups: GaLore(groups, rank=128))

Every `update_every` steps the top singular vectors P of a matrix' gradient are taken anew, Adam runs on P^T G, and the
weight moves by scale P Adam(P^T G). All weights are trained, with moments of rank max(o, i) numbers instead of o i. What is
no matrix, or too small for the rank, gets plain AdamW.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from mmpeft.adapters.selection.optimizer import Adaptive
from mmpeft.errors import ConfigError


@dataclass(eq=False, repr=False)
class GaLore(Adaptive):
    """AdamW in the subspace of the gradient's top singular vectors.

    Args:
        params: parameters or groups (`lr` and `weight_decay` of each are used).
        rank: of the subspace; matrices whose smaller side is no larger get AdamW as they are.
        update_every: the paper's T, steps between subspaces.
        scale: the paper's alpha, on the projected updates.
        betas, eps: of Adam.

    Raises:
        ConfigError: values out of range.
    """

    _: KW_ONLY
    rank: int = 128
    update_every: int = 200
    scale: float = 0.25

    def check(self) -> None:
        super().check()
        if self.rank < 1 or self.update_every < 1 or not self.scale > 0:
            raise ConfigError(
                f"rank {self.rank}, update_every {self.update_every}, scale {self.scale}; expected >= 1, >= 1, > 0"
            )

    def update(self, p: Tensor, g: Tensor) -> Tensor:
        state = self.state[p]
        small = p.ndim < 2 or min(p.shape[-2:]) <= self.rank
        step = state["step"] = state.get("step", 0) + 1
        if small:
            return self.adam(state, g)
        left = p.shape[-2] <= p.shape[-1]  # project the smaller side
        if (step - 1) % self.update_every == 0:
            U, _, V = torch.linalg.svd(g if g.dtype == torch.float64 else g.float(), full_matrices=False)
            state["P"] = (U[..., : self.rank] if left else V[..., : self.rank, :].mT).to(g.dtype).contiguous()
            self.turned(state)
        P: Tensor = state["P"]
        R = self.precondition(state, P.mT @ g if left else g @ P)
        N = self.adam(state, R)
        out: Tensor = self.scale * (P @ N if left else N @ P.mT)
        return out

    def turned(self, state: dict[str, Any]) -> None:
        """The subspace has changed."""

    def precondition(self, state: dict[str, Any], R: Tensor) -> Tensor:
        """The projected gradient as Adam gets it."""
        return R


@dataclass(eq=False, repr=False)
class NaturalGaLore(GaLore):
    """GaLore whose projected gradient g is the natural one, (damping I + H H^T)^-1 g with H the last `window` projected
    gradients as columns, g among them: an empirical Fisher information, inverted through the window x window system of
    Woodbury's identity.

    Args:
        window: gradients that make the Fisher information.
        damping: the paper's lambda.
    """

    _: KW_ONLY
    window: int = 8
    damping: float = 1.0

    def check(self) -> None:
        super().check()
        if self.window < 1 or not self.damping > 0:
            raise ConfigError(f"window {self.window}, damping {self.damping}; expected >= 1, > 0")

    def turned(self, state: dict[str, Any]) -> None:
        state["history"] = []  # gradients of another subspace have other coordinates

    def precondition(self, state: dict[str, Any], R: Tensor) -> Tensor:
        state["history"] = [R.flatten().clone(), *state["history"]][: self.window]
        H = torch.stack(state["history"], 1)
        inner = self.damping * torch.eye(H.shape[1], dtype=H.dtype, device=H.device) + H.mT @ H
        g = R.flatten()
        natural: Tensor = (g - H @ torch.linalg.solve(inner, H.mT @ g)) / self.damping
        return natural.view(R.shape)
