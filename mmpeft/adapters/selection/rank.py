"""What changes the rank of an adapter over the steps: a controller that runs a policy of `rank_policies.py`.

    controller = mmpeft.RankController(model, mmpeft.Budget(target=4, total_steps=1000))
    loop:  loss = task(model(x)) + controller.penalty();  loss.backward();  optimizer.step()
           controller.step(t)               # t = 1, 2, ...: after the optimizer's step, gradients still there
           optimizer.zero_grad()

Schedules are functions of the step (`schedules.py`); importance comes from `criteria.py` through `Importance`,
which adds the moving average and uncertainty of AdaLoRA. A policy writes to the adapter's own tensors (`mask`,
`lam`, `g`, `size`), so an adapter file holds its decisions; what else it remembers is in `state_dict`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta
from mmpeft.adapters.methods.dynamic_rank import Elastic
from mmpeft.adapters.selection.compact import compact
from mmpeft.adapters.selection.controller import Controller
from mmpeft.adapters.selection.criteria import Evidence, criterion, smooth
from mmpeft.adapters.state import slots
from mmpeft.errors import ConfigError

log = logging.getLogger(__name__)
Sites = Mapping[str, Delta]


class Importance:
    """Smoothed scores of tensors, AdaLoRA's equations 8 to 10: I = criterion, I' = EMA of I, U' = EMA of |I - I'|; the
    score is I' U'.

    Args:
        criterion: one of `criteria.CRITERIA`; "sensitivity" is the paper's |w g|.
        beta1, beta2: of the two averages, which start at 0; beta2 None leaves the uncertainty out.
        warm: the average starts at the first value instead (RoseLoRA, APT); without the uncertainty.
    """

    def __init__(
        self,
        criterion_name: str = "sensitivity",
        beta1: float = 0.85,
        beta2: float | None = 0.85,
        *,
        warm: bool = False,
    ) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if beta is not None and not 0 <= beta < 1:
                raise ConfigError(f"{name} {beta}; expected 0 <= {name} < 1")
        if warm and beta2 is not None:
            raise ConfigError("warm averages have no spread: pass beta2=None")
        self.criterion, self.beta1, self.beta2, self.warm = criterion(criterion_name), beta1, beta2, warm
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, name: str, w: Tensor) -> None:
        """Count one step's gradient of `w`.

        Raises:
            ConfigError: `w` has no gradient.
        """
        if w.grad is None:
            raise ConfigError(f"{name} has no gradient; step the controller after backward and before zero_grad")
        evidence = Evidence(w.detach())
        evidence.add(w.grad)
        now = self.criterion(evidence)
        mean = smooth(self.mean.get(name, None if self.warm else torch.zeros_like(now)), now, self.beta1)
        if self.beta2 is not None:
            self.spread[name] = smooth(self.spread.get(name, torch.zeros_like(now)), (now - mean).abs(), self.beta2)
        self.mean[name] = mean

    def __call__(self, name: str) -> Tensor:
        """The score of each entry."""
        return self.mean[name] * self.spread[name] if self.beta2 is not None else self.mean[name]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """As tensors, for checkpoints."""
        return {"mean": dict(self.mean), "spread": dict(self.spread)}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """From `state()`."""
        self.mean, self.spread = dict(state["mean"]), dict(state["spread"])


class Policy(Protocol):
    """What a controller runs. `method` is the class of sites it works on."""

    method: type[Elastic]

    def begin(self, sites: Sites) -> None:
        """Check the sites and prepare their first step."""

    def step(self, sites: Sites, step: int) -> None:
        """After optimizer step number `step`, counted from 1."""

    def penalty(self, sites: Sites) -> Tensor | None:
        """What the loss gets, or None."""

    def state(self) -> dict[str, Any]:
        """What is not in the adapter's tensors."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """From `state()`."""


class RankController(Controller):
    """Runs a policy on the sites of an adapter (None: of all adapters) that are of the policy's method.

    Raises:
        ConfigError: there are none.

    Args:
        shrink: `compact` the adapter when a training loop ends, so that what is saved is as small as what is in use.
    """

    measure = "rank"

    def __init__(self, model: nn.Module, policy: Policy, *, name: str | None = None, shrink: bool = False) -> None:
        found = [
            (adapter, d)
            for _, _, slot in slots(model)
            for adapter, d in slot.deltas(None if name is None else (name,))
            if isinstance(d.method, policy.method)
        ]
        self.sites: dict[str, Delta] = {f"{adapter}: {d.site.name}": d for adapter, d in found}
        if not self.sites:
            raise ConfigError(f"{type(policy).__name__} works on {policy.method.__name__}; the model has no such site")
        self.policy, self.steps, self.model, self.name, self.reshapes = policy, 0, model, name, shrink
        with torch.no_grad():
            policy.begin(self.sites)

    def names(self) -> set[str]:
        return {*super().names(), type(self.policy).__name__}

    def step(self, step: int | None = None) -> int:
        """Once after each optimizer step, before `zero_grad`; returns the number of components in use.

        Args:
            step: number of the optimizer step just made, from 1; None counts the calls.
        """
        self.steps = self.steps + 1 if step is None else step
        with torch.no_grad():
            self.policy.step(self.sites, self.steps)
        return sum(self.ranks().values())

    def penalty(self) -> Tensor:
        """The policy's regulariser, a scalar to add to the loss; 0 where it has none."""
        found = self.policy.penalty(self.sites)
        return torch.zeros(()) if found is None else found

    def close(self) -> None:
        if self.reshapes:
            log.info("ranks after training: %s", compact(self.model, self.name))

    def ranks(self) -> dict[str, int]:
        """Components in use at each site."""
        return {name: int(method_of(d).kept(d).sum()) for name, d in self.sites.items()}

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints; masks and gates are the adapter's."""
        return {"steps": self.steps, "policy": self.policy.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From `state_dict()`, on the same plan."""
        self.steps = int(state["steps"])
        self.policy.restore(state["policy"])


def method_of(delta: Delta) -> Elastic:
    """The site's method, which is `Elastic`."""
    assert isinstance(delta.method, Elastic)
    return delta.method
