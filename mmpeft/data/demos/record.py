"""Record a scripted expert, and prove that a recording replays.

    collection = collect("metaworld:push-v3", episodes=50, noise=0.3, folder="demos/push")

Noise is added to what is carried out, never to what is learned: the arm is pushed off its path, and the label says how
the expert would return (Laskey et al. 2017, DART). An episode goes on for a few steps after success, so that a policy
learns to hold still. Each recording is played again from its seed in a second simulator; every bit of every state must
come back.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mmpeft.data.demos.store import DemoFolder, Episode
from mmpeft.errors import ConfigError, FileFormatError, MmpeftError, require
from mmpeft.policies.envs import make_env
from mmpeft.policies.experts import make_expert

log = logging.getLogger("mmpeft")
_VERSIONED = ("metaworld", "mujoco", "minigrid", "gymnasium")


class ReplayMismatch(MmpeftError, RuntimeError):
    """Playing a recording again from its seed gave other states than were recorded."""


@dataclass
class Collection:
    """What `collect` did: the folder, seeds recorded now, seeds the expert failed on, steps, seconds, bytes on disk."""

    folder: Path
    recorded: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def __str__(self) -> str:
        rate = len(self.recorded) / max(1, len(self.recorded) + len(self.failed))
        return (
            f"{len(self.recorded)} episodes ({self.steps} steps, {self.bytes / 1e6:.2f} MB, expert {rate:.0%}) "
            f"in {self.seconds:.1f} s -> {self.folder}"
        )


def collect(
    env: str,
    *,
    folder: str | Path,
    episodes: int = 50,
    seeds: Iterable[int] | None = None,
    noise: float = 0.0,
    options: Mapping[str, Any] | None = None,
    extra_steps: int = 10,
    check: bool = True,
) -> Collection:
    """Record `episodes` successes of the environment's expert; a folder that has some already is filled up.

    Args:
        env: "metaworld:<task>" or "babyai:<level>". folder: where to; one environment a folder.
        seeds: tried in order; default 0, 1, 2, ... An episode without success is not kept.
        noise: standard deviation of Gaussian noise on the carried-out action, where `action_noise_mask` allows it; for
            discrete actions the chance of a random one. options: of `make_env` that change the episode (max_steps,
            instruction).
        extra_steps: recorded after success. check: replay each episode before it is kept.

    Raises:
        ConfigError: a count or noise out of range, a folder of other demonstrations, or seeds that ran out (what was
            recorded stays).
        NameNotFound: unknown environment or option. Unsupported: it has no expert. ReplayMismatch: a recording does
            not replay.
    """
    for name, value, least in (("episodes", episodes, 1), ("extra_steps", extra_steps, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
    if not 0 <= noise <= 1:
        raise ConfigError(f"noise must be 0 to 1 (in units of the action), got {noise!r}")
    expert = make_expert(env)
    given = dict(options or {})
    simulator, second = make_env(env, **given, views=()), make_env(env, **given, views=())
    store = DemoFolder(folder, _description(env, given, noise, simulator))
    done, began = set(store.seeds), time.perf_counter()
    result = Collection(store.path)
    # an expert that fails on most seeds would otherwise search for ever
    tried = itertools.islice(itertools.count(), 20 + 10 * episodes) if seeds is None else iter(seeds)
    missing = episodes - len(done)
    for seed in tried:
        if missing <= 0:
            break
        if seed in done:
            continue
        episode = record_episode(simulator, expert, int(seed), noise=noise, extra_steps=extra_steps)
        if episode is None:
            result.failed.append(int(seed))
            continue
        if check:
            check_replay(second, episode)
        result.bytes += store.add(episode).stat().st_size
        result.recorded.append(int(seed))
        result.steps += len(episode)
        missing -= 1
    result.seconds = time.perf_counter() - began
    if missing > 0:
        raise ConfigError(f"seeds ran out with {missing} of {episodes} episodes missing (kept: {len(store)}; {result})")
    log.info("%s", result)
    return result


def record_episode(env: Any, expert: Any, seed: int, *, noise: float, extra_steps: int) -> Episode | None:
    """One episode of the expert, or None if it had no success."""
    env.begin(seed)
    expert.reset(env)
    rng = np.random.default_rng([9, seed])
    rows: dict[str, list[Any]] = {k: [] for k in ("state", "action", "executed", "reward", "success", "snapshot")}
    left = None  # steps to go since success
    while True:
        snapshot = env.snapshot()
        rows["snapshot"].append(snapshot)
        rows["state"].append(env.observe()["state"])
        action = expert.act(env)
        executed = _disturbed(action, env, noise, rng)
        reward, terminated, truncated, info = env.advance(executed)
        for key, value in (
            ("action", action),
            ("executed", executed),
            ("reward", reward),
            ("success", info["success"]),
        ):
            rows[key].append(value)
        if left is None and info["success"]:
            left = extra_steps
        elif left is not None:
            left -= 1
        if terminated or truncated or left == 0:
            break
    rows["snapshot"].append(env.snapshot())
    if left is None:
        return None
    discrete = not hasattr(env.action_space, "low")
    kinds = {"state": "float32", "reward": "float32", "success": "bool", "snapshot": "float64"}
    kinds |= dict.fromkeys(("action", "executed"), "int64" if discrete else "float32")
    if rows["snapshot"][0] is None:
        del rows["snapshot"]
    return Episode(seed, env.text, {k: np.asarray(v, kinds[k]) for k, v in rows.items()})


def _disturbed(action: Any, env: Any, noise: float, rng: np.random.Generator) -> Any:
    """The action that is carried out."""
    if not noise:
        return action
    if not hasattr(env.action_space, "low"):
        return int(rng.integers(env.action_space.n)) if rng.random() < noise else action
    disturbed = action + noise * rng.standard_normal(action.shape) * env.action_noise_mask
    return np.clip(disturbed, env.action_space.low, env.action_space.high).astype(np.float32)


def check_replay(env: Any, episode: Episode) -> None:
    """Carry out a recording's actions from its seed and compare every state, bit for bit.

    Raises:
        ReplayMismatch: naming the first step that differs.
    """
    env.begin(episode.seed)
    stored = episode.arrays.get("snapshot")
    for step in range(len(episode)):
        same = np.array_equal(env.observe()["state"], episode["state"][step])
        if not same or (stored is not None and not np.array_equal(env.snapshot(), stored[step])):
            raise ReplayMismatch(
                f"{env.name}, seed {episode.seed}: the replay leaves the recording at step {step} of {len(episode)}; "
                "was it recorded with another version of the simulator?"
            )
        env.advance(episode["executed"][step])


def verify(folder: str | Path) -> int:
    """Replay every episode of a folder; how many there are.

    Raises:
        ReplayMismatch: one does not replay. FileFormatError: a damaged file.
    """
    store = DemoFolder(folder)
    env = make_env(store.env, **store.description.get("options", {}), views=())
    for episode in store:
        check_replay(env, episode)
    if not len(store):
        raise FileFormatError(f"{folder} holds no episodes")
    return len(store)


def _description(env: str, options: Mapping[str, Any], noise: float, simulator: Any) -> dict[str, Any]:
    require("safetensors", "robot")
    versions = {}
    for package in _VERSIONED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    described = {k: v for k, v in simulator.describe().items() if k in ("name", "action", "discrete", "state")}
    hertz = {"control_hz": simulator.control_hz}
    return {"env": env, "options": dict(options), "noise": noise, "describe": described, **hertz, "versions": versions}
