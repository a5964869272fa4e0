"""Laplace-LoRA (Yang et al. 2024, arXiv 2308.13111): after ordinary training, a Gaussian over an adapter's tensors, and
predictions that know their uncertainty.

    posterior = mmpeft.Laplace(model, lambda batch: model(batch["x"]))        # logits [B, C]
    posterior.fit(batches)                # (batch, targets) pairs
    posterior.tune_prior()                # the prior precision of highest evidence
    p = posterior.probabilities(batch)    # [B, C], samples of the linearised model

The precision is the generalised Gauss-Newton matrix plus the prior's, at the trained point; nothing is added to
training (the survey says a regularising term). Predictions are those of the linearised model, f + J (w - w*).

The matrix by `structure`:

    kron     the paper's: each of LoRA's A and B has a Kronecker product of two small matrices, the one of the wide side
             of low rank (`kfac.py`). LoRA and LoRA-FA on linear layers, of any width
    full     exact and whole;  blocks: exact, one block a tensor. Of any method, up to `LARGEST` numbers a block
    diag     the exact diagonal, of any method and size
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.methods.low_rank import one_of
from mmpeft.adapters.selection import kfac
from mmpeft.adapters.site import Site
from mmpeft.adapters.state import slots
from mmpeft.errors import ConfigError

LARGEST = 8192
Structure = Literal["kron", "full", "blocks", "diag"]
Likelihood = Literal["classification", "regression"]


class Laplace:
    """A Gaussian over the trained tensors of an adapter.

    Args:
        forward: batch -> outputs [B, C]: logits, or means of a regression. The model should be in eval.
        name: the adapter; None is all of them.
        only: which sites (Laplace of the last layer alone: `only=lambda site: site.path == "head"`).
        kron_rank: directions kept of a wide factor of "kron" (the paper's n_kfac, 10 there); None keeps all.
        prior_precision: of the zero-mean prior.
        noise: standard deviation of a regression's targets.

    Raises:
        ConfigError: no tensors, a block that is too large, values out of range.
        Unsupported: a tensor that has no Kronecker factors.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Any], Tensor],
        *,
        name: str | None = None,
        only: Callable[[Site], bool] | None = None,
        structure: Structure = "kron",
        kron_rank: int | None = 10,
        likelihood: Likelihood = "classification",
        prior_precision: float = 1.0,
        noise: float = 1.0,
    ) -> None:
        one_of("structure", structure, ("kron", "full", "blocks", "diag"))
        one_of("likelihood", likelihood, ("classification", "regression"))
        if not prior_precision > 0 or not noise > 0:
            raise ConfigError(f"prior_precision {prior_precision}, noise {noise}; expected positive numbers")
        if kron_rank is not None and kron_rank < 1:
            raise ConfigError(f"kron_rank {kron_rank}; expected at least 1, or None")
        found = [(o, d) for _, o, s in slots(model) for _, d in s.deltas(None if name is None else (name,))]
        places = {id(getattr(d, n)): (o, d, n) for o, d in found if only is None or only(d.site) for n in d.trained}
        places = {i: (o, d, n) for i, (o, d, n) in places.items() if getattr(d, n).requires_grad}
        self.tensors: list[Tensor] = [getattr(d, n) for _, d, n in places.values()]
        if not self.tensors:
            raise ConfigError("Laplace: no trainable tensor of an adapter is left")
        sizes = [t.numel() for t in self.tensors]
        self.blocks = [sum(sizes)] if structure == "full" else sizes
        if structure in ("full", "blocks") and max(self.blocks) > LARGEST:
            raise ConfigError(
                f"a block of {max(self.blocks)} numbers needs a matrix of its square (at most {LARGEST} are allowed); "
                "use structure='kron' or 'diag', or only= for fewer sites"
            )
        self.matrices = kfac.matrices([*places.values()], kron_rank, LARGEST) if structure == "kron" else []
        self.forward, self.structure, self.likelihood = forward, structure, likelihood
        self.prior_precision, self.noise = prior_precision, noise
        self.values: list[Tensor] = []  # eigenvalues of the blocks, or diagonals
        self.vectors: list[Tensor] = []
        self.log_likelihood = 0.0

    # --- fitting -----------------------------------------------------------------------------------------------------

    def fit(self, batches: Iterable[tuple[Any, Tensor]]) -> None:
        """Sum the Gauss-Newton matrix and the log likelihood over the training data.

        Args:
            batches: (batch, targets): class indices [B], or values [B, C].
        """
        self.log_likelihood = 0.0
        if self.structure == "kron":
            self._fit_kron(batches)
            return
        sums: list[Tensor] = []
        for batch, targets in batches:
            f, J = self.jacobian(batch)
            self.log_likelihood += self._fits(f, targets)
            R = self._root(f) @ J  # [B, C, P], R^T R summed over rows is the matrix
            rows = torch.split(R.flatten(0, 1), self.blocks, 1)
            parts = [(r.square().sum(0) if self.structure == "diag" else r.T @ r) for r in rows]
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        if not sums:
            raise ConfigError("Laplace.fit: no batches")
        if self.structure == "diag":
            self.values, self.vectors = sums, []
        else:
            pairs = [torch.linalg.eigh(H) for H in sums]
            self.values = [pair.eigenvalues.clamp_min(0) for pair in pairs]
            self.vectors = [pair.eigenvectors for pair in pairs]

    def _fit_kron(self, batches: Iterable[tuple[Any, Tensor]]) -> None:
        first = True
        for batch, targets in batches:
            f, seen = self._called(batch)
            values = f.detach().double()
            self.log_likelihood += self._fits(values, targets)
            kfac.accumulate(self.matrices, f, self._root(values), seen, first=first)
            first = False
        if first:
            raise ConfigError("Laplace.fit: no batches")
        for m in self.matrices:
            m.settle()
        self.values = [m.values.flatten() for m in self.matrices]

    def _called(self, batch: Any) -> tuple[Tensor, dict[nn.Module, kfac.Pairs]]:
        """Outputs with their graph, and what went into and came out of the layers."""
        with kfac.calls(self.matrices) as seen, torch.enable_grad():
            f = self.forward(batch)
        return _outputs(f), seen

    def jacobian(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(outputs [B, C], their derivative by all numbers [B, C, P]), in float64."""
        with torch.enable_grad():
            f = _outputs(self.forward(batch))
        rows = []
        for y in f.flatten():
            grads = torch.autograd.grad(y, self.tensors, retain_graph=True, allow_unused=True)
            flat = [torch.zeros_like(t) if g is None else g for t, g in zip(self.tensors, grads, strict=True)]
            rows.append(torch.cat([g.flatten() for g in flat]).double())
        return f.detach().double(), torch.stack(rows).view(*f.shape, -1)

    def _root(self, f: Tensor) -> Tensor:
        """[B, C, C] with R^T R the Hessian of minus the log likelihood by the outputs."""
        if self.likelihood == "regression":
            return torch.eye(f.shape[1], dtype=f.dtype, device=f.device).expand(len(f), -1, -1) / self.noise
        p = f.softmax(-1)
        root = p.sqrt()
        # diag(p) - p p^T = R^T R with R = diag(sqrt p) - sqrt(p) p^T, since sum p = 1
        return torch.diag_embed(root) - root.unsqueeze(2) * p.unsqueeze(1)

    def _fits(self, f: Tensor, targets: Tensor) -> float:
        if self.likelihood == "classification":
            return float(f.log_softmax(-1).gather(1, targets.view(-1, 1)).sum())
        error = (f - targets.double()) / self.noise
        return float(-0.5 * error.square().sum() - error.numel() * math.log(self.noise * math.sqrt(2 * math.pi)))

    def log_evidence(self, prior_precision: float | None = None) -> float:
        """log p(data) by Laplace's approximation: log likelihood + log prior + log volume of the posterior."""
        self._check()
        delta = self.prior_precision if prior_precision is None else prior_precision
        norm = sum(float(t.detach().double().square().sum()) for t in self.tensors)
        volume = sum(float((1 + e / delta).log().sum()) for e in self.values)
        return self.log_likelihood - 0.5 * (delta * norm + volume)

    def tune_prior(self, grid: Sequence[float] | None = None) -> float:
        """Set the prior precision to the one of highest evidence in `grid` (default 1e-4 to 1e4, 81 values)."""
        grid = grid if grid is not None else [10 ** (k / 10) for k in range(-40, 41)]
        self.prior_precision = max(grid, key=self.log_evidence)
        return self.prior_precision

    # --- predicting --------------------------------------------------------------------------------------------------

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(mean [B, C], covariance [B, C, C]) of the linearised model's outputs, without a regression's noise."""
        self._check()
        if self.structure == "kron":
            y, seen = self._called(batch)
            found = zip(self.matrices, kfac.jacobians(self.matrices, y, seen), strict=True)
            covariances = [m.covariance(one, self.prior_precision) for m, one in found]
            return y.detach().double(), torch.stack(covariances).sum(0)
        f, J = self.jacobian(batch)
        total = torch.zeros(*f.shape, f.shape[1], dtype=f.dtype, device=f.device)
        for i, part in enumerate(torch.split(J, self.blocks, 2)):
            turned = part @ self.vectors[i] if self.vectors else part
            total = total + (turned / (self.values[i] + self.prior_precision)) @ turned.mT
        return f, total

    def probabilities(self, batch: Any, *, samples: int = 1000, seed: int = 0) -> Tensor:
        """Class probabilities [B, C], the mean of softmax over samples of the outputs."""
        mean, covariance = self.predict(batch)
        values, vectors = torch.linalg.eigh(covariance)
        noise = torch.randn(samples, *mean.shape, generator=torch.Generator().manual_seed(seed), dtype=mean.dtype)
        root = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
        logits: Tensor = mean + (root @ noise.to(mean.device).unsqueeze(-1)).squeeze(-1)
        return logits.softmax(-1).mean(0)

    def _check(self) -> None:
        if not self.values:
            raise ConfigError("Laplace: call fit(batches) first")


def _outputs(f: Tensor) -> Tensor:
    if f.ndim != 2:
        raise ConfigError(f"forward gave {tuple(f.shape)}; expected outputs [B, C]")
    return f
