"""Towers of transformer blocks (ViT, SigLIP, wav2vec and kin): torch.compile with gradients, CUDA graphs without.

A tower whose blocks run fused (`vit.py`) is captured only: frozen, or under no_grad, one replay is the whole tower.

A tower is found by structure: the smallest module around a ModuleList or Sequential of at least two blocks of one class
that have an attention and an MLP (two norms, four linear layers). Llama-type decoders are not towers (`llama.py`). The
adapted linears inside are one operator each (`kernels.lowrank`), so a tower is one graph with its adapters unmerged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmpeft.adapters.compiled.graphs import Graphed
from mmpeft.adapters.compiled.llama import decoders
from mmpeft.adapters.compiled.route import Route
from mmpeft.adapters.state import SLOT, find_state
from mmpeft.errors import Unsupported
from mmpeft.kernels.vit_parts import is_block

if TYPE_CHECKING:
    from mmpeft.adapters.compiled.model import Compiled
    from mmpeft.adapters.compiled.vit import FusedStack


def find(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """(path, module, blocks) of every tower outside of Llama-type decoders, outermost list first."""
    inside = {id(m) for _, d in decoders(model) for m in d.modules()}
    taken: set[int] = set(inside)
    for path, module in model.named_modules():
        if id(module) in taken:
            continue
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList | nn.Sequential) and (count := _blocks(child)) and name != SLOT:
                taken |= {id(m) for m in module.modules()}
                yield path, module, count
                break


def _blocks(stack: nn.Module) -> int:
    """How many transformer blocks of one class a list holds; 0 where it holds anything else."""
    blocks = [m for name, m in stack.named_children() if name != SLOT]
    if len(blocks) < 2 or len({type(b).__qualname__ for b in blocks}) > 1:
        return 0

    def norms(block: nn.Module) -> int:
        return sum("norm" in type(m).__name__.lower() for m in block.modules())

    def linears(block: nn.Module) -> int:
        return sum(isinstance(m, nn.Linear) for m in block.modules())

    return len(blocks) if all(is_block(b) or (norms(b) >= 2 and linears(b) >= 4) for b in blocks) else 0


class FastTower:
    """A tower's forward: compiled where gradients flow, replayed from a CUDA graph where none do.

    Args:
        backend: of torch.compile; None runs the tower as it is. stacks: the fused stacks inside.
    """

    def __init__(
        self, model: nn.Module, tower: nn.Module, *, backend: str | None, graphs: bool, stacks: Sequence[FusedStack] = ()
    ) -> None:
        self.state, self.tower, self.stacks = find_state(model), tower, stacks
        self.modules = [m for m in tower.modules() if m is not tower]
        self.adapted = self.slots()

        def run(*args: Any, **kwargs: Any) -> Any:
            return type(tower).forward(tower, *args, **kwargs)

        self.run = run if backend is None else torch.compile(run, dynamic=False, backend=backend)
        self.graphed = Graphed(self.run) if graphs else None
        self.route = Route(tower, self)

    def __call__(self, route: Route, *args: Any, **kwargs: Any) -> Any:
        if self.graphed is None or torch.compiler.is_compiling():
            return self.run(*args, **kwargs)
        for stack in self.stacks:
            stack.ready()
        if self.differs(args, kwargs):
            return self.run(*args, **kwargs)
        modes = any(m.training for m in self.modules)
        with torch.no_grad():
            return self.graphed(*args, key=(program(self.state), modes), **kwargs)

    def slots(self) -> int:
        """How many modules of the tower have adapters."""
        return sum(SLOT in m._modules for m in (self.tower, *self.modules))

    def differs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a replay would not do what a call does: gradients, hooks, dropout that draws anew, other adapters."""
        if any(m._forward_hooks or m._forward_pre_hooks for m in self.modules):
            return True
        if any(stack.fused.dropout for stack in self.stacks) or self.slots() != self.adapted:
            return True
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        return torch.is_grad_enabled() and any(t.requires_grad for t in (*leaves, *self.tower.parameters()))


def program(state: Any) -> Any:
    """What of the adapters' state decides which operations run; switches within a stack do not."""
    if state is None:
        return None
    return ((state.indexed, state.generation) if state.indexed else state.active, state.merged, state.bare)


def apply(
    model: nn.Module, compiled: Compiled, *, graphs: bool, backend: str = "inductor", devices: tuple[str, ...] = ("cuda",),
    fused: Collection[int] = (),
) -> None:  # fmt: skip
    """Every tower of the model that is on one of `devices`; those around a stack of ids `fused` are captured only."""
    every = list(find(model))
    if not every:
        raise Unsupported("no stack of transformer blocks outside of the decoders")
    for path, tower, count in every:
        part = f"tower {path or type(tower).__name__}"
        inside = {id(m) for m in tower.modules()}
        if inside & set(fused):
            _capture(model, compiled, tower, part, [s for s in compiled.stacks if id(s.module) in inside], graphs)
            continue
        kinds = {p.device.type for p in tower.parameters()}
        if not kinds <= set(devices):
            compiled.skip(part, f"{count} blocks on {', '.join(sorted(kinds))}: compiled and captured on a GPU only")
            continue
        try:
            fast = FastTower(model, tower, backend=backend, graphs=graphs)
        except Unsupported as error:
            compiled.skip(part, str(error))
            continue
        how = f"{count} blocks in one torch.compile graph" + ("; CUDA graphs without gradients" if graphs else "")
        compiled.add(part, how, fast.route.remove)


def _capture(
    model: nn.Module, compiled: Compiled, tower: nn.Module, part: str, stacks: list[FusedStack], graphs: bool
) -> None:
    """CUDA graphs of a tower whose blocks run fused; without a GPU there is nothing to add."""
    if not graphs or tower is stacks[0].module:
        return
    try:
        fast = FastTower(model, tower, backend=None, graphs=True, stacks=stacks)
    except Unsupported as error:
        compiled.skip(part, str(error))
        return
    compiled.add(part, "around the fused blocks; CUDA graphs where no gradient flows", fast.route.remove)
