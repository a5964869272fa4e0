"""Bottleneck adapters: a small network after, or beside, a frozen call.

    Bottleneck    serial, y + s * up(act(down(y))): Houlsby et al. 2019 (arXiv 1902.00751) after attention and after the
                  feed-forward, Pfeiffer et al. 2020 (2005.00247) after the feed-forward only. The plan says where:
                  {"**.{attn,mlp}": Bottleneck(reduction=16)} is Houlsby's, {"**.mlp": ...} Pfeiffer's.
    AdaptFormer   parallel, call(x) + s * up(relu(down(x))): Chen et al. 2022 (arXiv 2205.13535), around the MLP.

Both act on the channel axis: the last one, or axis 1 of a convolutional map. `up` starts at zero, so both start as the
identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Method, Tensors, wide, zeros
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError

Activation = Literal["relu", "gelu", "silu", "tanh"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": F.tanh}


@dataclass
class Projections:
    """What `Bottleneck.update` reads of a site, for methods that make the weights at each call (a class that
    torch.compile traces)."""

    site: Site
    training: bool
    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None


@dataclass(frozen=True)
class Bottleneck(Method, name="bottleneck", aliases=("houlsby", "pfeiffer")):
    """Serial bottleneck adapter (arXiv 1902.00751, 2005.00247).

    Args:
        size: inner width; None means width // reduction.
        reduction: used when `size` is None.
        activation: relu, gelu, silu or tanh.
        scale: factor on the update.
        dropout: on the inner activation, in training.
        bias: of both projections; without, 2 width size numbers are trained.
        dim: channel width, where it cannot be read off the module's own layers.
    """

    size: int | None = None
    reduction: int = 16
    activation: Activation = "relu"
    scale: float = 1.0
    dropout: float = 0.0
    dim: int | None = None
    bias: bool = True
    kind = "call"

    def __post_init__(self) -> None:
        if (self.size is not None and self.size < 1) or self.reduction < 1:
            raise ConfigError(f"size {self.size}, reduction {self.reduction}; expected at least 1")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout {self.dropout}; expected 0 <= dropout < 1")

    def width(self, module: nn.Module) -> int | None:
        """Channels the adapter works on: the call's output."""
        return width_out(module)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        width = known_width(self.dim or self.width(context.module), site, context.module)
        like = next(context.module.parameters(), None)
        dtype, device = (wide(like.dtype), like.device) if like is not None else (None, None)
        inner = self.size or max(1, width // self.reduction)
        down, up = (
            nn.Linear(*sides, bias=self.bias, dtype=dtype, device=device) for sides in ((width, inner), (inner, width))
        )
        nn.init.kaiming_uniform_(down.weight, a=5**0.5)
        for start in (up.weight, down.bias, up.bias):
            if start is not None:
                nn.init.zeros_(start)
        parts = {"down": down, "up": up}
        return Tensors({f"{n}_{t}": p.detach() for n, m in parts.items() for t, p in m.named_parameters()})

    def update(self, x: Tensor, p: Delta) -> Tensor:
        """s * up(act(down(x))) along the channel axis, in x's dtype."""
        h, channels_first = channels_last(x, p.down_weight.shape[1], p.site)
        down, up = self.biases(p, h.dtype)
        h = ACTIVATIONS[self.activation](F.linear(h, p.down_weight.to(h.dtype), down))
        h = F.dropout(h, self.dropout, p.training)
        h = self.scale * F.linear(h, p.up_weight.to(h.dtype), up)
        return h.movedim(-1, 1) if channels_first else h

    def biases(self, p: Delta, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Those of down and up, None where there are none."""
        return (p.down_bias.to(dtype), p.up_bias.to(dtype)) if self.bias else (None, None)

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        y, put = first_tensor(output)
        return put(y + self.update(y, p))

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        return 2 * (tensors["down_weight"].numel() + tensors["up_weight"].numel())


@dataclass(frozen=True)
class AdaptFormer(Bottleneck, name="adaptformer", aliases=("parallel_bottleneck",)):
    """Parallel bottleneck, `call(x) + scale * up(relu(down(x)))` (arXiv 2205.13535; its size 64 and scale 0.1)."""

    size: int | None = 64
    scale: float = 0.1

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        reads, gives = _io(context.module)
        if reads != gives:
            raise ConfigError(
                f"{type(self).__name__} adds what it makes of a call's input to its output, and {site.path} takes {reads} "
                f"channels and gives {gives}; match the block around it"
            )
        return super().init(site, base, context)

    def width(self, module: nn.Module) -> int | None:
        return width_in(module)

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        update = self.update(x, p)  # before the call, which may work in place on x
        output = call(*args, **kwargs)
        y, put = first_tensor(output)
        return put(y + update)


def channels_last(x: Tensor, width: int, site: Site) -> tuple[Tensor, bool]:
    """x [..., width], and whether its channels were on axis 1 (a convolutional map)."""
    if x.shape[-1] == width:
        return x, False
    if x.ndim in (3, 4, 5) and x.shape[1] == width:
        return x.movedim(1, -1), True
    raise ConfigError(f"{site.path}: a tensor of shape {tuple(x.shape)} has no channel axis of {width}; pass dim=")


def first_tensor(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The main tensor of a call's output, and a function that puts a new one in its place (tuples keep their rest)."""
    if isinstance(output, Tensor):
        return output, lambda y: y
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0], lambda y: (y, *output[1:])
    if hasattr(output, "last_hidden_state"):

        def put(y: Tensor) -> Any:
            output.last_hidden_state = y
            return output

        return output.last_hidden_state, put
    raise ConfigError(f"a call that returns {type(output).__name__} has no main tensor to adapt")


def known_width(width: int | None, site: Site, module: nn.Module) -> int:
    """`width`, refused where it could not be read off the module."""
    if width is None:
        raise ConfigError(f"the width of {site.path} ({type(module).__name__}) is not known; pass dim=")
    return width


def channel_vector(dim: int | None, site: Site, module: nn.Module) -> Tensor:
    """Zeros [channels a call gives], beside the module's own parameters."""
    like = next(module.parameters(), torch.empty(0))
    return zeros(known_width(dim or width_out(module), site, module), like=like)


def width_in(module: nn.Module) -> int | None:
    """Channels a module reads, from its first layer that says so."""
    return next((w for m in module.modules() if (w := _io(m)[0]) is not None), None)


def width_out(module: nn.Module) -> int | None:
    """Channels a module gives, from its last layer that says so (norms included: they keep the width)."""
    found = [w for m in module.modules() if (w := _io(m)[1]) is not None]
    return found[-1] if found else None


def _io(m: nn.Module) -> tuple[int | None, int | None]:
    if isinstance(m, nn.Linear):
        return m.in_features, m.out_features
    if isinstance(m, nn.modules.conv._ConvNd):
        return m.in_channels, m.out_channels
    if isinstance(m, nn.MultiheadAttention):
        return m.embed_dim, m.embed_dim
    if isinstance(m, nn.LayerNorm):
        return m.normalized_shape[-1], m.normalized_shape[-1]
    if isinstance(m, nn.RMSNorm):
        return m.normalized_shape[-1], m.normalized_shape[-1]
    if hasattr(m, "nx") and hasattr(m, "nf"):  # HF Conv1D
        return int(m.nx), int(m.nf)  # type: ignore[arg-type]
    return None, None
