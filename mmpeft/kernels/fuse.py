"""Finding the parts of a Llama-type model by structure, and proving that the fused step computes the same function.

Nothing is decided by class name: a model fits when it has an embedding, a list of blocks with the seven linears and
two RMS norms and nothing else, a final norm and a head. What does not fit is refused with the reason. The fused
hidden states and loss are then compared with the model's own on random tokens, so an unknown variation (a gate, a
scaled residual) is refused too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmpeft.errors import NameNotFound, Unsupported, nearest
from mmpeft.kernels.group import Group
from mmpeft.kernels.llama import FusedLlama
from mmpeft.kernels.llama_block import Block
from mmpeft.kernels.packed import PackedGroup
from mmpeft.kernels.stored import Ring, Stored, StoredGroup

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
AdapterOf = Callable[[nn.Module], "LowRank | None"]
StorageOf = Callable[[Tensor], Stored | None]  # how a weight that is not dense is written out


class LowRank(NamedTuple):
    """An adapter of one linear: masters A [r, in], B [out, r], and the scale of B A; m [out] makes it DoRA."""

    A: Tensor
    B: Tensor
    scale: float
    m: Tensor | None = None


def from_model(
    model: Any,
    adapters: Mapping[str, LowRank],
    *,
    dropout: float = 0.0,
    attached: bool = False,
    check: bool = True,
    tolerance: float | None = None,
    others: Sequence[Tensor] = (),
    storage: StorageOf = lambda _: None,
) -> FusedLlama:
    """The fused form of a causal LM of transformers, or of its decoder alone, with `adapters` by the linears' paths from
    `model`.

    The packed buffers become the storage of the model's own weights (same values, padded rows), so nothing is stored
    twice. `dropout` acts on every adapter's input in training. `attached` says that the model's own forward already
    applies these adapters (their masters may be its parameters). With `check`, the last hidden states and the loss on
    random tokens (the states alone for a decoder without a head; with the adapters where they are attached, else without) must agree with the model's own within
    `tolerance` (relative; by default 1e-1 in half precision, 1e-4 in fp32). `others`: parameters below the blocks that
    take no part, as those of other adapters. `storage` tells which weights are kept in few bits: they stay so, and a group
    that has one is made dense for each of its products, in an area all such groups share (`stored`).

    Raises:
        Unsupported: the model's structure or a numeric check does not fit; the message says where.
        NameNotFound: an adapter for a path that is no linear of the blocks.
    """
    decoder = _decoder(model)
    paths = {id(m): name for name, m in model.named_modules()}
    unused = dict(adapters)
    masters = {id(t) for a in adapters.values() for t in (a.A, a.B, a.m)} | {id(t) for t in others}
    parts = _Parts(lambda m: unused.pop(paths[id(m)], None), storage, Ring())
    packed = [_block(layer, parts, paths[id(layer)], masters) for layer in decoder.layers]
    if unused:
        known = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise NameNotFound(f"no fused linear at {min(unused)!r}{nearest(min(unused), known)}")
    attention = packed[0][1]
    d = attention.head_dim
    has_head = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None
    head = (model.get_output_embeddings() if has_head else decoder.embed_tokens).weight
    if any(storage(w) is not None for w in (head, decoder.embed_tokens.weight)):
        raise Unsupported("embedding or head is kept in few bits; the fused step reads both dense")
    fused = FusedLlama(
        embedding=decoder.embed_tokens.weight.detach(),
        blocks=[block for block, _ in packed],
        final_norm=decoder.norm.weight.detach(),
        head=head.detach(),
        eps=_eps(decoder.norm, "norm"),
        inv_freq=decoder.rotary_emb.inv_freq.detach().float(),
        heads=packed[0][0].qkv.packed.outs[0] // d,
        kv_heads=packed[0][0].qkv.packed.outs[1] // d,
        scale=float(attention.scaling),
        rope_scale=float(getattr(decoder.rotary_emb, "attention_scaling", 1.0)),
        dropout=dropout,
    )
    if check:
        _prove(model if has_head else None, decoder, fused, attached, tolerance or (1e-1 if head.element_size() < 4 else 1e-4))
    return fused


def _decoder(model: Any) -> Any:
    for module in model.modules():
        if all(hasattr(module, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
            return module
    raise Unsupported(
        f"{type(model).__name__} has no module with embed_tokens, layers, norm and rotary_emb: no Llama-type decoder"
    )


class _Parts(NamedTuple):
    """Where a group's parts come from."""

    adapter_of: AdapterOf
    storage: StorageOf
    ring: Ring


def _block(layer: nn.Module, parts: _Parts, path: str, masters: set[int]) -> tuple[Block, Any]:
    attention: Any = next((m for m in layer.children() if all(hasattr(m, n) for n in ATTENTION)), None)
    mlp: Any = next((m for m in layer.children() if all(hasattr(m, n) for n in MLP)), None)
    norms: list[Any] = [getattr(layer, n, None) for n in NORMS]
    if attention is None or mlp is None or norms[0] is None or norms[1] is None:
        raise Unsupported(f"{path}: expected {', '.join(ATTENTION + MLP + NORMS)}")
    linears = [getattr(attention, n) for n in ATTENTION] + [getattr(mlp, n) for n in MLP]
    for name, linear in zip(ATTENTION + MLP, linears, strict=True):
        if not isinstance(linear, nn.Linear):
            raise Unsupported(f"{path}: {name} is a {type(linear).__name__}, not a Linear")
    known = {id(p) for m in (*linears, *norms) for p in m.parameters()}
    extra = [name for name, p in layer.named_parameters() if id(p) not in known and id(p) not in masters]
    if extra:
        raise Unsupported(f"{path} has parameters that a Llama block has not: {', '.join(extra[:3])}")
    if not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ != "SiLUActivation":
        raise Unsupported(f"{path}: activation {type(mlp.act_fn).__name__}; expected SiLU")
    if getattr(attention, "sliding_window", None):
        raise Unsupported(f"{path}: sliding-window attention")
    trainable = [name for name, p in layer.named_parameters() if p.requires_grad and id(p) not in masters]
    if trainable:
        raise Unsupported(f"{path}.{trainable[0]} requires a gradient; the fused blocks' base is frozen")
    q, k, v, o, gate, up, down = linears
    block = Block(
        norms[0].weight.detach(), _group([q, k, v], parts), _group([o], parts),
        norms[1].weight.detach(), _group([gate, up], parts), _group([down], parts),
    )  # fmt: skip
    return block, attention


def _group(linears: list[Any], parts: _Parts) -> Group:
    found = [parts.adapter_of(m) for m in linears]
    weights = [m._parameters["weight"] for m in linears]  # the base's own, whatever the attribute shows
    biases = [None if m.bias is None else m.bias.detach() for m in linears]
    ranks = [0 if a is None else a.A.shape[0] for a in found]
    scales = [1.0 if a is None else a.scale for a in found]
    elsewhere = [parts.storage(w) for w in weights]
    packed: PackedGroup
    if any(s is not None for s in elsewhere):
        stored = [Stored.of(w.detach()) if s is None else s for w, s in zip(weights, elsewhere, strict=True)]
        packed = StoredGroup(stored, biases, ranks, scales, ring=parts.ring)
    else:
        packed = PackedGroup([w.detach() for w in weights], biases, ranks, scales)
        for w, view in zip(weights, packed.weights, strict=True):
            w.data = view
    masters = [None if a is None else (a.A, a.B) for a in found]
    return Group(packed, masters, magnitudes=[None if a is None else a.m for a in found])


def _eps(norm: Any, path: str) -> float:
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(norm, name, None), float):
            return float(getattr(norm, name))
    raise Unsupported(f"{path} ({type(norm).__name__}) has no epsilon: no RMS norm")


@torch.no_grad()
def _prove(model: Any, decoder: Any, fused: FusedLlama, attached: bool, tolerance: float) -> None:
    device, V = fused.embedding.device, fused.embedding.shape[0]
    ids = torch.randint(0, V, (2, 19), generator=torch.Generator().manual_seed(0)).to(device)
    if not attached:
        for slot in fused.slots:
            slot.copy.zero_()
        for group, _ in fused.scaled:
            assert group.magnitude is not None
            group.magnitude.scaling.factor.fill_(1)
    whole = decoder if model is None else model
    modes = [(m, m.training) for m in whole.modules()]  # each its own: `train()` would wake frozen parts
    whole.eval()
    own = decoder(input_ids=ids).last_hidden_state.flatten(0, 1).float()
    own_loss = own.new_ones(()) if model is None else model(input_ids=ids, labels=ids).loss
    for m, mode in modes:
        m.training = mode
    x = torch.nn.functional.embedding(ids, fused.embedding)
    ours, ours_loss = fused.last_states(x).flatten(0, 1).float(), own_loss if model is None else fused.forward(x, ids)[0]
    fused.refresh()
    error = float(((ours - own).norm() / own.norm()).maximum((ours_loss - own_loss).abs() / own_loss.abs()))
    if not error <= tolerance:
        raise Unsupported(
            f"the fused forward differs from the model's own by {error:.1e}, relatively (expected at most "
            f"{tolerance:.0e}): not the same function"
        )
