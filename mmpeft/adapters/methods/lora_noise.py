"""LoRA with a regulariser or a regime of its own.

LoRADropout    Lin et al. 2024, arXiv 2404.09610: whole input and output dimensions of A and B are dropped
PeriodicLoRA   Meng et al. 2024, arXiv 2402.16141: the pair is unloaded and starts again, so that ranks add up. (The
               survey calls it "Predict LoRA", a regulariser.)
orthogonal_penalty   O-LoRA, Wang et al. 2023, arXiv 2310.14152: new tasks in subspaces orthogonal to old ones'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Factors, Tensors, zeros
from mmpeft.adapters.methods.dynamic_rank import Elastic
from mmpeft.adapters.methods.low_rank import LowRank, at_least, kaiming
from mmpeft.adapters.selection.controller import Controller, Loop, seeded
from mmpeft.adapters.selection.rank import Sites
from mmpeft.adapters.site import Site
from mmpeft.adapters.state import sites_of, slots, state_of
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class LoRADropout(Elastic, name="lora-dropout", aliases=("loradropout",)):
    """`W' = W + alpha / rank * (m_out 1^T * B)(A * 1 m_in^T)` in training, m_in [in] and m_out [out] Bernoulli(1 - p),
    not rescaled; plain LoRA in eval (arXiv 2404.09610); rank (in + out) parameters. HF PEFT's lora_dropout drops
    activations.

    The masks are drawn by a `Masks` policy, once a step and the same for all reads of a forward.

    Args:
        p: share of dimensions dropped on each side.
    """

    beside = ("Masks",)
    p: float = 0.1
    AXES: ClassVar[dict[str, int | None]] = {"A": -2, "B": -1, "m_in": None, "m_out": None}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.p < 1:
            raise ConfigError(f"p {self.p}; expected 0 <= p < 1")

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        *stack, out, into = base.shape
        masks = {n: torch.ones_like(zeros(*stack, size, like=base)) for n, size in (("m_in", into), ("m_out", out))}
        return Tensors(self.pair(base), derived=masks)

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        if not p.training:
            return Factors(p.A, p.B, self.scale)
        return Factors(p.A * p.m_in.unsqueeze(-2), p.B * p.m_out.unsqueeze(-1), self.scale)

    def kept(self, p: Delta) -> Tensor:
        return torch.ones(p.A.shape[:-1], dtype=torch.bool, device=p.A.device)


@dataclass
class Masks:
    """Draws the masks of every LoRADropout site for the next step; a policy for `RankController`."""

    seed: int = 0
    method: type[Elastic] = field(default=LoRADropout, init=False)

    def begin(self, sites: Sites) -> None:
        self.step(sites, 0)

    def step(self, sites: Sites, step: int) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        for d in sites.values():
            assert isinstance(d.method, LoRADropout)
            for mask in (d.m_in, d.m_out):
                mask.copy_(torch.rand(mask.shape, generator=generator) >= d.method.p)

    def penalty(self, sites: Sites) -> Tensor | None:
        return None

    def state(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def restore(self, state: Any) -> None:
        self.seed = int(state["seed"])


@torch.no_grad()
def mask_ensemble(model: nn.Module, predict: Callable[[], Tensor], *, samples: int = 8, seed: int = 0) -> Tensor:
    """The mean of `predict()` over draws of the LoRADropout masks (the paper's test-time ensemble).

    Raises:
        ConfigError: the model has no LoRADropout adapter.
    """
    found = [d for _, _, s in slots(model) for _, d in s.deltas() if isinstance(d.method, LoRADropout)]
    if not found or samples < 1:
        raise ConfigError(f"{len(found)} LoRADropout sites, {samples} samples; expected at least 1 of each")
    before = [(d, d.training, d.m_in.clone(), d.m_out.clone()) for d in found]
    policy, sites = Masks(seed), {d.site.name: d for d in found}
    total: Tensor | None = None
    try:
        for i in range(samples):
            policy.step(sites, i)
            for d in found:
                d.training = True
            y = predict()
            total = y if total is None else total + y
    finally:
        for d, training, m_in, m_out in before:
            d.training = training
            d.m_in.copy_(m_in)
            d.m_out.copy_(m_out)
    assert total is not None
    return total / samples


@dataclass(frozen=True)
class PeriodicLoRA(LowRank, name="periodic-lora", aliases=("plora", "periodiclora", "predict-lora", "predict lora")):
    """`W' = W + alpha / rank * (B A + sum_k B_k A_k)`: one pair is trained, the pairs of earlier stages are unloaded
    beside W (arXiv 2402.16141); rank (in + out) trained parameters, stages times as many kept. PLoRA for short; the survey's
    "Predict LoRA".

    The paper adds the pair to W itself; here the sum is kept in the adapter, so that the base stays what it was.

    Args:
        stages: how often `unload` may be called.
    """

    beside = ("Unloads", "unload")
    stages: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, stages=1)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        *stack, out, into = base.shape
        kept = {
            "A_past": zeros(*stack, self.stages * self.rank, into, like=base),
            "B_past": zeros(*stack, out, self.stages * self.rank, like=base),
            "done": zeros(*stack, 1, like=base),
        }
        return Tensors(self.pair(base), frozen=kept)

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        return Factors(torch.cat([p.A, p.A_past], -2), torch.cat([p.B, p.B_past], -1), self.scale)


@torch.no_grad()
def unload(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    name: str | None = None,
    momentum: float = 0.0,
) -> int:
    """End a stage of every PeriodicLoRA site: 1 - momentum of B A is kept beside W, the new B is momentum times the old
    one, and A starts anew where momentum is 0. With any momentum the function stays what it was.

    Args:
        optimizer: its state for A and B is forgotten.

    Returns:
        The number of stages done.

    Raises:
        ConfigError: there is none, or all stages are used.
    """
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum {momentum}; expected 0 <= momentum < 1")
    names = None if name is None else (name,)
    found = [d for _, _, s in slots(model) for _, d in s.deltas(names) if isinstance(d.method, PeriodicLoRA)]
    if not found:
        raise ConfigError("unload: the model has no PeriodicLoRA adapter")
    stage = 0
    for d in found:
        assert isinstance(d.method, PeriodicLoRA)
        r, stage = d.method.rank, int(d.done.max())
        if stage >= d.method.stages:
            raise ConfigError(f"{d.site.name} has used its {d.method.stages} stages; attach with more")
        d.A_past.narrow(-2, stage * r, r).copy_(d.A)
        d.B_past.narrow(-1, stage * r, r).copy_((1 - momentum) * d.B)
        d.B.mul_(momentum)
        if not momentum:
            d.A.copy_(kaiming(*d.A.shape, like=d.A))
        d.done.add_(1)
        for p in (d.A, d.B):
            if optimizer is not None:
                optimizer.state.pop(p, None)
    return stage + 1


class Unloads(Controller):
    """`unload` after every so many optimizer steps, in any training loop.

    Args:
        every: steps of a stage.
        momentum: as in `unload`.
        seed: of the new A of each stage.

    Raises:
        ConfigError: there is no PeriodicLoRA, numbers out of range, or the run is longer than its stages.
    """

    KEEPS = ("steps",)
    kind: ClassVar[type[PeriodicLoRA]] = PeriodicLoRA

    def __init__(
        self, model: nn.Module, *, every: int, momentum: float = 0.0, seed: int = 0, name: str | None = None
    ) -> None:
        if every < 1 or not 0 <= momentum < 1:
            raise ConfigError(f"every {every}, momentum {momentum}; expected >= 1, in [0, 1)")
        self.deltas: list[Delta] = sites_of(model, self.kind, name)
        self.model, self.every, self.momentum, self.seed, self.name, self.steps = model, every, momentum, seed, name, 0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The loop's."""
        if self.loop.optimizer is None:
            raise ConfigError(f"{type(self).__name__} needs the loop's optimizer (`join`)")
        return self.loop.optimizer

    def join(self, loop: Loop) -> None:
        super().join(loop)
        stages = min(d.method.stages for d in self.deltas if isinstance(d.method, PeriodicLoRA))
        if loop.total is not None and loop.total // self.every > stages:
            raise ConfigError(
                f"{loop.total} steps, {self.every} a stage, make {loop.total // self.every} stages; the plan has "
                f"stages={stages}"
            )

    def step(self) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            with seeded(self.seed * 1_000_003 + self.steps, self.model):
                self.end_stage()

    def end_stage(self) -> None:
        """What happens at the end of one."""
        unload(self.model, name=self.name, momentum=self.momentum, optimizer=self.optimizer)


def orthogonal_penalty(model: nn.Module, new: str, old: Sequence[str]) -> Tensor:
    """O-LoRA's sum over sites and earlier adapters of ||A_old A_new^T||^2, to be added to the loss of task `new`
    (arXiv 2310.14152): rows of A span an adapter's input subspace. Old adapters should be active beside the new one and
    not trainable.

    Raises:
        NameNotFound: an adapter the model does not have.
        ConfigError: the adapters share no site with a matrix A, or an A is none of rank rows over the inputs, or the new
            one is not trained (LoRA-FA, VeRA).
    """
    state_of(model).check_names([new, *old])
    total: Tensor | None = None
    for _, _, slot in slots(model):
        mine = {d.site.name: d for _, d in slot.deltas((new,)) if "A" in d._parameters}
        for _, d in slot.deltas(tuple(old)):
            if d.site.name in mine and "A" in d._parameters:
                fresh = mine[d.site.name]
                if "A" not in fresh.trained or any(e.A.shape[-1] != e.site.shape[-1] for e in (d, fresh)):
                    kinds = f"{d.method.name} and {fresh.method.name}"
                    raise ConfigError(f"{d.site.name}: O-LoRA needs A [rank, in], trained in {new!r}; not so in {kinds}")
                here = (d.A.detach() @ fresh.A.mT).square().sum()
                total = here if total is None else total + here
    if total is None:
        raise ConfigError(f"adapters {new!r} and {', '.join(old)} share no low-rank site")
    return total
