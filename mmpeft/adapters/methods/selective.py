"""Selective methods: train a few of the base's own numbers, stored as compact deltas so that the base never moves.

full       the adapter's own copy of every tensor below the matched module
BitFit     a delta on each bias (Ben Zaken et al. 2021, arXiv 2106.10199)
LayerNorm tuning   own gains and biases of normalisation layers (Qi et al. 2022, arXiv 2211.08682; Zhao et al. 2023,
                   2312.11420)
RoCoFT     a delta on a few rows or columns of each weight (Kowsher et al. 2024, arXiv 2410.10075)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Method, Tensors, vector_tensors, wide, zeros
from mmpeft.adapters.site import Site, own_tensors
from mmpeft.errors import ConfigError

Select = Literal["first", "last", "random", "magnitude", "small_magnitude", "mixed_magnitude"]
Order = Literal["largest", "smallest", "mixed"]


@dataclass(frozen=True)
class Full(Method, name="full"):
    """Full training of the matched modules: `W' = value`, a copy that starts at W. Written "full" in a plan."""

    space = "any"
    mixes = False

    def tensors(self, path: str, module: nn.Module) -> list[str]:
        return own_tensors(module)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        return Tensors({"value": base.detach().to(wide(base.dtype), copy=True).contiguous()})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        return cast(Tensor, p.value)


class VectorDelta(Method):
    """A delta of its own size on each vector, 0 at the start."""

    space = "vector"
    mixes = False

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        return Tensors({"delta": zeros(*base.shape, like=base)})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        return cast(Tensor, W + p.delta)


@dataclass(frozen=True)
class BitFit(VectorDelta, name="bitfit", aliases=("bias",)):
    """Bias-only tuning, `b' = b + delta` (arXiv 2106.10199); the survey's tables call it "Bias". Modules without a bias are
    passed over."""

    def tensors(self, path: str, module: nn.Module) -> list[str]:
        return [t for t in vector_tensors(module, ["bias"]) if t.endswith("bias") or t.startswith("bias_")] + [
            t for t in own_tensors(module) if t.startswith("bias_") and isinstance(module, nn.RNNBase)
        ]


@dataclass(frozen=True)
class LayerNormTuning(
    VectorDelta, name="layernorm", aliases=("ln_tuning", "norm_tuning", "ln-tuning", "norm-tuning", "lnfit", "ln-tune")
):
    """Gains and biases of the normalisation layers, each as a delta (arXiv 2211.08682; 2312.11420 in multimodal models).
    The survey's tables call it LNFit, LN-Tune, LN-tuning and Norm-Tuning.

    Matches any module that is a normalisation: torch's, or a class whose own parameters are one-dimensional and whose
    name ends in "Norm" (RMSNorm, LlamaRMSNorm, LayerNorm2d, ...).
    """

    def tensors(self, path: str, module: nn.Module) -> list[str]:
        norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.RMSNorm)
        named = any(c.__name__.rstrip("0123456789dD").endswith("Norm") for c in type(module).__mro__)
        return vector_tensors(module, ["weight", "bias"]) if isinstance(module, norms) or named else []


@dataclass(frozen=True)
class RoCoFT(Method, name="rocoft"):
    """Row-column fine-tuning: a delta on `rank` rows (or columns) of each weight (arXiv 2410.10075).

    Args:
        rank: number of rows or columns, at most the matrix's own.
        axis: "rows" (output units) or "columns" (input units).
        select: which: "first" (the authors' code) and "last" by position, "random" by `seed`, "magnitude" the largest
            L2 norms, "small_magnitude" the smallest, "mixed_magnitude" half of each. The paper's scores of weight times
            input need data: `attach_selected` with `SparseRows(criterion="wanda", order=...)`.
    """

    rank: int = 1
    axis: Literal["rows", "columns"] = "rows"
    select: Select = "first"
    seed: int = 0
    mixes = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank {self.rank}; expected at least 1")
        if self.axis not in ("rows", "columns"):
            raise ConfigError(f"axis {self.axis!r}; expected 'rows' or 'columns'")
        if self.select not in (*_POSITIONS, *_NORMS):
            raise ConfigError(f"select {self.select!r}; expected one of {', '.join((*_POSITIONS, *_NORMS))}")

    def check(self, site: Site) -> None:
        most = site.shape[-2 if self.axis == "rows" else -1]
        if self.rank > most:
            raise ConfigError(f"rank {self.rank} at {site.name} with {most} {self.axis}; expected 1 to {most}")

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        axis = -2 if self.axis == "rows" else -1
        n = base.shape[axis]
        if base.is_meta or self.select in _POSITIONS:
            index = _POSITIONS["first" if base.is_meta else self.select](n, self.rank, self.seed)
        else:
            others = [a for a in range(base.ndim) if a != base.ndim + axis]
            norms = torch.linalg.vector_norm(base.float(), dim=others)
            index = ordered(norms, _NORMS[self.select]).topk(self.rank).indices.sort().values
        shape = list(base.shape)
        shape[axis] = self.rank
        return Tensors({"delta": zeros(*shape, like=base)}, frozen={"index": index.to(base.device)})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        return W.index_add(W.ndim + (-2 if self.axis == "rows" else -1), p.index, p.delta)


_POSITIONS: dict[str, Callable[[int, int, int], Tensor]] = {
    "first": lambda n, k, seed: torch.arange(k),
    "last": lambda n, k, seed: torch.arange(n - k, n),
    "random": lambda n, k, seed: torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].sort().values,
}
_NORMS: dict[str, Order] = {"magnitude": "largest", "small_magnitude": "smallest", "mixed_magnitude": "mixed"}


def ordered(scores: Tensor, order: Order) -> Tensor:
    """Scores [n] whose largest are the largest, the smallest, or half and half ("mixed") of the given ones."""
    if order == "mixed":
        ranks = scores.argsort(stable=True).argsort().to(scores.dtype)
        return (ranks - (len(scores) - 1) / 2 + 0.25).abs()  # of an odd number, one more from the top
    return scores if order == "largest" else -scores
