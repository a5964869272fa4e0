"""What a causal language model of transformers computes before and after its head, for any architecture.

The loss needs the last hidden states at a few positions and the head's weight, not the logits of the whole batch. So the
decoder is run without the head, and what some models do to their logits afterwards is read from their configuration
(`LOGIT_RULES`). Nothing is taken on trust: `verify_head` compares with the model's own logits and `verify_packing`
compares packed with separate documents, on a few random inputs; a model that differs is refused, never trained wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.freeze import evaluating
from mmpeft.errors import Unsupported
from mmpeft.kernels.cross_entropy import postprocess_logits


@dataclass(frozen=True)
class LogitRules:
    """What follows the head: logits = softcap(scale * (weight @ h + bias)); None = nothing."""

    scale: float | None = None
    softcap: float | None = None


# field of the model's configuration -> (field of LogitRules, its value)
LOGIT_RULES: dict[str, tuple[str, Callable[[float], float]]] = {
    "final_logit_softcapping": ("softcap", float),  # Gemma 2, 3, 3n
    "logits_soft_cap": ("softcap", float),  # RecurrentGemma
    "logit_scale": ("scale", float),  # Cohere
    "logits_scaling": ("scale", lambda divisor: 1.0 / divisor),  # Granite
    "lm_head_multiplier": ("scale", float),  # Falcon H1
}


def find_decoder(llm: Any) -> nn.Module:
    """The part of a causal language model that gives hidden states: everything but the head.

    Raises:
        Unsupported: the model has no such part.
    """
    for candidate in (getattr(llm, llm.base_model_prefix, None), llm.get_decoder()):
        if isinstance(candidate, nn.Module) and candidate is not llm:
            return candidate
    raise Unsupported(f"{type(llm).__name__} has no decoder apart from its head")


def logit_rules(llm: Any) -> LogitRules:
    """What the model does to its logits after the head, read from its configuration and proved.

    Raises:
        Unsupported: no linear head, or logits that differ from the model's own.
    """
    weight = getattr(llm.get_output_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise Unsupported(
            f"{type(llm).__name__} has no linear language-model head, so no text can be trained or generated"
        )
    given = {name: getattr(llm.config, name, None) for name in LOGIT_RULES}
    found = {LOGIT_RULES[n][0]: LOGIT_RULES[n][1](v) for n, v in given.items() if v is not None and float(v) > 0}
    rules = LogitRules(**found)
    if weight.device.type != "meta":
        verify_head(llm, rules)
    return rules


def head_logits(llm: Any, hidden: Tensor, rules: LogitRules) -> Tensor:
    """[N, H] -> [N, V]: the head is called, so adapters in it act, and the rules applied."""
    return postprocess_logits(llm.get_output_embeddings()(hidden), logit_scale=rules.scale, softcap=rules.softcap)


@torch.no_grad()
def verify_head(llm: Any, rules: LogitRules) -> None:
    """Raise Unsupported unless decoder plus head give the logits of the model itself."""
    try:
        with evaluating(llm):
            embeds = _probe(llm, 3)
            hidden = find_decoder(llm)(inputs_embeds=embeds, use_cache=False)[0]
            given, expected = head_logits(llm, hidden, rules), llm(inputs_embeds=embeds, use_cache=False).logits
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise Unsupported(f"{type(llm).__name__} cannot be run from input embeddings: {error}") from error
    if not _close(given, expected):
        raise Unsupported(
            f"{type(llm).__name__} does more to its logits than mmpeft knows ({', '.join(LOGIT_RULES)}): its loss "
            f"would be wrong (largest difference {float((given - expected).abs().max()):.3g} on a random input)"
        )


@torch.no_grad()
def verify_packing(llm: Any) -> None:
    """Raise Unsupported unless two documents in one row give the hidden states that they give alone."""
    decoder = find_decoder(llm)
    with evaluating(llm):
        embeds = _probe(llm, 7)
        packed = decoder(inputs_embeds=embeds, position_ids=_positions(embeds, 3, 4), use_cache=False)[0]
        parts = [decoder(inputs_embeds=part, use_cache=False)[0] for part in torch.split(embeds, [3, 4], dim=1)]
    if not _close(packed, torch.cat(parts, dim=1)):
        raise Unsupported(
            f"{type(llm).__name__} with attn_implementation={llm.config._attn_implementation!r} lets packed documents "
            "see each other; batch without packing"
        )


def _probe(llm: Any, length: int) -> Tensor:
    """Embeddings of `length` different ids, [1, length, H]."""
    embedding = llm.get_input_embeddings()
    ids = torch.arange(length, device=embedding.weight.device) * 7 % embedding.weight.shape[0]
    return embedding(ids[None])  # type: ignore[no-any-return]


def _positions(like: Tensor, *lengths: int) -> Tensor:
    return torch.cat([torch.arange(n, device=like.device) for n in lengths])[None]


def _close(given: Tensor, expected: Tensor) -> bool:
    """Equal up to what another order of the same sums may change in this dtype."""
    error = (given.double() - expected.double()).abs().max()
    return bool(error <= 64 * torch.finfo(expected.dtype).eps * expected.double().abs().max().clamp_min(1e-3))
