"""Stacked adapters on a fused decoder: their compute copies, out of which each row of the batch reads its own.

`mmpeft.stack` and `use(rows=[...])` (or `use` of one) pick adapters by an index tensor, so the fused blocks need nothing but
all adapters' A and sB side by side, in the weights' dtype: n (R in + out r) elements a group, next to no copy of the blocks'
own. Ranks and scales may differ: shorter ones are padded with zeros, scales are in sB, a site that an adapter has not is zeros.

As with the stacks themselves, what was trained or loaded since is copied again by `use` (by the masters' versions, nothing
else is rewritten), and after `train()` and `eval()`. Not at each call: to ask 64 adapters' tensors takes longer than a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mmpeft.adapters.stack import Pick
from mmpeft.adapters.state import State, slots
from mmpeft.errors import Unsupported
from mmpeft.kernels.fuse import ATTENTION, MLP, LowRank
from mmpeft.kernels.group import Group
from mmpeft.kernels.grouped import Stack
from mmpeft.kernels.llama_forward import Stacks

if TYPE_CHECKING:
    from mmpeft.adapters.compiled.part import FusedPart

MEMBERS = (ATTENTION[:3], ATTENTION[3:], MLP[:2], MLP[2:])  # of a block's four groups
CHUNK = 1024  # tensors copied in one call: what it makes in fp32 on the way stays small


class Copy(NamedTuple):
    """A master and where its compute copy lies."""

    master: Tensor
    copy: Tensor
    scale: float


class StackedRows:
    """The compute copies of all adapters that are stacked, for one fused decoder.

    Args:
        part: whose `sites` tell the factors. blocks: the fused ones.

    Raises:
        Unsupported: an adapter is more than W + s B A of the decoder's linears.
    """

    def __init__(self, part: FusedPart, blocks: list[Any]) -> None:
        assert part.state is not None
        self.names, self.generation = part.state.stacked, part.state.generation
        device = blocks[0].qkv.packed.device
        self.pick = _pick(part.module, device)
        factors = []
        for name in self.names:
            sites = part.sites(name, again=True)
            if odd := next((path for (path, rows), (f, _) in sites.items() if rows is not None or f.m is not None), None):
                raise Unsupported(f"{name!r} at {odd} is no plain W + s B A of a whole linear, which is what stacks on it take")
            factors.append({path: f for (path, _), (f, _) in sites.items()})
        self.copies: list[Copy] = []
        with torch.inference_mode(False), torch.no_grad():
            layers = [
                tuple(self._stack(g, paths, factors) for g, paths in zip(block.groups(), places, strict=True))
                for block, places in zip(blocks, _places(part.module), strict=True)
            ]
        self.stacks = Stacks(layers)  # type: ignore[arg-type]
        self.versions: list[int] = []
        self.mark: Any = None
        self.restacked = -1

    def _stack(self, group: Group, paths: list[str], factors: list[dict[str, LowRank]]) -> Stack:
        p, n = group.packed, len(factors)
        found = [[of.get(path) for path in paths] for of in factors]
        ranks = [max(0 if f is None else f.A.shape[0] for f in member) for member in zip(*found, strict=True)]
        A = torch.zeros(n, max(1, sum(ranks)), p.in_features, dtype=p.dtype, device=p.device)
        B = torch.zeros(n, p.out_features, max(1, *ranks), dtype=p.dtype, device=p.device)
        for i, members in enumerate(found):
            first = row = 0
            for f, rank, out in zip(members, ranks, p.outs, strict=True):
                if f is not None:
                    r = f.A.shape[0]
                    self.copies += [Copy(f.A, A[i, first : first + r], 1.0), Copy(f.B, B[i, row : row + out, :r], f.scale)]
                first, row = first + rank, row + out
        return Stack(A, B, ranks)

    @torch.no_grad()
    def refresh(self, restacked: int, mark: Any) -> None:
        """Copy what changed, where `use` has found that something did (`State.restacked`), or `train()` came in between."""
        if restacked == self.restacked and mark is self.mark:
            return
        versions = [c.master._version for c in self.copies]
        stale = self.copies
        if mark is self.mark and self.versions:
            stale = [c for c, new, old in zip(stale, versions, self.versions, strict=True) if new != old]
        for start in range(0, len(stale), CHUNK):
            masters, copies, scales = zip(*stale[start : start + CHUNK], strict=True)
            torch._foreach_copy_(copies, torch._foreach_mul(masters, scales))
        self.versions, self.mark, self.restacked = versions, mark, restacked

    def index(self, state: State, samples: int) -> Tensor:
        """The adapter of each of the batch's samples, or of all of them: a tensor that stays where it is.

        Raises:
            Unsupported: rows were given for another number of samples.
        """
        if state.indexed == "one":
            return self.pick.one
        if len(self.pick.rows) != samples:
            raise Unsupported(f"{len(self.pick.rows)} rows were given for a batch of {samples}")
        return self.pick.rows


def _pick(module: nn.Module, device: torch.device) -> Pick:
    """What holds the index of the stacks below a module."""
    for _, _, slot in slots(module):
        for stack in slot.stacks.values():
            if stack.pick.one.device == device:
                pick: Pick = stack.pick
                return pick
    raise Unsupported("none of the stacked adapters is in it")


def _places(decoder: Any) -> list[list[list[str]]]:
    """For every block the paths of its four groups' members."""
    found = []
    for i, layer in enumerate(decoder.layers):
        owner = {
            name: child
            for child, module in layer.named_children()
            for names in (ATTENTION, MLP)
            if all(hasattr(module, n) for n in names)
            for name in names
        }
        found.append([[f"layers.{i}.{owner[name]}.{name}" for name in names] for names in MEMBERS])
    return found
