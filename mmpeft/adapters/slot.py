"""The slot: the child module that holds all adapters of one owner, and what they make of its weight or its call.

Two execution plans share the same tensors. Whatever code reads `owner.weight` gets the *materialised* W'
(`Slot.effective`). Where the owner itself is called and the update is low-rank, the generated class's forward takes
the *factored* route instead (`Slot.parts`, used in `forward.py`), and W' is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmpeft.adapters.method import Delta, Factors, wide
from mmpeft.adapters.site import put_rows, slice_rows
from mmpeft.adapters.state import Active, State
from mmpeft.errors import ConfigError, Unsupported


@dataclass(frozen=True)
class Part:
    """One factored update of rows [start, stop) of an owner's matrix."""

    start: int
    stop: int
    factors: Factors
    delta: Delta
    weight: float = 1.0

    @property
    def scale(self) -> float:
        """The method's scale times the adapter's weight in the active set."""
        return self.factors.scale * self.weight


class Slot(nn.Module):
    """Children: adapter name -> ModuleDict(site key -> Delta). One per adapted owner."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state
        self.pinned: dict[str, Tensor] = {}  # tensor name -> merged W', beside the untouched base
        self.hits: dict[str, int] = {}  # liveness: how often each tensor (or the call) was read
        self.follows: dict[str, tuple[nn.Module, str]] = {}  # tied tensors: the owner and name that carry the delta
        self.cache: dict[str, tuple[Any, Tensor]] = {}  # tensor name -> (versions, W'), without gradients only
        self.rows_fit = True  # liveness saw the batch on the first axis of this owner's input

    def deltas(self, names: tuple[str, ...] | None = None) -> Iterator[tuple[str, Delta]]:
        """(adapter name, Delta) in the order of `names` (default: all adapters here)."""
        for name in self._modules if names is None else names:
            group = self._modules.get(name)
            if group is not None:
                for delta in group.children():
                    assert isinstance(delta, Delta)
                    yield name, delta

    def at(self, tensor: str, names: tuple[str, ...]) -> list[tuple[str, Delta]]:
        """The active deltas on one tensor of the owner."""
        return [(n, d) for n, d in self.deltas(names) if d.site.kind == "weight" and d.site.tensor == tensor]

    def calls(self, active: Active) -> list[Delta]:
        """The active call and token methods, outermost last."""
        found = [d for n, d in self.deltas(active.names) if d.site.kind != "weight"]
        if found and active.rows is None and active.weights is not None and set(active.weights) != {1.0}:
            names = ", ".join(sorted({d.method.name for d in found}))
            raise Unsupported(f"weighted use of {names}: only weight methods have a delta that can be scaled; pass a list")
        return found

    # --- materialised ------------------------------------------------------------------------------------------------

    def effective(self, tensor: str, base: Tensor) -> Tensor:
        """W' of one tensor under the active set; `base` itself where nothing applies."""
        state = self.state
        if state.bare or isinstance(base, DTensor):  # FSDP2 reads its shard through this property and must see it
            return base
        if tensor in self.follows:
            owner, name = self.follows[tensor]
            return cast(Tensor, getattr(owner, name))
        if state.probing:
            self.hits[tensor] = self.hits.get(tensor, 0) + 1
        active = state.current()
        if active.base:
            return base
        start = self.pinned.get(tensor, base)
        todo = tuple(n for n in active.names if n not in state.merged)
        deltas = self.at(tensor, todo)
        if not deltas:
            return start
        if active.rows is not None:
            raise Unsupported(
                f"rows= at {deltas[0][1].site.name}: this weight is read, not called, so all rows of a batch share it; "
                "use one adapter a batch"
            )
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self.cache.pop(tensor, None)
            return self._compose(start, deltas, active)
        key = self._versions(start, deltas, active)
        found = self.cache.get(tensor)
        if key is None or found is None or found[0] != key:
            found = (key, self._compose(start, deltas, active))
            self.cache[tensor] = found
        return found[1]

    def _compose(self, start: Tensor, deltas: list[tuple[str, Delta]], active: Active) -> Tensor:
        dtype = wide(start.dtype)
        w = start.to(dtype)
        if active.weights is None:
            for _, delta in deltas:
                w = apply(w, delta)
        else:
            total = w
            for name, weight in active.weighted():
                changed = w
                for n, delta in deltas:
                    changed = apply(changed, delta) if n == name else changed
                total = total + weight * (changed - w) if changed is not w else total
            w = total
        return w.to(start.dtype)

    def _versions(self, start: Tensor, deltas: list[tuple[str, Delta]], active: Active) -> Any:
        try:
            tensors = [start, *(p for _, d in deltas for p in d.parameters())]
            return (active, tuple((id(t), t._version) for t in tensors), any(d.training for _, d in deltas))
        except RuntimeError:  # inference tensors keep no version
            return None

    # --- factored ----------------------------------------------------------------------------------------------------

    def parts(self, tensor: str, base: Tensor) -> tuple[Tensor, list[Part]] | None:
        """(starting weight, factored updates) under the active set, or None where W' has to be materialised."""
        state = self.state
        active = state.current()
        if state.bare or active.base:
            return base, []
        start = self.pinned.get(tensor, base)
        if isinstance(start, DTensor) or tensor in self.follows:
            return None
        found: list[Part] = []
        for name, weight in active.weighted():
            if name in state.merged:
                continue
            for _, delta in self.at(tensor, (name,)):
                layout, rows = delta.site.layout, delta.site.rows
                assert layout is not None
                matrix = slice_rows(layout.to_matrix(start), rows)
                factors = delta.method.factors(matrix, delta)
                if factors is None:
                    return None
                begin, stop = rows or (0, matrix.shape[-2])
                found.append(Part(begin, stop, factors, delta, weight))
        scaled = any(not p.factors.additive for p in found)
        if scaled and (len({p.start for p in found}) < len(found) or any(p.weight != 1 for p in found)):
            return None  # a row or column scale composes with nothing else on the same rows
        if state.probing and found:
            self.hits[tensor] = self.hits.get(tensor, 0) + 1
        return start, found

    def rows_parts(self, tensor: str, base: Tensor) -> tuple[Tensor, list[list[Part]]]:
        """(starting weight, updates per adapter of `active.names`) for a batch whose rows use different adapters."""
        active = self.state.current()
        start = self.pinned.get(tensor, base)
        groups: list[list[Part]] = []
        for name in active.names:
            group = []
            for _, delta in self.at(tensor, (name,)):
                layout, rows = delta.site.layout, delta.site.rows
                assert layout is not None
                matrix = slice_rows(layout.to_matrix(start), rows)
                factors = delta.method.factors(matrix, delta) if delta.method.mixes else None
                if factors is None:
                    raise Unsupported(f"rows= at {delta.site.name}: {delta.method.name} cannot differ within a batch")
                begin, stop = rows or (0, matrix.shape[-2])
                group.append(Part(begin, stop, factors, delta))
            groups.append(group)
        return start, groups

    # --- calls -------------------------------------------------------------------------------------------------------

    def around(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a frozen call inside the active call methods, the last adapter outermost."""
        state = self.state
        active = state.current()
        if state.bare or active.base:
            return call(*args, **kwargs)
        deltas = self.calls(active)
        if not deltas:
            return call(*args, **kwargs)
        if state.probing:
            self.hits["call"] = self.hits.get("call", 0) + 1
        if active.rows is not None:
            return self._around_rows(call, deltas, active, args, kwargs)
        for delta in deltas:
            call = partial(delta.method.around, delta, call)
        return call(*args, **kwargs)

    def _around_rows(
        self, call: Callable[..., Any], deltas: list[Delta], active: Active, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Each adapter's rows through its own call: outputs must be tensors (or tuples of them) with the batch first."""
        for delta in deltas:
            if delta.site.kind == "tokens" or not delta.method.mixes:
                raise Unsupported(f"rows= at {delta.site.name}: {delta.method.name} cannot differ within a batch")
        assert active.rows is not None
        batch = len(active.rows)
        out: list[Any] = [None] * batch
        for i in sorted(set(active.rows)):
            index = [b for b, r in enumerate(active.rows) if r == i]
            inner = call
            for _, delta in self.deltas((active.names[i],) if i >= 0 else ()):
                inner = partial(delta.method.around, delta, inner) if delta.site.kind != "weight" else inner
            with only_rows(self.state, Active(active.names, rows=(i,) * len(index))):
                result = inner(*take_rows(args, index, batch), **take_rows(kwargs, index, batch))
            for b, row in zip(index, split_rows(result, len(index)), strict=True):
                out[b] = row
        return join_rows(out)

    # --- copies ------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"cache": {}, "hits": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slot:
        super()._apply(fn, recurse)
        self.pinned = {name: fn(t) for name, t in self.pinned.items()}
        self.cache = {}
        return self

    def extra_repr(self) -> str:
        return ", ".join(self._modules)


def apply(w: Tensor, delta: Delta) -> Tensor:
    """The stored tensor `w` under one delta."""
    site = delta.site
    assert site.layout is not None
    m = site.layout.to_matrix(w)
    new = delta.method.weight(slice_rows(m, site.rows), delta)
    return site.layout.from_matrix(put_rows(m, new, site.rows))


class only_rows:
    """Within it, the batch consists of some rows of the active set's batch."""

    def __init__(self, state: State, active: Active) -> None:
        self.state, self.before, self.active = state, state.override, active

    def __enter__(self) -> None:
        self.state.override = self.active

    def __exit__(self, *_: object) -> None:
        self.state.override = self.before


def take_rows(value: Any, index: list[int], batch: int) -> Any:
    """The rows `index` of every tensor whose first axis is the batch; other values as they are."""
    if isinstance(value, Tensor):
        return value[index] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {k: take_rows(v, index, batch) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(take_rows(v, index, batch) for v in value)
    return value


def split_rows(value: Any, n: int) -> list[Any]:
    """A call's output as one value per row."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == n:
        return list(value)
    if isinstance(value, tuple):
        columns = [split_rows(v, n) if v is not None else [None] * n for v in value]
        return [tuple(c[i] for c in columns) for i in range(n)]
    raise ConfigError(f"rows= needs calls that return tensors with the batch of {n} first; got {type(value).__name__}")


def join_rows(rows: list[Any]) -> Any:
    """Undo `split_rows`."""
    first = rows[0]
    if isinstance(first, tuple):
        return tuple(join_rows([r[i] for r in rows]) for i in range(len(first)))
    return None if first is None else torch.stack(rows)
