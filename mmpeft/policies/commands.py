"""`mmpeft collect` and `mmpeft rollout`: demonstrations to disk, and policies evaluated in simulation.

    mmpeft collect --env metaworld:push-v3 --episodes 50 --noise 0.3 --folder demos/push
    mmpeft rollout --adapter runs/push --env metaworld:push-v3 --seeds 50000:50050 --video videos/ --output result.json
    mmpeft rollout --adapter runs/push --adapter runs/reach --env metaworld:push-v3 --env metaworld:reach-v3
    mmpeft rollout --expert --env metaworld:push-v3 --seeds 0:20 --against runs/push/result.json

Each takes the arguments after its name and gives an exit code; `mmpeft.cli` registers them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mmpeft.errors import ConfigError


def collect(args: Sequence[str]) -> int:
    """Record demonstrations of a scripted expert."""
    parser = argparse.ArgumentParser(prog="mmpeft collect", description="Record a scripted expert's demonstrations.")
    parser.add_argument("--env", required=True, help="metaworld:<task> or babyai:<level>")
    parser.add_argument("--folder", required=True, help="where to; an interrupted recording is filled up")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--noise", type=float, default=0.0, help="on the carried-out action; labels stay clean")
    parser.add_argument("--seeds", help="first:end, or a list 3,7,9; default 0, 1, 2, ...")
    parser.add_argument("--extra-steps", type=int, default=10, help="recorded after success")
    _options(parser)
    given = parser.parse_args(list(args))
    from mmpeft.data.demos.record import collect as run

    found = run(
        given.env,
        folder=given.folder,
        episodes=given.episodes,
        noise=given.noise,
        seeds=None if given.seeds is None else seeds(given.seeds),
        extra_steps=given.extra_steps,
        options=options(given.options),
    )
    print(found)
    return 0


def rollout(args: Sequence[str]) -> int:
    """Evaluate a saved adapter, or the scripted expert."""
    parser = argparse.ArgumentParser(prog="mmpeft rollout", description="Success of a policy on fixed seeds.")
    policy = parser.add_mutually_exclusive_group(required=True)
    policy.add_argument(
        "--adapter", action="append", help="folder of a saved policy adapter; of several, each plays its own task"
    )
    policy.add_argument("--expert", action="store_true", help="Metaworld's scripted experts, the ceiling")
    parser.add_argument("--over", action="append", default=[], help="adapters that --adapter was trained over, in order")
    parser.add_argument("--env", action="append", required=True, help="may be given several times")
    parser.add_argument("--seeds", default="50000:50050", help="first:end, or a list 3,7,9")
    parser.add_argument("--execute", type=int, help="actions of a chunk carried out before the next look")
    parser.add_argument("--num-envs", type=int, help="simulators at once; default the number of cores")
    parser.add_argument("--video", help="a folder, or one .mp4 or .gif")
    parser.add_argument("--folder", help="keeps finished episodes; the same command goes on there")
    parser.add_argument("--output", help="JSON file of the result")
    parser.add_argument("--against", help="JSON result on the same seeds; prints the paired test")
    _options(parser)
    given = parser.parse_args(list(args))
    from mmpeft.policies.by_task import ByTask
    from mmpeft.policies.experts import ExpertPolicy
    from mmpeft.policies.rollout_loop import rollout as run
    from mmpeft.policies.rollout_result import RolloutResult

    if given.over and (given.expert or len(given.adapter) > 1):
        raise ConfigError("--over is for one --adapter")
    other = None if given.against is None else RolloutResult.load(given.against)  # refused before the work, not after
    player: Any = ExpertPolicy()
    if given.adapter is not None:
        player = _stacked(given.over, given.adapter[0])
        if len(given.adapter) > 1:
            player = ByTask(given.adapter)
            player.check(given.env)
    result = run(
        player,
        env=given.env,
        seeds=seeds(given.seeds),
        execute=given.execute,
        num_envs=given.num_envs,
        options=options(given.options),
        video=given.video,
        folder=given.folder,
    )
    print(result)
    if given.output:
        result.save(given.output)
    if other is not None:
        test = result.compare(other)
        print(
            f"against {given.against}: {test.difference:+.3f} ({test.only_a} to {test.only_b}), p = {test.p_value:.2g}"
        )
    return 0


def _stacked(over: Sequence[str], adapter: str) -> Any:
    """The adapter's folder, or a policy with the adapter over others."""
    if not over:
        return adapter
    from mmpeft.policies.cloning import as_base
    from mmpeft.policies.policy import load_policy

    policy = as_base(load_policy(over[0]))
    for folder in over[1:]:
        as_base(load_policy(folder, policy))
    return load_policy(adapter, policy)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--options", nargs="*", default=[], metavar="KEY=VALUE", help="of the environment, as YAML values"
    )


def options(pairs: Sequence[str]) -> dict[str, Any]:
    """{"views": ["close"], "image_size": 96} of ["views=[close]", "image_size=96"].

    Raises:
        ConfigError: no KEY=VALUE, or a value that is not YAML.
    """
    import yaml

    found = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--options {pair!r}: {value!r} is not YAML ({error})") from error
        if not sign or not key:
            raise ConfigError(f"--options takes KEY=VALUE, got {pair!r}")
    return found


def seeds(said: str) -> list[int]:
    """[3, 4] of "3:5", [3, 7] of "3,7".

    Raises:
        ConfigError: neither of the two, or an empty range.
    """
    first, colon, end = said.partition(":")
    try:
        found = list(range(int(first), int(end))) if colon else [int(s) for s in said.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds takes first:end or a list 3,7,9; got {said!r}") from error
    if not found:
        raise ConfigError(f"--seeds {said!r} names no seed")
    return found
