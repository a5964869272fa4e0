"""What runs beside the optimizer and keeps some of a method's numbers still or at zero.

    RosePruner   RoseLoRA's row- and column-wise pruning (Wang et al. 2024, arXiv 2406.10777)
    ChildMask    Child-Tuning_F: a Bernoulli gradient mask a step (Xu et al. 2021, arXiv 2109.05687). The survey says
                 gradient norms.
    WorstSamples FISH-DIP's mask (Das et al. 2023, arXiv 2311.03748): Fisher information of the worst samples, anew at
    times
    TopGradient  gradient-mask tuning: only the largest accumulated gradients update (Li et al. 2025, arXiv 2406.15330)

The masks are called between `backward` and `step`, the pruner after `step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mmpeft.adapters.methods.lora_kin import RoseLoRA
from mmpeft.adapters.selection.controller import Controller, samples_of, trained_by
from mmpeft.adapters.selection.criteria import Evidence, criterion, top
from mmpeft.adapters.selection.rank import Importance
from mmpeft.adapters.selection.schedules import Cubic
from mmpeft.adapters.state import slots
from mmpeft.errors import ConfigError


class RosePruner(Controller):
    """After every optimizer step: smooth the sensitivities |w g| of every RoseLoRA site's A and B, and zero what falls
    below the top share of its row of A or column of B; the share falls from 1 to `1 - sparsity` cubically between steps
    `begin` and `end`.

    Args:
        begin, end: steps between which the share falls (the paper's warm-up and cool-down lie outside).
        beta: of the exponential average, 0.8 in the paper.
    """

    KEEPS = ("steps", "scores")
    measure = "kept"

    def __init__(self, model: nn.Module, *, begin: int, end: int, beta: float = 0.8, name: str | None = None) -> None:
        found = [d for _, _, slot in slots(model) for _, d in slot.deltas(None if name is None else (name,))]
        self.deltas = [d for d in found if isinstance(d.method, RoseLoRA)]
        if not self.deltas:
            raise ConfigError("RosePruner: the model has no RoseLoRA adapter")
        self.kept = [Cubic(1.0, 1 - cast(RoseLoRA, d.method).sparsity, begin, end) for d in self.deltas]
        self.importance, self.steps = Importance("sensitivity", beta, None, warm=True), 0

    @property
    def scores(self) -> dict[str, Tensor]:
        """Smoothed sensitivities."""
        return self.importance.mean

    @scores.setter
    def scores(self, held: dict[str, Tensor]) -> None:
        self.importance.mean = held

    @torch.no_grad()
    def step(self) -> float:
        """Prune; returns the share that is kept now. Gradients must still be there (call before `zero_grad`)."""
        self.steps += 1
        kept = 1.0
        for i, (delta, schedule) in enumerate(zip(self.deltas, self.kept, strict=True)):
            kept = schedule(self.steps)
            for name, axis in (("A", -1), ("B", -2)):
                w: Tensor = getattr(delta, name)
                self.importance.update(f"{i} {delta.site.name}.{name}", w)
                score = self.importance(f"{i} {delta.site.name}.{name}")
                keep = max(1, round(kept * w.shape[axis]))
                drop = score.argsort(dim=axis, descending=True).narrow(axis, keep, w.shape[axis] - keep)
                w.scatter_(axis if axis >= 0 else w.ndim + axis, drop, 0.0)
        return kept


class GradientMask(Controller):
    """Called between `backward` and `step`, to mask gradients in place."""

    def __call__(self) -> None:
        """Mask the gradients."""
        raise NotImplementedError

    def before_step(self) -> None:
        self()


class ChildMask(GradientMask):
    """Child-Tuning_F: each gradient entry is kept with probability p and divided by it, anew every step.

    Args:
        parameters: or a model, for all that it trains.
        p: share of entries that update.
    """

    KEEPS = ("generator",)

    def __init__(self, parameters: nn.Module | Iterable[nn.Parameter], *, p: float, seed: int = 0) -> None:
        if not 0 < p <= 1:
            raise ConfigError(f"p {p}; expected 0 < p <= 1")
        self.parameters, self.p = trained_by(parameters), p
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> None:
        """Mask the gradients in place."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                keep = torch.rand(parameter.shape, generator=self.generator) < self.p
                parameter.grad.mul_(keep.to(parameter.grad)).div_(self.p)


class TopGradient(GradientMask):
    """Gradient-mask tuning: of each tensor only the `density` of entries with the largest |gradient| update, the
    gradient being what has accumulated since the last step.

    Args:
        parameters: or a model, for all that it trains.
        density: share of entries that update.
    """

    def __init__(self, parameters: nn.Module | Iterable[nn.Parameter], *, density: float) -> None:
        if not 0 < density <= 1:
            raise ConfigError(f"density {density}; expected 0 < density <= 1")
        self.parameters, self.density = trained_by(parameters), density

    def __call__(self) -> None:
        """Mask the gradients in place."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                size = parameter.grad.abs().flatten()
                drop = size.argsort(descending=True, stable=True)[max(1, round(self.density * len(size))) :]
                parameter.grad.view(-1)[drop] = 0


class WorstSamples(GradientMask):
    """FISH-DIP: only the `density` of all entries with the largest Fisher information on the samples with the largest
    losses update; `update` chooses them anew. (Adam's momentum still moves entries that were chosen before; SGD leaves
    them where they are.)

    Args:
        parameters: or a model, for all that it trains.
        density: share of entries that update.
        worst: number of samples that count.
        every, pool: in a training loop that gives samples, steps between updates and samples looked at in one.
    """

    KEEPS = ("steps", "kept")
    reads_samples = True

    def __init__(
        self,
        parameters: nn.Module | Iterable[nn.Parameter],
        *,
        density: float,
        worst: int,
        every: int = 100,
        pool: int = 64,
    ) -> None:
        if not 0 < density <= 1 or not 1 <= worst <= pool or every < 1:
            raise ConfigError(
                f"density {density}, worst {worst}, pool {pool}, every {every}; expected 0 < density <= 1, "
                "1 <= worst <= pool and every >= 1"
            )
        self.parameters, self.density, self.worst = trained_by(parameters), density, worst
        self.every, self.pool, self.steps = every, pool, 0
        self.kept: list[Tensor] = []

    def draw(self) -> None:
        if self.steps % self.every == 0:
            self.update(samples_of(self.loop, self.pool))

    def step(self) -> None:
        self.steps += 1

    def update(self, losses: Sequence[Callable[[], Tensor]]) -> list[int]:
        """Choose entries from the losses of single samples; returns the numbers of the samples that counted."""
        with torch.no_grad():
            values = [float(loss()) for loss in losses]
        chosen = sorted(range(len(values)), key=lambda i: -values[i])[: self.worst]
        seen = [Evidence(p.detach()) for p in self.parameters]
        for i in chosen:
            grads = torch.autograd.grad(losses[i](), self.parameters, allow_unused=True)
            for e, g in zip(seen, grads, strict=True):
                e.add(torch.zeros_like(e.value) if g is None else g)
        fisher = {str(i): criterion("fisher")(e) for i, e in enumerate(seen)}
        best = top(fisher, max(1, round(self.density * sum(f.numel() for f in fisher.values()))))
        self.kept = [torch.zeros(p.numel(), dtype=torch.bool, device=p.device) for p in self.parameters]
        for name, index in best.items():
            self.kept[int(name)][index] = True
        return chosen

    def __call__(self) -> None:
        """Mask the gradients in place."""
        if not self.kept:
            raise ConfigError("WorstSamples: call update(losses) before the first step")
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            if parameter.grad is not None:
                parameter.grad.mul_(kept.view(parameter.shape))
