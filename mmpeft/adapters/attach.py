"""attach, detach, bare: putting adapters on a model and taking them off without a trace."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters import freeze as freezing
from mmpeft.adapters.classes import adapt, check_restorable, reads_below, restore, spec_of
from mmpeft.adapters.example import defer, example_of, forget
from mmpeft.adapters.forward import stock_op
from mmpeft.adapters.liveness import as_call, prove
from mmpeft.adapters.method import Context, Delta
from mmpeft.adapters.pattern import select
from mmpeft.adapters.plan import Plan, PlanLike, Target, resolve
from mmpeft.adapters.site import slice_rows
from mmpeft.adapters.slot import Slot
from mmpeft.adapters.state import SLOT, Active, Entry, State, find_state, slots, state_of
from mmpeft.adapters.wrapped import is_sharded, unwrap
from mmpeft.errors import ConfigError, Unsupported

log = logging.getLogger("mmpeft")


def attach(
    model: nn.Module, plan: PlanLike, name: str = "default", *, example: Any = None, check: bool = True
) -> nn.Module:
    """Freeze `model`, put a named adapter on it and make it the active one. The model is changed in place and returned.

    The base keeps its tensors, keys, classes (`isinstance`) and behaviour; the new adapter starts as the identity.

    Args:
        plan: mapping pattern -> method, list of rules, YAML file, or `Plan`.
        name: letters, digits, '-' and '_'.
        example: an input that the model can be called with (a tensor, a tuple of arguments or a dict of keyword
            arguments), used to prove that every site has an effect and a gradient; None infers one from the model, or
            waits for the first real batch.
        check: False skips that proof.

    Raises:
        NameNotFound: a pattern that matches nothing.
        ConfigError: a name that is taken, a rank larger than its matrix, a plan that trains nothing.
        DeadSite: the model never uses a site.
        Unsupported: the model is inside DistributedDataParallel already, which would not know the adapter's tensors.
    """
    plan = Plan.read(plan)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise Unsupported("this model is in DistributedDataParallel already: attach first, then wrap")
    outer, model = model, unwrap(model)
    state = find_state(model) or State()
    if not name or not name.replace("-", "_").isidentifier():
        raise ConfigError(f"adapter name {name!r}; expected letters, digits, '-' and '_', not starting with a digit")
    if name in state.entries:
        raise ConfigError(f"the model already has an adapter {name!r}; detach it first or choose another name")
    if state.merged:
        raise ConfigError(f"adapters {', '.join(state.merged)} are merged; unmerge before attaching {name!r}")
    if state.entries and not spec_of(type(model))[3]:
        raise ConfigError(
            f"a part of this {type(model).__name__} is adapted already; attach to that part, or detach it first"
        )
    targets = resolve(model, plan)
    before = state.active
    mode = freezing.learning(model) if state.entries else model.training  # an adapted root is frozen and does not tell
    if not state.entries:
        state.requires_grad = {n: p.requires_grad for n, p in model.named_parameters()}
        state.training = {n: m.training for n, m in model.named_modules()}
    try:
        _insert(model, state, plan, targets, name)
        freezing.freeze(model, full_paths(model, plan), mode)
        state.entries[name] = Entry(plan.to_list())
        state.ask_again()
        state.active = Active((name,))
        if check:
            given = example if example is not None else example_of(model)
            if given is None or any(p.is_meta for p in model.parameters()):
                defer(model, name)
            else:
                prove(model, name, as_call(given))
    except BaseException:
        state.entries.setdefault(name, Entry([]))
        state.active = before
        if find_state(model) is not None:  # else the first site's init refused, and nothing is on the model yet
            detach(model, name)
        raise
    return outer


def full_paths(model: nn.Module, plan: Plan) -> set[str]:
    """Paths of the modules that `full` rules train whole."""
    modules = [p for p, _ in model.named_modules() if SLOT not in p.split(".")][1:]
    found: set[str] = set()
    for rule in plan.rules:
        if rule.train == "full":
            params = [p for p, _ in model.named_parameters() if SLOT not in p.split(".")]
            hits = [("", ())] if rule.match == "." else select(rule.match, modules, params)
            found |= {path for path, _ in hits if path in modules or path == ""}
    return found


def _insert(model: nn.Module, state: State, plan: Plan, targets: list[Target], name: str) -> None:
    """Make the deltas and swap the owners' classes."""
    shared: dict[Any, Any] = {}
    by_rule: dict[int, list[Target]] = {}
    for target in targets:
        by_rule.setdefault(target.rule, []).append(target)
    tied, modules = _tied(model, targets), dict(model.named_modules(remove_duplicate=False))
    for target in targets:
        owner, site, method = target.owner, target.site, target.method
        context = Context(model, owner, shared, tuple(t.site for t in by_rule[target.rule] if t.method == method))
        base = None
        if site.layout is not None:
            with bare(model), torch.no_grad():
                stored = getattr(owner, site.tensor)
                if is_sharded(stored):
                    raise Unsupported(f"{site.name} is sharded already; attach first, then fully_shard")
                base = slice_rows(site.layout.to_matrix(stored), site.rows)
        delta = Delta(method, site, method.init(site, base, context), target.rule)
        delta.train(model.training)
        if base is not None and method.dropout:
            _refuse_dropout(owner, delta, base)
        group = _slot(owner, state)._modules.setdefault(name, nn.ModuleDict())
        assert isinstance(group, nn.ModuleDict)
        key = site.key(method.name)
        if key in group:
            raise ConfigError(f"two {method.name} at {site.name} in one adapter; give the second to another adapter")
        group[key] = delta
        adapt(owner, frozenset([site.tensor] if site.layout is not None else []), wraps=site.layout is None)
        for reader in _readers(modules, site.path):
            _slot(reader, state)
            adapt(reader, frozenset(), wraps=False)
        for other, tensor in tied.get((id(owner), site.tensor), []):
            _slot(other, state).follows[tensor] = (owner, site.tensor)
            adapt(other, frozenset([tensor]), wraps=False)
    _slot(model, state)
    adapt(model, frozenset(), wraps=False, root=True)


def _slot(owner: nn.Module, state: State) -> Slot:
    slot = owner._modules.get(SLOT)
    if slot is None:
        slot = Slot(state)
        owner._modules[SLOT] = slot  # add_module would ask `hasattr`, which containers answer with their own items
    assert isinstance(slot, Slot)
    return slot


def _readers(modules: Mapping[str, nn.Module], path: str) -> list[nn.Module]:
    """The modules above `path` whose forward reads its weight."""
    parts = path.split(".")
    above = [(".".join(parts[:i]), ".".join(parts[i:])) for i in range(len(parts))]
    return [modules[p] for p, rest in above if rest in reads_below(spec_of(type(modules[p]))[0])]


def _tied(model: nn.Module, targets: list[Target]) -> dict[tuple[int, str], list[tuple[nn.Module, str]]]:
    """Other owners of the very parameter objects that are adapted: they must see the same delta."""
    wanted = {id(p): t for t in targets if (p := t.owner._parameters.get(t.site.tensor)) is not None}
    found: dict[tuple[int, str], list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for tensor, parameter in module._parameters.items():
            target = wanted.get(id(parameter))
            if target is not None and (module is not target.owner or tensor != target.site.tensor):
                found.setdefault((id(target.owner), target.site.tensor), []).append((module, tensor))
    return found


def _refuse_dropout(owner: nn.Module, delta: Delta, base: Tensor) -> None:
    """Dropout acts on a site's input, which only the factored plan has."""
    op = stock_op(spec_of(type(owner))[0]) if delta.site.tensor == "weight" else None
    if op is not None and op.drops and op.fits(owner):
        factors = delta.method.factors(base, delta)
        if factors is not None and (op.scales or factors.additive):
            return
    raise ConfigError(
        f"dropout of {delta.method.name} at {delta.site.name}: the weight of a {type(owner).__name__} is formed there, "
        "so no activation can be dropped; set dropout=0 for this rule"
    )


def detach(model: nn.Module, name: str | None = None, *, bake: bool = False) -> nn.Module:
    """Take one adapter (None: all) off; after the last one the model is the very object it was, flags included.

    Args:
        bake: first write the active effective weights (of `name` alone, if given) into the base tensors and then take
            all adapters off, which gives a plain merged model.

    Raises:
        NameNotFound: no such adapter.
        Unsupported: `bake` with active call or token methods, which no weight can hold.
    """
    state = state_of(model)
    if name is not None:
        state.check_names([name])
    if bake:
        state.active = state.active if name is None else Active((name,))
        _bake(model, state)
        name = None
    gone = set(state.entries) if name is None else {name}
    if gone == set(state.entries):
        for _, owner, _ in slots(model):
            check_restorable(owner)
    if gone & set(state.merged):
        from mmpeft.adapters.switch import unmerge

        unmerge(model)
    mode = freezing.learning(model)
    for _, _, slot in list(slots(model)):
        for n in gone & set(slot._modules):
            del slot._modules[n]
        slot.cache = {}
    state.entries = {n: e for n, e in state.entries.items() if n not in gone}
    if set(state.active.names) & gone:
        state.active = Active(tuple(n for n in state.active.names if n not in gone))
    forget(model, gone)
    if state.entries:
        entries = state.entries.values()
        trained = set().union(*(full_paths(model, Plan.read(e.rules)) for e in entries if e.rules))
        freezing.follow(model, trained, mode)
    else:
        freezing.restore(model)
        for _, owner, _ in list(slots(model)):
            del owner._modules[SLOT]
            restore(owner)
    return model


def _bake(model: nn.Module, state: State) -> None:
    calls = [d.site.name for _, _, slot in slots(model) for d in slot.calls(state.active)]
    if calls:
        raise Unsupported(
            f"bake=True: {calls[0]} and {len(calls) - 1} more change a call; detach keeps no trace of them"
        )
    with torch.no_grad():
        new: list[tuple[Tensor, Tensor]] = []
        for _, owner, slot in slots(model):
            for tensor in {d.site.tensor for _, d in slot.deltas()}:
                stored = owner._parameters.get(tensor)
                if is_sharded(stored):
                    raise Unsupported(f"bake=True: {type(owner).__name__}.{tensor} is sharded; gather the model first")
                if stored is None:
                    raise Unsupported(
                        f"bake=True: {type(owner).__name__}.{tensor} is recomputed by its module and cannot hold W'"
                    )
                new.append((stored, getattr(owner, tensor)))
        for target, value in new:
            target.copy_(value)


class bare:
    """`with mmpeft.bare(model)`: attribute access shows the stored base tensors, for code that ties, resizes or
    initialises parameters in place. Calls inside it run the base."""

    def __init__(self, model: nn.Module) -> None:
        self.states = _states([model])

    def __enter__(self) -> None:
        self.before = [state.bare for state in self.states]
        for state in self.states:
            state.bare = True

    def __exit__(self, *_: object) -> None:
        for state, before in zip(self.states, self.before, strict=True):
            state.bare = before


def _states(models: Iterable[nn.Module]) -> list[State]:
    found = [find_state(model) for model in models]
    return [state for state in found if state is not None]
