"""Trans-LoRA (Wang et al. 2024, arXiv 2405.17258): moving an adapter to another base model without its training data.
The survey speaks of transfer to new domains; what is transferred is the adapter.

    move = mmpeft.TransLoRA(source, "pets", target, plan)            # any methods on either side
    move.fit_discriminator(judge, real=few, synthetic=drawn)         # LoRA on the source base tells them apart
    samples = move.synthesise(generate, count=1000)                  # drawn until that many are taken for real
    move.distil(samples, teach, loss, steps=2000, lr=1e-4)           # the target learns the source adapter's answers

The four functions are the task's: `generate()` draws an input (the target model, prompted with a few seeds), `judge(x)` is
the source's logit that x is real (the yes-token's, say), `teach(x)` the source's answer, `loss(x, answer)` what the target
loses on it. Each is called with the right adapter of its model active. Nothing is assumed of tokenisers or architectures:
`teach` may give text or logits (`distil_loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.attach import attach
from mmpeft.adapters.plan import Plan, PlanLike
from mmpeft.adapters.state import find_state, state_of
from mmpeft.adapters.switch import parameter_groups, trainable, use
from mmpeft.errors import ConfigError

Judge = Callable[[Any], Tensor]


class TransLoRA:
    """One transfer; keeps the names of its adapters.

    Args:
        source: model with the adapter `adapter`, trained.
        target: another model.
        plan: of the adapter that `target` gets.
        name: of that adapter.
        discriminator: plan of the discriminator's adapter on the source's base; None is the source adapter's own.
        example: of the target, as in `attach`.

    Raises:
        NameNotFound: the source has no such adapter.
    """

    def __init__(
        self,
        source: nn.Module,
        adapter: str,
        target: nn.Module,
        plan: PlanLike,
        *,
        name: str = "default",
        discriminator: PlanLike = None,
        example: Any = None,
    ) -> None:
        state_of(source).check_names([adapter])
        self.source, self.adapter, self.target, self.name = source, adapter, target, name
        self.plan = discriminator or Plan.read(state_of(source).entries[adapter].rules)
        self.judge: Judge | None = None
        state = find_state(target)
        if state is None or name not in state.entries:
            attach(target, plan, name, example=example)

    def fit_discriminator(
        self,
        judge: Judge,
        *,
        real: Sequence[Any],
        synthetic: Sequence[Any],
        steps: int = 100,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> float:
        """Train the discriminator to give real inputs a positive logit and synthetic ones a negative; returns its
        accuracy on both. The source's own adapter keeps its numbers.

        Raises:
            ConfigError: no inputs of one kind.
        """
        if not real or not synthetic:
            raise ConfigError(f"{len(real)} real and {len(synthetic)} synthetic inputs; expected some of each")
        own = "discriminator"
        if own not in state_of(self.source).entries:
            attach(self.source, self.plan, own, check=False)
        with use(self.source, own):
            trainable(self.source, [own])
            optimizer = torch.optim.Adam(parameter_groups(self.source, lr=lr, name=own))
            generator = torch.Generator().manual_seed(seed)
            for _ in range(steps):
                pair = [given[int(torch.randint(len(given), (), generator=generator))] for given in (real, synthetic)]
                logits = torch.stack([judge(x).reshape(()) for x in pair])
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(logits, torch.tensor([1.0, 0.0]).to(logits)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        self.judge = judge
        right = [self.accepts(x) for x in real] + [not self.accepts(x) for x in synthetic]
        return sum(right) / len(right)

    @torch.no_grad()
    def accepts(self, x: Any) -> bool:
        """Whether the discriminator takes an input for real; everything, before there is one."""
        if self.judge is None:
            return True
        with use(self.source, "discriminator"):
            return float(self.judge(x)) > 0

    def synthesise(self, generate: Callable[[], Any], *, count: int, attempts: int = 20) -> list[Any]:
        """Draw inputs until `count` are accepted.

        Raises:
            ConfigError: fewer than that many are accepted in `attempts` draws for each.
        """
        taken: list[Any] = []
        for _ in range(count * attempts):
            if len(taken) == count:
                break
            with torch.no_grad():
                x = generate()
            if self.accepts(x):
                taken.append(x)
        if len(taken) < count:
            raise ConfigError(
                f"{len(taken)} of {count * attempts} synthetic inputs were taken for real; wanted {count}"
            )
        return taken

    def distil(
        self,
        samples: Sequence[Any],
        teach: Callable[[Any], Any],
        loss: Callable[[Any, Any], Tensor],
        *,
        steps: int,
        lr: float,
        batch: int = 8,
        seed: int = 0,
    ) -> list[float]:
        """Train the target's adapter on the source adapter's answers to the samples; returns the loss of each step.

        Raises:
            ConfigError: there is nothing to learn from.
        """
        if not samples or steps < 1 or batch < 1:
            raise ConfigError(f"{len(samples)} samples, steps {steps}, batch {batch}; expected at least 1 of each")
        with torch.no_grad(), use(self.source, self.adapter):
            answers = [teach(x) for x in samples]
        trainable(self.target, [self.name])
        optimizer = torch.optim.AdamW(parameter_groups(self.target, lr=lr, name=self.name))
        generator, losses = torch.Generator().manual_seed(seed), []
        with use(self.target, self.name):
            for _ in range(steps):
                picked = torch.randint(len(samples), (batch,), generator=generator).tolist()
                value = torch.stack([loss(samples[i], answers[i]) for i in picked]).mean()
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(float(value.detach()))
        return losses


def distil_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL divergence of the student's next-token distribution from the teacher's, T^2 sum p log(p / q) / n, for models
    with one vocabulary; logits [..., vocabulary]."""
    p, q = (F.log_softmax(t.flatten(0, -2) / temperature, -1) for t in (teacher.detach(), student))
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2
