"""Variants of LoRA that change what is trained, or what stands between A and B.

    LoRA-FA     Zhang et al. 2023, arXiv 2308.03303: A stays at its random start, only B is trained.
    LoRA-XS     Balazy et al. 2024, arXiv 2405.17604: between the top singular factors of W, only an r x r matrix is
                trained.
    MoSLoRA     Wu et al. 2024, arXiv 2406.11909: a trained mixer between A and B. (The survey calls it MoLE in one
                place.)
    Kernel-mix  Chen et al. 2022, arXiv 2205.03720: LoRA plus a small pair of its own for every head.
    Delta-LoRA  Zi et al. 2023, arXiv 2309.02411: the weight follows the change of BA.
    RoseLoRA    Wang et al. 2024, arXiv 2406.10777: rows of A and columns of B kept sparse. The survey files it under
                transfer.
    DeLoRA      Bini et al. 2025, arXiv 2503.18225: angle and strength of every rank-one part apart.
    RandLoRA    Albert et al. 2025, arXiv 2502.00987: a full-rank sum of frozen random pairs with trained diagonals.

All give `factors()`, so they run beside the frozen call, take dropout and mix in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Factors, Tensors, wide, zeros
from mmpeft.adapters.methods.low_rank import (
    LowRank,
    at_least,
    check_divides,
    check_matrix,
    kaiming,
    one_of,
    seeded_normal,
)
from mmpeft.adapters.site import Site
from mmpeft.adapters.state import slots
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class LoRAFA(LowRank, name="lora-fa", aliases=("lorafa",)):
    """LoRA with A frozen at its random start (arXiv 2308.03303): rank out trained parameters, and the input of the site
    need not be kept for the backward. A is saved with the adapter. (HF PEFT's LoRA-FA is an optimizer that also
    rescales B's gradient.)
    """

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        pair = self.pair(base)
        return Tensors({"B": pair["B"]}, frozen={"A": pair["A"]})


@dataclass(frozen=True)
class LoRAXS(LowRank, name="lora-xs", aliases=("loraxs",)):
    """`W' = W + alpha / rank * U_r S_r R V_r^T` with U, S, V the top singular triplets of W, frozen, and R [rank, rank]
    trained from N(0, 1e-5) (arXiv 2405.17604); rank^2 parameters. That start is not the identity, by about 1e-5 of W.

    Args:
        save_projection: also save the frozen factors (rank (in + out) numbers). Without them the file holds R alone and
            loading repeats the decomposition; close singular values may then turn on another device or in another
            precision.
    """

    save_projection: bool = True
    std: float = 1e-5
    identity_at_init = False

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        r = self.rank
        U, S, Vh = torch.linalg.svd(base.detach().to(wide(base.dtype)), full_matrices=False)
        U, S, Vh = U[..., :r], S[..., :r], Vh[..., :r, :]
        # Singular vectors are given up to a sign: make the largest entry of each u positive.
        sign = U.gather(-2, U.abs().argmax(-2, keepdim=True)).sign().squeeze(-2)
        basis = {"A": (Vh * sign.unsqueeze(-1)).contiguous(), "B": (U * (S * sign).unsqueeze(-2)).contiguous()}
        R = zeros(*base.shape[:-2], r, r, like=base).normal_(std=self.std)
        saved = self.save_projection
        return Tensors({"R": R}, frozen=basis if saved else {}, derived={} if saved else basis)

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        return Factors(p.A, p.B @ p.R, self.scale)


@dataclass(frozen=True)
class MoSLoRA(LowRank, name="moslora", aliases=("mole",)):
    """Mixture of subspaces, `W' = W + alpha / rank * B M A` with a trained mixer M [rank, rank] (arXiv 2406.11909);
    rank (in + out) + rank^2 parameters. The survey's "MoLE", which is another paper's name.

    Args:
        mixer: start of M, "orthogonal" or "kaiming" (the paper's two best).
    """

    mixer: Literal["orthogonal", "kaiming"] = "orthogonal"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("mixer", self.mixer, ("orthogonal", "kaiming"))

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        M = kaiming(*base.shape[:-2], self.rank, self.rank, like=base)
        if self.mixer == "orthogonal":
            for matrix in M.view(-1, self.rank, self.rank):
                nn.init.orthogonal_(matrix)
        return Tensors({**self.pair(base), "M": M})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        return Factors(p.A, p.B @ p.M, self.scale)


@dataclass(frozen=True)
class KernelMix(LowRank, name="kernel-mix", aliases=("kernelmix",)):
    """For the rows of head h, `W'_h = W_h + alpha / rank * [B_h | C_h] [A ; D_h]`: A [rank, in] shared by the heads as
    in LoRA, D_h [head_rank, in] and C_h [out / heads, head_rank] the head's own (arXiv 2205.03720, transposed: the
    paper writes x W, so its shared factor is the input side here too). rank (in + out) + head_rank (heads in + out)
    parameters. Start: B and C 0.

    Args:
        heads: number of heads; divides the rows.
        head_rank: rank of each head's own pair.
    """

    heads: int = 1
    head_rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, heads=1, head_rank=1)

    def check(self, site: Site) -> None:
        check_matrix(self, site)
        check_divides("heads", site.shape[0], self.heads, "rows", site)
        super().check(site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        (out, into), h = base.shape, self.heads
        D = kaiming(h, self.head_rank, into, like=base)
        return Tensors({**self.pair(base), "C": zeros(h, out // h, self.head_rank, like=base), "D": D})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        eye = torch.eye(self.heads, dtype=p.C.dtype, device=p.C.device)
        C = torch.einsum("hg,hor->hogr", eye, p.C).reshape(W.shape[0], -1)  # block-diagonal [out, heads head_rank]
        return Factors(torch.cat([p.A, p.D.flatten(0, 1)]), torch.cat([p.B, C], 1), self.scale)


@dataclass(frozen=True)
class DeltaLoRA(LowRank, name="delta-lora", aliases=("deltalora",)):
    """Delta-LoRA (arXiv 2309.02411): after every step the weight takes the change of the product, W <- W + lam s (B A -
    B_old A_old), s = alpha / rank, without being in the optimizer; the forward is W + s B A.

    The changes telescope, so the weight is W + lam s (B A - B_0 A_0), (A_0, B_0) the pair when the updates began. That
    is what is computed here, with no gradient through it: the same trajectory, and the base stays untouched. They begin
        at once, or, with
    `wait`, when `begin_delta_lora` is called (the paper's K warm-up steps).

    Args:
        lam: the paper's lambda, 2 there.
        wait: plain LoRA until `begin_delta_lora(model)`.
    """

    lam: float = 2.0
    wait: bool = False

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        pair = self.pair(base)
        on = zeros(1, like=base) if self.wait else torch.ones_like(zeros(1, like=base))
        return Tensors(pair, frozen={"A0": pair["A"].clone(), "B0": pair["B"].clone(), "on": on})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        lam = self.lam * p.on
        A = torch.cat([p.A, p.A.detach(), p.A0], -2)
        B = torch.cat([p.B, lam * p.B.detach(), -lam * p.B0], -1)
        return Factors(A, B, self.scale)


def begin_delta_lora(model: nn.Module, name: str | None = None) -> int:
    """End the warm-up of every Delta-LoRA site (of adapter `name`): from here on the weight follows. Returns the number
    of sites.

    Raises:
        ConfigError: there is none, or it began before.
    """
    found = [d for _, _, slot in slots(model) for _, d in slot.deltas(None if name is None else (name,))]
    mine = [d for d in found if isinstance(d.method, DeltaLoRA)]
    if not mine or any(bool(d.on) for d in mine):
        raise ConfigError("begin_delta_lora: " + ("the weights follow already" if mine else "no DeltaLoRA is attached"))
    with torch.no_grad():
        for d in mine:
            d.A0.copy_(d.A)
            d.B0.copy_(d.B)
            d.on.fill_(1)
    return len(mine)


@dataclass(frozen=True)
class RoseLoRA(LowRank, name="roselora"):
    """LoRA whose rows of A and columns of B are sparse (arXiv 2406.10777), so that B A is sparse too. Which entries
    stay is the business of a `RosePruner` (`sparsify.py`), which zeroes the rest after every step; a zero may come back
    while the schedule runs.

    Args:
        sparsity: final share of zeros in every row of A and column of B.
    """

    beside = ("RosePruner",)
    sparsity: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity {self.sparsity}; expected 0 <= sparsity < 1")


@dataclass(frozen=True)
class DeLoRA(LowRank, name="delora"):
    """Decoupled LoRA (arXiv 2503.18225), `W' = W + lam / rank * (sum_i b_i a_i^T / (||b_i|| ||a_i||)) diag(||W_:j||)`:
    every rank-one part has norm 1, one trained number `lam` a site bounds the update, and each input is scaled by its
    column of W. A, B, lam trained: rank (in + out) + 1 parameters.

    Start: B 0, norms below 1e-4 count as 1e-4 (the authors' code in HF PEFT).

    Args:
        lam: start of the bound, 15 there.
    """

    lam: float = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            raise ConfigError(f"alpha {self.alpha}; DeLoRA has no alpha, its strength is lam")

    def check(self, site: Site) -> None:
        check_matrix(self, site)
        super().check(site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        lam = torch.full((1,), self.lam, dtype=wide(base.dtype), device=base.device)
        norms = torch.linalg.vector_norm(base.detach().to(lam.dtype), dim=-2)
        return Tensors({**self.pair(base), "lam": lam}, frozen={"norms": norms})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        sizes = p.A.norm(dim=-1).clamp_min(1e-4) * p.B.norm(dim=-2).clamp_min(1e-4)
        return Factors(p.A * p.norms, p.B * (p.lam / self.rank / sizes))


@dataclass(frozen=True)
class RandLoRA(LowRank, name="randlora"):
    """`W' = W + alpha / rank * sum_j B_j diag(lambda_j) A diag(gamma_j)` over ceil(min(out, in) / rank) frozen random
    pairs, so the update has full rank (arXiv 2502.00987). A [rank, min] and B [n, max, rank] are drawn from `seed` at
    the largest sizes among the rule's sites and not in the file, unless `save_projection` keeps them there (for bases
    that came from elsewhere); where out < in the whole sum is transposed, so that gamma is on the smaller side.
    Trained: lambda [n, rank] from 0 and gamma [n, min] from 1 / max(n, min) (HF PEFT's start); n (rank + min)
    parameters.

    Choice: entries N(0, 1), as the paper's appendix and HF PEFT normalise them. A smaller site takes leading rows and
    the first n rank columns of B in the order (rank, n), as HF PEFT does.
    """

    rank: int = 32
    seed: int = 0
    save_projection: bool = False

    def check(self, site: Site) -> None:
        check_matrix(self, site)
        super().check(site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        r, small = self.rank, min(base.shape)
        n = -(-small // r)
        sides = sorted((max(s.shape[0] for s in context.sites), max(s.shape[1] for s in context.sites)))
        key = (self.name, self.seed, r, *sides)
        first = key not in context.shared
        if first:
            generator = torch.Generator("cpu").manual_seed(self.seed)
            A = seeded_normal(r, sides[0], like=base, generator=generator)
            B = seeded_normal(-(-sides[0] // r), sides[1], r, like=base, generator=generator)
            context.shared[key] = nn.Parameter(A, False), nn.Parameter(B, False)
        A, B = context.shared[key]
        gamma = torch.full((n, small), 1 / max(n, small), dtype=wide(base.dtype), device=base.device)
        saved = {"A": A, "B": B} if first and self.save_projection else {}  # shared by all sites, saved by one
        derived = {} if saved else {"A": A, "B": B}
        return Tensors({"lambda_": zeros(n, r, like=base), "gamma": gamma}, frozen=saved, derived=derived)

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        n, small = p.gamma.shape
        pairs = p.lambda_.mT.unsqueeze(-1) * p.A[:, None, :small] * p.gamma  # [rank, n, min]
        A = pairs.flatten(0, 1)
        B = p.B.permute(1, 2, 0).flatten(1)[: max(W.shape), : n * self.rank]  # [max, rank n]
        return Factors(A, B, self.scale) if W.shape[0] >= W.shape[1] else Factors(B.mT, A.mT, self.scale)

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        return 2 * tensors["lambda_"].numel() * sum(site.shape)
