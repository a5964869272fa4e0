"""Writing HF PEFT folders: one adapter as adapter_config.json and adapter_model.safetensors.

PEFT has one method a folder, wraps modules that are called, and copies whole modules that are trained whole. So

    LoRA, DoRA, IA3, VeRA    sites become targets by exact path, differing ranks and scales become patterns
    bare parameters          (3-D experts, packed projections elsewhere) become target_parameters
    nn.MultiheadAttention    in_proj and out_proj become one target, the part that is not adapted with zeros
    full, norm tuning        become modules_to_save, or LN_TUNING where nothing else is trained
    BitFit                   becomes bias="all" beside LoRA or VeRA

What PEFT cannot express, or would compute differently, is refused before anything is written, with all sites named.
The configuration is then matched against the model by PEFT's own rules, so a folder that is written is found again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from mmpeft.adapters.lora import LoRA
from mmpeft.adapters.method import Delta
from mmpeft.adapters.peft_codecs import (
    CONFIG,
    OUT_PROJ_TIMES,
    PEFT_VERSION,
    PREFIX,
    TENSORS,
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
from mmpeft.adapters.site import Site, _is_hf_conv1d, weight_site
from mmpeft.adapters.slot import apply
from mmpeft.adapters.state import SLOT
from mmpeft.adapters.store import _choose, _gather, deltas_of
from mmpeft.errors import ConfigError, Unsupported

log = logging.getLogger("mmpeft")

_VALUES = ("full", "bitfit", "layernorm")  # methods that are values of base tensors
_TYPES = {"lora": "LORA", "dora": "LORA", "ia3": "IA3", "vera": "VERA"}
_NO_COPY = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # PEFT wraps nothing that is not called


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
    name = _choose(model, name)
    export = _Export(model, name)
    config = export.config()
    if check:
        export.refuse_uncalled(example)
    tensors = {
        PREFIX + k if not k.startswith("base_model.") else k: _gather(t.detach()) for k, t in export.tensors.items()
    }
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


class _Export:
    """One adapter on its way to PEFT's form: `config()` fills `tensors` and gives the configuration."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.modules = module_paths(model)
        self.every = module_paths(model, duplicates=True)  # shared modules under each of their paths
        self.names: dict[int, list[str]] = {}
        for path, p in model.named_parameters(remove_duplicate=False):
            if SLOT not in path.split("."):
                self.names.setdefault(id(p), []).append(path)
        self.sites: dict[tuple[str, str], list[Delta]] = {}  # sites of the low-rank and scaling methods
        self.values: dict[str, Tensor] = {}  # values of base tensors, by every name they have
        self.copied: list[str] = []  # names whose module is copied whole
        self.norms: list[str] = []  # those of them that norm tuning trains
        self.targets: dict[str, Any] = {}  # module or parameter -> (rank, scale) or None
        self.wrappers: dict[str, int] = {}
        self.tensors: dict[str, Tensor] = {}
        self.refused: list[str] = []
        self.kind = self.sort(deltas_of(model, name))

    def owner(self, path: str) -> nn.Module:
        return self.modules[path] if path else self.model

    def sort(self, deltas: list[tuple[str, Delta]]) -> str:
        """File every delta under what PEFT makes of it; the weight method of the adapter, or 'layernorm'."""
        kinds: dict[str, str] = {}
        for path, delta in deltas:
            method, site = delta.method.name, delta.site
            stored = self.owner(path)._parameters.get(site.tensor)
            if method not in _TYPES and method not in _VALUES:
                self.refused.append(f"{site.name}: PEFT has no {type(delta.method).__name__}")
            elif stored is None:
                self.refused.append(f"{site.name}: the tensor is computed (weight norm and kin); PEFT cannot adapt it")
            elif method in _VALUES:
                for name in self.names[id(stored)]:
                    with torch.no_grad():
                        self.values[name] = apply(self.values.get(name, stored), delta).detach()
                    self.copied += [name] if method != "bitfit" else []
                    self.norms += [name] if method == "layernorm" else []
            else:
                kinds.setdefault(method, site.name)
                others = [n for n in self.names[id(stored)] if n != f"{path}.{site.tensor}"]
                if others:
                    self.refused.append(f"{site.name} is tied to {others[0]}, which PEFT would leave on the base")
                self.sites.setdefault((path, site.tensor), []).append(delta)
        if len(kinds) > 1:
            mixed = " and ".join(f"{kind} (at {where})" for kind, where in kinds.items())
            self.refused.append(f"one PEFT adapter has one method; this one mixes {mixed}")
        for path, tensor in self.sites:
            if f"{path}.{tensor}" in self.values:
                self.refused.append(f"{path}.{tensor} is adapted and trained whole; PEFT does one of the two")
        return next(iter(kinds), "layernorm")

    def config(self) -> dict[str, Any]:
        """The configuration; `tensors` is complete afterwards.

        Raises:
            Unsupported: naming everything PEFT cannot express.
        """
        wholes = self.wholes()
        if not self.refused:
            config = _ENCODERS[self.kind](self, wholes)
            config["modules_to_save"] = self.to_save(wholes) or None
            self.find_again(config)
            self.add_biases(config, wholes)
        if self.refused:
            more = f"\n  and {len(self.refused) - 20} more" if len(self.refused) > 20 else ""
            raise Unsupported("HF PEFT cannot express this adapter:\n  " + "\n  ".join(self.refused[:20]) + more)
        base = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        facts = {"base_model_name_or_path": base or None, "peft_version": PEFT_VERSION, "task_type": None}
        return {**facts, "inference_mode": True, **config}

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
            if tensor != "weight" or not is_stock(owner) or isinstance(owner, nn.Embedding | nn.Conv1d):
                if (path, "weight") not in self.sites:
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
        owners = {name.rpartition(".")[0] for name in self.norms}
        chosen = [path for path in wholes if path in owners] or list(wholes)
        if not chosen:
            self.refused.append("PEFT trains biases only beside LoRA or VeRA")
        self.targets = dict.fromkeys(chosen)
        for path in chosen:
            self.tensors |= {f"{path}.ln_tuning_layers.{sub}": t for sub, t in self.state(path).items()}
        wholes[:] = [path for path in wholes if path not in chosen]
        return {"peft_type": "LN_TUNING", "target_modules": chosen}

    # --- whole copies and biases -------------------------------------------------------------------------------------

    def wholes(self) -> list[str]:
        """The modules to copy whole: owners of such tensors, the outermost where they nest."""
        paths = list(dict.fromkeys(name.rpartition(".")[0] for name in self.copied))
        for path in paths:
            if not path:
                self.refused.append("a parameter of the root module is trained; PEFT copies modules below the root")
            elif isinstance(self.every[path], _NO_COPY):
                self.refused.append(f"{path}: PEFT cannot copy a {type(self.every[path]).__name__}")
        return [p for p in paths if p and not any(p.startswith(other + ".") for other in paths if other)]

    def to_save(self, wholes: list[str]) -> list[str]:
        """`modules_to_save`, and the tensors of every module that PEFT will copy under these names."""
        hits = saved_paths({"modules_to_save": wholes}, self.every)  # "head" means aux_head too
        for path in hits:
            near = [t for t in self.wrappers if _nested(t, path)] + [t for t in self.targets if _nested(t, path)]
            if near:
                self.refused.append(f"{path} is trained whole and {near[0]} adapted; PEFT cannot nest the two")
            self.tensors |= {f"{path}.{sub}": t for sub, t in self.state(path).items()}
        return wholes

    def state(self, path: str) -> dict[str, Tensor]:
        """A module's state under this adapter, by names below it, as PEFT copies it."""
        found: dict[str, Tensor] = {}
        for below, module in self.every.items():
            if below == path or below.startswith(path + "."):
                inner = below.removeprefix(path).lstrip(".")
                for n, t in [*module._parameters.items(), *module._buffers.items()]:
                    if t is not None and n not in module._non_persistent_buffers_set:
                        found[f"{inner}.{n}" if inner else n] = self.values.get(f"{below}.{n}", t)
        return found

    def add_biases(self, config: dict[str, Any], wholes: list[str]) -> None:
        """Trained biases that no copied module holds."""
        hits = [
            *saved_paths({"modules_to_save": wholes}, self.every),
            *(self.targets if self.kind == "layernorm" else ()),
        ]
        for name in self.values:
            path, _, tensor = name.rpartition(".")
            if any(path == h or path.startswith(h + ".") for h in hits):
                continue
            if tensor != "bias" or "bias" not in config:
                self.refused.append(f"{name}: PEFT trains only tensors named bias, and only beside LoRA or VeRA")
                continue
            config["bias"] = "all"
            key = wrapped_path(path, self.wrappers, own=self.wrappers.get(path, 0)) + "." if path else ""
            self.tensors[f"{key}bias"] = self.values[name]

    # --- proof -------------------------------------------------------------------------------------------------------

    def find_again(self, config: dict[str, Any]) -> None:
        """Match the configuration by PEFT's rules; where a list of paths means more than was meant, write an expression."""
        meant = list(config["target_modules"])
        if target_paths(config, self.modules, self.model) != [p for p in self.modules if p in meant]:
            config["target_modules"] = _any_of(meant)
        missed = set(meant) ^ set(target_paths(config, self.modules, self.model))
        names = [n for names in self.names.values() for n in names]
        missed |= set(config.get("target_parameters") or ()) ^ set(target_parameters(config, names))
        if missed:
            self.refused.append(f"PEFT's name matching confuses {', '.join(sorted(missed)[:4])} with other modules")

    def refuse_uncalled(self, example: Any) -> None:
        """Run the model once and refuse targets that it reads without calling them: PEFT's wrappers only see calls."""
        from mmpeft.adapters.example import example_of
        from mmpeft.adapters.liveness import as_call

        given = example if example is not None else example_of(self.model)
        if given is None or any(p.is_meta for p in self.model.parameters()):
            return
        watched = {t for t in self.targets if t in self.modules} | {
            t.rpartition(".")[0] for t in self.targets if t not in self.modules
        }
        parents = {path: path.rpartition(".")[0] for path in watched}
        ran: set[str] = set()
        hooks = []
        for path in {*watched, *parents.values()}:
            hooks.append(self.owner(path).register_forward_pre_hook(lambda *_, path=path: ran.add(path)))
        args, kwargs = as_call(given)
        training = self.model.training
        try:
            self.model.eval()
            with torch.no_grad():
                self.model(*args, **kwargs)
        finally:
            self.model.train(training)
            for hook in hooks:
                hook.remove()
        dead = sorted(path for path in watched if path not in ran and parents[path] in ran)
        if dead:
            raise Unsupported(
                "HF PEFT would ignore the adapter where a layer's weight is read and the layer never called:\n  "
                + "\n  ".join(dead[:20])
            )
        fast = [p for p in watched if isinstance(self.modules.get(p.rpartition(".")[0]), nn.TransformerEncoderLayer)]
        if fast:
            log.warning(
                "PEFT ignores adapters in nn.TransformerEncoderLayer in eval mode (%s): call "
                "torch.backends.mha.set_fastpath_enabled(False) where you use the export",
                ", ".join(sorted(fast)[:3]),
            )

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


_ENCODERS = {
    "lora": _Export.lora,
    "dora": _Export.lora,
    "ia3": _Export.ia3,
    "vera": _Export.vera,
    "layernorm": _Export.layernorm,
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


def _nested(a: str, b: str) -> bool:
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")


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
