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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta, Factors, Method
from mmpeft.adapters.methods.bottleneck import first_tensor
from mmpeft.adapters.methods.lora_prune import layer_of
from mmpeft.adapters.selection.controller import Controller
from mmpeft.adapters.state import sites_of, slots, state_of
from mmpeft.errors import ConfigError, Unsupported


class Damped(Method):
    """Another method with `factor` times its update, whatever its maths."""

    def __init__(self, method: Method, factor: float) -> None:
        self.inner, self.factor = method, factor
        for name in ("name", "kind", "space", "mixes", "dropout"):
            setattr(self, name, getattr(method, name))

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        f = self.inner.factors(W, p)
        return None if f is None or not f.additive else replace(f, scale=f.scale * self.factor)

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        return W + self.factor * (self.inner.weight(W, p) - W)

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        y, _ = first_tensor(call(*args, **kwargs))
        changed, put = first_tensor(self.inner.around(p, call, *args, **kwargs))
        return put(y + self.factor * (changed - y))


class LayerSampler(Controller):
    """Draws the layers that train, and learns their importance.

    Args:
        active: layers that train at a time (a quarter of them in the paper).
        suppressed: layers that a trial suppresses; None is half.
        trials: suppressions tried in an update.
        factor: what a suppressed adapter is scaled by.
        lr: of the importances.
        every: in a training loop, steps between updates, each on the batch at hand.
        seed: of all draws.

    Attributes:
        importance: one number a layer, 0 at the start [layers].

    Raises:
        ConfigError: fewer than two numbered layers, or numbers out of range.
    """

    KEEPS = ("steps", "importance", "generator")

    def __init__(
        self,
        model: nn.Module,
        *,
        active: int,
        suppressed: int | None = None,
        trials: int = 3,
        factor: float = 0.25,
        lr: float = 10.0,
        every: int = 10,
        seed: int = 0,
        name: str | None = "default",
    ) -> None:
        self.model = model
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
        if every < 1:
            raise ConfigError(f"every {every}; expected at least 1")
        self.active, self.trials, self.factor, self.lr, self.every = active, trials, factor, lr, every
        self.steps = 0
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

    def look(self, loss: Callable[[], Tensor]) -> None:
        if self.steps and self.steps % self.every == 0:
            self.update(loss)

    def step(self) -> None:
        self.steps += 1

    def close(self) -> None:
        self.release()

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
                rewards.append(math.exp(-float(self.loop.mean(loss().detach()))))
        mean, p = sum(rewards) / len(rewards), torch.sigmoid(self.importance)
        for picked, reward in zip(tried, rewards, strict=True):
            self.importance[picked] -= self.lr * (reward - mean) * (p * (1 - p))[picked]
        return self.importance

    @contextmanager
    def suppress(self, numbers: Iterable[int]) -> Iterator[None]:
        """Within it, the updates of these layers' adapters are scaled by `factor`: W + factor (W' - W), y + factor (y' - y).

        Raises:
            Unsupported: a method that inserts tokens, of whose update there is no part; or a stacked adapter.
        """
        held = [(d, d.method) for number in numbers for d in self.layers[number]]
        for d, method in held:
            if d.site.kind == "tokens":
                raise Unsupported(f"IST scales updates; {method.name} at {d.site.name} inserts tokens")
        if state_of(self.model).indexed:
            raise Unsupported("IST scales single sites; call `unstack` first")
        try:
            for d, method in held:
                d.method = Damped(method, self.factor)
            self._forget()
            yield
        finally:
            for d, method in held:
                d.method = method
            self._forget()

    def _forget(self) -> None:
        """Drop weights kept from before: they are known by their tensors, which stay the same here."""
        for _, _, slot in slots(self.model):
            slot.cache = {}

    def _pick(self, weights: Tensor, n: int) -> list[int]:
        return sorted(torch.multinomial(weights, n, generator=self.generator).tolist())

    def _trained(self, numbers: Iterable[int]) -> Iterator[nn.Parameter]:
        for d in (d for number in numbers for d in self.layers[number]):
            for n in d.trained:
                p = d._parameters[n]
                assert p is not None
                yield p
