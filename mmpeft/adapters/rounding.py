"""What half precision does to an adapter: gradients that are nothing but rounding error, and deltas that W swallows."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta
from mmpeft.adapters.probe import Call, noise, scalar, seed
from mmpeft.adapters.site import slice_rows

log = logging.getLogger("mmpeft")


def rounding_unit(owner: nn.Module, delta: Delta) -> float:
    """The rounding unit of the arithmetic around a site."""
    stored = owner._parameters.get(delta.site.tensor)
    found = next((t for t in (stored, *owner.parameters()) if t is not None and t.is_floating_point()), None)
    if found is None:
        return torch.finfo(torch.float32).eps
    kind = found.device.type
    dtype = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else found.dtype
    return torch.finfo(dtype).eps


def incoherent(model: nn.Module, call: Call, sites: Mapping[str, Delta]) -> set[str]:
    """Names of the sites whose gradient in eval is another one when it is taken again, so that it is rounding error.

    The gradients are taken twice, the second time with the loss scaled by no power of two and the vectors among the
    sites at other noise. A true gradient scales with the loss (measured within 20 % in bf16 and fp16); rounding error
    is drawn anew (65 % and more of its norm).
    """
    if not sites:
        return set()
    model.eval()
    params = {n: [p for t in d.trained if (p := d._parameters[t]) is not None] for n, d in sites.items()}
    flat = [p for group in params.values() for p in group]
    vectors = [d for d in sites.values() if len(d.site.shape) == 1]
    taken: list[dict[int, Tensor]] = []
    for draw, scale in enumerate((1.0, 1.37)):
        with noise(vectors, draw=draw) if draw else nullcontext():
            seed()
            grads = torch.autograd.grad(scale * scalar(model(*call[0], **call[1])), flat)
        taken.append({id(p): g.double() / scale for p, g in zip(flat, grads, strict=True)})
    one, two = taken
    size = {n: sum(float(one[id(p)].square().sum()) for p in group) for n, group in params.items()}
    change = {n: sum(float((one[id(p)] - two[id(p)]).square().sum()) for p in group) for n, group in params.items()}
    return {n for n in params if change[n] > 0.4**2 * size[n]}


def warn_rounding(name: str, materialised: list[tuple[nn.Module, Delta]]) -> None:
    """On a bf16 or fp16 base, say what W + delta loses where it is formed, on a delta of 1e-3 of the weight."""
    worst: tuple[float, float, Delta] | None = None
    found: list[str] = []
    for owner, delta in materialised:
        stored = owner._parameters.get(delta.site.tensor)
        if stored is None or stored.dtype not in (torch.bfloat16, torch.float16) or delta.method.name == "full":
            continue
        assert delta.site.layout is not None
        w = slice_rows(delta.site.layout.to_matrix(stored.detach()), delta.site.rows).flatten()[:65536].float()
        small = 1e-3 * w.abs() * torch.randn(w.shape, generator=torch.Generator().manual_seed(0)).to(w.device)
        kept = (w + small).to(stored.dtype).float() - w
        error = float((kept - small).norm() / small.norm().clamp_min(1e-30))
        lost = float(((kept == 0) & (small != 0)).float().mean())
        found.append(delta.site.name)
        if worst is None or error > worst[0]:
            worst = (error, lost, delta)
    if worst is not None:
        log.warning(
            "adapter %r: %d sites are formed as one weight on a half-precision base, where W + delta is rounded: of a "
            "delta of 1e-3 of the weight, %.0f %% of the entries are lost and the error is %.0f %% of its norm (at "
            "%s). Keep the base in float32 there, or adapt layers that are called: %s",
            name, len(found), 100 * worst[1], 100 * worst[0], worst[2].site.name, few(found),
        )  # fmt: skip


def few(names: Collection[str], n: int = 4) -> str:
    return ", ".join(sorted(names)[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
