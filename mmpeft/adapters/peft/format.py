"""Reading HF PEFT folders: adapter_config.json and adapter_model.safetensors of every type that `table.py` and
`decode.py` list, and what may stand beside them (modules_to_save, trained biases and tokens, embedding tables).

The configuration says which modules the file must cover and the file has to cover exactly those: every missing, extra
or misshapen key is named, NaN is refused, nothing is unpickled, and all of it before the model is changed. An imported
adapter then goes through `attach` with a plan of exact paths, so it is frozen, switched, merged and proved alive like
any other.

Where PEFT's own forward and merge disagree, the merged weight is what is loaded: PEFT runs lora_A of a convolution
without its dilation and with zeros for padding, whatever the layer's padding mode.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.attach import attach, detach
from mmpeft.adapters.peft.codecs import CONFIG, PICKLED, PREFIX, TENSORS, Item
from mmpeft.adapters.peft.decode import decode
from mmpeft.adapters.peft.export import export_peft
from mmpeft.adapters.peft.read import Reader
from mmpeft.adapters.peft.table import LEAVES
from mmpeft.adapters.plan import Plan, Rule
from mmpeft.adapters.state import find_state
from mmpeft.adapters.store import adapter_tensors, fill, read_safetensors
from mmpeft.errors import FileFormatError, NameNotFound


@dataclass(frozen=True)
class PeftFile:
    """A PEFT folder as data: its configuration and its tensors, keys without prefix and adapter name."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    source: str


def is_peft(folder: str | Path) -> bool:
    """Whether the folder is an HF PEFT adapter."""
    return (Path(folder) / CONFIG).is_file()


def read_peft(folder: str | Path) -> PeftFile:
    """The content of an HF PEFT folder.

    Raises:
        NameNotFound: no adapter_config.json there.
        FileFormatError: no JSON, no safetensors file (a pickled .bin is never loaded), NaN or infinite values.
    """
    folder = Path(folder)
    if not is_peft(folder):
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) if folder.is_dir() else "no such folder"
        raise NameNotFound(f"{str(folder)!r} holds no HF PEFT adapter: expected {CONFIG} (found: {inside})")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{folder / CONFIG} is no JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise FileFormatError(f"{folder / CONFIG} is no PEFT configuration: it has no 'peft_type'")
    path = folder / TENSORS
    if not path.is_file():
        pickled = f"; {PICKLED} is a pickle, which mmpeft never loads: save it again with safe_serialization=True"
        raise FileFormatError(f"{folder} has no {TENSORS}{pickled if (folder / PICKLED).exists() else ''}")
    tensors: dict[str, Tensor] = {}
    for key, tensor in read_safetensors(path).items():
        plain = _plain_key(key, LEAVES.get(config["peft_type"].upper(), {}))
        if ".original_module." in key:  # the base's own values beside a trained copy, which PEFT never uses
            continue
        if plain in tensors and not torch.equal(tensors[plain], tensor):
            raise FileFormatError(f"{path} holds {plain} twice, once as {key}")
        tensors[plain] = tensor
    bad = [key for key, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise FileFormatError(f"{path}: {', '.join(bad[:8])} hold NaN or infinite values")
    return PeftFile(config, tensors, str(path))


def _plain_key(key: str, leaves: Mapping[str, str | None]) -> str:
    """'base_model.model.fc.lora_A.default.weight' -> 'fc.lora_A.weight', for the parameter names of a PEFT type."""
    key = key.replace("_orig_mod.", "").removeprefix(PREFIX)
    key = re.sub(r"\.modules_to_save\.[^.]+\.", ".", key)
    for name, leaf in leaves.items():
        path, found, rest = key.rpartition(f".{name}")
        if not found or leaf is None or rest[:1] not in ("", "."):
            continue
        *adapter, last = rest.split(".") if rest else ["", ""]  # ["", the adapter's name] and "weight", "bias" or ""
        if last not in ("", "weight", "bias"):
            adapter, last = [*adapter, last], ""
        if len(adapter) <= 2:
            return f"{path}.{name}{'.bias' if last == 'bias' else leaf}"
    return key


def load_peft(
    model: nn.Module, folder: str | Path, name: str = "default", *, example: Any = None, check: bool = True
) -> nn.Module:
    """Attach the HF PEFT adapter in `folder` to `model` under `name` and make it the active one.

    Args:
        example, check: as in `attach`.

    Raises:
        NameNotFound, FileFormatError: as `read_peft`; a file that does not cover exactly what its configuration means.
        Unsupported: what this engine cannot represent (another method, an adapter on one of two tied weights, ...).
        DeadSite: the model never uses a site.
    """
    file = read_peft(folder)
    reader = Reader(model, file.config, file.tensors, file.source)
    items = decode(reader)
    state = find_state(model)
    before = None if state is None else state.active
    attach(model, _plan(items), name, example=example, check=check)
    try:
        fill(model, name, _values(model, name, items), file.source)
    except BaseException:
        detach(model, name)
        if state is not None and before is not None:
            state.active = before
        raise
    return model


def _plan(items: list[Item]) -> Plan:
    """One rule a method configuration, each matching its sites by exact path."""
    matches: dict[Any, list[str]] = {}
    for item in items:
        matches.setdefault(item.method, []).append(item.match)
    return Plan(tuple(Rule(" ".join(paths), (method,)) for method, paths in matches.items()))


def _values(model: nn.Module, name: str, items: list[Item]) -> dict[str, Tensor]:
    """The imported values by the keys of the attached adapter."""
    live = adapter_tensors(model, name)
    values: dict[str, Tensor] = {}
    for item in items:
        prefix = ".".join(part for part in (item.site.path, item.site.key(item.method.name)) if part)
        values |= {f"{prefix}.{n}": t for n, t in item.tensors.items()}
        values |= {f"{prefix}.{n}": live[f"{prefix}.{n}"] * factor for n, factor in item.starts.items()}
        values |= {key: t for n, t in item.shared.items() if (key := f"{prefix}.{n}") in live}
    return values


__all__ = ["PeftFile", "export_peft", "is_peft", "load_peft", "read_peft"]
