"""OFT, BOFT, HRA: rotations and reflections of a weight's inputs, as PEFT stores them.

    OFT    oft_R.weight [blocks, b (b - 1) / 2], the upper triangle of the skew matrix; oft_embedding_R.weight
    BOFT   boft_R [m, blocks, b, b], of which the skew part counts; boft_s [out, 1], convolutions [1, out]
    HRA    hra_u [in, r]

PEFT's exact Cayley transform turns by (I + Q)(I - Q)^-1 as ours does, its Neumann series by the same at -Q.

Where PEFT is wrong. OFT on kernels above 1 unfolds the image, turns the patches and folds them again, which counts
overlapping pixels several times: its forward is no convolution, while its merge gives the weight of the definition,
which is what is read. Three Neumann terms compute what four do, and two I + 2 Q, which belongs to no series. BOFT
without its CUDA extension makes every adapter one factor, whatever the configuration says. Convolutions of BOFT and HRA
run with the first number of stride and padding, without dilation, and take every kernel for square.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmpeft.adapters.methods.orthogonal import BOFT, HRA, OFT, skew
from mmpeft.adapters.peft.codec import Codec, Place, Sent, Source, blocks_of_one_kind
from mmpeft.adapters.peft.codecs import Item
from mmpeft.adapters.peft.layers import grouped, oblong, square_only
from mmpeft.errors import ConfigError

_RADIUS = 6e-5  # PEFT's default of eps


# --- OFT -------------------------------------------------------------------------------------------------------------


def _oft_name(owner: nn.Module) -> str:
    return "oft_embedding_R" if isinstance(owner, nn.Embedding) else "oft_R"


def _read_oft(place: Place) -> Item | None:
    config, name = place.reader.config, _oft_name(place.owner)
    embedding = isinstance(place.owner, nn.Embedding)
    size = place.site.shape[0 if embedding else 1]
    share = bool(config.get("block_share", False))
    # PEFT moves a block size that does not divide to one that does; the file says which.
    numbers = (place.shape(name) or (0, 0))[-1]
    block = int((1 + (1 + 8 * numbers) ** 0.5) / 2)
    blocks = 1 if share else size // max(block, 1)
    found = place.take(**{name: (blocks, block * (block - 1) // 2)})
    if found is None:
        return None
    terms = place.count("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else None
    if terms in (1, 2):
        place.refuse(f"{terms} Neumann terms are {'nothing' if terms == 1 else 'I + 2 Q'} in PEFT, no rotation")
        return None
    terms = 4 if terms == 3 else terms
    method = OFT(
        block_size=block,
        share=share,
        eps=place.number("eps", _RADIUS) if config.get("coft") else None,
        side="out" if embedding else "in",
        neumann=terms,
    )
    return Item(place.site, method, {"Q": found[0] if terms is None else -found[0]})


def _write_oft(source: Source) -> Sent:
    method, embedding = source.method, isinstance(source.owner, nn.Embedding)
    if method.side != ("out" if embedding else "in"):
        raise ConfigError(f"PEFT turns the {'width of an embedding' if embedding else 'input of a layer'} only")
    Q = source.delta.Q.detach()
    tensors = {_oft_name(source.owner): Q if method.neumann is None else -Q}
    return tensors, {
        "r": 0,
        "oft_block_size": method.block_size,
        "block_share": method.share,
        "coft": method.eps is not None,
        "eps": _RADIUS if method.eps is None else method.eps,
        "use_cayley_neumann": method.neumann is not None,
        "num_cayley_neumann_terms": method.neumann or 5,
    }


def _oft_unfit(owner: nn.Module) -> str | None:
    if isinstance(owner, nn.Conv2d) and owner.dilation[0] > 1:
        return "PEFT has no OFT for dilated convolutions"
    return grouped(owner) or oblong(owner)


def _oft_differs(owner: nn.Module) -> str | None:
    if isinstance(owner, nn.Conv2d) and owner.kernel_size != (1, 1):
        return "PEFT folds turned patches of the image back, counting overlaps several times; that is no convolution"
    return "PEFT has no OFT for sparse tables" if isinstance(owner, nn.Embedding) and owner.sparse else None


def _oft_even(sent: dict[str, Sent], sources: Mapping[str, Source]) -> None:
    side = {p: s.site.shape[0 if isinstance(s.owner, nn.Embedding) else 1] for p, s in sources.items()}
    blocks_of_one_kind(sent, "oft_block_size", "r", side.__getitem__)


OFT_CODEC = Codec(
    kind="OFT",
    methods=("oft",),
    layers=(nn.Linear, nn.Embedding, nn.Conv2d),
    leaves={"oft_R": ".weight", "oft_embedding_R": ".weight"},
    read=_read_oft,
    write=_write_oft,
    even=_oft_even,
    fixed={"bias": "none"},
    training=("module_dropout",),
    unfit=_oft_unfit,
    differs=_oft_differs,
)


# --- BOFT ------------------------------------------------------------------------------------------------------------


def _read_boft(place: Place) -> Item | None:
    out, into = place.site.shape
    block, count = int(place.value("boft_block_size", 4)), int(place.value("boft_block_num", 0))
    block = block or into // max(count, 1)
    m = (place.shape("boft_R") or (1,))[0]  # what PEFT made of boft_n_butterfly_factor
    gains = (1, out) if isinstance(place.owner, nn.Conv2d) else (out, 1)
    found = place.take(boft_R=(m, into // block, block, block), boft_s=gains)
    if found is None:
        return None
    R, s = found
    i, j = torch.triu_indices(block, block, 1)
    return Item(place.site, BOFT(block_size=block, m=m), {"Q": ((R - R.mT) / 2)[..., i, j], "s": s.flatten()})


def _write_boft(source: Source) -> Sent:
    method, delta = source.method, source.delta
    s = delta.s.detach() if method.scale else torch.ones(source.out, dtype=delta.Q.dtype, device=delta.Q.device)
    gains = s.unsqueeze(0) if isinstance(source.owner, nn.Conv2d) else s.unsqueeze(1)
    return {"boft_R": skew(delta.Q.detach(), method.block_size), "boft_s": gains}, {
        "boft_block_size": method.block_size,
        "boft_block_num": 0,
        "boft_n_butterfly_factor": method.m,
    }


BOFT_CODEC = Codec(
    kind="BOFT",
    methods=("boft",),
    layers=(nn.Linear, nn.Conv2d),
    leaves={"boft_R": "", "boft_s": ""},
    read=_read_boft,
    write=_write_boft,
    even=lambda sent, sources: blocks_of_one_kind(
        sent, "boft_block_size", "boft_block_num", lambda path: sources[path].site.shape[1]
    ),
    fixed={"bias": "none"},
    training=("boft_dropout",),
    unfit=lambda owner: grouped(owner) or oblong(owner),
    differs=square_only,
)


# --- HRA -------------------------------------------------------------------------------------------------------------


def _read_hra(place: Place) -> Item | None:
    r, (_, into) = place.count("r", 8), place.site.shape
    found = place.take(hra_u=(into, r))
    if found is None:
        return None
    u = found[0].mT
    return Item(place.site, HRA(rank=r), {"u": _orthonormal(u) if place.reader.config.get("apply_GS") else u})


def _orthonormal(u: Tensor) -> Tensor:
    """Gram-Schmidt over the rows: PEFT then reflects by I - 2 U U^T, the product of the orthonormal reflections."""
    rows: Tensor = torch.linalg.qr(u.double().mT)[0].mT.to(u.dtype)  # up to signs, which no reflection sees
    return rows


HRA_CODEC = Codec(
    kind="HRA",
    methods=("hra",),
    layers=(nn.Linear, nn.Conv2d),
    leaves={"hra_u": ""},
    read=_read_hra,
    write=lambda source: ({"hra_u": source.delta.u.detach().mT}, {"r": source.method.rank}),
    fixed={"bias": "none", "apply_GS": False},
    unfit=lambda owner: grouped(owner) or oblong(owner),
    differs=square_only,
)
