"""What a plan would do to a model, before anything is changed: sites, parameters, bytes and FLOPs, rule by rule."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmpeft.adapters.example import example_of
from mmpeft.adapters.fingerprint import base_tensors
from mmpeft.adapters.liveness import as_call
from mmpeft.adapters.method import Context, Tensors
from mmpeft.adapters.plan import Plan, PlanLike, Target, resolve
from mmpeft.adapters.state import find_state
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One rule of the plan."""

    match: str
    method: str
    sites: tuple[str, ...]
    parameters: int  # trained numbers
    flops: int  # forward FLOPs added for one row (token) through every site once
    lr: float | None
    weight_decay: float | None


@dataclass(frozen=True)
class Inspection:
    """A plan resolved on a model. `print` it for the table."""

    rows: tuple[Row, ...]
    base_parameters: int
    base_bytes: int
    base_flops: int | None  # of one forward of the example, where an example is known

    @property
    def trainable(self) -> int:
        """Trained numbers in all."""
        return sum(row.parameters for row in self.rows)

    @property
    def file_bytes(self) -> int:
        """Size of the adapter file (fp32)."""
        return 4 * self.trainable

    @property
    def optimizer_bytes(self) -> int:
        """Gradient and AdamW's two moments, fp32, beside the fp32 adapter itself."""
        return 12 * self.trainable

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=None, show_lines=False)
        for column, justify in (
            ("match", "left"),
            ("method", "left"),
            ("sites", "right"),
            ("trainable", "right"),
            ("FLOPs a token", "right"),
            ("lr", "right"),
            ("weight decay", "right"),
        ):
            table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(
                row.match.replace("[", "\\["),
                row.method,
                f"{len(row.sites):,}",
                f"{row.parameters:,}",
                f"{row.flops:,}",
                _value(row.lr),
                _value(row.weight_decay),
            )
        out = io.StringIO()
        Console(file=out, width=118, highlight=False).print(table)
        share = 100 * self.trainable / max(1, self.base_parameters)
        flops = f"; one example forward {self.base_flops / 1e9:,.2f} GFLOP" if self.base_flops else ""
        return (
            f"{out.getvalue()}base {self.base_parameters:,} parameters, {_size(self.base_bytes)}, frozen{flops}\n"
            f"trainable {self.trainable:,} ({share:.3f} %), file {_size(self.file_bytes)}, "
            f"optimizer {_size(self.optimizer_bytes)}"
        )


def inspect(model: nn.Module, plan: PlanLike | None = None) -> Inspection:
    """Resolve `plan` on `model` (default: the plans of the adapters it has) without changing anything.

    Works on the meta device, so a 7B model's table costs no memory.

    Raises:
        NameNotFound, ConfigError: as `attach` would.
    """
    if plan is None:
        state = find_state(model)
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
        rows.append(
            Row(
                rule.match,
                ", ".join(str(m) for m in rule.methods) or "frozen",
                tuple(t.site.name for t in mine),
                sum(p.numel() for tensors in made for p in tensors.trained.values()),
                sum(t.method.flops(t.site, m.trained) for t, m in zip(mine, made, strict=True)),
                rule.lr,
                rule.weight_decay,
            )
        )
    base = {id(t): t for t in base_tensors(model).values()}.values()
    return Inspection(tuple(rows), sum(t.numel() for t in base), sum(t.nbytes for t in base), base_flops(model))


def tensors_of(model: nn.Module, target: Target, same_rule: list[Target], shared: dict[Any, Any]) -> Tensors:
    """The tensors a target would get, on the meta device."""
    target.method.check(target.site)
    sites = tuple(t.site for t in same_rule if t.method == target.method)
    context = Context(model, target.owner, shared, sites)
    with torch.device("meta"):
        base = torch.empty(target.site.shape) if target.site.layout is not None else None
        return target.method.init(target.site, base, context)


def base_flops(model: nn.Module) -> int | None:
    """Forward FLOPs of the model's own example, counted on the meta device; None where that cannot run."""
    if find_state(model) is not None:
        return None
    example = example_of(model)
    if example is None:
        return None
    args, kwargs = _meta(as_call(example))
    state = {n: t.detach().to("meta") for n, t in [*model.named_parameters(), *model.named_buffers()]}
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            torch.func.functional_call(model, state, args, kwargs)
    except Exception:  # data-dependent control flow has no meta form; the rest of the table stands without it
        return None
    return int(counter.get_total_flops())


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {k: _meta(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_meta(v) for v in value)
    return value


def _size(n: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.1f} {unit}" if unit != "B" else f"{n} B"
        n = n / 1024  # type: ignore[assignment]
    return f"{n:.2f} GiB"


def _value(v: float | None) -> str:
    return "" if v is None else f"{v:g}"
