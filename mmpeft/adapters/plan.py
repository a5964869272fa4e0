"""The plan: ordered rules that say, pattern by pattern, what is frozen, adapted or fully trained, with which lr and
weight decay.

    plan = {"llm.**.{q,v}_proj": LoRA(rank=8), "connectors.image": "full"}

or a list of rules, or a YAML file with the same content:

    - match: llm.**.{q,v}_proj
      method: {LoRA: {rank: 8}}       # or a list of methods that work on the same site, or class_path/init_args
      lr: 1.0e-3
    - {match: connectors.image, train: full, lr: 2.0e-3, weight_decay: 0.05}

Choice: what no rule names is frozen, and where two rules name the same tensor the later one wins, so exceptions follow
the general rule. Every pattern must match something its method can adapt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from mmpeft.adapters.method import REGISTRY, Method, method_from
from mmpeft.adapters.pattern import parse, select
from mmpeft.adapters.site import Site, read_shape, weight_site
from mmpeft.adapters.state import SLOT
from mmpeft.errors import ConfigError, NameNotFound, Unsupported, nearest

PlanLike = Any  # Plan, mapping, list of rules, or path
_TRAIN = ("frozen", "full", "adapter")
_FIELDS = ("match", "train", "method", "lr", "weight_decay")


@dataclass(frozen=True)
class Rule:
    """One line of a plan. `lr` and `weight_decay` None: the optimizer's default."""

    match: str
    methods: tuple[Method, ...] = ()  # () is frozen
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if self.match != ".":
            parse(self.match)
        for name, value in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            if value is not None and not value >= 0:
                raise ConfigError(f"rule {self.match!r}: {name} {value}; expected a number >= 0")

    @property
    def train(self) -> str:
        """'frozen', 'full' or 'adapter'."""
        if not self.methods:
            return "frozen"
        return "full" if self.methods[0].name == "full" else "adapter"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for adapter.json."""
        out: dict[str, Any] = {"match": self.match, "train": self.train}
        if self.train == "adapter":
            out["method"] = [m.to_dict() for m in self.methods]
        return out | {k: v for k, v in (("lr", self.lr), ("weight_decay", self.weight_decay)) if v is not None}

    @staticmethod
    def read(value: Any) -> Rule:
        """A rule from a `Rule` or a mapping with the fields match, train, method, lr, weight_decay."""
        if isinstance(value, Rule):
            return value
        if not isinstance(value, Mapping) or "match" not in value:
            raise ConfigError(f"{value!r} is no rule; expected {{match: ..., train or method: ..., lr, weight_decay}}")
        for key in value:
            if key not in _FIELDS:
                raise ConfigError(
                    f"rule {value['match']!r} has no field {key!r}{nearest(key, _FIELDS)}; it has {_FIELDS}"
                )
        method, train = value.get("method"), value.get("train")
        if train is not None and train not in _TRAIN:
            raise ConfigError(f"rule {value['match']!r}: train {train!r}; expected one of {', '.join(_TRAIN)}")
        if (train == "adapter") != (method is not None) and train is not None:
            raise ConfigError(
                f"rule {value['match']!r}: train {train!r} with method {method!r}; 'adapter' needs a method"
            )
        match = value["match"]
        return Rule(
            match if isinstance(match, str) else " ".join(match),
            _methods(method if method is not None else (train or "frozen")),
            _number(value.get("lr")),
            _number(value.get("weight_decay")),
        )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _methods(value: Any) -> tuple[Method, ...]:
    if isinstance(value, str) and value in ("frozen", "full"):
        return () if value == "frozen" else (REGISTRY["full"](),)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(method_from(v) for v in value)
    return (method_from(value),)


@dataclass(frozen=True)
class Plan:
    """Ordered rules. `Plan.read` accepts everything a user may write."""

    rules: tuple[Rule, ...]

    @staticmethod
    def read(value: Any) -> Plan:
        """A plan from a mapping pattern -> method, a list of rules, a YAML file, or a plan.

        Raises:
            ConfigError, NameNotFound: an empty plan, an unknown field or method, a file that is no plan.
        """
        if isinstance(value, Plan):
            return value
        if isinstance(value, str | Path):
            path = Path(value)
            if not path.is_file():
                raise NameNotFound(f"plan file {str(path)!r} does not exist")
            try:
                value = yaml.safe_load(path.read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise ConfigError(f"plan file {str(path)!r} is not YAML: {error}") from error
        if isinstance(value, Mapping) and "rules" in value and len(value) == 1:
            value = value["rules"]
        if isinstance(value, Mapping):
            rules = tuple(Rule(str(match), _methods(method)) for match, method in value.items())
        elif isinstance(value, Sequence) and not isinstance(value, str):
            rules = tuple(Rule.read(v) for v in value)
        else:
            raise ConfigError(
                f"{value!r} is no plan; expected a mapping pattern -> method, a list of rules or a YAML file"
            )
        if not rules:
            raise ConfigError("the plan is empty; name at least one pattern to adapt or train")
        return Plan(rules)

    def to_list(self) -> list[dict[str, Any]]:
        """As plain data; `Plan.read` reads it back."""
        return [rule.to_dict() for rule in self.rules]


@dataclass(frozen=True)
class Target:
    """One method at one site, as a plan resolves on a model."""

    rule: int
    method: Method
    site: Site
    owner: nn.Module


def resolve(model: nn.Module, plan: Plan) -> list[Target]:
    """What a plan attaches to a model; nothing is changed.

    Raises:
        NameNotFound: a pattern that matches nothing, or nothing its method can adapt.
        ConfigError: overlapping slices of one tensor, or a plan that trains nothing.
        Unsupported: a method other than `full` on a bare tensor of four or more dimensions.
    """
    modules = {p: m for p, m in model.named_modules(remove_duplicate=False) if not _in_slot(p)}
    params = {p: None for p, _ in model.named_parameters(remove_duplicate=False) if not _in_slot(p)}
    chosen: dict[tuple[int, str], dict[str | None, list[Target]]] = {}
    for index, rule in enumerate(plan.rules):
        hits = [("", ())] if rule.match == "." else select(rule.match, list(modules)[1:], params)
        if rule.train == "frozen":
            for path, _ in hits:
                _drop(chosen, modules, path)
            continue
        found = [t for m in rule.methods for path, roles in hits for t in _targets(modules, index, m, path, roles)]
        if not found:
            kinds = sorted({type(modules[p]).__name__ for p, _ in hits if p in modules})
            names = ", ".join(type(m).__name__ for m in rule.methods)
            raise NameNotFound(
                f"pattern {rule.match!r} matches {len(hits)} places ({', '.join(kinds)}), none that {names} adapts"
            )
        fresh: set[tuple[tuple[int, str], str | None]] = set()
        for target in found:
            _refuse_whole(target)
            target.method.check(target.site)
            key = _identity(target)
            here = chosen.setdefault(key, {})
            _refuse_overlap(target, here)
            if target.site.role not in here or (key, target.site.role) not in fresh:
                here[target.site.role] = []  # a later rule replaces an earlier one
            fresh.add((key, target.site.role))
            if all(t.method != target.method for t in here[target.site.role]):  # tied tensors are met twice
                here[target.site.role].append(target)
    out = [t for here in chosen.values() for group in here.values() for t in group]
    if not out:
        raise ConfigError("the plan trains nothing; every rule is frozen or overruled by a later one")
    return out


def _targets(
    modules: dict[str, nn.Module], rule: int, method: Method, path: str, roles: tuple[str, ...]
) -> list[Target]:
    """The sites of one method at one matched path (a module, or a parameter by its full name)."""
    owner_path, _, leaf = path.rpartition(".")
    if path not in modules:
        owner = modules[owner_path]
        dims = len(read_shape(owner, leaf))
        fits = method.kind == "weight" and (method.space == "any" or (method.space == "matrix") == (dims >= 2))
        tensors = [leaf] if fits else []
    elif method.name == "full":
        below = [p for p in modules if p == path or p.startswith(path + ".") or path == ""]
        seen: set[int] = set()
        out = []
        for p in below:
            if id(modules[p]) not in seen:
                seen.add(id(modules[p]))
                out += [
                    Target(rule, method, weight_site(p, modules[p], t), modules[p])
                    for t in method.tensors(p, modules[p])
                ]
        return out
    else:
        owner_path, owner = path, modules[path]
        if method.kind != "weight":
            return [Target(rule, method, Site(p, method.kind), m) for p, m in method.owners(path, owner)]
        tensors = method.tensors(path, owner)
    parent = modules.get(owner_path.rpartition(".")[0]) if owner_path else None
    return [
        Target(rule, method, weight_site(owner_path, owner, tensor, role, parent), owner)
        for tensor in tensors
        for role in (roles or (None,))
    ]


def _refuse_whole(target: Target) -> None:
    """A tensor that has no matrix view is trained whole or not at all."""
    layout = target.site.layout
    if layout is not None and layout.name == "whole" and target.method.name != "full":
        raise Unsupported(
            f"{type(target.method).__name__} at {target.site.name} of shape {layout.shape}, which is no matrix, "
            "convolution or expert stack; only `full` takes a tensor of any shape"
        )


def _identity(target: Target) -> tuple[int, str]:
    """Two names of one tied parameter are one site."""
    stored = target.owner._parameters.get(target.site.tensor)
    return (id(stored), "tensor") if stored is not None else (id(target.owner), target.site.tensor or target.site.kind)


def _refuse_overlap(target: Target, here: dict[str | None, list[Target]]) -> None:
    rows = target.site.rows
    for role, group in here.items():
        if role == target.site.role or not group:
            continue
        other = group[0].site.rows
        if rows is None or other is None or (rows[0] < other[1] and other[0] < rows[1]):
            raise ConfigError(f"{target.site.name} and {group[0].site.name} overlap; name the slices in one way only")


def _drop(
    chosen: dict[tuple[int, str], dict[str | None, list[Target]]], modules: dict[str, nn.Module], path: str
) -> None:
    for here in chosen.values():
        for role in list(here):
            here[role] = [t for t in here[role] if not _below(t.site, path)]


def _below(site: Site, path: str) -> bool:
    tensor_path = f"{site.path}.{site.tensor}" if site.path else site.tensor
    return path == "" or any(p == path or p.startswith(path + ".") for p in (site.path, tensor_path))


def _in_slot(path: str) -> bool:
    """Whether a path is an adapter's own, or the stored half of a parametrised tensor (the owner's is the site)."""
    return SLOT in path.split(".") or "parametrizations" in path.split(".")


__all__ = ["Plan", "PlanLike", "Rule", "Target", "resolve"]
