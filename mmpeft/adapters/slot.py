"""The slot: the child module that holds all adapters of one owner, and what they make of its weight or its call.

Two execution plans share the same tensors. Whatever code reads `owner.weight` gets the *materialised* W'
(`Slot.effective`). Where the owner itself is called and the update is low-rank, the generated class's forward takes
the *factored* route instead (`Slot.parts`, used in `forward.py`), and W' is never formed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta, Factors, wide
from mmpeft.adapters.rows import join_rows, only_rows, split_rows, take_rows
from mmpeft.adapters.site import put_rows, slice_rows
from mmpeft.adapters.state import Active, State
from mmpeft.adapters.versions import versions_tell
from mmpeft.adapters.wrapped import is_sharded
from mmpeft.errors import ConfigError, Unsupported

if TYPE_CHECKING:
    from mmpeft.adapters.stack import Stack


@dataclass(frozen=True)
class Part:
    """One factored update of rows [start, stop) of an owner's matrix."""

    start: int
    stop: int
    factors: Factors
    delta: Delta | None  # None: picked from a stack
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
        self.reads: dict[str, int] = {}  # liveness: how often W' of each tensor was formed
        self.runs: dict[str, int] = {}  # liveness: how often each tensor was used factored, or the call wrapped
        self.follows: dict[str, tuple[nn.Module, str]] = {}  # tied tensors: the owner and name that carry the delta
        self.cache: dict[str, Cached] = {}  # tensor name -> W', without gradients only
        self.kept: dict[Any, Tensor] | None = None  # W' within one call of what reads it, gradients or not
        self.stacks: dict[str, Stack] = {}  # tensor name -> all stacked adapters' updates (`mmpeft.stack`)
        self.inputs: list[tuple[int, Tensor]] = []  # liveness: (rows, summary of the first two) of each input
        self.rows_fit: bool | None = None  # whether liveness saw the batch on the first axis of this owner's input

    def deltas(self, names: tuple[str, ...] | None = None) -> Iterator[tuple[str, Delta]]:
        """(adapter name, Delta) in the order of `names` (default: all adapters here)."""
        for name in self._modules if names is None else names:
            group = self._modules.get(name)
            if group is not None:
                for delta in group._modules.values():  # `children` takes four times as long
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
            raise Unsupported(
                f"weighted use of {names}: only weight methods have a delta that can be scaled; pass a list"
            )
        return found

    # --- materialised ------------------------------------------------------------------------------------------------

    def effective(self, tensor: str, base: Tensor) -> Tensor:
        """W' of one tensor under the active set; `base` itself where nothing applies."""
        state = self.state
        if state.bare or is_sharded(base):  # FSDP2 reads its shard through this property and must see it
            return base
        if tensor in self.follows:
            owner, name = self.follows[tensor]
            return cast(Tensor, getattr(owner, name))
        if state.probing:
            self.reads[tensor] = self.reads.get(tensor, 0) + 1
        if state.indexed:
            stack = self.stacks.get(tensor)
            start = self.pinned.get(tensor, base)
            return start if stack is None else stack.weight(start)
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
            if self.kept is None:
                return self._compose(start, deltas, active)
            if (tensor, active) not in self.kept:
                self.kept[tensor, active] = self._compose(start, deltas, active)
            return self.kept[tensor, active]
        return self._cached(tensor, start, deltas, active)

    def compose(self, start: Tensor, deltas: list[tuple[str, Delta]]) -> Tensor:
        """W' under some deltas, one after the other."""
        return self._compose(start, deltas, Active())

    def _compose(self, start: Tensor, deltas: list[tuple[str, Delta]], active: Active) -> Tensor:
        with full_precision(start.device):
            w = start.to(wide(start.dtype))
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

    def _cached(self, tensor: str, start: Tensor, deltas: list[tuple[str, Delta]], active: Active) -> Tensor:
        """W' kept between reads without gradients, until a source, the active set or W' itself changes."""
        sources = (start, *(p for _, d in deltas for p in d.parameters()))
        if not versions_tell() or any(t.is_inference() for t in sources):  # inference tensors keep no version
            return self._compose(start, deltas, active)
        key = (active, tuple(t._version for t in sources), any(d.training for _, d in deltas))
        found = self.cache.get(tensor)
        if found is None or not found.fits(key, sources):
            with torch.inference_mode(False), torch.no_grad():
                value = self._compose(start, deltas, active)
            found = self.cache[tensor] = Cached(key, sources, value, value._version)
        return found.value

    # --- factored ----------------------------------------------------------------------------------------------------

    def parts(self, tensor: str, base: Tensor) -> tuple[Tensor, list[Part]] | None:
        """(starting weight, factored updates) under the active set, or None where W' has to be materialised."""
        state = self.state
        if state.bare:
            return base, []
        start = self.pinned.get(tensor, base)
        if state.indexed:
            stack = self.stacks.get(tensor)
            parts = [] if stack is None else stack.parts()
            return None if parts is None else (start, parts)
        active = state.current()
        if active.base:
            return base, []
        if is_sharded(start) or tensor in self.follows:
            return None
        found: list[Part] = []
        for name, weight in active.weighted():
            if name in state.merged:
                continue
            for _, delta in self.at(tensor, (name,)):
                part = part_of(start, delta, weight)
                if part is None:
                    return None
                found.append(part)
        scaled = any(not p.factors.additive for p in found)
        if scaled and (overlap(found) or any(p.weight != 1 for p in found)):
            return None  # a row or column scale composes with nothing else on the same rows
        return start, found

    def rows_parts(self, tensor: str, start: Tensor) -> list[list[Part]]:
        """Updates per adapter of the active names, for a batch whose rows use different adapters."""
        active = self.state.current()
        groups: list[list[Part]] = []
        for name in active.names:
            group = []
            for _, delta in self.at(tensor, (name,)):
                part = part_of(start, delta) if delta.method.mixes else None
                if part is None:
                    raise Unsupported(f"rows= at {delta.site.name}: {delta.method.name} cannot differ within a batch")
                group.append(part)
            groups.append(group)
        return groups

    def rows_vectors(self, tensor: str, base: Tensor) -> Tensor:
        """A bias under each adapter of `active.names` and, last, the base's: [n + 1, out]; [1, out] if untouched."""
        active = self.state.current()
        start = self.pinned.get(tensor, base)
        found = [self.at(tensor, (name,)) for name in active.names]
        if not any(found):
            return start.unsqueeze(0)
        return torch.stack([self.compose(start, deltas) for deltas in [*found, []]])

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
            self.runs["call"] = self.runs.get("call", 0) + 1
        if state.watching:
            self.watch(next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None))
        if active.rows is not None:
            return self._around_rows(call, deltas, active, args, kwargs)
        for delta in deltas:
            call = partial(delta.method.around, delta, call)
        return call(*args, **kwargs)

    def _around_rows(
        self,
        call: Callable[..., Any],
        deltas: list[Delta],
        active: Active,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Each adapter's rows through its own call: outputs must be tensors (or tuples of them), batch first."""
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

    def watch(self, x: Tensor | None) -> None:
        """Note how many rows the input has, and two numbers of each of its first two rows."""
        if x is None or not x.ndim or len(x) < 2:
            self.inputs.append((-1, torch.zeros(())))
            return
        rows = x.detach()[:2].reshape(2, -1).double()
        self.inputs.append((len(x), torch.stack([rows.sum(1), rows.square().sum(1)], 1)))

    # --- copies ------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"cache": {}, "kept": None, "stacks": {}, "reads": {}, "runs": {}, "inputs": []}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slot:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.pinned = {name: fn(t) for name, t in self.pinned.items()}
        self.cache, self.stacks, self.state.indexed = {}, {}, ""  # `use` stacks again on the new device
        return self

    def extra_repr(self) -> str:
        return ", ".join(self._modules)


@dataclass(frozen=True)
class Cached:
    """A materialised W', and what it was made of."""

    key: tuple[Any, ...]
    sources: tuple[Tensor, ...]  # the tensors themselves: an id could be used again
    value: Tensor
    version: int

    def fits(self, key: tuple[Any, ...], sources: tuple[Tensor, ...]) -> bool:
        """Whether nothing changed, the value included (code that initialises in place writes to what it reads)."""
        same = self.key == key and len(sources) == len(self.sources)
        return same and all(map(operator.is_, self.sources, sources)) and self.value._version == self.version


@contextmanager
def one_call(slots: list[Slot]) -> Iterator[None]:
    """Within one call of the module that reads them, each W' of these slots is formed once, though MultiheadAttention
    reads its own three to five times; a random method draws once."""
    before = [slot.kept for slot in slots]
    for slot, kept in zip(slots, before, strict=True):
        slot.kept = {} if kept is None else kept
    try:
        yield
    finally:
        for slot, kept in zip(slots, before, strict=True):
            slot.kept = kept


def full_precision(device: torch.device) -> Any:
    """Autocast off: weights and factors are formed at their own precision, whatever the forward around rounds to."""
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def part_of(start: Tensor, delta: Delta, weight: float = 1.0) -> Part | None:
    """The factored update of the stored tensor `start` by one delta, or None where the method has no factors."""
    layout, rows = delta.site.layout, delta.site.rows
    check_shape(start, delta)
    assert layout is not None
    with full_precision(start.device):
        matrix = slice_rows(layout.to_matrix(start), rows)
        factors = delta.method.factors(matrix, delta)
    if factors is None:
        return None
    begin, stop = rows or (0, matrix.shape[-2])
    return Part(begin, stop, factors, delta, weight)


def overlap(parts: list[Part]) -> bool:
    """Whether two of the updates share rows."""
    edges = sorted((p.start, p.stop) for p in parts)
    return any(a[1] > b[0] for a, b in zip(edges, edges[1:], strict=False))


def check_shape(w: Tensor, delta: Delta) -> None:
    """Refuse a weight that was resized under its adapter."""
    layout = delta.site.layout
    if layout is not None and tuple(w.shape) != layout.shape:
        raise ConfigError(
            f"{delta.site.name} has shape {tuple(w.shape)}, but its adapter was made for {layout.shape}: resize the "
            "base first, then attach"
        )


def apply(w: Tensor, delta: Delta) -> Tensor:
    """The stored tensor `w` under one delta."""
    site = delta.site
    check_shape(w, delta)
    assert site.layout is not None
    m = site.layout.to_matrix(w)
    new = delta.method.weight(slice_rows(m, site.rows), delta)
    return site.layout.from_matrix(put_rows(m, new, site.rows))
