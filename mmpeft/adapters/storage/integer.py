"""Integer and float storage of weights: absmax (symmetric) and affine grids, 2, 4 or 8 bits, by row or group; 8 and 16
bit floats.

Int(8)                 W = scale * code, code in -127..127, a scale a row
Int(4, group=32)       a scale for every 32 columns
Int(4, affine=True)    W = scale * code + zero, code in 0..15 (QA-LoRA's (alpha, beta))
FP8()                  float8 e4m3, a scale a row
BF16()                 bfloat16, no scale: the "16" of a bit allocation on a base that is wider
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmpeft.adapters.storage.nf4 import E4M3_MAX
from mmpeft.errors import ConfigError

SMALLEST = 1e-30  # scale of a row or group whose numbers are all alike


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits [n] uint8 -> bytes, the first in the upper bits; 8 bits as they are."""
    each = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.numel() % each)).view(-1, each)
    out = torch.zeros_like(padded[:, 0])
    for i in range(each):
        out = out | padded[:, i] << (8 - bits * (i + 1))
    return out


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first n codes."""
    each = 8 // bits
    parts = [packed >> (8 - bits * (i + 1)) & (2**bits - 1) for i in range(each)]
    return torch.stack(parts, 1).flatten()[:n]


@dataclass(frozen=True)
class Int:
    """Round to nearest on a grid for each row or group of a matrix.

    Args:
        bits: 2, 4 or 8.
        group: columns that share a scale; None is a whole row. Divides the columns.
        affine: a zero point too, over the group's minimum and maximum; else symmetric over its largest |value|.
    """

    bits: int = 8
    group: int | None = None
    affine: bool = False
    name: ClassVar[str] = "int"

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ConfigError(f"bits {self.bits}; expected 2, 4 or 8")
        if self.group is not None and self.group < 1:
            raise ConfigError(f"group {self.group}; expected at least 1")

    @property
    def top(self) -> int:
        """Largest code of the symmetric grid."""
        return int(2 ** (self.bits - 1)) - 1

    def grouped(self, w: Tensor) -> Tensor:
        """[out, in] -> [out, groups, group].

        Raises:
            ConfigError: a group that does not divide the columns.
        """
        rows = w.reshape(w.shape[0], -1)
        group = self.group or rows.shape[1]
        if rows.shape[1] % group:
            raise ConfigError(f"group {group} does not divide the {rows.shape[1]} columns of a weight {tuple(w.shape)}")
        return rows.reshape(len(rows), -1, group)

    def quantise(self, w: Tensor) -> dict[str, Tensor]:
        """A matrix (or [out, ...]) -> packed codes, scale [out, groups] and, if affine, zero."""
        x = self.grouped(w.detach().float())
        if self.affine:
            low, high = x.amin(-1), x.amax(-1)
            scale = ((high - low) / (2**self.bits - 1)).clamp_min(SMALLEST)
            codes = ((x - low.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, 2**self.bits - 1)
            return {"codes": pack(codes.to(torch.uint8).flatten(), self.bits), "scale": scale, "zero": low}
        scale = (x.abs().amax(-1) / self.top).clamp_min(SMALLEST)
        codes = (x / scale.unsqueeze(-1)).round().clamp(-self.top, self.top) + self.top
        return {"codes": pack(codes.to(torch.uint8).flatten(), self.bits), "scale": scale}

    def integers(self, t: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """The integer of each entry, [out, groups, group] fp32; symmetric ones are signed."""
        codes = unpack(t["codes"], self.bits, shape.numel()).float()
        codes = codes if self.affine else codes - self.top
        return codes.view(shape[0], t["scale"].shape[1], -1)

    def dequantise(self, t: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """The fp32 tensor."""
        x = self.integers(t, shape) * t["scale"].float().unsqueeze(-1)
        return (x + t["zero"].float().unsqueeze(-1) if self.affine else x).reshape(shape)


@dataclass(frozen=True)
class FP8:
    """float8 e4m3 with a scale a row that takes the row's largest |value| to 448."""

    name: ClassVar[str] = "fp8"
    bits: ClassVar[float] = 8.0

    def quantise(self, w: Tensor) -> dict[str, Tensor]:
        """A matrix (or [out, ...]) -> codes (the bytes of float8) and scale [out]."""
        rows = w.detach().float().reshape(w.shape[0], -1)
        scale = (rows.abs().amax(1) / E4M3_MAX).clamp_min(SMALLEST)
        return {"codes": (rows / scale.unsqueeze(1)).to(torch.float8_e4m3fn).view(torch.uint8), "scale": scale}

    def dequantise(self, t: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """The fp32 tensor."""
        rows = t["codes"].view(torch.float8_e4m3fn).float() * t["scale"].float().unsqueeze(1)
        return rows.reshape(shape)


@dataclass(frozen=True)
class BF16:
    """bfloat16 numbers, 2 bytes each, of a base that is wider (fp32): rounded once, read as the base's own type."""

    name: ClassVar[str] = "bf16"
    bits: ClassVar[float] = 16.0

    def quantise(self, w: Tensor) -> dict[str, Tensor]:
        """A tensor of any shape -> its numbers in bfloat16."""
        return {"codes": w.detach().to(torch.bfloat16, memory_format=torch.contiguous_format, copy=True)}

    def dequantise(self, t: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """The fp32 tensor."""
        return t["codes"].float().view(shape)
