"""What one adapted model shares among all its slots: which adapters exist, which are active, merged, bare."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError, NameNotFound, nearest


@dataclass(frozen=True)
class Active:
    """Which adapters a forward uses.

    `names` alone is a composition, left to right, each adapter seeing its predecessor's weight. With `weights` it is
    the weighted sum of effective deltas. With `rows`, row i of the batch uses adapter `names[rows[i]]`, -1 the base.
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
    mixes: bool = False  # `use(rows=)` found that rows of a batch can have it; asked again after an attach or a proof


@dataclass
class State:
    """Shared by every slot of an adapted model; copied and pickled with it."""

    entries: dict[str, Entry] = field(default_factory=dict)
    active: Active = field(default_factory=Active)
    merged: tuple[str, ...] = ()
    bare: bool = False
    probing: bool = False  # liveness: count which sites a forward reaches
    watching: bool = False  # liveness: note the first two rows of every site's input
    requires_grad: dict[str, bool] = field(default_factory=dict)  # of the base before the first attach
    training: dict[str, bool] = field(default_factory=dict)
    frames: MutableMapping[Any, Active] = field(
        default_factory=weakref.WeakKeyDictionary
    )  # checkpoint -> its active set
    seen: set[Active] = field(default_factory=set)  # active sets of all forwards since the last recomputation
    in_backward: bool = False
    override: Active | None = None  # within one call that runs a part of the batch
    row_index: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    stacked: tuple[str, ...] = ()  # adapters that `mmpeft.stack` put side by side
    indexed: str = ""  # "one" or "rows": the active set is picked from the stacks by an index tensor
    restacked: int = 0  # counts up when `use` finds that a stacked adapter has changed, and stacks it again
    generation: int = 0  # counts up when the stacks lie somewhere else than before: a CUDA graph reads where they lay

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "active":  # whoever sets another active set leaves the stacks; `use` enters them again
            object.__setattr__(self, "indexed", "")
        object.__setattr__(self, name, value)

    def ask_again(self) -> None:
        """Something changed that decides which adapters rows of a batch can have."""
        for entry in self.entries.values():
            entry.mixes = False

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse names of adapters the model does not have."""
        for name in names:
            if name not in self.entries:
                known = f"it has {', '.join(self.entries)}" if self.entries else "it has none"
                raise NameNotFound(f"the model has no adapter {name!r}{nearest(name, self.entries)}; {known}")

    def current(self) -> Active:
        """The active set of this call, also inside the recomputation of activation checkpointing.

        A recomputation runs during the backward and must repeat its forward, though the active set may have changed
        since (a `with use(...)` that ended). Non-reentrant checkpointing has one frame object a checkpointed call, in
        its forward and in its recomputation: the frame's set is noted and repeated. Reentrant checkpointing (or a
        frame hidden by saved-tensor hooks of the user) has none: all sets used since the last recomputation are noted,
        and if they differ nothing tells which it was.

        Raises:
            ConfigError: such a recomputation, and the forwards before it used different active sets.
        """
        if torch.compiler.is_compiling():
            return self.active if self.override is None else self.override
        if torch._C._current_graph_task_id() == -1:  # a forward
            active = self.active if self.override is None else self.override
            if self.in_backward:
                self.seen.clear()
                self.in_backward = False
            self.seen.add(active)
            frame = checkpoint_frame() if torch.is_grad_enabled() else None
            if frame is not None:
                self.frames[frame] = active
            return active
        frame = checkpoint_frame()
        if frame is not None and frame in self.frames:
            return self.frames[frame]
        if self.override is not None:
            return self.override
        self.in_backward = True
        if len(self.seen) > 1:
            raise ConfigError(
                "activation checkpointing recomputes a forward, but the forwards before this backward used different "
                "adapters; use checkpoint(..., use_reentrant=False), or call backward inside each `with use(...)`"
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
        return {k: v for k, v in self.__dict__.items() if k != "frames"} | {
            "row_index": {},
            "seen": set(),
            "stacked": (),
            "indexed": "",
        }

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values, frames=weakref.WeakKeyDictionary())


def checkpoint_frame() -> Any:
    """The frame of the innermost non-reentrant `torch.utils.checkpoint` that this forward or recomputation is in."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    for cell in () if hooks is None else getattr(hooks[0], "__closure__", None) or ():
        held = cell.cell_contents
        held = held() if isinstance(held, weakref.ref) else held
        if type(held).__name__ == "_CheckpointFrame":
            return held
    return None


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(owner path, owner, slot) for every slot below `model`, in the order of `named_modules`, but not into the slots:
    nothing attaches there, and with 64 adapters they are most of the modules."""
    seen: set[int] = set()
    todo: list[tuple[str, nn.Module]] = [("", model)]
    while todo:
        path, module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        slot = module._modules.get(SLOT)
        if slot is not None:
            yield path, module, slot
        children = [(n, m) for n, m in module._modules.items() if m is not None and n != SLOT]
        todo += [(f"{path}.{n}" if path else n, m) for n, m in reversed(children)]


def sites_of(model: nn.Module, kind: type[Any] | tuple[type[Any], ...], name: str | None = None) -> list[Any]:
    """The `Delta` of every site whose method is a `kind`, of adapter `name` (None: of all).

    Raises:
        ConfigError: there is none.
        NameNotFound: no such adapter.
    """
    if name is not None:
        state_of(model).check_names([name])
    found = [d for _, _, slot in slots(model) for _, d in slot.deltas(None if name is None else (name,))]
    mine = [d for d in found if isinstance(d.method, kind)]
    if not mine:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        where = "the model" if name is None else f"adapter {name!r}"
        raise ConfigError(f"{where} has no site of {' or '.join(k.__name__ for k in kinds)}")
    return mine


SLOT = "_adapters"


def find_state(model: nn.Module) -> State | None:
    """The state of an adapted model, or None."""
    return next((slot.state for _, _, slot in slots(model)), None)


def state_of(model: nn.Module) -> State:
    """The state of an adapted model.

    Raises:
        ConfigError: nothing is attached, or parts of the model were adapted apart from each other.
    """
    found = _states(model)
    if not found:
        raise ConfigError(f"this {type(model).__name__} has no adapter; call mmpeft.attach(model, plan) first")
    if len(found) > 1:
        raise ConfigError(
            f"{len(found)} parts of this {type(model).__name__} were adapted apart; call this on each part"
        )
    state: State = next(iter(found.values()))
    return state


def _states(model: nn.Module) -> dict[int, State]:
    """Every state below `model`. `slots` without its paths, in a fifth of the time: every `use` looks."""
    found: dict[int, State] = {}
    todo, seen = [model], {id(model)}
    for module in todo:  # grows on the way
        slot: Any = module._modules.get(SLOT)
        if slot is not None:
            found[id(slot.state)] = slot.state
        for name, child in module._modules.items():
            if child is None or name == SLOT:
                continue
            if not child._modules or id(child) in seen:  # most modules have no children
                continue
            seen.add(id(child))
            todo.append(child)
    return found


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
