"""Activation steering: fixed directions, computed and not trained, added to activations.

    RepE   Zou et al. 2023, arXiv 2310.01405: a reading vector a layer, from contrasting inputs, added to the layer's
           output
    ITI    Li et al. 2023, arXiv 2306.03341: alpha sigma_h theta_h added to the outputs of the heads whose probes tell
           the classes best on inputs they were not fitted on

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
import torch.nn.functional as F
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

NEWTON = 30  # most steps, and most halvings of one


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
    model: nn.Module,
    positive: Iterable[Any],
    negative: Iterable[Any],
    heads: int,
    *,
    name: str = "default",
    held_out: float | tuple[Iterable[Any], Iterable[Any]] = 0.2,
    direction: Literal["mean", "probe"] = "mean",
    seed: int = 0,
) -> list[tuple[str, int, float]]:
    """Set the directions of the `heads` heads that separate the classes best, over all ITI sites; the others stay as
    they are, unsteered.

    Every head gets a logistic probe, fitted on one part of the inputs; its score is the accuracy on the other, which is
    held out. The direction of a chosen head and its sigma, the standard deviation of the activations along it, are
    those of all inputs, as the paper takes them.

    Choice: probes have the penalty |w|^2 / 2 of the authors' (scikit-learn's default), and of equally good heads the
    earlier is taken. Where both classes have equally many inputs, row i of one belongs with row i of the other (a true
    and a false answer to one question), and the two are held out together.

    Args:
        positive, negative: inputs as in `attach(example=)`, in batches.
        held_out: share of the inputs that scores the probes (the paper's is a fifth), or further inputs of both kinds.
        direction: "mean" is the difference of the class means ("mass mean shift", the paper's best), "probe" the
            probe's weight.
        seed: of the split.

    Returns:
        (site, head, held-out accuracy) of the chosen heads, best first.

    Raises:
        ConfigError: a number of heads there is not, a share outside (0, 1) or one that leaves a class without inputs.
    """
    one_of("direction", direction, ("mean", "probe"))
    if isinstance(held_out, int | float) and not 0 < held_out < 1:
        raise ConfigError(f"held_out {held_out}; expected a share between 0 and 1, or two lists of inputs")
    deltas = _steered(model, name, ITI)
    number = sum(len(d.v) for d in deltas)
    if not 1 <= heads <= number:
        raise ConfigError(f"heads {heads}; expected 1 to {number}")
    classes = [_activations(model, deltas, inputs) for inputs in (positive, negative)]  # each [n, heads, width] a site
    if isinstance(held_out, tuple):
        sizes = [len(c[0]) for c in classes]
        more = [_activations(model, deltas, inputs) for inputs in held_out]
        classes = [[torch.cat(z) for z in zip(c, m, strict=True)] for c, m in zip(classes, more, strict=True)]
        splits = [(torch.arange(n), torch.arange(n, len(c[0]))) for n, c in zip(sizes, classes, strict=True)]
    else:
        splits = _split([len(c[0]) for c in classes], float(held_out), seed)
    (kept_p, held_p), (kept_n, held_n) = splits
    scored: list[tuple[float, int, int]] = []
    found: list[Tensor] = []
    for i, (d, p, n) in enumerate(zip(deltas, *classes, strict=True)):
        p, n = p.double(), n.double()
        w, b = logistic_probes(p[kept_p], n[kept_n])
        right = (_logits(p[held_p], w, b) > 0).sum(0) + (_logits(n[held_n], w, b) <= 0).sum(0)
        scored += [(float(right[h]) / (len(held_p) + len(held_n)), -i, -h) for h in range(len(w))]
        theta = p.mean(0) - n.mean(0) if direction == "mean" else w
        theta = theta / theta.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        sigma = (torch.cat([p, n]) * theta).sum(-1).std(0)
        found.append((sigma.unsqueeze(-1) * theta).to(d.v.dtype))
    for d in deltas:
        d.v.zero_()
    chosen = [(accuracy, -i, -h) for accuracy, i, h in sorted(scored, reverse=True)[:heads]]
    for _, i, h in chosen:
        deltas[i].v[h] = found[i][h]
    return [(deltas[i].site.path, h, accuracy) for accuracy, i, h in chosen]


def _split(sizes: list[int], share: float, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(kept, held out) rows of each class."""
    generator, out = torch.Generator().manual_seed(seed), []
    orders = [torch.randperm(n, generator=generator) for n in sizes]
    for n, order in zip(sizes, [orders[0]] * 2 if sizes[0] == sizes[1] else orders, strict=True):
        few = max(1, round(share * n))
        if few >= n:
            raise ConfigError(
                f"held_out {share} of {n} inputs leaves none to fit the probes on; give more, or held_out="
            )
        out.append((order[few:], order[:few]))
    return out


def _logits(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """[n, heads, width], w [heads, width], b [heads] -> [n, heads]."""
    return (z * w).sum(-1) + b


def logistic_probes(positive: Tensor, negative: Tensor, *, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weights [heads, width] and biases [heads] of one logistic regression a head, which minimise `penalty / 2 |w|^2 +
    sum log(1 + exp(-+ (w z + b)))` by Newton's method with halved steps.

    Args:
        positive, negative: float64 activations [n, heads, width] of each class.
    """
    z = torch.cat([positive, negative]).transpose(0, 1)  # [heads, n, width]
    x = torch.cat([z, torch.ones_like(z[..., :1])], -1)
    sign = torch.cat([torch.ones(len(positive)), -torch.ones(len(negative))]).to(z)
    ridge = torch.full(x.shape[-1:], penalty, dtype=x.dtype, device=x.device)
    ridge[-1] = 0
    theta = x.new_zeros(len(x), x.shape[-1])

    def loss(theta: Tensor) -> Tensor:
        margin = sign * (x @ theta.unsqueeze(-1)).squeeze(-1)
        return 0.5 * (ridge * theta.square()).sum(-1) + F.softplus(-margin).sum(-1)

    for _ in range(NEWTON):
        p = torch.sigmoid((x @ theta.unsqueeze(-1)).squeeze(-1))
        gradient = ((p - (sign > 0).to(p)).unsqueeze(1) @ x).squeeze(1) + ridge * theta
        if float(gradient.abs().max()) < 1e-9 * len(sign):
            break
        hessian = (x * (p * (1 - p)).unsqueeze(-1)).mT @ x + torch.diag(ridge + 1e-9)
        step = torch.linalg.solve(hessian, gradient)
        here, size = loss(theta), torch.ones_like(theta[:, :1])
        for _ in range(NEWTON):
            worse = loss(theta - size * step) > here - 1e-4 * size[:, 0] * (gradient * step).sum(-1) + 1e-12 * here
            if not bool(worse.any()):
                break
            size = torch.where(worse.unsqueeze(-1), size / 2, size)
        theta = theta - size * step
    return theta[:, :-1], theta[:, -1]


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
