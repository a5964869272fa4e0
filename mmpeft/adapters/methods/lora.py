"""LoRA and its closest kin: low-rank updates of a weight, `W' = W + scale * B A`.

    LoRA   Hu et al. 2021, arXiv 2106.09685. rsLoRA (2312.03732) changes the scale to alpha / sqrt(rank), LoRA+
           (2402.12354) trains B with a larger learning rate, PiSSA (2404.02948) and OLoRA (2406.01775) start from the
           weight's own SVD or QR factors.
    DoRA   Liu et al. 2024, arXiv 2402.09353: magnitude and direction apart.
    VeRA   Kopiczko et al. 2024, arXiv 2310.11454: one frozen random pair for all sites, two trained vectors a site.

Choice: PiSSA and OLoRA keep the base untouched. The papers subtract the starting product from W; here the residual is a
frozen second pair (A0, B0) inside the adapter, `W' = W + s (B A - B0 A0)`, which is the same function and leaves every
other adapter, and `use(None)`, on the true base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Factors, Method, Tensors, check_rank, wide, zeros
from mmpeft.adapters.site import Site
from mmpeft.adapters.versions import versions_tell
from mmpeft.errors import ConfigError, Unsupported
from mmpeft.kernels.dora import RowNorms, row_norm

NORMS = RowNorms()
Init = Literal["default", "gaussian", "orthogonal", "pissa", "olora"]


@dataclass(frozen=True)
class LoRA(Method, name="lora"):
    """Low-rank adaptation, `W' = W + alpha / rank * B A` with A [rank, in], B [out, rank] (arXiv 2106.09685).

    Args:
        rank: inner width, 1 to min(out, in).
        alpha: numerator of the scale; None means `rank`, a scale of 1.
        dropout: on the adapter's input, in training; needs a site that is called (not one whose weight is read). Every site
            draws a mask of its own; inside the fused blocks of `mmpeft.compile`, linears that share their input (q, k and
            v; gate and up) share its mask.
        rslora: scale alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732).
        lr_ratio: learning rate of B over that of A (LoRA+, arXiv 2402.12354; the paper suggests 16).
        init_from: "default" (A Kaiming-uniform, B 0), "gaussian" (A N(0, 1/rank)), "orthogonal" (A of orthogonal rows),
            "pissa" (top singular pairs of W), "olora" (QR of W).

    Raises:
        ConfigError: rank outside 1..min(out, in), dropout outside [0, 1), an unknown init_from.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    lr_ratio: float = 1.0
    init_from: Init = "default"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank {self.rank}; expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout {self.dropout}; expected 0 <= dropout < 1")
        if self.init_from not in _INITS:
            raise ConfigError(f"init_from {self.init_from!r}; expected one of {', '.join(_INITS)}")
        if self.lr_ratio <= 0:
            raise ConfigError(f"lr_ratio {self.lr_ratio}; expected a positive factor")

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank)."""
        alpha = self.rank if self.alpha is None else self.alpha
        return float(alpha / (self.rank**0.5 if self.rslora else self.rank))

    def check(self, site: Site) -> None:
        check_rank(self.rank, site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        A, B = _INITS[self.init_from](base, self.rank, self.scale)
        started = self.init_from in ("pissa", "olora")  # from a non-zero product, which the frozen pair takes off again
        return Tensors({"A": A, "B": B}, frozen={"A0": A.clone(), "B0": B.clone()} if started else {})

    def factors(self, W: Tensor, p: Delta) -> Factors:
        if "A0" in p._parameters:
            return Factors(torch.cat([p.A, p.A0], -2), torch.cat([p.B, -p.B0], -1), self.scale)
        return Factors(p.A, p.B, self.scale)

    def lr_ratio_of(self, parameter: str) -> float:
        return self.lr_ratio if parameter == "B" else 1.0


@dataclass(frozen=True)
class LoRAPlus(LoRA, name="lora+", aliases=("lora++", "loraplus")):
    """LoRA+ (arXiv 2402.12354): LoRA whose B learns `lr_ratio` times as fast as A, that is `LoRA(lr_ratio=16)` under
    its own name. The survey's "LoRA++", which it takes for a remedy against forgetting."""

    lr_ratio: float = 16.0


@dataclass(frozen=True)
class DoRA(LoRA, name="dora"):
    """Weight-decomposed LoRA, `W' = m * (W + s B A) / ||W + s B A||`, norms per output row, m starts at ||W||
    (arXiv 2402.09353). The norm is a constant of the backward, as in section 4.3 of the paper.

    The norm never forms B A, and is formed once an optimizer step (`kernels.dora`).
    """

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        low_rank = super().init(site, base, context)
        magnitude = torch.linalg.vector_norm(base.to(wide(base.dtype)), dim=-1)
        return Tensors({**low_rank.trained, "m": magnitude}, frozen=low_rank.frozen)

    def factors(self, W: Tensor, p: Delta) -> Factors:
        f = super().factors(W, p)
        assert f.A is not None and f.B is not None
        A, B = f.A.detach(), f.B.detach()
        sources = [getattr(p, n) for n in p.saved if n != "m"]
        norm = NORMS.of(p, W, A, B, f.scale, sources) if versions_tell() else row_norm(W, A, B, f.scale)
        return Factors(f.A, f.B, f.scale, row=p.m / norm)

    def lr_ratio_of(self, parameter: str) -> float:
        return self.lr_ratio if parameter == "B" else 1.0


@dataclass(frozen=True)
class VeRA(Method, name="vera"):
    """Vector-based random adaptation, `W' = W + diag(b) B diag(d) A` with A and B frozen, random and shared by all
    sites of the adapter; trained: d [rank] from `d_initial`, b [out] from 0 (arXiv 2310.11454).

    A [rank, max in] and B [max out, rank] are drawn once from `seed` (Kaiming-uniform, A first, on the CPU, the very
    numbers of HF PEFT) at the largest sizes among the rule's sites, and each site takes its leading columns and rows.
    Files hold d, b and the seed, and with `save_projection` A and B too (for projections that came from elsewhere).
    """

    rank: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    seed: int = 0
    save_projection: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank {self.rank}; expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout {self.dropout}; expected 0 <= dropout < 1")

    def check(self, site: Site) -> None:
        if len(site.shape) != 2:
            raise Unsupported(
                f"VeRA shares one matrix pair and cannot adapt the stack {site.name} of shape {site.shape}"
            )

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        out, rank = base.shape[0], self.rank
        sizes = (max(s.shape[1] for s in context.sites), max(s.shape[0] for s in context.sites))
        key = (self.name, self.seed, self.rank, sizes)
        first = key not in context.shared
        if first:
            generator = torch.Generator().manual_seed(self.seed)
            context.shared[key] = [
                nn.Parameter(projection(*shape, generator).to(base.device, wide(base.dtype)), False)
                for shape in ((self.rank, sizes[0]), (sizes[1], self.rank))
            ]
        A, B = context.shared[key]
        d = torch.full((rank,), self.d_initial, dtype=wide(base.dtype), device=base.device)
        saved = {"A": A, "B": B} if first and self.save_projection else {}  # shared by all sites, saved by one
        derived = {} if saved else {"A": A, "B": B}
        return Tensors({"d": d, "b": zeros(out, like=base)}, frozen=saved, derived=derived)

    def factors(self, W: Tensor, p: Delta) -> Factors:
        out, into = W.shape
        return Factors(p.d.unsqueeze(-1) * p.A[:, :into], p.b.unsqueeze(-1) * p.B[:out], 1.0)

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        return 2 * self.rank * sum(site.shape)


def projection(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """One of VeRA's matrices: Kaiming-uniform with gain sqrt(2), U(+-sqrt(6 / columns)), in fp32."""
    bound = 3**0.5 * (2**0.5 / columns**0.5)  # in this order, so that every bit is HF PEFT's
    return torch.empty(rows, columns, device="cpu").uniform_(-bound, bound, generator=generator)


def _kaiming(t: Tensor) -> Tensor:
    """Kaiming-uniform with a = sqrt(5) over the last axis, the init of nn.Linear and of HF PEFT: U(+-1/sqrt(in))."""
    bound = t.shape[-1] ** -0.5
    return t.uniform_(-bound, bound) if not t.is_meta else t


def _default(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    *stack, out, into = W.shape
    return _kaiming(zeros(*stack, rank, into, like=W)), zeros(*stack, out, rank, like=W)


def _gaussian(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    *stack, out, into = W.shape
    return zeros(*stack, rank, into, like=W).normal_(std=1 / rank), zeros(*stack, out, rank, like=W)


def _orthogonal(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    A, B = _default(W, rank, scale)
    for matrix in A.reshape(-1, *A.shape[-2:]):
        nn.init.orthogonal_(matrix)
    return A, B


def _pissa(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W.detach().to(wide(W.dtype)), full_matrices=False)
    root = (S[..., :rank] / scale).sqrt()
    return (root.unsqueeze(-1) * Vh[..., :rank, :]).contiguous(), (U[..., :rank] * root.unsqueeze(-2)).contiguous()


def _olora(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(W.detach().to(wide(W.dtype)))
    return (R[..., :rank, :] / scale).contiguous(), Q[..., :rank].contiguous()


_INITS = {"default": _default, "gaussian": _gaussian, "orthogonal": _orthogonal, "pissa": _pissa, "olora": _olora}
