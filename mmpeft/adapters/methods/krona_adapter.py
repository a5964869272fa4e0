"""KronA's parallel forms: a Kronecker product beside a frozen call (Edalati et al. 2022, arXiv 2212.10650).

    KronAB      call(x) + s x (A (x) B)^T, beside the feed-forward
    KronARes    the same plus a trained share of the input, + s_res x

The product itself, its start and its parameters are KronA's. Nothing here is non-linear, but the call in between is, so
neither merges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmpeft.adapters.method import Context, Delta, Method, Tensors, zeros
from mmpeft.adapters.methods.bottleneck import first_tensor, known_width, width_in, width_out
from mmpeft.adapters.methods.kronecker import factor_pair, kron
from mmpeft.adapters.methods.low_rank import kaiming
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class KronAB(Method, name="krona-b", aliases=("kronab",)):
    """`call(x) + scale * (A (x) B) x` along the last axis, A [a1, a2] Kaiming-uniform, B [out / a1, in / a2] 0 (KronA^B
    of arXiv 2212.10650, beside the feed-forward); a1 a2 + out in / (a1 a2) parameters.

    Args:
        a1, a2: as in `KronA`.
        scale: the paper's s.
    """

    a1: int | None = None
    a2: int | None = None
    scale: float = 1.0
    kind = "call"

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        module = context.module
        out, into = (known_width(w, site, module) for w in (width_out(module), width_in(module)))
        a1, a2 = self.a1 or factor_pair(out, -1)[0], self.a2 or factor_pair(into, -1)[0]
        if out % a1 or into % a2:
            raise ConfigError(f"a1 {a1}, a2 {a2} at {site.path} do not divide its widths of {out} and {into}")
        like = next(module.parameters())
        return Tensors({"A": kaiming(a1, a2, like=like), "B": zeros(out // a1, into // a2, like=like)})

    def added(self, x: Tensor, p: Delta) -> Tensor:
        """What is added to the call, [..., out]."""
        out: Tensor = self.scale * (x @ kron(p.A, p.B).mT.to(x.dtype))
        return out

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        update = self.added(x, p)  # before the call, which may work in place on x
        y, put = first_tensor(call(*args, **kwargs))
        return put(y + update)

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        # (A (x) B) x is A X B^T of the reshaped input.
        (a1, a2), (b1, b2) = tensors["A"].shape, tensors["B"].shape
        return int(2 * a2 * b2 * b1 + 2 * a2 * b1 * a1)


@dataclass(frozen=True)
class KronARes(KronAB, name="krona-res", aliases=("kronares", "krona-b-res")):
    """KronAB with a trained residual, `call(x) + scale * (A (x) B) x + s_res * x` (KronA^B_res of arXiv 2212.10650); one
    parameter more.

    Choice: s_res starts at 0, the identity.
    """

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        made = super().init(site, base, context).trained
        A, B = made["A"], made["B"]
        if A.shape[0] * B.shape[0] != A.shape[1] * B.shape[1]:
            raise ConfigError(f"{site.path} changes the width; its input cannot be added to its output")
        return Tensors({**made, "s_res": zeros(1, like=A)})

    def added(self, x: Tensor, p: Delta) -> Tensor:
        residual: Tensor = p.s_res.to(x.dtype) * x
        return super().added(x, p) + residual
