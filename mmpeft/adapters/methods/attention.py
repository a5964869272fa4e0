"""Methods that work inside an attention: on its scores, or (`prefix.py`) on the keys and values it sees.

    AttnScale      Basu et al. 2023, arXiv 2304.01917: the scores times a trained matrix, softmax(A * S) V
    AttnScaleLite  there too: one trained number a head, which folds into the query projection
    DRA            the domain residual adapter of that paper and of eTT: a trained offset after attention and
                   feed-forward

Within the wrapped call, `F.scaled_dot_product_attention` is answered by the method: timm, transformers with
`attn_implementation="sdpa"` and open_clip's custom blocks go through it. An attention that multiplies by hand has no
such place, and the liveness proof of `attach` names it as dead. `nn.MultiheadAttention` is refused at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmpeft.adapters.method import Context, Delta, Factors, Method, Tensors, zeros
from mmpeft.adapters.methods.activation import ChannelEdit, OutputGain, on_channels
from mmpeft.adapters.methods.bottleneck import first_tensor, known_width, width_in
from mmpeft.adapters.methods.low_rank import at_least, check_divides
from mmpeft.adapters.site import Site, matrix_tensors
from mmpeft.errors import ConfigError, Unsupported

Attend = Callable[..., Tensor]


class Attending(TorchFunctionMode):
    """Within it, `attend` answers F.scaled_dot_product_attention; inside `attend`, the one before does."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class InsideAttention(Method):
    """Call methods on an attention module that change how its heads attend."""

    kind = "call"

    @abstractmethod
    def attend(self, p: Delta, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, o: Any) -> Tensor:
        """q [B, heads, T, d], k and v [B, heads or kv heads, S, d] -> [B, heads, T, d]; `o` is the other options."""

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return inside(partial(self.attend, p), call, args, kwargs)


def inside(attend: Attend, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call with `attend(q, k, v, mask, causal, options)` in the place of its attention."""

    def answer(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **o: Any,
    ) -> Tensor:
        return attend(query, key, value, attn_mask, is_causal, {"dropout_p": dropout_p, **o})

    if torch.compiler.is_compiling():  # dynamo would trace past the mode; run this attention as it is
        return torch.compiler.disable(enter)(answer, call, args, kwargs)  # type: ignore[no-untyped-call]
    return enter(answer, call, args, kwargs)


def enter(answer: Attend, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call with its attention answered."""
    with Attending(answer):
        return call(*args, **kwargs)


def heads_of(site: Site, module: nn.Module, num_heads: int | None = None) -> tuple[int, int, int]:
    """(heads, key heads, width of one) of an attention module.

    Raises:
        Unsupported: nn.MultiheadAttention, whose scores nothing outside sees.
        ConfigError: they are not known, or do not divide the width.
    """
    if isinstance(module, nn.MultiheadAttention):
        raise Unsupported(f"{site.path}: nn.MultiheadAttention cannot be entered; use a weight method on its in_proj")
    config = getattr(module, "config", None)
    heads = num_heads or getattr(module, "num_heads", None) or getattr(config, "num_attention_heads", None)
    width = known_width(width_in(module), site, module)
    if not isinstance(heads, int) or heads < 1:
        raise ConfigError(f"the heads of {site.path} ({type(module).__name__}) are not known; pass num_heads=")
    kv = getattr(module, "num_key_value_heads", None) or getattr(config, "num_key_value_heads", None) or heads
    d = getattr(module, "head_dim", None)
    if d is None and width % heads:
        raise ConfigError(f"{site.path}: {heads} heads do not divide a width of {width}; pass num_heads=")
    d = d or width // heads
    return heads, int(kv), int(d)


@dataclass(frozen=True)
class AttnScale(InsideAttention, name="attn-scale"):
    """Attention scaling, softmax(A * q k^T / sqrt(d)) v with a trained A [heads, tokens, tokens], 1 at the start
    (arXiv 2304.01917); heads tokens^2 parameters, or tokens^2 with `share`. Two of them in one attention add up their
    differences from 1.

    Args:
        tokens: length of the sequence, class tokens included (197: ViT-B/16 at 224).
        share: one A for all heads.
        num_heads: where it cannot be read off the module.
    """

    tokens: int = 197
    share: bool = False
    num_heads: int | None = None

    def __post_init__(self) -> None:
        at_least(self, tokens=1)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        heads = heads_of(site, context.module, self.num_heads)[0]
        like = next(context.module.parameters())
        return Tensors({"A": 1 + zeros(1 if self.share else heads, self.tokens, self.tokens, like=like)})

    def attend(self, p: Delta, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, o: Any) -> Tensor:
        if (q.shape[-2], k.shape[-2]) != (self.tokens, self.tokens):
            raise ConfigError(
                f"{p.site.path}: {q.shape[-2]} queries and {k.shape[-2]} keys; this AttnScale has tokens={self.tokens}"
            )
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # of grouped queries
        scores = q @ keys.mT * (o.get("scale") or q.shape[-1] ** -0.5)
        bias = (p.A - 1).to(q.dtype) * scores  # A * S = S + (A - 1) * S, so the fused kernel can add it
        if causal:
            mask = torch.ones(self.tokens, self.tokens, dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **o)

    def flops(self, site: Site, tensors: Any) -> int:
        return int(4 * tensors["A"].numel() // self.tokens)


@dataclass(frozen=True)
class AttnScaleLite(OutputGain, name="attn-scale-lite", aliases=("attnscalelite",)):
    """One trained scale a head on its scores, softmax(s_h q k^T / sqrt(d)) v, 1 at the start (arXiv 2304.01917); as
    many parameters as heads. Match the query projection: q' = s_h q is the same thing, and merges. (Behind a norm of
    the queries it would cancel, and `attach` says so.)

    Choice: the survey and the paper's text leave open whether "Lite" shares over heads or over entries; here a head has
    one number, and `AttnScale(share=True)` is the other reading.

    Args:
        num_heads: where it cannot be read off the module around the projection.
    """

    num_heads: int | None = None

    def heads(self, site: Site, context: Context) -> int:
        """Heads of the attention around the site."""
        parent = context.root.get_submodule(site.path.rpartition(".")[0])
        n = self.num_heads or getattr(parent, "num_heads", None)
        n = n or getattr(getattr(parent, "config", None), "num_attention_heads", None)
        if not isinstance(n, int):
            raise ConfigError(f"the heads of {site.path} are not known; pass num_heads=")
        return n

    def weights(self, path: str, module: nn.Module) -> list[str]:
        return matrix_tensors(module)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        heads, W = self.heads(site, context), base
        check_divides("num_heads", base.shape[0], heads, "rows", site)
        return self.share("s", site, context, lambda: 1 + zeros(heads, like=W))

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        return Factors(row=p.s.repeat_interleave(W.shape[0] // len(p.s)))

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        gain: Tensor = p.s.repeat_interleave(W.shape[0] // len(p.s))
        return W * (gain if W.ndim == 1 else gain.unsqueeze(-1))


@dataclass(frozen=True)
class DRA(ChannelEdit, name="dra", aliases=("domain-residual-adapter",)):
    """Domain residual adapter, `y' = y + delta` around a call (arXiv 2301.02419, 2304.01917; there, around attention
    and feed-forward of every block); delta [width] 0 at the start."""

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        return Tensors({"delta": self.channels(site, context)})

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        y, put = first_tensor(call(*args, **kwargs))
        return put(y + on_channels(p.delta, y, p.site))
