"""`make robot`: a frozen image encoder learns to steer a simulated arm from 50 demonstrations, beside two controls.

1. `mmpeft collect` records the scripted expert of Metaworld's coffee-pull, with noise on what it carries out.
2. `mmpeft fit` clones it three times: `adapted` with small convolutional adapters inside the frozen encoder, `frozen`
   without them, `blind` without a picture.
3. `mmpeft rollout` plays the same 50 seeds with each. They are fresh: demonstrations have the seeds 0, 1, 2, ...,
   settings were chosen on 40000 to 40049 and 50000 to 50049, a first version was measured on 60000 to 60049.
4. `mmpeft report` makes one page of it: success with intervals, paired tests, curves, parameters, videos.

    python examples/robot.py [options of mmpeft fit]           # runs/robot, ten minutes on two cores
    python examples/robot.py --last-map                        # runs/robot-full: the encoder's last map, with LoRA
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait without spinning; read when torch is imported
ENV = "metaworld:coffee-pull-v3"
EXAMPLES = Path(__file__).resolve().parent
DEMONSTRATIONS = Path("runs/robot/demos")
# arm -> what is laid over examples/metaworld_coffee.yaml; the first is what the others are compared with
ARMS: dict[str, tuple[str, ...]] = {
    "adapted": (),
    "frozen": ("metaworld_frozen.yaml",),
    "blind": ("metaworld_blind.yaml",),
}
LAST_MAP = {name: ("metaworld_last_map.yaml", *over) for name, over in ARMS.items() if name != "blind"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--last-map", action="store_true", help="half an hour; the demonstrations are shared")
    parser.add_argument("--episodes", type=int, default=50, help="demonstrations")
    parser.add_argument("--seeds", default="70000:70050", help="first:end of the evaluation")
    parser.add_argument("--max-steps", type=int, default=300, help="an episode without success ends there")
    given, overrides = parser.parse_known_args()
    folder, arms = (Path("runs/robot-full"), LAST_MAP) if given.last_map else (Path("runs/robot"), ARMS)

    from mmpeft.policies.envs.gl import why_no_gl

    if reason := why_no_gl():  # before anything is recorded
        print(reason, file=sys.stderr)
        return 2
    clock = Clock()
    print(f"\n== {given.episodes} demonstrations of {ENV}", flush=True)
    with clock("collect"):
        mmpeft("collect", "--env", ENV, "--episodes", given.episodes, "--noise", 0.3, "--folder", DEMONSTRATIONS)
    with clock("draw"):
        draw(EXAMPLES / "metaworld_coffee.yaml")
    for arm, over in arms.items():
        print(f"\n== {arm}", flush=True)
        with clock(f"fit {arm}"):
            configs = [part for name in ("metaworld_coffee.yaml", *over) for part in ("--config", EXAMPLES / name)]
            mmpeft("fit", *configs, *overrides)
        with clock(f"rollout {arm}"):
            shutil.rmtree(folder / arm / "videos", ignore_errors=True)  # of an earlier run
            play = ["--env", ENV, "--seeds", given.seeds, "--options", f"max_steps={given.max_steps}"]
            kept = ["--video", folder / arm / "videos", "--output", folder / arm / "rollout.json"]
            mmpeft("rollout", "--adapter", folder / arm / "adapter", *play, *kept)
    result = summary(folder, arms) | {"seconds": round(clock.total, 1), "stages": clock.stages}
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    show(result)
    mmpeft("report", folder, *(["--open"] if has_screen() else []))
    return 0


class Clock:
    """Seconds by stage: `with clock("fit"): ...`."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.began = time.perf_counter()

    def __call__(self, stage: str) -> "Clock":
        self.stage, self.since = stage, time.perf_counter()
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.stages[self.stage] = round(time.perf_counter() - self.since, 1)

    @property
    def total(self) -> float:
        return time.perf_counter() - self.began


def mmpeft(*arguments: object) -> None:
    """`mmpeft ARGUMENTS`; this script ends where it fails."""
    from mmpeft.cli import main as command

    if code := command([str(a) for a in arguments]):
        sys.exit(code)


def draw(config: Path) -> None:
    """The pictures of the demonstrations, two processes drawing; `mmpeft fit` would do it too, unmeasured."""
    import yaml

    from mmpeft.data.demos import Demonstrations

    Demonstrations(**yaml.safe_load(config.read_text())["data"]["init_args"]["train"]["init_args"]).render(workers=2)


def has_screen() -> bool:
    """Whether a person at a terminal can be shown a page."""
    screens = "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    return sys.stdout.isatty() and (screens or platform.system() != "Linux")


def summary(folder: Path, arms: Iterable[str]) -> dict[str, Any]:
    """Success of each arm with its interval, and the exact paired test of the first arm against it."""
    import torch

    from mmpeft import read_metadata
    from mmpeft.data.demos import DemoFolder
    from mmpeft.policies import RolloutResult

    found = {arm: RolloutResult.load(folder / arm / "rollout.json") for arm in arms}
    name, first = next(iter(found.items()))
    tests = {arm: None if arm == name else first.compare(result) for arm, result in found.items()}
    seeds = [row["seed"] for row in first.episodes]
    return {
        "task": ENV,
        "seeds": [min(seeds), max(seeds)],
        "success": {arm: result.success for arm, result in found.items()},
        "intervals": {arm: list(result.interval) for arm, result in found.items()},
        "p_value": {arm: test and test.p_value for arm, test in tests.items()},
        "pairs": {arm: test and [test.only_a, test.only_b] for arm, test in tests.items()},
        "steps": read_metadata(folder / name / "adapter")["step"],
        "demonstrations": len(DemoFolder(DEMONSTRATIONS)),
        "device": f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}",
    }


def show(result: dict[str, Any]) -> None:
    """The table a person reads, and where the time went."""
    first, last = result["seeds"]
    print(f"\n{result['task']}, seeds {first} to {last}, {result['steps']} steps of training each")
    print(f"{'':10}{'success':>8}  {'95 % interval':14}  adapted against it, paired")
    for arm, success in result["success"].items():
        low, high = result["intervals"][arm]
        test = result["pairs"][arm]
        said = f"{test[0]} to {test[1]}, p = {result['p_value'][arm]:.2g}" if test else ""
        print(f"{arm:10}{success:8.2f}  {low:.2f} - {high:.2f}     {said}")
    print("\n" + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result["stages"].items()))
    print(f"{result['seconds']:.0f} s in all, on {result['device']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
