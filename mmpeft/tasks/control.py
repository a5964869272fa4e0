"""Behaviour cloning: a policy and a plan, trained on demonstrations, evaluated by rollouts.

    policy = Policy(encoder=TappedEncoder("package:efficientnet-lite0", taps=(2, 3), split=2), trunk=MLPTrunk(), ...)
    task = ControlTask(policy, {"trunk": "full", "head": "full", "encoder.backbone.blocks.{3,4}.*":
    mmpeft.ConvAdapter()}) trainer.fit(task, ControlData(Demonstrations("demos/push", views=("close",), chunk=8)))

Before anything is attached, the demonstrations are measured (normalisation, vocabularies, environment); all of it goes
into the adapter, whose folder is then enough to act. `rollout` is a hook: any function of the policy that gives
numbers, called every so many epochs and at the end of training; a policy's loss says little about its success.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import Dataset

from mmpeft.adapters.freeze import evaluating
from mmpeft.adapters.state import find_state
from mmpeft.data.demos.dataset import Demonstrations
from mmpeft.data.encoding import OnBad
from mmpeft.data.module import DataModule
from mmpeft.errors import ConfigError
from mmpeft.policies.policy import KEY, Policy, note_skill
from mmpeft.policies.samples import PolicyProcessor, PolicySamples
from mmpeft.policies.skill import Skill
from mmpeft.tasks.base import EXTRA, AdapterTask
from mmpeft.tasks.schedule import Schedule

Rollout = Callable[[Policy], Mapping[str, float]]


class Evaluate:
    """The rollout hook of a YAML file: success of the policy on fixed seeds, with its Wilson interval.

    Args:
        env: one environment name or several. first_seed, episodes: of each; keep them apart from the training seeds.
        num_envs: simulators at once. options: of `make_env` (views, image_size, ...).
    """

    def __init__(
        self, env: str | list[str], *, first_seed: int = 40_000, episodes: int = 20, num_envs: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if episodes < 1:
            raise ConfigError(f"episodes is at least 1, given {episodes}")
        self.env, self.first_seed, self.episodes = env, first_seed, episodes
        self.num_envs, self.options = num_envs, options

    def __call__(self, policy: Policy) -> dict[str, float]:
        from mmpeft.policies import rollout

        seeds = range(self.first_seed, self.first_seed + self.episodes)
        found = rollout(policy, env=self.env, seeds=seeds, num_envs=self.num_envs, options=self.options)
        return {"success": found.success, "low": found.interval[0], "high": found.interval[1]}


class ControlData(DataModule):
    """Demonstrations as batches for a `ControlTask`.

    Args:
        train, val: demonstrations (`mmpeft.data.demos.Demonstrations`).
        batch_size, eval_batch_size, workers, shuffle, on_bad, pin_memory, seed: see `DataModule`.
        cache: folder of the cached frozen prefix; None: no cache. copies, shift: of the augmentation, see `PolicySamples`.
        renderers: processes that draw pictures which are not on disk yet; 0 draws in this one, when each is needed.
    """

    def __init__(
        self, train: Dataset | None = None, val: Dataset | None = None, *, batch_size: int = 64,  # type: ignore[type-arg]
        eval_batch_size: int | None = None, workers: int = 0, shuffle: bool = True, on_bad: OnBad = "refuse",
        pin_memory: bool = False, seed: int = 0, cache: str | None = None, copies: int = 4, shift: int = 5,
        renderers: int = 0,
    ) -> None:  # fmt: skip
        if renderers < 0:
            raise ConfigError(f"renderers is a number of processes, 0 or more, given {renderers}")
        super().__init__(
            train, val, batch_size=batch_size, eval_batch_size=eval_batch_size, workers=workers, bucket=False,
            shuffle=shuffle, on_bad=on_bad, pin_memory=pin_memory, seed=seed,
        )  # fmt: skip
        self.cache, self.copies, self.shift, self.renderers = cache, copies, shift, renderers

    def prepare(self, policy: Policy) -> None:
        """Draw the demonstrations' pictures, wrap them for this policy, and fill the cache."""
        for split, data in self.datasets.items():
            if data is not None and not isinstance(data, PolicySamples):
                if self.renderers and isinstance(data, Demonstrations) and "images" in policy.reads:
                    data.render(workers=self.renderers)
                samples = PolicySamples(
                    data, policy, cache=self.cache, copies=self.copies, shift=self.shift, seed=self.seed
                )
                samples.fill()
                self.datasets[split] = samples


class ControlTask(AdapterTask):
    """Behaviour cloning of a `Policy`.

    Args:
        model, plan, lr, weight_decay, betas, warmup, schedule, final_lr, adapter, optimizer, start_from: see
            `AdapterTask`.
        rollout: called with the policy; its numbers are logged as `rollout_<name>`. `Evaluate(env)`
            is one; any function will do.
        rollout_every: epochs between rollouts; 0: only at the end of training.
        pad: allow a robot with fewer dimensions than the policy has.

    Raises:
        ConfigError: the demonstrations do not fit the policy; names both sizes.
    """

    model: Policy

    def __init__(
        self, model: Policy, plan: Any = None, *, lr: float = 1e-3, weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999), warmup: float = 100, schedule: Schedule = "cosine",
        final_lr: float = 0.01, adapter: str = "default", optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        start_from: str | None = None, rollout: Rollout | None = None, rollout_every: int = 0, pad: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            model, plan, lr=lr, weight_decay=weight_decay, betas=betas, warmup=warmup, schedule=schedule,
            final_lr=final_lr, adapter=adapter, optimizer=optimizer, start_from=start_from,
        )  # fmt: skip
        if rollout_every < 0 or (rollout_every and rollout is None):
            raise ConfigError(f"rollout_every={rollout_every} needs a rollout and is not negative")
        self.rollout, self.rollout_every, self.pad = rollout, rollout_every, pad
        self.processor: PolicyProcessor | None = None
        self.successes: list[dict[str, float]] = []  # one row a rollout, with its epoch and step

    # ---- demonstrations --------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Measure the demonstrations and prepare the data module; runs before the plan is attached."""
        data = self.trainer.datamodule
        if not isinstance(data, ControlData):
            raise ConfigError(f"a ControlTask is trained on ControlData, given {type(data).__name__}")
        if self.start_from is None and self.model.skill is None and not self._carried():
            if data.datasets["train"] is None:
                raise ConfigError("the policy has no normalisation: give training demonstrations, or start_from=")
            measure(self.model, data.datasets["train"], pad=self.pad)
        data.prepare(self.model)

    def adapt(self) -> None:
        super().adapt()
        if not self._carried():
            note_skill(self.model, self.adapter)
        skill = self.model.current()
        self.processor = PolicyProcessor(
            action_dim=skill.actions.dim if skill.actions is not None else self.model.action_dim,
            state_dim=skill.states.dim if skill.states is not None else 0,
            chunk=self.model.chunk, discrete=self.model.head.discrete, shift=getattr(self.trainer.datamodule, "shift", 0),
        )  # fmt: skip

    def _carried(self) -> bool:
        """Whether the adapter has its skill already."""
        state = find_state(self.model)
        return state is not None and self.adapter in state.entries and KEY in state.entries[self.adapter].metadata

    # ---- steps -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        count = int(batch["action_mask"].sum())
        loss = self.model(batch)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=count)
        return self.shared_loss(loss * count, count)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Held-out loss, and the mean error of the predicted actions in the environment's units (discrete: share)."""
        mask = batch["action_mask"]
        count = int(mask.sum())
        self.log("val_loss", self.model(batch), batch_size=count, sync_dist=True)
        predicted, action = self.model.predict(batch, generator=self._generator()), batch["action"]
        error = (predicted != action).float() if self.model.head.discrete else (predicted - action).abs().mean(-1)
        self.log("val_error", error[mask].mean(), batch_size=count, sync_dist=True, prog_bar=True)

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    # ---- rollouts --------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        if self.rollout_every and (self.current_epoch + 1) % self.rollout_every == 0:
            self._roll_out()

    def on_train_end(self) -> None:
        last = self.successes[-1]["step"] if self.successes else None
        if self.rollout is not None and last != self.global_step:
            self._roll_out()

    def _roll_out(self) -> None:
        if self.rollout is None or not self.trainer.is_global_zero:
            return
        with evaluating(self.model):
            found = {k: float(v) for k, v in self.rollout(self.model).items()}
        self.successes.append({"epoch": float(self.current_epoch), "step": float(self.global_step), **found})
        rows = {f"rollout_{k}": v for k, v in found.items()}
        self.trainer.callback_metrics.update({k: torch.tensor(v) for k, v in rows.items()})
        for logger in self.trainer.loggers:
            logger.log_metrics(rows, step=self.global_step)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[EXTRA] |= {KEY: self.model.current().to_dict(), "successes": self.successes}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """A resumed run keeps the statistics it began with, whatever the demonstrations look like now."""
        super().on_load_checkpoint(checkpoint)
        extra = checkpoint.get(EXTRA, {})
        self.successes = list(extra.get("successes", []))
        if KEY in extra:
            self.model.skill = Skill.from_dict(extra[KEY], self.model.sizes(), self.adapter)
            note_skill(self.model, self.adapter)


def measure(policy: Policy, demonstrations: Any, *, pad: bool = False) -> Skill:
    """Fit the policy's normalisation and head on every step of the demonstrations; see `Policy.fit`."""
    source = demonstrations.demonstrations if isinstance(demonstrations, PolicySamples) else demonstrations
    actions = source.stacked("action")
    states = source.stacked("state") if policy.state_dim else None
    return policy.fit(actions, states, chunks=chunks_of(source, policy.chunk), environment=source.describe(), pad=pad)


def chunks_of(demonstrations: Any, chunk: int) -> Tensor:
    """Every whole chunk [M, chunk, A] within an episode."""
    found = []
    for _, episode in demonstrations.episodes:
        actions = torch.as_tensor(episode["action"])
        if len(actions) >= chunk:
            windows = actions.unfold(0, chunk, 1)  # [M, A, chunk], of discrete actions [M, chunk]
            found.append(windows.movedim(-1, 1))
    if not found:
        raise ConfigError(f"no episode is as long as a chunk of {chunk} steps; take a shorter chunk")
    return torch.cat(found)
