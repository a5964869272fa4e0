"""Sites: the places where an adapter attaches, and how each stored tensor is seen as a matrix.

A weight method works on a matrix `[*, out, in]` and never asks what layer it sits in. A layout turns the stored tensor
into that view and back, so a dilated grouped convolution, a packed attention projection and an embedding are one case:

    linear            [out, in]                  Linear, packed in_proj, RNN weights; [e, out, in] for expert tensors
    transposed        [in, out]                  HF Conv1D, Embedding (out = width, in = vocabulary), [e, in, out]
    conv              [out, in/groups, *k]       Conv1d/2d/3d, flattened to [out, in/groups * prod(k)]
    conv_transposed   [in, out/groups, *k]       ConvTranspose1d/2d/3d, to the same [out, in/groups * prod(k)]
    vector            [n]                        biases and norm gains, kept as they are
    whole             any other shape            bare parameters of four dimensions and more: only `full` takes them

Roles name row slices of fused weights (`[q,v]` of a qkv, `[gate]` of a gate_up).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError, NameNotFound, Unsupported, nearest

Kind = str  # "weight" | "call" | "tokens"


@dataclass(frozen=True)
class Layout:
    """How a stored tensor is seen as `[*, out, in]`."""

    name: str
    shape: tuple[int, ...]  # of the stored tensor
    groups: int = 1

    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the matrix view; a vector keeps its own."""
        shape = self.shape
        if self.name == "linear" or self.name in ("vector", "whole"):
            return shape
        if self.name == "transposed":
            return (*shape[:-2], shape[-1], shape[-2])
        if self.name == "conv":
            return (shape[0], prod(shape[1:]))
        return (shape[1] * self.groups, shape[0] // self.groups * prod(shape[2:]))

    def to_matrix(self, w: Tensor) -> Tensor:
        """Stored tensor -> `[*, out, in]`; a view wherever torch allows one."""
        if self.name == "transposed":
            return w.mT
        if self.name == "conv":
            return w.flatten(1)
        if self.name == "conv_transposed":  # [g * i, o, *k] -> [g, o, i, *k] -> [g * o, i * prod(k)]
            w = w.reshape(self.groups, -1, *w.shape[1:]).transpose(1, 2)
            return w.reshape(self.matrix_shape())
        return w

    def from_matrix(self, m: Tensor) -> Tensor:
        """`[*, out, in]` -> the stored shape."""
        if self.name == "transposed":
            return m.mT
        if self.name == "conv":
            return m.reshape(self.shape)
        if self.name == "conv_transposed":
            g, (i, o, *k) = self.groups, self.shape
            return m.reshape(g, o, i // g, *k).transpose(1, 2).reshape(self.shape)
        return m


@dataclass(frozen=True)
class Site:
    """One place where one method attaches. `path` is the owner module's path from the model's root."""

    path: str
    kind: Kind
    tensor: str = ""  # for weight sites: the parameter's name in its owner
    role: str | None = None
    rows: tuple[int, int] | None = None  # row range of `role` in the matrix view
    layout: Layout | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what the method sees: `[*, out, in]`, rows applied; a vector's own shape; () for calls."""
        if self.layout is None:
            return ()
        shape = self.layout.matrix_shape()
        if self.rows is None:
            return shape
        n = self.rows[1] - self.rows[0]
        return (n,) if len(shape) == 1 else (*shape[:-2], n, shape[-1])

    @property
    def name(self) -> str:
        """'blocks.0.attn.qkv.weight[q]': what tables and messages call this site."""
        label = self.tensor or self.kind
        return f"{self.path + '.' if self.path else ''}{label}{f'[{self.role}]' if self.role else ''}"

    def key(self, method: str) -> str:
        """Name of the adapter's slot entry in its owner: 'lora__weight__q'."""
        return "__".join(part for part in (method, self.tensor or self.kind, self.role) if part)


def layout_of(module: nn.Module, tensor: str, shape: tuple[int, ...]) -> Layout:
    """The layout of `module.<tensor>`, by the module's class."""
    if len(shape) <= 1:
        return Layout("vector", shape)
    if tensor == "weight":
        for classes, name in _BY_CLASS:
            if isinstance(module, classes):
                return Layout(name, shape, getattr(module, "groups", 1))
        if _is_hf_conv1d(module):
            return Layout("transposed", shape)
    if len(shape) == 3 and getattr(module, "is_transposed", False):  # HF expert modules that store [e, in, out]
        return Layout("transposed", shape)
    if len(shape) > 3:
        return Layout("whole", shape)
    return Layout("linear", shape)


def matrix_tensors(module: nn.Module) -> list[str]:
    """Names of the parameters of `module` itself (not of its children) that a matrix method may adapt."""
    names = [name for name in own_tensors(module) if read_shape(module, name) and len(read_shape(module, name)) >= 2]
    if isinstance(module, nn.MultiheadAttention):
        return [name for name in names if name.endswith("proj_weight")]
    if "weight" in names:
        return ["weight"]
    if isinstance(module, nn.RNNBase):
        return names
    # Modules with bare parameters: expert stacks count, class tokens and position tables do not.
    return [name for name in names if len(read_shape(module, name)) == 3 and min(read_shape(module, name)) > 1]


def own_tensors(module: nn.Module) -> list[str]:
    """Parameter names of the module itself, parametrised ones (weight norm) under the name the forward reads."""
    names = [name for name, p in module._parameters.items() if p is not None]
    parametrized = getattr(module, "parametrizations", None)
    if parametrized is not None:
        names += [name for name in parametrized if name not in names]
    legacy = [name[:-2] for name in names if name.endswith("_g") and f"{name[:-2]}_v" in names]  # nn.utils.weight_norm
    return [name for name in names if name[:-2] not in legacy or name[-2:] not in ("_g", "_v")] + legacy


def read_shape(module: nn.Module, tensor: str) -> tuple[int, ...]:
    """Stored shape of `module.<tensor>` without computing an adapted value."""
    stored = module._parameters.get(tensor)
    if stored is None:
        stored = getattr(module, tensor)
    return tuple(stored.shape)


def weight_site(
    path: str, module: nn.Module, tensor: str, role: str | None = None, parent: nn.Module | None = None
) -> Site:
    """The site of `module.<tensor>`, or of one role's rows in it.

    Raises:
        NameNotFound: the tensor has no such role; the message lists the roles it has.
    """
    layout = layout_of(module, tensor, read_shape(module, tensor))
    site = Site(path, "weight", tensor, layout=layout)
    if role is None:
        return site
    shape = layout.matrix_shape()
    roles = roles_of(path, tensor, shape[0] if len(shape) == 1 else shape[-2], module, parent)
    if role not in roles:
        known = f"it has {', '.join(roles)}" if roles else "it is not a fused weight with known roles"
        raise NameNotFound(f"{site.name} has no role {role!r}: {known}{nearest(role, roles)}")
    return replace(site, role=role, rows=roles[role])


def roles_of(
    path: str, tensor: str, out: int, module: nn.Module, parent: nn.Module | None = None
) -> dict[str, tuple[int, int]]:
    """Row ranges by role for a fused weight (or bias) of `out` rows; empty where nothing is fused."""
    leaf = tensor if tensor not in ("weight", "bias") else path.rpartition(".")[2]
    leaf = leaf.removesuffix("_bias").removesuffix("_weight")
    if isinstance(module, nn.RNNBase) and tensor.startswith("weight_hr"):
        return {}  # the projection of an LSTM's output has no gates
    if isinstance(module, nn.LSTM):
        return _equal("ifgo", out)
    if isinstance(module, nn.GRU):
        return _equal("rzn", out)
    if leaf == "query_key_value":
        raise Unsupported(f"{path}: query_key_value interleaves its heads, so q, k and v are no row ranges of it")
    names = _FUSED.get(leaf)
    if names is None:
        return {}
    if names == ("q", "k", "v") and (sizes := _grouped_query_sizes(parent, out)):
        edges = [0, sizes[0], sizes[0] + sizes[1], out]
        return {name: (edges[i], edges[i + 1]) for i, name in enumerate(names)}
    return _equal(names, out)


_BY_CLASS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "conv_transposed"),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
    ((nn.Embedding, nn.EmbeddingBag), "transposed"),
    ((nn.Linear,), "linear"),
)

_FUSED: dict[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "qkv_proj": ("q", "k", "v"),
    "Wqkv": ("q", "k", "v"),
    "to_qkv": ("q", "k", "v"),
    "c_attn": ("q", "k", "v"),
    "in_proj": ("q", "k", "v"),
    "kv": ("k", "v"),
    "to_kv": ("k", "v"),
    "kv_proj": ("k", "v"),
    "gate_up_proj": ("gate", "up"),
    "w12": ("gate", "up"),
}


def _equal(names: str | tuple[str, ...], out: int) -> dict[str, tuple[int, int]]:
    if out % len(names):
        raise ConfigError(f"{out} rows do not divide into {len(names)} roles {tuple(names)}")
    n = out // len(names)
    return {name: (i * n, (i + 1) * n) for i, name in enumerate(names)}


def _grouped_query_sizes(parent: nn.Module | None, out: int) -> tuple[int, int] | None:
    """(q rows, k rows) where the parent says it has fewer key heads than query heads (Phi-3 and kin)."""
    config = getattr(parent, "config", None)
    heads = getattr(parent, "num_heads", None) or getattr(config, "num_attention_heads", None)
    kv = getattr(parent, "num_key_value_heads", None) or getattr(config, "num_key_value_heads", None)
    if not (isinstance(heads, int) and isinstance(kv, int)) or kv == heads or out % (heads + 2 * kv):
        return None
    head_dim = out // (heads + 2 * kv)
    return heads * head_dim, kv * head_dim


def _is_hf_conv1d(module: nn.Module) -> bool:
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def slice_rows(m: Tensor, rows: tuple[int, int] | None) -> Tensor:
    """Rows of a matrix view `[*, out, in]` (or entries of a vector)."""
    if rows is None:
        return m
    return m[rows[0] : rows[1]] if m.ndim == 1 else m[..., rows[0] : rows[1], :]


def put_rows(m: Tensor, new: Tensor, rows: tuple[int, int] | None) -> Tensor:
    """`m` with the rows of `slice_rows` replaced by `new`, differentiable in both."""
    if rows is None:
        return new
    axis = -1 if m.ndim == 1 else -2
    head, tail = m.narrow(axis, 0, rows[0]), m.narrow(axis, rows[1], m.shape[axis] - rows[1])
    return torch.cat([head, new, tail], axis)
