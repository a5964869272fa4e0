"""The table that `print(mmpeft.inspect(model, plan))` shows."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmpeft.adapters.costs import Cost
    from mmpeft.adapters.inspect import Inspection

WIDTH = 118


def page(seen: Inspection) -> str:
    """One row a rule, and a few lines about the whole."""
    from rich.console import Console
    from rich.table import Table

    costed = seen.base_cost is not None
    last = ("saved", "forward", "backward") if costed else ("FLOPs a token",)
    rates = any(row.lr is not None or row.weight_decay is not None for row in seen.rows)
    table = Table()
    table.add_column("match", overflow="fold")
    table.add_column("method", overflow="fold")
    for column in ("sites", "trained", "optimizer", *last, *(("lr", "decay") if rates else ())):
        table.add_column(column, justify="right", no_wrap=True)
    if seen.base_cost is not None:
        table.add_row("(the base)", "frozen", "", "", "", *_cells(seen.base_cost), *(("", "") if rates else ()))
    for row in seen.rows:
        cost = _cells(row.cost) if row.cost is not None else (f"{row.flops:,}",)
        table.add_row(
            row.match.replace("[", "\\["),
            row.method,
            f"{len(row.sites):,}",
            f"{row.parameters:,}",
            size(row.optimizer_bytes),
            *cost,
            *((_value(row.lr), _value(row.weight_decay)) if rates else ()),
        )
    if seen.cost is not None:
        table.add_section()
        table.add_row(
            "all", "", "", f"{seen.trainable:,}", size(seen.optimizer_bytes), *_cells(seen.cost),
            *(("", "") if rates else ()),
        )  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=WIDTH, highlight=False).print(table)
    return out.getvalue() + "\n".join(_summary(seen))


def _summary(seen: Inspection) -> list[str]:
    share = 100 * seen.trainable / max(1, seen.base_parameters)
    lines = [
        f"base {seen.base_parameters:,} parameters, {size(seen.base_bytes)}, frozen",
        f"trainable {seen.trainable:,} ({share:.3f} %), file {size(seen.file_bytes)}, gradients "
        f"{size(seen.gradient_bytes)}, optimizer {size(seen.optimizer_bytes)} ({seen.optimizer})",
    ]
    beside = dict.fromkeys(needed for row in seen.rows for needed in row.beside)
    if beside:
        lines.append(f"wants something beside the optimizer, or trains as it starts: {', '.join(beside)}")
    if seen.training_bytes is not None:
        lines.append(
            f"one step on {seen.example} ({seen.note}); base, adapter, gradients, optimizer and saved activations: "
            f"{size(seen.training_bytes)}"
        )
    else:
        lines.append(seen.note)
    return lines


def _cells(cost: Cost) -> tuple[str, str, str]:
    return size(cost.saved_bytes), count(cost.forward_flops), count(cost.backward_flops)


def size(n: float) -> str:
    """Bytes in a unit that leaves one to four digits before the point."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.1f} {unit}" if unit != "B" else f"{n} B"
        n = n / 1024
    return f"{n:.2f} GiB"


def count(n: float) -> str:
    """FLOPs likewise."""
    for unit in ("", "k", "M", "G"):
        if abs(n) < 1000:
            return f"{n:.1f} {unit}FLOP" if unit else f"{n} FLOP"
        n = n / 1000
    return f"{n:.2f} TFLOP"


def _value(v: float | None) -> str:
    return "" if v is None else f"{v:g}"
