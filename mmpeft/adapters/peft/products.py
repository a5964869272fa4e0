"""LoHa, LoKr (and KronA), HiRA: updates made of products, as PEFT stores them.

    LOHA      hada_w1_a [out, r], hada_w1_b [r, in], hada_w2_a, hada_w2_b: B1, A1, B2, A2
    LOKR      lokr_w1 [l, m] or its pair, lokr_w2 [k, n, *kernel] or its pair: C and D
    HIRA      hira_A [r, in], hira_B [out, r]; convolutions [r, in, *kernel], [out, r, 1..]; hira_embedding_A, _B

"Effective" convolutions of LoHa and LoKr hold a Tucker core t [r, r, *kernel] between two factors. Core and input
factor multiply to an ordinary second factor of the same rank, which is how they are read: the same weight, the core no longer
trained apart. Row slices are written where disjoint rows add up: one pair of the summed rank.

KronA is written as a LOKR with both factors whole. PEFT derives their sizes from one `decompose_factor`, so that is
chosen to give (a1, a2) at every site, and r large enough that nothing is decomposed; where none does, it is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isqrt

import torch
from torch import Tensor, nn

from mmpeft.adapters.methods.hadamard import HiRA, LoHa
from mmpeft.adapters.methods.kronecker import KronA, LoKr, factor_pair
from mmpeft.adapters.peft.codec import Codec, Place, Sent, Source, widen
from mmpeft.adapters.peft.codecs import Item, fit_rank, is_stock
from mmpeft.adapters.peft.layers import Conv, foreign_padding, grouped, kernel_of
from mmpeft.adapters.peft.targets import plain_number
from mmpeft.errors import ConfigError, Unsupported

_LYCORIS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_RANKS = {"r": "rank_pattern", "alpha": "alpha_pattern"}


def _effective(place: Place) -> bool:
    """Whether a convolution has a Tucker core; PEFT leaves 1 x 1 kernels flat."""
    kernel = kernel_of(place.layout)
    return bool(place.reader.config.get("use_effective_conv2d")) and any(k != 1 for k in kernel)


def _core(t: Tensor, b: Tensor) -> Tensor:
    """Core [r, r, k, l] and input factor [r, c] -> [r, c k l], the second factor they stand for."""
    return torch.einsum("ijkl,jc->ickl", t, b).flatten(1)


# --- LoHa ------------------------------------------------------------------------------------------------------------


def _read_loha(place: Place) -> Item | None:
    r, alpha = place.count("r", 8), place.number("alpha", 8)
    out, into = place.site.shape
    if _effective(place):
        channels, kernel = place.layout.shape[1], (*kernel_of(place.layout), 1)[:2]
        shapes = {"t": (r, r, *kernel), "w_a": (r, out), "w_b": (r, channels)}
        named = {f"hada_{n[0]}{i}{n[1:]}": shape for i in (1, 2) for n, shape in shapes.items()}
        found = place.take(**named)
        if found is None:
            return None
        t1, a1, b1, t2, a2, b2 = found
        pairs = [(_core(t1, b1), a1.mT), (_core(t2, b2), a2.mT)]
    else:
        found = place.take(hada_w1_a=(out, r), hada_w1_b=(r, into), hada_w2_a=(out, r), hada_w2_b=(r, into))
        if found is None:
            return None
        pairs = [(found[1], found[0]), (found[3], found[2])]
    (A1, B1), (A2, B2) = (fit_rank(A, B) for A, B in pairs)
    used = A1.shape[0]
    method = LoHa(rank=used, alpha=alpha / r * used)
    return Item(place.site, method, {"A1": A1, "B1": B1, "A2": A2, "B2": B2})


def _write_loha(source: Source) -> Sent:
    A1, B1 = source.joined("A1", "B1")
    A2, B2 = source.joined("A2", "B2")
    scale, r = source.method.scale, A1.shape[0]
    if any(d.method.scale != scale for d in source.deltas):  # type: ignore[attr-defined]
        B2 = torch.cat([source.padded(d, d.B2 * (d.method.scale / scale)) for d in source.deltas], -1)  # type: ignore[attr-defined]
    tensors = {"hada_w1_a": B1, "hada_w1_b": A1, "hada_w2_a": B2, "hada_w2_b": A2}
    return tensors, {"r": r, "alpha": plain_number(scale * r)}


LOHA = Codec(
    kind="LOHA",
    methods=("loha",),
    layers=_LYCORIS,
    leaves=dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), ""),
    read=_read_loha,
    write=_write_loha,
    patterns=_RANKS,
    fixed={"use_effective_conv2d": False},
    training=("rank_dropout", "module_dropout"),
    differs=foreign_padding,
    slices=True,
)


_SCRAMBLED = (
    "PEFT multiplies a whole second factor [k, n, kernel] of a Conv1d as if the kernel were the input, which is no "
    "Kronecker product"
)

# --- LoKr ------------------------------------------------------------------------------------------------------------


def _read_lokr(place: Place) -> Item | None:
    config = place.reader.config
    r, alpha, factor = place.count("r", 8), place.number("alpha", 8), int(config.get("decompose_factor", -1))
    both = bool(config.get("decompose_both", False))
    method = LoKr(rank=r, alpha=alpha, factor=factor, decompose_both=both)
    (out, into), kernel = place.site.shape, kernel_of(place.layout)
    taps = torch.Size(kernel).numel()
    (rows, k), (m, n) = factor_pair(out, factor), factor_pair(into // taps, factor)
    tensors: dict[str, Tensor] = {}
    if both and r < max(rows, m) / 2:
        pair = place.take(lokr_w1_a=(rows, r), lokr_w1_b=(r, m))
        tensors |= dict(zip(("C1", "C2"), pair or (), strict=False))
    else:
        whole = place.take(lokr_w1=(rows, m))
        tensors |= {"C": whole[0]} if whole else {}
    if r >= max(k, n) / 2:
        if len(kernel) == 1:
            place.refuse(_SCRAMBLED)
            return None
        whole = place.take(lokr_w2=(k, n, *kernel))
        tensors |= {"D": whole[0].flatten(1)} if whole else {}
    elif _effective(place):
        core = place.take(lokr_t2=(r, r, *(*kernel, 1)[:2]), lokr_w2_a=(r, k), lokr_w2_b=(r, n))
        tensors |= {"D1": core[1].mT, "D2": _core(core[0], core[2])} if core else {}
    else:
        pair = place.take(lokr_w2_a=(k, r), lokr_w2_b=(r, n * taps))
        tensors |= dict(zip(("D1", "D2"), pair or (), strict=False))
    complete = {n[0] for n in tensors} == {"C", "D"}
    return Item(place.site, method, tensors) if complete else None


def _write_lokr(source: Source) -> Sent:
    names = {"C": "lokr_w1", "C1": "lokr_w1_a", "C2": "lokr_w1_b", "D": "lokr_w2", "D1": "lokr_w2_a", "D2": "lokr_w2_b"}
    if isinstance(source.method, KronA):
        names = {"A": "lokr_w1", "B": "lokr_w2"}
    tensors = {names[n]: t.detach() for n, t in source.delta._parameters.items() if t is not None}
    if "lokr_w2" in tensors:
        if len(kernel_of(source.layout)) == 1:
            raise ConfigError(_SCRAMBLED)
        D, kernel = tensors["lokr_w2"], kernel_of(source.layout)
        if D.shape[1] % torch.Size(kernel).numel():
            raise ConfigError(f"a2 = {tensors['lokr_w1'].shape[1]} cuts through the kernels, which PEFT keeps whole")
        tensors["lokr_w2"] = D.reshape(D.shape[0], -1, *kernel)
    method = source.method
    if isinstance(method, KronA):
        if not _splits([source]):
            sizes = tuple(tensors["lokr_w1"].shape)
            raise ConfigError(f"no decompose_factor of PEFT's makes a first factor of {sizes} here")
        return tensors, {}  # the fields follow from all sites together
    return tensors, {
        "r": method.rank,
        "alpha": plain_number(method.alpha or method.rank),
        "decompose_factor": method.factor,
        "decompose_both": method.decompose_both,
    }


def _splits(sources: Collection[Source]) -> set[int]:
    """Every decompose_factor by which PEFT splits both sides of all these sites as they do."""
    sides = {source.path: _sides(source) for source in sources}
    pairs = [pair for found in sides.values() for pair in found]
    # Above the square root of all sides, a number that divides none of them says what -1 does.
    tried = {-1, *(part for _, part in pairs), *range(1, isqrt(max(n for n, _ in pairs)) + 1)}
    tried |= {source.method.factor for source in sources if isinstance(source.method, LoKr)}
    return {f for f in tried if all(_makes(f, source, sides[source.path]) for source in sources)}


def _sides(source: Source) -> list[tuple[int, int]]:
    """(side, its part in the first factor) of rows and columns, the kernel left out."""
    into = source.site.shape[1] // torch.Size(kernel_of(source.layout)).numel()
    first = source.delta.A.shape if isinstance(source.method, KronA) else (1, 1)
    return list(zip((source.out, into), first, strict=True))


def _makes(factor: int, source: Source, sides: list[tuple[int, int]]) -> bool:
    if isinstance(source.method, LoKr):
        return factor == source.method.factor
    return all(factor_pair(n, factor)[0] == part for n, part in sides)


def _lokr_even(sent: dict[str, Sent], sources: Mapping[str, Source]) -> None:
    """The fields of KronA's sites: one factor for all, and a rank at which no factor is decomposed."""
    kron = {path: sources[path] for path in sent if isinstance(sources[path].method, KronA)}
    if not kron:
        return
    common = _splits([sources[path] for path in sent])
    if not common:
        sizes = ", ".join(f"{tuple(s.delta.A.shape)} at {path}" for path, s in list(kron.items())[:4])
        raise Unsupported(f"PEFT has one decompose_factor for all modules, and none gives KronA's sizes {sizes}")
    r = max((max(t.shape[:2]) + 1) // 2 for path in kron for t in sent[path][0].values())
    both = any(s.method.decompose_both for path, s in sources.items() if path not in kron)
    for path, source in kron.items():
        sent[path] = (
            sent[path][0],
            {
                "r": r,
                "alpha": plain_number(source.method.scale * r),
                "decompose_factor": min(common),
                "decompose_both": both,
            },
        )


LOKR = Codec(
    kind="LOKR",
    methods=("lokr", "krona"),
    layers=_LYCORIS,
    leaves=dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), ""),
    read=_read_lokr,
    write=_write_lokr,
    patterns=_RANKS,
    fixed={"use_effective_conv2d": False},
    even=_lokr_even,
    training=("rank_dropout", "module_dropout"),
    differs=foreign_padding,
)


# --- HiRA ------------------------------------------------------------------------------------------------------------


def _hira_names(owner: nn.Module) -> tuple[str, str]:
    return ("hira_embedding_A", "hira_embedding_B") if isinstance(owner, nn.Embedding) else ("hira_A", "hira_B")


def _read_hira(place: Place) -> Item | None:
    if isinstance(place.owner, nn.Embedding) and not is_stock(place.owner):
        place.refuse(f"PEFT adds its update after the forward of a {type(place.owner).__name__}, not to its table")
        return None
    out, into = place.site.shape
    a, b = _hira_names(place.owner)
    r = (place.shape(a) or (place.count("r", 32),))[0]  # PEFT writes a rank_pattern down and then ignores it
    kernel = kernel_of(place.layout)
    shapes = {a: (r, place.layout.shape[1], *kernel), b: (out, r, *(1,) * len(kernel))} if kernel else {}
    found = place.take(**(shapes or {a: (r, into), b: (out, r)}))
    if found is None:
        return None
    A, B = fit_rank(found[0].flatten(1), found[1].flatten(1))
    return Item(place.site, HiRA(rank=A.shape[0]), {"A": A, "B": B})


def _write_hira(source: Source) -> Sent:
    A, B = source.joined("A", "B")
    kernel = kernel_of(source.layout)
    if kernel:
        A, B = A.reshape(A.shape[0], -1, *kernel), B.view(*B.shape, *(1,) * len(kernel))
    return dict(zip(_hira_names(source.owner), (A, B), strict=True)), {"r": A.shape[0]}


def _hira_even(sent: dict[str, Sent], sources: Mapping[str, Source]) -> None:
    rank = max(fields["r"] for _, fields in sent.values())
    for path, (tensors, _) in sent.items():
        pairs = [(t, i) for i, t in enumerate(tensors.values())]  # A [r, ...], B [out, r, ...]
        sent[path] = dict(zip(tensors, widen(rank, *pairs), strict=True)), {"r": rank}


def _hira_differs(owner: nn.Module) -> str | None:
    if isinstance(owner, nn.Embedding) and owner.max_norm is not None:
        return "PEFT looks its update up without the table's max_norm"
    return foreign_padding(owner)


HIRA = Codec(
    kind="HIRA",
    methods=("hira",),
    layers=(nn.Linear, nn.Embedding, *Conv),
    hf_conv1d=True,
    leaves=dict.fromkeys(("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"), ""),
    read=_read_hira,
    write=_write_hira,
    even=_hira_even,
    training=("hira_dropout",),
    unfit=grouped,
    differs=_hira_differs,
    slices=True,
)
