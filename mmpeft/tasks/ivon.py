"""IVON (Shen et al. 2024, arXiv 2402.17641) for adapters: a variational Gaussian over A and B at the cost of Adam
(IVON-LoRA, Cong et al. 2024, arXiv 2411.04421).

    optimizer = IVON(mmpeft.parameter_groups(model, lr=0.03), data_size=len(dataset))
    each step:
        with optimizer.sampled():                  # weights drawn from the posterior
            loss = task(model(x)); loss.backward()
        optimizer.step();  optimizer.zero_grad()   # weights are the mean again
    with optimizer.sampled(): ...                  # a posterior sample at test time

or, under Lightning, `PosteriorSamples` in `mmpeft.tasks.StepControl`.

The gradient g at a sample w = m + s e gives the curvature estimate g e / s; mean and curvature are averaged as in Adam:

    g <- b1 g + (1 - b1) g_hat                            s = 1 / sqrt(N (h + decay))
    h <- b2 h + (1 - b2) h_hat + (1 - b2)^2 (h - h_hat)^2 / (2 (h + decay))
    m <- m - lr (g / (1 - b1^t) + decay m) / (h + decay)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.selection.controller import Controller, Loop
from mmpeft.errors import ConfigError


class IVON(torch.optim.Optimizer):
    """Improved variational online Newton.

    Args:
        params: parameters or groups; a group's `weight_decay` is the prior's precision over N, and positive.
        data_size: N, number of training samples (a larger one cools the posterior).
        hess_init: start of the curvature h.
        betas: of the averages of gradient and curvature.
        seed: of the samples.

    Raises:
        ConfigError: values out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.03,
        *,
        data_size: float,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99999),
        weight_decay: float = 1e-4,
        seed: int = 0,
    ) -> None:
        if not (lr > 0 and data_size > 0 and hess_init > 0 and all(0 <= b < 1 for b in betas)):
            raise ConfigError(
                f"lr {lr}, data_size {data_size}, hess_init {hess_init}, betas {betas}; expected positive numbers and "
                "betas in [0, 1)"
            )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            group["weight_decay"] = group["weight_decay"] or weight_decay  # parameter_groups writes 0 where none is set
            if not group["weight_decay"] > 0:
                raise ConfigError("IVON needs a positive weight_decay: it is the prior's precision")
        self.data_size, self.hess_init, self.betas = data_size, hess_init, betas
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: list[tuple[dict[str, Any], Tensor, Tensor]] = []  # (group, parameter, noise) of open samples

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Parameters drawn from the posterior; the mean again afterwards. Gradients made inside count for `step`."""
        if self.drawn:
            raise ConfigError("sampled() inside sampled()")
        noise = []
        with torch.no_grad():
            for group, p in self._parameters():
                state = self._state(p)
                e = torch.randn(p.shape, generator=self.generator, dtype=torch.float32).to(p.device, p.dtype)
                noise.append((group, p, e))
                state["mean"] = p.detach().clone()
                p.add_(e * self._spread(group, p))
        before = [p.grad for _, p, _ in noise]
        for _, p, _ in noise:
            p.grad = None
        self.drawn = noise
        try:
            yield
        finally:
            with torch.no_grad():
                for (group, p, e), old in zip(self.drawn, before, strict=True):
                    state = self.state[p]
                    p.copy_(state.pop("mean"))
                    if p.grad is not None:
                        curvature = p.grad * e / self._spread(group, p)
                        state["curvature"] = state.get("curvature", torch.zeros_like(p)) + curvature
                        state["samples"] = state.get("samples", 0) + 1
                        p.grad = p.grad if old is None else p.grad + old
                    else:
                        p.grad = old
            self.drawn = []

    def spread(self, p: Tensor) -> Tensor:
        """The posterior's standard deviation of a parameter."""
        for group, q in self._parameters():
            if q is p:
                return self._spread(group, p)
        raise ConfigError("spread: not a parameter of this optimizer")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update mean and curvature from the gradients made in `sampled()` since the last step (averaged over samples).

        Args:
            closure: makes the gradients, in `sampled()`, and gives what is returned; None: they are there.

        Raises:
            ConfigError: gradients were made outside `sampled()`, or it is still open.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.drawn:
            raise ConfigError("IVON.step comes after `with optimizer.sampled()`, not inside")
        b1, b2 = self.betas
        for group, p in self._parameters():
            if p.grad is None:
                continue
            state = self._state(p)
            n = state.pop("samples", 0)
            if not n:
                raise ConfigError("a gradient was made outside `with optimizer.sampled()`; it has no curvature")
            h, decay = state["h"], group["weight_decay"]
            h_hat = state.pop("curvature") / n
            state["step"] += 1
            state["g"].lerp_(p.grad / n, 1 - b1)
            correction = (1 - b2) ** 2 * (h - h_hat).square() / (2 * (h + decay))
            h.mul_(b2).add_(h_hat, alpha=1 - b2).add_(correction)
            g = state["g"] / (1 - b1 ** state["step"])
            p.sub_(group["lr"] * (g + decay * p) / (h + decay))
        return loss

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    yield group, p

    def _state(self, p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state |= {"step": 0, "g": torch.zeros_like(p), "h": torch.full_like(p, self.hess_init)}
        return state

    def _spread(self, group: dict[str, Any], p: Tensor) -> Tensor:
        h: Tensor = self._state(p)["h"]
        precision: Tensor = self.data_size * (h + group["weight_decay"])
        return precision.rsqrt()


class PosteriorSamples(Controller):
    """IVON in a training loop: every micro-batch sees weights of its own drawn from the posterior.

    Raises:
        ConfigError: the loop's optimizer is another.
    """

    KEEPS = ("generator",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def optimizer(self) -> IVON:
        """The loop's."""
        assert isinstance(self.loop.optimizer, IVON)
        return self.loop.optimizer

    @property
    def generator(self) -> torch.Generator:
        """Of the samples, which the optimizer's own state leaves out."""
        return self.optimizer.generator

    def join(self, loop: Loop) -> None:
        super().join(loop)
        if not isinstance(loop.optimizer, IVON):
            raise ConfigError(f"PosteriorSamples is for IVON; the optimizer is {type(loop.optimizer).__name__}")

    def draw(self) -> None:
        self.optimizer.zero_grad()  # `sampled` keeps what it finds

    def watch(self) -> AbstractContextManager[None]:
        return self.optimizer.sampled()

    def before_step(self) -> None:
        # The loss of one of n micro-batches is divided by n already, and IVON takes the mean of its samples.
        for state in self.optimizer.state.values():
            if "samples" in state:
                state["curvature"].mul_(state["samples"])
        for p in self.model.parameters():
            if p.grad is not None and "samples" in self.optimizer.state.get(p, {}):
                p.grad.mul_(self.optimizer.state[p]["samples"])
