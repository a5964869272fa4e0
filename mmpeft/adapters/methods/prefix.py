"""Prefixes: trained keys and values that every token of an attention sees before those of the tokens.

Prefix         the keys and values themselves (P-tuning v2, Liu et al. 2021, arXiv 2110.07602)
PrefixTuning   as first published (Li & Liang 2021, arXiv 2101.00190): one trained embedding through an MLP
ETT            Xu et al. 2023, arXiv 2301.02419: generated from prototypes of the support set

mmpeft.plain_prefixes(model)                   after training: what the generators made, as `Prefix`
{"**.attn": mmpeft.PrefixTuning(30, hidden=800), "**.mlp": mmpeft.AdaptFormer(size=384, scale=4.0)}    MaM
{"blocks.*.attn": [mmpeft.ETT(), mmpeft.DRA()], "blocks.*.mlp": mmpeft.DRA()}, then fit_ett: eTT as published
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Tensors, zeros
from mmpeft.adapters.methods.attention import InsideAttention, heads_of
from mmpeft.adapters.methods.bottleneck import known_width, width_in
from mmpeft.adapters.methods.low_rank import at_least, kaiming, normal
from mmpeft.adapters.probe import as_call
from mmpeft.adapters.site import Site
from mmpeft.adapters.state import sites_of
from mmpeft.adapters.switch import use
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class Prefixed(InsideAttention):
    """`num_tokens` keys and values before those of the tokens. Every token sees them, whatever the mask; keys are not
    rotated. The softmax shares its mass with them, so the start is not the identity.

    Args:
        num_tokens: length of the prefix.
        std: of the normal distribution that the prefix, or what generates it, starts from.
        num_heads: where it cannot be read off the module.
    """

    num_tokens: int = 10
    std: float = 0.02
    num_heads: int | None = None
    identity_at_init = False

    def __post_init__(self) -> None:
        at_least(self, num_tokens=1)

    @abstractmethod
    def prefix(self, p: Delta) -> tuple[Tensor, Tensor]:
        """Keys and values [num_tokens, width of the keys]."""

    def attend(self, p: Delta, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, o: Any) -> Tensor:
        return attend_to(*self.prefix(p), p.facts["kv"], q, k, v, mask, causal, o)

    def flops(self, site: Site, tensors: Any) -> int:
        return 0  # the cost is a longer row of scores


def attend_to(
    K: Tensor, V: Tensor, kv: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, o: Any
) -> Tensor:
    """Attention of q [B, heads, T, d] with the prefix K, V [n, kv d], or one a row [B, n, kv d], before k and v."""
    n = K.shape[-2]
    front = [t.reshape(*t.shape[:-1], kv, k.shape[-1]).transpose(-3, -2).to(q.dtype) for t in (K, V)]
    if front[0].ndim == 4 and len(front[0]) != len(q):
        raise ConfigError(f"prefixes for {len(front[0])} samples in an attention of {len(q)} rows (windows?)")
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        mask = F.pad(mask, (n, 0), value=1 if mask.dtype == torch.bool else 0)
    if k.shape[1] != kv:  # already repeated for grouped queries
        front = [t.repeat_interleave(k.shape[1] // kv, -3) for t in front]
    k, v = (torch.cat([f.expand(len(q), -1, -1, -1), t], -2) for f, t in zip(front, (k, v), strict=True))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **o)


@dataclass(frozen=True)
class Prefix(Prefixed, name="prefix", aliases=("p-tuning-v2",)):
    """Prefix of `num_tokens` trained keys and values in every matched attention, from N(0, `std`) (P-tuning v2, arXiv
    2110.07602); 2 num_tokens width parameters a site (width: that of the keys).

    Args:
        num_tokens: length of the prefix.
        std: of the start.
        num_heads: where it cannot be read off the module.
    """

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        _, kv, d = heads_of(site, context.module, self.num_heads)
        like = next(context.module.parameters())
        shape = (self.num_tokens, kv * d)
        return Tensors({n: normal(*shape, std=self.std, like=like) for n in ("K", "V")}, facts={"kv": kv})

    def prefix(self, p: Delta) -> tuple[Tensor, Tensor]:
        return p.K, p.V


def generator(method: Prefixed, site: Site, context: Context, make: Callable[..., dict[str, Tensor]]) -> Tensors:
    """Tensors of a prefix made by something that all sites of a rule share, `make(width, like)`, and the site's own
    M [2, width of the keys, hidden], zero."""
    _, kv, d = heads_of(site, context.module, method.num_heads)
    like = next(context.module.parameters())
    key = (method.name, context.sites[0])
    first = key not in context.shared
    if first:
        made = make(known_width(width_in(context.module), site, context.module), like)
        context.shared[key] = {n: nn.Parameter(t) for n, t in made.items()}
    shared: dict[str, Tensor] = context.shared[key]
    own = {"M": zeros(2, kv * d, method.hidden, like=like)}  # type: ignore[attr-defined]
    return Tensors({**(shared if first else {}), **own}, derived={} if first else shared, facts={"kv": kv})


@dataclass(frozen=True)
class PrefixTuning(Prefixed, name="prefix-tuning", aliases=("prefix-mlp",)):
    """Prefix tuning with its reparametrisation (arXiv 2101.00190): keys and values of a site are
    M tanh(W E + w) + m, E [num_tokens, width] from N(0, `std`), W [hidden, width] and w [hidden] shared by the sites of
    the rule, M [2 width of the keys, hidden] and m the site's; the layers start as nn.Linear does. Parameters:
    num_tokens width + hidden (width + 1) + sum over sites of 2 width (hidden + 1). The MLP serves the training alone:
    `plain_prefixes` leaves what it made.

    Args:
        num_tokens: length of the prefix.
        std: of the embedding's start.
        num_heads: where it cannot be read off the module.
        hidden: width of the MLP (512 in the paper's table-to-text runs; 800 in AdapterHub's MaM).
    """

    std: float = 1.0
    hidden: int = 512

    def __post_init__(self) -> None:
        at_least(self, num_tokens=1, hidden=1)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        def shared(width: int, like: Tensor) -> dict[str, Tensor]:
            W = kaiming(self.hidden, width, like=like)
            w = zeros(self.hidden, like=like).uniform_(-(width**-0.5), width**-0.5)
            return {"E": normal(self.num_tokens, width, std=self.std, like=like), "W": W, "w": w}

        made = generator(self, site, context, shared)
        M = made.trained["M"]
        bound = self.hidden**-0.5
        own = {"M": kaiming(*M.shape, like=M), "m": zeros(*M.shape[:2], like=M).uniform_(-bound, bound)}
        return Tensors({**made.trained, **own}, derived=made.derived, facts=made.facts)

    def prefix(self, p: Delta) -> tuple[Tensor, Tensor]:
        h = torch.tanh(F.linear(p.E, p.W, p.w))
        return F.linear(h, p.M[0], p.m[0]), F.linear(h, p.M[1], p.m[1])


@dataclass(frozen=True)
class ETT(Prefixed, name="ett", aliases=("attentive-prefix",)):
    """Attentive prefix of eTT (arXiv 2301.02419): keys and values of a site are M tanh(W E), E [num_tokens, width] the
    prototypes shared by the sites and trained on (`fit_ett` sets them; N(0, std) until then), W [hidden, width] shared,
    M [2 width of the keys, hidden] the site's. One token a class in the paper. Parameters: width (num_tokens + hidden)
    + sum over sites of 2 hidden width.

    Choice: the paper leaves the generator's depth to its code; here it has one hidden layer without biases, and M
    starts at 0, so that the first prefix attends like a zero token.

    Args:
        hidden: width of the generator.
    """

    hidden: int = 64

    def __post_init__(self) -> None:
        at_least(self, num_tokens=1, hidden=1)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        def shared(width: int, like: Tensor) -> dict[str, Tensor]:
            E = normal(self.num_tokens, width, std=self.std, like=like)
            return {"E": E, "W": kaiming(self.hidden, width, like=like)}

        made = generator(self, site, context, shared)
        return Tensors(made.trained, derived=made.derived, facts={**made.facts, "seen": None})

    def prefix(self, p: Delta) -> tuple[Tensor, Tensor]:
        h = torch.tanh(p.E @ p.W.mT)
        return h @ p.M[0].mT, h @ p.M[1].mT

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if p.facts["seen"] is not None:
            p.facts["seen"]["tokens"] = args[0] if args else next(iter(kwargs.values()))
        return super().around(p, call, *args, **kwargs)

    def attend(self, p: Delta, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, o: Any) -> Tensor:
        if p.facts["seen"] is not None:
            scores = q[..., :1, :] @ k.mT * (o.get("scale") or q.shape[-1] ** -0.5)
            p.facts["seen"]["attention"] = scores.softmax(-1).mean(1).squeeze(1)  # of token 0, [B, S]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, **o)
        return super().attend(p, q, k, v, mask, causal, o)


@torch.no_grad()
def fit_ett(model: nn.Module, support: Iterable[Any], labels: Tensor, *, name: str = "default") -> Tensor:
    """Set the prototypes E of an ETT adapter from a support set: token i is the mean, over the images of class i, of
    the tokens at the last ETT site weighted by the attention that token 0 (the class token) pays them there, with the
    adapter off. Returns E [num_tokens, width].

    Args:
        support: inputs as in `attach(example=)`.
        labels: class of each row of the inputs in order [n], 0 to num_tokens - 1.

    Raises:
        ConfigError: labels that do not fit, or classes without an example.
    """
    deltas = sites_of(model, ETT, name)
    last = cast(Delta, deltas[-1])
    n = cast(ETT, last.method).num_tokens
    if sorted(set(labels.tolist())) != list(range(n)):
        raise ConfigError(
            f"labels {sorted(set(labels.tolist()))}; expected each of 0 to {n - 1}, one prefix token each"
        )
    rows = []
    try:
        with use(model, name):
            for given in support:
                for d in deltas:
                    d.facts["seen"] = {}  # while it is there, the site notes what it sees and adds no prefix
                args, kwargs = as_call(given)
                model(*args, **kwargs)
                rows.append(torch.einsum("bs,bsd->bd", last.facts["seen"]["attention"], last.facts["seen"]["tokens"]))
    finally:
        for d in deltas:
            d.facts["seen"] = None
    tokens = torch.cat(rows)
    if len(tokens) != len(labels):
        raise ConfigError(f"{len(labels)} labels for {len(tokens)} inputs")
    E = torch.stack([tokens[labels.to(tokens.device) == c].mean(0) for c in range(n)])
    last.E.copy_(E)
    return cast(Tensor, last.E)
