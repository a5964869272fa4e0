"""Rows of an embedding trained alone: PEFT's TRAINABLE_TOKENS, and `trainable_token_indices` beside LoRA.

PEFT stores the new rows, `trainable_tokens_delta` [tokens, width] (below `token_adapter.` beside LoRA). Here they are a
RoCoFT on columns of the embedding's matrix [width, vocabulary], which stores their change. Where the model ties its
head to the embedding, both sides follow it there too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta, wide
from mmpeft.adapters.methods.selective import RoCoFT
from mmpeft.adapters.peft.codecs import Item

if TYPE_CHECKING:
    from mmpeft.adapters.peft.read import Reader
    from mmpeft.adapters.peft.write import Writer

ALONE, BESIDE = "trainable_tokens_delta", "token_adapter.trainable_tokens_delta"


def read_tokens(reader: Reader) -> list[Item]:
    """TRAINABLE_TOKENS."""
    ids = reader.config.get("token_indices") or ()
    if reader.config.get("target_modules") is None:
        paths = [_input_embedding(reader.model, reader.modules)]
    else:
        paths = reader.targets(lambda m: isinstance(m, nn.Embedding), "TRAINABLE_TOKENS")
    reader.wrappers |= dict.fromkeys(paths, 1)
    return [item for path in paths for item in _rows(reader, path, f"{path}.{ALONE}", ids)]


def read_tokens_beside(reader: Reader) -> list[Item]:
    """The tokens of a LoRA configuration."""
    given = reader.config.get("trainable_token_indices")
    if not given:
        return []
    if not isinstance(given, Mapping):
        given = {_input_embedding(reader.model, reader.modules): given}
    found = []
    for name, ids in given.items():
        for path in [p for p in reader.modules if p == name or p.endswith(f".{name}")]:
            found += _rows(reader, path, f"{path}.{BESIDE}", ids)
    return found


def _input_embedding(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """Path of a transformers model's input embedding; PEFT's guess `embed_tokens` elsewhere."""
    table = getattr(model, "get_input_embeddings", lambda: None)()
    return next((path for path, module in modules.items() if module is table), "embed_tokens")


def _rows(reader: Reader, path: str, key: str, ids: Sequence[int]) -> list[Item]:
    owner = reader.modules.get(path)
    if not isinstance(owner, nn.Embedding):
        reader.refused.append(f"{path}: tokens are rows of an embedding, which this is not")
        return []
    index = torch.tensor(list(ids), dtype=torch.int64)
    given = reader.take(key, (len(index), owner.embedding_dim))
    site = reader.site(path, "weight")
    if given is None or site is None:
        return []
    if not len(index) or int(index.min()) < 0 or int(index.max()) >= owner.num_embeddings or len(set(ids)) < len(ids):
        reader.refused.append(f"{path}: token_indices {list(ids)[:8]} are no distinct rows of {owner.num_embeddings}")
        return []
    if _tied(reader.model, owner):  # PEFT saves the rows once more under the head's name
        for other in reader.names[id(owner.weight)]:
            again = reader.left.get(f"{other.removesuffix('.weight')}.{ALONE}")
            if again is not None and torch.equal(again, given):
                reader.left.pop(f"{other.removesuffix('.weight')}.{ALONE}")
    elif not reader.alone(site):
        return []
    base = owner.weight.detach().cpu()[index]
    change = given.to(wide(base.dtype)) - base.to(wide(base.dtype))
    return [Item(site, RoCoFT(rank=len(index), axis="columns"), {"delta": change.mT, "index": index})]


def _tied(model: nn.Module, owner: nn.Module) -> bool:
    """Whether PEFT follows this embedding into a tied head: a transformers model that says so."""
    config = getattr(model, "config", None)
    table = getattr(model, "get_input_embeddings", lambda: None)()
    return table is owner and bool(getattr(config, "tie_word_embeddings", False))


def can_write(model: nn.Module, owner: nn.Module, delta: Delta, alone: bool) -> bool:
    """Whether a RoCoFT delta is rows of an embedding that PEFT can train."""
    columns = isinstance(delta.method, RoCoFT) and delta.method.axis == "columns"
    return columns and isinstance(owner, nn.Embedding) and (alone or _tied(model, owner))


def new_rows(writer: Writer, path: str, delta: Delta) -> tuple[list[int], Tensor]:
    """The token ids and their rows [tokens, width] under the adapter."""
    base = writer.matrix(path, "weight")[:, delta.index]
    return delta.index.tolist(), (base.to(delta.delta.dtype) + delta.delta.detach()).mT


def write_tokens(writer: Writer, wholes: list[str]) -> dict[str, Any]:
    """TRAINABLE_TOKENS, whose configuration has one list of ids."""
    ids: list[int] = []
    for path, delta in writer.tokens.items():
        here, rows = new_rows(writer, path, delta)
        if ids and here != ids:
            writer.refused.append(
                f"{path}: PEFT has one list of token ids for all embeddings, {len(here)} here and {len(ids)} elsewhere"
            )
        ids = here
        writer.tensors[f"{path}.{ALONE}"] = rows
    writer.targets = dict.fromkeys(writer.tokens)
    writer.wrappers = dict.fromkeys(writer.tokens, 1)
    return {"peft_type": "TRAINABLE_TOKENS", "token_indices": ids, "target_modules": list(writer.tokens)}


def write_tokens_beside(writer: Writer) -> dict[str, Any]:
    """The field of a LoRA configuration."""
    found = {}
    for path, delta in writer.tokens.items():
        found[path], rows = new_rows(writer, path, delta)
        if path in writer.targets:
            writer.refused.append(f"{path}: PEFT trains tokens of an embedding or adapts it, not both")
        writer.tensors[f"{path}.{BESIDE}"] = rows
    return {"trainable_token_indices": found or None}
