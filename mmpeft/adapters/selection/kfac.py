"""Kronecker-factored curvature of LoRA's matrices, for `Laplace` (Yang et al. 2024, arXiv 2308.13111, section 4).

The gradient by A [r, in] of one input is a sum over tokens of outer products, s B^T g x^T, that by B [out, r] is
g (s A x)^T, x the layer's input and g the gradient by its output. K-FAC takes the two sides for independent:

    H = (sum u u^T) (x) (sum v v^T) / number of v          u on the matrix' rows, v on its columns

with g running over the columns of the root of the Gauss-Newton matrix, so that no dimension is squared but its own.
The side of width r is kept whole; of the wide one (columns of A, rows of B) only the leading `k` directions are, a root
[d, k] that every batch updates by an SVD of [root, new vectors], cut to k again.

Choice: tokens that share a weight enter one by one (K-FAC "expand"), padding among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta
from mmpeft.adapters.methods.lora import DoRA, LoRA
from mmpeft.adapters.methods.lora_kin import LoRAFA
from mmpeft.adapters.site import _is_hf_conv1d
from mmpeft.errors import ConfigError, Unsupported

CHUNK = 64  # new vectors a low-rank update takes at once
Pairs = list[tuple[Tensor, Tensor]]  # (input [*, in], output [*, out]) of each call of a layer


class Factor:
    """A sum of outer products of vectors [d]: whole, or by the leading `k` directions of it.

    Args:
        k: columns of the root that is kept; None keeps the [d, d] sum.
    """

    def __init__(self, d: int, k: int | None) -> None:
        self.k = None if k is None else min(k, d)
        self.sum: Tensor | None = None  # [d, d], or a root of it [d, at most k]

    def add(self, x: Tensor) -> None:
        """x [n, d]."""
        if self.k is None:
            new = x.T @ x
            self.sum = new if self.sum is None else self.sum + new
            return
        for part in torch.split(x, max(self.k, CHUNK)):
            y = part.T if self.sum is None else torch.cat([self.sum, part.T], 1)
            # With y = U S V^T the cut root U_k S_k is y V_k, and V comes from the small matrix y^T y.
            V = torch.linalg.eigh(y.T @ y).eigenvectors
            self.sum = y @ V[:, -self.k :]

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [m] and vectors [d, m]; the rest of the space has 0."""
        assert self.sum is not None
        if self.k is None:
            values, vectors = torch.linalg.eigh(self.sum)
            return values.clamp_min(0), vectors
        U, S, _ = torch.linalg.svd(self.sum, full_matrices=False)
        return S.square(), U


@dataclass
class Matrix:
    """One trained matrix, A or B of a LoRA site, and the two factors of its curvature."""

    owner: nn.Module
    delta: Delta
    name: str
    rows: Factor
    columns: Factor
    count: int = 0
    basis: tuple[Tensor, Tensor] = field(init=False)
    values: Tensor = field(init=False)  # eigenvalues of H [m of rows, m of columns]

    @property
    def label(self) -> str:
        return f"{self.delta.site.name}.{self.name}"

    def sides(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """(u [*, rows], v [*, columns]) of the matrix, in float64, from x [*, in] and g [*, out]."""
        d, scale = self.delta, float(self.delta.method.scale)  # type: ignore[attr-defined]
        begin, stop = d.site.rows or (0, g.shape[-1])
        x, g = x.double(), g[..., begin:stop].double()
        if self.name == "A":
            return scale * g @ d.B.detach().double(), x
        return g, scale * x @ d.A.detach().double().mT

    def add(self, x: Tensor, g: Tensor, *, first: bool) -> None:
        """One column of the root; the inputs count once, with the first."""
        u, v = (t.flatten(0, -2) for t in self.sides(x, g))
        self.rows.add(u)
        if first:
            self.columns.add(v)
            self.count += len(v)

    def settle(self) -> None:
        """The eigenvectors, after the last batch."""
        (a, U), (b, V) = self.rows.eigen(), self.columns.eigen()
        self.basis, self.values = (U, V), torch.outer(a, b) / self.count

    def covariance(self, J: Tensor, prior: float) -> Tensor:
        """J (H + prior)^-1 J^T [B, C, C] for a Jacobian J [B, C, rows, columns]; what the low rank left out has the
        prior's variance."""
        U, V = self.basis
        flat, turned = J.flatten(2), (U.T @ J @ V).flatten(2)
        gain = 1 / prior - 1 / (self.values.flatten() + prior)
        return flat @ flat.mT / prior - (turned * gain) @ turned.mT


def matrices(found: Sequence[tuple[nn.Module, Delta, str]], rank: int | None, largest: int) -> list[Matrix]:
    """A `Matrix` for each (owner, delta, name of a trained tensor).

    Args:
        rank: of the wide factors; None keeps them whole, up to `largest`.

    Raises:
        Unsupported: a tensor that is not A or B of LoRA or LoRA-FA on a linear layer.
        ConfigError: a whole factor that is too large.
    """
    out = []
    for owner, d, name in found:
        lora = isinstance(d.method, LoRA | LoRAFA) and not isinstance(d.method, DoRA) and name in ("A", "B")
        linear = d.site.tensor == "weight" and (isinstance(owner, nn.Linear) or _is_hf_conv1d(owner))
        if not lora or not linear:
            raise Unsupported(
                f"{d.site.name}: {name} of {type(d.method).__name__} has no Kronecker factors here, only A and B of LoRA "
                "on linear layers have; leave it out by only=, or use structure='blocks' or 'diag'"
            )
        rows, columns = getattr(d, name).shape
        wide = columns if name == "A" else rows
        if rank is None and wide > largest:
            raise ConfigError(f"{d.site.name}: a whole factor of {wide} (at most {largest}); give kron_rank")
        sides = (None, rank) if name == "A" else (rank, None)
        out.append(Matrix(owner, d, name, Factor(rows, sides[0]), Factor(columns, sides[1])))
    return out


@contextmanager
def calls(found: Sequence[Matrix]) -> Iterator[dict[nn.Module, Pairs]]:
    """Inputs and outputs of the layers while a forward runs, by layer."""
    seen: dict[nn.Module, Pairs] = {m.owner: [] for m in found}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen[module].append(((args[0] if args else kwargs["input"]).detach(), output))

    hooks = [owner.register_forward_hook(note, with_kwargs=True) for owner in seen]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def gradients(y: Tensor, seen: dict[nn.Module, Pairs], extra: Sequence[Tensor] = ()) -> tuple[Any, list[Tensor]]:
    """By layer the (input, gradient by its output) pairs of a scalar, and the gradients by `extra`; the graph stays."""
    outputs = [out for pairs in seen.values() for _, out in pairs if out.requires_grad]
    found = torch.autograd.grad(y, [*outputs, *extra], retain_graph=True, allow_unused=True)
    grads = iter(found[: len(outputs)])
    by_owner: dict[nn.Module, Pairs] = {}
    for owner, pairs in seen.items():
        given = [(x, out, next(grads) if out.requires_grad else None) for x, out in pairs]
        by_owner[owner] = [(x, torch.zeros_like(out) if g is None else g) for x, out, g in given]
    rest = zip(extra, found[len(outputs) :], strict=True)
    return by_owner, [torch.zeros_like(t) if g is None else g for t, g in rest]


def accumulate(found: Sequence[Matrix], f: Tensor, root: Tensor, seen: dict[nn.Module, Pairs], *, first: bool) -> None:
    """Add a batch to all factors.

    Args:
        f: outputs [B, C] with their graph.
        root: [B, C, C] float64, R with R^T R the Hessian by the outputs.
        first: start anew, and compare the gradients with autograd's own.

    Raises:
        ConfigError: a layer that is never called, or whose calls do not explain its gradient.
    """
    for m in found:
        if not seen[m.owner]:
            raise ConfigError(
                f"{m.delta.site.name} is read and never called, which gives K-FAC no inputs; use 'blocks'"
            )
        if first:
            m.rows.sum, m.columns.sum, m.count = None, None, 0
    own = [getattr(m.delta, m.name) for m in found] if first else []
    for c in range(f.shape[1]):
        pairs, direct = gradients((root[:, c].to(f.dtype) * f).sum(), seen, own if c == 0 else ())
        for i, m in enumerate(found):
            for x, g in pairs[m.owner]:
                m.add(x, g, first=c == 0)
            if direct and not _explained(m, pairs[m.owner], direct[i]):
                raise ConfigError(
                    f"{m.label}: the gradient is not that of one LoRA at its own scale (adapters that scale it or "
                    "stand on top of it?); use structure='blocks' or 'diag'"
                )


def _explained(m: Matrix, pairs: Pairs, gradient: Tensor) -> bool:
    made = torch.zeros_like(gradient, dtype=torch.float64)
    for x, g in pairs:
        u, v = (t.flatten(0, -2) for t in m.sides(x, g))
        made += u.T @ v
    return bool((made - gradient).norm() <= 0.02 * gradient.norm() + 1e-12)


def jacobians(found: Sequence[Matrix], f: Tensor, seen: dict[nn.Module, Pairs]) -> list[Tensor]:
    """The outputs' derivative by each matrix, [B, C, rows, columns] float64.

    Raises:
        ConfigError: a layer whose inputs do not have the samples on their first axis.
    """
    parts: list[list[Tensor]] = [[] for _ in found]
    for c in range(f.shape[1]):
        pairs, _ = gradients(f[:, c].sum(), seen)
        for m, part in zip(found, parts, strict=True):
            total = None
            for x, g in pairs[m.owner]:
                if len(x) != len(f):
                    raise ConfigError(
                        f"{m.label}: {len(x)} rows of inputs for {len(f)} samples; use structure='blocks'"
                    )
                u, v = (t.flatten(1, -2) if t.ndim > 2 else t.unsqueeze(1) for t in m.sides(x, g))
                J = u.mT @ v  # [B, rows, columns], summed over tokens
                total = J if total is None else total + J
            assert total is not None
            part.append(total)
    return [torch.stack(part, 1) for part in parts]
