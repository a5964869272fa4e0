"""Behaviour cloning from memory: small demonstrations, a plain loop, and room for what continual learning adds.

    memory = Memory.of(Demonstrations("demos/push", chunk=4), policy)
    mmpeft.attach(policy, {"trunk": "full", "head": "full"}, "push")
    losses = clone(policy, memory, steps=1500)

A step of a policy this small is computed in a few milliseconds and launched in more: a trainer around it would cost more
than the training, and `graph=True` records the whole step (draw samples, forward, backward, optimizer) as one CUDA graph.
`mmpeft.tasks.ControlTask` is the same loss with loaders, precision, checkpoints and several devices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mmpeft.adapters import detach, parameter_groups
from mmpeft.errors import ConfigError
from mmpeft.policies.memory import Memory, prepared
from mmpeft.policies.policy import Policy

EAGER = 8  # steps before a graph is recorded: libraries choose their kernels, optimizers make their state
CHECKED = 250  # steps of a graph between two looks at the loss


def clone(
    policy: Policy, memory: Memory, *, steps: int, adapter: str | None = None, batch_size: int = 256, lr: float = 1e-3,
    weight_decay: float = 1e-4, warmup: int = 0, clip: float | None = None, seed: int = 0, replay: Memory | None = None,
    replay_share: float = 0.5, penalty: Callable[[], Tensor] | None = None, graph: bool = False,
    seconds: float | None = None,
) -> list[float]:  # fmt: skip
    """Train what is trainable of the active adapters on `memory`; the loss of each step.

    Args:
        adapter: whose parameters; None: everything trainable. lr rises for `warmup` steps and falls to 0 along a cosine.
        clip: largest norm of the gradient; None: any.
        replay: a memory of earlier tasks, of which each batch holds a share of `replay_share`.
        penalty: a scalar that is added to the loss.
        graph: record the step as one CUDA graph: the same steps, other samples drawn. Not for parts that read sentences
            or decide on the host what they compute.
        seconds: wall clock at most, as many of the steps as fit: fixed once, from the speed of some steps.

    Raises:
        ConfigError: numbers out of range, nothing trainable, a graph without a GPU, or a loss that is not finite (the
            weights keep the last finite step).
    """
    if min(steps, batch_size) < 1 or not lr > 0 or not 0 < replay_share < 1 or warmup < 0:
        raise ConfigError(
            f"steps and batch_size are at least 1, lr is above 0, replay_share within (0, 1), warmup not negative; given "
            f"{steps}, {batch_size}, {lr}, {replay_share}, {warmup}"
        )
    if (clip is not None and not clip > 0) or (seconds is not None and not seconds > 0):
        raise ConfigError(f"clip and seconds are above 0, given {clip} and {seconds}")
    device = next(policy.parameters()).device
    if graph and device.type != "cuda":
        raise ConfigError(f"graph=True records a CUDA graph, and the policy is on {device}; leave it out")
    memory = prepared(memory, policy)
    earlier = None if replay is None else prepared(replay, policy)
    if graph and "instruction" in memory.batch:
        raise ConfigError("this policy reads sentences at each step, which no graph can hold: graph=False")
    old = 0 if earlier is None else max(1, min(batch_size - 1, round(replay_share * batch_size)))
    draws = torch.Generator(device if graph else "cpu").manual_seed(seed)
    groups = parameter_groups(policy, lr=lr, weight_decay=weight_decay, name=adapter)
    run = _Step(policy, memory, earlier, batch_size - old, old, draws, groups, penalty, clip, on_device=graph)

    replayed: torch.cuda.CUDAGraph | None = None
    # what comes before a recording runs beside the default stream
    side = torch.cuda.Stream() if graph else None  # type: ignore[no-untyped-call]
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())
    losses: list[float] = []
    kept = torch.zeros(CHECKED, device=device)  # losses of a graph's steps that were not read yet
    began, step = time.perf_counter(), 0
    marks: list[float] = []
    while step < steps:
        run.rate(min(1.0, (step + 1) / warmup if warmup else 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        if replayed is None:
            with torch.cuda.stream(side):  # nothing without one
                losses.append(_finite(float(run()), step, lr))
        else:
            replayed.replay()
            kept[(step - EAGER) % CHECKED] = run.loss
            if (step + 1 - EAGER) % CHECKED == 0 or step + 1 == steps:
                run.written()
                for value in kept[: (step - EAGER) % CHECKED + 1].tolist():
                    losses.append(_finite(value, len(losses), lr))
        step += 1
        if graph and replayed is None and step == EAGER:
            replayed = run.recorded()
        if seconds is not None and step in (2 * EAGER, 6 * EAGER):
            torch.cuda.synchronize() if device.type == "cuda" else None
            marks.append(time.perf_counter())
            if len(marks) == 2:
                left = seconds - (marks[1] - began)
                steps = max(step + 1, min(steps, step + int(left / ((marks[1] - marks[0]) / (4 * EAGER)))))
    run.optimizer.zero_grad()  # gradients lie in the graph's memory
    return losses


class _Step:
    """One optimizer step: draw, forward, backward, clip, update. A call gives the loss, which `loss` then holds."""

    def __init__(
        self, policy: Policy, memory: Memory, earlier: Memory | None, new: int, old: int, draws: torch.Generator,
        groups: list[dict[str, object]], penalty: Callable[[], Tensor] | None, clip: float | None, *, on_device: bool,
    ) -> None:  # fmt: skip
        self.policy, self.memory, self.earlier, self.new, self.old = policy, memory, earlier, new, old
        self.draws, self.penalty, self.clip = draws, penalty, clip
        device = next(policy.parameters()).device
        if on_device:  # the rate is read from the device, where `rate` writes it
            groups = [g | {"lr": torch.tensor(g["lr"], device=device)} for g in groups]
        self.optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda", capturable=on_device)
        self.on_device = on_device
        self.peaks = [float(g["lr"]) for g in self.optimizer.param_groups]
        self.parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        self.loss = torch.zeros((), device=device)
        self.bad = torch.zeros((), device=device)  # 1: the loss is not finite, and nothing is written
        if device.type == "cuda":
            self.optimizer.found_inf = self.bad  # type: ignore[attr-defined]  # what torch's GradScaler sets

    def rate(self, factor: float) -> None:
        """The learning rates, as a share of their peaks."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            if self.on_device:
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = peak * factor

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        part = self._draw(self.memory, self.new)
        if self.earlier is not None:
            part = Memory.joined([part, self._draw(self.earlier, self.old)])
        loss = self.policy({**part.batch, "normalised": True})
        total = loss if self.penalty is None else loss + self.penalty()
        self.loss.copy_(total.detach())
        self.bad.copy_(~torch.isfinite(self.loss))
        if not self.on_device and bool(self.bad):
            return self.loss
        total.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.loss.copy_(torch.where(self.bad > 0, self.loss, loss.detach()))
        return self.loss

    def _draw(self, memory: Memory, count: int) -> Memory:
        where = memory.device
        index = self._integers(len(memory), count).to(where)
        copy = self._integers(memory.copies, count).to(where) if memory.copies > 1 else None
        return memory.take(index, copy)

    def _integers(self, below: int, count: int) -> Tensor:
        return torch.randint(below, (count,), generator=self.draws, device=self.draws.device)

    def recorded(self) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph."""
        self.optimizer.zero_grad()  # gradients are to lie in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.draws)
        torch.cuda.synchronize()  # the side stream, too
        with torch.cuda.graph(graph):
            self()
        return graph

    def written(self) -> None:
        """Says that a graph wrote the parameters: their versions do not."""
        if self.on_device:
            torch.autograd.graph.increment_version(self.parameters)


def _finite(loss: float, step: int, lr: float) -> float:
    if not math.isfinite(loss):
        raise ConfigError(f"the loss is {loss} at step {step}; take a smaller lr than {lr}")
    return loss


def as_base(policy: Policy) -> Policy:
    """Write the active adapters into the base, which is then the clone: what later adapters are trained over, and what
    `mmpeft.use(policy, None)` gives. Its normalisation stays; an adapter saved over it is loaded over it.

    Raises:
        ConfigError: no adapter. Unsupported: adapters that change calls, which no weight can hold.
    """
    skill = policy.current()
    detach(policy, bake=True)
    policy.skill = skill
    return policy
