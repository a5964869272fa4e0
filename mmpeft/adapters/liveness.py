"""Proof that every adapter site is alive: it changes the output, and it gets a gradient.

Peers attach to weights that nobody calls (EVA's qkv, MultiheadAttention's out_proj, an encoder layer's fast path) and
train nothing without a sign. Here `attach` fills the new adapter with noise, runs a small input in train mode, in eval,
and in eval without gradients, and looks at each site: was it read or called in all three, did a gradient reach its
tensors in the first two, and is the third's output that of the second. Buffers, random state and adapters are put back.

A site is dead (an error) if the module around it ran but the site took no part, unreached (a warning) if that module
did not run on this input (an expert without tokens, the other tower), closed (a warning) if it took part but its
gradient is exactly zero (behind a gate that starts at zero), and invariant (a log line) if its gradient is rounding
error and no more (a key bias cancels in the softmax): tiny beside the others', and another one when it is taken again.

The same runs answer three more questions: dropout where a weight is only read (refused), what W + delta loses in bf16
or fp16 (a warning), and whether the batch is the first axis of each site's input (for `use(rows=)`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta
from mmpeft.adapters.probe import Call, as_call, noise, put_back, scalar, seed, tensors_in, twins
from mmpeft.adapters.rounding import few, incoherent, rounding_unit, warn_rounding
from mmpeft.adapters.slot import Slot
from mmpeft.adapters.state import slots, state_of
from mmpeft.errors import ConfigError, DeadSite, MmpeftError

__all__ = ["as_call", "prove", "tensors_in"]

log = logging.getLogger("mmpeft")

TRAIN, EVAL, NO_GRAD = "train", "eval", "eval without gradients"


@dataclass(frozen=True)
class Place:
    """One site of the adapter under proof."""

    path: str
    owner: nn.Module
    slot: Slot
    delta: Delta

    @property
    def name(self) -> str:
        """As messages call it."""
        return self.delta.site.name

    @property
    def key(self) -> str:
        """What the slot counts it under."""
        return self.delta.site.tensor or "call"


@dataclass
class Run:
    """What one forward (and backward) in one mode showed, site by site."""

    dead: set[str] = field(default_factory=set)
    unreached: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)  # W' was formed
    called: set[str] = field(default_factory=set)  # used factored, or wrapped
    size: dict[str, float] = field(default_factory=dict)  # largest gradient
    output: list[Tensor] = field(default_factory=list)


def prove(model: nn.Module, name: str, call: Call) -> None:
    """Raise unless every site of adapter `name` is alive when the model is called with `call`, (args, kwargs).

    Raises:
        DeadSite: naming the dead sites and the mode in which they are dead.
        ConfigError: dropout at a site whose weight is only read; an adapter whose shapes do not fit the tensors there.
    """
    places = [Place(path, owner, slot, d) for path, owner, slot in slots(model) for _, d in slot.deltas((name,))]
    state = state_of(model)
    with noise(place.delta for place in places) as without, put_back(model), torch.enable_grad():
        try:
            runs = {mode: _run(model, places, mode, call) for mode in (TRAIN, EVAL, NO_GRAD)}
        except Exception as error:  # whatever a method or the model's own code raises
            _refuse_misfit(model, name, places, call, error)
            raise
        invariant = _invariant(model, places, call, runs[EVAL])
        if _differ(runs[EVAL].output, runs[NO_GRAD].output):
            effective = [p for p in places if p.name not in invariant | runs[EVAL].closed]
            runs[NO_GRAD].dead |= _without_effect(model, effective, call, runs[NO_GRAD].output, without)
        _watch_rows(model, places, call)
    state.seen.clear()
    _report(name, runs, invariant)
    _refuse_dropout(places, runs[TRAIN])
    read = {site for run in runs.values() for site in run.read}
    warn_rounding(name, [(place.owner, place.delta) for place in places if place.name in read])


def _refuse_misfit(model: nn.Module, name: str, places: list[Place], call: Call, error: Exception) -> None:
    """A call method of the wrong width fails deep in the model. If the model alone takes the example, say who it was."""
    state = state_of(model)
    if isinstance(error, MmpeftError):
        return
    before, state.bare = state.bare, True
    try:
        with torch.no_grad():
            model(*call[0], **call[1])
    except Exception:
        return  # the example's own fault
    finally:
        state.bare = before
    methods = few({f"{place.delta.method.name} at {place.name}" for place in places})
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    raise ConfigError(f"adapter {name!r} does not fit what the model computes there ({methods}): {reason}") from error


def _run(model: nn.Module, places: list[Place], mode: str, call: Call) -> Run:
    state, run = state_of(model), Run()
    for _, _, slot in slots(model):
        slot.reads, slot.runs, slot.inputs = {}, {}, []
    params = [p for place in places for n in place.delta.trained if (p := place.delta._parameters[n]) is not None]
    gradients: dict[int, Tensor | None] | None = None
    model.train(mode == TRAIN)
    state.probing, state.watching = True, mode == NO_GRAD
    try:
        seed()
        with torch.set_grad_enabled(mode != NO_GRAD):
            output = model(*call[0], **call[1])
        if mode != NO_GRAD:
            loss = scalar(output)
            some = loss.requires_grad
            grads = torch.autograd.grad(loss, params, allow_unused=True) if some else [None] * len(params)
            gradients = {id(p): g for p, g in zip(params, grads, strict=True)}
    finally:
        state.probing = state.watching = False
    run.output = [t.detach() for t in tensors_in(output) if t.is_floating_point()]
    followed = _followed(model)
    for place in places:
        reads = place.slot.reads.get(place.key, 0) + ((id(place.owner), place.key) in followed)
        runs = place.slot.runs.get(place.key, 0)
        mine = None if gradients is None else [gradients[id(place.delta._parameters[n])] for n in place.delta.trained]
        if not reads + runs or (mine is not None and any(g is None for g in mine)):
            run.dead.add(place.name)
        elif mine:
            run.size[place.name] = max(float(g.abs().max()) for g in mine if g is not None)
            if not all(bool(g.any()) for g in mine if g is not None):
                run.closed.add(place.name)
        if reads:
            run.read.add(place.name)
        if runs:
            run.called.add(place.name)
    if run.dead:
        run.unreached = _unreached(model, [place for place in places if place.name in run.dead], mode, call)
        run.dead -= run.unreached
    return run


def _report(name: str, runs: Mapping[str, Run], invariant: set[str]) -> None:
    dead = {mode: run.dead for mode, run in runs.items() if run.dead}
    if dead:
        lines = [f"  in {mode}: {few(sites, 6)}" for mode, sites in dead.items()]
        raise DeadSite(
            f"adapter {name!r} would train nothing at some sites, because the model does not use them\n"
            + "\n".join(lines)
            + "\nExclude them with '!', or pass example= with an input that reaches them."
        )
    unreached = set.intersection(*(run.unreached for run in runs.values()))
    if unreached:
        log.warning("%d sites of adapter %r were not reached by the example: %s", len(unreached), name, few(unreached))
    closed = set.intersection(*(runs[mode].closed for mode in (TRAIN, EVAL)))
    if closed:
        log.warning(
            "%d sites of adapter %r have a gradient of exactly zero on the example: %s", len(closed), name, few(closed)
        )
    if invariant:
        log.info("the output does not depend on %d sites of adapter %r: %s", len(invariant), name, few(invariant))


def _invariant(model: nn.Module, places: list[Place], call: Call, run: Run) -> set[str]:
    """Sites whose gradient in eval is rounding error: a few units of the median's last place, and never the same."""
    median = sorted(run.size.values())[len(run.size) // 2] if run.size else 0.0
    open_sites = (p for p in places if p.name not in run.closed)
    small = [p for p in open_sites if run.size.get(p.name, median) < 8 * rounding_unit(p.owner, p.delta) * median]
    return incoherent(model, call, {p.name: p.delta for p in small})


def _refuse_dropout(places: list[Place], run: Run) -> None:
    """Dropout acts on a site's input; code that only reads the weight (timm's EVA and BEiT) gives it none."""
    read = {
        place.name
        for place in places
        if place.delta.method.dropout and place.delta.site.layout and place.name in run.read - run.called
    }
    if read:
        raise ConfigError(
            f"dropout at {few(read)}: the model reads this weight without calling its module, so no activation can be "
            "dropped; set dropout=0 for this rule"
        )


def _followed(model: nn.Module) -> set[tuple[int, str]]:
    """(owner, tensor) whose delta was read through a tied name."""
    return {
        (id(owner), name)
        for _, _, slot in slots(model)
        for tensor, (owner, name) in slot.follows.items()
        if slot.reads.get(tensor)
    }


def _unreached(model: nn.Module, dead: list[Place], mode: str, call: Call) -> set[str]:
    """Dead sites whose surrounding module did not run either. A second run with hooks tells; the first has none, since
    a hook switches off the very fast paths that hide dead sites."""
    modules = dict(model.named_modules())
    around: dict[str, nn.Module] = {}
    for place in dead:
        above = place.path if place.delta.site.layout is None else place.path.rpartition(".")[0]
        while above and isinstance(modules[above], nn.ModuleList | nn.ModuleDict):
            above = above.rpartition(".")[0]
        around[place.name] = modules[above]
    ran: set[int] = set()
    hooks = [m.register_forward_pre_hook(lambda m, _: ran.add(id(m))) for m in set(around.values())]
    try:
        seed()
        with torch.set_grad_enabled(mode != NO_GRAD):
            model(*call[0], **call[1])
    finally:
        for hook in hooks:
            hook.remove()
    return {site for site, module in around.items() if id(module) not in ran}


def _differ(with_graph: list[Tensor], without: list[Tensor]) -> bool:
    """Whether two runs disagree by more than rounding."""
    for a, b in zip(with_graph, without, strict=False):
        if a.shape == b.shape and a.numel():
            tolerance = 1e-4 if torch.finfo(a.dtype).bits >= 32 else 5e-2
            if not float((a - b).abs().max()) <= tolerance * float(a.abs().max()):
                return True
    return False


def _without_effect(
    model: nn.Module, places: list[Place], call: Call, output: list[Tensor], without: Mapping[int, Tensor]
) -> set[str]:
    """Sites whose noise changes nothing in a forward without gradients: something there uses a copy of the weight."""
    found = set()
    model.eval()
    for place in places:
        params = [p for n in place.delta.trained if (p := place.delta._parameters[n]) is not None]
        noisy = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.copy_(without[id(p)])
            seed()
            now = [t for t in tensors_in(model(*call[0], **call[1])) if t.is_floating_point()]
            for p, value in zip(params, noisy, strict=True):
                p.copy_(value)
        if params and all(torch.equal(a, b) for a, b in zip(now, output, strict=True)):
            found.add(place.name)
    return found


def _watch_rows(model: nn.Module, places: list[Place], call: Call) -> None:
    """The two-row probe: row 1 of the example is made row 0's twin. Where the batch is a site input's first axis,
    row 0 stays bit for bit and row 1 becomes its equal."""
    batch = next((len(t) for t in tensors_in(call) if t.ndim), 0)
    if batch < 2:
        return
    state = state_of(model)
    first = {id(place.slot): place.slot.inputs for place in places}
    for place in places:
        place.slot.inputs = []
    args, kwargs = twins(call, batch)
    model.eval()
    state.watching = True
    try:
        seed()
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        state.watching = False
    state.ask_again()
    for slot in {id(place.slot): place.slot for place in places}.values():
        before, after = first[id(slot)], slot.inputs
        slot.inputs = []
        if not before and not slot.reads:
            continue  # unreached
        slot.rows_fit = (
            bool(before)
            and len(before) == len(after)
            and all(
                n == m == batch and torch.equal(a[0], b[0]) and torch.allclose(b[1], b[0], rtol=1e-4, atol=1e-6)
                for (n, a), (m, b) in zip(before, after, strict=True)
            )
        )
