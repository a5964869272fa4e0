"""Activation steering: fixed directions, computed and not trained, added to activations.

    RepE   Zou et al. 2023, arXiv 2310.01405: a reading vector a layer, from contrasting inputs, added to the layer's
           output
    ITI    Li et al. 2023, arXiv 2306.03341: alpha sigma_h theta_h added to the outputs of the heads whose probes tell
           the classes best

    mmpeft.attach(model, {"model.layers.{8..16}": mmpeft.RepE()}, name="honest")
    mmpeft.fit_repe(model, positive, negative, name="honest");  mmpeft.set_strength(model, 2.0, name="honest")

Directions are saved with the adapter. Until they are fitted they are 0, the identity. Activations are those of each
input's last token (the last position: pad on the left).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Tensors, zeros
from mmpeft.adapters.methods.activation import ChannelEdit, HeadEdit, on_channels
from mmpeft.adapters.methods.bottleneck import first_tensor
from mmpeft.adapters.methods.low_rank import one_of
from mmpeft.adapters.probe import as_call
from mmpeft.adapters.site import Site
from mmpeft.adapters.state import slots, state_of
from mmpeft.adapters.switch import use
from mmpeft.errors import ConfigError


def steered(v: Tensor) -> Tensors:
    """A direction v at strength 1; nothing is trained."""
    return Tensors({}, frozen={"v": v, "strength": torch.ones_like(v[..., :1].flatten()[:1])}, facts={"seen": None})


@dataclass(frozen=True)
class RepE(ChannelEdit, name="repe"):
    """`y' = y + strength * v` around a layer, v [width] of norm 1 from `fit_repe` (arXiv 2310.01405); nothing is
    trained."""

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        return steered(self.channels(site, context))

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        y, put = first_tensor(call(*args, **kwargs))
        if p.facts["seen"] is not None:
            p.facts["seen"].append(y[:, -1].detach())
        return put(y + on_channels(p.strength * p.v, y, p.site))


@dataclass(frozen=True)
class ITI(HeadEdit, name="iti"):
    """Inference-time intervention: z_h' = z_h + strength * sigma_h * theta_h for the chosen heads of an attention, on
    the input of its output projection (arXiv 2306.03341); theta and sigma from `fit_iti`; nothing is trained.

    Args:
        num_heads: heads of the attention; None reads them off the module around the projection.
    """

    num_heads: int | None = None

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        heads, width, like = self.widths(site, context, self.num_heads)
        return steered(zeros(heads, width, like=like))

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if p.facts["seen"] is not None:
            p.facts["seen"].append(args[0][:, -1].detach().unflatten(-1, p.v.shape))
        return call(args[0] + (p.strength * p.v).flatten().to(args[0].dtype), *args[1:], **kwargs)


@torch.no_grad()
def fit_repe(
    model: nn.Module,
    positive: Iterable[Any],
    negative: Iterable[Any],
    *,
    name: str = "default",
    by: Literal["pca", "mean"] = "pca",
) -> None:
    """Set each RepE site's vector: the first principal component of the differences of paired inputs (or their mean),
    of norm 1, pointing from negative to positive.

    Args:
        positive, negative: inputs as in `attach(example=)`, batches of the same sizes, row i paired with row i.
    """
    one_of("by", by, ("pca", "mean"))
    deltas = _steered(model, name, RepE)
    a, b = _activations(model, deltas, positive), _activations(model, deltas, negative)
    for d, p, n in zip(deltas, a, b, strict=True):
        if p.shape != n.shape:
            raise ConfigError(f"{len(p)} positive and {len(n)} negative inputs; RepE pairs them row by row")
        difference = (p - n).to(d.v.dtype)
        v = difference.mean(0)
        if by == "pca":
            # Signs of the pairs are arbitrary for a component, so differences enter with both.
            component = torch.linalg.svd(difference, full_matrices=False)[2][0]
            v = component * torch.sign(component @ v)
        d.v.copy_(v / v.norm())


@torch.no_grad()
def fit_iti(
    model: nn.Module, positive: Iterable[Any], negative: Iterable[Any], heads: int, *, name: str = "default"
) -> list[tuple[str, int, float]]:
    """Set the directions of the `heads` heads that separate the classes best, over all ITI sites; the others stay as
    they are, unsteered.

    A head's probe projects on the difference of the class means ("mass mean shift", the paper's best direction) with
    the threshold half-way; its score is the accuracy on the inputs given here.

    Returns:
        (site, head, accuracy) of the chosen heads, best first.
    """
    deltas = _steered(model, name, ITI)
    a, b = _activations(model, deltas, positive), _activations(model, deltas, negative)
    scored: list[tuple[float, int, int]] = []
    found: list[Tensor] = []
    for i, (d, p, n) in enumerate(zip(deltas, a, b, strict=True)):
        theta = p.mean(0) - n.mean(0)
        theta = theta / theta.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        middle = (theta * (p.mean(0) + n.mean(0)) / 2).sum(-1)
        right = ((p * theta).sum(-1) > middle).sum(0) + ((n * theta).sum(-1) <= middle).sum(0)
        scored += [(float(right[h]) / (len(p) + len(n)), -i, -h) for h in range(len(theta))]
        sigma = (torch.cat([p, n]) * theta).sum(-1).std(0)
        found.append((sigma.unsqueeze(-1) * theta).to(d.v.dtype))
    if not 1 <= heads <= len(scored):
        raise ConfigError(f"heads {heads}; expected 1 to {len(scored)}")
    for d in deltas:
        d.v.zero_()
    chosen = [(accuracy, -i, -h) for accuracy, i, h in sorted(scored, reverse=True)[:heads]]
    for _, i, h in chosen:
        deltas[i].v[h] = found[i][h]
    return [(deltas[i].site.path, h, accuracy) for accuracy, i, h in chosen]


@torch.no_grad()
def set_strength(model: nn.Module, strength: float, *, name: str = "default") -> None:
    """Set alpha at every RepE and ITI site of an adapter; negative values steer the other way."""
    for d in _steered(model, name, (RepE, ITI)):
        d.strength.fill_(strength)


def _steered(model: nn.Module, name: str, kind: Any) -> list[Delta]:
    state_of(model).check_names([name])
    found = [d for _, _, slot in slots(model) for _, d in slot.deltas((name,)) if isinstance(d.method, kind)]
    if not found:
        raise ConfigError(f"adapter {name!r} has no site of the kind to fit")
    return found


@torch.no_grad()
def _activations(model: nn.Module, deltas: list[Delta], inputs: Iterable[Any]) -> list[Tensor]:
    """Last-token activations at each site, unsteered, [n, ...]."""
    before = [d.strength.clone() for d in deltas]
    name = next(n for _, _, slot in slots(model) for n, d in slot.deltas() if d is deltas[0])
    for d in deltas:
        d.strength.zero_()
        d.facts["seen"] = []
    try:
        with use(model, name):
            for given in inputs:
                args, kwargs = as_call(given)
                model(*args, **kwargs)
        return [torch.cat(d.facts["seen"]) for d in deltas]
    finally:
        for d, strength in zip(deltas, before, strict=True):
            d.strength.copy_(strength)
            d.facts["seen"] = None
