"""Pre-norm ViT blocks as a fused stack: their weights laid out for it, and a proof that it computes the same function.

`vit_parts` finds the parts of a block. The rest that could act (drop path, norms of q and k, a scaled residual) must be
absent or identities; that it acts is seen by the comparison on random tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.errors import Unsupported
from mmpeft.kernels.fuse import LowRank
from mmpeft.kernels.group import Group
from mmpeft.kernels.packed import PackedGroup
from mmpeft.kernels.plain import Plain
from mmpeft.kernels.vit import FusedVit, Linears, Norm, VitBlock
from mmpeft.kernels.vit_parts import Matrix, Parts, parts_of

Rows = tuple[int, int]
Adapters = Mapping[str, Mapping[Rows | None, LowRank]]  # weight's owner's path below the stack -> row range (None: all)


def blocks_of(stack: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) of a Sequential or ModuleList."""
    return [(name, block) for name, block in stack.named_children() if name.isdigit()]


def from_stack(
    stack: nn.Module, adapters: Adapters, *, others: Sequence[Tensor] = (), check: bool = True,
    tolerance: float | None = None,
) -> FusedVit:  # fmt: skip
    """The fused form of a Sequential or ModuleList of blocks, with `adapters` by the paths of their weights' owners below
    it and by row ranges. Packed buffers become the storage of the model's own weights. `others`: parameters of other
    adapters.

    With `check`, outputs on random tokens must agree with the stack's own within `tolerance` (relative; default 5e-2 in
    half precision, 1e-4 in fp32), adapters attached.

    Raises:
        Unsupported: the structure or the comparison does not fit; the message says where.
    """
    own = {id(t) for t in others} | {id(t) for by in adapters.values() for a in by.values() for t in (a.A, a.B)}
    found = {name: parts_of(block, name, own) for name, block in blocks_of(stack)}
    kinds = {(p.heads, p.scale, p.gelu) for p in found.values()}
    if len(kinds) > 1:
        raise Unsupported(f"blocks that differ in (heads, scale, GELU): {', '.join(map(str, sorted(kinds)))}")
    ((heads, scale, gelu),) = kinds
    if len({m.weight.dtype for p in found.values() for m in p.matrices()}) > 1:
        raise Unsupported("weights of different dtypes")
    try:
        fused = FusedVit([_block(f"{name}.", p, adapters) for name, p in found.items()], heads, scale, gelu)
        fused.copies = [c for b, p in zip(fused.blocks, found.values(), strict=True) for c in _copies(b, p)]
        if check:
            _prove(stack, fused, tolerance or (5e-2 if fused.dtype.itemsize < 4 else 1e-4))
    except Unsupported:
        for matrix in (m for p in found.values() for m in p.matrices()):  # storage of its own again
            matrix.weight.data = matrix.weight.data.clone(memory_format=torch.contiguous_format)
        raise
    return fused


def _block(path: str, parts: Parts, adapters: Adapters) -> VitBlock:
    def group(*matrices: Matrix) -> Linears:
        return _group(matrices, [adapters.get(path + m.path, {}) for m in matrices])

    scales = [None if s is None else s.detach() for s in (parts.scale1, parts.scale2)]
    return VitBlock(
        _norm(parts.norm1), group(*parts.qkv), group(parts.proj),
        _norm(parts.norm2), group(parts.fc1), group(parts.fc2), *scales,
    )  # fmt: skip


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), float(norm.eps))


def _group(matrices: Sequence[Matrix], found: Sequence[Mapping[Rows | None, LowRank]]) -> Linears:
    """The matrices side by side; where adapters are, a member for each row range between their edges."""
    if not any(found):
        plain = Plain([m.weight.detach() for m in matrices], [_detached(m.bias) for m in matrices])
        for m, view in zip(matrices, plain.weights, strict=True):
            m.weight.data = view
        return plain
    members: list[tuple[Tensor, Tensor | None, LowRank | None]] = []
    for m, by in zip(matrices, found, strict=True):
        out = m.weight.shape[0]
        edges = sorted({0, out, *(e for rows in by if rows is not None for e in rows)})
        ranges: list[Rows] = list(zip(edges, edges[1:], strict=False))
        pairs = [by.get(rows) or (by.get(None) if rows == (0, out) else None) for rows in ranges]
        if sum(p is not None for p in pairs) != len(by):
            raise Unsupported(f"{m.path}, of {out} rows, has adapters on {list(by)}, which overlap")
        bias = _detached(m.bias)
        weight = m.weight.detach()
        members += [
            (weight[a:b], None if bias is None else bias[a:b], p) for (a, b), p in zip(ranges, pairs, strict=True)
        ]
    packed = PackedGroup(
        [w for w, _, _ in members],
        [b for _, b, _ in members],
        [0 if p is None else p.A.shape[0] for *_, p in members],
        [1.0 if p is None else p.scale for *_, p in members],
    )
    for m, view in zip(matrices, packed.W.split_with_sizes([m.weight.shape[0] for m in matrices]), strict=True):
        m.weight.data = view
    return Group(packed, [None if p is None else (p.A, p.B) for *_, p in members])


def _copies(block: VitBlock, parts: Parts) -> Iterator[tuple[Tensor, Tensor]]:
    """(part of a group's bias, the parameter it was copied from)."""
    sources = (parts.qkv, (parts.proj,), (parts.fc1,), (parts.fc2,))
    for group, matrices in zip(block.groups(), sources, strict=True):
        bias = group.bias if isinstance(group, Plain) else group.packed.bias
        if bias is not None:
            views = bias.split_with_sizes([m.weight.shape[0] for m in matrices])
            yield from ((v, m.bias) for v, m in zip(views, matrices, strict=True) if m.bias is not None)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def run_own(stack: nn.Module, x: Tensor) -> Tensor:
    """x [B, T, h] through the blocks' own forwards, one after another, without a mask.

    Raises:
        Unsupported: a block returns more than tokens.
    """
    for name, block in blocks_of(stack):
        forward: Any = type(block).forward
        more = {"attention_mask": None} if "attention_mask" in inspect.signature(forward).parameters else {}
        x = block(x, **more)
        if not isinstance(x, Tensor):
            raise Unsupported(f"block {name} returns a {type(x).__name__}, not tokens")
    return x


@torch.no_grad()
def _prove(stack: nn.Module, fused: FusedVit, tolerance: float) -> None:
    h, device = fused.blocks[0].norm1.weight.shape[0], fused.seed.device
    x = torch.randn(2, 19, h, generator=torch.Generator().manual_seed(0)).to(device, fused.dtype)
    modes = [(m, m.training) for m in stack.modules()]
    stack.eval()
    try:
        own = run_own(stack, x).float()
    finally:
        for m, mode in modes:
            m.training = mode
    error = float((fused.states(x).float() - own).norm() / own.norm())
    if not error <= tolerance:
        raise Unsupported(
            f"the fused blocks differ from the stack's own by {error:.1e}, relatively (expected at most {tolerance:.0e})"
        )
