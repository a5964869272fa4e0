"""Every exception mmpeft raises on bad input, and the two helpers that word them.

A message says what was given, what was expected and the nearest valid value, and is raised before work starts.
Each class also inherits the built-in a caller would guess, so `except ValueError` and `except KeyError` keep working.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class MmpeftError(Exception):
    """Base class of every error raised by mmpeft."""


class ConfigError(MmpeftError, ValueError):
    """A value, shape or range that cannot work (rank 0, a plan that trains nothing, a wrong image size)."""


class NameNotFound(MmpeftError, LookupError):
    """A pattern, method, adapter, encoder or file name that matches nothing; the message lists the nearest names."""


class MissingExtra(MmpeftError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class FileFormatError(MmpeftError, ValueError):
    """A file that is truncated, pickled, foreign, or holds missing, extra, misshapen or non-finite tensors."""


class BaseMismatch(MmpeftError, ValueError):
    """An adapter or a cache was made for another base model."""


class DeadSite(MmpeftError, RuntimeError):
    """An adapter was attached where the model never uses it, so it would train nothing without a sign."""


class BadSample(MmpeftError, ValueError):
    """A training sample that cannot be used (missing file, corrupt image, no supervised token, too long)."""


class Unsupported(MmpeftError, NotImplementedError):
    """A combination that is well-formed but that mmpeft cannot compute; the message says what to use instead."""


def refusal_in(error: BaseException | None) -> MmpeftError | None:
    """The error of mmpeft that led to `error`, which a library may have wrapped in its own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, MmpeftError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def nearest(given: str, valid: Iterable[str], n: int = 3) -> str:
    """' (nearest: a, b, c)' for an error message, or '' when nothing is close."""
    close = difflib.get_close_matches(given, list(valid), n=n, cutoff=0.5)
    return f" (nearest: {', '.join(close)})" if close else ""


def require(module: str, extra: str, why: str = "") -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises:
        MissingExtra: the module is not installed, or refuses to import (its own words are kept in the message).
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchaudio raises RuntimeError or OSError beside a torch of another CUDA
        hint = f"; {why}" if why else ""
        raise MissingExtra(
            f"{module!r} could not be imported ({type(error).__name__}: {error}){hint}. "
            f"Install it with: pip install 'mmpeft[{extra}]'"
        ) from error
