"""Base tensors that an adapter trains themselves (full, norm tuning, BitFit), in HF PEFT's form.

PEFT copies whole modules (modules_to_save, LN_TUNING) and trains biases in place (bias="all"), so values are collected
by tensor name, and a copied module's state is the base's with these values in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta
from mmpeft.adapters.peft.codecs import wrapped_path
from mmpeft.adapters.peft.targets import module_paths, saved_paths
from mmpeft.adapters.slot import apply
from mmpeft.adapters.state import SLOT

_NO_COPY = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # never called, so PEFT cannot wrap them


class Values:
    """Trained base tensors under every name they have; `refused` says what PEFT has no place for."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = module_paths(model, duplicates=True)  # shared modules under each of their paths
        self.names: dict[int, list[str]] = {}  # of each parameter object
        for path, p in model.named_parameters(remove_duplicate=False):
            if SLOT not in path.split("."):
                self.names.setdefault(id(p), []).append(path)
        self.found: dict[str, Tensor] = {}
        self.copied: list[str] = []  # names whose module is copied whole
        self.norms: list[str] = []  # those of them that norm tuning trains
        self.refused: list[str] = []

    def add(self, stored: nn.Parameter, delta: Delta) -> None:
        """Note what a delta makes of its tensor."""
        for name in self.names[id(stored)]:
            with torch.no_grad():
                self.found[name] = apply(self.found.get(name, stored), delta).detach()
            self.copied += [name] if delta.method.name != "bitfit" else []
            self.norms += [name] if delta.method.name == "layernorm" else []

    def wholes(self) -> list[str]:
        """The modules to copy whole: owners of such tensors, the outermost where they nest."""
        paths = list(dict.fromkeys(name.rpartition(".")[0] for name in self.copied))
        for path in paths:
            if not path:
                self.refused.append("a parameter of the root module is trained; PEFT copies modules below the root")
            elif isinstance(self.modules[path], _NO_COPY):
                self.refused.append(f"{path}: PEFT cannot copy a {type(self.modules[path]).__name__}")
        return [p for p in paths if p and not any(p.startswith(other + ".") for other in paths if other)]

    def state(self, path: str, prefix: str) -> dict[str, Tensor]:
        """A module's state under this adapter, as PEFT copies it, keys below `prefix`."""
        found: dict[str, Tensor] = {}
        for below, module in self.modules.items():
            if below == path or below.startswith(path + "."):
                for n, t in [*module._parameters.items(), *module._buffers.items()]:
                    if t is not None and n not in module._non_persistent_buffers_set:
                        found[f"{prefix}{below.removeprefix(path)}.{n}"] = self.found.get(f"{below}.{n}", t)
        return found

    def to_save(self, wholes: list[str], adapted: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of every module that PEFT copies under these names ("head" means aux_head too)."""
        tensors: dict[str, Tensor] = {}
        for path in saved_paths({"modules_to_save": wholes}, self.modules):
            near = [t for t in adapted if _nested(t, path)]
            if near:
                self.refused.append(f"{path} is trained whole and {near[0]} adapted; PEFT cannot nest the two")
            tensors |= self.state(path, path)
        return tensors

    def biases(self, copied: Iterable[str], wrappers: Mapping[str, int], allowed: bool) -> dict[str, Tensor]:
        """Trained tensors that no copied module holds; PEFT has a place for those named bias, where `allowed`."""
        tensors: dict[str, Tensor] = {}
        hits = list(copied)
        for name, value in self.found.items():
            path, _, tensor = name.rpartition(".")
            if any(path == h or path.startswith(h + ".") for h in hits):
                continue
            if tensor != "bias" or not allowed:
                self.refused.append(f"{name}: PEFT trains only tensors named bias, and only beside LoRA or VeRA")
                continue
            inside = wrapped_path(path, wrappers, own=wrappers.get(path, 0))
            tensors[f"{inside}.bias" if path else "bias"] = value
        return tensors


def _nested(a: str, b: str) -> bool:
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")
