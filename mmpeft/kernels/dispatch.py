"""Which implementation runs: Triton on CUDA tensors, the plain-torch reference everywhere else, said once in the log.

`backend("triton")` forces the kernels (Triton's interpreter runs them on CPU tensors when TRITON_INTERPRET=1 was set
before this module was imported); `backend("reference")` forces the references, which is how a suspected kernel is
ruled out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from mmpeft.errors import ConfigError, Unsupported

log = logging.getLogger("mmpeft.kernels")

Backend = Literal["auto", "triton", "reference"]
_backend: Backend = "auto"


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force the kernels or the references inside a `with`.

    Raises:
        ConfigError: an unknown name.
        Unsupported: "triton" without Triton.
    """
    global _backend
    if name not in ("auto", "triton", "reference"):
        raise ConfigError(f"backend {name!r}; expected 'auto', 'triton' or 'reference'")
    if name == "triton" and not triton_installed():
        raise Unsupported("backend 'triton': Triton is not installed; use 'reference'")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def forced() -> Backend:
    """What `backend` asked for; "auto" outside of it."""
    return _backend


def use_triton(x: Tensor) -> bool:
    """Whether the kernels run for tensors that live where `x` lives."""
    if _backend != "auto":
        return _backend == "triton"
    return device_runs(x.device.type, x.device.index or 0)


def device_runs(kind: str, index: int) -> bool:
    """Whether this device runs the Triton kernels; says once in the log where it does not."""
    runs = kind == "cuda" and triton_installed() and _capability(index) >= (8, 0)
    if not runs:
        _say_once(kind)
    return runs


# `torch.compiler.assume_constant_result` without its import of the whole compiler: a graph is made for one answer.
device_runs._dynamo_marked_constant = True  # type: ignore[attr-defined]

@functools.cache
def triton_installed() -> bool:
    """Whether Triton can be imported; it is not imported before a kernel is needed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _say_once(device: str) -> None:
    log.info(
        "mmpeft.kernels: plain-torch references run on %s (the Triton kernels need CUDA, compute capability 8.0)",
        device,
    )


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()
