"""Stacks of pre-norm ViT blocks (timm, transformers, open_clip) on the fused blocks of `mmpeft.kernels.vit`.

Found by structure: a Sequential or ModuleList whose members have a ViT block's parts (`kernels.vit_parts`), frozen or
with adapters on their weights. A Sequential that is called whole is one autograd node. Everywhere else each block's own
call is fused, with its true output: what looks at what is between the blocks (an encoder that reads another layer,
`output_hidden_states`, checkpointing) sees what it always saw. A call with a mask, hooks inside a block, or dropout of
the block's own in training go to the block's own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.compiled.part import FusedPart
from mmpeft.adapters.compiled.route import Route
from mmpeft.adapters.state import SLOT, slots
from mmpeft.adapters.storage.packed_weight import PackedWeight
from mmpeft.errors import Unsupported
from mmpeft.kernels import fuse_vit
from mmpeft.kernels.fuse import LowRank
from mmpeft.kernels.vit_parts import is_block

if TYPE_CHECKING:
    from mmpeft.adapters.compiled.model import Compiled

RECORDERS = "transformers.utils.output_capturing"  # its hooks stay on for good, and read attentions only when asked to
TOKENS = ("hidden_states", "input", "output_hidden_states")  # names of tokens, and what hooks outside of a block read
NOISE = ("p", "drop_prob", "dropout", "dropout_prob", "attention_dropout")  # attributes that act in training where they are not 0


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, stack) of every Sequential or ModuleList of ViT blocks."""
    for path, module in model.named_modules():
        blocks = [m for name, m in module.named_children() if name != SLOT] if _is_list(module) else []
        if blocks and all(is_block(b) for b in blocks):
            yield path, module


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList)


class FusedStack(FusedPart):
    """One stack on the fused blocks, and the choice made at each call. `calls` counts those of the whole stack, and of
    single blocks where they are called one by one."""

    def __init__(self, model: nn.Module, path: str, stack: nn.Module, *, check: bool) -> None:
        super().__init__(model, path, stack, frozen=not any(list(slot.deltas()) for _, _, slot in slots(stack)))
        if any(owner is stack and list(slot.deltas()) for _, owner, slot in slots(stack)):
            raise Unsupported("an adapter wraps the whole stack")
        if any(isinstance(p, PackedWeight) for p in stack.parameters()):
            raise Unsupported("its weights are packed in few bits; the fused ViT blocks hold them dense")
        adapters: dict[str, dict[tuple[int, int] | None, LowRank]] = {}
        for (place, rows), (low_rank, _) in ({} if self.frozen else self.sites(self.bound)).items():
            adapters.setdefault(place, {})[rows] = low_rank
        self.blocks = [block for _, block in fuse_vit.blocks_of(stack)]
        fused = fuse_vit.from_stack(stack, adapters, others=self.others, check=check)
        self.inside = [[m for m in block.modules() if m is not block] for block in self.blocks]
        base = [m for name, m in stack.named_modules() if SLOT not in name.split(".")]
        self.noisy = [m for m in base if any(_acts(m, name) for name in NOISE)]
        self.copied = [p._version for _, p in fused.copies]
        self.standing_back = False
        self.names = tuple(inspect.signature(type(self.blocks[0]).forward).parameters)[2:]  # after self and the tokens
        self.start(fused, [g for block in fused.blocks for g in block.groups()], graphs=False)

    def computes(self, owner: nn.Module, tensor: str | None) -> bool:
        """Also q, k and v of nn.MultiheadAttention, in one tensor."""
        packed = isinstance(owner, nn.MultiheadAttention) and tensor == "in_proj_weight"
        return packed or super().computes(owner, tensor)

    def current(self, name: str | None = None) -> Any:
        """Also with the base's biases as they are now."""
        now = [p._version for _, p in self.fused.copies]
        if now != self.copied:
            self.fused.recopy()
            self.copied = now
        return super().current(name)

    def take(self) -> None:
        """In front of every block, and of a Sequential that has only these."""
        self.routes: list[Route] = []
        try:
            for index, block in enumerate(self.blocks):
                self.routes.append(Route(block, OneBlock(self, index)))
            if isinstance(self.module, nn.Sequential):
                self.routes.append(Route(self.module, self))
        except Unsupported:
            self.remove()
            raise

    def remove(self) -> None:
        """The blocks' own forwards again."""
        for route in self.routes:
            route.remove()
        self.unpack()

    def __call__(self, route: Route, *args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if args else kwargs.get("input")
        watched = any(m._forward_hooks or m._forward_pre_hooks for m in self.blocks)
        if watched:  # block by block, each with its hooks
            return route.plain(*args, **kwargs)
        fused = self.choose(x, args[1:], kwargs, range(len(self.blocks)))
        if fused is not None:
            return self.states(fused, x)
        self.standing_back = True
        try:
            return route.plain(*args, **kwargs)
        finally:
            self.standing_back = False

    def choose(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: range) -> Any:
        """The fused form for a call of some blocks on x, or None where they run their own forwards."""
        more = [k for k, v in kwargs.items() if k not in TOKENS and v is not None and v is not False]
        more += [name for name, v in zip(self.names, args, strict=False) if v is not None and v is not False]
        shaped = isinstance(x, Tensor) and x.ndim == 3
        inside = [m for i in blocks for m in self.inside[i]]
        here = [self.module, *(self.blocks[i] for i in blocks), *inside]
        reasons: dict[str, object] = {
            "called with more than tokens [B, T, D]": not shaped,
            f"called with {', '.join(more)}": more,
            "an adapter was attached since; call mmpeft.compile again": self.frozen and any(map(_has_slot, here)),
            "hooks inside a block": any(map(_observed, inside)),
            "dropout of its own in training": any(m.training for m in self.noisy),
            "under no_grad with an input that needs a gradient": shaped and x.requires_grad and not torch.is_grad_enabled(),
            "gradient checkpointing is on": torch.is_grad_enabled() and any(_checkpoints(self.blocks[i]) for i in blocks),
        }  # fmt: skip
        try:
            return self.current(self.name_of(x if shaped else None, reasons))
        except Unsupported as why:
            self.own(why)
            return None

    def ready(self) -> None:
        """Compute copies of the active adapter, before a CUDA graph that reads them is replayed."""
        if not self.frozen and self.state is not None and len(self.state.active.names) == 1:
            try:
                self.current(self.state.active.names[0])
            except Unsupported:
                return  # the graph of this active set was captured over the blocks' own forwards


class OneBlock:
    """The choice at the call of block `index` alone."""

    def __init__(self, stack: FusedStack, index: int) -> None:
        self.stack, self.index = stack, index

    def __call__(self, route: Route, *args: Any, **kwargs: Any) -> Any:
        stack = self.stack
        x: Any = args[0] if args else kwargs.get("hidden_states")
        if stack.standing_back or torch.compiler.is_compiling():
            return route.plain(*args, **kwargs)
        fused = stack.choose(x, args[1:], kwargs, range(self.index, self.index + 1))
        if fused is None:
            return route.plain(*args, **kwargs)
        stack.calls["fused"] += 1
        return fused.block_states(x, self.index)


def _acts(module: nn.Module, name: str) -> bool:
    value = getattr(module, name, 0)
    return isinstance(value, float) and value > 0


def _observed(module: nn.Module) -> bool:
    """Whether someone looks at a module's calls, which the fused blocks never make."""
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks):
        return False
    mine = [h for h in module._forward_hooks.values() if getattr(h, "__module__", "") != RECORDERS]
    recorded = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(mine or module._forward_pre_hooks or module._backward_hooks or recorded)


def _has_slot(module: nn.Module) -> bool:
    return SLOT in module._modules


def _checkpoints(block: nn.Module) -> bool:
    return bool(getattr(block, "gradient_checkpointing", False)) and block.training


def apply(model: nn.Module, compiled: Compiled, *, check: bool, graphs: bool) -> set[int]:
    """Every stack of the model onto the fused blocks; returns ids of those stacks. Their CUDA graphs: `towers.py`."""
    taken: set[int] = set()
    for path, stack in stacks(model):
        part = f"blocks {path or type(stack).__name__}"
        try:
            fused = FusedStack(model, path, stack, check=check)
        except Unsupported as error:
            compiled.skip(part, str(error))
            continue
        how = f"{len(fused.blocks)} fused ViT blocks, {'frozen' if fused.frozen else f'adapter {fused.bound!r}'}, "
        how += "Triton kernels" if fused.fused.seed.is_cuda else "plain-torch references (no GPU)"
        compiled.stacks.append(fused)
        compiled.add(part, how, fused.remove)
        taken |= {id(stack)}
    return taken
