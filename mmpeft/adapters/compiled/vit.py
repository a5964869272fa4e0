"""Stacks of pre-norm ViT blocks (timm's Sequential of blocks) on the fused blocks of `mmpeft.kernels.vit`.

Found by structure: a Sequential whose members have norm1, attn.qkv, attn.proj, norm2, mlp.fc1 and mlp.fc2. A stack without
an adapter is left to `towers.py`; a token method on the stack itself (VPT) is a program of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmpeft.adapters.compiled.part import FusedPart
from mmpeft.adapters.compiled.route import Route
from mmpeft.adapters.state import SLOT, slots
from mmpeft.errors import Unsupported
from mmpeft.kernels import fuse_vit
from mmpeft.kernels.fuse import LowRank

if TYPE_CHECKING:
    from mmpeft.adapters.compiled.model import Compiled

PARTS = ("norm1", "attn", "norm2", "mlp")


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.Sequential]]:
    """(path, stack) of every Sequential of ViT blocks."""
    for path, module in model.named_modules():
        blocks = [m for name, m in module.named_children() if name != SLOT] if isinstance(module, nn.Sequential) else []
        if len(blocks) > 1 and all(hasattr(b, name) for b in blocks for name in PARTS):
            assert isinstance(module, nn.Sequential)
            yield path, module


class FusedStack(FusedPart):
    """One stack on the fused blocks, and the choice made at each call."""

    def __init__(self, model: nn.Module, path: str, stack: nn.Sequential, *, check: bool, graphs: bool = False) -> None:
        super().__init__(model, path, stack)
        if any(owner is stack and list(slot.deltas()) for _, owner, slot in slots(stack)):
            raise Unsupported("an adapter wraps the whole stack")
        adapters: dict[str, dict[tuple[int, int] | None, LowRank]] = {}
        for (place, rows), (low_rank, _) in self.sites(self.bound).items():
            adapters.setdefault(place, {})[rows] = low_rank
        fused = fuse_vit.from_stack(stack, adapters, others=self.others, check=check)
        self.start(fused, [g for block in fused.blocks for g in block.groups()], graphs=graphs)

    def __call__(self, route: Route, *args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if args else kwargs.get("input")
        shaped = isinstance(x, Tensor) and x.ndim == 3 and len(args) + len(kwargs) == 1
        try:
            fused = self.current(self.name_of(x if shaped else None, {"called with more than tokens [B, T, D]": not shaped}))
        except Unsupported as why:
            self.own(why)
            return route.plain(*args, **kwargs)
        return self.states(fused, x)


def apply(model: nn.Module, compiled: Compiled, *, check: bool, graphs: bool) -> set[int]:
    """Every adapted stack of the model onto the fused blocks; returns ids of the modules inside those."""
    taken: set[int] = set()
    for path, stack in stacks(model):
        if not any(list(slot.deltas()) for _, _, slot in slots(stack)):
            continue
        part = f"blocks {path or type(stack).__name__}"
        try:
            fused = FusedStack(model, path, stack, check=check, graphs=graphs)
        except Unsupported as error:
            compiled.skip(part, str(error))
            continue
        how = f"{len(fused.fused.blocks)} fused ViT blocks, adapter {fused.bound!r}, "
        how += "Triton kernels" if fused.fused.seed.is_cuda else "plain-torch references (no GPU)"
        compiled.stacks.append(fused)
        compiled.add(part, how + ("; CUDA graphs without gradients" if graphs else ""), fused.remove)
        taken |= {id(stack)}
    return taken
