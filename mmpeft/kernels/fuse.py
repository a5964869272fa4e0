"""Finding the parts of a Llama-type model by structure, and proving that the fused step computes the same function.

Nothing is decided by class name: a model fits when it has an embedding, a list of blocks with the seven linears and two RMS norms
and nothing else, a final norm and a head. What does not fit is refused with the reason. The fused hidden states and loss are then
compared with the model's own on random tokens, so an unknown variation (a gate, a scaled residual) is refused too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmpeft.errors import NameNotFound, Unsupported, nearest
from mmpeft.kernels.llama import Block, FusedLlama, Group
from mmpeft.kernels.packed import PackedGroup

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


class LowRank(NamedTuple):
    """An adapter of one linear: masters A [r, in], B [out, r], and the scale of B A."""

    A: Tensor
    B: Tensor
    scale: float


def from_model(
    model: nn.Module, adapters: Mapping[str, LowRank], *, check: bool = True, tolerance: float | None = None
) -> FusedLlama:
    """The fused form of a causal LM of transformers, with `adapters` by the linears' paths from `model`.

    The packed buffers become the storage of the model's own weights (same values, padded rows), so nothing is stored twice.
    With `check`, the last hidden states and the loss without adapters, on random tokens, must agree with the model's own within
    `tolerance` (relative; by default 1e-1 in half precision, 1e-4 in fp32).

    Raises:
        Unsupported: the model's structure or a numeric check does not fit; the message says where.
        NameNotFound: an adapter for a path that is no linear of the blocks.
    """
    decoder = _decoder(model)
    paths = {id(m): name for name, m in model.named_modules()}
    unused = dict(adapters)
    packed = [_block(layer, lambda m: unused.pop(paths[id(m)], None), paths[id(layer)]) for layer in decoder.layers]
    if unused:
        known = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise NameNotFound(f"no fused linear at {min(unused)!r}{nearest(min(unused), known)}")
    attention = packed[0][1]
    d = attention.head_dim
    head = model.get_output_embeddings().weight
    fused = FusedLlama(
        embedding=decoder.embed_tokens.weight.detach(),
        blocks=[block for block, _ in packed],
        final_norm=decoder.norm.weight.detach(),
        head=head.detach(),
        eps=_eps(decoder.norm, "norm"),
        inv_freq=decoder.rotary_emb.inv_freq.detach().float(),
        heads=attention.q_proj.weight.shape[0] // d,
        kv_heads=attention.k_proj.weight.shape[0] // d,
        scale=float(attention.scaling),
        rope_scale=float(getattr(decoder.rotary_emb, "attention_scaling", 1.0)),
    )
    if check:
        _prove(model, decoder, fused, tolerance or (1e-1 if head.element_size() < 4 else 1e-4))
    return fused


def _decoder(model: nn.Module) -> Any:
    for module in model.modules():
        if all(hasattr(module, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
            return module
    raise Unsupported(
        f"{type(model).__name__} has no module with embed_tokens, layers, norm and rotary_emb: no Llama-type decoder"
    )


def _block(layer: nn.Module, adapter_of, path: str) -> tuple[Block, nn.Module]:  # type: ignore[no-untyped-def]
    attention = next((m for m in layer.children() if all(hasattr(m, n) for n in ATTENTION)), None)
    mlp = next((m for m in layer.children() if all(hasattr(m, n) for n in MLP)), None)
    norms = [getattr(layer, n, None) for n in NORMS]
    if attention is None or mlp is None or None in norms:
        raise Unsupported(f"{path}: expected {', '.join(ATTENTION + MLP + NORMS)}")
    linears = [getattr(attention, n) for n in ATTENTION] + [getattr(mlp, n) for n in MLP]
    for name, linear in zip(ATTENTION + MLP, linears, strict=True):
        if not isinstance(linear, nn.Linear):
            raise Unsupported(f"{path}: {name} is a {type(linear).__name__}, not a Linear")
    known = {id(p) for m in (*linears, *norms) for p in m.parameters()}
    extra = [name for name, p in layer.named_parameters() if id(p) not in known]
    if extra:
        raise Unsupported(f"{path} has parameters that a Llama block has not: {', '.join(extra[:3])}")
    if not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ != "SiLUActivation":
        raise Unsupported(f"{path}: activation {type(mlp.act_fn).__name__}; expected SiLU")
    if getattr(attention, "sliding_window", None):
        raise Unsupported(f"{path}: sliding-window attention")
    trainable = [name for name, p in layer.named_parameters() if p.requires_grad]
    if trainable:
        raise Unsupported(f"{path}.{trainable[0]} requires a gradient; the fused blocks' base is frozen")
    q, k, v, o, gate, up, down = linears
    block = Block(
        norms[0].weight.detach(), _group([q, k, v], adapter_of), _group([o], adapter_of),
        norms[1].weight.detach(), _group([gate, up], adapter_of), _group([down], adapter_of),
    )  # fmt: skip
    return block, attention


def _group(linears: list[nn.Linear], adapter_of) -> Group:  # type: ignore[no-untyped-def]
    found = [adapter_of(m) for m in linears]
    packed = PackedGroup(
        [m.weight.detach() for m in linears],
        [None if m.bias is None else m.bias.detach() for m in linears],
        [0 if a is None else a.A.shape[0] for a in found],
        [1.0 if a is None else a.scale for a in found],
    )
    for m, view in zip(linears, packed.weights, strict=True):
        m.weight.data = view
    return Group(packed, [None if a is None else (a.A, a.B) for a in found])


def _eps(norm: nn.Module, path: str) -> float:
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(norm, name, None), float):
            return float(getattr(norm, name))
    raise Unsupported(f"{path} ({type(norm).__name__}) has no epsilon: no RMS norm")


@torch.no_grad()
def _prove(model: nn.Module, decoder: nn.Module, fused: FusedLlama, tolerance: float) -> None:
    device, V = fused.embedding.device, fused.embedding.shape[0]
    ids = torch.randint(0, V, (2, 19), generator=torch.Generator().manual_seed(0)).to(device)
    kept = [slot.copy.clone() for slot in fused.slots]
    for slot in fused.slots:
        slot.copy.zero_()
    training = model.training
    model.eval()
    own, own_loss = (
        decoder(input_ids=ids).last_hidden_state.flatten(0, 1).float(),
        model(input_ids=ids, labels=ids).loss,
    )
    model.train(training)
    x = torch.nn.functional.embedding(ids, fused.embedding)
    ours, ours_loss = fused.hidden(x)[0].float(), fused.forward(x, ids)[0]
    for slot, value in zip(fused.slots, kept, strict=True):
        slot.copy.copy_(value)
    error = float(((ours - own).norm() / own.norm()).maximum((ours_loss - own_loss).abs() / own_loss.abs()))
    if not error <= tolerance:
        raise Unsupported(
            f"the fused forward differs from the model's own by {error:.1e} (relative; at most {tolerance:.0e} expected): "
            "not the same function"
        )
