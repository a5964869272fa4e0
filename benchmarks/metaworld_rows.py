"""What the Metaworld tables share: a row is one training and its evaluation; rows run side by side on one accelerator.

    run(rows, "benchmarks/results/metaworld_vision.jsonl", processes=8)

A row goes the way a user's run goes: `Demonstrations`, `ControlData`, `ControlTask`, a Lightning `Trainer`, `rollout`.
Each finished row is a JSON line with date and device; a row that has its line is not run again, so a table grows run
by run. Demonstrations are recorded and drawn once, before any training, by all cores. Seeds: demonstrations take the
expert's 0, 1, 2, ...; settings are chosen on `TUNE`; what is reported is played on `FRESH`, where nothing was chosen.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RUNS = Path("runs/metaworld")
RESULTS = Path(__file__).parent / "results"
TUNE, FRESH = 40_000, 70_000  # first seeds
TAPS = {"last": (4,), "mid": (2, 3)}  # EfficientNet-Lite0's last map (stride 32), and strides 8 and 16
BLOCKS = "encoder.backbone.blocks"
WHOLE = {"trunk": "full", "head": "full"}


def plans(taps: str) -> dict[str, dict[str, Any]]:
    """arm -> what it trains beside trunk and head; stages up to stride 8 stay frozen in every arm but the last two."""
    import mmpeft

    stages = "{3,4,5,6}" if taps == "last" else "{3,4}"
    return {
        "blind": {},
        "frozen": {},
        "lora": {f"{BLOCKS}.{stages}.*.{{conv_pw,conv_pwl}}": mmpeft.LoRA(rank=16, alpha=16)},
        "conv": {f"{BLOCKS}.{stages}.*": mmpeft.ConvAdapter(size=16)},
        "full": {"encoder.backbone": {"train": "full", "lr": 3e-4}},
        "scratch": {"encoder": "full"},
    }


ARMS = ("blind", "frozen", "lora", "conv", "full", "scratch")


@dataclass(frozen=True)
class Row:
    """One training and its evaluation; `name` is its identity in the table's file."""

    name: str
    tasks: tuple[str, ...]
    arm: str
    seed: int = 1
    taps: str = "mid"
    view: str = "close"
    size: int = 96
    demonstrations: int = 50
    steps: int = 2000
    batch: int = 64
    lr: float = 1e-3
    width: int = 256
    episodes: int = 50  # a task
    first: int = FRESH
    max_steps: int = 300
    workers: int = 0
    shift: tuple[tuple[str, float], ...] = ()  # of the world's looks, in demonstrations and evaluation alike

    @property
    def look(self) -> dict[str, Any]:
        """Options of `make_env` and `Demonstrations` that decide what is seen."""
        seen: dict[str, Any] = {"views": [self.view], "image_size": self.size}
        return seen | ({"shift": dict(self.shift)} if self.shift else {})


def rules(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """A plan's mapping as rules; a mapping in place of a method holds the rule's other fields."""
    found = []
    for match, what in plan.items():
        fields = what if isinstance(what, dict) else {"train": what} if isinstance(what, str) else {"method": what}
        found.append({"match": match, **fields})
    return found


def folder_of(task: str) -> Path:
    return RUNS / "demos" / task


def env_of(task: str) -> str:
    return f"metaworld:{task}"


# ---- once, before the rows -------------------------------------------------------------------------------------------


def prepare(rows: Sequence[Row], processes: int) -> None:
    """Record and draw what the rows need: a process a task."""
    needed: dict[str, int] = {}
    looks: dict[tuple[str, str], tuple[str, dict[str, Any], int]] = {}
    for row in rows:
        for task in row.tasks:
            needed[task] = max(needed.get(task, 0), row.demonstrations)
            if row.arm != "blind":
                key = (task, json.dumps(row.look, sort_keys=True))
                count = max(row.demonstrations, looks[key][2] if key in looks else 0)
                looks[key] = (task, row.look, count)
    with _pool(processes) as pool:
        list(pool.map(_record, needed.items()))
        list(pool.map(_draw, looks.values()))


def _record(given: tuple[str, int]) -> None:
    from mmpeft.data.demos import collect

    task, count = given
    collect(env_of(task), folder=folder_of(task), episodes=count, noise=0.3)


def _draw(given: tuple[str, dict[str, Any], int]) -> None:
    from mmpeft.data.demos import Demonstrations

    task, look, count = given
    Demonstrations(folder_of(task), episodes=count, **look).render()


# ---- one row ---------------------------------------------------------------------------------------------------------


def make_policy(row: Row) -> Any:
    """The policy of a row, nothing attached."""
    from mmpeft import policies

    eyes: Any = None
    if row.arm == "scratch":
        eyes = policies.ScratchEncoder()
    elif row.arm != "blind":
        eyes = policies.TappedEncoder("package:efficientnet-lite0", taps=TAPS[row.taps], split=2)
    return policies.Policy(
        encoder=eyes, instruction="package:minilm-l6", trunk=policies.MLPTrunk(width=row.width),
        head=policies.RegressionHead(), action_dim=4, state_dim=4, chunk=8, image_size=row.size,
    )  # fmt: skip


def demonstrations_of(row: Row) -> Any:
    from mmpeft.data.demos import Demonstrations

    seen = {} if row.arm == "blind" else row.look
    return Demonstrations([folder_of(t) for t in row.tasks], episodes=row.demonstrations, wording="train", **seen)


def train(row: Row, policy: Any, plan: Any, *, adapter: str = "default", cached: bool = True) -> float:
    """Clone the demonstrations; gives the seconds of training. `plan` None: `adapter` is attached already."""
    import lightning.pytorch as lightning

    from mmpeft.tasks import ControlData, ControlTask

    lightning.seed_everything(row.seed, verbose=False)
    data = ControlData(
        demonstrations_of(row), batch_size=row.batch, seed=row.seed, workers=row.workers,
        cache=str(RUNS / "prefix") if cached and row.arm not in ("blind", "full", "scratch") else None,
    )  # fmt: skip
    task = ControlTask(policy, None if plan is None else rules(plan), lr=row.lr, adapter=adapter)
    trainer = lightning.Trainer(
        accelerator="auto", devices=1, max_epochs=-1, max_steps=row.steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, default_root_dir=str(RUNS),
    )  # fmt: skip
    began = time.perf_counter()
    trainer.fit(task, datamodule=data)
    policy.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return time.perf_counter() - began


def evaluate(row: Row, policy: Any, *, tasks: Sequence[str] | None = None, **changed: Any) -> Any:
    """`RolloutResult` of the policy on the row's evaluation seeds; `changed` are further options of `make_env`."""
    from mmpeft.policies import rollout

    options = {"max_steps": row.max_steps, **({} if row.arm == "blind" else row.look), **changed}
    envs = [env_of(t) for t in (tasks or row.tasks)]
    seeds = range(row.first, row.first + row.episodes)
    return rollout(policy, env=envs, seeds=seeds, options=options, num_envs=simulators())


def simulators() -> int:
    """Simulators of one row: a share of the cores."""
    return max(1, (os.cpu_count() or 2) // int(os.environ.get("METAWORLD_PROCESSES", "1")))


def clone(row: Row) -> dict[str, Any]:
    """A row from nothing: train, save, evaluate."""
    from mmpeft.policies import save_policy

    policy = make_policy(row)
    seconds = train(row, policy, WHOLE | plans(row.taps)[row.arm])
    save_policy(policy, RUNS / "adapters" / row.name.replace("/", "_"), metadata={"row": dataclasses.asdict(row)})
    return scores(evaluate(row, policy)) | {"train_seconds": round(seconds, 1), **sizes(policy)}


def sizes(policy: Any) -> dict[str, int]:
    """Trainable parameters, and bytes of the adapter's tensors."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    return {"trained": sum(p.numel() for p in trained), "bytes": sum(p.numel() * p.element_size() for p in trained)}


def scores(result: Any) -> dict[str, Any]:
    """What a table needs of a `RolloutResult`."""
    return {
        "success": round(result.success, 4), "interval": [round(x, 3) for x in result.interval],
        "by_task": {t: [v["successes"], v["episodes"]] for t, v in result.by_task().items()},
        "won": sorted(f"{r['task']}:{r['seed']}" for r in result.episodes if r["success"]),
    }  # fmt: skip


# ---- many rows -------------------------------------------------------------------------------------------------------


def run(rows: Iterable[Row], out: Path, *, processes: int, work: Any = clone, tiny: bool = False) -> list[dict[str, Any]]:
    """Run the rows that have no line in `out` yet, `processes` at a time; gives all lines."""
    rows = [smaller(r) for r in rows] if tiny else list(rows)
    known = {line["name"] for line in read(out)}
    todo = [r for r in rows if r.name not in known]
    os.environ["METAWORLD_PROCESSES"] = str(processes)
    began = time.perf_counter()
    prepare(todo, os.cpu_count() or 2)
    print(f"{len(todo)} rows to run, {len(rows) - len(todo)} known; prepared in {time.perf_counter() - began:.0f} s", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _pool(processes) as pool:
        waiting = {pool.submit(_one, work, row): row for row in todo}
        for done in concurrent.futures.as_completed(waiting):
            line = done.result()
            if "error" in line:
                print(f"{line['name']}: FAILED\n{line['error']}", flush=True)
                continue
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{line['name']}: {line['success']:.2f} {line['interval']}, {line['seconds']:.0f} s", flush=True)
    return read(out)


def _one(work: Any, row: Row) -> dict[str, Any]:
    torch.set_num_threads(1)
    began = time.perf_counter()
    about = {
        **dataclasses.asdict(row), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "torch": torch.__version__,
    }  # fmt: skip
    try:
        return about | work(row) | {"seconds": round(time.perf_counter() - began, 1)}
    except Exception:  # the other rows go on
        return about | {"error": traceback.format_exc()}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def smaller(row: Row) -> Row:
    """A row of seconds on a CPU, to see that everything runs."""
    return dataclasses.replace(
        row, tasks=row.tasks[:2], demonstrations=2, steps=3, batch=8, episodes=1, max_steps=12, workers=0
    )


def paired(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> tuple[int, int, float]:
    """Episodes that only `a` won, that only `b` won, and McNemar's exact p, over rows of the same seeds and episodes."""
    from mmpeft.metrics.intervals import mcnemar_exact

    by_seed = {line["seed"]: set(line["won"]) for line in b}
    pairs = [(set(line["won"]), by_seed[line["seed"]]) for line in a if line["seed"] in by_seed]
    only_a, only_b = sum(len(x - y) for x, y in pairs), sum(len(y - x) for x, y in pairs)
    return only_a, only_b, mcnemar_exact(only_a, only_b)


def pooled(lines: Sequence[dict[str, Any]]) -> str:
    """"141/150 .94 (.89-.97)" over the rows' training seeds."""
    from mmpeft.metrics.intervals import wilson_interval

    won = sum(v[0] for line in lines for v in line["by_task"].values())
    of = sum(v[1] for line in lines for v in line["by_task"].values())
    if not of:
        return "-"
    low, high = wilson_interval(won, of)
    return f"{won}/{of} {won / of:.2f} ({low:.2f}-{high:.2f})"


def arguments(text: str | None) -> argparse.ArgumentParser:
    """Options of every table."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8, help="rows at a time")
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--out", type=Path, help="JSON lines; default benchmarks/results/<table>.jsonl")
    parser.add_argument("--table", action="store_true", help="print the table of what has been run, run nothing")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU: does everything run?")
    return parser


def program(
    text: str | None, rows: Iterable[Row], default: Path, *, work: Callable[[Row], dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], str],
) -> None:  # fmt: skip
    """A table's command line: run its rows with `work`, unless told not to, and print the table."""
    given = arguments(text).parse_args()
    out = given.out or default
    if not given.table:
        chosen = [r for r in rows if (not given.only or given.only in r.name) and (r.seed == 1 or not given.tiny)]
        run(chosen, out, processes=given.processes, work=work, tiny=given.tiny)
    print(table(read(out)))


def _pool(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
