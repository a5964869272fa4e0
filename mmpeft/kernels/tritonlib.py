"""Triton's names for the kernel files: `triton`, `tl` and `jit`, harmless where Triton is not installed.

A kernel file can then be imported anywhere (it also holds the launchers' shapes and plans); launching needs Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

triton: Any = None
tl: Any = None
try:
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
except (ImportError, OSError, RuntimeError):  # not on this platform, or built for another torch: the references run
    triton = tl = None


def jit(fn: Callable[..., Any]) -> Any:
    """`triton.jit`, or the plain function where Triton is absent (it is never launched there)."""
    return fn if triton is None else triton.jit(fn)
