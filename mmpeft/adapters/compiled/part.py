"""What every fused part of a model shares: its adapters' masters, their compute copies, and when it stands back.

Compute copies of A and B are rewritten when a master's version has changed, or after `train()` and `eval()` (where code
that writes through `.data` sits). A call that the part does not compute goes to the module's own forward; the log says
why, once a reason.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpeft.adapters.compiled.few_bits import address
from mmpeft.adapters.compiled.graphs import Graphed
from mmpeft.adapters.compiled.route import Route
from mmpeft.adapters.method import Delta
from mmpeft.adapters.methods.lora import DoRA
from mmpeft.adapters.slot import part_of
from mmpeft.adapters.state import Active, State, find_state, slots
from mmpeft.adapters.storage.packed_weight import PackedWeight
from mmpeft.adapters.wrapped import is_sharded
from mmpeft.errors import Unsupported
from mmpeft.kernels.fuse import LowRank
from mmpeft.kernels.group import Group
from mmpeft.kernels.plain import Plain
from mmpeft.kernels.stored import StoredGroup

log = logging.getLogger("mmpeft.kernels")
Place = tuple[str, tuple[int, int] | None]  # path of a linear below the module, row range (None: all)
Sites = Mapping[Place, tuple[LowRank, Delta]]


class Bound:
    """An adapter as the fused blocks take it, and whether it still is that one."""

    def __init__(self, part: FusedPart, name: str) -> None:
        assert part.state is not None
        self.name, self.entry = name, part.state.entries[name]
        self.rules = self.entry.rules
        self.sites = part.sites(name, again=True)
        found = [slot for _, _, slot in slots(part.module)]
        self.slots = [slot._modules for slot in found]
        self.groups = [slot._modules.get(name) for slot in found]
        self.delta = next(d for _, d in self.sites.values())
        self.masters: list[Tensor] = []  # in the order of the fused blocks

    def holds(self, state: State) -> bool:
        """Whether the adapter was neither attached anew, nor edited (other rules), nor left out of a layer."""
        same = state.entries.get(self.name) is self.entry and self.entry.rules is self.rules
        return same and all(map(operator.is_, map(dict.get, self.slots, repeat(self.name)), self.groups))


class FusedPart:
    """A module on fused blocks.

    Args:
        model: the root that was given to `compile`. path: of `module` in it.
        around: paths below the module whose adapters act as modules, beside the fused blocks.
        frozen: no adapter is inside, so which one is active does not matter.

    Raises:
        Unsupported: the active set, the storage or a site does not fit.
    """

    fused: Any
    route: Route
    dora: ClassVar[bool] = False  # whether the fused form computes magnitudes
    few_bits: ClassVar[bool] = False  # whether it takes packed weights
    stacks: ClassVar[bool] = False  # whether it takes stacked adapters, a row of the batch its own

    def __init__(
        self, model: nn.Module, path: str, module: nn.Module, around: tuple[str, ...] = (), *, frozen: bool = False
    ) -> None:
        self.path, self.module, self.state, self.around, self.frozen = path, module, find_state(model), around, frozen
        active = Active() if self.state is None else self.state.active
        names = active.names
        if self.stacks and self.state is not None and self.state.indexed:  # any of them: the index picks at each call
            names = (names or self.state.stacked)[:1]
        elif active.weights or active.rows:
            names = ()
        if not frozen and (len(names) != 1 or self.state is None or self.state.merged):
            raise Unsupported("needs exactly one active adapter, not merged: mmpeft.use(model, name) first")
        if any(is_sharded(p) for p in module.parameters()):
            raise Unsupported("its parameters are sharded")
        if not self.few_bits and any(isinstance(p, PackedWeight) for p in module.parameters()):
            raise Unsupported("its weights are packed in few bits; the fused blocks hold them dense")
        self.bound = "" if frozen else names[0]
        self._sites: dict[str, Sites] = {}
        self._adapters: dict[str, Bound] = {}
        self.reasons: set[str] = set()
        self.calls = {"fused": 0, "own": 0}
        self.others = [p for _, _, slot in slots(module) for p in slot.parameters()]

    def start(self, fused: Any, groups: Sequence[Group | Plain], *, graphs: bool) -> None:
        """Take over the module's calls, once its fused form is there."""
        self.fused, self.groups = fused, groups
        mine = _storage(groups[0])
        self.first = next((m, n) for m, n, p in _tensors(self.module) if _lies(p) == mine)
        self.place = address(stored(*self.first))
        if not self.frozen:
            sites = self.sites(self.bound)
            factors = [(place, n, t) for place, (x, _) in sites.items() for n, t in x._asdict().items()]
            at = {id(t): (place, n) for place, n, t in factors if isinstance(t, Tensor)}
            self.order = [at[id(m)] for m in fused.masters]
            self.kinds = {place: _kind(x) for place, (x, _) in sites.items()}
            self.now = self.adapter(self.bound)
        self.versions, self.mark = self._now()
        self.graphed = Graphed(fused.states) if graphs else None
        self.take()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it the bound adapter is the active set."""
        if self.state is None or self.frozen:
            yield
            return
        before = self.state.active, self.state.indexed
        self.state.active = Active((self.bound,))
        try:
            yield
        finally:
            self.state.active, self.state.indexed = before

    def prepare(self) -> None:
        """Bring the compute copies up to date before a CUDA graph that reads them is replayed."""
        if self.state is not None and not self.state.indexed and len(self.state.active.names) == 1:
            self.current(self.state.active.names[0])

    def take(self) -> None:
        """Stand in front of the module's own forward."""
        self.route = Route(self.module, self)

    def sites(self, name: str, *, again: bool = False) -> Sites:
        """An adapter's sites below the module, `around` left out; looked up once, or `again`.

        Raises:
            Unsupported: a site that the fused blocks do not compute, named with its method.
        """
        if name in self._sites and not again:
            return self._sites[name]
        found: dict[Place, tuple[LowRank, Delta]] = {}
        for path, owner, slot in slots(self.module):
            for _, delta in slot.deltas((name,)) if path not in self.around else ():
                base = owner._parameters.get(delta.site.tensor)
                plain = delta.site.kind == "weight" and self.computes(owner, delta.site.tensor)
                part = part_of(base, delta) if plain and base is not None else None
                A, B = (None, None) if part is None else (part.factors.A, part.factors.B)
                own = {id(p) for p in delta.parameters()}
                m = delta.m if self.dora and type(delta.method) is DoRA else None
                fits = part is not None and (part.factors.additive or m is not None)
                if part is None or A is None or B is None or not {id(A), id(B)} <= own or not fits:
                    raise Unsupported(f"{delta.site.name}: {delta.method.name} is not a plain W + s B A of a linear layer")
                found[path, delta.site.rows] = (LowRank(A, B, part.scale, m), delta)
        if len({d.method.dropout for _, d in found.values()}) > 1:
            raise Unsupported(f"the sites of {name!r} have different dropouts")
        self._sites[name] = found
        return found

    def computes(self, owner: nn.Module, tensor: str | None) -> bool:
        """Whether a stored tensor is the weight of a product of the fused blocks."""
        return isinstance(owner, nn.Linear) and tensor == "weight"

    def current(self, name: str | None = None) -> Any:
        """The fused form with the compute copies of an adapter (default: the last used) as it is now.

        Raises:
            Unsupported: that adapter has other sites, ranks or scales than the one that was compiled.
        """
        fused, name = self.fused, name or self.bound
        if self.frozen:
            return fused
        found = self.adapter(name)
        if found is not self.now:
            fused.rebind(found.masters)
            self.bound, self.now = name, found
            self.versions, self.mark = self._now()
        else:
            versions, mark = self._now()
            if versions != self.versions or mark is not self.mark:
                fused.refresh()
                self.versions, self.mark = versions, mark
        fused.dropout = found.delta.method.dropout if found.delta.training else 0.0
        return fused

    def adapter(self, name: str) -> Bound:
        """An adapter as it is now, looked up again only where it is another one than before.

        Raises:
            Unsupported: it has other sites, ranks or scales than the one that was compiled.
            NameNotFound: it was detached.
        """
        assert self.state is not None
        found = self._adapters.get(name)
        if found is None or not found.holds(self.state):
            self._adapters.pop(name, None)
            self.state.check_names([name])
            found = Bound(self, name)
            if {place: _kind(x) for place, (x, _) in found.sites.items()} != self.kinds:
                raise Unsupported(f"{name!r} differs from the compiled adapter in sites, ranks or scales")
            found.masters = [getattr(found.sites[place][0], which) for place, which in self.order]
            self.fused.check(found.masters)
            self._adapters[name] = found
        return found

    def _now(self) -> tuple[list[int], Any]:
        """The masters' versions, and an object that `train()` and `eval()` replace."""
        return list(map(operator.attrgetter("_version"), self.fused.masters)), self.mark_now()

    def mark_now(self) -> Any:
        """An object that `train()` and `eval()` replace."""
        return next((slot.cache for _, _, slot in slots(self.module)), None)

    def name_of(self, x: Tensor | None, more: Mapping[str, object] | None = None) -> str:
        """The adapter a call on x runs with; `more`: reason -> whether it holds.

        Raises:
            Unsupported: the call is for the module's own forward; the message says why.
        """
        state = None if self.frozen else self.state
        active = state.current() if state else Active()
        single = len(active.names) == 1 and active.weights is None and active.rows is None and not active.base
        reasons = {
            "the active set is not one unmerged adapter": state and (not single or state.bare or state.merged),
            "adapters are stacked (mmpeft.unstack to use the fused blocks)": state and state.indexed,
        }
        self.refuse(x, reasons | dict(more or {}))
        return active.names[0] if state else ""

    def refuse(self, x: Tensor | None, more: Mapping[str, object]) -> None:
        """Raise for a call on x that the fused form does not compute, whatever the adapters; `more`: as in `name_of`.

        Raises:
            Unsupported: the message says why.
        """
        weight = stored(*self.first)
        dtype, kind = weight.dtype, weight.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != dtype
        reasons = {
            **more,
            "the weights were moved or cast since; call mmpeft.compile again": address(weight) != self.place,
            f"inputs of another dtype than the weights' {dtype}": x is not None and x.dtype != dtype,
            "autocast to another dtype than the weights'": autocast,
        }
        if why := next((reason for reason, holds in reasons.items() if holds), None):
            raise Unsupported(why)

    def states(self, fused: Any, x: Tensor, *more: Any) -> Tensor:
        """The fused form's output (`more`: what else it reads); a CUDA graph where no gradients flow."""
        self.calls["fused"] += 1
        run = fused.states if torch.is_grad_enabled() or fused.dropout or self.graphed is None else self.graphed
        y: Tensor = run(x, *more)
        return y

    def own(self, why: Unsupported) -> None:
        """Note that a call goes to the module's own forward."""
        self.calls["own"] += 1
        if str(why) not in self.reasons:
            self.reasons.add(str(why))
            log.info("%s runs its own forward: %s", self.path or type(self.module).__name__, why)

    def remove(self) -> None:
        """The module's own forward again, and weights in storage of their own."""
        self.route.remove()
        self.unpack()

    def unpack(self) -> None:
        """Weights in storage of their own again."""
        buffers = {_storage(group) for group in self.groups}
        for _, _, w in _tensors(self.module):
            if _lies(w) in buffers - {None}:
                w.data = w.data.clone(memory_format=torch.contiguous_format)

    def __call__(self, route: Route, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def _kind(x: LowRank) -> tuple[float, torch.Size, bool]:
    """What two adapters of one site must share to take each other's place."""
    return x.scale, x.A.shape, x.m is not None


def stored(owner: nn.Module, tensor: str = "weight") -> Tensor:
    """A weight as it lies in memory, whatever the attribute shows."""
    weight = owner._parameters[tensor]
    assert weight is not None
    return weight


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(owner, name, tensor) of every parameter as stored."""
    for owner in module.modules():
        yield from ((owner, name, p) for name, p in owner._parameters.items() if p is not None)


def _storage(group: Group | Plain) -> int | None:
    """Where a group's weights lie; None if they are kept in few bits."""
    if isinstance(group, Group) and isinstance(group.packed, StoredGroup):
        return None
    return (group.W if isinstance(group, Plain) else group.packed.buffer).untyped_storage().data_ptr()


def _lies(w: Tensor) -> int | None:
    """Where a weight lies; None for one kept in few bits."""
    return None if isinstance(w, PackedWeight) else w.untyped_storage().data_ptr()
