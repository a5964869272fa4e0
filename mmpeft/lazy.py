"""The one lazy `__getattr__` of the package's front pages: a name's file is imported when the name is first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from mmpeft.errors import nearest


def lazy(package: str, names: Mapping[str, str], parts: Collection[str] = ()) -> Callable[[str], Any]:
    """The module-level `__getattr__` of `package` (PEP 562).

    Args:
        names: public name -> module that holds it, absolute or relative to the package (".samples").
        parts: sub-packages that are given as themselves.

    An unknown name raises AttributeError with the nearest that there are.
    """

    def __getattr__(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module(names[name], package), name)
        if name in parts:
            return importlib.import_module(f"{package}.{name}")
        known = [*vars(sys.modules[package]), *names, *parts]
        raise AttributeError(f"module {package!r} has no attribute {name!r}{nearest(name, known)}")

    return __getattr__
