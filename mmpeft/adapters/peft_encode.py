"""From an adapter to HF PEFT's configuration and tensors; see `peft_export.py` for what becomes of what."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.lora import LoRA
from mmpeft.adapters.method import Delta
from mmpeft.adapters.peft_codecs import (
    OUT_PROJ_TIMES,
    PEFT_VERSION,
    Pair,
    gain_shape,
    is_packed_attention,
    is_stock,
    lora_names,
    magnitude_shape,
    magnitudes,
    pack_experts,
    pack_lora,
    same_rank,
    whole_gains,
    whole_pair,
    wrapped_path,
    zero_pair,
)
from mmpeft.adapters.peft_targets import (
    is_feedforward,
    module_paths,
    pattern_value,
    saved_paths,
    target_parameters,
    target_paths,
)
from mmpeft.adapters.peft_values import METHODS, Values
from mmpeft.adapters.site import Site, _is_hf_conv1d, weight_site
from mmpeft.errors import Unsupported


class Encoder:
    """One adapter on its way to PEFT's form: `config()` fills `tensors` and gives the configuration."""

    def __init__(self, model: nn.Module, deltas: list[tuple[str, Delta]]) -> None:
        self.model = model
        self.modules = module_paths(model)
        self.values = Values(model)
        self.sites: dict[tuple[str, str], list[Delta]] = {}  # sites of the low-rank and scaling methods
        self.targets: dict[str, Any] = {}  # module or parameter -> (rank, scale) or None
        self.wrappers: dict[str, int] = {}
        self.tensors: dict[str, Tensor] = {}
        self.refused: list[str] = []
        self.kind = self.sort(deltas)

    def owner(self, path: str) -> nn.Module:
        return self.modules[path] if path else self.model

    def sort(self, deltas: list[tuple[str, Delta]]) -> str:
        """File every delta under what PEFT makes of it; the weight method of the adapter, or 'layernorm'."""
        kinds: dict[str, str] = {}
        for path, delta in deltas:
            method, site = delta.method.name, delta.site
            stored = self.owner(path)._parameters.get(site.tensor)
            if method not in _ENCODERS and method not in METHODS:
                self.refused.append(f"{site.name}: PEFT has no {type(delta.method).__name__}")
            elif stored is None:
                self.refused.append(f"{site.name}: the tensor is computed (weight norm and kin); PEFT cannot adapt it")
            elif method in METHODS:
                self.values.add(stored, delta)
            else:
                kinds.setdefault(method, site.name)
                others = [n for n in self.values.names[id(stored)] if n != f"{path}.{site.tensor}"]
                if others:
                    self.refused.append(f"{site.name} is tied to {others[0]}, which PEFT would leave on the base")
                self.sites.setdefault((path, site.tensor), []).append(delta)
        if len(kinds) > 1:
            mixed = " and ".join(f"{kind} (at {where})" for kind, where in kinds.items())
            self.refused.append(f"one PEFT adapter has one method; this one mixes {mixed}")
        for path, tensor in self.sites:
            if f"{path}.{tensor}" in self.values.found:
                self.refused.append(f"{path}.{tensor} is adapted and trained whole; PEFT does one of the two")
        return next(iter(kinds), "layernorm")

    def config(self) -> dict[str, Any]:
        """The configuration; `tensors` is complete afterwards.

        Raises:
            Unsupported: naming everything PEFT cannot express.
        """
        wholes = self.values.wholes()
        self.refused += self.values.refused
        if not self.refused:
            self.values.refused.clear()
            config = _ENCODERS[self.kind](self, wholes)
            saved = self.values.to_save(wholes, [*self.wrappers, *self.targets])
            config["modules_to_save"] = wholes or None
            self.find_again(config)
            copied = [*saved_paths(config, self.values.modules), *(self.targets if self.kind == "layernorm" else ())]
            biases = self.values.biases(copied, self.wrappers, "bias" in config)
            config |= {"bias": "all"} if biases else {}
            self.tensors |= saved | biases
            self.refused += self.values.refused
        if self.refused:
            more = f"\n  and {len(self.refused) - 20} more" if len(self.refused) > 20 else ""
            raise Unsupported("HF PEFT cannot express this adapter:\n  " + "\n  ".join(self.refused[:20]) + more)
        base = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        facts = {"base_model_name_or_path": base or None, "peft_version": PEFT_VERSION, "task_type": None}
        return {**facts, "inference_mode": True, **config}

    def find_again(self, config: dict[str, Any]) -> None:
        """Match the configuration by PEFT's rules; where a list of paths means more than was meant, write an expression."""
        meant = list(config["target_modules"])
        if target_paths(config, self.modules, self.model) != [p for p in self.modules if p in meant]:
            config["target_modules"] = _any_of(meant)
        missed = set(meant) ^ set(target_paths(config, self.modules, self.model))
        names = [n for names in self.values.names.values() for n in names]
        missed |= set(config.get("target_parameters") or ()) ^ set(target_parameters(config, names))
        if missed:
            self.refused.append(f"PEFT's name matching confuses {', '.join(sorted(missed)[:4])} with other modules")

    # --- methods -----------------------------------------------------------------------------------------------------

    def lora(self, wholes: list[str]) -> dict[str, Any]:
        """LoRA and DoRA."""
        dora = self.kind == "dora"
        bare: list[str] = []
        attention: dict[str, dict[str, list[Delta]]] = {}
        plain: dict[str, list[Delta]] = {}
        for (path, tensor), deltas in self.sites.items():
            where = self.route(path, tensor, dora)
            if where == "attention":
                holder = path if tensor == "in_proj_weight" else path.rpartition(".")[0]
                attention.setdefault(holder, {})[tensor] = deltas
            elif where == "parameter":
                bare.append(f"{path}.{tensor}")
            elif where == "module":
                plain[path] = deltas
        self.wrappers = {path: 1 for path in [*plain, *attention, *(f"{p}.out_proj" for p in attention)]}
        for owner in (name.rpartition(".")[0] for name in bare):
            self.wrappers[owner] = self.wrappers.get(owner, 0) + 1
        for path, deltas in plain.items():
            self.put_pair(path, deltas[0].site, whole_pair(deltas, self.rows(path, "weight")), path)
            if dora:
                base = self.matrix(path, "weight")
                key = f"{wrapped_path(path, self.wrappers)}.lora_magnitude_vector"
                self.tensors[key] = magnitudes(deltas, base).view(magnitude_shape(self.site(path, "weight")))
        for path, parts in attention.items():
            self.put_attention(path, parts)
        self.put_parameters(bare)
        rslora = all(d.method.rslora for deltas in self.sites.values() for d in deltas if isinstance(d.method, LoRA))
        drops = {d.method.dropout for deltas in plain.values() for d in deltas if isinstance(d.method, LoRA)}
        return {
            "peft_type": "LORA",
            "bias": "none",
            "fan_in_fan_out": self.transposed(plain),
            "init_lora_weights": True,
            "lora_dropout": drops.pop() if len(drops) == 1 and not bare else 0.0,
            "target_modules": [path for path in self.modules if path in plain or path in attention],
            "target_parameters": sorted(bare) or None,
            "use_dora": dora,
            "use_rslora": rslora,
            **self.ranks(rslora),
        }

    def route(self, path: str, tensor: str, dora: bool) -> str | None:
        """How PEFT reaches a weight: 'module', 'attention' or 'parameter'; None, with a reason noted, if not at all."""
        owner, site = self.owner(path), self.site(path, tensor)
        above = self.modules.get(path.rpartition(".")[0])
        reason = None
        if isinstance(above, nn.MultiheadAttention) or isinstance(owner, nn.MultiheadAttention):
            holder = owner if isinstance(owner, nn.MultiheadAttention) else above
            assert holder is not None
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
        elif not path:
            reason = "PEFT cannot wrap the root module"
        elif isinstance(owner, nn.RNNBase) or site.layout is None or site.layout.name not in ("linear", "transposed"):
            reason = f"PEFT has no {'DoRA' if dora else 'LoRA'} for a {type(owner).__name__}"
        elif dora:
            reason = "PEFT has no DoRA for bare parameters"
        else:
            return "parameter"
        self.refused.append(f"{site.name}: {reason}")
        return None

    def put_pair(self, path: str, site: Site, pair: Pair, target: str) -> None:
        """One module target's A and B."""
        whole = self.site(path, site.tensor)
        a, b = pack_lora(pair.A, pair.B, whole)
        key = wrapped_path(path, self.wrappers)
        for name, tensor in zip(lora_names(self.owner(path)), (a, b), strict=True):
            self.tensors[f"{key}.{name}"] = tensor
        self.targets[target] = (a.shape[0], pair.scale)

    def put_attention(self, path: str, parts: Mapping[str, list[Delta]]) -> None:
        """Both projections of an nn.MultiheadAttention, at one rank and scale."""
        packed, out = self.site(path, "in_proj_weight"), self.site(f"{path}.out_proj", "weight")
        pairs = {
            t: whole_pair(deltas, self.rows(path if t == "in_proj_weight" else f"{path}.out_proj", t))
            for t, deltas in parts.items()
        }
        some = next(iter(pairs.values()))
        first, second = same_rank(
            pairs.get("in_proj_weight") or zero_pair(packed, some), pairs.get("weight") or zero_pair(out, some)
        )
        self.put_pair(f"{path}.out_proj", out, Pair(second.A, second.B / OUT_PROJ_TIMES, second.scale), path)
        self.put_pair(path, packed, first, path)

    def put_parameters(self, bare: list[str]) -> None:
        """Bare parameters; of several in one module, the one registered last has the outermost wrapper."""
        for name in bare:
            path, _, tensor = name.rpartition(".")
            order = [t for t in self.owner(path)._parameters if f"{path}.{t}" in bare]
            key = wrapped_path(path, self.wrappers, own=len(order) - 1 - order.index(tensor))
            pair = whole_pair(self.sites[path, tensor], self.rows(path, tensor))
            a, b = pack_experts(pair.A, pair.B, self.site(path, tensor))
            self.tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            self.targets[name] = (pair.rank, pair.scale)

    def ranks(self, rslora: bool) -> dict[str, Any]:
        """r and lora_alpha of most targets, and patterns for the others."""
        if not self.targets:
            return {}
        numbers = {t: (r, _number(scale * (r**0.5 if rslora else r))) for t, (r, scale) in self.targets.items()}
        (rank, alpha), _ = Counter(numbers.values()).most_common(1)[0]
        keys = {target: _pattern(target, numbers) for target in numbers}
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {keys[t]: r for t, (r, _) in numbers.items() if r != rank},
            "alpha_pattern": {keys[t]: a for t, (_, a) in numbers.items() if a != alpha},
        }

    def ia3(self, wholes: list[str]) -> dict[str, Any]:
        """IA3; PEFT scales a layer's bias with its output."""
        sides: dict[str, str] = {}
        for (path, tensor), deltas in self.sites.items():
            owner, site, side = self.owner(path), self.site(path, tensor), deltas[0].method.side  # type: ignore[attr-defined]
            if tensor == "bias" and (path, "weight") in self.sites:
                continue
            if tensor != "weight" or not is_stock(owner) or isinstance(owner, nn.Embedding | nn.Conv1d):
                self.refused.append(f"{site.name}: PEFT has no IA3 for a {type(owner).__name__}")
                continue
            roles = {d.site.role for d in deltas}
            scaled = {d.site.role for d in self.sites.get((path, "bias"), [])}
            if side == "out" and owner._parameters.get("bias") is not None and scaled != roles:
                self.refused.append(f"{site.name}: PEFT scales the bias too; match the module, not its weight")
            elif side == "in" and roles != {None}:
                self.refused.append(f"{site.name}: PEFT scales the input of the whole weight, not of a slice")
            else:
                sides[path] = side
                gains = deltas[0].l if side == "in" else whole_gains(deltas, site.shape[0])
                self.tensors[f"{path}.ia3_l"] = gains.view(gain_shape(site, gains.numel(), side == "in"))
        self.targets = dict.fromkeys(sides)
        self.wrappers = dict.fromkeys(sides, 1)
        self.tensors = {
            f"{wrapped_path(k.removesuffix('.ia3_l'), self.wrappers)}.ia3_l": t for k, t in self.tensors.items()
        }
        feedforward = [path for path, side in sides.items() if side == "in"]
        config: dict[str, Any] = {"feedforward_modules": feedforward}
        if any(is_feedforward(config, path) != (path in feedforward) for path in sides):
            config = {"feedforward_modules": _any_of(feedforward)}
        return {
            "peft_type": "IA3",
            "fan_in_fan_out": self.transposed(sides),
            "init_ia3_weights": True,
            "target_modules": [path for path in self.modules if path in sides],
            **config,
        }

    def vera(self, wholes: list[str]) -> dict[str, Any]:
        """VeRA, with its projections."""
        deltas = {path: group[0] for (path, _), group in self.sites.items()}
        first = next(iter(deltas.values()))
        method: Any = first.method
        for (path, tensor), group in self.sites.items():
            owner = self.owner(path)
            if tensor != "weight" or not (isinstance(owner, nn.Linear) or _is_hf_conv1d(owner)) or not is_stock(owner):
                self.refused.append(f"{group[0].site.name}: PEFT has no VeRA for a {type(owner).__name__}")
            elif group[0].site.rows is not None:
                self.refused.append(
                    f"{group[0].site.name}: PEFT has one vera_lambda_d for a whole weight, not one a slice"
                )
            elif not (torch.equal(group[0].A, first.A) and torch.equal(group[0].B, first.B)):
                self.refused.append(f"{group[0].site.name}: PEFT has one pair of projections; this site has another")
        self.targets = dict.fromkeys(deltas)
        self.wrappers = dict.fromkeys(deltas, 1)
        shapes = [d.site.shape for d in deltas.values()]
        self.tensors["base_model.vera_A"] = first.A[:, : max(s[1] for s in shapes)]
        self.tensors["base_model.vera_B"] = first.B[: max(s[0] for s in shapes)]
        for path, delta in deltas.items():
            key = wrapped_path(path, self.wrappers)
            self.tensors |= {f"{key}.vera_lambda_d": delta.d, f"{key}.vera_lambda_b": delta.b}
        return {
            "peft_type": "VERA",
            "bias": "none",
            "d_initial": method.d_initial,
            "fan_in_fan_out": self.transposed(deltas),
            "init_weights": True,
            "projection_prng_key": method.seed,
            "r": method.rank,
            "save_projection": True,
            "target_modules": [path for path in self.modules if path in deltas],
            "vera_dropout": method.dropout,
        }

    def layernorm(self, wholes: list[str]) -> dict[str, Any]:
        """LN_TUNING: copies of the norms, or of all copied modules if no norm is among them."""
        owners = {name.rpartition(".")[0] for name in self.values.norms}
        chosen = [path for path in wholes if path in owners] or list(wholes)
        if not chosen:
            self.refused.append("PEFT trains biases only beside LoRA or VeRA")
        self.targets = dict.fromkeys(chosen)
        for path in chosen:
            self.tensors |= self.values.state(path, f"{path}.ln_tuning_layers")
        wholes[:] = [path for path in wholes if path not in chosen]
        return {"peft_type": "LN_TUNING", "target_modules": chosen}

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


_ENCODERS: dict[str, Callable[[Encoder, list[str]], dict[str, Any]]] = {
    "lora": Encoder.lora,
    "dora": Encoder.lora,
    "ia3": Encoder.ia3,
    "vera": Encoder.vera,
    "layernorm": Encoder.layernorm,
}


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


def _any_of(paths: Iterable[str]) -> str:
    """An expression for exactly these paths."""
    return "|".join(re.escape(path) for path in paths) or "$^"


def _pattern(target: str, targets: Iterable[str]) -> str:
    """A key for rank_pattern: the path, anchored where it would also end another target's path."""
    hits = [t for t in targets if pattern_value({target: True}, t, False)]
    return target if hits == [target] else f"^{re.escape(target)}"


def _number(x: float) -> float | int:
    """Free of rounding: alpha / r * r."""
    near = round(x, 9)
    return int(near) if near == int(near) else near
