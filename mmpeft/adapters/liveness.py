"""Proof that every adapter site is alive: it changes the output, and it gets a gradient.

Peers attach to weights that nobody calls (EVA's qkv, MultiheadAttention's out_proj, an encoder layer's fast path) and
train nothing without a sign. Here `attach` fills the new adapter with noise, runs a small input in train mode, in eval,
and in eval without gradients, and looks at each site: was it read or called in all three, and did a gradient reach its
tensors in the first two. Buffers, random state and adapters are put back.

A site is dead (an error) if the module around it ran but the site took no part, unreached (a warning) if that module did
not run on this input (an expert without tokens, the other tower), and invariant (a log line) if it ran but its gradient
is at rounding level (a key bias cancels in the softmax).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta
from mmpeft.adapters.slot import Slot
from mmpeft.adapters.state import slots, state_of
from mmpeft.errors import DeadSite

log = logging.getLogger("mmpeft")


def prove(model: nn.Module, name: str, example: Any) -> None:
    """Raise unless every site of adapter `name` is alive on `example`.

    Raises:
        DeadSite: naming the dead sites and the mode in which they are dead.
    """
    args, kwargs = as_call(example)
    if any(t.is_meta for t in model.parameters()):
        return  # nothing can run yet
    mine = [(path, owner, slot, d) for path, owner, slot in slots(model) for _, d in slot.deltas((name,))]
    state = state_of(model)
    state.probe_batch = next((t.shape[0] for t in _tensors((args, kwargs)) if t.ndim), 0)
    dead: dict[str, list[str]] = {}
    small: dict[str, float] = {}
    with _noise(mine), _put_back(model), torch.enable_grad():
        for mode in ("train", "eval", "eval without gradients"):
            for _, _, slot, _ in mine:
                slot.hits.clear()
            model.train(mode == "train")
            state.probing = True
            try:
                if mode == "eval without gradients":
                    with torch.no_grad():
                        model(*args, **kwargs)
                    gradients: dict[int, Tensor | None] = {}
                else:
                    loss = _scalar(model(*args, **kwargs))
                    params = [p for _, _, _, d in mine for n in d.trained for p in [d._parameters[n]]]
                    grads = torch.autograd.grad(loss, params, allow_unused=True) if loss.requires_grad else [None] * len(params)
                    gradients = {id(p): g for p, g in zip(params, grads, strict=True)}
            finally:
                state.probing = False
            for _, owner, slot, delta in mine:
                hit = slot.hits.get(delta.site.tensor or "call", 0) > 0 or delta.site.tensor in _followed(model, owner)
                size = _gradient_size(delta, gradients)
                if not hit or (gradients and size is None):
                    dead.setdefault(mode, []).append(delta.site.name)
                elif size is not None and mode == "eval":
                    small[delta.site.name] = size
        unreached = _unreached(model, dead, args, kwargs) if dead else set()
    _report(name, dead, unreached, small)


def _report(name: str, dead: dict[str, list[str]], unreached: set[str], small: dict[str, float]) -> None:
    dead = {mode: [s for s in sites if s not in unreached] for mode, sites in dead.items()}
    if any(dead.values()):
        lines = [f"  in {mode}: {_few(sites, 6)}" for mode, sites in dead.items() if sites]
        raise DeadSite(
            f"adapter {name!r} would train nothing at some sites, because the model does not use them\n"
            + "\n".join(lines)
            + "\nExclude them with '!', or pass example= with an input that reaches them."
        )
    if unreached:
        log.warning("%d sites of adapter %r were not reached by the example: %s", len(unreached), name, _few(unreached))
    median = sorted(small.values())[len(small) // 2] if small else 0.0
    invariant = [site for site, size in small.items() if size < 1e-6 * median]
    if invariant:
        log.info("the output does not depend on %d sites of adapter %r: %s", len(invariant), name, _few(invariant))


def _few(names: Collection[str], n: int = 4) -> str:
    return ", ".join(sorted(names)[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _gradient_size(delta: Delta, gradients: dict[int, Tensor | None]) -> float | None:
    """Largest gradient over the site's trained tensors; None if one of them got none. A site that shares all its
    tensors with another (IA3's bias) is proved by that one."""
    sizes = []
    for n in delta.trained:
        g = gradients.get(id(delta._parameters[n]))
        if g is None or not bool(g.any()):
            return None
        sizes.append(float(g.abs().max()))
    return max(sizes, default=1.0)


def _followed(model: nn.Module, owner: nn.Module) -> set[str]:
    """Tensors of `owner` whose delta was read through a tied name."""
    found = set()
    for _, _, slot in slots(model):
        found |= {name for tensor, (o, name) in slot.follows.items() if o is owner and slot.hits.get(tensor)}
    return found


def _unreached(model: nn.Module, dead: dict[str, list[str]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """Dead sites whose surrounding module did not run either. A second run with hooks tells; the first has none, since
    a hook switches off the very fast paths that hide dead sites."""
    suspects = {site for sites in dead.values() for site in sites}
    modules = dict(model.named_modules())
    around: dict[str, nn.Module] = {}
    for path, _, slot in slots(model):
        for _, delta in slot.deltas():
            if delta.site.name in suspects:
                above = path if delta.site.layout is None else path.rpartition(".")[0]
                while above and isinstance(modules[above], nn.ModuleList | nn.ModuleDict):
                    above = above.rpartition(".")[0]
                around[delta.site.name] = modules[above]
    ran: set[int] = set()
    hooks = [m.register_forward_pre_hook(lambda m, _: ran.add(id(m))) for m in set(around.values())]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {site for site, module in around.items() if id(module) not in ran}


@contextmanager
def _noise(mine: list[tuple[str, nn.Module, Slot, Delta]]) -> Iterator[None]:
    """Fill the trained tensors with noise: a zero factor would hide that its partner is dead."""
    kept = [(p, p.detach().clone()) for _, _, _, d in mine for n in d.trained for p in [d._parameters[n]] if p is not None]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p, value in kept:
                noise = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
                p.add_(noise * (0.02 + 0.1 * float(value.abs().mean())))
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Restore buffers, modes and the random state of every device."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    training = model.training
    with torch.random.fork_rng():
        try:
            yield
        finally:
            model.train(training)
            with torch.no_grad():
                for b, value in buffers:
                    b.copy_(value)


def _scalar(output: Any) -> Tensor:
    """A number that depends on every floating-point output, with random signs so that nothing cancels."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(())
    for t in _tensors(output):
        if t.is_floating_point() and t.requires_grad:
            signs = torch.randn(t.shape, generator=generator).to(t.device)
            total = total.to(t.device) + (t.float() * signs).sum()
    return total


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _tensors(v)
    elif hasattr(value, "__dataclass_fields__"):
        for n in value.__dataclass_fields__:
            yield from _tensors(getattr(value, n))


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as (args, kwargs): a dict is keyword arguments, a tuple or list arguments, anything else the argument."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    return (example,), {}
