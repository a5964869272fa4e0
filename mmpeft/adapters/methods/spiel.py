"""SpIEL: a sparse delta of fixed size whose places move (Ansell et al. 2024, arXiv 2401.16405).

Drop the entries that changed least since the last move, grow as many where the accumulated gradient of the dense weight
is largest. This is the AG form; the MA form estimates that gradient from an optimizer's momentum, which the gradient
itself makes unnecessary here, since `criteria.gather` never holds more than one dense gradient a site.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Tensors
from mmpeft.adapters.methods.sparse import Sparse, sparse_deltas
from mmpeft.adapters.plan import Target
from mmpeft.adapters.selection.criteria import Losses, criterion, gather
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class SpIEL(Sparse, name="spiel", aliases=("spiel-ag",)):
    """SpIEL-AG (arXiv 2401.16405): a sparse delta of fixed size whose places move. It starts at random; every so often
    `spiel_step` drops the entries that changed least since the last time (their values go back to 0) and grows as many
    where the accumulated gradient of the dense weight is largest, at value 0."""

    density: float = 0.01

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        made = super().init(site, base, context)
        return replace(made, frozen={**made.frozen, "before": made.trained["value"].clone()})


@torch.no_grad()
def spiel_step(
    model: nn.Module,
    losses: Losses,
    share: float,
    *,
    name: str = "default",
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Move the `share` of every SpIEL site's entries; returns how many moved.

    Args:
        losses: as in `criteria.gather`, run with the adapter active: their gradients say where to grow.
        share: of the entries, 0 to 1; the paper anneals it to 0.
        optimizer: its state of the moved entries is set to 0.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share {share}; expected 0 <= share <= 1")
    deltas = [d for d in sparse_deltas(model, name) if isinstance(d.method, SpIEL)]
    modules = dict(model.named_modules())
    targets = [Target(0, d.method, d.site, modules[d.site.path]) for d in deltas]
    evidence = gather(model, targets, losses)
    moved = 0
    for d in deltas:
        n = round(share * len(d.index))
        drop = (d.value - d.before).abs().argsort()[:n]
        score = criterion("gradient")(evidence[d.site.name]).flatten().clone()
        score[d.index] = -1  # what is trained already is no candidate, the dropped included
        grow = score.topk(n).indices
        d.index[drop] = grow.to(d.index)
        d.value[drop] = 0
        for state in [optimizer.state[d.value]] if optimizer is not None and d.value in optimizer.state else []:
            for t in state.values():
                if isinstance(t, Tensor) and t.shape == d.value.shape:
                    t[drop] = 0
        order = d.index.argsort()
        if optimizer is None or d.value not in optimizer.state:  # keep files canonical where no state would be mixed up
            d.index.copy_(d.index[order])
            d.value.copy_(d.value[order])
        d.before.copy_(d.value)
        moved += n
    return moved
