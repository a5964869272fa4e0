"""Quantised bases: frozen linear weights in few bits, adapters on top as on any base.

    mmpeft.quantise(model, "llm.**.{q,k,v,o}_proj", "nf4")              QLoRA is this and then LoRA
    mmpeft.quantise(model, plan_bits(model, "llm.**", budget_bytes=2**30))
    mmpeft.loftq(model, {"llm.**.q_proj": mmpeft.LoRA(rank=8)}, "nf4")  LoftQ; start="svd" is SVDQuant's split

The module stays the `nn.Linear` it was, with a `PackedWeight` as its parameter (`packed_weight.py`). Quantising comes
before attaching; the fingerprint is then that of the quantised base, and `dequantise` gives dense weights back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmpeft.adapters.attach import attach, detach
from mmpeft.adapters.methods.lora import LoRA
from mmpeft.adapters.pattern import select
from mmpeft.adapters.plan import PlanLike
from mmpeft.adapters.state import find_state, slots
from mmpeft.adapters.storage.integer import BF16, FP8, Int
from mmpeft.adapters.storage.nf4 import NF4, from_bitsandbytes
from mmpeft.adapters.storage.packed_weight import PackedWeight, Scheme
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound, Unsupported, nearest

SCHEMES: dict[str, Callable[[], Scheme]] = {
    "nf4": NF4,
    "int8": lambda: Int(8),
    "int4": lambda: Int(4, group=32),
    "int2": lambda: Int(2, group=32),
    "fp8": FP8,
    "bf16": BF16,
}
LEFT = "keep"  # in place of a scheme: the layer stays as it is


def scheme_of(value: str | Scheme) -> Scheme:
    """A scheme from its name ("nf4", "int8", "int4", "int2", "fp8", "bf16") or itself.

    Raises:
        NameNotFound: with the nearest names.
    """
    if not isinstance(value, str):
        return value
    if value not in SCHEMES:
        raise NameNotFound(f"unknown scheme {value!r}{nearest(value, SCHEMES)}; known: {', '.join(SCHEMES)}")
    return SCHEMES[value]()


def linears(model: nn.Module, pattern: str) -> dict[str, nn.Linear]:
    """The linear layers that a pattern names, or that are below what it names.

    Raises:
        NameNotFound: there are none.
    """
    modules = dict(model.named_modules())
    hits = [path for path, _ in select(pattern, [p for p in modules if p])]
    below = [p for p in modules if any(p == h or p.startswith(h + ".") for h in hits)]
    found = {p: m for p in below if isinstance(m := modules[p], nn.Linear)}
    if not found:
        raise NameNotFound(f"pattern {pattern!r} matches {len(hits)} modules, no nn.Linear among or below them")
    return found


def quantise(
    model: nn.Module, what: str | Mapping[str, str | Scheme], scheme: str | Scheme = "nf4"
) -> dict[str, Scheme]:
    """Replace weights of linear layers by packed ones, in place; biases stay.

    Args:
        what: a pattern, or pattern (or path) -> scheme. "16" is 16 bits: bf16 where the base is wider, else as it is;
            "keep" leaves a layer as it is. Later entries win.
        scheme: for a pattern alone.

    Returns:
        Path -> scheme of every layer that was quantised.

    Raises:
        ConfigError: adapters are attached, a weight is packed already or not floating point, or a group does not divide
            its columns.
        Unsupported: a weight tied to another module's, which would no longer be one.
    """
    if find_state(model) is not None:
        raise ConfigError("quantise the base before attaching adapters")
    given: Mapping[str, str | Scheme] = {what: scheme} if isinstance(what, str) else what
    chosen: dict[str, tuple[nn.Linear, Scheme]] = {}
    for pattern, value in given.items():
        found = linears(model, pattern)
        for path, layer in found.items():
            wanted = sixteen(layer.weight) if value == "16" else None if value == LEFT else scheme_of(value)
            if wanted is None:
                chosen.pop(path, None)
            else:
                chosen[path] = (layer, wanted)
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
    new: dict[str, PackedWeight] = {}
    for path, (layer, s) in chosen.items():
        if owners[id(layer.weight)] > 1:
            raise Unsupported(f"{path}.weight is tied to another module's; leave it out of the pattern with '!'")
        _check_dense(path, layer)
        new[path] = PackedWeight.of(layer.weight.detach(), s)
    for path, packed in new.items():
        chosen[path][0].weight = nn.Parameter(packed, requires_grad=False)
    return {path: s for path, (_, s) in chosen.items()}


def sixteen(w: Tensor) -> Scheme | None:
    """What 16 bits mean for a weight: bf16, or None, nothing to do, where it has no more than that."""
    return None if isinstance(w, PackedWeight) or w.element_size() <= 2 else BF16()


def _check_dense(path: str, layer: nn.Linear) -> None:
    if isinstance(layer.weight, PackedWeight) or not layer.weight.is_floating_point():
        raise ConfigError(f"{path}.weight is packed already or not floating point ({layer.weight.dtype})")


def dequantise(model: nn.Module) -> list[str]:
    """Give every packed layer a dense weight of the same values, in place; returns their paths."""
    if find_state(model) is not None:
        raise ConfigError("detach the adapters before dequantising the base")
    found = {p: m for p, m in model.named_modules() if isinstance(m._parameters.get("weight"), PackedWeight)}
    for m in found.values():
        m.weight = nn.Parameter(m._parameters["weight"].dense(), requires_grad=False)
    return list(found)


def load_bitsandbytes(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Put the NF4 weights of a bitsandbytes checkpoint on the model's linear layers, as they are stored (no second
    rounding); returns their paths. Everything else in `state` is left to `load_state_dict(strict=False)`.

    Raises:
        NameNotFound: a weight for a layer the model does not have.
        ConfigError: another shape.
        FileFormatError: a companion tensor is missing.
    """
    ending = ".weight.quant_state.bitsandbytes__nf4"
    paths = [key.removesuffix(ending) for key in state if key.endswith(ending)]
    layers = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    for path in paths:
        if path not in layers:
            raise NameNotFound(f"the checkpoint has {path}.weight, the model no such layer{nearest(path, layers)}")
        scheme, packed, shape, dtype = from_bitsandbytes(state, f"{path}.weight")
        if shape != layers[path].weight.shape:
            raise ConfigError(f"{path}.weight is {tuple(shape)} there and {tuple(layers[path].weight.shape)} here")
        layers[path].weight = nn.Parameter(PackedWeight(packed, scheme, shape, dtype), requires_grad=False)
    return paths


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all parameters as stored, packed ones by what they take."""
    return sum(p.packed_bytes if isinstance(p, PackedWeight) else p.nbytes for p in model.parameters())


def save_packed(model: nn.Module, path: str | Path) -> None:
    """Write the packed weights (and only them) to one safetensors file, with their schemes."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for name, m in model.named_modules():
        w = m._parameters.get("weight")
        if isinstance(w, PackedWeight):
            tensors |= {f"{name}:{n}": t.cpu().clone() for n, t in w.packed.items()}
            fields = asdict(w.scheme)  # type: ignore[call-overload]
            about[name] = {"scheme": w.scheme.name, "fields": fields, "shape": list(w.shape), "dtype": str(w.dtype)[6:]}
    if not about:
        raise ConfigError("the model has no packed weight")
    save_file(tensors, str(path), {"mmpeft.packed": json.dumps(about)})


def load_packed(model: nn.Module, path: str | Path) -> list[str]:
    """Put the weights of `save_packed` on the linear layers of a model; returns their paths.

    Raises:
        FileFormatError: no such file, or it holds other things.
        NameNotFound: a layer that the model does not have.
        ConfigError: another shape.
    """
    if not Path(path).is_file():
        raise FileFormatError(f"no file {str(path)!r}")
    with safe_open(str(path), "pt") as file:
        text = (file.metadata() or {}).get("mmpeft.packed")
        if text is None:
            raise FileFormatError(f"{path} was not written by save_packed")
        about, tensors = json.loads(text), {k: file.get_tensor(k) for k in file.keys()}
    layers = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, entry in about.items():
        if name not in layers:
            raise NameNotFound(f"the file has {name}.weight, the model no such layer{nearest(name, layers)}")
        old, shape = layers[name].weight, torch.Size(entry["shape"])
        if shape != old.shape:
            raise ConfigError(f"{name}.weight is {tuple(shape)} in the file and {tuple(old.shape)} here")
        packed = {k.rpartition(":")[2]: t.to(old.device) for k, t in tensors.items() if k.rpartition(":")[0] == name}
        scheme = _CLASSES[entry["scheme"]](**entry["fields"])
        weight = PackedWeight(packed, scheme, shape, getattr(torch, entry["dtype"]))
        layers[name].weight = nn.Parameter(weight, requires_grad=False)
    return list(about)


_CLASSES: dict[str, Callable[..., Scheme]] = {"nf4": NF4, "int": Int, "fp8": FP8, "bf16": BF16}
Start = Literal["quantise", "svd"]


def split(
    W: Tensor, rank: int, scheme: Scheme, *, start: Start = "quantise", steps: int = 1
) -> tuple[PackedWeight, Tensor, Tensor]:
    """(Q, A [rank, in], B [out, rank]) with Q + B A near W.

    LoftQ (arXiv 2310.08659) alternates Q = q(W - B A) and B A = SVD_rank(W - Q), from B A = 0, `steps`
    times ("quantise"). SVDQuant (arXiv 2411.05007) takes the leading part out first, B A = SVD_rank(W), Q = q(W - B A):
    "svd".
    """
    W = W.detach().float()
    pair = _svd(W, rank) if start == "svd" else (W.new_zeros(rank, W.shape[1]), W.new_zeros(W.shape[0], rank))
    for _ in range(steps):
        A, B = pair
        Q = PackedWeight.of(W - B @ A, scheme)
        if start == "quantise":
            pair = _svd(W - Q.dense(), rank)
    return Q, *pair


def _svd(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    root = S[:rank].sqrt()
    return root.unsqueeze(1) * Vh[:rank], U[:, :rank] * root


def loftq(
    model: nn.Module,
    plan: PlanLike,
    scheme: str | Scheme = "nf4",
    name: str = "default",
    *,
    start: Start = "quantise",
    steps: int = 5,
    check: bool = True,
) -> nn.Module:
    """Quantise the linear layers that the LoRA rules of a plan name, and attach the plan with A and B making up for the
    rounding: LoftQ's start for fine-tuning, or SVDQuant's split (`start="svd"`, weights only: its 4-bit activations and
    their smoothing need kernels that are not here).

    The file holds A and B; the base they belong to is the quantised one: keep it by `save_packed`, or make it again by
    the same call.

    Args:
        steps: LoftQ's alternations (T; 5 in the paper). Not used with "svd".

    Raises:
        ConfigError: adapters are attached, or the plan has no LoRA on a linear layer.
        Unsupported: LoRA on a role of a fused weight or on another kind of tensor.
    """
    if steps < 1 or start not in ("quantise", "svd"):
        raise ConfigError(f"steps {steps}, start {start!r}; expected at least 1, 'quantise' or 'svd'")
    if find_state(model) is not None:
        raise ConfigError("loftq changes the base: detach the adapters first")
    chosen = scheme_of(scheme)
    attach(model, plan, name, check=check)
    found = [(owner, d) for _, owner, s in slots(model) for _, d in s.deltas((name,)) if type(d.method) is LoRA]
    wrong = [d.site.name for owner, d in found if d.site.rows is not None or not isinstance(owner, nn.Linear)]
    if wrong or not found:
        detach(model, name)
        if wrong:
            raise Unsupported(f"loftq needs whole linear layers: {', '.join(wrong[:4])}")
        raise ConfigError("the plan has no LoRA on a linear layer")
    with torch.no_grad():
        for owner, d in found:
            assert isinstance(d.method, LoRA)
            stored = owner._parameters["weight"]
            assert stored is not None
            Q, A, B = split(stored, d.method.rank, chosen, start=start, steps=1 if start == "svd" else steps)
            packed = PackedWeight(Q.packed, Q.scheme, Q.shape, stored.dtype)
            owner._parameters["weight"] = nn.Parameter(packed, requires_grad=False)
            d.A.copy_(A)
            d.B.copy_(B / d.method.scale)
    return model


def plan_bits(
    model: nn.Module,
    pattern: str,
    budget_bytes: int,
    *,
    schemes: Mapping[str, str | Scheme] | None = None,
    importance: Mapping[str, Tensor] | None = None,
) -> dict[str, str | Scheme]:
    """The allocation of 2, 4, 8 or 16 bits to linear layers that loses least within a budget; give it to `quantise`.

    What a layer loses is sum w (W - q(W))^2. The search is exact (a knapsack over the Pareto front of bytes and loss).
    "16" is bf16 at 2 bytes a number, and loses what that rounds; a base of 16 bits loses nothing by it.

    Args:
        budget_bytes: for the weights of the layers matched.
        schemes: label -> scheme; default int2, int4 (groups of 32) and int8. "16" is always among the choices.
        importance: path -> w [out, in], e.g. squared gradients ("fisher" of `criteria.gather`); default 1.

    Raises:
        ConfigError: even the smallest choice does not fit (the message says what would), a weight is packed already, or
            a scheme is called "16".
    """
    names = dict(schemes) if schemes is not None else {n: n for n in ("int2", "int4", "int8")}
    if "16" in names:
        raise ConfigError("a scheme is called '16', which is bf16 here; give it another label")
    layers = linears(model, pattern)
    options: list[list[tuple[int, float, str]]] = []
    for path, layer in layers.items():
        _check_dense(path, layer)
        W = layer.weight.detach()
        w = None if importance is None else importance[path]
        offered = {label: scheme_of(value) for label, value in names.items()} | {"16": sixteen(W)}
        options.append([_cost(W, w, s, label) for label, s in offered.items()])
    front: list[tuple[int, float, tuple[str, ...]]] = [(0, 0.0, ())]
    for mine in options:
        front = _pareto([(b + x, e + y, (*c, n)) for b, e, c in front for x, y, n in mine if b + x <= budget_bytes])
        if not front:
            least = sum(min(cost[0] for cost in each) for each in options)
            raise ConfigError(f"budget_bytes {budget_bytes} is too small for {len(layers)} layers; {least} would do")
    best = min(front, key=lambda state: (state[1], state[0]))
    return {path: names.get(label, label) for path, label in zip(layers, best[2], strict=True)}


def _cost(W: Tensor, w: Tensor | None, scheme: Scheme | None, label: str) -> tuple[int, float, str]:
    """(bytes, loss, label) of one weight under one scheme; None leaves it as it is."""
    if scheme is None:
        return W.nbytes, 0.0, label
    Q = PackedWeight.of(W, scheme)
    error = (W.float() - Q.dense().float()).square()
    return Q.packed_bytes, float((error if w is None else error * w).double().sum()), label


def _pareto(states: list[tuple[int, float, tuple[str, ...]]]) -> list[tuple[int, float, tuple[str, ...]]]:
    """States that no other one beats in both bytes and loss."""
    kept: list[tuple[int, float, tuple[str, ...]]] = []
    for state in sorted(states):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept


__all__ = [
    "SCHEMES", "dequantise", "linears", "load_bitsandbytes", "load_packed", "loftq", "packed_bytes", "plan_bits",
    "quantise", "save_packed", "scheme_of", "split",
]  # fmt: skip
