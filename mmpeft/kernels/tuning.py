"""Which of several ways to compute the same thing is fastest at this size on this device: timed once, kept on disk.

`choose` times the candidates the first time a size is met and writes the answer to one JSON file a device, so that the
next process starts with it; `launch_shape` does so among the launch shapes of one kernel. Where a library does the same,
our kernel is compared with it then, once, before it is used. The log says when the first timing of a process begins. A
file that cannot be read is ignored (and said so), one that cannot be written costs a timing in the next process and
nothing else.

The file is `<cache>/tuning/<device>.json`, <cache> being $MMPEFT_CACHE, or mmpeft under $XDG_CACHE_HOME or ~/.cache. Its
name holds everything that makes a measurement stale: the device, its number of multiprocessors, torch and Triton.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("mmpeft.kernels")
Key = tuple[object, ...]
TOLERANCE = 0.02  # relative error of a result in half precision, several roundings long


def cache_folder() -> Path:
    """Where measurements are kept."""
    if given := os.environ.get("MMPEFT_CACHE"):
        return Path(given) / "tuning"
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mmpeft" / "tuning"


def choose(
    op: str,
    key: Key,
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    otherwise: str,
    timer: Callable[[Callable[[], object], torch.device], float] | None = None,
    proof: tuple[str, Callable[[str], Sequence[Tensor]]] | None = None,
) -> str:
    """The name of the fastest candidate.

    Args:
        op: what is computed; key: the sizes and dtypes that decide, as plain values.
        candidates: name -> a function that runs it once on data of that size; one that raises RuntimeError (out of
            memory, a kernel that does not fit) is out.
        otherwise: the answer where nothing can be timed: none of the candidates runs, or a CUDA graph is being captured.
        timer: run, device -> milliseconds.
        proof: (a candidate that is trusted, name -> what that candidate computes): one that computes something else on this
            device is out, however fast, and a warning says so.
    """
    table = _table(device)
    name = f"{op} {' '.join(map(str, key))}"
    known = table.get(name)
    if known in candidates:
        return str(known)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return otherwise
    _say_once(table.path)
    times: dict[str, float] = {}
    expected = _expected(proof)
    for candidate, run in candidates.items():
        try:
            if proof is not None and expected is not None and candidate != proof[0]:
                _prove(name, candidate, proof[1](candidate), expected)
            times[candidate] = (timer or milliseconds)(run, device)
        except _cannot_run() as error:
            log.info("%s: %s cannot run (%s)", name, candidate, str(error).split("\n")[0])
    if not times:
        return otherwise
    best = min(times, key=times.__getitem__)
    log.info("%s: %s (%s)", name, best, ", ".join(f"{k} {t:.3f} ms" for k, t in times.items()))
    table.put(name, best)
    return best


Shape = tuple[int, ...]
_shapes: dict[Key, Shape] = {}  # what was asked in this process, by op, device and key


def launch_shape(
    op: str,
    key: Key,
    shapes: Sequence[Shape],
    run: Callable[[Any], object],
    like: Tensor,
    *,
    proof: tuple[Shape, Callable[[Any], Tensor]] | None = None,
) -> Any:
    """The kernel's launch shape that is fastest on like's device inside CUDA graphs; off the GPU the first of `shapes`.

    Args:
        run: shape -> one run of it; repeated where it is timed.
        proof: (the shape that is trusted, shape -> what it computes), see `choose`.
    """
    if not like.is_cuda:
        return shapes[0]
    asked = (op, like.device, *key)
    if asked not in _shapes:
        named = {str(s): s for s in shapes}
        candidates = {name: functools.partial(run, s) for name, s in named.items()}
        otherwise = str(shapes[0] if proof is None else proof[0])
        proved = None if proof is None else (str(proof[0]), lambda name, of=proof[1]: [of(named[name])])
        best = choose(op, key, candidates, like.device, otherwise=otherwise, timer=device_milliseconds, proof=proved)
        if torch.cuda.is_current_stream_capturing():
            return named[best]  # not timed, so not kept
        _shapes[asked] = named[best]
    return _shapes[asked]


def _cannot_run() -> tuple[type[Exception], ...]:
    """What a candidate raises that does not fit: out of memory, or Triton's own for more shared memory than there is. A
    candidate that raises the second has imported Triton; this file does not."""
    own = getattr(sys.modules.get("triton"), "OutOfResources", None)
    return (RuntimeError,) if own is None else (RuntimeError, own)


def _expected(proof: tuple[str, Callable[[str], Sequence[Tensor]]] | None) -> list[Tensor] | None:
    """What the trusted candidate computes; None where it cannot run, or none is named."""
    if proof is None:
        return None
    try:
        return [t.float() for t in proof[1](proof[0])]
    except _cannot_run():
        return None


def _prove(name: str, candidate: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raises RuntimeError: another result than expected."""
    for mine, its in zip(found, expected, strict=True):
        error = float((mine.float() - its).norm() / its.norm().clamp_min(1e-30))
        if not error <= TOLERANCE:
            log.warning("%s: %s computes something else here (relative error %.2g), it is not used", name, candidate, error)
            raise RuntimeError(f"relative error {error:.2g}")


def milliseconds(run: Callable[[], object], device: torch.device, *, queued: bool = False) -> float:
    """The fastest of three runs after two; with `queued` the device's own time, launches made while it is still busy."""
    times = []
    for _ in range(5):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            if queued:
                torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]  # half a millisecond of clock cycles
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)))
        else:
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1e3)
    return min(times[2:])


def device_milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """A timer for what runs inside CUDA graphs, where a launch costs the host nothing."""
    return milliseconds(run, device, queued=True)


class Table:
    """One device's file: name -> choice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = self._read()

    def get(self, name: str) -> str | None:
        """The choice made earlier, if any."""
        return self.known.get(name)

    def put(self, name: str, choice: str) -> None:
        """Note a choice, in the file too; other processes' entries stay."""
        self.known[name] = choice
        try:
            self.known = self._read() | self.known
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".tuning-")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(self.known, file, indent=1, sort_keys=True)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            _say_unwritten(self.path, str(error))

    def _read(self) -> dict[str, str]:
        try:
            found: Any = json.loads(self.path.read_text())
            if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
                raise ValueError("not a table of choices")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("kernel timings in %s are ignored: %s", self.path, error)
            return {}
        return dict(found)


def _table(device: torch.device) -> Table:
    return _open(cache_folder(), device.type, device.index or 0)


@functools.cache
def _open(folder: Path, kind: str, index: int) -> Table:
    return Table(folder / f"{device_name(kind, index)}.json")


def device_name(kind: str, index: int) -> str:
    """What a measurement holds for, as a file name."""
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(index)
        kind = f"{properties.name}-{properties.multi_processor_count}"
    try:
        compiler = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        compiler = "none"
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", f"{kind}-torch{torch.__version__}-triton{compiler}")


@functools.cache
def _say_once(path: Path) -> None:
    log.info("tuning kernels for this device: the first step takes longer (kept in %s)", path)


@functools.cache
def _say_unwritten(path: Path, error: str) -> None:
    log.info("kernel timings cannot be kept in %s: %s", path, error)
