"""Collecting experience for `ppo`: an actor (a policy with its adapter, and the clone it came from), a critic, a walk.

What does not change while an adapter is trained is computed once, here: the clone's density, which the policy may be
held near to, its features, which the critic reads, and the maps of a frozen prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmpeft.adapters import use
from mmpeft.errors import ConfigError
from mmpeft.policies.memory import join, take
from mmpeft.policies.policy import Policy
from mmpeft.policies.ppo_density import Density, Parameters
from mmpeft.policies.ppo_rollout import Vector, gae

Batch = dict[str, Any]
STORY = ("success", "return", "length")  # what is told of the episodes that ended, means over them


class Critic(nn.Module):
    """The value of a state: LayerNorm and a tanh MLP of two hidden layers, [B, D] -> [B]."""

    def __init__(self, in_dim: int, width: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        linears = [nn.Linear(in_dim, width), nn.Linear(width, width), nn.Linear(width, 1)]
        self.layers = nn.Sequential(linears[0], nn.Tanh(), linears[1], nn.Tanh(), linears[2])
        for layer, gain in zip(linears, (2**0.5, 2**0.5, 1.0), strict=True):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(self.norm(x)).squeeze(-1)
        return out


@dataclass
class Actor:
    """The policy with its adapter (`names` active), and the clone it came from (`reference` active)."""

    policy: Policy
    density: Density
    names: tuple[str, ...]
    reference: tuple[str, ...]
    execute: int
    valid: Tensor | None = None  # [A], False where a robot's action is padded

    def practised(self) -> AbstractContextManager[Any]:
        return use(self.policy, self.names)

    def cloned(self) -> AbstractContextManager[Any]:
        return use(self.policy, self.reference or None)

    def observe(self, observation: Mapping[str, Any], *, look: bool = False) -> Batch:
        """A batch of tensors; pictures as the maps of a frozen prefix, where the encoder has one. With `look`, the policy's
        memory of past frames stays as it was."""
        policy, past = self.policy, self.policy._past
        policy._past = copy.deepcopy(past) if look else past
        with self.practised(), torch.no_grad():
            batch = policy.observe(observation)
            if "images" in batch and self._splits():
                images = batch.pop("images")
                maps = policy.encoder.prefix(policy.encoder.pixels(images.flatten(0, 2)))
                batch["prefix"] = maps.unflatten(0, tuple(images.shape[:3]))
        policy._past = past
        return batch

    def _splits(self) -> bool:
        try:
            self.policy.encoder.check_prefix()
        except (AttributeError, ConfigError):  # no split, or an adapter before it
            return False
        return True

    def parameters(self, batch: Batch) -> Parameters:
        """Of the active policy's density."""
        return self.density.parameters(self.policy.head, self.policy.features(batch), self.execute)

    @torch.no_grad()
    def clone(self, batch: Batch) -> tuple[Parameters, Tensor]:
        """The clone's density, and what the critic reads [B, D + history * S]: its features and the normalised state."""
        with self.cloned():
            features = self.policy.features(batch)
            parts = [features.float().mean(1)]
            if self.policy.state_dim:
                states = self.policy.current().states
                assert states is not None
                parts.append(states.encode(batch["state"]).flatten(1))
            return self.density.parameters(self.policy.head, features, self.execute), torch.cat(parts, -1)

    def actions(self, drawn: Tensor) -> Any:
        """What the environment takes, in its units, [B, execute, A] or [B, execute]."""
        decoded = self.density.decode(self.policy.head, drawn)
        norm = self.policy.current().actions
        found = (decoded if norm is None else norm.decode(decoded)).cpu().numpy()
        if not np.isfinite(found).all():
            raise ConfigError("the policy gives NaN or infinite actions; nothing was carried out, take a smaller lr")
        return found


@dataclass
class Experience:
    """Decisions of one iteration, flat [T * N, ...], those that were none left out."""

    batch: Batch
    drawn: Tensor
    log_prob: Tensor
    clone: Parameters
    reads: Tensor
    value: Tensor
    advantage: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.value)

    def take(self, index: Tensor) -> Experience:
        """The decisions at `index`."""
        return Experience(**{k: take(v, index) for k, v in self.__dict__.items()})


class Walk:
    """A vector of environments walked through by an actor, episode after episode."""

    def __init__(
        self, vector: Vector, actor: Actor, *, gamma: float, generator: torch.Generator, scale: float = 1.0
    ) -> None:
        self.vector, self.actor, self.gamma, self.generator, self.scale = vector, actor, gamma, generator, scale

    def begin(self, seed: int) -> None:
        """Episodes anew in every row; those that were running are forgotten."""
        n = self.vector.num_envs
        self.actor.policy.reset(n)
        self.observation = self.vector.reset(seed) | {"first": np.ones(n, bool)}
        self.total, self.won, self.length = np.zeros(n), np.full(n, np.nan), np.zeros(n)

    @torch.no_grad()
    def collect(
        self, critic: Callable[[Tensor], Tensor], decisions: int, *, lam: float
    ) -> tuple[Experience, dict[str, float]]:
        """`decisions` a row, with advantages; and what happened: steps, and of the episodes that ended their number, success,
        return and length."""
        rows: dict[str, list[Any]] = {k: [] for k in ("batch", "drawn", "log_prob", "clone", "reads", "value")}
        seen: dict[str, list[Tensor]] = {k: [] for k in ("reward", "terminated", "ended", "discount", "valid", "after")}
        ended: list[tuple[float, float, float]] = []
        steps = 0.0
        for _ in range(decisions):
            batch = self.actor.observe(self.observation)
            clone, reads = self.actor.clone(batch)
            with self.actor.practised():
                parameters = self.actor.parameters(batch)
                drawn = self.actor.density.sample(parameters, self.generator)
                actions = self.actor.actions(drawn)
            log_prob = self.actor.density.log_prob(parameters, drawn, self.actor.valid)
            for key, new in zip(rows, (batch, drawn, log_prob, clone, reads, critic(reads)), strict=True):
                rows[key].append(new)
            moment = self.vector.step(actions)
            over = moment.terminated | moment.truncated
            after = torch.full(log_prob.shape, float("nan"), device=log_prob.device)  # NaN: the next decision's value
            if moment.successor is not moment.observation and moment.truncated.any():
                shown = self.actor.observe(moment.successor | {"first": np.zeros_like(over)}, look=True)
                cut = torch.from_numpy(moment.truncated).to(after.device)
                after[cut] = critic(self.actor.clone(shown)[1])[cut]
            new = (moment.reward * self.scale, moment.terminated, over, self.gamma**moment.steps, moment.valid, after)
            for key, array in zip(seen, new, strict=True):
                seen[key].append(torch.as_tensor(array, device=log_prob.device))
            self.observation = moment.observation | {"first": moment.first}
            steps += float(moment.steps.sum())
            self.total += moment.reward * moment.valid
            self.length += moment.steps
            self.won = np.where(moment.valid, np.fmax(self.won, moment.success), self.won)
            ended += list(zip(self.won[over], self.total[over], self.length[over], strict=True))
            self.total[over], self.won[over], self.length[over] = 0.0, np.nan, 0.0
        value = torch.stack(rows["value"])
        last = critic(self.actor.clone(self.actor.observe(self.observation, look=True))[1])
        following, after = torch.cat([value[1:], last[None]]), torch.stack(seen["after"])
        got = {k: torch.stack(v) for k, v in seen.items()}
        advantage = gae(
            got["reward"].to(value.dtype), value, torch.where(after.isnan(), following, after), got["terminated"],
            got["ended"], got["discount"].to(value.dtype), lam=lam,
        )  # fmt: skip
        flat = {k: join(v) for k, v in rows.items()}
        whole = Experience(**flat, advantage=advantage.flatten(), returns=(advantage + value).flatten())
        told = [np.array(column) for column in zip(*ended, strict=True)] or [np.array([])] * 3
        facts = {k: float(v.mean()) if len(v) else float("nan") for k, v in zip(STORY, told, strict=True)}
        return whole.take(got["valid"].flatten().nonzero()[:, 0]), {"steps": steps, "episodes": len(ended), **facts}
