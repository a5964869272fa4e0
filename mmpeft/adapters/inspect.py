"""What a plan would do to a model, before anything is changed: sites, parameters, bytes and FLOPs, rule by rule.

Sites and parameters come from the plan alone. What a step costs comes from `costs.py`, for an example that is given or
that the model brings along: a row says what its rule adds to the rules above it, so rows add up to the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.example import example_of
from mmpeft.adapters.fingerprint import base_tensors
from mmpeft.adapters.method import Context, Method, Tensors
from mmpeft.adapters.optimizer_state import STATES
from mmpeft.adapters.plan import Plan, PlanLike, Target, resolve
from mmpeft.adapters.probe import as_call
from mmpeft.adapters.state import find_state
from mmpeft.errors import ConfigError, NameNotFound, nearest

if TYPE_CHECKING:
    from mmpeft.adapters.costs import Cost


@dataclass(frozen=True)
class Row:
    """One rule of the plan."""

    match: str
    method: str
    sites: tuple[str, ...]
    parameters: int  # trained numbers
    flops: int  # forward FLOPs added for one row (token) through every site once, by the method's own account
    lr: float | None
    weight_decay: float | None
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    beside: tuple[str, ...] = ()  # what has to run beside the optimizer: "LoRADropout: Masks"
    cost: Cost | None = None  # what the rule adds to a step under the rules above it; None where no step could be run


@dataclass(frozen=True)
class Inspection:
    """A plan resolved on a model. `print` it for the table, `to_dict` for a program."""

    rows: tuple[Row, ...]
    base_parameters: int
    base_bytes: int
    optimizer: str = "adamw"
    base_cost: Cost | None = None  # of one forward of the example through the frozen model
    example: str = ""  # shapes of that example
    note: str = ""  # how the costs were found, or why there are none

    @property
    def trainable(self) -> int:
        """Trained numbers in all."""
        return sum(row.parameters for row in self.rows)

    @property
    def file_bytes(self) -> int:
        """Size of the adapter file (fp32)."""
        return 4 * self.trainable

    @property
    def gradient_bytes(self) -> int:
        """Gradients of all trained numbers."""
        return sum(row.gradient_bytes for row in self.rows)

    @property
    def optimizer_bytes(self) -> int:
        """What the optimizer keeps: for AdamW two moments."""
        return sum(row.optimizer_bytes for row in self.rows)

    @property
    def base_flops(self) -> int | None:
        """Of one forward of the example through the frozen model."""
        return None if self.base_cost is None else self.base_cost.forward_flops

    @property
    def cost(self) -> Cost | None:
        """Of one training step on the example under the whole plan."""
        total = self.base_cost
        for row in self.rows:
            total = total + row.cost if total is not None and row.cost is not None else None
        return total

    @property
    def training_bytes(self) -> int | None:
        """Base, adapter, gradients, optimizer and what a step keeps for its backward. What lives within one layer
        comes on top."""
        kept = self.cost
        if kept is None:
            return None
        return self.base_bytes + self.file_bytes + self.gradient_bytes + self.optimizer_bytes + kept.saved_bytes

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        derived = ("trainable", "file_bytes", "gradient_bytes", "optimizer_bytes", "base_flops", "training_bytes")
        total = None if self.cost is None else asdict(self.cost)
        return asdict(self) | {name: getattr(self, name) for name in derived} | {"cost": total}

    def __str__(self) -> str:
        from mmpeft.adapters.inspect_table import page

        return page(self)


def inspect(
    model: nn.Module, plan: PlanLike | None = None, *, example: Any = None, optimizer: str = "adamw"
) -> Inspection:
    """Resolve `plan` on `model` (default: the plans of the adapters it has) without changing anything.

    Works on the meta device, so a 7B model's table costs no memory.

    Args:
        example: an input the model can be called with (as in `attach`), whose step is costed: its shapes count. None
            takes the one the model brings along (two samples), where nothing is attached yet. A step that cannot be
            predicted is run, if an example is given and the model has weights.
        optimizer: adamw, adam, ivon, lion, rmsprop, adagrad, adafactor, sgd+momentum or sgd.

    Raises:
        NameNotFound, ConfigError: as `attach` would; an unknown optimizer; an example the model cannot be called with.
    """
    state_bytes = STATES.get(optimizer)
    if state_bytes is None:
        raise NameNotFound(f"unknown optimizer {optimizer!r}{nearest(optimizer, STATES)}; known: {', '.join(STATES)}")
    state = find_state(model)
    if plan is None:
        if state is None or not state.entries:
            raise ConfigError("inspect(model) without a plan needs an adapted model; pass a plan")
        plan = Plan(tuple(rule for entry in state.entries.values() for rule in Plan.read(entry.rules).rules))
    plan = Plan.read(plan)
    targets = resolve(model, plan)
    shared: dict[Any, Any] = {}
    rows = []
    for index, rule in enumerate(plan.rules):
        mine = [t for t in targets if t.rule == index]
        made = [tensors_of(model, t, mine, shared) for t in mine]
        trained = [p for tensors in made for p in tensors.trained.values()]
        rows.append(
            Row(
                rule.match,
                ", ".join(brief(m) for m in rule.methods) or "frozen",
                tuple(t.site.name for t in mine),
                sum(p.numel() for p in trained),
                sum(t.method.flops(t.site, m.trained) for t, m in zip(mine, made, strict=True)),
                rule.lr,
                rule.weight_decay,
                sum(p.nbytes for p in trained),
                sum(state_bytes(p.shape) * p.itemsize for p in trained),
                tuple(f"{type(m).__name__}: {' or '.join(m.beside)}" for m in rule.methods if m.beside),
            )
        )
    base = {id(t): t for t in base_tensors(model).values()}.values()
    seen = Inspection(tuple(rows), sum(t.numel() for t in base), sum(t.nbytes for t in base), optimizer)
    if example is None and state is not None:
        return replace(seen, note="not costed: pass example= for an adapted model")
    return _with_costs(seen, model, plan, example)


def _with_costs(seen: Inspection, model: nn.Module, plan: Plan, given: Any) -> Inspection:
    from mmpeft.adapters import costs  # torch's fake tensors and FLOP counter bring sympy and Triton

    ghost = any(p.is_meta for p in model.parameters())
    example = example_of(model, device=torch.device("cpu") if ghost else None) if given is None else given
    if example is None:
        return replace(seen, note="not costed: the model does not say what it reads; pass example=")
    seen = replace(seen, example=_shapes(example))
    try:
        found, note = costs.plan_costs(model, plan, example), "predicted"
    except costs.NoStep as error:
        if given is None:
            return replace(seen, note=f"not costed ({error}); pass example=")
        try:
            if not error.values:
                raise
            if ghost:
                return replace(seen, note=f"not costed: the model looks at values ({error}), and it has none")
            found, note = costs.plan_costs(model, plan, example, real=True), "measured: the model looks at values"
        except costs.NoStep as failed:
            raise ConfigError(f"the model cannot be called with the example {seen.example}: {failed}") from failed
    added = [after - before for before, after in zip(found, found[1:], strict=False)]
    rows = tuple(replace(row, cost=cost) for row, cost in zip(seen.rows, added, strict=True))
    return replace(seen, rows=rows, base_cost=found[0], note=note)


def brief(method: Method) -> str:
    """The method with its first field and those that are not at their default: LoRA(rank=8)."""
    given = [(f.name, getattr(method, f.name), f.default) for f in fields(method)]  # type: ignore[arg-type]
    shown = [f"{n}={v!r}" for i, (n, v, default) in enumerate(given) if v != default or (i == 0 and v is not None)]
    return f"{type(method).__name__}({', '.join(shown)})"


def tensors_of(model: nn.Module, target: Target, same_rule: list[Target], shared: dict[Any, Any]) -> Tensors:
    """The tensors a target would get, on the meta device."""
    target.method.check(target.site)
    sites = tuple(t.site for t in same_rule if t.method == target.method)
    context = Context(model, target.owner, shared, sites)
    with torch.device("meta"):
        base = torch.empty(target.site.shape) if target.site.layout is not None else None
        return target.method.init(target.site, base, context)


def _shapes(example: Any) -> str:
    """'input_ids [2, 6], labels [2, 6]', three of them at most."""
    args, kwargs = as_call(example)
    named: list[tuple[str, Any]] = [*(("", a) for a in args), *kwargs.items()]
    found = []
    while named:
        name, value = named.pop(0)
        if isinstance(value, Tensor):
            found.append(f"{name} {list(value.shape)}".strip())
        elif isinstance(value, Mapping):
            named = [*value.items(), *named]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
