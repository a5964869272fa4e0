"""Gates: how much of an adapter a sample gets (UniPELT, Mao et al. 2022, arXiv 2110.07577).

    {"**.attention.self.{query,value}": mmpeft.Gated(mmpeft.LoRA(rank=8)),
     "**.attention.self": mmpeft.Gated(mmpeft.PrefixTuning(num_tokens=10, hidden=512)),
     "**.layer.*.output": mmpeft.Gated(mmpeft.Bottleneck(reduction=16))}        UniPELT on RoBERTa

A gate is a number in (0, 1) for every sample and site, the mean over the tokens of sigmoid(w h + b), where h is what the
adapter itself reads. `WAYS` says, by how a method is made, what h is and what the gate multiplies:

    serial bottlenecks     h: what the call gives        the update
    parallel ones          h: what the call reads        the update
    prefixes               h: what the attention reads   the prefix' keys and values
    weight methods         h: what the layer reads       scale B A h, of methods whose update has that form
    other call methods     h: what the call gives        what the method changes about it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Method, Tensors, method_from, wide, zeros
from mmpeft.adapters.methods.attention import InsideAttention, inside
from mmpeft.adapters.methods.bottleneck import (
    AdaptFormer,
    Bottleneck,
    channels_last,
    first_tensor,
    known_width,
    width_in,
    width_out,
)
from mmpeft.adapters.methods.lora import LoRA
from mmpeft.adapters.methods.low_rank import normal
from mmpeft.adapters.methods.prefix import Prefixed, attend_to
from mmpeft.adapters.site import Site, matrix_tensors, weight_site
from mmpeft.errors import ConfigError, Unsupported

Call = Callable[..., Any]


@dataclass(frozen=True)
class Gated(Method, name="gated"):
    """A method behind a gate of its own, sigmoid(w h + b) averaged over the tokens of a sample (the gates of UniPELT, arXiv
    2110.07577); width + 1 parameters beside the method's. w N(0, 0.02), b 0: a gate starts near 1/2.

    It works on a call: a weight method has to match a layer whole (linear or HF Conv1D, no `[q,v]`) and does not merge.
    The gate is a mean over all tokens of the call, padding included; where a cache feeds one token at a time, of that one.

    Args:
        inner: the method; one whose rows may differ and that needs no controller.

    Raises:
        ConfigError: a method that cannot be gated, or a weight method whose update is not scale B A.
        Unsupported: a layer it cannot read.
    """

    inner: Method = LoRA()
    kind = "call"

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", method_from(self.inner))  # YAML and JSON give a mapping
        m = self.inner
        why = (
            "inserts tokens that all samples share" if m.kind == "tokens"
            else "needs a controller, which would not find it" if m.beside
            else "cannot differ within a batch, as a gate does" if not m.mixes
            else "changes the scores, which a gate does not reach"
            if isinstance(m, InsideAttention) and not isinstance(m, Prefixed)
            else "is a gate already" if isinstance(m, Gated)
            else ""
        )  # fmt: skip
        if why:
            raise ConfigError(f"Gated({type(m).__name__}()): it {why}")

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, "inner": self.inner.to_dict()}

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        module = context.module
        made, facts = self._made(site, context)
        reads = width_in if way_of(self.inner)[1] else width_out
        given = getattr(self.inner, "dim", None)
        like = next(module.parameters(), torch.empty(0))
        width = known_width(given or reads(module), site, module)
        gate = {"gate_weight": normal(width, std=0.02, like=like), "gate_bias": zeros(1, like=like)}
        return Tensors({**made.trained, **gate}, made.frozen, made.derived, {**made.facts, **facts})

    def _made(self, site: Site, context: Context) -> tuple[Tensors, dict[str, Any]]:
        """The method's own tensors and, of a weight method, the layer."""
        if self.inner.kind == "call":
            return self.inner.init(site, None, context), {}
        owner = context.module
        if not (isinstance(owner, nn.Linear) or hasattr(owner, "nf")) or matrix_tensors(owner) != ["weight"]:
            raise Unsupported(
                f"{site.path} is a {type(owner).__name__}; a gated {type(self.inner).__name__} goes on a linear layer"
            )
        place = weight_site(site.path, owner, "weight")
        assert place.layout is not None
        self.inner.check(place)
        base = place.layout.to_matrix(owner._parameters["weight"]).detach()  # type: ignore[arg-type]
        made = self.inner.init(place, base, context)
        f = self.inner.factors(base, Delta(self.inner, place, made, 0))
        if f is None or not f.additive or f.A is None:
            raise ConfigError(f"Gated({type(self.inner).__name__}()): a gate needs an update of the form scale B A")
        return made, {"owner": owner, "layout": place.layout}

    def gate(self, h: Tensor, p: Delta) -> Tensor:
        """h [B, ..., width] or [B, width, ...] -> [B], at least fp32."""
        h, _ = channels_last(h, p.gate_weight.shape[0], p.site)
        logits = F.linear(h, p.gate_weight.to(h.dtype).unsqueeze(0), p.gate_bias.to(h.dtype)).to(wide(h.dtype))
        return torch.sigmoid(logits).flatten(1).mean(1)

    def around(self, p: Delta, call: Call, *args: Any, **kwargs: Any) -> Any:
        return way_of(self.inner)[0](self, p, call, args, kwargs)

    def lr_ratio_of(self, parameter: str) -> float:
        return 1.0 if parameter.startswith("gate_") else self.inner.lr_ratio_of(parameter)

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        own = {n: t for n, t in tensors.items() if not n.startswith("gate_")}
        return self.inner.flops(site, own) + 2 * tensors["gate_weight"].numel()


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The call's main tensor."""
    found: Tensor = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
    return found


def _by(g: Tensor, t: Tensor) -> Tensor:
    """t [B, ...] times g [B]."""
    return t * g.to(t.dtype).view(-1, *(1,) * (t.ndim - 1))


def _serial(self: Gated, p: Delta, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    y, put = first_tensor(call(*args, **kwargs))
    return put(y + _by(self.gate(y, p), self.inner.update(y, p)))  # type: ignore[attr-defined]


def _parallel(self: Gated, p: Delta, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = _input(args, kwargs)
    update = _by(self.gate(x, p), self.inner.update(x, p))  # type: ignore[attr-defined]
    y, put = first_tensor(call(*args, **kwargs))
    return put(y + update)


def _prefix(self: Gated, p: Delta, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    g = self.gate(_input(args, kwargs), p)
    K, V = (_by(g, t.expand(len(g), *t.shape)) for t in self.inner.prefix(p))  # type: ignore[attr-defined]
    return inside(partial(attend_to, K, V, p.facts["kv"]), call, args, kwargs)


def _weight(self: Gated, p: Delta, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, m = _input(args, kwargs), self.inner
    f = m.factors(p.facts["layout"].to_matrix(p.facts["owner"]._parameters["weight"]), p)
    assert f is not None and f.A is not None and f.B is not None
    h = F.linear(F.dropout(x, m.dropout, p.training), f.A.to(x.dtype))
    update = F.linear(h, (f.B * f.scale).to(x.dtype))
    g = self.gate(x, p)
    return call(*args, **kwargs) + _by(g, update)


def _change(self: Gated, p: Delta, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first = _input(args, kwargs)
    seen: list[Tensor] = []

    def noted(*a: Any, **k: Any) -> Any:
        output = call(*a, **k)
        if _input(a, k) is first:
            seen.append(first_tensor(output)[0])
        return output

    changed, put = first_tensor(self.inner.around(p, noted, *args, **kwargs))
    y = seen[0] if seen else first_tensor(call(*args, **kwargs))[0]  # a method that changes what goes in
    return put(y + _by(self.gate(y, p), changed - y))


Way = tuple[Callable[[Gated, Delta, Call, tuple[Any, ...], dict[str, Any]], Any], bool]
WAYS: dict[
    Any, Way
] = {  # by what adapts the call, ungated: how it is gated, and whether the gate reads the call's input
    Bottleneck.around: (_serial, False),
    AdaptFormer.around: (_parallel, True),
    InsideAttention.around: (_prefix, True),
    Method.around: (_weight, True),
}


def way_of(method: Method) -> Way:
    """How a method is gated."""
    around = InsideAttention.around if isinstance(method, Prefixed) else type(method).around
    return WAYS.get(around, (_change, False))
