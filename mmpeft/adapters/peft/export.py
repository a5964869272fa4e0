"""Writing HF PEFT folders: one adapter as adapter_config.json and adapter_model.safetensors.

PEFT has one method a folder, wraps modules that are called, and copies whole modules that are trained whole. So

    methods that both have   sites become targets by exact path, differing ranks and scales become patterns (`table.py`)
    bare parameters          (3-D experts, packed projections elsewhere) become target_parameters
    nn.MultiheadAttention    in_proj and out_proj become one target, the part that is not adapted with zeros
    full, norm tuning        become modules_to_save, or LN_TUNING where nothing else is trained
    BitFit                   becomes bias="all" beside LoRA and kin, BEFT where it is alone on linear layers
    columns of an embedding  (RoCoFT) become trainable tokens, alone or beside LoRA
    prompts and prefixes     become PROMPT_TUNING and PREFIX_TUNING, alone

What PEFT cannot express, or would compute differently, is refused before anything is written, with all sites named.
The configuration is then matched against the model by PEFT's own rules, so a folder that is written is found again.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import nn

from mmpeft.adapters.example import example_of
from mmpeft.adapters.freeze import evaluating
from mmpeft.adapters.liveness import as_call
from mmpeft.adapters.peft.codecs import CONFIG, TENSORS, full_key
from mmpeft.adapters.peft.encode import encode
from mmpeft.adapters.peft.write import Writer
from mmpeft.adapters.store import _choose, deltas_of
from mmpeft.adapters.switch import use
from mmpeft.adapters.wrapped import unwrap, whole
from mmpeft.errors import ConfigError, Unsupported

log = logging.getLogger("mmpeft")


def export_peft(
    model: nn.Module, folder: str | Path, *, name: str | None = None, example: Any = None, check: bool = True
) -> Path:
    """Write one adapter (default: the only one, or the active one) as an HF PEFT folder, which `peft` loads with equal
    outputs.

    Args:
        example: an input of the model (as in `attach`), to see which adapted layers are called; None infers one.
        check: False skips that run. PEFT has no effect where a layer's weight is read and the layer is never called.

    Raises:
        ConfigError: several adapters and no name, values that are not finite.
        NameNotFound: no such adapter.
        Unsupported: sites that PEFT cannot express, all named. Nothing is written then.
    """
    model = unwrap(model)
    name = _choose(model, name)
    writer = Writer(model, deltas_of(model, name))
    config = encode(writer)
    if check:
        _refuse_uncalled(model, writer, example)
    tensors = {full_key(key): whole(t.detach()) for key, t in writer.tensors.items()}
    bad = [key for key, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise ConfigError(f"adapter {name!r} is not exported: {', '.join(bad[:4])} hold NaN or infinite values")
    data = to_bytes({key: t.cpu().contiguous().clone() for key, t in tensors.items()}, {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False).encode()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        _put(Path(folder), {TENSORS: data, CONFIG: text})
    if distributed:
        torch.distributed.barrier()
    return Path(folder)


def _put(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace files of a folder; everything that may fail (space, permissions) is over before the first is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    ready: dict[str, str] = {}
    try:
        for file, data in files.items():
            handle, ready[file] = tempfile.mkstemp(dir=folder, prefix=f".{file}.")
            with os.fdopen(handle, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            os.chmod(ready[file], 0o644)
        for file, temporary in ready.items():
            os.replace(temporary, folder / file)
    finally:
        for temporary in ready.values():
            Path(temporary).unlink(missing_ok=True)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _refuse_uncalled(model: nn.Module, writer: Writer, example: Any) -> None:
    """Run the model once and refuse targets that it reads without calling them: PEFT's wrappers only see calls."""
    given = example if example is not None else example_of(model)
    if given is None or any(p.is_meta for p in model.parameters()):
        return
    watched = {t for t in writer.targets if t in writer.modules} | {
        t.rpartition(".")[0] for t in writer.targets if t not in writer.modules
    }
    parents = {path: path.rpartition(".")[0] for path in watched}
    ran: set[str] = set()
    hooks = []
    for path in {*watched, *parents.values()}:
        hooks.append(writer.owner(path).register_forward_pre_hook(lambda *_, path=path: ran.add(path)))
    args, kwargs = as_call(given)
    try:
        with evaluating(model), use(model, None), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    dead = sorted(path for path in watched if path not in ran and parents[path] in ran)
    if dead:
        raise Unsupported(
            "HF PEFT would ignore the adapter where a layer's weight is read and the layer never called:\n  "
            + "\n  ".join(dead[:20])
        )
    fast = [p for p in watched if isinstance(writer.modules.get(p.rpartition(".")[0]), nn.TransformerEncoderLayer)]
    if fast:
        log.warning(
            "PEFT ignores adapters in nn.TransformerEncoderLayer in eval mode (%s): call "
            "torch.backends.mha.set_fastpath_enabled(False) where you use the export",
            ", ".join(sorted(fast)[:3]),
        )
