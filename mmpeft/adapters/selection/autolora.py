"""AutoLoRA's search (Zhang et al. 2024, arXiv 2403.09113): the weights of the rank-one parts are learned on a
validation split through one unrolled step of the factors.

    search = mmpeft.AutoLoRASearch(model, lr=1e-2, inner_lr=1e-3)
    each step:  search.step(train_loss, val_loss)       # functions that run the model and return a scalar loss
                the usual step of the optimizer on the training loss
    plan = search.plan()                                # LoRA(rank=k) a site; attach it afresh and train

or `AutoLoRARanks` in `mmpeft.tasks.StepControl`, and a second run that starts from its adapter.

The gradient is d L_val(v - xi dL_train/dv, w) / dw, v the factors and w the logits. As in DARTS, its second-order part
is a difference of two gradients, so a step costs four backwards and no graph of graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.attach import attach, detach
from mmpeft.adapters.methods.dynamic_rank import AutoLoRA
from mmpeft.adapters.methods.lora import LoRA
from mmpeft.adapters.plan import Plan, Rule
from mmpeft.adapters.selection.controller import Controller, Loop, Loss, seeded
from mmpeft.adapters.selection.edit import pattern_of
from mmpeft.adapters.state import slots, state_of
from mmpeft.errors import ConfigError


class AutoLoRASearch:
    """Adam on the logits of every AutoLoRA site of an adapter, with the unrolled gradient.

    Args:
        lr: of the logits.
        inner_lr: xi, the step of the factors that is looked through; 0 is the first-order approximation.
        epsilon: size of the finite difference, over the norm of the validation gradient.

    Raises:
        ConfigError: there is no AutoLoRA site.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, inner_lr: float, epsilon: float = 1e-2, name: str | None = None
    ) -> None:
        found = [(n, d) for _, _, s in slots(model) for n, d in s.deltas(None if name is None else (name,))]
        self.deltas = [(n, d) for n, d in found if isinstance(d.method, AutoLoRA)]
        if not self.deltas:
            raise ConfigError("AutoLoRASearch: the model has no AutoLoRA adapter")
        self.model, self.inner_lr, self.epsilon = model, inner_lr, epsilon
        self.logits: list[Tensor] = [d.logits for _, d in self.deltas]
        self.factors: list[Tensor] = [t for _, d in self.deltas for t in (d.A, d.B)]
        self.optimizer = torch.optim.Adam(self.logits, lr=lr)

    def gradient(self, train: Loss, val: Loss) -> list[Tensor]:
        """The unrolled gradient of the logits; the factors are as before afterwards."""
        inner = self._grad(train(), self.factors) if self.inner_lr else []
        with torch.no_grad():
            before = [v.clone() for v in self.factors]
            for v, g in zip(self.factors, inner, strict=False):
                v.sub_(self.inner_lr * g)
        try:
            both = self._grad(val(), [*self.factors, *self.logits])
            outer, direct = both[: len(self.factors)], both[len(self.factors) :]
            if not self.inner_lr:
                return direct
            norm = torch.stack([g.norm() for g in outer]).norm()
            h = self.epsilon / max(float(norm), 1e-12)
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    for v, start, g in zip(self.factors, before, outer, strict=True):
                        v.copy_(start + sign * h * g)
                sides.append(self._grad(train(), self.logits))
        finally:
            with torch.no_grad():
                for v, start in zip(self.factors, before, strict=True):
                    v.copy_(start)
        return [d - self.inner_lr * (p - m) / (2 * h) for d, p, m in zip(direct, *sides, strict=True)]

    def step(self, train: Loss, val: Loss) -> None:
        """One Adam step of the logits."""
        for logits, g in zip(self.logits, self.gradient(train, val), strict=True):
            logits.grad = g
        self.optimizer.step()
        self.optimizer.zero_grad()

    def ranks(self) -> dict[str, int]:
        """Components at or above the threshold, by site name."""
        out = {}
        for _, d in self.deltas:
            assert isinstance(d.method, AutoLoRA)
            out[d.site.name] = int(d.method.kept(d).sum())
        return out

    def plan(self) -> Plan:
        """LoRA with the ranks found and the search's scale, a rule a site; lr and weight decay as in the rules they came
        from. A site without a component at the threshold is left out.

        Raises:
            ConfigError: that is every site.
        """
        ranks, rules = self.ranks(), []
        for name, d in self.deltas:
            rank = ranks[d.site.name]
            if not rank:
                continue
            rule = state_of(self.model).entries[name].rules[d.rule]
            assert isinstance(d.method, AutoLoRA)
            method = LoRA(rank=rank, alpha=d.method.resized(rank).alpha, dropout=d.method.dropout)
            rules.append(Rule(pattern_of(d.site), (method,), rule.get("lr"), rule.get("weight_decay")))
        if not rules:
            raise ConfigError(f"no component of {len(ranks)} sites reaches the threshold; search longer or lower it")
        return Plan(tuple(rules))

    @staticmethod
    def _grad(loss: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(loss, list(of), allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(of, found, strict=True)]


class AutoLoRARanks(Controller):
    """AutoLoRASearch beside a training: before every optimizer step one of the logits, on the batch at hand and a batch of
    the validation data. When training ends the adapter is replaced by LoRA of the ranks found, at its start: the second
    run's `start_from`.

    Args:
        lr, inner_lr, epsilon: as in `AutoLoRASearch`.
        seed: of the start of the LoRA.

    Raises:
        ConfigError: there is no AutoLoRA site, or no validation data.
    """

    measure = "rank"
    reshapes = True

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        inner_lr: float,
        epsilon: float = 1e-2,
        seed: int = 0,
        name: str = "default",
    ) -> None:
        self.search = AutoLoRASearch(model, lr=lr, inner_lr=inner_lr, epsilon=epsilon, name=name)
        self.model, self.name, self.seed, self.steps = model, name, seed, 0

    def join(self, loop: Loop) -> None:
        super().join(loop)
        if loop.validation is None:
            raise ConfigError("AutoLoRARanks learns ranks on validation data; the training has none")

    def look(self, loss: Loss) -> None:
        assert self.loop.validation is not None
        found = self.search.gradient(loss, self.loop.validation(self.steps))
        for logits, g in zip(self.search.logits, found, strict=True):
            logits.grad = self.loop.mean(g)
        self.search.optimizer.step()
        self.search.optimizer.zero_grad()

    def step(self) -> float:
        self.steps += 1
        return float(sum(self.search.ranks().values()))

    def close(self) -> None:
        plan = self.search.plan()
        detach(self.model, self.name)
        with seeded(self.seed, self.model):
            attach(self.model, plan, self.name, check=False)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "adam": self.search.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.search.optimizer.load_state_dict(dict(state["adam"]))
