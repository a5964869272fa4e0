"""`mmpeft ppo`: practice for a saved policy.

    mmpeft ppo --adapter runs/clone --env metaworld:push-v3 --total-steps 200000 --reward success --folder runs/practised
    mmpeft ppo --adapter runs/clone --plan lora.yaml --env ... --folder runs/lora
    mmpeft rollout --over runs/clone --adapter runs/lora --env metaworld:push-v3

Without a plan a copy of the saved adapter is trained further, held to the original by `--kl`, and its folder is whole.
With one, the saved adapter is baked into the base and the new one trained over it; a rollout must name both. Every
number of `mmpeft.policies.ppo` is an option here.
"""

from __future__ import annotations

import argparse
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any


def ppo(args: Sequence[str]) -> int:
    """Train an adapter by reinforcement; the last iteration's success is printed."""
    parser = argparse.ArgumentParser(prog="mmpeft ppo", description="Reinforcement learning of an adapter.")
    parser.add_argument("--adapter", required=True, help="folder of a saved policy adapter, the clone")
    parser.add_argument("--env", action="append", required=True, help="may be given several times")
    parser.add_argument(
        "--folder", required=True, help="of the new adapter, curve and checkpoint; goes on if there is one"
    )
    parser.add_argument("--plan", help="YAML of an adapter over the clone; default: train a copy of the clone's own")
    parser.add_argument(
        "--options", nargs="*", default=[], metavar="KEY=VALUE", help="of the environment, as YAML values"
    )
    numbers = _numbers()
    for name, (kind, default) in numbers.items():
        wanted = default is inspect.Parameter.empty
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        else:
            parser.add_argument(flag, type=kind, required=wanted, default=None if wanted else default)
    given = parser.parse_args(list(args))
    from mmpeft.adapters.store import read_description
    from mmpeft.policies.cloning import as_base
    from mmpeft.policies.commands import options
    from mmpeft.policies.policy import load_policy
    from mmpeft.policies.ppo_loop import ppo as run

    name = str(read_description(given.adapter)["name"])
    policy = load_policy(given.adapter)
    new = "ppo" if name != "ppo" else "ppo2"
    if given.plan is None:
        load_policy(given.adapter, policy, name=new)
    else:
        as_base(policy)
    found = run(
        policy, env=given.env, plan=given.plan, adapter=new, reference=name if given.plan is None else None,
        options=options(given.options), folder=given.folder, report=_report, **{n: getattr(given, n) for n in numbers},
    )  # fmt: skip
    last = found.curve[-1]
    print(
        f"{found.steps} steps in {found.seconds:.0f} s, success {last['success']:.3f}, adapter {new!r} in {given.folder}"
    )
    return 0


def _numbers() -> dict[str, tuple[Any, Any]]:
    """Name -> (type, default) of every number and word that `ppo` takes."""
    from mmpeft.policies.ppo_loop import ppo as run

    hints, found = typing.get_type_hints(run), {}
    for name, parameter in inspect.signature(run).parameters.items():
        kinds = [k for k in typing.get_args(hints[name]) if k is not types.NoneType] or [hints[name]]
        kind = str if typing.get_origin(hints[name]) is typing.Literal else kinds[0]
        if kind in (int, float, bool, str) and name not in ("adapter", "over", "reference", "env", "folder", "plan"):
            found[name] = (kind, parameter.default)
    return found


def _report(row: Mapping[str, float]) -> None:
    shown = ("iteration", "steps", "episodes", "success", "return", "kl", "seconds")
    print("  ".join(f"{k} {row[k]:.4g}" for k in shown), flush=True)
