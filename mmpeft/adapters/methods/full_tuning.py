"""Full tuning that stays near its start, and an adapter on the weights themselves.

    Mixout   Lee et al. 2020, arXiv 1909.11299: in training, entries go back to their pretrained values at random
    r3f      Aghajanyan et al. 2020, arXiv 2008.03156: outputs must not change under small noise of the embeddings
    one_off_drop   a baseline of gradient-mask tuning (Li et al. 2024, arXiv 2406.15330): the smallest changes go back, once
    HiWi     Liao et al. 2023, arXiv 2305.16742: a bottleneck applied to a pretrained bias or weight, not to activations

RecAdam, which pulls towards the start in the optimizer, is `mmpeft.tasks.RecAdam`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Method, Tensors, zeros
from mmpeft.adapters.methods.bottleneck import ACTIVATIONS, Activation
from mmpeft.adapters.methods.low_rank import at_least, kaiming, one_of
from mmpeft.adapters.methods.selective import BitFit, Full
from mmpeft.adapters.selection.criteria import top
from mmpeft.adapters.site import Site, matrix_tensors, slice_rows
from mmpeft.adapters.state import sites_of, slots
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class Mixout(Full, name="mixout"):
    """Full tuning, `W' = W + M * (value - W) / (1 - p)` in training with M Bernoulli(1 - p), value in eval: each entry
    is the pretrained one with probability p, corrected for the mean (arXiv 1909.11299). `draw_mixout` draws M, once a
    step and the same for all reads of a forward; until it does, M is 1 - p everywhere, which is plain full tuning.

    Args:
        p: share of entries that go back (0.7 to 0.9 in the paper).
    """

    beside = ("draw_mixout",)
    p: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ConfigError(f"p {self.p}; expected 0 <= p < 1")

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        made = super().init(site, base, context)
        return replace(made, derived={"M": torch.full_like(made.trained["value"], 1 - self.p)})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        value = cast(Tensor, p.value)
        return W + p.M / (1 - self.p) * (value - W) if p.training else value


@torch.no_grad()
def draw_mixout(model: nn.Module, generator: torch.Generator, *, name: str | None = None) -> None:
    """New masks for every Mixout site, before a step's forward.

    Raises:
        ConfigError: there is none.
    """
    for d in sites_of(model, Mixout, name):
        d.M.copy_(torch.rand(d.M.shape, generator=generator) >= d.method.p)


@torch.no_grad()
def one_off_drop(model: nn.Module, keep: float, *, name: str = "default") -> int:
    """After a run with `"full"`: of all its numbers, the `keep` share that changed most stay and the others go back to the
    base; returns how many stay. ("One-off drop" of arXiv 2406.15330; that the size of the change decides is our reading.)

    Raises:
        ConfigError: `keep` is no share, or the adapter has no `Full` site.
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep {keep}; expected 0 < keep <= 1")
    found = [(o, d) for _, o, s in slots(model) for _, d in s.deltas((name,)) if isinstance(d.method, Full)]
    if not found:
        raise ConfigError(f"adapter {name!r} has no site that is trained in full")
    starts: dict[str, Tensor] = {}
    for owner, d in found:
        stored = owner._parameters[d.site.tensor]
        assert stored is not None and d.site.layout is not None
        starts[d.site.name] = slice_rows(d.site.layout.to_matrix(stored.detach()), d.site.rows).to(d.value.dtype)
    total = sum(t.numel() for t in starts.values())
    chosen = top({d.site.name: (d.value - starts[d.site.name]).abs() for _, d in found}, max(1, round(keep * total)))
    for _, d in found:
        kept = torch.zeros(d.value.numel(), dtype=torch.bool, device=d.value.device)
        kept[chosen.get(d.site.name, [])] = True
        d.value.copy_(torch.where(kept.view(d.value.shape), d.value, starts[d.site.name]))
    return sum(len(places) for places in chosen.values())


def r3f(
    forward: Callable[[Tensor], Tensor],
    embeddings: Tensor,
    *,
    std: float = 1e-5,
    noise: Literal["normal", "uniform"] = "normal",
) -> tuple[Tensor, Tensor]:
    """(logits, penalty): the symmetric divergence KL(p || q) + KL(q || p), the mean over samples, between the outputs at
    the embeddings and at noisy ones; add lambda times it to the loss (lambda 0.1 to 5 in the paper).

    Args:
        forward: embeddings [B, T, d] -> logits [B, classes] or [B, T, classes].
        std: of normal noise, or half the width of uniform noise.
    """
    one_of("noise", noise, ("normal", "uniform"))
    drawn = torch.randn_like(embeddings) if noise == "normal" else 2 * torch.rand_like(embeddings) - 1
    logits, noisy = forward(embeddings), forward(embeddings + std * drawn)
    p, q = (F.log_softmax(t.flatten(0, -2).float(), -1) for t in (logits, noisy))
    return logits, ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()


@dataclass(frozen=True)
class HiWi(Method, name="hiwi"):
    """`b' = b + act(b D^T) U^T`: a bottleneck whose input is the pretrained bias (or every row of the weight), D [rank, n]
    Kaiming-uniform, U [n, rank] 0 (arXiv 2305.16742); 2 rank n parameters while training. It merges like any delta, so
    that nothing of the bottleneck is left at inference.

    Args:
        rank: width of the bottleneck.
        of: "bias" (the paper's best) or "weight".
        activation: relu, gelu, silu or tanh.
    """

    rank: int = 16
    of: Literal["bias", "weight"] = "bias"
    activation: Activation = "relu"
    space = "any"
    mixes = False

    def __post_init__(self) -> None:
        at_least(self, rank=1)
        one_of("of", self.of, ("bias", "weight"))
        one_of("activation", self.activation, tuple(ACTIVATIONS))

    def tensors(self, path: str, module: nn.Module) -> list[str]:
        return BitFit().tensors(path, module) if self.of == "bias" else matrix_tensors(module)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        n, stack = base.shape[-1], base.shape[:-2] if base.ndim > 1 else ()
        return Tensors({"D": kaiming(*stack, self.rank, n, like=base), "U": zeros(*stack, n, self.rank, like=base)})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        # A bias of zeros has nothing to read from; `attach` finds it dead.
        update: Tensor = ACTIVATIONS[self.activation](W.to(p.D.dtype) @ p.D.mT) @ p.U.mT
        return W + update
