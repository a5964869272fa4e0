"""Methods that work on the grid of a quantised base.

    QALoRA   Xu et al. 2023, arXiv 2309.14717: the adapter sees the mean of each input group and merges into zeros.
    PEQA     Kim et al. 2023, arXiv 2305.14152: integers stay, their scales are trained.
    LRQAT    Bondarenko et al. 2024, arXiv 2406.06385: the pair is added before rounding; the result is integers again.

Quantise the base first (`quantise.py`). QLoRA is `quantise(model, ..., "nf4")` and LoRA; it needs no method of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mmpeft.adapters.attach import detach
from mmpeft.adapters.method import Context, Delta, Factors, Method, Tensors, wide, zeros
from mmpeft.adapters.methods.low_rank import LowRank, check_divides, check_matrix, kaiming
from mmpeft.adapters.site import Site
from mmpeft.adapters.state import slots, state_of
from mmpeft.adapters.storage.integer import SMALLEST, Int, pack
from mmpeft.adapters.storage.packed_weight import PackedWeight
from mmpeft.errors import ConfigError, Unsupported


@dataclass(frozen=True)
class QALoRA(LowRank, name="qa-lora", aliases=("qalora",)):
    """`W' = W + alpha / rank * B (A kron 1^T / group)`: A [rank, in / group] acts on the mean of each group of inputs
    (arXiv 2309.14717); rank (in / group + out) parameters. On a base of `Int(bits, group, affine=True)`, `merge_qalora`
    puts it into the zeros without rounding.

    Args:
        group: inputs that share a column of A; divides the columns.
    """

    group: int = 32

    def check(self, site: Site) -> None:
        super().check(site)
        check_divides("group", site.shape[-1], self.group, "columns", site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        *stack, out, into = base.shape
        A = kaiming(*stack, self.rank, into // self.group, like=base)
        return Tensors({"A": A, "B": zeros(*stack, out, self.rank, like=base)})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        return Factors(p.A.repeat_interleave(self.group, -1) / self.group, p.B, self.scale)


def merge_qalora(model: nn.Module, name: str) -> list[str]:
    """Put adapter `name`, all QALoRA, into the zero points of its packed weights and detach it; integers and scales
    stay as they are. Returns the sites.

    Raises:
        Unsupported: a site whose base is not affine integers of the same group.
    """
    state_of(model).check_names([name])
    found = [(owner, d) for _, owner, s in slots(model) for _, d in s.deltas((name,))]
    for owner, d in found:
        w, m = owner._parameters.get(d.site.tensor), d.method
        grid = w.scheme if isinstance(w, PackedWeight) else None
        if not isinstance(m, QALoRA) or not isinstance(grid, Int) or not grid.affine or grid.group != m.group:
            raise Unsupported(f"{d.site.name}: {m} does not merge into zeros of {grid}; quantise to Int(affine=True)")
        if d.site.rows is not None:
            raise Unsupported(f"{d.site.name}: only whole weights merge into zeros")
    with torch.no_grad():
        for owner, d in found:
            assert isinstance(d.method, QALoRA)
            packed = cast(PackedWeight, owner._parameters[d.site.tensor]).packed
            packed["zero"] += d.method.scale / d.method.group * (d.B @ d.A)
    detach(model, name)
    return [d.site.name for _, d in found]


@dataclass(frozen=True)
class PEQA(Method, name="peqa"):
    """`W' = (s + ds) (W_int - z)`: the integers and zero points of the base stay and their scales are trained (arXiv
    2305.14152); one number a row, or a group of a row. Only on a base packed by `Int`, symmetric (z = 0) or affine,
    whose scales it starts from.

    Since W = s (W_int - z), W' = (1 + ds / s) W. With one scale a row it is a row factor and runs beside the packed
    call; with groups W' is formed. Choice: a group of equal numbers has no scale of its own (W_int is 0 and any s
    describes it), and s is their size.

    Args:
        group: columns that share a scale; must be the base's. None is a row.
    """

    group: int | None = None

    def check(self, site: Site) -> None:
        check_matrix(self, site)
        if site.rows is not None:
            raise Unsupported(f"{site.name}: PEQA trains the scales of whole weights; match the module without [roles]")
        if self.group is not None:
            check_divides("group", site.shape[-1], self.group, "columns", site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        groups = 1 if self.group is None else base.shape[1] // self.group
        if base.is_meta:
            s = zeros(base.shape[0], groups, like=base)
        else:
            stored = context.module._parameters.get(site.tensor)
            grid = stored.scheme if isinstance(stored, PackedWeight) else None
            if not isinstance(grid, Int) or grid.group != self.group:
                raise ConfigError(
                    f"PEQA(group={self.group}) at {site.name} trains scales of integers, and the base is "
                    f"{grid or 'dense'}; call mmpeft.quantise(model, ..., Int(bits, group={self.group})) first"
                )
            assert isinstance(stored, PackedWeight)
            s = stored.packed["scale"].to(wide(base.dtype), copy=True)
            level = stored.packed["zero"].to(s).abs() if grid.affine else torch.zeros_like(s)
            s = torch.where(s > SMALLEST, s, torch.where(level > 0, level, 1))
        return Tensors({"ds": torch.zeros_like(s)}, derived={"s": s})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        ratio: Tensor = 1 + p.ds / p.s
        scaled: Tensor = W.view(len(W), ratio.shape[1], -1) * ratio.unsqueeze(-1)
        return scaled.flatten(1)

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        return Factors(row=(1 + p.ds / p.s).squeeze(1)) if self.group is None else None


@dataclass(frozen=True)
class LRQAT(LowRank, name="lr-qat", aliases=("lrqat",)):
    """`W' = s clip(round(W / s0 + alpha / rank * B A), -2^(bits-1), 2^(bits-1) - 1)`, a straight-through gradient
    through the rounding; A, B and the row scales s are trained (arXiv 2406.06385); rank (in + out) + out parameters. s
    starts at s0 = max|W| / (2^(bits-1) - 1), so the start is the rounded weight and not the identity.

    The update is in units of the grid and W' is formed. `integers` gives the low-bit matrix that is deployed.

    Choice: the paper's downcast of W / s0 is storage; quantise the base (fp8, int8) for it.

    Args:
        bits: 2, 4 or 8.
    """

    bits: int = 4
    identity_at_init = False
    mixes = False

    def __post_init__(self) -> None:
        super().__post_init__()
        Int(self.bits)
        if self.dropout:
            raise ConfigError(f"dropout {self.dropout}: the pair is rounded together with W, so there is none here")

    def check(self, site: Site) -> None:
        check_matrix(self, site)
        super().check(site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        W = base.to(wide(base.dtype))
        s = W.abs().amax(1) / (2 ** (self.bits - 1) - 1)
        s = s.clamp_min(torch.finfo(s.dtype).tiny)
        return Tensors({**self.pair(base), "s": s}, frozen={"s0": s.clone()})

    def codes(self, W: Tensor, p: Delta) -> Tensor:
        """The integers, with the straight-through gradient."""
        x: Tensor = W / p.s0.unsqueeze(1) + self.scale * (p.B @ p.A)
        half = 2 ** (self.bits - 1)
        x = x.clamp(-half, half - 1)
        return x + (x.round() - x).detach()

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        out: Tensor = self.codes(W, p) * p.s.unsqueeze(1)
        return out

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        return None

    def integers(self, W: Tensor, p: Delta) -> PackedWeight:
        """The result as a packed weight: W', `bits` a weight and a scale a row. W [out, in]."""
        with torch.no_grad():
            half = 2 ** (self.bits - 1)
            codes = (self.codes(W, p) + half).to(torch.uint8)
            s = p.s.detach().float().unsqueeze(1)
            packed = {"codes": pack(codes.flatten(), self.bits), "scale": s, "zero": -half * s}
        return PackedWeight(packed, Int(self.bits, affine=True), W.shape, W.dtype)
