"""Importance criteria: one interface for everything that selects weights (masks, pruning, growing, placement).

What is known of a tensor is its `Evidence`: value, start, and sums over gradients. A criterion is a function from
evidence to scores of the tensor's shape; the largest are kept.

    random              uniform
    magnitude           |w|                       small_magnitude   -|w| (PaFi)
    gradient            |sum g| / n
    fisher              sum g^2 / n               squared gradients of log-likelihoods, FISH Mask
    sensitivity         sum |w g| / n             first-order loss change of setting w to 0
    movement            -sum w g                  weights that move away from 0 (Sanh et al. 2020)
    change              |w - start|               lottery-ticket sparse fine-tuning
    second_order        (sum g)^2 / sum g^2       first-order gain over curvature, the Fisher information for it
    taylor              (sum w g / n)^2           the square of that change (Molchanov et al. 2019), LoRAPrune's
    wanda               |w| ||x||                 weight times the norm of its input (Sun et al. 2023, RoCoFT's score)

`gather` collects the evidence of a plan's sites on a model from losses; it never changes the model. `smooth` is the
exponential average that AdaLoRA and RoseLoRA put on sensitivities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.methods.low_rank import site_seed
from mmpeft.adapters.plan import Target
from mmpeft.adapters.site import slice_rows
from mmpeft.errors import ConfigError, NameNotFound, nearest

Losses = Iterable[Callable[[], "Tensor | tuple[Tensor, float]"]]


@dataclass
class Evidence:
    """What a criterion may look at: a tensor's value, its start, and sums over `n` gradients."""

    value: Tensor
    start: Tensor | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    n: float = 0.0
    g: Tensor | None = None  # sum of gradients
    g2: Tensor | None = None  # of their squares
    wg: Tensor | None = None  # of value * gradient
    abs_wg: Tensor | None = None  # of |value * gradient|
    x2: Tensor | None = None  # of the squares of each input [in]

    def add(self, grad: Tensor, weight: float = 1.0) -> None:
        """Count one gradient, `weight` times."""
        grad = grad.to(self.value.dtype)
        parts = {"g": grad, "g2": grad.square(), "wg": self.value * grad, "abs_wg": (self.value * grad).abs()}
        for name, part in parts.items():
            before = getattr(self, name)
            setattr(self, name, weight * part if before is None else before + weight * part)
        self.n += weight


def _mean(name: str) -> Callable[[Evidence], Tensor]:
    def score(e: Evidence) -> Tensor:
        total = getattr(e, name)
        if total is None:
            raise ConfigError("this criterion needs gradients: pass losses to gather them")
        return torch.div(total, e.n)

    return score


def _random(e: Evidence) -> Tensor:
    return torch.rand(e.value.shape, generator=e.generator).to(e.value.device)


def _change(e: Evidence) -> Tensor:
    if e.start is None:
        raise ConfigError("criterion 'change' compares with a start: gather it with start=")
    return (e.value - e.start).abs()


def _second_order(e: Evidence) -> Tensor:
    return _mean("g")(e).square() / _mean("g2")(e).clamp_min(torch.finfo(e.value.dtype).tiny)


def _wanda(e: Evidence) -> Tensor:
    if e.x2 is None:
        raise ConfigError("criterion 'wanda' needs the inputs of a layer that is called: pass losses to gather them")
    return e.value.abs() * e.x2.sqrt()


CRITERIA: dict[str, Callable[[Evidence], Tensor]] = {
    "random": _random,
    "magnitude": lambda e: e.value.abs(),
    "small_magnitude": lambda e: -e.value.abs(),
    "gradient": lambda e: _mean("g")(e).abs(),
    "fisher": _mean("g2"),
    "sensitivity": _mean("abs_wg"),
    "movement": lambda e: -_mean("wg")(e),
    "change": _change,
    "second_order": _second_order,
    "taylor": lambda e: _mean("wg")(e).square(),
    "wanda": _wanda,
}
DATA_FREE = ("random", "magnitude", "small_magnitude")


def criterion(name: str) -> Callable[[Evidence], Tensor]:
    """A criterion by name.

    Raises:
        NameNotFound: with the nearest names.
    """
    if name not in CRITERIA:
        raise NameNotFound(f"unknown criterion {name!r}{nearest(name, CRITERIA)}; known: {', '.join(CRITERIA)}")
    return CRITERIA[name]


def gather(
    model: nn.Module,
    targets: Iterable[Target],
    losses: Losses = (),
    *,
    seed: int = 0,
    start: Mapping[str, Tensor] | None = None,
) -> dict[str, Evidence]:
    """Evidence of each target's matrix view `[*, out, in]`, by site name.

    Args:
        losses: functions that run `model` and return a scalar loss, or (loss, weight). For the Fisher criterion each is
            minus the log likelihood of one sample (`fisher_losses` makes them); what a batch of several sums over, its
            squares do not see.
        start: tensors by their path in the model, for "change": the values before a fine-tuning run.
    """
    found: dict[str, Evidence] = {}
    stored: dict[str, tuple[Target, nn.Parameter]] = {}
    for target in targets:
        parameter = target.owner._parameters.get(target.site.tensor)
        if parameter is None or target.site.layout is None:
            raise ConfigError(f"{target.site.name} is not a stored parameter; its entries cannot be scored")
        stored[target.site.name] = (target, parameter)
        path = f"{target.site.path}.{target.site.tensor}".lstrip(".")
        begin = None if start is None else _view(target, start[path]).clone()
        generator = site_seed(seed, target.site)
        found[target.site.name] = Evidence(_view(target, parameter.detach()).clone(), begin, generator)
    flags = [(p, p.requires_grad) for _, p in stored.values()]
    hooks = [t.owner.register_forward_pre_hook(_inputs_to(found[name])) for name, (t, _) in stored.items()]
    try:
        for p, _ in flags:
            p.requires_grad_(True)
        for loss in losses:
            with torch.enable_grad():
                made = loss()
            value, weight = made if isinstance(made, tuple) else (made, 1.0)
            grads = torch.autograd.grad(value, [p for _, p in stored.values()], allow_unused=True)
            for (name, (target, p)), grad in zip(stored.items(), grads, strict=True):
                found[name].add(_view(target, torch.zeros_like(p) if grad is None else grad), weight)
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in flags:
            p.requires_grad_(flag)
    return found


def _inputs_to(e: Evidence) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that adds up the squares of a layer's inputs, where its last axis is the matrix' columns."""

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args and isinstance(args[0], Tensor) and args[0].is_floating_point() else None
        if x is not None and e.value.ndim == 2 and x.shape[-1] == e.value.shape[-1]:
            square = x.detach().to(e.value.dtype).reshape(-1, x.shape[-1]).square().sum(0)
            e.x2 = square if e.x2 is None else e.x2 + square

    return note


def _view(target: Target, t: Tensor) -> Tensor:
    assert target.site.layout is not None
    m = slice_rows(target.site.layout.to_matrix(t), target.site.rows)
    return m.to(torch.promote_types(m.dtype, torch.float32))


def fisher_losses(
    forward: Callable[[Any], Tensor], samples: Iterable[Any]
) -> Iterator[Callable[[], tuple[Tensor, float]]]:
    """Losses of the (true) diagonal Fisher information, E_x sum_y p(y | x) (d log p(y | x))^2, one for each sample and
    class.

    Args:
        forward: sample -> logits [classes] or [1, classes].
        samples: inputs, one at a time.
    """
    for sample in samples:
        with torch.no_grad():
            p = F.softmax(forward(sample).flatten().float(), -1)
        for y, weight in enumerate(p.tolist()):
            # The expectation over y is a sum of weights 1 a sample, so that n counts samples.
            yield lambda sample=sample, y=y, weight=weight: (  # type: ignore[misc]
                -F.log_softmax(forward(sample).flatten().float(), -1)[y],
                weight,
            )


def top(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Flat indices of the `count` largest scores over all tensors together, ascending, by tensor; ties go to the
    earlier."""
    total = sum(s.numel() for s in scores.values())
    if not 1 <= count <= total:
        raise ConfigError(f"{count} of {total} weights to select; expected 1 to {total}")
    flat = torch.cat([s.flatten() for s in scores.values()])
    best = flat.argsort(descending=True, stable=True)[:count].sort().values
    edges, out = 0, {}
    for name, s in scores.items():
        mine = best[(best >= edges) & (best < edges + s.numel())] - edges
        if len(mine):
            out[name] = mine
        edges += s.numel()
    return out


def check_share(keep: float) -> None:
    """Refuse a share that is not in (0, 1]."""
    if not 0 < keep <= 1:
        raise ConfigError(f"keep {keep}; expected 0 < keep <= 1")


def smooth(average: Tensor | None, new: Tensor, beta: float) -> Tensor:
    """beta average + (1 - beta) new; `new` itself at the first step."""
    return new.clone() if average is None else average.lerp(new, 1 - beta)
