"""What practice made of a clone: it is played before and after `ppo`, on the same episodes, and the two are compared.

    result = before_and_after(evaluate, practise, arguments=vars(given), began=began, output="runs/result.json")

`evaluate` and `practise` are the caller's own, so that its script says what is played and how it is trained; what is told
while it runs, and what is written at the end, is the same for every one of them.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mmpeft.data.demos.store import atomic_write
from mmpeft.policies.ppo_loop import PPOResult
from mmpeft.policies.rollout_result import RolloutResult


def before_and_after(
    evaluate: Callable[[], RolloutResult], practise: Callable[[], PPOResult], *, arguments: Mapping[str, Any],
    began: float, output: str | Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Play the clone, let it practise, play it again; success of both with Wilson's interval, and the exact McNemar test.

    Args:
        evaluate: plays the policy as it is now, each time on the same episodes, which `practise` does not train on.
        arguments: of the script, as JSON. began: its `time.perf_counter()`.
        output: JSON of the result; the curve lies beside it as CSV.

    Raises:
        ConfigError: the episodes of the two evaluations differ.
    """
    before = evaluate()
    print(_said("clone", before), flush=True)
    found = practise()
    after = evaluate()
    test = after.compare(before)
    print(f"{_said('PPO', after)}, p = {test.p_value:.2g}")
    result = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "device": f"CPU, {torch.get_num_threads()} thread(s), {platform.machine()}", "torch": torch.__version__,
        "arguments": dict(arguments), "clone": before.success, "clone_interval": before.interval, "ppo": after.success,
        "ppo_interval": after.interval, "episodes": len(after.episodes), "only_ppo": test.only_a,
        "only_clone": test.only_b, "p_value": test.p_value, "steps": found.steps,
        "seconds": round(time.perf_counter() - began),
    }  # fmt: skip
    if output:
        path = Path(output)
        atomic_write(path, (json.dumps(result, indent=1) + "\n").encode())
        found.save_curve(path.with_suffix(".csv"))
    return result


def print_row(row: Mapping[str, float]) -> None:
    """A row of the curve, as `ppo(report=print_row)` gives it."""
    print(" ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)


def _said(name: str, played: RolloutResult) -> str:
    low, high = played.interval
    return f"{name:<8}{played.success:.2f} ({low:.2f} to {high:.2f})"
