"""One adapter on its way to HF PEFT's form: its deltas sorted by what PEFT makes of them, what is refused, and the proof
that PEFT's own name matching finds what the configuration means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mmpeft.adapters.method import Delta
from mmpeft.adapters.peft.codecs import is_packed_attention, is_stock
from mmpeft.adapters.peft.table import PROMPTS, SAME, VALUES, WEIGHT_METHODS
from mmpeft.adapters.peft.targets import any_of, module_paths, target_parameters, target_paths
from mmpeft.adapters.peft.trained_tokens import can_write
from mmpeft.adapters.peft.values import Values
from mmpeft.adapters.site import Site, _is_hf_conv1d, weight_site
from mmpeft.errors import Unsupported


class Writer:
    """Collects `tensors`, and everything that PEFT cannot express in `refused`."""

    def __init__(self, model: nn.Module, deltas: list[tuple[str, Delta]]) -> None:
        self.model = model
        self.modules = module_paths(model)
        self.values = Values(model)
        self.sites: dict[tuple[str, str], list[Delta]] = {}  # sites of the low-rank and scaling methods
        self.tokens: dict[str, Delta] = {}  # embeddings of which single rows are trained
        self.targets: dict[str, Any] = {}  # module or parameter -> (rank, scale) or None
        self.wrappers: dict[str, int] = {}
        self.tensors: dict[str, Tensor] = {}
        self.refused: list[str] = []
        self.kind = self.sort(deltas)

    def owner(self, path: str) -> nn.Module:
        return self.modules[path] if path else self.model

    def sort(self, deltas: list[tuple[str, Delta]]) -> str:
        """File every delta under what PEFT makes of it; the weight method of the adapter, or 'tokens' or
        'layernorm'."""
        kinds: dict[str, str] = {}
        for path, delta in deltas:
            method, site = delta.method.name, delta.site
            if method in PROMPTS:
                kinds.setdefault(method, site.name)
                self.sites[path, ""] = [delta]
                continue
            stored = self.owner(path)._parameters.get(site.tensor)
            alone = stored is not None and len(self.values.names[id(stored)]) == 1
            if can_write(self.model, self.owner(path), delta, alone):
                self.tokens[path] = delta
            elif method not in WEIGHT_METHODS and method not in VALUES:
                self.refused.append(f"{site.name}: PEFT has no {type(delta.method).__name__}")
            elif stored is None:
                self.refused.append(f"{site.name}: the tensor is computed (weight norm and kin); PEFT cannot adapt it")
            elif method in VALUES:
                self.values.add(stored, delta)
            else:
                kinds.setdefault(SAME.get(method, method), site.name)
                others = [n for n in self.values.names[id(stored)] if n != f"{path}.{site.tensor}"]
                if others:
                    self.refused.append(f"{site.name} is tied to {others[0]}, which PEFT would leave on the base")
                self.sites.setdefault((path, site.tensor), []).append(delta)
        if len(kinds) > 1:
            mixed = " and ".join(f"{kind} (at {where})" for kind, where in kinds.items())
            self.refused.append(f"one PEFT adapter has one method; this one mixes {mixed}")
        if self.tokens and kinds and not kinds.keys() <= {"lora", "dora"}:
            self.refused.append(f"{next(iter(self.tokens))}: PEFT trains single tokens alone or beside LoRA")
        for path, tensor in [*self.sites, *((path, "weight") for path in self.tokens)]:
            if f"{path}.{tensor}" in self.values.found:
                self.refused.append(f"{path}.{tensor} is adapted and trained whole; PEFT does one of the two")
        return next(iter(kinds), "tokens" if self.tokens else "layernorm")

    def finish(self) -> None:
        """Raise if anything was refused.

        Raises:
            Unsupported: naming everything PEFT cannot express.
        """
        self.refused += self.values.refused
        self.values.refused = []
        if self.refused:
            more = f"\n  and {len(self.refused) - 20} more" if len(self.refused) > 20 else ""
            raise Unsupported("HF PEFT cannot express this adapter:\n  " + "\n  ".join(self.refused[:20]) + more)

    def find_again(self, config: dict[str, Any]) -> None:
        """Match the configuration by PEFT's rules; where a list of paths means more than was meant, write an expression."""
        meant = list(config.get("target_modules", ()))
        if target_paths(config, self.modules, self.model) != [p for p in self.modules if p in meant]:
            config["target_modules"] = any_of(meant)
        missed = set(meant) ^ set(target_paths(config, self.modules, self.model))
        names = [n for names in self.values.names.values() for n in names]
        missed |= set(config.get("target_parameters") or ()) ^ set(target_parameters(config, names))
        if missed:
            self.refused.append(f"PEFT's name matching confuses {', '.join(sorted(missed)[:4])} with other modules")

    def route(self, path: str, tensor: str, dora: bool) -> str | None:
        """How PEFT reaches a weight: 'module', 'attention' or 'parameter'; None, with a reason noted, if not at all."""
        owner, site = self.owner(path), self.site(path, tensor)
        above = self.owner(path.rpartition(".")[0])
        holder = next((m for m in (owner, above) if isinstance(m, nn.MultiheadAttention)), None)
        reason = None
        if holder is self.model or not path:
            reason = "PEFT cannot wrap the root module"
        elif holder is not None:
            packed = is_packed_attention(holder)
            if dora:
                reason = "PEFT has no DoRA for nn.MultiheadAttention"
            elif packed or holder is owner:
                return "attention" if packed else "parameter"
            else:
                reason = "nn.MultiheadAttention reads out_proj's weight, where PEFT's wrapper has no effect"
        elif tensor == "weight" and is_stock(owner):
            reason = _geometry(owner, dora)
            if reason is None:
                return "module"
        elif isinstance(owner, nn.RNNBase) or site.layout is None or site.layout.name not in ("linear", "transposed"):
            reason = f"PEFT has no {'DoRA' if dora else 'LoRA'} for a {type(owner).__name__}"
        elif dora:
            reason = "PEFT has no DoRA for bare parameters"
        else:
            return "parameter"
        self.refused.append(f"{site.name}: {reason}")
        return None

    # --- helpers -----------------------------------------------------------------------------------------------------

    def site(self, path: str, tensor: str) -> Site:
        return weight_site(path, self.owner(path), tensor)

    def rows(self, path: str, tensor: str) -> int:
        return self.site(path, tensor).shape[-2]

    def matrix(self, path: str, tensor: str) -> Tensor:
        layout, stored = self.site(path, tensor).layout, self.owner(path)._parameters[tensor]
        assert layout is not None and stored is not None
        return layout.to_matrix(stored.detach())

    def transposed(self, paths: Iterable[str]) -> bool:
        return any(_is_hf_conv1d(self.owner(path)) for path in paths)


def _geometry(owner: nn.Module, dora: bool) -> str | None:
    """Why PEFT's LoRA of this layer would compute something else, or None."""
    if isinstance(owner, nn.Embedding):
        return "PEFT renormalises lora_A by the table's max_norm" if owner.max_norm is not None else None
    if not isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    if any(d > 1 and k > 1 for d, k in zip(owner.dilation, owner.kernel_size, strict=True)):
        return f"PEFT runs lora_A without the dilation {owner.dilation}"
    padded = owner.padding != "valid" and any(p != 0 for p in owner.padding)
    if owner.padding_mode != "zeros" and padded:
        return f"PEFT pads lora_A's input with zeros, not by {owner.padding_mode!r}"
    return "PEFT has no DoRA for grouped convolutions" if dora and owner.groups > 1 else None
