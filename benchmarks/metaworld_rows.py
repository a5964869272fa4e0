"""What the Metaworld tables share: a row is one training and its evaluation, and what a table says of its rows.

A row goes the way a user's run goes: `Demonstrations`, `ControlData`, `ControlTask`, a Lightning `Trainer`, `rollout`.
Seeds: demonstrations take the expert's 0, 1, 2, ...; settings are chosen on `TUNE`; what is reported is played on
`FRESH`, where nothing was chosen. `metaworld_program` runs the rows.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

RUNS = Path("runs/metaworld")
RESULTS = Path(__file__).parent / "results"
TUNE, FRESH = 40_000, 70_000  # first seeds
TAPS = {"last": (4,), "mid": (2, 3)}  # EfficientNet-Lite0's last map (stride 32), and strides 8 and 16
BLOCKS = "encoder.backbone.blocks"
HEADS = {"l1": "RegressionHead", "flow": "FlowHead"}
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
PLAYED = ("budget", "workers", "episodes", "first", "max_steps", "execute")  # what a saved policy does not depend on


@dataclass(frozen=True)
class Row:
    """One training and its evaluation; `name` is its identity in the table's file."""

    name: str
    tasks: tuple[str, ...]
    arm: str
    seed: int = 1
    head: str = "l1"  # of HEADS
    word_noise: float = 0  # of the sentences' vectors, in training
    execute: int = 8  # steps of a chunk of 8 that are carried out before the policy looks again
    taps: str = "mid"
    view: str = "close"
    size: int = 96
    demonstrations: int = 50
    steps: int = 2000
    budget: float = 0  # seconds of training at most, its preparations included; 0: however long the steps take
    batch: int = 64
    lr: float = 1e-3
    width: int = 256
    episodes: int = 50  # a task
    first: int = FRESH
    max_steps: int = 300
    workers: int = 0
    copies: int = 0  # of each picture through the frozen prefix, kept on the device (`clone`); 0: a loader and a trainer
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


def adapter_of(row: Row) -> Path:
    """Where a row keeps its policy."""
    return RUNS / "adapters" / row.name.replace("/", "_")


def saved(row: Row) -> bool:
    """Whether the row's policy was trained."""
    return (adapter_of(row) / "adapter.json").exists()


def env_of(task: str) -> str:
    return f"metaworld:{task}"


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
        head=getattr(policies, HEADS[row.head])(), action_dim=4, state_dim=4, chunk=8, execute=row.execute, image_size=row.size,
        word_noise=row.word_noise,
    )  # fmt: skip


def demonstrations_of(row: Row) -> Any:
    from mmpeft.data.demos import Demonstrations

    seen = {} if row.arm == "blind" else row.look
    return Demonstrations([folder_of(t) for t in row.tasks], episodes=row.demonstrations, wording="train", **seen)


def train(row: Row, policy: Any, plan: Any, *, adapter: str = "default", cached: bool = True) -> dict[str, Any]:
    """Clone the demonstrations; gives steps and seconds of training. `plan` None: `adapter` is attached already."""
    import lightning.pytorch as lightning

    from mmpeft.tasks import BudgetedSteps, ControlData, ControlTask

    lightning.seed_everything(row.seed, verbose=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy.to(device)  # the prefix cache is filled before Lightning would move it
    demonstrations = demonstrations_of(row)
    if row.arm != "blind":
        demonstrations.render()  # opens every picture, for the loader's processes to inherit
    if row.copies:
        return _from_memory(row, policy, plan, adapter, demonstrations)
    data = ControlData(
        demonstrations, batch_size=row.batch, seed=row.seed, workers=row.workers,
        cache=str(RUNS / "prefix") if cached and row.arm not in ("blind", "full", "scratch") else None,
    )  # fmt: skip
    task = ControlTask(policy, None if plan is None else rules(plan), lr=row.lr, adapter=adapter)
    limit = BudgetedSteps(row.budget, measure=60, max_steps=row.steps) if row.budget else None
    trainer = lightning.Trainer(
        accelerator="auto", devices=1, max_epochs=-1, max_steps=-1 if limit else row.steps,
        max_time=timedelta(seconds=row.budget) if limit else None, callbacks=[limit] if limit else [],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=1.0, default_root_dir=str(RUNS),
    )  # fmt: skip
    began = time.perf_counter()
    trainer.fit(task, datamodule=data)
    policy.to(device).eval()
    return {"trained_steps": trainer.global_step, "train_seconds": round(time.perf_counter() - began, 1)}


def _from_memory(row: Row, policy: Any, plan: Any, adapter: str, demonstrations: Any) -> dict[str, Any]:
    """The same without a loader: every sample lies on the device, and a step is one CUDA graph."""
    import mmpeft
    from mmpeft.policies import Memory, clone
    from mmpeft.policies.policy import note_skill
    from mmpeft.tasks.control import measure

    began = time.perf_counter()
    if policy.skill is None:
        measure(policy, demonstrations)
    if plan is not None:
        mmpeft.attach(policy, rules(plan), name=adapter)
    note_skill(policy, adapter)
    place = next(policy.parameters()).device
    memory = Memory.of(demonstrations, policy, copies=row.copies, seed=row.seed, device=place)
    filled = time.perf_counter() - began
    print(f"{row.name}: {len(memory)} samples ready in {filled:.0f} s", flush=True)
    left = row.budget - filled if row.budget else None
    if left is not None and left < row.budget / 4:
        raise RuntimeError(f"reading took {filled:.0f} of the row's {row.budget:.0f} s, too little is left to train")
    policy.train()
    losses = clone(
        policy, memory, steps=row.steps, batch_size=row.batch, lr=row.lr, warmup=100, clip=1.0,
        seed=row.seed, graph=place.type == "cuda", seconds=left,
    )  # fmt: skip
    policy.eval()
    return {
        "trained_steps": len(losses), "train_seconds": round(time.perf_counter() - began, 1),
        "fill_seconds": round(filled, 1), "loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
    }  # fmt: skip


def evaluate(row: Row, policy: Any, *, tasks: Sequence[str] | None = None, **changed: Any) -> Any:
    """`RolloutResult` of the policy on the row's evaluation seeds; `changed` are further options of `make_env`."""
    from mmpeft.policies import rollout

    options = {"max_steps": row.max_steps, **({} if row.arm == "blind" else row.look), **changed}
    envs = [env_of(t) for t in (tasks or row.tasks)]
    seeds = range(row.first, row.first + row.episodes)
    return rollout(policy, env=envs, seeds=seeds, options=options, **simulators())


def simulators() -> dict[str, Any]:
    """Simulators of one row: a process for each of its cores; with a core to itself a few take turns, seen as a batch."""
    cores = (os.cpu_count() or 2) // int(os.environ.get("METAWORLD_PROCESSES", "1"))
    return {"num_envs": cores if cores > 1 else 5, "asynchronous": cores > 1}


def trained(row: Row) -> tuple[Any, dict[str, Any]]:
    """The row's policy, and what is known of its training: read where it was saved before, else trained and saved."""
    from mmpeft.adapters import read_metadata
    from mmpeft.policies import load_policy, save_policy

    folder, recipe = adapter_of(row), {k: v for k, v in dataclasses.asdict(row).items() if k not in PLAYED}
    recipe = json.loads(json.dumps(recipe))
    if saved(row):
        about = read_metadata(folder)
        if about["row"] != recipe:
            raise RuntimeError(f"{folder} was trained as {about['row']}, not as {recipe}: move it away to train anew")
        policy = load_policy(folder).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return policy, dict(about["training"])
    policy = make_policy(row)
    training = train(row, policy, WHOLE | plans(row.taps)[row.arm]) | sizes(policy)
    training["trained_on"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    save_policy(policy, folder, metadata={"row": recipe, "training": training})
    return policy, training


def clone(row: Row) -> dict[str, Any]:
    """A row from nothing: train, save, evaluate."""
    policy, training = trained(row)
    return scores(evaluate(row, policy)) | training


def counts(result: Any) -> list[int]:
    """Successes and episodes of a `RolloutResult`."""
    return [result.successes, len(result.episodes)]


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


def smaller(row: Row) -> Row:
    """A row of seconds on a CPU, to see that everything runs."""
    return dataclasses.replace(
        row, tasks=row.tasks[:2], demonstrations=2, steps=3, batch=8, episodes=1, max_steps=12, workers=min(row.workers, 1),
        copies=min(row.copies, 2),
    )


# ---- what a table says of rows ----------------------------------------------------------------------------------------


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
