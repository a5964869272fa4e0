"""Selective methods: train a few of the base's own numbers, stored as compact deltas so that the base never moves.

full       the adapter's own copy of every tensor below the matched module
BitFit     a delta on each bias (Ben Zaken et al. 2021, arXiv 2106.10199)
LayerNorm tuning   own gains and biases of normalisation layers (Zhao et al. 2023, arXiv 2312.11420)
RoCoFT     a delta on a few rows or columns of each weight (Kowsher et al. 2024, arXiv 2410.10075)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Method, Tensors, vector_tensors, wide, zeros
from mmpeft.adapters.site import Site, own_tensors
from mmpeft.errors import ConfigError

Select = Literal["first", "last", "random", "magnitude"]


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


@dataclass(frozen=True)
class BitFit(Method, name="bitfit"):
    """Bias-only tuning, `b' = b + delta` (arXiv 2106.10199). Modules without a bias are passed over."""

    space = "vector"
    mixes = False

    def tensors(self, path: str, module: nn.Module) -> list[str]:
        return [t for t in vector_tensors(module, ["bias"]) if t.endswith("bias") or t.startswith("bias_")] + [
            t for t in own_tensors(module) if t.startswith("bias_") and isinstance(module, nn.RNNBase)
        ]

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        return Tensors({"delta": zeros(*base.shape, like=base)})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        return cast(Tensor, W + p.delta)


@dataclass(frozen=True)
class LayerNormTuning(Method, name="layernorm", aliases=("ln_tuning", "norm_tuning")):
    """Gains and biases of the normalisation layers, each as a delta (arXiv 2312.11420; norm tuning, 2302.01382).

    Matches any module that is a normalisation: torch's, or a class whose own parameters are one-dimensional and whose
    name ends in "Norm" (RMSNorm, LlamaRMSNorm, LayerNorm2d, ...).
    """

    space = "vector"
    mixes = False

    def tensors(self, path: str, module: nn.Module) -> list[str]:
        norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.RMSNorm)
        named = any(c.__name__.rstrip("0123456789dD").endswith("Norm") for c in type(module).__mro__)
        return vector_tensors(module, ["weight", "bias"]) if isinstance(module, norms) or named else []

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        return Tensors({"delta": zeros(*base.shape, like=base)})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        return cast(Tensor, W + p.delta)


@dataclass(frozen=True)
class RoCoFT(Method, name="rocoft"):
    """Row-column fine-tuning: a delta on `rank` rows (or columns) of each weight (arXiv 2410.10075).

    Args:
        rank: number of rows or columns, at most the matrix's own.
        axis: "rows" (output units) or "columns" (input units).
        select: which: "first" and "last" by position, "magnitude" by largest L2 norm, "random" by `seed`.
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
        if self.select not in ("first", "last", "random", "magnitude"):
            raise ConfigError(f"select {self.select!r}; expected first, last, random or magnitude")

    def check(self, site: Site) -> None:
        most = site.shape[-2 if self.axis == "rows" else -1]
        if self.rank > most:
            raise ConfigError(f"rank {self.rank} at {site.name} with {most} {self.axis}; expected 1 to {most}")

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        axis = -2 if self.axis == "rows" else -1
        n = base.shape[axis]
        if base.is_meta or self.select == "first":
            index = torch.arange(self.rank)
        elif self.select == "last":
            index = torch.arange(n - self.rank, n)
        elif self.select == "random":
            index = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[: self.rank].sort().values
        else:
            others = [a for a in range(base.ndim) if a != base.ndim + axis]
            index = torch.linalg.vector_norm(base.float(), dim=others).topk(self.rank).indices.sort().values
        shape = list(base.shape)
        shape[axis] = self.rank
        return Tensors({"delta": zeros(*shape, like=base)}, frozen={"index": index.to(base.device)})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        return W.index_add(W.ndim + (-2 if self.axis == "rows" else -1), p.index, p.delta)
