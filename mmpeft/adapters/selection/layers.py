"""IST, importance-aware sparse tuning (Yao et al. 2024, arXiv 2410.11772): on top of any adapter, a few layers train at
a time, drawn by an importance that is itself learned. The survey files it under importance of parameters; it is of
layers.

    sampler = mmpeft.LayerSampler(model, active=4)
    every step:      sampler.draw()
    every ten steps: sampler.update(lambda: task(model(x)))

`update` tries a few suppressions of half the layers, their adapters scaled to a quarter: a layer whose suppression makes
the loss rise gains importance, by the policy gradient of the sigmoid that draws it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta, Method
from mmpeft.adapters.methods.lora_prune import layer_of
from mmpeft.adapters.state import sites_of
from mmpeft.errors import ConfigError, Unsupported

# An update is linear in these tensors together, so scaling them scales it.
LINEAR = ("B", "up_weight", "up_bias", "value", "delta")


class LayerSampler:
    """Draws the layers that train, and learns their importance.

    Args:
        active: layers that train at a time (a quarter of them in the paper).
        suppressed: layers that a trial suppresses; None is half.
        trials: suppressions tried in an update.
        factor: what a suppressed adapter is scaled by.
        lr: of the importances.
        seed: of all draws.

    Attributes:
        importance: one number a layer, 0 at the start [layers].

    Raises:
        ConfigError: fewer than two numbered layers, or numbers out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        active: int,
        suppressed: int | None = None,
        trials: int = 3,
        factor: float = 0.25,
        lr: float = 10.0,
        seed: int = 0,
        name: str = "default",
    ) -> None:
        self.layers: dict[int, list[Delta]] = {}
        for d in sites_of(model, Method, name):
            if (number := layer_of(d.site)) is not None:
                self.layers.setdefault(number, []).append(d)
        n = len(self.layers)
        self.suppressed = max(1, n // 2) if suppressed is None else suppressed
        if n < 2 or not 1 <= active <= n or not 1 <= self.suppressed < n:
            raise ConfigError(f"{n} layers, active {active}, suppressed {self.suppressed}; expected at least 2 layers")
        if trials < 2 or not 0 <= factor < 1 or not lr > 0:
            raise ConfigError(f"trials {trials}, factor {factor}, lr {lr}; expected >= 2, in [0, 1), > 0")
        self.active, self.trials, self.factor, self.lr = active, trials, factor, lr
        self.generator = torch.Generator().manual_seed(seed)
        self.importance = torch.zeros(n)

    def draw(self) -> list[int]:
        """Choose the layers that train now, with probabilities after the sigmoid of their importance; the others get no
        gradients and the optimizer passes over them. Returns their numbers."""
        numbers = list(self.layers)
        chosen = self._pick(torch.sigmoid(self.importance), self.active)
        for i, number in enumerate(numbers):
            for p in self._trained([number]):
                p.requires_grad_(i in chosen)
                if i not in chosen:
                    p.grad = None
        return [numbers[i] for i in chosen]

    def release(self) -> None:
        """All layers train again."""
        for p in self._trained(self.layers):
            p.requires_grad_(True)

    @torch.no_grad()
    def update(self, loss: Callable[[], Tensor]) -> Tensor:
        """Learn from `trials` suppressions on one batch; returns the importances.

        Args:
            loss: runs the model on the batch.
        """
        numbers = list(self.layers)
        tried = [self._pick(torch.sigmoid(-self.importance), self.suppressed) for _ in range(self.trials)]
        rewards = []
        for picked in tried:
            with self.suppress([numbers[i] for i in picked]):
                rewards.append(math.exp(-float(loss())))
        mean, p = sum(rewards) / len(rewards), torch.sigmoid(self.importance)
        for picked, reward in zip(tried, rewards, strict=True):
            self.importance[picked] -= self.lr * (reward - mean) * (p * (1 - p))[picked]
        return self.importance

    @contextmanager
    def suppress(self, numbers: Iterable[int]) -> Iterator[None]:
        """Within it, the adapters of these layers are scaled by `factor`.

        Raises:
            Unsupported: a method whose update is in no tensor linear.
        """
        held: list[tuple[Tensor, Tensor]] = []
        for d in (d for number in numbers for d in self.layers[number]):
            mine = [p for n in LINEAR if (p := d._parameters.get(n)) is not None]
            if not mine:
                raise Unsupported(f"IST scales adapters down; {d.method.name} at {d.site.name} is linear in no tensor")
            held += [(p, p.detach().clone()) for p in mine]
        with torch.no_grad():
            for tensor, _ in held:
                tensor.mul_(self.factor)
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in held:
                    tensor.copy_(value)

    def _pick(self, weights: Tensor, n: int) -> list[int]:
        return sorted(torch.multinomial(weights, n, generator=self.generator).tolist())

    def _trained(self, numbers: Iterable[int]) -> Iterator[nn.Parameter]:
        for d in (d for number in numbers for d in self.layers[number]):
            for n in d.trained:
                p = d._parameters[n]
                assert p is not None
                yield p
