"""What one adapted model shares among all its slots: which adapters exist, which are active, merged, bare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError, NameNotFound, nearest


@dataclass(frozen=True)
class Active:
    """Which adapters a forward uses.

    `names` alone is a composition, left to right, each adapter seeing its predecessor's weight. With `weights` it is the
    weighted sum of effective deltas. With `rows`, row i of the batch uses adapter `names[rows[i]]`, -1 the base.
    """

    names: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    rows: tuple[int, ...] | None = None
    base: bool = False  # `use(None)`: the base bit for bit, merged adapters included

    def weighted(self) -> Iterator[tuple[str, float]]:
        """(name, weight) pairs; weight 1 in a composition."""
        yield from zip(self.names, self.weights or (1.0,) * len(self.names), strict=True)


@dataclass
class Entry:
    """One named adapter: its plan as data, and what else its file records."""

    rules: list[dict[str, Any]]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class State:
    """Shared by every slot of an adapted model; copied and pickled with it."""

    entries: dict[str, Entry] = field(default_factory=dict)
    active: Active = field(default_factory=Active)
    merged: tuple[str, ...] = ()
    bare: bool = False
    probing: bool = False  # liveness: count which sites a forward reaches
    requires_grad: dict[str, bool] = field(default_factory=dict)  # of the base before the first attach
    training: dict[str, bool] = field(default_factory=dict)
    seen: set[Active] = field(default_factory=set)  # active sets of the grad-enabled forwards since the last backward
    in_backward: bool = False
    override: Active | None = None  # within one call that runs a part of the batch
    probe_batch: int = 0  # batch size of the liveness probe's input
    row_index: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse names of adapters the model does not have."""
        for name in names:
            if name not in self.entries:
                known = f"it has {', '.join(self.entries)}" if self.entries else "it has none"
                raise NameNotFound(f"the model has no adapter {name!r}{nearest(name, self.entries)}; {known}")

    def current(self) -> Active:
        """The active set of this call, also inside the recomputation of activation checkpointing.

        A recomputation runs during the backward and must repeat its forward. The active set may have changed since (a
        `with use(...)` that ended), so every grad-enabled forward notes its set; if the forwards since the last
        backward used one, that one is repeated, else nothing tells which it was.

        Raises:
            ConfigError: recomputation, and the forwards before it used different active sets.
        """
        if self.override is not None:
            return self.override
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.active
        if torch._C._current_graph_task_id() == -1:
            if self.in_backward:
                self.seen.clear()
                self.in_backward = False
            self.seen.add(self.active)
            return self.active
        self.in_backward = True
        if len(self.seen) > 1:
            raise ConfigError(
                "activation checkpointing recomputes a forward, but the forwards before this backward used different "
                "adapters; call backward inside each `with mmpeft.use(...)`"
            )
        return next(iter(self.seen), self.active)

    def rows_of(self, active: Active, device: torch.device) -> Tensor:
        """`active.rows` as an index tensor [batch]; the base is the last index, len(names)."""
        assert active.rows is not None
        key = (active.rows, len(active.names), device)
        if key not in self.row_index:
            self.row_index.clear()
            index = [len(active.names) if i < 0 else i for i in active.rows]
            self.row_index[key] = torch.tensor(index, device=device)
        return self.row_index[key]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"row_index": {}, "seen": set()}


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(owner path, owner, slot) for every slot below `model`."""
    for path, module in model.named_modules():
        slot = module._modules.get(SLOT)
        if slot is not None:
            yield path, module, slot


SLOT = "_adapters"


def find_state(model: nn.Module) -> State | None:
    """The state of an adapted model, or None."""
    return next((slot.state for _, _, slot in slots(model)), None)


def state_of(model: nn.Module) -> State:
    """The state of an adapted model.

    Raises:
        ConfigError: nothing is attached.
    """
    state = find_state(model)
    if state is None:
        raise ConfigError(f"this {type(model).__name__} has no adapter; call mmpeft.attach(model, plan) first")
    return state


def make_active(
    state: State,
    names: str | Sequence[str] | Mapping[str, float] | None,
    rows: Sequence[str | None] | None = None,
) -> Active:
    """The `Active` for what a caller passes to `use`: a name, a list, a mapping, None, or rows of a batch."""
    if rows is not None:
        order = tuple(dict.fromkeys(name for name in rows if name is not None))
        state.check_names(order)
        return Active(order, rows=tuple(-1 if name is None else order.index(name) for name in rows))
    if names is None:
        return Active(base=True)
    if isinstance(names, str):
        names = [names]
    state.check_names(list(names))
    if isinstance(names, Mapping):
        if len(names) == 1 and next(iter(names.values())) == 1.0:  # one adapter at weight 1 is that adapter
            return Active(tuple(names))
        return Active(tuple(names), tuple(float(w) for w in names.values()))
    if len(set(names)) != len(names):
        raise ConfigError(f"adapter names {list(names)} repeat")
    return Active(tuple(names))
