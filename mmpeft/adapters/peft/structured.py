"""C3A, FourierFT, SHiRA, DeLoRA, AdaLoRA and BEFT, as PEFT stores them.

    C3A         c3a_kernel [out / b, in / b, b]
    FOURIERFT   fourierft_spectrum [n]; the places come from random_loc_seed
    SHIRA       shira_weight [n], shira_indices [2, n] (row, column); n = r (in + out)
    DELORA      delora_A [r, in], delora_B [out, r], delora_lambda [1], delora_w_norm [in]
    ADALORA     lora_A [r, in], lora_E [r, 1], lora_B [out, r], masked triplets left out by rank_pattern
    BEFT        beft_bias [1, out], added to the output: a delta on the bias (`values.py` writes it)

Every sparse method whose entries are single weights is written as SHiRA, its number of entries rounded up to a multiple
of in + out by zeros at unused places. AdaLoRA's scale is alpha / (init_r + 1e-5), folded into lam.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mmpeft.adapters.methods.circulant import C3A, FourierFT
from mmpeft.adapters.methods.dynamic_rank import AdaLoRA
from mmpeft.adapters.methods.lora_kin import DeLoRA
from mmpeft.adapters.methods.selective import BitFit
from mmpeft.adapters.methods.sparse import SHiRA
from mmpeft.adapters.peft.codec import Codec, Place, Sent, Source, widen
from mmpeft.adapters.peft.codecs import Item, fit_rank
from mmpeft.adapters.peft.layers import foreign_padding, grouped
from mmpeft.adapters.peft.targets import plain_number
from mmpeft.adapters.site import weight_site
from mmpeft.errors import ConfigError, Unsupported

# --- C3A and FourierFT -----------------------------------------------------------------------------------------------


def _read_c3a(place: Place) -> Item | None:
    b, (out, into) = place.count("block_size", 256), place.site.shape
    found = place.take(c3a_kernel=(out // b, into // b, b))
    return None if found is None else Item(place.site, C3A(block_size=b), {"w": found[0]})


C3A_CODEC = Codec(
    kind="C3A",
    methods=("c3a",),
    layers=(nn.Linear,),
    leaves={"c3a_kernel": ""},
    read=_read_c3a,
    write=lambda source: ({"c3a_kernel": source.delta.w.detach()}, {"block_size": source.method.block_size}),
    patterns={"block_size": "block_size_pattern"},
    late_patterns=True,
    fixed={"bias": "none"},
)


def _read_fourierft(place: Place) -> Item | None:
    n = place.count("n_frequency", 1000)
    method = FourierFT(n=n, scale=place.number("scaling", 150.0), seed=int(place.value("random_loc_seed", 777)))
    found = place.take(fourierft_spectrum=(n,))
    return None if found is None else Item(place.site, method, {"c": found[0]})


def _write_fourierft(source: Source) -> Sent:
    method = source.method
    fields = {"n_frequency": method.n, "scaling": method.scale, "random_loc_seed": method.seed}
    return {"fourierft_spectrum": source.delta.c.detach()}, fields


FOURIERFT = Codec(
    kind="FOURIERFT",
    methods=("fourierft",),
    layers=(nn.Linear,),
    hf_conv1d=True,
    leaves={"fourierft_spectrum": ""},
    read=_read_fourierft,
    write=_write_fourierft,
    patterns={"n_frequency": "n_frequency_pattern"},
    late_patterns=True,
    fixed={"bias": "none"},
)


# --- SHiRA and all single entries ------------------------------------------------------------------------------------


def _read_shira(place: Place) -> Item | None:
    r, (out, into) = place.count("r", 32), place.site.shape
    n = r * (out + into)
    found = place.take(shira_weight=(n,), shira_indices=(2, n))
    if found is None:
        return None
    value, places = found[0], found[1].long()
    if not bool(((places >= 0) & (places < torch.tensor([[out], [into]]))).all()):
        place.refuse(f"shira_indices point outside of {(out, into)}")
        return None
    return Item(place.site, SHiRA(count=n, rank=r), {"value": value, "index": places[0] * into + places[1]})


def _write_shira(source: Source) -> Sent:
    out, into = source.site.shape
    index = torch.cat([d.index + (d.site.rows or (0, 0))[0] * into for d in source.deltas])
    if bool((index < 0).any()):
        raise ConfigError("its places are not chosen yet")
    value = torch.cat([d.value.detach() for d in source.deltas])
    return {"shira_weight": value, "shira_indices": index}, {"r": -(-index.numel() // (out + into))}


def _shira_even(sent: dict[str, Sent], sources: Mapping[str, Source]) -> None:
    """One r: zeros at unused places up to r (in + out) of them."""
    r = max(fields["r"] for _, fields in sent.values())
    for path, (tensors, _) in sent.items():
        (out, into), index, value = sources[path].site.shape, tensors["shira_indices"], tensors["shira_weight"]
        more = r * (out + into) - index.numel()
        if r * (out + into) > out * into:
            raise Unsupported(
                f"{path}: PEFT's SHiRA has r (in + out) entries with one r for all modules; r = {r} is needed, and the "
                f"matrix has {out * into}"
            )
        free = torch.ones(out * into, dtype=torch.bool, device=index.device)
        free[index] = False
        index = torch.cat([index, free.nonzero().flatten()[:more]])
        places = torch.stack([index // into, index % into]).int()
        sent[path] = {"shira_weight": torch.cat([value, value.new_zeros(more)]), "shira_indices": places}, {"r": r}


SHIRA = Codec(
    kind="SHIRA",
    methods=("shira", "sparse", "fishmask", "pafi", "child-tuning-d", "lt-sft"),
    layers=(nn.Linear,),
    leaves={"shira_weight": "", "shira_indices": ""},
    read=_read_shira,
    write=_write_shira,
    even=_shira_even,
    fixed={"mask_type": "random", "fan_in_fan_out": False},
    slices=True,
)


# --- DeLoRA and AdaLoRA ----------------------------------------------------------------------------------------------


def _read_delora(place: Place) -> Item | None:
    r, lam, (out, into) = place.count("r", 8), place.number("delora_lambda", 15), place.site.shape
    found = place.take(delora_A=(r, into), delora_B=(out, r), delora_lambda=(1,), delora_w_norm=(into,))
    if found is None:
        return None
    tensors = dict(zip(("A", "B", "lam", "norms"), found, strict=True))
    return Item(place.site, DeLoRA(rank=r, lam=lam, dropout=place.dropout()), tensors)


def _write_delora(source: Source) -> Sent:
    d = source.delta
    tensors = {"delora_A": d.A, "delora_B": d.B, "delora_lambda": d.lam, "delora_w_norm": d.norms}
    return tensors, {"r": source.method.rank, "delora_lambda": plain_number(source.method.lam)}


DELORA = Codec(
    kind="DELORA",
    methods=("delora",),
    layers=(nn.Linear,),
    leaves=dict.fromkeys(("delora_A", "delora_B", "delora_lambda", "delora_w_norm"), ""),
    read=_read_delora,
    write=_write_delora,
    patterns={"r": "rank_pattern", "delora_lambda": "lambda_pattern"},
    fixed={"bias": "none"},
    dropout="module_dropout",
)


def _read_adalora(place: Place) -> Item | None:
    r, alpha = place.count("init_r", 12), place.number("lora_alpha", 8)
    out, into = place.site.shape
    kept = (place.reader.config.get("rank_pattern") or {}).get(f"{place.path}.lora_E")
    used = r if kept is None else sum(map(bool, kept))
    found = place.take(lora_A=(used, into), lora_E=(used, 1), lora_B=(out, used))
    if found is None or used == 0:  # everything of this site was pruned
        return None
    A, E, B = found
    scale = (alpha if alpha > 0 else r) / (r + 1e-5)
    Q, P = fit_rank(A, B) if used <= min(out, into) else fit_rank(A * E, B)
    lam = E.flatten() if used <= min(out, into) else torch.ones(Q.shape[0], dtype=Q.dtype)
    rank = Q.shape[0]
    method = AdaLoRA(rank=rank, alpha=scale * rank, dropout=place.dropout())
    return Item(place.site, method, {"P": P, "lam": lam, "Q": Q, "mask": torch.ones(rank)})


def _write_adalora(source: Source) -> Sent:
    Q, P = source.joined("Q", "P")
    lam = torch.cat([d.lam.detach() * d.method.scale for d in source.deltas])  # type: ignore[attr-defined]
    return {"lora_A": Q, "lora_E": lam.unsqueeze(1), "lora_B": P}, {"init_r": Q.shape[0]}


def _adalora_even(sent: dict[str, Sent], sources: Mapping[str, Source]) -> None:
    """PEFT has one init_r: smaller sites get triplets of zeros. Its scale is then 1 up to the 1e-5 that it adds."""
    rank = max(fields["init_r"] for _, fields in sent.values())
    for path, (tensors, _) in sent.items():
        Q, E, P = widen(rank, (tensors["lora_A"], 0), (tensors["lora_E"], 0), (tensors["lora_B"], 1))
        wider = {"lora_A": Q, "lora_E": E * ((rank + 1e-5) / rank), "lora_B": P}
        sent[path] = wider, {"init_r": rank, "target_r": rank, "lora_alpha": rank}


ADALORA = Codec(
    kind="ADALORA",
    methods=("adalora",),
    layers=(nn.Linear, nn.Conv2d),
    hf_conv1d=True,
    leaves=dict.fromkeys(("lora_A", "lora_E", "lora_B"), ""),
    read=_read_adalora,
    write=_write_adalora,
    even=_adalora_even,
    fixed={"bias": "none", "total_step": 1, "orth_reg_weight": 0.5},
    dropout="lora_dropout",
    unfit=grouped,
    differs=foreign_padding,
    slices=True,
)


# --- BEFT: a bias added to the output --------------------------------------------------------------------------------


def _read_beft(place: Place) -> Item | None:
    found = place.take(beft_bias=(1, place.site.shape[0]))
    if place.owner._parameters.get("bias") is None:
        place.refuse("BEFT adds a bias to a layer that has none")
        return None
    if found is None:
        return None
    return Item(weight_site(place.path, place.owner, "bias"), BitFit(), {"delta": found[0].flatten()})


BEFT = Codec(
    kind="BEFT",
    methods=(),
    layers=(nn.Linear,),
    leaves={"beft_bias": ""},
    read=_read_beft,
    write=lambda source: ({}, {}),
)
