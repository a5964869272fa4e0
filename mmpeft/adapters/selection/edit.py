"""Changing the sites of an attached adapter in place, so that its file and its plan follow.

    with editing(model, name) as sites:           # sites: list of Place
        sites[0].put(smaller_delta); sites[1].drop()

The plan gets one exact rule for each changed place. At the end it is proved, on the meta device, that the plan makes
the very tensors that are there: a method that looks at all sites of its rule (VeRA's widest, FacT's common divisor, the
number of SAID's sites) may make others once some are gone, and such a file could not be loaded, or would be loaded as
something else. Then everything is as it was, and `Unsupported` says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mmpeft.adapters.inspect import tensors_of
from mmpeft.adapters.method import Delta
from mmpeft.adapters.plan import Plan, Rule, Target, resolve
from mmpeft.adapters.site import Site
from mmpeft.adapters.state import Entry, slots, state_of
from mmpeft.errors import ConfigError, Unsupported


class Place:
    """One site of the adapter: where its delta hangs."""

    def __init__(self, group: nn.ModuleDict, key: str, delta: Delta) -> None:
        self.group, self.key, self.delta = group, key, delta
        self.changed = False

    def put(self, delta: Delta) -> None:
        """Replace the delta."""
        self.group[self.key] = delta
        self.changed = True

    def drop(self) -> None:
        """Take the site off the adapter."""
        del self.group[self.key]
        self.changed = True


def one_adapter(model: nn.Module, name: str | None) -> str:
    """`name`, or that of the only adapter.

    Raises:
        ConfigError: several and none named.
        NameNotFound: no such adapter.
    """
    state = state_of(model)
    if name is None:
        if len(state.entries) != 1:
            raise ConfigError(f"the model has adapters {', '.join(state.entries)}; say which one: name=...")
        return next(iter(state.entries))
    state.check_names([name])
    return name


@contextmanager
def editing(model: nn.Module, name: str) -> Iterator[list[Place]]:
    """The sites of adapter `name`, to change within the block; undone whole if the block or the proof raises.

    Raises:
        ConfigError: an adapter is merged.
        Unsupported: the plan that results would not make these tensors.
    """
    state = state_of(model)
    if state.merged:
        raise ConfigError(f"adapters {', '.join(state.merged)} are merged; unmerge before changing one")
    entry = state.entries[name]
    groups = [(slot, slot._modules[name]) for _, _, slot in slots(model) if name in slot._modules]
    before = [(group, list(group.items())) for _, group in groups]
    notes = [(d, d.rule, d.saved, d.trained) for _, items in before for _, d in items]
    rules = list(entry.rules)
    places = [Place(group, key, d) for group, items in before for key, d in items]
    owned = {id(d._parameters[n]): n in d.trained for d, *_ in notes for n in d.saved}
    try:
        yield places
        left = [d for _, group in groups for d in group.children()]
        _write_rules(entry, [p.delta.site for p in places if p.changed], left)
        _hand_over(left, owned)
        _prove(model, name, entry, left)
    except BaseException:
        entry.rules = rules
        for group, items in before:
            group.clear()
            group.update(dict(items))
        for d, *was in notes:
            d.rule, d.saved, d.trained = was
        raise
    for slot, group in groups:
        slot.cache = {}
        if not len(group):
            del slot._modules[name]


def _write_rules(entry: Entry, changed: list[Site], left: list[Delta]) -> None:
    """Exact rules, after the others, for every tensor (or call) of which a site changed; deltas point at them."""
    rules = list(entry.rules)
    for place in dict.fromkeys(_place(site) for site in changed):
        rules.append(Rule(place or ".").to_dict())  # frozen, which takes along what is below; that is named again
        below = [d for d in left if not place or (_place(d.site) + ".").startswith(place + ".")]
        for pattern, index in dict.fromkeys((pattern_of(d.site), d.rule) for d in below):
            mine = [d for d in below if (pattern_of(d.site), d.rule) == (pattern, index)]
            before = rules[index]
            methods = tuple(d.method for d in mine)
            for d in mine:
                d.rule = len(rules)
            rules.append(Rule(pattern, methods, before.get("lr"), before.get("weight_decay")).to_dict())
    entry.rules = rules


def _hand_over(left: list[Delta], owned: dict[int, bool]) -> None:
    """Tensors that the sites of a rule share (`owned`: whether trained) are saved with the first that is left."""
    kept: set[tuple[int, int]] = set()
    for d in left:
        for n, p in d._parameters.items():
            if id(p) in owned and (d.rule, id(p)) not in kept:
                kept.add((d.rule, id(p)))
                if n not in d.saved:
                    d.saved += (n,)
                    d.trained += (n,) if owned[id(p)] else ()


def _prove(model: nn.Module, name: str, entry: Entry, left: list[Delta]) -> None:
    """Refuse rules that make other sites, or other tensors at a site, than there are."""
    by_rule: dict[int, list[Target]] = {}
    for target in resolve(model, Plan.read(entry.rules)):
        by_rule.setdefault(target.rule, []).append(target)
    shared: dict[Any, Any] = {}
    makes: dict[tuple[str, str], dict[str, tuple[Any, ...]]] = {}
    for targets in by_rule.values():
        for target in targets:
            made = tensors_of(model, target, targets, shared)
            parts = (("trained", made.trained), ("frozen", made.frozen), ("derived", made.derived))
            makes[target.site.name, target.method.name] = {
                n: (kind, tuple(t.shape)) for kind, tensors in parts for n, t in tensors.items()
            }
    for d in left:
        kinds = {n: "derived" if n not in d.saved else "trained" if n in d.trained else "frozen" for n in d._parameters}
        here = {n: (kinds[n], tuple(p.shape)) for n, p in d._parameters.items() if p is not None}
        made_here = makes.pop((d.site.name, d.method.name), None)
        if here != made_here:
            differs = sorted(n for n in here if (made_here or {}).get(n) != here[n]) or sorted(made_here or ())
            raise Unsupported(
                f"{d.site.name}: {type(d.method).__name__} looks at all sites of its rule, and without the others its "
                f"{', '.join(differs)} would be made anew; nothing was changed in adapter {name!r}"
            )
    if makes:
        raise Unsupported(f"the plan would adapt {next(iter(makes))[0]}, which adapter {name!r} does not")


def _place(site: Site) -> str:
    """Path of the site's tensor, or of the module whose call it wraps."""
    return f"{site.path}.{site.tensor}".strip(".")


def pattern_of(site: Site) -> str:
    """What matches this site alone."""
    return (_place(site) or ".") + (f"[{site.role}]" if site.role else "")
