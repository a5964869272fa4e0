"""What a probe of a model needs: its call, noise in the adapters, one number of its output, and everything put back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta

Call = tuple[tuple[Any, ...], dict[str, Any]]


def twins(value: Any, batch: int) -> Any:
    """Every tensor of `batch` rows with row 1 replaced by row 0."""
    if isinstance(value, Tensor):
        return torch.cat([value[:1], value[:1], value[2:]]) if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {k: twins(v, batch) for k, v in value.items()}
    return tuple(twins(v, batch) for v in value) if isinstance(value, tuple | list) else value


@contextmanager
def noise(deltas: Iterable[Delta], draw: int = 0) -> Iterator[dict[int, Tensor]]:
    """Add noise (the `draw`-th) to the trained tensors: a zero factor would hide a dead partner. Yields the values
    before."""
    params = [p for d in deltas for n in d.trained if (p := d._parameters[n]) is not None]
    kept, flags = {id(p): p.detach().clone() for p in params}, [p.requires_grad for p in params]
    generator = torch.Generator().manual_seed(draw)
    try:
        for p in params:
            p.requires_grad_(True)
        with torch.no_grad():
            for p in params:
                change = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
                p.add_(change * (0.02 + 0.1 * float(p.abs().mean())))
        yield kept
    finally:
        for p, flag in zip(params, flags, strict=True):
            p.requires_grad_(flag)
        with torch.no_grad():
            for p in params:
                p.copy_(kept[id(p)])


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Restore buffers, modes and every random state (transformers masks spectrograms by numpy's)."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    modes = [(m, m.training) for m in model.modules()]
    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    others = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(cards):
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])
            model.train(model.training)  # adapters drop what they keep between steps
            for m, mode in modes:  # the root of a model that has adapters is frozen, and they are not
                m.training = mode
            with torch.no_grad():
                for b, value in buffers:
                    b.copy_(value)


def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def scalar(output: Any) -> Tensor:
    """A number that depends on every floating-point output, with random signs so that nothing cancels."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(())
    for t in tensors_in(output):
        if t.is_floating_point() and t.requires_grad:
            signs = torch.randn(t.shape, generator=generator).to(t.device)
            total = total.to(t.device) + (t.float() * signs).sum()
    return total


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from tensors_in(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from tensors_in(v)
    elif hasattr(value, "__dataclass_fields__"):
        for n in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, n))


def as_call(example: Any) -> Call:
    """An example as (args, kwargs): a dict is keyword arguments, a tuple or list arguments, else the argument."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    return (example,), {}
