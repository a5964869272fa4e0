"""Where a pre-norm ViT block keeps its parts, whatever library wrote it: timm, transformers, open_clip and kin.

A part is looked for under the names that exist for it (`NORM1` to `SCALE2`), each part by itself, so no class and no
library is asked for. Heads and scale are read off the attention; the activation is told by what it computes. A block with
one parameter more than these parts is refused, and `fuse_vit` compares the whole on random tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.errors import Unsupported
from mmpeft.kernels.fused_ops import gelu_of

NORM1 = ("norm1", "layer_norm1", "layernorm_before", "ln_1")
NORM2 = ("norm2", "layer_norm2", "layernorm_after", "ln_2")
ATTENTION = ("attn", "self_attn", "attention")
INNER = "attention"  # transformers' BERT layout (DINOv2 in 5.17): attention.attention.query, attention.output.dense
QKV = (
    ("qkv",), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"),
    (f"{INNER}.query", f"{INNER}.key", f"{INNER}.value"), ("",),  # "": nn.MultiheadAttention itself
)  # fmt: skip
OUT = ("proj", "out_proj", "o_proj", "projection", "output.dense")
UP = ("mlp.fc1", "mlp.c_fc")
DOWN = ("mlp.fc2", "mlp.c_proj")
ACT = ("mlp.act", "mlp.activation_fn", "mlp.activation", "mlp.act_fn", "mlp.gelu")
SCALE1 = ("ls1.gamma", "ls_1.gamma", "layer_scale1.lambda1")
SCALE2 = ("ls2.gamma", "ls_2.gamma", "layer_scale2.lambda1")
GELUS = ("none", "tanh", "quick")


@dataclass(frozen=True)
class Matrix:
    """A stored weight [out, in] and its bias: the module that owns them, and its path below the block."""

    path: str
    owner: nn.Module
    tensor: str = "weight"
    bias_name: str = "bias"

    @property
    def weight(self) -> Tensor:
        """As it lies in memory, whatever the attribute shows."""
        weight = self.owner._parameters[self.tensor]
        assert weight is not None
        return weight

    @property
    def bias(self) -> Tensor | None:
        """Likewise."""
        return self.owner._parameters.get(self.bias_name)


@dataclass(frozen=True)
class Parts:
    """Of one block. `qkv`: one matrix [3 h, h], or three [h, h]."""

    norm1: nn.LayerNorm
    qkv: tuple[Matrix, ...]
    proj: Matrix
    norm2: nn.LayerNorm
    fc1: Matrix
    fc2: Matrix
    scale1: Tensor | None
    scale2: Tensor | None
    heads: int
    scale: float
    gelu: str

    def matrices(self) -> tuple[Matrix, ...]:
        """All of them."""
        return (*self.qkv, self.proj, self.fc1, self.fc2)


def is_block(block: nn.Module) -> bool:
    """Whether a module has every part of a ViT block under some name; `parts_of` says whether they fit."""
    attention = _first(block, ATTENTION)
    has = all(_first(block, names) is not None for names in (NORM1, NORM2, UP, DOWN))
    return has and attention is not None and _first(attention[1], OUT) is not None


def parts_of(block: nn.Module, path: str, own: set[int]) -> Parts:
    """The parts of a block at `path`; `own`: ids of adapter tensors, which may train and lie in between.

    Raises:
        Unsupported: a part is missing, of another kind or shape, or there is more than these parts.
    """
    norm1, norm2 = (_norm(block, names, path) for names in (NORM1, NORM2))
    name, attention = _need(block, ATTENTION, path)
    qkv = _qkv(attention, f"{path}.{name}", name)
    proj = _linear(attention, OUT, f"{path}.{name}", name)
    fc1, fc2 = (_linear(block, names, path, "") for names in (UP, DOWN))
    h = norm1.weight.shape[0]
    shapes = [tuple(m.weight.shape) for m in qkv]
    if shapes not in ([(3 * h, h)], [(h, h)] * 3) or tuple(proj.weight.shape) != (h, h):
        raise Unsupported(f"{path}.{name}: q, k, v of another width than the stream")
    scales = [_tensor(block, names) for names in (SCALE1, SCALE2)]
    known = own | {id(t) for t in scales} | {id(p) for m in (norm1, norm2) for p in m._parameters.values()}
    known |= {id(t) for m in (*qkv, proj, fc1, fc2) for t in (m.weight, m.bias)}
    if extra := [n for n, p in block.named_parameters() if id(p) not in known]:
        raise Unsupported(f"{path}.{extra[0]}: a parameter that a plain ViT block has not")
    if trained := [n for n, p in block.named_parameters() if p.requires_grad and id(p) not in own]:
        raise Unsupported(f"{path}.{trained[0]} requires a gradient; the fused blocks' base is frozen")
    heads = _number(attention, ("num_heads", "num_attention_heads"))
    if not heads:
        raise Unsupported(f"{path}.{name} does not say how many heads it has")
    scale = _number(attention, ("scale", "scaling")) or (h // int(heads)) ** -0.5
    return Parts(
        norm1, qkv, proj, norm2, fc1, fc2, scales[0], scales[1], int(heads), float(scale),
        _gelu(block, path, fc1.weight.device),
    )  # fmt: skip


def _first(module: nn.Module, names: tuple[str, ...]) -> tuple[str, nn.Module] | None:
    for name in names:
        try:
            return name, module.get_submodule(name)
        except AttributeError:
            continue
    return None


def _need(module: nn.Module, names: tuple[str, ...], path: str) -> tuple[str, nn.Module]:
    found = _first(module, names)
    if found is None:
        raise Unsupported(f"{path} has no {' or '.join(names)}: no ViT block")
    return found


def _norm(block: nn.Module, names: tuple[str, ...], path: str) -> nn.LayerNorm:
    name, norm = _need(block, names, path)
    if not isinstance(norm, nn.LayerNorm):
        raise Unsupported(f"{path}.{name} is a {type(norm).__name__}, not a LayerNorm")
    if norm.weight is None or norm.bias is None:
        raise Unsupported(f"{path}.{name}: a LayerNorm without gain or bias")
    return norm


def _linear(module: nn.Module, names: tuple[str, ...], path: str, below: str) -> Matrix:
    name, linear = _need(module, names, path)
    if not isinstance(linear, nn.Linear):
        raise Unsupported(f"{path}.{name} is a {type(linear).__name__}, not a Linear")
    return Matrix(f"{below}.{name}".lstrip("."), linear)


def _qkv(attention: nn.Module, path: str, below: str) -> tuple[Matrix, ...]:
    for names in QKV:
        if names == ("",):
            if isinstance(attention, nn.MultiheadAttention):
                if not attention.batch_first or attention._parameters.get("in_proj_weight") is None:
                    raise Unsupported(f"{path}: batch second, or q, k, v of different widths")
                if attention.bias_k is not None or attention.add_zero_attn:
                    raise Unsupported(f"{path}: keys of its own beside the tokens'")
                return (Matrix(below, attention, "in_proj_weight", "in_proj_bias"),)
        elif all(_first(attention, (n,)) is not None for n in names):
            return tuple(_linear(attention, (n,), path, below) for n in names)
    raise Unsupported(f"{path} has no {' or '.join('|'.join(n) for n in QKV[:-1])}: no attention of a ViT block")


def _tensor(block: nn.Module, names: tuple[str, ...]) -> Tensor | None:
    for name in names:
        owner, _, tensor = name.rpartition(".")
        found = _first(block, (owner,))
        if found is not None and isinstance(value := found[1]._parameters.get(tensor), Tensor):
            return value
    return None


def _number(module: Any, names: tuple[str, ...]) -> float | None:
    """A positive number under one of its names, of an attention or of the one inside it."""
    owners = (module, getattr(module, INNER, None))
    return next((v for m in owners for n in names if isinstance(v := getattr(m, n, None), int | float) and v > 0), None)


@torch.no_grad()
def _gelu(block: nn.Module, path: str, device: torch.device) -> str:
    """Which GELU the MLP's activation computes; the three differ by 1e-4 and more."""
    name, act = _need(block, ACT, path)
    x = torch.linspace(-4, 4, 65, device=device)
    for kind in GELUS:
        if float((act(x.clone()) - gelu_of(x, kind)).abs().max()) < 1e-5:
            return kind
    raise Unsupported(f"{path}.{name} ({type(act).__name__}) computes no GELU: exact, tanh or quick")
