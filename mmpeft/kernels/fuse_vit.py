"""Finding the parts of pre-norm ViT blocks by structure, and proving that the fused stack computes the same function.

A block fits when it has two LayerNorms, an attention with one qkv and one output linear, an MLP of two linears around a
GELU, and nothing else that has parameters or acts (drop path, layer scale, norms of q and k must be absent or identities;
that they act is seen by the comparison on random tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.errors import Unsupported
from mmpeft.kernels.fuse import LowRank
from mmpeft.kernels.group import Group
from mmpeft.kernels.packed import PackedGroup
from mmpeft.kernels.vit import FusedVit, Norm, VitBlock

Rows = tuple[int, int]
Adapters = Mapping[str, Mapping[Rows | None, LowRank]]  # linear's path below the stack -> row range (None: all) -> pair


def from_stack(
    stack: nn.Module, adapters: Adapters, *, others: Sequence[Tensor] = (), check: bool = True,
    tolerance: float | None = None,
) -> FusedVit:  # fmt: skip
    """The fused form of a Sequential of blocks, with `adapters` by the linears' paths below it and, for a fused qkv, by row
    ranges. The packed buffers become the storage of the model's own weights. `others`: parameters of other adapters.

    With `check`, outputs on random tokens must agree with the stack's own within `tolerance` (relative; default 5e-2 in
    half precision, 1e-4 in fp32), adapters attached.

    Raises:
        Unsupported: the structure or the comparison does not fit; the message says where.
    """
    own = {id(t) for t in others} | {id(t) for by in adapters.values() for a in by.values() for t in (a.A, a.B)}
    blocks = [_block(f"{name}.", block, adapters, own) for name, block in stack.named_children() if name.isdigit()]
    members: list[Any] = [block for name, block in stack.named_children() if name.isdigit()]
    kinds = {(int(b.attn.num_heads), getattr(b.attn, "scale", None), b.mlp.act.approximate) for b in members}
    if len(kinds) > 1:
        raise Unsupported(f"blocks that differ in (heads, scale, GELU): {', '.join(map(str, sorted(kinds, key=str)))}")
    ((heads, scale, approximate),) = kinds
    head_dim = blocks[0].qkv.packed.in_features // heads
    fused = FusedVit(blocks, heads, float(scale or head_dim**-0.5), tanh=approximate == "tanh")
    if check:
        _prove(stack, fused, tolerance or (5e-2 if fused.dtype.itemsize < 4 else 1e-4))
    return fused


def _block(path: str, block: Any, adapters: Adapters, own: set[int]) -> VitBlock:
    names = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    try:
        norm1, qkv, proj, norm2, fc1, fc2 = (block.get_submodule(n) for n in names)
    except AttributeError as error:
        raise Unsupported(f"{path[:-1]} is no ViT block of {', '.join(names)}: {error}") from error
    for name, m, kind in zip(names, (norm1, qkv, proj, norm2, fc1, fc2), (nn.LayerNorm, *[nn.Linear] * 2) * 2, strict=True):
        if not isinstance(m, kind):
            raise Unsupported(f"{path}{name} is a {type(m).__name__}, not a {kind.__name__}")
    if norm1.weight is None or norm1.bias is None or norm2.weight is None or norm2.bias is None:
        raise Unsupported(f"{path}norm1, norm2: a LayerNorm without gain or bias")
    if qkv.out_features != 3 * qkv.in_features or proj.out_features != qkv.in_features:
        raise Unsupported(f"{path}attn: q, k, v of another width than the stream")
    if not isinstance(getattr(block.mlp, "act", None), nn.GELU):
        raise Unsupported(f"{path}mlp.act is a {type(getattr(block.mlp, 'act', None)).__name__}, not a GELU")
    known = own | {id(p) for m in (norm1, qkv, proj, norm2, fc1, fc2) for p in m._parameters.values()}
    if extra := [n for n, p in block.named_parameters() if id(p) not in known]:
        raise Unsupported(f"{path}{extra[0]}: a parameter that a plain ViT block has not")
    trained = [n for n, p in block.named_parameters() if p.requires_grad and id(p) not in own]
    if trained:
        raise Unsupported(f"{path}{trained[0]} requires a gradient; the fused blocks' base is frozen")

    def group(name: str, linear: nn.Linear) -> Group:
        return _group(linear, adapters.get(path + name, {}))

    return VitBlock(
        _norm(norm1), group("attn.qkv", qkv), group("attn.proj", proj),
        _norm(norm2), group("mlp.fc1", fc1), group("mlp.fc2", fc2),
    )  # fmt: skip


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), float(norm.eps))


def _group(linear: nn.Linear, found: Mapping[Rows | None, LowRank]) -> Group:
    """One member for a whole-weight adapter (or none), else one for each row range between its edges."""
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    assert weight is not None
    out = weight.shape[0]
    edges = sorted({0, out, *(e for rows in found if rows is not None for e in rows)})
    ranges: list[Rows] = list(zip(edges, edges[1:], strict=False))
    pairs = [found.get(rows) or (found.get(None) if rows == (0, out) else None) for rows in ranges]
    if sum(p is not None for p in pairs) != len(found):
        raise Unsupported(f"a linear of {out} rows has adapters on {list(found)}, which overlap")
    packed = PackedGroup(
        [weight.detach()[a:b] for a, b in ranges],
        None if bias is None else [bias.detach()[a:b] for a, b in ranges],
        [0 if p is None else p.A.shape[0] for p in pairs],
        [1.0 if p is None else p.scale for p in pairs],
    )
    weight.data = packed.W
    return Group(packed, [None if p is None else (p.A, p.B) for p in pairs])


@torch.no_grad()
def _prove(stack: nn.Module, fused: FusedVit, tolerance: float) -> None:
    h, device = fused.blocks[0].qkv.packed.in_features, fused.seed.device
    x = torch.randn(2, 19, h, generator=torch.Generator().manual_seed(0)).to(device, fused.dtype)
    modes = [(m, m.training) for m in stack.modules()]
    stack.eval()
    own = stack(x).float()
    for m, mode in modes:
        m.training = mode
    error = float((fused.states(x).float() - own).norm() / own.norm())
    if not error <= tolerance:
        raise Unsupported(
            f"the fused blocks differ from the stack's own by {error:.1e}, relatively (expected at most {tolerance:.0e})"
        )
