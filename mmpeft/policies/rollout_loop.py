"""Evaluate any policy: fixed seeds, success with its interval, rows by task, latency, videos.

    result = rollout(policy, env="metaworld:push-v3", seeds=range(50), execute=8, video="videos/")
    result = rollout(policy, env=["metaworld:push-v3", "metaworld:reach-v3"], seeds=range(20), folder="runs/eval")

Every (environment, seed) is played once. A slot that finishes takes the next episode at once, so slow episodes hold up
nobody; which slot plays an episode changes nothing, because the seed decides it. Finished episodes are written to
`folder` one by one: a killed worker is replaced and only its own episode played again, a killed rollout goes on where
it stopped.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import ConfigError, FileFormatError, NameNotFound, require
from mmpeft.policies.envs import split_name
from mmpeft.policies.rollout_result import RolloutResult
from mmpeft.policies.rollout_video import write_video

log = logging.getLogger("mmpeft")
READS = ("images", "state", "instruction")
ATTEMPTS = 3  # an episode whose worker died so often is given up


def rollout(
    policy: Any,
    *,
    env: str | Sequence[str],
    seeds: Iterable[int],
    execute: int | None = None,
    num_envs: int | None = None,
    asynchronous: bool | None = None,
    options: Mapping[str, Any] | None = None,
    stop_on_success: bool = True,
    video: str | Path | None = None,
    video_size: int | None = None,
    video_episodes: int = 3,
    folder: str | Path | None = None,
    shard: tuple[int, int] = (0, 1),
    timeout: float = 300.0,
) -> RolloutResult:
    """Play every environment with every seed.

    Args:
        policy: an object with `act(observation) -> chunk` (see `mmpeft.policies`), or the folder of a saved adapter.
        env: one environment name or several with equal spaces. seeds: of the episodes; each environment plays all of
            them.
        execute: actions of a chunk carried out before the next observation; default the policy's `execute`, else its `chunk`, else 1.
        num_envs: slots; default the number of cores, at most the number of episodes. asynchronous: a process a slot;
            default where there is more than one. timeout: seconds until a silent worker counts as dead.
        options: of `make_env`: views, image_size, max_steps, shift, noise, instruction...; views and size default to
            those that the policy's `environment` names.
        stop_on_success: an episode ends with its first success, as Metaworld counts it ("success at any step").
        video: a folder (one file an episode) or an .mp4 or .gif file (all in one); `video_episodes` successes and as
            many failures.
        video_size: pixels; default the policy's own first view, which costs no drawing.
        folder: finished episodes go to its episodes.jsonl, and a rollout with the same settings resumes there.
        shard: (rank, of how many): every so-manieth episode; `RolloutResult.merged` joins the shards.

    Raises:
        ConfigError: a repeated or negative seed, a chunk that is too short, misshapen or not finite, settings of
            another rollout in `folder`. NameNotFound: unknown environment or option. BaseMismatch: the policy was
            trained for other actions, state or cameras. WorkerDied: one episode killed its worker three times. NoGL:
            no OpenGL library draws here.
    """
    require("gymnasium", "robot")
    policy = _loaded(policy)
    names = (env,) if isinstance(env, str) else tuple(env)
    for name in names:
        split_name(name)
    reads = tuple(getattr(policy, "reads", READS))
    if execute is None:
        execute = getattr(policy, "execute", None) or getattr(policy, "chunk", 1)
    execute = _at_least_one("execute", execute)
    episodes = _episodes(names, seeds, shard)
    num_envs = min(_at_least_one("num_envs", num_envs or os.cpu_count() or 1), max(1, len(episodes)))
    asynchronous = num_envs > 1 if asynchronous is None else asynchronous
    trained = getattr(policy, "environment", None)
    given = dict(options or {})
    if trained and {split_name(n)[0] for n in names} == {str(trained.get("name")).partition(":")[0]}:
        given = {**trained.get("options", {}), **given}  # the cameras it knows, unless others are asked for
    given.setdefault("full_state", "full_state" in reads)
    if "images" not in reads:
        given["views"] = ()
    settings = {"env": list(names), "execute": execute, "options": _plain(given), "stop_on_success": stop_on_success}

    from mmpeft.policies.envs.base import check_trained_for
    from mmpeft.policies.rollout_slot import EpisodeList, Filming
    from mmpeft.policies.rollout_workers import WorkerDied, Workers

    filming = None
    if video is not None:
        filming = Filming(size=video_size if "images" in reads or video_size else 192, every=4)
    plan = EpisodeList(names, episodes)
    book = _Book(folder, settings)
    waiting = _Waiting(plan, book.finished(plan))
    films = _Films(video, video_episodes, named=len(names) > 1)
    milliseconds: list[float] = []
    steps, died = 0, dict[int, int]()
    kwargs = {"execute": execute, "stop_on_success": stop_on_success, "filming": filming}
    while waiting.left():
        workers = None
        running: dict[int, int] = {}  # slot -> episode number
        try:
            workers = Workers(
                plan, given, kwargs, num_envs=min(num_envs, waiting.left()), asynchronous=asynchronous, timeout=timeout
            )
            if trained:
                check_trained_for(trained, workers.describe(), needs=reads)
            if hasattr(policy, "reset"):
                policy.reset(workers.num_envs)
            action_space = workers.action_space()
            texts, tasks = np.full(workers.num_envs, "", object), np.full(workers.num_envs, "", object)
            last_env = [i % len(names) for i in range(workers.num_envs)]
            observation: dict[str, Any] = {}
            while True:
                fresh = {}
                for slot in range(workers.num_envs):
                    number = None if slot in running else waiting.next(last_env[slot])
                    if number is not None:
                        fresh[slot] = running[slot] = number
                        last_env[slot] = plan.episodes[number][0]
                        tasks[slot] = names[last_env[slot]]
                if not running:
                    break
                if fresh:
                    observation, told = workers.reset(fresh)
                    texts = np.array([new or old for new, old in zip(told, texts, strict=True)], object)
                first = np.array([slot in fresh for slot in range(workers.num_envs)])
                began = time.perf_counter()
                chunk = policy.act(
                    {**observation, "instruction": texts.astype(str), "task": tasks.astype(str), "first": first}
                )
                milliseconds.append(1000 * (time.perf_counter() - began))
                actions = _checked(chunk, action_space, execute, running, plan)
                observation, records = workers.step(actions)
                for record in records:
                    slot = next(s for s, n in running.items() if n == record.number)
                    del running[slot]
                    steps += record.row["steps"]
                    book.add(record.row)
                    films.add(record)
        except WorkerDied as error:
            guilty = {n for s, n in running.items() if s in error.slots or not error.slots}
            for number in guilty:
                died[number] = died.get(number, 0) + 1
                if died[number] >= ATTEMPTS:
                    name, seed = names[plan.episodes[number][0]], plan.episodes[number][1]
                    raise WorkerDied(
                        f"{name} with seed {seed} ended its worker {ATTEMPTS} times: {error}", error.slots
                    ) from error
            if not running:
                raise
            log.warning("%s; %d finished episodes are kept, new workers play the rest", error, len(book.rows))
            waiting.put_back(running.values())
        finally:
            if workers is not None:
                workers.close()
    rows = sorted(book.rows, key=lambda r: (names.index(r["task"]), r["seed"]))
    settings |= {"num_envs": num_envs, "restarts": sum(died.values()), "policy": type(policy).__name__}
    return RolloutResult(rows, _latency(milliseconds, steps), films.write(), settings)


def _loaded(policy: Any) -> Any:
    """A policy object; a folder is read by the policy side of the package."""
    if isinstance(policy, str | Path):
        if not Path(policy).is_dir():
            raise NameNotFound(f"no adapter folder {str(policy)!r}")
        return require("mmpeft.policies.policy", "robot").load_policy(policy)
    if not callable(getattr(policy, "act", None)):
        raise ConfigError(f"a policy has a method act(observation) -> chunk; {type(policy).__name__} has none")
    return policy


def _at_least_one(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)


def _episodes(names: Sequence[str], seeds: Iterable[int], shard: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """(environment index, seed) of this shard, environment by environment."""
    listed = list(seeds)
    for s in listed:
        if isinstance(s, bool) or not isinstance(s, int | np.integer) or not 0 <= s < 2**31:
            raise ConfigError(f"seeds are integers from 0 to 2**31 - 1, got {s!r}")
    for what, values in (("seed", listed), ("environment", list(names))):
        if not values or len(set(values)) != len(values):
            raise ConfigError(f"need at least one {what} and none twice, got {values[:8]}")
    rank, world = shard
    if not 0 <= rank < world:
        raise ConfigError(f"shard (rank, of how many) needs 0 <= rank < number, got {shard}")
    return tuple((i, int(s)) for i in range(len(names)) for s in listed)[rank::world]


def _checked(chunk: Any, space: Any, execute: int, running: Mapping[int, int], plan: Any) -> NDArray[Any]:
    """The first `execute` actions of a chunk [B, C, ...]; zeros in rows that play nothing.

    Raises:
        ConfigError: another shape, NaN or infinity, or an integer that is no action; the first such episode is named.
    """
    array = np.asarray(chunk.detach().cpu().float() if hasattr(chunk, "detach") else chunk)
    rows, inner = len(array) if array.ndim else 0, tuple(space.shape)
    slots = max(running) + 1
    if array.ndim != 2 + len(inner) or rows < slots or array.shape[2:] != inner:
        wanted = f"[{slots} or more, chunk{''.join(f', {n}' for n in inner)}]"
        raise ConfigError(
            f"a chunk has shape {wanted} here (slots, actions, action size), the policy gave {list(array.shape)}"
        )
    if array.shape[1] < execute:
        raise ConfigError(
            f"execute {execute} needs chunks of at least {execute} actions, the policy gave {array.shape[1]}"
        )
    array = array[:, :execute]
    discrete = hasattr(space, "n")
    actions = np.zeros(array.shape, np.int64 if discrete else np.float32)
    for slot, number in running.items():
        index, seed = plan.episodes[number]
        ok = (array[slot] >= 0) & (array[slot] < space.n) if discrete else np.isfinite(array[slot])
        if not ok.all():
            bad = array[slot][~ok].reshape(-1)[0]
            wants = f"integers 0 to {space.n - 1}" if discrete else "finite"
            raise ConfigError(f"{plan.envs[index]}, seed {seed}: actions must be {wants}, the policy gave {bad}")
        actions[slot] = array[slot] if discrete else np.clip(array[slot], space.low, space.high)
    return actions


def _plain(value: Any) -> Any:
    """Settings as JSON values, whatever dataclasses and tuples they hold."""
    return json.loads(
        json.dumps(value, default=lambda v: vars(v) if hasattr(v, "__dict__") else str(v), sort_keys=True)
    )


def _latency(milliseconds: list[float], steps: int) -> dict[str, float]:
    if not milliseconds:
        return {"calls": 0}
    p50, p95 = np.percentile(milliseconds, [50, 95])
    found = {"p50": p50, "p95": p95, "mean": np.mean(milliseconds), "per_step": sum(milliseconds) / max(1, steps)}
    return {k: round(float(v), 4) for k, v in found.items()} | {"calls": len(milliseconds)}


class _Waiting:
    """Episodes still to play. A slot gets one of the environment it holds if there is one, since making another costs
    a second."""

    def __init__(self, plan: Any, done: set[int]) -> None:
        self.plan = plan
        self.queues: dict[int, deque[int]] = {i: deque() for i in range(len(plan.envs))}
        for number, (index, _) in enumerate(plan.episodes):
            if number not in done:
                self.queues[index].append(number)

    def left(self) -> int:
        return sum(map(len, self.queues.values()))

    def next(self, env: int) -> int | None:
        queue = self.queues[env] or max(self.queues.values(), key=len)
        return queue.popleft() if queue else None

    def put_back(self, numbers: Iterable[int]) -> None:
        for number in sorted(numbers, reverse=True):
            self.queues[self.plan.episodes[number][0]].appendleft(number)


class _Book:
    """Rows of finished episodes, in memory and, a line each, in `<folder>/episodes.jsonl`; its first line holds the
    settings."""

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.path = Path(folder) / "episodes.jsonl" if folder is not None else None
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self._write(settings)
            return
        lines = self.path.read_bytes().split(b"\n")
        if lines[-1]:  # the process was killed while it wrote: that episode is played again
            self.path.write_bytes(b"\n".join(lines[:-1]) + b"\n" if lines[:-1] else b"")
        try:
            found = [json.loads(line) for line in lines[:-1] if line.strip()]
        except ValueError as error:
            raise FileFormatError(f"{self.path} is no record of a rollout ({error})") from error
        if not found:
            self._write(settings)
            return
        if found[0] != _plain(settings):
            wrong = [k for k in settings if found[0].get(k) != _plain(settings)[k]]
            raise ConfigError(
                f"{self.path} records a rollout with other settings ({', '.join(wrong)}); choose another folder"
            )
        self.rows = found[1:]

    def finished(self, plan: Any) -> set[int]:
        """Numbers of the plan's episodes that are recorded; rows of other seeds are left out of the result, not of the
        file."""
        numbers = {(plan.envs[i], s): n for n, (i, s) in enumerate(plan.episodes)}
        self.rows = [r for r in self.rows if (r["task"], r["seed"]) in numbers]
        return {numbers[r["task"], r["seed"]] for r in self.rows}

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path is not None:
            self._write(row)

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())


class _Films:
    """The first few successes and failures of a rollout, by seed, as videos; `named` puts the task into their names."""

    def __init__(self, target: str | Path | None, episodes: int, *, named: bool) -> None:
        self.target = None if target is None else Path(target)
        self.episodes, self.named = episodes, named
        self.kept: dict[bool, list[Any]] = {True: [], False: []}

    def add(self, record: Any) -> None:
        if self.target is None or record.frames is None:
            return
        kept = self.kept[record.row["success"]]
        kept.append(record)
        kept.sort(key=lambda r: r.number)
        del kept[self.episodes :]

    def write(self) -> list[str]:
        """The files written: `seed-<seed>-success.mp4` in a folder (of several environments: the task before it), or
        one file that shows all after one another."""
        films = [*self.kept[True], *self.kept[False]]
        if self.target is None or not films:
            return []
        if self.target.suffix:
            frames = np.concatenate([f.frames for f in films])
            return [str(write_video(self.target, frames, fps=films[0].frames_per_second))]
        written = []
        for film in films:
            row = film.row
            how = "success" if row["success"] else "failure"
            task = f"{row['task'].split(':')[1].replace('/', '-')}-" if self.named else ""
            name = f"{task}seed-{row['seed']}-{how}.mp4"
            written.append(str(write_video(self.target / name, film.frames, fps=film.frames_per_second)))
        return written
