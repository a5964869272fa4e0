"""MeZO (Malladi et al. 2023, arXiv 2305.17333): training an adapter by two forward passes a step, with the memory of
inference.

    optimizer = MeZO(mmpeft.parameter_groups(model, lr=1e-3), eps=1e-3)
    loss = optimizer.step(lambda: task(model(x)))        # the closure only computes the loss; no backward

The gradient estimate is g z with g = (L(w + eps z) - L(w - eps z)) / (2 eps), z normal. z is never stored: it is drawn
again from the step's seed for each of the three passes over the parameters, tensor by tensor. `trajectory` keeps (seed,
g, lr) of every step, from which `replay` makes the trained adapter again out of its start: a file of 24 bytes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmpeft.adapters.selection.optimizer import Grouped
from mmpeft.errors import ConfigError


@dataclass(eq=False, repr=False)
class MeZO(Grouped):
    """Zeroth-order SGD with seed replay. Gradients are neither needed nor made.

    Args:
        params: parameters or groups (`lr` and `weight_decay` of each are used).
        eps: size of the perturbation.
        samples: perturbations a step (n-SPSA).
        seed: of the first step.

    Raises:
        ConfigError: values out of range.
    """

    _: KW_ONLY
    eps: float = 1e-3
    samples: int = 1
    seed: int = 0
    trajectory: list[tuple[int, float, tuple[float, ...]]] = field(default_factory=list, init=False)

    def check(self) -> None:
        if not self.eps > 0 or self.samples < 1:
            raise ConfigError(f"eps {self.eps}, samples {self.samples}; expected > 0, >= 1")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One step; returns the mean of the losses it saw.

        Args:
            closure: runs the model and returns the loss; called twice for each sample, on the same batch.
        """
        if closure is None:
            raise ConfigError("MeZO.step needs a closure that returns the loss")
        probes = [self.probe(closure) for _ in range(self.samples)]
        self.apply([(seed, g) for seed, g, _ in probes])
        return torch.stack([loss for *_, losses in probes for loss in losses]).mean()

    def probe(self, closure: Callable[[], Tensor]) -> tuple[int, float, list[Tensor]]:
        """(seed, directional gradient, the two losses) of the next perturbation; the parameters are as before."""
        seed, self.seed = self.seed, self.seed + 1
        self._move(seed, self.eps)
        up = closure()
        self._move(seed, -2 * self.eps)
        down = closure()
        self._move(seed, self.eps)
        return seed, float(up - down) / (2 * self.eps), [up, down]

    def apply(self, found: list[tuple[int, float]]) -> None:
        """Step along the mean of these perturbations."""
        rates = tuple(float(group["lr"]) for group in self.param_groups)
        for seed, g in found:
            self.trajectory.append((seed, g / len(found), rates))
            self._update(seed, g / len(found), rates, decay=1 / len(found))

    def replay(self, trajectory: Iterable[tuple[int, float, tuple[float, ...]]], *, samples: int | None = None) -> None:
        """Apply recorded steps to the parameters as they are now (the start of the recorded run)."""
        with torch.no_grad():
            for seed, g, rates in trajectory:
                self._update(seed, g, rates, decay=1 / (samples or self.samples))
                self.trajectory.append((seed, g, rates))
                self.seed = max(self.seed, seed + 1)

    def _noise(self, seed: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(group, parameter, z), one tensor's noise at a time; drawn on the CPU, so every device sees the same."""
        generator = torch.Generator().manual_seed(seed)
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    z = torch.randn(p.shape, generator=generator, dtype=torch.float32)
                    yield index, p, z.to(p.device, p.dtype)

    def _move(self, seed: int, size: float) -> None:
        for _, p, z in self._noise(seed):
            p.add_(z, alpha=size)

    def _update(self, seed: int, g: float, rates: tuple[float, ...], *, decay: float) -> None:
        for index, p, z in self._noise(seed):
            p.mul_(1 - rates[index] * self.param_groups[index]["weight_decay"] * decay)
            p.add_(z, alpha=-rates[index] * g)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"mezo": {"seed": self.seed, "trajectory": list(self.trajectory)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = state_dict["mezo"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "mezo"})
        self.seed, self.trajectory = int(own["seed"]), [tuple(t) for t in own["trajectory"]]
