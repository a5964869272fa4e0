"""What stands on disk: which library wrote a folder, weights files that may be read, and where downloads are kept.

Weights are read from safetensors only. A pickle can run any code when it is opened, so a pickled file is refused with
the way to convert it; the one exception is a file inside an installed package, opened with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.errors import FileFormatError, MmpeftError, NameNotFound

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".tar")


def cache_folder() -> Path:
    """mmpeft's own cache: $MMPEFT_CACHE, or ~/.cache/mmpeft."""
    return Path(os.environ.get("MMPEFT_CACHE") or Path.home() / ".cache" / "mmpeft")


def identify_folder(folder: Path) -> str:
    """The source whose library wrote this folder: "open_clip", "timm" or "hf".

    Raises:
        FileFormatError: no configuration is there, or it is no JSON, or no library's.
    """
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    if not (folder / "config.json").is_file():
        held = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
        raise FileFormatError(
            f"{str(folder)!r} is no model folder: it has neither config.json (transformers, timm) nor "
            f"open_clip_config.json; it holds {', '.join(held) or 'nothing'}"
        )
    config = read_json(folder / "config.json")
    if "model_type" in config:
        return "hf"
    if "architecture" in config:
        return "timm"
    raise FileFormatError(
        f"{str(folder / 'config.json')!r} has neither 'model_type' (transformers) nor 'architecture' (timm); "
        f"its keys are {', '.join(sorted(config)[:8])}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or FileFormatError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{str(path)!r} holds a JSON {type(value).__name__}, expected an object")
    return value


def check_weights(folder: Path) -> None:
    """Refuse, before any work, a model folder whose weights are missing or only pickled.

    Raises:
        FileFormatError: no *.safetensors file is there.
    """
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
    if pickled:
        raise FileFormatError(_pickled_message(folder / pickled[0]))
    raise FileFormatError(
        f"{str(folder)!r} has a configuration but no *.safetensors file, so it has no weights. "
        f"For random weights of that architecture say so: 'random:{folder}'"
    )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file.

    Raises:
        NameNotFound: no such file.
        FileFormatError: pickled, truncated, or another format.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise NameNotFound(f"weights file not found: {str(path)!r}")
    if path.suffix in PICKLED:
        raise FileFormatError(_pickled_message(path))
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own type, OSError and ValueError
        raise FileFormatError(f"{str(path)!r} cannot be read as safetensors: {error}") from error


@contextmanager
def load_errors(name: str, place: str | Path) -> Iterator[None]:
    """Word what a library says when a model does not load.

    Args:
        name: as the user gave it.
        place: a Path of a folder or file on disk; a text is the cache folder of a hub's downloads.

    Raises:
        FileFormatError: the folder or file on disk is damaged or does not fit.
        NameNotFound: the hub did not give it; the message says the id, the cache tried, and how to do without the hub.
    """
    try:
        yield
    except (MmpeftError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every library and hub client has its own error types
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        said = f"{type(error).__name__}: {reason}"
        if isinstance(place, Path):
            raise FileFormatError(f"{name!r} could not be loaded from {str(place)!r} ({said})") from error
        raise NameNotFound(
            f"{name!r} could not be loaded ({said}). It is not complete in the cache {place!r}, and the hub did not give "
            f"it: the id may be wrong, or there is no connection. Without a connection, copy the model's folder (its "
            f"configuration and *.safetensors) to this machine and give its path as the name"
        ) from error


def _pickled_message(path: Path) -> str:
    return (
        f"{str(path)!r} is a pickle, which can run any code when opened, and is refused. If you trust it, convert it "
        f"once: from safetensors.torch import save_file; save_file({{k: v.contiguous().clone() for k, v in "
        f"torch.load({path.name!r}, weights_only=True).items()}}, 'model.safetensors')"
    )


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy a state into a module, every key and shape accounted for.

    Raises:
        FileFormatError: missing, extra or misshapen keys, named.
    """
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    extra = sorted(state.keys() - wanted.keys())
    misshapen = [
        f"{k} is {list(state[k].shape)}, expected {list(wanted[k].shape)}"
        for k in sorted(wanted.keys() & state.keys())
        if state[k].shape != wanted[k].shape
    ]
    if missing or extra or misshapen:
        parts = [("missing", missing), ("extra", extra), ("misshapen", misshapen)]
        said = "; ".join(f"{len(keys)} {word}: {', '.join(keys[:4])}" for word, keys in parts if keys)
        raise FileFormatError(f"{source!r} does not fit {type(module).__name__}: {said}")
    module.load_state_dict(state)
