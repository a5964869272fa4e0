"""Token methods: prompts that are inserted into a frozen model's sequence and dropped again.

    VPT            visual prompt tuning, shallow and deep (Jia et al. 2022, arXiv 2203.12119), on a stack of blocks
    PromptTuning   soft prompts before an LLM's input (Lester et al. 2021, arXiv 2104.08691), on its decoder

What follows a change of length moves with it: attention masks, position ids, rotary tables and prefix counts, the KV
cache; and the prompts' outputs are dropped, so that whatever reads the model afterwards (pooling, a connector, the LM
head, labels) sees the tokens it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Method, Tensors, wide
from mmpeft.adapters.methods.bottleneck import first_tensor, width_in
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError, Unsupported

_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
_CACHES = ("past_key_values", "cache")  # transformers' name for it (newer releases: cache)
_MASKS = ("attn_mask", "attention_mask", "mask")


@dataclass(frozen=True)
class VPT(Method, name="vpt", aliases=("visual_prompt",)):
    """Visual prompt tuning (arXiv 2203.12119); match the stack of blocks: {"blocks": VPT(num_tokens=10)}.

    Deep: every block gets its own prompts, and their outputs are dropped after it. Shallow: one set enters before the
    first block and leaves after the last. Trained: num_tokens * width numbers, times the number of blocks if deep.

    Args:
        num_tokens: prompts a block.
        deep: own prompts for each block.
        dropout: on the prompts, in training.
        after: how many leading tokens (class, registers) stay in front; None reads it off the model.
        dim: token width, where it cannot be read off the blocks.
    """

    num_tokens: int = 10
    deep: bool = True
    dropout: float = 0.0
    after: int | None = None
    dim: int | None = None
    kind = "tokens"
    identity_at_init = False
    mixes = False

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ConfigError(f"num_tokens {self.num_tokens}; expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout {self.dropout}; expected 0 <= dropout < 1")

    def owners(self, path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        if not isinstance(module, nn.Sequential | nn.ModuleList):
            return []
        return [(f"{path}.{i}" if path else str(i), block) for i, block in enumerate(module)]

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        stack, index = _stack(context.root, site.path)
        like = next(context.module.parameters())
        width = self.dim or width_in(context.module)
        if width is None:
            raise ConfigError(f"the token width of {site.path} is not known; pass dim=")
        after = _prefix(context.root, site.path) if self.after is None else self.after
        facts = {"first": index == 0, "last": index == len(stack) - 1, "after": after}
        facts["seq_first"] = _seq_first(context.root, site.path)
        trained = {}
        if self.deep or index == 0:
            bound = (6 / (3 * _patch(context.root) ** 2 + width)) ** 0.5
            prompts = torch.empty(self.num_tokens, width, dtype=wide(like.dtype), device=like.device)
            trained["prompts"] = prompts if prompts.is_meta else prompts.uniform_(-bound, bound)
        return Tensors(trained, facts=facts)

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        first, last, after = p.facts["first"], p.facts["last"], p.facts["after"]
        x, args, kwargs = _take_input(args, kwargs)
        n, axis = self.num_tokens, 0 if p.facts["seq_first"] else 1
        enters, leaves = self.deep or first, self.deep or last
        if enters:
            prompts = F.dropout(p.prompts, self.dropout, p.training).to(x.dtype)
            prompts = prompts.unsqueeze(1 - axis).expand(
                -1 if axis == 0 else x.shape[0], x.shape[1] if axis == 0 else -1, -1
            )
            x = torch.cat([x.narrow(axis, 0, after), prompts, x.narrow(axis, after, x.shape[axis] - after)], axis)
        length = x.shape[axis] - n
        args, kwargs = (
            tuple(_longer(None, v, length, after, n) for v in args),
            {k: _longer(k, v, length, after, n) for k, v in kwargs.items()},
        )
        with _prefixes(owner_of(call), n):
            output = call(x, *args, **kwargs)
        if not leaves:
            return output
        y, put = first_tensor(output)
        return put(torch.cat([y.narrow(axis, 0, after), y.narrow(axis, after + n, length - after)], axis))

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        return 0  # the cost is a longer sequence, not work per token


@dataclass(frozen=True)
class PromptTuning(Method, name="prompt_tuning", aliases=("soft_prompt",)):
    """Prompt tuning (arXiv 2104.08691): `num_tokens` trained embeddings before the input; match the LLM or its decoder.

    Works with ids or embeddings, padding on either side, and generation with a KV cache (the prompts enter it once).

    Args:
        num_tokens: prompts; trained numbers are num_tokens * width.
        init_from: "vocabulary" (embeddings of random entries, the better choice in the paper) or "normal" (N(0, 0.02)).
    """

    num_tokens: int = 20
    init_from: Literal["vocabulary", "normal"] = "vocabulary"
    kind = "tokens"
    identity_at_init = False
    mixes = False

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ConfigError(f"num_tokens {self.num_tokens}; expected at least 1")
        if self.init_from not in ("vocabulary", "normal"):
            raise ConfigError(f"init_from {self.init_from!r}; expected 'vocabulary' or 'normal'")

    def owners(self, path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        get = getattr(module, "get_decoder", None)
        decoder = get() if get is not None else module
        if not hasattr(decoder, "get_input_embeddings"):
            return []
        inside = next((n for n, m in module.named_modules() if m is decoder), None)
        return [] if inside is None else [(".".join(part for part in (path, inside) if part), decoder)]

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        table = cast(Tensor, cast(Any, context.module).get_input_embeddings().weight)
        n, width = self.num_tokens, table.shape[1]
        if table.is_meta or torch.empty(0).is_meta:
            return Tensors({"prompts": torch.empty(n, width, device="meta")})
        if self.init_from == "vocabulary":
            prompts = table.detach()[torch.randint(table.shape[0], (n,), device=table.device)].to(
                wide(table.dtype), copy=True
            )
        else:
            prompts = torch.randn(n, width, dtype=wide(table.dtype), device=table.device) * 0.02
        return Tensors({"prompts": prompts})

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if len(args) > 1:
            raise Unsupported(
                f"{p.site.path}: prompt tuning needs keyword arguments beside input_ids; got {len(args)} positional"
            )
        if args:
            kwargs["input_ids"] = args[0]
        cache = cache_in(kwargs)
        n = self.num_tokens
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise Unsupported(
                    f"{p.site.path}: prompt tuning needs an attention mask [batch, tokens]; packed rows have none"
                )
            kwargs["attention_mask"] = F.pad(mask, (n, 0), value=1)
        if cache is not None and cache.get_seq_length() > 0:  # the prompts are in the cache already
            for key in ("position_ids", "cache_position"):
                if kwargs.get(key) is not None:
                    kwargs[key] = kwargs[key] + n
            return call(**kwargs)
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = cast(Any, owner_of(call)).get_input_embeddings()(kwargs.pop("input_ids"))
        kwargs.pop("input_ids", None)
        prompts = p.prompts.to(embeds.dtype).expand(embeds.shape[0], -1, -1)
        kwargs["inputs_embeds"] = torch.cat([prompts, embeds], 1)
        for key in ("position_ids", "cache_position"):
            ids = kwargs.get(key)
            if ids is not None:
                front = torch.arange(n, device=ids.device).expand(*ids.shape[:-1], n)
                kwargs[key] = torch.cat([front, ids + n], -1)
        output = call(**kwargs)
        y, put = first_tensor(output)
        return put(y[:, n:])

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        return 0


# --- what follows a change of length ---------------------------------------------------------------------------------


def _longer(name: str | None, value: Any, length: int, at: int, n: int) -> Any:
    """A block's other argument, made to fit `n` more tokens at `at`: masks let everything see the prompts, rotary pairs
    (cos, sin) leave them unrotated."""
    if (
        isinstance(value, Tensor)
        and (name in _MASKS or (name is None and value.ndim >= 2))
        and value.shape[-1] == length
    ):
        fill = 1 if value.dtype == torch.bool or not value.is_floating_point() else 0
        value = _insert(value, -1, at, n, fill)
        return _insert(value, -2, at, n, fill) if value.ndim >= 2 and value.shape[-2] == length else value
    if (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(v, Tensor) and v.shape[-2:-1] == (length,) for v in value)
    ):
        return _insert(value[0], -2, at, n, 1), _insert(value[1], -2, at, n, 0)
    return value


def _insert(t: Tensor, axis: int, at: int, n: int, fill: float) -> Tensor:
    shape = list(t.shape)
    shape[axis] = n
    new = torch.full(shape, fill, dtype=t.dtype, device=t.device)
    return torch.cat([t.narrow(axis, 0, at), new, t.narrow(axis, at, t.shape[axis] - at)], axis)


@contextmanager
def _prefixes(block: nn.Module, n: int) -> Iterator[None]:
    """timm's rotary attention leaves `num_prefix_tokens` unrotated: count the prompts among them for this call."""
    inside = [m for m in block.modules() if isinstance(getattr(m, "num_prefix_tokens", None), int)]
    for m in inside:
        cast(Any, m).num_prefix_tokens += n
    try:
        yield
    finally:
        for m in inside:
            cast(Any, m).num_prefix_tokens -= n


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among a transformers module's arguments, or None."""
    return next((kwargs[key] for key in _CACHES if kwargs.get(key) is not None), None)


def owner_of(call: Callable[..., Any]) -> nn.Module:
    """The module whose frozen call a chain of call methods ends in."""
    while isinstance(call, partial):
        head = call.args[0]
        if isinstance(head, nn.Module) and not isinstance(head, Delta):
            return head
        call = call.args[1] if len(call.args) > 1 else call.func
    raise ConfigError("this call belongs to no module")


def _take_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    key = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
    return kwargs[key], (), {k: v for k, v in kwargs.items() if k != key}


# --- facts read off the model at attach ------------------------------------------------------------------------------


def _stack(root: nn.Module, path: str) -> tuple[nn.ModuleList | nn.Sequential, int]:
    parent, _, leaf = path.rpartition(".")
    return cast(nn.ModuleList, root.get_submodule(parent)), int(leaf)


def _ancestors(root: nn.Module, path: str) -> list[nn.Module]:
    """Modules above the stack, nearest first."""
    parts = path.split(".")[:-2]
    return [root.get_submodule(".".join(parts[:i])) for i in range(len(parts), -1, -1)]


def _prefix(root: nn.Module, path: str) -> int:
    """Leading tokens that are no patches."""
    for module in _ancestors(root, path):
        n = getattr(module, "num_prefix_tokens", None)
        if isinstance(n, int):
            return n
        leaves = {name.rpartition(".")[2] for name, _ in module.named_parameters()}
        if leaves & set(_CLASS_TOKENS):
            return 1 + int(getattr(getattr(module, "config", None), "num_register_tokens", 0) or 0)
    return 0


def _seq_first(root: nn.Module, path: str) -> bool:
    """Whether the blocks see [T, B, D] (open_clip and torch with batch_first=False)."""
    owner = next(iter(_ancestors(root, path)), root)
    return getattr(owner, "batch_first", True) is False


def _patch(root: nn.Module) -> int:
    """The patch size, for the paper's init; 16 where the model does not say."""
    for module in root.modules():
        size = getattr(module, "patch_size", None) or getattr(getattr(module, "config", None), "patch_size", None)
        if isinstance(size, int):
            return size
        if isinstance(size, tuple | list) and size and isinstance(size[0], int):
            return size[0]
    return 16
