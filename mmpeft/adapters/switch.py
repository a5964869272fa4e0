"""use, trainable, merge, unmerge: three independent things about the adapters of a model.

Activity says which adapters a forward uses. Trainability says which get gradients. Merging pins the effective weights
beside the untouched base, to save the work of forming them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.classes import spec_of
from mmpeft.adapters.forward import stock_op
from mmpeft.adapters.liveness import as_call, tensors_in
from mmpeft.adapters.method import Delta
from mmpeft.adapters.slot import Slot
from mmpeft.adapters.stack import activate
from mmpeft.adapters.state import Active, make_active, slots, state_of
from mmpeft.adapters.wrapped import is_sharded
from mmpeft.errors import ConfigError, Unsupported


class use:
    """Choose the active adapters: at once, and, in a `with`, until it ends.

        mmpeft.use(model, "pets")                  one adapter
        with mmpeft.use(model, None): ...          the base, bit for bit
        mmpeft.use(model, ["a", "b"])              a composition, left to right
        mmpeft.use(model, {"a": .7, "b": .3})      the weighted sum of effective deltas
        mmpeft.use(model, rows=["a", None, "b"])   one adapter a row of the batch

    Raises:
        NameNotFound: an adapter the model does not have.
        Unsupported: `rows` at sites that one batch cannot split (named in the message).
    """

    def __init__(
        self,
        model: nn.Module,
        names: str | Sequence[str] | Mapping[str, float] | None = None,
        *,
        rows: Sequence[str | None] | None = None,
    ) -> None:
        self.model, self.state = model, state_of(model)
        if rows is not None and names is not None:
            raise ConfigError("use() takes names or rows=, not both")
        chosen = make_active(self.state, names, rows)
        if chosen.rows is not None:
            check_rows(model, chosen)
        self.before = self.state.active
        activate(model, self.state, chosen)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *_: object) -> None:
        activate(self.model, self.state, self.before)


def check_rows(model: nn.Module, chosen: Active) -> None:
    """Refuse rows= where one batch cannot be split: at materialised sites, for methods that cannot mix, and where the
    proof of liveness saw that the batch is not the first axis.

    Raises:
        Unsupported: naming the sites.
        ConfigError: adapters are merged, so that no row can be the base.
    """
    state = state_of(model)
    if state.merged:
        raise ConfigError(f"rows= while {', '.join(state.merged)} are merged; unmerge first")
    new = tuple(n for n in chosen.names if not state.entries[n].mixes)
    if not new:
        return  # a server changes the rows with every batch, and walks no model for it
    refused: dict[str, list[str]] = {}
    for _, owner, slot in slots(model):
        asked: dict[tuple[object, ...], str] = {}  # 64 adapters of one kind are one question
        for _, delta in slot.deltas(new):
            kind = (delta.site.kind, delta.site.tensor, delta.method.name, delta.method.mixes)
            if kind not in asked:
                asked[kind] = _why_no_rows(owner, slot, delta)
            why = asked[kind]
            if why:
                refused.setdefault(why, []).append(delta.site.name)
    if refused:
        lines = [
            f"  {', '.join(sites[:4])}{f' and {len(sites) - 4} more' if len(sites) > 4 else ''}: {why}"
            for why, sites in refused.items()
        ]
        raise Unsupported("rows= cannot give each row of a batch its own adapter at\n" + "\n".join(lines))
    for name in new:
        state.entries[name].mixes = True


def _why_no_rows(owner: nn.Module, slot: Slot, delta: Delta) -> str:
    """The reason why rows= is refused at a site, '' where it works."""
    if delta.site.kind == "weight":
        op = stock_op(spec_of(type(owner))[0])
        if (
            op is None
            or not op.mixes
            or delta.site.tensor not in ("weight", "bias")
            or delta.site.tensor in slot.follows
        ):
            return f"the {delta.site.tensor} of a {type(owner).__name__} is one for the whole batch"
        if delta.site.tensor == "weight" and not delta.method.mixes:
            return f"{delta.method.name} cannot differ within a batch"
    elif delta.site.kind == "tokens" or not delta.method.mixes:
        return f"{delta.method.name} cannot differ within a batch"
    return (
        "its input does not keep the batch on the first axis, or its weight is read without a call"
        if slot.rows_fit is False
        else ""
    )


def active(model: nn.Module) -> tuple[str, ...]:
    """Names of the active adapters, in order."""
    return state_of(model).active.names


def trainable(model: nn.Module, names: Sequence[str] | str) -> None:
    """Give gradients to these adapters and to no others, whatever is active.

    Raises:
        NameNotFound: an adapter the model does not have.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    state_of(model).check_names(wanted)
    for _, _, slot in slots(model):
        for name, delta in slot.deltas():
            for n in delta.trained:
                p = delta._parameters[n]
                assert p is not None
                p.requires_grad_(name in wanted)


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the adapters that get gradients."""
    found = {
        n: None for _, _, slot in slots(model) for n, d in slot.deltas() if any(p.requires_grad for p in d.parameters())
    }
    return list(found)


def check_distributed(model: nn.Module) -> None:
    """Refuse what DDP would hang on: an adapter that is trainable but takes no part in the forward.

    Raises:
        ConfigError: naming the inactive trainable adapters.
    """
    state = state_of(model)
    idle = [n for n in trainable_names(model) if n not in state.active.names or n in state.merged]
    if idle:
        raise ConfigError(
            f"adapters {', '.join(idle)} are trainable but not active "
            f"(active: {', '.join(state.active.names) or 'none'}); "
            "under DDP their gradients never arrive. Call mmpeft.trainable(model, [...]) or mmpeft.use(model, [...])"
        )


def merge(
    model: nn.Module, names: Sequence[str] | str | None = None, *, check: Any = None, tolerance: float = 1e-4
) -> float:
    """Pin the effective weights of `names` (default: the active adapters) beside the base, so that forwards cost
    as much as the base's. `use(None)`, `state_dict` and `unmerge` stay exact; other adapters keep working on top.

    Args:
        check: an input; the output before and after is compared.
        tolerance: largest allowed difference, relative to the largest output.

    Returns:
        The measured difference (0.0 without `check`).

    Raises:
        Unsupported: an adapter with call or token methods, or rows in use.
        ConfigError: the outputs differ by more than `tolerance`; nothing is merged then.
    """
    state = state_of(model)
    chosen = state.active if names is None else make_active(state, names)
    if not chosen.names or chosen.rows is not None:
        raise ConfigError("merge needs active adapters (or their names); rows of a batch cannot be merged")
    if state.merged:
        raise ConfigError(
            f"{', '.join(state.merged)} are merged already; unmerge first, then merge all you want together"
        )
    for path, owner, slot in slots(model):
        for name, delta in slot.deltas(chosen.names):
            if is_sharded(owner._parameters.get(delta.site.tensor)):
                raise Unsupported(f"{delta.site.name} is sharded; merge before fully_shard, or gather the model first")
            if delta.site.kind != "weight":
                raise Unsupported(
                    f"{name!r} changes the call of {path} ({delta.method.name}); only weight methods can be merged"
                )
    call = None if check is None else as_call(check)
    with use_active(state, chosen), torch.no_grad():
        before = None if call is None else list(tensors_in(model(*call[0], **call[1])))
        pinned: list[tuple[Slot, str, Tensor]] = []
        for _, owner, slot in slots(model):
            for tensor in {d.site.tensor for _, d in slot.deltas(chosen.names)}:
                pinned.append((slot, tensor, getattr(owner, tensor).detach().clone()))
    for slot, tensor, value in pinned:
        slot.pinned[tensor] = value
    state.merged = chosen.names
    if call is None or before is None:
        return 0.0
    with use_active(state, chosen), torch.no_grad():
        after = list(tensors_in(model(*call[0], **call[1])))
    size = max((float(b.abs().max()) for b in before if b.is_floating_point()), default=0.0) or 1.0
    error = max(
        (float((a - b).abs().max()) for a, b in zip(after, before, strict=True) if b.is_floating_point()), default=0.0
    )
    if not error / size <= tolerance:
        unmerge(model)
        raise ConfigError(
            f"merging changes the output by {error / size:.2e} of its largest value, more than {tolerance:.0e}; "
            "on bf16 or fp16 bases W + delta is rounded to the base's precision"
        )
    return error / size


def unmerge(model: nn.Module) -> None:
    """Drop the pinned weights; exact, since the base was never written to."""
    state = state_of(model)
    for _, _, slot in slots(model):
        slot.pinned.clear()
    state.merged = ()


class use_active:
    """Within it, exactly this active set."""

    def __init__(self, state: Any, chosen: Active) -> None:
        self.state, self.chosen = state, chosen

    def __enter__(self) -> None:
        self.before = self.state.active
        self.state.active = self.chosen

    def __exit__(self, *_: object) -> None:
        self.state.active = self.before


def adapter_parameters(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """(file key, parameter) of an adapter's trained tensors (None: of all adapters)."""
    seen: set[int] = set()
    for path, _, slot in slots(model):
        for adapter, delta in slot.deltas(None if name is None else (name,)):
            for n in delta.trained:
                p = delta._parameters[n]
                if p is not None and id(p) not in seen:
                    seen.add(id(p))
                    yield f"{path}.{adapter}.{delta.site.key(delta.method.name)}.{n}", p


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, name: str | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups of everything trainable, with each rule's lr and weight decay, LoRA+ ratios included.

    Parameters that need gradients without belonging to an adapter (a head the caller unfroze) form a group of defaults.

    Raises:
        NameNotFound: no such adapter.
        ConfigError: nothing is trainable.
    """
    state = state_of(model)
    if name is not None:
        state.check_names([name])
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    seen: set[int] = set()

    def put(p: nn.Parameter, rate: float, decay: float, label: str) -> None:
        if p.requires_grad and id(p) not in seen:
            seen.add(id(p))
            group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay, "name": label})
            group["params"].append(p)

    for _, _, slot in slots(model):
        for adapter, delta in slot.deltas(None if name is None else (name,)):
            rule = state.entries[adapter].rules[delta.rule]
            for n in delta.trained:
                p = delta._parameters[n]
                assert p is not None
                rate = rule.get("lr", lr) * delta.method.lr_ratio_of(n)
                put(p, rate, rule.get("weight_decay", weight_decay), f"{adapter}: {rule['match']}")
    if name is None:
        for n, p in model.named_parameters():
            put(p, lr, weight_decay, n)
    if not groups:
        raise ConfigError("nothing is trainable; call mmpeft.trainable(model, [...])")
    return list(groups.values())
