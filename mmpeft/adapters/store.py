"""Adapter files: a folder with `adapter.safetensors` (what was trained) and `adapter.json` (what it means).

    adapter.safetensors   keys <module path>.<slot>.<parameter>, e.g. blocks.0.attn.qkv.lora__weight__q.A
    adapter.json          plan, base name and fingerprint, versions, SHA-256 of the tensors, metadata

Writes are atomic (temporary file, fsync, rename) and keep the previous tensors until the new description is in place,
so a crash at any moment leaves a folder that loads. Loads are strict: nothing is unpickled, and every missing, extra,
misshapen or non-finite tensor, and another base, is refused by name before the model is changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from mmpeft.adapters import freeze as freezing
from mmpeft.adapters.attach import attach, detach
from mmpeft.adapters.example import example_of
from mmpeft.adapters.fingerprint import fingerprint, model_name
from mmpeft.adapters.liveness import as_call, prove
from mmpeft.adapters.method import Delta
from mmpeft.adapters.plan import Plan
from mmpeft.adapters.state import Active, find_state, slots, state_of
from mmpeft.adapters.wrapped import plain_path, unwrap, whole
from mmpeft.errors import BaseMismatch, ConfigError, FileFormatError, NameNotFound, nearest

TENSORS, DESCRIPTION, PREVIOUS = "adapter.safetensors", "adapter.json", "adapter.previous.safetensors"
FORMAT = 1


def save(
    model: nn.Module, folder: str | Path, name: str | None = None, *, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write one adapter (default: the only one, or the active one) to `folder`.

    Under torch.distributed every rank calls it; sharded tensors are gathered and rank 0 writes. A model inside
    DistributedDataParallel, FSDP2 or torch.compile is saved as the plain model it is.

    Args:
        metadata: JSON data kept beside the plan (normalisation statistics, metrics, ...); `read_metadata` returns it.

    Raises:
        ConfigError: several adapters and no name; a tensor that is not finite (nothing is written).
        NameNotFound: no such adapter.
    """
    model = unwrap(model)
    name = _choose(model, name)
    tensors = {key: whole(t) for key, t in adapter_tensors(model, name).items()}
    bad = [key for key, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise ConfigError(f"adapter {name!r} is not saved: {_few(bad)} hold NaN or infinite values")
    entry = state_of(model).entries[name]
    entry.metadata |= dict(metadata or {})
    data = to_bytes({key: t.contiguous().cpu() for key, t in tensors.items()}, {"format": "mmpeft"})
    description = {
        "format": FORMAT,
        "name": name,
        "plan": entry.rules,
        "base": {"name": model_name(model), "fingerprint": fingerprint(model, exclude=replaced(model, name))},
        "versions": {"torch": torch.__version__.split("+")[0]},
        "sha256": hashlib.sha256(data).hexdigest(),
        "metadata": entry.metadata,
    }
    folder = Path(folder)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_rank() == 0:
            write(folder, data, description)
        torch.distributed.barrier()
    else:
        write(folder, data, description)
    return folder


def write(folder: Path, data: bytes, description: Mapping[str, Any]) -> None:
    """Put both files in place so that a crash at any moment leaves a loadable folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description, indent=2, sort_keys=True, allow_nan=False).encode()
    if (folder / TENSORS).exists():
        _atomic(folder / PREVIOUS, (folder / TENSORS).read_bytes())
    _atomic(folder / TENSORS, data)
    _atomic(folder / DESCRIPTION, text)
    (folder / PREVIOUS).unlink(missing_ok=True)


def _atomic(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    check_base: bool = True,
    example: Any = None,
    check: bool = True,
) -> str:
    """Attach the adapter in `folder` (mmpeft's or HF PEFT's) to `model` and make it the active one.

    Args:
        name: under which name; default the saved one.
        check_base: False allows a base with other values (its shapes must still fit).
        example, check: as in `attach`.

    Returns:
        The adapter's name.

    Raises:
        NameNotFound: no adapter there.
        FileFormatError: truncated, foreign or tampered files; missing, extra, misshapen or non-finite tensors.
        BaseMismatch: the adapter was trained on another base.
    """
    model, folder = unwrap(model), Path(folder)
    if (folder / "adapter_config.json").exists() and not (folder / DESCRIPTION).exists():
        from mmpeft.adapters.peft.format import load_peft

        load_peft(model, folder, name or "default", example=example, check=check)
        return name or "default"
    description = read_description(folder)
    tensors = read_tensors(folder, description)
    name = name or str(description["name"])
    before = _active(model)
    attach(model, Plan.read(description["plan"]), name, check=False)
    try:
        fill(model, name, tensors, str(folder / TENSORS))
        base = description["base"]
        own = fingerprint(model, exclude=replaced(model, name))
        if check_base and own and base["fingerprint"] and own != base["fingerprint"]:
            raise BaseMismatch(
                f"{folder} was trained on base {base['name']!r} ({base['fingerprint'][:12]}); this model is "
                f"{model_name(model)!r} ({own[:12]}): same tensor names and shapes where they are used, other values. "
                "Load the same checkpoint, or pass check_base=False"
            )
        state_of(model).entries[name].metadata = dict(description.get("metadata", {}))
        if check:
            given = example if example is not None else example_of(model)
            if given is not None:
                prove(model, name, as_call(given))
    except BaseException:
        detach(model, name)
        if before is not None:
            state_of(model).active = before
        raise
    return name


def fill(model: nn.Module, name: str, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy file tensors into adapter `name`, all or nothing.

    Raises:
        FileFormatError: naming every missing, extra, misshapen or non-finite tensor.
    """
    expected = adapter_tensors(model, name)
    problems = []
    for key in sorted(set(expected) - set(tensors)):
        problems.append(f"missing {key}")
    for key in sorted(set(tensors) - set(expected)):
        problems.append(f"extra {key}{nearest(key, expected, n=1)}")
    for key in sorted(set(expected) & set(tensors)):
        if expected[key].shape != tensors[key].shape:
            problems.append(f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(expected[key].shape)}")
        elif tensors[key].is_floating_point() and not bool(torch.isfinite(tensors[key]).all()):
            problems.append(f"{key} holds NaN or infinite values")
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise FileFormatError(f"{source} does not fit this model:\n  " + "\n  ".join(problems[:20]) + more)
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(tensors[key])


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What the file of adapter `name` holds, by key; the live tensors, detached."""
    found: dict[str, Tensor] = {}
    for path, delta in deltas_of(model, name):
        for n, t in delta.state_to_save().items():
            found[".".join(part for part in (path, delta.site.key(delta.method.name), n) if part)] = t
    return found


def deltas_of(model: nn.Module, name: str) -> list[tuple[str, Delta]]:
    """(owner path, Delta) of one adapter."""
    return [(plain_path(path), delta) for path, _, slot in slots(model) for _, delta in slot.deltas((name,))]


def replaced(model: nn.Module, name: str) -> set[str]:
    """Paths of base tensors that adapter `name` replaces whole (and every tied name of them)."""
    found = set()
    for path, _, slot in slots(model):
        for _, delta in slot.deltas((name,)):
            if delta.method.name == "full":
                found.add(plain_path(f"{path}.{delta.site.tensor}" if path else delta.site.tensor))
    trained: set[str] = model.__dict__.get(freezing.TRAINED_PATHS, set())
    for path, module in model.named_modules():
        path = plain_path(path)
        if any(path == t or path.startswith(t + ".") or not t for t in trained):
            found |= {f"{path}.{n}" if path else n for n in module._buffers}
    return found


def read_description(folder: str | Path) -> dict[str, Any]:
    """adapter.json, checked.

    Raises:
        NameNotFound: the folder has none; FileFormatError: it is no mmpeft description.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        inside = (
            ", ".join(sorted(p.name for p in Path(folder).iterdir())[:6]) if Path(folder).is_dir() else "no such folder"
        )
        raise NameNotFound(f"{str(folder)!r} holds no adapter: expected {DESCRIPTION} (found: {inside})")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if description["format"] > FORMAT:
            raise FileFormatError(
                f"{path} has format {description['format']}; this mmpeft reads up to {FORMAT}: update it"
            )
        for field in ("name", "plan", "base", "sha256"):
            description[field]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{path} is no mmpeft adapter description ({type(error).__name__}: {error})") from error
    return dict(description)


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """The metadata an adapter was saved with."""
    return dict(read_description(folder).get("metadata", {}))


def read_tensors(folder: Path, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors whose SHA-256 the description names; those of the previous save if a crash came between the two."""
    for path in (folder / TENSORS, folder / PREVIOUS):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == description["sha256"]:
            return read_safetensors(path)
    if not (folder / TENSORS).is_file():
        raise FileFormatError(f"{folder} has a description but no {TENSORS}")
    read_safetensors(folder / TENSORS)  # says so if the file is truncated or pickled
    raise FileFormatError(f"{folder / TENSORS} is not the file that {DESCRIPTION} describes (SHA-256 differs)")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        FileFormatError: truncated, pickled or otherwise no safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, ValueError, OSError) as error:
        head = path.read_bytes()[:2] if path.is_file() else b""
        kind = (
            "a pickle, which mmpeft never loads"
            if head[:1] == b"\x80" or head == b"PK"
            else "truncated or no safetensors file"
        )
        raise FileFormatError(f"{path} is {kind} ({error})") from error


def _choose(model: nn.Module, name: str | None) -> str:
    state = state_of(model)
    if name is not None:
        state.check_names([name])
        return name
    candidates = list(state.entries) if len(state.entries) == 1 else list(state.active.names)
    if len(candidates) != 1:
        raise ConfigError(f"the model has adapters {', '.join(state.entries)}; say which one: name=...")
    return candidates[0]


def _active(model: nn.Module) -> Active | None:
    state = find_state(model)
    return None if state is None else state.active


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
