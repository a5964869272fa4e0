"""What every benchmark shares: arguments, timing, memory, versions, the JSON lines and the loss gate.

A row's arms run one after another on one machine in one call, each from the same seed (weights, adapters, batches), so
speed is compared side by side and the losses must agree. Steps are timed with CUDA events; the median is reported with
its quartiles, and the first arm is run again at the end: the spread between its two runs is the row's noise floor.

`--tiny` runs the same code at toy sizes, on CPU where there is no GPU, so that a typo costs no GPU minute: kernels are
references then, torch.compile runs its `aot_eager` backend, arms that need a GPU say that they were skipped, and nothing
goes into the results file.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "h100.jsonl"
PEAK_TFLOPS = 796.0  # measured bf16 matmul, 8192^3, random data, on the H100 of the table
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = ("triton", "transformers", "peft", "liger_kernel", "timm", "unsloth", "unsloth_zoo")


class Skipped(Exception):
    """An arm that cannot run here; the message says why."""


def parser(doc: str | None, *, results: Path = RESULTS) -> argparse.ArgumentParser:
    """The options that every row has; `results` is where its lines go."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--arms", nargs="+", help="default: all")
    made.add_argument("--warmup", type=int, default=5)
    made.add_argument("--steps", type=int, default=12)
    made.add_argument("--out", type=Path, help=f"JSON lines; default {results.relative_to(results.parents[2])}")
    made.add_argument("--tiny", action="store_true", help="toy sizes, on CPU too: does every line of this row run?")
    return made


def parse(
    made: argparse.ArgumentParser, argv: Sequence[str] | None, arms: Mapping[str, Any], *, cpu: bool = False
) -> argparse.Namespace:
    """The arguments, checked before anything is built; quiet logs but for mmpeft's own. `cpu`: full sizes need no GPU."""
    args = made.parse_args(argv)
    args.arms = list(arms) if args.arms is None else args.arms
    if unknown := [a for a in args.arms if a not in arms]:
        made.error(f"unknown arms {', '.join(unknown)}; this row has {', '.join(arms)}")
    if DEVICE == "cpu" and not args.tiny and not cpu:
        made.error("no GPU here: only --tiny runs on CPU")
    if args.tiny:
        args.warmup, args.steps = min(args.warmup, 1), min(args.steps, 3)
        if args.out is None:
            args.out = Path(os.devnull)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    for noisy in ("httpx", "torch", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return args


def compile_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of torch.compile."""
    return {"dynamic": False} | ({"backend": "aot_eager"} if args.tiny and DEVICE == "cpu" else {})


def need(*packages: str, gpu: bool = False) -> None:
    """Raise Skipped where a package, or a GPU, is missing."""
    if gpu and DEVICE == "cpu":
        raise Skipped("needs a GPU")
    if missing := [p for p in packages if find_spec(p) is None]:
        raise Skipped(f"{', '.join(missing)} not installed")


def versions() -> dict[str, str]:
    """Versions of what can change a number."""
    found = {"torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def clocks() -> str:
    """SM clock, power and temperature now: rounds that differ by more than 3 % are not compared."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=False, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def free() -> None:
    """Empties the allocator and restarts the peak counters."""
    torch._dynamo.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> tuple[float, float]:
    """(allocated, reserved) GiB since `free`; zeros on CPU."""
    if DEVICE == "cpu":
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30


def timed(step: Callable[[int], Any], *, warmup: int, steps: int) -> tuple[list[float], list[float]]:
    """Runs step(i) warmup + steps times; returns (milliseconds of the timed ones, every value it gave)."""
    values, marks = [], []
    gc.disable()
    for i in range(warmup + steps):
        start = _mark()
        value = step(i)
        marks.append((start, _mark()))
        values.append(value.detach().float().abs().mean().clone())  # actions of both signs would cancel
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    gc.enable()
    milliseconds = [a.elapsed_time(b) if DEVICE == "cuda" else (b - a) * 1e3 for a, b in marks[warmup:]]
    return milliseconds, [float(x) for x in values]


def _mark() -> Any:
    if DEVICE == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def quantile(values: list[float], q: float) -> float:
    """Linear-interpolated quantile."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


class Row:
    """One row of the table: runs arms, prints them, appends their JSON lines.

    Args:
        items: of `unit` (without its "/s") a step; flops: a step, for MFU.
        gate_on: arms whose `loss` must agree start with this prefix's first line; "" takes the first line of all.
    """

    def __init__(self, workload: str, *, unit: str, items: int, flops: float, args: argparse.Namespace) -> None:
        self.workload = f"{workload} (tiny)" if args.tiny else workload
        self.unit, self.items, self.flops, self.args = unit, items, flops, args
        self.out: Path = args.out or RESULTS
        self.lines: list[dict[str, Any]] = []

    def arms(self, builders: Mapping[str, Callable[[], Callable[[int], Any]]], *, again: str | None = None) -> None:
        """Run the arms asked for, in the order given, and `again` once more at the end (before an arm that patches)."""
        names = [name for name in builders if name in self.args.arms]
        if again in names and len(names) > 1 and not self.args.tiny:
            names.insert(-1 if names[-1].endswith("liger") else len(names), str(again))
        for i, name in enumerate(names):
            self.arm(name, builders[name], repeat=name in names[:i])

    def arm(self, name: str, build: Callable[[], Callable[[int], Any]], **extra: Any) -> None:
        """`build` makes a step function; an arm that fails or is skipped is reported and the others go on."""
        free()
        began = time.time()
        try:
            step = build()
            milliseconds, losses = timed(step, warmup=self.args.warmup, steps=self.args.steps)
        except Skipped as why:
            print(f"{self.workload} | {name} | skipped: {why}", flush=True)
            return
        except Exception as error:
            print(f"{self.workload} | {name} | FAILED {type(error).__name__}: {str(error)[:600]}", flush=True)
            free()
            if os.environ.get("BENCH_RAISE"):
                raise
            return
        line = self.line(name, milliseconds, losses, peak(), began) | getattr(step, "extra", {}) | extra
        self.add(line)
        del step
        free()

    def line(
        self, name: str, milliseconds: list[float], losses: list[float], gib: tuple[float, float], began: float
    ) -> dict[str, Any]:
        """The JSON line of an arm."""
        median = quantile(milliseconds, 0.5)
        return {
            "workload": self.workload,
            "arm": name,
            "throughput": round(self.items / median * 1e3, 1),
            "unit": self.unit,
            "peak_gib": round(gib[0], 2),
            "mfu": round(self.flops / (median * 1e-3) / 1e12 / PEAK_TFLOPS, 4),
            "loss": round(losses[-1], 5),
            "loss_first": round(losses[0], 5),
            "step_ms": round(median, 3),
            "step_ms_iqr": [round(quantile(milliseconds, q), 3) for q in (0.25, 0.75)],
            "reserved_gib": round(gib[1], 2),
            "steps": [self.args.warmup, self.args.steps],
            "device": device_name(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": versions(),
            "clocks": clocks(),
            "seconds": round(time.time() - began, 1),
        }

    def add(self, line: dict[str, Any]) -> None:
        """Print a line and append it to the file."""
        self.lines.append(line)
        shown = ("throughput", "peak_gib", "reserved_gib", "mfu", "step_ms", "step_ms_iqr", "loss_first", "loss")
        text = {k: line[k] for k in shown}
        print(f"{self.workload} | {line['arm']} | {text} | {line['clocks']} | {line['seconds']} s", flush=True)
        if str(self.out) != os.devnull:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def subprocess(self, name: str, module: str, *arguments: str) -> None:
        """An arm that patches libraries on import: it runs `python -m module` and its last line is the JSON line."""
        free()
        began = time.time()
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=480)
        last = done.stdout.strip().splitlines()[-1:] or [""]
        if done.returncode or not last[0].startswith("{"):
            tail = (done.stdout + done.stderr).strip()[-600:]
            print(f"{self.workload} | {name} | FAILED in its process ({done.returncode}): {tail}", flush=True)
            return
        told = json.loads(last[0])
        if why := told.get("skipped"):
            print(f"{self.workload} | {name} | skipped: {why}", flush=True)
            return
        line = self.line(name, told["milliseconds"], told["losses"], tuple(told["gib"]), began)
        self.add(line | {"versions": told["versions"]})

    def gate(self, *, relative: float = 2e-3) -> bool:
        """Prints whether each arm's losses agree with the first peer's: `relative` at step 0, 5x that at the end."""
        reference = next((x for x in self.lines if x["arm"].startswith("peft")), None)
        good = True
        for line in self.lines if reference is not None else []:
            first = abs(line["loss_first"] - reference["loss_first"]) / max(abs(reference["loss_first"]), 1e-9)
            last = abs(line["loss"] - reference["loss"]) / max(abs(reference["loss"]), 1e-9)
            same_steps = sum(line["steps"]) == sum(reference["steps"])
            ok = first <= relative and (not same_steps or last <= 5 * relative)
            good &= ok
            verdict = "ok" if ok else "FAILED"
            print(f"gate {self.workload} | {line['arm']}: first {first:.1e} last {last:.1e} {verdict}", flush=True)
        return good
