"""Low-rank methods whose rank is not one fixed number; what changes it over the steps is a policy of
`rank_policies.py`.

    DyLoRA     Valipour et al. 2023, arXiv 2210.07558: a rank drawn each step, so that every smaller rank works after.
               (The survey says gradient norms choose it; the draw is blind.)
    AdaLoRA    Zhang et al. 2023, arXiv 2303.10512: P diag(lam) Q whose triplets share one shrinking budget.
    SoRA       Ding et al. 2023, arXiv 2311.11696: a gate between A and B, made sparse by proximal steps. The survey's
               "SLoRA".
    IncreLoRA  Zhang et al. 2023, arXiv 2308.12043: P diag(lam) Q grown one triplet at a time where it matters.
    AutoLoRA   Zhang et al. 2024, arXiv 2403.09113: rank-one parts weighted on a simplex that a validation split learns.
    CapaBoost  Song et al. 2024, arXiv 2407.01320: tied weights under fixed random masks add up to a higher rank. (The survey says it
               chooses the rank; it chooses nothing.)

Which components are in use is data of the adapter (`mask`, `size`, zeros of `g`), so it is in the file; `compact` of
`compact.py` then makes the tensors as small as that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmpeft.adapters.method import Context, Delta, Factors, Tensors, zeros
from mmpeft.adapters.methods.low_rank import LowRank, at_least, normal, one_of, site_seed
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class Elastic(LowRank):
    """A low-rank method some of whose components may be out of use.

    `AXES` says where the rank axis of each tensor is (None: it has none).
    """

    AXES: ClassVar[dict[str, int | None]] = {}

    def kept(self, p: Delta) -> Tensor:
        """Which components take part, [*, rank] bool."""
        raise NotImplementedError

    def resized(self, rank: int) -> LowRank:
        """The same method at another rank and the same scale."""
        return replace(self, rank=rank, alpha=None if self.alpha is None else self.alpha * rank / self.rank)


@dataclass(frozen=True)
class DyLoRA(Elastic, name="dylora"):
    """`W' = W + alpha / b * B[:, :b] A[:b]`, b drawn each training step from min_rank..rank (arXiv 2210.07558); rank
    (in + out) parameters. In eval b is `size`, `rank` until `set_rank` says otherwise. alpha None is a scale of 1.

    Args:
        min_rank: smallest b.
        update: "all" trains the first b components, "last" the b-th alone (the paper's "frozen" mode).
    """

    beside = ("Sampled",)
    min_rank: int = 1
    update: Literal["all", "last"] = "all"
    AXES = {"A": -2, "B": -1, "size": None, "draw": None}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("update", self.update, ("all", "last"))
        if not 1 <= self.min_rank <= self.rank:
            raise ConfigError(f"min_rank {self.min_rank}; expected 1 to rank, which is {self.rank}")

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        size = zeros(*base.shape[:-2], 1, like=base) + self.rank
        return Tensors(self.pair(base), frozen={"size": size}, derived={"draw": size.clone()})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        b: Tensor = p.draw if p.training else p.size
        place = torch.arange(self.rank, device=b.device)
        A, B = p.A, p.B
        if p.training and self.update == "last":
            last = place == b - 1
            A = torch.where(last.unsqueeze(-1), A, A.detach())
            B = torch.where(last.unsqueeze(-2), B, B.detach())
        scale = 1.0 if self.alpha is None else self.alpha / b
        return Factors(A, B * ((place < b) * scale).to(B.dtype).unsqueeze(-2))

    def kept(self, p: Delta) -> Tensor:
        kept: Tensor = torch.arange(self.rank, device=p.size.device) < p.size
        return kept

    def resized(self, rank: int) -> LowRank:
        return replace(self, rank=rank, min_rank=min(self.min_rank, rank))  # the scale follows b


@dataclass(frozen=True)
class AdaLoRA(Elastic, name="adalora"):
    """`W' = W + alpha / rank * P diag(lam) Q`, P [out, rank] and Q [rank, in] kept near orthonormal by a penalty, lam 0
    at the start (arXiv 2303.10512); rank (in + out + 1) parameters. A `Budget` policy zeroes the least important lam.

    Args:
        rank: the paper's initial rank r(0); the budget then falls to the policy's target.
        std: of the normal start of P and Q.
    """

    beside = ("Budget",)
    std: float = 0.02
    AXES = {"P": -1, "Q": -2, "lam": -1, "mask": -1}

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        *stack, out, into = base.shape
        lam = zeros(*stack, self.rank, like=base)
        P = normal(*stack, out, self.rank, std=self.std, like=base)
        Q = normal(*stack, self.rank, into, std=self.std, like=base)
        return Tensors({"P": P, "lam": lam, "Q": Q}, frozen={"mask": torch.ones_like(lam)})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        # lam of a masked triplet is zeroed by the policy and not here, so that its gradient may bring it back.
        return Factors(p.lam.unsqueeze(-1) * p.Q, p.P, self.scale)

    def kept(self, p: Delta) -> Tensor:
        kept: Tensor = p.mask != 0
        return kept


@dataclass(frozen=True)
class SoRA(Elastic, name="sora", aliases=("slora",)):
    """`W' = W + alpha / rank * B diag(g) A` with a trained gate g from 1 (arXiv 2311.11696); rank (in + out + 1)
    parameters. A `Proximal` policy soft-thresholds g after each step; a gate at 0 is a component out of use."""

    beside = ("Proximal",)
    AXES = {"A": -2, "B": -1, "g": -1}

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        gate = torch.ones_like(zeros(*base.shape[:-2], self.rank, like=base))
        return Tensors({**self.pair(base), "g": gate})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        return Factors(p.g.unsqueeze(-1) * p.A, p.B, self.scale)

    def kept(self, p: Delta) -> Tensor:
        kept: Tensor = p.g != 0
        return kept


@dataclass(frozen=True)
class IncreLoRA(Elastic, name="increlora"):
    """`W' = W + alpha / rank * P diag(lam) Q` over the triplets in use and one in reserve (arXiv 2308.12043): one
    triplet at first, more by a `Growth` policy, at most `rank`. Room for `rank` (in + out + 1) parameters is allocated;
    unused triplets get no gradient.

    The reserve is the paper's advance learning: its lam is held at `start`, small, so that P and Q of the next triplet
    are warm when it is taken. The start is the identity up to that.

    Args:
        rank: most triplets a site may have.
        start: lam of a new triplet.
        std: of the normal start of P and Q.
    """

    beside = ("Growth",)
    start: float = 1e-5
    std: float = 0.02
    AXES = {"P": -1, "Q": -2, "lam": -1, "mask": -1}

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        *stack, out, into = base.shape
        lam = zeros(*stack, self.rank, like=base) + self.start
        mask = torch.zeros_like(lam)
        mask[..., 0] = 1
        P = normal(*stack, out, self.rank, std=self.std, like=base)
        Q = normal(*stack, self.rank, into, std=self.std, like=base)
        return Tensors({"P": P, "lam": lam, "Q": Q}, frozen={"mask": mask})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        reserve = p.mask.roll(1, -1) * (1 - p.mask)
        lam = p.lam * p.mask + self.start * reserve
        return Factors(lam.unsqueeze(-1) * p.Q, p.P, self.scale)

    def kept(self, p: Delta) -> Tensor:
        kept: Tensor = p.mask != 0
        return kept


@dataclass(frozen=True)
class AutoLoRA(Elastic, name="autolora"):
    """`W' = W + alpha / rank * sum_j w_j b_j a_j^T`, w = softmax(logits) uniform at the start (arXiv 2403.09113); rank
    (in + out + 1) parameters while searching. `AutoLoRASearch` (`autolora.py`) learns the logits on a validation split
    and gives the plan of the ranks it found; an ordinary optimizer leaves them alone (their lr ratio is 0).

    Args:
        threshold: components with w below it are dropped; None means 1 / rank.
    """

    beside = ("AutoLoRARanks", "AutoLoRASearch")
    threshold: float | None = None
    AXES = {"A": -2, "B": -1, "logits": -1}

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        return Tensors({**self.pair(base), "logits": zeros(*base.shape[:-2], self.rank, like=base)})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        return Factors(p.A, p.B * p.logits.softmax(-1).unsqueeze(-2), self.scale)

    def kept(self, p: Delta) -> Tensor:
        least = 1 / self.rank if self.threshold is None else self.threshold
        w: Tensor = p.logits.softmax(-1)
        return w >= least * (1 - 1e-6)  # at the uniform start nothing is dropped

    def lr_ratio_of(self, parameter: str) -> float:
        return 0.0 if parameter == "logits" else 1.0


@dataclass(frozen=True)
class CapaBoost(LowRank, name="capaboost", aliases=("capabooster",)):
    """`W' = W + alpha / rank * sum_j (B * N_j)(A * M_j)`, j = 1..d, over one pair A, B and fixed random masks M_j
    [rank, in], N_j [out, rank] (Song et al., arXiv 2407.01320; also called CapaBooster); rank up to d rank from rank (in +
    out) parameters.

    Args:
        d: number of masked copies.
        density: share of ones in a mask.
        seed: of the masks, which files do not hold.
    """

    d: int = 2
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, d=1)
        if not 0 < self.density <= 1:
            raise ConfigError(f"density {self.density}; expected 0 < density <= 1")

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        *stack, out, into = base.shape
        generator = site_seed(self.seed, site)
        shapes = {"M": (*stack, self.d, self.rank, into), "N": (*stack, self.d, out, self.rank)}
        masks = {n: self._mask(shape, base, generator) for n, shape in shapes.items()}
        return Tensors(self.pair(base), derived=masks)

    def _mask(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
        if like.is_meta:
            return torch.zeros(shape, dtype=torch.bool, device=like.device)
        return (torch.rand(shape, generator=generator, device="cpu") < self.density).to(like.device)

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        A = (p.A.unsqueeze(-3) * p.M).flatten(-3, -2)  # [*, d rank, in]
        B = (p.B.unsqueeze(-3) * p.N).transpose(-3, -2).flatten(-2)  # [*, out, d rank]
        return Factors(A, B, self.scale)


__all__ = ["AdaLoRA", "AutoLoRA", "CapaBoost", "DyLoRA", "Elastic", "IncreLoRA", "SoRA"]
