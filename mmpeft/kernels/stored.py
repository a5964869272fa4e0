"""Groups of linears whose weights are stored some other way (in few bits): made dense for one product at a time.

`StoredGroup` answers as `packed.PackedGroup` does, but its [W | sB ; A] exists only from `load` until another group's
`load`: all groups share one `Ring`, an area of the largest group's size. Every product loads its group anew, in the forward and
again in the backward, so no dense copy of the model exists. A and sB, the compute copies, are each group's own.

Bytes a step: each weight is read packed and written dense, and both again in the backward. At 1.5B in NF4 that is
2 (.65 + 2.6) GB = 6.5 GB, 2.2 ms at 3 TB/s, beside GEMMs of 53 ms; the area is 57 MB, for weights of .68 GB instead of 2.6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.kernels.packed import PackedGroup

Fill = Callable[[Tensor], object]  # writes the dense weight into [out, in], rows any distance apart


class Stored(NamedTuple):
    """A weight that can be written out: its shape, dtype and device as it reads, and how."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    fill: Fill

    @staticmethod
    def of(weight: Tensor) -> Stored:
        """A dense weight, which is copied; the group leaves it where it lies."""
        return Stored((weight.shape[0], weight.shape[1]), weight.dtype, weight.device, lambda out: out.copy_(weight))


class Ring:
    """The area that groups take turns in; made at the first `load`, when the largest is known."""

    def __init__(self) -> None:
        self.size = 0
        self.area: Tensor | None = None

    def reserve(self, rows: int, leading: int) -> None:
        """Room for a group's buffer.

        Raises:
            ConfigError: the area is in use already and too small.
        """
        if self.area is not None and rows * leading > self.size:
            raise ConfigError("a group joins a ring that is in use: make all groups before the first product")
        self.size = max(self.size, rows * leading)

    def buffer(self, rows: int, leading: int, like: Tensor) -> Tensor:
        """The area as [rows, leading]."""
        if self.area is None:
            self.area = like.new_empty(self.size)
        return self.area[: rows * leading].view(rows, leading)


class StoredGroup(PackedGroup):
    """As `PackedGroup`, of weights that `ring` holds dense only while they are used.

    Args:
        weights: one dtype and device. biases, ranks, scales: as there.
    """

    def __init__(
        self,
        weights: Sequence[Stored],
        biases: Sequence[Tensor | None] | None,
        ranks: Sequence[int],
        scales: Sequence[float],
        *,
        ring: Ring,
    ) -> None:
        self._measure([w.shape for w in weights], ranks, scales)
        first = weights[0]
        self.fills, self.ring = [w.fill for w in weights], ring
        self.weights = []
        new = torch.zeros(self.out_features + self.in_features, self.rank, dtype=first.dtype, device=first.device)
        self.B, self.A = new[: self.out_features], new[self.out_features :].view(self.rank, self.in_features)
        self._copies()
        self._add_biases(biases)
        ring.reserve(self.buffer_rows, self.leading)
        self.loaded: Tensor | None = None

    def load(self) -> None:
        """Write the dense weights and the compute copies into the ring."""
        if self.loaded is None:
            self.loaded = self.ring.buffer(self.buffer_rows, self.leading, self.A)
            self._place(self.loaded)
            self.parts = self.W.split_with_sizes(self.outs)
        for fill, part in zip(self.fills, self.parts, strict=True):
            fill(part)
        R, out, n = self.rank, self.out_features, self.in_features
        self.loaded[:out, n : n + R].copy_(self.B)
        self.loaded[out : out + R, :n].copy_(self.A)
