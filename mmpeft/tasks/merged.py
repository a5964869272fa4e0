"""A model with its adapter baked in, on disk: plain weights that need no mmpeft to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from mmpeft.adapters import detach
from mmpeft.errors import ConfigError


def check_output(folder: str | Path) -> None:
    """Refuse a folder that holds a model or an adapter, or that is a file."""
    folder = Path(folder)
    for name, what in (("model.safetensors", "a model"), ("llm", "a model"), ("adapter.json", "an adapter")):
        if (folder / name).exists():
            raise ConfigError(f"{str(folder)!r} holds {what} already; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is a file; choose a folder")


def write_merged(model: nn.Module, folder: str | Path) -> list[Path]:
    """Bake the active adapter into `model` and write it.

    Writes `model.safetensors` (every tensor of the model), and for a `MultimodalLM` also `llm/`, its language model and
    tokenizer as transformers reads them.

    Returns:
        What was written.

    Raises:
        ConfigError: the folder holds a model or an adapter already.
        Unsupported: the adapter has parts that no weight can hold (bottlenecks, prompts).
    """
    from safetensors.torch import save_model

    folder = Path(folder)
    check_output(folder)
    detach(model, bake=True)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "model.safetensors"]
    save_model(model, str(written[0]))
    llm: Any = getattr(model, "llm", None)
    if llm is not None and hasattr(llm, "save_pretrained"):
        llm.save_pretrained(folder / "llm")
        model.tokenizer.save_pretrained(folder / "llm")  # type: ignore[union-attr, operator]
        written.append(folder / "llm")
    return written
