"""How HF PEFT lays out adapter tensors, and the exact conversions between that and this engine's matrices.

Here every site is a matrix `[*, out, in]` with A `[*, r, in]` and B `[*, out, r]`. PEFT stores (r: rank, k: kernel):

    Linear, HF Conv1D, packed in_proj    lora_A [r, in]             lora_B [out, r]
    Conv1d/2d/3d                         lora_A [r, C_in, *k]       lora_B [out, r / groups, 1..]
    Embedding                            lora_embedding_A [r, n]    lora_embedding_B [width, r]
    3-D experts (target_parameters)      lora_A [e * r, in]         lora_B [out, r * e], the expert running fastest
    IA3                                  ia3_l [out, 1] | [1, in];  convolutions [1, C, 1..]

What PEFT has no form for, but a larger rank has, is converted exactly: row slices of a fused weight become one LoRA of
the summed rank with zero-padded B, a frozen starting pair doubles the rank, a grouped convolution takes one copy of A a
group (PEFT's lora_A sees all channels).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.classes import spec_of
from mmpeft.adapters.forward import stock_op
from mmpeft.adapters.method import Delta, Method, wide
from mmpeft.adapters.methods.lora import DoRA, LoRA
from mmpeft.adapters.site import Site, put_rows

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

# PEFT's layer for nn.MultiheadAttention adds out_proj's update twice, in every forward and merge of every release so far
# (0.14 to 0.21; a fix is proposed in huggingface/peft#3774). Its adapters were trained that way, so reading doubles the
# scale there and writing halves B. A test holds PEFT to it and will tell when this changes.
OUT_PROJ_TIMES = 2
PEFT_VERSION = "0.21.2"  # whose behaviour files are written for; PEFT's own field for it


@dataclass(frozen=True)
class Item:
    """One site of an imported adapter: its method and the values of its tensors.

    `starts` names frozen tensors that keep the value the method's init gives them, times a factor; `shared` holds those
    that several sites share and one of them carries.
    """

    site: Site
    method: Method
    tensors: Mapping[str, Tensor]
    starts: Mapping[str, float] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def match(self) -> str:
        """The exact pattern of this site; IA3 finds the bias beside its weight itself, so its module is named, and prompt
        tuning finds the decoder below the root."""
        if self.site.layout is None:
            return self.site.path if self.site.kind == "call" else "."
        tensor = "" if self.method.name == "ia3" else self.site.tensor
        return ".".join(part for part in (self.site.path, tensor) if part)


def full_key(key: str) -> str:
    """A key as the file has it; few stand outside the wrapped model."""
    return key if key.startswith(("base_model.", "prompt_embeddings")) else PREFIX + key


def is_stock(owner: nn.Module) -> bool:
    """Whether the owner runs the forward of the stock layer that PEFT wraps."""
    return stock_op(spec_of(type(owner))[0]) is not None


def is_packed_attention(module: nn.Module) -> bool:
    """An nn.MultiheadAttention with one in_proj_weight, the only kind PEFT adapts."""
    return isinstance(module, nn.MultiheadAttention) and module._parameters.get("in_proj_weight") is not None


# --- LoRA factors ----------------------------------------------------------------------------------------------------


def lora_names(owner: nn.Module) -> tuple[str, str]:
    """File names of A and B below the module's path."""
    if isinstance(owner, nn.Embedding):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def lora_shapes(site: Site, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B in the file for a module target."""
    out, into = site.shape
    layout = site.layout
    assert layout is not None
    if layout.name != "conv":
        return (rank, into), (out, rank)
    kernel = layout.shape[2:]
    return (rank, layout.shape[1] * layout.groups, *kernel), (out, rank // layout.groups, *(1,) * len(kernel))


def pack_lora(A: Tensor, B: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """A [r, in], B [out, r] -> PEFT's tensors for a module target; a grouped convolution gets rank groups * r."""
    layout = site.layout
    assert layout is not None
    if layout.name != "conv":
        return A, B
    groups, (_, into, *kernel) = layout.groups, layout.shape
    wide_A = A.new_zeros(groups, A.shape[0], groups, into, *kernel)
    for g in range(groups):
        wide_A[g, :, g] = A.view(-1, into, *kernel)
    return wide_A.flatten(2, 3).flatten(0, 1), B.view(*B.shape, *(1,) * len(kernel))


def unpack_lora(a: Tensor, b: Tensor, site: Site) -> tuple[Tensor, Tensor] | None:
    """PEFT's tensors of a module target -> A, B; None for a grouped convolution whose A looks across groups, which no
    grouped weight can hold."""
    layout = site.layout
    assert layout is not None
    if layout.name != "conv":
        return a, b
    groups, (_, into, *kernel) = layout.groups, layout.shape
    split = a.view(groups, -1, groups, into, *kernel)  # [group of ranks, r / groups, group of channels, ...]
    own = torch.stack([split[g, :, g] for g in range(groups)])
    if int(split.count_nonzero()) != int(own.count_nonzero()):
        return None
    out, ranks = b.shape[0] // groups, b.shape[1]
    B = b.new_zeros(groups, out, groups, ranks)  # each group's outputs see its own ranks only
    for g in range(groups):
        B[g, :, g] = b.view(groups, out, ranks)[g]
    return own.reshape(a.shape[0], -1), B.flatten(2).flatten(0, 1)


def expert_shapes(site: Site, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B in the file for a bare parameter; a 2-D one is taken as stored, [out, in]."""
    assert site.layout is not None
    if len(site.layout.shape) == 2:
        out, into = site.layout.shape
        return (rank, into), (out, rank)
    experts, out, into = site.shape
    return (experts * rank, into), (out, rank * experts)


def pack_experts(A: Tensor, B: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """A [*, r, in], B [*, out, r] -> PEFT's tensors for a bare parameter."""
    assert site.layout is not None
    if A.ndim == 2:
        return (B.mT, A.mT) if site.layout.name == "transposed" else (A, B)
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def unpack_experts(a: Tensor, b: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """PEFT's tensors of a bare parameter -> A, B."""
    assert site.layout is not None
    if len(site.layout.shape) == 2:
        return (b.mT, a.mT) if site.layout.name == "transposed" else (a, b)
    experts = site.shape[0]
    return a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)


def fit_rank(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with a rank no larger than the matrix: PEFT allows any rank, and a pair above full rank is full."""
    out, into = B.shape[-2], A.shape[-1]
    if A.shape[-2] <= min(out, into):
        return A, B
    product = B @ A
    eye = torch.eye(min(out, into), dtype=A.dtype).expand(*A.shape[:-2], -1, -1)
    return (product, eye) if out <= into else (eye, product)


@dataclass(frozen=True)
class Pair:
    """`scale * B A`, ready for a file."""

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[-2]


def whole_pair(deltas: Sequence[Delta], out: int) -> Pair:
    """One pair for the whole weight of `out` rows from its deltas of LoRA and kin: one, or one a row slice."""
    A, B, scale = [], [], 1.0
    for i, delta in enumerate(deltas):
        kin = LoRA if isinstance(delta.method, DoRA) else type(delta.method)  # DoRA's magnitudes go their own way
        # A frozen starting pair comes appended, its rank doubled; QA-LoRA's A comes repeated.
        f = kin.factors(delta.method, delta.A, delta)
        assert f is not None and f.A is not None and f.B is not None
        scale = f.scale if i == 0 else scale
        begin, stop = delta.site.rows or (0, out)
        rows = f.B if f.scale == scale else f.B * (f.scale / scale)
        A.append(f.A)
        B.append(F.pad(rows, (0, 0, begin, out - stop)))
    return Pair(torch.cat(A, -2), torch.cat(B, -1), scale)


def same_rank(first: Pair, second: Pair) -> tuple[Pair, Pair]:
    """Both pairs at the larger rank and the first one's scale, padded with zeros."""
    rank = max(first.rank, second.rank)

    def fit(pair: Pair) -> Pair:
        more = rank - pair.rank
        A = torch.cat([pair.A, pair.A.new_zeros(more, pair.A.shape[1])])
        B = torch.cat([pair.B, pair.B.new_zeros(pair.B.shape[0], more)], 1) * (pair.scale / first.scale)
        return Pair(A, B, first.scale)

    return fit(first), fit(second)


def zero_pair(site: Site, like: Pair) -> Pair:
    """A pair of the same rank and scale that changes nothing."""
    out, into = site.shape
    return Pair(like.A.new_zeros(like.rank, into), like.B.new_zeros(out, like.rank), like.scale)


def magnitude_shape(site: Site) -> tuple[int, ...]:
    """Shape of DoRA's magnitudes in the file."""
    assert site.layout is not None
    spatial = len(site.layout.shape) - 2 if site.layout.name == "conv" else 0
    return (1, site.shape[0], *(1,) * spatial) if spatial else (site.shape[0],)


def magnitudes(deltas: Sequence[Delta], base: Tensor) -> Tensor:
    """DoRA's magnitudes of all rows of the matrix view `base`; rows without DoRA keep their own norm."""
    m: Tensor = torch.linalg.vector_norm(base.to(wide(base.dtype)), dim=-1)
    for delta in deltas:
        assert isinstance(delta.method, DoRA)
        m = put_rows(m, delta.m, delta.site.rows)
    return m


# --- IA3 -------------------------------------------------------------------------------------------------------------


def gain_shape(site: Site, channels: int, feedforward: bool) -> tuple[int, ...]:
    """Shape of ia3_l for `channels` gains."""
    assert site.layout is not None
    if site.layout.name == "conv":
        return (1, channels, *(1,) * (len(site.layout.shape) - 2))
    return (1, channels) if feedforward else (channels, 1)


def whole_gains(deltas: Iterable[Delta], out: int) -> Tensor:
    """Output gains of all rows; 1 where no delta is."""
    gains = None
    for delta in deltas:
        gains = torch.ones(out, dtype=delta.l.dtype, device=delta.l.device) if gains is None else gains
        gains = put_rows(gains, delta.l, delta.site.rows)
    assert gains is not None
    return gains


# --- wrappers --------------------------------------------------------------------------------------------------------


def wrapped_path(path: str, wrappers: Mapping[str, int], *, own: int = 0) -> str:
    """The path of a base module inside PEFT's wrapped model.

    `wrappers` says how many wrappers stand around each module; one below a wrapped module is reached through
    `.base_layer`. `own` is how many of the module's own wrappers to pass: 0 for its outermost, all for the module itself.
    """
    parts = path.split(".")
    out: list[str] = []
    for i, part in enumerate(parts):
        here = ".".join(parts[: i + 1])
        out += [part, *["base_layer"] * (own if i == len(parts) - 1 else wrappers.get(here, 0))]
    return ".".join(out)
