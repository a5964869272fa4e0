"""Proximal policy optimisation of an adapter: a cloned policy practises in simulation, and only its adapter changes.

    policy = as_base(load_policy("runs/push"))                                            # the clone is the base
    found = ppo(policy, env="metaworld:push-v3", plan={"{trunk,head}.**": mmpeft.LoRA(rank=8)}, total_steps=200_000)
    found.curve[-1]["success"];  save_policy(policy, "runs/push-ppo", "ppo")

PPO (Schulman et al. 2017, arXiv 1707.06347) with the details that matter (advantages normalised a minibatch, orthogonal
critic, annealed rates, early stop by KL), as CleanRL writes it: one loop, top to bottom. What differs here:

- The policy is a frozen base with a named adapter, which starts as the identity: the first policy is the clone. The
  clone stays at hand for nothing, `mmpeft.use(policy, None)`, and never changes by a bit.
- The critic reads the clone's features, which are constant: it is a small network of its own that cannot pull at the
  adapter, and what it reads is computed once, when experience is collected. A frozen prefix of an encoder too.
- `kl` holds the policy near the clone: the exact KL(policy || clone) of each decision joins the loss. `value_warmup`
  iterations train the critic alone, since advantages of an untrained critic unlearn what was cloned.
- A decision is a chunk of `execute` actions (see `ppo_rollout`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor, nn

from mmpeft.adapters import detach, parameter_groups, use
from mmpeft.adapters.freeze import evaluating
from mmpeft.adapters.plan import Plan, PlanLike
from mmpeft.errors import ConfigError
from mmpeft.policies.policy import Policy, save_policy
from mmpeft.policies.ppo_checkpoint import Checkpoint, Curve, write_curve
from mmpeft.policies.ppo_density import density_of
from mmpeft.policies.ppo_rollout import Reward, Vector, make_vector
from mmpeft.policies.ppo_setup import attach_adapter, check_actions, check_numbers
from mmpeft.policies.ppo_walk import Actor, Critic, Experience, Walk


def policy_loss(log_prob: Tensor, old: Tensor, advantage: Tensor, *, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate, the mean of max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = exp(log_prob - old).

    Args:
        log_prob, old, advantage: [B].

    Returns:
        The loss, an estimate of KL(old || new), (r - 1) - log r (Schulman 2020), and the share of clipped ratios.
    """
    log_ratio = log_prob - old
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
    with torch.no_grad():
        return loss, (ratio - 1 - log_ratio).mean(), ((ratio - 1).abs() > clip).float().mean()


def value_loss(value: Tensor, old: Tensor, target: Tensor, *, clip: float | None) -> Tensor:
    """Half the mean squared error [B]; with `clip`, the worse of it and that of a value within `clip` of the old one."""
    error = (value - target).square()
    if clip is not None:
        error = torch.maximum(error, (old + (value - old).clamp(-clip, clip) - target).square())
    return 0.5 * error.mean()


@dataclass
class PPOResult:
    """What came of it; the policy is left with its adapter active, ready to act.

    Attributes:
        curve: a row an iteration: iteration, steps (of the environments, so far), episodes, and of the episodes that
            ended in it success, return and length (NaN if none did); policy_loss, value_loss, entropy, kl (to the clone),
            step_kl (of the update), clipped, explained_variance, seconds.
        critic: reads the clone's features. steps: actions carried out. seconds: of this call.
    """

    actor: Actor
    critic: Critic
    curve: Curve
    steps: int
    seconds: float
    adapter: str

    @torch.no_grad()
    def value(self, observation: Mapping[str, Any]) -> NDArray[np.float32]:
        """The worth of a batch of states [B], as the critic sees it: with reward="success" and gamma near 1 about the
        probability of success, which is what SayCan calls the affordance of a skill."""
        found: NDArray[np.float32] = (
            self.critic(self.actor.clone(self.actor.observe(observation, look=True))[1]).cpu().numpy()
        )
        return found

    def save_curve(self, path: str | Path) -> None:
        """As CSV."""
        write_curve(self.curve, path)


def ppo(
    policy: Policy, *, env: str | Sequence[str] | VectorEnv[Any, Any, Any], total_steps: int, plan: PlanLike | None = None,
    adapter: str = "ppo", over: str | Sequence[str] = (), reference: str | Sequence[str] | None = None,
    reward: Reward = "env", reward_scale: float = 1.0, options: Mapping[str, Any] | None = None, num_envs: int = 8, asynchronous: bool = False,
    execute: int | None = None, decisions: int = 64, epochs: int = 4, minibatches: int = 8, lr: float = 3e-4,
    value_lr: float = 1e-3, anneal: bool = True, gamma: float = 0.99, lam: float = 0.95, clip: float = 0.2,
    value_clip: float | None = None, entropy: float = 0.0, kl: float = 0.0, step_kl: float | None = None,
    max_grad_norm: float = 0.5, min_std: float = 0.0, value_warmup: int = 1, seed: int = 0,
    folder: str | Path | None = None, checkpoint_every: int = 10, report: Callable[[Mapping[str, float]], Any] | None = None,
) -> PPOResult:  # fmt: skip
    """Train an adapter of a cloned policy by reinforcement.

    Args:
        policy: fitted, with a head that has a density (`ppo_density`).
        env: names for `make_env` with its `options`, or a Gymnasium vector environment in any autoreset mode, which is
            left open.
        total_steps: actions carried out in all environments together; the iteration that reaches it is the last.
        plan: of the adapter, which is attached; None: the policy has it already, and it is trained further.
        over: adapters that stay active under it and do not change. reference: the adapters that make the clone; default
            those of `over`, without which the clone is the base.
        reward: see `Decisions`; of a vector environment its own. reward_scale: a factor that brings values near 1.
        num_envs, asynchronous: environments, and whether each has a process. execute: actions of a chunk that are carried
            out before the next look; default the policy's. decisions: of each environment in an iteration.
        epochs, minibatches: passes over an iteration's decisions, each in so many parts. lr, value_lr: of adapter and
            critic; `anneal` lets both fall to 0. max_grad_norm: of each of the two.
        gamma: discount of an action. lam: GAE's lambda, a decision. clip, value_clip: see `policy_loss`, `value_loss`.
        entropy, kl: weights of the entropy and of KL(policy || clone). step_kl: an iteration's policy updates stop when
            the policy is so far from the one that collected.
        min_std: least exploration of a Gaussian head, in normalised units. value_warmup: iterations for the critic alone.
        seed: of environments, actions and minibatches.
        folder: the adapter, `curve.csv` and a checkpoint are written there every `checkpoint_every` iterations, and the same
            call goes on where it was stopped, exactly: at each checkpoint the environments begin anew.
        report: called with each row of the curve.

    Raises:
        ConfigError: numbers out of range, a policy without normalisation, actions that do not fit, a checkpoint of other
            settings. Unsupported: a head without a density. NameNotFound: no such adapter or environment.
        BaseMismatch: the policy was cloned in an environment with other actions, state or cameras.
    """
    settings = {k: v for k, v in locals().items() if k not in ("policy", "folder", "report", "asynchronous")}
    check_numbers(settings)
    settings["plan"] = None if plan is None else Plan.read(plan).to_list()
    density = density_of(policy.head, floor=min_std)
    names = (*((over,) if isinstance(over, str) else tuple(over)), adapter)
    told = names[:-1] if reference is None else reference
    clone = (told,) if isinstance(told, str) else tuple(told)
    if not isinstance(env, VectorEnv | str | Sequence):
        raise ConfigError(f"env is a name, several, or a gymnasium.vector.VectorEnv; given a {type(env).__name__}")
    given = dict(options or {})
    if "images" not in policy.reads:
        given.setdefault("views", ())
    attach_adapter(policy, plan, adapter, names, clone)
    made: VectorEnv[Any, Any, Any] | None = None
    try:
        if not isinstance(env, VectorEnv):
            where = policy.current().environment or {}
            made = make_vector(
                env, num_envs=num_envs, asynchronous=asynchronous, options={**where.get("options", {}), **given},
                execute=policy.execute if execute is None else execute, gamma=gamma, reward=reward,
            )  # fmt: skip
        vector = Vector(env if isinstance(env, VectorEnv) else made)  # type: ignore[arg-type]
        check_actions(policy, vector)
    except BaseException:
        if plan is not None:
            detach(policy, adapter)
        if made is not None:
            made.close()
        raise
    norm = policy.current().actions
    valid = None if norm is None else norm.valid.to(next(policy.parameters()).device)
    actor = Actor(policy, density, names, clone, vector.execute, valid)
    try:
        return _train(actor, vector, settings, folder, checkpoint_every, report)
    finally:
        if made is not None:
            made.close()


def _train(
    actor: Actor, vector: Vector, o: Mapping[str, Any], folder: str | Path | None, every: int,
    report: Callable[[Mapping[str, float]], Any] | None,
) -> PPOResult:  # fmt: skip
    policy, adapter, began = actor.policy, actor.names[-1], time.perf_counter()
    device = next(policy.parameters()).device
    generator = torch.Generator(device).manual_seed(o["seed"])
    walk = Walk(vector, actor, gamma=o["gamma"], scale=o["reward_scale"], generator=generator)
    quiet = ExitStack()
    quiet.enter_context(evaluating(policy))  # a ratio of probabilities makes no sense across dropout masks
    walk.begin(_seed(o["seed"], 0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(o["seed"])
        critic = Critic(actor.clone(actor.observe(walk.observation, look=True))[1].shape[1]).to(device)
    groups = parameter_groups(policy, lr=o["lr"], name=adapter)
    actor_optimizer = torch.optim.AdamW(groups, eps=1e-5)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=o["value_lr"], eps=1e-5, weight_decay=0.0)
    optimizers = (actor_optimizer, critic_optimizer)
    rates = [[g["lr"] for g in x.param_groups] for x in optimizers]
    curve: Curve = []
    keeper = Checkpoint(policy, adapter, critic, optimizers, generator, o)
    if folder is not None and (known := keeper.load(folder)) is not None:
        curve = known
        walk.begin(_seed(o["seed"], len(curve)))
    steps = int(curve[-1]["steps"]) if curve else 0
    try:
        while steps < o["total_steps"]:
            start = time.perf_counter()
            for x, own in zip(optimizers, rates, strict=True):
                for group, rate in zip(x.param_groups, own, strict=True):
                    group["lr"] = rate * (1 - steps / o["total_steps"] if o["anneal"] else 1)
            experience, facts = walk.collect(critic, o["decisions"], lam=o["lam"])
            learned = _update(
                actor, critic, experience, optimizers, generator, o, practise=len(curve) >= o["value_warmup"]
            )
            steps += int(facts.pop("steps"))
            row = {"iteration": float(len(curve)), "steps": float(steps), **facts, **learned}
            curve.append({**row, "seconds": round(time.perf_counter() - start, 3)})
            if report is not None:
                report(curve[-1])
            if folder is not None and (len(curve) % every == 0 or steps >= o["total_steps"]):
                save_policy(policy, folder, adapter)
                keeper.save(folder, curve)
                walk.begin(_seed(o["seed"], len(curve)))  # what a resumed run would do
    finally:
        quiet.close()
        use(policy, actor.names)
    return PPOResult(actor, critic, curve, steps, time.perf_counter() - began, adapter)


def _update(
    actor: Actor, critic: Critic, experience: Experience, optimizers: Sequence[torch.optim.Optimizer],
    generator: torch.Generator, o: Mapping[str, Any], *, practise: bool,
) -> dict[str, float]:  # fmt: skip
    """Epochs of minibatches over an iteration's decisions; what was learned, means over the minibatches."""
    density, told = actor.density, dict[str, list[float]]()
    adapted = [p for g in optimizers[0].param_groups for p in g["params"]]
    for _ in range(o["epochs"]):
        order = torch.randperm(len(experience), generator=generator, device=generator.device)
        for index in order.tensor_split(o["minibatches"]):
            part = experience.take(index)
            worth = value_loss(critic(part.reads), part.value, part.returns, clip=o["value_clip"])
            _step(optimizers[1], worth, list(critic.parameters()), o["max_grad_norm"])
            told.setdefault("value_loss", []).append(float(worth.detach()))
            if not practise:
                continue
            advantage = (part.advantage - part.advantage.mean()) / (part.advantage.std(correction=0) + 1e-8)
            with actor.practised():
                parameters = actor.parameters(part.batch)
            log_prob = density.log_prob(parameters, part.drawn, actor.valid)
            surrogate, far, clipped = policy_loss(log_prob, part.log_prob, advantage, clip=o["clip"])
            spread = density.entropy(parameters, actor.valid).mean()
            away = density.kl(parameters, part.clone, actor.valid).mean()
            if o["step_kl"] is not None and float(far) > o["step_kl"]:
                practise = False
                continue
            _step(optimizers[0], surrogate - o["entropy"] * spread + o["kl"] * away, adapted, o["max_grad_norm"])
            now = {"policy_loss": surrogate, "entropy": spread, "kl": away, "step_kl": far, "clipped": clipped}
            for name, value in now.items():
                told.setdefault(name, []).append(float(value.detach()))
    spread = experience.returns.var(correction=0)
    unexplained = (experience.returns - experience.value).var(correction=0)
    columns = ("policy_loss", "value_loss", "entropy", "kl", "step_kl", "clipped")
    means = {k: float(np.mean(told[k])) if k in told else float("nan") for k in columns}
    return {**means, "explained_variance": float(1 - unexplained / spread) if spread > 0 else float("nan")}


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[nn.Parameter], max_norm: float) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()


def _seed(seed: int, iteration: int) -> int:
    """Of the environments from this iteration on."""
    return int(np.random.SeedSequence([seed, iteration]).generate_state(1)[0] % 2**31)
