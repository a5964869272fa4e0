"""GraLoRA and MiSS: low-rank updates in blocks, as PEFT stores them.

    GRALORA   gralora_A [k, in / k, r], gralora_B [k, r, out / k], gralora_A_general, gralora_B_general
    MISS      miss_block [r, out]; "bat" [out / r, r, r]; "mini" [r, mini_r], repeated along the output
    BONE      the earlier name of MiSS, bone_block; read only, as today's PEFT has no such type

"mini" is read as the block it stands for, its copies no longer trained as one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from mmpeft.adapters.methods.blocks import GraLoRA, MiSS
from mmpeft.adapters.peft.codec import Codec, Place, Sent, Source
from mmpeft.adapters.peft.codecs import Item
from mmpeft.adapters.peft.targets import plain_number
from mmpeft.errors import ConfigError

# --- GraLoRA ---------------------------------------------------------------------------------------------------------


def _read_gralora(place: Place) -> Item | None:
    r, k, hybrid = place.count("r", 32), place.count("gralora_k", 2), int(place.value("hybrid_r", 0))
    alpha, (out, into) = place.number("alpha", 64), place.site.shape
    method = GraLoRA(rank=r, k=k, hybrid_rank=hybrid, alpha=alpha, dropout=place.dropout())
    shapes: dict[str, tuple[int, ...]] = {"gralora_A": (k, into // k, r), "gralora_B": (k, r, out // k)}
    if hybrid:
        shapes |= {"gralora_A_general": (hybrid, into), "gralora_B_general": (out, hybrid)}
    found = place.take(**shapes)
    if found is None:
        return None
    tensors = {"A": found[0].mT, "B": found[1].mT} | dict(zip(("A_hybrid", "B_hybrid"), found[2:], strict=False))
    return Item(place.site, method, tensors)


def _write_gralora(source: Source) -> Sent:
    delta, method = source.delta, source.method
    tensors = {"gralora_A": delta.A.mT, "gralora_B": delta.B.mT}
    if method.hybrid_rank:
        tensors |= {"gralora_A_general": delta.A_hybrid, "gralora_B_general": delta.B_hybrid}
    rank = method.rank + method.hybrid_rank
    return tensors, {
        "r": method.rank,
        "gralora_k": method.k,
        "hybrid_r": method.hybrid_rank,
        "alpha": plain_number(method.scale * rank),
    }


GRALORA = Codec(
    kind="GRALORA",
    methods=("gralora",),
    layers=(nn.Linear,),
    hf_conv1d=True,
    leaves={"gralora_A": "", "gralora_B": "", "gralora_A_general": ".weight", "gralora_B_general": ".weight"},
    read=_read_gralora,
    write=_write_gralora,
    fixed={"bias": "none"},
    dropout="gralora_dropout",
)


# --- MiSS ------------------------------------------------------------------------------------------------------------


def _read_miss(place: Place) -> Item | None:
    r, form, (out, _) = place.count("r", 64), place.value("init_weights", True), place.site.shape
    (name,) = place.codec.leaves
    if form == "bat":
        found = place.take(**{name: (out // r, r, r)})
        return None if found is None else Item(place.site, MiSS(rank=r, bat=True), {"D": found[0]})
    width = place.count("mini_r", 1) if form == "mini" else out
    found = place.take(**{name: (r, width)})
    if found is None:
        return None
    method = MiSS(rank=r, dropout=place.dropout())
    return Item(place.site, method, {"D": found[0].mT.repeat(out // width, 1)})


def _write_miss(source: Source) -> Sent:
    bat, delta = source.method.bat, source.delta
    if delta.site.rows is None:
        D = delta.D if bat else delta.D.mT
    else:
        ranks = {d.method.rank for d in source.deltas}  # type: ignore[attr-defined]
        if bat or len(ranks) > 1:
            raise ConfigError("PEFT has one block for a whole weight: slices need one rank and no bat")
        D = torch.stack([source.padded(d, d.D) for d in source.deltas]).sum(0).mT
    return {"miss_block": D}, {"r": source.method.rank, "init_weights": "bat" if bat else True}


MISS = Codec(
    kind="MISS",
    methods=("miss",),
    layers=(nn.Linear,),
    leaves={"miss_block": ""},
    read=_read_miss,
    write=_write_miss,
    fixed={"bias": "none"},
    dropout="miss_dropout",
    slices=True,
)

BONE = replace(MISS, kind="BONE", methods=(), leaves={"bone_block": ""}, dropout=None)
