"""From an adapter to HF PEFT's configuration and tensors, one function a method; `export.py` says what becomes of
what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mmpeft.adapters.method import Delta
from mmpeft.adapters.peft.codec import encode_modules
from mmpeft.adapters.peft.codecs import (
    OUT_PROJ_TIMES,
    PEFT_VERSION,
    Pair,
    gain_shape,
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
from mmpeft.adapters.peft.projections import write_randlora, write_vera
from mmpeft.adapters.peft.prompts import write_prefix, write_prompts
from mmpeft.adapters.peft.table import BY_METHOD
from mmpeft.adapters.peft.targets import (
    any_of,
    is_feedforward,
    pattern_key,
    plain_number,
    saved_paths,
)
from mmpeft.adapters.peft.trained_tokens import write_tokens, write_tokens_beside
from mmpeft.adapters.peft.write import Writer
from mmpeft.adapters.site import Site


def encode(writer: Writer) -> dict[str, Any]:
    """The configuration of an adapter; `writer.tensors` is complete afterwards.

    Raises:
        Unsupported: naming everything PEFT cannot express.
    """
    wholes = writer.values.wholes()
    writer.finish()
    codec = BY_METHOD.get(writer.kind)
    config = encode_modules(writer, codec) if codec is not None else _ENCODERS[writer.kind](writer, wholes)
    writer.finish()
    saved = writer.values.to_save(wholes, [*writer.wrappers, *writer.targets])
    config |= {"modules_to_save": wholes} if wholes else {}
    writer.find_again(config)
    copied = [*saved_paths(config, writer.values.modules), *(writer.targets if writer.kind == "layernorm" else ())]
    biases = writer.values.biases(copied, writer.wrappers, "bias" in config)
    writer.finish()
    writer.tensors |= saved | biases
    config |= {"bias": "all"} if biases else {}
    base = getattr(getattr(writer.model, "config", None), "_name_or_path", None)
    facts = {"base_model_name_or_path": base or None, "peft_version": PEFT_VERSION, "task_type": None}
    return {**facts, "inference_mode": True, **config}


def lora(writer: Writer, wholes: list[str]) -> dict[str, Any]:
    """LoRA, what is written as it, and DoRA."""
    dora = writer.kind == "dora"
    bare: list[str] = []
    attention: dict[str, dict[str, list[Delta]]] = {}
    plain: dict[str, list[Delta]] = {}
    for (path, tensor), deltas in writer.sites.items():
        where = writer.route(path, tensor, dora)
        if where == "attention":
            holder = path if tensor == "in_proj_weight" else path.rpartition(".")[0]
            attention.setdefault(holder, {})[tensor] = deltas
        elif where == "parameter":
            bare.append(f"{path}.{tensor}")
        elif where == "module":
            plain[path] = deltas
    writer.wrappers = {path: 1 for path in [*plain, *attention, *(f"{p}.out_proj" for p in attention)]}
    for owner in (name.rpartition(".")[0] for name in bare):
        writer.wrappers[owner] = writer.wrappers.get(owner, 0) + 1
    for path, deltas in plain.items():
        _put_pair(writer, path, deltas[0].site, whole_pair(deltas, writer.rows(path, "weight")), path)
        if dora:
            base = writer.matrix(path, "weight")
            key = f"{wrapped_path(path, writer.wrappers)}.lora_magnitude_vector"
            writer.tensors[key] = magnitudes(deltas, base).view(magnitude_shape(writer.site(path, "weight")))
    for path, parts in attention.items():
        _put_attention(writer, path, parts)
    _put_parameters(writer, bare)
    rslora = all(getattr(d.method, "rslora", False) for deltas in writer.sites.values() for d in deltas)
    drops = {d.method.dropout for deltas in plain.values() for d in deltas}
    return {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": writer.transposed(plain),
        "init_lora_weights": True,
        "lora_dropout": drops.pop() if len(drops) == 1 and not bare else 0.0,
        "target_modules": [path for path in writer.modules if path in plain or path in attention],
        "target_parameters": sorted(bare) or None,
        "use_dora": dora,
        "use_rslora": rslora,
        **_ranks(writer, rslora),
        **write_tokens_beside(writer),
    }


def _put_pair(writer: Writer, path: str, site: Site, pair: Pair, target: str) -> None:
    """One module target's A and B."""
    whole = writer.site(path, site.tensor)
    a, b = pack_lora(pair.A, pair.B, whole)
    key = wrapped_path(path, writer.wrappers)
    for name, tensor in zip(lora_names(writer.owner(path)), (a, b), strict=True):
        writer.tensors[f"{key}.{name}"] = tensor
    writer.targets[target] = (a.shape[0], pair.scale)


def _put_attention(writer: Writer, path: str, parts: Mapping[str, list[Delta]]) -> None:
    """Both projections of an nn.MultiheadAttention, at one rank and scale."""
    packed, out = writer.site(path, "in_proj_weight"), writer.site(f"{path}.out_proj", "weight")
    pairs = {
        t: whole_pair(deltas, writer.rows(path if t == "in_proj_weight" else f"{path}.out_proj", t))
        for t, deltas in parts.items()
    }
    some = next(iter(pairs.values()))
    first, second = same_rank(
        pairs.get("in_proj_weight") or zero_pair(packed, some), pairs.get("weight") or zero_pair(out, some)
    )
    _put_pair(writer, f"{path}.out_proj", out, Pair(second.A, second.B / OUT_PROJ_TIMES, second.scale), path)
    _put_pair(writer, path, packed, first, path)


def _put_parameters(writer: Writer, bare: list[str]) -> None:
    """Bare parameters; of several in one module, the one registered last has the outermost wrapper."""
    for name in bare:
        path, _, tensor = name.rpartition(".")
        order = [t for t in writer.owner(path)._parameters if f"{path}.{t}" in bare]
        key = wrapped_path(path, writer.wrappers, own=len(order) - 1 - order.index(tensor))
        pair = whole_pair(writer.sites[path, tensor], writer.rows(path, tensor))
        a, b = pack_experts(pair.A, pair.B, writer.site(path, tensor))
        writer.tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        writer.targets[name] = (pair.rank, pair.scale)


def _ranks(writer: Writer, rslora: bool) -> dict[str, Any]:
    """r and lora_alpha of most targets, and patterns for the others."""
    if not writer.targets:
        return {}
    numbers = {t: (r, plain_number(scale * (r**0.5 if rslora else r))) for t, (r, scale) in writer.targets.items()}
    (rank, alpha), _ = Counter(numbers.values()).most_common(1)[0]
    keys = {target: pattern_key(target, numbers) for target in numbers}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {keys[t]: r for t, (r, _) in numbers.items() if r != rank},
        "alpha_pattern": {keys[t]: a for t, (_, a) in numbers.items() if a != alpha},
    }


def ia3(writer: Writer, wholes: list[str]) -> dict[str, Any]:
    """IA3; PEFT scales a layer's bias with its output."""
    sides: dict[str, str] = {}
    for (path, tensor), deltas in writer.sites.items():
        owner, site, side = writer.owner(path), writer.site(path, tensor), deltas[0].method.side  # type: ignore[attr-defined]
        if tensor == "bias" and (path, "weight") in writer.sites:
            continue
        if tensor != "weight" or not is_stock(owner) or isinstance(owner, nn.Embedding | nn.Conv1d):
            writer.refused.append(f"{site.name}: PEFT has no IA3 for a {type(owner).__name__}")
            continue
        roles = {d.site.role for d in deltas}
        scaled = {d.site.role for d in writer.sites.get((path, "bias"), [])}
        if side == "out" and owner._parameters.get("bias") is not None and scaled != roles:
            writer.refused.append(f"{site.name}: PEFT scales the bias too; match the module, not its weight")
        elif side == "in" and roles != {None}:
            writer.refused.append(f"{site.name}: PEFT scales the input of the whole weight, not of a slice")
        else:
            sides[path] = side
            gains = deltas[0].l if side == "in" else whole_gains(deltas, site.shape[0])
            writer.tensors[f"{path}.ia3_l"] = gains.view(gain_shape(site, gains.numel(), side == "in"))
    writer.targets = dict.fromkeys(sides)
    writer.wrappers = dict.fromkeys(sides, 1)
    writer.tensors = {
        f"{wrapped_path(k.removesuffix('.ia3_l'), writer.wrappers)}.ia3_l": t for k, t in writer.tensors.items()
    }
    feedforward = [path for path, side in sides.items() if side == "in"]
    config: dict[str, Any] = {"feedforward_modules": feedforward}
    if any(is_feedforward(config, path) != (path in feedforward) for path in sides):
        config = {"feedforward_modules": any_of(feedforward)}
    return {
        "peft_type": "IA3",
        "fan_in_fan_out": writer.transposed(sides),
        "init_ia3_weights": True,
        "target_modules": [path for path in writer.modules if path in sides],
        **config,
    }


def layernorm(writer: Writer, wholes: list[str]) -> dict[str, Any]:
    """LN_TUNING: copies of the norms, or of all copied modules if no norm is among them."""
    owners = {name.rpartition(".")[0] for name in writer.values.norms}
    chosen = [path for path in wholes if path in owners] or list(wholes)
    if not chosen:
        return _biases_alone(writer)
    writer.targets = dict.fromkeys(chosen)
    for path in chosen:
        writer.tensors |= writer.values.state(path, f"{path}.ln_tuning_layers")
    wholes[:] = [path for path in wholes if path not in chosen]
    return {"peft_type": "LN_TUNING", "target_modules": chosen}


def _biases_alone(writer: Writer) -> dict[str, Any]:
    """BEFT: what biases of linear layers gain."""
    found: dict[str, torch.Tensor] = {}
    for name, value in writer.values.found.items():
        path, _, tensor = name.rpartition(".")
        owner = writer.owner(path)
        if not path or tensor != "bias" or not isinstance(owner, nn.Linear) or not is_stock(owner):
            writer.refused.append(f"{name}: PEFT trains biases of linear layers alone, others only beside LoRA and kin")
        else:
            found[path] = (value - owner._parameters["bias"].detach().to(value)).unsqueeze(0)  # type: ignore[union-attr]
    writer.targets = dict.fromkeys(found)
    writer.wrappers = dict.fromkeys(found, 1)
    writer.tensors |= {f"{wrapped_path(path, writer.wrappers)}.beft_bias": t for path, t in found.items()}
    writer.values.found.clear()
    return {"peft_type": "BEFT", "target_modules": [path for path in writer.modules if path in found]}


_ENCODERS: dict[str, Callable[[Writer, list[str]], dict[str, Any]]] = {
    "lora": lora,
    "dora": lora,
    "ia3": ia3,
    "vera": write_vera,
    "randlora": write_randlora,
    "tokens": write_tokens,
    "layernorm": layernorm,
    "prompt_tuning": write_prompts,
    "prefix": write_prefix,
    "prefix-tuning": write_prefix,
}
