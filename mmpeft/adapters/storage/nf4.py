"""4-bit NormalFloat with double quantisation (Dettmers et al. 2023, arXiv 2305.14314), in plain torch.

A weight is cut into blocks of 64; each value, divided by its block's largest |value|, becomes the index of the nearest
of 16 levels, and two indices share a byte (the first in the upper half, as in bitsandbytes). The blocks' scales,
minus their mean, are quantised again to 8 bits in blocks of 256: 4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight.

Choice: the second quantisation is to 8-bit floats (e4m3), as the paper says. bitsandbytes uses a table of its own; the
table is stored with the tensors, so its checkpoints are read by the same code (`from_bitsandbytes`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from mmpeft.errors import ConfigError, FileFormatError

# Quantiles of N(0, 1) scaled to [-1, 1], 8 on each side with 0 shared: the values of the paper's appendix E.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
E4M3_MAX = 448.0


@cache
def levels(device: torch.device) -> Tensor:
    """The 16 levels on a device, fp32."""
    return torch.tensor(LEVELS, device=device)


@cache
def e4m3(device: torch.device) -> Tensor:
    """All 256 bit patterns of e4m3 as numbers in [-1, 1] (its two NaNs as 0)."""
    values = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float() / E4M3_MAX
    return values.nan_to_num(0.0)


def pack4(codes: Tensor) -> Tensor:
    """Codes 0..15 [n] uint8 -> [ceil(n / 2)] bytes, the first of two in the upper half."""
    even = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    return even[0::2] << 4 | even[1::2]


def unpack4(packed: Tensor, n: int) -> Tensor:
    """The first n codes."""
    return torch.stack([packed >> 4, packed & 15], 1).flatten()[:n]


@dataclass(frozen=True)
class NF4:
    """Args:
    block: values that share a scale.
    double: quantise the scales too.
    nested_block: scales that share a scale.
    """

    block: int = 64
    double: bool = True
    nested_block: int = 256
    name: ClassVar[str] = "nf4"
    bits: ClassVar[float] = 4.0

    def __post_init__(self) -> None:
        if self.block < 1 or self.nested_block < 1:
            raise ConfigError(f"block {self.block}, nested_block {self.nested_block}; expected at least 1")

    def quantise(self, w: Tensor) -> dict[str, Tensor]:
        """A tensor of any shape -> packed codes and scales."""
        flat = _blocks(w.detach().float().flatten(), self.block)
        scale = flat.abs().amax(1)
        table = levels(flat.device)
        middle = (table[1:] + table[:-1]) / 2
        codes = torch.bucketize(flat / scale.clamp_min(1e-30).unsqueeze(1), middle).to(torch.uint8)
        out = {"codes": pack4(codes.flatten()[: w.numel()]), "table": table}
        if not self.double:
            return out | {"scale": scale}
        offset = scale.mean()
        centred = _blocks(scale - offset, self.nested_block)
        nested = centred.abs().amax(1)
        unit = centred / nested.clamp_min(1e-30).unsqueeze(1)
        eight = (unit * E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).flatten()[: scale.numel()]
        return out | {"scale_codes": eight, "scale_table": e4m3(w.device), "nested": nested, "offset": offset.view(1)}

    def dequantise(self, t: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """The fp32 tensor."""
        n = shape.numel()
        values = t["table"][unpack4(t["codes"].view(-1), n).int()]
        return (_blocks(values, self.block) * self.scales(t).unsqueeze(1)).flatten()[:n].view(shape)

    def scales(self, t: Mapping[str, Tensor]) -> Tensor:
        """The blocks' scales, fp32."""
        if "scale" in t:
            return t["scale"].float()
        codes = t["scale_codes"]
        scale = _blocks(t["scale_table"][codes.int()], self.nested_block) * t["nested"].unsqueeze(1)
        return scale.flatten()[: codes.numel()] + t["offset"]


def _blocks(flat: Tensor, block: int) -> Tensor:
    """[n] -> [ceil(n / block), block], padded with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def from_bitsandbytes(
    state: Mapping[str, Tensor], weight: str
) -> tuple[NF4, dict[str, Tensor], torch.Size, torch.dtype]:
    """One 4-bit weight of a bitsandbytes checkpoint: its scheme, tensors, shape and dtype.

    Args:
        state: a state dict with `weight` and its companions `<weight>.absmax`, `.nested_absmax`, `.nested_quant_map`,
            `.quant_state.bitsandbytes__nf4`.
        weight: e.g. "model.layers.0.self_attn.q_proj.weight".

    Raises:
        FileFormatError: a companion is missing, or the type is not NF4.
    """
    key = f"{weight}.quant_state.bitsandbytes__nf4"
    if key not in state:
        raise FileFormatError(f"no {key}: {weight} is not an NF4 weight of bitsandbytes")
    about = json.loads(bytes(state[key].tolist()))
    shape = torch.Size(about["shape"])
    nested = "nested_blocksize" in about
    needed = [weight, f"{weight}.absmax"]
    needed += [f"{weight}.nested_absmax", f"{weight}.nested_quant_map"] if nested else []
    if missing := [k for k in needed if k not in state]:
        raise FileFormatError(f"the checkpoint lacks {', '.join(missing)}")
    scheme = NF4(about["blocksize"], nested, about.get("nested_blocksize", 256))
    codes, absmax = state[weight].reshape(-1).view(torch.uint8), state[f"{weight}.absmax"]
    tensors = {"codes": codes, "table": levels(codes.device)}
    if nested:
        tensors |= {
            "scale_codes": absmax,
            "scale_table": state[f"{weight}.nested_quant_map"].float(),
            "nested": state[f"{weight}.nested_absmax"].float(),
            "offset": torch.tensor([about["nested_offset"]], dtype=torch.float32),
        }
    else:
        tensors["scale"] = absmax.float()
    return scheme, tensors, shape, getattr(torch, about["dtype"])
