"""The call itself: tries every part in turn, keeps the report, prints it, and can take everything back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from torch import nn

from mmpeft.adapters.compiled import llama, patches, vit
from mmpeft.adapters.compiled import towers as tower_parts
from mmpeft.adapters.compiled.graphs import Graphed
from mmpeft.adapters.state import State
from mmpeft.errors import ConfigError, Unsupported
from mmpeft.kernels.step import TrainStep


@dataclass
class Line:
    """One line of the report: a part of the model, whether it is on, and how or why not."""

    part: str
    on: bool
    what: str


@dataclass
class Compiled:
    """What `compile` did. `str()` is the report; `undo()` (or leaving a `with`) gives the model back as it was."""

    lines: list[Line] = field(default_factory=list)
    decoders: list[llama.FusedDecoder] = field(default_factory=list)
    stacks: list[vit.FusedStack] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def __str__(self) -> str:
        width = max((len(line.part) for line in self.lines), default=0)
        return "\n".join(f"{'on ' if x.on else 'off'}  {x.part:<{width}}  {x.what}" for x in self.lines)

    def __enter__(self) -> Compiled:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a model has its own forwards (`Route`): there is nothing to report."""

    def __reduce__(self) -> Any:
        return _nothing, ()

    def undo(self) -> None:
        """Take everything off again, the last part first; harmless to call twice."""
        while self._undo:
            self._undo.pop()()
        self.decoders, self.stacks = [], []

    def add(self, part: str, what: str, undo: Callable[[], None]) -> None:
        """Note a part that is on, and how it is taken off."""
        self.lines.append(Line(part, True, what))
        self._undo.append(undo)

    def skip(self, part: str, why: str) -> None:
        """Note a part that stays as it was."""
        self.lines.append(Line(part, False, why))

    def graph(self, fn: Callable[..., Any]) -> Step:
        """`fn` (tensors in, tensors out, no gradients: a policy step, an encoder with its connector) as a CUDA graph a
        shape; without a GPU it is called as it is. All adapters of the model must sit in the fused decoders, or be the
        same in every call."""
        return Step(fn, self)

    def train_step(
        self, *, batch: int, length: int, rows: int | None = None, documents: int | None = None, **optimizer: Any
    ) -> TrainStep:
        """A whole training step of the fused language model (forward, backward, AdamW) at one batch shape; on a GPU
        one CUDA graph. Options of `kernels.adamw.FlatAdamW`; `rows`: how many positions the head runs on; `documents`: the
        most packed documents of a batch, `step(ids, labels, documents=batch["document_ids"])`.

        Raises:
            ConfigError: not exactly one fused decoder with a head, or adapters outside of its blocks.
        """
        if len(self.decoders) != 1 or not self.decoders[0].whole:
            raise ConfigError(f"a training step needs one fused decoder and its plain head; this model has:\n{self}")
        fused = self.decoders[0].current()
        return TrainStep(fused, fused.optimizer(**optimizer), batch=batch, length=length, rows=rows, documents=documents)


def _nothing() -> None:
    """What a pickled model has in place of its report."""


class Step:
    """A function of tensors without gradients, captured whole as one CUDA graph a shape, adapters unmerged: `use` of
    another adapter between calls rewrites the fused decoders' compute copies (among `mmpeft.stack`ed ones: an index) and
    replays the same graph."""

    def __init__(self, fn: Callable[..., Any], compiled: Compiled) -> None:
        self.graphed, self.compiled = Graphed(fn), compiled

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """fn(*args, **kwargs)."""
        state = None
        for part in (*self.compiled.decoders, *self.compiled.stacks):
            state = part.state
            part.prepare()
        return self.graphed(*args, key=_key(state), **kwargs)


def _key(state: State | None) -> Any:
    """Which program runs: one adapter in place of another on the fused blocks is the same one."""
    if state is None:
        return None
    active = state.active
    single = len(active.names) == 1 and active.weights is None and active.rows is None and not active.base
    chosen = (state.indexed, state.generation) if state.indexed else "one" if single else active
    return (chosen, state.merged, state.bare)


KEPT = "_mmpeft_compiled"  # where a model keeps its report; a table of models would keep them alive, since parts refer to them


def compile(
    model: nn.Module,
    *,
    decoders: bool = True,
    blocks: bool = True,
    towers: bool = True,
    loss: bool = True,
    graphs: bool = True,
    check: bool = True,
    out: TextIO | None = None,
) -> Compiled:
    """Turn on what makes this model faster on this device, in place; whatever does not fit stays as it is.

    Call it after `mmpeft.attach` and after the model is on its device. A second call starts over. Dropout of adapters inside
    fused blocks draws one mask an input: q, k and v read the same dropped tensor, and so do gate and up.

    Args:
        decoders: Llama-type decoders, found by structure, run as fused blocks with the active adapter.
        loss: a causal language model called with labels computes its loss without logits (its output has `logits=None`).
        blocks: stacks of pre-norm ViT blocks (timm, transformers, open_clip), frozen or with adapters inside, found by
            structure, run fused too.
        towers: other stacks of transformer blocks are compiled by torch.compile (GPU only).
        graphs: forwards without gradients of whole towers and decoders replay CUDA graphs, one a shape (GPU only).
        check: compare every fused part with the model's own on random inputs first.
        out: where the report is printed, default stdout; an `io.StringIO()` keeps it quiet.

    Returns:
        The report, which can `undo`.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"mmpeft.compile takes a module, given {type(model).__name__}")
    if (before := model.__dict__.pop(KEPT, None)) is not None:
        before.undo()
    compiled = model.__dict__[KEPT] = Compiled()
    fused: set[int] = set()
    captures = graphs and any(p.is_cuda for p in model.parameters())
    parts: list[tuple[bool, str, Callable[..., None]]] = [
        (decoders, "decoders", lambda: llama.apply(model, compiled, check=check, graphs=captures)),
        (loss, "loss", lambda: llama.apply_loss(model, compiled, check=check)),
        (blocks, "blocks", lambda: fused.update(vit.apply(model, compiled, check=check, graphs=captures))),
        (blocks, "patches", lambda: patches.apply(model, compiled)),
        (towers, "towers", lambda: tower_parts.apply(model, compiled, graphs=captures, fused=fused)),
    ]
    for wanted, name, run in parts:
        if not wanted:
            compiled.skip(name, "not asked for")
            continue
        try:
            run()
        except Unsupported as error:
            compiled.skip(name, str(error))
    if graphs and not captures:
        compiled.skip("graphs", "CUDA graphs need a GPU")
    print(compiled, file=out or sys.stdout)
    return compiled
