"""GaLore (Zhao et al. 2024, arXiv 2403.03507) and Natural GaLore (Das 2024, arXiv 2410.16029): full training whose
optimizer lives in the gradient's own low-rank subspace.

    task = GenerationTask(model, {"llm.**": "full"}, optimizer=lambda groups: GaLore(groups, rank=128))

Every `update_every` steps the top singular vectors P of a matrix' gradient are taken anew, Adam runs on P^T G, and the
weight moves by scale P Adam(P^T G). All weights are trained, with moments of rank max(o, i) numbers instead of o i. What is
no matrix, or too small for the rank, gets plain AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mmpeft.adapters.selection.optimizer import Preconditioned, adam, check_betas
from mmpeft.errors import ConfigError


class GaLore(Preconditioned):
    """AdamW in the subspace of the gradient's top singular vectors.

    Args:
        params: parameters or groups (`lr` and `weight_decay` of each are used).
        rank: of the subspace; matrices whose smaller side is no larger get AdamW as they are.
        update_every: the paper's T, steps between subspaces.
        scale: the paper's alpha, on the projected updates.

    Raises:
        ConfigError: values out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rank: int = 128,
        update_every: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if rank < 1 or update_every < 1 or not scale > 0 or not eps > 0:
            raise ConfigError(
                f"rank {rank}, update_every {update_every}, scale {scale}, eps {eps}; expected >= 1, >= 1, > 0, > 0"
            )
        check_betas(*betas)
        super().__init__(params, lr, weight_decay)
        self.rank, self.update_every, self.scale, self.betas, self.eps = rank, update_every, scale, betas, eps

    def update(self, p: Tensor, g: Tensor) -> Tensor:
        state = self.state[p]
        small = p.ndim < 2 or min(p.shape[-2:]) <= self.rank
        step = state["step"] = state.get("step", 0) + 1
        if small:
            return adam(state, g, self.betas, self.eps)
        left = p.shape[-2] <= p.shape[-1]  # project the smaller side
        if (step - 1) % self.update_every == 0:
            U, _, V = torch.linalg.svd(g if g.dtype == torch.float64 else g.float(), full_matrices=False)
            state["P"] = (U[..., : self.rank] if left else V[..., : self.rank, :].mT).to(g.dtype).contiguous()
            self.turned(state)
        P: Tensor = state["P"]
        R = self.precondition(state, P.mT @ g if left else g @ P)
        N = adam(state, R, self.betas, self.eps)
        out: Tensor = self.scale * (P @ N if left else N @ P.mT)
        return out

    def turned(self, state: dict[str, Any]) -> None:
        """The subspace has changed."""

    def precondition(self, state: dict[str, Any], R: Tensor) -> Tensor:
        """The projected gradient as Adam gets it."""
        return R


class NaturalGaLore(GaLore):
    """GaLore whose projected gradient g is the natural one, (damping I + H H^T)^-1 g with H the last `window` projected
    gradients as columns, g among them: an empirical Fisher information, inverted through the window x window system of
    Woodbury's identity.

    Args:
        window: gradients that make the Fisher information.
        damping: the paper's lambda.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        window: int = 8,
        damping: float = 1.0,
        rank: int = 128,
        update_every: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if window < 1 or not damping > 0:
            raise ConfigError(f"window {window}, damping {damping}; expected >= 1, > 0")
        super().__init__(
            params, lr, rank=rank, update_every=update_every, scale=scale, betas=betas, eps=eps,
            weight_decay=weight_decay,
        )  # fmt: skip
        self.window, self.damping = window, damping

    def turned(self, state: dict[str, Any]) -> None:
        state["history"] = []  # gradients of another subspace have other coordinates

    def precondition(self, state: dict[str, Any], R: Tensor) -> Tensor:
        state["history"] = [R.flatten().clone(), *state["history"]][: self.window]
        H = torch.stack(state["history"], 1)
        inner = self.damping * torch.eye(H.shape[1], dtype=H.dtype, device=H.device) + H.mT @ H
        g = R.flatten()
        natural: Tensor = (g - H @ torch.linalg.solve(inner, H.mT @ g)) / self.damping
        return natural.view(R.shape)
