"""Structures of a network that can only be removed together, found by running it: LLM-Pruner's dependency groups
(Ma et al. 2023, arXiv 2305.11627), and cutting them out for good.

    found = structures(model, example)           # feed-forward units and attention heads, whatever the architecture
    scores = score_structures(model, found, losses)         # Taylor importance of every group
    pruned = prune_structures(model, found, scores, share=0.2)      # the smaller model, in place; then LoRA recovers it

A row of one layer belongs to the columns of another that change when its output is disturbed, and no others do. A unit of
a feed-forward moves one column of the second layer, a row of v one head's columns of the output projection; what goes
through a norm or the residual stream moves all, which is no dependency. No name and no architecture is known here.

Cutting changes the model's own tensors, so it is done before anything is attached. Masks that leave them are LoRAPrune,
`StructuredMask` and APT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Method, Tensors
from mmpeft.adapters.methods.low_rank import one_of
from mmpeft.adapters.plan import Target
from mmpeft.adapters.probe import as_call, put_back
from mmpeft.adapters.selection.criteria import Evidence, Losses, gather
from mmpeft.adapters.site import weight_site
from mmpeft.adapters.state import find_state
from mmpeft.errors import ConfigError

Aggregate = Literal["sum", "prod", "max", "last"]
Order = Literal["vector", "element", "second"]


@dataclass(frozen=True)
class Rows:
    """Rows of a linear layer that make the channels of a structure: `begin` + group * `width`, `width` of them."""

    path: str
    begin: int
    width: int


@dataclass(frozen=True)
class Structure:
    """`groups` groups; group j is the columns [j * width, (j + 1) * width) of `consumer`, and its rows of each producer."""

    consumer: str
    groups: int
    width: int
    producers: tuple[Rows, ...]


@torch.no_grad()
def structures(model: nn.Module, example: Any, *, only: Callable[[str], bool] | None = None) -> list[Structure]:
    """The dependency groups between linear layers, in the order of their consumers.

    Args:
        example: an input of a few tokens.
        only: which consumers may be cut, by path; default all.

    Raises:
        ConfigError: the model has adapters already.
    """
    if find_state(model) is not None:
        raise ConfigError("structures are found and cut on a model without adapters; attach afterwards")
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    args, kwargs = as_call(example)
    found: dict[
        str, list[tuple[str, int, int, int]]
    ] = {}  # consumer -> (producer, first row, rows, columns a row moves)
    with put_back(model):
        model.eval()
        base = _inputs(model, linear, args, kwargs)
        for name, m in linear.items():
            for parts in (1, 2, 3):  # q|k|v and gate|up may be one layer
                if m.out_features % parts:
                    continue
                size = m.out_features // parts
                spans = [_spans(model, linear, name, i * size, size, base, args, kwargs) for i in range(parts)]
                if good := set.intersection(*(set(span) for span in spans)) - {name}:
                    for consumer in good:
                        found.setdefault(consumer, []).extend(
                            (name, i * size, size, span[consumer]) for i, span in enumerate(spans)
                        )
                    break
    out = []
    for consumer in (c for c in linear if c in found and (only is None or only(c))):
        columns = linear[consumer].in_features
        width = max(n for *_, n in found[consumer])  # of grouped queries, all that one key head serves
        if columns % width == 0 and all(rows % (columns // width) == 0 for _, _, rows, _ in found[consumer]):
            groups = columns // width
            producers = tuple(Rows(n, begin, rows // groups) for n, begin, rows, _ in found[consumer])
            out.append(Structure(consumer, groups, width, producers))
    return out


Linears = Mapping[str, nn.Linear]


def _spans(
    model: nn.Module,
    linear: Linears,
    name: str,
    begin: int,
    size: int,
    base: Mapping[str, Tensor],
    args: Any,
    kwargs: Any,
) -> dict[str, int]:
    """Consumer -> columns that one of these rows of a layer moves, where some and not all move, and in proportion:
    the row at a quarter of the rows moves what is at a quarter of the columns."""
    probes = sorted({0, size // 4, size // 2, 3 * size // 4, size - 1})
    moved = {row: _moved(model, linear, name, begin + row, base, args, kwargs) for row in probes}
    out = {}
    for consumer in set.intersection(*(set(m) for m in moved.values())):
        columns = linear[consumer].in_features
        ends = [moved[row][consumer] for row in probes]
        if all(first <= row * columns / size <= last for row, (first, last) in zip(probes, ends, strict=True)):
            if (width := max(last - first + 1 for first, last in ends)) < columns:
                out[consumer] = width
    return out


def _moved(
    model: nn.Module, linear: Linears, name: str, row: int, base: Mapping[str, Tensor], args: Any, kwargs: Any
) -> dict[str, tuple[int, int]]:
    """Consumer -> (first, last) column that noise on one row of a layer's output moves."""

    def disturb(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        y = y.clone()
        noise = torch.randn(y.shape[:-1], generator=torch.Generator().manual_seed(row)).to(y)
        y[..., row] += noise * (1 + y.abs().max())
        return y

    hook = linear[name].register_forward_hook(disturb)
    try:
        now = _inputs(model, linear, args, kwargs)
    finally:
        hook.remove()
    out = {}
    for consumer, before in base.items():
        if consumer in now and now[consumer].shape == before.shape:
            change = (now[consumer] - before).abs().flatten(0, -2).amax(0)
            columns = (change > 1e-6 * (1 + float(before.abs().max()))).nonzero().flatten()
            if len(columns):
                out[consumer] = (int(columns[0]), int(columns[-1]))
    return out


def _inputs(model: nn.Module, linear: Mapping[str, nn.Linear], args: Any, kwargs: Any) -> dict[str, Tensor]:
    """What every linear layer reads in one forward."""
    seen: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, a, n=n: seen.__setitem__(n, a[0].detach().float()) if a else None)
        for n, m in linear.items()
    ]
    try:
        model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@dataclass(frozen=True)
class _Whole(Method):
    """Stands for a weight in `gather`."""

    def init(self, site: Any, base: Tensor | None, context: Context) -> Tensors:
        return Tensors({})


def score_structures(
    model: nn.Module,
    found: Sequence[Structure],
    losses: Losses,
    *,
    order: Order = "element",
    aggregate: Aggregate = "sum",
) -> dict[str, Tensor]:
    """Taylor importance of every group, by consumer [groups].

    Args:
        losses: as in `criteria.gather`.
        order: "vector" |sum g w| of a part, "element" sum |g w|, "second" sum |g w - w^2 F / 2| with F the mean squared
            gradient for the Hessian's diagonal (the paper's approximation).
        aggregate: of a group's parts: the sum, product or largest, or the consumer's own ("last").
    """
    one_of("order", order, ("vector", "element", "second"))
    one_of("aggregate", aggregate, ("sum", "prod", "max", "last"))
    modules = dict(model.named_modules())
    paths = {p for s in found for p in (s.consumer, *(r.path for r in s.producers))}
    sites = {path: weight_site(path, modules[path], "weight") for path in paths}
    evidence = gather(model, [Target(0, _Whole(), site, modules[site.path]) for site in sites.values()], losses)
    entries = {path: _entries(evidence[site.name], order) for path, site in sites.items()}
    out = {}
    for s in found:
        parts = [entries[r.path][r.begin : r.begin + r.width * s.groups].view(s.groups, -1).sum(1) for r in s.producers]
        parts.append(entries[s.consumer].T.reshape(s.groups, -1).sum(1))
        stack = torch.stack([p.abs() for p in parts])
        out[s.consumer] = {"sum": stack.sum(0), "prod": stack.prod(0), "max": stack.amax(0), "last": stack[-1]}[
            aggregate
        ]
    return out


def _entries(e: Evidence, order: Order) -> Tensor:
    """Importance of single weights [out, in]; a part's is their sum."""
    assert e.g is not None and e.g2 is not None
    first = e.value * e.g / e.n
    if order == "vector":
        return first  # signed: the sum over a part comes before the absolute value
    return first.abs() if order == "element" else (first - e.value.square() * e.g2 / e.n / 2).abs()


def prune_structures(
    model: nn.Module,
    found: Sequence[Structure],
    scores: Mapping[str, Tensor],
    *,
    share: float,
) -> dict[str, list[int]]:
    """Cut the `share` of every structure's groups with the lowest scores out of the model, in place; returns the groups
    that stayed, by consumer. The function becomes that of the whole model with these columns at 0.

    Raises:
        ConfigError: a share out of range.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"share {share}; expected 0 <= share < 1")
    kept = {}
    for s in found:
        n = s.groups - min(s.groups - 1, int(share * s.groups + 1e-9))
        kept[s.consumer] = sorted(scores[s.consumer].argsort(descending=True, stable=True)[:n].tolist())
    cut(model, found, kept)
    return kept


@torch.no_grad()
def cut(model: nn.Module, found: Sequence[Structure], kept: Mapping[str, Sequence[int]]) -> None:
    """Keep these groups of each structure and remove the others' rows and columns. Head counts of the module around a
    consumer (`num_heads`, `num_key_value_heads`) follow."""
    modules = dict(model.named_modules())
    rows: dict[str, list[Tensor]] = {}
    for s in found:
        stay = torch.tensor(list(kept[s.consumer]))
        for r in s.producers:
            gone = torch.ones(s.groups, r.width, dtype=torch.bool)
            gone[stay] = False
            rows.setdefault(r.path, []).append(r.begin + gone.flatten().nonzero().flatten())
        columns = torch.arange(s.groups * s.width).view(s.groups, s.width)[stay].flatten()
        _select(modules[s.consumer], columns, axis=1)
        parent = modules[s.consumer.rpartition(".")[0]]
        for name in ("num_heads", "num_key_value_heads"):
            if isinstance(heads := getattr(parent, name, None), int) and heads % s.groups == 0:
                setattr(parent, name, heads // s.groups * len(stay))
        for name in ("attn_dim", "inner_dim"):  # timm's attention reshapes to it
            if getattr(parent, name, None) == s.groups * s.width:
                setattr(parent, name, len(columns))
    for path, parts in rows.items():
        m = modules[path]
        keep = torch.ones(int(m.weight.shape[0]), dtype=torch.bool)
        keep[torch.cat(parts)] = False
        _select(m, keep.nonzero().flatten(), axis=0)


def _select(m: nn.Module, index: Tensor, axis: int) -> None:
    assert isinstance(m, nn.Linear)
    m.weight = nn.Parameter(m.weight.index_select(axis, index.to(m.weight.device)), m.weight.requires_grad)
    if axis == 0:
        m.out_features = len(index)
        if m.bias is not None:
            m.bias = nn.Parameter(m.bias.index_select(0, index.to(m.bias.device)), m.bias.requires_grad)
    else:
        m.in_features = len(index)
