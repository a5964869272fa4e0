"""The command line of the Metaworld tables: prepare the rows, run them side by side, print the table.

    program(__doc__, rows(), RESULTS / "metaworld_multitask.jsonl", work=clone, table=table)

Each finished row is a JSON line with date and device; a row that has its line is not run again, so a table grows run
by run. Demonstrations are recorded and drawn once, before any training, by all processes.

A training step of a policy this small is launched slower than it is computed, so `--processes` rows share the GPUs, each
process bound to one of them for training and for drawing. A core a process is a good number.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import concurrent.futures.process
import dataclasses
import fcntl
import json
import multiprocessing
import os
import re
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.metaworld_rows import Row, env_of, folder_of, saved, smaller
from mmpeft.policies.envs.gl import egl_devices

Work = Callable[[Row], dict[str, Any]]
Table = Callable[[list[dict[str, Any]]], str]
ATTEMPTS = 2  # rounds in which rows are tried whose process died, with the rows beside them


def arguments(text: str | None) -> argparse.ArgumentParser:
    """Options of every table."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8, help="rows at a time, and recordings and drawings before them")
    parser.add_argument("--only", type=expression, default="", help="rows in whose name this regular expression is found")
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--budget", type=float, help="seconds of each training at most: as many of the steps as fit")
    parser.add_argument("--workers", type=int, help="processes that load the batches of a row")
    parser.add_argument("--out", type=Path, help="JSON lines; default benchmarks/results/<table>.jsonl")
    parser.add_argument("--prepare", action="store_true", help="only record and draw the demonstrations of the rows")
    parser.add_argument("--table", action="store_true", help="print the table of what has been run, run nothing")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU: does everything run?")
    return parser


def expression(text: str) -> re.Pattern[str]:
    """A regular expression of the command line.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression ({error})") from error


def chosen(rows: Iterable[Row], given: argparse.Namespace) -> list[Row]:
    """The rows that the options leave, as they change them."""
    changes = {k: getattr(given, k) for k in ("steps", "budget", "workers") if getattr(given, k) is not None}
    found = [dataclasses.replace(r, **changes) for r in rows if given.only.search(r.name)]
    return [smaller(r) for r in found if r.seed <= 1] if given.tiny else found


def program(text: str | None, rows: Iterable[Row], default: Path, *, work: Work, table: Table) -> None:
    """A table's command line: run its rows with `work`, unless told not to, and print the table."""
    given = arguments(text).parse_args()
    finish(chosen(rows, given), given, given.out or default, work=work, table=table)


def finish(rows: Sequence[Row], given: argparse.Namespace, out: Path, *, work: Work, table: Table) -> None:
    """What the options ask for: prepare the rows, or run them and print the table, or print it alone."""
    if given.prepare:
        prepare(rows, given.processes)
        return
    if not given.table:
        run(rows, out, processes=given.processes, work=work)
    print(table(read(out)))


# ---- once, before the rows -------------------------------------------------------------------------------------------


def prepare(rows: Sequence[Row], processes: int) -> None:
    """Record what the rows need, a process a task, then draw it, some episodes a process."""
    needed: dict[str, int] = {}
    looks: dict[tuple[str, str], tuple[str, dict[str, Any], int]] = {}
    for row in rows:
        for task in row.tasks if not saved(row) else ():
            needed[task] = max(needed.get(task, 0), row.demonstrations)
            if row.arm != "blind":
                key = (task, json.dumps(row.look, sort_keys=True))
                count = max(row.demonstrations, looks[key][2] if key in looks else 0)
                looks[key] = (task, row.look, count)
    if not needed:
        return
    with _pool(processes) as pool:
        list(pool.map(_record, needed.items()))
        list(pool.map(_draw, shares(looks.values(), processes)))


def shares(
    looks: Iterable[tuple[str, dict[str, Any], int]], processes: int
) -> list[tuple[str, dict[str, Any], list[int]]]:
    """(task, look, seeds) for each process: every look's first episodes, dealt out evenly."""
    from mmpeft.data.demos import DemoFolder

    looks = list(looks)
    parts = max(2, processes // max(1, len(looks)))  # tasks differ in length
    dealt = [
        (task, look, DemoFolder(folder_of(task)).seeds[:count][i::parts])
        for task, look, count in looks for i in range(parts)
    ]  # fmt: skip
    return [share for share in dealt if share[2]]


def _record(given: tuple[str, int]) -> None:
    from mmpeft.data.demos import DemoFolder, collect

    task, count = given
    if not (folder_of(task) / "demos.json").exists() or len(DemoFolder(folder_of(task))) < count:
        collect(env_of(task), folder=folder_of(task), episodes=count, noise=0.3)


def _draw(given: tuple[str, dict[str, Any], list[int]]) -> None:
    from mmpeft.data.demos.frames import FrameCache

    task, look, seeds = given
    frames = FrameCache(folder_of(task), **look)
    frames.fill(seeds=seeds)
    frames.close()


# ---- many rows -------------------------------------------------------------------------------------------------------


def run(rows: Sequence[Row], out: Path, *, processes: int, work: Work) -> None:
    """Run the rows that have no line in `out` yet, `processes` at a time, in their order."""
    known = {line["name"] for line in read(out)}
    todo = [r for r in rows if r.name not in known]
    os.environ["METAWORLD_PROCESSES"] = str(processes)
    began = time.perf_counter()
    prepare(todo, processes)
    print(f"{len(todo)} rows to run, {len(rows) - len(todo)} known; prepared in {time.perf_counter() - began:.0f} s", flush=True)
    for _ in range(ATTEMPTS):
        if todo:
            todo = _round(todo, out, min(processes, len(todo)), work, began)
    if todo:
        print(f"given up after {ATTEMPTS} rounds: {', '.join(r.name for r in todo)}", flush=True)


def _round(todo: Sequence[Row], out: Path, processes: int, work: Work, began: float) -> list[Row]:
    """Run the rows; gives those that were lost because some process was killed or crashed."""
    lost = []
    with _pool(processes) as pool:
        waiting = {pool.submit(_one, work, row): row for row in todo}
        for done in concurrent.futures.as_completed(waiting):
            try:
                line = done.result()
            except concurrent.futures.process.BrokenProcessPool:
                lost.append(waiting[done])
                continue
            if "error" in line:
                print(f"{line['name']}: FAILED\n{line['error']}", flush=True)
                continue
            append(out, line)
            won = f"{line['success']:.2f} {line['interval']}, " if "success" in line else ""
            print(
                f"{line['name']}: {won}{line.get('trained_steps')} steps in {line.get('train_seconds')} s, "
                f"{line['seconds']:.0f} s in all, {time.perf_counter() - began:.0f} s since start",
                flush=True,
            )
    if lost:
        print(f"FAILED: a process died and took {len(lost)} rows with it", flush=True)
    return lost


def append(path: Path, line: dict[str, Any]) -> None:
    """A line at the end of the file; other programs may be appending to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _one(work: Work, row: Row) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # as convolutions are by default
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


def _pool(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    """Processes dealt out over the GPUs."""
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for number in range(processes):
        places.put(number)
    return concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=context, initializer=_settle, initargs=(places, torch.cuda.device_count(), egl_devices())
    )


def _settle(places: Any, gpus: int, screens: int) -> None:
    """Bind this process to one GPU, for training and for drawing."""
    torch.set_num_threads(1)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # every mapped file of pictures holds a descriptor
    number = places.get()
    if gpus > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    if gpus > 1 and screens >= gpus:
        os.environ["MUJOCO_EGL_DEVICE_ID"] = str(number % gpus)
