"""stack, unstack: many adapters side by side in rank-padded stacks, one of them picked by an index tensor.

Under torch.compile every `use` of another adapter is another program: other tensors, other ranks, other sites. With

    mmpeft.stack(model, names)          # default: all adapters
    mmpeft.use(model, "a")              # or rows=["a", None, "b"]; writes an index tensor, recompiles nothing

the compiled forward gathers A and B by a tensor, so that 64 switches cost one compilation; `use(None)` is a second
graph, `rows=` a third. For inference: the stacks are copies, and a forward with gradients is refused.

Where all adapters have factors, a stack holds [n + 1, rank, in] and [n + 1, out, rank], padded to the largest rank, the
base last; elsewhere (biases, norm gains, `full`) it holds the n + 1 whole values. `use` stacks again what changed, in the
same memory, as it keeps one index tensor for each length of `rows`: a CUDA graph of the forward replays with another index.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.method import Factors, wide
from mmpeft.adapters.site import Layout, put_rows, slice_rows
from mmpeft.adapters.slot import Part, Slot, full_precision, overlap, part_of
from mmpeft.adapters.state import Active, State, slots, state_of
from mmpeft.adapters.wrapped import is_sharded
from mmpeft.errors import ConfigError, Unsupported


@dataclass(frozen=True)
class Piece:
    """The updates of rows [start, stop) by n adapters, and none as the last; what no adapter has is None."""

    start: int
    stop: int
    A: Tensor | None = None  # [n + 1, rank, in]
    B: Tensor | None = None  # [n + 1, out, rank], scaled
    row: Tensor | None = None  # [n + 1, out]
    col: Tensor | None = None  # [n + 1, in]

    def pick(self, i: Tensor) -> Factors:
        """The factors of adapter `i`, an index of shape [1]."""

        def at(stack: Tensor | None) -> Tensor | None:
            return None if stack is None else stack.index_select(0, i).squeeze(0)

        return Factors(at(self.A), at(self.B), 1.0, at(self.row), at(self.col))


def pieces_of(groups: list[list[Part]]) -> list[Piece] | None:
    """Each adapter's updates of one weight as stacks, or None where they cannot be told apart by rows: two updates of
    one adapter on the same rows, or scales on ranges that overlap between adapters."""
    ranges = sorted({(p.start, p.stop) for group in groups for p in group})
    scaled = any(not p.factors.additive for group in groups for p in group)
    apart = all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    if any(overlap(group) for group in groups) or (scaled and not apart):
        return None
    pieces = []
    for start, stop in ranges:
        here = [next((p for p in group if (p.start, p.stop) == (start, stop)), None) for group in groups]
        factors = [p.factors if p else Factors() for p in here] + [Factors()]
        scales = [p.scale if p else 1.0 for p in here] + [1.0]
        rank = max((f.A.shape[-2] for f in factors if f.A is not None), default=0)
        pieces.append(
            Piece(
                start,
                stop,
                _stacked([None if f.A is None else _pad(f.A, rank, 0) for f in factors], 0.0),
                _stacked(
                    [None if f.B is None else _pad(f.B * s, rank, 1) for f, s in zip(factors, scales, strict=True)], 0.0
                ),
                _stacked([f.row for f in factors], 1.0),
                _stacked([f.col for f in factors], 1.0),
            )
        )
    return pieces


def _stacked(tensors: list[Tensor | None], identity: float) -> Tensor | None:
    like = next((t for t in tensors if t is not None), None)
    if like is None:
        return None
    return torch.stack([torch.full_like(like, identity) if t is None else t for t in tensors])


def _pad(t: Tensor, rank: int, axis: int) -> Tensor:
    missing = rank - t.shape[axis - 2]
    return F.pad(t, (0, missing) if axis == 1 else (0, 0, 0, missing)) if missing else t


@dataclass
class Pick:
    """Which adapter is in use: shared by the stacks of one device, read inside the compiled graph."""

    one: Tensor  # [1]
    rows: Tensor  # [B]
    kept: dict[int, Tensor] = field(default_factory=dict)  # by length: each stays where it is

    @staticmethod
    def on(device: torch.device) -> Pick:
        """The first adapter, and no rows."""
        return Pick(torch.zeros(1, dtype=torch.long, device=device), torch.zeros(0, dtype=torch.long, device=device))

    def choose(self, index: list[int]) -> None:
        """These rows."""
        given = torch.tensor(index)
        self.rows = self.kept.setdefault(len(index), torch.zeros_like(given, device=self.one.device))
        self.rows.copy_(given)


@dataclass
class Stack:
    """One tensor of an owner under the stacked adapters."""

    name: str  # of a site there
    layout: Layout
    pick: Pick
    state: State
    pieces: list[Piece] = field(default_factory=list)
    values: Tensor | None = None  # [n + 1, *shape] where some adapter has no factors
    sources: tuple[Tensor, ...] = ()
    versions: tuple[int, ...] = ()
    held: tuple[list[Tensor], list[int]] = ([], [])  # what the stacked adapters have at this owner, and its versions

    def _index(self) -> Tensor:
        if torch.is_grad_enabled():
            raise ConfigError(
                "stacked adapters are for inference: call the model under torch.no_grad(), or mmpeft.unstack(model) "
                "to train"
            )
        if self.state.indexed == "rows":
            raise Unsupported(f"rows= at {self.name}: this weight is one for the whole batch; use one adapter a batch")
        return self.pick.one

    def rows(self) -> Tensor:
        """The adapter of each row, [B]."""
        if torch.is_grad_enabled():
            self._index()
        return self.pick.rows

    def parts(self) -> list[Part] | None:
        """The picked adapter's factored updates, or None where W' has to be formed."""
        if self.values is not None:
            return None
        i = self._index()
        return [Part(p.start, p.stop, p.pick(i), None) for p in self.pieces]

    def weight(self, start: Tensor) -> Tensor:
        """The picked adapter's W'."""
        i = self._index()
        if self.values is not None:
            return self.values.index_select(0, i).squeeze(0)
        with full_precision(start.device):
            m = self.layout.to_matrix(start.to(wide(start.dtype)))
            for p in self.pieces:
                f, w = p.pick(i), slice_rows(m, (p.start, p.stop))
                w = w if f.col is None else w * f.col.unsqueeze(-2)
                w = w if f.A is None or f.B is None else w + f.B @ f.A
                m = put_rows(m, w if f.row is None else w * f.row.unsqueeze(-1), (p.start, p.stop))
            return self.layout.from_matrix(m).to(start.dtype)


def stack(model: nn.Module, names: Sequence[str] | None = None) -> None:
    """Put adapters (default: all) side by side, so that `use` of any one of them, or of `rows=` among them, changes an
    index tensor and no compiled graph. Lists and mappings of several keep compiling their own graphs.

    Raises:
        NameNotFound: an adapter the model does not have.
        Unsupported: an adapter with call or token methods, which are programs of their own.
    """
    state = state_of(model)
    chosen = tuple(state.entries if names is None else names)
    state.check_names(chosen)
    if not chosen:
        raise ConfigError("stack needs at least one adapter")
    for _, _, slot in slots(model):
        for name, delta in slot.deltas(chosen):
            if delta.site.kind != "weight":
                raise Unsupported(
                    f"{name!r} changes a call at {delta.site.name} ({delta.method.name}); only weights can be stacked"
                )
    unstack(model)
    state.stacked = chosen
    activate(model, state, state.active)


def unstack(model: nn.Module) -> None:
    """Drop the stacks; the active set stays."""
    state = state_of(model)
    state.stacked, state.indexed = (), ""
    state.generation += 1
    for _, _, slot in slots(model):
        slot.stacks = {}


def activate(model: nn.Module, state: State, active: Active) -> None:
    """Make `active` the active set, by index where the stacks hold it."""
    state.active = active
    single = len(active.names) == 1 and active.weights is None and active.rows is None
    if not (single or active.rows is not None) or not set(active.names) <= set(state.stacked):
        return
    order = {name: i for i, name in enumerate(state.stacked)}
    picks: dict[torch.device, Pick] = {}
    with torch.inference_mode(False), torch.no_grad():  # what is kept is written again, in whatever mode
        for _, owner, slot in slots(model):
            _refresh(owner, slot, state, picks)
        for pick in picks.values():
            if active.rows is None:
                pick.one.fill_(order[active.names[0]])
            else:
                pick.choose([len(order) if r < 0 else order[active.names[r]] for r in active.rows])
    state.indexed = "one" if active.rows is None else "rows"


def _refresh(owner: nn.Module, slot: Slot, state: State, picks: dict[torch.device, Pick]) -> None:
    """Build the stacks of one owner, or build again those whose sources changed."""
    held = _held(slot, state)
    if slot.stacks and _current(owner, slot, held):
        for stack in slot.stacks.values():
            picks.setdefault(stack.pick.one.device, stack.pick)
        return
    for tensor in dict.fromkeys(d.site.tensor for _, d in slot.deltas(state.stacked)):
        stored = owner._parameters.get(tensor)
        deltas = [slot.at(tensor, (name,)) for name in state.stacked]
        first = next(d for group in deltas for _, d in group)
        if is_sharded(stored):
            raise Unsupported(f"{first.site.name} is sharded and cannot be stacked")
        if stored is None:
            raise Unsupported(f"{first.site.name} is recomputed by its module at each forward and cannot be stacked")
        start = slot.pinned.get(tensor, stored)
        sources = (start, *(p for group in deltas for _, d in group for p in d.parameters()))
        versions = tuple(-1 if t.is_inference() else t._version for t in sources)
        old = slot.stacks.get(tensor)
        same = old is not None and [id(t) for t in old.sources] == [id(t) for t in sources]
        if old is not None and same and old.versions == versions:
            old.held = held
            picks.setdefault(start.device, old.pick)
            continue
        state.restacked += 1
        pick = picks.get(start.device) or (old.pick if old is not None else None)
        pick = Pick.on(start.device) if pick is None else pick
        picks.setdefault(start.device, pick)
        assert first.site.layout is not None
        groups = [[part_of(start, d) for _, d in group] for group in deltas] if len(start.shape) > 1 else [[None]]
        whole = [[p for p in group if p is not None] for group in groups]
        pieces = pieces_of(whole) if all(p is not None for group in groups for p in group) else None
        values = None
        if pieces is None:
            values = torch.stack([slot.compose(start, group) for group in [*deltas, []]])
        made = Stack(first.site.name, first.site.layout, pick, state, pieces or [], values, sources, versions, held)
        if old is None or not same or not _rewritten(old, made):
            state.generation += 1
        slot.stacks[tensor] = made


def _held(slot: Slot, state: State) -> tuple[list[Tensor], list[int]]:
    """Every tensor of the stacked adapters at one owner, and its version (-1: it has none). Asked at each `use`, so by the
    shortest way: 64 adapters of a small decoder are 28,672 tensors."""
    groups = (slot._modules.get(name) for name in state.stacked)
    deltas = [d for group in groups if group is not None for d in group._modules.values() if d is not None]
    tensors: list[Tensor] = [p for d in deltas for p in d._parameters.values() if p is not None]
    try:
        return tensors, [p._version for p in tensors]
    except RuntimeError:  # inference tensors keep no version
        return tensors, [-1 if p.is_inference() else p._version for p in tensors]


def _current(owner: nn.Module, slot: Slot, held: tuple[list[Tensor], list[int]]) -> bool:
    """Whether an owner's stacks are what they would be if they were built now."""
    for tensor, stack in slot.stacks.items():
        tensors, versions = stack.held
        start = slot.pinned.get(tensor, owner._parameters.get(tensor))
        if start is None or start is not stack.sources[0] or start.is_inference() or start._version != stack.versions[0]:
            return False
        if len(tensors) != len(held[0]) or versions != held[1] or not all(map(operator.is_, tensors, held[0])):
            return False
    return True


def _rewritten(old: Stack, made: Stack) -> bool:
    """Move a new stack into the memory of the one before, if they are alike; returns whether they are."""
    before, after = ([(p.start, p.stop) for p in s.pieces] for s in (old, made))
    pairs = list(zip(_tensors(old), _tensors(made), strict=True)) if before == after else [(None, old.pick.one)]
    if any((a is None) != (b is None) or (a is not None and b is not None and _kind(a) != _kind(b)) for a, b in pairs):
        return False
    for a, b in pairs:
        if a is not None and b is not None:
            a.copy_(b)
    made.pieces, made.values = old.pieces, old.values
    return True


def _tensors(stack: Stack) -> list[Tensor | None]:
    return [stack.values, *(t for p in stack.pieces for t in (p.A, p.B, p.row, p.col))]


def _kind(t: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return t.shape, t.dtype, t.device
