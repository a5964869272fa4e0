"""Prompts and prefixes of language models: PROMPT_TUNING, P_TUNING, PREFIX_TUNING, whose files hold one tensor.

    PROMPT_TUNING, P_TUNING   prompt_embeddings [n, width]; P-tuning saves what its encoder made, not the encoder
    PREFIX_TUNING             prompt_embeddings [n, 2 layers kv-width]: keys and values of layer 0, of layer 1, ...

PEFT's logits include the prompts' positions, ours do not. PEFT's prefix is a filled KV cache: its keys are as they
stand, and the tokens' positions start after them. Here a prefix takes no position. With rotary positions the two are
the same once the keys are turned back by n, R(p + n) q . k = R(p) q . R(-n) k, which the model's own functions do. With
positions added to the input they are not, and such models are refused.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mmpeft.adapters.methods.prefix import Prefix, Prefixed
from mmpeft.adapters.methods.tokens import PromptTuning
from mmpeft.adapters.peft.codecs import Item
from mmpeft.adapters.site import Site

if TYPE_CHECKING:
    from mmpeft.adapters.peft.read import Reader
    from mmpeft.adapters.peft.write import Writer

KEY = "prompt_embeddings"


def read_prompts(reader: Reader) -> list[Item]:
    """Soft prompts before a language model's input."""
    method = PromptTuning(num_tokens=reader.count(reader.config.get("num_virtual_tokens"), "num_virtual_tokens"))
    owners = method.owners("", reader.model)
    if not owners or reader.config.get("num_transformer_submodules", 1) not in (1, None):
        reader.refused.append("PEFT's prompts are for the input of a transformers language model without an encoder")
        return []
    path, decoder = owners[0]
    width = decoder.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    prompts = reader.take(KEY, (method.num_tokens, width))
    return [] if prompts is None else [Item(Site(path, "tokens"), method, {"prompts": prompts})]


def write_prompts(writer: Writer, wholes: list[str]) -> dict[str, Any]:
    """PROMPT_TUNING, whose files hold nothing else."""
    ((path, _),) = writer.sites
    delta = writer.sites[path, ""][0]
    if [p for p, _ in delta.method.owners("", writer.model)] != [path]:
        writer.refused.append(f"{path}: PEFT inserts prompts before the whole model's decoder only")
    writer.refused += [f"{name}: PEFT trains nothing beside prompts" for name in writer.values.found]
    writer.tensors[KEY] = delta.prompts
    config: Any = writer.model.config
    return {
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "token_dim": delta.prompts.shape[1],
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
        **_prompted(writer, delta.prompts.shape[0]),
    }


def read_prefix(reader: Reader) -> list[Item]:
    """A prefix in every attention of a decoder with rotary positions."""
    n = reader.count(reader.config.get("num_virtual_tokens"), "num_virtual_tokens")
    layers = _attentions(reader.modules)
    reason = _no_rotary(reader.modules, layers)
    if reason is None and reader.config.get("num_transformer_submodules", 1) not in (1, None):
        reason = "PEFT's prefix of an encoder-decoder has no counterpart here"
    if reason is not None:
        reader.refused.append(reason)
        return []
    heads, width = _key_heads(next(iter(layers.values())))
    given = reader.take(KEY, (n, 2 * len(layers) * heads * width))
    if given is None:
        return []
    found = []
    for (path, owner), pair in zip(layers.items(), given.view(n, len(layers), 2, heads, width).unbind(1), strict=True):
        K = turned(reader.modules, owner, pair[:, 0], -n)
        tensors = {"K": K.flatten(1), "V": pair[:, 1].flatten(1)}
        found.append(Item(Site(path, "call"), Prefix(num_tokens=n), tensors))
    return found


def write_prefix(writer: Writer, wholes: list[str]) -> dict[str, Any]:
    """PREFIX_TUNING, whose files hold nothing else."""
    layers = _attentions(writer.modules)
    given = {path: deltas[0] for (path, _), deltas in writer.sites.items()}
    pairs = {path: cast(Prefixed, delta.method).prefix(delta) for path, delta in given.items()}
    sizes = {len(K) for K, _ in pairs.values()}
    reason = _no_rotary(writer.modules, layers)
    if reason is not None:
        writer.refused.append(reason)
    elif given.keys() != layers.keys() or len(sizes) > 1:
        missed = sorted(given.keys() ^ layers.keys())[:3] or "prefixes of several lengths"
        writer.refused.append(f"PEFT has a prefix of one length in every attention of the decoder: {missed}")
    writer.refused += [f"{name}: PEFT trains nothing beside a prefix" for name in writer.values.found]
    if writer.refused:
        return {}
    (n,) = sizes
    heads, width = _key_heads(next(iter(layers.values())))
    parts = []
    for path, owner in layers.items():
        K, V = (t.detach() for t in pairs[path])
        parts += [turned(writer.modules, owner, K.view(n, heads, width), n).flatten(1), V]
    writer.tensors[KEY] = torch.cat(parts, 1)
    return {
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "token_dim": heads * width,
        "num_attention_heads": heads,
        "num_layers": len(layers),
        **_prompted(writer, n),
    }


def _prompted(writer: Writer, n: int) -> dict[str, Any]:
    head = writer.model.get_output_embeddings()  # type: ignore[operator]
    return {
        "num_transformer_submodules": 1,
        "num_virtual_tokens": n,
        "task_type": "CAUSAL_LM" if head is not None else "FEATURE_EXTRACTION",
    }


# --- the attention of a decoder --------------------------------------------------------------------------------------


def _attentions(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The decoder's attentions by path, in the order of their layers."""
    found = [
        (p, m) for p, m in modules.items() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "head_dim")
    ]
    return dict(sorted(found, key=lambda pair: pair[1].layer_idx))  # type: ignore[arg-type, return-value]


def _key_heads(owner: nn.Module) -> tuple[int, int]:
    """(key heads, width of one)."""
    config: Any = owner.config
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads), int(owner.head_dim)  # type: ignore[arg-type]


def _rotary(modules: dict[str, nn.Module]) -> list[nn.Module]:
    return [m for path, m in modules.items() if path.rpartition(".")[2] == "rotary_emb"]


def _no_rotary(modules: dict[str, nn.Module], layers: dict[str, nn.Module]) -> str | None:
    """Why a prefix of PEFT's has no counterpart in this model, or None."""
    tables = _rotary(modules)
    if (
        not layers
        or len({id(m) for m in tables}) != 1
        or not hasattr(sys.modules[type(next(iter(layers.values()))).__module__], "apply_rotary_pos_emb")
    ):
        return (
            "PEFT's prefix moves the tokens' positions, which only a decoder with one table of rotary positions makes "
            "up for"
        )
    if float(getattr(tables[0], "attention_scaling", 1.0)) != 1.0:
        return "PEFT's prefix is not scaled as the rotary table of this model scales its keys"
    if any(getattr(m, "sliding_window", None) for m in layers.values()):
        return "PEFT's prefix leaves the sliding window of this model's attention, ours is always seen"
    return None


def turned(modules: dict[str, nn.Module], owner: nn.Module, K: Tensor, by: int) -> Tensor:
    """Keys [n, heads, width] turned by a number of positions, by the model's own rotary table and function."""
    apply: Any = sys.modules[type(owner).__module__].apply_rotary_pos_emb
    (table, *_) = _rotary(modules)
    device = next((b.device for b in table.buffers()), K.device)
    keys = K.to(device).transpose(0, 1).unsqueeze(0)  # [1, heads, n, width]
    with torch.no_grad():
        cos, sin = table(keys, torch.full((1, len(K)), by, device=device))
        moved: Tensor = apply(keys, keys, cos, sin)[1].squeeze(0).transpose(0, 1)
        return moved.to(K)
