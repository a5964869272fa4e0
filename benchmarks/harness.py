"""What every benchmark shares: timing, memory, versions, the JSON lines and the loss gate.

A row's arms run one after another on one machine in one process, each from the same seed (weights, adapters,
batches), so speed is compared side by side and the losses must agree. Steps are timed with CUDA events; the median is
reported with its
quartiles, and the first arm is run again at the end: the spread between its two runs is the row's noise floor.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "h100.jsonl"
PEAK_TFLOPS = 796.0  # measured bf16 matmul, 8192^3, random data, on the H100 of the table


def versions() -> dict[str, str]:
    """Versions of what can change a number."""
    found = {"torch": torch.__version__}
    for name in ("triton", "transformers", "peft", "liger_kernel", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def clocks() -> str:
    """SM clock, power and temperature now: rounds that differ by more than 3 % are not compared."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
    return subprocess.run(query, check=False, capture_output=True, text=True).stdout.strip()


def free() -> None:
    """Empties the allocator and restarts the peak counters."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def timed(step: Callable[[int], Any], *, warmup: int, steps: int) -> tuple[list[float], list[float]]:
    """Runs step(i) warmup + steps times; returns (milliseconds of the timed ones, every loss)."""
    losses, events = [], []
    gc.disable()
    for i in range(warmup + steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss = step(i)
        end.record()
        losses.append(loss.detach().clone())
        events.append((start, end))
    torch.cuda.synchronize()
    gc.enable()
    return [a.elapsed_time(b) for a, b in events[warmup:]], [float(x) for x in losses]


def quantile(values: list[float], q: float) -> float:
    """Linear-interpolated quantile."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


class Row:
    """One row of the table: runs arms, prints them, appends their JSON lines."""

    def __init__(self, workload: str, *, unit: str, items: int, flops: float, out: Path | None = None) -> None:
        self.workload, self.unit, self.items, self.flops = workload, unit, items, flops
        self.out = out or RESULTS
        self.lines: list[dict[str, Any]] = []

    def arm(
        self, name: str, build: Callable[[], Callable[[int], Any]], *, warmup: int, steps: int, **extra: Any
    ) -> None:
        """`build` makes a step function; a failing arm is reported and the others go on."""
        free()
        began = time.time()
        try:
            step = build()
            milliseconds, losses = timed(step, warmup=warmup, steps=steps)
        except Exception as error:
            print(f"{self.workload} {name}: FAILED {type(error).__name__}: {str(error)[:600]}", flush=True)
            if os.environ.get("BENCH_RAISE"):
                raise
            return
        median = quantile(milliseconds, 0.5)
        gib = 2**30
        line = {
            "workload": self.workload,
            "arm": name,
            "throughput": round(self.items / median * 1e3, 1),
            "unit": self.unit,
            "peak_gib": round(torch.cuda.max_memory_allocated() / gib, 2),
            "mfu": round(self.flops / (median * 1e-3) / 1e12 / PEAK_TFLOPS, 4),
            "loss": round(losses[-1], 5),
            "loss_first": round(losses[0], 5),
            "step_ms": round(median, 3),
            "step_ms_iqr": [round(quantile(milliseconds, q), 3) for q in (0.25, 0.75)],
            "reserved_gib": round(torch.cuda.max_memory_reserved() / gib, 2),
            "steps": [warmup, steps],
            "device": torch.cuda.get_device_name(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": versions(),
            "clocks": clocks(),
            "seconds": round(time.time() - began, 1),
            **extra,
        }
        self.lines.append(line)
        shown = {
            k: line[k]
            for k in ("throughput", "peak_gib", "reserved_gib", "mfu", "step_ms", "step_ms_iqr", "loss_first", "loss")
        }
        print(f"{self.workload} | {name} | {shown} | {line['clocks']} | {line['seconds']} s", flush=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        del step
        free()

    def gate(self, *, relative: float = 2e-3) -> None:
        """Prints whether each arm's losses agree with the first peer's: `relative` at step 0, 5x that at the end."""
        reference = next((x for x in self.lines if x["arm"].startswith("peft")), None)
        for line in self.lines:
            if reference is None:
                break
            first = abs(line["loss_first"] - reference["loss_first"]) / abs(reference["loss_first"])
            last = abs(line["loss"] - reference["loss"]) / abs(reference["loss"])
            same_steps = sum(line["steps"]) == sum(reference["steps"])
            ok = first <= relative and (not same_steps or last <= 5 * relative)
            print(
                f"gate {self.workload} | {line['arm']}: first {first:.1e} last {last:.1e} {'ok' if ok else 'FAILED'}",
                flush=True,
            )
