"""PEDRO: gains that depend on the prompt (Xie et al. 2024, arXiv 2409.17834).

Every transformer layer has a small generator that turns the pooled hidden states of the prompt into three vectors, and
multiplies queries, values and the feed-forward's up projection by them. They are made once a prompt: while tokens are
generated with a cache, those of the prompt stay.

    mmpeft.attach(llm, {"model.layers.*": mmpeft.PEDRO(rank=12)})
    with mmpeft.prompt_mask(llm, mask):      # [B, T] bool, the tokens of the prompt
        loss = llm(input_ids=..., labels=...).loss

Choice: without a mask, a token's vectors come from the mean over the tokens up to it, so that a forgotten mask leaks no
answer into the prompt's vectors; over a whole prompt both are the same at its last token. The paper learns its activation
function in a second loop; here it is a fixed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Method, Tensors, zeros
from mmpeft.adapters.methods.bottleneck import ACTIVATIONS, Activation, first_tensor, known_width, width_in, width_out
from mmpeft.adapters.methods.lora_prune import layer_of
from mmpeft.adapters.methods.low_rank import at_least, kaiming, one_of
from mmpeft.adapters.methods.tokens import cache_in
from mmpeft.adapters.site import Site
from mmpeft.adapters.state import sites_of
from mmpeft.errors import ConfigError, NameNotFound, nearest


@dataclass(frozen=True)
class PEDRO(Method, name="pedro"):
    """`y' = l * y` after each target of a layer, [l_q, l_v, l_u] = 1 + U act(D pool(H)) of the layer's input H over the
    prompt (arXiv 2409.17834); D [rank, d] Kaiming-uniform, U 0, so l is 1 at the start. rank (d + sum of the targets'
    widths) parameters a layer.

    Args:
        rank: width of the generator (12 to 16 in the paper).
        activation: relu, gelu, silu or tanh.
        targets: last names of the modules whose output is multiplied.
    """

    rank: int = 12
    activation: Activation = "gelu"
    targets: tuple[str, ...] = ("q_proj", "v_proj", "up_proj")
    kind = "call"
    mixes = False

    def __post_init__(self) -> None:
        at_least(self, rank=1)
        one_of("activation", self.activation, tuple(ACTIVATIONS))

    def owners(self, path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        found = self.inside(module)
        if not found:
            return []
        names = {n.rpartition(".")[2] for n, _ in found}
        for target in self.targets:
            if target not in names:
                leaves = sorted({n.rpartition(".")[2] for n, m in module.named_modules() if isinstance(m, nn.Linear)})
                raise NameNotFound(f"{path} has no {target!r}{nearest(target, leaves)}; it has {', '.join(leaves)}")
        return [(path, module), *((f"{path}.{n}" if path else n, m) for n, m in found)]

    def inside(self, layer: nn.Module) -> list[tuple[str, nn.Module]]:
        """The targets of one layer, in its order."""
        return [(n, m) for n, m in layer.named_modules() if n.rpartition(".")[2] in self.targets]

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        module, key = context.module, (self.name, site.path)
        if key in context.shared:  # a target: it only reads what its layer has made
            return Tensors({}, facts=context.shared[key])
        like = next(module.parameters())
        widths = [known_width(width_out(m), site, m) for _, m in self.inside(module)]
        flow: dict[str, Any] = {"l": None, "kept": None, "mask": None}
        begin = 0
        for (name, _), width in zip(self.inside(module), widths, strict=True):
            path = f"{site.path}.{name}" if site.path else name
            context.shared[self.name, path] = {"flow": flow, "rows": (begin, begin + width)}
            begin += width
        down = kaiming(self.rank, known_width(width_in(module), site, module), like=like)
        return Tensors({"D": down, "U": zeros(begin, self.rank, like=like)}, facts={"flow": flow, "rows": None})

    def vectors(self, p: Delta, x: Tensor, mask: Tensor | None) -> Tensor:
        """l of a layer's input x [B, T, d]: [B, 1, n] over the masked tokens, or [B, T, n] over those up to each."""
        h = x.to(p.D.dtype)
        if mask is not None:
            m = mask.to(h).unsqueeze(-1)
            pooled = (h * m).sum(1, keepdim=True) / m.sum(1, keepdim=True).clamp_min(1)
        else:
            pooled = h.cumsum(1) / torch.arange(1, h.shape[1] + 1, device=h.device, dtype=h.dtype).unsqueeze(-1)
        gains: Tensor = 1 + ACTIVATIONS[self.activation](pooled @ p.D.mT) @ p.U.mT
        return gains

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        flow, rows = p.facts["flow"], p.facts["rows"]
        if rows is not None:
            y, put = first_tensor(call(*args, **kwargs))
            return put(y if flow["l"] is None else y * flow["l"][..., rows[0] : rows[1]].to(y.dtype))
        x = args[0] if args else kwargs["hidden_states"]
        cache = cache_in(kwargs)
        if cache is not None and flow["kept"] is not None and cache.get_seq_length(layer_of(p.site) or 0) > 0:
            flow["l"] = flow["kept"]
        else:
            mask = flow["mask"]
            if mask is not None and mask.shape != x.shape[:2]:
                raise ConfigError(
                    f"a prompt mask of {tuple(mask.shape)} for tokens {tuple(x.shape[:2])} at {p.site.path}"
                )
            flow["l"] = self.vectors(p, x, mask)
            flow["kept"] = None if cache is None else flow["l"][:, -1:].detach()
        try:
            return call(*args, **kwargs)
        finally:
            flow["l"] = None

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        return 0  # once a prompt, not once a token


@contextmanager
def prompt_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Within it, every PEDRO layer pools over these tokens [B, T] bool (the prompt, without padding and answers).

    Raises:
        ConfigError: the model has no PEDRO adapter.
    """
    flows = [d.facts["flow"] for d in sites_of(model, PEDRO)]
    for flow in flows:
        flow["mask"] = mask
    try:
        yield
    finally:
        for flow in flows:
            flow["mask"] = None
